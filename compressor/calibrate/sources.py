"""Sources of calibration text: files, folders and hub data sets, read into documents, and windows
of tokens that need no text. No torch for text, and no socket for anything local.

A source is one function, registered with `@source`: it gives documents, or windows of tokens.

A text file is one document; a row of a jsonl, json, csv or parquet file or of a hub data set is one
document, either text or a list of chat messages ({role, content}). Whatever is skipped, cut or
repaired on the way is counted in a warning.
"""

import csv
import io
import json
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from compressor.errors import ConfigError, DataError, did_you_mean
from compressor.runtime.progress import Progress, silent

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

Document = str | list[dict[str, Any]]
HUB = re.compile(
    r"(?P<name>[\w.-]+(/[\w.-]+)?):(?P<config>[^:]*):(?P<split>[^:\[]+(\[[^\]]*\])?)(:(?P<column>[^:]+))?"
)
FOLDER_SUFFIXES = (".txt", ".text", ".md", ".jsonl", ".parquet")
SURROGATE = re.compile("[\ud800-\udfff]")
SAID = {"content", "tool_calls", "function_call"}  # keys of a message, at least one of them
DELIMITERS = {".csv": ",", ".tsv": "\t"}
MARKUP_SUFFIXES = (".html", ".htm", ".xml", ".yaml", ".yml")
LONG_LINE = 1 << 20  # characters; prose has no such lines


@dataclass(frozen=True)
class Request:
    """What is asked of a source: text to cut windows from, or the windows themselves."""

    source: str
    column: str | None = None  # of rows
    chat: bool = False  # whether documents are lists of messages
    limit: int | None = None  # bytes of text to read; None: all
    length: int = 0  # tokens of a window
    count: int | None = None  # windows; None: all
    seed: int = 0
    model: Any = None  # loaded; None where there is none
    progress: Progress = silent


Reader = Callable[[Request], "Iterable[Document] | Tensor"]


@dataclass(frozen=True)
class Source:
    """A kind of source: how it is written, what of that is meant, and how it is read."""

    form: str
    matches: Callable[[str], object]
    read: Reader
    tokens: bool


SOURCES: list[Source] = []  # the first that matches is read


def source(
    form: str, matches: Callable[[str], object], tokens: bool = False
) -> Callable[[Reader], Reader]:
    """Register a function that reads a kind of source.

    Args:
        form: how a user writes it, for messages.
        matches: whether a text names a source of this kind; earlier ones have the first word.
        tokens: whether it gives windows (n, length) int64 rather than documents.
    """

    def register(read: Reader) -> Reader:
        SOURCES.append(Source(form, matches, read, tokens))
        return read

    return register


def read_source(request: Request) -> "list[Document] | Tensor":
    """Read the documents of a source, or its windows (n, length) int64.

    Raises DataError naming the source when it is missing, is not text, has no such column, or holds
    no text at all; ConfigError for options that it would ignore.
    """
    kind = next((kind for kind in SOURCES if kind.matches(request.source)), None)
    if kind is None:
        raise DataError(
            f"{request.source}: no such file or folder; a source is "
            f"{', '.join(kind.form for kind in reversed(SOURCES))}"
        )
    if not kind.tokens:
        documents = cast("Iterable[Document]", kind.read(request))
        return _take(iter(documents), request.source, request.limit)
    _refuse_text_options(request)
    return cast("Tensor", kind.read(request))


def read_documents(
    source: str, column: str | None = None, chat: bool = False, limit: int | None = None
) -> list[Document]:
    """Read the documents of a source of text. Raises as `read_source`, DataError for windows."""
    documents = read_source(Request(source, column, chat, limit))
    if not isinstance(documents, list):
        raise DataError(f"{source}: holds windows of tokens, where text is needed")
    return documents


@source("self", lambda text: text == "self", tokens=True)
def sample_self(request: Request) -> "Tensor":
    """Sample windows from the model that is to be compressed."""
    if request.model is None or request.count is None:
        raise DataError(
            "self: windows can be sampled only from a loaded model, and their number must be given"
        )
    check_positions(request.length, request.model, "self")
    from compressor.calibrate.sampling import sample

    return sample(request.model, request.count, request.length, request.seed, request.progress)


@source("windows of tokens file.safetensors:key", lambda text: ".safetensors:" in text, tokens=True)
def read_tokens(request: Request) -> "Tensor":
    """Read integer windows (n, length). Raises DataError naming the source."""
    import torch
    from safetensors import SafetensorError, safe_open

    source, length = request.source, request.length
    stem, key = source.rsplit(".safetensors:", 1)
    path = Path(f"{stem}.safetensors")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            if key not in keys:
                raise DataError(f"{path} holds no tensor '{key}'; {did_you_mean(key, keys)}")
            tokens = file.get_tensor(key)
    except SafetensorError as error:
        raise DataError(f"{path}: damaged safetensors file: {error}") from None
    shape = tuple(tokens.shape)
    if tokens.is_floating_point() or tokens.dtype == torch.bool or tokens.ndim != 2 or 0 in shape:
        raise DataError(
            f"{source}: {tokens.dtype} of shape {shape}, where integer token windows (n, "
            f"{length}) are needed"
        )
    if shape[1] != length:
        raise DataError(
            f"{source}: its windows have {shape[1]} tokens, where {length} were asked for; set "
            f"the length to {shape[1]}"
        )
    return tokens.long()


