"""Generated inputs: whatever stands in a recipe, a shard index, a weight file or a config.json, the
user sees a result or one message.

Seeds are fixed (`derandomize`), so every run checks the same inputs.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from compressor.errors import CheckpointError, CompressorError, ConfigError
from compressor.files.documents import read_json
from compressor.files.model_folder import check_sizes, check_type
from compressor.files.safetensors import INDEX, read_tensors
from compressor.files.yaml import dump, parse_yaml
from compressor.plan import Plan
from compressor.recipe.load import dump_yaml, load_recipe
from compressor.recipe.presets import presets
from compressor.recipe.sections import Recipe
from compressor.recipe.training import Section

pytestmark = pytest.mark.faults

LEAST_VALID = 0.1  # of the generated recipes: were it few, the round trip would say little
WEIGHTS = save(
    {"x": torch.arange(6.0).view(2, 3), "y": torch.ones(2, dtype=torch.bfloat16)},
    metadata={"format": "pt"},
)
LENGTH = struct.unpack("<Q", WEIGHTS[:8])[0]


def generated(examples: int) -> settings:
    return settings(max_examples=examples, derandomize=True, database=None)


def outcome(call, *arguments) -> Any:
    """What a call returns, or the error for users that it raises. Anything else it raises is a
    failed test.
    """
    try:
        return call(*arguments)
    except CompressorError as error:
        assert str(error).strip() and len(str(error)) < 2_000
        return error


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder that all inputs are written to, one after the other."""
    return tmp_path_factory.mktemp("properties")


SCALARS = (
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=8)
)
TREES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=8,
)
SIGNS = "a{}[],'|>#%~=@`é\"\\\n\t\0\x85\ufeff\ud800"
WORDS = [
    "b: ",
    "- ",
    "? ",
    ": ",
    "  ",
    "&x ",
    "*x",
    "!!str ",
    "!t ",
    "---",
    "...",
    "1e-3",
    "010",
    ".nan",
    "<<: ",
    "0x",
    "null",
    "2024-01-01",
]
TEXTS = st.lists(st.sampled_from([*SIGNS, *WORDS]), max_size=24).map("".join) | st.text(max_size=60)


@generated(600)
@given(TEXTS)
def test_any_text_is_yaml_or_is_refused_with_its_place(text):
    found = outcome(parse_yaml, text, "recipe.yaml")
    if isinstance(found, CompressorError):
        assert isinstance(found, ConfigError) and str(found).startswith("recipe.yaml:")
    else:
        json.dumps(found, allow_nan=False)


# Files of a model folder

NAMES = [
    "model.safetensors",
    "other.safetensors",
    "../model.safetensors",
    "/etc/passwd",
    "model.bin",
    "",
    ".",
    "a\0.safetensors",
    "a/b.safetensors",
]
MAPS = st.dictionaries(
    st.sampled_from("xyz") | st.text(max_size=4), st.sampled_from(NAMES) | SCALARS, max_size=4
)
DATA = (
    st.fixed_dictionaries(
        {},
        optional={"weight_map": MAPS | TREES, "metadata": TREES, "linears": TREES, "price": TREES},
    )
    | TREES
)


@generated(350)
@given(DATA.map(json.dumps) | TEXTS)
def test_any_shard_index_is_read_or_refused_and_nothing_outside_is_opened(place, text):
    folder = place / "index"
    folder.mkdir(exist_ok=True)
    (place / "model.safetensors").write_bytes(WEIGHTS)  # outside
    for name in ("model.safetensors", "other.safetensors"):
        (folder / name).write_bytes(WEIGHTS)
    (folder / INDEX).write_text(text, encoding="utf-8", errors="surrogatepass")
    found = outcome(read_tensors, folder)
    if isinstance(found, CompressorError):
        assert isinstance(found, CheckpointError)
    else:
        assert found.keys() == {"x", "y"} and {info.file for info in found.values()} <= {
            "model.safetensors",
            "other.safetensors",
        }


@generated(350)
@given(st.data())
def test_any_damage_to_a_weight_file_is_noticed_or_lies_in_the_numbers(place, data):
    folder = place / "weights"
    folder.mkdir(exist_ok=True)
    content = bytearray(WEIGHTS)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))]
    (folder / "model.safetensors").write_bytes(content)
    found = outcome(read_tensors, folder)
    if isinstance(found, CompressorError):
        assert isinstance(found, CheckpointError) and "model.safetensors" in str(found)
    else:
        assert len(content) == len(WEIGHTS)
        assert max(info.start + info.bytes for info in found.values()) <= len(content)


