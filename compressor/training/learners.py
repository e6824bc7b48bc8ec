"""What learns: copies in 32 bits of what a compressed model stores.

Masks, integer codes, positions and pivots are fixed; every floating tensor that a storage kind
keeps as a parameter learns: factors, kept sparse values, atoms and codes, wrappers, scales, biases;
or the factors of low-rank storage and the norms alone: WeLore's low-rank components (arXiv
2407.11239; healing card 8.1), whose gradients stay of low rank, while what has no such structure is
frozen. Copies in 32 bits learn (the masters); the modules they were made from stay as they are.
"""

from collections.abc import Iterable, Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compressor.linears import CompressedLinear
from compressor.models.install import fitted

Values = dict[str, dict[str, Tensor]]  # module → name within it → tensor


def learning_parameters(module: nn.Module, train: str) -> dict[str, nn.Parameter]:
    """Return the parameters of a module without children that learn, by name within it.

    Args:
        train: as in the recipe, which trains other modules than linears and norms never.
    """
    if isinstance(module, CompressedLinear):
        return module.trainable(train)
    own = {
        name: parameter
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.is_floating_point()
    }
    if isinstance(module, (nn.Linear, Conv1D)) and train in ("everything", "low_rank"):
        return own if train == "everything" else {}
    if train == "compressed":
        return {}
    return {name: parameter for name, parameter in own.items() if parameter.ndim == 1}


def leaves(
    model: nn.Module, modules: Mapping[str, nn.Module], scopes: Iterable[nn.Module]
) -> dict[str, nn.Module]:
    """What is to stand in the model, by name, for its modules without children below `scopes`:
    those of `modules`, else the model's.
    """
    names = {id(module): name for name, module in model.named_modules()}
    inside = (
        names[id(module)]
        for scope in scopes
        for module in scope.modules()
        if not any(module.children())
    )
    return {name: modules.get(name, model.get_submodule(name)) for name in inside}


def masters(model: nn.Module, originals: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Copies in the dtype in which the model runs, frozen; those that borrow atoms borrow them from
    one another.
    """
    copies = {
        name: deepcopy(fitted(model, name, module)).requires_grad_(False)
        for name, module in originals.items()
    }
    rebind(copies)
    return copies


class Learners:
    """Copies of the modules below `scopes` that have anything to learn."""

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        scopes: Iterable[nn.Module],
        train: str,
    ):
        """modules: what is to stand in the model, by name; what is not among them is taken from the
        model.
        """
        self.originals = {
            name: module
            for name, module in leaves(model, modules, scopes).items()
            if learning_parameters(module, train)
        }
        self.copies = masters(model, self.originals)
        self.parameters: dict[str, nn.Parameter] = {}
        for name, copy in self.copies.items():
            for key, parameter in learning_parameters(copy, train).items():
                self.parameters[f"{name}.{key}"] = parameter

    def values(self, dtypes: Mapping[str, torch.dtype]) -> Values:
        """What has been learned, cast to the dtypes of the output. dtypes: of each parameter, by
        its full name.
        """
        return {
            name: {
                key: p.detach().to(dtypes[f"{name}.{key}"])
                for key, p in copy.named_parameters()
                if f"{name}.{key}" in self.parameters
            }
            for name, copy in self.copies.items()
        }


def rebuilt(originals: Mapping[str, nn.Module], values: Values) -> dict[str, nn.Module]:
    """Copies of modules with new values, in the dtype of these. values: of parameters, and of
    buffers whose contents have changed.
    """
    made = {name: deepcopy(originals[name]) for name in values}
    for name, tensors in values.items():
        copies = {key: tensor.clone() for key, tensor in tensors.items()}
        made[name].load_state_dict(
            copies, strict=False, assign=True
        )  # clears what a module has derived from its buffers
        for key in tensors.keys() & made[name]._parameters.keys():
            made[name]._parameters[key].requires_grad_(False)
    return made


def rebind(modules: Mapping[str, nn.Module]) -> None:
    """Let linears that borrow tensors borrow them from these modules, where the lender is among
    them.
    """
    for module in modules.values():
        if isinstance(module, CompressedLinear) and module.lender is not None:
            lender = modules.get(module.lender)
            if isinstance(lender, CompressedLinear):
                module.borrow(lender)
