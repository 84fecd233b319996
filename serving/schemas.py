"""Bodies of requests. Names and meanings are OpenAI's; the rest are those of `SamplingParams`.

A field that nobody knows is refused: a misspelt one would otherwise be ignored in silence.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from kvjax.request import MAX_LOGIT_BIAS, MAX_LOGPROBS, SamplingParams, StructuredOutputs
from kvjax.serving.keys import Tenant
from kvjax.sessions import Keep

MAX_N = 128  # completions of one prompt
MAX_PROMPTS = 256  # prompts of one body
MAX_STOPS = 16
MAX_CHUNKS = 256  # of one body
MAX_SESSION_SECONDS = 86_400.0  # that a conversation's KV may be kept between two turns

TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=2**20)]
Text = Annotated[str, Field(min_length=1)]
ChunkId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Salt = Annotated[str, Field(min_length=1, max_length=1024)]
Stop = Text | Annotated[list[Text], Field(max_length=MAX_STOPS)]
Bias = Annotated[float, Field(ge=-MAX_LOGIT_BIAS, le=MAX_LOGIT_BIAS)]
Penalty = Annotated[float, Field(ge=-2, le=2)]

# Fields of `Sampling` that go to `SamplingParams` as they are; None leaves its default.
_PASSED = (
    "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "seed", "branch", "reuse", "stop", "stop_token_ids", "ignore_eos",
    "min_tokens", "prompt_logprobs", "allowed_token_ids", "bad_words",
    "skip_special_tokens", "include_stop_str_in_output", "priority", "skip_reading_prefix_cache",
    "extra_args",
)  # fmt: skip


class Body(BaseModel):
    """What every body has in common."""

    model_config = ConfigDict(extra="forbid")


class ChunkPart(Body):
    """A part of a prompt whose KV is stored by itself: its text, its token ids, or the id that
    `/v1/kv/chunks` gave it."""

    type: Literal["chunk"] = "chunk"
    text: Text | None = None
    token_ids: Annotated[TokenIds, Field(min_length=1)] | None = None
    id: ChunkId | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(given is not None for given in (self.text, self.token_ids, self.id)) != 1:
            raise ValueError("a chunk is exactly one of text, token_ids and id")
        return self


def _marked(part: Any) -> Any:
    """Also the form of chunks in files: `{"chunk": text or token ids}`."""
    if isinstance(part, dict) and set(part) == {"chunk"}:
        kind = "text" if isinstance(part["chunk"], str) else "token_ids"
        return {"type": "chunk", kind: part["chunk"]}
    return part


Marking = BeforeValidator(_marked)


class StreamOptions(Body):
    """How a stream ends."""

    include_usage: bool = False
    include_obfuscation: bool | None = None  # accepted, and never done


class JSONSchema(Body):
    """A JSON schema under a name. What it says is always enforced."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class TextFormat(Body):
    """Any text."""

    type: Literal["text"]


class JSONObjectFormat(Body):
    """Any JSON object."""

    type: Literal["json_object"]


class JSONSchemaFormat(Body):
    """A JSON value that a schema describes."""

    type: Literal["json_schema"]
    json_schema: JSONSchema


