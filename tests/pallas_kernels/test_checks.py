"""Bad values are refused by name and value: at hand at once, under jit on request."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax.pallas_kernels as kernels
from tests.pallas_kernels.attention_cases import Heads, causal, problem

SEQS = [(40, causal(40, 2)), (33, causal(33, 1))]
GOOD = problem(1, Heads(4, 2, 32), SEQS, num_tokens=5)
PAGES = jax.tree.map(lambda x: np.nan_to_num(x), GOOD.pages)  # 51 pages of 16 slots
TABLES = GOOD.block_tables


def ids(x: list) -> np.ndarray:
    return np.array(x, np.int32)


def attention(operation: Any, **wrong: Any) -> Any:
    """A call and its arguments, some of them replaced."""
    arguments: dict[str, Any] = {
        "q": GOOD.q, "pages": PAGES, "block_tables": GOOD.block_tables,
        "query_starts": GOOD.query_starts, "kv_lens": GOOD.kv_lens, "visible_lo": GOOD.lo,
        "visible_hi": GOOD.hi,
    }  # fmt: skip
    if operation is kernels.cascade_attention:
        arguments |= {"group_starts": ids([0, 2]), "prefix_lens": ids([16])}
    if operation is kernels.attention_mass:
        arguments |= {
            "lse": np.zeros((5, 4), np.float32),
            "segment_starts": ids([[0, 40], [0, 33]]),
        }
    return functools.partial(operation, scale=1.0), arguments | wrong


def changed(x: np.ndarray, at: Any, value: int) -> np.ndarray:
    x = x.copy()
    x[at] = value
    return x


def moves(operation: Any, **wrong: Any) -> Any:
    cos, k = np.ones((3, 4), np.float32), np.ones((3, 2, 32), np.float32)
    slots, other = ids([1, -1, 2]), ids([3, 4, 5])
    span = kernels.KVSpan(jnp.asarray(k), jnp.asarray(k))
    arguments: dict[str, Any] = {
        kernels.write_slots: {"pages": PAGES, "k": k, "v": k, "slots": slots},
        kernels.gather_slots: {"pages": PAGES, "slots": slots},
        kernels.export_span: {"pages": PAGES, "slots": slots},
        kernels.import_span: {"pages": PAGES, "span": span, "slots": slots},
        kernels.copy_pages: {"pages": PAGES, "src": other, "dst": slots},
        kernels.rotary_shift: {"pages": PAGES, "slots": slots, "cos": cos, "sin": cos},
        kernels.reposition: {
            "pages": PAGES, "src_slots": other, "dst_slots": slots, "cos": cos, "sin": cos,
        },
    }[operation]  # fmt: skip
    return operation, arguments | wrong


paged, cascade, mass = kernels.paged_attention, kernels.cascade_attention, kernels.attention_mass
BAD = {
    "hi beyond kv_len": (attention(paged, visible_hi=changed(GOOD.hi, 1, 41)),
                         "visible_hi must be at most kv_len = 40, got 41 at place 1"),
    "lo negative": (attention(paged, visible_lo=changed(GOOD.lo, 2, -3)),
                    "visible_lo must not be negative, got -3 at place 2"),
    "starts fall": (attention(paged, query_starts=ids([0, 4, 3])),
                    "query_starts must not fall, but 4 came before it, got 3"),
    "starts past the tokens": (attention(paged, query_starts=ids([0, 2, 6])),
                               r"query_starts must be in 0\.\.5, got 6 at place 2"),
    "a length beyond the table": (attention(paged, kv_lens=ids([40, 385])),
                                  r"kv_lens must be in 0\.\.384, got 385"),
    "a page id past the pool": (attention(paged, block_tables=changed(TABLES, (1, 2), 51)),
                                r"block_tables must be in 0\.\.50, got 51 at place 26"),
    "a page id of padding": (attention(paged, block_tables=changed(TABLES, (0, 0), -1)),
                             r"block_tables must be in 0\.\.50, got -1 at place 0"),
    "groups that miss a sequence": (attention(cascade, group_starts=ids([0, 1])),
                                    r"group_starts must be in 2\.\.2, got 1"),
    "a prefix longer than a member": (attention(cascade, prefix_lens=ids([36])),
                                      r"prefix_lens must be in 0\.\.33 \(kv_len\), got 36"),
    "mass beyond kv_len": (attention(mass, visible_hi=changed(GOOD.hi, 1, 41)), "visible_hi must"),
    "segments fall": (attention(mass, segment_starts=ids([[0, 40], [33, 5]])),
                      "segment_starts must not fall, but 33 came before it, got 5"),
    "a slot past the pool": (moves(kernels.write_slots, slots=ids([1, 816, 2])),
                             r"slots must be in -1\.\.815, got 816 at place 1"),
    "a slot written twice": (moves(kernels.write_slots, slots=ids([7, -1, 7])),
                             "slots must not repeat an id, got 7"),
    "a slot read past the pool": (moves(kernels.gather_slots, slots=ids([1, -2, 2])),
                                  r"slots must be in -1\.\.815, got -2 at place 1"),
    "exported past the pool": (moves(kernels.export_span, slots=ids([816])), "got 816"),
    "imported twice": (moves(kernels.import_span, slots=ids([3, 3, 1])), "repeat an id, got 3"),
    "a copy from nowhere": (moves(kernels.copy_pages, src=ids([3, 4, -1])),
                            r"src_pages must be in 0\.\.50, got -1 at place 2"),
    "two copies to one page": (moves(kernels.copy_pages, dst=ids([1, 1, -1])),
                               "dst_pages must not repeat an id, got 1"),
    "a move from nowhere": (moves(kernels.reposition, src_slots=ids([3, -1, 900])),
                            r"src_slots must be in 0\.\.815, got 900 at place 2"),
    "two moves to one slot": (moves(kernels.reposition, dst_slots=ids([5, 5, -1])),
                              "dst_slots must not repeat an id, got 5"),
    "shifted twice": (moves(kernels.rotary_shift, slots=ids([5, 5, -1])), "repeat an id, got 5"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_value_at_hand_is_refused_with_its_name_and_value(name):
    (call, arguments), message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call(**arguments)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_value_under_jit_is_refused_by_the_debug_mode(name):
    (call, arguments), message = BAD[name]
    with pytest.raises(ValueError, match=message):
        kernels.checked(jax.jit(functools.partial(call, checks=True)))(**arguments)


GOOD_CALLS = {
    "paged_attention": attention(paged),
    "cascade_attention": attention(cascade),
    "attention_mass": attention(mass),
    "write_slots": moves(kernels.write_slots),
    "gather_slots": moves(kernels.gather_slots),
    "export_span": moves(kernels.export_span),
    "import_span": moves(kernels.import_span),
    "copy_pages": moves(kernels.copy_pages),
    "reposition": moves(kernels.reposition),
    "rotary_shift": moves(kernels.rotary_shift),
}


@pytest.mark.parametrize("call", GOOD_CALLS.values(), ids=GOOD_CALLS)
def test_good_values_pass_and_the_debug_mode_changes_nothing_but_rounding(call):
    """Padding, with intervals and slots that would be bad in a real row, is not looked at."""
    fn, arguments = call
    plain = jax.jit(fn)(**arguments)
    for run in (fn, kernels.checked(jax.jit(functools.partial(fn, checks=True)))):
        for a, b in zip(jax.tree.leaves(run(**arguments)), jax.tree.leaves(plain), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


def test_without_the_debug_mode_nothing_is_checked_while_tracing():
    call, arguments = attention(paged, visible_hi=changed(GOOD.hi, 1, 41))
    assert np.isfinite(jax.jit(call)(**arguments)).all()


def test_pages_that_no_row_sees_may_have_any_id():
    """Pages that a window has left are given back: their entries mean nothing."""
    p = problem(2, Heads(4, 2, 32), [(200, causal(200, 3, window=20))])
    tables = p.block_tables.copy()
    tables[:, :11], tables[:, 13:] = -1, 10**6
    call: Any = kernels.paged_attention
    call(
        p.q, p.pages, tables, p.query_starts, p.kv_lens, p.lo, p.hi, scale=1.0
    )  # fmt: skip
