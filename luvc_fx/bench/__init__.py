"""`luvc-fx bench`: compiled against compiled, on real shapes with random weights, or no number at all."""

from luvc_fx.bench.result import Result, Row
from luvc_fx.bench.run import Options, run
from luvc_fx.bench.shapes import SHAPES

__all__ = ["SHAPES", "Options", "Result", "Row", "run"]
