"""What residuals are worth beside finer bases of no more bytes: measured, in the plan, in the
report, in words.
"""

import pytest
from support.jobs import job_of
from support.models import read_json
from support.recipes import recipe

from compressor.evaluation import perplexity
from compressor.linears import Adapted, Packed
from compressor.models import install, load
from compressor.pipeline import residual_rival, run, stages
from compressor.pipeline.solution import allocate
from compressor.plan import FINER_BASES, WITH_RESIDUALS
from compressor.reporting import report

OPTIONS = "method.0.candidates.0.options"
EORA = [f"{OPTIONS}.bits=[2]", f"{OPTIONS}.residual=[2]", "output.dtype=bfloat16"]


@pytest.mark.parametrize("sequential", [False, True], ids=["dense inputs", "in order"])
def test_a_run_says_whether_its_residuals_beat_finer_bases(
    tmp_path, tiny_llama, text_file, sequential
):
    made = recipe(
        tiny_llama,
        text_file,
        *EORA,
        f"calibration.sequential={str(sequential).lower()}",
        config="eora_w4_r32",
    )
    found = run.compress(made, tmp_path / "out")
    contest = read_json(tmp_path / "out" / "plan.json")["contest"]
    assert contest == found["contest"] and contest.keys() == {WITH_RESIDUALS, FINER_BASES}
    assert sequential or found["heldout"]["kl"] == pytest.approx(contest[WITH_RESIDUALS], rel=1e-3)
    line = report.describe_residuals(found)
    assert ("a finer base is the better use" in line) == (
        contest[FINER_BASES] <= contest[WITH_RESIDUALS]
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert line[1:] in card and "Low-rank residuals: held-out KL" in card


def test_the_rival_is_the_finest_scheme_that_fits_and_its_divergence_that_of_the_whole_model(
    tiny_llama, text_file
):
    job = job_of(tiny_llama, text_file, *EORA, config="eora_w4_r32")
    solution = allocate(job, stages.statistics(job))
    plan, modules = solution.plan, solution.modules
    rivals = {name: residual_rival.find_finest(solution, name) for name in plan.linears}
    assert {type(module) for module in modules.values()} == {Adapted}
    for name, rival in rivals.items():
        choice = plan.linears[name]
        assert isinstance(rival, Packed) and rival.bits() <= choice.bits
        assert rival.code_bits > 2 or rival.group < choice.setting["group"]
        wider = (
            rival.weight.numel() * 32 * (rival.code_bits + 1) / rival.code_bits
            + rival.out_features * 16
        )
        assert wider > choice.bits  # a bit more would not fit, whatever the groups
    judged = residual_rival.compare_residuals(solution).plan
    original, _ = load.load(tiny_llama)
    for key, made in ((WITH_RESIDUALS, modules), (FINER_BASES, rivals)):
        with job.computing(), install.installed(job.model, made):
            expected = perplexity.compare(original, job.model, job.heldout.tokens).kl
        assert judged.contest[key] == pytest.approx(expected, rel=2e-3, abs=2e-7)  # in float32


@pytest.mark.parametrize(
    ("config", "overrides"),
    [
        ("gptq_w4", []),
        ("eora_24", ["calibration.windows=8"]),
        ("eora_w4_r32", [*EORA, "calibration.heldout=0"]),
    ],
    ids=["no residual", "no finer base of its kind", "nothing held out"],
)
def test_nothing_is_said_where_nothing_can_be_compared(
    tmp_path, tiny_llama, text_file, config, overrides
):
    found = run.compress(
        recipe(tiny_llama, text_file, *overrides, "evaluation.enabled=false", config=config),
        tmp_path / "out",
    )
    assert found["contest"] == {} and report.describe_residuals(found) is None


def test_a_compensated_base_of_many_sizes_has_finer_ones(tmp_path, tiny_llama, text_file):
    made = recipe(
        tiny_llama,
        text_file,
        "compensation.rank=2",
        "allocation.keep=0.6",
        "evaluation.enabled=false",
        config="svd_llm",
    )
    found = run.compress(made, tmp_path / "out")
    assert found["contest"].keys() == {WITH_RESIDUALS, FINER_BASES} and all(
        value > 0 for value in found["contest"].values()
    )
