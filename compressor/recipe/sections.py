"""What a recipe says: frozen sections in stage order. Sizes are fractions kept, from above 0 to
1.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, Strict, model_validator

from compressor.recipe.quantities import Duration, Size, seconds_of
from compressor.recipe.training import Count, Heal, Many, NonNegative, Repair, Section, refusal

DEFAULT_KEEP = 0.8
SEARCHED = (
    "method.",
    "allocation.depth_bias",
    "allocation.cap",
    "allocation.tie",
    "allocation.probe.rank",
)


def _keep(value: Any) -> Any:
    fractions = value.values() if isinstance(value, dict) else [value]
    if value is not None and (
        not fractions or not all(type(x) in (int, float) and 0 < x <= 1 for x in fractions)
    ):
        raise ValueError(
            "must be a fraction kept, greater than 0 and at most 1, or a map from target pattern "
            "to such fractions"
        )
    return value


def _pattern(value: str) -> str:
    if value.startswith("re:"):
        try:
            re.compile(value[3:])
        except re.error as error:
            raise ValueError(f"is not a regular expression: {error}") from None
    return value


def _ascending(value: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= value[0] < value[1]:
        raise ValueError("must be two numbers [low, high] with 0 <= low < high")
    return value


Pattern = Annotated[str, AfterValidator(_pattern)]


class Model(Section):
    """Which model is compressed, and where it runs."""

    name: str = "reference"
    """Folder, hub identifier, or `reference` for the model bundled with this package."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; null for its default branch."""
    device: str = "auto"
    """Device of the forward passes and decompositions: `auto`, `cpu`, `cuda`, `cuda:1`, …"""
    device_map: str | None = None
    """Placement by accelerate for models larger than one device, e.g. `auto`; null to use `device`
    alone.
    """


class Gradients(Section):
    """How output gradients are collected, for the methods that need them."""

    labels: Literal["data", "sampled"] = "data"
    """Next tokens from the text, or sampled from the model's own distribution."""
    clip: Annotated[tuple[float, float], Strict(False), AfterValidator(_ascending)] | None = None
    """Bounds [low, high] on each token's gradient norm, as multiples of the mean norm; null for
    none.
    """
    trim: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Fraction of the positions of a window that is dropped at either end."""


class Calibration(Section):
    """Text that the statistics are collected on."""

    source: str | None = None
    """File, folder, `org/name:config:split[:column]`, `file.safetensors:key` or `self`; null for
    the bundled text.
    """
    column: str | None = None
    """Column or key that holds the text; null for `text`."""
    chat_template: bool = False
    """Whether each record is a conversation to be laid out by the tokenizer's chat template."""
    windows: Annotated[int, Field(ge=2)] = 128
    """Number of windows, the held-out ones included."""
    length: Annotated[int, Field(ge=2)] = 512
    """Tokens in a window."""
    batch_size: Count = 8
    """Windows in one forward pass."""
    heldout: Annotated[int, Field(ge=0)] | None = None
    """Last windows kept out of the statistics, for the probe and for choices; null for an eighth of
    them, 16 at most.
    """
    memory: Size = "4GiB"
    """Memory for the second moments collected in one pass; more passes are made when they do not
    fit.
    """
    cache: Size = "4GiB"
    """Memory for what blocks return, kept from block to block by sequential solves, repair and
    healing; the rest lies on disk.
    """
    gradients: Gradients = Gradients()
    sequential: bool = False
    """Whether, once methods and sizes are fixed, linears are solved again in order, each on what
    the compressed ones before it leave.
    """
    anchor: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Target of a sequential solve: 0 the weight's own outputs on these inputs, 1 its outputs in
    the dense model, or a blend.
    """
    anchor_damping: Annotated[Many[Annotated[float, Field(ge=0)]], Field(min_length=1)] = (
        0.01,
        0.1,
        1.0,
    )
    """Dampings of the anchored target, relative to the mean diagonal of the Gram, tried in this
    order.
    """

    @model_validator(mode="after")
    def _leaves_windows(self) -> "Calibration":
        if self.heldout is not None and self.heldout >= self.windows:
            raise refusal(
                "heldout",
                f"holds out {self.heldout} of {self.windows} windows, which leaves none to "
                "collect statistics on",
            )
        return self


class Engine(Section):
    """One decomposition with its options."""

    name: str = "low_rank"
    """Engine, as listed by `compressor methods`."""
    options: dict[str, JsonValue] = Field(default={})
    """Options of the engine; those left out have its defaults."""
    share: Many[Literal["qkv", "gate_up"]] = ()
    """Linears with the same inputs that the engine decomposes together, what they have in common
    being stored once.
    """


class Target(Section):
    """Some linears and the decompositions that compete for them."""

    targets: Pattern = "*"
    """Module names, as a glob or as `re:` and a regular expression, or `role:` and a role; a linear
    belongs to the first that matches.
    """
    candidates: Annotated[Many[Engine], Field(min_length=1)] = (Engine(),)
    """Decompositions; the allocation chooses among their settings."""
    dense: bool = True
    """Whether keeping the weight as it is competes too."""


class Probe(Section):
    """The measurement behind `damage: fisher_probe` and `kl_probe`: each linear alone is truncated,
    and the divergence of the model's output estimated to second order, or measured.
    """

    rank: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Rank of the truncated linear, as a fraction of the rank at which two factors are as large as
    the weight.
    """
    windows: Count | None = None
    """Held-out windows used; null for all of them."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Temperature of both output distributions."""
    skip: Annotated[int, Field(ge=0)] = 0
    """Leading positions of each window that do not count."""
    samples: Count = 4
    """Labels drawn at each position, each a backward pass; more lower the variance (fisher_probe).
    """
    span: Count | None = 64
    """Consecutive positions whose effects may depend on each other; fewer lower the variance, null
    for the whole window (fisher_probe).
    """
    checks: Annotated[int, Field(ge=0)] = 3
    """Estimates that must agree with what is measured: the largest are measured one by one until so
    many in a row do, since second order does not reach far; 0 to measure none (fisher_probe).
    """


