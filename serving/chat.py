"""`POST /v1/chat/completions`."""

import dataclasses
import json
import time
from collections.abc import Sequence as Seq
from typing import Any

from starlette.requests import Request

from kvjax.marked import StandIns
from kvjax.models.chat import render_chat
from kvjax.models.tokenizers import Tokenizer
from kvjax.request import CompletionOutput, RequestOutput, SamplingParams, StructuredOutputs
from kvjax.serving.generation import Generation, Job, event
from kvjax.serving.logprobs import chat_logprobs, prompt_logprobs
from kvjax.serving.marking import Part, Reader
from kvjax.serving.schemas import (
    ChatRequest,
    ChosenTool,
    ChunkPart,
    Message,
    TextPart,
    chunk_parts,
)
from kvjax.serving.service import Service
from kvjax.serving.tools import Call, CallFormat, ToolReader, bound_to_calls, call_format
from kvjax.serving.usage import usage

_TAKEN = frozenset({"messages", "tools", "add_generation_prompt", "bos_token", "eos_token"})


async def chat(service: Service, request: Request, body: ChatRequest) -> Generation:
    """The answer to a conversation. Raises `ValueError` or `APIError` for bad input."""
    service.check_model(body.model)
    tokenizer = service.llm.get_tokenizer()
    if body.top_logprobs is not None and not body.logprobs:
        raise ValueError("top_logprobs needs logprobs=true")
    tools = _tools(body, tokenizer)
    tenant = request.scope["kvjax.tenant"]
    salt = tenant.cache_salt(body.cache_salt)
    await service.check_reuse(body.reuse)
    params = body.params(
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        cache_salt=salt,
    )
    if tools is not None:
        params = tools.adapt(params, tokenizer)
    await service.compile_grammar(params)
    parts = conversation(
        tokenizer,
        with_chunks(body.messages, body.chunks),
        body.chat_template_kwargs,
        generate=body.add_generation_prompt,
        tools=None if tools is None else tools.described,
    )
    prompts = Reader(service, tenant, salt, service.llm.max_model_len)
    marked = await prompts.prompt(parts, special=False)
    keep = body.keep(tenant, prompts=1)
    answer_id = service.next_id("chatcmpl")
    reader = None if tools is None else tools.reader
    wording = ChatWording(service, answer_id, body, reader)
    return Generation(
        service, answer_id, [Job(marked, params)], wording, stream=bool(body.stream), keep=keep
    )


def conversation(
    tokenizer: Tokenizer,
    messages: Seq[Message],
    variables: dict[str, Any] | None = None,
    *,
    generate: bool = True,
    tools: Seq[dict[str, Any]] | None = None,
) -> list[Part]:
    """A conversation through the model's chat template: its text, with the chunks in it."""
    taken = _TAKEN & set(variables or ())
    if taken:
        raise ValueError(f"chat_template_kwargs must not set {sorted(taken)}")
    chunks: StandIns[ChunkPart] = StandIns()
    plain = [message.plain(chunks.put) for message in messages]
    text = render_chat(
        tokenizer, plain, add_generation_prompt=generate, tools=tools, **(variables or {})
    )
    return [*chunks.cut(text)]


def with_chunks(messages: Seq[Message], chunks: Seq[str | ChunkPart] | None) -> Seq[Message]:
    """The messages with a body's `chunks` at the beginning of what the user says first.

    There they stand before every question, and before the same text in the next turn.
    """
    if not chunks:
        return messages
    first = next((i for i, message in enumerate(messages) if message.role == "user"), None)
    if first is None:
        raise ValueError("chunks are put in front of the first user message, and there is none")
    said = messages[first].content or ""
    own = [TextPart(type="text", text=said)] if isinstance(said, str) else said
    content = [*chunk_parts(chunks), *own]
    changed = messages[first].model_copy(update={"content": content})
    return [*messages[:first], changed, *messages[first + 1 :]]


@dataclasses.dataclass(frozen=True)
class _Tools:
    """The tools of a request, and how their calls are to be had."""

    described: list[dict[str, Any]]
    form: CallFormat
    bound: StructuredOutputs | None  # the answer must be a call

    @property
    def reader(self) -> ToolReader:
        """What finds the calls in the answer."""
        return ToolReader(self.form, bound=self.bound is not None)

    def adapt(self, params: SamplingParams, tokenizer: Tokenizer) -> SamplingParams:
        """The parameters with which the calls can be seen in the text."""
        if self.bound is not None:
            if params.structured_outputs is not None:
                raise ValueError("tool_choice already says what the answer must be")
            return dataclasses.replace(params, structured_outputs=self.bound)
        mark = tokenizer.token_to_id(self.form.opening) if self.form.opening else None
        if mark in tokenizer.special_ids:
            return dataclasses.replace(params, skip_special_tokens=False)
        return params


def _tools(body: ChatRequest, tokenizer: Tokenizer) -> _Tools | None:
    """None if there are no tools, or they are not to be used. Raises `ValueError`."""
    choice = body.tool_choice
    if not body.tools:
        if choice not in (None, "none", "auto"):
            raise ValueError("tool_choice needs tools")
        return None
    if choice == "none":
        return None
    form = call_format(tokenizer.chat_template or "")
    described = [tool.model_dump(exclude_none=True) for tool in body.tools]
    if choice in (None, "auto"):
        return _Tools(described, form, None)
    name = choice.function.name if isinstance(choice, ChosenTool) else None
    return _Tools(described, form, bound_to_calls(described, name))


