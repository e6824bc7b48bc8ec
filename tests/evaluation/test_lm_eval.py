"""lm-eval in process and through its command line, without a network, on a local text."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.models import VOCABULARY, tiny_model, tiny_tokenizer
from support.modules import save_compressed

from compressor.errors import EvaluationError
from compressor.evaluation.lm_eval import rolling_windows, run_cli, scores
from compressor.evaluation.perplexity import perplexity
from compressor.linears import CompressedLinear
from compressor.models.load import load

SAME_SUM = 1e-5  # float32 log-likelihoods of the same windows; the promise to users is 1e-3
WINDOW = 32
WORDS = 10 * WINDOW

TASK = """
task: {name}
dataset_path: text
dataset_kwargs:
  data_files: {{test: {text}}}
  sample_by: document
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: text
metric_list:
  - {{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}
  - {{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}
metadata: {{version: 1.0}}
"""

CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
output_type: multiple_choice
test_split: test
doc_to_text: question
doc_to_target: answer
doc_to_choice: choices
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""

LAST = """
task: local_last
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
output_type: loglikelihood
test_split: test
doc_to_text: question
doc_to_target: " w5"
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
metadata: {{version: 1.0}}
"""


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    """No connection may be tried, with HF_HUB_OFFLINE unset on purpose, and no cache of the user is
    touched.
    """
    import datasets

    tried = []

    def refuse(host, *rest, **options):
        tried.append(host)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    yield
    assert not tried


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def words():
    ids = torch.randint(
        3, VOCABULARY, (WORDS,), generator=torch.Generator().manual_seed(3)
    ).tolist()
    return [f"w{i}" for i in ids]


@pytest.fixture
def task(tmp_path, words) -> Path:
    """A task file over one document of WORDS words, in a folder of its own."""
    (tmp_path / "words.txt").write_text(" ".join(words))
    (tmp_path / "tasks").mkdir()
    path = tmp_path / "tasks" / "local_words.yaml"
    path.write_text(TASK.format(name="local_words", text=tmp_path / "words.txt"))
    return path


def our_bits_per_byte(model, words) -> float:
    tokenizer = tiny_tokenizer()
    windows = rolling_windows(tokenizer.encode(" ".join(words)), tokenizer.bos_token_id, WINDOW)
    return perplexity(model, windows).nll_sum / math.log(2) / len(" ".join(words))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rolling_log_likelihood_is_our_sum_at_equal_windows(words, task, dtype, capsys):
    stored = tiny_model("llama").to(dtype)
    found = scores(stored, tiny_tokenizer(), [str(task)], batch_size=3, max_length=WINDOW)
    assert found.keys() == {"local_words"}
    assert found["local_words"]["bits_per_byte"] == pytest.approx(
        our_bits_per_byte(stored, words), rel=SAME_SUM
    )
    word_perplexity = 2 ** (our_bits_per_byte(stored, words) * len(" ".join(words)) / WORDS)
    assert found["local_words"]["word_perplexity"] == pytest.approx(word_perplexity, rel=1e-3)
    assert {
        key: found["local_words"][key]
        for key in ("samples", "max_length", "word_perplexity_stderr")
    } == {
        "samples": 1,
        "max_length": WINDOW,
        "word_perplexity_stderr": None,
    }
    assert stored.dtype == dtype
    assert (
        "Running loglikelihood requests" not in capsys.readouterr().err
    )  # no progress bar for each batch
    json.dumps(found, allow_nan=False)


def test_rolling_windows_worked_by_hand():
    assert rolling_windows([5, 6, 7, 8], prefix=1, max_length=2).tolist() == [[1, 5, 6], [6, 7, 8]]
    for document in ([5, 6, 7], []):
        with pytest.raises(EvaluationError, match="do not divide into windows of 2"):
            rolling_windows(document, prefix=1, max_length=2)


def test_folder_of_tasks_limit_and_closed_form_errors(model, words, task, tmp_path, capsys):
    documents = [
        {"question": word, "choices": words[i : i + 3], "answer": i % 3}
        for i, word in enumerate(words[:9])
    ]
    (tmp_path / "choice.jsonl").write_text("\n".join(map(json.dumps, documents)))
    (task.parent / "choice.yaml").write_text(CHOICE.format(data=tmp_path / "choice.jsonl"))
    (task.parent / "last.yaml").write_text(LAST.format(data=tmp_path / "choice.jsonl"))
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    found = scores(model, tokenizer, [str(task.parent)], limit=5, max_length=WINDOW)
    assert found.keys() == {"local_words", "local_choice", "local_last"}
    assert found["local_choice"]["samples"] == found["local_last"]["samples"] == 5
    assert found["local_last"]["perplexity"] > 1 and found["local_last"]["perplexity_stderr"] > 0
    rate = found["local_choice"]["acc"]
    assert found["local_choice"]["acc_stderr"] == pytest.approx(math.sqrt(rate * (1 - rate) / 4))
    assert tokenizer.pad_token is None  # the caller's tokenizer is not edited
    streams = capsys.readouterr()
    assert streams.out == "" and "bootstrapping" in streams.err  # stdout belongs to the result


@pytest.mark.parametrize(("text", "items"), [(TASK, WORDS // WINDOW), (CHOICE, 4), (LAST, 2)])
def test_progress_counts_windows_and_requests(text, items, model, words, tmp_path, capsys):
    (tmp_path / "words.txt").write_text(" ".join(words))
    rows = [{"question": f"w{n} w4", "choices": ["w5", "w6"], "answer": 0} for n in (3, 7)]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "task.yaml").write_text(
        text.format(name="local_words", text=tmp_path / "words.txt", data=tmp_path / "rows.json")
    )
    taken = []

    def progress(found, title, total=None):
        assert (title, len(found)) == ("lm-eval", items)
        for item in found:
            taken.append(item)
            yield item

    scores(
        model,
        tiny_tokenizer(),
        [str(tmp_path / "task.yaml")],
        batch_size=3,
        max_length=WINDOW,
        progress=progress,
    )
    assert len(taken) == items
    assert "Running" not in capsys.readouterr().err  # the bars of lm-eval


@pytest.mark.parametrize(
    "value, message", [(math.nan, "is nan"), (1e8, "OverflowError: .* model is broken")]
)
def test_broken_models_fail_the_run(value, message, task):
    broken = tiny_model("llama")
    broken.model.norm.weight.data[0] = value
    with pytest.raises(EvaluationError, match=message):
        scores(broken, tiny_tokenizer(), [str(task)], max_length=WINDOW)


def test_bad_tasks_are_one_line(model, task, tmp_path):
    def fails(spec, message):
        with pytest.raises(EvaluationError, match=message) as caught:
            scores(model, tiny_tokenizer(), [str(spec)], max_length=WINDOW)
        assert "\n" not in str(caught.value)

    fails(tmp_path / "none.yaml", "none.yaml: no such task file")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", r"no task file \(\*.yaml\) in this folder")
    task.write_text(TASK.format(name="absent", text=tmp_path / "absent.txt"))
    fails(task, "FileNotFoundError: .*absent.txt")
    (tmp_path / "nothing.txt").write_text("")
    task.write_text(TASK.format(name="nothing", text=tmp_path / "nothing.txt"))
    fails(task, "could not score")
    (tmp_path / "latin.txt").write_bytes("w3 w4 \xe9\xe9".encode("latin-1"))
    task.write_text(TASK.format(name="latin", text=tmp_path / "latin.txt"))
    fails(task, "could not score .*Error")
    task.write_text("task: [broken\n")
    fails(task, "could not score .*ParserError")
    with pytest.raises(EvaluationError, match="no tokenizer"):
        scores(model, None, [str(task)])


def test_data_sets_that_need_the_network_name_the_variable(model, task, monkeypatch):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    task.write_text(
        TASK.format(name="remote", text="x.txt").replace(
            "dataset_path: text", "dataset_path: someone/something"
        )
    )
    with pytest.raises(EvaluationError, match="HF_HUB_OFFLINE unset"):
        scores(model, tiny_tokenizer(), [str(task)])


def test_unknown_names_get_a_suggestion(model, task, monkeypatch):
    import lm_eval.tasks.manager

    monkeypatch.setattr(
        lm_eval.tasks.manager, "__file__", str(task)
    )  # the index of all of lm-eval's tasks takes long to read
    with pytest.raises(EvaluationError, match="no task 'local_word'; did you mean 'local_words'"):
        scores(model, tiny_tokenizer(), ["local_word"])
    assert (
        scores(model, tiny_tokenizer(), ["local_words"], max_length=WINDOW)["local_words"][
            "samples"
        ]
        == 1
    )


def test_command_line_reads_our_checkpoints_and_gives_the_same_score(
    words, task, tmp_path, monkeypatch
):
    import lm_eval.tasks.manager

    folder = save_compressed(tmp_path / "models" / "llama", "llama")

    monkeypatch.setattr(lm_eval.tasks.manager, "__file__", str(task))
    monkeypatch.chdir(tmp_path)  # a relative folder looks like the name of a repository
    arguments = f"run --model hf --device cpu --batch_size 3 --tasks {task} --output_path {tmp_path / 'out'}".split()
    model_args = f"pretrained={folder.relative_to(tmp_path)},dtype=float32,max_length={WINDOW}"
    before = list(sys.argv)
    assert run_cli([*arguments, "--model_args", model_args]) == 0
    assert sys.argv == before
    (path,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(path.read_text())["results"]["local_words"]["bits_per_byte,none"]
    model, _ = load(folder)
    assert any(isinstance(module, CompressedLinear) for module in model.modules())
    assert found == pytest.approx(our_bits_per_byte(model, words), rel=SAME_SUM)


def test_command_line_passes_exit_codes_on(task, capsys):
    assert run_cli(["run", "--no-such-option"]) == 2
    assert run_cli(["--help"]) == 0
    assert "lm-eval run" in capsys.readouterr().out
    with pytest.raises(EvaluationError, match="lm-eval failed: ValueError: Specify --output_path"):
        run_cli(["run", "--tasks", str(task), "--log_samples"])


def test_importing_the_bridge_does_not_import_lm_eval():
    code = (
        "import sys, compressor.evaluation.lm_eval; sys.exit('lm_eval' in sys.modules or "
        "'datasets' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == 0
