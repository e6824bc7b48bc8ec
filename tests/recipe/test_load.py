import subprocess
import sys

import pytest

from compressor.errors import ConfigError
from compressor.recipe.load import Recipe, dump_yaml, find_recipe, load_recipe, parse_size, schema
from compressor.recipe.presets import presets

PRESETS = [
    "afm",
    "armor",
    "asvd",
    "awsvd",
    "best",
    "best_float",
    "channels",
    "ci",
    "compot",
    "cospadi",
    "default",
    "dsformer",
    "eora_24",
    "eora_w3_r64",
    "eora_w4_r32",
    "fwsvd",
    "geopair",
    "gptq_w3",
    "gptq_w4",
    "kfac_svd",
    "lems",
    "lorap",
    "lord",
    "mixed",
    "mlorq",
    "modules",
    "oats",
    "repaired",
    "rocket",
    "rocket_uniform",
    "rtn_w4",
    "sparse_admm",
    "sparse_low_rank",
    "sparsegpt",
    "svd",
    "svd_llm",
    "svd_llm_gptq",
    "transact",
    "utilized_rank",
    "wanda",
    "welore",
]
MAX_PRESET_LINES = 40


@pytest.fixture
def recipe_file(tmp_path):
    def write(text: str):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


def refused(*arguments) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_layers_override_each_other_in_order(recipe_file):
    path = recipe_file("seed: 1\nallocation: {keep: 0.1}\ncalibration: {windows: 10, length: 64}\n")
    recipe = load_recipe(
        path,
        ["allocation.roles.q=2", "calibration.windows=20"],
        {"allocation.keep": 0.3, "model.name": None},
    )
    assert recipe.seed == 1
    assert recipe.calibration.length == 64
    assert recipe.calibration.windows == 20
    assert recipe.allocation.keep == 0.3
    assert recipe.model.name == "reference"


def test_later_override_wins(recipe_file):
    assert load_recipe(recipe_file("seed: 1\n"), ["seed=2", "seed=3"]).seed == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "seed: 0\nallocation:\n  kep: 0.5\n",
            ":3: unknown key 'kep' in allocation; did you mean 'keep'?",
        ),
        (
            "alocation: {}\n",
            ":1: unknown key 'alocation' in the recipe; did you mean 'allocation'?",
        ),
        (
            "seed: 1\nkeep: 0.5\n",
            ":2: unknown key 'keep' in the recipe; did you mean 'allocation.keep'?",
        ),
        (
            "method:\n- candidates:\n  - name: low_rank\n    option: {}\n",
            ":4: unknown key 'option' in method.0.candidates.0; did you mean",
        ),
        (
            "calibration:\n  gradients:\n    trimm: 0\n",
            ":3: unknown key 'trimm' in calibration.gradients; did you mean 'trim'?",
        ),
    ],
)
def test_unknown_keys_name_their_line_and_the_nearest_key(recipe_file, text, message):
    path = recipe_file(text)
    assert refused(path).startswith(f"{path}{message}")


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("seed: 0\nallocation:\n  keep: 1.5\n", 3, ["allocation.keep", "at most 1", "1.5"]),
        ("allocation: {keep: 0}\n", 1, ["allocation.keep", "greater than 0"]),
        ("allocation: {keep: true}\n", 1, ["allocation.keep"]),
        ("allocation: {keep: {}}\n", 1, ["allocation.keep"]),
        ("allocation:\n  keep: {'*q_proj': 2}\n", 2, ["allocation.keep"]),
        ("allocation: {kind: knapsac}\n", 1, ["allocation.kind", "'knapsack'"]),
        ("allocation: {keep: 0.5, target_size: 1GB}\n", 1, ["keep or target_size"]),
        ("allocation: {target_size: 3XB}\n", 1, ["allocation.target_size", "GiB", "3XB"]),
        ("allocation: 0.5\n", 1, ["allocation", "mapping"]),
        ("seed: '1'\n", 1, ["seed", "integer", "'1'"]),
        ("seed: 1.5\n", 1, ["seed", "integer"]),
        ("model: {revision: 1234567}\n", 1, ["model.revision", "quotes"]),
        ("method:\n- targets: 're:('\n", 2, ["method.0.targets", "regular expression"]),
        ("method: []\n", 1, ["method", "empty"]),
        ("calibration:\n  windows: 8\n  heldout: 8\n", 3, ["calibration.heldout holds out 8 of 8"]),
        (
            "calibration:\n  gradients: {clip: [2, 1]}\n",
            2,
            ["calibration.gradients.clip", "low < high"],
        ),
        (
            "calibration:\n  gradients: {trim: 0.5}\n",
            2,
            ["calibration.gradients.trim", "less than 0.5"],
        ),
        ("- 1\n", 1, ["mapping", "allocation"]),
        ("null\n", 1, ["mapping"]),
    ],
)
def test_bad_values_name_their_line_their_key_and_what_would_be_right(
    recipe_file, text, line, words
):
    path = recipe_file(text)
    message = refused(path)
    assert message.startswith(f"{path}:{line}: ")
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("allocation.kep=1", ["no 'allocation.kep'", "'allocation.keep'"]),
        ("alocation.keep=1", ["'allocation.keep'"]),
        ("keep=0.5", ["allocation.keep, compensation.keep"]),
        ("method.0.candidate.0.name=x", ["'method.0.candidates.0.name'"]),
        ("allocation.keep", ["path=value"]),
        ("seed=", ["null"]),
        ("seed=[1", ["not YAML"]),
        ("allocation.keep.deeper=1", ["allocation.keep holds no 'deeper'"]),
        ("method.1.targets=x", ["from 0 to 0"]),
        ("allocation.0=x", ["allocation holds no '0'"]),
        ("method.0.targets=*q", ["alias", "quotes"]),
        ("allocation.keep=7", ["allocation.keep", "at most 1"]),
    ],
)
def test_bad_overrides_are_quoted_and_name_the_nearest_path(override, words):
    message = refused("svd", [override])
    assert message.startswith(f"--set {override}:")
    assert all(word in message for word in words), message


