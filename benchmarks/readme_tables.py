"""The README's tables of numbers, made from the results: `make readme-tables`.

Each table stands between `<!-- table NAME -->` and `<!-- end -->`. Of several results with the same
figure the newest counts (their names have the time). A test fails when README and results disagree.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kvjax.benchmarks import readme_serve, reuse_methods, reuse_results, reuse_table
from kvjax.benchmarks.readme_serve import line as _line

FOLDER = Path(__file__).resolve().parent / "results"
_TARGETS = {  # in the results -> in the tables
    "kvjax-jax012": "kvjax", "kvjax-jax010": "jax 0.10", "transformers": "transformers",
    "vllm": "vLLM", "openvino": "OpenVINO", "llamacpp": "llama.cpp",
}  # fmt: skip
_ROWS = {  # metric -> row, digits
    "prefill_tps": ("prefill, 512 tokens (tokens/s)", 0),
    "decode_b1_tps": ("decode, batch 1 (tokens/s)", 0),
    "decode_b8_tps": ("decode, batch 8 (tokens/s)", 0),
    "ttft_cold_s": ("first token, 1,532 tokens cold (s)", 2),
    "ttft_warm_s": ("first token, 1,500 of them cached (s)", 3),
    "shared_prefix_s": ("8 requests on one cached prefix (s)", 1),
    "start_up_s": ("start-up to the first token (s)", 1),
    "start_up_empty_cache_s": ("the same, nothing compiled before (s)", 1),
    "peak_rss_mib": ("peak memory (MiB)", 0),
}
_SUBJECTS = {
    "kvjax": "kvjax, from pages", "jax.nn, XLA": "jax.nn",
    "contiguous, XLA": "two products, XLA", "torch SDPA": "torch SDPA",
    "torch FlexAttention": "torch FlexAttention",
}  # fmt: skip
_BLOCK = re.compile(r"(<!-- table ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str, folder: Path = FOLDER) -> str:
    """`text` with every table made anew. Raises `ValueError` for a table that is not known."""

    def table(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"unknown table {match[2]!r}; there are {', '.join(TABLES)}")
        return f"{match[1]}{TABLES[match[2]](folder)}{match[3]}"

    return _BLOCK.sub(table, text)


def engine_table(dtype: str) -> Callable[[Path], str]:
    """A function that makes the table of one dtype from a folder's engine results."""

    def make(folder: Path) -> str:
        found = {
            (row["target"], row["metric"]): row["median"]
            for run in _runs(folder, "engine")
            for row in run["rows"]
            if row["dtype"] == dtype
        }
        targets = [t for t in _TARGETS if any(target == t for target, _ in found)]
        lines = [_line(dtype, *(_TARGETS[t] for t in targets)), _rule("---:", len(targets))]
        for metric, (name, digits) in _ROWS.items():
            values = [found.get((t, metric)) for t in targets]
            cells = ["" if v is None else f"{v:,.{digits}f}" for v in values]
            lines.append(_line(name, *cells))
        return "\n".join(lines) + "\n"

    return make


def kernel_table(folder: Path) -> str:
    """Attention beside other implementations, in milliseconds."""
    found: dict[tuple[str, ...], dict[str, float]] = {}
    for run in _runs(folder, "kernels"):
        for row in run["rows"]:
            subject = row["subject"].removesuffix(" prefill")
            if subject in _SUBJECTS and row["case"] in ("prefill", "decode, compared"):
                size = (
                    f"prefill of {row['tokens']:,} tokens"
                    if row["case"] == "prefill"
                    else f"decode, batch {row['batch']}, context {row['context']:,}"
                )
                key = (size, run["dtype"])
                found.setdefault(key, {})[subject] = 1000 * row["median"]
    lines = [_line("", *_SUBJECTS.values()), _rule("---", len(_SUBJECTS))]
    for (size, dtype), medians in sorted(found.items()):
        if "torch SDPA" in medians:
            cells = [f"{medians[s]:#.3g}".rstrip(".") if s in medians else "" for s in _SUBJECTS]
            lines.append(_line(f"{size}, {dtype}", *cells))
    return "\n".join(lines) + "\n"


