"""Checkpoints written by tests, and what is in them."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from compressor.checkpoint.write import compare_reload, write_model
from compressor.files.staging import Staging
from compressor.linears import LowRank
from compressor.linears.masks import pack_mask
from compressor.models.install import replace
from compressor.models.linears import dense_of, linears
from compressor.models.load import load

WHOLE = 10**9  # a shard size that takes everything


TOKENS = torch.arange(3, 40)[None]


RANK = 5


def compress(model, every: int = 2, names: tuple[str, ...] = ()):
    """Put random low-rank modules, plain and pivoted in turn, in place of every second linear and
    of `names`.
    """
    generator = torch.Generator().manual_seed(0)
    chosen = list(linears(model).items())[::every] + list(
        linears(model, names).items() if names else ()
    )
    for number, (name, info) in enumerate(chosen):
        pivoted = number % 2
        mask = torch.arange(info.in_features) < RANK if pivoted else None
        weight = (
            torch.randn(RANK, info.in_features - RANK * pivoted, generator=generator)
            / info.in_features
        )
        up = torch.randn(info.out_features, RANK, generator=generator)
        bias = dense_of(info, model.dtype).bias
        replace(
            model,
            name,
            LowRank(
                weight.to(model.dtype),
                up.to(model.dtype),
                bias,
                pack_mask(mask) if pivoted else None,
            ),
        )
    return model


def store(
    output: Path, model, source: Path | None, shard_size: int = WHOLE, tokenizer=None
) -> Path:
    with Staging(output) as stage:
        write_model(stage.folder, model, tokenizer, source, shard_size)
        compare_reload(stage.folder, model)
        return stage.commit()


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(TOKENS).logits


@pytest.fixture(scope="module")
def written(tiny_llama, tmp_path_factory) -> Path:
    """A compressed tiny Llama in several shards. Read only."""
    return store(
        tmp_path_factory.mktemp("written") / "out",
        compress(load(tiny_llama)[0]),
        tiny_llama,
        20_000,
    )


@pytest.fixture
def damaged(written, tmp_path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(written, tmp_path / "damaged"))


@pytest.fixture
def without_plugin(monkeypatch):
    """transformers as it is when compressor.hf was never imported."""
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "compressor")
    monkeypatch.delitem(AUTO_QUANTIZER_MAPPING, "compressor")
