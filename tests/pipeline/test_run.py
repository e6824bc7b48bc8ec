"""Whole runs on tiny models: what is written, what is refused, what is equal."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.models import VOCABULARY, read_json, save_tiny
from support.recipes import SMALL, recipe, tensors
from support.sameness import assert_same_output

import compressor
from compressor.errors import BudgetError, CheckpointError, ConfigError, DataError
from compressor.files.model_folder import read_headers
from compressor.pipeline import run as pipeline
from compressor.recipe.load import load_recipe

FILES = {
    "README.md",
    "config.json",
    "curves.json",
    "generation_config.json",
    "manifest.json",
    "model.safetensors",
    "plan.json",
    "recipe.yaml",
    "report.json",
    "timings.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def run(tiny_llama, text_file, tmp_path_factory):
    """One default compression of the tiny Llama: (recipe, folder, report)."""
    folder = tmp_path_factory.mktemp("run") / "out"
    made = recipe(tiny_llama, text_file, "allocation.keep=0.6")
    return made, folder, pipeline.compress(made, folder)


def test_the_folder_holds_these_files_and_loads_with_equal_logits(run, tiny_llama):
    _, folder, _ = run
    assert {path.name for path in folder.iterdir()} == FILES
    assert not list(folder.parent.glob("*partial*")) and not list(folder.parent.glob(".*lock"))
    model, tokenizer = compressor.load(folder)
    ids = torch.arange(3, 23).view(1, -1)
    again, _ = compressor.load(folder)
    assert_same_output(model(ids).logits, again(ids).logits)
    assert tokenizer.decode([3, 4]) == "w3 w4"
    from compressor.linears import LowRank

    assert any(isinstance(module, LowRank) for module in model.modules())


def test_report_counts_what_is_on_disk(run, tiny_llama):
    _made, folder, found = run
    stored = read_json(folder / "report.json")
    assert stored == json.loads(json.dumps(found))
    plan = read_json(folder / "plan.json")["linears"]
    assert 0.55 < found["kept"]["targets"] <= 0.6
    assert found["bytes"]["compressed"] == (folder / "model.safetensors").stat().st_size
    assert found["bytes"]["original"] == (tiny_llama / "model.safetensors").stat().st_size
    headers = read_headers(folder).tensors
    for name, choice in plan.items():
        assert (
            8 * sum(info.bytes for key, info in headers.items() if key.startswith(f"{name}."))
            == choice["bits"]
        )
        assert choice["error"] == 0 if choice["method"] == "dense" else choice["error"] > 0
        assert choice["measured"] == pytest.approx(choice["predicted"], rel=0.05, abs=1e-5)
    for key in ("perplexity", "kl", "tokens", "window", "heldout", "fingerprints"):
        assert stored[key] is not None
    assert stored["kl"] > 0 and stored["reason"] is None and stored["window"] == 32
    assert set(read_json(folder / "timings.json")["seconds"]) == {
        "calibrate", "probe", "decompose", "allocate", "train", "write", "evaluate", "total"
    }  # fmt: skip
    assert pipeline.verify(folder) == []


def test_the_installed_error_is_the_error_of_the_stored_weights(run, tiny_llama, text_file):
    """`error` in the report, recomputed from both checkpoints and freshly collected inputs."""
    from compressor.pipeline import job as jobs
    from compressor.pipeline import stages

    made, folder, found = run
    job = jobs.start(made, jobs.open_source(str(tiny_llama), None))
    stats = stages.statistics(job)
    compressed, _ = compressor.load(folder)
    for linear in found["linears"]:
        module = compressed.get_submodule(linear["name"])
        weight = module.to_dense() if linear["method"] != "dense" else module.weight
        lost = (job.assignments[linear["name"]].info.module.weight - weight).double().detach()
        gram, dense = (
            stats[linear["name"]].gram,
            job.assignments[linear["name"]].info.module.weight.double().detach(),
        )
        expected = torch.trace(lost @ gram @ lost.T) / torch.trace(dense @ gram @ dense.T)
        assert linear["error"] == pytest.approx(expected.item(), rel=1e-6, abs=1e-12)


def test_every_long_stage_reports_its_progress(run, tiny_llama, tmp_path):
    made, folder, _ = run
    stages = {}

    def progress(items, title, total=None):
        items = list(items)
        stages[title] = len(items) if total is None else total
        return items

    options = {
        "calibration.sequential": True,
        "compensation.rank": 1,
        "model.name": str(tiny_llama),
    }
    pipeline.compress(
        load_recipe(folder / "recipe.yaml", options=options), tmp_path / "out", progress=progress
    )
    assert stages == {
        "check weights": 21,
        "calibrate": 2,
        "decompose": 14,
        "probe": 14,
        "build": 14,
        "solve in order": 2,
        "write model.safetensors": len(read_headers(tmp_path / "out").tensors),
        "compare with what was written": len(read_headers(tmp_path / "out").tensors),
        "evaluate": 1,
    }
    pipeline.compress(
        made.model_copy(update={"compensation": made.compensation.model_copy(update={"rank": 1})}),
        tmp_path / "b",
        progress=progress,
    )
    assert stages["compensate"] <= 14
    stages.clear()
    pipeline.verify(folder, progress)
    assert set(stages) == {"compare with manifest.json", "check weights"}
    pipeline.export(folder, tmp_path / "dense", progress=progress)
    assert "multiply out" in stages


def test_same_seed_same_bytes(run, tmp_path):
    made, folder, _ = run
    pipeline.compress(made, tmp_path / "again")
    for path in folder.iterdir():
        if path.name != "timings.json":
            assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_statistics_are_an_artifact_that_gives_the_same_bytes_and_refuses_another_run(
    run, tmp_path
):
    made, folder, _ = run
    pipeline.calibrate(made, tmp_path / "stats")
    pipeline.compress(made, tmp_path / "out", stats=tmp_path / "stats")
    assert tensors(tmp_path / "out") == tensors(folder)
    with pytest.raises(ConfigError, match="--overwrite"):
        pipeline.calibrate(made, tmp_path / "stats")
    pipeline.calibrate(made, tmp_path / "stats", overwrite=True)
    other = made.model_copy(update={"seed": 1})
    with pytest.raises(DataError, match="seed is 0 there and 1 here"):
        pipeline.compress(other, tmp_path / "other", stats=tmp_path / "stats")
    assert not (tmp_path / "other").exists()


def test_missing_statistics_name_the_command(run, tiny_llama, text_file, tmp_path):
    plain = recipe(tiny_llama, text_file, config="svd_llm")
    pipeline.calibrate(plain, tmp_path / "stats")
    with pytest.raises(DataError, match=r"lack grad_gram.*compressor calibrate"):
        pipeline.compress(run[0], tmp_path / "out", stats=tmp_path / "stats")


def test_an_edited_plan_runs_as_it_stands(run, tmp_path):
    made, folder, _ = run
    plan = read_json(folder / "plan.json")
    name = next(name for name, choice in plan["linears"].items() if choice["method"] == "low_rank")
    plan["linears"][name]["setting"]["rank"] = 3
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    found = pipeline.compress(made, tmp_path / "out", plan=tmp_path / "plan.json")
    model, _ = compressor.load(tmp_path / "out")
    assert model.get_submodule(name).rank == 3
    assert {linear["name"]: linear["setting"] for linear in found["linears"]}[name] == {"rank": 3}
    plan["linears"][name]["setting"]["rank"] = 10_000
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(ConfigError, match=f"{name}.*no setting"):
        pipeline.compress(made, tmp_path / "bad", plan=tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text("[]")
    with pytest.raises(ConfigError, match="is not a plan"):
        pipeline.compress(made, tmp_path / "bad", plan=tmp_path / "plan.json")


def test_f6_existing_output_is_refused_before_any_work_and_replaced_with_overwrite(
    run, tmp_path, monkeypatch
):
    made, folder, _ = run
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    monkeypatch.setattr(pipeline.jobs, "open_source", lambda *a: pytest.fail("work was done"))
    with pytest.raises(ConfigError, match="--overwrite"):
        pipeline.compress(made, tmp_path / "out")
    monkeypatch.undo()
    again = made.model_copy(update={"output": made.output.model_copy(update={"overwrite": True})})
    pipeline.compress(again, tmp_path / "out")
    assert tensors(tmp_path / "out") == tensors(folder)


def test_f34_failed_evaluation_keeps_the_checkpoint_with_null_scores_and_a_reason(
    tiny_llama, text_file, tmp_path
):
    broken = recipe(tiny_llama, text_file, **{"evaluation.source": "/nowhere/text.txt"})
    found = pipeline.compress(broken, tmp_path / "out")
    assert "evaluation failed" in found["failure"]
    stored = read_json(tmp_path / "out" / "report.json")
    assert stored["perplexity"] == {"original": None, "compressed": None} and stored["kl"] is None
    assert "/nowhere/text.txt" in stored["reason"]
    assert pipeline.verify(tmp_path / "out") == []


def test_f26_infeasible_budget_names_the_least_reachable(tiny_llama, text_file, tmp_path):
    tiny = recipe(tiny_llama, text_file, "allocation.keep=0.001")
    for act in (lambda: pipeline.plan(tiny), lambda: pipeline.compress(tiny, tmp_path / "out")):
        with pytest.raises(BudgetError, match=r"at least 0\.0\d+"):
            act()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("keep", [0.5, 0.8])
def test_f27_linears_that_would_not_shrink_stay_dense_and_count_so(
    tiny_llama, text_file, tmp_path, keep
):
    found = pipeline.compress(
        recipe(tiny_llama, text_file, f"allocation.keep={keep}", "evaluation.enabled=false"),
        tmp_path / "out",
    )
    assert all(linear["bits"] <= linear["dense_bits"] for linear in found["linears"])
    assert all(
        linear["bits"] == linear["dense_bits"]
        for linear in found["linears"]
        if linear["method"] == "dense"
    )
    assert found["kept"]["targets"] <= keep
    assert found["kl"] is None and "switched off" in found["reason"]


def test_target_size_bounds_the_weight_files(tiny_llama, text_file, tmp_path):
    size = (tiny_llama / "model.safetensors").stat().st_size
    found = pipeline.compress(
        recipe(tiny_llama, text_file, f"allocation.target_size={int(0.8 * size)}"), tmp_path / "out"
    )
    assert 0.6 * size < found["bytes"]["compressed"] <= 0.8 * size
    with pytest.raises(ConfigError, match="not targeted"):
        pipeline.compress(
            recipe(tiny_llama, text_file, "allocation.target_size=1kB"), tmp_path / "bad"
        )


def test_keep_may_differ_by_target(tiny_llama, text_file, tmp_path):
    found = pipeline.compress(
        recipe(tiny_llama, text_file, "allocation.keep={'*mlp*': 0.5, '*': 0.9}"), tmp_path / "out"
    )
    for pattern, least, most in (("mlp", 0.4, 0.5), ("attn", 0.8, 0.9)):
        group = [linear for linear in found["linears"] if pattern in linear["name"]]
        assert (
            least
            < sum(linear["bits"] for linear in group)
            / sum(linear["dense_bits"] for linear in group)
            <= most
        )


def test_targets_that_select_nothing_are_an_error(tiny_llama, text_file, tmp_path):
    with pytest.raises(ConfigError, match="selects no linear"):
        pipeline.compress(
            recipe(tiny_llama, text_file, "method.0.targets='*experts*'"), tmp_path / "out"
        )


def test_first_matching_target_wins(tiny_llama, text_file, tmp_path):
    lines = """
