"""Schedule x Anatomy -> Plan: which sites, with which static counts."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from luvc_fx.anatomy import Anatomy, Decoder, Encoder
from luvc_fx.report import Reason, Refusal
from luvc_fx.schedule import Merge, Prune, Schedule


@dataclass(frozen=True, slots=True)
class MergeSite:
    """OIM steps after one encoder block: ``(merge, length of its axis before, and after)`` each.

    `keys` are those of the block's attention, `[images, heads, lead + tokens, dim]`.
    """

    block: int
    node: fx.Node
    keys: fx.Node
    steps: tuple[tuple[Merge, int, int], ...]
    grid: tuple[int, int]
    merged: tuple[int, int]


@dataclass(frozen=True, slots=True)
class PruneSite:
    """Before one decoder layer, `count` of `left` visual tokens stay in each row."""

    layer: int
    node: fx.Node
    prune: Prune
    left: int
    count: int
    grid: tuple[int, int] | None


@dataclass(slots=True)
class Plan:
    """What will be inserted into one graph.

    Attributes:
        original: visual tokens of one row as captured; `fused`: after merging.
        merged_grid: grid of one image after all merges, where known.
    """

    merges: tuple[MergeSite, ...] = ()
    prunes: tuple[PruneSite, ...] = ()
    original: int | None = None
    fused: int | None = None
    merged_grid: tuple[int, int] | None = None
    tokens_per_layer: list[int] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)

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
    if encoder is not None and (decoder is not None or encoder.slots is not None):
        try:
            plan.merges = _merges(plan, schedule, encoder, identity_sites)
        except ValueError as error:
            plan.refusals.append(Refusal(Reason.SCHEDULE, str(error)))
        if plan.merges:
            plan.merged_grid = plan.merges[-1].merged
    if decoder is not None:
        try:
            _plan_decoder(plan, schedule, encoder, decoder, identity_sites)
        except ValueError as error:
            plan.refusals.append(Refusal(Reason.SCHEDULE, str(error)))
    return plan


def _merges(plan: Plan, schedule: Schedule, encoder: Encoder, identity_sites: bool) -> tuple[MergeSite, ...]:
    grid = encoder.grid
    sites: list[MergeSite] = []
    by_block: dict[int, list[tuple[Merge, int, int]]] = {}
    for block, merge in schedule.merges_at(len(encoder.leaving)):
        along = 0 if merge.axis == "height" else 1
        before, unit = grid[along], encoder.unit[along]
        if merge.length is None:
            after = merge.target(before // unit) * unit  # whole blocks merge, so a fraction is one of blocks
        else:
            asked = merge.target(before)
            after = -(-asked // unit) * unit
            if after != asked:
                text = f"Merge.length {asked} became {after}, as {unit} patches make one feature"
                plan.refusals.append(Refusal(Reason.SCHEDULE, text))
        if after == before and not identity_sites:
            continue
        by_block.setdefault(block, []).append((merge, before, after))
        grid = (after, grid[1]) if along == 0 else (grid[0], after)
    grid = encoder.grid
    for block, steps in by_block.items():
        merged = grid
        for merge, _, after in steps:
            merged = (after, merged[1]) if merge.axis == "height" else (merged[0], after)
        node, keys = encoder.leaving[block], encoder.keys[block]
        sites.append(MergeSite(block, node, keys, tuple(steps), grid, merged))
        grid = merged
    return tuple(sites)


def _plan_decoder(
    plan: Plan, schedule: Schedule, encoder: Encoder | None, decoder: Decoder, identity_sites: bool
) -> None:
    layers = len(decoder.entering)
    plan.original = plan.fused = decoder.visual
    grid = decoder.grid
    if encoder is not None and plan.merges:
        height, width = encoder.feature_grid
        merged = plan.merges[-1].merged
        grid = merged[0] // encoder.unit[0], merged[1] // encoder.unit[1]
        plan.fused = decoder.visual // (height * width) * grid[0] * grid[1]
    left = plan.fused
    plan.tokens_per_layer = [left] * layers
    sites = []
    for layer, prune in schedule.prunes_at(layers, plan.fused):
        count = prune.count(plan.fused)
        if count == left and not identity_sites:
            continue
        whole = grid if left == plan.fused else None
        sites.append(PruneSite(layer, decoder.entering[layer], prune, left, count, whole))
        left = count
        plan.tokens_per_layer[layer:] = [left] * (layers - layer)
    plan.prunes = tuple(sites)
