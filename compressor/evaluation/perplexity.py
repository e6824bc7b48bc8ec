"""Token perplexity and KL divergence of causal language models on windows of token ids.

Windows do not overlap. Perplexity: every token but the first of a window is predicted from the
tokens before it in that window, so a window of W tokens gives W − 1 predictions.
KL(original‖model): mean over all W positions of every window, in nats per token.

Precision: the weights keep the values they are stored with, the forward pass runs in float32
(`in_float32`), log-softmax and all sums in float64. Every batch counts: one that is not finite
stops the run.
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

from compressor.errors import EvaluationError
from compressor.resume.store import NOWHERE, Store
from compressor.runtime.progress import Progress, silent

CHUNK = 1 << 23  # logits widened to float64 at a time: 64 MiB a copy


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
    model: nn.Module,
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
        for place, batch in progress(_batches(tokens, batch_size), "evaluate"):
            nll += store.recall("score", place, partial(_likelihood, model, batch, place))
    return _score(nll, tokens, "the model")


def _likelihood(model: nn.Module, batch: Tensor, place: str) -> float:
    return _finite(nll_sum(_logits(model, batch), batch), f"the model: log-likelihood of {place}")


def compare(
    original: nn.Module,
    model: nn.Module,
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
        for place, batch in progress(_batches(tokens, batch_size), "evaluate"):
            sums = store.recall(
                "comparison", place, partial(_compare, original, model, batch, place)
            )
            nll_original, nll_model, divergence = (
                nll_original + sums[0],
                nll_model + sums[1],
                divergence + sums[2],
            )
    return Comparison(
        original=_score(nll_original, tokens, "the original"),
        model=_score(nll_model, tokens, "the model"),
        kl=divergence / tokens.numel(),
    )


def _compare(
    original: nn.Module, model: nn.Module, batch: Tensor, place: str
) -> tuple[float, float, float]:
    """Sums over one batch: negative log-likelihood of the original and of the model, and
    KL(original‖model).
    """
    expected, found = _logits(original, batch), _logits(model, batch)
    if expected.shape != found.shape:
        raise EvaluationError(
            f"the models cannot be compared: logits {tuple(expected.shape)} of the original and "
            f"{tuple(found.shape)} of the model"
        )
    return (
        _finite(nll_sum(expected, batch), f"the original: log-likelihood of {place}"),
        _finite(nll_sum(found, batch), f"the model: log-likelihood of {place}"),
        _finite(kl_sum(expected.to(found.device), found), f"KL(original‖model) of {place}"),
    )


def nll_sum(logits: Tensor, tokens: Tensor) -> Tensor:
    """Negative log-likelihood, summed over the W − 1 predicted tokens of each window: float64 (),
    nats.

    logits: (windows, W, vocabulary); tokens: (windows, W), int64.
    """
    predictions = logits[:, :-1].flatten(0, 1)  # (windows · (W − 1), vocabulary)
    targets = tokens[:, 1:].flatten().to(logits.device)
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for rows, wanted in zip(
        *(part.split(_rows(logits)) for part in (predictions, targets)), strict=True
    ):
        total += functional.nll_loss(
            functional.log_softmax(rows.double(), dim=-1), wanted, reduction="sum"
        )
    return total


def kl_sum(log_p: Tensor, log_q: Tensor, temperature: float = 1.0, skip: int = 0) -> Tensor:
    """KL(p‖q) summed over the positions of all windows: float64 (), nats.

    log_p, log_q: (windows, W, vocabulary), log-probabilities or logits alike, since both are
    normalised here in float64 after division by `temperature`. The first `skip` positions of each
    window are left out. A token with p = 0 adds nothing.
    """
    total = torch.zeros((), dtype=torch.float64, device=log_p.device)
    parts = (logits[:, skip:].flatten(0, 1).split(_rows(logits)) for logits in (log_p, log_q))
    for rows_p, rows_q in zip(*parts, strict=True):
        p = functional.log_softmax(rows_p.double() / temperature, dim=-1)
        q = functional.log_softmax(rows_q.double() / temperature, dim=-1)
        total += torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum()
    return total


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


def _logits(model: nn.Module, batch: Tensor) -> Tensor:
    device = (
        "cpu" if model.device.type == "meta" else model.device
    )  # offloaded: accelerate moves the inputs
    return model(input_ids=batch.to(device), use_cache=False).logits


def _rows(logits: Tensor) -> int:
    return max(1, CHUNK // logits.shape[-1])


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


def _check_windows(model: nn.Module, tokens: Tensor, who: str) -> None:
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
