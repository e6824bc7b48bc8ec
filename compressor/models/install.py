"""Put modules in the place of linears, and take them out again."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy

from accelerate.utils import align_module_device
from torch import nn
from transformers import PreTrainedModel


def fitted(model: PreTrainedModel, name: str, module: nn.Module) -> nn.Module:
    """`module` in the floating dtype and on the device of what stands at `name`: itself, or a copy
    if it must change.
    """
    old = model.get_submodule(name)
    with align_module_device(old):
        first = next(old.parameters(recurse=False))
        device, dtype = first.device, first.dtype
    if any(
        tensor.device != device or (tensor.is_floating_point() and tensor.dtype != dtype)
        for tensor in module.state_dict().values()
    ):
        return deepcopy(module).to(device=device, dtype=dtype)
    return module


def replace(model: PreTrainedModel, name: str, module: nn.Module) -> None:
    """Install `module` in place of what stands at `name`, in its floating dtype and on its device;
    copied if it must change.

    A tied linear is untied: what it was tied to, the embedding of an lm_head, keeps the dense
    weight. The config has one flag for all ties, so whatever else is tied is stored by itself too.
    """
    model.set_submodule(name, fitted(model, name, module))
    if f"{name}.weight" in model.all_tied_weights_keys:
        model.all_tied_weights_keys = {}
        model.config.tie_word_embeddings = False


@contextmanager
def installed(model: PreTrainedModel, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Have `modules` (name → module) in the model inside the `with`; the former modules are back
    afterwards, whatever happens.
    """
    former = {name: model.get_submodule(name) for name in modules}
    tied, tie = dict(model.all_tied_weights_keys), model.config.tie_word_embeddings
    try:
        for name, module in modules.items():
            replace(model, name, module)
        yield
    finally:
        for name, module in former.items():
            model.set_submodule(name, module)
        model.all_tied_weights_keys, model.config.tie_word_embeddings = tied, tie
