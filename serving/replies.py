"""Bodies of answers, for the OpenAPI schema and for tests that hold answers against it.

The endpoints build plain dictionaries of these shapes: making models of them first would cost more
than the rest of the answer.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

FinishReason = Literal["stop", "length", "tool_calls", "abort"]


class Reply(BaseModel):
    """Every field is known, none is missing."""

    model_config = ConfigDict(extra="forbid")


class ErrorDetail(Reply):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(Reply):
    """Body of every 4xx and 5xx."""

    error: ErrorDetail


class PromptTokensDetails(Reply):
    """Where the prompt's KV came from."""

    cached_tokens: int  # reused, not computed
    shifted_tokens: int | None = None  # of a prompt with chunks: moved from where they were stored
    patched_tokens: int | None = None  # the same, with a correction added
    recomputed_tokens: int | None = None  # stored, but run again


class Usage(Reply):
    """Tokens of one answer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(Reply):
    """Parallel lists, one entry per token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class Choice(Reply):
    """What all choices have. `token_ids` and `prompt_token_ids` only if asked for."""

    index: int
    finish_reason: FinishReason | None
    stop_reason: str | int | None  # the stop string or token; null: an end token, or none
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None


class CompletionChoice(Choice):
    """One completion."""

    text: str
    logprobs: CompletionLogprobs | None


class CompletionReply(Reply):
    """Answer of `/v1/completions`; in a stream, one event of it."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None  # in a stream: in the last event, if asked for


class TopLogprob(Reply):
    """A token that could have come."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token that came."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Reply):
    """One entry per token."""

    content: list[TokenLogprob]


class ToolFunction(Reply):
    """What is called, and with what (JSON text)."""

    name: str | None = None
    arguments: str


class ToolCall(Reply):
    """One call. `index` is there in streams only."""

    index: int | None = None
    id: str | None = None
    type: Literal["function"] | None = None
    function: ToolFunction


class AnswerMessage(Reply):
    """What the model said."""

    role: Literal["assistant"]
    content: str | None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(Choice):
    """One answer."""

    message: AnswerMessage
    logprobs: ChatLogprobs | None


class ChatReply(Reply):
    """Answer of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(Reply):
    """What one event adds."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChunkChoice(Choice):
    """What one event adds to one answer."""

    delta: Delta
    logprobs: ChatLogprobs | None


class ChatChunk(Reply):
    """One event of a streamed chat."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class ModelCard(Reply):
    """One served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(Reply):
    """Answer of `/v1/models`."""

    object: Literal["list"]
    data: list[ModelCard]


class TokenizeReply(Reply):
    """Answer of `/tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]


class DetokenizeReply(Reply):
    """Answer of `/detokenize`."""

    prompt: str


class Status(Reply):
    """Answer of `/health` and `/ready`."""

    status: str


class Version(Reply):
    """Answer of `/version`."""

    version: str
    jax: str
    platform: str


class PageCounts(Reply):
    """Every page once: free, only cached, held by requests, or pinned by sessions and branches.

    What is held or pinned may be cached, too.
    """

    total: int
    free: int
    cached_only: int
    held: int
    pinned: int
    page_size: int


class PrefixCacheStats(Reply):
    """Of the prefix cache, since it was made."""

    enabled: bool
    tokens: int
    pages: int
    queries: int
    query_tokens: int
    hit_tokens: int
    hit_rate: float  # of tokens
    inserted_tokens: int
    evicted_pages: int


class ChunkStats(Reply):
    """Of the stored chunks, since the server was started."""

    chunks: int
    variants: int
    tokens: int
    pages: int
    capacity_pages: int
    pinned: int
    lookups: int
    hits: int
    admitted: int
    refused: int
    evicted: int


class RequestCounts(Reply):
    """Sequences by where they are."""

    running: int
    waiting: int
    preemptions: int


class KVStats(Reply):
    """Answer of `/v1/kv/stats`."""

    pages: PageCounts
    prefix_cache: PrefixCacheStats
    chunks: ChunkStats
    requests: RequestCounts


class ChunkVariant(Reply):
    """Stored KV of a chunk, computed behind one context."""

    context_tokens: int
    lineage: str  # exact, or what its context was made by
    uses: int


class ChunkInfo(Reply):
    """Answer of most of `/v1/kv/chunks`: a chunk as it stands."""

    id: str
    object: Literal["kv.chunk"]
    tokens: int
    stored: bool  # false: evicted; the next prompt with it computes it again
    pinned: bool
    uses: int
    pages: int
    variants: list[ChunkVariant]


class ChunkList(Reply):
    """Answer of `GET /v1/kv/chunks`."""

    object: Literal["list"]
    data: list[ChunkInfo]
    has_more: bool


class ChunkGone(Reply):
    """Answer of `DELETE /v1/kv/chunks/{id}`."""

    id: str
    object: Literal["kv.chunk"]
    deleted: bool


Fate = Literal["exact", "shifted", "patched", "recomputed", "computed"]


class ReuseLayers(Reply):
    """Tokens of a prompt by fate, in layers `[start, end)`."""

    start: int
    end: int
    exact: int
    shifted: int
    patched: int
    recomputed: int
    computed: int


class ReuseSegment(Reply):
    """Tokens `[start, end)` of a prompt, which have one fate in the last layers."""

    start: int
    end: int
    fate: Fate
    text: str


class PromptReuse(Reply):
    """How one prompt's KV came about."""

    index: int
    prompt_tokens: int
    cached_tokens: int
    strategy: str
    copied_tokens: int
    estimated_loss: float | None  # nats per token, as the model's gate measured it
    layers: list[ReuseLayers]
    segments: list[ReuseSegment]


class RequestReuse(Reply):
    """Answer of `/v1/kv/requests/{id}/reuse`."""

    id: str
    time: float  # Unix seconds, of the first prompt that was over
    prompts: list[PromptReuse]


class RequestSummary(Reply):
    """One answer that a report is kept of."""

    id: str
    time: float
    prompt_tokens: int
    cached_tokens: int


class RequestList(Reply):
    """Answer of `/v1/kv/requests`: the newest first."""

    requests: list[RequestSummary]


class PromptSegment(Reply):
    """Tokens of a prompt that share a fate; "waiting": nothing has become of them yet."""

    start: int
    end: int
    fate: Fate | Literal["waiting"]
    text: str  # a long one without its middle


class OccupyingRequest(Reply):
    """A sequence that runs or waits."""

    id: str
    status: str
    prompt: int
    reused: int
    computed: int
    output: int
    pages: int
    segments: list[PromptSegment] | None


class TreeNode(Reply):
    """A span of the prefix tree; `parent` is its parent's place in the list, or -1."""

    parent: int
    start: int
    end: int
    pages: int
    hits: int
    used: int
    text: str | None


class Occupancy(Reply):
    """Answer of `/v1/kv/occupancy`."""

    model: str
    stats: KVStats
    computed_tokens: int
    pages: list[str]  # free, cached, pinned, shared, or r and the place in `requests`
    requests: list[OccupyingRequest]
    nodes: list[TreeNode]


class Session(Reply):
    """A conversation whose KV is kept."""

    id: str
    tokens: int
    pages: int
    seconds_left: float


class SessionList(Reply):
    """Answer of `/v1/sessions`."""

    sessions: list[Session]


class SessionGone(Reply):
    """Answer of `DELETE /v1/sessions/{id}`."""

    id: str
    deleted: bool


class ResetReply(Reply):
    """Answer of `/v1/kv/reset`."""

    freed_pages: int
