"""`transformers serve` with a token budget, and with requests that are checked before they run."""

from luvc_fx.apps.serving.server import REPORT_PATH, serve

__all__ = ["REPORT_PATH", "serve"]
