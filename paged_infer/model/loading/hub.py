"""From what a user calls a model to a folder on disk."""

from __future__ import annotations

import re
from pathlib import Path

from paged_infer.model.loading.safetensors import weight_files

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
_NOT_FILES = ["*/*", "consolidated*.safetensors"]  # the same weights in other formats


def resolve_model(model: str | Path) -> Path:
    """A local folder as it is; else a hub id, from the local hub cache or, if it is not there, downloaded.

    Raises:
        ValueError: neither a folder nor a hub id that can be had; one line that says why.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if not _HUB_ID.fullmatch(str(model)):
        raise ValueError(f"model {str(model)!r} is neither a folder nor a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(str(model), local_files_only=True))
        weight_files(folder)
        return folder
    except Exception:  # not cached, or in part (a tokenizer alone, a broken download): the hub is asked below
        pass
    try:
        return Path(snapshot_download(str(model), allow_patterns=_FILES, ignore_patterns=_NOT_FILES, etag_timeout=5))
    except Exception as error:  # the hub client raises a dozen kinds; a user needs one line
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"model {str(model)!r} is no folder here, and the hub did not give it: {reason}") from None
