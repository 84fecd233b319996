"""The routes, and the OpenAPI schema that describes them."""

import asyncio
import importlib.metadata
import json
from pathlib import Path
from typing import Annotated, Any

import jax
from fastapi import FastAPI, Query, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from kvjax import __version__
from kvjax.serving import chunks, replies
from kvjax.serving.chat import chat, conversation
from kvjax.serving.completions import complete
from kvjax.serving.errors import APIError, api_error, install_handlers
from kvjax.serving.gate import OPEN, Gate
from kvjax.serving.keys import Tenant
from kvjax.serving.kv import EventHub, EventStream, stats
from kvjax.serving.marking import Part, Reader
from kvjax.serving.occupancy import occupancy
from kvjax.serving.schemas import (
    ChatRequest,
    ChunkId,
    CompletionRequest,
    DetokenizeRequest,
    PutChunk,
    Salt,
    TokenizeRequest,
)
from kvjax.serving.service import Service

SaltQuery = Annotated[Salt | None, Query(description="As the body's `cache_salt` was.")]
_PAGE = Path(__file__).with_name("ui.html")
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": replies.ErrorReply, "description": text}
    for status, text in (
        (400, "Bad input; the message names the value and the limit."),
        (401, "No key, or a wrong one."),
        (403, "The key is no operator's."),
        (404, "No such model, session, chunk or report."),
        (408, "The body did not come in time."),
        (409, "The key has too much pinned."),
        (413, "The body is too large."),
        (429, "The queue is full; `Retry-After` says when to try again."),
        (500, "The request broke its step; the message has an id."),
        (503, "Loading, shutting down, or out of pages."),
        (504, "Not done within the request timeout."),
    )
}


def _streams(model: type, description: str) -> dict[int | str, dict[str, Any]]:
    content = {"text/event-stream": {"schema": {"type": "string"}}}
    return {200: {"model": model, "description": description, "content": content}, **_ERRORS}


def create_app(service: Service) -> FastAPI:
    """The ASGI application over `service`."""
    app = FastAPI(
        title="kvjax", version=__version__, docs_url=None, redoc_url=None, openapi_url=None
    )
    app.state.service, app.state.hub = service, EventHub(service)
    app.add_middleware(Gate, service=service)
    install_handlers(app)
    _generating(app, service)
    _describing(app, service)
    _sessions(app, service)
    _chunks(app, service)
    _requests(app, service)
    _operating(app, service, app.state.hub)
    app.openapi = lambda: _schema(app)
    return app


