"""What verbs return and files hold, a comment for each key; a figure that has a unit is annotated
with it.

`report.json` is a `Report`, `evaluate --json` an `Evaluation`; the other records are what `--json`
prints for the verbs that have no file of their own.
"""

from collections.abc import Mapping
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    TypedDict,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

Unit = Literal["bits", "bytes", "fraction", "seconds"]
Bits = Annotated[int, "bits"]
Bytes = Annotated[int, "bytes"]
Fraction = Annotated[float, "fraction"]
Seconds = Annotated[float, "seconds"]

Setting = dict[str, Any]  # what a method needs to build a candidate, such as {"rank": 48}
Metrics = dict[str, float | int | None]  # lm-eval: metric, metric_stderr, samples, max_length


class Pair(TypedDict):
    """A figure of the original and of the compressed model."""

    original: float | None
    compressed: float | None


class Scores(TypedDict):
    """The comparison of both models on one text; all null where there is none."""

    perplexity: Pair  # exp of the mean nats per predicted token
    kl: float | None  # KL(original‖compressed), nats per token, mean over all positions
    tokens: int | None  # in all windows
    window: int | None  # tokens


class Kept(TypedDict):
    """Fractions of the original's size that are kept."""

    unit: Literal["bits", "parameters"]  # what `targets` and `model` count
    targets: Fraction  # of the targeted linears
    model: Fraction  # of the whole model
    bits: Fraction  # of the targets, stored bits
    parameters: Fraction  # of the targets, stored real numbers
    model_bits: Fraction
    model_parameters: Fraction


class Linear(TypedDict):
    """What was chosen for one linear: the fields of `plan.Choice`, with its name."""

    name: str
    method: str  # engine, or "dense"
    setting: Setting
    bits: Bits  # as stored, bias included
    parameters: int  # stored real numbers
    dense_bits: Bits
    dense_parameters: int
    predicted: float  # error in the method's metric, before it was built
    measured: float | None  # the same, of the stored module
    error: float | None  # tr(D G Dᵀ) / tr(W G Wᵀ), D = W − Ŵ
    kl: float | None  # damage that the allocation counted with, nats per token
    residual: int | None  # rank of the low-rank residual
    options: Setting | None  # those that tell the candidate from others of its method
    sequential: dict[str, float] | None  # dampings that a solve in order took
    reason: str | None  # why it stays dense whatever the budget


class Report(TypedDict):
    """`report.json`: what a run kept and what that cost."""

    kept: Kept
    bytes: Annotated[dict[str, int], "bytes"]  # weight files: original, compressed
    sizes: dict[str, dict[str, dict[str, int]]]  # targets, model → bits, parameters → before, after
    perplexity: Pair  # on the evaluation windows, as in `Scores`
    kl: float | None
    tokens: int | None
    window: int | None
    reason: str | None  # why scores are null
    calibration: Scores | None  # on the windows that were fitted to; of runs that train
    heldout: Scores | None  # on the windows that choices were made by
    lm_eval: dict[str, Metrics] | None  # of the compressed model, by task
    lm_eval_original: dict[str, Metrics] | None
    price: float | None  # marginal price of the size, nats per MiB
    contest: dict[str, float]  # held-out divergence of competing plans
    search: dict[str, Any]  # what was tried in search of the recipe, and what was taken
    trained: dict[str, Any]  # repair, heal → whether it was kept, divergences before and after
    linears: list[Linear]
    warnings: list[str]
    fingerprints: dict[str, Any]  # digests of model, windows, recipe and evaluation windows
    # repository and url, printed after --push-to; null where it was not pushed
    pushed: NotRequired[dict[str, Any] | None]
    failure: NotRequired[str]  # why the evaluation failed, printed only


class Speed(TypedDict):
    """Speed of one model, medians over runs in a process of its own."""

    prefill_tokens_per_second: float  # one forward pass over the prompt
    decode_tokens_per_second: float  # greedy, one token after the other
    peak_memory_bytes: Bytes
    base_memory_bytes: Bytes  # before the model was loaded
    prompt_tokens: int
    decode_tokens: int
    device: str


