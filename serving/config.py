"""How a server is set up: where it listens, what it accepts, how long it waits."""

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Addresses, limits and times of one server. Checked when made (`ValueError`)."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one
    served_model_name: str | None = None  # None: the MODEL that was asked for
    api_key_file: Path | None = None  # None: no key is asked for
    otlp_endpoint: str | None = None  # of OpenTelemetry, such as http://localhost:4318/v1/traces
    max_queue: int = 256  # completions that may wait beside the `max_num_seqs` that run
    max_body_bytes: int = 4 << 20
    max_header_bytes: int = 64 << 10  # request line and headers
    max_connections: int = 4096
    max_refusals: float = 50.0  # refused requests that are answered a second; more have to wait
    max_pinned_share: float = 0.5  # of the room for chunks, that one key may pin
    header_timeout: float = 20.0  # seconds from the first byte, or from connecting, to the headers
    body_timeout: float = 60.0  # seconds in which the body must have come
    write_timeout: float = 60.0  # seconds that a client may read nothing of what is sent
    keep_alive_timeout: float = 30.0  # seconds that a connection may idle between two requests
    request_timeout: float = 600.0  # seconds from admission to the last token
    drain_timeout: float = 120.0  # seconds after SIGTERM that running requests have
    step_timeout: float = 60.0  # seconds after which a step counts as hung

    def __post_init__(self) -> None:
        for name, least, most in (
            ("port", 0, 65535),
            ("max_queue", 0, 2**31 - 1),
            ("max_body_bytes", 1024, 2**40),
            ("max_header_bytes", 1024, 2**30),
            ("max_connections", 1, 2**20),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise ValueError(f"{name} must be an integer in [{least}, {most}], got {value!r}")
        rate = self.max_refusals
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < 2**31:
            raise ValueError(f"max_refusals must be a number in (0, 2**31), got {rate!r}")
        share = self.max_pinned_share
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise ValueError(f"max_pinned_share must be a number in [0, 1], got {share!r}")
        for field in dataclasses.fields(self):
            if not field.name.endswith("_timeout"):
                continue
            seconds = getattr(self, field.name)
            if not isinstance(seconds, int | float) or not 0 < seconds < float("inf"):
                raise ValueError(f"{field.name} must be a number of seconds > 0, got {seconds!r}")
