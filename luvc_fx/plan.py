"""Schedule x Anatomy -> Plan: which sites, with which counts."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from luvc_fx.anatomy.axes.lengths import Counts
from luvc_fx.anatomy.encoder import Encoder
from luvc_fx.anatomy.recognise import Anatomy, Decoder, SymbolicCounts
from luvc_fx.graph.nodes import size_seen
from luvc_fx.mergers import MERGERS
from luvc_fx.report import Reason, Refusal
from luvc_fx.schedule import Merge, Prune, Schedule
from luvc_fx.schedule.merged_sides import MERGED, merged_side
from luvc_fx.schedule.row_counts import PRUNED, UNCHANGED

Grid = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Step:
    """One merge at a site.

    Attributes:
        merge: the schedule item.
        before, after: length of the merged axis in patches, for each of the encoder's `frames`.
        runs: where tiles are padded, for each tile the first and the last + 1 of the places on the axis that
            show the picture: only those may merge. None where all may.
        shortest: length of the shortest of `runs` that is not the whole axis.
    """

    merge: Merge
    before: tuple[int, ...]
    after: tuple[int, ...]
    runs: tuple[tuple[int, int], ...] | None = None
    shortest: int | None = None


@dataclass(frozen=True, slots=True)
class MergeSite:
    """The merges after one encoder block.

    Attributes:
        block: number of the encoder block, from 0.
        node: the residual value that leaves the block.
        keys: the keys of each of the block's attention calls, `[images, heads, rows, dim]`.
        steps: in the order in which they run; all of one merger.
        grids, merged: the grids before and after, in patches, for each of the encoder's `frames`.
        sides: in a graph for all sizes, height and width before, and the side that each step leaves, as nodes
            or small numbers; then all other sizes are those seen while tracing. None in a graph for one size.
    """

    block: int
    node: fx.Node
    keys: tuple[fx.Node, ...]
    steps: tuple[Step, ...]
    grids: tuple[Grid, ...]
    merged: tuple[Grid, ...]
    sides: tuple[fx.Node | int, ...] | None = None

    @property
    def merged_sides(self) -> tuple[fx.Node | int, fx.Node | int]:
        """Height and width behind it, of the one grid of a graph for all sizes."""
        assert self.sides is not None
        height, width, *left = self.sides
        for step, side in zip(self.steps, left, strict=True):
            height, width = (side, width) if step.merge.axis == "height" else (height, side)
        return height, width


@dataclass(frozen=True, slots=True)
class SiteSizes:
    """The sizes at a prune site as nodes, or as numbers where they are 0 or 1."""

    count: fx.Node | int
    rows: fx.Node | int
    height: fx.Node | int = 0
    width: fx.Node | int = 0


@dataclass(frozen=True, slots=True)
class PruneSite:
    """Before one decoder layer, `count` of `left` visual tokens stay in each row.

    Attributes:
        layer: number of the decoder layer, from 0.
        node: the residual value that enters the layer.
        prune: the schedule item.
        grid: height and width of each image's tokens while all of them are there in raster order, else None.
        sizes: `count`, the rows behind the prune, and the `grid` (zeros without one) as nodes of a graph for
            all numbers of tokens, or as the numbers 0 and 1; then `left`, `count` and `grid` are those seen
            while tracing. None in a graph for one number of tokens.
    """

    layer: int
    node: fx.Node
    prune: Prune
    left: int
    count: int
    grid: tuple[int, int] | None
    sizes: SiteSizes | None = None


@dataclass(slots=True)
class Plan:
    """What will be inserted into one graph.

    Attributes:
        original: visual tokens of one row as captured; `fused`: after merging.
        merged_grid: grid of one image after all merges, where known.
        notes: what a reader should know although nothing is refused.
    """

    merges: tuple[MergeSite, ...] = ()
    prunes: tuple[PruneSite, ...] = ()
    original: int | None = None
    fused: int | None = None
    merged_grid: tuple[int, int] | None = None
    tokens_per_layer: list[int] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        """Whether nothing would be inserted."""
        return not self.merges and not self.prunes


def make_plan(schedule: Schedule, anatomy: Anatomy, identity_sites: bool = False) -> Plan:
    """Resolve a schedule against one graph.

    Args:
        identity_sites: keep sites that change no count, so that tests can force every insertion.

    A schedule that the model cannot follow is refused, with the `ValueError`'s text, and nothing of
    that part is planned.
    """
    plan = Plan()
    encoder, decoder = anatomy.encoder, anatomy.decoder
    if encoder is not None:
        plan.merged_grid = encoder.grid
    if encoder is not None and (decoder is not None or encoder.representatives_marker is not None):
        try:
            plan.merges = _merges(plan, schedule, encoder, identity_sites)
        except ValueError as error:
            plan.refusals.append(Refusal(Reason.SCHEDULE, f"{error}; nothing is merged"))
        if plan.merges:
            plan.merged_grid = plan.merges[-1].merged[0] if encoder.grid is not None else None
    if decoder is not None:
        try:
            _plan_decoder(plan, schedule, encoder, decoder, identity_sites)
        except ValueError as error:
            plan.refusals.append(Refusal(Reason.SCHEDULE, f"{error}; nothing is pruned"))
    return plan


def side_counts(
    encoder: Encoder, grids: tuple[Grid, ...] | tuple[tuple[fx.Node | int, fx.Node | int]]
) -> Counts:
    """The sides of these grids by the names they have in the encoder's `TokenAxes`; nodes where they are."""
    pairs = zip(encoder.frames, grids, strict=True)
    return {side: size for frames, grid in pairs for side, size in zip(frames.sides, grid, strict=True)}


