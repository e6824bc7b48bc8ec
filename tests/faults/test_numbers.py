"""Faults of the numbers on the way: overflow, degenerate statistics, solvers that fail, experts,
sizes that cannot be met or do not pay.
"""

import json
import re
from dataclasses import replace

import pytest
import scipy.linalg
import torch
from safetensors.torch import save_file
from support.folders import WEIGHTS, edit_tensors
from support.models import read_json, save_tiny
from support.shell import calibrate, compress, refused, run

from compressor.calibrate.statistics_folder import load_statistics, save_statistics
from compressor.files.documents import read_json as read_description
from compressor.models import load as models
from compressor.reporting import report

pytestmark = pytest.mark.faults


def test_f21_overflow_in_activations(model, text_file, tmp_path):
    """Activations overflow or are NaN: the run stops and names the linear and the windows, an
    evaluation the batch.
    """
    edit_tensors(
        model / WEIGHTS, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].fill_(3e38)
    )
    name = "model.layers.1.mlp.down_proj: input activations are not finite in windows 0 to 3"
    refused(run(*compress(model, tmp_path / "never", text_file)), 1, name)
    assert not (tmp_path / "never").exists()
    refused(
        run("evaluate", model, "--text", text_file, "--window", 32, "--windows", 4),
        1,
        "batch 1 of 1",
        "is nan",
    )


DAMAGE = {
    "zero": lambda gram: torch.zeros_like(gram),
    "rank 3": lambda gram: gram[:, :3] @ gram[:3],
    "indefinite": lambda gram: (
        gram - 2 * torch.linalg.eigvalsh(gram)[:3].max() * torch.eye(len(gram), dtype=gram.dtype)
    ),
    "scales 1e-20 to 1e20": lambda gram: (
        (s := torch.logspace(-10, 10, len(gram), dtype=gram.dtype))[:, None] * gram * s
    ),
    "dead inputs": lambda gram: (
        (alive := (torch.arange(len(gram)) % 3 > 0).double())[:, None] * gram * alive
    ),
}


@pytest.mark.parametrize(
    "preset", ["svd_llm", "default", "wanda", "sparsegpt", "cospadi", "gptq_w4", "channels"]
)
def test_f22_degenerate_statistics(preset, tiny_llama, text_file, tmp_path):
    """A Gram is zero, of low rank, indefinite or of scales 1e-20 to 1e20: the run completes; a zero
    one leaves its linears dense, aloud.
    """
    options = ["-c", preset, "--set", "evaluation.enabled=false"] + (
        ["--keep", "0.7"] if preset != "gptq_w4" else []
    )
    collected = run(*calibrate(tiny_llama, tmp_path / "stats", text_file, "-c", preset))
    assert collected.exit_code == 0
    stats = load_statistics(tmp_path / "stats")
    damages, spoiled = list(DAMAGE.values()), {}
    for one in stats.values():
        spoiled.setdefault(id(one.gram), damages[len(spoiled) % len(damages)](one.gram))
    stats = {name: replace(one, gram=spoiled[id(one.gram)]) for name, one in stats.items()}
    mark = read_description(tmp_path / "stats" / "statistics.json")["fingerprint"]
    save_statistics(tmp_path / "stats", stats, mark, overwrite=True)
    result = run(
        *compress(tiny_llama, tmp_path / "out", text_file, *options, "--stats", tmp_path / "stats")
    )
    assert result.exit_code == 0, result.stderr
    assert re.search(
        r"\d linears stay dense, each because its inputs are all zero: model\.layers\.0\.",
        result.stderr,
    )
    if preset != "channels":  # whose targets read three inputs alone
        assert re.search(
            r"\d linears have inputs that the text never sets \(model\.layers\.\d\.\S+: \d+ of \d+\)",
            result.stderr,
        )
    assert run("verify", tmp_path / "out").exit_code == 0
    assert all(
        linear["error"] is not None
        for linear in read_json(tmp_path / "out" / "report.json")["linears"]
    )


def test_f23_solver_that_does_not_converge(tiny_llama, text_file, tmp_path, monkeypatch):
    """The first eigensolver does not converge: a second computes the same; if that fails too, exit
    1 with the linear named.
    """

    def diverge(*_, **__):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", diverge)
    assert run(*compress(tiny_llama, tmp_path / "out", text_file)).exit_code == 0
    monkeypatch.setattr(
        scipy.linalg,
        "eigh",
        lambda *_, **__: (_ for _ in ()).throw(scipy.linalg.LinAlgError("info 7")),
    )
    refused(
        run(*compress(tiny_llama, tmp_path / "never", text_file)),
        1,
        "model.layers.0.self_attn.q_proj",
        "does not converge (info 7)",
    )
    assert not (tmp_path / "never").exists()


def test_f25_experts(tiny_llama, text_file, tmp_path, monkeypatch):
    """Experts are fused into one weight, or nothing reaches a linear: what is left out is said
    aloud, the dead linear stays dense.
    """
    source = save_tiny(tmp_path / "mixtral", "mixtral")
    save_file(
        {"windows": torch.arange(12 * 32).view(12, 32) % 90 + 3}, tmp_path / "tokens.safetensors"
    )
    result = run(*compress(source, tmp_path / "out", f"{tmp_path / 'tokens.safetensors'}:windows"))
    assert result.exit_code == 0 and "4 fused weights of experts, 7" in result.stderr
    assert 0.1 < json.loads(run("plan", source, "--json").stdout)["covered_share"] < 0.4

    load = models.load

    def without_tokens(*arguments, **options):
        found, tokenizer = load(*arguments, **options)
        found.model.layers[1].mlp.forward = lambda x: x
        return found, tokenizer

    monkeypatch.setattr(models, "load", without_tokens)
    result = run(*compress(tiny_llama, tmp_path / "dead", text_file, "--keep", "0.8"))
    assert (
        result.exit_code == 0
        and "3 linears stay dense, each because no token reaches it: model.layers.1.mlp.down_proj, "
        in result.stderr
    )


def test_f26_budget_that_cannot_be_met(tiny_llama, text_file, tmp_path):
    """No plan is that small: exit 2 with the least reachable size, by `plan` from headers alone as
    well.
    """
    command = compress(tiny_llama, tmp_path / "never", text_file, "--keep", "0.001")
    refused(run(*command), 2, "least")
    refused(run("plan", *command[1:2], *command[3:]), 2, "least")
    refused(
        run(
            *compress(
                tiny_llama,
                tmp_path / "never",
                text_file,
                "--target-size",
                "36kB",
                allocation__count="bits",
            )
        ),
        2,
        "least",
    )
    assert not (tmp_path / "never").exists()


def test_f27_ranks_that_do_not_pay(tiny_llama, text_file, tmp_path):
    """A rank would store more than the dense weight: the linear stays dense, and the report counts
    it so.
    """
    settings = {
        "allocation__keep": 0.98,
        "allocation__kind": "knapsack",
        "allocation__damage": "gram",
        "allocation__count": "bits",
    }
    assert run(*compress(tiny_llama, tmp_path / "out", text_file, **settings)).exit_code == 0
    linears = read_json(tmp_path / "out" / "report.json")["linears"]
    dense = [linear for linear in linears if linear["method"] == "dense"]
    assert 0 < len(dense) < len(linears)
    assert all(linear["bits"] == linear["dense_bits"] and linear["error"] == 0 for linear in dense)
    assert all(linear["bits"] < linear["dense_bits"] for linear in linears if linear not in dense)
    assert "dense" in {
        row[0] for row in report.method_rows(read_json(tmp_path / "out" / "report.json"))
    }
