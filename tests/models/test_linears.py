"""Ten architectures found by structure, and one Llama through patterns and replacing."""

import pytest
import torch
from support.models import VOCABULARY, read_json, save_tiny, tiny_model
from support.modules import compress_in_place, factor_pair, logits, low_rank_like
from support.sameness import assert_same_output
from torch import nn

from compressor.errors import ConfigError
from compressor.linears import LowRank
from compressor.models.install import installed, replace
from compressor.models.linears import blocks, covered_share, dense_of, fused, linears
from compressor.models.load import load, skeleton

CLOSE = 1e-4  # logits of a weight of exact rank r against its rank-r factors, float32
LLAMA = [
    ("self_attn", {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}, ["q", "k", "v"])
]
GATED = [("mlp", {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}, ["gate", "up"])]
# architecture: (path of the blocks, per parent module: role → child, and the roles that share an
# input)
EXPECTED = {
    "llama": ("model.layers", LLAMA + GATED),
    "mistral": ("model.layers", LLAMA + GATED),
    "qwen2": ("model.layers", LLAMA + GATED),
    "qwen3": ("model.layers", LLAMA + GATED),
    "gemma2": ("model.layers", LLAMA + GATED),
    "phi3": (
        "model.layers",
        [
            ("self_attn", {"qkv": "qkv_proj", "o": "o_proj"}, []),
            ("mlp", {"gate_up": "gate_up_proj", "down": "down_proj"}, []),
        ],
    ),
    "mixtral": ("model.layers", LLAMA),
    "gpt2": (
        "transformer.h",
        [
            ("attn", {"qkv": "c_attn", "o": "c_proj"}, []),
            ("mlp", {"fc1": "c_fc", "fc2": "c_proj"}, []),
        ],
    ),
    "opt": (
        "model.decoder.layers",
        [
            (
                "self_attn",
                {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"},
                ["q", "k", "v"],
            ),
            ("", {"fc1": "fc1", "fc2": "fc2"}, []),
        ],
    ),
    "gpt_neox": (
        "gpt_neox.layers",
        [
            ("attention", {"qkv": "query_key_value", "o": "dense"}, []),
            ("mlp", {"fc1": "dense_h_to_4h", "fc2": "dense_4h_to_h"}, []),
        ],
    ),
}
CHANGES = {"qwen3": {"tie_word_embeddings": True}}
ARCHITECTURES = list(EXPECTED)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request, tmp_path_factory) -> tuple[str, object, object]:
    """Name, folder and model of one tiny architecture. Read only."""
    folder = save_tiny(
        tmp_path_factory.mktemp("architectures") / request.param,
        request.param,
        **CHANGES.get(request.param, {}),
    )
    return request.param, folder, load(folder)[0]


def test_roles_blocks_and_shared_inputs(architecture):
    kind, _, model = architecture
    prefix, families = EXPECTED[kind]
    found = linears(model)
    assert blocks(model)[0] == prefix and len(blocks(model)[1]) == 2
    expected = {}
    for block in range(2):
        for parent, roles, sharing in families:
            names = {
                role: ".".join(filter(None, (prefix, str(block), parent, child)))
                for role, child in roles.items()
            }
            expected |= {
                name: (role, block, names[sharing[0]] if role in sharing else name)
                for role, name in names.items()
            }
    assert {name: (info.role, info.block, info.feeds) for name, info in found.items()} == expected


def test_sizes_and_dense_weights(architecture):
    kind, _, model = architecture
    for info in linears(model).values():
        dense = dense_of(info, torch.bfloat16)
        assert tuple(dense.weight.shape) == (info.out_features, info.in_features)
        assert (dense.dtype, info.conv1d, info.outside) == (torch.bfloat16, kind == "gpt2", False)
        inputs = torch.randn(3, info.in_features, generator=torch.Generator().manual_seed(0))
        expected = inputs @ dense.weight.T + (0 if dense.bias is None else dense.bias)
        torch.testing.assert_close(info.module(inputs), expected, rtol=CLOSE, atol=CLOSE)
        assert not dense.weight.requires_grad and dense.weight.is_contiguous()


