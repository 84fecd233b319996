"""What happens to logits before a token is drawn: an ordered table of small stages.

The order is vLLM's. A stage from outside needs one file:

    class Cooling:
        name = "cooling"
        arguments = {"cooling": 0.0}  # read from SamplingParams.extra_args, with defaults
        def wanted(self, rows): return rows.extra["cooling"] > 0
        def apply(self, logits, state, rows): return logits * rows.extra["cooling"][:, None]

    register_stage(Cooling(), before="temperature")  # before the engine is built
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kvjax.decode.rows import GREEDY_BELOW, SamplingRows
from kvjax.decode.state import DecodeState
from kvjax.decode.truncation import keep_min_p, keep_top_k, keep_top_p


class LogitStage(Protocol):
    """One edit of the logits. Stateless; runs inside the jitted step.

    What `apply` returns is used for the wanted rows only, and it is skipped when no row wants it.
    It must compute a row from that row alone, sum over the vocabulary with `row_sum` and take
    exponentials with `steady_exp` (both of `kvjax.pallas_kernels`): then a request draws the same
    tokens whatever is batched with it.
    """

    @property
    def name(self) -> str:
        """Unique name in the table."""
        ...

    @property
    def arguments(self) -> Mapping[str, float]:
        """What it reads of `SamplingParams.extra_args` (as `rows.extra[name]`), with defaults."""
        ...

    def wanted(self, rows: SamplingRows) -> Bool[Array, " rows"]:
        """Which rows ask for it."""
        ...

    def apply(
        self, logits: Float[Array, "rows vocab"], state: DecodeState, rows: SamplingRows
    ) -> Float[Array, "rows vocab"]:
        """The new logits, float32; -inf makes a token impossible."""
        ...


class _BuiltIn:
    """Shared by the stages below: the class is its own name and reads no extra arguments."""

    name: str
    arguments: Mapping[str, float] = {}


class Grammar(_BuiltIn):
    """Leaves only what the row's grammar allows next."""

    name = "grammar"

    def wanted(self, rows: SamplingRows) -> Array:
        """Rows with a grammar."""
        return rows.uses_grammar

    def apply(self, logits: Array, state: DecodeState, rows: SamplingRows) -> Array:
        """Sets the others to -inf."""
        words = state.grammar[rows.seats]
        bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.int32)) & 1
        allowed = bits.reshape(words.shape[0], -1)[:, : logits.shape[1]]
        return jnp.where(allowed != 0, logits, -jnp.inf)


class BadWords(_BuiltIn):
    """Bans the last token of a bad word when the tokens before it have just been output."""

    name = "bad_words"

    def wanted(self, rows: SamplingRows) -> Array:
        """Rows with bad words."""
        return rows.uses_bad_words

    def apply(self, logits: Array, state: DecodeState, rows: SamplingRows) -> Array:
        """Sets the completing tokens to -inf."""
        words = state.bad_words[rows.seats]  # right-aligned
        history = state.history[rows.seats][:, None, :]
        begun = jnp.all((words[:, :, :-1] == -1) | (words[:, :, :-1] == history), axis=2)
        return _ban(logits, jnp.where(begun, words[:, :, -1], -1))


class MinTokens(_BuiltIn):
    """Bans end and stop tokens until `min_tokens` have been output."""

    name = "min_tokens"

    def wanted(self, rows: SamplingRows) -> Array:
        """Rows that are not there yet."""
        return rows.ban_stops

    def apply(self, logits: Array, state: DecodeState, rows: SamplingRows) -> Array:
        """Sets the stop ids to -inf."""
        return _ban(logits, rows.stop_ids)


class Bias(_BuiltIn):
    """Adds `logit_bias`; makes tokens outside `allowed_token_ids` impossible."""

    name = "bias"

    def wanted(self, rows: SamplingRows) -> Array:
        """Rows with a bias or a list of allowed tokens."""
        return rows.uses_bias

    def apply(self, logits: Array, state: DecodeState, rows: SamplingRows) -> Array:
        """Adds the seat's dense bias."""
        return logits + state.bias[rows.seats]


class Penalties(_BuiltIn):
    """Repetition (prompt and output), then frequency and presence (output) penalties."""

    name = "penalties"

    def wanted(self, rows: SamplingRows) -> Array:
        """Rows with any of the three."""
        return rows.uses_penalties

    def apply(self, logits: Array, state: DecodeState, rows: SamplingRows) -> Array:
        """Divides positive and multiplies negative logits of seen tokens, then subtracts."""
        counts = state.output_counts[rows.seats]
        seen = state.prompt_mask[rows.seats] | (counts > 0)
        repetition = jnp.where(seen, rows.repetition[:, None], 1)
        logits = jnp.where(logits > 0, logits / repetition, logits * repetition)
        logits = logits - rows.frequency[:, None] * counts.astype(jnp.float32)
        return logits - rows.presence[:, None] * (counts > 0).astype(jnp.float32)


