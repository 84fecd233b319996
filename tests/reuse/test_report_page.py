"""The drawing of a report says what the report says, and nothing in it comes from elsewhere."""

import html.parser
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvjax.reuse.report import Fate, ReuseReport
from kvjax.reuse.report_page import Drawing, html_page, mean_deviation, text_page

FATES = np.array([[0, 0, 1, 2, 3, 4], [0, 0, 1, 1, 1, 4]], np.int8)
REPORT = ReuseReport("cacheblend:ratio=0.2", ((0, 2), (2, 3)), FATES, 3, 9, estimated_loss=0.0123)
TOKENS = ("Be", " terse", "<b>", "&amp;", '"x"\n', "?")


class Reader(html.parser.HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.prompts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if dict(attrs).get("class") == "prompt":
            self.prompts.append("")
        if tag in ("div", "i", "span"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in ("div", "i", "span"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.prompts and self.open:
            self.prompts[-1] += data


def drawing(tokens=TOKENS, deviation=None, report=REPORT) -> Drawing:
    return Drawing("some model", report, tokens, ((2, 4), (4, 5)), deviation)


@given(st.lists(st.text(max_size=6), min_size=6, max_size=6))
def test_whatever_the_tokens_are_the_page_shows_them_and_they_never_become_markup(tokens):
    page = Reader(html_page(drawing(tuple(tokens))))
    plain = Reader(html_page(drawing(("",) * 6)))
    newlines = sum(token.count("\n") for token in tokens)
    assert len(page.tags) == len(plain.tags) + 2 * newlines  # a mark for each, in each group
    # Parsers of HTML read every line end as one, and drop what no text can hold.
    shown, text = page.prompts[0].replace("\u21b5\n", "\n"), "".join(tokens)
    assert shown.rstrip("\n") == text.rstrip("\n") or "\r" in text


def test_every_token_has_the_class_of_its_fate_in_every_layer_group():
    page = Reader(html_page(drawing()))
    classes = [attrs["class"] for tag, attrs in page.tags if tag == "i"]
    assert classes == [Fate(int(f)).name.lower() for f in FATES.ravel()]
    assert len(page.prompts) == 2
    assert sum(attrs.get("class") == "chunk" for _, attrs in page.tags) == 1 + 2 * 2


def test_the_page_has_no_script_and_asks_nothing_of_a_network():
    page = Reader(html_page(drawing(deviation=np.ones((3, 6)))))
    assert {"script", "link", "img", "iframe"}.isdisjoint(tag for tag, _ in page.tags)
    for _, attrs in page.tags:
        assert {"src", "href"}.isdisjoint(attrs)
        assert not any(name.startswith("on") for name in attrs)
    assert "url(" not in html_page(drawing())
    assert "http" not in html_page(drawing())


def test_names_from_outside_are_escaped():
    odd = ReuseReport("<script>x</script>", ((0, 3),), FATES[:1], 0, 3)
    page = html_page(Drawing("<img src=x>", odd, TOKENS))
    assert "<script" not in page
    assert "<img" not in page


def test_counts_and_deviations_are_those_of_the_report():
    deviation = np.arange(18, dtype=np.float64).reshape(3, 6) / 100
    drawn = drawing(deviation=deviation)
    assert mean_deviation(drawn, 0, Fate.EXACT) == pytest.approx(deviation[:2, :2].mean())
    assert mean_deviation(drawn, 1, Fate.SHIFTED) == pytest.approx(deviation[2, 2:5].mean())
    assert mean_deviation(drawn, 1, Fate.PATCHED) is None
    page = html_page(drawn)
    assert re.search(r"layers 0 to 1<td>2<td>1<td>1<td>1<td>1", page)
    assert re.search(r"layer 2<td>2<td>3<td>0<td>0<td>1", page)
    assert 'title="token 3: patched, KV deviation 0.06"' in page
    assert "0.0123 nats per token" in page


def test_text_lists_runs_and_counts_of_every_layer_group():
    text = text_page(drawing(deviation=np.full((3, 6), 0.25)))
    assert "layers 0 to 1" in text
    assert "layers 2 to 2" in text
    assert re.search(r"\[2, 5\) +shifted +<b>&amp;\"x\"\\n", text)
    assert re.search(r"shifted +3 .*KV deviation 0.25", text)
    assert all(line.isprintable() for line in text.splitlines())


def test_a_drawing_of_other_sizes_is_refused():
    with pytest.raises(ValueError, match="2 texts for a prompt of 6 tokens"):
        drawing(("a", "b"))
    with pytest.raises(ValueError, match=r"deviation must be \(3, 6\), got \(2, 6\)"):
        drawing(deviation=np.ones((2, 6)))
