"""Values as JSON and tensors, and back."""

import json

import pytest
import torch
from support.sameness import assert_same_output, assert_same_tensors
from support.stores import Asked

from compressor.linalg import Metric
from compressor.linears import Dictionary, LowRank
from compressor.linears.masks import pack_mask
from compressor.plan import Candidate
from compressor.resume.codec import decode, encode
from compressor.statistics import LinearStats


def there_and_back(value, known=None):
    data, tensors = encode(value, known)
    return decode(json.loads(json.dumps(data)), tensors, known)


def test_plain_values_come_back_as_they_were():
    value = {"a": [1, 2.5, None, True, "x"], (1, "b"): (0.1, [torch.bfloat16]), "nan": float("inf")}
    assert there_and_back(value) == value


def test_dataclasses_and_tensors_of_every_dtype_come_back():
    candidate = Candidate("svd", {"rank": 3}, 10, 2, 0.1 + 0.2, None)
    assert there_and_back((candidate,)) == (candidate,)
    for dtype in (torch.float64, torch.bfloat16, torch.uint8, torch.bool, torch.int64):
        tensor = torch.arange(6).reshape(2, 3).to(dtype)
        found = there_and_back([tensor.T])[0]
        assert found.dtype == dtype and torch.equal(found, tensor.T) and found.is_contiguous()


def test_a_tensor_that_is_shared_is_shared_again_and_a_known_one_is_not_stored():
    gram, own = torch.eye(3), torch.ones(2)
    stats = LinearStats(tokens=4, gram=gram)
    value = {"metric": Metric(gram, 0.25), "again": Metric(own, 1.0), "too": own}
    data, tensors = encode(value, stats)
    found = decode(data, tensors, stats)
    assert len(tensors) == 1
    assert found["metric"].moment is gram and found["again"].moment is found["too"] is not own


def test_views_of_one_storage_are_told_apart():
    base = torch.arange(12.0)
    found = there_and_back([base, base[:6], base[6:], base.view(3, 4)])
    assert [each.tolist() for each in found] == [
        each.tolist() for each in (base, base[:6], base[6:], base.view(3, 4))
    ]


def test_modules_compute_the_same_and_borrowers_find_their_lender():
    torch.manual_seed(0)
    pair = LowRank(torch.randn(2, 6), torch.randn(5, 2), None, None)
    lender = Dictionary(
        torch.randn(12), torch.randn(4, 6), pack_mask(torch.ones(12, dtype=torch.bool)), None, 3
    )
    borrower = Dictionary(
        torch.randn(8), lender, pack_mask(torch.ones(8, dtype=torch.bool)), None, 2, lender="first"
    )
    found = there_and_back({"pair": pair, "first": lender, "second": borrower})
    x = torch.randn(7, 6)
    for name, module in {"pair": pair, "first": lender, "second": borrower}.items():
        assert_same_tensors(found[name].state_dict(), module.state_dict())
        assert_same_output(found[name](x), module(x))
        assert not any(p.requires_grad for p in found[name].parameters())
    assert found["second"].lent is found["first"]


def test_tensors_come_back_on_their_devices(device):
    data, tensors = encode([torch.ones(2, device=device), torch.zeros(3)])
    assert [
        each.device.type
        for each in decode(data, {name: each.cpu() for name, each in tensors.items()})
    ] == [device, "cpu"]


def test_tensors_of_another_process_come_to_the_current_device_of_the_type():
    data, tensors = (
        {"list": [{"tensor": ["0", "cuda:1"]}, {"tensor": ["1", "cpu"]}]},
        {"0": Asked(), "1": Asked()},
    )
    assert decode(data, tensors) == ["cuda:1", "cpu"]
    assert decode(data, tensors, foreign=True) == ["cuda", "cpu"]


def test_other_classes_are_refused_both_ways():
    with pytest.raises(TypeError, match="cannot be stored"):
        encode({1, 2})
    with pytest.raises(TypeError, match="not a class of this package"):
        decode({"subprocess:Popen": {"args": "true"}}, {})
