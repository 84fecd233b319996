"""Text of a sequence as its tokens come: incremental decoding, stop strings, what may be shown."""

from collections.abc import Iterable

from kvjax.models.tokenizers import IncrementalDecoder, Tokenizer
from kvjax.request import SamplingParams


class TextStream:
    """Decodes one sequence's output, so that prompt and text concatenate to the whole.

    A stop string may span tokens; it ends the text.

    `shown` is what a stream may print: it holds back an unfinished character and any tail that
    could still grow into a stop string. A token of `end_ids` ends the text without being part of
    it, unless `include_stop_str_in_output`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        params: SamplingParams,
        end_ids: Iterable[int] = (),
        *,
        prompt_ids: Iterable[int] = (),
    ) -> None:
        skips = params.skip_special_tokens
        skipped = tokenizer.special_ids if skips else ()
        continues = any(tokenizer.token_bytes(i) for i in prompt_ids if i not in skipped)
        self._decoder = IncrementalDecoder(tokenizer, skips, continues=continues)
        self._end_ids = frozenset(end_ids)
        self._stops: tuple[str, ...] = tuple(params.stop or ())
        self._keeps_stop = params.include_stop_str_in_output
        self._min_tokens, self._num_tokens = params.min_tokens, 0
        self.text = ""
        self.complete = False

    def push(self, token_id: int, last: bool) -> str | None:
        """Takes the next token; returns the stop string that now ends the text, if any."""
        before = len(self.text)
        if not (last and token_id in self._end_ids and not self._keeps_stop):
            self.text += self._decoder.push(token_id)
        self._num_tokens += 1
        may_stop = self._num_tokens >= self._min_tokens
        stop = self._cut(before) if may_stop else None
        if stop is None and last:
            self.text += self._decoder.flush()
            stop = self._cut(before) if may_stop else None
        self.complete = last or stop is not None
        return stop

    def _cut(self, before: int) -> str | None:
        """Ends the text at the first stop string that the text from `before` on completes."""
        found = [
            (at, stop)
            for stop in self._stops
            if (at := self.text.find(stop, max(0, before - len(stop) + 1))) >= 0
        ]
        if not found:
            return None
        at, stop = min(found, key=lambda hit: (hit[0] + len(hit[1]), hit[0]))
        self.text = self.text[: at + len(stop) if self._keeps_stop else at]
        return stop

    @property
    def shown(self) -> str:
        """The text that no later token can take back."""
        if self.complete:
            return self.text
        begun = (
            length
            for stop in self._stops
            for length in range(len(stop) - 1, 0, -1)
            if self.text.endswith(stop[:length])
        )
        return self.text[: len(self.text) - max(begun, default=0)]
