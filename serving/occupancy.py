"""What is in the pages right now, for the page at `/ui`: requests, and the prefix tree."""

from collections.abc import Callable
from typing import Any

from kvjax.engine import Engine
from kvjax.sequence import Sequence
from kvjax.serving.kv import stats

_MOST_NODES, _MOST_REQUESTS = 300, 64
_LABEL = 48  # tokens of a node whose text is shown
_SHOWN = 400  # tokens of a prompt whose text is shown, of each colour

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
    prompt = sequence.tokens[: sequence.num_prompt]
    texts = None
    if decode is not None:
        computed = min(sequence.num_computed, sequence.num_prompt)
        parts = (prompt[:cached], prompt[cached:computed], prompt[computed:])
        texts = [decode(part[-_SHOWN:]) for part in parts]
    return {
        "id": f"{request.request_id}/{sequence.branch}",
        "status": sequence.status.value,
        "prompt": sequence.num_prompt,
        "reused": cached,
        "computed": sequence.num_computed,
        "output": sequence.num_output,
        "pages": len(sequence.page_ids),
        "texts": texts,  # of the prompt: reused, computed, still to be computed
    }


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
