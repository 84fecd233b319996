"""Flags that several commands share: sampling, engine, sizes."""

import argparse
import dataclasses
import json
import re
from typing import Any

from kvjax.cache.chunks import CHUNK_EVICTION_POLICIES
from kvjax.cache.radix import EVICTION_POLICIES
from kvjax.config import KV_CACHE_DTYPES, EngineConfig
from kvjax.llm import LLM
from kvjax.models import WEIGHT_DTYPES
from kvjax.request import SamplingParams, StructuredOutputs

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)


def size(text: str) -> int:
    """Bytes in `512M`, `2G`, `1.5GiB` or `1000000`; units are powers of 1024."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"a size such as 512M or 2G, got {text!r}")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def show_size(num_bytes: float) -> str:
    """`size` backwards, to three digits or so."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"


def _ids(text: str) -> tuple[int, ...]:
    """Token ids in `1,2,3`."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"token ids such as 5,17, got {text!r}") from None


def _bias(text: str) -> dict[int, float]:
    """Token ids and numbers in `5:-100,17:2.5`."""
    try:
        pairs = [part.split(":") for part in text.split(",")]
        return {int(token_id): float(number) for token_id, number in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(f"biases such as 5:-100,17:2.5, got {text!r}") from None


def _structured(text: str) -> StructuredOutputs:
    """Fields of `StructuredOutputs` in JSON."""
    try:
        return StructuredOutputs(**json.loads(text))
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"{error}, got {text!r}") from None


def _max_tokens(text: str) -> int | None:
    """A number of tokens, or `none`."""
    try:
        return None if text == "none" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a number of tokens or 'none', got {text!r}") from None


_SAMPLING: tuple[tuple[str, dict[str, Any], str], ...] = (  # field, argparse options, help
    ("n", {"type": int}, "completions per prompt; they share its KV"),
    ("max_tokens", {"type": _max_tokens, "metavar": "N"}, "'none': up to the context length"),
    ("min_tokens", {"type": int}, "no end or stop token before that many"),
    ("temperature", {"type": float}, "0: greedy"),
    ("top_p", {"type": float}, "smallest set of tokens with at least this probability"),
    ("top_k", {"type": int}, "most likely tokens; 0: all"),
    ("min_p", {"type": float}, "least probability, relative to the most likely token"),
    ("presence_penalty", {"type": float}, "on tokens of the output"),
    ("frequency_penalty", {"type": float}, "the same, times their count"),
    ("repetition_penalty", {"type": float}, "on tokens of prompt and output"),
    ("seed", {"type": int}, "same seed, same tokens"),
    ("branch", {"type": int}, "number of the first completion: 2 repeats the third one of --n 3"),
    ("stop", {"action": "append", "metavar": "TEXT"}, "end before this text; may be repeated"),
    ("stop_token_ids", {"type": _ids, "metavar": "IDS"}, "end at these tokens: 5,17"),
    ("ignore_eos", {}, "do not end at the model's end token"),
    ("logprobs", {"type": int}, "report that many alternatives per output token"),
    ("prompt_logprobs", {"type": int}, "the same per prompt token"),
    ("logit_bias", {"type": _bias, "metavar": "ID:X,.."}, "add X to the logit of token ID"),
    ("allowed_token_ids", {"type": _ids, "metavar": "IDS"}, "draw from these tokens only"),
    ("bad_words", {"action": "append", "metavar": "WORD"}, "never write it; may be repeated"),
    ("structured_outputs", {"type": _structured, "metavar": "JSON"}, 'such as {"regex": "[ab]+"}'),
    ("skip_special_tokens", {}, "leave control tokens out of the text"),
    ("include_stop_str_in_output", {}, "keep the stop text"),
    ("priority", {"type": int}, "lower is served first"),
    ("cache_salt", {"metavar": "TEXT"}, "share KV only between requests of this salt"),
    ("skip_reading_prefix_cache", {}, "compute every prompt anew"),
)
_FIELDS = {field.name: field for field in dataclasses.fields(SamplingParams)}


def add_sampling(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """A flag for every field of `SamplingParams`; `defaults` replace the class's."""
    group = parser.add_argument_group("sampling")
    for name, options, text in _SAMPLING:
        default = defaults.get(name, _FIELDS[name].default)
        settings: dict[str, Any] = {"default": default, "help": text + _shown(default), **options}
        if isinstance(default, bool):
            settings["action"] = argparse.BooleanOptionalAction
        elif "metavar" not in settings:
            settings["metavar"] = "X" if settings.get("type") is float else "N"
        group.add_argument(_flag(name), **settings)


