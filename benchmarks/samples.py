"""What a result file measured, as samples that can be compared: one list of values per figure."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kvjax.benchmarks import reuse_results
from kvjax.benchmarks.results import METRICS
from kvjax.benchmarks.reuse_results import Results

LEAST_KL = 1e-4  # nats: a loss below it is that of other sums, not of reuse
LEAST_ROUNDS = 3  # with fewer, the requests of a serving run are the sample
_NO_QUALITY = ("other_cores", "same_tokens")  # neither more nor less of them is better
_COUNTS = ("bytes", "flops")  # of a kernel's row: they follow from what names it
Run = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """Repeated measurements of one figure, all positive; or of one on named items, of any size."""

    values: tuple[float, ...]
    unit: str
    higher_is_better: bool
    items: tuple[str, ...] = ()  # what each value is of: two samples of the same ones are paired
    floor: float = 0.0  # means below it count as it


def read(path: Path) -> dict[str, Any]:
    """The result in a file, of several the newest. Raises `ValueError` for a file that is none."""
    return read_all(path)[-1]


def read_all(path: Path) -> list[dict[str, Any]]:
    """The results in a file of any command: one, or a line for each that was appended.

    Raises `ValueError` for a file that is none.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            rows = [json.loads(text)]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no benchmark result: {error}") from None
    if rows and isinstance(rows[0], dict) and set(rows[0]) == {"manifest"}:
        return [_reuse_run(path)]
    for run in rows:
        if not isinstance(run, dict) or command(run) not in READERS:
            raise ValueError(f"{path} is no benchmark result of {', '.join([*READERS, 'reuse'])}")
    if not rows:
        raise ValueError(f"{path} is no benchmark result: it is empty")
    return rows


def _reuse_run(path: Path) -> dict[str, Any]:
    """The readings of `bench reuse`, with a manifest whose keys are those of other results."""
    found = reuse_results.read(path)
    about = found.manifest.get("about", {})
    model = {k: about.get(k) for k in ("model", "weights", "dtype", "kv_dtype")}
    manifest = {**found.manifest, "model": model}
    return {"command": "reuse", "manifest": manifest, "results": found}


def command(run: Run) -> str:
    """Which command wrote a result; the oldest files are known by what is in them."""
    if "command" in run:
        return str(run["command"])
    for name, key in (("overhead", "results"), ("http", "first_token"), ("kernels", "ceilings")):
        if key in run:
            return name
    return "engine" if "rows" in run else ""


def samples(run: Run) -> dict[str, Sample]:
    """Figure -> sample, in the order of the file; those that were not measured are left out."""
    if command(run) == "reuse":
        return _reuse(run["results"])
    found = {}
    for name, values, unit, higher in READERS[command(run)](run):
        kept = tuple(float(v) for v in values if v is not None and v > 0)
        if kept:
            found[name] = Sample(kept, unit, higher)
    return found


_Row = tuple[str, list[Any], str, bool]


def _engine(run: Run) -> Iterator[_Row]:
    for row in run["rows"]:
        metric = row["metric"]
        if metric in METRICS and metric not in _NO_QUALITY:
            name = f"{row['target']} {row['dtype']} {metric}"
            yield name, row["values"], row["unit"], row["higher_is_better"]


def _kernels(run: Run) -> Iterator[_Row]:
    for row in run["rows"]:
        about = [
            str(v)
            for k, v in row.items()
            if isinstance(v, str | int) and k not in ("bytes", "flops")
        ]
        yield " ".join(about), row["seconds"], "s", False


def _overhead(run: Run) -> Iterator[_Row]:
    for dtype, cases in run["results"].items():
        for case, row in cases.items():
            yield f"{dtype} {case}", row["a_s"], "s", False


def _http(run: Run) -> Iterator[_Row]:
    rounds = run["throughput"]["rounds"]
    yield "throughput direct", [direct for direct, _ in rounds], "tokens/s", True
    yield "throughput http", [http for _, http in rounds], "tokens/s", True


