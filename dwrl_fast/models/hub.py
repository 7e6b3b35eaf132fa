"""The Hugging Face hub: a trained model is sent there, and loaded from there by its name."""

import re
import shlex
from pathlib import Path
from typing import Any

from dwrl_fast.errors import ConfigError, ModelError
from dwrl_fast.models.pretrained import CARD, has_card

FILES = ["*.safetensors", "*.json", "*.jinja"]  # all that is fetched: no pickle and no code
NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # USER/NAME, or NAME of a few old ones


def on_hub(name: str | Path) -> bool:
    """Whether `name` can only be that of a repository of the hub: nothing here has it."""
    return NAME.fullmatch(str(name)) is not None and not Path(name).exists()


def judge_folder(name_or_path: str | Path, revision: str | None = None) -> Path:
    """The folder of a model that `dwrl_fast.train` wrote: the one that is named, or that of a repository in the hub's
    cache, fetched where it is not there. revision: its branch, tag or commit; None is main.

    ModelError where it cannot be fetched or was not trained here, ConfigError where a folder is given a revision.
    """
    if not on_hub(name_or_path):
        if revision is not None:
            raise ConfigError(f"revision = {revision}: {name_or_path} is no model of the hub. Leave the revision out.")
        return Path(name_or_path)
    name = str(name_or_path)
    folder = _fetched(name, revision, [CARD])
    if not has_card(folder):
        raise ModelError(
            f"{name} on the hub has no {CARD}, so dwrl_fast.train did not write it. dwrl_fast.evaluate can ask any "
            'other causal language model, by --method judge (in Python method="judge").'
        )
    return _fetched(name, folder.name, FILES)  # by its commit: the branch may move on between the two


def _fetched(name: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # of the network, the token, the disk
        raise ModelError(
            f"{name} is no folder here, and could not be fetched from the hub: {error} Give the folder of a model, or "
            "a name on the hub; a private model needs a token (hf auth login, or HF_TOKEN)."
        ) from error


def check_account() -> str:
    """The user whose token is set up for the hub. ConfigError where there is none, or the hub does not take it."""
    from huggingface_hub import HfApi

    try:
        return str(HfApi().whoami()["name"])
    except Exception as error:  # of the network or the token
        raise ConfigError(
            f"--push_to_hub: {error} Log in by `hf auth login`, or set HF_TOKEN, to a token that may write; where the "
            "hub cannot be reached, leave --push_to_hub out and send the model later by `hf upload`."
        ) from error


def claim(model_id: str | None, folder: Path, *, private: bool) -> str:
    """USER/NAME of the repository that the model of a run in `folder` will be sent to; it is made where it is missing,
    so that a token that may not write is known before the run. ConfigError where it cannot be.
    """
    from huggingface_hub import HfApi

    user = check_account()
    name = model_id or folder.absolute().name
    name = name if "/" in name else f"{user}/{name}"
    try:
        return str(HfApi().create_repo(name, private=private, exist_ok=True).repo_id)
    except Exception as error:  # of the network, the token or the name
        raise ConfigError(
            f"--push_to_hub: the repository {name} cannot be made: {error} Give another name by --hub_model_id, or a "
            "token that may write there."
        ) from error


def push(folder: Path, repository: str) -> str:
    """Send the files of a model's folder to USER/NAME; the address of the commit. ModelError where that fails, with the
    command that sends them later.
    """
    from huggingface_hub import HfApi

    try:
        sent: Any = HfApi().upload_folder(repo_id=repository, folder_path=folder, commit_message="Model of dwrl_fast")
    except Exception as error:  # of the network, the token, the hub
        raise ModelError(
            f"the run is over and its model is in {folder}, but it could not be sent to {repository}: {error} Send it "
            f"later by\n  hf upload {repository} {shlex.quote(str(folder))}"
        ) from error
    return str(sent.commit_url)
