"""Token windows sampled from a model's own distribution."""

from typing import Any

import torch
from torch import Tensor

from compressor.errors import DataError, NumericalError
from compressor.runtime.progress import Progress, silent

# windows sampled together; fixed, because it decides which random number meets which window
SAMPLE_BATCH = 64


@torch.no_grad()
def sample(model: Any, count: int, length: int, seed: int, progress: Progress = silent) -> Tensor:
    """Sample token windows (count, length), int64, from the model's own distribution: temperature
    1, each starting with BOS.

    Sampling goes on after an end-of-sequence token, as in packed training text. The same seed,
    device and dtype give the same tokens. Raises DataError when the model names neither a BOS nor
    an EOS token to start from, NumericalError on non-finite logits.
    """
    start = next(
        (
            token
            for token in (model.config.bos_token_id, model.config.eos_token_id)
            if token is not None
        ),
        None,
    )
    if start is None:
        raise DataError(
            "self: the model's config names neither bos_token_id nor eos_token_id, so there is no "
            "token to start from"
        )
    generator = torch.Generator(model.device).manual_seed(seed)
    batches = []
    for first in progress(range(0, count, SAMPLE_BATCH), "sample"):
        rows = min(SAMPLE_BATCH, count - first)
        token = torch.full(
            (rows, 1), start[0] if isinstance(start, list) else start, device=model.device
        )
        columns, cache = [token], None
        while len(columns) < length:
            output = model(input_ids=token, past_key_values=cache, use_cache=True)
            cache, logits = output.past_key_values, output.logits[:, -1].float()
            if not torch.isfinite(logits).all():
                raise NumericalError(
                    f"self: non-finite logits at position {len(columns) - 1} while sampling"
                )
            token = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            columns.append(token)
        batches.append(torch.cat(columns, dim=1).cpu())
    return torch.cat(batches)
