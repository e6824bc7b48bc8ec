"""EleutherAI's lm-evaluation-harness on models of this package: task scores in process, and its
command line with our formats known.

A task is a name that lm-eval knows, a YAML task file, or a folder of such files. A task file is
code: `!function` imports Python and templates are not sandboxed, so run only files you trust. Local
text files are read through `datasets`, whose cache recognises a file by path, size and modification
time.

How lm-eval's `loglikelihood_rolling` cuts a text (word_perplexity, byte_perplexity, bits_per_byte):
each document is tokenised with the tokenizer's own special tokens and a prefix token
(beginning-of-sequence, else end-of-sequence) is put before it; window k then reads tokens kL … kL +
L − 1 of that sequence and predicts the L tokens that follow each, L being `max_length`. So its
windows share one token, and every token of the document is predicted once. `rolling_windows` cuts
the same windows: perplexity() of them measures the same sum of log-likelihoods.
"""

import contextlib
import copy
import logging
import math
import numbers
import sys
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import CompressorError, EvaluationError
from compressor.evaluation.perplexity import in_float32
from compressor.runtime.progress import Progress, counted, silent

BOOTSTRAP = 1000  # resamples for the standard error of metrics without a closed form
HINTS = {
    OverflowError: "the log-likelihood is too low to be a perplexity, the model is broken",
    ZeroDivisionError: "a task has no text or no samples",
    IndexError: "a task may have no samples",
    ConnectionError: "data sets that are not on this machine need the network, and HF_HUB_OFFLINE "
    "unset",
    torch.OutOfMemoryError: "use a smaller batch size",
}


def scores(
    model: nn.Module,
    tokenizer: Any,
    tasks: list[str],
    limit: int | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    progress: Progress = silent,
) -> dict[str, dict[str, float | int | None]]:
    """Score a model on lm-eval tasks, forward pass and log-softmax in float32.

    Returns task (or group) → {metric: value, metric_stderr: value or None, "samples": documents
    scored, "max_length": tokens}, finite numbers only; a metric under a filter of its own is called
    "metric,filter". `limit` is the number of documents per task, `max_length` the window in tokens
    (None: the model's). lm-eval seeds Python, NumPy and torch with fixed numbers.

    Raises EvaluationError for an unknown task, a missing or unreadable file, a text that is empty,
    and for NaN or overflow.
    """
    if tokenizer is None:
        raise EvaluationError("lm-eval tasks are text, and the model has no tokenizer")
    from lm_eval import simple_evaluate

    _count_no_downloads()
    with (
        in_float32(model),
        contextlib.redirect_stdout(sys.stderr),
        _one_line_errors(f"lm-eval could not score {', '.join(tasks)}"),
    ):
        manager, specs = _resolve(tasks)
        harness = _harness(model, tokenizer, batch_size, max_length, progress)
        found = simple_evaluate(
            model=harness,
            tasks=specs,
            task_manager=manager,
            limit=limit,
            bootstrap_iters=BOOTSTRAP,
            log_samples=False,
        )
    samples = found["n-samples"]
    return {
        task: _metrics(task, entries)
        | {"samples": samples.get(task, {}).get("effective"), "max_length": harness.max_length}
        for task, entries in sorted(found["results"].items())
    }


def run_cli(arguments: list[str]) -> int:
    """Run lm-eval's own command line with our checkpoint format registered; return its exit code.

    `arguments` are what would follow `lm-eval`: ["run", "--model", "hf", "--model_args",
    "pretrained=DIR", "--tasks", …]. Raises EvaluationError where lm-eval itself would end with a
    traceback.
    """
    from lm_eval.__main__ import cli_evaluate

    import compressor.hf  # noqa: F401  registers the format

    _count_no_downloads()
    before, sys.argv = sys.argv, ["lm-eval", *map(_absolute_folders, arguments)]
    try:
        with _one_line_errors("lm-eval failed"):
            cli_evaluate()
    except SystemExit as stop:
        if isinstance(stop.code, str):
            raise EvaluationError(f"lm-eval stopped: {stop.code}") from stop
        return stop.code or 0
    finally:
        sys.argv = before
    return 0


def rolling_windows(document: list[int], prefix: int, max_length: int) -> Tensor:
    """Windows (n, max_length + 1), int64, of which `loglikelihood_rolling` predicts all tokens but
    the first.

    document: token ids; prefix: the token id put before them (`HFLM.prefix_token_id`). Raises
    EvaluationError unless max_length divides the document: lm-eval gives a last, shorter window
    more context than it predicts, which has no counterpart here.
    """
    if not document or len(document) % max_length:
        raise EvaluationError(f"{len(document)} tokens do not divide into windows of {max_length}")
    return torch.tensor([prefix, *document]).unfold(0, max_length + 1, max_length)


