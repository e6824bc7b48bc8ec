"""Token windows to calibrate and evaluate on.

Every text document is tokenised whole, with the special tokens its tokenizer adds by itself, and
the documents are joined by the end-of-sequence token where there is one (not doubled). The stream
is cut into non-overlapping windows; what is left at the end is dropped.
"""

import hashlib
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.calibrate.sources import Document, Request, check_positions, read_source
from compressor.errors import DataError, did_you_mean
from compressor.files.bundled import bundled_folder
from compressor.runtime.progress import Progress, silent

logger = logging.getLogger(__name__)

READ_LEAST = 4 << 20  # bytes of text always read, if there are as many
# bytes of text read per requested token: enough to choose from, without tokenising a library
READ_PER_TOKEN = 32


@dataclass(frozen=True)
class Windows:
    """Non-overlapping token windows of one source, in the order of the source."""

    tokens: Tensor  # (n, length) int64
    source: str

    @property
    def digest(self) -> str:
        """sha256 of the token windows and their shape."""
        data = self.tokens.contiguous().cpu().numpy().astype("<i8").tobytes()
        return hashlib.sha256(str(tuple(self.tokens.shape)).encode() + data).hexdigest()


def load_windows(
    source: str,
    tokenizer: Any,
    length: int,
    count: int | None = None,
    column: str | None = None,
    chat_template: bool = False,
    seed: int = 0,
    model: Any = None,
    progress: Progress = silent,
) -> Windows:
    """Load up to `count` windows of `length` tokens (None: all) from a SOURCE.

    SOURCE is one of those registered in `sources`. Windows are chosen evenly: one at random, by
    `seed`, from each of `count` equal stretches of the source. With `count` the text behind the
    first max(READ_LEAST, READ_PER_TOKEN · tokens) bytes is not read, with a warning. `model` is
    needed for `self`; where given, windows must fit its vocabulary and its positions. Fewer windows
    than asked for are a warning with both counts.

    Raises DataError naming the source when there is not one window, when window lengths differ, or
    when the source cannot be read.
    """
    limit = None if count is None else max(READ_LEAST, READ_PER_TOKEN * length * count)
    request = Request(source, column, chat_template, limit, length, count, seed, model, progress)
    content = read_source(request)
    if isinstance(content, Tensor):
        tokens = content
    else:
        tokens = _cut(_tokenise(content, tokenizer, chat_template, source), length, source)
    if model is not None:
        _check_model(tokens, model, source)
    if count is not None and len(tokens) < count:
        logger.warning(
            "%s: %d windows of %d tokens, where %d were asked for; all are used",
            source,
            len(tokens),
            length,
            count,
        )
    elif count is not None:
        tokens = tokens[_choose(len(tokens), count, seed)]
    return Windows(tokens, source)


def bundled(kind: str) -> Path:
    """Return the text shipped with the package: `calibration` or `evaluation`. Raises DataError for
    another kind.
    """
    if kind not in ("calibration", "evaluation"):
        raise DataError(
            f"there is no bundled text '{kind}'; "
            f"{did_you_mean(kind, ['calibration', 'evaluation'])}"
        )
    return bundled_folder("calibration") / f"{kind}.txt"


