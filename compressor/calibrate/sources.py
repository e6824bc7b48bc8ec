"""Where text comes from: files, folders and hub data sets, read into documents. No torch, and no
socket for anything local.

A text file is one document; a row of a jsonl or parquet file or of a hub data set is one document,
either text or a list of chat messages ({role, content}). Whatever is skipped, cut or repaired on
the way is counted in a warning.
"""

import json
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from compressor.errors import ConfigError, DataError, did_you_mean

logger = logging.getLogger(__name__)

Document = str | list[dict[str, Any]]
HUB = re.compile(
    r"(?P<name>[\w.-]+(/[\w.-]+)?):(?P<config>[^:]*):(?P<split>[^:\[]+(\[[^\]]*\])?)(:(?P<column>[^:]+))?"
)
FOLDER_SUFFIXES = (".txt", ".text", ".md", ".jsonl", ".parquet")
LONG_LINE = 1 << 20  # characters; prose has no such lines


def read_documents(
    source: str, column: str | None = None, chat: bool = False, limit: int | None = None
) -> list[Document]:
    """Read the documents of a local path or of a hub data set `org/name:config:split[:column]`.

    A local path wins over a data set of that name. `chat` prefers the column `messages`; reading
    stops after `limit` bytes (None: never). Raises DataError naming the source when it is missing,
    is not text, has no such column, or holds no text at all.
    """
    path, hub = Path(source), HUB.fullmatch(source)
    if path.exists():
        documents = (
            document for file in _files(path) for document in _read_file(file, column, chat, limit)
        )
    elif hub:
        documents = _read_hub(source, hub, column, chat, stream=limit is not None)
    else:
        raise DataError(
            f"{source}: no such file or folder; a source is a text, jsonl or parquet file or "
            "folder, a hub data set "
            "org/name:config:split[:column], windows of tokens file.safetensors:key, or self"
        )
    return _take(documents, source, limit)


def _take(documents: Iterator[Document], source: str, limit: int | None) -> list[Document]:
    """Keep documents that are not blank until `limit` bytes (counted as characters) are used; count
    what was left out.
    """
    taken: list[Document] = []
    blank = characters = 0
    for document in documents:
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
            else sum(len(str(message["content"])) for message in document)
        )
    if not taken:
        raise DataError(f"{source}: no text ({blank} blank documents)")
    if blank:
        logger.warning(
            "%s: %d of %d documents are blank and skipped", source, blank, blank + len(taken)
        )
    return taken


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
    if suffix == ".jsonl":
        return _pick(_json_rows(path), column, chat)
    if suffix == ".parquet":
        return _pick(_parquet_rows(path), column, chat)
    if column is not None:
        raise ConfigError(
            f"{path}: column '{column}' was asked for, but plain text has no columns; use a jsonl "
            "or parquet file"
        )
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


def _read_hub(
    source: str, hub: re.Match, column: str | None, chat: bool, stream: bool
) -> Iterator[Document]:
    """Read a hub data set. `stream` fetches only the rows used, unless offline or the split is a
    slice such as train[:1%].
    """
    import datasets

    name, config, split = hub["name"], hub["config"] or None, hub["split"]
    if column is not None and hub["column"] not in (None, column):
        raise ConfigError(
            f"{source}: the source names the column '{hub['column']}', and column '{column}' was "
            "asked for too; leave one of the two out"
        )
    stream = stream and "[" not in split and not datasets.config.HF_HUB_OFFLINE
    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=stream)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{source}: the data set could not be read: {reason} (offline: HF_HUB_OFFLINE=1 uses "
            "the local cache; private: set HF_TOKEN)"
        ) from error
    places = ((f"{source}, row {number}", row) for number, row in enumerate(rows, start=1))
    return _pick(places, column or hub["column"], chat)


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
        isinstance(message, dict) and {"role", "content"} <= message.keys() for message in value
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
