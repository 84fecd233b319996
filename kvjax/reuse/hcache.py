"""HCache (arXiv 2410.05004): KV is restored from the hidden states that entered each layer.

The hidden states of a chunk behind exactly the text in front of it are kept on the host and take no
pages. When the same text comes again and its KV is gone, each layer's norm and key and value
products give it back: no attention, no MLP, no approximation. Restored KV is an exact prefix like
any other, so a chunk behind another text is another variant.

Worth it where hidden states are smaller than KV: half of it with one KV head per query head, but
larger where more than two query heads share one. Such models are refused (`force_reuse` restores
all the same). Arithmetic never speaks against it: what restores is a part of what recomputes.

The paper's text was not available: the steps are from its abstract and summaries of others that
agree. Hidden states are float32 here and kept so beside float32 KV; beside narrower KV they are
kept as bfloat16, and what is restored then counts as approximate, of a lineage of its own. Not
here: saving them while tokens are first computed (a second forward of the chunk reads them off KV
that is there), restoring some layers by KV or by recompute (the bubble-free split), and 64-token
files over several disks; all three need a tier below the device.
"""

import dataclasses
from typing import ClassVar

from kvjax.cache.chunks import Variant
from kvjax.reuse.strategy import Found, ModelFacts, Prompt, Strategy, Tokens, variant_name


@dataclasses.dataclass(frozen=True)
class HCache(Strategy):
    """Chunks behind the very text in front of them, from hidden states on the host."""

    name: ClassVar[str] = "hcache"
    keeps_hidden: ClassVar[bool] = True

    def refusal(self, facts: ModelFacts) -> str | None:
        """Hidden states that are not smaller than KV."""
        hidden, kv = facts.hidden_token_bytes, facts.kv_token_bytes
        if hidden < kv:
            return None
        return f"hidden states take {hidden} bytes per token on this model, its KV {kv}"

    def wanted(self, prompt: Prompt, number: int, found: Found) -> Tokens | None:
        """The variant behind all that is in front of the chunk."""
        return prompt.tokens[: prompt.segments[number].start]

    def look_up(self, prompt: Prompt, number: int, found: Found) -> Variant | None:
        """The same."""
        segment = prompt.segments[number]
        name = variant_name(self, prompt.tokens[: segment.start])
        return found.variants(prompt.salt, segment.chunk).get(name)
