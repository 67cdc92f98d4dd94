"""/v1/models: a model has the name that the user gave."""

from __future__ import annotations

from pathlib import Path

import pytest
from serving import error_of, serving

from paged_infer import LLM
from paged_infer.server.service import Settings


def snapshot_of(folder: Path, tmp_path: Path) -> Path:
    """A hub model's files, in a folder that is named after a commit, as the hub's cache has them."""
    snapshot = tmp_path / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.parent.mkdir()
    snapshot.symlink_to(folder, target_is_directory=True)
    return snapshot


def test_a_hub_model_is_served_under_the_id_that_was_typed(
    text_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = snapshot_of(text_checkpoint, tmp_path)
    monkeypatch.setattr("paged_infer.engine.engine.resolve_model", lambda model: snapshot)
    with serving(model="owner/name", num_blocks=32) as served:
        assert [one.id for one in served.openai().models.list()] == ["owner/name"]
        answer = served.complete(model="owner/name", prompt="a", max_tokens=1)
        assert answer["model"] == "owner/name"
        assert served.http.get("/v1/models/owner/name").json()["id"] == "owner/name"
        error_of(served.post("/v1/completions", model=snapshot.name, prompt="a"), 404)


@pytest.mark.parametrize("typed", [".", "./", "../{name}", "{folder}", "{folder}/"])
def test_a_folder_is_served_under_its_name(text_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, typed: str) -> None:
    monkeypatch.chdir(text_checkpoint)
    typed = typed.format(name=text_checkpoint.name, folder=text_checkpoint)
    assert LLM(typed, device="cpu", num_blocks=32).name == text_checkpoint.name != ""


def test_a_name_that_is_empty_is_refused() -> None:
    with pytest.raises(ValueError, match="served_model_names='': a name must not be empty"):
        Settings(served_model_names=("a", ""))
