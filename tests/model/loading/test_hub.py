"""resolve_model: a folder, a model in the hub cache, or one line with the reason why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects

from paged_infer.model.loading.hub import _FILES, _NOT_FILES, resolve_model


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The snapshot folder of owner/name in a hub cache of its own."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    (snapshot / "config.json").write_text("{}")
    return snapshot


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert resolve_model(tmp_path) == resolve_model(str(tmp_path)) == tmp_path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids that the hub itself, not the cache, was asked for; it refuses them all."""
    download, ids = huggingface_hub.snapshot_download, list[str]()

    def ask(name: str, local_files_only: bool = False, **options: Any) -> str:
        if local_files_only:
            return download(name, local_files_only=True, **options)
        ids.append(name)
        raise OSError("no route\nto the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", ask)
    return ids


def test_a_cached_model_needs_no_network(cached: Path, asked: list[str]) -> None:
    (cached / "model.safetensors").write_bytes(b"")
    assert resolve_model("owner/name") == cached and asked == []


def test_a_cached_model_with_an_index_left_over_needs_no_network(cached: Path, asked: list[str]) -> None:
    (cached / "model.safetensors").write_bytes(b"")
    (cached / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    assert resolve_model("owner/name") == cached and asked == []


@pytest.mark.parametrize("index", [None, {"a": "model-1.safetensors", "b": "model-2.safetensors"}])
def test_a_cache_that_holds_a_part_is_not_taken_for_the_model(index, cached: Path, asked: list[str]) -> None:
    """Only the tokenizer was ever loaded, or a download was broken off between two shards."""
    if index is not None:
        (cached / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        (cached / "model-1.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"'owner/name' is not a folder, and the hub cannot load it: no route$"):
        resolve_model("owner/name")
    assert asked == ["owner/name"]


@pytest.mark.parametrize("name", ["storyteller", "storyteller-moe", "storyteller-steps"])
def test_a_bundled_model_has_its_name_in_any_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    folder = resolve_model(name)
    assert (folder / "config.json").is_file() and resolve_model(folder) == folder
    assert resolve_model(f"./{name}") == Path(name)


@pytest.mark.parametrize("name", ["storyteler-moe", "no/such.gguf", "a name"])
def test_a_name_that_is_no_model_s_is_answered_with_those_that_are(name: str, asked: list[str]) -> None:
    with pytest.raises(ValueError, match="storyteller, storyteller-moe, storyteller-steps, smollm2"):
        resolve_model(name)


def test_weights_are_fetched_once_and_not_in_other_formats() -> None:
    wanted = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.json", "merges.txt", "chat_template.jinja"]
    others = ["consolidated.safetensors", "original/params.json", "onnx/model.safetensors", "pytorch_model.bin"]
    kept = filter_repo_objects(wanted + others, allow_patterns=_FILES, ignore_patterns=_NOT_FILES)
    assert list(kept) == wanted


def test_a_misspelt_name_of_a_bundled_model_is_refused_with_the_one_that_may_be_meant(asked: list[str]) -> None:
    with pytest.raises(ValueError, match=r"known here are storyteller, .*, smollm2 \(did you mean storyteller\?\)$"):
        resolve_model("stroyteller")
    with pytest.raises(ValueError, match=r"smollm2$"):
        resolve_model("gpt2")
