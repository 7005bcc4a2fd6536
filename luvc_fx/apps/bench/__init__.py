"""`luvc-fx bench`: time a schedule on models of real size, compiled against compiled."""

from luvc_fx.apps.bench.result import BenchResult, StageTiming
from luvc_fx.apps.bench.run import Options, run
from luvc_fx.apps.bench.shapes import SHAPES

__all__ = ["SHAPES", "BenchResult", "Options", "StageTiming", "run"]
