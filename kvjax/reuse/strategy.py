"""What a reuse strategy is: hooks, each optional, over one prompt and what is stored of it.

    enrich      behind which context a chunk's KV is computed, ahead of time
    related     ... and where that is other documents of a corpus, which
    wanted      ... and at the latest when a prompt misses it
    annotate    what is worked out once from stored KV, and kept with it
    refusal     why a model gains nothing by it
    look_up     which stored variant serves a chunk of this prompt
    rotates     whether keys are turned to their new positions (every sane strategy does)
    patch       what is added to stored KV on its way, instead of running tokens
    select      which tokens are run again, in which layers
    observe     what is kept of a prompt that was computed
    arrange     in which order the prompts of a batch are queued

Strategies are frozen values and hold no state of a request: what they learn goes into the chunk
store, under the tenant's salt.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np

from kvjax.cache.chunks import Variant, tokens_hash
from kvjax.models.tokenizers import Tokenizer
from kvjax.reuse.plan import Spans, StagedPlan

Tokens = tuple[int, ...]
# Reads a variant's KV: float32 `[layers, tokens, kv_heads, width]`, keys as before rotary positions
# (an amplitude of the rotary table stays in them), values None where there are none (latent).
KV = tuple[np.ndarray, np.ndarray | None]
ReadKV = Callable[[], KV]


class ModelFacts(NamedTuple):
    """What strategies may depend on."""

    num_layers: int
    hidden_size: int
    kv_token_bytes: int  # over all layers
    hidden_token_bytes: int  # hidden states of one token entering every layer, as they are kept
    tag: str = ""  # tells its stored KV from that of other models


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """One of the texts that are encoded ahead of any prompt."""

    tokens: Tokens
    text: str
    parents: tuple[int, ...] | None = None  # numbers of those it refers to; None: nobody said


@dataclasses.dataclass(frozen=True, slots=True)
class Segment:
    """Tokens `[start, stop)` of a prompt that are a chunk."""

    start: int
    stop: int
    chunk: str  # `tokens_hash` of them


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt in which chunks are marked."""

    tokens: Tokens
    segments: tuple[Segment, ...]
    salt: str | None
    model: ModelFacts
    num_exact: int = 0  # leading tokens whose KV is there, exactly
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # the request's extra_args

    @property
    def num_tokens(self) -> int:
        """Length."""
        return len(self.tokens)

    @property
    def head(self) -> Tokens:
        """The text in front of the first chunk."""
        return self.tokens[: self.segments[0].start] if self.segments else ()

    @property
    def question(self) -> tuple[int, int]:
        """The text behind the last chunk, without the last token, which is always run by itself."""
        start = self.segments[-1].stop if self.segments else 0
        return min(start, self.num_tokens - 1), self.num_tokens - 1

    @property
    def learns(self) -> bool | None:
        """What its `extra_args["learn"]` says to strategies that learn from prompts. True: it is
        computed whole, and learned from; False: nothing is learned from it; None: as they like."""
        learn = self.options.get("learn")
        return None if learn is None else bool(learn)

    def chunk_tokens(self, number: int) -> Tokens:
        """Tokens of one chunk."""
        segment = self.segments[number]
        return self.tokens[segment.start : segment.stop]


@dataclasses.dataclass(frozen=True, slots=True)
class Hit:
    """A stored variant that serves tokens `[start, stop)` of a prompt."""

    number: int  # of the segment
    segment: Segment
    variant: Variant
    start: int  # behind an exact prefix that ends within the chunk
    stop: int

    @property
    def offset(self) -> int:
        """First token of the variant that is used."""
        return self.start - self.segment.start

    @property
    def shift(self) -> int:
        """New minus old rotary position."""
        return self.segment.start - self.variant.base


