"""Registration with transformers: after `import compressor.hf`, `from_pretrained` reads checkpoints
of this package.

config.json carries `quantization_config`: {"quant_method": "compressor", "format_version": 1,
"linears": {module name: spec}}. The listed linears are replaced by empty modules of their storage
kind before any weight is read; names map one to one, so device maps, sharding, dtype overrides,
`generate`, PEFT and `save_pretrained` need nothing more. Without the import, `from_pretrained`
stops on a shape mismatch, because `weight` of a storage kind never has the dense shape.
"""

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from compressor.errors import CheckpointError
from compressor.linears import CompressedLinear, build_empty

QUANT_METHOD = "compressor"
FORMAT_VERSION = 1


def out_in(linear: nn.Linear | Conv1D) -> tuple[int, int]:
    """Return (out, in) of an nn.Linear, a storage kind or a Conv1D, which keeps its weight as (in,
    out).
    """
    if isinstance(linear, Conv1D):
        return linear.nf, linear.nx
    return linear.out_features, linear.in_features


class CompressorConfig(QuantizationConfigMixin):
    """Section `quantization_config` of config.json, as transformers hands it around."""

    def __init__(
        self,
        linears: Any = None,
        format_version: Any = None,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ):
        """Check and keep the fields.

        Raises:
            CheckpointError: the format is newer, or a field is missing or unknown.
        """
        if isinstance(format_version, int) and format_version > FORMAT_VERSION:
            raise CheckpointError(
                f"the checkpoint has format version {format_version}, this package reads up to "
                f"{FORMAT_VERSION}: upgrade compressor"
            )
        if type(format_version) is not int or format_version < 1:
            raise CheckpointError(
                "quantization_config.format_version must be an integer from 1, not "
                f"{format_version!r}"
            )
        if not isinstance(linears, dict) or not all(
            isinstance(spec, dict) for spec in linears.values()
        ):
            raise CheckpointError("quantization_config.linears must map module names to specs")
        if unknown:
            raise CheckpointError(
                f"quantization_config has unknown fields: {', '.join(sorted(unknown))}"
            )
        self.quant_method = quant_method  # type: ignore[assignment]  # an enum of known methods
        self.format_version = format_version
        self.linears = linears


class CompressorQuantizer(HfQuantizer):
    """Hook that puts the storage kinds in place before weights are read; there is no compression at
    load time.
    """

    requires_calibration = True
    quantization_config: CompressorConfig

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        for name, spec in self.quantization_config.linears.items():
            model.set_submodule(name, _empty_like(model, name, spec))
        for name in self.quantization_config.linears:
            _bind(model, name)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def _empty_like(model: PreTrainedModel, name: str, spec: dict[str, Any]) -> CompressedLinear:
    """Build the module of `spec` with dtype and device of the dense linear `name`.

    Raises:
        CheckpointError: the spec does not agree with that linear.
    """
    try:
        dense = model.get_submodule(name)
    except AttributeError:
        raise CheckpointError(
            f"{name}: named in quantization_config, but {type(model).__name__} has no such module"
        ) from None
    if not isinstance(dense, (nn.Linear, Conv1D)):
        raise CheckpointError(
            f"{name}: named in quantization_config, but it is a {type(dense).__name__}, not a "
            "linear"
        )
    if f"{name}.weight" in model.all_tied_weights_keys:
        raise CheckpointError(
            f"{name}: compressed, but tied to the embedding: config.json must say "
            "tie_word_embeddings false"
        )
    try:
        module = build_empty(spec, dense.weight.dtype, dense.weight.device)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{name}: damaged spec {spec}: {type(error).__name__} {error}"
        ) from error
    if out_in(module) != out_in(dense):
        raise CheckpointError(
            f"{name}: (out, in) of the spec {spec} is not that of the model, whose (out, in) is "
            f"{out_in(dense)}"
        )
    # The reverse is AFM, which gives biases to linears without one.
    if module.bias is None and dense.bias is not None:
        raise CheckpointError(f"{name}: the spec {spec} lacks the bias that the model has")
    return module


def _bind(model: PreTrainedModel, name: str) -> None:
    try:
        module = model.get_submodule(name)
        assert isinstance(module, CompressedLinear), "every listed linear has been replaced"
        module.bind(model)
    except AttributeError as error:
        raise CheckpointError(
            f"{name}: its spec borrows from a module that the model does not have: {error}"
        ) from None


def register() -> None:
    """Tell transformers about the format; a second call changes nothing."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(CompressorConfig)
        register_quantizer(QUANT_METHOD)(CompressorQuantizer)


register()
