"""Made-up readings for tests of what is done with readings."""

from kvjax.benchmarks.reuse_reading import Reading


def reading(kl=0.0, **changes):
    """A reading whose both divergences are `kl`; anything else as a full prefill would have it."""
    fields = {
        "kl_1": kl, "kl_answer": kl, "top1": True, "agreement": 1.0, "solved": True,
        "gold_logprob": -1.0, "kv_deviation": (0.0, 0.1, 0.2), "computed_layer_tokens": 300,
        "total_layer_tokens": 300, "copied_tokens": 0, "stored_bytes_per_token": 0.0,
        "prefill_s": 0.5,
    }  # fmt: skip
    return Reading(**{**fields, **changes})
