"""Layouts for integers and residuals that load without this package: that of the compressed-tensors
library, and adapters of PEFT.

compressed-tensors   <m>.weight_packed (out, ⌈in · b / 32⌉) int32, weight_scale (out, groups),
                     weight_shape (2,) int64, if asymmetric
                     weight_zero_point (⌈out · b / 32⌉, groups); config.json lists a config group
                     for each scheme
peft                 adapter_config.json and adapter_model.safetensors beside such a base, which
                     transformers finds and puts on top: lora_A
                     (r, in) = down, lora_B (out, r) = up, alpha = r for every linear, so that the
                     scaling is 1. There is an index file
                     even for one shard, so that readers of every *.safetensors do not take the
                     adapter for weights.
dequantize           a flag of config.json: unpack while loading rather than in the first pass. PEFT
                     needs it, and so do zero points, whose
                     packed shape the other way does not expect (transformers 5.23,
                     compressed-tensors 0.20). It knows one scheme only, so
                     several are written as one that holds them all exactly: the widest codes, and
                     groups of the greatest common divisor.
Linears of other kinds are written dense. Every export is loaded by the library it is for and
compared before it is put in place.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from compressor.checkpoint.export.dense import SHARD_SIZE, build_dense, read_skeleton
from compressor.checkpoint.weights import stored_dtype, stored_tensors, write_shard, write_weights
from compressor.checkpoint.write import has_same_bits, write_config, write_other_files
from compressor.errors import CheckpointError, ConfigError
from compressor.files.documents import naming, some
from compressor.files.staging import Staging, preflight
from compressor.linears import Adapted, CompressedLinear, Packed
from compressor.linears.packed import library
from compressor.models.load import from_pretrained, load

# format → whether residuals are written, as an adapter
FORMATS = {"compressed-tensors": False, "peft": True}
# of logits over the largest, where adapters are added
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
README = """# {name}

Written from a checkpoint of `compressor`; it loads without that package:

```python
from transformers import AutoModelForCausalLM  # with {needs} installed

model = AutoModelForCausalLM.from_pretrained("{name}")
```
"""
ADAPTED = """
The adapter makes up for what the base has lost; it belongs to this base alone.
Without `peft` transformers loads the base and says nothing. Engines that take adapters from a
folder of their own (vLLM: `--lora-modules`) want a copy of the two `adapter_*` files elsewhere.
"""


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A compressed checkpoint, taken apart."""

    path: Path
    stock: PreTrainedModel  # the dense architecture, on the meta device
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    bases: dict[str, CompressedLinear]  # every compressed linear without its residual
    pairs: dict[str, tuple[Tensor, Tensor]]  # up (out, r) and down (r, in) of the residuals

    @property
    def integers(self) -> dict[str, Packed]:
        return {name: base for name, base in self.bases.items() if isinstance(base, Packed)}

    @property
    def schemes(self) -> dict[tuple[int, int, bool], list[str]]:
        """Linears of each (bits, group, symmetric); group 0 is a scale for a whole row."""
        schemes: dict[tuple[int, int, bool], list[str]] = {}
        for name, base in self.integers.items():
            group = 0 if base.group == base.in_features else base.group
            schemes.setdefault((base.code_bits, group, base.zeros is None), []).append(name)
        return dict(sorted(schemes.items()))

    @property
    def dequantize(self) -> bool:
        """Say whether the integers have to be unpacked while loading."""
        return bool(self.pairs) or not all(symmetric for _, _, symmetric in self.schemes)

    def is_conv1d(self, name: str) -> bool:
        return isinstance(self.stock.get_submodule(name), Conv1D)


