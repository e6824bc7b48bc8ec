"""Token perplexity and KL divergence of causal language models on windows of token ids.

Windows do not overlap. Perplexity: every token but the first of a window is predicted from the
tokens before it in that window, so a window of W tokens gives W − 1 predictions.
KL(original‖model): mean over all W positions of every window, in nats per token.

Precision: the weights keep the values they are stored with, the forward pass runs in float32
(`in_float32`), log-softmax and all sums in float64. Every batch counts: one that is not finite
stops the run.

Memory: the activations of one batch, and the logits of one chunk of positions (`models.head`) of
each model, whatever the vocabulary.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from compressor.errors import EvaluationError
from compressor.models.head import NO_LABEL, Head, next_tokens, row_blocks
from compressor.resume.store import NOWHERE, Store
from compressor.runtime.progress import Progress, silent


@dataclass(frozen=True)
class Score:
    """Perplexity per token of one model on `tokens` / `window` windows."""

    perplexity: float  # exp(nll_sum / predicted)
    nll_sum: float  # nats, over the predicted tokens
    tokens: int  # tokens in all windows
    window: int

    @property
    def predicted(self) -> int:
        return self.tokens - self.tokens // self.window

    def to_json(self) -> dict[str, Any]:
        return {
            "perplexity": self.perplexity,
            "kl": None,
            "tokens": self.tokens,
            "window": self.window,
        }


@dataclass(frozen=True)
class Comparison:
    """A model beside the original on the same windows."""

    original: Score
    model: Score
    kl: float  # KL(original‖model), nats per token, mean over all positions

    def to_json(self) -> dict[str, Any]:
        return self.model.to_json() | {
            "kl": self.kl,
            "perplexity_original": self.original.perplexity,
        }


def perplexity(
    model: PreTrainedModel,
    tokens: Tensor,
    batch_size: int = 8,
    progress: Progress = silent,
    store: Store = NOWHERE,
) -> Score:
    """Score a model on tokens (n, window), int64; `store` is that of a run of this model on these
    tokens, if it may be stopped.

    Raises EvaluationError if the windows do not fit the model, if a batch is not finite (it is
    named) or the result overflows.
    """
    _check_windows(model, tokens, "the model")
    nll = 0.0
    with in_float32(model):
        head = Head(model)
        for place, batch in progress(_batches(tokens, batch_size), "evaluate"):
            nll += store.recall("score", place, partial(_score_batch, head, batch, place))
    return _score(nll, tokens, "the model")


def _score_batch(head: Head, batch: Tensor, place: str) -> float:
    """Negative log-likelihood of the windows of a batch, nats."""
    hidden, ids, targets = head.hidden(batch).flatten(0, 1), batch.flatten(), next_tokens(batch)
    total = torch.zeros((), dtype=torch.float64, device=head.device)
    for rows in head.chunks(len(ids)):
        total += nll_sum(head.logits(hidden[rows], ids[rows]), targets[rows])
    return _finite(total, f"the model: log-likelihood of {place}")


def compare(
    original: PreTrainedModel,
    model: PreTrainedModel,
    tokens: Tensor,
    batch_size: int = 8,
    progress: Progress = silent,
    store: Store = NOWHERE,
) -> Comparison:
    """Score the original and the model on tokens (n, window), int64, batch by batch, so that no
    log-probabilities are kept.

    The two may live on different devices and may be the same module. Raises EvaluationError as
    `perplexity` does.
    """
    _check_windows(original, tokens, "the original")
    _check_windows(model, tokens, "the model")
    nll_original = nll_model = divergence = 0.0
    with in_float32(original), in_float32(model):
        heads = Head(original), Head(model)
        if heads[0].vocabulary != heads[1].vocabulary:
            raise EvaluationError(
                "the models cannot be compared: the original has a vocabulary of "
                f"{heads[0].vocabulary}, the model of {heads[1].vocabulary}"
            )
        for place, batch in progress(_batches(tokens, batch_size), "evaluate"):
            sums = store.recall("comparison", place, partial(_compare_batch, *heads, batch, place))
            nll_original += sums[0]
            nll_model += sums[1]
            divergence += sums[2]
    return Comparison(
        original=_score(nll_original, tokens, "the original"),
        model=_score(nll_model, tokens, "the model"),
        kl=divergence / tokens.numel(),
    )


def _compare_batch(
    original: Head, model: Head, batch: Tensor, place: str
) -> tuple[float, float, float]:
    """Sums over one batch, nats: negative log-likelihood of the original and of the model, and
    KL(original‖model).
    """
    ids, targets = batch.flatten(), next_tokens(batch)
    expected, hidden = original.hidden(batch).flatten(0, 1), model.hidden(batch).flatten(0, 1)
    sums = torch.zeros(3, dtype=torch.float64, device=model.device)
    for rows in model.chunks(len(ids)):
        log_p = original.logits(expected[rows], ids[rows]).to(model.device)
        sums += comparison_sums(log_p, model.logits(hidden[rows], ids[rows]), targets[rows])
    return (
        _finite(sums[0], f"the original: log-likelihood of {place}"),
        _finite(sums[1], f"the model: log-likelihood of {place}"),
        _finite(sums[2], f"KL(original‖model) of {place}"),
    )


def comparison_sums(log_p: Tensor, log_q: Tensor, targets: Tensor) -> Tensor:
    """Sums over positions: negative log-likelihood of p, that of q, and KL(p‖q): float64 (3,),
    nats.

    Args:
        log_p: (positions, vocabulary), log-probabilities or logits alike, since they are normalised
            here in float64. A token with p = 0 adds nothing to the divergence.
        log_q: the same of q.
        targets: (positions,) int64, NO_LABEL where nothing is predicted.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=log_p.device)
    for rows_p, rows_q, labels in row_blocks(log_p, log_q, targets.to(log_p.device)):
        p, q = _log_softmax(rows_p), _log_softmax(rows_q)
        sums[0] += _nll(p, labels)
        sums[1] += _nll(q, labels)
        sums[2] += _divergence(p, q)
    return sums