def _merges(plan: Plan, schedule: Schedule, encoder: Encoder, identity_sites: bool) -> tuple[MergeSite, ...]:
    grids = start = tuple(frames.grid for frames in encoder.frames)
    by_block: dict[int, list[Step]] = {}
    lost = [0, 0]
    symbolic = encoder.symbolic
    given = None if symbolic is None else list(symbolic.merged)
    sides_of: dict[int, list[fx.Node | int]] = {}
    if symbolic is not None and len(symbolic.form) != len(schedule.merge):
        raise ValueError(
            f"Schedule.merge has {len(schedule.merge)} items; sides of {len(symbolic.form)} are given"
        )
    for number, (block, merge) in enumerate(schedule.merges_at(len(encoder.leaving))):
        if not merge.method.keeps_places and encoder.packing is not None:
            allowed = [name for name in MERGERS.names() if MERGERS.get(name).keeps_places]
            raise ValueError(
                f"Merge.method {merge.method.name!r}: the tiles of this image are put together by place, "
                f"where its tokens are in no order; allowed: {', '.join(map(repr, allowed))}"
            )
        if block > encoder.last:
            raise ValueError(
                f"Schedule.merge after encoder block {block}: features of block {encoder.last} enter the "
                f"decoder, too, so tokens must merge by then; allowed: up to block {encoder.last}"
            )
        along = 0 if merge.axis == "height" else 1
        before = tuple(grid[along] for grid in grids)
        after = tuple(_target(plan, merge, size, encoder.unit[along]) for size in before)
        if symbolic is not None and given is not None:
            if symbolic.form[number] == MERGED:
                sides_of.setdefault(block, []).append(given.pop(0))
                after = (size_seen(sides_of[block][-1]),)
            elif after != before:
                raise ValueError(f"Schedule.merge {number} shortens an axis, and no side is given for it")
        step = Step(merge, before, after)
        if encoder.packing is not None:
            step = _beside_padding(plan, step, encoder, along, lost[along])
            lost[along] += step.before[0] - step.after[0]
        if step.after == before and not identity_sites:
            if all(size == encoder.unit[along] for size in before) and merge.keep not in (None, 1):
                what = f"after encoder block {block}: one feature is left there"
                plan.notes.append(f"grid too small to merge along {merge.axis} {what}")
            continue
        by_block.setdefault(block, []).append(step)
        grids = _shortened(grids, step)
    sites = []
    grids = start
    sides = None if symbolic is None else symbolic.grid
    for block, steps in by_block.items():
        merged = grids
        for step in steps:
            merged = _shortened(merged, step)
        nodes = None if sides is None else (*sides, *sides_of[block])
        site = MergeSite(
            block, encoder.leaving[block], encoder.keys[block], tuple(steps), grids, merged, nodes
        )
        sites.append(site)
        grids = merged
        sides = None if sides is None else site.merged_sides
    return tuple(sites)


def _shortened(grids: tuple[Grid, ...], step: Step) -> tuple[Grid, ...]:
    height = step.merge.axis == "height"
    pairs = zip(grids, step.after, strict=True)
    return tuple((after, grid[1]) if height else (grid[0], after) for grid, after in pairs)


