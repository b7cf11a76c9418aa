"""Publishing a finished migration on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorasuite.adapters import CONFIG, WEIGHTS
from lorasuite.errors import ConfigError, OutputError, Problem, PushError
from lorasuite.reporting._files import RECORD
from lorasuite.reporting._record import MigrationRecord

#: What goes to the Hub. The record, the report and the samples quote training and held-out rows and local paths.
PUSHED = (WEIGHTS, CONFIG, "README.md")


def check_target(repo: str, new_base: str) -> None:
    """Find out before any work whether a push can succeed.

    Raises:
        ConfigError: with every problem: an invalid repository id, a base that the Hub does not know, no valid token.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    problems = []
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        problems.append(Problem("--push-to-hub", f"is no repository id ({error})", "Give owner/name."))
    if Path(new_base).exists():
        problems.append(
            Problem("--new-base", "is a directory, which nobody on the Hub could load", "Give the base by its Hub id.")
        )
    try:
        _api().whoami()
    except (OSError, ValueError, HfHubHTTPError) as error:
        what = f"the Hub knows no such user ({type(error).__name__})"
        problems.append(Problem("--push-to-hub", what, "Run `hf auth login`, or set HF_TOKEN, with write access."))
    if problems:
        raise ConfigError(problems)


def push(folder: Path, repo: str, *, private: bool = True) -> str:
    """Upload adapter, config and card of a published migration as one commit: all of it arrives, or nothing.

    Args:
        repo: ``owner/name``; created if it is not there.
        private: of a repository that is created.

    Returns:
        the commit's address.

    Raises:
        OutputError: if the directory is not complete.
        AdapterError: if the adapter in it is not the one that its record is of.
        PushError: if the Hub refuses; what is published locally stays.
    """
    from huggingface_hub.errors import HfHubHTTPError

    missing = [name for name in PUSHED if not (folder / name).is_file()]
    if missing:
        what = f"has no {', '.join(missing)}"
        raise OutputError(Problem(str(folder), what, "Give the output directory of a migration."))
    if (folder / RECORD).is_file():
        MigrationRecord.read(folder / RECORD).check_weights(folder / WEIGHTS)
    api = _api()
    try:
        api.create_repo(repo, private=private, exist_ok=True, repo_type="model")
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=list(PUSHED),
            commit_message="Adapter migrated by lorasuite",
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        what = f"could not be uploaded ({type(error).__name__}: {error})"
        raise PushError(
            Problem(repo, what, f"The adapter is in {folder}. Try again with `lorasuite push {folder} {repo}`.")
        ) from error
    return str(commit.commit_url)


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(library_name="lorasuite")
