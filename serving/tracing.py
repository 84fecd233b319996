"""OpenTelemetry spans of requests, if an endpoint is configured: one per prompt, and its phases."""

import time
from collections.abc import Mapping
from typing import Any

from kvjax.request import RequestOutput, SamplingParams


class Tracing:
    """Sends spans over OTLP (HTTP). Raises `ValueError` if the `otel` extra is not there."""

    def __init__(self, endpoint: str, model: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ValueError(
                f'otlp_endpoint needs {error.name}: pip install "kvjax[otel]"'
            ) from None
        self._model = model
        self._provider = TracerProvider(resource=Resource.create({"service.name": "kvjax"}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
        self._tracer = self._provider.get_tracer("kvjax.serving")

    def finish(
        self, output: RequestOutput, params: SamplingParams, headers: Mapping[str, str]
    ) -> None:
        """Records a request that is over; its trace is that of the client's `traceparent`."""
        from opentelemetry.trace import set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        times = output.metrics
        if times is None or times.finished_time is None:
            return
        since = time.time_ns() - time.monotonic() * 1e9  # the engine's clock is monotonic

        def at(seconds: float) -> int:
            return int(since + seconds * 1e9)

        parent = TraceContextTextMapPropagator().extract(dict(headers))
        span = self._tracer.start_span(
            "llm_request", parent, start_time=at(times.arrival_time),
            attributes=self._attributes(output, params),
        )  # fmt: skip
        inside = set_span_in_context(span)
        first, token, last = times.first_scheduled_time, times.first_token_time, times.finished_time
        phases = (
            ("queue", times.arrival_time, first),
            ("prefill", first, token),
            ("decode", token, last),
        )
        for name, begin, end in phases:
            if begin is not None and end is not None:
                phase = self._tracer.start_span(name, inside, start_time=at(begin))
                phase.end(at(end))
        span.end(at(last))

    def _attributes(self, output: RequestOutput, params: SamplingParams) -> dict[str, Any]:
        reasons = [c.finish_reason or "" for c in output.outputs]
        return {
            "gen_ai.request.model": self._model,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.n": params.n,
            "gen_ai.response.id": output.request_id,
            "gen_ai.response.finish_reasons": reasons,
            "gen_ai.usage.input_tokens": len(output.prompt_token_ids),
            "gen_ai.usage.output_tokens": sum(len(c.token_ids) for c in output.outputs),
            "kvjax.cached_tokens": output.num_cached_tokens,
        }

    def shutdown(self) -> None:
        """Sends what is left."""
        self._provider.shutdown()