method:
  - targets: "*mlp*"
    candidates: [{name: low_rank, options: {metric: gram, storage: factors}}]
  - targets: "*"
    candidates: [{name: utilized_rank}, {name: low_rank, options: {metric: gram}}]
allocation: {keep: 0.6}
"""
    (tmp_path / "recipe.yaml").write_text(lines)
    found = pipeline.compress(
        recipe(tiny_llama, text_file, config=str(tmp_path / "recipe.yaml")), tmp_path / "out"
    )
    assert all(
        linear["method"] in ("low_rank", "dense")
        for linear in found["linears"]
        if "mlp" in linear["name"]
    )
    model, _ = compressor.load(tmp_path / "out")
    for linear in found["linears"]:
        if linear["method"] == "low_rank":
            assert (model.get_submodule(linear["name"]).pivots is None) == ("mlp" in linear["name"])


PRESETS = [
    "svd",
    "fwsvd",
    "asvd",
    "awsvd",
    "svd_llm",
    "lord",
    "afm",
    "utilized_rank",
    "welore",
    "kfac_svd",
    "lems",
    "default",
]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_runs_by_name_and_keeps_its_fraction(preset, tiny_llama, text_file, tmp_path):
    made = recipe(
        tiny_llama,
        text_file,
        "allocation.keep=0.7",
        "evaluation.enabled=false",
        "allocation.probe.skip=0",
        config=preset,
    )
    found = pipeline.compress(made, tmp_path / "out")
    assert 0.3 < found["kept"]["targets"] <= 0.7
    compressor.load(tmp_path / "out")


@pytest.mark.parametrize("rule", ["uniform", "by_role", "d_rank", "knapsack"])
@pytest.mark.parametrize("count", ["bits", "parameters"])
def test_every_allocation_rule_meets_its_budget(rule, count, tiny_llama, text_file, tmp_path):
    made = recipe(
        tiny_llama, text_file, f"allocation.kind={rule}", f"allocation.count={count}", "allocation.keep=0.6",
        "allocation.damage=relative_error", "evaluation.enabled=false", config="svd_llm",
    )  # fmt: skip
    found = pipeline.compress(made, tmp_path / "out")
    assert found["kept"]["unit"] == count and 0.35 < found["kept"][count] <= 0.6


def test_a_rule_that_cannot_work_says_so(tiny_llama, text_file, tmp_path):
    made = recipe(
        tiny_llama, text_file, "allocation.kind=svd_llm_v2", "allocation.keep=0.6", config="svd_llm"
    )
    with pytest.raises(ConfigError, match="losses above e"):  # a random model loses almost nothing
        pipeline.compress(made, tmp_path / "out")


def test_afm_gives_biases_which_no_stock_architecture_has_room_for(tiny_llama, text_file, tmp_path):
    made = recipe(
        tiny_llama, text_file, "allocation.keep=0.7", "evaluation.enabled=false", config="afm"
    )
    pipeline.compress(made, tmp_path / "out")
    assert (
        compressor.load(tmp_path / "out")[0].get_submodule("model.layers.0.self_attn.q_proj").bias
        is not None
    )
    with pytest.raises(CheckpointError, match="bias"):
        pipeline.export(tmp_path / "out", tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_damage_in_nats_has_a_price_and_relative_error_has_none(
    run, tiny_llama, text_file, tmp_path
):
    assert run[2]["price"] > 0
    for damage, priced in (("two_sided", True), ("relative_error", False)):
        made = recipe(
            tiny_llama,
            text_file,
            f"allocation.damage={damage}",
            "allocation.keep=0.6",
            "evaluation.enabled=false",
        )
        assert (pipeline.compress(made, tmp_path / damage)["price"] is not None) == priced
    made = recipe(
        tiny_llama,
        text_file,
        "allocation.kind=knapsack",
        "allocation.damage=gram",
        "evaluation.enabled=false",
        config="svd_llm",
    )
    assert (
        pipeline.compress(made, tmp_path / "gram")["price"] is None
    )  # output energy is no divergence
    with pytest.raises(ConfigError, match="needs methods with metric 'two_sided'"):
        made = recipe(
            tiny_llama,
            text_file,
            "allocation.kind=knapsack",
            "allocation.damage=two_sided",
            config="svd_llm",
        )
        pipeline.compress(made, tmp_path / "bad")


def test_output_dtype_changes_what_is_stored_and_counted(tiny_llama, text_file, tmp_path):
    found = pipeline.compress(
        recipe(tiny_llama, text_file, "output.dtype=bfloat16", "allocation.keep=0.6"),
        tmp_path / "out",
    )
    model, _ = compressor.load(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert sum(linear["dense_bits"] for linear in found["linears"]) == 16 * sum(
        linear["dense_parameters"] for linear in found["linears"]
    )


@pytest.mark.parametrize(
    "kind", ["gpt2", "qwen2", "qwen3", "mistral", "gemma2", "phi3", "opt", "gpt_neox", "mixtral"]
)
def test_architectures(kind, text_file, tmp_path):
    """One default run each: compressed, reloaded with equal logits, exported dense with equal
    logits.
    """
    source = save_tiny(tmp_path / "model", kind)
    windows = torch.randint(3, VOCABULARY, (12, 32), generator=torch.Generator().manual_seed(0))
    save_file({"windows": windows}, tmp_path / "tokens.safetensors")
    tokens = f"{tmp_path / 'tokens.safetensors'}:windows"
    found = pipeline.compress(recipe(source, tokens, "allocation.keep=0.6"), tmp_path / "out")
    assert found["kept"]["targets"] <= 0.6 and found["kl"] > 0
    pipeline.export(tmp_path / "out", tmp_path / "dense")
    ids = torch.arange(3, 23).view(1, -1)
    compressed, dense = compressor.load(tmp_path / "out")[0], compressor.load(tmp_path / "dense")[0]
    torch.testing.assert_close(compressed(ids).logits, dense(ids).logits, rtol=1e-3, atol=1e-4)
    if kind == "mixtral":
        outline = pipeline.plan(recipe(source, tokens))
        assert outline["covered_share"] < 0.6 and outline["not_linear"]


def test_f28_ties_biases_and_odd_widths_survive(text_file, tmp_path):
    source = save_tiny(
        tmp_path / "model",
        "qwen3",
        tie_word_embeddings=True,
        intermediate_size=43,
        num_hidden_layers=1,
    )
    pipeline.compress(recipe(source, text_file, "allocation.keep=0.7"), tmp_path / "out")
    model, _ = compressor.load(tmp_path / "out")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert "lm_head.weight" not in read_headers(tmp_path / "out").tensors


def test_a_tied_head_that_is_compressed_is_counted_as_the_files_are(text_file, tmp_path, caplog):
    source = save_tiny(tmp_path / "model", "llama", tie_word_embeddings=True)
    made = recipe(
        source, text_file, "method=[{targets: lm_head, dense: false}]", "allocation.keep=0.5"
    )
    outline = pipeline.plan(made)
    assert "lm_head shares its weight with model.embed_tokens.weight" in caplog.text
    caplog.clear()
    found = pipeline.compress(made, tmp_path / "out")
    assert "lm_head shares its weight with model.embed_tokens.weight" in caplog.text
    (warning,) = found["warnings"]
    assert warning.startswith("lm_head.weight repeats another tensor of the source")
    for side, folder in (("original", source), ("compressed", tmp_path / "out")):
        stored = read_headers(folder).tensors.values()
        assert found["sizes"]["model"]["bits"][side] == 8 * sum(info.bytes for info in stored)
    assert found["bytes"]["compressed"] > found["bytes"]["original"]
    assert found["kept"]["model"] > 1 > found["kept"]["targets"]
    least = found["bytes"]["compressed"] - outline["bytes"]["source"]
    assert 0 < least <= outline["bytes"]["compressed_at_most"] - outline["bytes"]["source"]


def test_a_tied_head_that_stays_dense_stays_tied(text_file, tmp_path):
    source = save_tiny(tmp_path / "model", "llama", tie_word_embeddings=True)
    found = pipeline.compress(recipe(source, text_file, "allocation.keep=0.7"), tmp_path / "out")
    assert found["warnings"] == [] and found["kept"]["model"] < 1
    stored = read_headers(source).tensors.values()
    assert found["sizes"]["model"]["bits"]["original"] == 8 * sum(info.bytes for info in stored)


def test_compressed_and_quantised_inputs_are_refused(run, tmp_path, text_file):
    _, folder, _ = run
    with pytest.raises(CheckpointError, match="compressed"):
        pipeline.compress(recipe(folder, text_file), tmp_path / "out")


@pytest.mark.slow
def test_f36_local_runs_open_no_socket(tiny_llama, text_file, tmp_path):
    script = f"""
