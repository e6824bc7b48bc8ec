"""LoRA adapters of PEFT: read as PEFT reads them, squeezed to smaller ranks, compared before they
are put in place.

In comes plain LoRA on linears, with alpha / r or alpha / √r (rsLoRA) and patterns of both. What
PEFT makes of patterns is asked from PEFT, on a shell that has the adapted linears and nothing else,
so that the base model is not needed. Out goes the same, with alpha = r for every module, so that
the scaling is 1 whatever the rank, and its size is in the factors (see `squeeze`). Modules of rank
0 are left out. Tensors keep their dtype. Adapters that are more than such products are refused by
name.
"""

import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from compressor.allocation import adapter_ranks
from compressor.calibrate import statistics_folder
from compressor.checkpoint.weights import write_shard
from compressor.checkpoint.write import LICENCE, TOKENIZER, copy_files, has_same_bits
from compressor.errors import CheckpointError, ConfigError, DataError
from compressor.files import model_folder
from compressor.files.documents import naming, read_json, some
from compressor.files.safetensors import inside, read_header
from compressor.files.staging import Staging, preflight
from compressor.linalg import Metric
from compressor.linalg import products as squeeze
from compressor.linalg.products import Components, Product
from compressor.reporting.records import SqueezedModule

CONFIG, WEIGHTS, NAME = "adapter_config.json", "adapter_model.safetensors", "default"
TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# Keys of adapter_config.json that may hold anything: they do not change what a product means.
# Others must be unset.
HARMLESS = {
    *(
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "bias",
    ),
    *(
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "lora_dropout",
        "fan_in_fan_out",
        "init_lora_weights",
    ),
    *(
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "ensure_weight_tying",
        "runtime_config",
    ),
    *(
        "megatron_config",
        "megatron_core",
        "qalora_group_size",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
    ),
}
FRESH = (
    None,
    True,
    False,
    "gaussian",
    "orthogonal",
    "eva",
)  # ways to start that leave the base as it is
PRECISION = (
    1e-6  # of the norm of a product: far above float64, whose roots of differences have 1e-8
)


@dataclass(frozen=True)
class Adapter:
    """A folder of PEFT, with what it adds to each module by the module's name in the base model."""

    path: Path
    config: dict[str, Any]
    products: dict[str, Product]

    @property
    def parameters(self) -> int:
        return sum(product.rank * product.price for product in self.products.values())


