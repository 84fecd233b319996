"""One long context, computed once, continued in several directions at once."""

import argparse

from kvjax import LLM, SamplingParams

CONTEXT = (
    "Minutes of the garden club. Present: Ada, Boris, Chen. Ada reported that the pear trees have "
    "scab. Boris bought two rolls of fleece and a new hose. Chen will write to the town about the "
    "compost. The next meeting is on the first of May in the greenhouse."
)
HINTS = (
    "\nIn one word, the trees have",
    "\nThe next meeting is in the",
    "\nBoris bought",
    "\nThe letter to the town is about",
)


def main() -> None:
    """Prints four continuations of one context, and what they cost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--max-tokens", type=int, default=8)
    args = parser.parse_args()
    llm = LLM(args.model, max_model_len=512, max_num_seqs=len(HINTS), max_num_batched_tokens=128)
    with llm.open(CONTEXT) as root:  # prefilled once
        branches = root.fork(len(HINTS))  # no device work, no copy
        for branch, hint in zip(branches, HINTS, strict=True):
            branch.append(hint)
        params = SamplingParams(max_tokens=args.max_tokens, temperature=0, stop="\n")
        outputs = llm.run(branches, params)  # one batch
        for hint, output in zip(HINTS, outputs, strict=True):
            length, shared = len(output.prompt_token_ids), output.num_cached_tokens
            text = hint.strip() + output.outputs[0].text
            print(f"{text!r}  ({shared} of {length} prompt tokens shared)")
        for branch in branches:
            branch.close()


if __name__ == "__main__":
    main()
