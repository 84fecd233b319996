"""Text of a sequence as its tokens come."""

from hypothesis import given
from hypothesis import strategies as st

from kvjax.request import SamplingParams
from kvjax.text import TextStream
from tests.tiny_model import END, LetterTokenizer

TOKENIZER = LetterTokenizer()


def run(
    text_or_ids: str | list[int], end_ids: tuple[int, ...] = (), **params
) -> tuple[str, str | None, list[str], int]:
    """(final text, stop string, what was shown after each token, tokens taken)."""
    ids = TOKENIZER.encode(text_or_ids) if isinstance(text_or_ids, str) else text_or_ids
    stream = TextStream(TOKENIZER, SamplingParams(**params), end_ids)
    shown = []
    for i, token in enumerate(ids):
        stop = stream.push(token, last=i == len(ids) - 1)
        shown.append(stream.shown)
        if stop is not None:
            return stream.text, stop, shown, i + 1
    return stream.text, None, shown, len(ids)


def test_a_stop_string_that_spans_tokens_ends_the_text_before_it():
    assert run("one two three", stop=["two", "zzz"])[:2] == ("one ", "two")
    assert run("one two three", stop="two", include_stop_str_in_output=True)[:2] == (
        "one two",
        "two",
    )


def test_text_behind_a_stop_string_in_the_same_token_is_dropped():
    ids = [ord("a"), 129]
    tail = TOKENIZER.token_bytes(129).decode()
    assert len(tail) == 2
    assert run([*ids, 120], stop=["a" + tail[0]])[:2] == ("", "a" + tail[0])
    kept = run([*ids, 120], stop=["a" + tail[0]], include_stop_str_in_output=True)
    assert kept[:2] == ("a" + tail[0], "a" + tail[0])


def test_of_two_stop_strings_the_one_that_is_complete_first_wins():
    assert run("abcdef", stop=["cdef", "bcd"])[:2] == ("a", "bcd")
    assert run("abcdef", stop=["d", "bcd"])[:2] == ("a", "bcd")  # both end at d; the longer text


def test_stop_strings_do_not_count_before_min_tokens():
    assert run("ababab", stop=["ab"], min_tokens=3)[:2] == ("ab", "ab")
    assert run("abxxxx", stop=["ab"], min_tokens=3)[:2] == ("abxxxx", None)


def test_an_end_token_is_no_text_unless_asked_for():
    ids = [*TOKENIZER.encode("hi"), END]
    assert run(ids, (END,))[0] == "hi"
    assert run(ids, (END,), skip_special_tokens=False)[0] == "hi"
    both = {"skip_special_tokens": False, "include_stop_str_in_output": True}
    assert run(ids, (END,), **both)[0] == "hi<end>"
    assert run([*TOKENIZER.encode("hi"), ord(".")], (ord("."),))[0] == "hi"
    assert run([ord("."), ord("h"), ord(".")], (ord("."),))[0] == ".h"


def test_special_tokens_are_left_out_or_not():
    ids = [ord("a"), END, ord("b")]
    assert run(ids)[0] == "ab"
    assert run(ids, skip_special_tokens=False)[0] == "a<end>b"


class Bytes(LetterTokenizer):
    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])


def test_a_character_cut_off_by_the_end_becomes_a_replacement_and_is_never_shown_before():
    stream = TextStream(Bytes(), SamplingParams())
    for byte in "é€".encode():
        stream.push(byte, last=False)
        assert "�" not in stream.shown
    assert stream.text == "é€"
    stream.push("€".encode()[0], last=True)
    assert stream.text == stream.shown == "é€�"


@given(
    text=st.text("ab", max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    keeps=st.booleans(),
)
def test_what_is_shown_is_always_a_prefix_of_the_final_text(text, stops, keeps):
    final, stop, shown, taken = run(
        text or "a", stop=stops or None, include_stop_str_in_output=keeps
    )
    assert all(final.startswith(part) for part in shown)
    assert shown[-1] == final
    text = text or "a"
    ends = [text.find(s) + len(s) for s in stops if s in text]
    assert (stop is None) == (not ends)
    if ends:
        assert taken == min(ends)
        assert final == (text[: min(ends)] if keeps else text[: min(ends) - len(stop or "")])


def test_only_what_may_become_a_stop_string_is_held_back():
    assert (
        run("xaxabxabc", stop=["abc"])[2]
        == ["x", "x", "xax", "xax", "xax", "xaxabx"] + ["xaxabx"] * 3
    )