def _target(plan: Plan, merge: Merge, before: int, unit: int) -> int:
    """The length of an axis after a merge, in patches: whole blocks merge."""
    after = merged_side(merge, before, unit)
    if merge.length is not None and after != merge.length:
        _round_up(plan, merge.length, after, f"{unit} patches make one feature")
    return after


def _beside_padding(plan: Plan, step: Step, encoder: Encoder, along: int, lost: int) -> Step:
    """Padding does not merge with the picture, and is cut off later as it is: only the picture shrinks."""
    assert encoder.packing is not None
    runs = encoder.packing.runs(along)
    if runs is None:
        raise ValueError(f"Schedule.merge along {step.merge.axis}: a tile of this image is only padding")
    runs = [(first, end - lost) for first, end in runs]
    size, after = step.before[0], step.after[0]
    partly = [end - first for first, end in runs if end - first < size]
    if not partly:
        return step
    least = size - min(partly) + 1
    if after < least:
        _round_up(plan, after, least, f"{min(partly)} of {size} places in a tile are no padding")
        after = least
    return Step(step.merge, step.before, (after,), tuple(runs), min(partly))


def _round_up(plan: Plan, asked: int, after: int, why: str) -> None:
    refusal = Refusal(Reason.SCHEDULE, f"Merge.length {asked} became {after}, as {why}")
    if refusal not in plan.refusals:
        plan.refusals.append(refusal)


def _plan_decoder(
    plan: Plan, schedule: Schedule, encoder: Encoder | None, decoder: Decoder, identity_sites: bool
) -> None:
    layers = len(decoder.entering)
    plan.original = plan.fused = decoder.visual
    grid = decoder.grid
    if encoder is not None and plan.merges:
        merged = plan.merges[-1].merged
        plan.fused = decoder.visual * encoder.count(side_counts(encoder, merged)) // encoder.placeholders
        grid = encoder.blocks_of(merged[0]) if grid is not None else None
    left = plan.fused
    plan.tokens_per_layer = [left] * layers
    sites = []
    given = None if decoder.row_counts is None else _GivenSizes(decoder.row_counts)
    for layer, prune in schedule.prunes_at(layers, None if given else plan.fused):
        sizes = None if given is None else given.take()
        count = prune.count(plan.fused) if given is None else given.count
        if sizes is None and given is not None:
            continue
        if count == left and not identity_sites:
            continue
        if layer == 0 and 0 < count < left and prune.selector.needs_attention:
            raise ValueError(
                f"Prune.selector {prune.selector.name!r} before decoder layer 0: it looks at the attention "
                "of the layer before; allowed: from layer 1"
            )
        whole = grid if left == plan.fused else None
        if sizes is not None and whole is None:
            sizes = SiteSizes(sizes.count, sizes.rows)
        sites.append(PruneSite(layer, decoder.entering[layer], prune, left, count, whole, sizes))
        left = count
        plan.tokens_per_layer[layer:] = [left] * (layers - layer)
    if given is not None:
        given.check_all_taken()
        plan.notes += given.notes
    plan.prunes = tuple(sites)


class _GivenSizes:
    """The sizes that a graph for all numbers of tokens is told, prune by prune."""

    def __init__(self, counts: SymbolicCounts) -> None:
        self._form, self._grid, self._rest = counts.form, counts.grid, list(counts.rest)
        self._next = 0
        self.count = 0
        self.notes: list[str] = []

    def take(self) -> SiteSizes | None:
        """Those of the next prune, and `count` is its count as seen while tracing; None: it does nothing."""
        if self._next >= len(self._form):
            raise ValueError(f"Schedule.prune has more items than the {self._next} whose counts are given")
        kind = self._form[self._next]
        self._next += 1
        if kind == UNCHANGED:
            return None
        count = self._rest.pop(0) if kind == PRUNED else 0
        self.count = size_seen(count)
        if self.count == 1:
            self.notes.append("one visual token is left of this prompt: its graph is for no other number")
        return SiteSizes(count, self._rest.pop(0), *self._grid)

    def check_all_taken(self) -> None:
        """Raise `ValueError` where counts are left over."""
        if self._next < len(self._form) or self._rest:
            raise ValueError(f"Schedule.prune has {self._next} items; counts of {len(self._form)} are given")
