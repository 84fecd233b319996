"""A sequence that outlives its request: computed once, forked, continued, closed."""

import dataclasses
from collections.abc import Iterable

import numpy as np

from kvjax.engine import Engine
from kvjax.errors import KVJaxError
from kvjax.intake import Intake
from kvjax.readout import LayerKV
from kvjax.request import SamplingParams
from kvjax.reuse.report import ReuseReport
from kvjax.sequence import Request, Sequence, Status


class Branch:
    """Tokens whose KV is kept on the device until the branch is closed. Made by `LLM.open`.

    One that nobody refers to any more counts as closed.

    Forking costs no device work and copies nothing; a shared partial page is copied when one of
    the branches writes to it.
    """

    def __init__(
        self, engine: Engine, intake: Intake, sequence: Sequence, cache_salt: str | None
    ) -> None:
        self._engine, self._intake = engine, intake
        self._sequence, self._salt = sequence, cache_salt
        self._closed = False

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Everything so far: prompt, appended text, output of its runs."""
        return tuple(self._sequence.tokens)

    @property
    def num_computed_tokens(self) -> int:
        """How many of them have their KV on the device."""
        return self._sequence.num_computed

    @property
    def reuse(self) -> ReuseReport | None:
        """How the KV of its prompt came about; None if nothing but exact prefixes was asked for."""
        return self._intake.report(self._sequence.request)

    def append(self, text_or_ids: str | Iterable[int]) -> "Branch":
        """Adds text (tokenised by itself) or token ids; computed at the next run.

        Raises `ValueError`, and adds nothing, for ids that are not in the vocabulary.
        """
        sequence = self._usable()
        if isinstance(text_or_ids, str):
            text_or_ids = self._intake.tokenizer.encode(text_or_ids, add_special_tokens=False)
        sequence.tokens.extend(self._intake.checked_ids(text_or_ids))
        return self

    def fork(self, count: int) -> list["Branch"]:
        """`count` branches that share this one's KV. This one stays usable."""
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        parent = self._usable()
        branches = []
        for _ in range(count):
            child = Sequence(
                parent.request, list(parent.tokens), keeps_pages=True, status=Status.FINISHED
            )
            self._engine.park(child, parent)
            branches.append(Branch(self._engine, self._intake, child, self._salt))
        return branches

    def request(self, params: SamplingParams, engine: Engine) -> Request:
        """What `engine` continues this branch by. It stays in the branch's `cache_salt`."""
        sequence = self._usable()
        if engine is not self._engine:
            raise ValueError("a branch runs on the LLM that opened it: its KV is there")
        if params.n != 1:
            raise ValueError(f"a branch runs with n=1, got n={params.n}: fork it instead")
        if params.prompt_logprobs is not None:
            raise ValueError(
                "prompt_logprobs cannot be had of a branch: its KV is computed already"
            )
        if params.cache_salt not in (None, self._salt):
            raise ValueError(f"the branch was opened with cache_salt={self._salt!r}")
        params = dataclasses.replace(params, cache_salt=self._salt)
        return self._intake.from_ids(list(sequence.tokens), params, sequence=sequence)

    def logits(self, continuation: Iterable[int] = ()) -> np.ndarray:
        """Float32 logits `[1 + len(continuation), vocab]`: of what follows the last token, and what
        follows each token of `continuation`. The branch stays as it is.

        Raises:
          ValueError: ids are not in the vocabulary, the context is too short for them, or tokens of
            the branch are not computed yet.
          OutOfPages: there is no room for the KV of `continuation`.
        """
        sequence, ids = self._computed(), self._intake.checked_ids(continuation)
        if (total := len(sequence.tokens) + len(ids)) > self._intake.max_model_len:
            raise ValueError(
                f"the branch and its continuation have {total} tokens; max_model_len is "
                f"{self._intake.max_model_len}"
            )
        return self._engine.score(sequence, ids)

    def kv(self) -> tuple[LayerKV, ...]:
        """Keys (turned to their positions) and values of every token, layer by layer.

        Raises `ValueError` if tokens of the branch are not computed yet.
        """
        return self._engine.read(self._computed())

    def _computed(self) -> Sequence:
        sequence = self._usable()
        if sequence.num_computed < len(sequence.tokens):
            raise ValueError(
                f"{len(sequence.tokens) - sequence.num_computed} tokens of the branch are not "
                "computed yet: run it first"
            )
        return sequence

    def close(self) -> None:
        """Gives the pages back. Closing twice does nothing."""
        if not self._closed:
            self._closed = True
            self._engine.discard(self._sequence)

    def __del__(self) -> None:
        if not self._closed:
            self._engine.abandon(self._sequence)

    def _usable(self) -> Sequence:
        if self._closed:
            raise KVJaxError("the branch is closed")
        return self._sequence

    def __enter__(self) -> "Branch":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
