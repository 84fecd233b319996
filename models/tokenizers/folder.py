"""What the small files beside a tokenizer say: which tokens begin and end, and how chats look."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvjax.errors import TokenizerNotFound
from kvjax.models.checkpoint import Checkpoint


@dataclasses.dataclass(frozen=True)
class Settings:
    """`tokenizer_config.json` and its neighbours, as far as they are there."""

    tokenizer_config: dict[str, Any]
    chat_template: str | None
    model_bos_token_id: int | None  # from config.json
    model_eos_token_ids: tuple[int, ...]  # from generation_config.json, then config.json

    def bos_token_id(self, token_to_id: Callable[[str], int | None]) -> int | None:
        """The tokenizer's; the model's only if the tokenizer does not speak of it at all."""
        if "bos_token" not in self.tokenizer_config:
            return self.model_bos_token_id
        token = content(self.tokenizer_config["bos_token"])
        return None if token is None else token_to_id(token)

    def eos_token_ids(self, token_to_id: Callable[[str], int | None]) -> tuple[int, ...]:
        """The tokenizer's own first, then all that the model's configs name."""
        token = content(self.tokenizer_config.get("eos_token"))
        own = None if token is None else token_to_id(token)
        first = () if own is None else (own,)
        return tuple(dict.fromkeys(first + self.model_eos_token_ids))


def read_settings(checkpoint: Checkpoint) -> Settings:
    """Reads them from `checkpoint.folder`."""
    folder = checkpoint.folder
    tokenizer_config = read_json(folder / "tokenizer_config.json")
    model = checkpoint.config.get("text_config") or checkpoint.config
    eos_token_ids = _ids(read_json(folder / "generation_config.json").get("eos_token_id"))
    eos_token_ids += _ids(model.get("eos_token_id"))
    return Settings(
        tokenizer_config=tokenizer_config,
        chat_template=_chat_template(folder, tokenizer_config),
        model_bos_token_id=model.get("bos_token_id"),
        model_eos_token_ids=tuple(dict.fromkeys(eos_token_ids)),
    )


def content(token: Any) -> str | None:
    """The text of a token, which configs write either as such or as a table with flags."""
    return token.get("content") if isinstance(token, dict) else token


def read_json(file: Path) -> dict[str, Any]:
    """The file's table; empty if there is no such file."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerNotFound(f"{file}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise TokenizerNotFound(f"{file}: not a table")
    return value


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    ids = tuple(value) if isinstance(value, list) else (value,)
    if not all(isinstance(token_id, int) for token_id in ids):
        raise TokenizerNotFound(f"eos_token_id must be an id or a list of ids, got {value!r}")
    return ids


def _chat_template(folder: Path, tokenizer_config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = read_json(folder / "chat_template.json").get("chat_template")
    template = template or tokenizer_config.get("chat_template")
    if isinstance(template, list):  # several, by name
        return {entry["name"]: entry["template"] for entry in template}.get("default")
    return template