@source("a text, jsonl or parquet file or folder", lambda text: Path(text).exists())
def read_path(request: Request) -> Iterator[Document]:
    """Read a file, or all files of a folder."""
    for file in _files(Path(request.source)):
        yield from _read_file(file, request.column, request.chat, request.limit)


@source("a hub data set org/name:config:split[:column]", HUB.fullmatch)
def read_hub(request: Request) -> Iterator[Document]:
    """Read a hub data set; only the rows used, unless offline or the split is a slice such as
    train[:1%].
    """
    import datasets

    hub = HUB.fullmatch(request.source)
    assert hub is not None  # it matched
    source, column = request.source, request.column
    name, config, split = hub["name"], hub["config"] or None, hub["split"]
    if column is not None and hub["column"] not in (None, column):
        raise ConfigError(
            f"{source}: the source names the column '{hub['column']}', and column '{column}' was "
            "asked for too; leave one of the two out"
        )
    stream = request.limit is not None and "[" not in split and not datasets.config.HF_HUB_OFFLINE
    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=stream)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{source}: the data set could not be read: {reason} (offline: HF_HUB_OFFLINE=1 uses "
            "the local cache; private: set HF_TOKEN)"
        ) from error
    places = ((f"{source}, row {number}", row) for number, row in enumerate(rows, start=1))
    return _pick(places, column or hub["column"], request.chat)


def _refuse_text_options(request: Request) -> None:
    """Raise ConfigError for options of text that windows of tokens would ignore."""
    column = f"column '{request.column}'" if request.column else None
    for option in (column, request.chat and "chat_template"):
        if option:
            raise ConfigError(
                f"{request.source}: {option} was asked for, but these are tokens, not text; leave "
                "it out"
            )


