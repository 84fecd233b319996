"""The tiny models in tests/models/golden: configurations, weights, transformers' logits."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = sorted(path.stem for path in GOLDEN.glob("*.npz"))


@dataclasses.dataclass(frozen=True, eq=False)
class GoldenCase:
    """One configuration. `logits[i]` belong to `ids[i]`, float32 `[tokens, vocab]`."""

    family: str
    name: str
    config: dict[str, Any]  # as transformers 4 wrote it
    saved: dict[str, Any]  # as transformers 5 writes it
    tensors: dict[str, np.ndarray]
    ids: list[np.ndarray]
    logits: list[np.ndarray]


@functools.cache
def load_family(family: str) -> dict[str, GoldenCase]:
    """Every case of a file, by name."""
    with np.load(GOLDEN / f"{family}.npz") as file:
        arrays = {name: file[name] for name in file.files}
    weights = "weights/"
    tensors = {n[len(weights) :]: array for n, array in arrays.items() if n.startswith(weights)}
    cases = {}
    for case in json.loads(arrays["cases"].tobytes()):
        name, sequences = case["name"], range(len(case["lengths"]))
        cases[name] = GoldenCase(
            family=family,
            name=name,
            config=case["config"],
            saved=case["saved"],
            tensors=tensors,
            ids=[arrays[f"ids/{i}"] for i in sequences],
            logits=[arrays[f"logits/{name}/{i}"] for i in sequences],
        )
    return cases


def all_cases() -> list[tuple[str, str]]:
    """`(family, case)` of everything there is."""
    return [(family, name) for family in FAMILIES for name in load_family(family)]
