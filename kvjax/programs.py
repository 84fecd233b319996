"""Programs beside the step: moving stored chunks, staged prefills, reading KV, scoring tokens,
hidden states in place of KV.

Each is a function of the model and the pages; the runner compiles one per key, at first use.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from kvjax.cache.pages import KVSpec
from kvjax.readout import ScoreShape, run_rows
from kvjax.reuse.attended import AttendedShape, attended, empty_attended
from kvjax.reuse.forward import StagedShape, run_staged
from kvjax.reuse.move import move_chunks
from kvjax.reuse.pack import MoveShape, empty_batch, empty_move
from kvjax.reuse.read import ReadShape, read_slots
from kvjax.reuse.restore import CaptureShape, RestoreShape, capture, restore
from kvjax.transfer import ExportShape, ImportShape, empty_spans, export_slots, import_slots

SideKey = (
    MoveShape
    | StagedShape
    | ReadShape
    | ScoreShape
    | ExportShape
    | ImportShape
    | AttendedShape
    | CaptureShape
    | RestoreShape
)


class SideProgram(NamedTuple):
    """What is compiled for a key."""

    run: Callable[..., Any]  # of the model, the pages and the arguments
    arguments: tuple[Any, ...]  # arrays of the right shapes
    consumes_pages: bool


def side_program(key: SideKey, spec: KVSpec, num_layers: int, pages_per_seq: int) -> SideProgram:
    """The program of a key."""

    def move(model, pages, *arrays):
        return move_chunks(model, pages, *arrays, frame=getattr(key, "frame", "source"))

    def staged(model, pages, batch):
        assert isinstance(key, StagedShape)
        return run_staged(model, pages, spec, key, batch)

    def read(model, pages, slots, shifts):
        return read_slots(model, pages, spec, slots, shifts)

    def score(model, pages, *arrays):
        return run_rows(model, pages, spec, *arrays)

    def export(model, pages, slots):
        return export_slots(pages, spec, slots)

    def load(model, pages, spans, slots):
        return import_slots(pages, spans, slots)

    def sums(model, pages, *arrays):
        return attended(model, pages, spec, *arrays)

    def captured(model, pages, *arrays):
        assert isinstance(key, CaptureShape)
        return capture(model, pages, spec, key.layers, key.dtype, *arrays)

    match key:
        case MoveShape():
            return SideProgram(move, empty_move(key, num_layers, spec), True)
        case StagedShape():
            return SideProgram(staged, (empty_batch(key, pages_per_seq),), True)
        case ReadShape():
            return SideProgram(read, (np.zeros(key.tokens, np.int32),) * 2, False)
        case ExportShape():
            return SideProgram(export, (np.zeros(key.tokens, np.int32),), False)
        case ImportShape():
            spans = empty_spans(spec, key.tokens)
            return SideProgram(load, (spans, np.zeros(key.tokens, np.int32)), True)
        case AttendedShape():
            return SideProgram(sums, empty_attended(key, pages_per_seq), True)
        case RestoreShape():
            hidden = np.zeros((num_layers, key.tokens, key.hidden_size), jnp.dtype(key.dtype))
            return SideProgram(restore, (hidden, *(np.zeros(key.tokens, np.int32),) * 2), True)
        case ScoreShape() | CaptureShape():
            table, number = np.zeros((1, pages_per_seq), np.int32), np.zeros((), np.int32)
            arguments = (np.zeros(key.rows, np.int32), number, number, table)
            run = score if isinstance(key, ScoreShape) else captured
            return SideProgram(run, arguments, True)
