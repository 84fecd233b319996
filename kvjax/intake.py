"""From what a caller passes to a `Request`, and from a `Request` to what a caller gets back."""

import itertools
import random
import secrets
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from typing import Any

from kvjax.errors import PromptTooLong
from kvjax.models.chat import render_chat
from kvjax.models.tokenizers import Tokenizer
from kvjax.request import CompletionOutput, RequestMetrics, RequestOutput, SamplingParams
from kvjax.sequence import Request, Sequence
from kvjax.text import TextStream

Prompt = str | Seq[int] | Mapping[str, Any] | Seq[Mapping[str, Any]]


class Intake:
    """Checks and tokenises prompts, all before any device work, and words the answers."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        vocab_size: int,
        end_token_ids: tuple[int, ...],
        max_model_len: int,
        max_prompt_tokens: int,
        max_num_seqs: int,
        seed: int | None,
        clock: Callable[[], float],
    ) -> None:
        self.tokenizer, self.clock = tokenizer, clock
        self.vocab_size, self.end_token_ids = vocab_size, end_token_ids
        self.max_model_len, self.max_prompt_tokens = max_model_len, max_prompt_tokens
        self.max_num_seqs = max_num_seqs
        self._arrivals = itertools.count()
        self._random = None if seed is None else random.Random(seed)

    # ---- in ---------------------------------------------------------------------------------

    def request(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        samples: bool = True,
    ) -> Request:
        """A request ready for `Engine.add`.

        Raises:
          ValueError: the prompt is empty or holds ids outside the vocabulary, or a parameter does
            not fit the model.
          PromptTooLong: the prompt and one token do not fit the context or the page pool.
        """
        text, ids = self.tokens(prompt)
        return self.from_ids(ids, params, text=text, request_id=request_id, samples=samples)

    def from_ids(
        self,
        ids: list[int],
        params: SamplingParams,
        *,
        text: str | None = None,
        request_id: str | None = None,
        samples: bool = True,
        sequence: Sequence | None = None,
    ) -> Request:
        """The same from token ids; `sequence` is a parked one that goes on, with these tokens."""
        self._check(ids, params)
        arrival = next(self._arrivals)
        request = Request(
            request_id=str(arrival) if request_id is None else request_id,
            prompt_ids=ids,
            params=params,
            seed=self._seed() if params.seed is None else params.seed,
            metrics=RequestMetrics(arrival_time=self.clock()),
            arrival=arrival,
            prompt=text,
            bad_word_ids=self._bad_words(params),
            samples=samples,
        )
        if params.prompt_logprobs is not None:
            request.prompt_logprobs = [None] * len(ids)
        ends = () if params.ignore_eos else self.end_token_ids
        for branch in range(params.n):
            branched = sequence if sequence is not None else Sequence(request, list(ids), branch)
            branched.request, branched.branch, branched.num_prompt = request, branch, len(ids)
            branched.end_token_ids = ends
            branched.finish_reason = branched.stop_reason = None
            branched.text = TextStream(self.tokenizer, params) if samples else None
            branched.logprobs = [] if params.logprobs is not None else None
            branched.cumulative_logprob = 0.0
            request.sequences.append(branched)
        return request

    def tokens(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """Text (if any) and ids of a prompt: text, ids, chat messages, or a mapping with one of
        `prompt`, `prompt_token_ids`, `messages`."""
        if isinstance(prompt, str):
            if not prompt:
                raise ValueError("prompt must not be empty, got ''")
            return prompt, self.tokenizer.encode(prompt)
        if isinstance(prompt, Mapping):
            for key in ("prompt_token_ids", "prompt", "messages"):
                if key in prompt:
                    return self.tokens(prompt[key])
            raise ValueError(
                f"a prompt mapping needs 'prompt', 'prompt_token_ids' or 'messages', got "
                f"{sorted(map(str, prompt))}"
            )
        if not isinstance(prompt, Seq):
            raise ValueError(
                f"a prompt is text, token ids or messages, got {type(prompt).__name__}"
            )
        if prompt and all(isinstance(item, Mapping) for item in prompt):
            text = render_chat(self.tokenizer, list(prompt))  # type: ignore[arg-type]
            return text, self.tokenizer.encode(text, add_special_tokens=False)
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in prompt):
            raise ValueError(f"token ids must be integers, got {list(prompt)[:8]!r}")
        return None, [int(i) for i in prompt]  # type: ignore[arg-type]

    def _check(self, ids: list[int], params: SamplingParams) -> None:
        if not ids:
            raise ValueError("the prompt has no tokens")
        params.validate_for(self.vocab_size, self.max_model_len)
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"token id {i} is not in the vocabulary of {self.vocab_size}")
        if len(ids) >= self.max_model_len:
            raise PromptTooLong(
                f"the prompt has {len(ids)} tokens; with one to generate, max_model_len="
                f"{self.max_model_len} allows {self.max_model_len - 1}"
            )
        if len(ids) >= self.max_prompt_tokens:
            raise PromptTooLong(
                f"the prompt has {len(ids)} tokens; the KV cache holds {self.max_prompt_tokens}"
            )

    def _seed(self) -> int:
        return self._random.getrandbits(64) if self._random else secrets.randbits(64)

    def _bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """Token sequences of each bad word, as it stands alone and after a space."""
        found = dict.fromkeys(
            tuple(self.tokenizer.encode(lead + word, add_special_tokens=False))
            for word in params.bad_words or ()
            for lead in ("", " ")
        )
        return tuple(ids for ids in found if ids)

    # ---- out --------------------------------------------------------------------------------

    def output(self, request: Request, *, streaming: bool = False) -> RequestOutput:
        """The state of a request; `streaming` holds back text that a later token could change."""
        logprobs = request.prompt_logprobs
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=tuple(request.prompt_ids),
            outputs=tuple(_completion(s, streaming) for s in request.sequences),
            finished=request.finished,
            prompt_logprobs=None if logprobs is None else tuple(logprobs),
            metrics=request.metrics,
            num_cached_tokens=request.num_cached_tokens,
            error=request.error,
        )


def _completion(sequence: Sequence, streaming: bool) -> CompletionOutput:
    text = sequence.text
    shown = ""
    if isinstance(text, TextStream):
        shown = text.shown if streaming else text.text
    return CompletionOutput(
        index=sequence.branch,
        text=shown,
        token_ids=sequence.output_ids,
        cumulative_logprob=None if sequence.logprobs is None else sequence.cumulative_logprob,
        logprobs=None if sequence.logprobs is None else tuple(sequence.logprobs),
        finish_reason=sequence.finish_reason,
        stop_reason=sequence.stop_reason,
    )