def sampling_of(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of `SamplingParams` that the flags set; checked when it is made."""
    return {name: getattr(args, name) for name, _, _ in _SAMPLING}


def add_engine(parser: argparse.ArgumentParser, *, reuse: bool = True) -> None:
    """Flags of `EngineConfig`, and what `LLM` takes beside it; `reuse=False`: without --reuse."""
    group = parser.add_argument_group("engine")
    default = EngineConfig()

    def add(name: str, text: str, **options: Any) -> None:
        value = getattr(default, name)
        if isinstance(value, bool):
            options["action"] = argparse.BooleanOptionalAction
        group.add_argument(_flag(name), default=value, help=text + _shown(value), **options)

    add("dtype", "of weights and activations", choices=WEIGHT_DTYPES)
    add("kv_cache_dtype", "of keys and values; int8 halves bfloat16", choices=KV_CACHE_DTYPES)
    add("max_model_len", "longest prompt and output together", type=int, metavar="TOKENS")
    add("max_num_seqs", "sequences in one step", type=int, metavar="N")
    add("max_num_batched_tokens", "tokens in one step", type=int, metavar="N")
    add("kv_cache_memory", "such as 512M or 2G", type=size, metavar="SIZE")
    add("memory_utilization", "share of an accelerator's memory", type=float, metavar="X")
    add("page_size", "KV slots per page; 16 on a CPU, 64 elsewhere", type=int, metavar="N")
    add("enable_prefix_caching", "reuse the KV of equal prompt beginnings")
    add("eviction_policy", "what leaves a full cache first", choices=sorted(EVICTION_POLICIES))
    if reuse:
        add("reuse", "of marked chunks, such as epic:k=16", metavar="SPEC")
    add("chunk_cache_share", "of the KV cache, for stored chunks", type=float, metavar="X")
    add("chunk_eviction_policy", "who leaves them first", choices=sorted(CHUNK_EVICTION_POLICIES))
    add("max_reuse_loss", "nats per token that reuse may cost", type=float, metavar="X")
    add("min_reuse_agreement", "share of answers that reuse must keep", type=float, metavar="X")
    add("force_reuse", "reuse that was not measured, or costs more (see kvjax reuse check)")
    add("deterministic", "bits of a result never depend on what else is in the batch")
    add("overlap", "plan a step while the device runs the one before")
    add("compilation_cache", "keep compiled programs for the next run")
    group.add_argument(
        "--tensor-parallel-size", type=int, default=1, metavar="N", help="devices per layer"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress, no start-up lines")


def open_llm(args: argparse.Namespace) -> LLM:
    """The engine that the flags describe."""
    return LLM(args.model, **engine_settings(args))


def engine_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags say of the engine, as arguments of `LLM` or `AsyncLLM`.

    A `--seed` is of the sampling parameters, where a command has these.
    """
    names = [field.name for field in dataclasses.fields(EngineConfig) if hasattr(args, field.name)]
    settings = {name: getattr(args, name) for name in names if name != "seed"}
    return {**settings, "tensor_parallel_size": args.tensor_parallel_size}


def _shown(default: Any) -> str:
    """A default as it stands in the help; switches and what has none say nothing."""
    return "" if default is None or isinstance(default, bool) else f" (default: {default})"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
