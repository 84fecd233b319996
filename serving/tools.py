"""Tools: how models write their calls, and how OpenAI's API words them.

What a model writes depends on its chat template, which is where the marks below are looked for. A
call that is asked for by `tool_choice` is not left to the model: the answer is bound to a JSON
schema of the calls that may be made.
"""

import dataclasses
import json
import secrets
from collections.abc import Sequence as Seq
from typing import Any

from kvjax.request import StructuredOutputs

Call = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class CallFormat:
    """How a family of models writes calls: JSON between two marks."""

    opening: str
    closing: str = ""


# In order of preference: the first whose opening is in the template.
CALL_FORMATS: dict[str, CallFormat] = {
    "hermes": CallFormat("<tool_call>", "</tool_call>"),  # Qwen, Hermes, SmolLM3
    "mistral": CallFormat("[TOOL_CALLS]"),
    "llama": CallFormat("<|python_tag|>"),
}
_BARE = CallFormat("")  # an answer that is one JSON object


def call_format(template: str) -> CallFormat:
    """The format of a template. Raises `ValueError` if it knows no tools."""
    if "tools" not in template:
        raise ValueError("the model's chat template takes no tools")
    found = (form for form in CALL_FORMATS.values() if form.opening in template)
    return next(found, _BARE)


def bound_to_calls(tools: Seq[dict[str, Any]], name: str | None) -> StructuredOutputs:
    """What an answer must be that is a call of `name`, or (None) of any tool.

    Raises `ValueError` if no tool has that name.
    """
    functions = [tool["function"] for tool in tools]
    chosen = [f for f in functions if name is None or f["name"] == name]
    if not chosen:
        raise ValueError(
            f"tool_choice names {name!r}; the tools are {[f['name'] for f in functions]}"
        )
    schemas = [
        {
            "type": "object",
            "properties": {
                "name": {"const": function["name"]},
                "arguments": function.get("parameters") or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for function in chosen
    ]
    return StructuredOutputs(json=schemas[0] if len(schemas) == 1 else {"anyOf": schemas})


class ToolReader:
    """Tells text from calls in one answer as it grows."""

    def __init__(self, form: CallFormat, *, bound: bool) -> None:
        self._opening, self._closing = ("", "") if bound else (form.opening, form.closing)
        self._bound = bound

    def shown(self, text: str) -> str:
        """What of an unfinished answer is certainly no call."""
        if not self._opening:
            return "" if self._bound or text.lstrip()[:1] in ("", "{", "[") else text
        at = text.find(self._opening)
        if at >= 0:
            return text[:at]
        begun = (
            n for n in range(len(self._opening) - 1, 0, -1) if text.endswith(self._opening[:n])
        )
        return text[: len(text) - next(begun, 0)]

    def read(self, text: str) -> tuple[str, list[Call]]:
        """The text of a finished answer, and its calls; what is no valid call stays text."""
        if not self._opening:
            calls = _calls(text)
            return ("", calls) if calls else (text, [])
        said, *pieces = text.split(self._opening)
        calls: list[Call] = []
        for piece in pieces:
            body = piece.split(self._closing)[0] if self._closing else piece
            found = _calls(body)
            if not found:
                return text, []
            calls += found
        return said, calls


def _calls(text: str) -> list[Call]:
    """Calls in JSON: an object or a list of them, with `arguments` or `parameters`."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return []
    calls = []
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, dict) or not isinstance(item.get("name"), str):
            return []
        arguments = item.get("arguments", item.get("parameters", {}))
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        calls.append(
            {
                "id": f"call_{secrets.token_hex(12)}",
                "type": "function",
                "function": {"name": item["name"], "arguments": arguments},
            }
        )
    return calls
