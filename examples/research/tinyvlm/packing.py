"""Packing many short conversations behind one image, and dense per-patch labels.

A packed row is ``USER: <image>*N`` followed by conversations.  Every conversation restarts at
position N + 1 and attends to the image prefix and to itself only, so its logits are those of the
same conversation alone in the stock forward pass (``check.py`` asserts this).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from examples.research.tinyvlm.families import WORD, Family, family
from examples.research.tinyvlm.model import EOS, PAD, POSITIONS
from examples.research.tinyvlm.scenes import COLORS, SHAPES, SIZE, Question, Scene, Thing
from examples.research.tinyvlm.videos import Video

KIND_WORDS = (*SHAPES, "bar", "card")
GROUPS = {  # dense label groups: every patch of a drawn thing is one word of each group
    "color": tuple(COLORS),
    "kind": KIND_WORDS,
    "number": tuple(str(n) for n in range(10)),
    "cell": POSITIONS,
}
CONVERSATION_TURNS = (0.6, 0.25, 0.15)
HARD = ("count_color", "row_count", "motion", "moving", "first", "last")
WEIGHTS = {"count": 3.0, **dict.fromkeys(HARD, 2.0)}
TEXT = 104  # packed text positions behind the image; fixed, so that every side has one shape


@dataclass
class Batch:
    """Tensors of one training step; L is the packed length, F the frames of each, G the side in tokens.

    input_ids (B, L), position_ids (A, B, L) on A axes, segment (B, L): 0 in front of the text, 1, 2, ... in
    the conversations, -1 behind them, targets (B, L) with -100 where no loss is taken, weights (B, L),
    pixels (B*F, 3, S, S), dense: group -> (B*F, G*G) word index within the group or -100, offsets
    (B*F, G*G, 2) from token to centre in image widths, asked (Q,) row number and about (Q, F*G*G) bool:
    the visual tokens each answer is read from, first (Q,): where in ``input_ids[targets >= 0]`` its first
    word is predicted.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    segment: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    pixels: torch.Tensor
    dense: dict[str, torch.Tensor]
    offsets: torch.Tensor
    asked: torch.Tensor
    about: torch.Tensor
    first: torch.Tensor

    @property
    def mask(self) -> torch.Tensor:
        """Attention mask (B, 1, L, L) of 0 and -inf: causal, the prefix and the own conversation only."""
        rows, columns = self.segment[:, :, None], self.segment[:, None, :]
        seen = ((rows == columns) | (columns == 0)).tril()
        return torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, float("-inf"))[:, None]

    def to(self, device: torch.device) -> Batch:
        """The same on `device`."""
        moved: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, dict):
                moved[name] = {key: part.to(device, non_blocking=True) for key, part in value.items()}
            else:
                moved[name] = value.to(device, non_blocking=True)
        return Batch(**moved)


def pixels(images: list[Image.Image], side: int) -> torch.Tensor:
    """What the shipped processor gives for these images at ``side``: (B, 3, side, side)."""
    stack = np.stack(
        [np.asarray(i.resize((side, side), Image.Resampling.BICUBIC), np.float32) for i in images]
    )
    return torch.from_numpy(stack).permute(0, 3, 1, 2).contiguous() / 127.5 - 1.0


def converse(
    questions: list[Question], rng: np.random.Generator, turns: tuple[float, ...]
) -> list[list[Question]]:
    """Group consecutive questions into conversations of 1, 2, ... turns drawn from ``turns``."""
    out = []
    rest = list(questions)
    while rest:
        n = 1 + int(rng.choice(len(turns), p=turns))
        out.append(rest[:n])
        rest = rest[n:]
    return out


def tokens(conversation: list[Question]) -> tuple[list[int], list[int], list[float]]:
    """Ids after the image, next-token targets and loss weights of one conversation."""
    ids: list[int] = []
    answer_at: list[tuple[int, float]] = []
    for turn, question in enumerate(conversation):
        ids += [WORD["user:"]] if turn else []
        ids += [WORD[w] for w in question.text.split()] + [WORD["assistant:"]]
        weight = WEIGHTS.get(question.task, 1.0)
        answer = [WORD[word] for word in question.answer.split()]
        answer_at += [(len(ids) - 1 + i, weight) for i in range(len(answer))]
        answer_at.append((len(ids) - 1 + len(answer), 0.2))
        ids += [*answer, EOS]
    targets, weights = [-100] * len(ids), [0.0] * len(ids)
    for at, weight in answer_at:
        targets[at], weights[at] = ids[at + 1], weight
    return ids, targets, weights


