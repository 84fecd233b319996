"""From logits to tokens: pure functions of the jitted step, and the host's side of their state."""

from kvjax.decode.randomness import Purpose, gumbel_noise, request_keys
from kvjax.decode.rows import GREEDY_BELOW, NUM_STOP_IDS, RowRequest, SamplingRows, pack_rows
from kvjax.decode.sampling import SampleOutput, draw_tokens, row_argmax, sample, token_logprobs
from kvjax.decode.stages import (
    LOGIT_STAGES,
    LogitStage,
    process_logits,
    register_stage,
    stage_arguments,
)
from kvjax.decode.state import (
    BAD_WORD_TOKENS,
    NUM_BAD_WORDS,
    DecodeState,
    SeatFeatures,
    load_masks,
    load_seat,
    record_tokens,
    seat_features,
)

__all__ = [
    "BAD_WORD_TOKENS",
    "GREEDY_BELOW",
    "LOGIT_STAGES",
    "NUM_BAD_WORDS",
    "NUM_STOP_IDS",
    "DecodeState",
    "LogitStage",
    "Purpose",
    "RowRequest",
    "SampleOutput",
    "SamplingRows",
    "SeatFeatures",
    "draw_tokens",
    "gumbel_noise",
    "load_masks",
    "load_seat",
    "pack_rows",
    "process_logits",
    "record_tokens",
    "register_stage",
    "request_keys",
    "row_argmax",
    "sample",
    "seat_features",
    "stage_arguments",
    "token_logprobs",
]
