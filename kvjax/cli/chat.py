"""`kvjax chat`: a conversation on the terminal. What was said before is in the prefix cache."""

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import Any

from kvjax.cli import options
from kvjax.llm import LLM
from kvjax.request import RequestOutput, SamplingParams

_MAX_TOKENS = 512

HELP = "talk to a model"
EPILOG = """\
/reset starts over, /system TEXT sets the system prompt and starts over, /help, /quit.
Ctrl-C stops an answer; at the prompt, it ends the chat. The KV of earlier turns is reused, so a
long conversation costs only what is new: --stats shows it.

examples:
  kvjax chat smollm2-135m
  kvjax chat smollm2-135m --system "You answer in one short sentence." --temperature 0 --stats
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    parser.usage = "kvjax chat MODEL [options]"
    parser.add_argument("model", metavar="MODEL", help="name, folder, .gguf file or hub id")
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument("--stats", action="store_true", help="tokens and times after each answer")
    options.add_sampling(parser, max_tokens=_MAX_TOKENS, temperature=0.7)
    options.add_engine(parser)
    parser.set_defaults(max_num_seqs=1)


def run(args: argparse.Namespace) -> int:
    """Runs the command until the input ends."""
    params = SamplingParams(**options.sampling_of(args))
    if params.n != 1:
        raise ValueError(f"a chat has one answer, got n={params.n}")
    chat = Chat(options.open_llm(args), params, system=args.system, stats=args.stats)
    if sys.stdin.isatty():
        print("Type /help for commands, /quit to leave.", file=sys.stderr)
    while (text := _read()) is not None:
        if not chat.take(text):
            break
    return 0


class Chat:
    """The turns so far and what a line of input does to them."""

    def __init__(
        self, llm: LLM, params: SamplingParams, *, system: str | None = None, stats: bool = False
    ) -> None:
        self._llm, self._params, self._stats = llm, params, stats
        self.messages: list[dict[str, Any]] = []
        self._system = system
        self._start_over()

    def take(self, text: str) -> bool:
        """Handles one line: a command or something to answer. False: the user wants to leave."""
        text = text.strip()
        command, _, rest = text.partition(" ")
        if command == "/quit":
            return False
        if command == "/reset":
            self._start_over()
        elif command == "/system":
            self._system = rest.strip() or None
            self._start_over()
        elif command.startswith("/"):
            known = "" if command == "/help" else f"no command {command}; there are "
            print(f"{known}/reset, /system TEXT, /help, /quit", file=sys.stderr)
        elif text:
            self._answer(text)
        return True

    def _start_over(self) -> None:
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    def _answer(self, text: str) -> None:
        """Streams the answer to standard output; a refused turn is not remembered."""
        asked = [*self.messages, {"role": "user", "content": text}]
        output, shown = None, 0
        try:
            with _interrupt() as interrupted:
                for output in self._llm.generate_iter({"messages": asked}, self._params):
                    answer = output.outputs[0].text
                    print(answer[shown:], end="", flush=True)
                    shown = len(answer)
                    if interrupted:
                        break
        except ValueError as error:
            print(f"kvjax: {error}; /reset starts over", file=sys.stderr)
            return
        print()
        assert output is not None
        if output.error is not None:
            print(f"kvjax: {output.error}", file=sys.stderr)
            return
        self.messages = [*asked, {"role": "assistant", "content": output.outputs[0].text}]
        if self._stats:
            print(_summary(output), file=sys.stderr)


def _summary(output: RequestOutput) -> str:
    prompt, cached = len(output.prompt_token_ids), output.num_cached_tokens
    text = f"[{prompt} prompt tokens, {cached} reused, {prompt - cached} computed"
    metrics = output.metrics
    if metrics is not None and metrics.time_to_first_token is not None:
        text += f"; first token after {metrics.time_to_first_token:.2f} s"
        if metrics.time_per_output_token:
            text += f", then {1 / metrics.time_per_output_token:.0f} tokens/s"
    return text + "]"


def _read() -> str | None:
    """The next line; None at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


@contextlib.contextmanager
def _interrupt() -> Iterator[list[bool]]:
    """A list that Ctrl-C fills: a step is never torn, the answer ends after it."""
    interrupted: list[bool] = []
    try:
        before = signal.signal(signal.SIGINT, lambda *_: interrupted.append(True))
    except ValueError:  # not the main thread, which Ctrl-C does not reach
        yield interrupted
        return
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)
