"""Progress on the terminal: what is done of a batch or a corpus, tokens per second, KV reused."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvjax.sequence import Request


class Bar:
    """Counts finished requests; draws only if it has something to draw on."""

    def __init__(self, progress: Progress | None, total: int | None) -> None:
        self._progress = progress
        self._task = progress.add_task("requests", total=total, rate="") if progress else None
        self._start = time.monotonic()
        self.requests = self.output_tokens = self.prompt_tokens = self.cached_tokens = 0

    def finished(self, request: Request) -> None:
        """Counts a request that is over."""
        self.count(
            len(request.prompt_ids), request.num_cached_tokens, request.metrics.num_output_tokens
        )

    def count(self, prompt_tokens: int, cached_tokens: int, output_tokens: int) -> None:
        """Counts one finished request by its tokens."""
        self.requests += 1
        self.prompt_tokens += prompt_tokens
        self.cached_tokens += cached_tokens
        self.output_tokens += output_tokens
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, advance=1, rate=self.summary)

    @property
    def summary(self) -> str:
        """Tokens per second so far and the share of prompt tokens that were reused."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        share = self.cached_tokens / max(self.prompt_tokens, 1)
        return f"{self.output_tokens / seconds:.0f} tokens/s, {share:.0%} of prompts reused"


@contextlib.contextmanager
def progress_bar(show: bool, total: int | None) -> Iterator[Bar]:
    """A bar on standard error, or a silent counter; `total` is None while nobody knows it."""
    if not show:
        yield Bar(None, total)
        return
    with _progress() as progress:
        yield Bar(progress, total)


@contextlib.contextmanager
def encoding_bar(show: bool, total: int) -> Iterator[Callable[[int, int], None]]:
    """The same for documents that are encoded; it is told how many, and of how many tokens."""
    if not show:
        yield lambda chunks, tokens: None
        return
    start, num_tokens = time.monotonic(), 0
    with _progress() as progress:
        task = progress.add_task("chunks", total=total, rate="")

        def encoded(chunks: int, tokens: int) -> None:
            nonlocal num_tokens
            num_tokens += tokens
            rate = num_tokens / max(time.monotonic() - start, 1e-9)
            progress.update(task, advance=chunks, rate=f"{rate:.0f} tokens/s")

        yield encoded


def _progress() -> Progress:
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[rate]}"),
    )  # fmt: skip
    return Progress(*columns, console=Console(stderr=True))