@dataclasses.dataclass(frozen=True, slots=True)
class KVPatch:
    """What is added to the KV of a hit's tokens, per layer, in float32 or float16.

    Dense: `k`, `v` are `[layers, tokens, kv_heads, width]`. Low rank: `k_left [layers, tokens,
    rank]` times `k` `[layers, rank, kv_heads, width]`, and the same for values. "source": before
    keys are turned; "target": after. Layers count from `l0` on; those below get nothing.
    """

    k: np.ndarray
    v: np.ndarray | None
    k_left: np.ndarray | None = None
    v_left: np.ndarray | None = None
    frame: str = "source"
    origin: str = ""  # what it was made of, where the same hit may get another one later
    l0: int = 0

    @property
    def rank(self) -> int | None:
        """Rank, None if dense."""
        return None if self.k_left is None else self.k_left.shape[2]

    @property
    def num_bytes(self) -> int:
        """What it takes to keep; keys and values may share their left factor."""
        shared = self.v_left is self.k_left
        arrays = (self.k, self.v, self.k_left, None if shared else self.v_left)
        return sum(array.nbytes for array in arrays if array is not None)

    def part(self, start: int, stop: int) -> "KVPatch":
        """The patch of some of its tokens."""
        if self.k_left is None:
            v = None if self.v is None else self.v[:, start:stop]
            return dataclasses.replace(self, k=self.k[:, start:stop], v=v)
        v_left = None if self.v_left is None else self.v_left[:, start:stop]
        return dataclasses.replace(self, k_left=self.k_left[:, start:stop], v_left=v_left)


class Found(Protocol):
    """The chunk store, as strategies may read it."""

    def variants(self, salt: str | None, chunk: str) -> Mapping[str, Variant]:
        """Variants of a chunk, by `tokens_hash` of their context."""
        ...

    def of(self, salt: str | None) -> Iterable[Variant]:
        """All variants of a tenant, in the order in which they came."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Observed:
    """A prompt that has been computed, while its KV is still there."""

    prompt: Prompt
    exact_end: int  # tokens before it are as exact as a full prefill
    fates: np.ndarray  # i8[groups, tokens], `kvjax.reuse.report.Fate`
    used: tuple[tuple[int, int, Variant], ...]  # tokens `[start, stop)` came from a stored variant

    @property
    def exact(self) -> bool:
        """Whether all of it is."""
        return self.exact_end >= self.prompt.num_tokens


class Workbench(Found, Protocol):
    """What a strategy may do with an observed prompt and the chunk store.

    Reading waits for the device. KV is float32 `[layers, tokens, kv_heads, width]`, values None for
    a latent, keys turned back to positions from 0 on.
    """

    def read(self, variant: Variant) -> KV:
        """KV of a stored variant."""
        ...

    def read_prompt(self, start: int, stop: int) -> KV:
        """KV of tokens `[start, stop)` of the prompt, which come to stand at positions from 0."""
        ...

    def attended(self, start: int, stop: int, edges: Sequence[int]) -> np.ndarray:
        """Attention that tokens `[start, stop)` paid to tokens `[edges[p], edges[p + 1])`, in the
        mean over heads: f32[layers, stop - start, parts]. Runs these tokens once more."""
        ...

    def keep(self, number: int) -> Variant | None:
        """Stores a chunk of the prompt as it is there; the variant, also if it was there already.
        None: the store did not let it in."""
        ...

    def use(self, variant: Variant) -> None:
        """Records a use, which protects it from newcomers."""
        ...

    def discard(self, variant: Variant) -> None:
        """Drops a variant from the store."""
        ...


class Strategy:
    """The do-nothing strategy: every hook at its default. Subclasses are frozen dataclasses."""

    name: ClassVar[str] = "prefix"
    approximate: ClassVar[bool] = False  # whether a model has to pass the quality gate for it
    query_aware: ClassVar[bool] = False  # whether the text behind a chunk changes its KV
    rotates: ClassVar[bool] = True
    keeps_hidden: ClassVar[bool] = False  # of its variants hidden states are kept, not pages
    attends: ClassVar[bool] = False  # `observe` asks how much attention rows paid
    repair: int = 0  # reused rows that are run again between two decode steps

    def for_tokenizer(self, tokenizer: Tokenizer) -> "Strategy":
        """Called with the model's, before any work: this strategy, as it reads that model's ids.
        Raises `ReuseRefused` if it cannot."""
        return self

    def refusal(self, facts: ModelFacts) -> str | None:
        """Why a model gains nothing by it; None if it may."""
        return None

    @property
    def patch_shapes(self) -> tuple[tuple[tuple[int, ...], str], ...]:
        """Rank (`()` is dense) and frame of the patches it makes: whose programs are warmed up."""
        return ()

    def prepare(self, variant: Variant, facts: ModelFacts) -> None:
        """Gives a made-up variant, of a prompt that warm-up plans for, what `select` looks for in
        those that this strategy keeps."""

    def enrich(self, tokens: Tokens, corpus: Sequence[Tokens]) -> Tokens:
        """Context behind which a chunk of a corpus is computed ahead of time; () is canonical."""
        return ()

    def related(self, corpus: Sequence[Document]) -> Sequence[tuple[int, ...]] | None:
        """For each document the numbers of those it is computed behind, in their order; None: what
        `enrich` says of each."""
        return None

    def wanted(self, prompt: Prompt, number: int, found: Found) -> Tokens | None:
        """Context of the variant to compute now for a chunk of `prompt`; None: go without."""
        return None

    def annotate(self, variant: Variant, read: ReadKV) -> None:
        """Called when a variant that this strategy asked for is there, stored now or before: may
        add to its `scores` and `facts`. `read` waits for the device; it is only called if needed.
        """

    def look_up(self, prompt: Prompt, number: int, found: Found) -> Variant | None:
        """The variant that serves a chunk; None: its tokens are computed like any text."""
        return None

    def patch(self, prompt: Prompt, hit: Hit, hits: Sequence[Hit], found: Found) -> KVPatch | None:
        """What to add to a hit's KV. Made for `hit.start - hit.segment.start` on."""
        return None

    def select(self, prompt: Prompt, hits: Sequence[Hit]) -> Spans | StagedPlan:
        """Reused rows that are run again: known now (`Spans`), or chosen on the device."""
        return Spans(())

    def observe(self, observed: Observed, bench: Workbench) -> None:
        """Called once a prompt with chunks is computed, before its pages go."""

    def arrange(self, prompts: Sequence[Prompt]) -> Sequence[int]:
        """The order in which prompts of one batch are queued: every number once."""
        return range(len(prompts))

    @property
    def spec(self) -> str:
        """How `parse` is told this strategy: `name:option=value,...` with what is not default."""
        if not dataclasses.is_dataclass(self):
            return self.name
        given = [
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if field.compare and getattr(self, field.name) != field.default
        ]
        return self.name + (":" + ",".join(given) if given else "")


