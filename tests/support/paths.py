"""Where things lie in a checkout."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The checkout."""

EXAMPLES = ROOT / "examples"
RESEARCH = EXAMPLES / "research"

DEMO_MODEL = ROOT / "luvc_fx" / "apps" / "demo_model"
"""The model that luvc_fx ships."""
