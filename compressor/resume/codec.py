"""Values of this package as JSON and tensors, and back, without pickles: what a stopped run has
finished can be read by the next one.

Encoded are numbers, text, None, dtypes, lists, tuples, dictionaries, tensors, compressed linears,
and the dataclasses and named tuples of this package. A tensor that occurs twice is stored once and
is one tensor again; tensors that are at hand anyway are not stored at all.

Decoded tensors are contiguous copies in memory of their own, whichever way they were laid out
before: products of matrices depend on the layout in their last bits, and a run that goes on must
see the very layout that an unbroken one sees. Each is on the device that it was on, wherever it has
been meanwhile: what is computed with it is there too.
"""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from compressor.linears import CompressedLinear, build_empty

PACKAGE = __name__.partition(".")[0]


def encode(value: Any, known: Any = None) -> tuple[Any, dict[str, Tensor]]:
    """JSON and contiguous tensors by name for a value. known: a value whose tensors `decode` is
    given again; they are stored as references.

    Raises TypeError for anything that is not listed above.
    """
    encoder = _Encoder(known)
    data = encoder.encode(value)
    return data, {name: tensor.contiguous() for name, tensor in encoder.tensors.items()}


def decode(data: Any, tensors: dict[str, Tensor], known: Any = None, foreign: bool = False) -> Any:
    """The value behind `encode`'s answer, its tensors on the devices they were on, wherever those
    given are.

    foreign: whether another process has encoded it; each tensor then goes to this process's own
    device of that type.
    """
    return _Decoder(tensors, known, foreign).decode(data)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor of a value, in a fixed order, modules apart."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def _place(tensor: Tensor) -> tuple:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device


def _kind(value: Any) -> str:
    kind = type(value)
    if kind.__module__.partition(".")[0] != PACKAGE:
        raise TypeError(f"{kind.__module__}.{kind.__qualname__} cannot be stored")
    return f"{kind.__module__}:{kind.__qualname__}"


class _Encoder:
    def __init__(self, known: Any):
        self.tensors: dict[str, Tensor] = {}
        self.seen: dict[tuple, dict[str, Any]] = {
            _place(tensor): {"known": index} for index, tensor in enumerate(tensors_in(known))
        }
        self.modules: dict[int, dict[str, int]] = {}

    def encode(self, value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, Tensor):
            return self.tensor(value.detach())
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, CompressedLinear):
            return self.module(value)
        if isinstance(value, dict):
            return {"dict": [[self.encode(key), self.encode(item)] for key, item in value.items()]}
        if isinstance(value, (list, tuple)):
            name = (
                "list"
                if isinstance(value, list)
                else "tuple"
                if type(value) is tuple
                else _kind(value)
            )
            return {name: [self.encode(item) for item in value]}
        if is_dataclass(value):
            return {
                _kind(value): {
                    field.name: self.encode(getattr(value, field.name)) for field in fields(value)
                }
            }
        raise TypeError(f"{type(value).__qualname__} cannot be stored")

    def tensor(self, value: Tensor) -> dict[str, Any]:
        place = _place(value)
        if place not in self.seen:
            name = str(len(self.tensors))
            self.tensors[name] = value  # keeps it alive, so its place stays its own
            self.seen[place] = {"tensor": [name, str(value.device)]}
        return self.seen[place]

    def module(self, value: CompressedLinear) -> dict[str, Any]:
        if id(value) in self.modules:
            return self.modules[id(value)]
        spec, state = value.spec(), value.state_dict()
        names = build_empty(
            spec, torch.float32
        ).state_dict()  # a lender that was given a residual shares its table of tensors
        lent = self.encode(value.lent)
        self.modules[id(value)] = {"module": len(self.modules)}
        return {
            "new": {
                "spec": spec,
                "state": {name: self.encode(state[name]) for name in names},
                "lent": lent,
            }
        }


class _Decoder:
    def __init__(self, tensors: dict[str, Tensor], known: Any, foreign: bool):
        self.tensors, self.foreign = tensors, foreign
        self.decoded: dict[str, Tensor] = {}
        self.known = list(tensors_in(known))
        self.modules: list[CompressedLinear] = []

    def decode(self, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        ((kind, content),) = data.items()
        match kind:
            case "tensor":
                return self.tensor(*content)
            case "known":
                return self.known[content]
            case "module":
                return self.modules[content]
            case "dtype":
                return getattr(torch, content)
            case "list":
                return [self.decode(item) for item in content]
            case "tuple":
                return tuple(self.decode(item) for item in content)
            case "dict":
                return {self.decode(key): self.decode(item) for key, item in content}
            case "new":
                return self.module(content)
        return self.record(kind, content)

    def tensor(self, name: str, where: str) -> Tensor:
        if name not in self.decoded:
            device = (
                torch.device(where).type if self.foreign else where
            )  # a type stands for the current device of that type
            self.decoded[name] = self.tensors[name].to(
                device, copy=True, memory_format=torch.contiguous_format
            )
        return self.decoded[name]

    def record(self, kind: str, content: Any) -> Any:
        """A dataclass, from its fields by name, or a named tuple."""
        module, _, name = kind.partition(":")
        if module.partition(".")[0] != PACKAGE:
            raise TypeError(f"{kind} is not a class of this package")
        found = getattr(import_module(module), name)
        if isinstance(content, list):
            return found(*(self.decode(item) for item in content))
        return found(**{field: self.decode(item) for field, item in content.items()})

    def module(self, content: dict[str, Any]) -> CompressedLinear:
        state = {name: self.decode(tensor) for name, tensor in content["state"].items()}
        floating = next(
            (tensor.dtype for tensor in state.values() if tensor.is_floating_point()), torch.float32
        )
        made = build_empty(content["spec"], floating)
        made.load_state_dict(state, assign=True)
        if content["lent"] is not None:
            made.borrow(self.decode(content["lent"]))
        self.modules.append(made)
        return made
