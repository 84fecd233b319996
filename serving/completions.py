"""`POST /v1/completions`."""

import dataclasses
import json
import time
from collections.abc import Sequence as Seq
from typing import Any

from starlette.requests import Request

from kvjax.request import CompletionOutput, RequestOutput
from kvjax.serving.generation import Generation, Job, event
from kvjax.serving.logprobs import completion_logprobs, prompt_logprobs
from kvjax.serving.marking import Marked, Part, Reader
from kvjax.serving.schemas import CompletionRequest
from kvjax.serving.service import Service
from kvjax.serving.usage import usage


async def complete(service: Service, request: Request, body: CompletionRequest) -> Generation:
    """The answer to a completion request. Raises `ValueError` or `APIError` for bad input."""
    service.check_model(body.model)
    prompt_logprobs_ = body.prompt_logprobs
    if body.echo and body.logprobs is not None:
        prompt_logprobs_ = max(body.logprobs, prompt_logprobs_ or 0)
    tenant = request.scope["kvjax.tenant"]
    salt = tenant.cache_salt(body.cache_salt)
    await service.check_reuse(body.reuse)
    params = body.params(
        logprobs=body.logprobs,
        cache_salt=salt,
        **({} if body.max_tokens is None else {"max_tokens": body.max_tokens}),
    )
    params = dataclasses.replace(params, prompt_logprobs=prompt_logprobs_)
    await service.compile_grammar(params)
    reader, jobs = Reader(service, tenant, salt, service.llm.max_model_len), []
    for parts in body.prompts:
        if parts == [""]:
            raise ValueError("prompt must not be empty")
        marked = await reader.prompt(parts, special=True)
        jobs.append(Job(marked, params, _echoed(service, parts, marked) if body.echo else None))
    keep = body.keep(tenant, prompts=len(jobs))
    answer_id = service.next_id("cmpl")
    wording = CompletionWording(service, answer_id, body, jobs)
    return Generation(service, answer_id, jobs, wording, stream=bool(body.stream), keep=keep)


def _echoed(service: Service, parts: Seq[Part], marked: Marked) -> str:
    """The text of a prompt, as it was given or as its tokens say."""
    if len(parts) == 1 and isinstance(parts[0], str):
        return parts[0]
    return service.llm.get_tokenizer().decode(marked.ids)


class CompletionWording:
    """How `/v1/completions` answers. Choice `i` of prompt `j` has the index `j * n + i`."""

    def __init__(
        self, service: Service, answer_id: str, body: CompletionRequest, jobs: Seq[Job]
    ) -> None:
        self._tokenizer = service.llm.get_tokenizer()
        self._body, self._jobs, self._n = body, jobs, body.n or 1
        self._head = {
            "id": answer_id, "object": "text_completion", "created": int(time.time()),
            "model": service.model,
        }  # fmt: skip
        self._sent: dict[int, tuple[int, int]] = {}  # choice -> characters and tokens sent
        self._plain = body.logprobs is None and not body.return_token_ids and not body.echo
        head = json.dumps(self._head, ensure_ascii=False, separators=(",", ":"))
        self._prefix = f'data: {head[:-1]},"choices":[{{"index":'

    def events(self, job: int, output: RequestOutput) -> bytes:
        """One event per choice that has something new."""
        return b"".join(
            self._event(job, completion, output)
            for completion in output.outputs
            if self._sent.get(job * self._n + completion.index) != (-1, -1)
        )

    def _event(self, job: int, completion: CompletionOutput, output: RequestOutput) -> bytes:
        index = job * self._n + completion.index
        text_from, tokens_from = self._sent.get(index, (0, 0))
        text = completion.text[text_from:]
        if completion.finished:
            self._sent[index] = (-1, -1)
        elif not text and (self._plain or len(completion.token_ids) == tokens_from):
            return b""
        else:
            self._sent[index] = (len(completion.text), len(completion.token_ids))
        if self._plain and not completion.finished:
            tail = ',"logprobs":null,"finish_reason":null,"stop_reason":null}]}\n\n'
            words = json.dumps(text, ensure_ascii=False)
            return f'{self._prefix}{index},"text":{words}{tail}'.encode()
        first = index not in self._sent or (text_from, tokens_from) == (0, 0)
        choice = self._choice(job, completion, output, text_from, tokens_from, first=first)
        return event({**self._head, "choices": [choice]})

    def closing(self, outputs: Seq[RequestOutput]) -> bytes:
        """The usage, if asked for."""
        options = self._body.stream_options
        if options is None or not options.include_usage:
            return b""
        return event({**self._head, "choices": [], "usage": usage(outputs)})

    def whole(self, outputs: Seq[RequestOutput]) -> dict[str, Any]:
        """All choices of all prompts."""
        choices = [
            self._choice(job, completion, output, 0, 0, first=True)
            for job, output in enumerate(outputs)
            for completion in output.outputs
        ]
        return {**self._head, "choices": choices, "usage": usage(outputs)}

    def _choice(
        self,
        job: int,
        completion: CompletionOutput,
        output: RequestOutput,
        text_from: int,
        tokens_from: int,
        *,
        first: bool,
    ) -> dict[str, Any]:
        """What is new since `text_from` characters and `tokens_from` tokens."""
        body, text = self._body, completion.text[text_from:]
        ids = list(completion.token_ids[tokens_from:])
        entries: list[Any] = list((completion.logprobs or ())[tokens_from:])
        echoed = self._jobs[job].text or "" if body.echo else ""
        choice: dict[str, Any] = {
            "index": job * self._n + completion.index,
            "text": echoed + text if first else text,
            "logprobs": None,
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }
        if body.logprobs is not None:
            offset = text_from + (0 if first else len(echoed))
            if first and body.echo:
                ids = [*output.prompt_token_ids, *ids]
                entries = [*(output.prompt_logprobs or ()), *entries]
            choice["logprobs"] = completion_logprobs(
                self._tokenizer, ids, entries, body.logprobs, offset
            )
        if body.return_token_ids:
            choice["token_ids"] = list(completion.token_ids[tokens_from:])
            choice["prompt_token_ids"] = list(output.prompt_token_ids) if first else None
        if body.prompt_logprobs is not None and first and output.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(self._tokenizer, output.prompt_logprobs)
        return choice
