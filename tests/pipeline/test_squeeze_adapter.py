"""Adapters squeezed to smaller ranks: exact products and errors, the best ranks, what PEFT loads,
and what is refused.
"""

import itertools
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import read_json, tiny_model
from typer.testing import CliRunner

from compressor.allocation import adapter_ranks
from compressor.calibrate import statistics_folder
from compressor.cli.app import app
from compressor.errors import BudgetError, CheckpointError, ConfigError, DataError
from compressor.files import model_folder
from compressor.linalg import Metric
from compressor.linalg import products as squeeze
from compressor.pipeline import squeeze_adapter
from compressor.statistics import LinearStats

peft = pytest.importorskip("peft")


def random_product(out=12, inner=9, rank=5, scale=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    up, down = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((out, rank), (rank, inner))
    )
    return squeeze.Product(
        up, down * torch.logspace(0, -2, rank, dtype=torch.float64)[:, None], scale
    )


def random_gram(width, tokens, seed=1):
    inputs = torch.randn(
        (tokens, width), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return inputs.T @ inputs


def dense(product):
    return product.scale * product.up.double() @ product.down.double()


@pytest.mark.parametrize(
    ("out", "inner", "rank"),
    [(12, 9, 5), (6, 20, 6), (20, 6, 6), (4, 20, 7), (20, 4, 7), (9, 9, 1)],
)
def test_errors_are_the_tails_of_the_singular_values(out, inner, rank):
    product = random_product(out, inner, rank)
    weight, parts = dense(product), squeeze.decompose(product, Metric(), "w")
    sigma = torch.linalg.svdvals(weight)[: len(parts.energies)]
    torch.testing.assert_close(
        parts.energies, sigma.square(), rtol=1e-10, atol=1e-12 * sigma[0].item() ** 2
    )
    for kept in range(1, len(sigma) + 1):
        error = (weight - dense(parts.take(kept))).square().sum().item()
        assert error == pytest.approx(
            sigma[kept:].square().sum().item(), rel=1e-10, abs=1e-24 * sigma[0].item() ** 2
        )
        assert squeeze.energy(
            squeeze.difference(product, parts.take(kept)), Metric(), "w"
        ) == pytest.approx(error, rel=1e-9, abs=1e-24)
    taken = parts.take(2 if len(sigma) > 1 else 1)
    torch.testing.assert_close(taken.up.norm(dim=0), taken.down.norm(dim=1))


@pytest.mark.parametrize("tokens", [40, 4])  # 4: a singular Gram
@pytest.mark.parametrize(("out", "inner", "rank"), [(12, 9, 5), (4, 12, 7), (12, 6, 8)])
def test_errors_at_the_inputs_are_the_tails_of_the_whitened_spectrum(out, inner, rank, tokens):
    product, gram = random_product(out, inner, rank), random_gram(inner, tokens)
    metric, weight = Metric(gram, 1 / tokens), dense(product)
    values, vectors = torch.linalg.eigh(gram / tokens)
    sigma = torch.linalg.svdvals(weight @ vectors * values.clamp(min=0).sqrt())
    parts = squeeze.decompose(product, metric, "w")
    plain = squeeze.decompose(product, Metric(), "w")
    for kept in range(1, len(parts.energies)):
        expected = sigma[kept:].square().sum().item()
        error = metric.energy(weight - dense(parts.take(kept)))
        floor = 1e-15 * sigma[0].item() ** 2
        assert error == pytest.approx(expected, rel=1e-10, abs=floor)
        assert parts.tail(kept) == pytest.approx(expected, rel=1e-10, abs=floor)
        assert error <= metric.energy(weight - dense(plain.take(kept))) + floor
    torch.testing.assert_close(
        dense(parts.take(len(parts.energies))), weight, rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("keep", [0.15, 0.3, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_other_ranks_lose_less(seed, keep):
    shapes = [(4, 3, 2), (9, 5, 3), (3, 14, 3)]
    products = [
        random_product(*shape, seed=10 * seed + index) for index, shape in enumerate(shapes)
    ]
    parts = [squeeze.decompose(product, Metric(), "w") for product in products]
    prices = [product.price for product in products]
    whole = sum(product.rank * product.price for product in products)
    chosen = adapter_ranks.allocate(parts, prices, whole, keep)

    def lost(ranks):
        return sum(part.tail(rank) for part, rank in zip(parts, ranks, strict=True))

    def cost(ranks):
        return sum(price * rank for price, rank in zip(prices, ranks, strict=True))

    every = itertools.product(*(range(len(part.energies) + 1) for part in parts))
    assert cost(chosen) <= keep * whole
    assert lost(chosen) <= min(lost(ranks) for ranks in every if cost(ranks) <= keep * whole) * (
        1 + 1e-5
    )


def test_budgets_for_nothing_are_refused():
    part = squeeze.decompose(random_product(), Metric(), "w")
    with pytest.raises(
        BudgetError, match=r"--keep 0.1 is 10 parameters, .* 21 for one rank; keep 0.2"
    ):
        adapter_ranks.allocate([part], [21], 105, 0.1)
    with pytest.raises(BudgetError, match="every product of the adapter is zero"):
        adapter_ranks.allocate(
            [squeeze.Components(part.left, part.right, part.energies * 0)], [21], 105, 0.5
        )


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of tiny models by architecture."""
    made = {}

    def base(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("bases") / kind
            tiny_model(kind).save_pretrained(made[kind])
        return made[kind]

    return base


@pytest.fixture
def trained(bases, tmp_path):
    """An adapter folder whose factors are random and not zero."""

    def make(kind="llama", dtype=torch.float32, **options):
        targets = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}[kind]
        given = {
            "r": 6,
            "lora_alpha": 9,
            "target_modules": targets,
            "task_type": "CAUSAL_LM",
            "fan_in_fan_out": kind == "gpt2",
        }
        base = tiny_model(kind)
        base.name_or_path = str(bases(kind))
        model = peft.get_peft_model(base, peft.LoraConfig(**(given | options)))
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
                    parameter.data = parameter.data.to(dtype)
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return make


def loaded(base, path):
    model = tiny_model(base)
    return peft.PeftModel.from_pretrained(model, path).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(40)[None], use_cache=False).logits


def by_hand(kind, path):
    """Logits of the base with weights to which alpha / r (or √r) · B A was added, from the files
    alone.
    """
    config, tensors, model = (
        read_json(path / "adapter_config.json"),
        load_file(path / "adapter_model.safetensors"),
        tiny_model(kind),
    )
    for key in [key for key in tensors if "lora_A" in key]:
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        rank, alpha = (
            next(
                (value for part, value in config[pattern].items() if name.endswith(part)),
                config[whole],
            )
            for pattern, whole in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
        )
        added = tensors[key.replace("lora_A", "lora_B")].float() @ tensors[key].float() * alpha
        added /= math.sqrt(rank) if config["use_rslora"] else rank
        with torch.no_grad():
            weight = model.get_submodule(name).weight
            weight += added.T if kind == "gpt2" else added
    return logits(model)


PATTERNS = {
    "rank_pattern": {"layers.1.self_attn.q_proj": 3, "down_proj": 8},
    "alpha_pattern": {"v_proj": 5},
}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {}),
        ("gpt2", {"use_rslora": True}),
        ("llama", PATTERNS),
        ("llama", PATTERNS | {"use_rslora": True}),
    ],
)
def test_the_old_rank_gives_the_same_product_and_logits(trained, tmp_path, kind, options):
    source = trained(kind, **options)
    most = max([6, *options.get("rank_pattern", {}).values()])
    found = squeeze_adapter.squeeze_adapter(source, tmp_path / "out", rank=most)
    assert found["kept"] == 1.0 and found["parameters"]["removed"] == 0
    before, after = (
        squeeze_adapter.read(source).products,
        squeeze_adapter.read(tmp_path / "out").products,
    )
    assert before.keys() == after.keys()
    for name, product in before.items():
        torch.testing.assert_close(dense(after[name]), dense(product), rtol=1e-6, atol=1e-6)
        assert after[name].scale == 1.0 and after[name].rank == product.rank
    torch.testing.assert_close(
        logits(loaded(kind, tmp_path / "out")), logits(loaded(kind, source)), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        logits(loaded(kind, tmp_path / "out")), by_hand(kind, source), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_smaller_adapters_load_and_have_the_errors_that_are_printed(trained, tmp_path, dtype):
    source = trained(dtype=dtype, **PATTERNS)
    found = squeeze_adapter.squeeze_adapter(source, tmp_path / "out", keep=0.4)
    assert (
        found["kept"] <= 0.4
        and found["parameters"]["before"] == squeeze_adapter.read(source).parameters
    )
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    assert sum(tensor.numel() for tensor in stored.values()) == found["parameters"]["after"]
    before, after = (
        squeeze_adapter.read(source).products,
        squeeze_adapter.read(tmp_path / "out").products,
    )
    for module in found["modules"]:
        weight, name = dense(before[module["module"]]), module["module"]
        made = dense(after[name]) if module["rank_after"] else torch.zeros_like(weight)
        sigma = torch.linalg.svdvals(weight).square()
        assert module["error"] == pytest.approx(
            ((weight - made).square().sum() / weight.square().sum()).item(), rel=1e-6
        )
        close = {torch.float32: 1e-5}.get(dtype, 1e-3)
        assert module["error"] == pytest.approx(
            (sigma[module["rank_after"] :].sum() / sigma.sum()).item(), rel=close, abs=close
        )
    model = loaded("llama", tmp_path / "out")
    tolerance = 1e-5 if dtype == torch.float32 else 1e-3
    torch.testing.assert_close(
        logits(model), by_hand("llama", tmp_path / "out"), rtol=tolerance, atol=tolerance
    )


def test_modules_that_matter_least_are_left_out(trained, tmp_path):
    source = trained()
    path = source / "adapter_model.safetensors"
    weak = "model.layers.0.self_attn.q_proj"
    save_file(
        {key: tensor * (1e-3 if weak in key else 1) for key, tensor in load_file(path).items()},
        path,
    )
    found = squeeze_adapter.squeeze_adapter(source, tmp_path / "out", keep=0.5)
    assert {module["module"]: module["rank_after"] for module in found["modules"]}[weak] == 0
    assert weak not in read_json(tmp_path / "out" / "adapter_config.json")["target_modules"]
    assert not hasattr(
        loaded("llama", tmp_path / "out").base_model.model.get_submodule(weak), "lora_A"
    )


@pytest.fixture
def statistics(bases, tmp_path):
    """Statistics of the linears of a tiny Llama, few tokens, with what is to be different in
    them.
    """

    def make(drop=(), widths=None, model=None):
        linears = {
            name: module
            for name, module in tiny_model("llama").named_modules()
            if name.endswith("_proj")
        }
        stats = {
            name: LinearStats(
                tokens=20,
                gram=random_gram((widths or {}).get(name, module.in_features), 20, seed=index),
            )
            for index, (name, module) in enumerate(linears.items())
            if name not in drop
        }
        digest = model or model_folder.content_digest(model_folder.read_headers(bases("llama")))
        statistics_folder.save_statistics(tmp_path / "stats", stats, {"model": digest})
        return tmp_path / "stats"

    return make


def test_statistics_lower_what_is_lost_at_the_inputs(trained, tmp_path, statistics):
    source, stats = trained(), statistics()
    grams = statistics_folder.load_statistics(stats)
    found = squeeze_adapter.squeeze_adapter(source, tmp_path / "aware", rank=2, stats=stats)
    squeeze_adapter.squeeze_adapter(source, tmp_path / "plain", rank=2)
    before, aware, plain = (
        squeeze_adapter.read(path).products
        for path in (source, tmp_path / "aware", tmp_path / "plain")
    )
    for module in found["modules"]:
        name = module["module"]
        metric = Metric(grams[name].gram)
        whole = metric.energy(dense(before[name]))
        errors = [
            metric.energy(dense(before[name]) - dense(one[name])) / whole for one in (aware, plain)
        ]
        assert module["error"] == pytest.approx(errors[0], rel=1e-6)
        assert errors[0] < errors[1]
    assert found["metric"] == "gram"
    assert (
        squeeze_adapter.squeeze_adapter(source, tmp_path / "shared", keep=1 / 3, stats=stats)[
            "error"
        ]
        < found["error"]
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"drop": ["model.layers.1.mlp.down_proj"]},
            "no statistics of model.layers.1.mlp.down_proj",
        ),
        ({"widths": {"model.layers.0.mlp.down_proj": 40}}, "down_proj has 40 inputs there and 48"),
        ({"model": "0" * 64}, "the statistics are of another model than"),
    ],
)
def test_statistics_of_another_model_are_refused(trained, tmp_path, statistics, changes, words):
    with pytest.raises(DataError, match=words):
        squeeze_adapter.squeeze_adapter(
            trained(), tmp_path / "out", rank=2, stats=statistics(**changes)
        )
    assert not (tmp_path / "out").exists()


def test_an_adapter_may_come_from_the_hub(trained, tmp_path, monkeypatch):
    local = trained()
    asked = []
    monkeypatch.setattr(
        model_folder, "download", lambda name, revision: (asked.append(name), local)[1]
    )
    found = squeeze_adapter.squeeze_adapter("organisation/adapter", tmp_path / "out", rank=2)
    assert asked == ["organisation/adapter"] and {
        module["rank_after"] for module in found["modules"]
    } == {2}
    with pytest.raises(ConfigError, match="there is no such folder"):
        squeeze_adapter.squeeze_adapter(str(tmp_path / "nowhere"), tmp_path / "other", rank=2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "either --rank or --keep"),
        ({"rank": 2, "keep": 0.5}, "either --rank or --keep"),
        ({"rank": 7}, "--rank 7: expected 1 to 6"),
        ({"rank": 0}, "--rank 0: expected 1 to 6"),
        ({"keep": 0.0}, "--keep 0: expected"),
        ({"keep": 1.5}, "--keep 1.5: expected"),
        ({"keep": math.nan}, "--keep nan: expected"),
        ({"keep": 0.001}, "one rank; keep 0"),
    ],
)
def test_sizes_out_of_range_are_refused(trained, tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        squeeze_adapter.squeeze_adapter(trained(), tmp_path / "out", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "LOHA"}, "type LOHA"),
        ({"use_dora": True}, "use_dora: True"),
        ({"bias": "all"}, "bias: 'all'"),
        ({"lora_bias": True}, "lora_bias: True"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save: \['lm_head'\]"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, "'pissa' changes the base"),
        ({"a_new_kind": 1}, "a_new_kind: 1"),
    ],
)
def test_adapters_that_are_more_than_plain_lora_are_refused(trained, tmp_path, changes, words):
    path = trained() / "adapter_config.json"
    path.write_text(json.dumps(read_json(path) | changes))
    with pytest.raises(ConfigError, match=words):
        squeeze_adapter.squeeze_adapter(path.parent, tmp_path / "out", rank=2)


def test_factors_of_embeddings_are_refused(trained, tmp_path):
    source = trained(target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(ConfigError, match=r"embed_tokens.* is not a LoRA factor of a linear"):
        squeeze_adapter.squeeze_adapter(source, tmp_path / "out", rank=2)


def test_damaged_adapters_are_named(trained, tmp_path):
    source = trained()
    config, weights = source / "adapter_config.json", source / "adapter_model.safetensors"
    good, content = config.read_text(), load_file(weights)
    config.write_text(json.dumps(json.loads(good) | {"r": 5}))
    with pytest.raises(CheckpointError, match="adapter: PEFT"):
        squeeze_adapter.read(source)
    config.write_text(good)
    save_file(
        {
            key: tensor
            for key, tensor in content.items()
            if "layers.0.self_attn.q_proj.lora_B" not in key
        },
        weights,
    )
    with pytest.raises(
        CheckpointError, match=r"no pair of factors that fit in model.layers.0.self_attn.q_proj"
    ):
        squeeze_adapter.read(source)
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        squeeze_adapter.read(source)
    weights.rename(source / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="only pickled weights"):
        squeeze_adapter.squeeze_adapter(source, tmp_path / "out", rank=2)
    config.unlink()
    with pytest.raises(ConfigError, match=r"has no adapter_config.json"):
        squeeze_adapter.squeeze_adapter(source, tmp_path / "out", rank=2)
    with pytest.raises(ConfigError, match="no such folder"):
        squeeze_adapter.squeeze_adapter(tmp_path / "nowhere", tmp_path / "out", rank=2)


def test_what_peft_would_not_load_is_never_put_in_place(trained, tmp_path, monkeypatch):
    source, write = trained(), squeeze_adapter.write

    def wrong(target, *arguments):
        written = write(target, *arguments)
        path = target / "adapter_config.json"
        path.write_text(json.dumps(read_json(path) | {"lora_alpha": 7}))
        return written

    monkeypatch.setattr(squeeze_adapter, "write", wrong)
    with pytest.raises(
        CheckpointError,
        match=r"PEFT loads something else than was written in model.layers.0.mlp.down_proj",
    ):
        squeeze_adapter.squeeze_adapter(source, tmp_path / "out", rank=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_the_verb_prints_a_table_or_json_and_keeps_what_is_there(trained, tmp_path):
    source, output = str(trained()), str(tmp_path / "out")
    runner = CliRunner()
    result = runner.invoke(app, ["adapter", "squeeze", source, output, "--rank", "2", "--json"])
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["kept"] == pytest.approx(1 / 3) and len(found["modules"]) == 6
    assert {"adapter_config.json", "adapter_model.safetensors", "manifest.json"} == {
        path.name for path in (tmp_path / "out").iterdir()
    }
    again = runner.invoke(app, ["adapter", "squeeze", source, output, "--keep", "0.5"])
    assert again.exit_code == 2 and "exists already; pass --overwrite" in again.stderr
    table = runner.invoke(
        app, ["adapter", "squeeze", source, output, "--keep", "0.5", "--overwrite"]
    )
    assert (
        table.exit_code == 0
        and "rank after" in table.stdout
        and "parameters.removed" in table.stdout
    )
    assert {"--json", "--verbose", "--quiet"} <= set(
        runner.invoke(app, ["adapter", "squeeze", "--help"]).stdout.split()
    )
    assert (
        runner.invoke(
            app, ["adapter", "squeeze", source, source, "--rank", "2", "--overwrite"]
        ).exit_code
        == 2
    )
