"""What a run of steps leaves, in files that are whole whenever the run is killed: one tar, and a summary.

    OUT/<name>results.tar.gz             logs and figures of all steps; their outcomes as a table in summary.txt
    OUT/<name>summary.json               the outcome of each step, and which one is running
    OUT/previous-<name>results.tar.gz    the tar that was there before

Each is written to a temporary name that is then renamed: a reader finds the old file or the new one. With those of
``make gpu-first`` and its first.jsonl, OUT has at most eight files, one of which is the temporary one.
"""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import tarfile
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from paged_infer.bench.tables import plain_table

TAR_LIMIT_BYTES = 15 * 2**20  # where results are fetched from a machine, a file may be limited to 16 MiB
READ_LIMIT = 4  # a file of more than this many times the tar's limit is not even read; JSON becomes a tenth
LOG_START_BYTES, LOG_END_BYTES = 64 * 2**10, 2**20  # what is kept of a long log
PART = "unfinished.part"  # where a file gets its content before it gets its name
PRINTED_CHARACTERS, TAIL_LINES, TAIL_BYTES = 10_000, 25, 64 * 2**10
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
    """The results of steps, in ``out``, which is one run's at a time; steps write to ``work``, a temporary folder.

    Raises:
        ValueError: another run uses ``out``, or nothing can be written there.
    """

    def __init__(self, out: Path, title: str, prefix: str = "") -> None:
        self.steps: list[StepResult] = []
        self.title = title
        self.tar, self.summary = out / f"{prefix}results.tar.gz", out / f"{prefix}summary.json"
        self._has_warned = False
        try:
            out.mkdir(parents=True, exist_ok=True)
            self._lock = lock(out)
            self._temporary = tempfile.TemporaryDirectory(prefix="paged-infer-", ignore_cleanup_errors=True)
            self.work = Path(self._temporary.name)
            self.figures = self.work / "figures"
            for folder in (self.figures, self.work / "logs"):
                folder.mkdir()
            if self.tar.exists():
                self.tar.replace(out / f"previous-{self.tar.name}")
            self._write()
        except OSError as error:
            raise ValueError(f"OUT={out}: results cannot be written there: {error}") from error

    @property
    def have_failed(self) -> bool:
        return any(step.failed for step in self.steps)

    def save(self) -> None:
        """What cannot be written is not the end of the run: the first error is printed."""
        try:
            self._write()
        except OSError as error:
            if not self._has_warned:
                print(f"results cannot be saved: {error}", flush=True)
            self._has_warned = True

    def _write(self) -> None:
        """The tar first, so that it holds the files of every step that the summary calls finished."""
        (self.work / "summary.txt").write_text(self.table() + "\n", encoding="utf-8")
        packed, left_out = pack(self.work)
        replace_file(self.tar, packed)
        stored = {"title": self.title, "left_out": left_out, "steps": [asdict(step) for step in self.steps]}
        replace_file(self.summary, (json.dumps(stored, indent=1) + "\n").encode())

    def close(self, why: str) -> None:
        """Give an outcome to the steps that have none: the one that is running, and those that are waiting."""
        for step in self.steps:
            if step.outcome in (RUNNING, WAITING):
                step.outcome = why if step.outcome == RUNNING else f"not run: {why}"

    def remove_work(self) -> None:
        """Remove the temporary folder, once everything is in the tar, and let other runs use ``out``."""
        self._temporary.cleanup()
        os.close(self._lock)

    def table(self) -> str:
        rows = [(f"{step.name}: {step.outcome}", f"{step.seconds:.0f}", f"{step.limit_s:.0f}") for step in self.steps]
        return plain_table(self.title, ("step", "seconds", "limit"), rows)

    def printed(self) -> str:
        """The table, then the last lines of the log of each step that failed, in at most ``PRINTED_CHARACTERS``."""
        failed = [step for step in self.steps if step.failed and step.log]
        texts = [self.table()]
        left = PRINTED_CHARACTERS - len(texts[0])
        for number, step in enumerate(failed):
            head = f"\n--- {step.name}, {step.outcome}: the end of {step.log}\n"
            room = max(0, left // (len(failed) - number) - len(head) - 1)
            lines = [""]
            with suppress(OSError):
                lines = start_and_end(self.work / step.log, 0, TAIL_BYTES).decode(errors="replace").splitlines()
            tail = "\n".join(lines[-TAIL_LINES:])
            texts.append(head + tail[max(0, len(tail) - room) :])
            left -= len(texts[-1]) + 1
        return "\n".join(texts)[:PRINTED_CHARACTERS]


def pack(folder: Path, limit_bytes: int = TAR_LIMIT_BYTES) -> tuple[bytes, list[str]]:
    """The files below ``folder`` as a .tar.gz, the smallest first, and the names of those that ``limit_bytes`` leave
    out. Files may be written meanwhile: what each holds now is in the tar. Of a long log, its start and end are.
    """
    sizes: list[tuple[int, Path]] = []
    for path in folder.rglob("*"):
        with suppress(OSError):  # renamed or removed meanwhile
            if path.is_file() and path.suffix != ".part":
                most = LOG_START_BYTES + LOG_END_BYTES if path.suffix == ".log" else READ_LIMIT * limit_bytes + 1
                sizes.append((min(path.stat().st_size, most), path))
    packed, left_out = bytearray(), []
    for size, path in sorted(sizes):
        member = tarfile.TarInfo(path.relative_to(folder).as_posix())
        if size > READ_LIMIT * limit_bytes:
            left_out.append(member.name)
            continue
        with suppress(OSError):
            # Read whole first: a tar of a file whose size changes meanwhile cannot be read.
            is_log = path.suffix == ".log"
            content = start_and_end(path, LOG_START_BYTES, LOG_END_BYTES) if is_log else path.read_bytes()
            member.size, member.mtime = len(content), int(path.stat().st_mtime)
            # Each is compressed by itself, so that its compressed size is known before it is added.
            compressed = gzip.compress(member.tobuf() + content + bytes(-len(content) % tarfile.BLOCKSIZE), 6)
            if len(packed) + len(compressed) > limit_bytes:
                left_out.append(member.name)
            else:
                packed += compressed
    return bytes(packed) + gzip.compress(bytes(2 * tarfile.BLOCKSIZE)), left_out  # a tar ends with two empty blocks


def start_and_end(path: Path, start_bytes: int, end_bytes: int) -> bytes:
    """What a file holds; of a longer one its first and last bytes, and between them how many are left out."""
    with path.open("rb") as file:
        left_out = os.fstat(file.fileno()).st_size - start_bytes - end_bytes
        start = file.read(start_bytes)
        if left_out > 0:
            start += f"\n[{left_out} bytes left out]\n".encode()
            file.seek(start_bytes + left_out)
        return start + file.read(end_bytes)


def lock(folder: Path) -> int:
    """A descriptor that locks ``folder`` until it is closed, at the latest when this process ends.

    Raises:
        ValueError: another run has locked it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(f"OUT={folder}: another run writes its results there") from None
    except OSError:  # a network's file system may lock no folder
        pass
    return descriptor


def replace_file(path: Path, content: bytes) -> None:
    """Write ``path`` so that it is whole, as it was or as it becomes, whenever this process ends."""
    part = path.with_name(PART)
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
