"""The page at `/ui`, in a real browser over a server that is at work."""

import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvjax.serving.replies import Occupancy
from tests.serving.live_server import Client, until

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), None)
ANIMALS = (("fox", "red and quick"), ("hen", "white and loud"), ("cat", "black and lazy"))
SHARED = "You are a helpful assistant who answers in few words. "


def browse(folder: Path, *words: str) -> str:
    """What the browser prints about a page that it was shown for four seconds of its time."""
    assert BROWSER is not None
    first = [
        BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}", "--window-size=1220,1000",
        "--virtual-time-budget=4000",
    ]  # fmt: skip
    done = subprocess.run([*first, *words], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


def keep(picture: Path) -> None:
    """A picture that is none is an error; others are kept for who wants to look at them."""
    assert picture.stat().st_size > 10_000
    if folder := os.environ.get("KVJAX_TEST_SCREENSHOTS"):
        shutil.copy(picture, Path(folder) / picture.name)


@pytest.fixture
def busy(served: Client) -> Iterator[Client]:
    """Two streams that share a cached beginning run until the test is over."""
    served.post("/v1/kv/reset", {})
    for question in ("Who?", "When and where?"):
        body = {"prompt": SHARED + question, "max_tokens": 8, "ignore_eos": True}
        served.post("/v1/completions", body)
    over = threading.Event()

    def ask(number: int) -> None:
        while not over.is_set():
            body = {"prompt": f"{SHARED}Number {number}?", "max_tokens": 180, "ignore_eos": True}
            served.post("/v1/completions", body)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    until(lambda: len(served.engine.scheduler.running) == 2)
    yield served
    over.set()
    for thread in threads:
        thread.join()


def test_occupancy_says_what_is_in_every_page(busy):
    status, state = busy.get("/v1/kv/occupancy")
    assert status == 200
    seen = Occupancy.model_validate(state)
    pages = seen.stats.pages
    assert len(seen.pages) == pages.total
    assert seen.pages.count("free") == pages.free
    assert seen.pages.count("cached") == pages.cached_only
    roots = [node for node in seen.nodes if node.parent == -1]
    assert [node.start for node in roots] == [0] * len(roots)
    for node in seen.nodes:
        assert node.parent == -1 or seen.nodes[node.parent].end == node.start
    assert any(SHARED[:20] in (node.text or "") for node in roots)
    for request in seen.requests:
        assert request.segments is not None
        assert request.reused >= len(SHARED)
        first = request.segments[0]
        assert (first.start, first.end, first.fate) == (0, request.reused, "exact")
        assert first.text.startswith(SHARED)
        assert request.segments[-1].end == request.prompt


@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
def test_a_browser_draws_pages_requests_and_the_tree(busy, tmp_path):
    drawn = browse(tmp_path, "--dump-dom", f"{busy.url}/ui")
    cells = drawn[drawn.index('id="pages"') : drawn.index('class="key"')]
    assert cells.count("<i ") == busy.engine.scheduler.pool.num_pages
    assert 'title="cached"' in cells
    assert re.search(r'title="(r\d|shared)"', cells)
    tree = drawn[drawn.index('<svg id="tree"') : drawn.index("</svg>")]
    assert tree.count("<rect") >= 3
    assert "You are a" in tree
    table = drawn[drawn.index('id="requests"') : drawn.index('id="prompt"')]
    assert table.count("<tr>") >= 1
    assert "hit rate" in drawn
    assert '<small id="error"></small>' in drawn
    picture = tmp_path / "ui.png"
    browse(tmp_path, f"--screenshot={picture}", f"{busy.url}/ui")
    keep(picture)


@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
def test_a_browser_colours_a_prompt_by_what_became_of_its_tokens(served, tmp_path):
    system, question = "You answer from what you are given. ", "What colour is the hen?"
    chunks = [{"type": "chunk", "text": f"The {a} is {c}. "} for a, c in ANIMALS]
    body = {"prompt": [system, *chunks, question], "max_tokens": 4, "reuse": "epic:k=5"}
    served.post("/v1/completions", {**body, "prompt": [system, chunks[0], question]})
    status, answer = served.post("/v1/completions", body)
    assert status == 200
    (told,) = served.get(f"/v1/kv/requests/{answer['id']}/reuse")[1]["prompts"]
    url = f"{served.url}/ui?request={answer['id']}"
    drawn = browse(tmp_path, "--dump-dom", url)
    picture = tmp_path / "reuse.png"
    browse(tmp_path, f"--screenshot={picture}", url)
    prompt = drawn[drawn.index('<div id="prompt"') : drawn.index('id="fates"')]
    marks = re.findall(r'background:var\(--(\w+)\)" title="[^"]*">([^<]*)<', prompt)
    assert marks == [(s["fate"], s["text"]) for s in told["segments"]]
    assert {"exact", "shifted", "recomputed", "computed"} <= {fate for fate, _ in marks}
    keep(picture)
    served.drop_chunks()
