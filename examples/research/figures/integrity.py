"""OIM integrity: which patches each token stands for, OIM beside 1-D ToMe, and what that costs in answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from examples.research.figures.figure_kit import (
    LEVEL,
    OTHER,
    SPLIT,
    UNPRUNED,
    Bench,
    Numbers,
    about,
    accuracy,
    arms,
    listed,
    told,
)
from examples.research.tinyvlm.scenes import sample
from luvc_fx.apps.evaluation.questions import ALL_TASKS, read_frames
from luvc_fx.ops import orthogonal_merge, sequence_merge
from luvc_fx.schedule import Merge, Schedule

NAME, TITLE = "integrity", "OIM keeps the token grid, 1-D ToMe does not"
PICTURED = (3, 8)
"""Numbers of the scenes that are shown."""

STEPS = {
    "16 x 12": (("width", 12, 2),),
    "12 x 12": (("width", 12, 2), ("height", 12, 3)),
    "16 x 8": (("width", 8, 2),),
    "8 x 8": (("width", 8, 2), ("height", 8, 3)),
}
"""By the grid that is left (height x width): axis, its length, and the encoder block before the merge."""

SHOWN = ("16 x 12", "8 x 8")
SIDE = 16


def merges(grid: str, method: str) -> tuple[Merge, ...]:
    """Those that leave as many tokens as `grid` has."""
    return tuple(
        Merge(axis=axis, length=length, layer=block, method=method) for axis, length, block in STEPS[grid]
    )


def schedules() -> dict[str, Schedule]:
    """OIM and ToMe at every count."""
    return {f"{m} {grid}": Schedule(merge=merges(grid, m)) for grid in STEPS for m in ("oim", "tome")}


def rivals() -> dict[str, str]:
    """OIM is compared with ToMe at the same count."""
    return {f"oim {grid}": f"tome {grid}" for grid in STEPS}


@torch.inference_mode()
def memberships(model: Any, pixels: Tensor, steps: Sequence[Merge]) -> Tensor:
    """Which token each patch became part of, by running the model's own encoder with the merges in it.

    What merges is the hidden states; beside them goes, for every token, a one for each of its patches.

    Args:
        pixels: ``[I, 3, S, S]``.
        steps: in order; each compares hidden states.

    Returns:
        int64 ``[I, patches]``: the place of the token in the row that the encoder returns.
    """
    images = pixels.shape[0]
    count = SIDE * SIDE
    sizes = torch.ones(images, count)
    slots = torch.arange(count).expand(images, -1)
    members = torch.eye(count).expand(images, -1, -1)
    sides = [SIDE, SIDE]

    def behind(block: int) -> Any:
        def merge(module: Any, args: Any, hidden: Tensor) -> Tensor:
            nonlocal sizes, slots, members
            tokens = hidden[:, 1:]  # behind CLS
            for step in (step for step in steps if step.layer == block):
                assert step.length is not None
                before = tuple(sides)
                sides[step.axis == "width"] = step.length
                parts = (members, sizes, slots)
                if step.method.name == "tome":
                    merged = sequence_merge(*parts, sides[0] * sides[1], tokens)
                else:
                    grids = [part.unflatten(1, before) for part in parts]
                    merged = orthogonal_merge(
                        *grids, step.axis, step.length, feature=tokens.unflatten(1, before)
                    )
                    merged = tuple(part.flatten(1, 2) for part in merged)
                members, sizes, slots, tokens = merged
            return torch.cat([hidden[:, :1], tokens], dim=1)

        return merge

    tower = model.model.vision_tower
    blocks = next(m for m in tower.modules() if isinstance(m, torch.nn.ModuleList))
    hooks = [blocks[block].register_forward_hook(behind(block)) for block in {s.layer for s in steps}]
    try:
        tower(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    return members.transpose(1, 2).argmax(-1)


def spread(token_of: Sequence[int]) -> dict[str, float]:
    """Of one image's tokens that hold several patches: how far these reach, and how many are torn apart.

    Returns:
        ``reach``: mean over those tokens of the largest distance of two of its patches on one axis;
        ``torn``: share of them whose patches are not all connected by their edges; ``largest``: patches.
    """
    groups: dict[int, set[tuple[int, int]]] = {}
    for patch, token in enumerate(token_of):
        groups.setdefault(token, set()).add(divmod(patch, SIDE))
    merged = [group for group in groups.values() if len(group) > 1]
    reach = [max(max(c) - min(c) for c in zip(*group, strict=True)) for group in merged]
    return {
        "reach": sum(reach) / len(merged),
        "torn": sum(not _connected(group) for group in merged) / len(merged),
        "largest": float(max(len(group) for group in merged)),
    }


def _connected(group: set[tuple[int, int]]) -> bool:
    left, edge = set(group), [next(iter(group))]
    while edge:
        row, column = edge.pop()
        left.discard((row, column))
        beside = {(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)}
        edge += beside & left
    return not left


def data(bench: Bench) -> Numbers:
    """Tokens of the pictured scenes, their spread over more images, and the answers."""
    shown = [sample(SPLIT, number, "objects").image for number in PICTURED]
    more = [read_frames(question)[0] for question in bench.scenes]
    pixels = bench.processor.image_processor(images=[*shown, *more], return_tensors="pt")["pixel_values"]
    pictures: dict[str, Any] = {}
    spreads: dict[str, dict[str, float]] = {}
    for grid in STEPS:
        for method in ("oim", "tome"):
            name = f"{method} {grid}"
            found = memberships(bench.model, pixels, merges(grid, method)).tolist()
            if grid in SHOWN:
                pictures[name] = found[: len(shown)]
            each = [spread(token_of) for token_of in found[len(shown) :]]
            spreads[name] = {key: sum(one[key] for one in each) / len(each) for key in each[0]}
    return {
        "asked": bench.asked(),
        "scenes": list(PICTURED),
        "images": len(more),
        "pictures": pictures,
        "spread": spreads,
        "rows": bench.rows(schedules(), rivals()),
    }


def draw(numbers: Numbers) -> Any:
    """The pictures above, the answers below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8.8), layout="constrained")
    columns = 1 + 2 * len(SHOWN)
    grid = figure.add_gridspec(3, columns, height_ratios=(1, 1, 0.9))
    for row, scene in enumerate(numbers["scenes"]):
        image = sample(SPLIT, scene, "objects").image
        names = ["before", *(f"{method} {shown}" for shown in SHOWN for method in ("oim", "tome"))]
        for column, name in enumerate(names):
            axes = figure.add_subplot(grid[row, column])
            axes.imshow(image, extent=(0, SIDE, SIDE, 0))
            tokens = numbers["pictures"][name][row] if column else list(range(SIDE * SIDE))
            _outline(axes, tokens)
            axes.set_axis_off()
            if not row:
                axes.set_title(_label(name, len(set(tokens))), fontsize=10)
    _bars(figure.add_subplot(grid[2, :]), numbers)
    return figure


