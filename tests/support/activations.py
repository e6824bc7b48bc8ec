"""Token windows, and statistics by their definition: each window on its own, by plain autograd."""

from functools import partial

import torch
from torch.nn import functional

from support.models import VOCABULARY

ALL = frozenset({"gram", "sum", "abs_sum", "fisher", "grad_gram"})
GRAM = frozenset({"gram"})
FIELDS = sorted(ALL)
PIECES = 1e-6  # relative, between batch sizes and passes: float32 products, float64 sums
LENGTH = 12


def windows(count: int = 6, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(1))


def everywhere(found, fields=ALL):
    return dict.fromkeys(found, fields)


def distance(one, other):
    return ((one - other).norm() / other.norm()).item()


def assert_same(one, other, tolerance=PIECES):
    assert one.keys() == other.keys()
    for name in one:
        assert (one[name].tokens, one[name].grad_tokens) == (
            other[name].tokens,
            other[name].grad_tokens,
        )
        for field in FIELDS:
            mine, theirs = getattr(one[name], field), getattr(other[name], field)
            assert (mine is None) == (theirs is None), (name, field)
            assert mine is None or distance(mine, theirs) < tolerance, (name, field)


def observed(model, found, tokens):
    """Input and output gradient of each linear, (windows, length, size) float64, one window at a
    time by plain autograd.
    """
    seen, length = {name: ([], []) for name in found}, tokens.shape[1]
    for window in tokens:
        outputs = {}

        def keep(name, module, args, output, outputs=outputs):
            output.retain_grad()
            outputs[name] = output
            seen[name][0].append(args[0].detach().double().reshape(length, -1))

        handles = [
            info.module.register_forward_hook(partial(keep, name)) for name, info in found.items()
        ]
        logits = model(input_ids=window[None], use_cache=False).logits[0]
        functional.cross_entropy(logits[:-1], window[1:], reduction="sum").backward()
        for name, output in outputs.items():
            seen[name][1].append(output.grad.double().reshape(length, -1))
        for handle in handles:
            handle.remove()
    return {name: (torch.stack(x), torch.stack(g)) for name, (x, g) in seen.items()}