def export_packed(
    path: Path, output: Path, adapted: bool, overwrite: bool = False, shard_size: int = SHARD_SIZE
) -> str:
    """Write the layout of compressed-tensors, with residuals as an adapter if `adapted`; return one
    line that says what was written.

    Raises:
        ConfigError: the layout cannot hold what the checkpoint stores (see `check_format`).
        CheckpointError: the export, loaded by transformers, is not what the checkpoint is.
    """
    stock = read_skeleton(path)
    preflight(
        output, path, overwrite, sum(tensor.nbytes for tensor in stored_tensors(stock).values())
    )
    opened = take_apart(path, stock)
    check_format(opened, adapted)
    if opened.dequantize and len(opened.schemes) > 1:
        opened = replace(opened, bases=opened.bases | unify_schemes(opened))
    dtype, expected = (
        stored_dtype(stored_tensors(opened.model).values()),
        compute_logits(opened.model),
    )
    weights = {name: base.to_dense().to(dtype) for name, base in opened.bases.items()}
    for name, base in opened.bases.items():
        replacement = (
            build_layout(base)
            if isinstance(base, Packed)
            else build_dense(base, stock.get_submodule(name), dtype)
        )
        opened.model.set_submodule(name, replacement)
    with Staging(output, overwrite) as staging:
        write_export(opened, staging.folder, output.name, shard_size, adapted)
        off, scale = compare_export(staging.folder, opened, weights, expected)
        if off > (TOLERANCE[dtype] * scale if adapted else 0.0):
            raise CheckpointError(
                f"{output}: logits of the export, loaded by transformers, are off by {off:.3g} of "
                f"{scale:.3g}"
            )
        staging.commit()
    schemes = " and ".join(
        f"{bits} bits in groups of {group or 'a row'}" for bits, group, _ in opened.schemes
    )
    kinds = (
        f"{len(opened.integers)} linears of integers{f' ({schemes})' if schemes else ''}, "
        f"{len(opened.pairs)} residuals"
    )
    rest = (
        f", {len(weights) - len(opened.integers)} linears of other kinds written dense"
        if len(weights) > len(opened.integers)
        else ""
    )
    return (
        f"{output}: {kinds}{rest}; loaded by transformers and compared, logits differ by "
        f"{off:.3g} at most (largest {scale:.3g})"
    )


def take_apart(path: Path, stock: PreTrainedModel) -> OpenedCheckpoint:
    model, tokenizer = load(path)
    modules = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, CompressedLinear)
    }
    bases = {name: module.base for name, module in modules.items()}
    pairs = {name: module.pair() for name, module in modules.items() if isinstance(module, Adapted)}
    return OpenedCheckpoint(path, stock, model, tokenizer, bases, pairs)


def check_format(opened: OpenedCheckpoint, adapted: bool) -> None:
    """Raise ConfigError for what the format cannot hold, or for a checkpoint with nothing to put in
    it.
    """
    path, schemes = opened.path, opened.schemes
    if adapted and not opened.pairs:
        raise ConfigError(
            f"{path}: has no residuals to make an adapter of; use --format compressed-tensors or "
            "dense"
        )
    if not adapted and opened.pairs:
        raise ConfigError(
            f"{path}: has residuals, which the layout has no place for; use --format peft, or dense"
        )
    if not adapted and not schemes:
        raise ConfigError(f"{path}: has no integers; use --format dense")
    if turned := [name for name in opened.integers if opened.is_conv1d(name)]:
        raise ConfigError(
            f"{path}: {turned[0]} is a Conv1D, whose integers compressed-tensors does not read; "
            "use --format dense"
        )


def unify_schemes(opened: OpenedCheckpoint) -> dict[str, Packed]:
    """Pack the same integers in the widest codes, and in groups whose size divides that of all,
    scales repeated: Ŵ does not change.

    Raises ConfigError if that would be no smaller than dense.
    """
    integers = opened.integers.values()
    bits, group = (
        max(base.code_bits for base in integers),
        math.gcd(*(base.group for base in integers)),
    )
    symmetric, packed = all(base.zeros is None for base in integers), {}
    for name, base in opened.integers.items():
        times, zeros = base.group // group, None
        if not symmetric:
            points = base.zero_points()
            if points is None:
                points = torch.zeros(base.scales.shape, dtype=torch.int8)
            zeros = points.repeat_interleave(times, 1)
        scales = base.scales.detach().repeat_interleave(times, 1)
        packed[name] = Packed.of_codes(base.codes(), scales, zeros, base.bias, bits)
    dense = sum(
        base.in_features * base.out_features * base.scales.element_size() * 8 for base in integers
    )
    if (size := sum(base.bits() for base in packed.values())) >= dense:
        raise ConfigError(
            f"{opened.path}: integers of several schemes would take {size:,} bits as the one of "
            f"{bits} bits in groups of {group} that "
            f"transformers unpacks here, dense {dense:,}; use --format dense"
        )
    return packed


def build_layout(base: Packed) -> nn.Module:
    """Build the tensors of a linear as compressed-tensors stores them; they compute nothing."""
    module, pack = nn.Module(), library().pack_to_int32
    module.register_buffer("weight_packed", pack(base.codes(), base.code_bits))
    module.register_buffer("weight_scale", base.scales.detach())
    module.register_buffer("weight_shape", torch.tensor([base.out_features, base.in_features]))
    if (points := base.zero_points()) is not None:
        packed = pack(points, base.code_bits, packed_dim=0).contiguous()
        module.register_buffer("weight_zero_point", packed)
    module.register_parameter("bias", base.bias)
    return module