def _label(name: str, tokens: int) -> str:
    method, _, grid = name.partition(" ")
    if not grid:
        return f"before, 16 x 16: {tokens} tokens"
    return f"{'OIM' if method == 'oim' else 'ToMe'}, {grid}: {tokens} tokens"


def _outline(axes: Any, token_of: Sequence[int]) -> None:
    """A thin grid around single patches; the outline of each token of several in a colour of its own."""
    from matplotlib import colormaps
    from matplotlib.collections import LineCollection
    from matplotlib.patches import Rectangle

    of = np.pad(np.array(token_of).reshape(SIDE, SIDE), 1, constant_values=-1)
    several = [token for token in dict.fromkeys(token_of) if token_of.count(token) > 1]
    # Neighbours in the list are neighbours in the picture, and get colours far apart.
    colour = {token: colormaps["hsv"]((7 * i % 19) / 19) for i, token in enumerate(several)}
    lines, colours, inset = [], [], 0.09
    for y, x in np.ndindex(SIDE, SIDE):
        token = of[y + 1, x + 1]
        if token not in colour:
            axes.add_patch(Rectangle((x, y), 1, 1, fill=False, edgecolor="white", linewidth=0.3, alpha=0.6))
            continue
        axes.add_patch(Rectangle((x, y), 1, 1, facecolor=colour[token], alpha=0.22, linewidth=0))
        near, far = inset, 1 - inset
        edges = (
            (of[y, x + 1], (x, y + near), (x + 1, y + near)),
            (of[y + 2, x + 1], (x, y + far), (x + 1, y + far)),
            (of[y + 1, x], (x + near, y), (x + near, y + 1)),
            (of[y + 1, x + 2], (x + far, y), (x + far, y + 1)),
        )
        outer = [(start, end) for beside, start, end in edges if beside != token]
        lines += outer
        colours += [colour[token]] * len(outer)
    axes.add_collection(LineCollection(lines, colors=colours, linewidths=1.4))
    axes.set_xlim(0, SIDE)
    axes.set_ylim(SIDE, 0)


