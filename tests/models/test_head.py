"""Heads in chunks of positions: the logits of the whole model, whatever it does behind its trunk."""

import pytest
import torch
from support.models import tiny_model
from support.modules import logits, low_rank_like, tokens
from transformers.modeling_outputs import CausalLMOutputWithPast

from compressor.errors import CompressorError
from compressor.models.head import LEAST_ROWS, Head
from compressor.models.install import installed
from compressor.models.linears import blocks
from compressor.models.load import load

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
    "cohere",
    "granite",
]
CLOSE = 1e-5  # float32 products of differently many rows


def assert_in_chunks(model, input_ids, expected):
    """Assert that hidden states and head give the logits of the whole model, five at a time."""
    head = Head(model)
    assert head.vocabulary == expected.shape[-1]
    hidden, ids = head.hidden(input_ids).flatten(0, 1), input_ids.flatten()
    found = [
        head.logits(hidden[start : start + 5], ids[start : start + 5])
        for start in range(0, len(ids), 5)
    ]
    torch.testing.assert_close(
        torch.cat(found), expected.flatten(0, 1), rtol=CLOSE, atol=CLOSE * expected.abs().max()
    )


@torch.no_grad()
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_chunks_of_positions_give_the_logits_of_the_whole_model(kind, device):
    model, input_ids = tiny_model(kind).to(device), tokens().to(device)
    assert_in_chunks(model, input_ids, logits(model, input_ids))


@torch.no_grad()
@pytest.mark.parametrize(
    "kind, key, value",
    [
        ("gemma2", "final_logit_softcapping", 0.1),
        ("cohere", "logit_scale", 3.0),
        ("granite", "logits_scaling", 3.0),
        ("llama", "tie_word_embeddings", True),
    ],
)
def test_what_follows_the_head_is_the_models_own(kind, key, value):
    model = tiny_model(kind, **{key: value})
    assert_in_chunks(model, tokens(), logits(model, tokens()))
    with installed(model, {"lm_head": low_rank_like(model.lm_head, 3, False)}):
        assert_in_chunks(model, tokens(), logits(model, tokens()))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_only_the_head_lies_outside_the_trunk(kind):
    head = Head(tiny_model(kind))
    assert list(head.outside) == ["lm_head"]


@torch.no_grad()
def test_the_head_runs_no_block():
    model = tiny_model("llama")
    head = Head(model)
    hidden, ran = head.hidden(tokens()).flatten(0, 1), []
    for block in blocks(model)[1]:
        block.register_forward_hook(lambda *hooked: ran.append(hooked))
    head.logits(hidden, tokens().flatten())
    assert not ran and "forward" not in model.model.__dict__


@torch.no_grad()
def test_offloaded_models(tiny_llama):
    placement = {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        "model.layers": "disk",
        "model.norm": "cpu",
        "lm_head": "disk",
    }
    model = load(tiny_llama, device_map=placement)[0]
    assert_in_chunks(model, tokens(), logits(model, tokens()))


def test_chunks_cover_every_position_once_within_their_bytes():
    head = Head(tiny_model("llama"))
    slices = list(head.chunks(1000, size=head.row_bytes * 130))
    assert [rows.stop - rows.start for rows in slices] == [130] * 7 + [90]
    assert [position for rows in slices for position in range(rows.start, rows.stop)] == list(
        range(1000)
    )
    assert next(head.chunks(1000, size=1)) == slice(0, LEAST_ROWS)


def test_a_head_that_needs_more_than_hidden_states_is_refused():
    model = tiny_model("llama")
    model.lm_head.register_forward_hook(lambda module, args, out: out * torch.rand(()))
    with pytest.raises(CompressorError, match="its head cannot be run alone"):
        Head(model)


def test_a_model_that_runs_its_blocks_itself_is_refused():
    model = tiny_model("llama")
    trunk = model.model
    del model.model
    model.layers = trunk.layers
    model.forward = lambda input_ids, use_cache: CausalLMOutputWithPast(
        logits=model.lm_head(trunk(input_ids)[0])
    )
    with pytest.raises(CompressorError, match="no module around its decoder blocks"):
        Head(model)