def pack(
    scenes: list[Scene] | list[Video],
    rng: np.random.Generator,
    side: int = SIZE,
    turns: tuple[float, ...] = CONVERSATION_TURNS,
    kind: Family | None = None,
) -> Batch:
    """Pack the questions of every scene that fit behind its frames at ``side`` pixels.

    All scenes have as many frames; ``kind`` is a LLaVA where it is not given.
    """
    kind = kind or family("llava")
    grid = kind.grid(side)
    layout = kind.layout(len(scenes[0].frames), grid)
    start = len(layout.ids)
    rows = [converse(scene.questions, rng, turns) for scene in scenes]
    asked: list[int] = []
    about: list[tuple[int, ...]] = []
    first: list[int] = []
    length = start + TEXT
    n = len(scenes)
    ids = np.full((n, length), PAD)
    ids[:, :start] = layout.ids
    position = np.tile(np.arange(length), (len(layout.positions), n, 1))
    position[:, :, :start] = layout.positions[:, None]
    segment = np.full((n, length), -1)
    segment[:, :start] = 0
    targets = np.full((n, length), -100)
    weights = np.zeros((n, length), np.float32)
    seen = 0
    for b, row in enumerate(rows):
        at = start
        for number, conversation in enumerate(row, 1):
            words, target, weight = tokens(conversation)
            if at + len(words) > length:
                break
            span = slice(at, at + len(words))
            ids[b, span], targets[b, span], weights[b, span] = words, target, weight
            position[:, b, span] = layout.after + np.arange(len(words))
            segment[b, span] = number
            at += len(words)
            asked += [b] * len(conversation)
            about += [question.about for question in conversation]
            for question in conversation:
                first.append(seen)
                seen += len(question.answer.split()) + 1
    frames = [frame for scene in scenes for frame in scene.frames]
    dense, offsets, owner = dense_labels([things for _, things in frames], grid)
    owner = owner.reshape(n, -1)
    patches = np.stack([np.isin(owner[b], things) for b, things in zip(asked, about, strict=True)])
    return Batch(
        torch.from_numpy(ids),
        torch.from_numpy(position),
        torch.from_numpy(segment),
        torch.from_numpy(targets),
        torch.from_numpy(weights),
        pixels([image for image, _ in frames], side),
        {name: labels for name, labels in dense.items() if name in kind.groups},
        offsets,
        torch.tensor(asked),
        torch.from_numpy(patches),
        torch.tensor(first),
    )


def dense_labels(
    things_of: list[list[Thing | None]], grid: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor, np.ndarray]:
    """Labels of the tokens whose centre lies in a thing's box; -100 (or 0 offset) elsewhere.

    ``things_of`` has the things of each of B images. The last result (B, G*G) is the index of the thing
    that owns each token, -1 where none does.
    """
    shape = (len(things_of), grid, grid)
    dense = {name: np.full(shape, -100) for name in GROUPS}
    offsets = np.zeros((*shape, 2), np.float32)
    owner = np.full(shape, -1)
    middle = (np.arange(grid) + 0.5) * SIZE / grid
    for b, listed in enumerate(things_of):
        for index, thing in enumerate(listed):
            if thing is None:
                continue
            x0, y0, x1, y1 = thing.box
            xs = np.flatnonzero((middle >= x0) & (middle <= x1))
            ys = np.flatnonzero((middle >= y0) & (middle <= y1))
            at = np.ix_([b], ys, xs)
            owner[at] = index
            words = {"color": thing.color, "kind": thing.shape, "cell": thing.cell}
            if thing.number is not None:
                words["number"] = str(thing.number)
            for name, word in words.items():
                if word in GROUPS[name]:  # the public set has a few colours and a shape of its own
                    dense[name][at] = GROUPS[name].index(word)
            cx, cy = thing.center
            offsets[(*at, 0)] = (cx - middle[xs])[None, None, :] / SIZE
            offsets[(*at, 1)] = (cy - middle[ys])[None, :, None] / SIZE
    return (
        {name: torch.from_numpy(a.reshape(len(things_of), -1)) for name, a in dense.items()},
        torch.from_numpy(offsets.reshape(len(things_of), -1, 2)),
        owner.reshape(len(things_of), -1),
    )
