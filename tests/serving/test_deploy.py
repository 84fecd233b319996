"""What is in `deploy/`: every file, flag, extra and route that it names is there.

Where a tool can judge a file itself (`systemd-analyze`, a shell), it does.
"""

import configparser
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from kvjax.cli import layers, parser
from kvjax.serving.app import create_app
from kvjax.serving.config import ServeConfig
from kvjax.serving.service import Service

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
VARIANTS = ("cpu", "cuda", "tpu")


def instructions() -> list[tuple[str, str]]:
    """Instructions of the Dockerfile and their words, lines that go on joined."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines if line.strip()]


def of(name: str) -> list[str]:
    return [words for instruction, words in instructions() if instruction == name]


def served(words: list[str]) -> Any:
    """Arguments of `kvjax serve`, as the command itself reads them."""
    return layers.layered(parser().parse_args(words))


def test_the_image_copies_from_what_is_there():
    stages = [words.split(" AS ")[1] for words in of("FROM") if " AS " in words]
    for words in of("COPY"):
        *sources, _ = [word for word in words.split() if not word.startswith("--")]
        stage = re.search(r"--from=(\S+)", words)
        if stage is None:
            assert all((ROOT / source).exists() for source in sources), words
        else:
            assert stage[1] in stages
            assert sources == ["/opt/kvjax"]
    assert any("venv /opt/kvjax" in words for words in of("RUN"))
    for name in re.findall(r"-c (\S+)", " ".join(of("RUN"))):
        assert (ROOT / name).is_file()
        assert f"python:3.{name[len('constraints-py3') :].removesuffix('.txt')}-" in of("FROM")[0]


def test_what_the_image_leaves_out_is_nothing_that_is_tracked():
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    patterns = [line for line in ignored if line and not line.startswith("#")]
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=True
    )
    tops = {path.split("/")[0] for path in listed.stdout.splitlines()}
    for pattern in patterns:
        assert not [top for top in tops if Path(top).match(pattern)], pattern


@pytest.mark.parametrize("variant", [*VARIANTS, "gpu"])
def test_the_shell_of_the_image_installs_the_extras_of_each_variant_and_no_other(variant, tmp_path):
    (install,) = (words for words in of("RUN") if "pip install" in words)
    told = install.replace("/opt/kvjax/bin/pip", "echo")
    shell = subprocess.run(
        ["sh", "-c", told], env={"VARIANT": variant, "PATH": "/usr/bin:/bin"},
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert shell.returncode == (variant not in VARIANTS), shell.stdout
    if variant in VARIANTS:
        (extras,) = re.findall(r"\.\[(.*)\]", shell.stdout)
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert {*extras.split(",")} <= {*known["optional-dependencies"]}
        assert (variant in extras) == (variant != "cpu")


def test_the_image_runs_a_command_that_there_is():
    (entry,), (command,) = of("ENTRYPOINT"), of("CMD")
    name, *words = [*json.loads(entry), *json.loads(command)]
    assert name == "kvjax"
    args = served(words)
    assert args.host == "0.0.0.0"
    assert of("EXPOSE") == [str(args.port)]
    environment = of("ENV")[0]
    assert "PATH=/opt/kvjax/bin:" in environment
    (cache,) = re.findall(r"KVJAX_CACHE_DIR=(\S+)", environment)
    assert of("VOLUME") == [cache]
    assert any(f"chown kvjax {cache}" in words for words in of("RUN"))


def test_the_images_health_check_asks_a_route_that_there_is_and_fails_without_a_server():
    (check,) = of("HEALTHCHECK")
    python, flag, code = json.loads(check[check.index("[") :])
    assert (python, flag) == ("python", "-c")
    (path,) = re.findall(r"localhost:8000(/\w+)", code)
    app = create_app(Service(ServeConfig(), "tiny"))
    assert path in app.openapi()["paths"]
    code = code.replace("8000", "9")  # where nobody listens
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert failed.returncode == 1


def test_the_unit_runs_a_command_that_there_is_and_lets_it_drain():
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(DEPLOY / "kvjax.service")
    service = unit["Service"]
    program, *words = shlex.split(service["ExecStart"])
    assert Path(program).name == "kvjax"
    assert parser().parse_args(words).log_format == "json"
    assert float(service["TimeoutStopSec"]) > ServeConfig.drain_timeout
    assert service["Environment"] == f"KVJAX_CACHE_DIR=/var/cache/{service['CacheDirectory']}"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_systemd_has_nothing_to_say_about_the_unit(tmp_path):
    unit = (DEPLOY / "kvjax.service").read_text()
    copy = tmp_path / "kvjax.service"
    copy.write_text(unit.replace("/opt/kvjax/bin/kvjax", sys.executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, check=False
    )
    said = [line for line in (done.stdout + done.stderr).splitlines() if "kvjax.service" in line]
    assert (done.returncode, said) == (0, [])
