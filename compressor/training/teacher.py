"""Teacher of healing, in which all blocks are trained together until the model's output
distribution is that of the original again.

References: training only what the compressed linears store is WeLore's (arXiv 2407.11239) and
ROCKET's (arXiv 2602.11008). `losses` has what is minimised.

The original is not kept as a second model: its final hidden states are cached, and its logits come
from them through its own head, a chunk of positions at a time.

Memory: windows × length × hidden size × 4 bytes for these states, of which no more than the cache
allows is held in memory, a few times the logits of one chunk of positions, and the activations,
gradients and moments of all blocks.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compressor.evaluation.perplexity import kl_sum
from compressor.models.head import Head
from compressor.models.install import installed
from compressor.resume.spill import Cache
from compressor.training.learners import collect_leaves


class Teacher:
    """Logits and block outputs of the original model, frozen at construction."""

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[Tensor],
        keep: bool = True,
        cache: Cache | None = None,
    ):
        """Freeze the model as it is now.

        Args:
            batches: (batch, length) int64, on the model's device.
            keep: keep the final hidden states in `cache`; else every question is a pass.

        Raises:
            CompressorError: the head of this architecture cannot be run alone.
        """
        self.model, self.batches, self.head = model, list(batches), Head(model)
        self.dense = {
            name: module
            for name, module in collect_leaves(model, {}, [model]).items()
            if len(module._parameters)
        }
        self.outside = self.head.outside  # the head may be compressed
        self.states = (Cache() if cache is None else cache).batches(
            len(self.batches) if keep else 0
        )
        with torch.no_grad():
            for index, batch in enumerate(self.batches[: len(self.states)]):
                self.states[index] = self.head.hidden(batch)

    def hidden(self, index: int) -> Tensor:
        """Return the final hidden states (batch · length, hidden) of the original for one batch."""
        states = self.states[index] if self.states else self.run(index)[0]
        return states.flatten(0, 1)

    @torch.no_grad()
    def logits(self, index: int, hidden: Tensor, rows: slice) -> Tensor:
        """Compute the logits (rows, vocabulary) of the original at some positions of one batch.

        hidden: (batch · length, hidden), as `hidden` returns it.
        """
        with installed(self.model, self.outside):
            return self.head.logits(hidden[rows], self.batches[index].flatten()[rows])

    def run(self, index: int) -> tuple[Tensor, list[Any]]:
        """Compute the final hidden states (batch, length, hidden) of the original for one batch,
        and what each of its blocks returns, in a pass of its own.
        """
        with installed(self.model, self.dense):
            return self.head.block_outputs(self.batches[index])

    @torch.no_grad()
    def divergence(self) -> float:
        """Measure KL(original‖model as it is now), nats per token, mean over all positions of all
        batches, as `perplexity.compare`.
        """
        total = 0.0
        for index, batch in enumerate(self.batches):
            expected, ids = self.hidden(index), batch.flatten()
            hidden = self.head.hidden(batch).flatten(0, 1)
            for rows in self.head.chunks(len(ids)):
                log_q = self.head.logits(hidden[rows], ids[rows])
                total += kl_sum(self.logits(index, expected, rows), log_q).item()
        return total / sum(batch.numel() for batch in self.batches)
