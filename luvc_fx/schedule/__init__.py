"""What to do at which site, as data: schedules, presets, budgets."""

from luvc_fx.mergers import FEATURES, MERGERS
from luvc_fx.ops.lowpass import REALIZATIONS
from luvc_fx.ops.oim import AXES, PAIRINGS
from luvc_fx.ops.rounding import round_half_up
from luvc_fx.ops.spu import ENERGIES, NORMALIZATIONS
from luvc_fx.schedule.merge import Merge
from luvc_fx.schedule.prune import COVERAGES, Prune
from luvc_fx.schedule.schedule import JSON_VERSION, KINDS, Schedule

METHODS = MERGERS.names()
"""The names of the mergers."""

__all__ = [
    "AXES",
    "COVERAGES",
    "ENERGIES",
    "FEATURES",
    "JSON_VERSION",
    "KINDS",
    "METHODS",
    "NORMALIZATIONS",
    "PAIRINGS",
    "REALIZATIONS",
    "Merge",
    "Prune",
    "Schedule",
    "round_half_up",
]
