"""The one place that reads the environment."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """Folder for what kvjax fetches and may fetch again; it need not exist yet.

    `KVJAX_CACHE_DIR` if set, else `kvjax` in `XDG_CACHE_HOME`, else in `~/.cache`.
    """
    if own := os.environ.get("KVJAX_CACHE_DIR"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "kvjax"
