"""Settings from a file and the environment below the flags of a command.

A flag wins over `KVJAX_FLAG` in the environment, that over the YAML file, that over the default.
"""

import argparse
from pathlib import Path
from typing import Any

import yaml

from kvjax.config import environment

_YES, _NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def layer(parser: argparse.ArgumentParser) -> None:
    """Makes `parser` leave out what no flag sets; `layered` then fills it in."""
    defaults = {action.dest: action.default for action in _options(parser).values()}
    for action in _options(parser).values():
        action.default = argparse.SUPPRESS
    parser.set_defaults(layers=(parser, defaults))


def layered(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments with all layers in them. Raises `ValueError` for unknown names in the file."""
    given = dict(vars(args))
    parser, defaults = given.pop("layers")
    options = _options(parser)
    told = environment(options)
    path = given.get("config") or told.get("config")
    from_file = _read(Path(path), options) if path else {}
    return argparse.Namespace(
        **{
            **defaults,
            **_parsed(parser, options, from_file, f"{path}: "),
            **_parsed(parser, options, told, "the environment: KVJAX_"),
            **given,
        }
    )


def _options(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {
        action.dest: action
        for action in parser._actions
        if action.option_strings and not isinstance(action, argparse._HelpAction)
    }


def _read(path: Path, options: dict[str, argparse.Action]) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold a table of settings, got {type(settings).__name__}")
    settings = {str(name).replace("-", "_"): value for name, value in settings.items()}
    for name in settings:
        if name not in options or name == "config":
            raise ValueError(f"{path}: unknown setting {name!r}; there are {sorted(options)}")
    return settings


def _parsed(
    parser: argparse.ArgumentParser,
    options: dict[str, argparse.Action],
    settings: dict[str, Any],
    source: str,
) -> dict[str, Any]:
    """The settings as the flags of the same names would have set them."""
    values: dict[str, Any] = {}
    for name, value in settings.items():
        if value is None:
            continue
        words = _words(options[name], value, source + name)
        usage, prog = parser.usage, parser.prog
        parser.usage, parser.prog = argparse.SUPPRESS, f"{source}{name}"
        try:
            values[name] = getattr(parser.parse_args(words), name)
        finally:
            parser.usage, parser.prog = usage, prog
    return values


def _words(action: argparse.Action, value: Any, source: str) -> list[str]:
    if action.nargs != 0:
        return [f"{action.option_strings[0]}={value}"]
    text = str(value).lower()
    if text not in (*_YES, *_NO):
        raise ValueError(f"{source} must be true or false, got {value!r}")
    for flag in action.option_strings:
        if flag.startswith("--no-") == (text in _NO):
            return [flag]
    return []
