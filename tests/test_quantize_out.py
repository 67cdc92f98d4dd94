"""Where ``paged-infer quantize`` writes: a folder that appears when it is complete, or an error that leaves nothing."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from holding import LIMIT_S
from torch import Tensor

from paged_infer.quantize import quantize


def test_the_folder_may_be_the_current_one(checkpoint, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    quantize(str(checkpoint("qwen3")), Path("."), scheme="w8a16")
    assert {"config.json", "model.safetensors"} <= {file.name for file in tmp_path.iterdir()}


def test_a_folder_that_cannot_be_made_is_refused_before_the_work(checkpoint, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("paged_infer.quantize.load_decoder", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(OSError, match="file"):
        quantize(str(checkpoint("qwen3")), tmp_path / "file" / "out", scheme="w8a16")


@pytest.mark.parametrize("target", ["there", "not-there"])
def test_what_a_link_leads_to_is_made_and_the_link_is_kept(target: str, checkpoint, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link = tmp_path / "link"
    link.symlink_to(target)
    quantize(str(checkpoint("qwen3")), link, scheme="w8a16")
    assert link.is_symlink() and (tmp_path / target / "config.json").is_file()


def test_a_mount_point_is_refused_before_the_work(checkpoint, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("paged_infer.quantize.load_decoder", lambda *_, **__: pytest.fail("the model was loaded"))
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == tmp_path / "disk")
    (tmp_path / "disk").mkdir()
    with pytest.raises(ValueError, match="disk: is a mount point, which cannot be replaced: name a folder in it"):
        quantize(str(checkpoint("qwen3")), tmp_path / "disk", scheme="w8a16")


def test_a_full_disk_is_an_error_that_names_the_file_and_leaves_nothing(checkpoint, tmp_path: Path) -> None:
    """The full disk is simulated by a limit on the size of the process's files."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    model = str(checkpoint("qwen3"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=r"model\.safetensors: cannot be written"):
            quantize(model, tmp_path / "out", scheme="w8a16")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not any(tmp_path.iterdir())


def test_config_json_comes_last_so_that_nothing_half_written_is_a_checkpoint(tmp_path: Path, monkeypatch) -> None:
    def interrupted(path: Path, tensors: dict[str, Tensor]) -> None:
        names = {file.name for file in path.parent.iterdir()}
        assert "tokenizer.json" in names and "config.json" not in names
        raise KeyboardInterrupt

    monkeypatch.setattr("paged_infer.model.loading.save_quantised.write_tensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize("storyteller", tmp_path / "out", scheme="w8a16")
    assert not any(tmp_path.iterdir())


HELD = """
import sys
import threading
from paged_infer.model.loading import save_quantised

def write_tensors(path, tensors):
    path.touch()
    print("writing", flush=True)
    threading.Event().wait()

save_quantised.write_tensors = write_tensors
from paged_infer.cli import app
app(["quantize", *sys.argv[1:], "--scheme", "w8a16"])
"""


def test_sigterm_while_the_command_writes_leaves_nothing(checkpoint, tmp_path: Path) -> None:
    command = [sys.executable, "-c", HELD, str(checkpoint("qwen3")), str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        (draft,) = tmp_path.iterdir()
        assert draft.name.startswith("quantize-") and (draft / "out" / "model.safetensors").exists()
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=LIMIT_S)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 143 and "Traceback" not in errors
    assert not any(tmp_path.iterdir())
