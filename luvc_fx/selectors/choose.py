"""Ask the selector that a prune names, and hold it to what it promised."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from luvc_fx.ops.select import (
    all_or_none,
    counted,
    keep_alike,
    keep_blocks,
    keep_global,
    marked,
    select_blocks,
    select_global,
)
from luvc_fx.selectors.base import Site

if TYPE_CHECKING:
    from luvc_fx.schedule import Prune


def choose(x: Tensor, prune: Prune, count: int, site: Site) -> Tensor:
    """The tokens that stay; the selector is not asked where all or none do.

    A selector's positions are known at run time only: if they are not distinct or not in range, the
    call that computes them fails.

    Args:
        x: ``[B, N, D]``, the visual rows of the residual stream in sequence order.
        prune: the schedule item that asks.
        count: how many stay, in 0 .. N.
        site: where it happens.

    Returns:
        int64 ``[B, count]``: distinct positions in 0 .. N - 1, in any order.

    Raises:
        ValueError: `count` is not in 0 .. N, or the selector returned something else than scores or
            positions of the right shape and dtype.
    """
    whole = all_or_none(x, count)
    if whole is not None:
        return whole
    answer = _answer(x, prune, count, site)
    if not answer.is_floating_point():
        return answer
    if prune.coverage == "block":
        return select_blocks(answer, count, site.grid)
    return select_global(answer, count)


def choose_mask(x: Tensor, prune: Prune, count: int, site: Site) -> tuple[Tensor, Tensor]:
    """`choose` as a mask, and how many tokens stay ahead of each.

    Arguments and errors are those of `choose`.

    Returns:
        Bool ``[B, N]``, True `count` times in each row; and int64 ``[B, N]``, how many of the tokens
        before each one stay.
    """
    if all_or_none(x, count) is not None:
        return keep_alike(x, count)
    answer = _answer(x, prune, count, site)
    if not answer.is_floating_point():
        return counted(marked(answer, x.shape[1]))
    if prune.coverage == "block":
        return keep_blocks(answer, count, site.grid, site.sizes.get("longest"))
    return keep_global(answer, count)


def _answer(x: Tensor, prune: Prune, count: int, site: Site) -> Tensor:
    """What the selector says: scores ``[B, N]``, or positions ``[B, count]`` that are checked."""
    answer = prune.selector.answer(x, prune, count, site)
    batch, tokens = x.shape[:2]
    if not isinstance(answer, Tensor):
        _refuse(prune, type(answer).__name__, batch, tokens, count)
    shape = (batch, tokens) if answer.is_floating_point() else (batch, count)
    if tuple(answer.shape) != shape or not (answer.is_floating_point() or answer.dtype == torch.int64):
        _refuse(prune, f"{answer.dtype} {list(answer.shape)}", batch, tokens, count)
    if answer.is_floating_point() or not prune.selector.positions_are_checked:
        return answer
    return _checked(answer, prune, tokens)


def _refuse(prune: Prune, got: str, batch: int, tokens: int, count: int) -> None:
    raise ValueError(
        f"selector {prune.selector.name!r} returned {got}; allowed: a tensor, either floating scores "
        f"[{batch}, {tokens}] or torch.int64 positions [{batch}, {count}]"
    )


def _checked(answer: Tensor, prune: Prune, tokens: int) -> Tensor:
    """`answer`, with a check in the graph that its values are positions, each of them once."""
    inside = answer.clamp(min=0, max=tokens - 1)
    seen = torch.zeros((answer.shape[0], tokens), dtype=torch.bool, device=answer.device)
    right = (inside == answer).all() & (seen.scatter(1, inside, True).sum(1) == answer.shape[1]).all()
    text = f"selector {prune.selector.name!r} returned positions that repeat or are not in 0 .. {tokens - 1}"
    torch.ops.aten._assert_async.msg(right, text)
    return inside
