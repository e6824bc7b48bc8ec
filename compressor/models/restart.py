"""Cached block outputs of a model, for measuring changes to a block at the price of the blocks
behind it.
"""

from typing import Any

from torch import Tensor

from compressor.models.head import Head
from compressor.models.partial_forward import require_restartable


class Restart:
    """Block outputs of a model as it was when they were cached, batch by batch.

    Memory: blocks × windows × length × hidden size numbers in the dtype of the forward pass, on the
    device of the model.
    """

    def __init__(self, head: Head, batches: list[Tensor], cure: str):
        """Run the model on each of `batches`, (batch, length) int64, and keep every block's output.

        Raises CompressorError, ending with `cure`, if a restart in the middle does not reproduce
        the hidden states: then blocks of this architecture pass each other more than their output.
        """
        self.head, self.batches = head, batches
        self.outputs: list[list[Any]] = []
        self.hidden: list[Tensor] = []  # final hidden states, (batch, length, hidden)
        for index, batch in enumerate(batches):
            hidden, outputs = head.block_outputs(batch)
            self.outputs.append(outputs)
            self.hidden.append(hidden)
            if index == 0:
                restarted = self.hidden_from((len(outputs) + 1) // 2, index)
                require_restartable(head.model, hidden, restarted, cure)

    def hidden_from(self, block: int, index: int) -> Tensor:
        """Final hidden states (batch, length, hidden) of batch `index`, computed from `block` on
        with the modules now in the model.
        """
        return self.head.hidden_from(block, self.outputs[index], self.batches[index])
