"""The upload of a result."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import filter_repo_objects

from lorainit_diffusers.training.options.checks import TrainOptions
from lorainit_diffusers.training.output_dir import directory_of, written_names


def open_hub_repository(options: TrainOptions) -> str | None:
    """Make the repository that `--push_to_hub` uploads to, before anything is trained; its full name.

    Raises:
        ValueError: When the hub refuses, or nobody is logged in.
    """
    if not options.push_to_hub or options.dry_run:
        return None
    name = options.hub_model_id or Path(options.output_dir).name
    private: dict[str, Any] = {"private": True} if options.hub_private else {}
    try:
        repository = huggingface_hub.create_repo(name, exist_ok=True, token=options.hub_token, **private).repo_id
        public = options.hub_private and _is_public(repository, options.hub_token)
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"--push_to_hub cannot make the repository {name!r} ({reason}); log in with `hf auth login`, "
            "set --hub_model_id owner/name, or leave it out"
        ) from error
    if public:
        raise ValueError(
            f"--hub_private: the repository {repository!r} exists and is public; make it private on the hub, or give "
            "another --hub_model_id"
        )
    return repository


def _is_public(repository: str, token: str | None) -> bool:
    """Whether a repository is known to be public: one that existed before keeps what it was."""
    try:
        return huggingface_hub.repo_info(repository, token=token).private is False
    except (HfHubHTTPError, OSError):
        return False


def upload(options: TrainOptions, repository: str, *, private_files: Sequence[str] = ()) -> None:
    """Upload the result: the files that this run wrote, without checkpoints, logs, class images and sample rows.

    Args:
        options: Of the run.
        repository: Full name.
        private_files: Patterns of files that hold images or texts of the user's data.

    Raises:
        ValueError: When the hub refuses; the result is in the output directory all the same.
    """
    if (directory := directory_of(str(options.output_dir))) is not None:
        directory.finish()
    hidden = [
        *("checkpoint-*/**", ".checkpoint-*/**", f"{options.logging_dir}/**", "class_images/**", "samples/**"),
        *private_files,
    ]
    names = filter_repo_objects(written_names(options.output_dir), ignore_patterns=hidden)
    try:
        huggingface_hub.upload_folder(
            repo_id=repository,
            folder_path=options.output_dir,
            token=options.hub_token,
            commit_message="LoRA and how it was made",
            allow_patterns=[glob.escape(name) for name in names],
            ignore_patterns=hidden,
        )
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"--push_to_hub cannot upload to {repository!r} ({reason}); the result is in {options.output_dir!r}, from "
            "where `hf upload` sends what you choose"
        ) from error
