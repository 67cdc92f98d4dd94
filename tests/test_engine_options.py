"""The engine's options are the same everywhere: in ``EngineConfig``, for type checkers, in help() and on the command
line.
"""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
import typer
from holding import LIMIT_S
from typer.testing import CliRunner

from paged_infer import LLM, AsyncLLM
from paged_infer.cli import app
from paged_infer.cli_options import as_arguments, with_option_groups
from paged_infer.config import EngineConfig, EngineOptions
from paged_infer.execution.errors import EngineDeadError

ROOT = Path(__file__).resolve().parent.parent
FIELDS = {field.name: field for field in dataclasses.fields(EngineConfig)}
HINTS = {name: hint for name, hint in typing.get_type_hints(EngineConfig).items() if name in FIELDS}

OWN_SEED = {"seed"}  # the command's own --seed is the text's or the workload's
NO_RECORD = {"trace"}  # the record would end with the command
OMITTED = {
    "generate": OWN_SEED | NO_RECORD,
    "chat": OWN_SEED | NO_RECORD,
    "compare": OWN_SEED,
    "info": NO_RECORD,
    "eval": OWN_SEED | NO_RECORD,
    "serve": set(),
    "bench latency": OWN_SEED,
    "bench throughput": OWN_SEED,
    "bench load": OWN_SEED,
    "bench ladder": OWN_SEED,
    "bench step": OWN_SEED,
    "bench trace": OWN_SEED,
    "bench optimisations": OWN_SEED
    # what its engines differ in
    | {"attention_backend", "enforce_eager", "async_scheduling", "max_num_batched_tokens", "speculative_config"},
    "bench speculation": OWN_SEED | {"speculative_config", "async_scheduling"},  # what its engines differ in
    "bench serve": OWN_SEED | {"max_num_seqs"},  # as many as the most clients
    "bench sharing": OWN_SEED | {"enable_prefix_caching"},  # off: it would share, too
}
# No engine is opened, or one with the options that are compared: the experiment fixes the others.
WITHOUT_OPTIONS = {
    "bench kernels", "bench parallel", "bench peers", "bench quantisation", "bench memory", "bench control",
    "bench policies", "bench arrival", "bench simulate", "quantize",
}  # fmt: skip


def commands(command: Any, name: str = "") -> dict[str, Any]:
    """Every command below ``command``, by the words that call it."""
    if not hasattr(command, "commands"):
        return {name: command}
    below = [commands(one, f"{name} {word}".strip()) for word, one in command.commands.items()]
    return {name: one for found in below for name, one in found.items()}


ALL = commands(typer.main.get_command(app))


def test_each_command_has_its_options_from_the_config_or_opens_no_engine() -> None:
    assert ALL.keys() == OMITTED.keys() | WITHOUT_OPTIONS


@pytest.mark.parametrize("name", OMITTED)
def test_a_command_has_every_option_of_the_engine_with_its_default_and_its_help(name: str) -> None:
    parameters = {one.name: one for one in ALL[name].params}
    taken = FIELDS.keys() - OMITTED[name]
    assert taken <= parameters.keys()
    for option in taken:
        dashed = option.replace("_", "-")
        is_switch = bool in (HINTS[option], *typing.get_args(HINTS[option]))
        assert parameters[option].opts == [f"--{dashed}"]
        assert parameters[option].secondary_opts == ([f"--no-{dashed}"] if is_switch else [])
        assert parameters[option].default == FIELDS[option].default
        assert parameters[option].rich_help_panel.startswith("Engine") and len(parameters[option].help) > 20
    for option in OMITTED[name] & parameters.keys():  # the command's own
        assert parameters[option].rich_help_panel is None


def test_what_is_read_from_the_command_line_is_written_back_as_the_same_options() -> None:
    read = []

    @with_option_groups
    def command(engine: EngineConfig) -> None:
        read.append(engine)

    small = typer.Typer()
    small.command()(command)
    draft = {"method": "draft_model", "model": "some/folder", "num_speculative_tokens": 2}
    config = EngineConfig(
        block_size=8,
        gpu_memory_utilization=0.25,
        enable_prefix_caching=False,
        preemption_mode="swap",
        swap_space=0,
        enforce_eager=False,
        speculative_config=draft,
        trace=True,
    )
    result = CliRunner().invoke(small, as_arguments(config))
    assert result.exit_code == 0, result.output
    assert read == [config]
    assert as_arguments(EngineConfig()) == []
    assert EngineConfig.from_options(**config.options) == config


