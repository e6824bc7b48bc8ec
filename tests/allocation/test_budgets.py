"""Budgets: one rounding, one unit, for plans and for dry runs alike."""

from dataclasses import dataclass
from typing import get_args

import pytest
from support.recipes import recipe

from compressor.allocation.budgets import Budget
from compressor.allocation.published import RULES
from compressor.errors import BudgetError
from compressor.pipeline import run
from compressor.recipe.sections import Allocation


@dataclass
class Sized:
    bits: int
    parameters: int


def test_a_whole_share_of_a_size_is_not_rounded_down():
    assert 0.29 * 100 < 29 and Budget("bits", 0.29).of([Sized(40, 1), Sized(60, 1)]) == 29
    assert Budget("bits", 0.299).of([Sized(100, 1)]) == 29


def test_a_budget_counts_in_its_own_unit():
    linears = [Sized(160, 10), Sized(320, 20)]
    assert Budget("bits", 0.5).of(linears) == 240 and Budget("parameters", 0.5).of(linears) == 15


def test_every_rule_but_the_knapsack_is_registered():
    kinds = set(get_args(Allocation.model_fields["kind"].annotation))
    assert kinds - {"knapsack"} == RULES.keys()


@pytest.mark.parametrize("count", ["bits", "parameters"])
def test_a_dry_run_and_a_run_agree_on_the_least_size(tiny_llama, text_file, tmp_path, count):
    method = "method=[{candidates: [{name: low_rank, options: {rank_step: 8}}], dense: false}]"
    sets = [method, f"allocation.count={count}", "evaluation.enabled=false"]

    def least(do) -> str:
        with pytest.raises(BudgetError, match="at least 0") as caught:
            do(recipe(tiny_llama, text_file, *sets, "allocation.keep=0.05"))
        return str(caught.value)

    assert least(run.plan) == least(lambda made: run.compress(made, tmp_path / "out"))
