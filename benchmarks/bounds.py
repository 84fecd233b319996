"""How near a run came to what the device reaches: its least work against measured ceilings.

The least work is what nobody can leave out: products of all weights for each token that was not
reused, attention to the keys it sees, and the weights read once in each step beside the keys and
values that decoding reads. Both shares are of the whole run, waiting included.
"""

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class Sequence:
    """One prompt: `known` of its tokens were reused; `output` tokens in each completion."""

    prompt: int
    known: float
    output: int
    completions: int = 1


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """What a token costs in a model as it is loaded."""

    matrices: int  # numbers in the layers' matrices: 2 FLOPs each for every token
    head: int  # numbers in the output matrix: for the tokens that are sampled from
    weight_bytes: int  # of both, read in every step
    attention_width: int  # query heads x their width: 4 FLOPs each for every key and layer
    kv_bytes: int  # of one token in all layers
    windows: Mapping[int, int]  # keys that a token sees at most (0: all) -> layers

    @classmethod
    def of(cls, engine: Any) -> "Work":
        """Of `LLM.engine`."""
        import jax
        from flax import nnx

        from kvjax.models.layers import Linear

        runner, config = engine.runner, engine.runner.config
        model = nnx.merge(runner._graph, jax.tree.unflatten(runner._weights_tree, runner._weights))
        head = model.embedding.table if model.output is None else model.output
        inner = [
            module
            for path, module in nnx.iter_modules(model)
            if isinstance(module, Linear) and not {"embedding", "output"} & set(path)
        ]
        return cls(
            matrices=sum(_size(module) for module in inner),
            head=_size(head),
            weight_bytes=sum(module.weight[...].nbytes for module in [*inner, head]),
            attention_width=config.num_heads * config.head_dim,
            kv_bytes=engine.spec.bytes(1),
            windows=dict(Counter(config.window(i) or 0 for i in range(config.num_layers))),
        )

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Work":
        """From `dataclasses.asdict`, after a way through JSON."""
        windows = {int(window): layers for window, layers in fields["windows"].items()}
        return cls(**{**fields, "windows": windows})

    def flops(self, sequences: Iterable[Sequence]) -> float:
        """Of everything that was computed for the sequences."""
        total = 0.0
        for s in sequences:
            decoded = s.completions * (s.output - 1)
            total += 2 * self.matrices * (s.prompt - s.known + decoded)
            total += 2 * self.head * s.completions * s.output
            keys = self._keys(s.known, s.prompt)
            keys += s.completions * self._keys(s.prompt, s.prompt + s.output - 1)
            total += 4 * self.attention_width * keys
        return total

    def bytes(self, sequences: Iterable[Sequence], steps: int) -> float:
        """Weights once in each step, and for each decoded token the keys and values it sees."""
        layers = sum(self.windows.values())
        keys = sum(s.completions * self._keys(s.prompt, s.prompt + s.output - 1) for s in sequences)
        return steps * self.weight_bytes + self.kv_bytes / layers * keys

    def _keys(self, first: float, stop: float) -> float:
        """Keys that the tokens from `first` to before `stop` see, over all layers."""
        return sum(
            layers * (_triangle(stop, window) - _triangle(first, window))
            for window, layers in self.windows.items()
        )


def shares(
    work: Work,
    ceilings: Mapping[str, float],
    sequences: Iterable[Sequence],
    seconds: float,
    steps: int | None,
) -> dict[str, float | None]:
    """Shares of the ceilings; that of the bandwidth is None where nobody counted the steps."""
    found = list(sequences)
    compute = work.flops(found) / seconds / ceilings["matmul"]
    read = None if steps is None else work.bytes(found, steps) / seconds / ceilings["copy"]
    return {"share_of_compute": compute, "share_of_bandwidth": read}


def ceilings(dtype: str) -> dict[str, float] | None:
    """`kvjax.benchmarks.ceilings` in a process of its own: nothing of it stays in this one's peak.

    None, and a line on standard error, if that failed: the run goes on without its shares.
    """
    command = [sys.executable, "-m", "kvjax.benchmarks.ceilings", dtype]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        print(f"the device's ceilings were not measured: {done.stderr[-500:]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def _size(linear: Any) -> int:
    size = 1
    for axis in linear.shape:
        size *= axis
    return size


def _triangle(count: float, window: int) -> float:
    """The sum of min(i + 1, window) over i < count; window 0: of i + 1."""
    if not window or count <= window:
        return count * (count + 1) / 2
    return window * (window + 1) / 2 + (count - window) * window