def test_a_command_whose_engine_dies_prints_one_line_and_fails() -> None:
    @with_option_groups
    def command(engine: EngineConfig) -> None:
        raise EngineDeadError("rank 1 was ended by SIGKILL")

    small = typer.Typer()
    small.command()(command)
    result = CliRunner().invoke(small, [])
    assert result.exit_code == 1 and result.output == "error: rank 1 was ended by SIGKILL\n"


def test_the_typed_options_are_the_fields_of_the_config() -> None:
    assert typing.get_type_hints(EngineOptions) == HINTS
    assert EngineOptions.__required_keys__ == frozenset()


@pytest.mark.parametrize("kind", [LLM, AsyncLLM])
def test_a_class_shows_the_options_in_its_signature(kind: type) -> None:
    shown = inspect.signature(kind).parameters
    options = {name: parameter for name, parameter in shown.items() if name in FIELDS}
    assert {name: parameter.default for name, parameter in options.items()} == {
        name: field.default for name, field in FIELDS.items()
    }
    assert "options" not in shown and next(iter(shown)) == "model"


def test_the_speculative_config_is_made_once() -> None:
    config = EngineConfig(speculative_config={"method": "ngram", "num_speculative_tokens": 3})
    assert config.speculation is config.speculation is config.speculative_config
    assert dataclasses.replace(config, block_size=8).speculation is config.speculation


SNIPPET = """
from pathlib import Path
from paged_infer import LLM, AsyncLLM, SamplingParams
from paged_infer.config import EngineConfig
from paged_infer.engine.engine import LLMEngine

LLM(block_size=8, num_blocks=None, speculative_config={"method": "ngram", "num_speculative_tokens": 2})
AsyncLLM("folder", max_num_waiting=3, enforce_eager=True)
LLMEngine(Path("folder"), EngineConfig(seed=3))
SamplingParams(max_tokens=3)
LLM(blok_size=8)
AsyncLLM(blok_size=8)
LLM(block_size="8")
AsyncLLM(trace=None)
LLMEngine(Path("folder"), EngineConfig(blok_size=8))
SamplingParams(max_tokens="3")
"""
# Only what the signatures are made of: to read the whole package takes ten times as long.
MYPY = """
[mypy]
follow_imports = skip
[mypy-paged_infer,paged_infer.llm,paged_infer.async_llm,paged_infer.engine.engine,paged_infer.config,paged_infer.params]
follow_imports = silent
[mypy-paged_infer.control.policies,paged_infer.control.speculation,paged_infer.suggestions,paged_infer.values]
follow_imports = silent
"""


def test_a_type_checker_finds_misspelt_options_and_wrong_types(tmp_path: Path) -> None:
    snippet, settings = tmp_path / "snippet.py", tmp_path / "mypy.ini"
    snippet.write_text(SNIPPET)
    settings.write_text(MYPY)
    command = [sys.executable, "-m", "mypy", "--config-file", settings, "--cache-dir", tmp_path / "cache", snippet]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=LIMIT_S)
    assert result.returncode == 1, result.stdout + result.stderr
    lines = SNIPPET.splitlines()
    wrong = {lines[int(line.split(":")[1]) - 1] for line in result.stdout.splitlines() if ": error:" in line}
    assert wrong == set(lines[lines.index("LLM(blok_size=8)") :])


def test_the_help_of_the_command_line_imports_nothing_heavy() -> None:
    code = """
import sys
from paged_infer.cli import app
for arguments in ([], ["generate"], ["bench"], ["bench", "throughput"]):
    try:
        app([*arguments, "--help"])
    except SystemExit as end:
        assert not end.code
print({"torch", "numpy", "transformers", "fastapi", "matplotlib"} & sys.modules.keys(), file=sys.stderr)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=LIMIT_S)
    assert (result.returncode, result.stderr) == (0, "set()\n"), result.stderr
