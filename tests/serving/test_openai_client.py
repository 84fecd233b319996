"""The real `openai` package against the server."""

import asyncio
from typing import Any

import openai
import pytest

HELLO: Any = [{"role": "user", "content": "hello"}]
GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 6}
EXTRA = {"ignore_eos": True}


@pytest.fixture
def client(served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def async_client(served) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def test_models_completions_and_chats(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    done = client.completions.create(prompt="the sea", **GREEDY, extra_body=EXTRA, logprobs=2)
    assert done.usage is not None
    assert done.usage.completion_tokens == 6
    assert done.choices[0].logprobs is not None
    said = client.chat.completions.create(
        messages=HELLO, **GREEDY, n=2, logprobs=True, top_logprobs=3, extra_body=EXTRA
    )
    assert [choice.index for choice in said.choices] == [0, 1]
    assert said.usage is not None
    assert said.usage.prompt_tokens_details is not None
    logprobs = said.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [len(token.top_logprobs) for token in logprobs.content] == [3] * 6


def test_a_stream_of_the_client_is_the_whole_answer(client):
    whole = client.chat.completions.create(messages=HELLO, **GREEDY, extra_body=EXTRA)
    text, usage = "", None
    for chunk in client.chat.completions.create(
        messages=HELLO, **GREEDY, extra_body=EXTRA, stream=True,
        stream_options={"include_usage": True},
    ):  # fmt: skip
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
        usage = chunk.usage or usage
    assert text == whole.choices[0].message.content
    assert usage is not None
    assert usage.completion_tokens == 6
    pieces = client.completions.create(prompt="ab", **GREEDY, extra_body=EXTRA, stream=True)
    joined = "".join(choice.text for chunk in pieces for choice in chunk.choices)
    again = client.completions.create(prompt="ab", **GREEDY, extra_body=EXTRA)
    assert joined == again.choices[0].text


def test_concurrent_async_streams_give_what_each_gives_alone(async_client):
    async def text(prompt: str) -> str:
        stream = await async_client.completions.create(
            prompt=prompt, **GREEDY, extra_body=EXTRA, stream=True
        )
        return "".join([choice.text async for chunk in stream for choice in chunk.choices])

    async def run() -> None:
        prompts = ["ab", "cd" * 20, "ef", "gh" * 9, "ij", "kl"]
        together = await asyncio.gather(*(text(prompt) for prompt in prompts))
        assert together == [await text(prompt) for prompt in prompts]

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_stream_that_the_client_closes_is_aborted(served, client):
    body = {"prompt": "ab", "model": "tiny", "max_tokens": 200, "stream": True}
    stream = client.completions.create(**body, extra_body=EXTRA)
    next(iter(stream))
    stream.close()
    served.settled()


def test_errors_are_the_clients_own_types(client):
    with pytest.raises(openai.NotFoundError, match="'gpt'"):
        client.completions.create(model="gpt", prompt="x")
    with pytest.raises(openai.BadRequestError, match="max_model_len") as refused:
        client.completions.create(model="tiny", prompt="x" * 400)
    assert refused.value.code == "context_length_exceeded"
