"""Prometheus metrics. Names follow vLLM's with the prefix `kvjax:`; times are in seconds."""

import time
from collections.abc import Callable, Hashable, Iterator, Sequence

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from kvjax.async_llm import AsyncLLM
from kvjax.cache.radix import RadixNode
from kvjax.request import RequestMetrics, RequestOutput, SamplingParams

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counts and times of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"kvjax:{name}", text, buckets=buckets, registry=registry)

        def seconds(name: str, text: str) -> Histogram:
            return histogram(f"{name}_seconds", text, _SECONDS)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"kvjax:{name}", text, labels, registry=registry)

        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts of finished requests.")
        self.generation_tokens = counter("generation_tokens", "Tokens generated.")
        self.finished = counter(
            "request_success", "Completions by why they ended.", "finished_reason"
        )
        self.responses = counter("http_responses", "HTTP answers.", "path", "status")
        self.first_token = seconds("time_to_first_token", "Arrival to first token.")
        self.between_tokens = seconds("inter_token_latency", "Between two tokens of a completion.")
        self.per_token = seconds("request_time_per_output_token", "Mean of one request.")
        self.whole = seconds("e2e_request_latency", "Arrival to last token.")
        self.queued = seconds("request_queue_time", "Arrival to first step.")
        self.prefill = seconds("request_prefill_time", "First step to first token.")
        self.decode = seconds("request_decode_time", "First to last token.")
        self.inference = seconds("request_inference_time", "First step to last token.")
        self.prompt_lens = histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self.output_lens = histogram("request_generation_tokens", "Tokens of an answer.", _TOKENS)
        self.computed = histogram(
            "request_prefill_kv_computed_tokens", "Prompt tokens that were not reused.", _TOKENS
        )
        self.params_n = histogram("request_params_n", "`n` of requests.", _COUNTS)
        self.params_max = histogram("request_params_max_tokens", "`max_tokens`.", _TOKENS)
        self.preempted = histogram("request_num_preemptions", "Preemptions.", (0, *_COUNTS))
        self.page_life = seconds("kv_block_lifetime", "A page's time in the prefix cache.")
        self.page_idle = seconds("kv_block_idle_before_evict", "Last use of a page to its end.")
        self.page_gap = seconds("kv_block_reuse_gap", "Between two uses of a cached page.")
        self.step_tokens = histogram("iteration_tokens_total", "Tokens of a step.", _TOKENS)
        self._real_tokens = 0

    def attach(self, llm: AsyncLLM, model: str) -> None:
        """Adds what is read from the engine: as a scrape asks for it, and after each step."""
        self.registry.register(_EngineCollector(llm, model))
        self._real_tokens = llm.engine.runner.real_tokens
        if llm.engine.scheduler.tree is not None:
            llm.engine.scheduler.tree.observers.append(PageTimes(self))

        def step_is_over() -> None:
            tokens = llm.engine.runner.real_tokens
            if tokens > self._real_tokens:
                self.step_tokens.observe(tokens - self._real_tokens)
            self._real_tokens = tokens

        llm.on_step = step_is_over

    def finish(self, output: RequestOutput, params: SamplingParams) -> None:
        """Counts a request that is over."""
        tokens = sum(len(completion.token_ids) for completion in output.outputs)
        self.prompt_tokens.inc(len(output.prompt_token_ids))
        self.generation_tokens.inc(tokens)
        for completion in output.outputs:
            self.finished.labels(completion.finish_reason or "abort").inc()
        self.prompt_lens.observe(len(output.prompt_token_ids))
        self.output_lens.observe(tokens)
        self.computed.observe(len(output.prompt_token_ids) - output.num_cached_tokens)
        self.params_n.observe(params.n)
        if params.max_tokens is not None:
            self.params_max.observe(params.max_tokens)
        if output.metrics is not None:
            self._time(output.metrics)

    def _time(self, times: RequestMetrics) -> None:
        start, first, last = times.first_scheduled_time, times.first_token_time, times.finished_time
        spans = (
            (self.first_token, times.arrival_time, first),
            (self.whole, times.arrival_time, last),
            (self.queued, times.arrival_time, start),
            (self.prefill, start, first),
            (self.decode, first, last),
            (self.inference, start, last),
        )
        for histogram, begin, end in spans:
            if begin is not None and end is not None:
                histogram.observe(end - begin)
        if times.time_per_output_token is not None:
            self.per_token.observe(times.time_per_output_token)
        self.preempted.observe(times.num_preemptions)

    def text(self) -> bytes:
        """What a scrape gets."""
        return generate_latest(self.registry)


