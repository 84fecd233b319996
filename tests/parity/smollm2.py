"""What transformers makes of the real SmolLM2-135M: greedy tokens and leading logits, float32.

The weights are those of the same GGUF file, read by transformers' own loader; they are compared
with ours, tensor by tensor, before anything else.
"""

# pyright: reportMissingImports=false

from typing import Any

import numpy as np
import torch
import transformers

from kvjax.models.checkpoint import open_checkpoint
from kvjax.models.tokenizers import load_tokenizer

MODEL = "smollm2-135m"
NUM_TOKENS = 64
STEPS = (0, 1, 7, 31, 63)  # of the generated tokens, those whose leading logits are kept
TOP = 10


def _chat(user: str, system: str = "") -> str:
    head = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    return f"{head}<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"


PROMPTS = (
    _chat("What is the capital of France?"),
    _chat("Write a haiku about the sea.", "You are a helpful AI assistant named SmolLM."),
    _chat("Explain in two sentences why the sky is blue."),
    _chat("List three fruits and their colours as JSON."),
    _chat("Translate to German: Good morning, how are you?"),
    _chat("What is 17 * 23? Think step by step."),
    "The quick brown fox jumps over the lazy dog. The",
    "Once upon a time, in a village at the edge of a dark forest,",
    "In 1969, Apollo 11 landed on the Moon. The crew",
    "Photosynthesis is the process by which",
    "A",
    'def fibonacci(n):\n    """Returns the n-th Fibonacci number."""\n',
    "#include <stdio.h>\n\nint main(void) {\n    int n = 10;\n",
    "import numpy as np\n\nclass Matrix:\n    def __init__(self, rows, cols):\n",
    "SELECT name, COUNT(*) AS orders FROM customers JOIN",
    "-- Schema: users(id, name, age), visits(user_id, day)\n-- Users older than 30:\nSELECT",
    "Die Hauptstadt von Deutschland ist",
    "Il était une fois, dans un petit village, une jeune fille qui",
    "東京は日本の首都です。",
    "3.14159265358979 2.71828182845904 1.4142135623 0 1 1 2 3 5 8 13 21 34",
)


def hugging_face_model() -> Any:
    """The float32 transformers model of the same file, its weights checked against our reader."""
    checkpoint = open_checkpoint(MODEL)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint.path.parent,
        gguf_file=checkpoint.path.name,
        dtype=torch.float32,
        attn_implementation="eager",
    ).eval()
    theirs = dict(model.named_parameters())  # tied: the output matrix is not listed twice
    if set(theirs) != set(checkpoint.tensors):
        raise AssertionError(f"other tensors: {set(theirs) ^ set(checkpoint.tensors)}")
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(
            checkpoint.tensors[name].astype(np.float32), tensor.detach().numpy(), err_msg=name
        )
    return model


@torch.no_grad()
def continued(model: Any, prompt_ids: list[int]) -> dict[str, Any]:
    """`NUM_TOKENS` greedy tokens (ends of sequence are tokens too), their margins, top logits."""
    ids = torch.tensor([prompt_ids])
    step = model(ids, use_cache=True)
    tokens = [int(step.logits[0, -1].argmax())]
    while len(tokens) < NUM_TOKENS:
        step = model(
            torch.tensor([tokens[-1:]]), past_key_values=step.past_key_values, use_cache=True
        )
        tokens.append(int(step.logits[0, -1].argmax()))
    whole = model(torch.tensor([prompt_ids + tokens[:-1]])).logits[0, len(prompt_ids) - 1 :]
    best = whole.topk(2).values
    margins = (best[:, 0] - best[:, 1]).tolist()
    near_ties = [i for i, token in enumerate(tokens) if int(whole[i].argmax()) != token]
    if any(margins[i] > 1e-4 for i in near_ties):
        raise AssertionError(f"cached and whole passes disagree at {near_ties}")
    return {
        "prompt_ids": prompt_ids,
        "token_ids": tokens,
        "margins": [round(margin, 5) for margin in margins],
        "top": [_top(whole[at], at) for at in STEPS],
    }


def _top(logits: torch.Tensor, step: int) -> dict[str, Any]:
    values, ids = logits.topk(TOP)
    return {
        "step": step,
        "ids": ids.tolist(),
        "logits": [round(value, 5) for value in values.tolist()],
    }


def golden() -> dict[str, Any]:
    """Everything tests/models/golden/smollm2.json holds."""
    model, tokenizer = hugging_face_model(), load_tokenizer(open_checkpoint(MODEL))
    return {
        "model": MODEL,
        "transformers": transformers.__version__,
        "prompts": [
            {"text": text, **continued(model, list(tokenizer.encode(text)))} for text in PROMPTS
        ],
    }