def heldout_count(total: int, heldout: int | None) -> int:
    """Windows to hold out of `total`: as many as asked for, or (None) one in eight, at most 16."""
    return min(16, total // 8) if heldout is None else heldout


def split_heldout(windows: Windows, heldout: int | None = None) -> tuple[Windows, Windows]:
    """Split off the last windows, `heldout_count` of them. Raises DataError when none would be
    left.
    """
    total = len(windows.tokens)
    heldout = heldout_count(total, heldout)
    if not 0 <= heldout < total:
        raise DataError(
            f"{windows.source}: {heldout} of {total} windows cannot be held out; at least one "
            "must be left to calibrate on"
        )
    kept = total - heldout
    return replace(windows, tokens=windows.tokens[:kept]), replace(
        windows, tokens=windows.tokens[kept:]
    )


def overlap(calibration: Windows, evaluation: Windows, ngram: int = 32) -> float:
    """Share of evaluation windows that contain a run of `ngram` tokens (or a whole shorter window)
    also found in calibration.
    """
    ngram = min(ngram, calibration.tokens.shape[1], evaluation.tokens.shape[1])
    known = _hash_ngrams(calibration.tokens, ngram)
    hits = torch.isin(_hash_ngrams(evaluation.tokens, ngram), known).any(dim=1)
    return hits.double().mean().item()


def _hash_ngrams(tokens: Tensor, ngram: int) -> Tensor:
    """Hash every run of `ngram` tokens by a random linear form modulo 2⁶⁴: (n, length) → (n, length
    − ngram + 1).
    """
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (ngram,), generator=generator) * 2 + 1
    positions = tokens.shape[1] - ngram + 1
    hashes = torch.zeros(len(tokens), positions, dtype=torch.int64)
    for offset, factor in enumerate(factors):
        hashes += tokens[:, offset : offset + positions].cpu() * factor
    return hashes


def _choose(total: int, count: int, seed: int) -> Tensor:
    """Choose one index at random from each of `count` equal stretches of range(total); ascending
    (count,).
    """
    edges = torch.arange(count + 1) * total // count
    shares = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return edges[:-1] + (shares * edges.diff()).long()


def _tokenise(
    documents: list[Document], tokenizer: Any, chat_template: bool, source: str
) -> Tensor:
    """Tokenise whole documents and join them: (tokens,) int64."""
    if tokenizer is None:
        raise DataError(
            f"{source}: text needs a tokenizer, and the model has none; give windows of tokens as "
            "file.safetensors:key"
        )
    if chat_template and not tokenizer.chat_template:
        raise DataError(
            f"{source}: chat_template was asked for, but the tokenizer of the model has none"
        )
    texts = [_render(document, tokenizer, chat_template, source) for document in documents]
    end = tokenizer.eos_token_id
    pieces: list[Tensor] = []
    for start in range(0, len(texts), 256):  # encodings take far more memory than tokens
        batch = texts[start : start + 256]
        for ids in tokenizer(batch, add_special_tokens=not chat_template, verbose=False)[
            "input_ids"
        ]:
            if pieces and end is not None and pieces[-1][-1:].tolist() != [end]:
                pieces.append(torch.tensor([end]))
            pieces.append(torch.tensor(ids, dtype=torch.int64))
    return torch.cat(pieces)


def _render(document: Document, tokenizer: Any, chat_template: bool, source: str) -> str:
    """Return the text of a document, messages through the chat template. Raises DataError when the
    two do not fit.
    """
    from jinja2 import TemplateError

    if isinstance(document, str) == chat_template:
        holds, cure = (
            ("text", "unset chat_template")
            if chat_template
            else ("chat messages", "set chat_template: true")
        )
        raise DataError(f"{source}: the column holds {holds}; {cure}, or name another column")
    if isinstance(document, str):
        return document
    try:
        return tokenizer.apply_chat_template(document, tokenize=False)
    except TemplateError as error:
        raise DataError(
            f"{source}: the chat template refuses a conversation of {len(document)} messages: "
            f"{error}"
        ) from None


def _cut(tokens: Tensor, length: int, source: str) -> Tensor:
    """Cut a stream (tokens,) into windows (n, length). Raises DataError when there is not one."""
    count = len(tokens) // length
    if count == 0:
        raise DataError(
            f"{source}: {len(tokens)} tokens of text, where one window needs {length}; shorten "
            "the windows or give more text"
        )
    return tokens[: count * length].view(count, length)


def _check_model(tokens: Tensor, model: Any, source: str) -> None:
    """Raise DataError unless the token ids fit the embedding and the windows fit the positions of
    the model.
    """
    vocabulary = model.get_input_embeddings().num_embeddings
    low, high = tokens.min().item(), tokens.max().item()
    if low < 0 or high >= vocabulary:
        raise DataError(
            f"{source}: token ids {low} … {high} do not fit the model's vocabulary of "
            f"{vocabulary}; is it another model's?"
        )
    check_positions(tokens.shape[1], model, source)
