"""Every README: its links, files, commands and options exist, and its Python runs as printed."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
import tomllib
import types
from pathlib import Path

import pytest
import typer

from paged_infer.cli import app
from paged_infer.kernels.attention_backends import ATTENTION_BACKENDS

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PACKAGE = ROOT / "paged_infer"
EXPERIMENTS = PACKAGE / "EXPERIMENTS.md"
READMES = [
    README,
    EXPERIMENTS,
    *(path for top in ("figures", "notebooks", "paged_infer") for path in (ROOT / top).rglob("README.md")),
]
ROOMS = sorted(path.name for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").is_file())
EACH_README = pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))

# Snippets that are compiled and whose imports are resolved, but that do not run here, and why.
NOT_RUN = {
    "OpenAI(": "asks a server",
    "litellm": "asks a server",
    "uvicorn.run(": "serves",
    "lm_eval.simple_evaluate(": "tests/server/test_evaluation_clients.py does the same",
    "from checks import": "has the reader's own function",
}


def fences(path: Path, *languages: str) -> list[str]:
    """The blocks of code in these languages; "" for blocks without one."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [text for language, text in blocks if language in languages]


def inline(path: Path) -> list[str]:
    """What stands between single backticks, outside blocks."""
    text = re.sub(r"^```.*?^```$", "", path.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"`([^`]+)`", text)


def anchors(path: Path) -> set[str]:
    """The names that GitHub gives to the headings."""
    headings = re.findall(r"^#+ (.+)$", path.read_text("utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(path: Path, program: str) -> list[list[str]]:
    """The arguments of each command line of ``program``, in blocks and in the text."""
    lines = [line[2:] for block in fences(path, "console") for line in block.splitlines() if line.startswith("$ ")]
    found = [text for text in (*lines, *inline(path)) if text.startswith(program + " ")]
    return [shlex.split(" ".join(text.split()), comments=True)[len(program.split()) :] for text in found]


def test_the_front_page_is_short():
    assert README.stat().st_size <= 12 * 1024


@EACH_README
def test_every_link_leads_to_a_file_and_to_a_heading_in_it(path):
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text("utf-8"))
    assert links
    for link in links:
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@EACH_README
def test_every_file_that_it_names_exists(path):
    words = re.findall(r"[\w./-]+", " ".join((*inline(path), *fences(path, ""))))
    bases = (path.parent, ROOT, PACKAGE)
    for word in words:
        if word.endswith((".py", ".c", ".html", ".cfg")) and "my_" not in word:
            assert any(base.joinpath(word).exists() for base in bases) or list(path.parent.rglob(word)), word
        elif word.split("/")[0] in ROOMS and "/" in word:
            spellings = (PACKAGE / word, PACKAGE / f"{word}.py")
            assert any(spelling.exists() for spelling in spellings) or (ROOT / word).exists(), word


@EACH_README
def test_every_command_of_paged_infer_parses_with_all_its_options(path):
    for arguments in commands(path, "paged-infer"):
        command, context, rest = typer.main.get_command(app), None, arguments
        while hasattr(command, "commands"):
            name, *rest = rest
            context = type(command).context_class(command, parent=context)
            assert name in command.commands, arguments
            command = command.commands[name]
        if rest != ["--help"]:
            command.make_context(name, rest, parent=context)  # checks them, and runs nothing


@EACH_README
def test_every_module_that_is_run_exists(path):
    for module, *_ in commands(path, "python -m"):
        assert importlib.util.find_spec(module) is not None, module


@pytest.fixture
def known_backends():
    """Those that a text registers are forgotten after it."""
    before = {**ATTENTION_BACKENDS}
    yield
    for name in ATTENTION_BACKENDS.keys() - before.keys():
        del ATTENTION_BACKENDS[name]


@EACH_README
@pytest.mark.usefixtures("known_backends")
def test_its_python_runs(path):
    for number, snippet in enumerate(fences(path, "python")):
        code = compile(snippet, f"{path.name}-{number}", "exec")
        if any(mark in snippet for mark in NOT_RUN):
            imports = re.findall(r"^((?:from|import) (\w+).*)$", snippet, flags=re.MULTILINE)
            lines = [line for line, module in imports if module != "checks" and importlib.util.find_spec(module)]
            code = compile("\n".join(lines), f"{path.name}-{number}", "exec")
        exec(code, {"__name__": "snippet"})


def test_each_experiment_is_short_and_checks_what_it_claims():
    """``test_its_python_runs`` runs them."""
    sections = re.split(r"^## ", EXPERIMENTS.read_text("utf-8"), flags=re.MULTILINE)[1:]
    assert len(sections) >= 9
    for section in sections:
        (code,) = re.findall(r"^```python\n(.*?)^```$", section, flags=re.DOTALL | re.MULTILINE)
        assert len([line for line in code.splitlines() if line.strip()]) <= 18, section[:40]
        assert re.search(r"^ *assert ", code, flags=re.MULTILINE), section[:40]


def test_the_attention_backend_of_the_front_page_gives_the_same_tokens(monkeypatch):
    from paged_infer import LLM, SamplingParams

    (source,) = (text for text in fences(README, "python") if "# my_kernel.py" in text)
    module = types.ModuleType("my_kernel")
    exec(source, module.__dict__)
    monkeypatch.setitem(sys.modules, "my_kernel", module)
    greedy = SamplingParams(temperature=0, max_tokens=12)
    mine, ours = (
        LLM(attention_backend=name).generate("Once upon a time", greedy, use_tqdm=False)[0].outputs[0].token_ids
        for name in ("my_kernel:attend", "torch")
    )
    assert mine == ours


def test_the_floors_are_those_of_the_contract():
    """As paged_infer/README.md draws them; folders that are still to come stand in brackets in the contract."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    wanted = [sorted(re.findall(r"(?<!\()\b\w+\b(?!\))", layer)) for layer in layers]
    (drawn,) = (text for text in fences(PACKAGE / "README.md", "") if text.startswith("cli\n"))
    assert [sorted(line.split()) for line in drawn.splitlines()] == wanted


def test_every_file_of_the_seven_rooms_is_on_their_map():
    (drawn,) = (text for text in fences(PACKAGE / "README.md", "") if text.startswith("engine/ "))
    parts = re.split(r"^(\w+)/ ", drawn, flags=re.MULTILINE)[1:]
    rooms = dict(zip(parts[::2], parts[1::2], strict=True))
    assert len(rooms) == 7
    for room, words in rooms.items():
        names = {path.stem for path in (PACKAGE / room).rglob("*.py")} - {"__init__"}
        assert names <= set(re.findall(r"\w+", words)), room


def test_the_rooms_are_all_on_both_maps():
    for path in (README, PACKAGE / "README.md"):
        text = path.read_text("utf-8")
        assert [room for room in ROOMS if f"{room}/" not in text] == [], path