def _bars(axes: Any, numbers: Numbers) -> None:
    rows = numbers["rows"]
    for number, name in enumerate(rows):
        colour = {"oim": "C0", "tome": "C3"}.get(name.partition(" ")[0], "0.5")
        place = number + (number + 1) // 2 * 0.5  # pairs stand together
        axes.bar(place, accuracy(rows[name]), yerr=[[a] for a in arms(rows[name])], color=colour, capsize=4)
        label = "before" if name == UNPRUNED else "\n".join(_label(name, 0).partition(":")[0].split(", "))
        axes.text(place, 3, f"{label}\n{accuracy(rows[name]):.1f} %", ha="center", color="w")
    axes.set_xticks([])
    axes.set_ylim(0, 100)
    axes.set_ylabel("accuracy, %, with 95 % intervals")


def caption(numbers: Numbers) -> str:
    """What the pictures and the bars show."""
    rows, spreads = numbers["rows"], numbers["spread"]
    tome = [spreads[f"tome {grid}"] for grid in STEPS]
    oim = [spreads[f"oim {grid}"] for grid in STEPS]
    compared = told({grid: rows[f"oim {grid}"] for grid in STEPS}, OTHER)
    against = {grid: rows[f"oim {grid}"]["scores"][ALL_TASKS]["against"][OTHER] for grid in STEPS}
    sure = {grid: one["difference"] for grid, one in against.items() if one["adjusted"] < LEVEL}
    better, worse = [g for g in sure if sure[g] > 0], [g for g in sure if sure[g] < 0]
    lost = told({name: row for name, row in rows.items() if name != UNPRUNED}, UNPRUNED)
    return (
        f"Scenes {listed([str(n) for n in numbers['scenes']])} of the dev split (objects on photos). A "
        "coloured outline is a token of several patches, white squares are patches that merged with nobody. "
        "OIM merges neighbours on a line after encoder block 2, and where the height shrinks on columns "
        "after block 3; ToMe merges the most similar pairs of the whole row at the same blocks and to the "
        "same counts; both compare hidden states, where ToMe's paper compares keys. Two pieces of one "
        f"colour can be one token or two. Over {numbers['images']} other images a token of several patches "
        f"reaches {_span(oim, 'reach')} patches beyond its first with OIM and {_span(tome, 'reach')} with "
        f"ToMe, {_span(oim, 'torn', 100)} % and {_span(tome, 'torn', 100)} % of them are in pieces that do "
        "not touch (with OIM where columns merge whose lines had merged at different places), and an "
        f"image's largest holds {_span(oim, 'largest')} and {_span(tome, 'largest')} patches: means over the "
        f"images, ranges over the four counts.\n\nAnswers without a merge: {accuracy(rows[UNPRUNED]):.1f} %. "
        f"OIM minus ToMe in points: {compared}. So OIM is significantly better at {listed(better)} and worse "
        f"at {listed(worse)}. Minus the unmerged model: {lost}. The model has a 1-D projector, and a merged "
        "token keeps the position id of its representative patch: so ToMe costs it the order of the row, "
        "and not the places. The figure `projector` has a model whose projector reads the grid "
        f"itself.{about(numbers)}"
    )


def _span(spreads: Sequence[dict[str, float]], key: str, times: float = 1.0) -> str:
    values = sorted(times * one[key] for one in spreads)
    return f"{values[0]:.1f} to {values[-1]:.1f}" if values[0] != values[-1] else f"{values[0]:.1f}"
