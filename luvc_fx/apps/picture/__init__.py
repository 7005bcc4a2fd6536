"""Draw which visual tokens a schedule keeps of a prompt."""

from luvc_fx.apps.picture.kept_tokens import picture

__all__ = ["picture"]