SIZES = [
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_size",
    "head_dim",
    "vocab_size",
    "n_head",
    "n_embd",
]
CONFIGS = st.dictionaries(
    st.sampled_from([*SIZES, "model_type", "auto_map", "attn_implementation", "text_config"]),
    st.sampled_from(["llama", "gpt2", "bert", 0, -1, 4, 32, 10**9, "32", 1.5]) | TREES,
    max_size=6,
)


@generated(350)
@given((CONFIGS | TREES).map(json.dumps) | TEXTS)
def test_any_config_is_accepted_or_refused_by_name(place, text):
    path = place / "config.json"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    config = outcome(read_json, path)
    if not isinstance(config, CompressorError):
        for check in (check_type, check_sizes):
            assert isinstance(outcome(check, path, config), CheckpointError | None)


# Recipes


def fields(section: type[Section], above: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and annotation of everything in a recipe, the first item standing for each
    list.
    """
    for name, field in section.model_fields.items():
        inner, items = next(
            (
                (part, part is not field.annotation)
                for part in parts(field.annotation)
                if is_section(part)
            ),
            (None, False),
        )
        yield above + name, field.annotation
        if inner:
            yield from fields(inner, f"{above}{name}." + "0." * items)


def parts(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in get_args(annotation):
        yield from parts(part)


def is_section(part: Any) -> bool:
    return isinstance(part, type) and issubclass(part, Section)


def values(annotation: Any) -> st.SearchStrategy:
    """Values that a field may well accept, and some that it will not."""
    found = list(parts(annotation))
    words = [word for part in found if get_origin(part) is Literal for word in get_args(part)]
    likely = (
        st.sampled_from(words)
        if words
        else st.sampled_from([{}, 64, 0.5, "1GB", "low_rank", "*", [0.5, 2]])
    )
    if bool in found:
        likely = st.booleans()
    elif int in found or float in found:
        likely = st.integers(0, 300) if int in found else st.floats(0, 1)
    lists = likely.map(lambda value: [value]) if tuple in map(get_origin, found) else likely
    return st.one_of(likely, likely, lists, lists, lists, TREES)


FIELDS = {path: values(annotation) for path, annotation in fields(Recipe)}
CHANGES = st.lists(
    st.sampled_from(sorted(FIELDS)).flatmap(lambda path: st.tuples(st.just(path), FIELDS[path])),
    max_size=3,
)
BASES = st.sampled_from(sorted(presets()))


def round_trip(recipe: Recipe, path: Path) -> None:
    path.write_text(dump_yaml(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe


def test_overrides_of_any_preset_make_a_recipe_that_comes_back_or_are_refused(place):
    valid = []

    @generated(400)
    @given(BASES, CHANGES)
    def check(preset, changes):
        texts = [f"{path}={'' if value is None else dump(value)}" for path, value in changes]
        found = outcome(load_recipe, preset, texts)
        assert isinstance(found, Recipe | ConfigError)
        valid.append(isinstance(found, Recipe))
        if valid[-1]:
            round_trip(found, place / "again.yaml")

    check()
    assert sum(valid) >= LEAST_VALID * len(valid)


def test_any_file_of_sections_is_a_recipe_that_comes_back_or_is_refused(place):
    valid = []

    @generated(300)
    @given(
        CHANGES,
        st.one_of(
            *[st.just({})] * 4,
            st.dictionaries(st.sampled_from(sorted(Recipe.model_fields)), TREES, max_size=1),
        ),
    )
    def check(changes, stray):
        data = dict(stray)
        for path, value in changes:
            *above, last = path.replace(".0", "*").split(".")
            section = data
            for name in above:
                inner = section.setdefault(name.strip("*"), [{}] if "*" in name else {})
                section = inner[0] if "*" in name and isinstance(inner, list) and inner else inner
                section = section if isinstance(section, dict) else {}
            section[last] = value
        (place / "recipe.yaml").write_text(dump(data), encoding="utf-8")
        found = outcome(load_recipe, place / "recipe.yaml")
        assert isinstance(found, Recipe | ConfigError)
        valid.append(isinstance(found, Recipe))
        if valid[-1]:
            round_trip(found, place / "again.yaml")

    check()
    assert sum(valid) >= LEAST_VALID * len(valid)


@generated(150)
@given(st.lists(TEXTS, max_size=2))
def test_any_override_is_taken_or_refused(texts):
    assert isinstance(outcome(load_recipe, None, texts), Recipe | ConfigError)


@generated(150)
@given(DATA)
def test_any_plan_is_read_or_refused(place, data):
    from compressor.pipeline.run import read_plan

    (place / "plan.json").write_text(json.dumps(data))
    assert isinstance(outcome(read_plan, place / "plan.json"), Plan | ConfigError)
