"""Kernels compiled for real accelerators without one: `python -m tests.aot [target..]`.

Each target is a module that runs on its own in a process of its own (what a plugin reads from the
environment is read once), prints a line per compile and fails if one of them fails.
"""

import argparse
import subprocess
import sys
import time

# modules with `--minutes`; they skip themselves with the reason
TARGETS = ("tests.aot.tpu", "tests.aot.cuda")


def main() -> int:
    """Runs the targets one after another within the time; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", default=TARGETS)
    parser.add_argument("--minutes", type=float, default=20.0)
    args = parser.parse_args()
    last, failed = time.monotonic() + 60 * args.minutes, False
    for target in args.targets:
        left = max(0.0, last - time.monotonic()) / 60
        print(f"==== {target}, {left:.1f} minutes left", flush=True)
        command = [sys.executable, "-m", target, "--minutes", f"{left:.2f}"]
        failed |= subprocess.run(command, check=False).returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
