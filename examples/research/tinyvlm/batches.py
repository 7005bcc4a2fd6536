"""The batches of training, by step number: drawn in this process or by workers ahead of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from examples.research.tinyvlm.families import Family, family
from examples.research.tinyvlm.packing import Batch, pack
from examples.research.tinyvlm.scenes import sample
from examples.research.tinyvlm.videos import film

FULL_SHARE = (0.1, 0.85)  # least and most share of batches at full size behind the warm-up
WARM_FULL_SHARE = 0.65
EXTRA_FIRST = 10_000_000  # a LLaVA learns as many card scenes besides, for the dense loss only, from here on
VIDEO_FRAMES = {4: 3, 8: 2, 16: 1}  # frames of a video -> videos for every 8 images of a batch
STRIDE = 128  # scene numbers of a step


@dataclass(frozen=True)
class Draw:
    """What one step sees: its batch, whether that is of videos, and card scenes besides or None."""

    batch: Batch
    video: bool
    extra: Batch | None


class Batches(Dataset[Draw]):
    """``batches[step]``: the batch of a step, as training has progressed.

    Args:
        name: of the family.
        warmup_batch, batch: images of a batch in the warm-up, and behind it.

    Attributes:
        progress: (4,) in shared memory, so that workers see it: whether the warm-up goes on, the share of
            its phase that is done, whether there are videos, the share of their time that is done.
    """

    def __init__(self, name: str, warmup_batch: int, batch: int) -> None:
        self.name, self.warmup_batch, self.batch = name, warmup_batch, batch
        self.progress = torch.zeros(4).share_memory_()

    def __getitem__(self, step: int) -> Draw:
        kind = family(self.name)
        warm, done, videos, late = self.progress.tolist()
        first = STRIDE * step
        if videos and step % 2 == 0:
            return Draw(make_videos(kind, step, first, late, self.batch), video=True, extra=None)
        size = self.warmup_batch if warm else self.batch
        share = WARM_FULL_SHARE if warm else float(np.clip(1.5 * done - 0.4, *FULL_SHARE))
        extra = None
        if not warm and kind.name == "llava":
            extra = make_batch(kind, step, EXTRA_FIRST + first, size, share, "cards")
        return Draw(make_batch(kind, step, first, size, share), video=False, extra=extra)


def feed(batches: Batches, first: int, workers: int) -> Iterator[Draw]:
    """The draws of steps `first`, `first` + 1, ...; `workers` processes draw ahead, 0: this one draws."""
    # Shared tensors by name: by descriptor, a deep queue would run out of open files.
    torch.multiprocessing.set_sharing_strategy("file_system")
    loader: DataLoader[Draw] = DataLoader(
        batches,
        batch_size=None,
        sampler=itertools.count(first),
        num_workers=workers,
        prefetch_factor=8 if workers else None,
        collate_fn=_same,
    )
    return iter(loader)


def _same(draw: Draw) -> Draw:
    return draw


def make_batch(
    kind: Family, step: int, first: int, size: int, full_share: float, scene: str | None = None
) -> Batch:
    """The batch of images of ``step``: scenes ``first``... at one random resolution."""
    rng = np.random.default_rng([7, step])
    side = kind.side if rng.random() < full_share else int(rng.choice(kind.small_sides))
    listed = [sample("train", i, scene or drawn_kind(kind, i)) for i in range(first, first + size)]
    return pack(listed, rng, side, kind=kind)


def drawn_kind(kind: Family, number: int) -> str:
    """The kind of scene that scene `number` has in training and dev, by the family's shares."""
    names, shares = list(kind.kinds), list(kind.kinds.values())
    return names[int(np.random.default_rng([8, number]).choice(len(names), p=shares))]


def make_videos(kind: Family, step: int, first: int, done: float, size: int) -> Batch:
    """The batch of videos of ``step``, as large as `size` images; longer ones come later."""
    rng = np.random.default_rng([9, step])
    late = max(0.0, 2 * done - 0.8)
    shares = np.array([1.0, 0.3 + late, late]) / (1.3 + 2 * late)
    frames = int(rng.choice(list(VIDEO_FRAMES), p=shares))
    count = max(1, VIDEO_FRAMES[frames] * size // 8)
    return pack([film("train", first + i, frames) for i in range(count)], rng, kind.side, kind=kind)
