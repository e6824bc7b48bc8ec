"""What the sections of a recipe are made of, and those sections that train."""

from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, Strict, model_validator
from pydantic_core import PydanticCustomError

T = TypeVar("T")
Many = Annotated[tuple[T, ...], Strict(False)]  # a YAML list
Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """A mapping of a recipe: frozen, of these keys alone, each of its very type."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def refusal(key: str, reason: str) -> PydanticCustomError:
    """Return the error of a validator that looks at several keys, for it to raise.

    Args:
        key: the key to change, dotted, from the section of the validator on.
        reason: what is wrong with it; it follows the key in the message.
    """
    return PydanticCustomError("refusal", "{reason}", {"key": key, "reason": reason})


class Training(Section):
    """What repair and healing have in common: 32-bit masters, warm-up and cosine, the best state on
    held-out windows kept.
    """

    enabled: bool = False
    """Whether to train at all."""
    train: Literal["compressed", "norms", "low_rank", "everything"] = "everything"
    """What learns: tensors of compressed linears, also norms and biases, only low-rank factors and
    norms, or dense weights too.
    """
    steps: Count = 200
    """Steps at most; the learning rate rises in the first tenth, then falls along a cosine to a
    tenth.
    """
    learning_rate: Annotated[float, Field(gt=0)] = 0.02
    """Largest step of a number, relative to the median of the absolute values of its tensor."""
    batch_size: Count = 4
    """Windows in one step."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """AdamW, or AdamW whose moments take a quarter of the memory, by bitsandbytes (extra `train`).
    """
    clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest norm of a gradient; longer ones are shortened to it."""
    check: Count = 20
    """Steps between two looks at the held-out windows."""
    patience: Count = 5
    """Looks without improvement, at one rate, after which training stops."""


class Repair(Training):
    """Each block, once compressed, is fitted to the outputs of the dense block, on the inputs that
    the blocks before it leave.
    """


class Heal(Training):
    """Then all blocks are trained together on the output of the model."""

    steps: Count = 300
    """Steps at most; the learning rate rises in the first tenth, then falls along a cosine to a
    tenth.
    """
    learning_rate: Annotated[float, Field(gt=0)] = 0.005
    """Largest step of a number, relative to the median of the absolute values of its tensor."""
    # One choice more than repair has, which the base class cannot say.
    train: Literal["compressed", "norms", "low_rank", "everything", "lora"] = "everything"  # type: ignore[assignment]
    """As in repair, or `lora`: products of two factors beside the linears, merged into what is
    stored, so that no size changes.
    """
    rank: Count = 8
    """Rank of the products (lora)."""
    supports: Literal["fixed", "learned"] = "fixed"
    """Whether other entries of sparse and of dictionary storage may be stored, as many as before;
    in the first four fifths of the steps.
    """
    loss: Literal["kl", "ce", "both"] = "kl"
    """Divergence from the original's distribution (needs no labels), cross-entropy of the text, or
    the sum of the two.
    """
    checkpointing: bool = False
    """Whether blocks run again in the backward pass, in place of keeping what they computed: less
    memory, more time.
    """
    features: NonNegative = 0.0
    """Weight of the distances between the outputs of blocks in the original and in the model,
    relative to their size.
    """
    teacher: Literal["online", "cached"] = "online"
    """Whether the original's whole distribution is made from cached outputs of its last block, or
    its likeliest tokens are cached.
    """
    top: Count = 64
    """Tokens at each position that a cached teacher keeps apart; all others are one outcome."""

    @model_validator(mode="after")
    def _what_goes_together(self) -> "Heal":
        if self.supports == "learned" and self.train in ("low_rank", "lora"):
            raise ValueError(
                f"learns no supports where train: {self.train} leaves entries as they are; set "
                "train to compressed"
            )
        if self.teacher == "cached" and self.loss == "ce":
            raise ValueError("needs no teacher for loss: ce; leave teacher: cached out")
        if self.teacher == "cached" and self.features:
            raise ValueError(
                "runs the original for features, which teacher: cached does without; set teacher "
                "to online or features to 0"
            )
        return self