def test_bad_named_option_is_attributed_to_the_command_line():
    problem = refused("svd", [], {"allocation.keep": 2.0})
    assert problem.startswith("option allocation.keep: allocation.keep must be")
    problem = refused("svd", [], {"allocation.keep": 2.0}, {"allocation.keep": "--keep"})
    assert problem.startswith("--keep: allocation.keep must be")


def test_value_replaced_by_an_override_no_longer_points_into_the_file():
    assert refused("svd", ["allocation={keep: 7}"]).startswith("--set allocation={keep: 7}:")


def test_overrides_reach_into_lists_and_options():
    recipe = load_recipe(
        "svd", ["method.0.candidates.0.options.metric=gram", "allocation.roles.q=2"]
    )
    assert recipe.method[0].candidates[0].options == {"metric": "gram", "storage": "factors"}
    assert recipe.allocation.roles["q"] == 2


def test_override_of_a_list_item_the_file_does_not_mention(recipe_file):
    recipe = load_recipe(
        recipe_file("seed: 1\n"),
        ["method.0.candidates.0.options.metric=gram", "method.0.dense=false"],
    )
    assert recipe.method[0].candidates[0].name == "low_rank"
    assert recipe.method[0].candidates[0].options == {"metric": "gram"}
    assert not recipe.method[0].dense


def test_a_stronger_size_replaces_a_weaker_one_of_the_other_kind():
    assert load_recipe("svd", ["allocation.target_size=3MB"]).allocation.keep is None
    recipe = load_recipe("svd", [], {"allocation.target_size": "3MB"})
    assert (recipe.allocation.keep, recipe.allocation.target_size) == (None, "3MB")
    assert "keep or target_size" in refused(
        "svd", [], {"allocation.keep": 0.5, "allocation.target_size": "3MB"}
    )


def test_overrides_act_on_the_options_of_the_method_that_is_named():
    recipe = load_recipe(
        "mixed", ["method.0.candidates.0.options.solver=ksvd"], {"method": "cospadi"}
    )
    (entry,) = recipe.method
    assert [(engine.name, engine.options) for engine in entry.candidates] == [
        ("cospadi", {"solver": "ksvd"})
    ]


@pytest.mark.parametrize(
    ("overrides", "options"),
    [
        (["allocation.keep=0.2"], {"allocation.keep": 0.3}),
        (["allocation={keep: 0.2}"], {"allocation.keep": 0.3}),
        (["allocation.target_size=3MB"], {"allocation.keep": 0.3}),
        (["allocation.keep=0.3"], {"allocation.target_size": "3MB"}),
        (["method.0.candidates.0.name=rocket"], {"method": "cospadi"}),
        (["method=[{candidates: [{name: rocket}]}]"], {"method": "cospadi"}),
        (["seed=1"], {"seed": 2}),
    ],
)
def test_an_override_that_a_named_option_discards_is_refused_naming_both(overrides, options):
    (key,) = options
    message = refused("svd", overrides, options)
    assert message.startswith(f"--set {overrides[0]}: option {key} sets {key} too")


