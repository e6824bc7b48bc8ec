"""What the original and a compressed checkpoint make of the same prompts, side by side: the
likeliest token at every step.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from compressor.errors import CheckpointError, ConfigError
from compressor.files import model_folder
from compressor.models import load as models
from compressor.recipe.load import load_recipe
from compressor.runtime.progress import Progress, silent

Sample = tuple[
    str, str, str
]  # prompt, continuation by the original, continuation by the compressed model


def side_by_side(
    checkpoints: Sequence[Path],
    prompts: Sequence[str],
    tokens: int,
    device: str = "cpu",
    progress: Progress = silent,
) -> list[list[Sample]]:
    """For each checkpoint its samples. Originals are those that the checkpoints' recipes name, each
    loaded once.

    Raises ConfigError for an empty prompt or a folder without recipe.yaml, CheckpointError for a
    model without a tokenizer.
    """
    if not all(prompt.strip() for prompt in prompts):
        raise ConfigError("--sample needs some text to continue")
    originals: dict[Path, list[str]] = {}
    found = []
    for checkpoint in progress(checkpoints, "sample"):
        section = load_recipe(checkpoint / "recipe.yaml").model
        source = model_folder.resolve(section.name, section.revision)
        if source not in originals:
            originals[source] = continuations(source, prompts, tokens, device)
        found.append(
            list(
                zip(
                    prompts,
                    originals[source],
                    continuations(checkpoint, prompts, tokens, device),
                    strict=True,
                )
            )
        )
    return found


@torch.no_grad()
def continuations(
    path: Path, prompts: Sequence[str], tokens: int, device: str = "cpu"
) -> list[str]:
    """At most `tokens` tokens that a model puts after each prompt, without sampling. Raises
    ConfigError for more than it has positions.
    """
    model, tokenizer = models.load(path, device=device)
    if tokenizer is None:
        raise CheckpointError(f"{path}: has no tokenizer, so it cannot continue a text")
    ends = model.generation_config.eos_token_id
    padding = (
        tokenizer.pad_token_id
        if tokenizer.pad_token_id is not None
        else ends[0]
        if isinstance(ends, list)
        else ends
    )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    continuations = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids.to(device)
        if positions is not None and ids.shape[1] + tokens > positions:
            raise ConfigError(
                f"{path}: a prompt of {ids.shape[1]} and a sample of {tokens} tokens exceed its "
                f"{positions} positions"
            )
        settings = {
            "max_new_tokens": tokens,
            "do_sample": False,
            "num_beams": 1,
            "pad_token_id": padding,
        }
        generate: Any = model.generate
        output = generate(ids, attention_mask=torch.ones_like(ids), **settings)
        text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        continuations.append(str(text))
    return continuations
