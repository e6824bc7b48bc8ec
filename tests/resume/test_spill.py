"""Cached outputs of blocks: the same bits from memory and from files, never more memory than
allowed, and no file left behind.
"""

import gc

import pytest
import torch
from support.activations import windows
from support.models import read_json, tiny_model
from support.modules import disk_of_20_kb, low_rank
from support.processes import contents
from support.recipes import recipe

from compressor.errors import CheckpointError
from compressor.pipeline import run
from compressor.pipeline.train import training as computing
from compressor.recipe.training import Repair
from compressor.resume.spill import Cache
from compressor.training import loop, repair
from compressor.training.teacher import Teacher

DOWN = "model.layers.0.mlp.down_proj"
QUICK = [
    f"{stage}.{key}"
    for stage in ("repair", "heal")
    for key in ("enabled=true", "steps=8", "check=4", "learning_rate=0.01")
]
SETS = [
    "allocation.keep=0.5",
    "calibration.sequential=true",
    "output.dtype=bfloat16",
    "repair.batch_size=2",
    "evaluation.enabled=false",
    *QUICK,
]


def value(seed, dtype=torch.float32):
    drawn = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return drawn.transpose(0, 1), None, torch.arange(seed + 1)


@pytest.mark.parametrize("budget", [0, 150, float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_come_back_bit_for_bit_and_laid_out_alike(tmp_path, budget, dtype, device):
    cache = Cache(budget, tmp_path)
    batches = cache.batches(3)
    assert len(batches) == 3 and batches[1] is None
    for index in range(3):
        batches[index] = tuple(
            part if part is None else part.to(device) for part in value(index, dtype)
        )
    for index in range(3):
        first, nothing, last = batches[index]
        assert (
            nothing is None
            and first.is_contiguous()
            and first.dtype == dtype
            and first.device.type == device
        )
        assert torch.equal(first.cpu(), value(index, dtype)[0]) and torch.equal(
            last.cpu(), value(index)[2]
        )
    assert cache.held <= budget
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == (
        0 if budget == float("inf") else 3 if budget == 0 else 2 if dtype == torch.float32 else 1
    )


def test_memory_and_files_are_given_back(tmp_path):
    cache = Cache(100, tmp_path)
    first, second = cache.batches(2), cache.batches(1)
    first[0], first[1], second[0] = torch.ones(20), torch.ones(20), torch.ones(20)
    assert cache.held == 80 and len(list(tmp_path.glob("*/*"))) == 2
    first[1] = first[1] + 1  # a file takes the place of a file
    assert len(list(tmp_path.glob("*/*"))) == 2 and torch.equal(first[1], torch.full((20,), 2.0))
    first[0] = torch.zeros(21)
    assert cache.held == 84
    del first
    assert cache.held == 0 and len(list(tmp_path.glob("*/*"))) == 1
    second[0] = torch.ones(25)
    assert cache.held == 100 and list(tmp_path.glob("*/*")) == []
    del second, cache
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_and_leaves_no_file(tmp_path):
    batches = Cache(10, tmp_path).batches(1)
    with (
        disk_of_20_kb(),
        pytest.raises(
            CheckpointError,
            match=r"blocks-\w+/1\.safetensors: could not be written \(File too large\)",
        ),
    ):
        batches[0] = torch.ones(10_000)
    assert list(tmp_path.glob("*/*")) == [] and batches[0] is None


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    batches = Cache(0, tmp_path / "file").batches(1)
    with pytest.raises(CheckpointError, match=r"file: could not be written"):
        batches[0] = torch.ones(3)


def hidden_states() -> int:
    """Bytes of all tensors alive that look like hidden states of some of these windows."""
    shapes = {(count, 12, 32) for count in (1, 2, 3)}
    found = {
        id(one): one
        for one in gc.get_objects()
        if type(one) is torch.Tensor and tuple(one.shape) in shapes and not one.requires_grad
    }
    return sum(tensor.nbytes for tensor in found.values())


@pytest.mark.parametrize("budget", [0, 5000, 10**9])
def test_streams_targets_and_originals_keep_to_the_budget(tmp_path, monkeypatch, budget):
    model, seen = tiny_model("llama"), []
    modules = {
        name: low_rank(model.get_submodule(name).weight, None, 8, False)
        for name in (DOWN, DOWN.replace("0", "1"))
    }
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    dtypes |= {
        f"{name}.{key}": p.dtype
        for name, module in modules.items()
        for key, p in module.named_parameters()
    }
    real = repair.mean_error
    monkeypatch.setattr(
        repair, "mean_error", lambda *args: (seen.append(hidden_states()), real(*args))[1]
    )
    cache, batches = Cache(budget, tmp_path), list(windows(6).split(2))
    section = Repair(enabled=True, train="compressed", steps=1, check=1)
    before = hidden_states()
    with computing(model):
        with torch.no_grad():
            original = Teacher(model, batches, cache=cache)
        outcome = repair.repair_blocks(
            model, modules, dtypes, (batches, batches[:1]), section, 0, cache=cache
        )[1]
        divergence = original.divergence()
    one = 2 * 12 * 32 * 4
    assert len(outcome) == 2 and divergence == 0
    whole = (
        3 + 2 * 3 + 2 * 1
    ) * one  # the original's last outputs, and two streams of either kind of windows
    assert max(seen) - before <= min(budget, whole) + 2 * one  # with what is being worked on
    assert max(seen) - before >= min(budget - one, whole)
    assert len(list(tmp_path.rglob("*.safetensors"))) <= 3  # those of `original`


@pytest.fixture(scope="module")
def roomy(tiny_llama, text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("roomy") / "out"
    run.compress(recipe(tiny_llama, text_file, *SETS), folder)
    return contents(folder)


def test_a_run_whose_caches_lie_on_disk_writes_the_same_bytes(
    roomy, tiny_llama, text_file, tmp_path, monkeypatch
):
    left, real = [], loop.fit

    def fit(*args):
        left.append(len(list((tmp_path / "out.journal" / "scratch").rglob("*.safetensors"))))
        return real(*args)

    monkeypatch.setattr("compressor.training.repair.fit", fit)
    run.compress(recipe(tiny_llama, text_file, *SETS, "calibration.cache=1"), tmp_path / "out")
    assert len(left) == 2 and min(left) >= 8
    found = contents(tmp_path / "out")
    assert found["model.safetensors"] == roomy["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert read_json(tmp_path / "out" / "plan.json")["trained"]["repair"]["kept"]


def test_a_run_that_fails_leaves_no_cached_outputs(tiny_llama, text_file, tmp_path, monkeypatch):
    def fail(*args):
        assert list((tmp_path / "out.journal" / "scratch").rglob("*.safetensors"))
        raise KeyboardInterrupt

    monkeypatch.setattr("compressor.training.repair.fit", fail)
    with pytest.raises(KeyboardInterrupt):
        run.compress(recipe(tiny_llama, text_file, *SETS, "calibration.cache=1"), tmp_path / "out")
    assert (tmp_path / "out.journal" / "store").exists() and not (
        tmp_path / "out.journal" / "scratch"
    ).exists()
