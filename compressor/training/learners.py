"""Learners: copies in 32 bits of what a compressed model stores, and what they have in common with
other ways to train.

Masks, integer codes, positions and pivots are fixed; every floating tensor that a storage kind
keeps as a parameter learns: factors, kept sparse values, atoms and codes, wrappers, scales, biases;
or the factors of low-rank storage and the norms alone: WeLore's low-rank components (arXiv
2407.11239), whose gradients stay of low rank, while what has no such structure is
frozen. Copies in 32 bits learn (the masters); the modules they were made from stay as they are.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
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


def collect_leaves(
    model: nn.Module, modules: Mapping[str, nn.Module], scopes: Iterable[nn.Module]
) -> dict[str, nn.Module]:
    """Collect what is to stand in the model, by name, for its modules without children below
    `scopes`: those of `modules`, else the model's.
    """
    names = {id(module): name for name, module in model.named_modules()}
    inside = (
        names[id(module)]
        for scope in scopes
        for module in scope.modules()
        if not any(module.children())
    )
    return {name: modules.get(name, model.get_submodule(name)) for name in inside}


def copy_masters(
    model: PreTrainedModel, originals: Mapping[str, nn.Module]
) -> dict[str, nn.Module]:
    """Copy modules in the dtype in which the model runs, frozen; those that borrow tensors borrow
    them from one another.
    """
    copies = {
        name: deepcopy(fitted(model, name, module)).requires_grad_(False)
        for name, module in originals.items()
    }
    rebind(copies)
    return copies


class Trainable(ABC):
    """Modules that a stage trains in place of those they were made from."""

    originals: dict[str, nn.Module]  # by name, as they are stored
    copies: dict[str, nn.Module]  # by name, which run in the model
    parameters: dict[str, nn.Parameter]  # of the copies, by full name: those that learn

    @abstractmethod
    def learned(self) -> Values:
        """Compute the tensors that the originals would store now, in the dtype that learns."""

    def penalise(self, loss: Tensor) -> Tensor:
        """Add to a loss what this way to train adds."""
        return loss

    def values(self, dtypes: Mapping[str, torch.dtype]) -> Values:
        """Cast what has been learned to the dtypes of the output.

        Args:
            dtypes: of each parameter, by its full name.
        """
        return {
            name: {
                key: tensor.to(dtypes[f"{name}.{key}"]) if tensor.is_floating_point() else tensor
                for key, tensor in tensors.items()
            }
            for name, tensors in self.learned().items()
        }

    def masters(self) -> dict[str, nn.Module]:
        """Build the modules that have been learned, by name, in the dtype that learns."""
        modules = rebuild(self.originals, self.learned())
        rebind(modules)
        return modules


class Learners(Trainable):
    """Copies of the modules below `scopes` that have anything to learn."""

    def __init__(
        self,
        model: PreTrainedModel,
        modules: Mapping[str, nn.Module],
        scopes: Iterable[nn.Module],
        train: str,
    ):
        """Copy the modules.

        Args:
            modules: what is to stand in the model, by name; what is not among them is taken from
                the model.
            train: as in the recipe.
        """
        self.originals = {
            name: module
            for name, module in collect_leaves(model, modules, scopes).items()
            if learning_parameters(module, train)
        }
        self.copies = copy_masters(model, self.originals)
        self.parameters = {
            f"{name}.{key}": parameter
            for name, copy in self.copies.items()
            for key, parameter in learning_parameters(copy, train).items()
        }

    def learned(self) -> Values:
        return {
            name: learned_tensors(name, copy, self.parameters) for name, copy in self.copies.items()
        }


def learned_tensors(
    name: str, copy: nn.Module, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Return the parameters of the copy of one linear that are among those that learn."""
    return {
        key: parameter.detach()
        for key, parameter in copy.named_parameters(recurse=False)
        if f"{name}.{key}" in parameters
    }


def rebuild(originals: Mapping[str, nn.Module], values: Values) -> dict[str, nn.Module]:
    """Copy modules with new values, in the dtype of these.

    Args:
        values: of parameters, and of buffers whose contents have changed.
    """
    modules = {name: deepcopy(originals[name]) for name in values}
    for name, tensors in values.items():
        copies = {key: tensor.clone() for key, tensor in tensors.items()}
        # Clears what a module has derived from its buffers.
        modules[name].load_state_dict(copies, strict=False, assign=True)
        for key, parameter in modules[name].named_parameters(recurse=False):
            if key in tensors:
                parameter.requires_grad_(False)
    return modules


def rebind(modules: Mapping[str, nn.Module]) -> None:
    """Let linears that borrow tensors borrow them from these modules, where the lender is among
    them.
    """
    for module in modules.values():
        if isinstance(module, CompressedLinear) and module.lender is not None:
            lender = modules.get(module.lender)
            if isinstance(lender, CompressedLinear):
                module.borrow(lender)
