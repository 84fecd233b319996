"""Text to SQL: every table is encoded once, behind the tables it refers to, and then only moved."""

import argparse

from kvjax import LLM, Chunk, SamplingParams
from kvjax.benchmarks import corpora


def main() -> None:
    """Prints queries for a schema whose tables come in three orders, and what they cost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--max-tokens", type=int, default=24)
    args = parser.parse_args()
    # Approximate: `kvjax reuse check` says what it loses. Here it is only shown.
    llm = LLM(args.model, reuse="tablecache", force_reuse=True, max_model_len=4096, max_num_seqs=4)
    items = [item for item in corpora.build("sql").items if item.template == "tpch"]
    tables = [Chunk(passage.text) for passage in items[0].passages]
    stored = sum(put.stored for put in llm.chunks.put(tables))
    print(f"{stored} of {len(tables)} tables encoded, foreign keys first")
    prompts = [item.prompt(lambda passage: Chunk(passage.text)) for item in items[::9]]
    params = SamplingParams(max_tokens=args.max_tokens, temperature=0, stop=";")
    for item, output in zip(items[::9], llm.generate(prompts, params), strict=True):
        report, text = output.reuse, output.outputs[0].text.strip()
        length, moved = len(output.prompt_token_ids), report.shifted + report.exact
        print(f"{item.question} SELECT {text!r}  ({moved:.0f} of {length} tokens reused)")


if __name__ == "__main__":
    main()
