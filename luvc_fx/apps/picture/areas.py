"""From what was recorded to areas: at each stage the token that every patch of the picture belongs to."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from luvc_fx.apps.picture.recording import RecordedPrune, Recording, Vision
from luvc_fx.graph.notes import Layout

GONE = -1
"""Owner of a patch that no token stands for."""

Grid = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Stage:
    """The tokens at one place of the model.

    Attributes:
        title: in plain words.
        owners: int64 ``[height, width]`` per frame: the number of the token that each patch belongs to, or
            `GONE`.
        absorbed: bool, as `owners`: patches whose own token was dropped, and averaged into that one.
        tokens: how many are left, of `before`; `what`: tokens, or patches of which several make one token.
        patches: of a token that neither merged nor absorbed another.
        ends: of `tokens`, those that stand for no area, such as ends of lines.
    """

    title: str
    owners: tuple[Tensor, ...]
    absorbed: tuple[Tensor, ...]
    tokens: int
    before: int
    patches: int
    what: str = "visual tokens"
    ends: int = 0


def stages_of(recording: Recording) -> list[Stage]:
    """The stages of one recorded prompt, from the picture to the last prune.

    Raises:
        ValueError: tokens that cannot be laid on the picture.
    """
    vision = _only_vision(recording)
    layout = vision.layout
    sizes = [grid for count, grid in layout.frames for _ in range(count)]
    grids = [grid for _, grid in layout.frames]
    before = _features(layout, grids, layout.origins)
    row = torch.cat([_rows(layout, grid).flatten() for grid in sizes])
    row += torch.repeat_interleave(_starts(sizes), torch.tensor([h * w for h, w in sizes]))
    rows = _Rows(layout, sizes, row.clone())
    stages = [rows.stage("the picture", row, grids)]
    for merge in vision.merges:
        row = _numbered(merge.owners, layout.lead)[row]
        grids = list(merge.note.grids)
        stages.append(rows.stage(f"after encoder block {merge.note.block}", row, grids))
    feature = _feature_of_row(layout, grids, vision.origins)
    tokens = _features(layout, grids, vision.origins)
    absorbed = torch.zeros_like(row, dtype=torch.bool)
    fused = _Tokens(sizes, feature[row], absorbed, tokens, before, math.prod(layout.unit))
    stages = _with_fusion(stages, fused.stage("into the language model"))
    for prune in recording.prunes:
        fused = fused.pruned(prune)
        stages.append(fused.stage(f"before decoder layer {prune.note.layer}"))
    return stages


def _only_vision(recording: Recording) -> Vision:
    if not recording.visions:
        why = "; ".join(map(str, recording.refusals))
        raise ValueError(
            "the encoder of this model was not recognised, so its tokens have no place in the picture"
            + (f": {why}" if why else "")
        )
    if len(recording.visions) > 1:
        raise ValueError(
            "the prompt has images and videos, which are encoded apart; allowed: one kind in a prompt"
        )
    (vision,) = recording.visions
    if vision.layout.pooled:
        raise ValueError(
            "this model resamples its features (videos of LLaVA-OneVision, images beyond its anyres_max), so "
            "a token has no area of its own; allowed: prompts whose features are patches"
        )
    return vision


def _starts(sizes: list[Grid]) -> Tensor:
    counts = torch.tensor([0, *(height * width for height, width in sizes)])
    return counts.cumsum(0)[:-1]


def _rows(layout: Layout, grid: Grid) -> Tensor:
    """int64 ``[height, width]``: the row of each patch of one frame."""
    (height, width), (high, wide) = grid, layout.unit
    number = torch.arange(height * width)
    if not layout.blockwise:
        return number.reshape(height, width)
    blocks = number.reshape(height // high, width // wide, high, wide)
    return blocks.transpose(1, 2).reshape(height, width)


def _numbered(owners: Tensor, lead: int) -> Tensor:
    """int64 ``[all rows]`` over all images, without the `lead` rows in front of each."""
    if owners.dim() == 1:
        return owners.cpu()
    inside = owners[:, lead:].cpu() - lead
    left = int(inside.max()) + 1
    return (inside + left * torch.arange(len(inside)).unsqueeze(1)).flatten()


def _features(layout: Layout, grids: list[Grid], origins: tuple[int, ...] | None) -> int:
    if origins is not None:
        return len(origins)
    high, wide = layout.unit
    pairs = zip(layout.frames, grids, strict=True)
    return sum(count * (grid[0] // high) * (grid[1] // wide) for (count, _), grid in pairs)


def _feature_of_row(layout: Layout, grids: list[Grid], origins: tuple[int, ...] | None) -> Tensor:
    """int64 ``[rows]``: the feature that each row becomes, or `GONE`; `grids` of each of `layout.frames`."""
    frames = [grid for (count, _), grid in zip(layout.frames, grids, strict=True) for _ in range(count)]
    total = sum(height * width for height, width in frames)
    features = torch.full((total,), GONE)
    if origins is not None:
        for number, origin in enumerate(origins):
            if origin >= 0:
                features[origin] = number
        return features
    start = feature = 0
    for height, width in frames:
        high, wide = layout.unit
        blocks = torch.arange(height // high * (width // wide)).reshape(height // high, width // wide)
        patches = blocks.repeat_interleave(high, 0).repeat_interleave(wide, 1)
        inside = torch.empty(height * width, dtype=torch.int64)
        inside[_rows(layout, (height, width)).flatten()] = patches.flatten()
        features[start : start + height * width] = inside + feature
        start, feature = start + height * width, feature + blocks.numel()
    return features


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows inside the encoder, which are tokens or, where blocks of them become one, patches.

    Attributes:
        sizes: height and width of each frame in patches.
        first: int64 ``[patches]``, the row of each before all merges.
    """

    layout: Layout
    sizes: list[Grid]
    first: Tensor

    def stage(self, title: str, row: Tensor, grids: list[Grid]) -> Stage:
        """The rows that the patches are in now: as whole blocks, where whole blocks merge."""
        unit = math.prod(self.layout.unit)
        blocks = _feature_of_row(self.layout, grids, None)
        old = _feature_of_row(self.layout, [grid for _, grid in self.layout.frames], None)[self.first]
        by_block = blocks[row]
        # For each block of the picture the lowest and the highest block that its patches are in now.
        low, high = (
            torch.zeros(int(old.max()) + 1, dtype=torch.int64).scatter_reduce(
                0, old, by_block, reduce, include_self=False
            )
            for reduce in ("amin", "amax")
        )
        whole = torch.equal(low, high)
        owners = by_block if whole else row
        patches, what = (unit, "visual tokens") if whole else (1, "patches")
        left, total = int(owners.max()) + 1, len(row) // patches
        none = _framed(torch.zeros_like(row, dtype=torch.bool), self.sizes)
        return Stage(title, _framed(owners, self.sizes), none, left, total, patches, what)