def _generating(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions", responses=_streams(replies.CompletionReply, "The completions."))
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continues a prompt, or each of several."""
        return await _checked(complete(service, request, body))

    @app.post("/v1/chat/completions", responses=_streams(replies.ChatReply, "The answer."))
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answers a conversation through the model's chat template."""
        return await _checked(chat(service, request, body))


def _describing(app: FastAPI, service: Service) -> None:
    def card() -> dict[str, Any]:
        return {
            "id": service.model,
            "object": "model",
            "created": service.created,
            "owned_by": "kvjax",
            "max_model_len": service.llm.max_model_len,
        }

    @app.get("/v1/models", response_model=replies.ModelList, responses=_ERRORS)
    async def models() -> Any:
        """What is served."""
        return {"object": "list", "data": [card()]}

    @app.get("/v1/models/{model:path}", response_model=replies.ModelCard, responses=_ERRORS)
    async def model(model: str) -> Any:
        """One model."""
        service.check_model(model)
        return card()

    @app.post("/tokenize", response_model=replies.TokenizeReply, responses=_ERRORS)
    async def tokenize(body: TokenizeRequest, request: Request) -> Any:
        """Token ids of a text or a conversation."""
        return await _checked(_tokenize(service, request.scope["kvjax.tenant"], body))

    @app.post("/detokenize", response_model=replies.DetokenizeReply, responses=_ERRORS)
    async def detokenize(body: DetokenizeRequest) -> Any:
        """The text of token ids."""
        service.check_model(body.model)
        tokenizer = service.llm.get_tokenizer()
        return {"prompt": tokenizer.decode(body.tokens, body.skip_special_tokens)}

    @app.get("/version", response_model=replies.Version)
    async def version() -> Any:
        """Versions."""
        jax_version = importlib.metadata.version("jax")
        return {"version": __version__, "jax": jax_version, "platform": jax.default_backend()}


def _sessions(app: FastAPI, service: Service) -> None:
    @app.get("/v1/sessions", response_model=replies.SessionList, responses=_ERRORS)
    async def sessions(request: Request) -> Any:
        """The conversations of this key whose KV is kept."""
        tenant = request.scope["kvjax.tenant"].name
        found = await service.llm.call(service.llm.sessions.describe)
        mine = [(one.key[1], one) for one in found if one.key[0] == tenant]
        return {
            "sessions": [
                {
                    "id": name,
                    "tokens": one.num_tokens,
                    "pages": one.num_pages,
                    "seconds_left": one.seconds_left,
                }
                for name, one in mine
            ]
        }

    @app.delete("/v1/sessions/{session_id}", response_model=replies.SessionGone, responses=_ERRORS)
    async def forget(session_id: str, request: Request) -> Any:
        """Gives the KV of a conversation up before its time."""
        key = (request.scope["kvjax.tenant"].name, session_id)
        gone = await service.llm.call(lambda: service.llm.sessions.forget(key))
        if not gone:
            raise APIError(404, f"there is no session {session_id!r}", code="session_not_found")
        return {"id": session_id, "deleted": True}


def _chunks(app: FastAPI, service: Service) -> None:
    path, one = "/v1/kv/chunks", "/v1/kv/chunks/{chunk_id}"
    info = {"response_model": replies.ChunkInfo, "responses": _ERRORS}

    @app.post(path, **info)
    async def put(body: PutChunk, request: Request) -> Any:
        """Encodes a text or token ids ahead of the prompts that will hold them."""
        return await _checked(chunks.put(service, request.scope["kvjax.tenant"], body))

    @app.get(path, response_model=replies.ChunkList, responses=_ERRORS)
    async def listed(
        request: Request,
        cache_salt: SaltQuery = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        after: Annotated[ChunkId | None, Query(description="Ids behind this one.")] = None,
    ) -> Any:
        """The chunks of this key, under one salt."""
        tenant = request.scope["kvjax.tenant"]
        return await chunks.listed(service, tenant, tenant.cache_salt(cache_salt), limit, after)

    def on_one(action: Any) -> Any:
        async def act(chunk_id: ChunkId, request: Request, cache_salt: SaltQuery = None) -> Any:
            tenant = request.scope["kvjax.tenant"]
            return await action(service, tenant, tenant.cache_salt(cache_salt), chunk_id)

        act.__name__, act.__doc__ = f"{action.__name__}_chunk", action.__doc__
        return act

    app.get(one, **info)(on_one(chunks.describe))
    app.post(f"{one}/pin", **info)(on_one(chunks.pin))
    app.post(f"{one}/unpin", **info)(on_one(chunks.unpin))
    app.delete(one, response_model=replies.ChunkGone, responses=_ERRORS)(on_one(chunks.delete))


def _requests(app: FastAPI, service: Service) -> None:
    @app.get("/v1/kv/requests", response_model=replies.RequestList, responses=_ERRORS)
    async def requests(request: Request) -> Any:
        """The last answers of this key that a report is kept of."""
        return {"requests": service.reports.list(request.scope["kvjax.tenant"].name)}

    @app.get(
        "/v1/kv/requests/{answer_id}/reuse",
        response_model=replies.RequestReuse,
        responses=_ERRORS,
    )
    async def reuse(answer_id: str, request: Request) -> Any:
        """How the KV of an answer's prompts came about, token by token."""
        decode = service.llm.get_tokenizer().decode
        tenant = request.scope["kvjax.tenant"].name
        told = await asyncio.to_thread(service.reports.tell, tenant, answer_id, decode)
        if told is None:
            message = f"there is no report on {answer_id!r}, or it is forgotten"
            raise APIError(404, message, code="request_not_found")
        return told


def _operating(app: FastAPI, service: Service, hub: EventHub) -> None:
    schema: list[bytes] = []
    unwell: dict[int | str, dict[str, Any]] = {503: {"model": replies.Status}}

    @app.get("/health", response_model=replies.Status, responses=unwell)
    async def health() -> Any:
        """Whether the process is worth keeping: 503 if a step hangs or the engine is gone."""
        status = service.health
        return JSONResponse({"status": status}, 503 if status in ("hung", "dead") else 200)

    @app.get("/ready", response_model=replies.Status, responses=unwell)
    async def ready() -> Any:
        """Whether to send requests here: 503 while loading, draining, hung or dead."""
        status = service.health
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    metrics_content = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}

    @app.get("/metrics", response_class=Response, responses={**_ERRORS, **metrics_content})
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/kv/stats", response_model=replies.KVStats, responses=_ERRORS)
    async def kv_stats() -> Any:
        """Pages, prefix cache and queues, at one moment between two steps."""
        llm = service.llm
        return await llm.call(lambda: stats(llm.engine))

    @app.post("/v1/kv/reset", response_model=replies.ResetReply, responses=_ERRORS)
    async def kv_reset() -> Any:
        """Forgets every cached prefix that nobody is using."""
        return {"freed_pages": await service.llm.reset_prefix_cache()}

    @app.get("/v1/kv/occupancy", response_model=replies.Occupancy, responses=_ERRORS)
    async def kv_occupancy() -> Any:
        """What is in each page, the requests and the prefix tree: what `/ui` draws.

        Where keys tell tenants apart, nobody's text is in it.
        """
        llm = service.llm
        decode = llm.get_tokenizer().decode if service.keys is None else None
        state = await llm.call(lambda: occupancy(llm.engine, decode))
        return JSONResponse({"model": service.model, **state})

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        """The schema, rendered once: it is large, and anybody may ask for it."""
        if not schema:
            schema.append(json.dumps(app.openapi()).encode())
        return Response(schema[0], media_type="application/json")

    @app.get("/ui", response_class=HTMLResponse, include_in_schema=False)
    async def ui() -> str:
        """The page. It has no data of its own."""
        return _PAGE.read_text(encoding="utf-8")

    event_content = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}

    @app.get("/v1/kv/events", response_class=Response, responses={**_ERRORS, **event_content})
    async def kv_events(
        snapshot_only: Annotated[bool, Query(description="End after what is cached now.")] = False,
    ) -> Response:
        """Stored, removed and cleared blocks by hash; what is cached already comes first."""
        return EventStream(hub, snapshot_only=snapshot_only)


