"""Claims about what is printed: words are not broken, what cannot be coded is replaced, a full disk is one line."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from paged_infer import terminal
from paged_infer.bench.tables import parts_of, print_table
from paged_infer.terminal import CommandLine, Writer, run_command, show_stream


def written(pieces: list[str], width: int, capsys: Any) -> str:
    writer = Writer(width)
    for piece in pieces:
        writer.write(piece)
    writer.end()
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        (["one two", " thr", "ee four"], "one two\nthree four\n"),  # a word that grows is moved whole
        (["0123456789 a "], "0123456789\na \n"),  # the space after a full line begins no line
        (["0123456789abc d"], "0123456789abc d\n"),  # a word that fits no line is left to the terminal
        (["a\n", "\nb c"], "a\n\nb c\n"),
        (["猫と犬と鳥"], "猫と犬と鳥\n"),  # ten columns
        (["猫と犬と鳥と"], "猫と犬と鳥\nと\n"),  # and a line may break between two of these
    ],
)
def test_a_text_is_broken_between_words(pieces, shown, capsys):
    assert written(pieces, 10, capsys) == shown
    assert written(["".join(pieces)], 10, capsys) == shown, "however it grows"


def test_a_text_in_a_file_has_lines_of_any_length(capsys):
    words = "word " * 100
    writer = Writer()  # stdout is no terminal here
    writer.write(words)
    assert capsys.readouterr().out == words


def test_ctrl_c_ends_a_stream_and_keeps_its_text(capsys):
    def growing():
        for text in (" one", " one two"):
            yield SimpleNamespace(outputs=[SimpleNamespace(text=text)])
        raise KeyboardInterrupt

    output = show_stream(growing(), Writer(), keep_space=False, interruptible=True)
    assert output.outputs[0].text == " one two" and capsys.readouterr().out == "one two\n"
    with pytest.raises(KeyboardInterrupt):
        show_stream(growing(), Writer())


HEADER = ("policy", "tokens\n/s", "longest\nstall", "a-column-of-its-own", "another-column-of-its-own")
ROWS = [("prefill_first, delay 0.5", "1,234", "12", "x", "1.5"), ("chunked", "5", "3,456", "y", "-")]


@pytest.mark.parametrize("width", [55, 60, 80, 200])
def test_a_table_fits_the_terminal_and_breaks_no_name(width, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(width))
    print_table("a table", HEADER, ROWS)
    shown = re.sub(r"\x1b\[\d*m", "", capsys.readouterr().out)  # without colours
    words = {word for row in (HEADER, *ROWS) for cell in row for word in cell.split("\n")}
    assert max(map(len, shown.splitlines())) <= width
    assert all(word in shown for word in words)
    parts = parts_of(HEADER, ROWS, width)
    assert [column for part in parts for column in part[1:]] == [1, 2, 3, 4] and shown.count("chunked") == len(parts)


def failing(error: OSError) -> CommandLine:
    app = CommandLine()

    @app.command()
    def command() -> None:
        typer.echo("begun")
        raise error

    return app


def test_an_output_that_cannot_be_written_is_one_line_and_a_closed_pipe_none(capsys):
    for error, said in (
        (OSError(28, "No space left on device"), "error: [Errno 28] No space left on device\n"),
        (BrokenPipeError(32, "Broken pipe"), ""),
    ):
        with pytest.raises(SystemExit) as ended:
            failing(error)([])
        assert ended.value.code == 1 and capsys.readouterr().err == said


SCRIPT = """
import sys
from paged_infer.terminal import CommandLine, replace_what_cannot_be_coded
app = CommandLine()

@app.command()
def command() -> None:
    replace_what_cannot_be_coded()
    print("café", *range(int(sys.argv[1])))

app(args=[])
"""


def test_a_process_ends_quietly_on_a_full_disk_and_a_closed_pipe_and_replaces_what_a_terminal_lacks():
    command = [sys.executable, "-c", SCRIPT]
    with open("/dev/full", "w") as full:
        ended = subprocess.run([*command, "1"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (ended.returncode, ended.stderr) == (1, "error: [Errno 28] No space left on device\n")
    piped = f"{sys.executable} -c '{SCRIPT}' 100000 | head -c 4; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", piped], capture_output=True)
    assert (ended.returncode, ended.stdout[:3], ended.stderr) == (1, b"caf", b"")
    for encoding, word in (("ascii", b"caf?"), ("latin-1", b"caf\xe9"), ("utf-8", "café".encode())):
        ended = subprocess.run([*command, "1"], capture_output=True, env={"PYTHONIOENCODING": encoding})
        assert ended.stdout == word + b" 0\n", ended.stderr


@pytest.mark.parametrize("script", [False, True])
def test_sigterm_ends_a_command_with_its_temporary_files_and_the_status_that_shells_show(script, tmp_path, monkeypatch):
    def command() -> None:
        with tempfile.TemporaryDirectory(dir=tmp_path):
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL  # which would end the tests
            signal.raise_signal(signal.SIGTERM)

    app = CommandLine()
    app.command()(command)
    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(SystemExit) as ended:
        run_command(command) if script else app([])
    assert ended.value.code == 143 and not any(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_handler_of_sigterm_that_is_set_already_stays():
    app, seen = CommandLine(), []

    @app.command()
    def command() -> None:
        signal.raise_signal(signal.SIGTERM)
        seen.append("went on")

    usual = signal.signal(signal.SIGTERM, lambda *_: seen.append("came"))
    try:
        with pytest.raises(SystemExit) as ended:
            app([])
    finally:
        signal.signal(signal.SIGTERM, usual)
    assert seen == ["came", "went on"] and not ended.value.code


def test_every_script_of_the_package_is_run_as_a_command_that_sigterm_ends():
    package = Path(terminal.__file__).parent
    plain = [path for path in package.rglob("*.py") if "typer.run(" in path.read_text("utf-8")]
    assert plain == [package / "terminal.py"]