def build_quantization_config(opened: OpenedCheckpoint) -> dict[str, Any]:
    """Build the section of config.json, a group of linears for each scheme."""
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
    )

    groups = {}
    for number, ((bits, group, symmetric), names) in enumerate(opened.schemes.items()):
        shape = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
        arguments = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, **shape)
        groups[f"group_{number}"] = QuantizationScheme(targets=names, weights=arguments)
    linears = {
        name for name, module in opened.stock.named_modules() if isinstance(module, nn.Linear)
    }
    config = QuantizationConfig(
        config_groups=groups,
        format="pack-quantized",
        quantization_status="compressed",
        ignore=sorted(linears - opened.integers.keys()),
    )
    return config.model_dump(mode="json") | ({"dequantize": True} if opened.dequantize else {})


def write_export(
    opened: OpenedCheckpoint, folder: Path, name: str, shard_size: int, adapted: bool
) -> None:
    """Write all files of an export that will be called `name`."""
    write_config(
        folder, opened.model, build_quantization_config(opened) if opened.integers else None
    )
    tensors = revert_weight_conversion(opened.stock, stored_tensors(opened.model))
    write_weights(folder, opened.model, shard_size, tensors, index=adapted)
    write_other_files(folder, opened.model, opened.tokenizer, opened.path)
    if adapted:
        write_adapter(folder, opened, name)
    needs = " and ".join(["compressed-tensors"] * bool(opened.integers) + ["peft"] * adapted)
    with naming(folder / "README.md"):
        text = README.format(name=name, needs=needs) + (ADAPTED if adapted else "")
        (folder / "README.md").write_text(text, encoding="utf-8")


def write_adapter(folder: Path, opened: OpenedCheckpoint, name: str) -> None:
    """Write residuals as PEFT reads them: B = up, A = down, of the rank each has, and alpha the
    same, so that the scaling is 1.
    """
    from peft import LoraConfig

    ranks = {linear: down.shape[0] for linear, (_, down) in opened.pairs.items()}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=name,
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        rank_pattern=ranks,
        alpha_pattern=ranks,
        target_modules=sorted(ranks),
        fan_in_fan_out=any(map(opened.is_conv1d, ranks)),
        inference_mode=True,
    ).to_dict()
    with naming(folder / "adapter_config.json"):
        text = json.dumps(config | {"target_modules": sorted(ranks)}, indent=2, sort_keys=True)
        (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
    tensors = {}
    for linear, (up, down) in opened.pairs.items():
        tensors[f"base_model.model.{linear}.lora_A.weight"] = down.detach()
        tensors[f"base_model.model.{linear}.lora_B.weight"] = up.detach().contiguous()
    write_shard(folder / "adapter_model.safetensors", tensors, opened.model)


@torch.no_grad()
def compute_logits(model: PreTrainedModel) -> Tensor:
    """Logits of one pass over some token ids."""
    count = min(64, model.config.get_text_config().vocab_size)
    return model(input_ids=torch.arange(count)[None], use_cache=False).logits


def compare_export(
    folder: Path, opened: OpenedCheckpoint, weights: dict[str, Tensor], expected: Tensor
) -> tuple[float, float]:
    """Load a folder as any user would: largest difference from the expected logits, and the largest
    of those.

    Raises CheckpointError naming the linears whose weight (out, in), residual or scaling is not
    what it should be.
    """
    model = from_pretrained(folder)
    loaded, wrong = compute_logits(model), []  # the first pass unpacks what is packed
    for name, weight in weights.items():
        module: Any = model.get_submodule(name)  # of the library that the export is for
        base = getattr(module, "base_layer", module)
        same = has_same_bits(
            (base.weight.T if opened.is_conv1d(name) else base.weight).detach(), weight
        )
        if name in opened.pairs and same:
            same = hasattr(module, "lora_A") and is_residual(module, *opened.pairs[name])
        if not same:
            wrong.append(name)
    if wrong:
        raise CheckpointError(
            f"{folder}: transformers loads another weight than was written in {some(wrong)}"
        )
    return (loaded - expected).abs().max().item(), expected.abs().max().item()


def is_residual(module: Any, up: Tensor, down: Tensor) -> bool:
    """Say whether a LoRA linear of PEFT adds up · down and nothing else."""
    adapter = module.active_adapters[0]
    stored = module.lora_B[adapter].weight, module.lora_A[adapter].weight
    equal = all(
        torch.equal(factor.to(expected.dtype), expected)
        for factor, expected in zip(stored, (up, down), strict=True)
    )
    return equal and module.scaling[adapter] == 1.0 and len(module.active_adapters) == 1
