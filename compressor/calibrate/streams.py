"""Solving linears in the order of the model, each group on the inputs that the compressed linears
before it leave.

Groups are the linears that read one tensor ({q, k, v}, {o}, {gate, up}, {down} of a Llama block),
in the order in which they run. The calibration windows are carried from block to block in two
streams: what the compressed prefix returns, and, where targets are anchored, what the dense model
returns. The stock `model.forward` runs with the blocks before replaced by their cached output, as
in `restart`.

References: statistics on the compressed prefix are GPTQ's (arXiv 2210.17323) and SparseGPT's; the
cross-Gram of the two streams is that of SAES-SVD (arXiv 2602.03051) and AA-SVD (arXiv 2604.02119).

Memory: windows × length × hidden size numbers in the dtype of the forward pass for each stream (one
stream until the first linear is replaced, and without anchoring), on the device of the model, of
which no more than the cache allows is held in memory. Time: each group costs one pass through the
part of its block that runs before it, two with anchoring, and each block one pass more for each
stream.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compressor.calibrate.collect import INPUT_FIELDS, Sums, wide
from compressor.errors import ConfigError
from compressor.linears import CompressedLinear
from compressor.models.head import Head
from compressor.models.install import fitted, installed
from compressor.models.linears import LinearInfo, blocks
from compressor.models.partial_forward import (
    capturing,
    passing,
    require_restartable,
    run_until_stopped,
    stop,
)
from compressor.resume.spill import Batches, Cache
from compressor.runtime.progress import Progress, silent
from compressor.statistics import LinearStats

log = logging.getLogger(__name__)

Solve = Callable[[Sequence[str], LinearStats | None], dict[str, CompressedLinear]]
Keep = Callable[
    [Sequence[str], Callable[[], dict[str, CompressedLinear]]], dict[str, CompressedLinear]
]


class Streams:
    """What the block before `block` returned for each batch: in the model behind its compressed
    linears, and in the dense model.

    `dense` is one block further between `lead` and `advance`: what the block is to return.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: list[Tensor],
        anchored: bool,
        cure: str = "set calibration.sequential to false",
        cache: Cache | None = None,
    ):
        """batches: (batch, length) int64 each, on the model's device; anchored: whether the dense
        stream is carried as well.

        Raises CompressorError if passes through this architecture cannot be restarted between its
        blocks.
        """
        self.model, self.batches, self.anchored = model, batches, anchored
        self.members = blocks(model)[1]
        self.block = 0
        self.parted = self.ahead = (
            # whether the inputs of this block differ from those in the dense model; see above
            False
        )
        self.cache = Cache() if cache is None else cache
        self.compressed: Batches = self.cache.batches(len(batches))
        self.dense = self.compressed  # the same list until a linear is replaced
        head = Head(model)
        hidden, outputs = head.block_outputs(batches[0])
        middle = (len(outputs) + 1) // 2
        restarted = head.hidden_from(middle, [outputs[middle - 1]] * middle, batches[0])
        require_restartable(model, hidden, restarted, cure)

    def run(self, index: int, outputs: Batches) -> None:
        """Run one batch from this block on, until a hook raises Stop or the logits are there."""
        with passing(self.members[: self.block], [outputs[index]] * self.block):
            run_until_stopped(self.model, self.batches[index])

    def order(self, linears: Mapping[str, LinearInfo]) -> list[list[str]]:
        """Linears of this block in groups that share an input, in the order in which they run;
        those that do not run come last.
        """
        ran: list[str] = []
        with ExitStack() as stack:
            for info in linears.values():
                watch = info.module.register_forward_pre_hook(
                    lambda module, args, feeds=info.feeds: ran.append(feeds)
                )
                stack.callback(watch.remove)
            if self.block < len(self.members):
                stack.callback(self.members[self.block].register_forward_hook(stop).remove)
            self.run(0, self.compressed)
        sharing: dict[str, list[str]] = {feeds: [] for feeds in ran}
        for name, info in linears.items():
            sharing.setdefault(info.feeds, []).append(name)
        return [names for names in sharing.values() if names]

    def inputs(self, module: nn.Module, index: int, outputs: Batches) -> Tensor | None:
        """What a linear of this block receives in one batch, (tokens, in); None if it does not
        run.
        """
        with capturing(module.register_forward_pre_hook, lambda module, args: args[0]) as seen:
            self.run(index, outputs)
        return wide(seen[0].detach()).flatten(0, -2) if seen else None

    def gather(
        self,
        infos: Sequence[LinearInfo],
        fields: frozenset[str],
        modules: dict[str, nn.Module],
        crossed: bool,
    ) -> LinearStats:
        """Input sums of linears that share an input, with `modules` of this block replaced;
        `cross_gram` too if `crossed`.

        Raises NumericalError on NaN or infinity, ConfigError for anchoring where tokens are routed.
        """
        first = infos[0]
        sums = Sums(f"{first.name}: input activations behind the compressed linears are")
        for index, batch in enumerate(self.batches):
            where = f"batch {index}"
            with installed(self.model, modules):
                x = self.inputs(first.module, index, self.compressed)
            if x is None:
                continue
            sums.add_inputs(x, fields, where)
            if crossed:
                dense = self.inputs(first.module, index, self.dense)
                if dense is None or len(x) != batch.numel():
                    raise ConfigError(
                        f"{first.name} sees routed tokens, which cannot be anchored; set "
                        "calibration.anchor to 0"
                    )
                sums.add("cross_gram", dense.T @ x, where)
        values: dict[str, Any] = dict(sums.fields)
        return LinearStats(tokens=sums.tokens, **values)

    def lead(self) -> None:
        """Carry the dense stream through this block; the compressed one stays before it."""
        if not self.ahead:
            into = self.dense if self.parted else self.cache.batches(len(self.batches))
            self.dense = self.carry(self.dense, into)
            self.ahead = True

    def advance(self, modules: dict[str, nn.Module]) -> None:
        """Carry the streams through this block, the compressed one with `modules` in place of its
        linears.
        """
        if modules or self.parted:
            if self.anchored:
                self.lead()
            with installed(self.model, modules):
                self.carry(self.compressed, self.compressed)
            self.parted = True
        elif self.ahead:
            self.compressed = self.dense
        else:
            self.carry(self.compressed, self.compressed)
        self.block, self.ahead = self.block + 1, False

    def carry(self, outputs: Batches, into: Batches) -> Batches:
        """Put what this block returns behind `outputs` into a list, which may be the same one."""
        for index in range(len(self.batches)):
            into[index] = self.output(index, outputs)
        return into

    def output(self, index: int, outputs: Batches) -> Any:
        """What this block returns for one batch (a tensor or a tuple), with autograd where that is
        on.
        """
        with capturing(
            self.members[self.block].register_forward_hook, lambda module, args, output: output
        ) as seen:
            self.run(index, outputs)
        return seen[0]


