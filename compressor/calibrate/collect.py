"""Sum `LinearStats` in passes over token windows: one Gram for each distinct input, gradients of
every linear from one backward pass.

Products are float32 GEMMs (float64 for a float64 model) of one batch, sums over batches float64;
the model runs in the dtype it has. Sums over the tokens of a batch are `Tensor.sum`, which is
pairwise: a product with a vector loses a digit on 4,096 tokens.

The loss is the *sum* over positions of the next-token cross-entropy in nats, so g of a token is its
own gradient and no batch mean enters. The last position of a window has no label and its g is
exactly zero: `grad_tokens` counts the other positions, trimmed ones apart. The loss and its
gradient at the final hidden states are computed in chunks of positions (`models.head`), so that no
logits of a whole batch are held.
"""

from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from compressor.errors import ConfigError, DataError, NumericalError
from compressor.models.head import NO_LABEL, Head, next_tokens, row_blocks
from compressor.models.linears import LinearInfo, blocks
from compressor.models.partial_forward import input_device, run_until_stopped, stop
from compressor.recipe.sections import Gradients
from compressor.resume.store import NOWHERE, Store
from compressor.runtime.progress import Progress, silent
from compressor.statistics import LinearStats

INPUT_FIELDS = frozenset({"gram", "sum", "abs_sum"})
GRADIENT_FIELDS = frozenset({"fisher", "grad_gram"})
LEAST_WIDTH = 128  # narrower second moments are one product: smaller ones are slower for their size


def collect(
    model: PreTrainedModel,
    linears: Mapping[str, LinearInfo],
    tokens: Tensor,
    needs: Mapping[str, frozenset[str]],
    batch_size: int = 8,
    gradients: Gradients | None = None,
    memory: int | None = None,
    generator: torch.Generator | None = None,
    progress: Progress = silent,
    store: Store = NOWHERE,
) -> dict[str, LinearStats]:
    """Collect for each linear the fields of `LinearStats` that `needs` names, over windows `tokens`
    (n, length) int64.

    Linears with equal `feeds` share the very same tensors of input fields. Sums larger than
    `memory` bytes are collected in several passes and moved to the CPU after each; `store` keeps
    what a pass found. `generator` draws the labels when `gradients.labels` is `sampled`. A model
    spread or offloaded by accelerate serves input fields; gradient fields need its weights in
    memory.

    Raises NumericalError naming linear and windows on NaN or infinity, ConfigError for gradients of
    an offloaded model or of a linear that sees routed tokens, DataError for windows too short for
    gradients. The sums of a linear that no token reaches are zero.
    """
    gradients = gradients or Gradients()
    uniform = _uniform(
        tokens, gradients, generator
    )  # drawn once: passes and batch sizes must not change the labels
    passes = waves(linears, needs, memory)
    stats = {name: LinearStats() for name in linears}
    for number, wave in enumerate(passes, start=1):
        sums = _Pass(model, wave, needs, gradients)
        title = "calibrate" if len(passes) == 1 else f"calibrate, pass {number} of {len(passes)}"
        batches = progress(range(0, len(tokens), batch_size), title)
        key = {name: sorted(sums.needs[name]) for name in wave}
        stats |= store.recall(
            "statistics",
            key,
            partial(sums.over, batches, batch_size, tokens, uniform, keep_device=len(passes) == 1),
        )
    return stats


def waves(
    linears: Mapping[str, LinearInfo], needs: Mapping[str, frozenset[str]], memory: int | None
) -> list[dict[str, LinearInfo]]:
    """Divide the linears that need anything into passes whose sums take at most `memory` bytes, in
    the order of the model.

    Linears that share an input stay together, so one of them alone may exceed the budget.
    """
    groups: dict[str, dict[str, LinearInfo]] = {}
    for name, info in linears.items():
        if needs.get(name):
            groups.setdefault(info.feeds, {})[name] = info
    passes: list[dict[str, LinearInfo]] = []
    room = 0.0
    for group in sorted(
        groups.values(), key=lambda group: max(info.block for info in group.values())
    ):
        size = _bytes(group, needs)
        if not passes or size > room:
            passes.append({})
            room = float("inf") if memory is None else memory
        passes[-1] |= group
        room -= size
    return passes


