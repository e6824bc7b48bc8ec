"""Perplexity and KL divergence: worked by hand, against transformers' own loss, and on broken
models.
"""

import copy
import math

import pytest
import torch
from support.models import VOCABULARY, tiny_model
from support.sameness import assert_same_tensors
from torch.nn import functional

from compressor.errors import EvaluationError
from compressor.evaluation.perplexity import (
    compare,
    comparison_sums,
    in_float32,
    kl_sum,
    nll_sum,
    perplexity,
)
from compressor.models.head import NO_LABEL

EXACT = 1e-12  # float64 sums of the same numbers
SAME_FORWARD = 1e-5  # float32 forward passes of differently cut batches


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def other():
    return tiny_model("llama", seed=1)


@pytest.fixture
def tokens():
    return torch.randint(3, VOCABULARY, (5, 16), generator=torch.Generator().manual_seed(0))


def poison(model, value=math.nan):
    """Copy of a model whose last norm multiplies by `value`."""
    broken = copy.deepcopy(model)
    broken.model.norm.weight.data[0] = value
    return broken


def test_nll_of_two_tokens_worked_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)], [50.0, -50.0]])  # the second predicts nothing
    for target, expected in ((1, math.log(4 / 3)), (0, math.log(4))):
        found = nll_sum(logits, torch.tensor([target, NO_LABEL])).item()
        assert found == pytest.approx(expected, rel=1e-7)


def test_kl_of_two_positions_worked_by_hand():
    p = torch.tensor([[0.5, 0.5], [1.0, 0.0]], dtype=torch.float64).log()
    q = torch.tensor([[0.25, 0.75], [0.5, 0.5]], dtype=torch.float64).log()
    first = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert kl_sum(p, q).item() == pytest.approx(first + math.log(2), rel=EXACT)
    assert kl_sum(p[1:], q[1:]).item() == pytest.approx(math.log(2), rel=EXACT)
    assert kl_sum(q, p).item() == math.inf  # q uses a token that p excludes
    assert kl_sum(p, p).item() == 0.0


def test_kl_of_logits_is_that_of_the_distributions():
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 12, 7, generator=generator, dtype=torch.float64)
    expected = functional.kl_div(
        functional.log_softmax(q, -1),
        functional.log_softmax(p, -1),
        log_target=True,
        reduction="sum",
    ).item()
    assert kl_sum(p, q).item() == pytest.approx(expected, rel=EXACT)
    assert kl_sum(p + 5, functional.log_softmax(q, -1)).item() == pytest.approx(expected, rel=EXACT)


def test_kl_keeps_nan():
    p, q = torch.zeros(2, 1, 3)
    q[0, 1] = math.nan
    assert math.isnan(kl_sum(p, q)) and math.isnan(kl_sum(q, p))


def test_one_pass_over_the_rows_gives_all_three_sums():
    p, q = torch.randn(2, 15, 7, generator=torch.Generator().manual_seed(0))
    targets = torch.randint(7, (15,), generator=torch.Generator().manual_seed(1))
    targets[4::5] = NO_LABEL
    expected = [nll_sum(p, targets).item(), nll_sum(q, targets).item(), kl_sum(p, q).item()]
    assert comparison_sums(p, q, targets).tolist() == pytest.approx(expected, rel=EXACT)


def test_sums_do_not_depend_on_the_blocks_of_rows(monkeypatch):
    p, q = torch.randn(2, 15, 7, generator=torch.Generator().manual_seed(0))
    targets = torch.randint(7, (15,), generator=torch.Generator().manual_seed(1))
    expected = comparison_sums(p, q, targets).tolist()
    monkeypatch.setattr("compressor.models.head.CPU_BLOCK", 7 * 4 * 4)
    assert comparison_sums(p, q, targets).tolist() == pytest.approx(expected, rel=EXACT)


