"""Find a schedule for a model on samples of one's own."""

from luvc_fx.tuning.search import Trial, Tuned, tune

__all__ = ["Trial", "Tuned", "tune"]