def test_an_override_that_a_later_one_discards_is_refused_naming_both():
    message = refused("svd", ["allocation.keep=0.3", "allocation={kind: uniform}"])
    assert "--set allocation={kind: uniform}: discards --set allocation.keep=0.3" in message


@pytest.mark.parametrize(
    ("text", "line", "start"),
    [
        (
            "seed: 1\nallocation:\n  limits: {parameters: 0.5}\ncompensation: {keep: 0.1}\n",
            3,
            "allocation.limits do not count the residuals",
        ),
        ("seed: 1\nbudget: 5m\n", 2, "budget is the time for allocation.search"),
        ("allocation:\n  search: [{seed: 1}]\n", 2, "allocation.search cannot set 'seed'"),
    ],
)
def test_what_is_wrong_between_sections_names_the_line_of_its_key(recipe_file, text, line, start):
    path = recipe_file(text)
    assert refused(path).startswith(f"{path}:{line}: {start}")


def test_method_option_replaces_the_list():
    recipe = load_recipe("svd", [], {"method": "utilized_rank"})
    assert [entry.targets for entry in recipe.method] == ["*"]
    assert [(engine.name, engine.options) for engine in recipe.method[0].candidates] == [
        ("utilized_rank", {})
    ]


def test_number_written_without_a_point_is_a_number(recipe_file):
    assert (
        load_recipe(recipe_file("allocation: {depth_bias: 1e-3}\n")).allocation.depth_bias == 0.001
    )


def test_evaluation_window_follows_calibration(recipe_file):
    assert load_recipe(recipe_file("calibration: {length: 99}\n")).evaluation_window == 99
    assert load_recipe(None, ["evaluation.window=7"]).evaluation_window == 7


def test_presets_are_the_published_recipes():
    assert sorted(presets()) == PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_short_cites_its_source_and_survives_a_round_trip(name, recipe_file):
    text = presets()[name].read_text()
    assert len(text.splitlines()) <= MAX_PRESET_LINES
    assert text.startswith("# ")
    assert "arXiv" in text or "ICML" in text
    assert "# Deviations" in text
    recipe = load_recipe(name)
    assert load_recipe(recipe_file(dump_yaml(recipe))) == recipe
    assert dump_yaml(load_recipe(recipe_file(dump_yaml(recipe)))) == dump_yaml(recipe)


def test_default_preset_is_what_a_file_that_says_nothing_about_size_starts_from(recipe_file):
    assert load_recipe() == load_recipe("default")
    default, bare = load_recipe("default"), load_recipe(recipe_file("seed: 0\n"))
    assert default.model_copy(update={"method": bare.method}) == bare
    assert default.method[0].candidates[0].name == bare.method[0].candidates[0].name


def test_misspelt_preset_names_the_nearest():
    with pytest.raises(
        ConfigError,
        match=r"'svdllm' is neither a recipe file nor a preset; did you mean 'svd_llm'\?",
    ):
        find_recipe("svdllm")


@pytest.mark.parametrize(
    ("size", "count"),
    [
        ("3.2GiB", int(3.2 * 2**30)),
        ("4GB", 4 * 10**9),
        ("500 MB", 5 * 10**8),
        ("1kB", 1000),
        ("7B", 7),
        ("7", 7),
        (7, 7),
        ("1TiB", 2**40),
    ],
)
def test_sizes(size, count):
    assert parse_size(size) == count


@pytest.mark.parametrize(
    "size", ["", "GiB", "-1GB", "1e9", "3 gigs", "0", 0, "0.1B", True, 1.5, None, "9" * 400]
)
def test_bad_sizes(size):
    with pytest.raises(ConfigError, match="a size must be"):
        parse_size(size)


def test_schema_describes_every_field():
    description = schema()
    sections = [
        description,
        *(part for name, part in description["$defs"].items() if name != "JsonValue"),
    ]
    assert all(
        "description" in field or "$ref" in field
        for part in sections
        for field in part["properties"].values()
    )
    assert all(part["additionalProperties"] is False for part in sections)


def test_recipe_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Recipe().seed = 1


def test_reading_a_recipe_imports_no_torch():
    code = (
        "import sys; from compressor.recipe.load import load_recipe; load_recipe('lems'); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