class ChatWording:
    """How `/v1/chat/completions` answers."""

    def __init__(
        self, service: Service, answer_id: str, body: ChatRequest, reader: ToolReader | None = None
    ) -> None:
        self._reader = reader
        self._tokenizer = service.llm.get_tokenizer()
        self._body = body
        self._head = {"id": answer_id, "created": int(time.time()), "model": service.model}
        self._plain = not body.logprobs and not body.return_token_ids
        self._sent: dict[int, tuple[int, int]] = {}  # choice -> characters and tokens sent
        chunk = {**self._head, "object": "chat.completion.chunk"}
        head = json.dumps(chunk, ensure_ascii=False, separators=(",", ":"))
        self._prefix = f'data: {head[:-1]},"choices":[{{"index":'

    def events(self, job: int, output: RequestOutput) -> bytes:
        """For each choice that has something new: at first its role, then what it says."""
        return b"".join(
            self._events(completion, output)
            for completion in output.outputs
            if self._sent.get(completion.index) != (-1, -1)
        )

    def _events(self, completion: CompletionOutput, output: RequestOutput) -> bytes:
        index = completion.index
        if not completion.token_ids:
            return b""
        out = b""
        if index not in self._sent:
            out = self._chunk(index, {"role": "assistant", "content": ""}, **self._about(output))
        text_from, tokens_from = self._sent.get(index, (0, 0))
        said, calls = self._said(completion)
        text = said[text_from:]
        self._sent[index] = (max(text_from, len(said)), len(completion.token_ids))
        if text and self._plain:
            tail = '},"logprobs":null,"finish_reason":null,"stop_reason":null}]}\n\n'
            words = json.dumps(text, ensure_ascii=False)
            out += f'{self._prefix}{index},"delta":{{"content":{words}{tail}'.encode()
        elif not self._plain and len(completion.token_ids) > tokens_from:
            more = self._details(completion, tokens_from)
            out += self._chunk(index, {"content": text}, **more)
        if completion.finished:
            self._sent[index] = (-1, -1)
            if calls:
                numbered = [{"index": i, **call} for i, call in enumerate(calls)]
                out += self._chunk(index, {"tool_calls": numbered})
            ended = {
                "finish_reason": _reason(completion, calls),
                "stop_reason": completion.stop_reason,
            }
            out += self._chunk(index, {}, **ended)
        return out

    def closing(self, outputs: Seq[RequestOutput]) -> bytes:
        """The usage, if asked for."""
        options = self._body.stream_options
        if options is None or not options.include_usage:
            return b""
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": []}
        return event({**chunk, "usage": usage(outputs)})

    def whole(self, outputs: Seq[RequestOutput]) -> dict[str, Any]:
        """All choices."""
        (output,) = outputs
        choices = [self._choice(completion, output) for completion in output.outputs]
        reply = {**self._head, "object": "chat.completion", "choices": choices}
        return {**reply, "usage": usage(outputs)}

    def _choice(self, completion: CompletionOutput, output: RequestOutput) -> dict[str, Any]:
        said, calls = self._said(completion)
        message: dict[str, Any] = {"role": "assistant", "content": said}
        if calls:
            message = {"role": "assistant", "content": said or None, "tool_calls": calls}
        return {
            "index": completion.index,
            "message": message,
            "logprobs": None,
            "finish_reason": _reason(completion, calls),
            "stop_reason": completion.stop_reason,
            **self._details(completion, 0),
            **self._about(output),
        }

    def _said(self, completion: CompletionOutput) -> tuple[str, list[Call]]:
        """What may be shown of an answer so far, and the calls of one that is over."""
        if self._reader is None:
            return completion.text, []
        if completion.finished:
            return self._reader.read(completion.text)
        return self._reader.shown(completion.text), []

    def _chunk(self, index: int, delta: dict[str, Any], **more: Any) -> bytes:
        choice = {
            "index": index, "delta": delta, "logprobs": None, "finish_reason": None,
            "stop_reason": None, **more,
        }  # fmt: skip
        return event({**self._head, "object": "chat.completion.chunk", "choices": [choice]})

    def _details(self, completion: CompletionOutput, tokens_from: int) -> dict[str, Any]:
        """Log-probabilities and token ids of the tokens from `tokens_from` on, if asked for."""
        details: dict[str, Any] = {}
        ids = completion.token_ids[tokens_from:]
        if self._body.logprobs:
            entries = (completion.logprobs or ())[tokens_from:]
            count = self._body.top_logprobs or 0
            details["logprobs"] = chat_logprobs(self._tokenizer, ids, entries, count)
        if self._body.return_token_ids:
            details["token_ids"] = list(ids)
        return details

    def _about(self, output: RequestOutput) -> dict[str, Any]:
        """What is known of the prompt, if asked for."""
        about: dict[str, Any] = {}
        if self._body.return_token_ids:
            about["prompt_token_ids"] = list(output.prompt_token_ids)
        if self._body.prompt_logprobs is not None and output.prompt_logprobs is not None:
            about["prompt_logprobs"] = prompt_logprobs(self._tokenizer, output.prompt_logprobs)
        return about


def _reason(completion: CompletionOutput, calls: list[Call]) -> str | None:
    return (
        "tool_calls" if calls and completion.finish_reason == "stop" else completion.finish_reason
    )