class Temperature(_BuiltIn):
    """Divides by the temperature; greedy rows stay as they are."""

    name = "temperature"

    def wanted(self, rows: SamplingRows) -> Array:
        """Rows that draw, at another temperature than 1."""
        return rows.is_random & (rows.temperature != 1)

    def apply(self, logits: Array, state: DecodeState, rows: SamplingRows) -> Array:
        """Divides."""
        return logits / jnp.maximum(rows.temperature, GREEDY_BELOW)[:, None]


class MinP(_BuiltIn):
    """Drops tokens less likely than `min_p` times the most likely one."""

    name = "min_p"

    def wanted(self, rows: SamplingRows) -> Array:
        """Rows that draw, with a `min_p`."""
        return rows.is_random & (rows.min_p > 0)

    def apply(self, logits: Array, state: DecodeState, rows: SamplingRows) -> Array:
        """Sets the others to -inf."""
        return keep_min_p(logits, rows.min_p)


class TopK(_BuiltIn):
    """Keeps the `top_k` most likely tokens and ties."""

    name = "top_k"

    def wanted(self, rows: SamplingRows) -> Array:
        """Rows that draw, with a `top_k`."""
        return rows.is_random & (rows.top_k > 0)

    def apply(self, logits: Array, state: DecodeState, rows: SamplingRows) -> Array:
        """Sets the others to -inf."""
        return keep_top_k(logits, rows.top_k, self.wanted(rows))


class TopP(_BuiltIn):
    """Keeps the smallest set of likely tokens that has probability `top_p`, and ties."""

    name = "top_p"

    def wanted(self, rows: SamplingRows) -> Array:
        """Rows that draw, with a `top_p`."""
        return rows.is_random & (rows.top_p < 1)

    def apply(self, logits: Array, state: DecodeState, rows: SamplingRows) -> Array:
        """Sets the others to -inf."""
        return keep_top_p(logits, rows.top_p, self.wanted(rows))


LOGIT_STAGES: list[LogitStage] = [
    Grammar(),
    BadWords(),
    MinTokens(),
    Bias(),
    Penalties(),
    Temperature(),
    MinP(),
    TopK(),
    TopP(),
]


def register_stage(stage: LogitStage, *, before: str | None = None) -> None:
    """Adds a stage to the table, in front of the one named `before` (None: at the end).

    Steps traced earlier do not have it: register before the engine is built. Raises `ValueError`
    if the name or an argument is taken, or `before` is unknown.
    """
    names = [other.name for other in LOGIT_STAGES]
    if stage.name in names:
        raise ValueError(f"a logit stage named {stage.name!r} is registered already")
    taken = set(stage.arguments) & set(stage_arguments())
    if taken:
        raise ValueError(f"another logit stage reads the arguments {sorted(taken)}")
    if before is not None and before not in names:
        raise ValueError(f"no logit stage is named {before!r}; there are {names}")
    LOGIT_STAGES.insert(len(names) if before is None else names.index(before), stage)


def stage_arguments() -> dict[str, float]:
    """Names that the registered stages read from `extra_args`, with defaults (for `pack_rows`)."""
    return {name: default for stage in LOGIT_STAGES for name, default in stage.arguments.items()}


def process_logits(
    logits: Float[Array, "rows vocab"],
    state: DecodeState,
    rows: SamplingRows,
    stages: Sequence[LogitStage] | None = None,
) -> Float[Array, "rows vocab"]:
    """Logits after all stages, float32: `softmax` of a random row is what it is drawn from.

    Rows change only through stages that they ask for. Bans that leave a row no token at all are
    void: such a row comes back as it went in.
    """
    raw = logits.astype(jnp.float32)
    logits = raw
    for stage in LOGIT_STAGES if stages is None else stages:
        wanted = stage.wanted(rows)

        def edit(logits: Array, stage: LogitStage = stage, wanted: Array = wanted) -> Array:
            with jax.named_scope(f"logits_{stage.name}"):
                return jnp.where(wanted[:, None], stage.apply(logits, state, rows), logits)

        logits = jax.lax.cond(jnp.any(wanted), edit, lambda logits: logits, logits)
    impossible = jnp.max(logits, axis=1, keepdims=True) == -jnp.inf
    return jnp.where(impossible, raw, logits)


def _ban(logits: Array, token_ids: Array) -> Array:
    """Sets `token_ids[L, n]` of each row to -inf; -1 is no token."""
    num_rows, vocab_size = logits.shape
    token_ids = jnp.where(token_ids < 0, vocab_size, token_ids)  # past the end: dropped
    row_ids = jnp.arange(num_rows, dtype=jnp.int32)[:, None]
    return logits.at[row_ids, token_ids].set(-jnp.inf, mode="drop")
