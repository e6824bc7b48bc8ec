"""Whole modules in sequential runs: scored again, and refitted, behind everything that was
compressed before them.
"""

from dataclasses import replace

import pytest
import torch
from support.jobs import built, exactly, job_of, received
from support.models import tiny_model

from compressor.allocation import decompose
from compressor.methods.base import Member
from compressor.models import install
from compressor.models.linears import dense_of, linears
from compressor.statistics import LinearStats

HEADS = """method=[{targets: "role:attention", candidates: [{name: heads, options: {score: transact}}]},
                   {targets: "role:ffn", candidates: [{name: channels}]}]"""
RUN = [
    "self_attn.{q_proj,k_proj}",
    "self_attn.{q_proj,k_proj,v_proj,o_proj}",
    "self_attn.{v_proj,o_proj}",
    "mlp",
]  # the order in a block


def place(group, assignments):
    return assignments[group.members[0]].info.block, next(
        index for index, each in enumerate(RUN) if each in group.name
    )


def part_of(dense, model, name, role, tokens, anchor):
    """A linear with its Gram behind what is compressed, its weight moved by what its inputs
    lack.
    """
    linear, x = dense_of(linears(dense)[name], torch.float64), received(model, name, tokens)
    if anchor:
        gram, cross = x.T @ x, received(dense, name, tokens).T @ x
        damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram))
        linear = replace(
            linear,
            weight=linear.weight
            + anchor * linear.weight @ torch.linalg.solve(damped, cross - gram, left=False),
        )
    return Member(name, linear, LinearStats(tokens=len(x), gram=x.T @ x), role)


@pytest.mark.parametrize(
    "sets",
    [(), ("calibration.anchor=0",), (HEADS, "calibration.anchor=0")],
    ids=["anchored", "plain", "heads"],
)
def test_every_module_is_scored_behind_what_was_compressed_before_it(sets, tiny_llama, text_file):
    """Against full passes of the model with everything before compressed: in a block q and k, then
    v and o, then the channels.
    """
    job = exactly(
        job_of(
            tiny_llama,
            text_file,
            "allocation.keep=0.6",
            "output.dtype=float32",
            *sets,
            config="transact",
        )
    )
    plan, modules = built(job)
    dense, model = tiny_model("llama").double(), tiny_model("llama").double()
    for group in sorted(job.groups.values(), key=lambda group: place(group, job.assignments)):
        roles = {name: job.assignments[name].info.role for name in group.members}
        anchor = job.recipe.calibration.anchor
        parts = {
            name: part_of(
                dense,
                model,
                name,
                role,
                job.calibration.tokens,
                anchor if role in ("o", "down") else 0.0,
            )
            for name, role in roles.items()
        }
        choice, method = plan.linears[group.members[0]], group.methods[0]
        outputs = {name: len(part.dense.weight) for name, part in parts.items()}
        state = method.prepare_unit(group.name, parts)
        expected, error = decompose.built(method, state, choice.setting, outputs)
        for name, module in expected.items():
            torch.testing.assert_close(
                modules[name].to_dense(), module.to_dense(), rtol=1e-5, atol=1e-7
            )
            assert plan.linears[name].measured == pytest.approx(error, rel=1e-5)
            install.replace(model, name, module)
    assert choice.sequential == ({"anchor_damping": 0.01} if job.recipe.calibration.anchor else {})
    assert choice.measured != choice.predicted