def _bytes(group: Mapping[str, LinearInfo], needs: Mapping[str, frozenset[str]]) -> int:
    """Bytes of the float64 sums of linears that share one input."""
    width = next(iter(group.values())).in_features
    inputs = {field for name in group for field in needs[name] & INPUT_FIELDS}
    numbers = sum(width**2 if field == "gram" else width for field in inputs)
    for name, info in group.items():
        numbers += width * ("fisher" in needs[name]) + info.out_features**2 * (
            "grad_gram" in needs[name]
        )
    return 8 * numbers


def _uniform(
    tokens: Tensor, gradients: Gradients, generator: torch.Generator | None
) -> Tensor | None:
    """Draw the random number (n, length) behind each sampled label; None for labels from the
    data.
    """
    if gradients.labels == "data":
        return None
    if generator is None:
        raise ValueError("sampled labels need a generator")
    return torch.rand(
        tokens.shape, dtype=torch.float64, generator=generator, device=generator.device
    )


class Sums:
    """Token count and named float64 sums of one stream of vectors; NaN and infinity are refused."""

    def __init__(self, stream: str):
        self.stream = stream
        self.tokens = 0
        self.fields: dict[str, Tensor] = {}

    def add(self, field: str, value: Tensor, where: str) -> None:
        """Add a vector or a second moment; of the latter the diagonal tells whether every entry of
        the stream is finite.
        """
        if not torch.isfinite((value.diagonal() if value.ndim == 2 else value).sum()):
            raise NumericalError(
                f"{self.stream} not finite in {where}; check the weights, or run the model in a "
                "wider dtype"
            )
        if field in self.fields:
            self.fields[field] += value
        else:
            self.fields[field] = value.double()

    def add_inputs(self, x: Tensor, fields: Container[str], where: str) -> None:
        """Add those of the input fields that are in `fields`. x: (tokens, in), float32 or wider."""
        self.tokens += len(x)
        if "gram" in fields:
            self.add("gram", second_moment(x), where)
        if "sum" in fields:
            self.add("sum", x.sum(0), where)
        if "abs_sum" in fields:
            self.add("abs_sum", x.abs().sum(0), where)