def test_scores_do_not_depend_on_the_chunks_of_positions(model, other, tokens, monkeypatch):
    expected = compare(model, other, tokens)
    monkeypatch.setattr("compressor.models.head.CPU_CHUNK", VOCABULARY * 4 * 7)
    monkeypatch.setattr("compressor.models.head.LEAST_ROWS", 1)
    found = compare(model, other, tokens)
    assert found.kl == pytest.approx(expected.kl, rel=SAME_FORWARD)
    assert found.model.nll_sum == pytest.approx(expected.model.nll_sum, rel=SAME_FORWARD)


def test_perplexity_is_that_of_the_loss_of_transformers(model, tokens):
    score = perplexity(model, tokens, batch_size=2)
    loss = model(input_ids=tokens, labels=tokens).loss.item()
    assert score.perplexity == pytest.approx(math.exp(loss), rel=SAME_FORWARD)
    assert (score.tokens, score.window, score.predicted) == (80, 16, 75)
    assert score.nll_sum == pytest.approx(75 * loss, rel=SAME_FORWARD)


def test_batch_size_does_not_matter_and_the_last_batch_counts(model, other, tokens):
    one, two, all_at_once = (compare(model, other, tokens, batch_size=size) for size in (1, 2, 5))
    for result in (one, two):
        assert result.kl == pytest.approx(all_at_once.kl, rel=SAME_FORWARD)
        assert result.model.nll_sum == pytest.approx(all_at_once.model.nll_sum, rel=SAME_FORWARD)
    assert compare(model, other, tokens[:4], batch_size=2).model.nll_sum != pytest.approx(
        two.model.nll_sum, rel=1e-3
    )


def test_compare_agrees_with_perplexity_and_has_the_direction_of_kl(model, other, tokens):
    forward, backward = compare(model, other, tokens), compare(other, model, tokens)
    assert forward.original == perplexity(model, tokens) and forward.model == perplexity(
        other, tokens
    )
    p, q = (
        functional.log_softmax(net(input_ids=tokens).logits.double(), -1) for net in (model, other)
    )
    assert forward.kl == pytest.approx(
        (p.exp() * (p - q)).sum(-1).mean().item(), rel=SAME_FORWARD
    )  # mean over all positions
    assert backward.kl == pytest.approx((q.exp() * (q - p)).sum(-1).mean().item(), rel=SAME_FORWARD)
    assert forward.kl != pytest.approx(backward.kl, rel=1e-4)
    assert compare(model, model, tokens).kl == 0.0


def test_json_of_scores(model, other, tokens):
    comparison = compare(model, other, tokens)
    assert comparison.model.to_json() == {
        "perplexity": comparison.model.perplexity,
        "kl": None,
        "tokens": 80,
        "window": 16,
    }
    assert comparison.to_json()["perplexity_original"] == comparison.original.perplexity


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models_are_scored_in_float32_and_left_as_they_were(model, tokens, dtype):
    narrow = copy.deepcopy(model).to(dtype).train()
    before = {name: tensor.clone() for name, tensor in narrow.state_dict().items()}
    wide = copy.deepcopy(narrow).float().eval()
    assert perplexity(narrow, tokens).nll_sum == pytest.approx(
        perplexity(wide, tokens).nll_sum, rel=EXACT
    )
    assert narrow.training
    assert_same_tensors(narrow.state_dict(), before)


def test_in_float32_restores_dtype_mode_and_ties_after_an_error():
    tied = tiny_model("qwen3", tie_word_embeddings=True).to(torch.bfloat16).train()
    tied.model.embed_tokens.eval()
    with pytest.raises(KeyboardInterrupt), in_float32(tied):
        assert (
            tied.lm_head.weight.dtype == torch.float32
            and not tied.training
            and not torch.is_grad_enabled()
        )
        raise KeyboardInterrupt
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert tied.lm_head.weight.dtype == torch.bfloat16 and torch.is_grad_enabled()
    assert tied.training and not tied.model.embed_tokens.training


def test_in_float32_leaves_integers_and_wide_tensors_alone(model):
    mixed = copy.deepcopy(model).double()
    mixed.register_buffer("codes", torch.arange(4, dtype=torch.uint8))
    with in_float32(mixed):
        assert mixed.codes.dtype == torch.uint8 and mixed.lm_head.weight.dtype == torch.float64