def check_positions(length: int, model: Any, source: str) -> None:
    """Raise DataError unless windows of `length` tokens fit the positions of the model."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise DataError(
            f"{source}: windows of {length} tokens, but the model has {positions} positions; "
            "shorten the windows"
        )


def _take(documents: Iterator[Document], source: str, limit: int | None) -> list[Document]:
    """Keep documents that are not blank until `limit` bytes (counted as characters) are used; count
    what was left out.
    """
    taken: list[Document] = []
    blank = characters = broken = 0
    for document in documents:
        repaired = _repair(document)
        broken += repaired != document
        document = repaired
        if not (document.strip() if isinstance(document, str) else document):
            blank += 1
            continue
        if limit is not None and characters >= limit:
            logger.warning(
                "%s: only the first %d characters (%d documents) are used",
                source,
                characters,
                len(taken),
            )
            break
        taken.append(document)
        characters += (
            len(document)
            if isinstance(document, str)
            else sum(len(str(message.get("content", ""))) for message in document)
        )
    if broken:
        logger.warning(
            "%s: %d documents hold halves of characters (lone surrogates), read as U+FFFD",
            source,
            broken,
        )
    if not taken:
        raise DataError(f"{source}: no text ({blank} blank documents)")
    if blank:
        logger.warning(
            "%s: %d of %d documents are blank and skipped", source, blank, blank + len(taken)
        )
    return taken


def _repair(value: Any) -> Any:
    """Put the replacement character in the place of lone surrogates, which no encoding has."""
    if isinstance(value, str):
        return SURROGATE.sub("\N{REPLACEMENT CHARACTER}", value)
    if isinstance(value, list):
        return [_repair(item) for item in value]
    if isinstance(value, dict):
        return {_repair(key): _repair(item) for key, item in value.items()}
    return value


def _files(path: Path) -> list[Path]:
    """List the readable files of a folder and its subfolders by name, or the file itself."""
    if path.is_file():
        return [path]
    everything = sorted(file for file in path.rglob("*") if file.is_file())
    files = [file for file in everything if file.suffix.lower() in FOLDER_SUFFIXES]
    if not files:
        raise DataError(
            f"{path}: none of its {len(everything)} files ends in {', '.join(FOLDER_SUFFIXES)}"
        )
    if len(files) < len(everything):
        logger.warning(
            "%s: %d of %d files are not text and ignored",
            path,
            len(everything) - len(files),
            len(everything),
        )
    return files


def _read_file(path: Path, column: str | None, chat: bool, limit: int | None) -> Iterator[Document]:
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return _pick(_json_rows(path), column, chat)
    if suffix in (".json", ".csv", ".tsv"):
        logger.warning("%s: read as rows, a document each, not as prose", path)
        rows = _json_list_rows(path) if suffix == ".json" else _csv_rows(path, DELIMITERS[suffix])
        return _pick(rows, column, chat)
    if suffix == ".parquet":
        return _pick(_parquet_rows(path), column, chat)
    if column is not None:
        raise ConfigError(
            f"{path}: column '{column}' was asked for, but plain text has no columns; use a jsonl "
            "or parquet file"
        )
    if suffix in MARKUP_SUFFIXES:
        logger.warning("%s: read as plain text, with its markup; is that prose?", path)
    return iter([_read_text(path, limit)])


def _read_text(path: Path, limit: int | None) -> str:
    """Read UTF-8 text, at most `limit` bytes; drop a byte-order mark, unify line ends. Raises
    DataError on anything else.
    """
    with path.open("rb") as file:
        data = file.read(-1 if limit is None else limit)
        cut = bool(file.read(1))
    if cut:
        logger.warning(
            "%s: only the first %d of %d bytes are used", path, len(data), path.stat().st_size
        )
    text = _decode(data, str(path), cut)
    carriage_returns = text.count("\r")
    if carriage_returns:
        logger.warning(
            "%s: %d carriage returns (CRLF or CR line ends) were read as newlines",
            path,
            carriage_returns,
        )
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    long_lines = sum(len(line) > LONG_LINE for line in text.split("\n"))
    if long_lines:
        logger.warning(
            "%s: %d lines are longer than %d characters; is this prose?",
            path,
            long_lines,
            LONG_LINE,
        )
    return text


def _decode(data: bytes, where: str, cut: bool = False) -> str:
    """Decode UTF-8 without its byte-order mark; when `cut`, a character torn at the end is
    dropped.
    """
    if b"\0" in data:
        raise DataError(
            f"{where}: binary, not text (the first of {data.count(0)} zero bytes is at "
            f"{data.index(0)}); give UTF-8 text"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if cut and error.start >= len(data) - 3:
            return data[: error.start].decode("utf-8-sig")
        bad = data.decode("utf-8", errors="replace").count("\ufffd")
        raise DataError(
            f"{where}: not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start} ({bad} "
            "bad places); convert it, e.g. with iconv"
        ) from None


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, row) of a jsonl file; blank lines are skipped. Raises DataError naming the
    line.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            text = _decode(line, where).strip()
            if not text:
                continue
            try:
                row = json.loads(text)
            except (json.JSONDecodeError, RecursionError) as error:
                raise DataError(
                    f"{where}: not JSON ({error}); a jsonl file holds one object per line"
                ) from None
            if not isinstance(row, dict):
                raise DataError(
                    f"{where}: a {type(row).__name__}, not an object; a jsonl file holds one "
                    "object per line"
                )
            yield where, row


def _json_list_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, row) of a json file: a list of objects, or an object on each line. Raises
    DataError naming the row.
    """
    text = _decode(path.read_bytes(), str(path)).strip()
    if not text.startswith("["):
        yield from _json_rows(path)
        return
    try:
        rows = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error})") from None
    for number, row in enumerate(rows, start=1):
        where = f"{path}, row {number}"
        if not isinstance(row, dict):
            raise DataError(f"{where}: a {type(row).__name__}, where a list of objects is read")
        yield where, row


def _csv_rows(path: Path, delimiter: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, row) of a table whose first line names the columns. Raises DataError naming the
    row.
    """
    lines = io.StringIO(_decode(path.read_bytes(), str(path)), newline="")
    usual = csv.field_size_limit(sys.maxsize)
    try:
        rows = list(csv.DictReader(lines, delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}: not a table of {delimiter!r}-separated values: {error}") from None
    finally:
        csv.field_size_limit(usual)
    for number, row in enumerate(rows, start=1):
        where = f"{path}, row {number}"
        if None in row or None in row.values():
            raise DataError(f"{where}: has more or fewer fields than the first line names")
        yield where, row


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, row) of a parquet file, batch by batch."""
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file: {error}") from None


def _pick(
    rows: Iterable[tuple[str, dict[str, Any]]], column: str | None, chat: bool
) -> Iterator[Document]:
    """Yield one column of the rows; the column is settled by the first row. Raises DataError naming
    the row.
    """
    for where, row in rows:
        column = column or _default_column(row, chat, where)
        if column not in row:
            raise DataError(f"{where}: no column '{column}'; {did_you_mean(column, row)}")
        value = row[column]
        if value is not None and not isinstance(value, str) and not _is_chat(value):
            raise DataError(
                f"{where}: column '{column}' holds a {type(value).__name__}, neither text nor a "
                f"list of {{role, content}}"
            )
        yield "" if value is None else value


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(message, dict) and "role" in message and not SAID.isdisjoint(message)
        for message in value
    )


def _default_column(row: dict[str, Any], chat: bool, where: str) -> str:
    """Choose `text` or `messages` (which first depends on `chat`), else the only column."""
    for name in ("messages", "text") if chat else ("text", "messages"):
        if name in row:
            return name
    if len(row) == 1:
        return next(iter(row))
    raise DataError(
        f"{where}: which column holds the text? Set it to one of: {', '.join(sorted(row))}"
    )
