"""From what a caller passes to a `Request`, and from a `Request` to what a caller gets back."""

import dataclasses
import itertools
import numbers
import operator
import random
import secrets
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from typing import Any

from kvjax.decode import RowRequest, pack_rows, seat_features, stage_arguments
from kvjax.errors import PromptTooLong
from kvjax.grammar import Grammars
from kvjax.marked import chat_parts, has_chunks, is_marked, part_of
from kvjax.models.chat import render_chat
from kvjax.models.tokenizers import Tokenizer
from kvjax.request import (
    Chunk,
    CompletionOutput,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
    StructuredOutputs,
)
from kvjax.reuse import Strategy, parse
from kvjax.reuse.gate import Gate
from kvjax.reuse.report import ReuseReport
from kvjax.sequence import Request, Sequence
from kvjax.text import TextStream

Prompt = (
    str | Seq[int] | Mapping[str, Any] | Seq[Mapping[str, Any]] | Seq[str | tuple[int, ...] | Chunk]
)


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
        seed: int | None,
        clock: Callable[[], float],
        reuse: Any = None,
        gate: Gate | None = None,
    ) -> None:
        """`gate`: what approximate strategies have to pass; None lets all of them through."""
        self.tokenizer, self.clock = tokenizer, clock
        self.vocab_size, self.end_token_ids = vocab_size, end_token_ids
        self.max_model_len, self.max_prompt_tokens = max_model_len, max_prompt_tokens
        self._gate = gate
        self.reuse = self.strategy(reuse)
        self.grammars = Grammars(tokenizer, vocab_size, end_token_ids)
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
          PromptTooLong: the prompt and one token do not fit the context, or the prompt does not
            fit the page pool.
          ReuseRefused: the strategy for its chunks may not serve this model.
        """
        text, ids, spans = self.marked_tokens(prompt)
        if text is not None:
            ids = self.checked_ids(ids)  # a vocabulary can be larger than the model's
        request = self.from_ids(ids, params, text=text, request_id=request_id, samples=samples)
        if spans and params.prompt_logprobs is None:  # which need every prompt token run
            request.strategy = self.reuse if params.reuse is None else self.strategy(params.reuse)
            request.chunk_spans = spans
        return request

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
        bad_word_ids = self._bad_words(params)
        self._check_device_limits(params, bad_word_ids)
        asked = params.structured_outputs
        matcher = None
        if samples and isinstance(asked, StructuredOutputs):
            matcher = self.grammars.matcher(asked)
        arrival = next(self._arrivals)
        request = Request(
            request_id=str(arrival) if request_id is None else request_id,
            prompt_ids=tuple(ids),
            params=params,
            seed=self._seed() if params.seed is None else params.seed,
            metrics=RequestMetrics(arrival_time=self.clock()),
            arrival=arrival,
            prompt=text,
            bad_word_ids=bad_word_ids,
            samples=samples,
        )
        if params.prompt_logprobs is not None:
            request.prompt_logprobs = [None for _ in ids]
        ends = () if params.ignore_eos else self.end_token_ids
        for branch in range(params.branch, params.branch + params.n):
            branched = sequence if sequence is not None else Sequence(request, list(ids))
            branched.request, branched.branch, branched.num_prompt = request, branch, len(ids)
            branched.end_token_ids = ends
            branched.finish_reason = branched.stop_reason = None
            if samples:
                stops = (*ends, *(params.stop_token_ids or ()))
                branched.text = TextStream(self.tokenizer, params, stops, prompt_ids=ids)
            branched.grammar = None if matcher is None else matcher.fresh()
            branched.logprobs = [] if params.logprobs is not None else None
            branched.cumulative_logprob = 0.0
            request.sequences.append(branched)
        return request

    def marked_tokens(
        self, prompt: Prompt
    ) -> tuple[str | None, list[int], tuple[tuple[int, int], ...]]:
        """Text and ids of a prompt, and the spans of its chunks. Parts are tokenised by themselves:
        the same text gives the same ids wherever it stands. Token ids come with `chunk_spans`."""
        if isinstance(prompt, Mapping) and "chunk_spans" in prompt:
            ids = self.checked_ids(prompt.get("prompt_token_ids", []))
            return None, ids, _checked_spans(prompt["chunk_spans"], len(ids))
        if isinstance(prompt, Mapping) and isinstance(prompt.get("prompt"), list):
            prompt = [part_of(part) for part in prompt["prompt"]]
        messages = prompt.get("messages") if isinstance(prompt, Mapping) else prompt
        chat = has_chunks(messages)
        if chat:
            prompt = chat_parts(self.tokenizer, messages)  # type: ignore[arg-type]
        if not is_marked(prompt):
            return *self.tokens(prompt), ()
        ids: list[int] = []
        spans, texts = [], []
        parts: list[Any] = list(prompt)
        for number, part in enumerate(parts):
            content = part.content if isinstance(part, Chunk) else part
            if isinstance(content, str):
                # A template writes its own special tokens.
                first = number == 0 and not isinstance(part, Chunk) and not chat
                encoded = self.tokenizer.encode(content, add_special_tokens=first)
                texts.append(content)
            else:
                encoded = self.checked_ids(content)
                texts.append(self.tokenizer.decode(encoded, skip_special_tokens=False))
            if isinstance(part, Chunk):
                if not encoded:
                    raise ValueError(f"a chunk has no tokens: {content!r}")
                spans.append((len(ids), len(ids) + len(encoded)))
            ids += encoded
        return "".join(texts), ids, tuple(spans)

    def tokens(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """Text (if any) and ids of a prompt: text, ids, chat messages, or a mapping with one of
        `prompt`, `prompt_token_ids`, `messages`."""
        if isinstance(prompt, str):
            if not prompt:
                raise ValueError("prompt must not be empty, got ''")
            return prompt, self.tokenizer.encode(prompt)
        if isinstance(prompt, Mapping):
            if "prompt_token_ids" in prompt:
                return None, self.checked_ids(prompt["prompt_token_ids"])
            if "prompt" in prompt:
                return self.tokens(prompt["prompt"])
            if "messages" in prompt:
                return self._chat(prompt["messages"])
            raise ValueError(
                f"a prompt mapping needs 'prompt', 'prompt_token_ids' or 'messages', got "
                f"{sorted(map(str, prompt))}"
            )
        if not isinstance(prompt, Seq) or isinstance(prompt, bytes | bytearray):
            raise ValueError(
                f"a prompt is text, token ids or messages, got {type(prompt).__name__}"
            )
        if prompt and all(isinstance(item, Mapping) for item in prompt):
            return self._chat(prompt)
        return None, self.checked_ids(prompt)

    def _chat(self, messages: Any) -> tuple[str, list[int]]:
        """Text and ids of a conversation, ready for the answer."""
        text = render_chat(self.tokenizer, messages)
        return text, self.tokenizer.encode(text, add_special_tokens=False)

    def checked_ids(self, ids: Iterable[Any]) -> list[int]:
        """`ids` as a list. Raises `ValueError` for what is no integer or not in the vocabulary."""
        if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
            raise ValueError(f"token ids are a list of integers, got {type(ids).__name__}")
        ids = list(ids)
        if not all(isinstance(i, numbers.Integral) and not isinstance(i, bool) for i in ids):
            raise ValueError(f"token ids must be integers, got {ids[:8]!r}")
        if ids and (min(ids) < 0 or max(ids) >= self.vocab_size):
            wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise ValueError(f"token id {wrong} is not in the vocabulary of {self.vocab_size}")
        return [int(i) for i in ids]

    def _check(self, ids: list[int], params: SamplingParams) -> None:
        if not isinstance(params, SamplingParams):
            raise ValueError(f"expected SamplingParams, got {type(params).__name__}")
        if not ids:
            raise ValueError("the prompt has no tokens")
        params.validate_for(self.vocab_size, self.max_model_len)
        if len(ids) >= self.max_model_len:
            raise PromptTooLong(
                f"the prompt has {len(ids)} tokens; with one to generate, max_model_len="
                f"{self.max_model_len} allows {self.max_model_len - 1}"
            )
        if len(ids) > self.max_prompt_tokens:
            raise PromptTooLong(
                f"the prompt has {len(ids)} tokens; the KV cache holds {self.max_prompt_tokens}"
            )

    def _check_device_limits(
        self, params: SamplingParams, bad_word_ids: tuple[tuple[int, ...], ...]
    ) -> None:
        """Packs what a step would, so that what does not fit is refused here and not there."""
        if params.extra_args or params.min_tokens:
            row = RowRequest(0, params, 0, 0, end_token_ids=self.end_token_ids)
            pack_rows([row], 1, 1, stage_arguments())
        if bad_word_ids:
            seat_features(params, self.vocab_size, bad_word_ids=bad_word_ids)

    def strategy(self, spec: Any) -> Strategy:
        """The strategy of a spec, if it may serve this model. Reads the weights when it first has
        to know which model that is.

        Raises:
          UnknownStrategy, ReuseRefused, ValueError: see `kvjax.reuse.parse` and `Gate.check`.
        """
        strategy = parse(spec).for_tokenizer(self.tokenizer)
        if self._gate is not None:
            self._gate.check(strategy)
        return strategy

    def report(self, request: Request) -> ReuseReport | None:
        """How the prompt's KV came about, with what that was measured to cost."""
        if request.report is None or request.strategy is None or self._gate is None:
            return request.report  # of a continued branch, whose prompt came with another request
        loss = self._gate.loss(request.strategy)
        return dataclasses.replace(request.report, estimated_loss=loss)

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
            prompt_token_ids=request.prompt_ids,
            outputs=tuple(_completion(i, s, streaming) for i, s in enumerate(request.sequences)),
            finished=request.finished,
            prompt_logprobs=None if logprobs is None else tuple(logprobs),
            metrics=dataclasses.replace(request.metrics),
            num_cached_tokens=request.num_cached_tokens,
            reuse=self.report(request),
            error=request.error,
        )


def _completion(index: int, sequence: Sequence, streaming: bool) -> CompletionOutput:
    text = sequence.text
    shown = ""
    if isinstance(text, TextStream):
        shown = text.shown if streaming else text.text
    return CompletionOutput(
        index=index,
        text=shown,
        token_ids=sequence.output_ids,
        cumulative_logprob=None if sequence.logprobs is None else sequence.cumulative_logprob,
        logprobs=None if sequence.logprobs is None else tuple(sequence.logprobs),
        finish_reason=sequence.finish_reason,
        stop_reason=sequence.stop_reason,
    )


def _checked_spans(spans: Iterable[tuple[int, int]], length: int) -> tuple[tuple[int, int], ...]:
    """`spans` if they are ascending, apart, not empty and within the prompt; else `ValueError`."""
    try:
        checked, end = tuple((operator.index(a), operator.index(b)) for a, b in spans), 0
    except (TypeError, ValueError):
        raise ValueError(f"chunk_spans must be pairs of integers, got {spans!r}") from None
    for start, stop in checked:
        if not end <= start < stop <= length:
            raise ValueError(
                f"chunk_spans must be ascending and within the {length} tokens of the prompt, got "
                f"[{start}, {stop})"
            )
        end = stop
    return checked
