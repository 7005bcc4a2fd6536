"""Find a schedule for a model on samples of one's own."""

from luvc_fx.apps.tuning.search import Trial, Tuned, tune

__all__ = ["Trial", "Tuned", "tune"]
