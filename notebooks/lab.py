"""JupyterLab on a copy of the course: ``python notebooks/lab.py [OPTIONS OF JUPYTERLAB]``, or ``make lab``.

The copy is ``notebooks/lab/``, which git ignores, so that reading, running and editing leave the repository as it is.
Each start copies what is missing in it, and replaces what is as it was copied by a newer version. A file that was
edited or run there is never written again: delete or rename it, and the next start copies the repository's. With
``--copy-only`` JupyterLab is not started.

``python notebooks/lab.py --add-to-path`` lets this Python import the course's modules (``from checks import ch01``)
wherever it starts, in the repository's root for example; ``make`` has done so in .venv.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LAB = HERE / "lab"
MANIFEST = ".copied.json"  # in the copy: what each file's content was when it was copied
TAKEN = (
    "*.ipynb",
    "GLOSSARY.md",
    "course.py",
    "course_*.py",
    "triton_lab.py",
    "checks/*.py",
    "drawing/*.py",
    "solutions/*.py",
    "my_engine/*.py",
    "diagrams/*.svg",
)
PATH_FILE = "paged_infer_course.pth"


def update(source: Path = HERE, copy: Path = LAB) -> list[str]:
    """Bring the copy up to date, except what was changed in it. -> Files that are newer in the repository than there.

    Raises:
        OSError: a file cannot be read or written. What was copied before is recorded, so that it can be run again.
    """
    manifest = copy / MANIFEST
    copied: dict[str, str] = json.loads(manifest.read_text("utf-8")) if manifest.is_file() else {}
    kept = []
    try:
        for name in files_of(source):
            new, place = (source / name).read_bytes(), copy / name
            old = digest(place.read_bytes()) if place.is_file() else None
            if old in (None, copied.get(name), digest(new)):
                if old != digest(new):
                    write(place, new)
                copied[name] = digest(new)
            elif copied.get(name) != digest(new):
                kept.append(name)
    finally:
        write(manifest, (json.dumps(copied, indent=1) + "\n").encode())
    return kept


def files_of(source: Path) -> Iterator[str]:
    for pattern in TAKEN:
        yield from (path.relative_to(source).as_posix() for path in sorted(source.glob(pattern)))


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write(place: Path, content: bytes) -> None:
    """Whole or not at all: an interrupted copy must not look like an edit."""
    place.parent.mkdir(parents=True, exist_ok=True)
    part = place.with_name(place.name + ".part")
    try:
        part.write_bytes(content)
        os.replace(part, place)
    finally:
        part.unlink(missing_ok=True)


def add_to_path(site_packages: Path | None = None) -> Path:
    """Let the Python that runs this import the course's modules from any folder. -> The file that does it."""
    place = (site_packages or Path(sysconfig.get_path("purelib"))) / PATH_FILE
    write(place, f"{HERE}\n".encode())
    return place


def main(options: list[str]) -> None:
    if "--add-to-path" in options:
        print(f"Python looks for the course's modules in {HERE}, because of {add_to_path()}")
        return
    kept = update()
    print(f"The notebooks are copied to {LAB.relative_to(ROOT)}/, where git ignores them.")
    for name in kept:
        print(f"  {name}: changed there, and the repository has a newer one. Delete or rename yours to get it.")
    if "--copy-only" in options:
        return
    if importlib.util.find_spec("jupyterlab") is None:
        sys.exit("JupyterLab is not installed: pip install -e '.[notebooks]' in the repository's root")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.getenv("PYTHONPATH"))))}
    command = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={LAB}", *options]
    sys.exit(subprocess.run(command, env=environment).returncode)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:  # JupyterLab has asked whether to stop, and has stopped
        sys.exit(0)
