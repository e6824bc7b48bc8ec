"""Tiny random models and their files."""

import json
from pathlib import Path

import torch

VOCABULARY = 96


def tiny_config(kind: str, **changes):
    """Configuration of a two-block random model of one architecture; sizes unequal on purpose."""
    from transformers import AutoConfig

    common = {
        "vocab_size": VOCABULARY,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": "float32",
    }
    gated = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
    }
    classic = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    }
    sizes = {
        "llama": gated,
        "mistral": gated,
        "qwen2": gated,
        "qwen3": gated,
        "gemma2": gated | {"query_pre_attn_scalar": 8},
        "phi3": gated,
        "mixtral": gated | {"num_local_experts": 4},
        "cohere": gated,
        "granite": gated,
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
        "opt": classic | {"ffn_dim": 48, "word_embed_proj_dim": 32},
        "gpt_neox": classic | {"intermediate_size": 48},
    }
    return AutoConfig.for_model(kind, **(common | sizes[kind] | changes))


def tiny_model(kind: str, seed: int = 0, **changes):
    """Random two-block causal LM in float32, evaluation mode."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_config(kind, **changes)).eval()


def tiny_tokenizer():
    """Word-level tokenizer over the words w3 … w95 (0–2 are pad, bos, eos)."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def save_tiny(folder: Path, kind: str, **changes) -> Path:
    """Write a tiny model with its tokenizer as a Hugging Face folder."""
    tiny_model(kind, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def read_json(path: Path) -> dict:
    """Read JSON strictly: NaN and Infinity are errors."""

    def refuse(token: str):
        raise ValueError(f"{path} holds {token}, which is not JSON")

    return json.loads(Path(path).read_text(), parse_constant=refuse)
