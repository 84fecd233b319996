"""`/v1/kv/chunks`: chunks of a tenant that are encoded ahead, listed, pinned and deleted.

A chunk's id is a hash of its tokens; what it names is looked up under the tenant's salt only.
"""

import asyncio
from collections.abc import Iterable
from typing import Any

from kvjax.cache.chunks import Variant, VariantKey, tokens_hash
from kvjax.engine import Engine
from kvjax.reuse import Strategy
from kvjax.reuse.strategy import context_hash
from kvjax.serving.errors import APIError
from kvjax.serving.keys import Tenant
from kvjax.serving.marking import Reader, no_chunk, stored_tokens
from kvjax.serving.schemas import ChunkPart, PutChunk
from kvjax.serving.service import Service


async def put(service: Service, tenant: Tenant, body: PutChunk) -> dict[str, Any]:
    """Encodes a chunk, unless it is stored already, and waits for that.

    Raises:
      APIError: there is no room for it, the queue is full, or it took too long.
      ValueError: the body is no chunk.
    """
    service.check_model(body.model)
    salt = tenant.cache_salt(body.cache_salt)
    strategy = await service.check_reuse(body.reuse)
    part = ChunkPart(text=body.text, token_ids=body.token_ids)
    tokens = await Reader(service, tenant, salt).chunk(part)
    seconds = service.config.request_timeout
    with service.admission.enter(1):
        try:
            async with asyncio.timeout(seconds):
                await _encode(service, tokens, salt, strategy)
        except TimeoutError:
            text = f"not encoded within {seconds:g} seconds"
            raise APIError(504, text, code="timeout") from None
    chunk_id = service.put_chunks.put(tenant, salt, tokens)
    if body.pin:
        return await pin(service, tenant, salt, chunk_id)
    return await describe(service, tenant, salt, chunk_id)


async def _encode(
    service: Service, tokens: list[int], salt: str | None, strategy: Strategy | None
) -> None:
    """Has the KV of a chunk computed. Looks between any two steps whether it is there."""
    llm, chunks = service.llm, service.llm.engine.chunks
    store, pages = chunks.store, -(-len(tokens) // llm.engine.spec.page_size)
    key = VariantKey(salt, tokens_hash(tokens), context_hash(()))
    if pages > store.capacity_pages:
        size = store.capacity_pages * llm.engine.spec.page_size
        raise ValueError(f"the chunk has {len(tokens)} tokens; chunk_cache_share leaves {size}")
    await llm.call(lambda: chunks.put(tuple(tokens), (), salt, strategy))
    while await llm.call(lambda: chunks.is_encoding(key)):
        pass
    if not await llm.call(lambda: store.get(key) is not None):
        text = "chunks in use or pinned leave no room for another"
        headers = {"Retry-After": "5"}
        raise APIError(503, text, code="chunk_store_full", headers=headers)


async def listed(
    service: Service, tenant: Tenant, salt: str | None, limit: int, after: str | None
) -> dict[str, Any]:
    """Chunks of one namespace in the order of their ids: those that were put, and those that
    prompts brought and that are stored."""
    known = service.put_chunks.ids(tenant, salt)

    def look(engine: Engine) -> list[dict[str, Any]]:
        stored = {v.key.chunk for v in engine.chunks.store if v.key.salt == salt}
        ids = sorted(one for one in {*known, *stored} if after is None or one > after)
        return [_described(engine, salt, one, known.get(one, 0)) for one in ids[: limit + 1]]

    found = await service.llm.call(lambda: look(service.llm.engine))
    return {"object": "list", "data": found[:limit], "has_more": len(found) > limit}


async def describe(
    service: Service, tenant: Tenant, salt: str | None, chunk_id: str
) -> dict[str, Any]:
    """One chunk. Raises 404."""
    known = service.put_chunks.ids(tenant, salt).get(chunk_id, 0)
    engine = service.llm.engine
    found = await service.llm.call(lambda: _described(engine, salt, chunk_id, known))
    if not found["tokens"]:
        raise no_chunk(chunk_id)
    return found


async def pin(service: Service, tenant: Tenant, salt: str | None, chunk_id: str) -> dict[str, Any]:
    """Keeps the stored KV of a chunk from being evicted; once is enough.

    Raises:
      APIError: 404, it is not stored; 409, this tenant would have too many pages pinned.
    """
    store, share = service.llm.engine.chunks.store, service.config.max_pinned_share
    limit = int(share * store.capacity_pages)

    def act() -> None:
        found = store.variants(salt, chunk_id).values()
        if not found:
            raise no_chunk(chunk_id)
        fresh = _pages(v for v in found if not v.pins)
        held = _pages(v for v in store if v.pins and tenant.owns(v.key.salt))
        if held + fresh > limit:
            text = f"{held} pages are pinned, {fresh} more are over {limit}"
            raise APIError(409, f"{text} (max_pinned_share={share:g})", code="too_many_pins")
        if fresh:
            store.pin(salt, chunk_id)

    await service.llm.call(act)
    return await describe(service, tenant, salt, chunk_id)


async def unpin(
    service: Service, tenant: Tenant, salt: str | None, chunk_id: str
) -> dict[str, Any]:
    """Lets a chunk be evicted again, however often it was pinned. Raises 404."""
    store = service.llm.engine.chunks.store

    def act() -> None:
        while any(variant.pins for variant in store.variants(salt, chunk_id).values()):
            store.pin(salt, chunk_id, by=-1)

    await service.llm.call(act)
    return await describe(service, tenant, salt, chunk_id)


async def delete(
    service: Service, tenant: Tenant, salt: str | None, chunk_id: str
) -> dict[str, Any]:
    """Forgets a chunk and its KV, pinned or not. Raises 404."""
    store = service.llm.engine.chunks.store

    def act() -> bool:
        found = list(store.variants(salt, chunk_id).values())
        for variant in found:
            store.discard(variant)
        return bool(found)

    stored = await service.llm.call(act)
    if not service.put_chunks.forget(tenant, salt, chunk_id) and not stored:
        raise no_chunk(chunk_id)
    return {"id": chunk_id, "object": "kv.chunk", "deleted": True}


def _described(engine: Engine, salt: str | None, chunk_id: str, known: int) -> dict[str, Any]:
    """A chunk as it stands; it has no tokens if nobody knows it. For the engine's thread."""
    store = engine.chunks.store
    found = list(store.variants(salt, chunk_id).values())
    return {
        "id": chunk_id,
        "object": "kv.chunk",
        "tokens": known or len(stored_tokens(store, salt, chunk_id) or ()),
        "stored": bool(found),
        "pinned": any(variant.pins for variant in found),
        "uses": sum(variant.uses for variant in found),
        "pages": _pages(found),
        "variants": [
            {"context_tokens": len(v.context_ids), "lineage": v.lineage, "uses": v.uses}
            for v in found
        ],
    }


def _pages(variants: Iterable[Variant]) -> int:
    return sum(len(variant.page_ids) for variant in variants)