def test_the_skeleton_tells_the_same_without_weights(architecture):
    _, folder, model = architecture
    bare = skeleton(folder)
    assert all(tensor.is_meta for tensor in (*bare.parameters(), *bare.buffers()))

    def told(model):
        return [
            (info.name, info.role, info.block, info.feeds, info.conv1d, info.outside)
            for info in linears(model).values()
        ]

    assert told(bare) == told(model)
    assert sum(parameter.numel() for parameter in bare.parameters()) == sum(
        parameter.numel() for parameter in model.parameters()
    )
    assert covered_share(bare, linears(bare)) == covered_share(model, linears(model))


def test_the_head_runs_after_the_blocks(architecture):
    _, folder, model = architecture
    for one in (model, skeleton(folder)):
        head = [info for info in linears(one, ["*", "lm_head"]).values() if info.outside]
        assert [(info.name, info.block, info.role) for info in head] == [("lm_head", 2, None)]


@pytest.mark.parametrize("pivoted", [False, True], ids=["plain", "pivoted"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_linear_as_exact_factors_survives_a_reload(kind, pivoted, tmp_path):
    """Weights of exact rank r, replaced by their rank-r factors: the same function, in memory and
    from the folder.
    """
    model = tiny_model(kind, **CHANGES.get(kind, {}))
    modules = {}
    with torch.no_grad():
        for info in linears(model).values():
            rank = min(info.out_features, info.in_features) // 2
            up, down = factor_pair(dense_of(info, torch.float32).weight, rank)
            info.module.weight.copy_((up @ down).T if info.conv1d else up @ down)
            modules[info.name] = low_rank_like(info.module, rank, pivoted)
    expected = logits(model)
    for name, module in modules.items():
        replace(model, name, module)
    torch.testing.assert_close(logits(model), expected, rtol=CLOSE, atol=CLOSE)
    assert not linears(model) or kind == "mixtral"
    compress_in_place(model, modules)
    model.save_pretrained(tmp_path)
    again, tokenizer = load(tmp_path)
    assert_same_output(logits(again), logits(model)) and tokenizer is None
    assert sum(isinstance(module, LowRank) for module in again.modules()) == len(modules)


def test_covered_share():
    model = tiny_model("llama", tie_word_embeddings=True)
    attention, mlp, norms, embedding = (
        32 * 32 * 2 + 16 * 32 * 2,
        3 * 32 * 48,
        2 * 32,
        VOCABULARY * 32,
    )
    total = 2 * (attention + mlp + norms) + 32 + embedding
    assert covered_share(model, linears(model)) == pytest.approx(2 * (attention + mlp) / total)
    assert covered_share(model, linears(model, ["*q_proj", "lm_head"])) == pytest.approx(
        (2 * 32 * 32 + embedding) / total
    )
    assert fused(model) == {}


def test_fused_experts_are_not_covered():
    model = tiny_model("mixtral")
    attention, experts = 2 * (32 * 32 * 2 + 16 * 32 * 2), 2 * 4 * 3 * 32 * 48
    assert sum(fused(model).values()) == experts
    assert all(".experts." in name for name in fused(model))
    assert covered_share(model, linears(model)) == pytest.approx(
        attention / sum(parameter.numel() for parameter in model.parameters())
    )


def test_patterns_select_whole_names():
    model = tiny_model("llama")
    assert list(linears(model, ["model.layers.1.self_attn.k_proj"])) == [
        "model.layers.1.self_attn.k_proj"
    ]
    assert list(linears(model, ["*.v_proj"])) == [
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    assert list(linears(model, [r"re:.*0\.(self_attn\.[qk]|mlp\.up)_proj"])) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.k_proj",
        "model.layers.0.mlp.up_proj",
    ]
    assert linears(model, ["*"]).keys() == linears(model).keys() == linears(model, ["re:.*"]).keys()
    assert "lm_head" not in linears(model, ["*"])
    assert list(linears(model, ["lm_head", "*.0.*.q_proj"])) == [
        "model.layers.0.self_attn.q_proj",
        "lm_head",
    ]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            "q_proj",
            r"target 'q_proj' selects no linear of this model; the nearest is 'model\.layers\.\d\.self_attn\.q_proj'",
        ),
        ("re:q_proj", "selects no linear"),
        (
            "model.layers.7.self_attn.v_proj",
            r"the nearest is 'model\.layers\.\d\.self_attn\.v_proj'",
        ),
        ("lm_haed", "the nearest is 'lm_head'"),
        ("*head", "selects no linear"),
        ("model.embed_tokens", "selects no linear"),
        ("re:*", "'re:\\*' is not a regular expression: nothing to repeat"),
    ],
)
def test_patterns_that_select_nothing_are_errors(pattern, message):
    with pytest.raises(ConfigError, match=message):
        linears(tiny_model("llama"), ["*.v_proj", pattern])


