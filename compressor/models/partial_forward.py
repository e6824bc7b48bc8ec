"""Forward passes in which decoder blocks run otherwise: from a cached output of the block before,
or once more in the backward pass.

The stock `model.forward` runs; decoder blocks that need no recomputation hand on a cached output.
Masks, positions and whatever else a model computes around its blocks come from its own code, so
nothing here knows an architecture.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from compressor.errors import CompressorError
from compressor.models.linears import blocks

# ‖logits − restarted logits‖ / ‖logits‖; equal on CPUs, while some GPU kernels add in varying order
RESTART_TOLERANCE = 1e-2


@torch.no_grad()
def block_outputs(model: PreTrainedModel, input_ids: Tensor) -> tuple[Tensor, list[Any]]:
    """Run the model once; return logits (batch, length, vocabulary) and what each block returned (a
    tensor or a tuple).

    input_ids: (batch, length) int64.
    """
    with watching(blocks(model)[1]) as outputs:
        logits = model(input_ids=input_ids, use_cache=False).logits
    return logits, outputs


@contextmanager
def watching(modules: nn.ModuleList) -> Iterator[list[Any]]:
    """The list to which each module adds what it returns (a tensor or a tuple) inside the
    `with`.
    """
    outputs: list[Any] = []
    handles = [
        module.register_forward_hook(lambda module, args, output: outputs.append(output))
        for module in modules
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def forward_from(
    model: PreTrainedModel, block: int, outputs: list[Any], input_ids: Tensor
) -> Tensor:
    """Logits (batch, length, vocabulary) with the blocks before `block` replaced by their cached
    `outputs`.

    Costs the embedding, blocks `block`, `block` + 1, … and the head; `block` = 0 is a full pass,
    the number of blocks runs the head alone.
    """
    with passing(blocks(model)[1][:block], outputs[:block]):
        return model(input_ids=input_ids, use_cache=False).logits


@contextmanager
def passing(modules: nn.ModuleList, outputs: list[Any]) -> Iterator[None]:
    """Let each module return its cached output."""
    with standing_in(
        modules, [lambda *args, _output=output, **kwargs: _output for output in outputs]
    ):
        yield


@contextmanager
def recomputing(model: PreTrainedModel) -> Iterator[None]:
    """Keep of every decoder block only what went in until the backward pass runs the block again;
    gradients are the same.

    Transformers' own way asks for a model in training mode, with dropout.
    """
    modules = blocks(model)[1]
    again = [
        partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)
        for module in modules
    ]
    with standing_in(modules, again):
        yield


@contextmanager
def standing_in(modules: nn.ModuleList, forwards: list[Callable]) -> Iterator[None]:
    """Let each module run another `forward`. That is hidden, not the module: models read attributes
    of their blocks.
    """
    hidden = [
        module.__dict__.get("forward") for module in modules
    ]  # accelerate puts its own `forward` there
    try:
        for module, forward in zip(modules, forwards, strict=True):
            module.forward = forward
        yield
    finally:
        for module, forward in zip(modules, hidden, strict=True):
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = forward


def require_restartable(
    model: PreTrainedModel, logits: Tensor, restarted: Tensor, cure: str
) -> None:
    """Raise CompressorError, ending with `cure`, if a pass restarted between blocks does not give
    the logits of the full pass.
    """
    if (logits - restarted).norm() > RESTART_TOLERANCE * logits.norm():
        raise CompressorError(
            f"{type(model).__name__}: a forward pass restarted between its blocks differs from "
            f"the full one; {cure}"
        )


class Restart:
    """Cached block outputs of a model as it is now, for measuring changes to one block at the price
    of the blocks after it.
    """

    def __init__(self, model: PreTrainedModel, batches: list[Tensor]):
        """Run the model on each of `batches`, (batch, length) int64 on the model's device, and keep
        every block's output there.

        Raises CompressorError if a restart in the middle does not reproduce the logits: then blocks
        of this architecture pass each other more than their output.
        """
        self.model, self.batches = model, batches
        self.outputs: list[list[Any]] = []
        for index, batch in enumerate(batches):
            logits, outputs = block_outputs(model, batch)
            self.outputs.append(outputs)
            if index == 0:
                cure = (
                    "choose an allocation that needs no probe (allocation.damage: two_sided or "
                    "relative_error)"
                )
                require_restartable(model, logits, self.logits(0, (len(outputs) + 1) // 2), cure)

    def logits(self, index: int, block: int) -> Tensor:
        """Logits (batch, length, vocabulary) of batch `index`, recomputed from `block` on with the
        modules now in the model.
        """
        return forward_from(self.model, block, self.outputs[index], self.batches[index])
