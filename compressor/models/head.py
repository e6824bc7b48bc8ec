"""From final hidden states to logits, in chunks of positions bounded by bytes.

A vocabulary of 262,144 words makes the logits of eight windows of 512 tokens 4.3 GB, and losses
need them several times. So nothing holds logits of more positions than a chunk has.

The trunk of a model is the module that runs the decoder blocks and returns the final hidden states.
The stock `model.forward` runs, and its trunk hands on the hidden states of a chunk: the head, the
soft cap or scale of its logits, and whatever is installed as the head now, are the model's own, and
nothing here knows an architecture.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compressor.errors import CompressorError
from compressor.models.linears import blocks
from compressor.models.partial_forward import (
    capturing,
    input_device,
    passing,
    require_restartable,
    run_until_stopped,
    standing_in,
    watching,
)

NO_LABEL = -100  # label of a position whose next token is not in its window
CPU_CHUNK = 1 << 24  # bytes of logits: fresh memory beyond a cache costs more than the products
GPU_CHUNK = 1 << 28  # bytes of logits: enough rows to keep an accelerator busy
LEAST_ROWS = 64  # positions of a chunk whatever their bytes: fewer would read the head too often
CPU_BLOCK = 1 << 20  # bytes of logits that a softmax works on at a time: they stay in the cache


class Head:
    """The way of a model from final hidden states to logits, with what is installed in it now."""

    def __init__(self, model: PreTrainedModel):
        """Find the trunk by a pass over four tokens, and check that head and trunk make the model.

        Raises CompressorError for a model that runs its blocks itself, or whose logits depend on
        more than what its trunk returns.
        """
        self.model = model
        tokens = torch.arange(4, device=input_device(model))[None]  # one may be padding, of zeros
        with torch.no_grad():
            logits = self._find_trunk(tokens)
            again = self.logits(self.hidden(tokens).flatten(0, 1), tokens.flatten())
        self.vocabulary, self.device = logits.shape[-1], logits.device
        self.row_bytes = self.vocabulary * max(logits.dtype.itemsize, torch.float32.itemsize)
        require_restartable(model, logits.flatten(0, 1), again, "its head cannot be run alone")

    def _find_trunk(self, tokens: Tensor) -> Tensor:
        """Set `trunk` to the outermost module around the blocks that the model calls."""
        *path, _ = blocks(self.model)[0].split(".")
        called: list[nn.Module] = []
        returned: list[Any] = []
        with ExitStack() as stack:
            for depth in range(len(path)):
                module = self.model.get_submodule(".".join(path[: depth + 1]))
                handles = (
                    module.register_forward_pre_hook(lambda module, args: called.append(module)),
                    module.register_forward_hook(lambda *hooked: returned.append(hooked[-1])),
                )
                for handle in handles:
                    stack.callback(handle.remove)
            logits = self.model(input_ids=tokens, use_cache=False).logits
        if not called:
            raise CompressorError(
                f"{type(self.model).__name__}: no module around its decoder blocks returns the "
                "hidden states behind them, so its head cannot be run alone"
            )
        self.trunk, self._returned = called[0], returned[-1]
        return logits

    @property
    def outside(self) -> dict[str, nn.Module]:
        """Modules outside the trunk that hold parameters of their own, by name."""
        inside = {id(module) for module in self.trunk.modules()}
        return {
            name: module
            for name, module in self.model.named_modules()
            if id(module) not in inside and module._parameters
        }

    def hidden(self, input_ids: Tensor) -> Tensor:
        """Run the trunk: (batch, length) int64 → final hidden states (batch, length, hidden)."""
        with capturing(self.trunk.register_forward_hook, lambda module, args, out: out) as seen:
            run_until_stopped(self.model, input_ids)
        return _first(seen[0])

    @torch.no_grad()
    def block_outputs(self, input_ids: Tensor) -> tuple[Tensor, list[Any]]:
        """Run the trunk; return the final hidden states and what each block returned.

        input_ids: (batch, length) int64. What a block returns is a tensor or a tuple.
        """
        with watching(blocks(self.model)[1]) as outputs:
            hidden = self.hidden(input_ids)
        return hidden, outputs

    @torch.no_grad()
    def hidden_from(self, block: int, outputs: list[Any], input_ids: Tensor) -> Tensor:
        """Run the trunk with the blocks before `block` replaced by their cached `outputs`.

        Costs the embedding, blocks `block`, `block` + 1, … and the final norm; `block` = 0 is a
        full pass.
        """
        with passing(blocks(self.model)[1][:block], outputs[:block]):
            return self.hidden(input_ids)

    def logits(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Logits (positions, vocabulary) behind hidden states (positions, hidden) of tokens
        (positions,), int64.
        """
        output = _with_first(self._returned, hidden[None])
        with standing_in([self.trunk], [lambda *args, **kwargs: output]):
            return self.model(input_ids=tokens[None], use_cache=False).logits[0]

    def chunks(self, positions: int, size: int | None = None) -> Iterator[slice]:
        """Slices of a number of positions whose logits take at most `size` bytes (None: what suits
        the device), or belong to LEAST_ROWS positions.
        """
        size = size or (CPU_CHUNK if self.device.type == "cpu" else GPU_CHUNK)
        rows = max(LEAST_ROWS, size // self.row_bytes)
        for start in range(0, positions, rows):
            yield slice(start, min(start + rows, positions))


def next_tokens(tokens: Tensor) -> Tensor:
    """Label of each position: tokens (windows, length) int64 → (windows · length,), NO_LABEL at the
    last position of a window.
    """
    labels = tokens.roll(-1, dims=1)
    labels[:, -1] = NO_LABEL
    return labels.flatten()


def row_blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut logits (positions, vocabulary), and what goes with them row by row, into blocks of rows
    that stay in the cache of a processor; whole on other devices.
    """
    first = tensors[0]
    rows = len(first)
    if first.device.type == "cpu":
        rows = CPU_BLOCK // (first.shape[-1] * torch.float32.itemsize)
    yield from zip(*(tensor.split(max(1, rows)) for tensor in tensors), strict=True)


def _first(output: Any) -> Tensor:
    """Hidden states in what a trunk returns: a tensor, a tuple, or an output of transformers."""
    return output if isinstance(output, Tensor) else output[0]


def _with_first(output: Any, hidden: Tensor) -> Any:
    """An output like `output` that holds other hidden states, and nothing beside them."""
    if isinstance(output, Tensor):
        return hidden
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    return type(output)(**{next(iter(output)): hidden})
