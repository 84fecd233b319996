"""Chat messages -> the text a model was trained to continue, by the model's own Jinja template.

A template comes with the weights, so it is foreign code: it runs in Jinja's sandbox.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from kvjax.models.tokenizers import Tokenizer

Message = Mapping[str, Any]


def render_chat(
    tokenizer: Tokenizer | str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> str:
    """Text of a conversation; encode it with `add_special_tokens=False`, it has its own.

    `tokenizer` may be the template itself. `messages` are tables with a "role" and, mostly, a
    "content"; `tools` are JSON schemas; `variables` reach the template as they are. Raises
    `ValueError` if there is no template, if a message is malformed, or if the template refuses
    the conversation (its own words are in the message).
    """
    template = tokenizer if isinstance(tokenizer, str) else tokenizer.chat_template
    if not template:
        raise ValueError("the tokenizer has no chat template")
    _check(messages, tools)
    if not isinstance(tokenizer, str):
        variables = _special_tokens(tokenizer) | variables
    try:
        return _compile(template).render(
            messages=[dict(message) for message in messages],
            tools=None if tools is None else list(tools),
            add_generation_prompt=add_generation_prompt,
            **variables,
        )
    except jinja2.TemplateError as error:
        raise ValueError(f"chat template: {error.message or error}") from error
    except TypeError as error:  # such as adding a missing content to a string
        raise ValueError(f"chat template cannot render these messages: {error}") from error


def _check(messages: object, tools: object) -> None:
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise ValueError(f"messages must be a list of tables, got {type(messages).__name__}")
    if not messages:
        raise ValueError("messages is empty")
    for place, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(f"messages[{place}] must be a table, got {type(message).__name__}")
        if not isinstance(message.get("role"), str):
            raise ValueError(f"messages[{place}] has no role: {sorted(map(str, message))}")
    if tools is None:
        return
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
        raise ValueError(f"tools must be a list of JSON schemas, got {type(tools).__name__}")
    for place, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise ValueError(f"tools[{place}] must be a JSON schema, got {type(tool).__name__}")


def _special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """The names under which templates expect them; a token that is not there is left out."""
    ends = tokenizer.eos_token_ids
    ids = {"bos_token": tokenizer.bos_token_id, "eos_token": ends[0] if ends else None}
    tokens = {n: tokenizer.id_to_token(i) for n, i in ids.items() if i is not None}
    return {name: token for name, token in tokens.items() if token is not None}


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what an assistant said, for training; here it is plain text."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own declaration)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes what HTML would trip over, which models never saw."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.datetime.now().strftime(layout)
