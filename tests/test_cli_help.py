"""Claims about help and names: each option's name is whole at 80 columns, and a model may be named in two ways."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

import paged_infer
from paged_infer.cli import app
from paged_infer.cli_options import RESULTS, Model, ModelName, with_option_groups

README = Path(__file__).resolve().parent.parent / "README.md"


def run(*arguments: str, **environment: str) -> Any:
    return CliRunner(env=environment).invoke(app, [*arguments])


def commands(command: Any, *words: str) -> dict[tuple[str, ...], Any]:
    """Every command and group, by the words that call it."""
    found = {words: command}
    for word, one in getattr(command, "commands", {}).items():
        found |= commands(one, *words, word)
    return found


ALL = commands(typer.main.get_command(app))


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_help_at_80_columns_has_every_name_whole_and_every_seed_explained(words: tuple[str, ...]) -> None:
    result = run(*words, "--help", COLUMNS="80", TERMINAL_WIDTH="80")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    shown = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", result.output))
    for parameter in ALL[words].params:
        named = {name for name in (*parameter.opts, *parameter.secondary_opts) if name.startswith("--")}
        assert named <= shown, words
        assert getattr(parameter, "help", None), (words, parameter.name)
    assert max(map(len, lines)) <= 80
    assert not [line for line in lines if re.search(r"--[\w-]*-$|…", line)], "a name is broken at the end of a line"


def test_each_seed_says_what_it_is_the_seed_of() -> None:
    helps = {words: one.help for words, found in ALL.items() for one in found.params if one.name == "seed"}
    assert len(helps) > 15
    of_a_text = {("generate",), ("chat",)}
    for words, text in helps.items():
        assert ("sampled text" in text) == (words in of_a_text), words
        assert re.search("text|prompt|request|length", text.lower()), words
    assert len(set(helps.values())) >= 8


def test_the_benchmarks_are_listed_in_the_front_pages_order() -> None:
    line = next(
        line for line in README.read_text("utf-8").splitlines() if line.startswith("$ paged-infer bench ladder")
    )
    wanted = ["ladder", *re.findall(r"\w+", line.split("# or ")[1])]
    shown = re.findall(r"^  (\w+)  ", run("bench", "--help").output, flags=re.MULTILINE)
    assert shown[: len(wanted)] == wanted and len(set(shown)) == len(shown)


@pytest.mark.parametrize("words", [words for words, one in ALL.items() if any(p.name == "model" for p in one.params)])
def test_a_model_is_an_argument_or_an_option_of_every_command(words: tuple[str, ...]) -> None:
    names = {one.name for one in ALL[words].params}
    assert "model_argument" in names or words in {("generate",), ("quantize",)}  # their arguments are several


def test_a_model_named_in_either_way_is_the_same_and_two_are_refused() -> None:
    taken: list[str | None] = []
    small = typer.Typer()

    @small.command()
    @with_option_groups
    def command(model: Model = None, other: Annotated[int, typer.Option()] = 0) -> None:
        taken.append(model)

    for arguments in ([], ["x"], ["--model", "x"], ["x", "--model", "x"]):
        assert CliRunner().invoke(small, arguments).exit_code == 0
    assert taken == [None, "x", "x", "x"]
    refused = CliRunner().invoke(small, ["x", "--model", "y"])
    assert refused.exit_code == 2 and refused.stderr == "error: --model 'y' and the argument 'x': give one of them\n"


def test_a_model_that_is_not_named_is_the_commands_own() -> None:
    taken: list[str | None] = []
    small = typer.Typer()

    @small.command()
    @with_option_groups
    def command(model: Annotated[str | None, ModelName("A shape.")] = "shape") -> None:
        taken.append(model)

    for arguments in ([], ["x"], ["--model", "x"]):
        assert CliRunner().invoke(small, arguments).exit_code == 0
    assert taken == ["shape", "x", "x"]


def test_the_first_of_several_prompts_may_be_the_model(llama_checkpoint) -> None:
    options = ("Once", "--temperature", "0", "--max-tokens", "3", "--num-blocks", "9")
    named = run("generate", *options, "--model", str(llama_checkpoint))
    first = run("generate", str(llama_checkpoint), *options)
    assert first.exit_code == 0 and first.output == named.output
    alone = run("generate", "storyteller", "--temperature", "0", "--max-tokens", "1")
    assert alone.output.startswith("storyteller"), "a single one is a prompt"


def test_quantize_takes_its_model_in_either_way(tmp_path) -> None:
    refused = run("quantize", "storyteller")
    assert refused.exit_code == 2 and "give MODEL and OUT" in refused.stderr
    assert run("quantize", "a", "b", "--model", "c").exit_code == 2
    words = [run("quantize", *words, "--scheme", "w8a16") for words in (
        ("storyteller", str(tmp_path / "a")), ("--model", "storyteller", str(tmp_path / "b")),
    )]  # fmt: skip
    assert [one.exit_code for one in words] == [0, 0] and words[0].output == words[1].output
    assert (tmp_path / "a" / "config.json").is_file() and (tmp_path / "b" / "config.json").is_file()


def test_version_is_the_packages() -> None:
    assert run("--version").output == f"paged-infer {paged_infer.__version__}\n"


def test_a_shell_completes_options() -> None:
    script = "import sys; sys.argv[0] = 'paged-infer'; from paged_infer.cli import app; app()"
    typed = {"COMP_WORDS": "paged-infer chat --tem", "COMP_CWORD": "2", "_PAGED_INFER_COMPLETE": "complete_bash"}
    found = subprocess.run([sys.executable, "-c", script], env=os.environ | typed, capture_output=True, text=True)
    assert found.stdout.split() == ["--temperature"], found.stderr


def test_python_m_runs_the_command_line() -> None:
    found = subprocess.run([sys.executable, "-m", "paged_infer", "--help"], capture_output=True, text=True)
    assert found.returncode == 0 and found.stdout.startswith("Usage: paged-infer [OPTIONS] COMMAND")


def test_what_a_command_writes_goes_to_a_folder_that_git_ignores() -> None:
    """README's pictures stand in figures/, and change only with --figures figures."""
    folders = {words: one.default for words, found in ALL.items() for one in found.params if one.name == "figures"}
    assert len(folders) > 15 and set(folders.values()) == {RESULTS}
    assert f"{RESULTS}/" in (README.parent / ".gitignore").read_text("utf-8").splitlines()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("serve", "--temperature", "0"), "--temperature (belongs to paged-infer chat or paged-infer generate"),
        (("generate", "Once", "--port=80"), "--port (belongs to paged-infer serve"),
        (("generate", "Once", "--max-new-tokens", "5"), "--max-new-tokens (did you mean --max-tokens?)"),
        (("bench", "ladder", "--max_num_seq", "5"), "--max_num_seq (did you mean --max-num-seqs?)"),
        (("--model", "x", "serve"), "--model (belongs to paged-infer serve or paged-infer chat or "),
        (("info", "--frobnicate"), "--frobnicate\n"),
    ],
)
def test_an_unknown_option_is_refused_with_the_one_or_the_command_that_may_be_meant(
    words: tuple[str, ...], message: str
) -> None:
    result = CliRunner().invoke(app, [*words], prog_name="paged-infer")
    assert result.exit_code == 2 and message in result.stderr
