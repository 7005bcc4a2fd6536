"""Pure tensor functions of the method: static shapes, no host sync, traceable by `make_fx`.

They use `narrow`, `logical_not` and `clone` where slices, ``~`` and `contiguous` would be shorter:
those ask for a CUDA device even on fake tensors, and without them a CPU build of torch traces the
CUDA graph.
"""

from luvc_fx.ops.absorb import absorb
from luvc_fx.ops.compact import compact, drop_tokens, gather_rows, mask_to_index
from luvc_fx.ops.lowpass import lowpass
from luvc_fx.ops.oim import orthogonal_merge
from luvc_fx.ops.placeholders import surviving_rows
from luvc_fx.ops.select import keep_blocks, keep_global, select_blocks, select_global
from luvc_fx.ops.spu import spectral_energy
from luvc_fx.ops.tome import sequence_merge

__all__ = [
    "absorb",
    "compact",
    "drop_tokens",
    "gather_rows",
    "keep_blocks",
    "keep_global",
    "lowpass",
    "mask_to_index",
    "orthogonal_merge",
    "select_blocks",
    "select_global",
    "sequence_merge",
    "spectral_energy",
    "surviving_rows",
]
