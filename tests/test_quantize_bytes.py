"""``quantize`` writes the same bytes for the same seed, also in another process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from paged_infer import storyteller
from paged_infer.model.quant.post_training import METHODS
from paged_infer.quantize import SCHEMES, quantize

KINDS = [(scheme, method) for scheme in SCHEMES for method in METHODS]


def written(model: Path, folder: Path, *kinds: tuple[str, str], seed: int = 0) -> dict[str, bytes]:
    """The files of a folder for each kind, on few short texts."""
    text = folder / "text.txt"
    folder.mkdir()
    text.write_text("".join(storyteller.tell(number).text for number in range(3)))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("NUM_TEXTS", 3), ("TEXT_TOKENS", 24), ("NUM_SENSITIVITY_TEXTS", 1)):
            patch.setattr(f"paged_infer.quantize.{name}", value)
        for scheme, method in kinds:
            options = {
                "scheme": scheme,
                "method": method,
                "seed": seed,
                "group_size": 16 if scheme == "w4a16" else None,
            }
            if method != "rtn":
                options |= {"calibration": str(text), "keep_wide": 0.2}
            quantize(str(model), folder / f"{scheme}-{method}", **options)
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def write(model: str, folder: str) -> None:
    torch.set_num_threads(1)
    written(Path(model), Path(folder), *KINDS)


def test_another_process_with_the_same_seed_writes_the_same_bytes(text_checkpoint: Path, tmp_path: Path) -> None:
    """With every method and scheme, and other hashes of strings."""
    code = "import sys, test_quantize_bytes as own; own.write(*sys.argv[1:])"
    paths = os.pathsep.join((str(Path(__file__).parent), str(Path(__file__).parents[1])))
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": "1"}
    command = [sys.executable, "-c", code, str(text_checkpoint), str(tmp_path / "theirs")]
    with subprocess.Popen(command, env=environment) as other:
        ours = written(text_checkpoint, tmp_path / "ours", *KINDS)
    assert other.returncode == 0
    theirs = {str(path.relative_to(tmp_path / "theirs")): path for path in (tmp_path / "theirs").rglob("*")}
    assert ours.keys() == {name for name, path in theirs.items() if path.is_file()}
    assert [name for name, content in ours.items() if theirs[name].read_bytes() != content] == []
    assert len(ours) > 3 * len(KINDS)


def test_another_seed_calibrates_on_other_texts(text_checkpoint: Path, tmp_path: Path) -> None:
    for method in METHODS:
        first, second = (
            written(text_checkpoint, tmp_path / f"{method}-{seed}", ("w4a16", method), seed=seed) for seed in (0, 1)
        )
        changed = {name.rpartition("/")[2] for name, content in first.items() if second[name] != content}
        assert ("model.safetensors" in changed) == (method != "rtn")
