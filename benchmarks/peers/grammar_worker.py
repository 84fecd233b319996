"""One library of structured output, timed: `python grammar_worker.py LIBRARY < task > answer`.

Runs in the library's own environment; beside the standard library it imports numpy and that one
(for llguidance: kvjax).
Every row follows a text that fits, token by token: a mask is made, the next token is looked up in
it, and taken. So the times are those of a server whose model writes that text.

The task (JSON): `model`, `vocabulary` (base64 per token), `special` and `end` (ids), `threads`,
`rows`, and `cases` with `kind`, `spec`, `fitting` and `unfitting` (token ids per text).
"""

import base64
import importlib.metadata
import json
import sys
import time
from typing import Any

import numpy as np


class LLGuidance:
    """llguidance as kvjax has it, through `kvjax.grammar`: the environment must have kvjax."""

    packages = ("llguidance",)

    def __init__(self, task: dict[str, Any]) -> None:
        import llguidance

        from kvjax.grammar import Grammars

        tokenizer = open_tokenizer(task["model"])
        self._grammars = Grammars(tokenizer, len(task["vocabulary"]), task["end"])
        self._executor = llguidance.LLExecutor(num_threads=task["threads"])

    def compile(self, kind: str, spec: Any) -> Any:
        """A matcher at the beginning; raises ValueError."""
        from kvjax.request import StructuredOutputs

        return self._grammars.matcher(StructuredOutputs(**{kind: spec}))

    def fresh(self, compiled: Any) -> Any:
        """Another matcher at the beginning."""
        return compiled.fresh()

    def fill(self, matcher: Any, masks: np.ndarray, row: int) -> None:
        """Writes the mask of one row."""
        masks[row] = matcher.mask()

    def fill_all(self, matchers: list[Any], masks: np.ndarray) -> None:
        """Writes the masks of all rows, in threads."""
        pairs = [(matcher.inner, row) for row, matcher in enumerate(matchers)]
        self._executor.unsafe_compute_mask_ptr(
            pairs, masks.ctypes.data, masks[0].nbytes, len(masks)
        )

    def accept(self, matcher: Any, token: int) -> bool:
        """Takes a token."""
        return matcher.accept(token)


class XGrammar:
    """xgrammar. It imports torch and transformers, which kvjax has not."""

    packages = ("xgrammar", "torch", "transformers")

    def __init__(self, task: dict[str, Any]) -> None:
        import xgrammar  # type: ignore[import-not-found]

        self._lib = xgrammar
        special = set(task["special"])
        vocabulary = [
            b"" if i in special else text for i, text in enumerate(_decoded(task["vocabulary"]))
        ]  # an empty token is a control token, which no text holds
        info = xgrammar.TokenizerInfo(
            vocabulary, xgrammar.VocabType.RAW, vocab_size=len(vocabulary),
            stop_token_ids=task["end"],
        )  # fmt: skip
        self._compiler = xgrammar.GrammarCompiler(
            info, max_threads=task["threads"], cache_enabled=False
        )
        self._batch = xgrammar.BatchGrammarMatcher(max_threads=task["threads"])

    def compile(self, kind: str, spec: Any) -> Any:
        """A compiled grammar; raises what the library raises."""
        if kind == "json":
            return self._compiler.compile_json_schema(json.dumps(spec))
        if kind == "regex":
            return self._compiler.compile_regex(spec)
        return self._compiler.compile_lark(_lark(kind, spec))

    def fresh(self, compiled: Any) -> Any:
        """A matcher at the beginning."""
        return self._lib.GrammarMatcher(compiled)

    def fill(self, matcher: Any, masks: np.ndarray, row: int) -> None:
        """Writes the mask of one row; a mask that allows everything is not written."""
        if not matcher.fill_next_token_bitmask(masks, row):
            masks[row] = -1

    def fill_all(self, matchers: list[Any], masks: np.ndarray) -> None:
        """Writes the masks of all rows, in threads."""
        self._batch.batch_fill_next_token_bitmask(matchers, masks)

    def accept(self, matcher: Any, token: int) -> bool:
        """Takes a token."""
        return matcher.accept_token(token)


