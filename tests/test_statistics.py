"""Statistics are sums: shards add, and what is missing is named."""

import pytest
import torch

from compressor.errors import DataError
from compressor.statistics import LinearStats, describe_blind_spots


def shard(seed: int, tokens: int = 5) -> LinearStats:
    x = torch.randn(tokens, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return LinearStats(tokens=tokens, gram=x.T @ x, sum=x.sum(0), grad_tokens=tokens - 1)


def test_shards_add_field_by_field():
    first, second = shard(0), shard(1, tokens=7)
    both = first + second
    assert (both.tokens, both.grad_tokens) == (12, 10)
    assert torch.equal(both.gram, first.gram + second.gram)
    assert torch.equal(both.sum, first.sum + second.sum)
    assert both.abs_sum is None and both.grad_gram is None


def test_adding_leaves_the_shards_alone():
    first, second = shard(0), shard(1)
    before = first.gram.clone()
    first + second
    assert torch.equal(first.gram, before)


def test_shards_with_other_fields_do_not_add():
    with pytest.raises(DataError, match="only one of them has 'gram'"):
        shard(0) + LinearStats(tokens=5, sum=torch.zeros(3))


def test_require_names_the_linear_the_missing_fields_and_the_command():
    stats = shard(0)
    stats.require("layers.0.q", frozenset({"gram", "sum"}))
    with pytest.raises(
        DataError,
        match=r"layers\.0\.q: the statistics lack fisher, grad_gram; .*compressor calibrate",
    ):
        stats.require("layers.0.q", frozenset({"gram", "grad_gram", "fisher"}))


def test_inputs_that_the_text_never_sets_and_texts_shorter_than_an_input_are_told():
    x = torch.randn(9, 4, dtype=torch.float64)
    x[:, 2] = 0
    whole = LinearStats(tokens=9, gram=torch.eye(4, dtype=torch.float64))
    stats = {
        "a": whole,
        "b": LinearStats(tokens=9, gram=x.T @ x),
        "c": LinearStats(tokens=2, gram=whole.gram),
        "d": LinearStats(tokens=9),
    }
    dead, few = describe_blind_spots(stats)
    assert dead == "1 linears have inputs that the text never sets (b: 1 of 4)"
    assert few == "1 linears have more inputs than the text has tokens (c: 2 for 4); give more text"
    assert describe_blind_spots({"a": whole}) == []
