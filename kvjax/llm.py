"""`LLM`: batch inference in one process. Names follow vLLM's, so that people can switch."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from kvjax.branch import Branch
from kvjax.build import build, tensor_parallel_mesh
from kvjax.chunk_library import ChunkLibrary
from kvjax.chunks import queued
from kvjax.conditioning import Conditioned, condition
from kvjax.config import EngineConfig
from kvjax.intake import Prompt
from kvjax.marked import is_marked
from kvjax.models.tokenizers import Tokenizer
from kvjax.progress import progress_bar
from kvjax.request import RequestOutput, SamplingParams
from kvjax.reuse import parse
from kvjax.reuse.restore import entering_name
from kvjax.sequence import Request, Sequence
from kvjax.stream import Job, Result, run_stream


class LLM:
    """A model, its KV cache and the loop around them.

    Args:
      model: a folder (Hugging Face or Orbax), a `.gguf` file, a hub id, or a name of
        `kvjax models` such as "smollm2-135m".
      tensor_parallel_size: devices that share every layer; or pass a `mesh` with an axis "model".
      config: everything else; single fields may be given as keywords instead.

    `chunks` is its `ChunkLibrary`: documents encoded ahead of time, pinned, saved, loaded.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        config: EngineConfig | None = None,
        tensor_parallel_size: int = 1,
        mesh: Mesh | None = None,
        **settings: Any,
    ) -> None:
        config = (config or EngineConfig()).replaced(settings)
        mesh = mesh if mesh is not None else tensor_parallel_mesh(tensor_parallel_size)
        built = build(model, config, mesh)
        self.engine, self._intake = built.engine, built.intake
        self.model_config, self.checkpoint = built.config, built.checkpoint
        self._tokenizer = built.tokenizer
        self.chunks = ChunkLibrary(built.engine, built.intake, lambda: built.checkpoint.fingerprint)

    def generate(
        self,
        prompts: Prompt | Seq[Prompt],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Completes every prompt, batched; outputs in the order of the prompts.

        All prompts are checked before any is run. A request that fails later has
        `finish_reason == "error"` and `.error`; the others are not touched by it.
        """
        requests = self._requests(prompts, sampling_params)
        with progress_bar(progress, len(requests)) as bar:
            for request in self._run(requests):
                if request.finished:
                    bar.finished(request)
        return [self._intake.output(request) for request in requests]

    def generate_iter(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
    ) -> Iterator[RequestOutput]:
        """Outputs as they grow: a snapshot of a request after each of its steps, then the final."""
        requests = self._requests(prompts, sampling_params)
        for request in self._run(requests):
            yield self._intake.output(request, streaming=not request.finished)

    def generate_stream(
        self,
        jobs: Iterable[Job],
        *,
        ordered: bool = False,
        window: int | None = None,
    ) -> Iterator[Result]:
        """Completes (key, prompt, params) jobs of any number, read as the engine drains.

        Yields (key, final output) as requests finish, or in the order of the jobs; a job that is
        refused yields (key, `ValueError`). At most `window` jobs are in memory.
        """
        return run_stream(self.engine, self._intake, jobs, ordered=ordered, window=window)

    def chat(
        self,
        messages: Seq[Mapping[str, Any]] | Seq[Seq[Mapping[str, Any]]],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Answers one conversation or a list of them, through the model's chat template."""
        one = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Any = [messages] if one else messages
        return self.generate(
            [{"messages": m} for m in conversations], sampling_params, progress=progress
        )

    # ---- branches ---------------------------------------------------------------------------

    def open(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        cache_salt: str | None = None,
    ) -> Branch:
        """Computes the KV of `prompt` and keeps it: fork it, append to it, run it.

        Of `sampling_params`, what concerns the prompt counts: `reuse` for its chunks, `cache_salt`,
        `skip_reading_prefix_cache`, `priority`, `extra_args`. Close it (or use `with`) to give its
        pages back.
        """
        given = sampling_params or SamplingParams()
        if cache_salt is not None and given.cache_salt not in (None, cache_salt):
            raise ValueError(f"two salts: {cache_salt=} and {given.cache_salt!r} in the parameters")
        cache_salt = cache_salt or given.cache_salt
        params = SamplingParams(
            max_tokens=1, cache_salt=cache_salt, reuse=given.reuse, priority=given.priority,
            skip_reading_prefix_cache=given.skip_reading_prefix_cache, extra_args=given.extra_args,
        )  # fmt: skip
        request = self._intake.request(prompt, params, samples=False)
        request.sequences[0].keeps_pages = True
        try:
            for _ in self._run([request]):
                pass
            if request.error is not None:
                raise request.error
        except BaseException:
            self.engine.discard(request.sequences[0])
            raise
        return Branch(self.engine, self._intake, request.sequences[0], cache_salt)

    def run(
        self,
        branches: Seq[Branch],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Continues branches, batched. Each keeps its own sequence, output included.

        With one `SamplingParams` for all, branch i draws as completion i of n would (see
        `SamplingParams.branch`), so that they differ under one seed; a list is taken as it is.
        """
        params = _each(sampling_params, len(branches))
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            params = [dataclasses.replace(p, branch=p.branch + i) for i, p in enumerate(params)]
        if len({id(branch) for branch in branches}) != len(branches):
            raise ValueError("a branch cannot be run twice at once: fork it")
        requests = [b.request(p, self.engine) for b, p in zip(branches, params, strict=True)]
        for _ in self._run(requests):
            pass
        return [self._intake.output(request) for request in requests]

    def relay(
        self,
        prompts: Prompt | Seq[Prompt],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        entering: int | None = None,
    ) -> list[RequestOutput]:
        """`generate`, and every output's KV is kept as a chunk for the prompts that quote it.

        `Chunk(completion.token_ids)`, with or without its end token, in a later prompt of the same
        `cache_salt` with `reuse="relaycaching"` finds the KV that decoding wrote. `entering`: keeps
        the hidden states that enter this layer too, for `relaycaching:start=` that layer; the
        layers below it run once more over the output for that.

        Raises `ValueError` if the model has no such layer above the first.
        """
        layers = self.model_config.num_layers
        if entering is not None and not 0 < entering < layers:
            raise ValueError(f"entering must be a layer in 1..{layers - 1}, got {entering}")
        requests = self._requests(prompts, sampling_params)
        sequences = [sequence for request in requests for sequence in request.sequences]
        for sequence in sequences:
            sequence.keeps_pages = True
        try:
            for _ in self._run(requests):
                pass
            for sequence in sequences:
                if sequence.request.error is None:
                    self.engine.chunks.keep_output(sequence, self._entering(sequence, entering))
        finally:
            for sequence in sequences:
                self.engine.discard(sequence)
        return [self._intake.output(request) for request in requests]

    def marked_ids(self, prompt: Prompt) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
        """Token ids of a prompt, and the spans of its chunks. Raises `ValueError` if it is none."""
        _, ids, spans = self._intake.marked_tokens(prompt)
        return tuple(self._intake.checked_ids(ids)), spans

    def _entering(self, sequence: Sequence, layer: int | None) -> dict[str, np.ndarray]:
        """Hidden states of a parked sequence's output."""
        start, stop = sequence.num_prompt, sequence.num_computed
        if layer is None or start >= stop:
            return {}
        rows = self.engine.entering(sequence, start, stop, layer)
        return {entering_name(layer): rows}

    # ---- the rest ---------------------------------------------------------------------------

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._tokenizer

    def reset_prefix_cache(self) -> int:
        """Forgets cached prefixes; the number of pages that became free."""
        return self.engine.reset_prefix_cache()

    def condition(
        self, prompt: Prompt, *, strategy: Any = "kamera", cache_salt: str | None = None
    ) -> Conditioned:
        """Makes the patch of every chunk of a marked prompt, for what stands in front of it there.

        Prompts with `reuse` of the same spec then find them, in any order of these antecedents:
        `llm.condition(["system", Chunk(a), Chunk(b)], strategy="kamera:rank=16")`.

        Raises:
          ValueError: no chunk is marked, or the strategy is not `Kamera`.
          PromptTooLong: the prompt does not fit the context.
        """
        return condition(self.engine, self._intake, prompt, parse(strategy), cache_salt, self._run)

    def warm_up(self) -> None:
        """Compiles every program now. Later calls compile nothing."""
        self.engine.runner.warm_up()

    def _requests(self, prompts: Any, sampling_params: Any) -> list[Request]:
        items = [prompts] if _is_one(prompts) else list(prompts)
        params = _each(sampling_params, len(items))
        return [self._intake.request(i, p) for i, p in zip(items, params, strict=True)]

    def _run(self, requests: Seq[Request]) -> Iterator[Request]:
        """Steps the engine until all are over; yields a request whenever it made progress."""
        try:
            for request in queued(requests, self.engine.chunks):
                self.engine.add(request)
            open_requests = {id(r) for r in requests}
            while open_requests:
                touched = self.engine.step()
                if not self.engine.has_work:  # another loop over this engine may have ended ours
                    touched = requests
                for request in touched:
                    if id(request) in open_requests:
                        if request.finished:
                            open_requests.discard(id(request))
                        yield request
        finally:
            for request in requests:
                if not request.finished:
                    self.engine.abort(request)


def _each(params: Any, count: int) -> list[SamplingParams]:
    """One `SamplingParams` per prompt."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise ValueError(f"{len(params)} sampling params for {count} prompts")
    return list(params)


def _is_one(prompts: Any) -> bool:
    """Whether this is a single prompt rather than a list of them."""
    if isinstance(prompts, str | Mapping) or is_marked(prompts):
        return True
    return bool(
        isinstance(prompts, Seq) and prompts and isinstance(prompts[0], Integral | Mapping)
        and not (isinstance(prompts[0], Mapping) and "role" not in prompts[0])
    )  # fmt: skip