class _Pass:
    """One pass over the windows: the hooks on the linears of a wave and the sums they fill."""

    def __init__(
        self,
        model: PreTrainedModel,
        wave: Mapping[str, LinearInfo],
        needs: Mapping[str, frozenset[str]],
        gradients: Gradients,
    ):
        self.model, self.wave, self.gradients = model, wave, gradients
        self.needs = {name: needs[name] for name in wave}
        self.backward = any(fields & GRADIENT_FIELDS for fields in self.needs.values())
        self.sharing: dict[str, list[str]] = {}  # `feeds` → linears that receive that input
        for name, info in wave.items():
            self.sharing.setdefault(info.feeds, []).append(name)
        self.inputs = {
            feeds: Sums(f"{names[0]}: input activations are")
            for feeds, names in self.sharing.items()
        }
        self.outputs = {name: Sums(f"{name}: output gradients are") for name in wave}
        self.windows = self.length = 0  # of what is running: a batch, or a chunk behind the trunk
        self.where = ""
        if self.backward and any(
            parameter.device.type == "meta" for parameter in model.parameters()
        ):
            raise ConfigError(
                "this recipe needs gradients, which are not collected from a model with weights "
                "offloaded to CPU or disk; "
                "choose a method that needs only Grams, or a device that holds the whole model"
            )
        last = max(info.block for info in wave.values())
        behind = last == len(blocks(model)[1])  # a linear behind the blocks
        self.last_block = None if self.backward or behind else blocks(model)[1][last]
        self.head = Head(model) if self.last_block is None else None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hook the linears and freeze the weights inside the `with`."""
        with ExitStack() as stack, freeze_weights(self.model):
            for feeds, names in self.sharing.items():
                fields = frozenset().union(*(self.needs[name] & INPUT_FIELDS for name in names))
                module = self.wave[names[0]].module
                handle = module.register_forward_pre_hook(partial(self._add_input, feeds, fields))
                stack.callback(handle.remove)
            for name, info in self.wave.items():
                if self.needs[name] & GRADIENT_FIELDS:
                    hook = partial(self._await_gradient, name)
                    stack.callback(info.module.register_forward_hook(hook).remove)
            if self.last_block is not None:
                stack.callback(self.last_block.register_forward_hook(stop).remove)
            yield

    def over(
        self,
        starts: Iterable[int],
        size: int,
        tokens: Tensor,
        uniform: Tensor | None,
        keep_device: bool,
    ) -> dict[str, LinearStats]:
        """Run all batches, and hand over the sums."""
        with self.watching():
            for start in starts:
                batch = slice(start, start + size)
                self.run(start, tokens[batch], None if uniform is None else uniform[batch])
        return self.result(keep_device)

    def run(self, start: int, tokens: Tensor, uniform: Tensor | None) -> None:
        """Run one batch.

        Args:
            start: number of the first window.
            tokens: (windows, length) int64.
            uniform: (windows, length), draws the labels; None for labels from the data.
        """
        self.where = f"windows {start} to {start + len(tokens) - 1}"
        self.windows, self.length = tokens.shape
        with torch.set_grad_enabled(self.backward):
            if self.head is None:
                run_until_stopped(self.model, tokens)
                return
            tokens = tokens.to(input_device(self.model))
            hidden = self.head.hidden(tokens)  # (windows, length, hidden)
            received = hidden.detach().flatten(0, 1).requires_grad_(self.backward)
            self._run_head(self.head, received, tokens, uniform)
            self.windows, self.length = tokens.shape
            if hidden.requires_grad and received.grad is not None:
                hidden.backward(received.grad.view_as(hidden))

    def _run_head(self, head: Head, hidden: Tensor, tokens: Tensor, uniform: Tensor | None) -> None:
        """Run what lies behind the trunk, and its backward pass, in chunks of positions: of whole
        windows where one of its linears is watched.

        hidden: (positions, hidden), whose gradient is accumulated.
        """
        labels, ids = next_tokens(tokens), tokens.flatten()
        if head.outside.keys() & self.wave.keys():
            self.windows = 1
            chunks = [slice(end - self.length, end) for end in self._window_ends(len(ids))]
        else:
            chunks = list(head.chunks(len(ids)))
        for rows in chunks:
            logits = head.logits(hidden[rows], ids[rows])
            if self.backward:
                drawn = None
                if uniform is not None:
                    drawn = draw_labels(logits, uniform.flatten()[rows, None]).squeeze(1)
                _summed_loss(logits, labels[rows], drawn).backward()

    def _window_ends(self, positions: int) -> range:
        return range(self.length, positions + 1, self.length)

    def _add_input(
        self, feeds: str, fields: frozenset[str], module: nn.Module, args: tuple[Any, ...]
    ) -> None:
        self.inputs[feeds].add_inputs(wide(args[0].detach()).flatten(0, -2), fields, self.where)

    def _await_gradient(
        self, name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor
    ) -> None:
        """Ask autograd for the gradient at the output; where nothing before it needs one, the
        backward pass ends here.
        """
        if not output.requires_grad:
            output.requires_grad_()
        # kept until the backward pass
        x = args[0].detach() if "fisher" in self.needs[name] else None
        output.register_hook(partial(self._add_gradient, name, x))

    def _add_gradient(self, name: str, x: Tensor | None, gradient: Tensor) -> None:
        sums, fields = self.outputs[name], self.needs[name]
        dropped, counted = self._positions()
        if gradient.shape[:-1].numel() != self.windows * self.length:
            raise ConfigError(
                f"{name} sees routed tokens, whose gradients are not collected; choose a method "
                "without gradients for it"
            )
        inner = slice(dropped, self.length - dropped)
        g = wide(gradient).reshape(self.windows, self.length, -1)[:, inner]  # (windows, kept, out)
        norms = torch.linalg.vector_norm(g, dim=-1)  # (windows, kept)
        if self.gradients.clip is not None:
            scale = clip_scale(norms, counted, *self.gradients.clip)
            g, norms = g * scale[..., None], norms * scale
        sums.tokens += self.windows * counted
        if x is not None:
            x = wide(x).reshape(self.windows, self.length, -1)[:, inner]
            sums.add("fisher", (x * norms[..., None]).square_().sum((0, 1)), self.where)
        if "grad_gram" in fields:
            sums.add("grad_gram", second_moment(g.flatten(0, 1)), self.where)

    def _positions(self) -> tuple[int, int]:
        """Positions dropped at either end of a window, and those counted: what is left, less the
        one that has no label.
        """
        dropped = int(self.gradients.trim * self.length)
        counted = self.length - dropped - max(dropped, 1)
        if counted < 1:
            raise DataError(
                f"windows of {self.length} tokens leave no position for gradients with trim "
                f"{self.gradients.trim}"
            )
        return dropped, counted

    def result(self, keep_device: bool) -> dict[str, LinearStats]:
        """Hand over the sums; each linear gets the fields it needs, zero where no token or no
        gradient came.
        """
        if not keep_device:
            for stream in (*self.inputs.values(), *self.outputs.values()):
                stream.fields = {field: value.cpu() for field, value in stream.fields.items()}
        stats = {}
        for name, info in self.wave.items():
            inputs, outputs = self.inputs[info.feeds], self.outputs[name]
            sums = inputs.fields | outputs.fields
            fields: dict[str, Any] = {
                field: sums[field] if field in sums else zero_sum(field, info)
                for field in self.needs[name]
            }
            stats[name] = LinearStats(tokens=inputs.tokens, grad_tokens=outputs.tokens, **fields)
        return stats


def zero_sum(field: str, info: LinearInfo) -> Tensor:
    """Return the sum of a field over no token, float64."""
    size = info.out_features if field == "grad_gram" else info.in_features
    return torch.zeros(
        (size, size) if field in ("gram", "grad_gram") else (size,), dtype=torch.float64
    )


def clip_scale(norms: Tensor, counted: int, low: float, high: float) -> Tensor:
    """Factors (windows, positions) that bring each token's gradient norm into [low, high] × the
    mean norm of its window.

    norms: (windows, positions), the mean taken over `counted` of them (a position without label has
    norm 0 and stays 0). The mean is a window's, not a batch's, so that the batch size changes
    nothing.
    """
    mean = norms.sum(-1, keepdim=True) / counted
    return torch.where(norms > 0, norms.clamp(low * mean, high * mean) / norms, 0.0)


def second_moment(x: Tensor) -> Tensor:
    """Sum x xᵀ over tokens: (tokens, in) → (in, in).

    On a CPU the products above the diagonal are computed once, which is 5/8 of the work of a plain
    product, by halves down to LEAST_WIDTH.
    """
    width = x.shape[1]
    if x.device.type != "cpu" or width <= LEAST_WIDTH:
        return x.T @ x
    half = width // 2
    left, right = x[:, :half], x[:, half:]
    moment = x.new_empty(width, width)
    moment[:half, :half], moment[half:, half:] = second_moment(left), second_moment(right)
    moment[:half, half:] = left.T @ right
    moment[half:, :half] = moment[:half, half:].T
    return moment


def _summed_loss(logits: Tensor, labels: Tensor, drawn: Tensor | None) -> Tensor:
    """Sum of the next-token cross-entropy in nats, scalar float32.

    Args:
        logits: (positions, vocabulary).
        labels: (positions,) int64, the next token of each; NO_LABEL where there is none.
        drawn: (positions,) int64, labels in their place; None for the data's own.
    """
    labels = labels.to(logits.device)
    if drawn is not None:
        labels = torch.where(labels == NO_LABEL, NO_LABEL, drawn)
    return functional.cross_entropy(wide(logits), labels, ignore_index=NO_LABEL, reduction="sum")


@torch.no_grad()
def draw_labels(logits: Tensor, uniform: Tensor) -> Tensor:
    """Draw labels from softmax(logits): those at which the cumulative sum passes a number.

    Args:
        logits: (positions, vocabulary).
        uniform: (positions, samples) in [0, 1), float64.

    Returns:
        (positions, samples) int64.
    """
    labels = []
    for rows, numbers in row_blocks(logits, uniform.to(logits.device)):
        cumulative = rows.softmax(-1, dtype=torch.float64).cumsum(-1)
        heights = numbers * cumulative[:, -1:]
        labels.append(torch.searchsorted(cumulative, heights.contiguous()))
    return torch.cat(labels)


def wide(tensor: Tensor) -> Tensor:
    """Return half-precision tensors as float32, others as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@contextmanager
def freeze_weights(model: PreTrainedModel) -> Iterator[None]:
    """Keep the model in evaluation mode, without weight gradients, inside the `with`, so that a
    backward pass costs only the input gradients.
    """
    trained, training = (
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        model.training,
    )
    try:
        model.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        model.train(training)