def test_offloaded_weights_are_widened_as_they_are_loaded(model, tokens):
    from accelerate import cpu_offload

    narrow = copy.deepcopy(model).to(torch.bfloat16)
    expected = perplexity(narrow, tokens).nll_sum
    offloaded = cpu_offload(narrow, execution_device=torch.device("cpu"))
    assert next(offloaded.parameters()).is_meta
    assert perplexity(offloaded, tokens).nll_sum == pytest.approx(expected, rel=EXACT)
    assert next(offloaded.parameters()).dtype == torch.bfloat16


def test_a_batch_that_is_not_finite_stops_the_run_and_is_named(model, tokens):
    broken = copy.deepcopy(model)
    rare = tokens[2, 3].item()
    while (tokens[:2] == rare).any():  # a token of the third window, absent from the first two
        rare = tokens[2, (tokens[2] == rare).nonzero()[-1] + 1].item()
    broken.model.embed_tokens.weight.data[rare] = math.nan
    with pytest.raises(EvaluationError, match=r"the model: .* batch 2 of 3 \(windows 3–4\) is nan"):
        perplexity(broken, tokens, batch_size=2)
    with pytest.raises(EvaluationError, match=r"the original: .* batch 2 of 3"):
        compare(broken, model, tokens, batch_size=2)
    with pytest.raises(EvaluationError, match=r"the model: .* batch 2 of 3"):
        compare(model, broken, tokens, batch_size=2)


def test_infinite_kl_is_an_error(model, tokens):
    certain = copy.deepcopy(model)
    unused = next(token for token in range(VOCABULARY) if not (tokens == token).any())
    certain.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCABULARY))
    certain.lm_head.bias.data[unused] = -math.inf
    with pytest.raises(EvaluationError, match=r"KL.original‖model. of batch 1 of 1 .* is inf"):
        compare(model, certain, tokens)
    assert math.isfinite(compare(certain, model, tokens).kl)


def test_a_perplexity_that_overflows_is_an_error(model, tokens):
    with pytest.raises(EvaluationError, match="nats per token overflow as a perplexity"):
        perplexity(poison(model, 1e6), tokens)


def test_windows_that_do_not_fit_are_refused(model, other, tokens):
    for windows, message in [
        (torch.zeros(0, 16, dtype=torch.int64), "nothing to evaluate: 0 windows"),
        (tokens[:, :1], "5 windows of 1 tokens"),
        (tokens.float(), "int64"),
        (tokens[0], "int64"),
        (tokens.repeat(1, 9), "has 128 positions, the window 144"),
        (tokens + VOCABULARY, "do not fit the vocabulary of the model"),
        (tokens - 50, "do not fit the vocabulary"),
    ]:
        with pytest.raises(EvaluationError, match=message):
            perplexity(model, windows)
    larger = tiny_model("llama", vocab_size=VOCABULARY + 1)
    with pytest.raises(EvaluationError, match="cannot be compared"):
        compare(model, larger, tokens)


def test_progress_sees_every_batch(model, tokens):
    seen = []

    def watch(items, title, total=None):
        for item in items:
            seen.append((title, len(item[1])))
            yield item

    perplexity(model, tokens, batch_size=2, progress=watch)
    assert seen == [("evaluate", 2), ("evaluate", 2), ("evaluate", 1)]


@pytest.mark.parametrize("kind", ["gpt2", "opt", "gpt_neox", "gemma2", "mixtral"])
def test_other_architectures(kind, tokens):
    model = tiny_model(kind).to(torch.bfloat16)
    assert perplexity(model, tokens).perplexity == pytest.approx(
        VOCABULARY, rel=0.5
    )  # random weights know next to nothing


def test_devices(device, model, other, tokens):
    expected = compare(model, other, tokens)
    found = compare(copy.deepcopy(model).to(device), copy.deepcopy(other).to(device), tokens)
    assert found.kl == pytest.approx(expected.kl, rel=1e-4)
