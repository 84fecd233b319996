"""Conditions a caller can act on. Bad arguments are `ValueError`; our own bugs are `assert`."""


class KVJaxError(Exception):
    """Base of every typed error of kvjax."""


class OutOfPages(KVJaxError):
    """The page pool cannot supply what was asked for, and nothing can be evicted or preempted."""

    def __init__(self, wanted: int, free: int, hint: str = "") -> None:
        super().__init__(f"{wanted} KV pages wanted, {free} free{'; ' + hint if hint else ''}")
        self.wanted, self.free = wanted, free


class PromptTooLong(KVJaxError, ValueError):
    """The prompt does not fit the context (`max_model_len`) or can never fit the page pool."""


class UnsupportedModel(KVJaxError, ValueError):
    """No model family here can run this checkpoint; the message names the architecture."""


class ModelNotFound(KVJaxError, FileNotFoundError):
    """The name is no known model, no folder, no file and no reachable hub id."""


class CorruptWeights(KVJaxError, ValueError):
    """A weight file is truncated, fails its checksum, or lacks or mis-shapes a tensor."""


class TokenizerNotFound(KVJaxError, FileNotFoundError):
    """The checkpoint brings no tokenizer that can be read."""


class GrammarFailed(KVJaxError, RuntimeError):
    """What a request forbids otherwise leaves no token that its structured outputs allow."""


class StepFailed(KVJaxError, RuntimeError):
    """The device step raised for this request; the others went on. `__cause__` says what raised."""


class UnknownChunk(KVJaxError, LookupError):
    """No KV is stored for the chunk that was named."""


class UnknownStrategy(KVJaxError, ValueError):
    """No reuse strategy has that name, or it has no such option; the message lists them."""


class ReuseRefused(KVJaxError, ValueError):
    """A way of reusing KV may not serve this model; the message has the measured loss, says that
    none was measured, or why the model gains nothing by it."""


class InvalidPlan(KVJaxError, ValueError):
    """A reuse plan cannot be carried out; the message names the stage and the rule it breaks."""


class CorruptChunks(KVJaxError, ValueError):
    """A file of saved chunks is damaged where that concerns all of them, or is no such file."""


class ForeignChunks(KVJaxError, ValueError):
    """Saved chunks hold for another model, KV type or tokenizer; the message names both."""
