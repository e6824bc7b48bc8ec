"""The safetensors files of a model folder, read without torch: which there are, what they hold, and
where each tensor lies.

Nothing outside the folder is opened: names from an index are plain file names, and links that lead
out are refused. The one exception is the cache of huggingface_hub, whose snapshots are links to the
blobs beside them.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from compressor.errors import CheckpointError
from compressor.files.documents import read_json, some

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# transformers would read these instead of the model files
DISTRIBUTED = "shard-[0-9]*-model-[0-9]*.safetensors"


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor, as its header describes it."""

    dtype: str  # name in the safetensors format, e.g. "BF16"
    shape: tuple[int, ...]
    file: str  # file name inside the folder
    start: int  # first byte in the file
    bytes: int


def inside(folder: Path, name: str) -> Path:
    """Return the path of a regular file of the folder. Raises CheckpointError if it is missing,
    irregular, or a link that leads out.
    """
    path = folder / name
    if not path.exists():
        raise CheckpointError(
            f"{path}: the file is missing; the folder is incomplete, copy or download it again"
        )
    home, target = folder.resolve(), path.resolve()
    cached = home.parent.name == "snapshots" and target.parent == home.parent.parent / "blobs"
    if not target.is_relative_to(home) and not cached:
        raise CheckpointError(
            f"{path}: the link leads out of the folder, to {target}; put the file itself there"
        )
    if not target.is_file():
        raise CheckpointError(f"{path}: expected a regular file")
    return path


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read the header of one safetensors file. Raises CheckpointError naming the file if it is
    truncated, empty or inconsistent.
    """
    try:
        with safe_open(
            path, framework="np"
        ):  # checks sizes, coverage and overflow of the whole file
            pass
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a complete safetensors file ({error}); copy or download it again"
        ) from None
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors[name] = TensorInfo(
            entry["dtype"], tuple(entry["shape"]), path.name, 8 + length + begin, end - begin
        )
    return tensors


def read_index(folder: Path) -> dict[str, str]:
    """Read the shard index: tensor name → file name. Raises CheckpointError for anything but plain
    .safetensors names.
    """
    path = inside(folder, INDEX)
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: 'weight_map' is missing or empty")
    for tensor, name in weight_map.items():
        if (
            not isinstance(name, str)
            or not name.endswith(".safetensors")
            or Path(name).name != name
            or "\\" in name
            or "\0" in name
        ):
            raise CheckpointError(
                f"{path}: {tensor} points to {name!r}; expected the name of a .safetensors file "
                "in the same folder"
            )
    return weight_map


def shards(folder: Path) -> Iterator[tuple[str, set[str] | None]]:
    """Yield each weight file with the tensors that the index expects in it (None without an index),
    in order of name.

    Raises CheckpointError if there are only pickles, no weights, or two sets of weights of which a
    reader would take either.
    """
    stray = sorted(path.name for path in folder.glob(DISTRIBUTED))
    if stray:
        raise CheckpointError(
            f"{folder}: {stray[0]} belongs to a distributed checkpoint that would be read "
            "instead; remove it"
        )
    if (folder / INDEX).exists():
        index = read_index(folder)
        files = set(index.values())
        if (folder / SINGLE).exists() and SINGLE not in files:
            raise CheckpointError(
                f"{folder}: holds {SINGLE} and an index of other shards; remove the set that is "
                "out of date"
            )
        for file in sorted(files):
            yield file, {tensor for tensor, name in index.items() if name == file}
    elif (folder / SINGLE).exists():
        yield SINGLE, None
    else:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        if pickles:
            raise CheckpointError(
                f"{folder}: only pickled weights ({some(pickles)}), which can run code when "
                "opened; convert them to safetensors first"
            )
        raise CheckpointError(f"{folder}: no {SINGLE} and no {INDEX}")


def read_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Read the headers of every weight file. Raises CheckpointError naming up to SHOWN tensors that
    are missing, extra or stored twice.
    """
    tensors: dict[str, TensorInfo] = {}
    for file, expected in shards(folder):
        header = read_header(inside(folder, file))
        if expected is not None and expected != header.keys():
            missing, extra = expected - header.keys(), header.keys() - expected
            found = [f"missing {some(missing)}"] * bool(missing) + [
                f"not in the index: {some(extra)}"
            ] * bool(extra)
            raise CheckpointError(
                f"{folder / file}: {'; '.join(found)}; shard and index are of different models"
            )
        twice = tensors.keys() & header.keys()
        if twice:
            raise CheckpointError(f"{folder / file}: stored in another shard too: {some(twice)}")
        tensors |= header
    return tensors