class Evaluation(TypedDict):
    """`evaluate --json`."""

    perplexity: float  # of the model, per predicted token
    perplexity_original: NotRequired[float]  # with --against
    kl: float | None  # KL(original‖model), nats per token; with --against
    tokens: int  # in all windows
    window: int  # tokens
    text: str  # source of the windows
    unit: str  # what perplexity is per: "token"
    lm_eval: dict[str, Metrics] | None  # with --tasks
    fingerprint: str  # digest of the windows
    speed: NotRequired[dict[str, Speed]]  # compressed, and original with --against


class PlannedLinear(TypedDict):
    """A target in the outline of a run."""

    name: str
    role: str | None
    shape: str  # out × in
    dense_bits: Bits
    methods: str
    candidates: int
    least_bits: Bits
    most_bits: Bits
    method: NotRequired[str]  # with --stats, what would be chosen
    setting: NotRequired[Setting]
    bits: NotRequired[Bits]
    error: NotRequired[float]


class Outline(TypedDict):
    """`plan --json`."""

    model: str
    kept: Fraction  # of the targets
    unit: str  # what `kept` counts: bits or parameters
    covered_share: Fraction  # of the model's parameters that are targets
    not_linear: dict[str, int]  # fused weights of experts → parameters
    bytes: Annotated[dict[str, int], "bytes"]  # source, targets, others, compressed_at_most
    memory_bytes: Annotated[dict[str, int], "bytes"]  # held at once
    estimated_seconds: Annotated[dict[str, float], "seconds"]  # by stage
    writes: str  # files of the output
    linears: list[PlannedLinear]
    price: NotRequired[float | None]  # with --stats, nats per MiB


class Collected(TypedDict):
    """`calibrate --json`."""

    output: str
    linears: int
    tokens: int
    bytes: Bytes
    fingerprint: dict[str, Any]  # what the statistics depend on


class StoredLinear(TypedDict):
    """A linear of a checkpoint."""

    name: str
    kind: str  # of storage
    shape: str  # out × in
    rank: int | None
    bits: Bits
    dense_bits: Annotated[int | None, "bits"]
    error: float | None


class Inspection(TypedDict):
    """`inspect --json`."""

    checkpoint: str
    model_type: str
    weight_bytes: Bytes
    tensors: int
    files: list[str]
    compressed_linears: int
    linears: list[StoredLinear]
    plot: NotRequired[str]


class PlannedPoint(TypedDict):
    """A point of `sweep --dry-run`; its settings stand between name and sizes."""

    name: str
    kept: Fraction
    bytes: Bytes
    seconds: Seconds


class PlannedSweep(TypedDict):
    """`sweep --dry-run --json`."""

    points: list[PlannedPoint]


class SqueezedModule(TypedDict):
    """What became of one module of an adapter."""

    module: str
    rank_before: int
    rank_after: int
    parameters: int
    error: float  # relative to what the module adds


class Squeezed(TypedDict):
    """`adapter squeeze --json`."""

    output: str
    metric: str
    parameters: dict[str, int]  # before, after, removed
    kept: Fraction
    error: float
    modules: list[SqueezedModule]


class Page(TypedDict):
    """`report --json`."""

    output: str
    checkpoints: list[str]
    bytes: Bytes


class Baseline(TypedDict):
    """`gate --update --json`."""

    baseline: str
    scores: "BaselineScores"


class BaselineScores(TypedDict):
    """Scores of a report that limits can name; those of lm-eval as task.metric."""

    perplexity: float
    kl: float
    bytes: Bytes


def units_of(record: type | None) -> dict[str, Unit]:
    """Return the units of a record's figures by dotted key, items of lists under the key of the
    list. None has none.

    >>> units_of(PlannedSweep)
    {'points.kept': 'fraction', 'points.bytes': 'bytes', 'points.seconds': 'seconds'}
    """
    units: dict[str, Unit] = {}
    if record is None:
        return units
    for name, hint in get_type_hints(record, include_extras=True).items():
        for layer in _layers(hint):
            if get_origin(layer) is Annotated:
                units[name] = layer.__metadata__[0]
            elif is_typeddict(layer):
                units |= {f"{name}.{key}": unit for key, unit in units_of(layer).items()}
    return units


def _layers(hint: Any) -> list[Any]:
    """List a type hint and everything that it is made of."""
    return [hint, *(layer for argument in get_args(hint) for layer in _layers(argument))]


def unit_at(units: Mapping[str, Unit], key: str) -> Unit | None:
    """Return the unit of a dotted key: its own, or that of the nearest key above it."""
    parts = key.split(".")
    above = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((units[path] for path in above if path in units), None)
