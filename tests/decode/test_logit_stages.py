"""Every stage, alone and composed, against the formulas in float64; a stage from outside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.decode import (
    LOGIT_STAGES,
    DecodeState,
    RowRequest,
    load_seat,
    pack_rows,
    process_logits,
    register_stage,
    sample,
    seat_features,
    stage_arguments,
)
from kvjax.request import SamplingParams
from tests.decode.naive_sampling import edited

VOCAB, SEATS, ROWS = 29, 3, 4
END_IDS = (2, 5)
process = jax.jit(process_logits)

tokens = st.integers(0, VOCAB - 1)


@st.composite
def requests(draw):
    """Parameters, prompt, output and bad words of one request."""
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.3, 1.0, 2.5])),
        presence_penalty=draw(st.sampled_from([0.0, 0.7, -1.0])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.4, -0.3])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3, 0.8])),
        min_tokens=draw(st.sampled_from([0, 3])),
        stop_token_ids=draw(st.lists(tokens, max_size=3)),
        logit_bias=draw(st.none() | st.dictionaries(tokens, st.floats(-9, 9), max_size=4)),
        allowed_token_ids=draw(st.none() | st.lists(tokens, min_size=12, unique=True)),
        bad_words=draw(st.sampled_from([None, ["x"]])),
    )
    output = draw(st.lists(st.integers(0, 4), max_size=12))
    words = draw(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4), max_size=4))
    words = words if params.bad_words else []
    return params, draw(st.lists(tokens, max_size=9)), output, words


def loaded(cases):
    """A state with one seat per request, and the rows of a step over them."""
    state = DecodeState.allocate(SEATS, VOCAB)
    rows = []
    for seat, (params, prompt, output, words) in enumerate(cases):
        if params.needs_seat_features:
            state = load_seat(state, seat, seat_features(params, VOCAB, prompt, output, words))
        rows.append(
            RowRequest(
                seat, params, seed=0, position=0, num_output_tokens=len(output),
                end_token_ids=END_IDS,
            )
        )  # fmt: skip
    return state, pack_rows(rows, ROWS, SEATS, stage_arguments())


@settings(max_examples=80, deadline=None)
@given(st.lists(requests(), min_size=1, max_size=SEATS), st.integers(0, 2**32 - 1))
def test_bans_biases_penalties_and_temperature_match_the_formulas(cases, seed):
    logits = np.random.default_rng(seed).standard_normal((ROWS, VOCAB)).astype(np.float32) * 4
    out = np.asarray(process(logits, *loaded(cases)))
    for row, (params, prompt, output, words) in enumerate(cases):
        expected = edited(logits[row], params, prompt, output, words, list(END_IDS))
        if np.isfinite(expected).any():
            np.testing.assert_allclose(out[row], expected, rtol=1e-5, atol=1e-5)
        else:
            np.testing.assert_array_equal(out[row], logits[row])  # nothing left: bans are void
    np.testing.assert_array_equal(out[len(cases) :], logits[len(cases) :])  # padding


def banned_after(words, output):
    params = SamplingParams(temperature=0, bad_words=["x"])
    out = process(np.zeros((ROWS, VOCAB), np.float32), *loaded([(params, [], output, words)]))
    return np.flatnonzero(np.asarray(out)[0] == -np.inf).tolist()


def test_a_bad_word_bans_its_last_token_only_right_after_its_beginning():
    assert banned_after([[7, 8, 9]], [7, 8]) == [9]
    assert banned_after([[7, 8, 9]], [1, 2, 7, 8]) == [9]
    assert banned_after([[7, 8, 9]], [7, 8, 1]) == []
    assert banned_after([[7, 8, 9]], [8]) == []
    assert banned_after([[7, 8, 9], [3], [8, 4]], [7, 8]) == [3, 4, 9]
    assert banned_after([[6] * 8], [6] * 7) == [6]
    assert banned_after([[6] * 8], [6] * 6) == []


def test_bad_words_follow_the_tokens_drawn_on_the_device():
    params = SamplingParams(temperature=0, bad_words=["x"])
    state, _ = loaded([(params, [], [], [[7, 8, 9]])])
    step = jax.jit(sample, donate_argnums=1)
    drawn = []
    for wish in (7, 8, 9):
        logits = np.zeros((1, VOCAB), np.float32)
        logits[0, wish], logits[0, 1] = 2, 1
        rows = pack_rows([RowRequest(0, params, seed=0, position=0)], 1, SEATS, stage_arguments())
        token, state, _ = step(logits, state, rows)
        drawn.append(int(token[0]))
    assert drawn == [7, 8, 1]


def test_end_and_stop_tokens_are_impossible_before_min_tokens_and_possible_after():
    params = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=[11])
    for num_output, banned in ((0, [2, 5, 11]), (1, [2, 5, 11]), (2, [])):
        out = process(
            np.zeros((ROWS, VOCAB), np.float32), *loaded([(params, [], [0] * num_output, [])])
        )
        assert np.flatnonzero(np.asarray(out)[0] == -np.inf).tolist() == banned


def test_features_left_in_a_seat_do_not_touch_a_request_that_uses_none():
    heavy = SamplingParams(
        temperature=0, allowed_token_ids=[1], repetition_penalty=2.0, bad_words=["x"]
    )
    state, _ = loaded([(heavy, [3], [4], [[1]])])
    plain = pack_rows([RowRequest(0, SamplingParams(temperature=0), seed=0, position=0)], ROWS, 3)
    logits = np.random.default_rng(0).standard_normal((ROWS, VOCAB)).astype(np.float32)
    # ... also when a batch mate makes every stage run
    mate = RowRequest(0, heavy, seed=0, position=0)
    both = pack_rows([RowRequest(0, SamplingParams(temperature=0), seed=0, position=0), mate], 4, 3)
    np.testing.assert_array_equal(process(logits, state, plain)[0], logits[0])
    np.testing.assert_array_equal(process(logits, state, both)[0], logits[0])


class Cooling:
    """A stage from outside: scales the logits by an argument of the request."""

    name = "cooling"
    arguments = {"cooling": 0.0}  # noqa: RUF012

    def wanted(self, rows):
        return rows.extra["cooling"] > 0

    def apply(self, logits, state, rows):
        return logits * rows.extra["cooling"][:, None]


def test_a_stage_from_outside_runs_in_its_place_for_the_rows_that_ask():
    table = list(LOGIT_STAGES)
    try:
        register_stage(Cooling(), before="temperature")
        assert [stage.name for stage in LOGIT_STAGES].index("cooling") == 5
        asks = SamplingParams(temperature=0, extra_args={"cooling": 3})
        cases = [(asks, [], [], []), (SamplingParams(temperature=0), [], [], [])]
        logits = np.random.default_rng(0).standard_normal((ROWS, VOCAB)).astype(np.float32)
        out = jax.jit(lambda *a: process_logits(*a))(logits, *loaded(cases))
        np.testing.assert_allclose(out[0], logits[0] * 3, rtol=1e-6)
        np.testing.assert_array_equal(out[1], logits[1])
        with pytest.raises(ValueError, match="'cooling' is registered already"):
            register_stage(Cooling())
        hot = SamplingParams(extra_args={"cooling": "hot"})
        with pytest.raises(ValueError, match=r"extra_args\['cooling'\] must be a number"):
            loaded([(hot, [], [], [])])
    finally:
        LOGIT_STAGES[:] = table
    with pytest.raises(ValueError, match="no logit stage is named 'frobnicate'"):
        register_stage(Cooling(), before="frobnicate")


def test_stages_that_no_row_wants_are_skipped():
    calls = jnp.zeros(())

    class Explosive(Cooling):
        def apply(self, logits, state, rows):
            return jnp.full_like(logits, jnp.nan)

    state, rows = loaded([(SamplingParams(temperature=0), [], [], [])])
    rows = jax.tree.map(jnp.asarray, rows)
    object.__setattr__(rows, "extra", {"cooling": jnp.zeros(ROWS)})
    logits = jnp.ones((ROWS, VOCAB)) + calls
    out = process_logits(logits, state, rows, [Explosive()])
    np.testing.assert_array_equal(out, logits)