@dataclass(frozen=True, slots=True)
class _Tokens:
    """Tokens in the language model: per patch the token that it belongs to, as in `Stage`."""

    sizes: list[Grid]
    owner: Tensor
    absorbed: Tensor
    tokens: int
    before: int
    patches: int

    def stage(self, title: str) -> Stage:
        ends = self.tokens - len(self.owner[self.owner != GONE].unique())
        owners, absorbed = _framed(self.owner, self.sizes), _framed(self.absorbed, self.sizes)
        return Stage(title, owners, absorbed, self.tokens, self.before, self.patches, ends=ends)

    def pruned(self, prune: RecordedPrune) -> _Tokens:
        """What is left behind a prune.

        Raises:
            ValueError: other visual tokens than the picture has.
        """
        places, rows, owners = prune.places.cpu(), prune.rows.cpu(), prune.owners.cpu()
        if len(places) != self.tokens:
            raise ValueError(
                f"{len(places)} visual tokens enter decoder layer {prune.note.layer}, and the pictures have "
                f"{self.tokens}: they cannot be laid on them"
            )
        kept = torch.isin(rows, places)
        number = torch.where(kept, kept.cumsum(0) - 1, GONE)
        now = owners[places]
        new = torch.where(now >= 0, number[now.clamp(min=0)], GONE)
        itself = (now >= 0) & (rows[now.clamp(min=0)] == places)
        alive = self.owner != GONE
        at = self.owner.clamp(min=0)
        owner = torch.where(alive, new[at], GONE)
        absorbed = (owner != GONE) & (self.absorbed | ~itself[at])
        return _Tokens(self.sizes, owner, absorbed, int(kept.sum()), self.before, self.patches)


def _framed(flat: Tensor, sizes: list[Grid]) -> tuple[Tensor, ...]:
    parts = flat.split([height * width for height, width in sizes])
    return tuple(part.reshape(size) for part, size in zip(parts, sizes, strict=True))


def _with_fusion(stages: list[Stage], fusion: Stage) -> list[Stage]:
    """One stage for two where the features are what left the encoder."""
    last = stages[-1]
    pairs = zip(last.owners, fusion.owners, strict=True)
    if last.what != fusion.what or not all(torch.equal(a, b) for a, b in pairs):
        return [*stages, fusion]
    title = f"{last.title}, {fusion.title}"
    return [*stages[:-1], dataclasses.replace(fusion, title=title)]
