"""Sparse-dictionary solvers against the published algorithms they stand for, in one run on one
machine.

    python -m benchmarks.dictionary [--rounds 60] [--part solver] [--part profile] [--part rocket]

solver    CoSpaDi's fast solver against its K-SVD over OMP, on a 512 × 1408 weight with a real Gram:
          seconds and relative error.
profile   the curves of every kind of candidate of two blocks of the reference checkpoint, all
          blocks being alike, against one full
          low-rank decomposition of them: all linears decomposed two-sided, and built with pivots at
          0.8 of their size.
rocket    the curve and one module of each linear of one block against the authors' path
          (`rocket_port`), float64 both.

The weight of `solver` and its inputs are those of trained down projections of the reference
checkpoint, two by two: outputs of blocks 1 and 2 over the inputs of blocks 4 and 5, joint second
moments, so that nothing is synthetic but the wiring.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

PARTS = ("rocket", "profile", "solver")
ATOMS, NONZEROS = (
    346,
    173,
    # keep 0.8 of 512 × 1408 at two atoms for each nonzero, as CoSpaDi counts (bits of the mask
    # apart)
)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def best_of(repeats: int, call: Callable[[], Any]) -> float:
    return min(timed(call)[0] for _ in range(repeats))


def reference_windows(windows: int):
    """Reference model in float32 and calibration windows of its bundled text, (windows, 512)."""
    from compressor.calibrate import windows as data
    from compressor.files.model_folder import resolve
    from compressor.models.load import load

    model, tokenizer = load(resolve("reference"))
    return model.float(), data.load_windows(
        str(data.bundled("calibration")), tokenizer, 512, windows
    ).tokens


def joined_case(windows: int = 32):
    """Weight (512, 1408) and statistics of the inputs of two down projections side by side."""
    import torch

    from compressor.linears import Dense
    from compressor.statistics import LinearStats

    model, tokens = reference_windows(windows)
    downs = {
        block: model.get_submodule(f"model.layers.{block}.mlp.down_proj") for block in (1, 2, 4, 5)
    }
    seen: dict[int, list] = {4: [], 5: []}
    handles = [
        downs[block].register_forward_pre_hook(
            lambda _, args, block=block: seen[block].append(args[0])
        )
        for block in seen
    ]
    with torch.no_grad():
        for batch in tokens.split(8):
            model(batch, use_cache=False)
    for handle in handles:
        handle.remove()
    inputs = torch.cat(
        [torch.cat(parts).flatten(0, 1) for parts in seen.values()], dim=1
    ).double()  # (tokens, 1408)
    top, bottom = (
        torch.cat([downs[first].weight, downs[second].weight], dim=1)
        for first, second in ((4, 5), (1, 2))
    )
    weight = torch.cat([top, bottom]).detach()
    return Dense(weight, None, torch.float32), LinearStats(
        tokens=len(inputs), gram=inputs.T @ inputs
    )


def solver(rounds: int) -> None:
    """Print seconds and error of both solvers, and their ratios."""
    from compressor.methods import build

    dense, stats = joined_case()
    setting, found = {"atoms": ATOMS, "nonzeros": NONZEROS}, {}
    for name, options in (("fast", {}), ("ksvd", {"solver": "ksvd", "rounds": rounds})):
        method = build("cospadi", options)
        state = method.prepare("joined", dense, stats)
        seconds, module = timed(lambda method=method, state=state: method.compress(state, setting))
        found[name] = seconds, method.measure(state, module)
        print(f"solver   {name:8} {seconds:9.2f} s   error {found[name][1]:.5f}", flush=True)
    (fast, error), (slow, reference) = found["fast"], found["ksvd"]
    print(
        f"solver   {rounds} K-SVD rounds take {slow / fast:.0f} times as long; error "
        f"{error / reference:.3f} of theirs (bars: 20, 1)"
    )


def checkpoint_cases(windows: int = 32, blocks: range = range(8)):
    """Dense weight and statistics of every linear of some blocks of the reference checkpoint."""
    from compressor.calibrate.collect import collect
    from compressor.models import linears
    from compressor.recipe.sections import Gradients

    model, tokens = reference_windows(windows)
    infos = {name: info for name, info in linears.linears(model).items() if info.block in blocks}
    needs = {name: frozenset({"gram", "grad_gram"}) for name in infos}
    stats = collect(
        model,
        infos,
        tokens,
        needs,
        batch_size=8,
        gradients=Gradients(),
        memory=1 << 32,
        generator=None,
    )
    return {
        name: (linears.dense_of(info, model.dtype), stats[name]) for name, info in infos.items()
    }


KEEP = 0.8
LOW_RANK = {"metric": "two_sided", "storage": "pivoted"}
KINDS = {  # every kind of candidate that competes in one knapsack
    "low_rank": LOW_RANK,
    "cospadi": {},
    "sparse": {"solver": "admm"},
    "sparse_low_rank": {"solver": "admm"},
}


def curves(cases: dict, name: str, options: dict[str, Any], build_too: bool = False) -> None:
    """Decompose every case, take its curve, and build the module nearest to KEEP where asked."""
    from compressor.methods import build

    method = build(name, options)
    for linear, (dense, stats) in cases.items():
        state = method.prepare(linear, dense, stats)
        candidates = method.candidates(state).candidates
        if build_too:
            method.compress(
                state, min(candidates, key=lambda one: abs(one.bits - KEEP * dense.bits)).setting
            )


def profile() -> None:
    """Print seconds of the curves of every kind, and their sum over one full low-rank
    decomposition.
    """
    cases = checkpoint_cases(blocks=range(2))
    floor, total = best_of(3, lambda: curves(cases, "low_rank", LOW_RANK, build_too=True)), 0.0
    print(
        f"profile  full low-rank decomposition of {len(cases)} linears  {floor:8.2f} s", flush=True
    )
    for name, options in KINDS.items():
        seconds = best_of(3, lambda name=name, options=options: curves(cases, name, options))
        total += seconds
        print(
            f"profile  curves of {name:28} {seconds:12.2f} s   {seconds / floor:.2f} of that",
            flush=True,
        )
    print(
        f"profile  all kinds                    {total:18.2f} s   {total / floor:.2f} of that "
        "(bar: 2)",
        flush=True,
    )


def rocket() -> None:
    """Print seconds of the closed form, with and without refinement, and of the authors' path on
    the linears of one block.
    """
    from benchmarks import rocket_port

    cases, options = checkpoint_cases(blocks=range(3, 4)), {"profile": "weight"}

    def theirs() -> None:
        for dense, stats in cases.values():
            rocket_port.compress(dense.weight, stats.gram, 0.2)

    slow = timed(theirs)[0]
    print(f"rocket   the authors' path, {len(cases)} linears {slow:8.2f} s", flush=True)
    for steps in (0, rocket_port.STEPS):
        seconds = best_of(
            2,
            lambda steps=steps: curves(
                cases, "rocket", options | {"refine_steps": steps}, build_too=True
            ),
        )
        bar = " (bar: 20)" if steps == 0 else ""
        print(
            f"rocket   ours, {steps:3} Adam steps {seconds:17.2f} s   {slow / seconds:.0f} times "
            f"as fast{bar}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rounds", type=int, default=60, help="K-SVD rounds of the reference; 60 as published"
    )
    parser.add_argument("--part", action="append", choices=PARTS)
    arguments = parser.parse_args()
    for part in arguments.part or PARTS:
        if part == "solver":
            solver(arguments.rounds)
        else:
            {"profile": profile, "rocket": rocket}[part]()


if __name__ == "__main__":
    main()
