"""Time and memory of compression against their floors, measured in the same run on the same
machine.

    python -m benchmarks.run [--case svd_llm-reference] [--case svd_llm-wide] [--case
    dictionary-rocket] [--case gptq_w4-sequential]
        [--case channels-widths] [--case sweep-sizes]

Cases called dictionary-… are the comparisons of `benchmarks.dictionary`, channels-widths that of
`benchmarks.channels`, sweep-sizes that of `benchmarks.sweep`, each in a process of its own.

Cases called …-sequential hold a run whose linears are solved in order against the same recipe
without that, in place of a floor.

Floor of a run = bare calibration forwards (with backward where the recipe needs gradients, and the
probes' forwards) + bare Gram GEMMs + bare eigendecompositions, each called with nothing around it.
Compress time = calibrate + decompose + probe + allocate + what follows a plan (solving in order,
residuals) of the same recipe; imports, writing and evaluation are apart. Memory: peak resident
bytes of a fresh process, less what Python and its libraries take, ÷ (weights + all second moments).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.dictionary import PARTS

CASES = {  # name: (recipe, model, calibration windows)
    "svd_llm-reference": ("svd_llm", "reference", 128),
    "default-reference": ("default", "reference", 128),
    "eora_w4_r32-reference": ("eora_w4_r32", "reference", 128),
    "svd_llm-wide": ("svd_llm", "wide", 16),
}
SEQUENTIAL = {
    "gptq_w4-sequential": ("gptq_w4", "reference", 128)
}  # against the same recipe that is not
APART = {f"dictionary-{part}": ["benchmarks.dictionary", "--part", part] for part in PARTS}
APART |= {"channels-widths": ["benchmarks.channels"], "sweep-sizes": ["benchmarks.sweep"]}


def wide_llama(folder: Path) -> Path:
    """Random 12-layer, 1024-wide Llama in float32, without a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    }
    LlamaForCausalLM(
        LlamaConfig(vocab_size=4096, max_position_embeddings=512, tie_word_embeddings=True, **sizes)
    ).save_pretrained(folder)
    return folder


def tokens_file(folder: Path, windows: int) -> str:
    """Random windows of 512 tokens below 4096, as a calibration source."""
    import torch
    from safetensors.torch import save_file

    save_file(
        {
            "tokens": torch.randint(
                0, 4096, (windows, 512), generator=torch.Generator().manual_seed(0)
            )
        },
        folder / "tokens.safetensors",
    )
    return f"{folder / 'tokens.safetensors'}:tokens"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", choices=[*CASES, *SEQUENTIAL, *APART])
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a child process that measures one case
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(**json.loads(arguments.one))))
        return
    chosen = arguments.case or [*CASES, *SEQUENTIAL, *APART]
    if any(case in CASES | SEQUENTIAL for case in chosen):
        print(
            f"{'case':20} {'compress s':>10} {'floor s':>8} {'ratio':>6} {'peak MiB':>9} "
            f"{'base MiB':>9} {'ratio':>6}"
        )
    with tempfile.TemporaryDirectory() as temporary:
        for case in chosen:
            if case in CASES | SEQUENTIAL:
                compare(case, Path(temporary))
            else:
                subprocess.run([sys.executable, "-m", *APART[case]], check=True)


def compare(case: str, folder: Path) -> None:
    """Print time and memory of one case and of its floor, each measured in a process of its own."""
    recipe, model, windows = (CASES | SEQUENTIAL)[case]
    name = model if model == "reference" else str(wide_llama(folder / "wide"))
    job = {
        "recipe": recipe,
        "model": name,
        "source": tokens_file(folder, windows),
        "windows": windows,
    }
    if case in SEQUENTIAL:
        run, floor = (
            measured(job | {"part": "compress", "sequential": sequential})
            for sequential in (True, False)
        )
    else:
        run, floor = (measured(job | {"part": part}) for part in ("compress", "floor"))
    seconds = sum(floor["seconds"].values())
    print(
        f"{case:20} {run['total']:10.2f} {seconds:8.2f} {run['total'] / seconds:6.2f} "
        f"{run['peak'] / 2**20:9.0f} {run['base'] / 2**20:9.0f} {run['peak'] / run['base']:6.2f}"
    )
    print(
        f"    compress {rounded(run['seconds'])}\n    floor    {rounded(floor['seconds'])}",
        flush=True,
    )


def measured(job: dict) -> dict:
    """`measure` in a process of its own."""
    child = [sys.executable, "-m", "benchmarks.run", "--one", json.dumps(job)]
    return json.loads(subprocess.run(child, check=True, stdout=subprocess.PIPE).stdout)


def rounded(seconds: dict[str, float]) -> str:
    return ", ".join(f"{stage} {value:.2f}" for stage, value in seconds.items())


