"""The loss of healing: how far the model's output, and the outputs of its blocks, are from those of
the original.

References: label-free divergence from the original's logits after Minitron (arXiv 2407.14679); the
feature loss is PELA's (arXiv 2310.10700; healing card 8.2); the largest logits of the original and
one outcome for all others in place of its distribution, card §8.

Minimises the mean over positions of KL(original‖model), in nats, or of the cross-entropy of the
next token, or of their sum; plus `features` times the mean over blocks and positions of ‖h − ĥ‖² /
‖h‖², h (hidden,) the output of a block in the original, ĥ in the model.

`teacher: cached` keeps of the original's distribution the `top` likeliest tokens and their logits,
and the rest as one more outcome. The divergence of such coarser distributions is never larger than
that of the whole ones, and the same where `top` is the vocabulary.

Differs from PELA: each position is divided by the original's energy there (as in `repair`): a few
positions with massive activations are nearly all of the variance of a block. No perturbation term.
Differs from the card's 390 bytes for a position (16 bits for a logit): 8 · `top` + 4, since a
student that is the teacher has neither loss nor gradient only where logits are what they were.

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
from compressor.training.repair import hidden
from compressor.training.teacher import Original


class Objective:
    """The loss that a section of a recipe describes, on batches of which the original is known."""

    def __init__(self, original: Original, section: Heal):
        self.original, self.section = original, section
        self.known: dict[
            int, tuple[Tensor, Tensor]
        ] = {}  # batch → likeliest tokens int32, coarse logits; filled as batches come

    def loss(self, index: int) -> Tensor:
        """Loss of the model as it is now on one batch, with autograd."""
        model, batch = self.original.model, self.original.batches[index]
        wanted = self.original.run(index)[1] if self.section.features else []
        with watching(blocks(model)[1]) as found:
            logits = model(input_ids=batch, use_cache=False).logits
        total = logits.new_zeros(())
        if self.section.loss in ("kl", "both"):
            total = total + self.divergence(index, logits) / batch.numel()
        if self.section.loss in ("ce", "both"):
            total = total + functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()
            )
        if wanted:
            parts = [
                distance(hidden(output), hidden(expected))
                for output, expected in zip(found, wanted, strict=True)
            ]
            total = total + self.section.features * torch.stack(parts).mean()
        return total

    def divergence(self, index: int, logits: Tensor) -> Tensor:
        """KL(original‖model) summed over positions, or between what the cached teacher tells
        apart.
        """
        if self.section.teacher == "online":
            return Divergence.apply(logits, self.original.logits(index))
        if index not in self.known:
            expected = self.original.logits(index)
            tokens = expected.topk(min(self.section.top, expected.shape[-1])).indices
            self.known[index] = tokens.int(), coarse(expected, tokens)
        tokens, expected = self.known[index]
        return Divergence.apply(coarse(logits, tokens.long()), expected)


def coarse(logits: Tensor, tokens: Tensor) -> Tensor:
    """Logits (…, k + 1) of `tokens` (…, k) and of all other outcomes together; (…, k) if there are
    no others. logits: (…, vocabulary).
    """
    chosen = logits.gather(-1, tokens)
    if tokens.shape[-1] == logits.shape[-1]:
        return chosen
    return torch.cat(
        [chosen, logits.scatter(-1, tokens, -torch.inf).logsumexp(-1, keepdim=True)], -1
    )


def distance(found: Tensor, expected: Tensor) -> Tensor:
    """Mean over positions of ‖h − ĥ‖² / ‖h‖²; outputs (batch, length, hidden)."""
    energy = expected.square().sum(-1).clamp(min=torch.finfo(expected.dtype).tiny)
    return ((found - expected).square().sum(-1) / energy).mean()


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
