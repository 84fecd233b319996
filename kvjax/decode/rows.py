"""How each logits row of a step is to be sampled: built on the host, read on the device."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jaxtyping import Bool

from kvjax.request import SamplingParams

NUM_STOP_IDS = 32  # ids a row can ban before `min_tokens`
GREEDY_BELOW = 1e-5  # temperatures below are greedy


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class SamplingRows:
    """Sampling parameters per logits row. A padding row has `seats == num_seats`, active False."""

    seats: Array  # i32[L] row of DecodeState
    active: Array  # bool[L] the token is appended to its seat; at most one such row per seat
    forced_tokens: Array  # i32[L] token to report instead of drawing (prompt logprobs), -1: draw
    want_logprobs: Array  # bool[L]
    temperature: Array  # f32[L]
    top_p: Array  # f32[L]
    top_k: Array  # i32[L] < 1: all
    min_p: Array  # f32[L]
    presence: Array  # f32[L]
    frequency: Array  # f32[L]
    repetition: Array  # f32[L]
    uses_bias: Array  # bool[L] DecodeState.bias holds for this row
    uses_grammar: Array  # bool[L] DecodeState.grammar holds for this row
    uses_bad_words: Array  # bool[L] DecodeState.bad_words holds for this row
    seeds: Array  # u32[L] lower half of the request's seed
    seeds_hi: Array  # u32[L] upper half
    branches: Array  # i32[L]
    positions: Array  # i32[L] sequence index of the token being drawn
    stop_ids: Array  # i32[L, NUM_STOP_IDS] -1: none
    ban_stops: Array  # bool[L] `min_tokens` is not reached: no token of `stop_ids`
    extra: Mapping[str, Array]  # f32[L] each: the arguments of stages from outside, by name

    @property
    def is_random(self) -> Bool[Array, " rows"]:
        """Rows that draw; the others take the most likely token."""
        return self.temperature >= GREEDY_BELOW

    @property
    def uses_penalties(self) -> Bool[Array, " rows"]:
        """Rows for which DecodeState.output_counts and prompt_mask hold."""
        return (self.presence != 0) | (self.frequency != 0) | (self.repetition != 1)


@dataclasses.dataclass(frozen=True, slots=True)
class RowRequest:
    """One logits row of a step, as the engine knows it."""

    seat: int
    params: SamplingParams
    seed: int  # the request's resolved seed, 0 <= seed < 2**64
    position: int  # sequence index of the token being drawn
    branch: int = 0
    num_output_tokens: int = 0  # so far; decides about `min_tokens`
    end_token_ids: tuple[int, ...] = ()  # the model's own
    active: bool = True
    forced_token: int = -1
    want_logprobs: bool | None = None  # None: as params.logprobs says
    uses_grammar: bool = False  # the seat's mask was loaded for this draw (`load_masks`)


def pack_rows(
    requests: Sequence[RowRequest],
    num_rows: int,
    num_seats: int,
    arguments: Mapping[str, float] | None = None,
) -> SamplingRows:
    """Pads `requests` to `num_rows` rows of numpy arrays, which jit transfers.

    `arguments` names what the registered stages read from `extra_args`, with defaults
    (`stage_arguments()`). Raises `ValueError` if there are too many rows or ids to ban, or an
    argument is no number.
    """
    if len(requests) > num_rows:
        raise ValueError(f"{len(requests)} logits rows do not fit a step of {num_rows}")

    def column(values: Sequence[Any], dtype: type, padding: float) -> Any:
        out = np.full(num_rows, padding, dtype)
        out[: len(values)] = values
        return out

    params = [request.params for request in requests]
    stop_ids: Any = np.full((num_rows, NUM_STOP_IDS), -1, np.int32)
    ban_stops: Any = np.zeros(num_rows, np.bool_)
    for row, request in enumerate(requests):
        if request.num_output_tokens < request.params.min_tokens:
            banned = tuple(request.params.stop_token_ids or ()) + request.end_token_ids
            if len(banned) > NUM_STOP_IDS:
                raise ValueError(f"min_tokens can ban {NUM_STOP_IDS} ids, got {len(banned)}")
            stop_ids[row, : len(banned)] = banned
            ban_stops[row] = True
    return SamplingRows(
        seats=column([r.seat for r in requests], np.int32, num_seats),
        active=column([r.active for r in requests], np.bool_, False),
        forced_tokens=column([r.forced_token for r in requests], np.int32, -1),
        want_logprobs=column([_wants_logprobs(r) for r in requests], np.bool_, False),
        temperature=column([p.temperature for p in params], np.float32, 0),
        top_p=column([p.top_p for p in params], np.float32, 1),
        top_k=column([p.top_k for p in params], np.int32, 0),
        min_p=column([p.min_p for p in params], np.float32, 0),
        presence=column([p.presence_penalty for p in params], np.float32, 0),
        frequency=column([p.frequency_penalty for p in params], np.float32, 0),
        repetition=column([p.repetition_penalty for p in params], np.float32, 1),
        uses_bias=column([p.uses_bias for p in params], np.bool_, False),
        uses_grammar=column([r.uses_grammar for r in requests], np.bool_, False),
        uses_bad_words=column([bool(p.bad_words) for p in params], np.bool_, False),
        seeds=column([r.seed & 0xFFFFFFFF for r in requests], np.uint32, 0),
        seeds_hi=column([r.seed >> 32 for r in requests], np.uint32, 0),
        branches=column([r.branch for r in requests], np.int32, 0),
        positions=column([r.position for r in requests], np.int32, 0),
        stop_ids=stop_ids,
        ban_stops=ban_stops,
        extra={
            name: column([_argument(p, name, default) for p in params], np.float32, default)
            for name, default in (arguments or {}).items()
        },
    )


def _wants_logprobs(request: RowRequest) -> bool:
    if request.want_logprobs is not None:
        return request.want_logprobs
    return request.params.logprobs is not None


def _argument(params: SamplingParams, name: str, default: float) -> float:
    value = (params.extra_args or {}).get(name, default)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or abs(value) > 3.4e38:
        raise ValueError(f"extra_args[{name!r}] must be a number, got {value!r}")
    return value