class CanonicalChunks(Strategy):
    """Strategies over chunks that were encoded alone, or behind one context that a chunk of a
    prompt always has: looked up, or computed when missed."""

    approximate: ClassVar[bool] = True

    def behind(self, prompt: Prompt, number: int) -> Tokens:
        """What a chunk of `prompt` is encoded behind: nothing."""
        return ()

    def wanted(self, prompt: Prompt, number: int, found: Found) -> Tokens | None:
        """The variant of that context."""
        return self.behind(prompt, number)

    def look_up(self, prompt: Prompt, number: int, found: Found) -> Variant | None:
        """The variant of that context."""
        key = context_hash(self.behind(prompt, number))
        return found.variants(prompt.salt, prompt.segments[number].chunk).get(key)


class Context(NamedTuple):
    """What a document is encoded behind, and of which chunks it consists, if of chunks."""

    tokens: Tokens
    chunks: tuple[str, ...] = ()


def contexts(
    strategy: Strategy, documents: Sequence[Document], corpus: Sequence[Document]
) -> list[Context]:
    """The context of each document: those it is related to, or what `enrich` finds in `corpus`."""
    related = strategy.related(documents)
    tokens = [document.tokens for document in documents]
    if related is None:
        among = [document.tokens for document in corpus]
        return [Context(tuple(strategy.enrich(mine, among))) for mine in tokens]
    return [
        Context(
            tuple(token for number in numbers for token in tokens[number]),
            tuple(tokens_hash(tokens[number]) for number in numbers),
        )
        for numbers in related
    ]


def context_hash(context: Tokens) -> str:
    """How a variant's context is named in its key; "" for none."""
    return tokens_hash(context) if context else ""


def variant_name(strategy: Strategy, context: Tokens) -> str:
    """The last part of the key of the variant that `strategy` keeps behind `context`."""
    return context_hash(context) + ("/hidden" if strategy.keeps_hidden else "")


def ratio_of(name: str, value: object) -> float:
    """`value` as a share. Raises `ValueError` if it is no number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a number in [0, 1], got {value!r}")
    return float(value)


def count_of(name: str, value: object, least: int = 0) -> int:
    """`value` as a count. Raises `ValueError` if it is no integer from `least` on."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return value
