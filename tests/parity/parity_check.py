"""kvjax against a live transformers: recomputes every golden and compares it with ours.

Usage, from the repository root, with torch and transformers installed beside kvjax:

    python -m tests.parity.parity_check [families] [rope] [smollm2]

Nothing is read from tests/models/golden, so a transformers newer than the committed files is put to
the same test. Prints the largest difference of each comparison; exits with 1 if one is too large.
"""

# pyright: reportMissingImports=false

import argparse
import sys
from typing import Any

import numpy as np
import torch
import transformers

from kvjax.models import load_model, model_config
from kvjax.models.checkpoint import open_checkpoint
from kvjax.models.rope import rope_table
from tests.models.run_model import logits_in_one_step
from tests.parity import rope_tables, smollm2, tiny_models

FAMILY_TOLERANCE, SMOLLM2_TOLERANCE, NEAR_TIE = 1e-4, 1e-3, 1e-3


class Report:
    """Collects comparisons; remembers whether all were within bounds."""

    def __init__(self) -> None:
        self.passed = True

    def compare(self, what: str, difference: float, bound: float, note: str = "") -> None:
        """Prints one line."""
        within = bool(difference <= bound)
        self.passed &= within
        print(f"{'ok  ' if within else 'FAIL'} {what:<34} {difference:.1e} <= {bound:.0e} {note}")


def check_families(report: Report) -> None:
    """Logits of tiny random models of every class, in float32."""
    for seed, name in enumerate(sorted(tiny_models.FAMILIES)):
        cases = tiny_models.FAMILIES[name]
        weights = tiny_models.draw_weights(tiny_models.build(cases[0])[0], seed)
        for case in cases:
            model, saved = tiny_models.build(case)
            tiny_models.set_weights(model, weights)
            ids = [tiny_models.token_ids(length, seed=i) for i, length in enumerate(case.lengths)]
            ours = load_model(
                model_config(saved), weights, dtype="float32", num_positions=max(case.lengths)
            )
            pairs = zip(logits_in_one_step(ours, ids), ids, strict=True)
            difference = max(
                np.abs(mine - tiny_models.logits(model, tokens)).max() for mine, tokens in pairs
            )
            report.compare(f"{name} / {case.name}", difference, FAMILY_TOLERANCE)


def check_rope(report: Report) -> None:
    """Inverse frequencies (relative) and amplitudes of published rotary settings."""
    for golden in rope_tables.golden():
        config = transformers.AutoConfig.for_model(
            golden["config"]["model_type"],
            **{k: v for k, v in golden["config"].items() if k != "model_type"},
        )
        hf = config.to_dict() | golden["config"]
        hf |= {"first_k_dense_replace": hf["num_hidden_layers"], "rope_parameters": None}
        hf |= {"num_key_value_heads": hf["num_attention_heads"]}
        cos, sin = rope_table(model_config(hf).rope, golden["num_positions"])[1].astype(np.float64)
        theirs = np.asarray(golden["inverse_frequencies"])
        frequencies = np.abs(np.arctan2(sin, cos) / theirs - 1).max()
        amplitude = np.abs(np.hypot(cos, sin) / golden["amplitude"] - 1).max()
        report.compare(f"rope / {golden['name']}", max(frequencies, amplitude), 3e-6)


def check_smollm2(report: Report) -> None:
    """The real model: greedy tokens and leading logits of every prompt."""
    checkpoint, theirs = open_checkpoint(smollm2.MODEL), smollm2.golden()
    ours = load_model(
        model_config(checkpoint.config), checkpoint.tensors, dtype="float32", num_positions=256
    )
    decided = 0
    for prompt in theirs["prompts"]:
        sequence = np.asarray(prompt["prompt_ids"] + prompt["token_ids"][:-1], np.int32)
        # one length for all, so that the model compiles once; what follows changes nothing before
        padded = np.pad(sequence, (0, 192 - len(sequence)))
        logits = logits_in_one_step(ours, [padded])[0][: len(sequence)][-smollm2.NUM_TOKENS :]
        clear = np.asarray(prompt["margins"]) > NEAR_TIE
        decided += int(clear.sum())
        wrong = int((logits.argmax(-1) != np.asarray(prompt["token_ids"]))[clear].sum())
        difference = max(
            np.abs(logits[top["step"]][top["ids"]] - top["logits"]).max() for top in prompt["top"]
        )
        report.compare(
            f"smollm2 / {prompt['text'][-24:]!r}",
            difference if not wrong else np.inf,
            SMOLLM2_TOLERANCE,
            f"{wrong} of {clear.sum()} greedy tokens differ",
        )
    print(f"{decided} greedy tokens had a margin above {NEAR_TIE}")


CHECKS: dict[str, Any] = {
    "families": check_families,
    "rope": check_rope,
    "smollm2": check_smollm2,
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checks", nargs="*", metavar="check", help=", ".join(CHECKS))
    names = parser.parse_args().checks or list(CHECKS)
    if unknown := set(names) - set(CHECKS):
        parser.error(f"unknown checks {sorted(unknown)}; known are {', '.join(CHECKS)}")
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    report = Report()
    for name in names:
        CHECKS[name](report)
    sys.exit(0 if report.passed else 1)


if __name__ == "__main__":
    main()
