"""Block repair: what a compressed block stores is fitted to the outputs of the dense block, on the
inputs that the blocks before it leave.

References: block refinement is AA-SVD's second stage (arXiv 2604.02119), for
pruned and quantised blocks local reconstruction (arXiv 2510.14444) and 3BASiL's (arXiv 2603.01376);
no labels and no passes through the whole model.

Minimises, over what the block stores, the mean over tokens of ‖y − ŷ‖² / ‖y‖²: y (hidden,) is the
output of the dense block behind dense blocks, ŷ that of the compressed block behind compressed
blocks. The published loss is not divided by ‖y‖²; then the few tokens with massive activations are
all that counts, while the norm that reads the output divides by ‖y‖ itself.

Memory: two copies of the hidden states of all windows, windows × length × hidden size × 4 bytes
each, of which no more than the cache allows is held in memory, and the activations, gradients and
moments of one block.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compressor.calibrate.streams import Streams
from compressor.linears import CompressedLinear
from compressor.models.install import installed
from compressor.models.linears import blocks
from compressor.recipe.training import Repair
from compressor.resume.spill import Cache
from compressor.resume.store import NOWHERE, Store
from compressor.runtime.progress import Progress, silent
from compressor.training.learners import Learners, Values, rebind, rebuild
from compressor.training.loop import Task, fit


@dataclass(frozen=True)
class BlockRepair:
    """Outcome of one block. Errors are means over held-out tokens of ‖y − ŷ‖² / ‖y‖², of modules as
    they are stored.
    """

    block: int
    before: float
    after: float  # equal to `before` where the repair was dropped
    steps: int
    values: Values  # empty where the repair was dropped

    def to_json(self) -> dict[str, float | int]:
        return {
            "block": self.block,
            "before": self.before,
            "after": self.after,
            "steps": self.steps,
        }


def repair_blocks(
    model: PreTrainedModel,
    modules: Mapping[str, nn.Module],
    dtypes: Mapping[str, torch.dtype],
    windows: tuple[Sequence[Tensor], Sequence[Tensor]],
    section: Repair,
    seed: int,
    store: Store = NOWHERE,
    progress: Progress = silent,
    cache: Cache | None = None,
    solve: Callable[[Streams], Mapping[str, nn.Module]] = lambda streams: {},
) -> tuple[dict[str, nn.Module], list[BlockRepair]]:
    """Repair block after block; return all modules that now differ from those of the model, and the
    outcome of each block.

    Modules that are given or solved stay as they are.

    Args:
        model: dense, computing in float32 or wider, left as it is.
        modules: those that compress it.
        dtypes: of every parameter as it will be stored, by full name.
        windows: batches (batch, length) int64 to fit on, and held-out ones.
        store: where outcomes are kept; it must depend on all of these.
        solve: makes modules of the block that the streams have come to, in place of those of
            `modules`, behind what has been repaired; it is called once more behind the last block.
    """
    prefix, members = blocks(model)
    repaired, outcomes = copy_borrowers(modules), []
    with torch.no_grad():
        cure, shared = "switch repair off", Cache() if cache is None else cache
        streams, heldout = (
            Streams(model, list(batches), anchored=True, cure=cure, cache=shared)
            for batches in windows
        )
        for number in progress(range(len(members)), "repair"):
            repaired |= copy_borrowers(solve(streams))
            rebind(repaired)
            inside = f"{prefix}.{number}."
            here = {name: module for name, module in repaired.items() if name.startswith(inside)}
            learners = Learners(
                model, here, [members[number]] if here or streams.parted else [], section.train
            )
            if learners.parameters:
                make = partial(
                    _repair_block, streams, heldout, learners, here, dtypes, section, seed
                )
                outcomes.append(store.recall("repair", number, make))
                repaired |= rebuild(learners.originals, outcomes[-1].values)
                rebind(repaired)
                here = {name: repaired[name] for name in repaired if name.startswith(inside)}
            streams.advance(here)
            heldout.advance(here)
        repaired |= copy_borrowers(solve(streams))
    return repaired, outcomes


def copy_borrowers(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the same modules, but copies of those that borrow tensors: they are to borrow them
    from others.
    """
    return {
        name: deepcopy(module)
        if isinstance(module, CompressedLinear) and module.lender is not None
        else module
        for name, module in modules.items()
    }


def _repair_block(
    streams: Streams,
    heldout: Streams,
    learners: Learners,
    here: Mapping[str, nn.Module],
    dtypes: Mapping[str, torch.dtype],
    section: Repair,
    seed: int,
) -> BlockRepair:
    model, number = streams.model, streams.block
    streams.lead()
    heldout.lead()
    before = mean_error(heldout, here)

    def loss(index: int) -> Tensor:
        return token_errors(streams, index).mean()

    title = f"repair of block {number}"
    with installed(model, learners.copies):
        task = Task(
            title, learners.parameters, len(streams.batches), loss, partial(mean_error, heldout, {})
        )
        state = fit(task, section, seed + number)
    values = learners.values(dtypes)
    after = mean_error(heldout, dict(here) | rebuild(learners.originals, values))
    if after < before:
        return BlockRepair(number, before, after, state.step, values)
    return BlockRepair(number, before, before, state.step, {})


def hidden_states(output: Any) -> Tensor:
    """Return the hidden states (batch, length, hidden) of what a block returns."""
    return output[0] if isinstance(output, tuple) else output


def token_errors(streams: Streams, index: int) -> Tensor:
    """Compute ‖y − ŷ‖² / ‖y‖² of every token of a batch, (batch, length).

    The dense stream leads.
    """
    output = hidden_states(streams.output(index, streams.compressed))
    expected = hidden_states(streams.dense[index])
    energy = expected.square().sum(-1)
    return (output - expected).square().sum(-1) / energy.clamp(min=torch.finfo(energy.dtype).tiny)


@torch.no_grad()
def mean_error(streams: Streams, modules: Mapping[str, nn.Module]) -> float:
    """Average `token_errors` over all tokens, float64 sums, with `modules` in the model. The dense
    stream leads.
    """
    with installed(streams.model, dict(modules)):
        errors = [token_errors(streams, index) for index in range(len(streams.batches))]
    total = sum(error.sum(dtype=torch.float64).item() for error in errors)
    return total / sum(error.numel() for error in errors)
