"""Where things lie in the checkout, for every program of this package."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The root of the checkout, in which programs are started."""

TRAINED = ROOT / "examples" / "research" / "models"
"""Trained models, one folder each, beside the one that luvc_fx ships."""

RUNS = ROOT / "runs"
"""What programs keep between calls; git ignores it."""
