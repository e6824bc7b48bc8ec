"""Loss of healing: how far the model's output, and the outputs of its blocks, are from those of the
original.

References: label-free divergence from the original's logits after Minitron (arXiv 2407.14679); the
feature loss is PELA's (arXiv 2310.10700).

Minimises the mean over positions of KL(original‖model), in nats, or of the cross-entropy of the
next token, or of their sum; plus `features` times the mean over blocks and positions of ‖h − ĥ‖² /
‖h‖², h (hidden,) the output of a block in the original, ĥ in the model.

`teacher: cached` keeps of the original's distribution the `top` likeliest tokens and their logits,
and the rest as one more outcome. The divergence of such coarser distributions is never larger than
that of the whole ones, and the same where `top` is the vocabulary.

Differs from PELA: each position is divided by the original's energy there (as in `repair`): a few
positions with massive activations are nearly all of the variance of a block. No perturbation term.
A cached position takes 8 · `top` + 4 bytes: logits keep 32 bits, since a student that is the
teacher has neither loss nor gradient only where logits are what they were.

Memory: `cached`, those bytes for each position, in place of the hidden size × 4 of `online`; the
logits of one batch three times. With `features` the original runs again in each step, which costs
no memory but the outputs of all blocks for one batch, twice, and a third of the time.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from compressor.models.linears import blocks
from compressor.models.partial_forward import watching
from compressor.recipe.training import Heal
from compressor.training.repair import hidden_states
from compressor.training.teacher import Teacher


class Objective:
    """Loss that a section of a recipe describes, on the batches of a teacher."""

    def __init__(self, teacher: Teacher, section: Heal):
        self.teacher, self.section = teacher, section
        # batch → likeliest tokens int32, coarse logits; filled as batches come
        self.cached: dict[int, tuple[Tensor, Tensor]] = {}

    def loss(self, index: int) -> Tensor:
        """Compute the loss of the model as it is now on one batch, with autograd."""
        model, batch = self.teacher.model, self.teacher.batches[index]
        features = self.teacher.run(index)[1] if self.section.features else []
        with watching(blocks(model)[1]) as outputs:
            logits = model(input_ids=batch, use_cache=False).logits
        total = logits.new_zeros(())
        if self.section.loss in ("kl", "both"):
            total = total + self.divergence(index, logits) / batch.numel()
        if self.section.loss in ("ce", "both"):
            total = total + functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()
            )
        if features:
            distances = [
                feature_distance(hidden_states(output), hidden_states(expected))
                for output, expected in zip(outputs, features, strict=True)
            ]
            total = total + self.section.features * torch.stack(distances).mean()
        return total

    def divergence(self, index: int, logits: Tensor) -> Tensor:
        """Compute KL(original‖model) summed over positions, or between what the cached teacher
        tells apart. logits: (batch, length, vocabulary).
        """
        if self.section.teacher == "online":
            return Divergence.apply(logits, self.teacher.logits(index))
        if index not in self.cached:
            expected = self.teacher.logits(index)
            tokens = expected.topk(min(self.section.top, expected.shape[-1])).indices
            self.cached[index] = tokens.int(), coarsen(expected, tokens)
        tokens, expected = self.cached[index]
        return Divergence.apply(coarsen(logits, tokens.long()), expected)


def coarsen(logits: Tensor, tokens: Tensor) -> Tensor:
    """Gather the logits of some tokens, and of all other outcomes together as one more.

    Args:
        logits: (…, vocabulary).
        tokens: (…, k) int64.

    Returns:
        (…, k + 1), or (…, k) if there are no other outcomes.
    """
    chosen = logits.gather(-1, tokens)
    if tokens.shape[-1] == logits.shape[-1]:
        return chosen
    others = logits.scatter(-1, tokens, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([chosen, others], -1)


def feature_distance(output: Tensor, expected: Tensor) -> Tensor:
    """Compute the mean over positions of ‖h − ĥ‖² / ‖h‖²; outputs (batch, length, hidden)."""
    energy = expected.square().sum(-1).clamp(min=torch.finfo(expected.dtype).tiny)
    return ((output - expected).square().sum(-1) / energy).mean()


class Divergence(torch.autograd.Function):
    """KL(p‖q) summed over positions, of logits (…, vocabulary) of q and of p, with gradients for q.

    The gradient q − p is exactly zero where the logits agree. That of a composed loss is rounding
    noise there, which AdamW, whose steps do not shrink with the gradient, would make large.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, expected: Tensor) -> Tensor:
        log_q, log_p = functional.log_softmax(logits, -1), functional.log_softmax(expected, -1)
        ctx.save_for_backward(log_q, log_p)
        return torch.where(log_p.isneginf(), 0.0, log_p.exp() * (log_p - log_q)).sum()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None]:
        log_q, log_p = ctx.saved_tensors
        return scale * (log_q.exp() - log_p.exp()), None
