"""Accuracy against budget, for any set of methods on a local model and a local set of questions."""

from luvc_fx.apps.evaluation.methods import Method, methods
from luvc_fx.apps.evaluation.options import BUDGETS, Options
from luvc_fx.apps.evaluation.questions import Question, read_questions
from luvc_fx.apps.evaluation.result import EvalResult
from luvc_fx.apps.evaluation.run import run

__all__ = ["BUDGETS", "EvalResult", "Method", "Options", "Question", "methods", "read_questions", "run"]
