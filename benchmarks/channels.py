"""All widths of a feed-forward block against one width, in one run on one machine.

    python -m benchmarks.channels

The block is the first of the reference checkpoint with its calibration. One width: channels leave one after the other until so many are
left, and the last linear is refitted. All widths: the curve of `channels`, every width with its error, and the same refit of one of them.
Seconds are those of the processor, one thread.
"""

import time
from collections.abc import Callable

from benchmarks.dictionary import reference_windows

KEPT = (0.8, 0.5, 0.2)
REPEATS = 3


def block_parts(windows: int = 16):
    """Parts of the first feed-forward block of the reference model, with their statistics."""
    import torch

    from compressor.calibrate import collect
    from compressor.methods.base import Part
    from compressor.model import dense_of, linears

    model, tokens = reference_windows(windows)
    infos = {name: info for name, info in linears(model, ["role:ffn"]).items() if info.block == 0}
    stats = collect(model, infos, tokens, dict.fromkeys(infos, frozenset({"gram"})), batch_size=8)
    return {info.role: Part(name, dense_of(info, torch.float32), stats[name]) for name, info in infos.items()}


def seconds_of(call: Callable[[], None]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def main() -> None:
    import torch

    from compressor.methods import build
    from compressor.methods.elimination import refit, removals

    torch.set_num_threads(1)
    method, parts = build("channels", {}), block_parts()
    state = method.prepare("block", parts)
    weight, hidden = parts[state.consumer].dense.weight.double(), state.hidden

    def one(width: int) -> None:
        kept = torch.ones(hidden, dtype=torch.bool)
        for names, _ in removals(weight, state.moment, 1, None):
            kept[names] = False
            if kept.sum() <= width:
                break
        refit(weight, state.moment, kept)

    def every() -> None:
        found = method.prepare("block", parts)
        method.candidates(found)
        method.compress(found, {"channels": hidden // 2})

    seconds = {kept: [] for kept in (*KEPT, None)}
    for _ in range(REPEATS):  # in turn, so that a busy moment hits all
        for kept in KEPT:
            seconds[kept].append(seconds_of(lambda kept=kept: one(int(kept * hidden))))
        seconds[None].append(seconds_of(every))
    best = {kept: min(found) for kept, found in seconds.items()}
    widths = len(method.candidates(state).candidates)
    print(f"channels-widths: {widths} widths of {hidden} channels {best[None]:.2f} s")
    for kept in KEPT:
        print(f"    one width, keep {kept}: {best[kept]:.2f} s; all take {best[None] / best[kept]:.2f} times as long", flush=True)


if __name__ == "__main__":
    main()
