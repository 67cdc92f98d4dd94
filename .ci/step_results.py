"""What a run of steps leaves, in files that are whole whenever the run is killed: one tar, and a summary.

    OUT/<name>results.tar.gz    logs and figures of all steps
    OUT/<name>summary.json      the outcome of each step, and which one is running; as a table in .txt

Each is written to a temporary name that is then renamed: a reader finds the old file or the new one.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from paged_infer.bench.tables import plain_table

TAR_LIMIT_BYTES = 15 * 2**20  # where results are fetched from a machine, a file may be limited to 16 MiB
PART = "unfinished.part"  # where a file gets its content before it gets its name
PRINTED_CHARACTERS, TAIL_LINES = 10_000, 25
WAITING, RUNNING, OK, SKIPPED = "waiting", "running", "ok", "skipped: "


@dataclass(slots=True)
class StepResult:
    name: str
    outcome: str = WAITING  # then "running", then "ok", "skipped: <why>", or what went wrong
    seconds: float = 0.0
    limit_s: float = 0.0
    log: str = ""  # its path in the tar; empty if it did not run

    @property
    def failed(self) -> bool:
        return self.outcome != OK and not self.outcome.startswith(SKIPPED)


class Results:
    """The results of steps, in ``out``; steps write to ``work``, a temporary folder."""

    def __init__(self, out: Path, title: str, prefix: str = "") -> None:
        self.steps: list[StepResult] = []
        self.tar, self.summary = out / f"{prefix}results.tar.gz", out / f"{prefix}summary.json"
        self.work = Path(tempfile.mkdtemp(prefix="paged-infer-"))
        self.figures = self.work / "figures"
        self._title = title
        for folder in (out, self.figures, self.work / "logs"):
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def have_failed(self) -> bool:
        return any(step.failed for step in self.steps)

    def save(self) -> None:
        """The tar first, so that it holds the files of every step that the summary calls finished."""
        packed, left_out = pack(self.work)
        replace_file(self.tar, packed)
        stored = {"title": self._title, "left_out": left_out, "steps": [asdict(step) for step in self.steps]}
        replace_file(self.summary, (json.dumps(stored, indent=1) + "\n").encode())
        replace_file(self.summary.with_suffix(".txt"), (self.table() + "\n").encode())

    def close(self, why: str) -> None:
        """Give an outcome to the steps that have none: the one that is running, and those that are waiting."""
        for step in self.steps:
            if step.outcome in (RUNNING, WAITING):
                step.outcome = why if step.outcome == RUNNING else f"not run: {why}"

    def remove_work(self) -> None:
        """Remove the temporary folder, once everything is in the tar."""
        shutil.rmtree(self.work, ignore_errors=True)

    def table(self) -> str:
        rows = [(f"{step.name}: {step.outcome}", f"{step.seconds:.0f}", f"{step.limit_s:.0f}") for step in self.steps]
        return plain_table(self._title, ("step", "seconds", "limit"), rows)

    def printed(self) -> str:
        """The table, then the last lines of the log of each step that failed, in at most ``PRINTED_CHARACTERS``."""
        failed = [step for step in self.steps if step.failed and step.log]
        texts = [self.table()]
        left = PRINTED_CHARACTERS - len(texts[0])
        for number, step in enumerate(failed):
            head = f"\n--- {step.name}, {step.outcome}: the end of {step.log}\n"
            room = max(0, left // (len(failed) - number) - len(head) - 1)
            lines = (self.work / step.log).read_text(encoding="utf-8", errors="replace").splitlines()
            tail = "\n".join(lines[-TAIL_LINES:])
            texts.append(head + tail[max(0, len(tail) - room) :])
            left -= len(texts[-1]) + 1
        return "\n".join(texts)[:PRINTED_CHARACTERS]


def pack(folder: Path, limit_bytes: int = TAR_LIMIT_BYTES) -> tuple[bytes, list[str]]:
    """The files below ``folder`` as a .tar.gz, the smallest first, and the names of those that ``limit_bytes`` leave
    out. Files may be written meanwhile: what each holds now is in the tar.
    """
    contents: list[tuple[str, bytes, float]] = []
    for path in sorted(folder.rglob("*")):
        with suppress(OSError):  # renamed or removed meanwhile
            if path.is_file() and path.suffix != ".part":
                # Read whole first: a tar of a file whose size changes meanwhile cannot be read.
                contents.append((path.relative_to(folder).as_posix(), path.read_bytes(), path.stat().st_mtime))
    packed, left_out = io.BytesIO(), []
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=6) as tar:
        for name, content, modified_s in sorted(contents, key=lambda one: len(one[1])):
            if packed.tell() + len(content) > limit_bytes:
                left_out.append(name)
                continue
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(content), int(modified_s)
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue(), left_out


def replace_file(path: Path, content: bytes) -> None:
    """Write ``path`` so that it is whole, as it was or as it becomes, whenever this process ends."""
    part = path.with_name(PART)
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
