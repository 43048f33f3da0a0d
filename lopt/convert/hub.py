"""Weights from a Hugging Face hub repository, pinned to a commit."""

from __future__ import annotations

import re
from pathlib import Path

FILES = ["model.safetensors", "config.json", "theta.state"]


def download(repository: str, revision: str | None) -> Path:
    """Folder of the repository's weights at a commit. Raises ValueError if it is not pinned or cannot be had."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"lopt.convert: hub repository, got {repository!r}; valid: owner/name.")
    if revision is None or not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise ValueError(
            f"lopt.convert: revision, got {revision!r}; valid: a commit of 40 hex digits, for a hub source."
        )
    try:
        from huggingface_hub import snapshot_download  # pyrefly: ignore
    except ModuleNotFoundError as e:
        raise ValueError("lopt.convert: a hub source needs huggingface_hub: pip install 'lopt[hub]'.") from e
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=FILES))
    except Exception as e:  # the network, the account, the name: all the caller can do is read why
        raise ValueError(
            f"lopt.convert: {repository} at {revision[:12]} cannot be had: {type(e).__name__}: {e}."
        ) from e
