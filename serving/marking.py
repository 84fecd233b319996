"""Prompts in which chunks are marked: from the parts of a body to token ids and spans.

Every part is tokenised by itself, so that a chunk has the same tokens wherever it stands.
"""

import dataclasses
from collections.abc import Sequence as Seq

from kvjax.cache.chunks import ChunkStore
from kvjax.errors import PromptTooLong
from kvjax.serving.errors import APIError
from kvjax.serving.keys import Tenant
from kvjax.serving.schemas import ChunkPart
from kvjax.serving.service import Service

Part = str | list[int] | ChunkPart

# Characters per token of the context: a text with more of them has its beginning tokenised first.
_BEGINNING = 16


@dataclasses.dataclass(frozen=True)
class Marked:
    """Token ids of a prompt, and which spans of them are chunks."""

    ids: list[int]
    spans: tuple[tuple[int, int], ...] = ()


class Reader:
    """Reads the parts of one request's prompts, in the namespace of its tenant and salt.

    A prompt of `most` tokens or more raises `PromptTooLong`, mostly before it is tokenised whole.
    """

    def __init__(
        self, service: Service, tenant: Tenant, salt: str | None, most: int | None = None
    ) -> None:
        self._service, self._tenant, self._salt, self._most = service, tenant, salt, most

    async def prompt(self, parts: Seq[Part], *, special: bool) -> Marked:
        """Token ids of the parts in a row. `special`: the tokens that begin a text come first,
        unless the first part that is no chunk brings ids."""
        own = next((part for part in parts if not isinstance(part, ChunkPart)), "")
        begins = special and isinstance(own, str)
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        if begins and isinstance(parts[0], ChunkPart):
            ids += self._service.llm.get_tokenizer().encode("")
        for number, part in enumerate(parts):
            if not isinstance(part, ChunkPart):
                ids += await self._text(part, begins and number == 0)
                self._check(len(ids))
                continue
            tokens = await self.chunk(part)
            spans.append((len(ids), len(ids) + len(tokens)))
            ids += tokens
            self._check(len(ids))
        return Marked(ids, tuple(spans))

    async def chunk(self, part: ChunkPart) -> list[int]:
        """Token ids of a chunk.

        Raises:
          APIError: 404, this tenant has no such chunk.
          ValueError: it has no tokens, or ids that are not in the vocabulary.
        """
        if part.id is not None:
            return await self._known(part.id)
        tokens = await self._text(part.text if part.text is not None else part.token_ids or [])
        if not tokens:
            raise ValueError(f"a chunk has no tokens: {part.text!r}")
        vocabulary = self._service.llm.engine.runner.config.vocab_size
        if max(tokens) >= vocabulary:
            raise ValueError(f"token id {max(tokens)} is not in the vocabulary of {vocabulary}")
        return tokens

    async def _text(self, part: str | list[int], special: bool = False) -> list[int]:
        if not isinstance(part, str):
            self._check(len(part))
            return part
        encode, beside = self._service.llm.get_tokenizer().encode, self._service.beside
        if self._most is not None and len(part) > (size := _BEGINNING * self._most):
            # If that alone is twice too long, no rest can change its tokens so that it fits.
            beginning = await beside(size, lambda: encode(part[:size], special))
            self._check(len(beginning) // 2)
        return await beside(len(part), lambda: encode(part, special))

    def _check(self, tokens: int) -> None:
        if self._most is not None and tokens >= self._most:
            raise PromptTooLong(
                f"the prompt has at least {tokens} tokens; with one to generate, "
                f"max_model_len={self._most} allows {self._most - 1}"
            )

    async def _known(self, chunk_id: str) -> list[int]:
        found = self._service.put_chunks.get(self._tenant, self._salt, chunk_id)
        if found is None:
            store = self._service.llm.engine.chunks.store
            found = await self._service.llm.call(lambda: stored_tokens(store, self._salt, chunk_id))
        if found is None:
            raise no_chunk(chunk_id)
        return found


def stored_tokens(store: ChunkStore, salt: str | None, chunk_id: str) -> list[int] | None:
    """Tokens of a chunk that is stored; None if it is not. For the engine's thread."""
    variant = next(iter(store.variants(salt, chunk_id).values()), None)
    return None if variant is None else [*map(int, variant.tokens), *variant.tail]


def no_chunk(chunk_id: str) -> APIError:
    """What is told who names a chunk that is not there, or another tenant's."""
    return APIError(404, f"there is no chunk {chunk_id!r}; put it again", code="chunk_not_found")
