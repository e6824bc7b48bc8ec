"""A finished checkpoint on the Hugging Face hub: private unless asked for otherwise, whole or not
at all (one commit).

Whether there is a token and a name that can be is checked before a run, the rest when the folder is
there: if that fails, the folder stays.
"""

import shlex
from pathlib import Path
from typing import Any

from compressor.errors import CheckpointError, CompressorError, ConfigError
from compressor.runtime.progress import Progress, silent

LEFT_OUT = ("timings.json",)  # names the host
# of an older version, which a reader would mix up with the new one
STALE = ("*.safetensors", "*.safetensors.index.json")


def check(repository: str | None, public: bool) -> None:
    """Refuse a push that cannot succeed, without a connection.

    Raises:
        ConfigError: it cannot.
    """
    if repository is None:
        if public:
            raise ConfigError(
                "--public says how a checkpoint is pushed; give --push-to REPOSITORY too"
            )
        return
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError:
        raise ConfigError(
            f"--push-to {repository}: is not a name on the hub; give organisation/model"
        ) from None
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(
            f"--push-to {repository}: HF_HUB_OFFLINE is set; unset it, or leave --push-to out"
        )
    if not get_token():
        raise ConfigError(
            f"--push-to {repository}: no token; set HF_TOKEN to one that may write, or log in "
            "with `hf auth login`"
        )


def push(
    folder: Path, repository: str, public: bool = False, progress: Progress = silent
) -> dict[str, Any]:
    """Upload a checkpoint folder, its model card included: {repository, url, private}.

    A repository that is there already keeps its visibility.

    Raises:
        CheckpointError: the hub refuses or cannot be reached, or the repository is public without
            `public`; the message has the command that tries again.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    api = HfApi()
    try:
        url = api.create_repo(repository, private=not public, exist_ok=True)
        name = url.repo_id
        private = bool(api.repo_info(name).private)
        if not (private or public):
            cure = f"choose another name, or make it public with {retry(folder, name, True)}"
            raise CheckpointError(
                f"{folder}: not pushed, because {name} is public on the hub and --public is not "
                f"given; {cure}"
            )
        for _ in progress([folder], f"push to {name}"):
            api.upload_folder(
                repo_id=name,
                folder_path=folder,
                commit_message=f"Upload {folder.name}, compressed",
                ignore_patterns=list(LEFT_OUT),
                delete_patterns=list(STALE),
            )
    except (OSError, HTTPError, ValueError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(
            f"{folder}: could not be pushed to {repository} ({reason}); try again with "
            f"{retry(folder, repository, public)}"
        ) from error
    return {"repository": name, "url": str(url), "private": private}


def deliver(
    folder: Path,
    repository: str | None,
    public: bool,
    failure: str | None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Push a checkpoint if a repository is given, unless the run failed.

    Returns:
        What pushing adds to the result of the run: `pushed`, and `failure` where there is one.
    """
    if repository is None:
        return {}
    if failure:
        return {
            "pushed": None,
            "failure": f"{failure}; not pushed, do so with {retry(folder, repository, public)}",
        }
    try:
        return {"pushed": push(folder, repository, public, progress)}
    except CompressorError as error:
        return {"pushed": None, "failure": str(error)}


def retry(folder: Path, repository: str, public: bool) -> str:
    """Write the command line that pushes a folder."""
    left_out = " ".join(f"--exclude {name}" for name in LEFT_OUT)
    return (
        f"`hf upload {shlex.quote(repository)} {shlex.quote(str(folder))} . "
        f"{left_out}{'' if public else ' --private'}`"
    )
