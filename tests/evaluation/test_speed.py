"""Speed in a process of its own: figures that do not depend on the caller, and failures in one
line.
"""

import pytest
import torch
from support.models import save_tiny, tiny_model

from compressor.errors import EvaluationError
from compressor.evaluation.speed import measure, speed
from compressor.runtime.stopwatch import peak_memory

MIB = 1 << 20


@pytest.mark.slow
def test_measures_a_folder_apart_from_this_process(tmp_path):
    folder = save_tiny(
        tmp_path / "model", "llama", vocab_size=1 << 16, hidden_size=512, num_attention_heads=8
    )
    weights = (folder / "model.safetensors").stat().st_size
    held = torch.ones(256 * MIB // 4)  # memory of the caller must not count
    found = speed(folder, prompt=8, decode=4, repeats=1)
    assert found.base_memory_bytes < peak_memory() - held.nbytes / 2
    assert found.prefill_tokens_per_second > 0 and found.decode_tokens_per_second > 0
    assert weights / 3 < found.peak_memory_bytes - found.base_memory_bytes < 3 * weights
    assert (found.prompt_tokens, found.decode_tokens, found.device) == (8, 4, "cpu")


@pytest.mark.slow
def test_failures_are_one_line(tiny_llama, tmp_path):
    with pytest.raises(
        EvaluationError,
        match=r"its speed could not be measured: 120 \+ 9 tokens do not fit the 128 positions",
    ):
        speed(tiny_llama, prompt=120, decode=9, repeats=1)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_decoding_reads_the_prompt_once_and_then_single_tokens(kind, monkeypatch):
    model = tiny_model(kind)
    lengths = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    clock = iter([0, 900, 1800, 2000, 2001, 2002])  # the first run is slow: it warms up
    monkeypatch.setattr("compressor.evaluation.speed.time.perf_counter", lambda: next(clock))
    assert measure(model, torch.ones(1, 6, dtype=torch.int64), decode=3, repeats=1) == (6.0, 3.0)
    assert lengths == [6, 1, 1, 1] * 2
