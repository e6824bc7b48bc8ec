"""Several processes that take the steps of one training together, through accelerate: each computes
gradients on windows of its own.

The main process decides everything and says where training stands before each run of steps; the
others do as they are told. Gradients are averaged over the processes at each step, so that all of
them hold the same parameters to the bit. No connection is made before the main process needs the
others, which may take hours.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, broadcast_object_list, reduce
from torch import Tensor, nn

from compressor.errors import CompressorError
from compressor.resume.codec import decode, encode

# for the main process to need the others; a process that ends is noticed at once
WAIT = timedelta(days=14)
# numbers that are averaged in one message: many small messages are slow, large ones need memory
BUCKET = 2**22


class Dismissed(Exception):
    """This process has done its part."""


class Team:
    """Processes of one run. One alone is a team too, for which nothing here does anything."""

    def __init__(self, processes: int = 1, rank: int = 0, device: str = "cpu"):
        """device: type of the devices that hold the parameters. Nothing is connected yet."""
        self.processes, self.rank, self.device = processes, rank, device
        self.state: PartialState | None = None

    @property
    def connection(self) -> PartialState:
        """Connection to the other processes, once they have met."""
        assert self.state is not None, "the processes have not met"
        return self.state

    def tell(self, value: Any) -> None:
        """Hand the others a value, anything that `codec` encodes, calling them first if they have
        not been. For the main process.
        """
        if self.processes == 1:
            return
        if self.state is None:
            self._call(True)
        data, tensors = encode(value)
        with _reporting():
            broadcast_object_list(
                [(data, [(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()])]
            )
            for tensor in tensors.values():
                broadcast(tensor.to(self.connection.device))
            self.connection.wait_for_everyone()

    def dismiss(self) -> None:
        """Part from the others, and let them go if they were never called. For the main process."""
        if self.processes == 1:
            return
        if self.state is None:
            self._call(False)
        self.connection.destroy_process_group()

    def called(self) -> bool:
        """Wait until the main process knows whether it needs this one, and say which."""
        return self._call(False)

    def hear(self) -> Any:
        """Receive what the main process tells. For the other processes."""
        with _reporting():
            ((data, outline),) = broadcast_object_list([None])
            device = self.connection.device
            tensors = {
                name: broadcast(torch.empty(shape, dtype=dtype, device=device))
                for name, shape, dtype in outline
            }
            self.connection.wait_for_everyone()
        return decode(data, tensors, foreign=True)

    def mean(self, value: Tensor) -> float:
        """Average a number over the processes."""
        if self.processes == 1:
            return value.item()
        with _reporting():
            return reduce(value, "mean").item()

    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """Let every gradient be its mean over the processes; one that no process has stays
        absent.
        """
        if self.processes == 1:
            return
        own = list(parameters)
        with _reporting():
            present = reduce(
                torch.tensor(
                    [float(parameter.grad is not None) for parameter in own],
                    device=self.connection.device,
                ),
                "sum",
            )
            for bucket in _buckets(
                parameter for parameter, count in zip(own, present.tolist(), strict=True) if count
            ):
                gradients = [
                    torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                    for parameter in bucket
                ]
                mean = reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
                sizes = [parameter.numel() for parameter in bucket]
                for parameter, gradient in zip(bucket, mean.split(sizes), strict=True):
                    parameter.grad = gradient.view_as(parameter)

    def _call(self, needed: bool) -> bool:
        """Meet the other processes; then each knows what the main one has passed as `needed`."""
        with _reporting():
            self.state = PartialState(cpu=self.device == "cpu", timeout=WAIT)
            (answer,) = broadcast_object_list([needed])
            self.connection.wait_for_everyone()
        return answer


ALONE = Team()


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Collect parameters in lists of at most BUCKET numbers, or of one parameter."""
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        if bucket and sum(other.numel() for other in bucket) + parameter.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


@contextmanager
def _reporting() -> Iterator[None]:
    """Say in one line that another process is gone: all that can go wrong between processes but
    memory, which is this one's.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        first = str(error).strip().splitlines()[0]
        raise CompressorError(
            f"another process of this run has ended or cannot be reached ({first}); see its message"
        ) from error
