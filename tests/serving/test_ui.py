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
SHARED = "You are a helpful assistant who answers in few words. "


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
        assert request.texts is not None
        assert request.reused >= len(SHARED)
        assert request.texts[0].startswith(SHARED)


@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
def test_a_browser_draws_pages_requests_and_the_tree(busy, tmp_path):
    assert BROWSER is not None
    picture = tmp_path / "ui.png"
    words = [
        BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1220,900",
        "--virtual-time-budget=4000",
    ]  # fmt: skip
    drawn = subprocess.run(
        [*words, "--dump-dom", f"{busy.url}/ui"],
        capture_output=True, text=True, timeout=60, check=True,
    ).stdout  # fmt: skip
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
    subprocess.run(
        [*words, f"--screenshot={picture}", f"{busy.url}/ui"],
        capture_output=True, timeout=60, check=True,
    )  # fmt: skip
    assert picture.stat().st_size > 10_000
    if folder := os.environ.get("KVJAX_TEST_SCREENSHOTS"):
        shutil.copy(picture, Path(folder) / "ui.png")
