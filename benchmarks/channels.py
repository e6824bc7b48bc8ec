"""All widths of a feed-forward block against one width, in one run on one machine.

    python -m benchmarks.channels

Blocks: the first of the reference checkpoint with its calibration, and a random one of 2816
channels, as of a model with 1B parameters. Both sides begin with the second moment of the hidden
channels and end with the refit of the last linear for the same width. One width: between them,
channels leave one after the other until so many are left. All widths: the curve of `channels`,
every width with its error. Seconds are those of the processor, one thread.
"""

import time
from collections.abc import Callable

from benchmarks.dictionary import reference_windows

KEPT = (0.8, 0.5, 0.2)


def block_parts(windows: int = 16):
    """Parts of the first feed-forward block of the reference model, with their statistics."""
    import torch

    from compressor.calibrate.collect import collect
    from compressor.methods.base import Member
    from compressor.models.linears import dense_of, linears

    model, tokens = reference_windows(windows)
    infos = {name: info for name, info in linears(model, ["role:ffn"]).items() if info.block == 0}
    stats = collect(model, infos, tokens, dict.fromkeys(infos, frozenset({"gram"})), batch_size=8)
    return {
        name: Member(name, dense_of(info, torch.float32), stats[name], info.role)
        for name, info in infos.items()
    }


def random_parts(width: int = 1024, hidden: int = 2816):
    """Parts of a random block; channels have energies over three decades and are correlated."""
    import torch

    from compressor.linears import Dense
    from compressor.methods.base import Member
    from compressor.statistics import LinearStats

    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(hidden, hidden, generator=generator) / hidden**0.5 + torch.eye(hidden)
    x = (torch.randn(2 * hidden, hidden, generator=generator) @ mixed) * torch.logspace(
        -1.5, 1.5, hidden
    )
    inputs = LinearStats(tokens=1, gram=torch.eye(width, dtype=torch.float64))
    channels = LinearStats(tokens=len(x), gram=(x.T @ x).double())
    shapes = {
        "gate": ((hidden, width), inputs),
        "up": ((hidden, width), inputs),
        "down": ((width, hidden), channels),
    }
    weights = {
        role: Dense(torch.randn(shape, generator=generator), None, torch.float32)
        for role, (shape, _) in shapes.items()
    }
    return {role: Member(role, weights[role], sums, role) for role, (_, sums) in shapes.items()}


def seconds_of(call: Callable[[], None]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def compare(parts: dict, repeats: int) -> None:
    """Print the times of one width and of all, the best of some repeats."""
    import torch

    from compressor.methods import build
    from compressor.methods.structured.elimination import refit, remove_greedily

    method = build("channels", {})
    state = method.prepare_unit("block", parts)
    consumer = state.parts[state.consumer]
    dense, stats, hidden = consumer.dense, consumer.stats, state.hidden

    def one(width: int) -> None:
        gram, weight = stats.gram.double() / stats.tokens, dense.weight.double()
        moment = gram + torch.diag(
            torch.full((hidden,), method.ridge * gram.diagonal().mean().item(), dtype=gram.dtype)
        )
        refit(weight, moment, without(remove_greedily(weight, moment, count=hidden - width)[0]))

    def every(width: int) -> None:
        found = method.prepare_unit("block", parts)
        method.candidates(found)
        refit(dense.weight.double(), found.moment, without(found.order[: hidden - width]))

    def without(gone: torch.Tensor) -> torch.Tensor:
        return torch.ones(hidden, dtype=torch.bool).index_fill(0, gone, False)

    runs = [(call, kept) for kept in KEPT for call in (one, every)]
    seconds = {run: [] for run in runs}
    for _ in range(repeats):  # in turn, so that a busy moment hits all
        for call, kept in runs:
            seconds[call, kept].append(
                seconds_of(lambda call=call, kept=kept: call(int(kept * hidden)))
            )
    best = {run: min(found) for run, found in seconds.items()}
    widths = len(method.candidates(state).candidates)
    print(f"channels-widths: {widths} widths of {hidden} channels")
    for kept in KEPT:
        single, whole = best[one, kept], best[every, kept]
        print(
            f"    keep {kept}: one width {single:.3f} s, all {whole:.3f} s, {whole / single:.2f} "
            "times as long",
            flush=True,
        )


def main() -> None:
    import torch

    torch.set_num_threads(1)
    for parts, repeats in ((block_parts(), 7), (random_parts(), 2)):
        compare(parts, repeats)


if __name__ == "__main__":
    main()
