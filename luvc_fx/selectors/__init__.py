"""Which visual tokens a prune keeps: one function a file, all with one signature."""

from __future__ import annotations

from luvc_fx.registry import Selector, Site, register, registered, selector, wants_attention, wants_keys
from luvc_fx.selectors.choose import choose, choose_mask
from luvc_fx.selectors.distinct import select_distinct
from luvc_fx.selectors.diversity import select_diversity
from luvc_fx.selectors.fastv import select_fastv
from luvc_fx.selectors.norm import select_norm
from luvc_fx.selectors.pact import select_pact
from luvc_fx.selectors.random import select_random
from luvc_fx.selectors.random_block import select_random_block
from luvc_fx.selectors.spectrum import select_spectrum
from luvc_fx.selectors.uniform import select_uniform

register("spectrum", select_spectrum)
register("random", select_random)
register("random-block", select_random_block)
register("uniform", select_uniform)
register("norm", select_norm)
register("fastv", select_fastv, attention=True)
register("diversity", select_diversity)
register("distinct", select_distinct)
register("pact", select_pact, keys=True)

__all__ = [
    "Selector",
    "Site",
    "choose",
    "choose_mask",
    "register",
    "registered",
    "select_distinct",
    "select_diversity",
    "select_fastv",
    "select_norm",
    "select_pact",
    "select_random",
    "select_random_block",
    "select_spectrum",
    "select_uniform",
    "selector",
    "wants_attention",
    "wants_keys",
]
