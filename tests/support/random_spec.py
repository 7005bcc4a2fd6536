"""What a random vision-language model looks like: `Spec`, a strategy that draws it, and its prompts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from luvc_fx.schedule import AXES, Merge, Prune, Schedule

PATCH = 2
IMAGE = 1
"""Id of the placeholder."""
VOCABULARY = 13
LONGEST = 96


@dataclass(frozen=True)
class Body:
    """The layers of one transformer stack.

    Attributes:
        residual: "pre" norm, "post" norm, "parallel" (attention and perceptron read the same norm),
            "scale" (each branch times a learned vector), "skip" (the stream times a factor, plus the branch).
        split: how the heads are split off: by "view", a view with "minus one", or "unflatten".
        repeat: keys and values are repeated for grouped queries, as transformers does; else `enable_gqa`.
        pool: between attention and perceptron, each token is also told the mean over all tokens.
    """

    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 4
    residual: str = "pre"
    norm: str = "layer"
    fused_qkv: bool = False
    split: str = "view"
    repeat: bool = True
    gated: bool = False
    pool: bool = False

    @property
    def dim(self) -> int:
        """Channels of the stream."""
        return self.heads * self.head_dim


@dataclass(frozen=True)
class Spec:
    """One model and the prompt that it is captured on; printing it is enough to make it again.

    Attributes:
        grid: patches (height, width) of an image.
        prefix: rows in front of the patches (CLS, registers).
        unused_block: the features are those before the last block, which nobody reads.
        cut_late: the rows in front are cut off behind the projector, not before it.
        flat_features: the fusion gets `[I * N, D]`, else `[I, N, D]`.
        images: in each row of the batch.
        text: in each row (text tokens in front, behind).
        padding: in front of each row.
        positions: of the text: "none", "before" or "after" the fusion, or "rotary".
        mask: "flag" (`is_causal`), "causal" (one for all rows), "bool", "additive", "keys" (padding alone,
            expanded over the queries), "distance" (falls with the distance of the rows, as ALiBi).
        shared: what all layers read: "nothing", the same "weights", a "gate" `[B, S, 1]` or a "bias"
            `[B, S, D]`.
        extras: further outputs: "hidden" (the stream before each layer), "caches" (keys and values of each
            layer), "pooled" (a head on the mean of the last layer's input), "vision" (the stream behind each
            block), "vision pooled".
        dead: branches that nobody reads.
        head: logits of "all" rows, of the "last", or of all with the "tied" embedding.
        trouble: what makes it a model that cannot be rewritten in full; see `random_graphs.TROUBLES`.
    """

    seed: int = 0
    blocks: int = 2
    layers: int = 2
    grid: tuple[int, int] = (3, 4)
    vision: Body = Body()
    decoder: Body = Body()
    prefix: int = 1
    flatten: str = "flatten"
    vision_positions: bool = True
    unused_block: bool = False
    projector: str = "mlp"
    cut_late: bool = False
    flat_features: bool = True
    images: int = 1
    text: tuple[tuple[int, int], ...] = ((2, 3),)
    padding: tuple[int, ...] = (0,)
    positions: str = "rotary"
    given_positions: bool = False
    mask: str = "flag"
    shared: str = "nothing"
    extras: tuple[str, ...] = ()
    dead: bool = False
    head: str = "all"
    trouble: str = "none"

    @property
    def batch(self) -> int:
        """Rows of the prompt."""
        return len(self.text)

    @property
    def patches(self) -> int:
        """Visual tokens of one image."""
        return self.grid[0] * self.grid[1]


TROUBLES = (
    *("columns", "channels last", "register behind", "places in each block", "two features"),
    *("two fusions", "uneven", "table", "flat rotary", "shortcut", "fixed cut"),
)
EXTRAS = ("hidden", "caches", "pooled", "vision", "vision pooled")


@st.composite
def _bodies(draw: st.DrawFn, rotary: bool = False) -> Body:
    heads = draw(st.sampled_from([2, 1, 4]))
    return Body(
        heads=heads,
        kv_heads=draw(st.sampled_from([n for n in (heads, 2, 1) if heads % n == 0])),
        head_dim=draw(st.sampled_from([4, 2, 6] if rotary else [4, 2, 3, 6])),
        residual=draw(st.sampled_from(["pre", "post", "parallel", "scale", "skip"])),
        norm=draw(st.sampled_from(["layer", "rms"])),
        fused_qkv=draw(st.booleans()),
        split=draw(st.sampled_from(["view", "minus one", "unflatten"])),
        repeat=draw(st.booleans()),
        gated=draw(st.booleans()),
        pool=draw(st.integers(0, 5)) == 5,
    )


@st.composite
def specs(draw: st.DrawFn, trouble: bool | None = None) -> Spec:
    """Any model; with `trouble` False or True only those without or with a named trouble."""
    batch = draw(st.sampled_from([1, 2]))
    positions = draw(st.sampled_from(["rotary", "after", "before", "none"]))
    mask = draw(st.sampled_from(["flag", "causal", "bool", "additive", "keys", "distance"]))
    padded = mask not in ("flag", "causal")
    words = draw(st.integers(1, 5))
    fronts = [draw(st.integers(0, words - 1)) for _ in range(batch)]
    pads = [draw(st.integers(0, 3)) if padded else 0 for _ in range(batch)]
    # rows of one length: what one row has more in padding, the others have more in text
    text = tuple((front, words - front + max(pads) - pad) for front, pad in zip(fronts, pads, strict=True))
    spec = Spec(
        seed=draw(st.integers(0, 99)),
        blocks=draw(st.integers(1, 3)),
        layers=draw(st.integers(1, 4)),
        grid=draw(st.tuples(st.integers(1, 5), st.integers(1, 5))),
        vision=draw(_bodies()),
        decoder=draw(_bodies(rotary=True)),
        prefix=draw(st.integers(0, 2)),
        flatten=draw(st.sampled_from(["flatten", "view", "reshape"])),
        vision_positions=draw(st.booleans()),
        unused_block=draw(st.booleans()),
        projector=draw(st.sampled_from(["mlp", "linear", "norm"])),
        cut_late=draw(st.booleans()),
        flat_features=draw(st.booleans()),
        images=draw(st.sampled_from([1, 1, 2])),
        text=text,
        padding=tuple(pads),
        positions=positions,
        given_positions=draw(st.booleans()),
        mask=mask,
        shared=draw(st.sampled_from(["nothing", "weights", "gate", "bias"])),
        extras=tuple(draw(st.lists(st.sampled_from(EXTRAS), unique=True, max_size=2))),
        dead=draw(st.booleans()),
        head=draw(st.sampled_from(["all", "last", "tied"])),
    )
    wanted = draw(st.integers(0, 3)) == 3 if trouble is None else trouble
    return in_trouble(spec, draw(st.sampled_from(TROUBLES))) if wanted else spec


def in_trouble(spec: Spec, trouble: str) -> Spec:
    """`spec` changed so that the trouble can show."""
    if trouble == "two features":
        return replace(spec, trouble=trouble, blocks=max(spec.blocks, 2), projector="norm")
    if trouble == "uneven":
        pads = (0, 0)
        text = (spec.text[0], spec.text[0])
        return replace(spec, trouble=trouble, text=text, padding=pads)
    if trouble == "table":
        return replace(spec, trouble=trouble, positions="none", given_positions=False)
    if trouble == "flat rotary":
        return replace(spec, trouble=trouble, positions="rotary", given_positions=False)
    if trouble == "shortcut":
        return replace(spec, trouble=trouble, layers=max(spec.layers, 3))
    return replace(spec, trouble=trouble)


@st.composite
def keep_all(draw: st.DrawFn, spec: Spec) -> Schedule:
    """A schedule with sites anywhere in the model that merge and drop nothing."""
    sites = st.tuples(st.integers(0, spec.blocks - 1), st.sampled_from(AXES))
    merges = draw(st.lists(sites, unique=True, max_size=2))
    layers = draw(st.lists(st.integers(0, spec.layers - 1), unique=True, max_size=2))
    selectors = [draw(st.sampled_from(["spectrum", "random", "uniform"])) for _ in layers]
    return Schedule(
        merge=tuple(Merge(axis, keep=1.0, layer=block) for block, axis in merges),
        prune=tuple(
            Prune(keep=1.0, layer=layer, selector=selector)
            for layer, selector in zip(layers, selectors, strict=True)
        ),
    )


def inputs(spec: Spec, seed: int = 0, longer: int = 0) -> dict[str, Tensor]:
    """A prompt for the model; with `longer`, one with that many more text tokens in each row."""
    generator = torch.Generator().manual_seed(1000 * spec.seed + seed)
    rows, valid, counts = [], [], [spec.images] * spec.batch
    if spec.trouble == "uneven":
        counts[-1] += 1
    for (front, behind), pad, images in zip(spec.text, spec.padding, counts, strict=True):
        image = [IMAGE] * spec.patches
        middle = image + (images - 1) * ([3, *image])
        words = torch.randint(4, VOCABULARY, (front + behind + longer,), generator=generator).tolist()
        rows.append([0] * pad + words[:front] + middle + words[front:])
        valid.append([False] * pad + [True] * (len(rows[-1]) - pad))
    length = max(map(len, rows))
    rows = [row + [2] * (length - len(row)) for row in rows]
    valid = [row + [True] * (length - len(row)) for row in valid]
    height, width = spec.grid
    pixels = torch.randn(sum(counts), 3, PATCH * height, PATCH * width, generator=generator)
    found = {"ids": torch.tensor(rows), "pixels": pixels}
    if spec.mask not in ("flag", "causal"):
        found["valid"] = torch.tensor(valid)
    if spec.given_positions:
        found["positions"] = (torch.tensor(valid).long().cumsum(-1) - 1).clamp(min=0)
    return found