def reuse_quality(folder: Path) -> str:
    """Recovery and kept answers of every method, corpus beside corpus."""
    results = reuse_results.read(max(folder.glob("reuse-*.jsonl")))
    names = results.corpora
    heads = [f"{name}: {what}" for name in names for what in ("recovery (%)", "answers kept (%)")]
    lines = [_line("", "layer-tokens run (%)", *heads), _rule("---:", 1 + len(heads))]
    for spec in reuse_methods.check(results.methods(names[0])):
        # a method that was not measured on every item of a corpus has no number there
        whole = [n for n in names if len(results.of(n, spec)) == len(results.of(n, "full"))]
        if not whole:
            continue
        share = [r.computed_share for name in whole for r in results.of(name, spec).values()]
        cells = []
        for name in names:
            if name not in whole:
                cells += ["", ""]
                continue
            kept = 100 * reuse_table.solved_again(results, name, spec).value
            cells += [reuse_table.recovery(results, name, spec).text(0, 100), f"{kept:.0f}"]
        run = f"{100 * statistics.mean(share):.0f}"
        lines.append(_line(reuse_methods.title(spec), run, *cells))
    return "\n".join(lines) + "\n"


def reuse_speed(folder: Path) -> str:
    """First tokens of a long prompt over stored chunks."""
    *_, run = _runs(folder, "reuse-speed")
    heads = (
        "full (ms)",
        "reused (ms)",
        "speed-up",
        "range",
        "layer-tokens run (%)",
        "of 1 / share",
    )
    lines = [_line("", *heads), _rule("---:", len(heads))]
    for spec, row in run["long_prompt"].items():
        full, reused = (1000 * statistics.median(row[key]) for key in ("full_s", "reused_s"))
        spread = f"{row['speed_up_min']:.1f} to {row['speed_up_max']:.1f}"
        share, ceiling = f"{100 * row['share_run']:.1f}", f"{100 * row['of_ceiling']:.0f} %"
        cells = (f"{full:,.0f}", f"{reused:,.0f}", f"{row['speed_up']:.1f}", spread, share, ceiling)
        lines.append(_line(f"`{spec}`", *cells))
    return "\n".join(lines) + "\n"


def grammar_table(folder: Path) -> str:
    """Libraries of structured output, one beside the other."""
    *_, run = _runs(folder, "grammar")
    found = {(row["library"], row["case"]): row for row in run["rows"] if "error" not in row}
    libraries = list(dict.fromkeys(library for library, _ in found))
    median = statistics.median
    heads = (
        ("compiled (ms)", 1, lambda row: 1e3 * median(row["compile_s"])),
        ("a mask (us)", 0, lambda row: 1e6 * row["mask_s"]["median"]),
        ("slowest step of 16 rows (ms)", 1, lambda row: 1e3 * row["step_s"]["max"]),
        (
            "a new grammar and 16 answers (ms)",
            0,
            lambda row: 1e3 * median(row["whole_s"]),
        ),
    )
    first = " / ".join(libraries)
    lines = [_line(first, *(head for head, _, _ in heads)), _rule("---:", len(heads))]
    for case in dict.fromkeys(case for _, case in found):
        rows = [found.get((library, case)) for library in libraries]
        cells = [
            " / ".join("-" if row is None else f"{value(row):,.{digits}f}" for row in rows)
            for _, digits, value in heads
        ]
        lines.append(_line(case, *cells))
    return "\n".join(lines) + "\n"


TABLES: dict[str, Callable[[Path], str]] = {
    "engine-bfloat16": engine_table("bfloat16"),
    "engine-float32": engine_table("float32"),
    "engine-int8": engine_table("int8"),
    "grammar": grammar_table,
    "kernels": kernel_table,
    "reuse-quality": reuse_quality,
    "reuse-speed": reuse_speed,
    "serving": readme_serve.serving,
    "offline": readme_serve.offline,
}


def _runs(folder: Path, command: str) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob(f"{command}-*.json")):
        yield json.loads(path.read_text(encoding="utf-8"))


def _rule(kind: str, columns: int) -> str:
    return "|---|" + f"{kind}|" * columns


def main() -> int:
    """Writes the tables into the file named, or checks them."""
    parser = argparse.ArgumentParser(description="the README's tables from the results")
    parser.add_argument("file", type=Path)
    parser.add_argument("--check", action="store_true", help="1 if the file would change")
    args = parser.parse_args()
    text = args.file.read_text(encoding="utf-8")
    new = filled(text)
    if args.check:
        return int(new != text)
    args.file.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
