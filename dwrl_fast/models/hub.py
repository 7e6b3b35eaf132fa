"""The Hugging Face hub: uploads a trained model, and downloads one by its name."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

from dwrl_fast.errors import ConfigError, ModelError
from dwrl_fast.models.pretrained import CARD, has_card

FILES = ["*.safetensors", "*.json", "*.jinja"]  # only these are downloaded: no pickle and no code
NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # USER/NAME, or NAME for a few old repositories


def on_hub(name: str | Path) -> bool:
    """Whether `name` has the form of a hub repository and is not a local file or folder."""
    return NAME.fullmatch(str(name)) is not None and not Path(name).exists()


def judge_folder(name_or_path: str | Path, revision: str | None = None) -> Path:
    """The folder of a model that `dwrl_fast.train` wrote: the given folder, or a repository in the hub's cache,
    downloaded if it is missing there. revision: branch, tag or commit; None is main.

    Raises ModelError if the model cannot be downloaded or was not trained with this package, and ConfigError if a
    folder is given with a revision.
    """
    if not on_hub(name_or_path):
        if revision is not None:
            raise ConfigError(
                f"revision = {revision}: {name_or_path} is not a model of the hub. Leave the revision out."
            )
        return Path(name_or_path)
    name = str(name_or_path)
    folder = _fetched(name, revision, [CARD])
    if not has_card(folder):
        raise ModelError(
            f"{name} on the hub has no {CARD}, so dwrl_fast.train did not write it. dwrl_fast.evaluate can use any "
            'other causal language model with --method judge (in Python method="judge").'
        )
    return _fetched(name, folder.name, FILES)  # by commit, because the branch may move between the two downloads


def _fetched(name: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # of the network, the token, the disk
        raise ModelError(
            f"{name} is not a folder, and could not be downloaded from the hub: {error} Give the folder of a model, or "
            "a name on the hub. A private model needs a token (hf auth login, or HF_TOKEN)."
        ) from error


def check_account() -> str:
    """The user of the hub token. Raises ConfigError if there is no token, or if the hub rejects it."""
    from huggingface_hub import HfApi

    try:
        return str(HfApi().whoami()["name"])
    except Exception as error:  # of the network or the token
        raise ConfigError(
            f"--push_to_hub: {error} Log in with `hf auth login`, or set HF_TOKEN, with a token that may write. If "
            "the hub cannot be reached, leave --push_to_hub out and upload the model later with `hf upload`."
        ) from error


def claim(model_id: str | None, folder: Path, *, private: bool) -> str:
    """USER/NAME of the repository for the model of a run in `folder`. It is created if it is missing, so that a token
    without write access is detected before the run. Raises ConfigError if this fails.
    """
    from huggingface_hub import HfApi

    user = check_account()
    name = model_id or folder.absolute().name
    name = name if "/" in name else f"{user}/{name}"
    try:
        return str(HfApi().create_repo(name, private=private, exist_ok=True).repo_id)
    except Exception as error:  # of the network, the token or the name
        raise ConfigError(
            f"--push_to_hub: the repository {name} cannot be created: {error} Give another --hub_model_id, or "
            "a token that may write there."
        ) from error


def push(folder: Path, repository: str) -> str:
    """Upload the files of a model's folder to USER/NAME, and return the address of the commit. Raises ModelError if
    this fails, with the commands that upload them later.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    try:
        files = [
            CommitOperationAdd(
                path.relative_to(folder).as_posix(), _card_to_share(path) if path.name == CARD else str(path)
            )
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        ]
        sent: Any = HfApi().create_commit(repository, files, commit_message="Model of dwrl_fast")
    except Exception as error:  # of the network, the token, the hub
        raise ModelError(
            f"training is complete and the model is in {folder}, but it could not be uploaded to {repository}: {error} "
            f"To upload it later, run the same command with --output_dir {shlex.quote(str(folder.parent))} "
            f"--resume_from_checkpoint latest, or\n  hf upload {repository} {shlex.quote(str(folder))}"
        ) from error
    return str(sent.commit_url)


def _card_to_share(file: Path) -> bytes:
    """The content of a card, without a reference that is a file or folder of this machine."""
    card = json.loads(file.read_text(encoding="utf-8"))
    if not any(isinstance(name, str) and Path(name).is_absolute() for name in card.get("reference", {}).values()):
        return file.read_bytes()
    del card["reference"]
    return json.dumps(card, indent=2).encode()