def measure(
    recipe: str, model: str, source: str, windows: int, part: str, sequential: bool = False
) -> dict:
    from compressor.pipeline.job import open_source, start
    from compressor.recipe.load import load_recipe

    options = {
        "model.name": model,
        "calibration.source": source,
        "calibration.windows": windows,
        "model.device": "cpu",
    }
    loaded = load_recipe(recipe, [f"calibration.sequential={json.dumps(sequential)}"], options)
    job = start(loaded, open_source(model, None))
    return compress(job) if part == "compress" else {"seconds": floor(job)}


def compress(job) -> dict:
    """Seconds of each stage and the peak memory of one compression, from loaded model to modules in
    memory.
    """
    from compressor.pipeline import contest, sequential_solve, solution, stages
    from compressor.runtime.stopwatch import peak_memory

    seconds, before = {}, peak_memory()

    def timed(stage, function, *arguments):
        start = time.perf_counter()
        result = function(*arguments)
        seconds[stage] = time.perf_counter() - start
        return result

    stats = timed("calibrate", stages.statistics, job)
    moments = {id(s.gram): s.gram.nbytes for s in stats.values()} | {
        id(s.grad_gram): s.grad_gram.nbytes for s in stats.values() if s.grad_gram is not None
    }
    decompositions = timed("decompose", stages.decompose_all, job, stats)
    damages = timed("probe", stages.probe_all, job, decompositions)
    timed("allocate", contest.choose, job, decompositions, damages)
    if job.recipe.calibration.sequential:
        timed("in order", sequential_solve.solve_in_order, solution.allocate(job, stats))
    weights = sum(parameter.nbytes for parameter in job.model.parameters())
    return {
        "seconds": seconds,
        "total": sum(seconds.values()),
        "peak": peak_memory() - before + weights,
        "base": weights + sum(moments.values()),
    }


def floor(job) -> dict[str, float]:
    """Seconds of the bare forwards, Gram GEMMs and eigendecompositions that the same job cannot do
    without.
    """
    import torch

    from compressor.evaluation.perplexity import in_float32
    from compressor.models.head import Head
    from compressor.models.restart import Restart

    gradients = any(
        "grad_gram" in assignment.needs or "fisher" in assignment.needs
        for assignment in job.assignments.values()
    )
    batches = job.calibration.tokens.split(job.recipe.calibration.batch_size)
    seconds = {}
    with in_float32(job.model):
        start = time.perf_counter()
        for batch in batches:
            with torch.set_grad_enabled(gradients):
                embedded = job.model.get_input_embeddings()(batch).requires_grad_(gradients)
                logits = job.model(inputs_embeds=embedded, use_cache=False).logits
                if gradients:
                    labels = batch[:, 1:].flatten()
                    torch.nn.functional.cross_entropy(
                        logits[:, :-1].flatten(0, 1), labels, reduction="sum"
                    ).backward()
        seconds["forwards"] = time.perf_counter() - start
    infos = {name: assignment.info for name, assignment in job.assignments.items()}
    inputs = {info.feeds: info.in_features for info in infos.values()}
    shapes = [
        (len(batch) * batch.shape[1], width) for batch in batches for width in inputs.values()
    ]
    shapes += [
        (len(batch) * batch.shape[1], info.out_features)
        for batch in batches
        for info in infos.values()
        if gradients
    ]
    seconds["grams"] = sum(gemm_seconds(*shape) * shapes.count(shape) for shape in set(shapes))
    ranks = [min(info.in_features, info.out_features) for info in infos.values()]
    seconds["eigh"] = sum(eigh_seconds(side) * ranks.count(side) for side in set(ranks))
    if job.recipe.allocation.kind == "knapsack" and job.recipe.allocation.damage == "kl_probe":
        with in_float32(job.model), torch.no_grad():
            start = time.perf_counter()
            head = Head(job.model)
            batches = list(job.heldout.tokens.split(job.recipe.calibration.batch_size))
            restart = Restart(head, batches, "measure without probes")
            for info in infos.values():
                for index, batch in enumerate(batches):
                    hidden = restart.hidden_from(info.block, index).flatten(0, 1)
                    for rows in head.chunks(len(hidden)):
                        head.logits(hidden[rows], batch.flatten()[rows])
            seconds["probes"] = time.perf_counter() - start
    return seconds


def gemm_seconds(tokens: int, width: int) -> float:
    """One float32 Gram GEMM of (tokens, width), best of three."""
    import torch

    x = torch.randn(tokens, width)
    return best(lambda: x.T @ x)


def eigh_seconds(side: int) -> float:
    """One float64 symmetric eigendecomposition, best of three."""
    import torch

    matrix = torch.randn(side, 2 * side, dtype=torch.float64)
    matrix = matrix @ matrix.T
    return best(lambda: torch.linalg.eigh(matrix))


def best(call, repeats: int = 3) -> float:
    spent = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        spent.append(time.perf_counter() - start)
    return min(spent)


if __name__ == "__main__":
    main()
