"""What holds for the repository as a whole."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import kvjax
from kvjax.config import EngineConfig

ROOT = Path(__file__).parent.parent
LINKED = ("models", "pallas_kernels", "benchmarks", "serving")
CODE = ("kvjax", *LINKED, "tests", "examples")


def sources() -> list[Path]:
    found = [p for name in CODE for p in sorted((ROOT / name).rglob("*.py"))]
    return [p for p in found if not any(parent.is_symlink() for parent in p.parents)]


@pytest.mark.parametrize("name", LINKED)
def test_folders_are_real_at_the_top_and_links_in_the_package(name):
    link = ROOT / "kvjax" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name
    assert (link / "__init__.py").is_file()


def test_modules_have_one_identity():
    bare = re.compile(rf"^\s*(?:from|import) (?:{'|'.join(LINKED)})\b", re.MULTILINE)
    relative = re.compile(r"^\s*from \.", re.MULTILINE)
    for path in sources():
        text = path.read_text(encoding="utf-8")
        assert not bare.search(text), path
        assert not relative.search(text), path


def test_files_stay_short_and_say_what_they_are_for():
    for path in sources():
        text = path.read_text(encoding="utf-8")
        if path.is_relative_to(ROOT / "tests") or not text:
            continue
        assert len(text.splitlines()) < 500, path
        assert text.startswith('"""'), path
        assert path.stem not in {"utils", "common", "base", "manager", "helpers"}, path


def test_only_the_configuration_reads_the_environment():
    readers = {
        path.relative_to(ROOT).as_posix()
        for path in sources()
        if path.parts[len(ROOT.parts)] in ("kvjax", "models", "pallas_kernels", "serving")
        and re.search(r"os\.environ|getenv", path.read_text(encoding="utf-8"))
    }
    assert readers == {"kvjax/config.py"}


@pytest.mark.parametrize("version", ["311", "312"])
def test_constraints_pin_names_and_versions_and_nothing_else(version):
    lines = (ROOT / f"constraints-py{version}.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines)
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.]+", line) for line in lines)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = list(project["project"]["dependencies"])
    wanted += project["project"]["optional-dependencies"]["serve"]
    for group in project["dependency-groups"].values():
        wanted += group
    normal = {re.sub(r"[-_.]+", "-", name).lower() for name in pins}
    python = {"python_version": f"{version[0]}.{version[1:]}"}
    for requirement in map(Requirement, wanted):
        if requirement.marker is not None and not requirement.marker.evaluate(python):
            continue
        name = requirement.name
        assert re.sub(r"[-_.]+", "-", name).lower() in normal, requirement


def test_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == kvjax.__version__
    assert project["scripts"] == {"kvjax": "kvjax.cli:main"}


def test_the_defaults_are_a_valid_configuration():
    assert EngineConfig().dtype in ("float32", "bfloat16", "int8")
