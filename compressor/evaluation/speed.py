"""Tokens per second and peak memory of a checkpoint, measured in a process of its own.

Peak memory is a high-water mark of a whole process, so each model gets a fresh one: the figures of
two checkpoints then do not depend on each other nor on what the caller holds. The model runs as
users run it: in its stored dtype, batch of one, key-value cache. `python -m
compressor.evaluation.speed` is that process: it reads one JSON object on stdin and writes one on
stdout.
"""

import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import CompressorError, EvaluationError
from compressor.models.load import load
from compressor.runtime.stopwatch import peak_memory


@dataclass(frozen=True)
class Speed:
    """Medians over `repeats` runs, after one to warm up."""

    prefill_tokens_per_second: float  # one forward pass over the prompt
    decode_tokens_per_second: float  # greedy, one token after the other
    # resident memory of the process on a CPU (weights count once they are read), tensors on a GPU
    peak_memory_bytes: int
    base_memory_bytes: int  # the same before the model was loaded: Python and its libraries
    prompt_tokens: int
    decode_tokens: int
    device: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def speed(
    folder: Path, device: str = "cpu", prompt: int = 128, decode: int = 64, repeats: int = 3
) -> Speed:
    """Measure the checkpoint in `folder`, dense or compressed, with as many threads as this process
    uses.

    prompt, decode: tokens read at once and tokens generated. Raises EvaluationError with the last
    line of what the measuring process had to say if it fails.
    """
    request = {
        "folder": str(folder),
        "device": device,
        "prompt": prompt,
        "decode": decode,
        "repeats": repeats,
    }
    request["threads"] = torch.get_num_threads()
    command = [sys.executable, "-m", "compressor.evaluation.speed"]
    done = subprocess.run(
        command, input=json.dumps(request), capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.strip()] or [
            f"exit code {done.returncode}"
        ]
        raise EvaluationError(f"{folder}: its speed could not be measured: {said[-1]}")
    return Speed(**json.loads(done.stdout))


def measure(model: nn.Module, prompt: Tensor, decode: int, repeats: int) -> tuple[float, float]:
    """Prefill and decode tokens per second of a model in memory. prompt: (1, n) token ids on the
    model's device.
    """
    runs = [_run(model, prompt, decode) for _ in range(1 + repeats)][1:]
    prefill, rest = (statistics.median(seconds) for seconds in zip(*runs, strict=True))
    return prompt.numel() / prefill, decode / rest


@torch.no_grad()
def _run(model: nn.Module, prompt: Tensor, decode: int) -> tuple[float, float]:
    """Seconds of the prompt and of `decode` greedy tokens."""
    start = _now(prompt)
    output = model(input_ids=prompt, use_cache=True)
    middle = _now(prompt)
    for _ in range(decode):
        token = output.logits[:, -1:].argmax(-1)  # (1, 1)
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
    return middle - start, _now(prompt) - middle


def _now(tensor: Tensor) -> float:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


def _peak(device: str) -> int:
    return (
        torch.cuda.max_memory_allocated(device)
        if torch.device(device).type == "cuda"
        else peak_memory()
    )


def _measure_folder(
    folder: str, device: str, prompt: int, decode: int, repeats: int, threads: int
) -> Speed:
    torch.set_num_threads(threads)
    base = _peak(device)
    model, _ = load(Path(folder), device=device)
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and prompt + decode > positions:
        raise EvaluationError(
            f"{prompt} + {decode} tokens do not fit the {positions} positions of the model"
        )
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (1, prompt), generator=generator).to(model.device)
    prefill, decoding = measure(model.eval(), tokens, decode, repeats)
    return Speed(prefill, decoding, _peak(device), base, prompt, decode, device)


if __name__ == "__main__":
    try:
        json.dump(_measure_folder(**json.load(sys.stdin)).to_json(), sys.stdout)
    except CompressorError as error:
        sys.exit(str(error))
