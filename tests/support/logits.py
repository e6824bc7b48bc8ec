"""Chunks of a few positions, and a check that nothing holds the logits of more."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Widest(TorchDispatchMode):
    """Count the rows of the largest tensor whose last dimension is the vocabulary."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if _is_like_logits(value, self.vocabulary):
                self.rows = max(self.rows, value.numel() // self.vocabulary)
        return out


def _is_like_logits(value: object, vocabulary: int) -> bool:
    """Tell logits from other tensors; a transposed weight of the head is not contiguous."""
    return (
        isinstance(value, torch.Tensor)
        and value.shape[-1:] == (vocabulary,)
        and value.is_contiguous()
    )


@contextmanager
def few_at_a_time(monkeypatch: pytest.MonkeyPatch, vocabulary: int, rows: int) -> Iterator[None]:
    """Set chunks to `rows` positions; fail if any tensor of logits, or like them, has more rows."""
    monkeypatch.setattr("compressor.models.head.CPU_CHUNK", vocabulary * 4 * rows)
    monkeypatch.setattr("compressor.models.head.LEAST_ROWS", 1)
    with _Widest(vocabulary) as widest:
        yield
    assert 0 < widest.rows <= rows