class PageTimes:
    """A `TreeObserver` that observes how long pages stay in the prefix cache, and are not used."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self._metrics, self._clock = metrics, clock
        self._pages: dict[int, tuple[float, float]] = {}  # when it came, when it was used last

    def matched(self, page_ids: Sequence[int]) -> None:
        """These pages are used again."""
        now = self._clock()
        for page in page_ids:
            if page in self._pages:
                came, used = self._pages[page]
                self._metrics.page_gap.observe(now - used)
                self._pages[page] = (came, now)

    def stored(
        self, namespace: Hashable, tokens: np.ndarray, known: int, page_ids: Sequence[int]
    ) -> None:
        """These pages came."""
        now = self._clock()
        for page in page_ids:
            self._pages.setdefault(page, (now, now))

    def removed(self, node: RadixNode, kept: int, page_ids: Sequence[int]) -> None:
        """These pages go."""
        now = self._clock()
        for page in page_ids:
            if page in self._pages:
                came, used = self._pages.pop(page)
                self._metrics.page_life.observe(now - came)
                self._metrics.page_idle.observe(now - used)

    def cleared(self) -> None:
        """All go, and none of them for its age."""
        self._pages.clear()


class TokenClock:
    """Observes the time between the tokens of one request, as its snapshots come."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics, self._tokens, self._last = metrics, 0, 0.0

    def see(self, output: RequestOutput) -> None:
        """Takes a snapshot; several tokens since the last share the time."""
        times = output.metrics
        tokens = 0 if times is None else times.num_output_tokens
        if tokens <= self._tokens:
            return
        now = time.monotonic()
        if self._tokens:
            streams = len(output.outputs)
            fresh = tokens - self._tokens
            self._metrics.between_tokens.observe((now - self._last) * max(1, streams / fresh))
        self._tokens, self._last = tokens, now


class _EngineCollector:
    """Reads the engine's counters. Plain reads of integers: no step is waited for."""

    def __init__(self, llm: AsyncLLM, model: str) -> None:
        self._llm, self._model = llm, model

    def collect(self) -> Iterator[Metric]:
        """The families; called by a scrape."""
        engine = self._llm.engine
        scheduler, runner = engine.scheduler, engine.runner
        pool, tree = scheduler.pool, scheduler.tree
        started = self._llm.step_started
        gauges = {
            "num_requests_running": ("Sequences with a seat.", len(scheduler.running)),
            "num_requests_waiting": ("Sequences in the queue.", len(scheduler.waiting)),
            "kv_cache_usage_perc": ("Share of pages in use.", 1 - pool.num_free / pool.num_pages),
            "kv_cached_pages": (
                "Pages that the prefix cache holds.",
                tree.num_pages if tree else 0,
            ),
            "step_token_budget": (
                "Tokens that a step may hold; less after the device ran out of memory.",
                scheduler.limits.max_num_batched_tokens,
            ),
            "step_sequence_budget": ("Sequences, the same.", scheduler.limits.max_num_seqs),
            "step_age_seconds": (
                "How long the current step has taken so far.",
                0.0 if started is None else time.monotonic() - started,
            ),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"kvjax:{name}", text, value=value)
        stats = tree.stats if tree is not None else None
        counters = {
            "num_preemptions": ("Preemptions.", scheduler.num_preemptions),
            "out_of_memory": ("Times that steps were made smaller for it.", engine.num_shrinks),
            "compilations": ("Programs compiled.", runner.compiles),
            "compile_seconds": ("Seconds spent on them.", runner.compile_seconds),
            "computed_tokens": ("Tokens computed in steps.", runner.real_tokens),
            "padded_tokens": ("Tokens of steps with their padding.", runner.padded_tokens),
            "prefix_cache_queries": ("Tokens looked up.", stats.query_tokens if stats else 0),
            "prefix_cache_hits": ("Tokens found.", stats.hit_tokens if stats else 0),
            "prefix_cache_evicted_pages": ("Pages evicted.", stats.evicted_pages if stats else 0),
        }
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(f"kvjax:{name}", text, value=value)
        info = GaugeMetricFamily(
            "kvjax:cache_config_info",
            "How the cache is set up.",
            labels=("model", "num_pages", "page_size", "kv_dtype", "prefix_caching"),
        )
        config = engine.config
        labels = (self._model, pool.num_pages, pool.page_size, config.kv_dtype, tree is not None)
        info.add_metric([str(label) for label in labels], 1)
        yield info
