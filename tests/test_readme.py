"""The documents say what is true: trees, commands, snippets and links."""

import ast
import re
import shlex
import subprocess
from pathlib import Path

import pytest

import kvjax
from kvjax.cli import COMMANDS, parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/architecture.md")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def tracked() -> list[Path]:
    """Paths that git knows or would know; the folder's own if this is no clone."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip("not a git clone")
    return [Path(p) for p in found.stdout.splitlines() if (ROOT / p).exists()]


def readme_tree() -> set[str]:
    """Paths of the annotated tree; folders end with a slash."""
    (tree,) = (block for block in blocks("text") if "pallas_kernels/" in block)
    paths: set[str] = set()
    folders: list[str] = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        folders[depth:] = [name]
        paths.add("".join(folders))
    return paths


def test_the_annotated_tree_is_the_tree():
    files = [p for p in tracked() if not (ROOT / p).is_symlink()]
    folders = {f"{parent}/" for p in files for parent in p.parents if parent != Path()}
    top = {str(p) for p in files if len(p.parts) == 1}
    engine = {str(p) for p in files if p.parent == Path("kvjax") and p.suffix == ".py"}
    assert readme_tree() == folders | top | engine


def test_every_command_line_is_understood():
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    seen = set()
    for line in lines:
        program, *words = shlex.split(line, comments=True)
        assert program == "kvjax"
        seen.add(words[0])
        if words[0] != "bench":
            parser().parse_args(words)
    assert seen == {*COMMANDS, "bench"}


def test_snippets_use_names_that_are_there():
    (snippet,) = blocks("python")
    tree = ast.parse(snippet)
    imported = {
        a.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for a in node.names
    }
    assert imported <= set(kvjax.__all__)
    called = set(re.findall(r"\bllm\.(\w+)\(", snippet))
    assert called == {"generate", "chat", "open", "run"}
    assert all(callable(getattr(kvjax.LLM, name)) for name in called)
    for name in re.findall(r"outs\[\d\]\.(\w+)", snippet):
        assert name in kvjax.RequestOutput.__dataclass_fields__


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_paths_lead_somewhere(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    folder = (ROOT / document).parent
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (folder / target).exists(), target
    for path in re.findall(
        r"`((?:kvjax|models|pallas_kernels|tests|examples|docs)/[\w/.]+\.\w+)`", text
    ):
        assert (ROOT / path).exists(), path


def test_the_make_targets_of_the_documents_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        named = set(re.findall(r"(?:`|^ {4})make ([\w-]+)", text, re.MULTILINE))
        assert named <= targets, document