@torch.no_grad()
def solve_in_order(
    model: PreTrainedModel,
    linears: Mapping[str, LinearInfo],
    batches: list[Tensor],
    needs: Mapping[str, frozenset[str]],
    anchored: bool,
    solve: Solve,
    keep: Keep = lambda names, make: make(),
    progress: Progress = silent,
    cache: Cache | None = None,
) -> None:
    """Call `solve` for each group of `linears`, in order, and let the groups behind see what it
    returns.

    linears: those to be replaced, name → linear; needs: fields of their statistics; solve(names,
    stats) → modules: `stats` are the input sums of the group, None as long as they are those of the
    dense model, or where they say nothing. keep(names, make) → modules of all `names` of a block:
    what `make` returns, or what it returned in a run that was stopped. The model is left as it was.
    Raises as `Streams`.
    """
    if not linears:
        return
    streams = Streams(model, batches, anchored, cache=cache)
    last = max(info.block for info in linears.values())
    for block in progress(range(last + 1), "solve in order"):
        members = {name: info for name, info in linears.items() if info.block == block}
        modules = (
            keep(list(members), partial(solve_block, streams, members, needs, anchored, solve))
            if members
            else {}
        )
        if block < last:
            streams.advance({name: fitted(model, name, module) for name, module in modules.items()})


def solve_block(
    streams: Streams,
    linears: Mapping[str, LinearInfo],
    needs: Mapping[str, frozenset[str]],
    anchored: bool,
    solve: Solve,
) -> dict[str, CompressedLinear]:
    """Solve the linears of the block that the streams have come to, group by group, as
    `solve_in_order` does.
    """
    found: dict[str, CompressedLinear] = {}
    for names in streams.order(linears):
        infos = [linears[name] for name in names]
        fields = frozenset({"gram"}).union(*(needs[name] for name in names)) & INPUT_FIELDS
        placed = {name: fitted(streams.model, name, module) for name, module in found.items()}
        stats = (
            streams.gather(infos, fields, placed, anchored) if streams.parted or placed else None
        )
        if stats is not None and (reason := stats.silence):
            log.warning(
                "%s: behind the compressed linears %s, so it is not solved again", names[0], reason
            )
            stats = None
        found |= solve(names, stats)
    return found