LIBRARIES = {"llguidance": LLGuidance, "xgrammar": XGrammar}


def open_tokenizer(model: str) -> Any:
    """The tokenizer of a model that kvjax knows."""
    from kvjax.build import open_checkpoint
    from kvjax.models.tokenizers import load_tokenizer

    return load_tokenizer(open_checkpoint(model))


def _decoded(vocabulary: list[str]) -> list[bytes]:
    return [base64.b64decode(token) for token in vocabulary]


def _lark(kind: str, spec: Any) -> str:
    return spec if kind == "grammar" else "start: " + " | ".join(map(json.dumps, spec))


def allows(masks: np.ndarray, row: int, token: int) -> bool:
    """Whether the token's bit is set."""
    return bool((int(masks[row, token // 32]) >> (token % 32)) & 1)


def follow(library: Any, compiled: Any, text: list[int], end: int, masks: np.ndarray) -> bool:
    """Whether every token of a text is allowed where it comes, and an end behind it."""
    matcher = library.fresh(compiled)
    for token in text:
        library.fill(matcher, masks, 0)
        if not allows(masks, 0, token) or not library.accept(matcher, token):
            return False
    library.fill(matcher, masks, 0)
    return allows(masks, 0, end)


def in_step(
    library: Any, compiled: Any, texts: list[list[int]], masks: np.ndarray, threads: bool
) -> tuple[list[float], list[float]]:
    """All rows one token further at a time, as a server does.

    Returns:
        Seconds of each mask (none with `threads`), and of each step: all rows' masks and tokens.
    """
    matchers = [library.fresh(compiled) for _ in texts]
    single: list[float] = []
    steps: list[float] = []
    for at in range(min(len(text) for text in texts)):
        start = time.perf_counter()
        if threads:
            library.fill_all(matchers, masks)
        else:
            for row, matcher in enumerate(matchers):
                before = time.perf_counter()
                library.fill(matcher, masks, row)
                single.append(time.perf_counter() - before)
        for matcher, text in zip(matchers, texts, strict=True):
            library.accept(matcher, text[at])
        steps.append(time.perf_counter() - start)
    return single, steps


def measure(library: Any, case: dict[str, Any], task: dict[str, Any]) -> dict[str, Any]:
    """The numbers of one case. An error is an answer, not a number."""
    rows, end = task["rows"], task["end"][0]
    masks = np.zeros((rows, -(-len(task["vocabulary"]) // 32)), np.int32)
    start = time.perf_counter()
    try:
        compiled = library.compile(case["kind"], case["spec"])
        library.fill(library.fresh(compiled), masks, 0)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:300]}
    compile_s = time.perf_counter() - start
    texts = [case["fitting"][i % len(case["fitting"])] for i in range(rows)]
    mask_s, step_s = in_step(library, compiled, texts, masks, threads=False)
    _, threaded_s = in_step(library, compiled, texts, masks, threads=True)
    return {
        "compile_s": compile_s,
        "mask_s": mask_s,
        "step_s": step_s,
        "step_in_threads_s": threaded_s,
        "fitting_accepted": sum(
            follow(library, compiled, t, end, masks) for t in case["fitting"]
        ),
        "unfitting_refused": sum(
            not follow(library, compiled, t, end, masks) for t in case["unfitting"]
        ),
    }  # fmt: skip


def main() -> None:
    """Answers one task."""
    task = json.load(sys.stdin)
    start = time.perf_counter()
    library = LIBRARIES[sys.argv[1]](task)
    library.compile("regex", "[a-z]{1,4}")  # what a first compilation sets up
    load_s = time.perf_counter() - start
    cases = [measure(library, case, task) for case in task["cases"]]
    answer = {
        "versions": {name: importlib.metadata.version(name) for name in library.packages},
        "load_s": load_s,
        "cases": cases,
    }
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
