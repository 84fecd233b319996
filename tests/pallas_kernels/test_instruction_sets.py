"""The C++ kernels are right on processors with less than this one: each set in its own process."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from kvjax.pallas_kernels import native

SETS = {
    "avx512 alone": "-mno-avx512bf16 -mno-avx512vnni",
    "avx2": "-mno-avx512f",
    "sse": "-mno-avx",
}
FILES = ("test_paged_attention.py", "test_bit_invariance.py", "test_linear.py")
RUN = """
import sys, pytest
from kvjax.pallas_kernels import native
native._FLAGS = (*native._FLAGS, *sys.argv[1].split())
# Compiled now, or the tests would skip.
native.register(native.Path(sys.argv[2]), "kvjax_paged_attention")
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-m", "not slow", "-k", "cpu or linear",
                      *sys.argv[3:]]))
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="these are sets of x86-64")
@pytest.mark.parametrize("flags", SETS.values(), ids=SETS)
def test_kernels_are_exact_with_fewer_instructions(flags):
    here = Path(__file__).parent
    source = Path(native.__file__).parent / "paged_attention" / "cpu.cc"
    run = subprocess.run(
        [sys.executable, "-c", RUN, flags, str(source), *(str(here / name) for name in FILES)],
        cwd=here.parents[1], capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
