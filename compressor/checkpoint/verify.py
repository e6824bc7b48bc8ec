"""Check a checkpoint folder: checksums, headers, complete tensors, finite numbers."""

from pathlib import Path

from compressor.checkpoint.weights import DTYPES, stored_tensors
from compressor.errors import CheckpointError
from compressor.files import manifest
from compressor.files.model_folder import ModelFolder, non_finite, read_headers
from compressor.hf import QUANT_METHOD, CompressorConfig, CompressorQuantizer
from compressor.models.load import skeleton
from compressor.runtime.progress import Progress, silent


def verify(path: Path, progress: Progress = silent) -> list[str]:
    """List what is wrong with a checkpoint: files against the manifest, headers, tensors against
    specs and architecture, NaN.

    An empty list means that the folder is what was written. Nothing is changed, and no weights are
    loaded.
    """
    problems = find_manifest_problems(path, progress)
    try:
        folder = read_headers(path)
        problems += find_tensor_problems(folder)
    except CheckpointError as error:
        return [*problems, str(error)]
    return problems + [
        f"{path}: {name} holds NaN or infinity" for name in non_finite(folder, progress)
    ]


def find_manifest_problems(path: Path, progress: Progress = silent) -> list[str]:
    """List the files that are missing, changed or not listed."""
    try:
        entries = manifest.read(path)
    except CheckpointError as error:
        return [str(error)]
    if entries is None:
        return [
            f"{path / manifest.NAME}: missing, so the files cannot be compared with what was "
            "written"
        ]
    extra = set(manifest.listed(path)) - entries.keys()
    return manifest.problems(path, entries, progress) + [
        f"{path / name}: not listed in {manifest.NAME}" for name in sorted(extra)
    ]


def find_tensor_problems(folder: ModelFolder) -> list[str]:
    """List the tensors of a compressed checkpoint that are missing, extra, or not of the dtype and
    shape that architecture and specs give them.

    Raises:
        CheckpointError: config.json describes no model.
    """
    if folder.quantization.get("quant_method") != QUANT_METHOD:
        return []  # dense folders may use older names, which only transformers' loader knows
    model = skeleton(folder.path)
    CompressorQuantizer(CompressorConfig(**folder.quantization)).preprocess_model(model)
    expected = {
        name: (DTYPES[tensor.dtype], tuple(tensor.shape))
        for name, tensor in stored_tensors(model).items()
    }
    stored = {name: (info.dtype, info.shape) for name, info in folder.tensors.items()}
    problems = [
        f"{folder.path}: {name} is missing" for name in sorted(expected.keys() - stored.keys())
    ]
    problems += [
        f"{folder.path}: {name} belongs to nothing in the model"
        for name in sorted(stored.keys() - expected.keys())
    ]
    for name in sorted(expected.keys() & stored.keys()):
        if stored[name] != expected[name]:
            problems.append(
                f"{folder.path}: {name} is {_typed(*stored[name])}, expected "
                f"{_typed(*expected[name])}"
            )
    return problems


def _typed(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{dtype} {list(shape)}"
