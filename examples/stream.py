"""Three conversations at once through `AsyncLLM`, each printed as it comes; one is cut short."""

import argparse
import asyncio

from kvjax import AsyncLLM, SamplingParams

PROMPTS = (
    "Name three rivers.",
    "Why is the sky blue? One sentence.",
    "Count upwards from one, for ever.",
)


async def main() -> None:
    """Streams the answers; the last one is aborted after a few tokens."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--max-tokens", type=int, default=24)
    args = parser.parse_args()
    llm = AsyncLLM(
        args.model, max_model_len=512, max_num_seqs=4, max_num_batched_tokens=64,
        compile_when_idle=False,
    )  # fmt: skip
    params = SamplingParams(max_tokens=args.max_tokens, temperature=0)

    async def answer(number: int, prompt: str) -> None:
        request_id = f"request-{number}"
        messages = [{"role": "user", "content": prompt}]
        shown = ""
        async for output in llm.generate(messages, params, request_id):
            completion = output.outputs[0]
            if new := completion.text[len(shown) :]:
                print(f"[{number}] {new!r}")
            shown = completion.text
            if number == len(PROMPTS) and len(completion.token_ids) >= args.max_tokens // 2:
                await llm.abort(request_id)  # the stream ends with finish_reason "abort"
            if output.finished:
                print(f"[{number}] finished: {completion.finish_reason}")

    try:
        await asyncio.gather(*(answer(i, prompt) for i, prompt in enumerate(PROMPTS, start=1)))
    finally:
        llm.shutdown()


if __name__ == "__main__":
    asyncio.run(main())
