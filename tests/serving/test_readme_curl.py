"""The curl examples of the README, run as they stand against a server."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
(BLOCK,) = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = re.split(r"\n(?=curl )", BLOCK.strip())


def test_there_are_examples():
    assert len(COMMANDS) >= 4
    assert all(command.startswith("curl ") for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS, ids=range(len(COMMANDS)))
def test_a_curl_example_is_answered(served, command):
    words = shlex.split(command.replace("\\\n", " ").replace("http://localhost:8000", served.url))
    done = subprocess.run(
        [*words, "--silent", "--show-error", "--fail-with-body", "--max-time", "30"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    if "events" in command:
        assert all(json.loads(e[6:])["type"] == "stored" for e in done.stdout.split("\n\n") if e)
    elif '"stream": true' in command:
        assert done.stdout.endswith("data: [DONE]\n\n")
        assert '"usage"' in done.stdout
    else:
        assert "error" not in json.loads(done.stdout)
