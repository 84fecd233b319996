"""`kvjax serve`: an OpenAI-compatible server."""

import argparse
import importlib.util
import logging

from kvjax.cli import options

HELP = "serve a model over HTTP, compatible with OpenAI's API"
EPILOG = """\
One line on standard output says when it is ready. Every flag can also stand in a YAML file
(--config) or in the environment: KVJAX_MAX_QUEUE=64 is --max-queue 64. A flag wins over the
environment, the environment over the file.

SIGTERM lets running requests finish and refuses new ones; a second one stops at once.

examples:
  kvjax serve smollm2-135m --port 8000
  kvjax serve smollm2-135m --host 0.0.0.0 --api-key-file keys.txt --max-queue 64
  kvjax serve --config server.yaml
"""

_NEEDED = ("fastapi", "uvicorn", "httptools", "prometheus_client", "yaml")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    parser.usage = "kvjax serve [MODEL] [options]"
    parser.add_argument(
        "model_argument", metavar="MODEL", nargs="?", help="name, folder, .gguf file or hub id"
    )
    _add_server(parser)
    _add_limits(parser)
    options.add_engine(parser)
    parser.set_defaults(max_num_seqs=16)
    parser.add_argument("--seed", type=int, metavar="N", help="of requests that bring none")
    if importlib.util.find_spec("yaml") is not None:
        from kvjax.cli.layers import layer

        layer(parser)


def _add_server(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument("--model", metavar="MODEL", help="the same as the argument, for files")
    group.add_argument("--config", metavar="FILE", help="YAML file with these settings")
    group.add_argument("--host", default="127.0.0.1", metavar="HOST", help="address to listen at")
    group.add_argument("--port", type=int, default=8000, metavar="N", help="0: any free one")
    group.add_argument("--served-model-name", metavar="NAME", help="what clients call it")
    group.add_argument("--api-key-file", metavar="FILE", help="lines of `NAME KEY [operator]`")
    group.add_argument("--otlp-endpoint", metavar="URL", help="send OpenTelemetry spans there")
    group.add_argument(
        "--log-format", choices=("text", "json"), default="text", help="of lines on standard error"
    )


def _add_limits(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("limits")

    def add(name: str, default: float, text: str, kind: object = float, metavar: str = "S") -> None:
        flag = "--" + name.replace("_", "-")
        shown = f"{text} (default: {default:g})"
        group.add_argument(flag, type=kind, default=default, metavar=metavar, help=shown)  # type: ignore[arg-type]

    add("max_queue", 256, "completions that may wait; more get 429", int, "N")
    add("max_body_bytes", 4 << 20, "of one request, such as 4M", options.size, "SIZE")
    add("max_header_bytes", 64 << 10, "request line and headers", options.size, "SIZE")
    add("max_connections", 4096, "open at once", int, "N")
    add("max_refusals", 50.0, "refused requests answered a second; more wait", metavar="N")
    add("max_pinned_share", 0.5, "of the room for chunks, that one key may pin", metavar="X")
    add("header_timeout", 20, "seconds until the headers are there")
    add("body_timeout", 60, "seconds until the body is there")
    add("write_timeout", 60, "seconds that a client may not read")
    add("keep_alive_timeout", 30, "seconds between two requests")
    add("request_timeout", 600, "seconds for an answer")
    add("drain_timeout", 120, "seconds for running requests after SIGTERM")
    add("step_timeout", 60, "seconds after which a step hangs, and /health says so")


def run(args: argparse.Namespace) -> int:
    """Runs the command until a signal."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f'the server needs {missing}: pip install "kvjax[serve]"')
    from kvjax.cli.layers import layered
    from kvjax.serving.config import ServeConfig
    from kvjax.serving.server import Server

    args = layered(args)
    model = args.model_argument or args.model
    if not model:
        raise ValueError("which MODEL? Name it as an argument, in the file or as KVJAX_MODEL")
    names = ServeConfig.__dataclass_fields__
    config = ServeConfig(**{name: getattr(args, name) for name in names})
    _set_up_logs(args)
    engine = options.engine_settings(args) | {"seed": args.seed}
    Server(model, config, engine).run_until_stopped()
    return 0


def _set_up_logs(args: argparse.Namespace) -> None:
    """One kind of line for everything that the process says on standard error."""
    log = logging.getLogger("kvjax")
    if args.quiet:
        log.setLevel(logging.WARNING)
    server = logging.getLogger("uvicorn")
    server.handlers, server.propagate = list(log.handlers), False
    server.setLevel(logging.WARNING)
    if args.log_format == "json":
        from kvjax.serving.gate import JSONFormatter

        for handler in log.handlers:
            handler.setFormatter(JSONFormatter())
