"""What is in the pages right now, for the page at `/ui`: requests, and the prefix tree."""

from collections.abc import Callable
from typing import Any

import numpy as np

from kvjax.engine import Engine
from kvjax.reuse.report import Fate, ReuseReport
from kvjax.sequence import Sequence, Status
from kvjax.serving.kv import stats
from kvjax.serving.reports import FATES, prefix_report, runs

_MOST_NODES, _MOST_REQUESTS = 300, 64
_LABEL = 48  # tokens of a node whose text is shown
_SHOWN = 400  # tokens of a run whose text is shown

Decode = Callable[[list[int]], str]


def occupancy(engine: Engine, decode: Decode | None) -> dict[str, Any]:
    """One moment between two steps. For the engine's thread; texts only if `decode` is given."""
    scheduler, pool = engine.scheduler, engine.scheduler.pool
    sequences = sorted((*scheduler.running, *scheduler.waiting), key=lambda s: s.order)
    shown = sequences[:_MOST_REQUESTS]
    owners = ["free" if pool.ref_count(page) == 0 else "cached" for page in range(pool.num_pages)]
    for sequence in engine.parked:
        for page in sequence.page_ids:
            owners[page] = "pinned"
    for number, sequence in enumerate(shown):
        for page in sequence.page_ids:
            owners[page] = "shared" if owners[page].startswith("r") else f"r{number}"
    return {
        "stats": stats(engine),
        "computed_tokens": engine.runner.real_tokens,
        "pages": owners,
        "requests": [_request(sequence, decode) for sequence in shown],
        "nodes": _nodes(engine, decode),
    }


def _request(sequence: Sequence, decode: Decode | None) -> dict[str, Any]:
    request = sequence.request
    cached = request.num_cached_tokens
    return {
        "id": f"{request.request_id}/{sequence.branch}",
        "status": sequence.status.value,
        "prompt": sequence.num_prompt,
        "reused": cached,
        "computed": sequence.num_computed,
        "output": sequence.num_output,
        "pages": len(sequence.page_ids),
        "segments": None if decode is None else _segments(sequence, decode),
    }


def _segments(sequence: Sequence, decode: Decode) -> list[dict[str, Any]]:
    """What becomes of the prompt's tokens, in runs of one fate; "waiting" where nothing has yet."""
    request, prompt = sequence.request, sequence.tokens[: sequence.num_prompt]
    report: ReuseReport | None = request.report
    if report is None or report.num_tokens != len(prompt):
        report = prefix_report(len(prompt), request.num_cached_tokens)
    fates = report.fates[-1].copy()
    to_come = np.arange(len(prompt)) >= sequence.num_computed
    if sequence.status is Status.RUNNING:  # what is moved is there from the start
        to_come &= fates >= Fate.RECOMPUTED
    fates[to_come] = len(Fate)
    return [
        {"start": a, "end": b, "fate": fate, "text": _shown(prompt[a:b], decode)}
        for a, b, fate in runs(fates, (*FATES, "waiting"))
    ]


def _shown(tokens: list[int], decode: Decode) -> str:
    """The text of a run, without the middle of a long one."""
    if len(tokens) <= _SHOWN:
        return decode(tokens)
    half = _SHOWN // 2
    return f"{decode(tokens[:half])} … {decode(tokens[-half:])}"


def _nodes(engine: Engine, decode: Decode | None) -> list[dict[str, Any]]:
    """Nodes of the prefix tree, parents first; those that were used last, if there are too many."""
    tree = engine.scheduler.tree
    nodes = [] if tree is None else list(tree.nodes())
    if len(nodes) > _MOST_NODES:  # a parent is used whenever its child is, so none is orphaned
        kept = set(sorted(nodes, key=lambda n: (-n.last_use, n.start))[:_MOST_NODES])
        nodes = [node for node in nodes if node in kept]
    numbers = {id(node): number for number, node in enumerate(nodes)}
    return [
        {
            "parent": numbers.get(id(node.parent), -1),
            "start": node.start,
            "end": node.end,
            "pages": len(node.pages),
            "hits": node.hits,
            "used": node.last_use,
            "text": None if decode is None else decode([int(t) for t in node.tokens[:_LABEL]]),
        }
        for node in nodes
    ]
