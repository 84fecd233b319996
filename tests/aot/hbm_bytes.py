"""Bytes that a compiled TPU program moves to and from HBM, counted from its own text.

XLA's cost analysis counts every operand and every result of every instruction, wherever they are.
Around the kernels that move rows most of them are in VMEM (memory space 1 in a layout, `S(1)`):
written by one instruction, read by the next, and never in HBM. Here an array counts if, and only
if, its layout says that it is in HBM, with the padding of its tiles. A fusion counts as if it read
its operands whole, and a kernel by its own estimate less what of it is in VMEM.
"""

import math
import re
from typing import NamedTuple

_BITS = {"pred": 8, "s8": 8, "u8": 8, "f8e4m3fn": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16,
         "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64}  # fmt: skip
FREE = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "copy-done",
         "slice-done", "async-done", "after-all"}  # fmt: skip
_UNKNOWN = {"while", "conditional", "call"}  # how often they run may not be in the text
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_LINE = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
_ESTIMATE = re.compile(r'"bytes_accessed":\s*"?(\d+)')


class Instruction(NamedTuple):
    """One instruction of the entry computation."""

    name: str
    arrays: list[tuple[int, bool]]  # bytes of each result, and whether it is in HBM
    elements: list[tuple[int, int]]  # numbers in each result, and bytes of one
    op: str
    operands: list[str]
    text: str


def array_bytes(dtype: str, dims: str, layout: str) -> tuple[int, bool]:
    """Bytes of an array with the padding of its tiles, and whether they are in HBM."""
    shape = [int(n) for n in dims.split(",") if n]
    order, _, rest = layout.partition(":")
    minor_first = [int(n) for n in order.split(",") if n] or list(range(len(shape)))[::-1]
    padded = [shape[axis] for axis in minor_first]
    if tile := re.search(r"T\(([\d,]+)\)", rest):
        for i, size in enumerate(reversed([int(n) for n in tile[1].split(",")])):
            if i < len(padded):
                padded[i] = -(-padded[i] // size) * size
    return math.prod(padded) * _BITS[dtype] // 8, "S(1)" not in rest


def instructions(text: str) -> list[Instruction]:
    """The entry computation of HLO `text`."""
    found = []
    for line in text[text.index("\nENTRY ") :].splitlines()[1:]:
        if line.startswith("}"):
            break
        if match := _LINE.match(line):
            name, result, op, rest = match.groups()
            results = [x for x in _ARRAY.findall(result) if x[0] in _BITS]
            arrays = [array_bytes(*x) for x in results]
            elements = [
                (math.prod(int(n) for n in dims.split(",") if n), _BITS[dtype] // 8)
                for dtype, dims, _ in results
            ]
            operands = re.findall(r"%([\w.-]+)", rest.partition("), ")[0])
            found.append(Instruction(name, arrays, elements, op, operands, rest))
    return found


def hbm_bytes(text: str) -> int:
    """Bytes read from and written to HBM by one run of the program. Raises ValueError for loops."""
    made: dict[str, list[tuple[int, bool]]] = {}
    total = 0
    for one in instructions(text):
        made[one.name] = one.arrays
        if one.op in _UNKNOWN:
            raise ValueError(f"{one.op} {one.name}: its bytes depend on data")
        if one.op in FREE:
            continue
        read = [x for name in one.operands for x in made[name]]
        total += _kernel(one, read) if one.op == "custom-call" else _whole(one, read)
    return total


def kept_bytes(text: str) -> int:
    """Of `hbm_bytes`, those of temporaries: written to HBM by one instruction, read by another.

    The compiler's own choice: it has moved them out of VMEM, or found no room for them there.
    """
    by_name = {one.name: one for one in instructions(text)}
    ends = [list(by_name)[-1]]  # the root, and what it is made of without an instruction
    for name in ends:
        if by_name[name].op in FREE:
            ends += [x for x in by_name[name].operands if x in by_name]
    total = 0
    for one in by_name.values():
        if one.op in FREE:
            continue
        if one.name not in ends:
            written = one.arrays[:1] if one.op.endswith("-start") else one.arrays
            total += sum(size for size, in_hbm in written if in_hbm)
        for name in one.operands:
            if not _given(by_name, name):
                total += sum(size for size, in_hbm in by_name[name].arrays[:1] if in_hbm)
    return total


def _given(by_name: dict[str, Instruction], name: str) -> bool:
    """Whether an operand is, or is a part of, a parameter or a constant."""
    one = by_name[name]
    if one.op in ("bitcast", "get-tuple-element"):
        return _given(by_name, one.operands[0])
    return one.op in ("parameter", "constant")


def _whole(one: Instruction, read: list[tuple[int, bool]]) -> int:
    written = one.arrays
    if one.op.endswith("-start"):  # results: the copy, the operand itself, a context
        written = one.arrays[:1]
    return sum(size for size, in_hbm in [*read, *written] if in_hbm)


def _kernel(one: Instruction, read: list[tuple[int, bool]]) -> int:
    """The estimate of a kernel counts its operands once, those in VMEM as well."""
    estimate = _ESTIMATE.search(one.text)
    if estimate is None:
        return _whole(one, read)
    in_vmem = sum(size for size, in_hbm in [*read, *one.arrays] if not in_hbm)
    return max(0, int(estimate[1]) - in_vmem)


def argument_bytes(text: str) -> list[int]:
    """Bytes of each parameter in HBM, in order of their numbers."""
    parameters = {
        int(one.text.partition(")")[0]): one.arrays[0][0]
        for one in instructions(text)
        if one.op == "parameter"
    }
    return [parameters[i] for i in sorted(parameters)]
