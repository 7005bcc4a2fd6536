"""`luvc-fx bench`: compiled against compiled, on real shapes with random weights, or no number at all."""

from luvc_fx.apps.bench.result import Result, Row
from luvc_fx.apps.bench.run import Options, run
from luvc_fx.apps.bench.shapes import SHAPES

__all__ = ["SHAPES", "Options", "Result", "Row", "run"]
