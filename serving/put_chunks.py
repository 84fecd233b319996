"""Which chunks a tenant has put: an id goes on to mean a text when its KV is evicted."""

import array
import collections

from kvjax.cache.chunks import tokens_hash
from kvjax.serving.keys import Tenant

_Key = tuple[str | None, str]  # salt and id


class PutChunks:
    """Token ids of the chunks that were put, by tenant, salt and id. For the event loop's thread.

    Each tenant may have so many chunks and tokens; the chunk used longest ago is forgotten first.
    """

    def __init__(self, max_chunks: int = 8192, max_tokens: int = 1 << 20) -> None:
        self._max_chunks, self._max_tokens = max_chunks, max_tokens
        self._chunks: dict[str, dict[_Key, array.array[int]]] = collections.defaultdict(dict)

    def put(self, tenant: Tenant, salt: str | None, tokens: list[int]) -> str:
        """Remembers a chunk; its id."""
        own, key = self._chunks[tenant.name], (salt, tokens_hash(tokens))
        own.pop(key, None)
        own[key] = array.array("i", tokens)
        while len(own) > self._max_chunks or sum(map(len, own.values())) > self._max_tokens:
            del own[next(iter(own))]
        return key[1]

    def get(self, tenant: Tenant, salt: str | None, chunk_id: str) -> list[int] | None:
        """The tokens of a chunk, which counts as a use; None if it is not known."""
        own = self._chunks[tenant.name]
        tokens = own.pop((salt, chunk_id), None)
        if tokens is None:
            return None
        own[salt, chunk_id] = tokens
        return tokens.tolist()

    def forget(self, tenant: Tenant, salt: str | None, chunk_id: str) -> bool:
        """Forgets a chunk; whether it was known."""
        return self._chunks[tenant.name].pop((salt, chunk_id), None) is not None

    def ids(self, tenant: Tenant, salt: str | None) -> dict[str, int]:
        """Ids in one namespace, with their numbers of tokens."""
        own = self._chunks[tenant.name]
        return {one: len(tokens) for (its, one), tokens in own.items() if its == salt}