class StructuredOutputsBody(Body):
    """What the answer must be: exactly one of these."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: Text | None = None
    choice: Annotated[list[Text], Field(min_length=1, max_length=1024)] | None = None
    grammar: Text | None = None  # Lark


class Sampling(Body):
    """How to generate. A field that is null or missing has the default of `SamplingParams`."""

    model: str | None = None
    n: int | None = Field(None, ge=1, le=MAX_N)
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    min_tokens: int | None = Field(None, ge=0, lt=2**31)
    temperature: float | None = Field(None, ge=0, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: float | None = Field(None, gt=0, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-1, lt=2**64)
    branch: int | None = Field(None, ge=0, le=2**30)
    stop: Stop | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    logit_bias: dict[Annotated[str, Field(pattern=r"^\d{1,10}$")], Bias] | None = None
    allowed_token_ids: TokenIds | None = None
    bad_words: Annotated[list[Text], Field(max_length=64)] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    priority: int | None = Field(None, ge=-(2**63), lt=2**63)
    cache_salt: Salt | None = None
    reuse: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    chunks: (
        Annotated[list[Annotated[Text | ChunkPart, Marking]], Field(max_length=MAX_CHUNKS)] | None
    ) = None
    skip_reading_prefix_cache: bool | None = None
    extra_args: dict[str, Any] | None = None
    response_format: TextFormat | JSONObjectFormat | JSONSchemaFormat | None = Field(
        None, discriminator="type"
    )
    structured_outputs: StructuredOutputsBody | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    session_id: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    session_seconds: float = Field(300, gt=0, le=MAX_SESSION_SECONDS)
    user: str | None = None  # this and the next are accepted, and change nothing
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def structured(self) -> StructuredOutputs | None:
        """What the answer must be, if anything. Raises `ValueError` if it is said twice."""
        own, asked = self.response_format, self.structured_outputs
        if isinstance(own, TextFormat):
            own = None
        if own is not None and asked is not None:
            raise ValueError("give either response_format or structured_outputs")
        if isinstance(own, JSONObjectFormat):
            return StructuredOutputs(json_object=True)
        if isinstance(own, JSONSchemaFormat):
            return StructuredOutputs(json=own.json_schema.schema_)
        if asked is None:
            return None
        return StructuredOutputs(
            json=asked.json_,
            json_object=bool(asked.json_object),
            regex=asked.regex,
            choice=asked.choice,
            grammar=asked.grammar,
        )

    def keep(self, tenant: Tenant, prompts: int) -> Keep | None:
        """The session that the KV is kept for, if any. Raises `ValueError` for several prompts."""
        if self.session_id is None:
            return None
        if prompts != 1:
            raise ValueError(f"a session has one prompt at a time, got {prompts}")
        return Keep((tenant.name, self.session_id), self.session_seconds)

    def params(self, **own: Any) -> SamplingParams:
        """The library's parameters; `own` are those that the endpoint settles. `ValueError`."""
        given = {name: getattr(self, name) for name in _PASSED}
        given["structured_outputs"] = self.structured()
        if self.logit_bias is not None:
            given["logit_bias"] = {int(token): bias for token, bias in self.logit_bias.items()}
        return SamplingParams(**{k: v for k, v in given.items() if v is not None}, **own)


class CompletionRequest(Sampling):
    """`POST /v1/completions`."""

    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[
            list[Annotated[str | ChunkPart, Marking]],
            Field(min_length=1, max_length=2 * MAX_CHUNKS + 1),
        ]
    )
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = None
    best_of: Literal[1] | None = None
    suffix: None = None

    @property
    def prompts(self) -> list[list[str | list[int] | ChunkPart]]:
        """The parts of each prompt, the body's `chunks` in front."""
        prompt: Any = self.prompt
        front: list[Any] = chunk_parts(self.chunks)
        if not isinstance(prompt, list) or not prompt or isinstance(prompt[0], int):
            return [[*front, prompt]]
        if any(isinstance(part, ChunkPart) for part in prompt):
            return [[*front, *prompt]]
        return [[*front, one] for one in prompt]


def chunk_parts(chunks: Sequence[str | ChunkPart] | None) -> list[ChunkPart]:
    """A body's `chunks`, of which texts may stand by themselves."""
    return [ChunkPart(text=one) if isinstance(one, str) else one for one in chunks or ()]


class TextPart(Body):
    """Text in a message's content."""

    type: Literal["text"]
    text: str


Part = Annotated[TextPart | ChunkPart, Field(discriminator="type"), Marking]


class Message(BaseModel):
    """One message. What else a template wants (`name`, `tool_calls`, ...) reaches it as it is."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Field(max_length=1024)] | None = None

    def plain(self, stand_in: Callable[[ChunkPart], str]) -> dict[str, Any]:
        """As templates take it: content as one string, with a text that stands for each chunk;
        what is not set left out."""
        fields = self.model_dump(exclude_none=True)
        if isinstance(self.content, list):
            fields["content"] = "".join(
                part.text if isinstance(part, TextPart) else stand_in(part) for part in self.content
            )
        return fields


class ToolDescription(Body):
    """What a tool is called, does and takes."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None  # a JSON schema
    strict: bool | None = None


class Tool(Body):
    """A function that the model may ask for."""

    type: Literal["function"]
    function: ToolDescription


class FunctionName(Body):
    """A tool by its name."""

    name: str


class ChosenTool(Body):
    """The tool that must be called."""

    type: Literal["function"]
    function: FunctionName


class ChatRequest(Sampling):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = None  # accepted: the model decides
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None  # accepted, and changes nothing


class TokenizeRequest(Body):
    """`POST /tokenize`: of a text, or of a conversation through the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(Body):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: TokenIds
    skip_special_tokens: bool = False


class PutChunk(Body):
    """`POST /v1/kv/chunks`: a text or token ids, encoded now for prompts to come."""

    model: str | None = None
    text: Text | None = None
    token_ids: Annotated[TokenIds, Field(min_length=1)] | None = None
    cache_salt: Salt | None = None
    reuse: Annotated[str, Field(min_length=1, max_length=256)] | None = None  # whom it is for
    pin: bool = False