import socket
def refuse(*a, **k): raise AssertionError("a socket was opened")
socket.socket.connect = refuse
socket.create_connection = refuse
socket.getaddrinfo = refuse
from compressor.cli.app import app
app(["compress", {str(tiny_llama)!r}, {str(tmp_path / "out")!r}, "--calibration", {str(text_file)!r}, "--json", "--quiet",
     {", ".join(repr(part) for override in (*SMALL, f"evaluation.source={text_file}") for part in ("--set", override))}])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["kl"] > 0
    assert done.stdout.count("\n") == 1


def test_the_api_is_callable_whatever_was_imported():
    for name in compressor.__all__:
        assert callable(getattr(compressor, name)), name
    assert not (
        Path(compressor.__file__).parent / "evaluate.py"
    ).exists()  # a module of that name would hide the function


def test_plan_with_statistics_shows_what_compress_will_choose(run, tmp_path):
    made, folder, _ = run
    pipeline.calibrate(made, tmp_path / "stats")
    outline = pipeline.plan(made, stats=tmp_path / "stats")
    chosen = {linear["name"]: linear["setting"] for linear in outline["linears"]}
    assert chosen == {
        name: choice["setting"]
        for name, choice in read_json(folder / "plan.json")["linears"].items()
    }


def test_plan_reads_headers_only(tiny_llama, text_file, tmp_path, monkeypatch):
    from compressor.models import load as model

    monkeypatch.setattr(model, "load", lambda *a, **k: pytest.fail("weights were loaded"))
    outline = pipeline.plan(recipe(tiny_llama, text_file))
    assert len(outline["linears"]) == 14
    assert (
        outline["kept"] == pytest.approx(0.8)
        and outline["bytes"]["compressed_at_most"] < outline["bytes"]["source"]
    )
    assert set(outline["estimated_seconds"]) == {"calibrate", "decompose", "probe"}
    assert list(tmp_path.iterdir()) == []


def test_inspect_counts_the_stored_bits(run, tmp_path):
    _, folder, found = run
    shown = pipeline.inspect(folder, plot=tmp_path / "errors.png")
    low_rank = {
        linear["name"]: linear["bits"] for linear in found["linears"] if linear["method"] != "dense"
    }
    assert {linear["name"]: linear["bits"] for linear in shown["linears"]} == low_rank
    assert (tmp_path / "errors.png").read_bytes()[:4] == b"\x89PNG"


def test_evaluate_agrees_with_the_report(run, tiny_llama, text_file):
    _, folder, found = run
    result = pipeline.evaluate(
        str(folder),
        against=str(tiny_llama),
        text=str(text_file),
        window=32,
        windows=6,
        device="cpu",
    )
    assert result["kl"] == pytest.approx(found["kl"], rel=1e-9)
    assert result["perplexity"] == pytest.approx(found["perplexity"]["compressed"], rel=1e-9)
    assert (
        pipeline.evaluate(
            str(tiny_llama),
            against=str(tiny_llama),
            text=str(text_file),
            window=32,
            windows=2,
            device="cpu",
        )["kl"]
        == 0
    )