def _reuse(found: Results) -> dict[str, Sample]:
    """Loss, agreement, right answers and time of each method; a full prefill has only its time."""
    figures: dict[str, Sample] = {}
    for corpus in found.corpora:
        for method in found.methods(corpus):
            readings = found.of(corpus, method)
            if not readings:
                continue
            title = f"{corpus} {method}"
            times = tuple(r.prefill_s for r in readings.values())
            figures[f"{title} first token"] = Sample(times, "s", False, tuple(readings))
            if method == "full":
                continue
            losses = tuple(r.kl_answer for r in readings.values())
            figures[f"{title} KL"] = Sample(losses, "nats", False, tuple(readings), LEAST_KL)
            shares = {
                "agreement": {i: r.agreement for i, r in readings.items()},
                "solved": {i: float(r.solved) for i, r in readings.items() if r.solved is not None},
            }
            for name, by_item in shares.items():
                if by_item:
                    values, items = tuple(by_item.values()), tuple(by_item)
                    floor = 0.5 / len(values)
                    figures[f"{title} {name}"] = Sample(values, "share", True, items, floor)
    return figures


def _reuse_speed(run: Run) -> Iterator[_Row]:
    for spec, row in run["long_prompt"].items():
        yield f"{spec} first token", row["reused_s"], "s", False


def _serve(run: Run) -> Iterator[_Row]:
    yield from _served("", run)
    for name, part in run.get("peers", {}).items():
        yield from _served(f"{name} ", part)


def _served(prefix: str, part: Run) -> Iterator[_Row]:
    rounds = part.get("rounds", [])
    for key in ("request_throughput", "request_goodput", "output_throughput"):
        unit = "tokens/s" if key == "output_throughput" else "requests/s"
        values = [r.get(key) for r in rounds] if rounds else [part.get(key)]
        yield prefix + key, values, unit, True
    for metric in ("ttft", "tpot", "itl", "e2el"):
        key = f"mean_{metric}_ms"
        if len(rounds) >= LEAST_ROUNDS:
            values = [r.get(key) for r in rounds]
        else:
            values = per_request_ms(part).get(metric) or [part.get(key)]
        yield prefix + key, values, "ms", False


def per_request_ms(part: Run) -> dict[str, list[float]]:
    """The times of each request that a detailed serving result has, in milliseconds.

    `itl` is a request's mean: gaps of one request depend on each other too much to be a sample.
    """
    if "ttfts" not in part or "latencies" not in part:
        return {}
    rows = zip(part["ttfts"], part["itls"], part["latencies"], part["output_lens"], strict=True)
    times: dict[str, list[float]] = {"ttft": [], "tpot": [], "itl": [], "e2el": []}
    for first, gaps, whole, count in rows:
        if first is None or not count:
            continue
        times["ttft"].append(1000 * first)
        times["e2el"].append(1000 * whole)
        if count > 1:
            times["tpot"].append(1000 * (whole - first) / (count - 1))
        if gaps:
            times["itl"].append(1000 * sum(gaps) / len(gaps))
    return times


def _latency(run: Run) -> Iterator[_Row]:
    yield "latency", run["latencies"], "s", False


def _throughput(run: Run) -> Iterator[_Row]:
    for key, unit in (("requests_per_second", "requests/s"), ("tokens_per_second", "tokens/s")):
        yield key, [r[key] for r in run["rounds"]], unit, True


def _startup(run: Run) -> Iterator[_Row]:
    for kind in ("cold", "warm"):
        for part in ("startup", "compilation", "first_token"):
            key = f"{kind}_{part}_times"
            yield key, run.get(key, []), "s", False


def _grammar(run: Run) -> Iterator[_Row]:
    for row in run["rows"]:
        name = f"{row['library']} {row['case']}"
        yield f"{name} compiled", row["compile_s"], "s", False
        yield f"{name} with 16 answers", row["whole_s"], "s", False


def _kamera_curves(run: Run) -> Iterator[_Row]:
    for curve, places in run["readings"].items():
        for at, readings in places.items():
            yield f"{curve} {at} KL", [one["kl_patched"] for one in readings], "nats", False


READERS: dict[str, Callable[[Run], Iterator[_Row]]] = {
    "engine": _engine,
    "kernels": _kernels,
    "overhead": _overhead,
    "http": _http,
    "reuse-speed": _reuse_speed,
    "serve": _serve,
    "latency": _latency,
    "throughput": _throughput,
    "startup": _startup,
    "grammar": _grammar,
    "kamera-curves": _kamera_curves,
}
