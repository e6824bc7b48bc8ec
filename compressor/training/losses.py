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

Memory: `cached`, those bytes for each position, in place of the hidden size × 4 of `online`; a few
times the logits of one chunk of positions. Where a batch has more than one chunk, the backward pass
computes the logits of each again. With `features` the original runs again in each step, which costs
no memory but the outputs of all blocks for one batch, twice, and a third of the time.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from compressor.models.head import NO_LABEL, next_tokens
from compressor.models.linears import blocks
from compressor.models.partial_forward import watching
from compressor.recipe.training import Heal
from compressor.training.repair import hidden_states
from compressor.training.teacher import Teacher

CHUNK = 1 << 28  # bytes of the logits of one chunk; a batch that fits needs no second pass


class Objective:
    """Loss that a section of a recipe describes, on the batches of a teacher."""

    def __init__(self, teacher: Teacher, section: Heal):
        self.teacher, self.section = teacher, section
        # batch → likeliest tokens (positions, top) int32, coarse logits; filled as batches come
        self.cached: dict[int, tuple[Tensor, Tensor]] = {}

    def loss(self, index: int) -> Tensor:
        """Compute the loss of the model as it is now on one batch, with autograd."""
        teacher, batch = self.teacher, self.teacher.batches[index]
        features = teacher.run(index)[1] if self.section.features else []
        with watching(blocks(teacher.model)[1]) as outputs:
            hidden = teacher.head.hidden(batch).flatten(0, 1)
        answer = self._answer(index) if self.section.loss in ("kl", "both") else None
        chunks = list(teacher.head.chunks(len(hidden), CHUNK))
        if len(chunks) == 1:
            total = self._chunk_loss(index, chunks[0], hidden, answer)
        else:
            again = partial(
                checkpoint, self._chunk_loss, use_reentrant=False, preserve_rng_state=False
            )
            total = torch.stack([again(index, rows, hidden, answer) for rows in chunks]).sum()
        if features:
            distances = [
                feature_distance(hidden_states(output), hidden_states(expected))
                for output, expected in zip(outputs, features, strict=True)
            ]
            total = total + self.section.features * torch.stack(distances).mean()
        return total

    def _answer(self, index: int) -> tuple[Tensor, ...]:
        """Return what the teacher knows of one batch: final hidden states (positions, hidden) if it
        is online, else its likeliest tokens (positions, top) and coarse logits.
        """
        teacher = self.teacher
        if self.section.teacher == "online":
            return (teacher.hidden(index),)
        if index not in self.cached:
            hidden = teacher.hidden(index)
            pieces = []
            for rows in teacher.head.chunks(len(hidden), CHUNK):
                logits = teacher.logits(index, hidden, rows)
                tokens = logits.topk(min(self.section.top, logits.shape[-1])).indices
                pieces.append((tokens.int(), coarsen(logits, tokens)))
            tokens, expected = (torch.cat(tensors) for tensors in zip(*pieces, strict=True))
            self.cached[index] = tokens, expected
        return self.cached[index]

    def _chunk_loss(
        self, index: int, rows: slice, hidden: Tensor, answer: tuple[Tensor, ...] | None
    ) -> Tensor:
        """Compute the share of some positions in the loss of one batch, with autograd.

        Args:
            index: the batch.
            rows: the positions.
            hidden: (positions, hidden), final hidden states of the model at all positions.
            answer: as `_answer` returns it; None where the loss needs no teacher.
        """
        batch = self.teacher.batches[index]
        logits = self.teacher.head.logits(hidden[rows], batch.flatten()[rows])
        total = logits.new_zeros(())
        if answer is not None:
            total = total + self._divergence(index, rows, logits, answer) / batch.numel()
        if self.section.loss in ("ce", "both"):
            labels = next_tokens(batch)[rows]
            nll = functional.cross_entropy(logits, labels, ignore_index=NO_LABEL, reduction="sum")
            total = total + nll / (batch.numel() - len(batch))
        return total

    def _divergence(
        self, index: int, rows: slice, logits: Tensor, answer: tuple[Tensor, ...]
    ) -> Tensor:
        """Compute KL(original‖model) summed over some positions, or between what the cached teacher
        tells apart. logits: (rows, vocabulary).
        """
        if self.section.teacher == "online":
            return Divergence.apply(logits, self.teacher.logits(index, answer[0], rows))
        tokens, expected = answer
        return Divergence.apply(coarsen(logits, tokens[rows].long()), expected[rows])


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
