from compressor.pipeline.forecast import evaluated_tokens, forecast
from compressor.recipe.load import load_recipe

FAST = ("calibration.windows=12", "calibration.length=32", "model.device=cpu")


def test_every_stage_of_a_run_is_forecast_in_its_order(tiny_llama):
    trained = ("calibration.sequential=true", "repair.enabled=true", "heal.enabled=true")
    recipe = load_recipe("default", [*FAST, *trained])
    seconds = forecast(recipe, tiny_llama)
    stages = "calibrate", "decompose", "probe", "solve_in_order", "repair", "heal", "evaluate"
    assert tuple(seconds) == stages
    assert all(spent > 0 for spent in seconds.values())


def test_what_is_given_or_switched_off_takes_no_time(tiny_llama):
    recipe = load_recipe("svd_llm", [*FAST, "evaluation.enabled=false"])
    given = forecast(recipe, tiny_llama, collected=True, planned=True)
    assert given.keys() == {"decompose"}


def test_a_model_that_headers_do_not_describe_has_no_forecast(tmp_path):
    assert forecast(load_recipe("svd_llm"), tmp_path) == {}


def test_evaluated_tokens_are_those_of_the_windows_or_of_the_text(tmp_path):
    windows = ["calibration.windows=32", "calibration.length=10", "calibration.heldout=4"]
    text = tmp_path / "text.txt"
    text.write_text("x" * 4000)
    counted = [*windows, "evaluation.windows=3", "evaluation.window=20"]
    assert evaluated_tokens(load_recipe("svd", counted)) == 40 + 60
    named = {"evaluation.source": str(text)}
    assert evaluated_tokens(load_recipe("svd", windows, named)) == 40 + 1000
