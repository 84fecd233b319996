"""From a plan to padded arrays and one compiled call. Owns the device's state and its programs.

Programs are compiled ahead, one per bucket, and called directly: a shape that was not foreseen is
an error, never a silent compilation. `compiles` counts them; after `warm_up()` it must not move.
"""

import contextlib
import ctypes
import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from kvjax.cache.pages import KVPages, KVSpec, KVView
from kvjax.decode import (
    DecodeState,
    RowRequest,
    SampleOutput,
    load_masks,
    load_seat,
    pack_rows,
    seat_features,
    stage_arguments,
)
from kvjax.ladder import ladder
from kvjax.models import ModelConfig, Transformer
from kvjax.prefix_groups import CascadeRule, PrefixGroups
from kvjax.programs import SideKey, side_program
from kvjax.readout import ScoreShape, row_arguments
from kvjax.request import SamplingParams
from kvjax.reuse.assemble import Move
from kvjax.reuse.forward import StagedShape
from kvjax.reuse.pack import batched_moves, stage_prompt
from kvjax.reuse.padding import pieces
from kvjax.reuse.read import read_pieces
from kvjax.reuse.repair import stage_repair
from kvjax.reuse.restore import CaptureShape
from kvjax.reuse.warming import smallest_holding
from kvjax.sequence import Sequence
from kvjax.step import Bucket, StepBatch, StepLayout, ints, step
from kvjax.step_plan import Limits, Portion, StepPlan
from kvjax.transfer import ImportShape, Spans, export_pieces, import_pieces

ProgramKey = Bucket | SideKey | str

_BESIDE = ("copy_pages", "load_seat", "load_masks")  # programs beside the step


@dataclasses.dataclass(frozen=True, slots=True)
class RowOwner:
    """Whom a logits row belongs to."""

    sequence: Sequence
    draws: bool  # the row's token is the sequence's next; else it scores prompt token `position`
    position: int


@dataclasses.dataclass(frozen=True, slots=True)
class Dispatched:
    """A step on its way: its plan, who owns which logits row, and the results to come."""

    plan: StepPlan
    owners: tuple[RowOwner, ...]
    out: SampleOutput | None  # None: a staged prefill, which draws nothing
    bucket: Bucket | StagedShape
    stages: tuple[Any, ...] = ()  # indices of the rows that each stage of it ran
    kept: tuple[Any, ...] = ()  # scores that its stages keep