class Expert(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.w = nn.Linear(width, width)


class Block(nn.Module):
    def __init__(self, experts: int, width: int):
        super().__init__()
        self.experts = nn.ModuleList(Expert(width) for _ in range(experts))


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.vision = nn.ModuleList(Block(1, 4) for _ in range(5))
        self.norms = nn.ModuleList(nn.LayerNorm(400) for _ in range(9))
        self.heads = nn.ModuleList(nn.Linear(64, 64) for _ in range(9))
        self.text = nn.ModuleList(Block(6, 16) for _ in range(2))


def test_blocks_are_the_outermost_largest_list_that_holds_linears():
    toy = Toy()
    assert blocks(toy)[0] == "text"
    del toy.text
    assert blocks(toy)[0] == "vision"
    del toy.vision
    with pytest.raises(ConfigError, match="no decoder blocks"):
        blocks(toy)


def test_installed_modules_leave_no_trace():
    model = tiny_model("llama", tie_word_embeddings=True)
    before, names = logits(model), ["model.layers.1.mlp.up_proj", "lm_head"]
    former = {name: model.get_submodule(name) for name in names}
    with (
        pytest.raises(KeyboardInterrupt),
        installed(model, {name: low_rank_like(former[name], 3, True) for name in names}),
    ):
        assert not torch.equal(logits(model), before)
        assert model.config.tie_word_embeddings is False
        raise KeyboardInterrupt
    assert all(model.get_submodule(name) is module for name, module in former.items())
    assert (
        model.config.tie_word_embeddings is True and "lm_head.weight" in model.all_tied_weights_keys
    )
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model), before)


def test_installing_at_an_unknown_name_restores_the_others():
    model = tiny_model("llama")
    good = "model.layers.1.mlp.up_proj"
    former = model.get_submodule(good)
    module = low_rank_like(former, 3, False)
    with (
        pytest.raises(AttributeError),
        installed(model, {good: module, "model.layers.9.mlp.up_proj": module}),
    ):
        pass
    assert model.get_submodule(good) is former


def test_replacing_casts_a_copy_to_the_dtype_of_the_linear():
    model = tiny_model("llama")
    name = "model.layers.0.self_attn.v_proj"
    module = low_rank_like(model.get_submodule(name), 5, True)
    replace(model, name, module)
    assert model.get_submodule(name) is module
    half = low_rank_like(tiny_model("llama", seed=1).get_submodule(name), 5, True).to(
        torch.bfloat16
    )
    replace(model, name, half)
    assert (
        model.get_submodule(name).up.dtype == torch.float32
        and model.get_submodule(name).pivots.dtype == torch.uint8
    )
    assert half.up.dtype == torch.bfloat16
    assert_same_output(model.get_submodule(name).to_dense(), half.to_dense())


def test_replacing_a_tied_head_unties_it(tmp_path):
    model = tiny_model("llama", tie_word_embeddings=True)
    embedding = model.model.embed_tokens.weight.detach().clone()
    head = low_rank_like(model.lm_head, 6, False)
    replace(model, "lm_head", head)
    compress_in_place(model, {"lm_head": head})
    model.tie_weights()  # lm-eval calls this on every model
    assert model.lm_head is head and head.weight.shape == (6, 32)
    model.save_pretrained(tmp_path)
    again, _ = load(tmp_path)
    assert read_json(tmp_path / "config.json")["tie_word_embeddings"] is False
    assert torch.equal(again.model.embed_tokens.weight, embedding)
    assert_same_output(logits(again), logits(model))
