"""Shortening the token axis by a mask whose number of kept entries is known beforehand."""

from __future__ import annotations

import torch
from torch import Tensor


def mask_to_index(mask: Tensor, count: int | torch.SymInt) -> Tensor:
    """The positions of the True entries of each row, ascending.

    A row with more than `count` of them yields the first `count`; one with fewer has unspecified
    entries at the end, which are in range all the same.

    Args:
        mask: bool ``[B, S]``; S may be symbolic.
        count: the static length of the result, in 0 .. S.

    Returns:
        int64 ``[B, count]``.

    Raises:
        ValueError: `count` is not in 0 .. S, where both are known.
    """
    length = mask.shape[1]
    # A symbolic size must not be compared here: that would put a guard on it.
    if isinstance(count, int) and count < 0:
        raise ValueError(f"count is {count!r}; allowed: at least 0")
    if isinstance(count, int) and isinstance(length, int) and count > length:
        raise ValueError(f"count is {count!r}; allowed: at most {length}, the length of the mask")
    if mask.device.type == "cpu":
        return index_by_scattering(mask, count)
    return index_by_counting(mask, count)


def index_by_scattering(mask: Tensor, count: int | torch.SymInt) -> Tensor:
    """`mask_to_index` for the CPU: linear in the row."""
    batch, length = mask.shape
    order = mask.cumsum(1, dtype=torch.int32) - 1
    # One spare column takes what is not kept, so that every write has a place.
    target = torch.where(mask & (order < count), order, count).to(torch.int64)  # type: ignore[arg-type]
    place = torch.arange(length, device=mask.device, dtype=torch.int32).expand(batch, length)
    spare = torch.zeros((batch, count + 1), device=mask.device, dtype=torch.int32)
    return spare.scatter(1, target, place).narrow(1, 0, count).to(torch.int64)


def index_by_counting(mask: Tensor, count: int | torch.SymInt) -> Tensor:
    """`mask_to_index` for accelerators: a cumulative sum and a reduction, and no buffer of zeros."""
    passed = mask.cumsum(1, dtype=torch.int32)
    wanted = torch.arange(count, device=mask.device)  # type: ignore[arg-type]
    found = (passed.unsqueeze(1) <= wanted.unsqueeze(-1)).sum(-1)
    return found.clamp(max=mask.shape[1] - 1)


def drop_tokens(
    places: Tensor, keep: Tensor, ahead: Tensor, length: int | torch.SymInt, rows: int | torch.SymInt
) -> Tensor:
    """Which rows of a sequence are left when some of the tokens in it go.

    Args:
        places: int64 ``[B, N]``, ascending: the rows of the sequence where the tokens are.
        keep: bool ``[B, N]``, the tokens that stay; as many in each row.
        ahead: int64 ``[B, N]``, how many of the tokens before each one stay.
        length: rows of the sequence; may be symbolic, as `rows`.
        rows: of the sequence that is left: `length` less the tokens that go.

    Returns:
        int64 ``[B, rows]``, ascending.

    >>> places, keep = torch.tensor([[1, 2, 4]]), torch.tensor([[False, True, False]])
    >>> drop_tokens(places, keep, torch.tensor([[0, 0, 1]]), 5, 3)
    tensor([[0, 2, 3]])
    """
    if places.device.type == "cpu":
        stays = torch.ones((places.shape[0], length), dtype=torch.bool)
        return mask_to_index(stays.scatter(1, places, keep), rows)
    return drop_by_counting(places, keep, ahead, rows)


def drop_by_counting(places: Tensor, keep: Tensor, ahead: Tensor, rows: int | torch.SymInt) -> Tensor:
    """`drop_tokens` for accelerators: each new row is its own number plus the dropped tokens before it."""
    before = torch.arange(places.shape[1], device=places.device) - ahead
    gap = (places - before).unsqueeze(1)
    row = torch.arange(rows, device=places.device)  # type: ignore[arg-type]
    passed = keep.logical_not().unsqueeze(1) & (gap <= row.unsqueeze(-1))
    return row + passed.sum(-1)


def gather_rows(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """Pick tokens by position, each batch row its own.

    Args:
        x: ``[B or 1, ...]`` with the tokens on axis `dim`, any dtype; or ``[S]`` with `dim` 0,
            which is shared by the rows.
        index: int64 ``[B, S']``, positions on that axis.
        dim: the token axis, at least 1 (0 for a rank of 1).

    Returns:
        `x` with S' tokens on axis `dim` and B on axis 0; ``[B, S']`` for an `x` of rank 1.

    Raises:
        ValueError: `dim` is no token axis of `x`.
    """
    lowest = 0 if x.dim() == 1 else 1
    if not lowest <= dim < max(x.dim(), 1) or x.dim() == 0:
        raise ValueError(f"dim is {dim!r}; allowed: {lowest} to {x.dim() - 1} for rank {x.dim()}")
    if x.dim() == 1:
        x, dim = x.unsqueeze(0), 1
    batch, picked = index.shape
    sizes = [batch, *x.shape[1:]]
    line = [1] * x.dim()
    line[0], line[dim] = batch, picked
    out = [*sizes[:dim], picked, *sizes[dim + 1 :]]
    return x.expand(sizes).gather(dim, index.reshape(line).expand(out))


def compact(x: Tensor, mask: Tensor, count: int | torch.SymInt) -> Tensor:
    """Keep the tokens that `mask` marks, in order, without a shape that depends on data.

    Args:
        x: ``[B or 1, S, ...]``, any dtype.
        mask: bool ``[B, S]`` with `count` True entries in each row (see `mask_to_index` otherwise).
        count: the static number of tokens kept.

    Returns:
        ``[B, count, ...]``.

    Raises:
        ValueError: `count` is not in 0 .. S, where both are known, or `x` has no axis 1.

    >>> x = torch.tensor([[10, 11, 12, 13]])
    >>> compact(x, torch.tensor([[True, False, False, True]]), 2)
    tensor([[10, 13]])
    """
    return gather_rows(x, mask_to_index(mask, count), 1)
