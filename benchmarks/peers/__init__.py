"""What the engine benchmark measures: one file per target, each run in an environment of its own.

A target file defines `class Target` (contract: `worker.py`) and imports nothing of kvjax's
benchmarks, since it runs in the peer's environment. A target from elsewhere joins by an entry in
`TARGETS`.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WORKER = HERE / "worker.py"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peer:
    """How a target is run: its file, its environment, and the weights it reads for each dtype."""

    file: Path
    environment: str  # the name under which its virtual environment is looked up
    weights: Mapping[str, str]  # dtype -> form (`weights.FORMATS`, or "": the GGUF as given)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of `Target.__init__`
    compiles: bool = False  # start-up is measured with an empty compilation cache, too


TARGETS: dict[str, Peer] = {
    "kvjax": Peer(
        file=HERE / "kvjax_target.py",
        environment="kvjax",
        weights={"float32": "", "bfloat16": "", "int8": ""},
        compiles=True,
    ),
    "transformers": Peer(
        file=HERE / "transformers_target.py",
        environment="transformers",
        weights={"float32": "hf", "bfloat16": "hf"},
    ),
    "transformers-batching": Peer(
        file=HERE / "transformers_target.py",
        environment="transformers",
        weights={"float32": "hf", "bfloat16": "hf"},
        options={"batching": True},
    ),
    "vllm": Peer(
        file=HERE / "vllm_target.py",
        environment="vllm",
        weights={"float32": "hf", "bfloat16": "hf"},
    ),
    "vllm-no-prefix-cache": Peer(
        file=HERE / "vllm_target.py",
        environment="vllm",
        weights={"float32": "hf", "bfloat16": "hf"},
        options={"prefix_caching": False},
    ),
    "llamacpp": Peer(
        file=HERE / "llamacpp_target.py",
        environment="llamacpp",
        weights={"float32": "f32.gguf", "bfloat16": "bf16.gguf", "int8": "q8_0.gguf", "q4_1": ""},
    ),
    "openvino": Peer(
        file=HERE / "openvino_target.py",
        environment="openvino",
        weights={"float32": "f16.gguf", "bfloat16": "f16.gguf", "int8": "q8_0.gguf"},
    ),
}
