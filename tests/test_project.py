"""The three files that say what to install agree with each other."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OWN_NAME = canonicalize_name(PROJECT["name"])


def declared() -> dict[str, Requirement]:
    """Every dependency of pyproject.toml, those of the extras included."""
    lines = [*PROJECT["dependencies"], *(line for extra in PROJECT["optional-dependencies"].values() for line in extra)]
    requirements = [Requirement(line) for line in lines]
    return {canonicalize_name(r.name): r for r in requirements if canonicalize_name(r.name) != OWN_NAME}


def pinned() -> dict[str, Requirement]:
    lines = (line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    requirements = [Requirement(line) for line in lines if line]
    return {canonicalize_name(r.name): r for r in requirements}


def conda_and_pip() -> tuple[dict[str, Requirement], list[str]]:
    """environment.yml: what conda and pip install by name, and pip's ``-e`` lines."""
    entries = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    by_pip = [line for entry in entries if isinstance(entry, dict) for line in entry["pip"]]
    by_name = [entry for entry in entries if isinstance(entry, str)] + [x for x in by_pip if not x.startswith("-e ")]
    requirements = [Requirement(line) for line in by_name]
    return {canonicalize_name(r.name): r for r in requirements}, [x for x in by_pip if x.startswith("-e ")]


def version_tested(requirement: Requirement) -> Version:
    """The version that requirements.txt pins, or the lower bound where it gives a range (triton)."""
    versions = {spec.operator: Version(spec.version) for spec in requirement.specifier}
    return versions["=="] if "==" in versions else versions[">="]


def test_every_declared_dependency_is_pinned_inside_its_range() -> None:
    pins = pinned()
    assert sorted(pins) == sorted(declared())
    for name, requirement in declared().items():
        assert requirement.specifier.contains(version_tested(pins[name])), f"{requirement} against {pins[name]}"
        assert requirement.marker == pins[name].marker, name


def test_every_pin_is_exact_except_triton_which_torch_chooses() -> None:
    loose = [name for name, pin in pinned().items() if {spec.operator for spec in pin.specifier} != {"=="}]
    assert loose == ["triton"]


def test_environment_yml_asks_for_what_pyproject_declares() -> None:
    named, editable = conda_and_pip()
    assert editable == ["-e .[all]"], "the package brings every dependency that environment.yml does not name"
    python = named.pop("python")
    named.pop("pip")
    for name, requirement in named.items():
        assert requirement.specifier == declared()[name].specifier, name
    assert {"torch", "triton", "transformers"} <= set(named)
    lowest = next(Version(spec.version) for spec in python.specifier if spec.operator == ">=")
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(lowest)


def test_the_extra_all_holds_every_other_extra() -> None:
    (everything,) = (Requirement(line) for line in PROJECT["optional-dependencies"]["all"])
    assert everything.extras == set(PROJECT["optional-dependencies"]) - {"all"}


@pytest.mark.parametrize("name", ["torch", "transformers", "triton"])
def test_the_supported_cuda_machine_fits_the_declared_ranges(name: str) -> None:
    cuda_machine = {"torch": "2.11.0", "transformers": "5.17.0", "triton": "3.6.0"}
    assert declared()[name].specifier.contains(cuda_machine[name])


def test_every_make_target_that_ci_and_the_readmes_name_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    command = re.compile(r"^(?:\$ )?make ([a-z]+)(?= *(?:#|<|$))|`make ([a-z]+)`", flags=re.MULTILINE)
    texts = [(ROOT / path).read_text() for path in (".ci/run", "README.md", "notebooks/README.md", "figures/README.md")]
    asked_for = {name for text in texts for match in command.findall(text) for name in match if name}
    assert {"test", "check", "demo"} <= asked_for <= targets


def test_the_wheel_has_the_files_that_are_not_python() -> None:
    """``py.typed``, with which type checkers believe the package's annotations, sources in C, the page and weights."""
    code = """
from setuptools import Distribution
distribution = Distribution()
distribution.parse_config_files()
build = distribution.get_command_obj("build_py")
build.ensure_finalized()
for package, folder, _, names in build.get_data_files_without_manifest():
    print(*(f"{folder}/{name}" for name in names), sep="\\n")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    packed = set(result.stdout.split())
    assert result.returncode == 0, result.stderr
    assert "paged_infer/py.typed" in packed
    kept = (path for path in (ROOT / "paged_infer").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert {str(path.relative_to(ROOT)) for path in kept if path.suffix not in (".py", ".md", ".so")} <= packed
