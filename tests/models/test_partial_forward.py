"""Restarted forward passes: equal to full ones bit for bit, on every architecture, and no block run
twice.
"""

import pytest
import torch
from support.models import VOCABULARY, tiny_model
from support.modules import logits, low_rank_like, tokens

from compressor.errors import CompressorError
from compressor.models.head import Head
from compressor.models.install import installed
from compressor.models.linears import blocks, linears
from compressor.models.load import load
from compressor.models.partial_forward import recomputing
from compressor.models.restart import Restart

ARCHITECTURES = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "phi3",
    "mixtral",
    "gpt2",
    "opt",
    "gpt_neox",
]


@torch.no_grad()
def logits_from(head, hidden, input_ids):
    """Logits (batch, length, vocabulary) behind hidden states, of all positions at once."""
    flat = head.logits(hidden.flatten(0, 1), input_ids.flatten())
    return flat.unflatten(0, input_ids.shape)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_restart_anywhere_is_bit_equal(kind, device):
    model, input_ids = tiny_model(kind).to(device), tokens().to(device)
    head, before = Head(model), logits(model, input_ids)
    hidden, outputs = head.block_outputs(input_ids)
    assert torch.equal(logits_from(head, hidden, input_ids), before)
    for block in range(len(blocks(model)[1]) + 1):
        assert torch.equal(head.hidden_from(block, outputs, input_ids), hidden)
    assert torch.equal(logits(model, input_ids), before)  # nothing stays behind


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_change_in_one_linear_is_seen_as_in_a_full_pass(kind):
    model, batches = tiny_model(kind), [tokens(1), tokens(2)]
    head = Head(model)
    restart = Restart(head, batches, "cure")
    dense = [logits(model, batch) for batch in batches]
    for info in linears(model, ["*", "lm_head"]).values():
        with installed(model, {info.name: low_rank_like(info.module, 3, False)}):
            for index, batch in enumerate(batches):
                found = logits_from(head, restart.hidden_from(info.block, index), batch)
                assert torch.equal(found, logits(model, batch))
                assert not torch.equal(found, dense[index])
    for index, (batch, before) in enumerate(zip(batches, dense, strict=True)):
        assert torch.equal(logits_from(head, restart.hidden_from(1, index), batch), before)


def test_blocks_before_the_restart_do_not_run():
    model = tiny_model("llama", num_hidden_layers=4)
    head = Head(model)
    _, outputs = head.block_outputs(tokens())
    ran = []
    for index, block in enumerate(blocks(model)[1]):
        block.mlp.register_forward_hook(lambda *args, index=index: ran.append(index))
    for block in range(5):
        head.hidden_from(block, outputs, tokens())
    assert ran == [0, 1, 2, 3, 1, 2, 3, 2, 3, 3]


def test_a_failing_pass_leaves_the_model_as_it_was():
    model = tiny_model("llama")
    head, full = Head(model), logits(model, tokens())
    _, outputs = head.block_outputs(tokens())
    with pytest.raises(IndexError):
        head.hidden_from(2, outputs, torch.full((2, 12), VOCABULARY))
    assert all(
        "forward" not in block.__dict__ and not block._forward_hooks for block in blocks(model)[1]
    )
    assert torch.equal(logits(model, tokens()), full)


def test_offloaded_blocks(tiny_llama):
    placement = {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        "model.layers": "disk",
        "model.norm": "cpu",
        "lm_head": "cpu",
    }
    model = load(tiny_llama, device_map=placement)[0]
    placed = [block.__dict__["forward"] for block in blocks(model)[1]]  # accelerate's
    head, full = Head(model), logits(model, tokens())
    hidden, outputs = head.block_outputs(tokens())
    assert all(
        torch.equal(head.hidden_from(block, outputs, tokens()), hidden) for block in range(3)
    )
    assert [block.__dict__["forward"] for block in blocks(model)[1]] == placed
    assert torch.equal(logits(model, tokens()), full)


def test_blocks_that_pass_each_other_more_than_their_output_are_refused():
    model = tiny_model("llama")
    first, second = blocks(model)[1]
    passed = [torch.zeros(())]
    first.mlp.register_forward_hook(lambda module, args, output: passed.append(output))
    second.register_forward_hook(
        lambda module, args, output: output + (passed.pop() if len(passed) > 1 else passed[0])
    )
    with pytest.raises(CompressorError, match="restarted between its blocks differs"):
        Restart(Head(model), [tokens()], "cure")


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_blocks_that_run_again_keep_their_inputs_only_and_give_the_same_gradients(kind, device):
    model, input_ids = tiny_model(kind).to(device), tokens().to(device)

    def passed():
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: (kept.append(tensor), tensor)[1], lambda tensor: tensor
        ):
            found = model(input_ids=input_ids, use_cache=False).logits
        gradients = torch.autograd.grad(
            found.square().mean(), list(model.parameters()), allow_unused=True
        )
        parameters = {parameter.data_ptr() for parameter in model.parameters()}
        return (
            found,
            gradients,
            sum(
                {
                    one.data_ptr(): one.nbytes for one in kept if one.data_ptr() not in parameters
                }.values()
            ),
        )

    expected, gradients, whole = passed()
    with recomputing(model):
        found, again, less = passed()
    assert torch.equal(found, expected) and less < 0.5 * whole
    for one, other in zip(again, gradients, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    assert not any("forward" in block.__dict__ for block in blocks(model)[1])