def squeeze_adapter(
    source: str | Path,
    output: Path,
    rank: int | None = None,
    keep: float | None = None,
    stats: Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write an adapter of smaller ranks; return what became of each module. Exactly one of rank and
    keep.

    source: folder, or hub identifier; rank: of every module that has more; keep: fraction of the
    parameters, shared out over all modules; stats: statistics of the base, whose Gram then measures
    what is lost, per token. Raises ConfigError or BudgetError for what has to be changed,
    CheckpointError for a folder that is damaged or reads back as something else, DataError for
    statistics that do not belong to the adapter.
    """
    if (rank is None) == (keep is None):
        raise ConfigError("give either --rank or --keep")
    if keep is not None and not 0 < keep <= 1:
        raise ConfigError(f"--keep {keep:g}: expected the fraction kept, above 0 and at most 1")
    source = model_folder.resolve(source)
    check_source(source)
    preflight(
        output, source, overwrite, sum(path.stat().st_size for path in source.glob("*.safetensors"))
    )
    adapter = read(source)
    most = max(product.rank for product in adapter.products.values())
    if rank is not None and not 1 <= rank <= most:
        raise ConfigError(f"--rank {rank}: expected 1 to {most}, the largest rank in {source}")
    metrics = metrics_of(adapter, stats)
    parts = {
        name: squeeze.decompose(product, metrics[name], name)
        for name, product in adapter.products.items()
    }
    if keep is None:
        ranks = {name: min(rank or most, len(part.energies)) for name, part in parts.items()}
    else:
        prices = [product.price for product in adapter.products.values()]
        ranks = dict(
            zip(
                parts,
                adapter_ranks.allocate(list(parts.values()), prices, adapter.parameters, keep),
                strict=True,
            )
        )
    with Staging(output, overwrite) as staging:
        written = write(staging.folder, adapter, parts, ranks)
        found = compare(staging.folder, adapter, written, parts, metrics)
        staging.commit()
    return {"output": str(output), "metric": "gram" if stats else "identity"} | found


def check_source(path: Path) -> None:
    """Raise unless the folder holds an adapter in the one format that is safe to open."""
    if not (path / CONFIG).exists():
        raise ConfigError(f"{path}: has no {CONFIG}; give the folder of a PEFT adapter")
    if (path / "adapter_model.bin").exists() and not (path / WEIGHTS).exists():
        raise CheckpointError(
            f"{path}: only pickled weights, which can run code when opened; convert them to "
            "safetensors first"
        )


def read(path: Path) -> Adapter:
    """Read an adapter. Raises ConfigError for one that is not plain LoRA on linears,
    CheckpointError for one that is damaged.
    """
    config = read_json(inside(path, CONFIG))
    check_plain(path, config)
    read_header(inside(path, WEIGHTS))
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(path / WEIGHTS).items():
        match = TENSOR.fullmatch(key)
        if not match or tensor.ndim != 2 or not tensor.is_floating_point():
            raise ConfigError(
                f"{path / WEIGHTS}: {key} is not a LoRA factor of a linear, and only those can be "
                "squeezed"
            )
        pairs.setdefault(match[1], {})[match[2]] = tensor
    bad = [
        name
        for name, pair in pairs.items()
        if pair.keys() != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]
    ]
    if bad or not pairs:
        raise CheckpointError(
            f"{path / WEIGHTS}: "
            f"{f'no pair of factors that fit in {some(bad)}' if bad else 'holds no factors'}"
        )
    products = {name: Product(pairs[name]["B"], pairs[name]["A"]) for name in sorted(pairs)}
    loaded = as_loaded(path, products)
    if wrong := [
        name
        for name, product in products.items()
        if name not in loaded or not same_factors(product, loaded[name])
    ]:
        raise CheckpointError(
            f"{path}: PEFT loads something else than is stored for {some(wrong)}; {CONFIG} and "
            f"{WEIGHTS} do not fit"
        )
    return Adapter(path, config, loaded)


def check_plain(path: Path, config: dict[str, Any]) -> None:
    """Raise ConfigError unless the adapter is LoRA and nothing else, naming what it is besides."""
    if (kind := config.get("peft_type")) != "LORA":
        raise ConfigError(f"{path}: is an adapter of type {kind}; only plain LoRA can be squeezed")
    if (bias := config.get("bias", "none")) != "none":
        raise ConfigError(
            f"{path}: trains biases too (bias: {bias!r}); only plain LoRA can be squeezed"
        )
    if (start := config.get("init_lora_weights")) not in FRESH:
        raise ConfigError(
            f"{path}: init_lora_weights: {start!r} changes the base model by the rank, so a "
            "smaller one would not fit it; convert the "
            "adapter to plain LoRA first (PEFT: save_pretrained with "
            "path_initial_model_for_weight_conversion)"
        )
    if beyond := sorted(key for key, value in config.items() if value and key not in HARMLESS):
        raise ConfigError(
            f"{path}: is more than plain LoRA "
            f"({', '.join(f'{key}: {config[key]!r}' for key in beyond)}); it cannot be squeezed"
        )


def as_loaded(path: Path, products: dict[str, Product]) -> dict[str, Product]:
    """What PEFT makes of a folder: factors and scaling of each module, on a model with linears of
    these names and shapes.

    Raises CheckpointError if PEFT refuses.
    """
    from peft import PeftConfig, PeftModel

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of fan_in_fan_out, which speaks of the base's weights
            config = PeftConfig.from_pretrained(str(path))
            config.task_type = None  # tasks want models that have more than linears
            model = PeftModel.from_pretrained(
                shell(products),
                str(path),
                config=config,
                low_cpu_mem_usage=True,
                autocast_adapter_dtype=False,
            )
    except (
        OSError,
        ValueError,
        RuntimeError,
        KeyError,
        TypeError,
        AttributeError,
        re.error,
    ) as error:
        line = next(
            (line.strip() for line in str(error).splitlines() if line.strip()), "no message"
        )
        raise CheckpointError(
            f"{path}: PEFT cannot load it: {type(error).__name__}: {line}"
        ) from error
    base: Any = model.base_model
    loaded = {}
    for name in products:
        module = base.model.get_submodule(name)
        if hasattr(module, "lora_A"):
            up, down = (getattr(module, f"lora_{side}")[NAME].weight.detach() for side in "BA")
            loaded[name] = Product(up, down, float(module.scaling[NAME]))
    return loaded


def shell(products: dict[str, Product]) -> nn.Module:
    """A model of nothing but linears of these names, whose weights are one zero each."""
    root = nn.Module()
    for name, product in products.items():
        at = root
        *above, last = name.split(".")
        for part in above:
            if part not in at._modules:
                at.add_module(part, nn.Module())
            at = at.get_submodule(part)
        linear = nn.Linear(product.down.shape[1], product.up.shape[0], bias=False, device="meta")
        zero = torch.zeros(
            (), dtype=torch.promote_types(product.up.dtype, product.down.dtype)
        )  # PEFT casts factors to its type
        linear.weight = nn.Parameter(zero.expand(linear.weight.shape), requires_grad=False)
        at.add_module(last, linear)
    return root


def same_factors(one: Product, other: Product) -> bool:
    """Whether the factors agree bit for bit, in the type of the second where that is the wider
    one.
    """
    return has_same_bits(one.up.to(other.up.dtype), other.up) and has_same_bits(
        one.down.to(other.down.dtype), other.down
    )


def metrics_of(adapter: Adapter, stats: Path | None) -> dict[str, Metric]:
    """The metric of each module: the mean of x xᵀ over tokens, or the identity without statistics.

    Raises DataError if the statistics are of another model: its content where the adapter names a
    folder here, names and widths otherwise.
    """
    if stats is None:
        return dict.fromkeys(adapter.products, Metric())
    collected, mark = (
        statistics_folder.load_statistics(stats),
        statistics_folder.read_fingerprint(stats),
    )
    base = Path(adapter.config.get("base_model_name_or_path") or "")
    if (base / "config.json").is_file() and model_folder.content_digest(
        model_folder.read_headers(base)
    ) != mark.get("model"):
        raise DataError(
            f"{stats}: the statistics are of another model than {base}, the base of "
            f"{adapter.path}; collect them again"
        )
    metrics = {}
    for name, product in adapter.products.items():
        if name not in collected:
            raise DataError(
                f"{stats}: no statistics of {name}, which {adapter.path} adapts; they are of "
                "another model or other targets"
            )
        collected[name].require(name, frozenset({"gram"}))
        if collected[name].tokens == 0:
            raise DataError(
                f"{stats}: no token of the text reaches {name}, which {adapter.path} adapts; "
                "collect them on more text"
            )
        gram = collected[name].gram
        assert gram is not None  # it was required above
        if len(gram) != product.down.shape[1]:
            raise DataError(
                f"{stats}: {name} has {len(gram)} inputs there and {product.down.shape[1]} in "
                f"{adapter.path}; of another model"
            )
        metrics[name] = Metric(gram, 1 / collected[name].tokens)
    return metrics


def write(
    target: Path, adapter: Adapter, parts: dict[str, Components], ranks: dict[str, int]
) -> dict[str, Product]:
    """Write configuration, weights and what goes with them; return the products as they are
    stored.
    """
    written: dict[str, Product] = {}
    tensors: dict[str, Tensor] = {}
    for name, rank in ranks.items():
        if rank:
            source, smaller = adapter.products[name], parts[name].take(rank)
            stored = Product(
                smaller.up.to(source.up.dtype).contiguous(),
                smaller.down.to(source.down.dtype).contiguous(),
            )
            written[name] = stored
            tensors |= {
                f"base_model.model.{name}.lora_A.weight": stored.down,
                f"base_model.model.{name}.lora_B.weight": stored.up,
            }
    kept = {name: product.rank for name, product in written.items()}
    most = max(kept.values())
    pattern = {} if len(set(kept.values())) == 1 else kept
    sizes = {
        "r": most,
        "lora_alpha": most,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "use_rslora": False,
    }
    names = {
        "target_modules": sorted(kept),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    config = (
        adapter.config
        | sizes
        | names
        | {
            "init_lora_weights": True,
            "loftq_config": {},
            "eva_config": None,
            "inference_mode": True,
        }
    )
    with naming(target / CONFIG):
        (target / CONFIG).write_text(
            json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )
    write_shard(target / WEIGHTS, tensors)
    copy_files(adapter.path, target, TOKENIZER + LICENCE)
    return written


def compare(
    target: Path,
    adapter: Adapter,
    written: dict[str, Product],
    parts: dict[str, Components],
    metrics: dict[str, Metric],
) -> dict[str, Any]:
    """Load the folder with PEFT and measure what it adds against what the adapter added; the errors
    are those of the stored tensors.

    Raises CheckpointError naming modules whose factors or scaling are not what was written, or that
    lost more than their spectrum says.
    """
    loaded, lost, whole = as_loaded(target, adapter.products), 0.0, 0.0
    wrong: list[str] = []
    modules: list[SqueezedModule] = []
    for name, product in adapter.products.items():
        found, total, error = loaded.get(name), parts[name].tail(0), parts[name].tail(0)
        if found is not None:
            error = squeeze.energy(squeeze.difference(product, found), metrics[name], name)
        if not same(found, written.get(name)) or not explained(
            error, product, found, parts[name], metrics[name], name
        ):
            wrong.append(name)
        rank = 0 if found is None else found.rank
        lost, whole = lost + error, whole + total
        modules.append(
            {
                "module": name,
                "rank_before": product.rank,
                "rank_after": rank,
                "parameters": rank * product.price,
                "error": error / total if total else 0.0,
            }
        )
    if wrong:
        raise CheckpointError(
            f"{target}: PEFT loads something else than was written in {some(wrong)}"
        )
    after = sum(module["parameters"] for module in modules)
    counts = {"before": adapter.parameters, "after": after, "removed": adapter.parameters - after}
    return {
        "parameters": counts,
        "kept": after / adapter.parameters,
        "error": lost / whole if whole else 0.0,
        "modules": modules,
    }


def same(one: Product | None, other: Product | None) -> bool:
    """Whether two modules have the very same factors and scaling, or neither has any."""
    if one is None or other is None:
        return one is other
    return same_factors(one, other) and one.scale == other.scale


def explained(
    error: float,
    product: Product,
    found: Product | None,
    parts: Components,
    metric: Metric,
    what: str,
) -> bool:
    """Whether a measured error is what the spectrum says for this rank, but for what the cast to
    the stored dtype moves.
    """
    rank = 0 if found is None else found.rank
    moved = (
        0.0
        if found is None
        else squeeze.energy(squeeze.difference(parts.take(rank), found), metric, what)
    )
    level = 1.0 if metric.moment is None else metric.scale * metric.moment.diagonal().max().item()
    slack = moved**0.5 + PRECISION * squeeze.energy(product, Metric(scale=level), what) ** 0.5
    return abs(error**0.5 - parts.tail(rank) ** 0.5) <= slack