async def _tokenize(service: Service, tenant: Tenant, body: TokenizeRequest) -> dict[str, Any]:
    service.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ValueError("expected either prompt or messages")
    parts: list[Part] = [body.prompt or ""]
    if body.messages is not None:
        parts = conversation(
            service.llm.get_tokenizer(),
            body.messages,
            body.chat_template_kwargs,
            generate=body.add_generation_prompt,
        )
    special = body.add_special_tokens and body.messages is None
    reader = Reader(service, tenant, tenant.cache_salt(None))
    tokens = (await reader.prompt(parts, special=special)).ids
    return {
        "count": len(tokens), "max_model_len": service.llm.max_model_len, "tokens": tokens,
    }  # fmt: skip


async def _checked(work: Any) -> Any:
    """Awaits it; a `ValueError` is the client's."""
    try:
        return await work
    except ValueError as error:
        raise api_error(error, "") from None


def _schema(app: FastAPI) -> dict[str, Any]:
    """OpenAPI: bad bodies are 400 here, not FastAPI's 422; a bearer key where one is asked for."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        for path, operations in schema["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)
                if path not in OPEN:
                    operation["security"] = [{"key": []}, {}]
        components = schema["components"]
        for name in ("HTTPValidationError", "ValidationError"):
            components["schemas"].pop(name, None)
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        app.openapi_schema = schema
    return app.openapi_schema
