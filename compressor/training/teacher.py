"""Teacher of healing, in which all blocks are trained together until the model's output
distribution is that of the original again.

References: training only what the compressed linears store is WeLore's (arXiv 2407.11239) and
ROCKET's (arXiv 2602.11008). `losses` has what is minimised.

The original is not kept as a second model: the outputs of its last block are cached, and its logits
come from them through its own norm and head.

Memory: windows × length × hidden size × 4 bytes for these outputs, of which no more than the cache
allows is held in memory, the logits of one batch three times, and the activations, gradients and
moments of all blocks.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compressor.evaluation.perplexity import kl_sum
from compressor.models.install import installed
from compressor.models.linears import blocks
from compressor.models.partial_forward import block_outputs, forward_from, require_restartable
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
            keep: keep the outputs of the last block in `cache`; else every question is a pass.

        Raises:
            CompressorError: passes through this architecture cannot be restarted behind its blocks.
        """
        self.model, self.batches = model, list(batches)
        self.depth = len(blocks(model)[1])
        prefix = f"{blocks(model)[0]}."
        self.dense = {
            name: module
            for name, module in collect_leaves(model, {}, [model]).items()
            if len(module._parameters)
        }
        # The head may be compressed.
        self.outside = {
            name: module for name, module in self.dense.items() if not name.startswith(prefix)
        }
        self.last_outputs = (Cache() if cache is None else cache).batches(
            len(self.batches) if keep else 0
        )
        for index, batch in enumerate(self.batches[: len(self.last_outputs)]):
            logits, outputs = block_outputs(model, batch)
            self.last_outputs[index] = outputs[-1]
            if index == 0:
                require_restartable(model, logits, self.logits(0), "switch repair and heal off")

    def logits(self, index: int) -> Tensor:
        """Compute the logits (batch, length, vocabulary) of the original for one batch."""
        if not self.last_outputs:
            return self.run(index)[0]
        with installed(self.model, self.outside):
            return forward_from(
                self.model, self.depth, [self.last_outputs[index]] * self.depth, self.batches[index]
            )

    def run(self, index: int) -> tuple[Tensor, list[Any]]:
        """Compute the logits of the original for one batch, and what each of its blocks returns, in
        a pass of its own.
        """
        with installed(self.model, self.dense):
            return block_outputs(self.model, self.batches[index])

    @torch.no_grad()
    def divergence(self) -> float:
        """Measure KL(original‖model as it is now), nats per token, mean over all positions of all
        batches, as `perplexity.compare`.
        """
        total = 0.0
        for index, batch in enumerate(self.batches):
            total += kl_sum(
                self.logits(index), self.model(input_ids=batch, use_cache=False).logits
            ).item()
        return total / sum(batch.numel() for batch in self.batches)