class Allocation(Section):
    """How the size is shared out among the linears."""

    kind: Literal[
        "knapsack", "uniform", "threshold", "by_role", "svd_llm_v2", "d_rank", "fixed"
    ] = "knapsack"
    """Rule; each one adjusts its own knob to meet the size, but `fixed`, which takes the one
    setting that the method offers.
    """
    keep: Annotated[float | dict[str, float] | None, BeforeValidator(_keep)] = None
    """Fraction of the size of the targets that is kept, or a map from target pattern to fraction;
    0.8 if no size is given.
    """
    target_size: Size | None = None
    """Size of the whole checkpoint, e.g. `3.2GiB`; takes the place of `keep`."""
    count: Literal["bits", "parameters"] = "bits"
    """Stored bits, indices and masks included, or stored real numbers only, as papers count."""
    damage: Literal["fisher_probe", "kl_probe", "two_sided", "gram", "relative_error"] = "kl_probe"
    """What the knapsack minimises: divergence, estimated to second order for all linears at once or
    measured one by one, the predicted loss or output error of methods of that metric, or relative
    error.
    """
    cap: Annotated[float, Field(gt=0)] | None = None
    """Largest damage of a linear in a knapsack, over the mean at uniform sizes; raised in steps of
    0.1 until the size can be met.
    """
    depth_bias: NonNegative = 0.0
    """Weight γ of the factor 1 + γh by which damage in early blocks counts more (probes)."""
    roles: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={"q": 1.0, "k": 1.0, "v": 3.0, "o": 3.0}
    )
    """Relative fraction kept of each role (by_role); linears of other roles keep the whole fraction
    each.
    """
    tie: Many[Literal["qkv", "gate_up"]] = ()
    """Linears with the same inputs that must get the same method and setting (knapsack)."""
    limits: dict[Literal["parameters", "multiply_adds"], Annotated[float, Field(gt=0, le=1)]] = (
        Field(default={})
    )
    """Further limits, each a fraction of what the dense targets have: stored numbers, multiply-adds
    for a token (knapsack).
    """
    shift: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """Fraction β of the rank of q and k that is moved to v (d_rank)."""
    probe: Probe = Probe()
    search: Many[dict[str, JsonValue]] | None = None
    """Settings by dotted key, e.g. `{allocation.depth_bias: 5}`, tried over the recipe one after
    the other; those that lower the held-out divergence stay. Before that, further candidates join
    the first one by one, and stay likewise. Null for no search."""

    @property
    def probes(self) -> bool:
        """Whether damages come from held-out windows."""
        return self.kind == "knapsack" and self.damage in ("fisher_probe", "kl_probe")

    @model_validator(mode="before")
    @classmethod
    def _one_size(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        given = [name for name in ("keep", "target_size") if data.get(name) is not None]
        if len(given) == 2:
            raise ValueError("takes keep or target_size, not both")
        if data.get("kind") == "fixed":
            if given:
                raise ValueError(
                    f"of kind 'fixed' has one size and takes no {given[0]}; set allocation.kind "
                    "to 'knapsack' to choose one"
                )
            return data
        return data if given else data | {"keep": DEFAULT_KEEP}


class Compensation(Section):
    """Low-rank residuals B A of what compressed linears lost, fitted in closed form after any
    method; none without `keep` or `rank`.
    """

    metric: Literal["identity", "diagonal", "gram", "two_sided"] = "gram"
    """What is minimised: the plain norm (LoRC), output errors from the diagonal of the Gram (LQER)
    or all of it (EoRA), or the loss.
    """
    keep: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Size of all residuals as a fraction of the dense targets, taken out of allocation.keep and
    shared out by marginal gain.
    """
    rank: Count | None = None
    """Rank of every residual, in place of `keep`; unless the allocation is fixed, their size is
    taken out of allocation.keep.
    """

    @property
    def enabled(self) -> bool:
        return self.keep is not None or self.rank is not None

    @model_validator(mode="after")
    def _one_size(self) -> "Compensation":
        if self.keep is not None and self.rank is not None:
            raise ValueError("takes keep or rank, not both")
        return self


class Evaluation(Section):
    """The comparison with the original that ends a run."""

    enabled: bool = True
    """Whether to evaluate at all."""
    source: str | None = None
    """Text, as for calibration; null for the bundled evaluation text."""
    column: str | None = None
    """Column or key that holds the text; null for `text`."""
    window: Annotated[int, Field(ge=2)] | None = None
    """Tokens in a window; null for the length of the calibration windows."""
    windows: Count | None = None
    """Number of windows; null for the whole text."""
    batch_size: Count = 8
    """Windows in one forward pass."""
    tasks: Many[str] = ()
    """lm-eval tasks, by name or as a task file."""
    limit: Count | None = None
    """Examples of each task; null for all."""


class Output(Section):
    """What is written."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the stored numbers; `auto` for that of the input."""
    shard_size: Size = "5GB"
    """Largest file of weights."""
    overwrite: bool = False
    """Whether an existing output folder is replaced."""


class Recipe(Section):
    """A compression run."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of everything random."""
    budget: Duration | None = None
    """Time for a run, e.g. `10m`: what a search tries and how many steps repair and healing take is
    fitted to it; null for no limit.
    """
    model: Model = Model()
    calibration: Calibration = Calibration()
    method: Annotated[Many[Target], Field(min_length=1)] = (Target(),)
    """Which decompositions apply to which linears."""
    allocation: Allocation = Allocation()
    compensation: Compensation = Compensation()
    repair: Repair = Repair()
    heal: Heal = Heal()
    evaluation: Evaluation = Evaluation()
    output: Output = Output()

    @model_validator(mode="after")
    def _limits_count_everything(self) -> "Recipe":
        if self.compensation.enabled and self.allocation.limits:
            raise refusal(
                "allocation.limits",
                "do not count the residuals of compensation; leave one of the two out",
            )
        return self

    @model_validator(mode="after")
    def _search_fits(self) -> "Recipe":
        section, key = self.allocation, "allocation.search"
        if section.search is None:
            return self
        if not section.probes:
            raise refusal(
                key,
                "needs allocation.kind 'knapsack' and allocation.damage 'fisher_probe' or "
                "'kl_probe', since it decides on held-out windows",
            )
        if self.compensation.enabled:
            raise refusal(
                key,
                "decides about candidates; leave compensation out and let them list residual ranks",
            )
        for setting in (setting for layer in section.search for setting in layer):
            if not setting.startswith(SEARCHED):
                raise refusal(key, f"cannot set '{setting}', only {', '.join(SEARCHED)}")
        return self

    @model_validator(mode="after")
    def _budget_is_spent(self) -> "Recipe":
        if self.budget is not None and self.allocation.search is None and not self.trains:
            raise refusal(
                "budget",
                "is the time for allocation.search, repair and heal; this recipe has none of them, "
                "leave it out",
            )
        return self

    @property
    def trains(self) -> bool:
        return self.repair.enabled or self.heal.enabled

    @property
    def budget_seconds(self) -> float | None:
        return None if self.budget is None else seconds_of(self.budget)

    @property
    def evaluation_window(self) -> int:
        return self.evaluation.window or self.calibration.length
