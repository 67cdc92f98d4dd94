"""Resolve a model's name, a folder or a hub id, to a folder on disk."""

from __future__ import annotations

import re
from pathlib import Path

from paged_infer.model.loading.safetensors import weight_files

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
_NOT_FILES = ["*/*", "consolidated*.safetensors"]  # the same weights in other formats


def resolve_model(model: str | Path) -> Path:
    """A local folder, unchanged; or the folder of a hub id, from the local cache or else downloaded.

    Raises:
        ValueError: neither a folder nor an available hub id; one line with the reason.
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
    except Exception as error:  # the hub client raises a dozen types; users need one line
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"model {str(model)!r} is not a folder, and the hub cannot load it: {reason}") from None