class Runner:
    """Runs plans on the device, in the order they come."""

    def __init__(
        self,
        model: Transformer,
        spec: KVSpec,
        num_pages: int,
        limits: Limits,
        cascade: bool = False,
    ) -> None:
        """`cascade`: decode steps may read what sequences share once, where that moves less."""
        self.spec, self.num_pages, self.limits = spec, num_pages, limits
        self.config, self.sharding = model.config, model.sharding
        self._graph, state = nnx.split(model)
        self._weights, self._weights_tree = jax.tree.flatten(state)
        self._pages_per_seq = -(-limits.max_model_len // spec.page_size)
        self.arguments = stage_arguments()
        self.cascade_rule = _cascade_rule(model.config, spec) if cascade else None
        self.buckets = ladder(limits, self.cascade_rule is not None)
        self.side_keys: tuple[SideKey, ...] = ()  # of programs that warm-up compiles as well
        self._programs: dict[ProgramKey, Any] = {}
        self._layouts: dict[Bucket, StepLayout] = {}
        self.compiles = 0
        self.compile_seconds = 0.0
        self.padded_tokens = self.real_tokens = self.steps = 0
        self.cascade_steps = 0  # decode steps that the rule gave to `cascade_attention`
        self.rebuild()

    # ---- device state -----------------------------------------------------------------------

    def rebuild(self) -> None:
        """Makes pages and decode state anew: at the start, and after a step that lost them."""
        self.pages = self.state = None  # the old ones first: two may not fit
        place = self.sharding.pages if self.sharding.mesh is not None else None
        self.pages = KVPages.allocate(self.spec, self.num_pages, place)
        self.state = self._replicated(
            DecodeState.allocate(self.limits.max_num_seqs, self.config.vocab_size)
        )

    def _replicated(self, tree: Any) -> Any:
        if self.sharding.mesh is None:
            return tree
        everywhere = jax.sharding.NamedSharding(self.sharding.mesh, jax.sharding.PartitionSpec())
        return jax.device_put(tree, everywhere)

    # ---- programs ---------------------------------------------------------------------------

    def warm_up(self, progress: Callable[[str], None] | None = None) -> None:
        """Compiles every program that is not there yet, and calls the ones beside the step."""
        while (name := self.compile_next()) is not None:
            if progress is not None:
                progress(name)

    def compile_next(self) -> str | None:
        """Compiles one more program; its name, or None when all are there."""
        for key in (*_BESIDE, *self.buckets, *self.side_keys):
            if key not in self._programs:
                self._program(key)
                return str(key)
        return None

    @property
    def is_warm(self) -> bool:
        """Whether every program is compiled."""
        return all(key in self._programs for key in (*_BESIDE, *self.buckets, *self.side_keys))

    def _program(self, key: ProgramKey) -> Any:
        if key not in self._programs:
            start = time.perf_counter()
            self._programs[key] = self._compile(key)
            self.compiles += 1
            self.compile_seconds += time.perf_counter() - start
            _return_freed_memory()
        return self._programs[key]

    def _compile(self, key: ProgramKey) -> Any:
        pages, state = (jax.tree.map(_abstract, tree) for tree in (self.pages, self.state))
        if key == "copy_pages":
            ids = self._abstract_input((self.limits.max_num_seqs,))
            copy = jax.jit(lambda pages, src, dst: pages.copied(src, dst), donate_argnums=0)
            return copy.lower(pages, ids, ids).compile()
        if key == "load_seat":
            features = seat_features(SamplingParams(), self.config.vocab_size)
            return load_seat.lower(state, np.int32(0), features).compile()
        if key == "load_masks":
            seats, masks = self._mask_arrays()
            return load_masks.lower(state, seats, masks).compile()
        if isinstance(key, SideKey):
            build = side_program(key, self.spec, self.config.num_layers, self._pages_per_seq)
            arguments = self._abstract_inputs(build.arguments)
            run = jax.jit(
                lambda weights, *rest: build.run(self._model(weights), *rest),
                donate_argnums=1 if build.consumes_pages else (),
            )
            return run.lower(self._weights, pages, *arguments).compile()
        assert isinstance(key, Bucket)
        layout = self._layout(key)

        @partial(jax.jit, donate_argnums=(1, 2))
        def run(weights, pages, state, buffer):
            model = self._model(weights)
            return step(model, pages, state, layout.unpack(buffer), decode=key.decode)

        buffer = self._abstract_input((layout.size,))
        return run.lower(self._weights, pages, state, buffer).compile()

    def _model(self, weights: Any) -> Transformer:
        """The model over flat weights, inside a trace."""
        return nnx.merge(self._graph, jax.tree.unflatten(self._weights_tree, weights))

    def _abstract_inputs(self, tree: Any) -> Any:
        return jax.tree.map(lambda x: self._abstract_input(x.shape, x.dtype), tree)

    def _abstract_input(
        self, shape: tuple[int, ...], dtype: Any = np.int32
    ) -> jax.ShapeDtypeStruct:
        sharding = None
        if self.sharding.mesh is not None:
            sharding = jax.sharding.NamedSharding(self.sharding.mesh, jax.sharding.PartitionSpec())
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def _layout(self, bucket: Bucket) -> StepLayout:
        if bucket not in self._layouts:
            self._layouts[bucket] = StepLayout(
                bucket, self.spec, self._pages_per_seq, self.arguments
            )
        return self._layouts[bucket]

    # ---- reading ----------------------------------------------------------------------------

    def read(
        self, slots: np.ndarray, shift: int | np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """KV at `slots`, keys turned `shift` positions on (all, or each); see `read_slots`.

        Blocks until the steps before it are done. For the thread that owns the engine.
        """
        return read_pieces(self._call, slots, shift)

    def export(self, slots: np.ndarray) -> Spans:
        """What is stored at `slots`, layer by layer, as numpy. Blocks as `read` does."""
        return export_pieces(self._call, slots)

    def load(self, spans: Spans, slots: np.ndarray) -> None:
        """Stores what `export` gave at other slots. If this raises, pages are lost."""
        for at, part in import_pieces(spans, slots):
            self.pages = self._call(ImportShape(len(at)), part, at)

    def _call(self, key: SideKey, *arguments: Any) -> Any:
        return self._program(key)(self._weights, self.pages, *arguments)

    # ---- running ----------------------------------------------------------------------------

    def dispatch(self, plan: StepPlan) -> Dispatched:
        """Sends a step to the device and returns at once. Consumes the runner's pages and state.

        If this (or reading the results) raises, pages and state are lost: call `rebuild()`.
        """
        self.steps += 1
        if plan.staged is not None:
            return self._dispatch_staged(plan)
        groups = self._groups(plan)
        bucket = self._bucket(plan, groups is not None)
        program, layout = self._program(bucket), self._layout(bucket)
        batch, owners = self._batch(plan, bucket, groups)
        self._prepare(plan)
        self._load_masks(plan)
        self.real_tokens += plan.num_tokens
        self.padded_tokens += bucket.tokens
        self.cascade_steps += bucket.cascade
        self.pages, self.state, out = program(
            self._weights, self.pages, self.state, layout.pack(batch)
        )
        return Dispatched(plan, owners, out, bucket)

    def score(
        self, tokens: list[int], first: int, page_ids: list[int], copy: tuple[int, int] | None
    ) -> np.ndarray:
        """Logits f32[len(tokens), vocab] of tokens from index `first` on over the KV in `page_ids`.

        Their own KV is written there, after the page `copy[0]` was copied to `copy[1]`. Waits for
        the device.
        """
        if copy is not None:
            self._copy((copy,))
        rows, arguments = row_arguments(tokens, first, page_ids, self._pages_per_seq)
        return self.beside(ScoreShape(rows), *arguments)[: len(tokens)]

    def beside(self, key: SideKey, *arguments: Any) -> np.ndarray:
        """Runs a program that gives the pages back and one array, which is waited for."""
        self.pages, result = self._program(key)(self._weights, self.pages, *arguments)
        return np.asarray(result)

    def hidden(
        self, tokens: list[int], first: int, page_ids: list[int], layers: tuple[int, ...],
        dtype: str,
    ) -> np.ndarray:  # fmt: skip
        """What enters `layers`, [layers, tokens, hidden], of tokens whose KV is in `page_ids`."""
        found = []
        for part, size in pieces(len(tokens)):
            some, at = tokens[part], first + part.start
            _, arguments = row_arguments(some, at, page_ids, self._pages_per_seq, size)
            hidden = self.beside(CaptureShape(size, layers, dtype), *arguments)
            found.append(hidden[:, : len(some)])
        return np.concatenate(found, axis=1)

    def _prepare(self, plan: StepPlan) -> None:
        """What comes before the step's tokens."""
        if plan.copies:
            self._copy(plan.copies)
        if plan.moves:
            self._move(plan.moves)
        for sequence in plan.loads:
            self._load_seat(sequence)

    def _move(self, moves: tuple[tuple[Sequence, Move], ...]) -> None:
        """Stored KV into sequences' own pages; moves without a patch travel together."""
        for move in batched_moves(moves, self.spec.page_size):
            program = self._program(move.shape)
            self.pages = program(self._weights, self.pages, *move.arrays)

    def _dispatch_staged(self, plan: StepPlan) -> Dispatched:
        """A staged prefill of one sequence, up to its last prompt token."""
        assert plan.staged is not None
        self._prepare(plan)
        pack = stage_repair if plan.repairs else stage_prompt
        shape, batch = pack(plan.staged, self.spec.page_size, self._pages_per_seq, self._fitting)
        self.padded_tokens += sum(stage.rows for stage in shape.stages)
        program = self._program(shape)
        self.pages, stages, kept = program(self._weights, self.pages, batch)
        return Dispatched(plan, (), None, shape, stages, kept)

    def _fitting(self, shape: StagedShape) -> StagedShape:
        """Once warm, a program that is compiled, if one holds what `shape` is for."""
        if shape in self._programs or not self.is_warm:
            return shape
        return smallest_holding(self.side_keys, shape) or shape

    def _copy(self, copies: tuple[tuple[int, int], ...]) -> None:
        width = self.limits.max_num_seqs
        program = self._program("copy_pages")
        for first in range(0, len(copies), width):
            src, dst = np.zeros(width, np.int32), np.full(width, -1, np.int32)
            for i, (a, b) in enumerate(copies[first : first + width]):
                src[i], dst[i] = a, b
            self.pages = program(self.pages, src, dst)

    def _load_seat(self, sequence: Sequence) -> None:
        request = sequence.request
        features = seat_features(
            request.params,
            self.config.vocab_size,
            sequence.tokens[: sequence.num_prompt],
            sequence.output_ids,
            request.bad_word_ids,
        )
        assert sequence.seat is not None
        self.state = self._program("load_seat")(self.state, np.int32(sequence.seat), features)

    def _groups(self, plan: StepPlan) -> PrefixGroups | None:
        """Who reads a prefix together in a decode step, if that pays."""
        if self.cascade_rule is None or len(plan.portions) < 2 or not _is_decode(plan):
            return None
        return self.cascade_rule.groups(
            [portion.sequence.page_ids for portion in plan.portions],
            [portion.stop for portion in plan.portions],
        )

    def _load_masks(self, plan: StepPlan) -> None:
        """Tells the device what the sequences with a grammar may draw in this step."""
        drawing = [
            c.sequence for c in plan.portions if c.samples and c.sequence.grammar is not None
        ]
        if not drawing:
            return
        seats, masks = self._mask_arrays()
        for row, sequence in enumerate(drawing):
            assert sequence.grammar is not None
            assert sequence.seat is not None
            seats[row], masks[row] = sequence.seat, sequence.grammar.mask()
        self.state = self._program("load_masks")(self.state, seats, masks)

    def _mask_arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Padding: seats past all of them, with any mask."""
        rows = self.limits.max_num_seqs
        words = -(-self.config.vocab_size // 32)
        return np.full(rows, rows + 1, np.int32), np.zeros((rows, words), np.int32)

    def _bucket(self, plan: StepPlan, cascade: bool = False) -> Bucket:
        """The smallest program that holds the plan."""
        scores = any(portion.scores_prompt for portion in plan.portions)
        if _is_decode(plan):
            fits = [
                b
                for b in self.buckets
                if b.decode and b.seqs >= len(plan.portions) and b.cascade == cascade
            ]
        else:
            fits = [
                b
                for b in self.buckets
                if not b.decode and b.tokens >= plan.num_tokens and (b.rows >= b.tokens) >= scores
            ]
        return min(fits)

    def _batch(
        self, plan: StepPlan, bucket: Bucket, groups: PrefixGroups | None
    ) -> tuple[StepBatch, tuple[RowOwner, ...]]:
        """The plan as padded numpy arrays, its sequences in the order of the groups."""
        t, s, size = bucket.tokens, bucket.seqs, self.spec.page_size
        tokens, source, positions = ints(t), ints(t, padding=-1), ints(t)
        slots, hi = ints(t, padding=-1), ints(t)
        starts, kv_lens, tables = ints(s + 1), ints(s), ints(s, self._pages_per_seq)
        rows: list[tuple[int, RowOwner]] = []
        at = 0
        portions = plan.portions if groups is None else [plan.portions[i] for i in groups.order]
        for i, portion in enumerate(portions):
            sequence, n = portion.sequence, portion.num_tokens
            span = slice(at, at + n)
            indices = portion.indices
            known = sequence.tokens[portion.start : portion.stop]
            if portion.reused:
                known = [sequence.tokens[i] for i in indices if i < len(sequence.tokens)]
            tokens[at : at + len(known)] = known
            if len(known) < n:
                source[at + len(known)] = sequence.seat
            tables[i, : len(sequence.page_ids)] = sequence.page_ids
            positions[span] = indices
            slots[span] = tables[i, indices // size] * size + indices % size
            hi[span] = indices + 1
            kv_lens[i] = portion.stop
            at += n
            starts[i + 1] = at
            rows += _rows(portion, at - n)
        starts[len(plan.portions) + 1 :] = at
        logits_rows = ints(bucket.rows)
        logits_rows[: len(rows)] = [row for row, _ in rows]
        owners = tuple(owner for _, owner in rows)
        shared: Any = (None, None) if groups is None else groups.padded(s)
        views = tuple(
            KVView(
                write_slots=slots,
                visible_lo=np.maximum(0, hi - group.window) if group.window else ints(t),
                visible_hi=hi,
                block_tables=tables,
                kv_lens=kv_lens,
                group_starts=None if group.window is not None else shared[0],
                prefix_lens=None if group.window is not None else shared[1],
            )
            for group in self.spec.groups
        )
        sampling = pack_rows(
            [_row_request(owner) for owner in owners],
            bucket.rows,
            self.limits.max_num_seqs,
            self.arguments,
        )
        batch = StepBatch(tokens, source, positions, starts, logits_rows, views, sampling)
        return batch, owners


def _return_freed_memory() -> None:
    """Gives the system back what loading and compiling have freed; glibc would keep it.

    For SmolLM2-135M in bfloat16 that is some 40 of 940 MiB after the last program.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _is_decode(plan: StepPlan) -> bool:
    """Whether every sequence brings one token, to draw the next from."""
    return all(c.num_tokens == 1 and not c.scores_prompt for c in plan.portions)


def _cascade_rule(config: ModelConfig, spec: KVSpec) -> CascadeRule | None:
    """The rule for the layers that see everything; None for a model that has none.

    A window leaves little to share, and what little it is moves with every token.
    """
    group = next((group for group in spec.groups if group.window is None), None)
    if group is None:
        return None
    v_width = config.latent.kv_lora_rank if config.latent else group.v_width
    state = 4 * config.num_heads * (v_width + 1)
    return CascadeRule(spec.page_size, spec.layer_bytes(group), state)


def _rows(portion: Portion, first: int) -> list[tuple[int, RowOwner]]:
    """Query tokens of a portion whose logits are wanted, and what for."""
    sequence, last = portion.sequence, portion.num_tokens - 1
    rows = []
    if portion.scores_prompt:
        scored = min(portion.stop, sequence.num_prompt - 1) - portion.start
        rows = [
            (first + i, RowOwner(sequence, False, portion.start + i + 1)) for i in range(scored)
        ]
    if portion.samples:
        rows.append((first + last, RowOwner(sequence, True, portion.stop)))
    return rows


def _row_request(owner: RowOwner) -> RowRequest:
    sequence, request = owner.sequence, owner.sequence.request
    assert sequence.seat is not None
    wants = request.params.logprobs if owner.draws else request.params.prompt_logprobs
    return RowRequest(
        seat=sequence.seat,
        params=request.params,
        seed=request.seed,
        position=owner.position,
        branch=sequence.branch,
        num_output_tokens=owner.position - sequence.num_prompt,
        end_token_ids=sequence.end_token_ids,
        active=owner.draws,
        forced_token=-1 if owner.draws else sequence.tokens[owner.position],
        want_logprobs=wants is not None,
        uses_grammar=owner.draws and sequence.grammar is not None,
    )


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
