"""Who is asking: API keys, and the salt that keeps one tenant's cached KV from the others."""

import dataclasses
import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

_SHORTEST = 16


@dataclasses.dataclass(frozen=True)
class Tenant:
    """Somebody with a key, or everybody where no keys are asked for."""

    name: str
    salt: str | None  # None: the namespace of those who bring no salt
    operator: bool  # may see and reset what is common to all tenants

    def cache_salt(self, asked: str | None) -> str | None:
        """The salt of a request: the tenant's own, and within it what the request asks for."""
        if self.salt is None:
            return asked
        return self.salt if asked is None else f"{self.salt}/{asked}"

    def owns(self, salt: str | None) -> bool:
        """Whether a salt is the tenant's own, or within it."""
        return self.salt is None or (salt or "").partition("/")[0] == self.salt


ANYBODY = Tenant("anybody", None, operator=True)


class Keys:
    """The keys of a file. Each line: a name, a key, and for operators the word `operator`.

    Compared by digest, all of them and in constant time: neither the length nor the beginning of a
    key, nor how many there are before it, shows in the time that a refusal takes.
    """

    def __init__(self, lines: Iterable[str], source: str = "keys") -> None:
        self._tenants: list[tuple[bytes, Tenant]] = []
        for number, line in enumerate(lines, start=1):
            words = line.split("#", 1)[0].split()
            if not words:
                continue
            if len(words) not in (2, 3) or words[2:] not in ([], ["operator"]):
                raise ValueError(f"{source}, line {number}: expected `NAME KEY [operator]`")
            name, key = words[:2]
            if len(key) < _SHORTEST:
                raise ValueError(
                    f"{source}, line {number}: a key needs {_SHORTEST} characters, got {len(key)}"
                )
            salt = hmac.new(key.encode(), b"kvjax cache salt", hashlib.sha256).hexdigest()
            self._tenants.append((_digest(key), Tenant(name, salt, len(words) == 3)))
        if not self._tenants:
            raise ValueError(f"{source}: no key in it")

    @staticmethod
    def read(path: Path) -> "Keys":
        """The keys of a file. Raises `OSError` or `ValueError`."""
        return Keys(path.read_text(encoding="utf-8").splitlines(), str(path))

    def tenant(self, key: str) -> Tenant | None:
        """Whose key that is."""
        digest, found = _digest(key), None
        for known, tenant in self._tenants:
            if hmac.compare_digest(known, digest):
                found = tenant
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
