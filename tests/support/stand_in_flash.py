"""A stand-in for the package flash-attn on the CPU: the same operators, in plain PyTorch.

Names, schemas and what Python does around the operators are those of flash-attn 2.8, as far as
transformers calls it.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import modeling_flash_attention_utils as flash_utils

_LIBRARY = torch.library.Library("flash_attn_tests", "FRAGMENT")
_TAIL = (
    "float dropout_p, float softmax_scale, bool causal, int window_size_left=-1, int window_size_right=-1, "
    "float softcap=0., Tensor? alibi_slopes=None, bool return_softmax=False"
)
_LIBRARY.define(f"_flash_attn_forward(Tensor q, Tensor k, Tensor v, {_TAIL}) -> (Tensor, Tensor)")
_LIBRARY.define(
    "_flash_attn_varlen_forward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    f"SymInt max_seqlen_q, SymInt max_seqlen_k, {_TAIL}) -> (Tensor, Tensor)"
)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    """q ``[rows, heads, dim]``, k and v ``[keys, groups, dim]``; the last query lies beside the last key."""
    share = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(share, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if causal:
        seen = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        scores = scores.masked_fill(~seen, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


def _plain(q: Tensor, k: Tensor, v: Tensor, dropout: float, scale: float, causal: bool, *_: Any) -> Any:
    out = torch.stack([_attend(*row, scale, causal) for row in zip(q, k, v, strict=True)])
    return out, q.new_zeros(1)


def _varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    longest_q: int,
    longest_k: int,
    dropout: float,
    scale: float,
    causal: bool,
    *_: Any,
) -> Any:
    assert cu_q.dtype == cu_k.dtype == torch.int32
    out = torch.full_like(q, torch.nan)
    pairs = zip(itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True)
    for (start, end), (first, last) in pairs:
        assert end - start <= longest_q, "the kernel would leave the rest out"
        assert last - first <= longest_k
        if end > start:
            out[start:end] = _attend(q[start:end], k[first:last], v[first:last], scale, causal)
    return out, q.new_zeros(1)


for _name, _body in {"_flash_attn_forward": _plain, "_flash_attn_varlen_forward": _varlen}.items():
    _LIBRARY.impl(_name, _body, "CompositeExplicitAutograd")
    torch.library.register_fake(
        f"flash_attn_tests::{_name}", lambda q, *_, **__: (torch.empty_like(q), q.new_empty(1)), lib=_LIBRARY
    )


def _padded(*tensors: Tensor) -> list[Tensor]:
    """Heads are a multiple of eight numbers wide."""
    missing = -tensors[0].shape[-1] % 8
    return [pad(x, [0, missing]) if missing else x for x in tensors]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> Tensor:
    width = q.shape[-1]
    scale = width**-0.5 if softmax_scale is None else softmax_scale
    out, _ = torch.ops.flash_attn_tests._flash_attn_forward(
        *_padded(q, k, v), dropout_p, scale, causal=causal, window_size_left=window_size[0], softcap=softcap
    )
    return out[..., :width]


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> Tensor:
    width = q.shape[-1]
    scale = width**-0.5 if softmax_scale is None else softmax_scale
    out, _ = torch.ops.flash_attn_tests._flash_attn_varlen_forward(
        *_padded(q, k, v),
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        scale,
        causal=causal,
        window_size_left=window_size[0],
        softcap=softcap,
    )
    return out[..., :width]


def install(patch: pytest.MonkeyPatch, name: str = "flash_attention_2") -> None:
    """Let transformers find this where it looks for what `name` stands for, and luvc_fx the package."""
    given = {
        "_loaded_implementation": name,
        "_flash_fn": flash_attn_func,
        "_flash_varlen_fn": flash_attn_varlen_func,
        "_flash_with_kvcache_fn": None,
        "_pad_fn": flash_utils._pad_input,
        "_unpad_fn": flash_utils._unpad_input,
        "_process_flash_kwargs_fn": flash_utils._lazy_define_process_function(flash_attn_varlen_func),
        "_process_with_kvcache_kwargs_fn": dict,  # 5.23
        # It casts float32, which flash-attn does not take; here the numbers are compared in it.
        "fa_peft_integration_check": lambda q, k, v, target_dtype=None: (q, k, v),
    }
    for key, value in given.items():
        if hasattr(flash_utils, key):
            patch.setattr(flash_utils, key, value)
    patch.setattr("luvc_fx._compat.transformers._has_flash_attn", lambda: True)
