"""Make everything behind the last site right for its token counts."""

from __future__ import annotations

from luvc_fx.passes.support.context import Context


def retarget(context: Context) -> None:
    """Bring the graph up to date from where the other passes left off to its end.

    Each site brings the graph up to date as far as itself; behind the last one literal sizes still hold
    the old count, and fake values the old shapes. After pruning 24 rows to 16::

        %short : [1, 16, 64] = gather(%hidden, 1, %rows)
        %heads : [1, 24, 4, 16] = view(%short, 1, 24, 4, 16)

    becomes::

        %short : [1, 16, 64] = gather(%hidden, 1, %rows)
        %heads : [1, 16, 4, 16] = view(%short, (1, 16, 4, 16))
    """
    context.retarget.advance()
