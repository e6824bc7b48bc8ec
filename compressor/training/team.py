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

WAIT = timedelta(
    days=14
)  # for the main process to need the others; a process that ends is noticed at once
BUCKET = (
    2**22
)  # numbers that are averaged in one message: many small messages are slow, large ones need memory


class Dismissed(Exception):
    """This process has done its part."""


class Team:
    """The processes of one run. One alone is a team too, for which nothing here does anything."""

    def __init__(self, processes: int = 1, rank: int = 0, device: str = "cpu"):
        """device: type of the devices that hold the parameters. Nothing is connected yet."""
        self.processes, self.rank, self.device = processes, rank, device
        self.state: PartialState | None = None

    def tell(self, value: Any) -> None:
        """Main process: hand the others a value, anything that `codec` encodes, calling them first
        if they have not been.
        """
        if self.processes == 1:
            return
        if self.state is None:
            self._call(True)
        data, tensors = encode(value)
        with _reporting():
            broadcast_object_list(
                [(data, [(name, one.shape, one.dtype) for name, one in tensors.items()])]
            )
            for tensor in tensors.values():
                broadcast(tensor.to(self.state.device))
            self.state.wait_for_everyone()

    def dismiss(self) -> None:
        """Main process: part from the others, and let them go if they were never called."""
        if self.processes == 1:
            return
        if self.state is None:
            self._call(False)
        self.state.destroy_process_group()

    def called(self) -> bool:
        """Another process: wait until the main one knows whether it needs this one, and say
        which.
        """
        return self._call(False)

    def hear(self) -> Any:
        """Another process: what the main one tells."""
        with _reporting():
            ((data, outline),) = broadcast_object_list([None])
            device = self.state.device
            tensors = {
                name: broadcast(torch.empty(shape, dtype=dtype, device=device))
                for name, shape, dtype in outline
            }
            self.state.wait_for_everyone()
        return decode(data, tensors, foreign=True)

    def mean(self, value: Tensor) -> float:
        """Mean of a number over the processes."""
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
                    [float(one.grad is not None) for one in own], device=self.state.device
                ),
                "sum",
            )
            for bucket in _buckets(
                one for one, count in zip(own, present.tolist(), strict=True) if count
            ):
                gradients = [
                    torch.zeros_like(one) if one.grad is None else one.grad for one in bucket
                ]
                mean = reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
                for parameter, part in zip(
                    bucket, mean.split([one.numel() for one in bucket]), strict=True
                ):
                    parameter.grad = part.view_as(parameter)

    def _call(self, needed: bool) -> bool:
        """Meet; then every process knows what the main one has passed as `needed`."""
        with _reporting():
            self.state = PartialState(cpu=self.device == "cpu", timeout=WAIT)
            (answer,) = broadcast_object_list([needed])
            self.state.wait_for_everyone()
        return answer


ALONE = Team()


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters in lists of at most BUCKET numbers, or of one parameter."""
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        if bucket and sum(one.numel() for one in bucket) + parameter.numel() > BUCKET:
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