def _resolve(tasks: list[str]) -> tuple[Any, list[str]]:
    """Return lm-eval's task manager and the specs it understands: absolute paths of task files, and
    names.

    The index of lm-eval's own tasks takes many seconds to read and is read only for names.
    """
    from lm_eval.tasks import TaskManager

    folders = [Path(task) for task in tasks if Path(task).is_dir()]
    files = [
        Path(task)
        for task in tasks
        if task.endswith((".yaml", ".yml")) and Path(task) not in folders
    ]
    names = [task for task in tasks if Path(task) not in folders + files]
    for path in files:
        if not path.is_file():
            raise EvaluationError(f"{path}: no such task file")
    for folder in folders:
        found = sorted(folder.glob("*.yaml"))
        if not found:
            raise EvaluationError(f"{folder}: no task file (*.yaml) in this folder")
        files += found
    manager = TaskManager(include_path=folders, include_defaults=bool(names))
    for name in names:
        if name not in manager.all_tasks:
            near = get_close_matches(name, manager.all_tasks, n=1)
            raise EvaluationError(
                f"lm-eval has no task '{name}'" + (f"; did you mean '{near[0]}'?" if near else "")
            )
    return manager, list(dict.fromkeys(str(path.absolute()) for path in files)) + names


def _absolute_folders(argument: str) -> str:
    """Make folders in "pretrained=DIR,tokenizer=DIR" absolute: lm-eval asks the hub about a
    relative one, taking it for a repository.
    """
    pairs = (part.partition("=") for part in argument.split(","))
    return ",".join(
        f"{key}={Path(value).absolute()}"
        if key in ("pretrained", "tokenizer", "peft", "delta") and Path(value).is_dir()
        else key + equals + value
        for key, equals, value in pairs
    )


def _count_no_downloads() -> None:
    """Keep `datasets` from opening a connection to count the use of a loader, which it does for
    local files too.
    """
    import datasets

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False


class _Counting:
    """Stands in for lm-eval's cache, which hears of every request that is done; of rolling ones all
    at once, so these are counted apart.
    """

    def __init__(self, advance: Callable[[int], None]):
        self.advance = advance

    def add_partial(self, kind: str, request: Any, found: Any) -> None:
        if kind != "loglikelihood_rolling":
            self.advance(1)


def _harness(
    model: nn.Module, tokenizer: Any, batch_size: int, max_length: int | None, progress: Progress
) -> Any:
    """Wrap a model in memory for lm-eval; the tokenizer is copied, because lm-eval sets its padding
    token.
    """
    from lm_eval.models.huggingface import HFLM

    class Harness(HFLM):
        """HFLM with our progress in place of its bars."""

        def loglikelihood(self, requests, disable_tqdm=False):
            with self.counting(len(requests)):
                return super().loglikelihood(requests, disable_tqdm=True)

        def generate_until(self, requests, disable_tqdm=False):
            with self.counting(len(requests)):
                return super().generate_until(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            with self.counting(
                sum(
                    -(-len(self.tok_encode(request.args[0])) // self.max_length)
                    for request in requests
                )
            ):
                return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
            found = super()._loglikelihood_tokens(
                requests, disable_tqdm=True, override_bs=override_bs
            )
            if override_bs is not None:
                self.cache_hook.advance(len(requests))
            return found

        @contextlib.contextmanager
        def counting(self, total):
            with counted(progress, total, "lm-eval") as advance:
                self.cache_hook = _Counting(advance)
                yield

    logger = logging.getLogger(HFLM.__module__)
    level = logger.level
    logger.setLevel(
        logging.ERROR
    )  # it warns that other arguments are ignored for a model in memory: none are given
    try:
        return Harness(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),
            batch_size=batch_size,
            max_length=max_length,
        )
    finally:
        logger.setLevel(level)


def _metrics(task: str, entries: dict[str, Any]) -> dict[str, float | None]:
    """Rename "metric,none" to "metric", turn "N/A" into None, and refuse numbers that are not
    finite.
    """
    metrics = {}
    for key, value in entries.items():
        metric, comma, chosen = key.partition(",")
        if not comma:
            continue  # name, alias and sample_len
        name = metric if chosen == "none" else key
        number = float(value) if isinstance(value, numbers.Real) else None
        if number is not None and not math.isfinite(number):
            raise EvaluationError(
                f"lm-eval task {task}: {name} is {number}; the model's logits hold NaN or infinity"
            )
        if number is not None or metric.endswith("_stderr"):
            metrics[name] = number
    return metrics


@contextlib.contextmanager
def _one_line_errors(what: str) -> Iterator[None]:
    """Turn whatever lm-eval raises into an EvaluationError of one line, the original kept as its
    cause.
    """
    try:
        yield
    except CompressorError:
        raise
    except Exception as error:
        text = " ".join(str(error).split()) or "no message"
        hint = next((f" ({hint})" for kind, hint in HINTS.items() if isinstance(error, kind)), "")
        raise EvaluationError(f"{what}: {type(error).__name__}: {text[:500]}{hint}") from error
