"""Writes what transformers computes to tests/models/golden, for tests that run without torch.

Usage, from the repository root, with torch and transformers installed beside kvjax:

    python -m tests.parity.make_goldens families
    python -m tests.parity.make_goldens rope
    python -m tests.parity.make_goldens smollm2

One `.npz` per family holds `weights/<name>` (float16), `cases` (JSON: name, config as written by
transformers 4 and 5, lengths), `ids/<i>` and `logits/<case>/<i>` (float32, eager attention).
"""

# pyright: reportMissingImports=false

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import transformers

from tests.parity import rope_tables, smollm2, tiny_models

GOLDEN = Path(__file__).parents[1] / "models" / "golden"


def family_golden(name: str) -> dict[str, np.ndarray]:
    """The arrays of one family's file."""
    cases = tiny_models.FAMILIES[name]
    seed = sorted(tiny_models.FAMILIES).index(name)
    first, _ = tiny_models.build(cases[0])
    weights = tiny_models.draw_weights(first, seed)
    arrays = {f"weights/{key}": value for key, value in weights.items()}
    described = []
    for case in cases:
        model, saved = tiny_models.build(case)
        tiny_models.set_weights(model, weights)
        described.append(
            {"name": case.name, "config": case.config, "saved": saved, "lengths": case.lengths}
        )
        for i, length in enumerate(case.lengths):
            arrays[f"ids/{i}"] = tiny_models.token_ids(length, seed=i)
            arrays[f"logits/{case.name}/{i}"] = tiny_models.logits(model, arrays[f"ids/{i}"])
    arrays["cases"] = np.frombuffer(json.dumps(described).encode(), np.uint8)
    return arrays


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=("families", "rope", "smollm2"))
    what = parser.parse_args().what
    GOLDEN.mkdir(exist_ok=True)
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    if what == "families":
        for name in tiny_models.FAMILIES:
            path = GOLDEN / f"{name}.npz"
            np.savez(path, **family_golden(name))  # type: ignore[arg-type]
            print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")
    else:
        content = smollm2.golden() if what == "smollm2" else rope_tables.golden()
        path = GOLDEN / f"{what}.json"
        path.write_text(json.dumps(content, separators=(",", ":")) + "\n")
        print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
