"""Supports that learn: which entries of a sparse matrix are stored is chosen anew at every step,
from a dense latent.

References: the straight-through factorizer of DSFormer (arXiv 2312.13211).

Glossary
    latent C̃     (rows, columns) the stored entries, and numbers that are zero at the start
                  outside their mask; of Ŵ for sparse storage, of the codes for a dictionary, also
                  where a residual is added to either
    support M     Π(C̃), the largest entries of C̃ in size, as many as are stored, in each group of
                  the stored pattern
    projected Ŝ   C̃ ⊙ M, which the model runs with; ∂loss/∂C̃ := ∂loss/∂Ŝ, also outside M, while
                  atoms get their true gradient

Patterns: the shortest run of consecutive entries of a row of which every one holds the same number
(so 2:4 stays 2:4, and equal counts in each row, or in each slice of a dictionary in blocks, stay
equal); else each column, if those hold the same number; else the whole matrix. So as many numbers
are stored as before, and the masks have the same size.

Healing trains latents for the first four fifths of its steps. Its loss grows by the fraction PULL
times the mean over matrices of ‖C̃ ⊙ (1 − M)‖² / ‖C̃ ⊙ M‖², which keeps entries from coming and
going. Then the supports are frozen, and what is stored learns in the steps that are left, from the
best latents on, with a warm-up and a cosine of its own up to LATE times the learning rate.

Differs from the paper: calibration text in place of a task; one latent for the entries inside and
one for those outside, so that both learn at a rate relative to the median of the stored entries;
all rates are the same, since they are relative (the paper: a tenth for atoms); the penalty is
relative to the loss, so that it is as strong for any text and has no gradient where there is no
loss.

Memory: 4 bytes for each entry of the dense matrix, four times with gradient and moments, in place
of those for stored entries.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from compressor.linears import CompressedLinear
from compressor.linears.masks import pack_mask
from compressor.recipe.training import Heal
from compressor.training.learners import Learners, Trainable, Values, learned_tensors
from compressor.training.loop import ZERO

FREE = 0.8  # fraction of the steps in which supports learn
PULL = 0.1  # of the loss, the weight of the penalty for what lies outside supports
# of the learning rate, for the steps after those: where a single cosine would be by then
LATE = 0.2


@dataclass(frozen=True)
class Pattern:
    """Number of entries in every group of a mask. A group: `size` consecutive entries of the rows,
    or of the columns.
    """

    size: int
    kept: int
    columns: bool = False

    @classmethod
    def of(cls, mask: Tensor) -> "Pattern":
        """Find the finest pattern that a boolean mask (rows, columns) has."""
        height, width = mask.shape
        runs = [(size, False) for size in range(2, width + 1) if width % size == 0]
        for size, columns in [*runs, (height, True)]:
            counts = (mask.T if columns else mask).reshape(-1, size).sum(1)
            if (counts == counts[0]).all():
                return cls(size, int(counts[0]), columns)
        return cls(mask.numel(), int(mask.sum()))

    def largest(self, sizes: Tensor) -> Tensor:
        """Build the mask with this pattern that holds the largest of `sizes` (rows, columns)."""
        table = sizes.T if self.columns else sizes
        groups = table.reshape(-1, self.size)
        chosen = (
            torch.zeros_like(groups, dtype=torch.bool)
            .scatter(1, groups.topk(self.kept, dim=1).indices, True)
            .view(table.shape)
        )
        return chosen.T if self.columns else chosen


def split_section(section: Heal) -> tuple[Heal, Heal]:
    """Split the settings of healing in those of the steps in which supports learn, and of those in
    which they are frozen.
    """
    free = max(1, round(FREE * section.steps))
    frozen = {
        "steps": max(1, section.steps - free),
        "learning_rate": LATE * section.learning_rate,
        "supports": "fixed",
    }
    return section.model_copy(update={"steps": free}), section.model_copy(update=frozen)


def has_support(module: nn.Module) -> bool:
    """Say whether a linear stores entries whose places can be chosen again."""
    return isinstance(module, CompressedLinear) and module.has_movable_support


class Latent(nn.Module):
    """A linear that runs with the projection of a dense latent in place of its stored entries."""

    module: CompressedLinear

    def __init__(self, module: CompressedLinear):
        """Start from what a linear stores, as it is (no copy): entries whose support can move, with
        or without a residual.
        """
        super().__init__()
        start = module.base.support()
        if start is None:
            raise TypeError(f"storage of kind '{module.kind}' keeps no entries")
        self.module, self.start, self.pattern = module, start, Pattern.of(start)
        self.everything = pack_mask(torch.ones_like(start).flatten())
        weight = module.weight.detach()
        self.unit = (weight.abs().median().item() or ZERO) / ZERO if len(weight) else 1.0
        self.inside = nn.Parameter(weight.clone(), requires_grad=False)
        self.outside = nn.Parameter(
            weight.new_zeros(self.start.numel() - len(weight)), requires_grad=False
        )

    def latent(self) -> Tensor:
        """Compute C̃ (rows, columns), differentiable."""
        empty = self.inside.new_zeros(self.start.shape)
        return empty.masked_scatter(self.start, self.inside).masked_scatter(
            ~self.start, self.unit * self.outside
        )

    def support(self, latent: Tensor) -> Tensor:
        """Choose M (rows, columns); of zeros the stored ones are taken first."""
        sizes = latent.detach().abs()
        return self.pattern.largest(
            torch.where(self.start, sizes.clamp(min=torch.finfo(sizes.dtype).tiny), sizes)
        )

    def projected(self) -> Tensor:
        """Compute Ŝ (rows, columns), exactly C̃ inside M and 0 outside, with the gradient of C̃."""
        latent = self.latent()
        return latent + (latent * self.support(latent) - latent).detach()

    def forward(self, input: Tensor) -> Tensor:
        return functional_call(
            self.module, {"weight": self.projected().flatten(), "mask": self.everything}, (input,)
        )

    def pull(self) -> Tensor:
        """Compute ‖C̃ ⊙ (1 − M)‖² / ‖C̃ ⊙ M‖², the latter without a gradient."""
        latent = self.latent()
        support = self.support(latent)
        inside = (latent * support).detach().square().sum()
        return (latent * ~support).square().sum() / inside.clamp(min=torch.finfo(inside.dtype).tiny)

    @torch.no_grad()
    def stored_tensors(self) -> dict[str, Tensor]:
        """Return the entries that are stored now, and their mask."""
        latent = self.latent()
        support = self.support(latent)
        return {"weight": latent[support], "mask": pack_mask(support.flatten())}


class Supports(Trainable):
    """Masks trained by straight-through estimation, beside what else is stored."""

    def __init__(
        self,
        model: PreTrainedModel,
        modules: Mapping[str, nn.Module],
        scopes: Iterable[nn.Module],
        train: str,
    ):
        """Put latents in place of copies whose stored entries can move.

        Args:
            modules: what is to stand in the model, by name.
            train: as in the recipe, one that trains stored entries.
        """
        inner = Learners(model, modules, scopes, train)
        self.originals, self.parameters = inner.originals, dict(inner.parameters)
        self.latents = {
            name: Latent(copy)
            for name, copy in inner.copies.items()
            if isinstance(copy, CompressedLinear) and has_support(copy)
        }
        self.copies = inner.copies | self.latents
        for name, latent in self.latents.items():
            del self.parameters[f"{name}.weight"]
            self.parameters |= {f"{name}.inside": latent.inside, f"{name}.outside": latent.outside}

    def penalise(self, loss: Tensor) -> Tensor:
        """Add the penalty for what lies outside the supports."""
        pulls = [latent.pull() for latent in self.latents.values()]
        return loss + PULL * loss.detach() * torch.stack(pulls).mean()

    def learned(self) -> Values:
        values = {}
        for name, copy in self.copies.items():
            latent = self.latents.get(name)
            module = copy if latent is None else latent.module
            values[name] = learned_tensors(name, module, self.parameters)
            if latent is not None:
                values[name] |= latent.stored_tensors()
        return values
