"""Shared fixtures: tiny random models built once for the suite, and seeded (weight, statistics)
cases.
"""

from pathlib import Path

import hypothesis
import pytest
import torch
from support.models import VOCABULARY, save_tiny

pytest_plugins = ["support.checkpoints", "support.folders", "support.outputs"]  # fixtures

torch.set_num_threads(1)
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    """Folder of the suite's two-block random Llama. Read only."""
    return save_tiny(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory) -> Path:
    """Folder of the suite's two-block random GPT-2 (Conv1D, fused qkv, biases). Read only."""
    return save_tiny(tmp_path_factory.mktemp("models") / "gpt2", "gpt2")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """Text of 6,000 random words of the tiny tokenizer."""
    generator = torch.Generator().manual_seed(0)
    words = [f"w{i}" for i in torch.randint(3, VOCABULARY, (6000,), generator=generator).tolist()]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n".join(" ".join(words[i : i + 60]) for i in range(0, len(words), 60)) + "\n")
    return path


@pytest.fixture(params=["cpu"] + (["cuda"] if torch.cuda.is_available() else []))
def device(request) -> str:
    return request.param
