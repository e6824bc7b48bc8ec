"""Dictionaries stored once for several linears: splitting, borrowing, and reading them with
transformers.
"""

import copy

import pytest
import torch
from support.models import tiny_model
from support.sameness import assert_same_output
from torch import nn

import compressor.hf
from compressor.errors import CheckpointError
from compressor.linears import Adapted, Dictionary, build_empty
from compressor.linears.masks import pack_mask

MEMBERS = {"self_attn.q_proj": 32, "self_attn.k_proj": 16, "self_attn.v_proj": 16}


def stacked(bias: bool = False, blocks: int = 1, dtype=torch.float32) -> Dictionary:
    """64 outputs over 32 inputs, 11 atoms: no multiple of eight codes in any linear."""
    generator = torch.Generator().manual_seed(0)
    codes, atoms = (
        torch.randn(64, 11 * blocks, generator=generator),
        torch.randn(11 * blocks, 32 // blocks, generator=generator),
    )
    mask, offset = codes.abs() > 0.6, torch.randn(64, generator=generator)
    return Dictionary(
        codes[mask].to(dtype),
        atoms.to(dtype),
        pack_mask(mask.flatten()),
        offset.to(dtype) if bias else None,
        64,
        blocks,
    )


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("blocks", [1, 4])
def test_the_parts_of_a_split_are_the_rows_of_the_whole(bias, blocks):
    whole = stacked(bias, blocks)
    parts = whole.split(MEMBERS)
    assert_same_output(torch.cat([part.to_dense() for part in parts.values()]), whole.to_dense())
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(torch.cat([part(x) for part in parts.values()], dim=-1), whole(x))


def test_atoms_are_stored_and_counted_once():
    parts = stacked().split(MEMBERS)
    stored = {name: set(part.state_dict()) for name, part in parts.items()}
    assert stored == {
        name: {"weight", "mask"} | ({"atoms"} if name.endswith("q_proj") else set())
        for name in MEMBERS
    }
    padding = sum(-(-height * 11 // 8) for height in MEMBERS.values()) - 64 * 11 // 8
    assert sum(part.bits() for part in parts.values()) == stacked().bits() + 8 * padding


def test_a_borrower_copied_alone_keeps_working_and_follows_its_own_dtype():
    part = stacked().split(MEMBERS)["self_attn.k_proj"]
    wide = copy.deepcopy(part).double()
    assert wide(torch.ones(1, 32, dtype=torch.float64)).dtype == torch.float64
    torch.testing.assert_close(wide.to_dense().float(), part.to_dense())


def test_training_reaches_the_lender_through_a_borrower():
    parts = stacked().split(MEMBERS)
    lender, borrower = parts["self_attn.q_proj"], parts["self_attn.v_proj"]
    lender.atoms.requires_grad_(True)
    borrower(torch.ones(2, 32)).square().sum().backward()
    assert lender.atoms.grad is not None and lender.atoms.grad.abs().sum() > 0


@pytest.fixture
def folder(tmp_path):
    """A tiny Llama whose first block shares a dictionary between q, k and v, and its logits in
    memory.
    """
    from compressor.checkpoint import write

    model = tiny_model("llama")
    names = {f"model.layers.0.{name}": height for name, height in MEMBERS.items()}
    for name, module in stacked().split(names).items():
        model.set_submodule(name, module)
    ids = torch.arange(3, 23).view(1, -1)
    with torch.no_grad():
        logits = model(ids).logits
    source = tmp_path / "source"
    tiny_model("llama").save_pretrained(source)
    (tmp_path / "out").mkdir()
    write.write_model(tmp_path / "out", model, None, source, 10**9)
    write.compare_reload(tmp_path / "out", model)
    return tmp_path / "out", ids, logits


@torch.no_grad()
def test_a_checkpoint_reloads_and_saves_again(folder, tmp_path):
    path, ids, logits = folder
    model, _ = compressor.load(path)
    assert_same_output(model(ids).logits, logits)
    assert (
        model.model.layers[0].self_attn.k_proj.dictionary().data_ptr()
        == model.model.layers[0].self_attn.q_proj.atoms.data_ptr()
    )
    assert_same_output(copy.deepcopy(model)(ids).logits, logits)
    model.save_pretrained(tmp_path / "again")
    again, _ = compressor.load(tmp_path / "again")
    assert_same_output(again(ids).logits, logits)


@torch.no_grad()
def test_disk_offload_fetches_the_lender(folder, tmp_path):
    from accelerate import dispatch_model

    path, ids, logits = folder
    model, _ = compressor.load(path)
    where = {
        "model.embed_tokens": "cpu",
        "model.layers": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    placed = dispatch_model(
        model, where, main_device="cpu", offload_dir=str(tmp_path / "offload"), force_hooks=True
    )
    torch.testing.assert_close(placed(ids).logits, logits)


def test_a_lender_that_has_no_such_dictionary_is_refused():
    model = nn.ModuleDict(
        {"a": build_empty(stacked().spec(), torch.float32, "cpu"), "b": nn.Linear(32, 16)}
    )
    part = stacked().split({"a": 32, "b": 16, "c": 16})["b"]
    spec = part.spec()
    borrower = build_empty(spec, torch.float32, "cpu")
    borrower.bind(model)
    with pytest.raises(CheckpointError, match="b: a linear borrows"):
        build_empty(spec | {"lender": "b"}, torch.float32, "cpu").bind(model)
    with pytest.raises(CheckpointError, match="of 12 atoms"):
        build_empty(spec | {"atoms": 12}, torch.float32, "cpu").bind(model)


def test_an_adapted_borrower_is_bound_through_its_base():
    parts = stacked().split({"a": 32, "b": 32})
    rank_one = torch.ones(32, 1), torch.ones(1, 32)
    model = nn.ModuleDict({"a": Adapted(parts["a"], *rank_one)})
    adapted = Adapted(parts["b"], *rank_one)
    rebuilt = build_empty(adapted.spec(), torch.float32, "cpu")
    rebuilt.load_state_dict(adapted.state_dict())
    rebuilt.bind(model)
    torch.testing.assert_close(rebuilt.to_dense(), adapted.to_dense())