def nll_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood summed over positions: float64 (), nats. As `comparison_sums`."""
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for rows, labels in row_blocks(logits, targets.to(logits.device)):
        total += _nll(_log_softmax(rows), labels)
    return total


def kl_sum(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p‖q) summed over positions: float64 (), nats. As `comparison_sums`."""
    total = torch.zeros((), dtype=torch.float64, device=log_p.device)
    for rows_p, rows_q in row_blocks(log_p, log_q):
        total += _divergence(_log_softmax(rows_p), _log_softmax(rows_q))
    return total


def _log_softmax(logits: Tensor) -> Tensor:
    return functional.log_softmax(logits.double(), dim=-1)


def _nll(log_p: Tensor, targets: Tensor) -> Tensor:
    return functional.nll_loss(log_p, targets, ignore_index=NO_LABEL, reduction="sum")


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    return torch.where(log_p.isneginf(), 0.0, log_p.exp() * (log_p - log_q)).sum()


@contextmanager
def in_float32(model: nn.Module) -> Iterator[nn.Module]:
    """Let a model compute in float32, in evaluation mode and without autograd; everything is
    restored on leaving.

    Parameters and buffers narrower than float32 are widened in place, tensor by tensor, and cast
    back: exact, because float32 holds every float16 and bfloat16 value. Memory: 4 bytes per
    parameter while inside (twice a bfloat16 model), no second copy. Tensors that accelerate has
    offloaded are widened as they are loaded.
    """
    narrow = [
        (module, name, tensor.dtype)
        for module in model.modules()
        for name, tensor in _own(module)
        if _narrow(tensor)
    ]
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, name, _ in narrow:
            _cast(module, name, torch.float32)
        model.eval()
        with torch.no_grad():
            yield model
    finally:
        for module, name, dtype in narrow:
            _cast(module, name, dtype)
        for module, training in modes:
            module.training = training


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _narrow(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype.itemsize < torch.float32.itemsize


def _cast(module: nn.Module, name: str, dtype: torch.dtype) -> None:
    """Cast a tensor of a module in place; it is looked up by name, because accelerate puts new
    objects in place while it offloads.
    """
    tensor = getattr(module, name)
    tensor.data = tensor.data.to(dtype)


def _batches(tokens: Tensor, batch_size: int) -> list[tuple[str, Tensor]]:
    """Batches of windows, each with its place among them for messages."""
    parts = tokens.split(batch_size)
    places = (
        f"batch {i + 1} of {len(parts)} (windows {i * batch_size + 1}–{i * batch_size + len(part)})"
        for i, part in enumerate(parts)
    )
    return list(zip(places, parts, strict=True))


def _finite(value: Tensor, what: str) -> float:
    number = value.item()
    if not math.isfinite(number):
        raise EvaluationError(
            f"{what} is {number}: the forward pass gave NaN or infinity; look for the cause with "
            "`compressor verify`"
        )
    return number


def _score(nll: float, tokens: Tensor, who: str) -> Score:
    windows, window = tokens.shape
    mean = nll / (windows * (window - 1))
    try:
        return Score(perplexity=math.exp(mean), nll_sum=nll, tokens=tokens.numel(), window=window)
    except OverflowError:
        raise EvaluationError(
            f"{who}: {mean:.4g} nats per token overflow as a perplexity; the model is broken"
        ) from None


def _check_windows(model: PreTrainedModel, tokens: Tensor, who: str) -> None:
    if tokens.ndim != 2 or tokens.dtype != torch.int64:
        raise EvaluationError(
            f"evaluation needs windows of token ids, int64 (n, window), not {tokens.dtype} "
            f"{tuple(tokens.shape)}"
        )
    windows, window = tokens.shape
    if windows < 1 or window < 2:
        raise EvaluationError(
            f"nothing to evaluate: {windows} windows of {window} tokens; give a longer text or a "
            "shorter window"
        )
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and window > positions:
        raise EvaluationError(
            f"{who} has {positions} positions, the window {window} tokens; use a window of at "
            f"most {positions}"
        )
    lowest, highest, vocabulary = tokens.min().item(), tokens.max().item(), config.vocab_size
    if lowest < 0 or highest >= vocabulary:
        raise EvaluationError(
            f"token ids {lowest}…{highest} do not fit the vocabulary of {who} ({vocabulary}); was "
            "the text tokenised for another model?"
        )
