"""Pushing to the hub, on an interface that only records, and on one that nobody listens at."""

import json
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants
from support.pages import checkpoint
from typer.testing import CliRunner

from compressor.checkpoint import hub
from compressor.cli.app import app
from compressor.errors import CheckpointError, ConfigError
from compressor.pipeline import run as pipeline


class Url(str):
    @property
    def repo_id(self) -> str:
        return self.removeprefix("https://hub/")


class Api:
    """What HfApi does, written down."""

    def __init__(self, private: bool = True, error: Exception | None = None):
        self.private, self.error, self.calls = private, error, []

    def create_repo(self, repository, private, exist_ok):
        self.calls.append(("create", repository, private, exist_ok))
        return Url(f"https://hub/me/{repository.removeprefix('me/')}")

    def repo_info(self, name):
        return SimpleNamespace(private=self.private)

    def upload_folder(self, **options):
        self.calls.append(("upload", options))
        if self.error:
            raise self.error


@pytest.fixture
def api(monkeypatch):
    def use(**options) -> Api:
        found = Api(**options)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: found)
        return found

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    return use


@pytest.fixture
def compress(monkeypatch, tmp_path):
    """Run `compress` with a pipeline that only writes the readable files of a checkpoint; its
    result may be a failed one.
    """

    def run(*arguments: str, failure: str | None = None):
        def made(recipe, output, **options):
            found = json.loads((checkpoint(output) / "report.json").read_text())
            return found | ({"failure": failure} if failure else {})

        monkeypatch.setattr(pipeline, "compress", made)
        return CliRunner().invoke(app, ["compress", "reference", str(tmp_path / "out"), *arguments])

    return run


def test_the_finished_folder_is_pushed_privately_in_one_commit(api, compress, tmp_path):
    fake = api()
    result = compress("--push-to", "model", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["pushed"] == {
        "repository": "me/model",
        "url": "https://hub/me/model",
        "private": True,
    }
    (create, (_, options)) = fake.calls
    assert create == ("create", "model", True, True)
    assert options["repo_id"] == "me/model" and options["folder_path"] == tmp_path / "out"
    assert (
        options["ignore_patterns"] == ["timings.json"]
        and "*.safetensors" in options["delete_patterns"]
    )


def test_public_is_asked_for(api, compress):
    fake = api(private=False)
    result = compress("--push-to", "me/model", "--public")
    assert result.exit_code == 0 and "pushed to https://hub/me/model" in result.stdout
    assert fake.calls[0] == ("create", "me/model", False, True)


def test_a_public_repository_is_not_written_unasked(api, compress):
    fake = api(private=False)
    result = compress("--push-to", "me/model")
    assert (
        result.exit_code == 1
        and "me/model is public on the hub and --public is not given" in result.stderr
    )
    assert [call[0] for call in fake.calls] == ["create"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--public"], "--push-to"),
        (["--push-to", "a/b/c"], "not a name on the hub"),
        (["--push-to", "me/model"], "no token; set HF_TOKEN"),
    ],
)
def test_what_cannot_succeed_is_refused_before_any_work(
    arguments, words, monkeypatch, tmp_path, api
):
    api()
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(pipeline, "compress", lambda *_, **__: pytest.fail("work was done"))
    result = CliRunner().invoke(app, ["compress", "reference", str(tmp_path / "out"), *arguments])
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr and result.stderr.count("\n") == 1


def test_offline_is_refused_before_any_work(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        hub.check("me/model", False)
    hub.check(None, False)


def test_a_failed_upload_keeps_the_folder_and_names_the_command(api, compress, tmp_path):
    api(error=OSError("connection\nreset"))
    result = compress("--push-to", "me/model", "--json")
    assert result.exit_code == 1 and (tmp_path / "out" / "report.json").exists()
    assert json.loads(result.stdout)["pushed"] is None
    command = f"`hf upload me/model {tmp_path / 'out'} . --exclude timings.json --private`"
    assert result.stderr.splitlines()[-1].endswith(
        f"could not be pushed to me/model (connection reset); try again with {command}"
    )


def test_a_failed_evaluation_is_not_pushed(api, compress):
    fake = api()
    result = compress("--push-to", "me/model", failure="its evaluation failed")
    assert (
        result.exit_code == 1
        and "its evaluation failed; not pushed, do so with `hf upload" in result.stderr
    )
    assert fake.calls == []


def test_an_endpoint_that_is_dead(tmp_path, monkeypatch):
    monkeypatch.setattr(
        huggingface_hub,
        "HfApi",
        lambda kind=huggingface_hub.HfApi: kind(endpoint="http://127.0.0.1:9", token="hf_x"),
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    (tmp_path / "out").mkdir()
    with pytest.raises(
        CheckpointError, match=r"could not be pushed to me/model .*try again with `hf upload"
    ):
        hub.push(tmp_path / "out", "me/model")
