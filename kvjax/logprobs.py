"""Log-probabilities of a step's rows, from the device's arrays to what a caller is given."""

from collections.abc import Callable, Iterable

import jax

from kvjax.decode import SampleOutput
from kvjax.request import Logprob, PositionLogprobs
from kvjax.runner import RowOwner


def read_report(out: SampleOutput, owners: Iterable[RowOwner]) -> SampleOutput | None:
    """The log-probability arrays on the host, if any row asked for them."""
    params = [(o.sequence.request.params, o.draws) for o in owners]
    if not any((p.logprobs if draws else p.prompt_logprobs) is not None for p, draws in params):
        return None
    return jax.device_get(out)


def position_logprobs(
    report: SampleOutput, row: int, owner: RowOwner, decode: Callable[[int], str] | None
) -> PositionLogprobs | None:
    """At one position: the token that came, and the most likely ones. None: not asked for.

    `decode`: from a token id to its text.
    """

    def decoded(token: int) -> str | None:
        return None if decode is None else decode(token)

    params = owner.sequence.request.params
    count = params.logprobs if owner.draws else params.prompt_logprobs
    if count is None:
        return None
    token = int(report.tokens[row])
    ids = [int(i) for i in report.top_ids[row][:count] if i >= 0]
    entry = {
        i: Logprob(float(report.top_logprobs[row][k]), k + 1, decoded(i)) for k, i in enumerate(ids)
    }
    rank, logprob = int(report.ranks[row]), float(report.logprobs[row])
    entry[token] = Logprob(logprob, rank, decoded(token))
    return entry
