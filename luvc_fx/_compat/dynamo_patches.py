"""What Dynamo of torch 2.11 and 2.12 is taught so that it traces transformers as 2.13 does."""

from __future__ import annotations

import operator
from typing import Any

import torch


def install() -> None:
    """Teach this process's Dynamo; on torch 2.13 and newer nothing changes. Doing it again does nothing."""
    _trace_tensor_checks()
    _trace_whether_exporting()


def _trace_tensor_checks() -> None:
    """Let Dynamo up to 2.12 trace `torch._check_tensor_all`, which transformers calls, as 2.13 does.

    There it is one call in the graph, whose fake run makes a symbol that nothing returns: with
    `capture_scalar_outputs` every model of transformers is an error.
    """
    from torch._dynamo.variables import BuiltinVariable, ConstantVariable  # 2.11 - 2.15
    from torch._dynamo.variables.torch import TorchInGraphFunctionVariable  # 2.11 - 2.15

    handlers = TorchInGraphFunctionVariable._get_handlers()
    if torch._check_tensor_all in handlers:
        return

    def check(self: Any, tx: Any, cond: Any, *message: Any) -> Any:
        # Of a bool the check itself would say that it is 1, and AOTAutograd would then drop the check.
        seen = cond.call_method(tx, "_is_all_true", [], {}).call_method(tx, "long", [], {})
        number = seen.call_method(tx, "item", [], {})
        holds = BuiltinVariable(operator.ge).call_function(tx, [number, ConstantVariable.create(1)], {})
        return TorchInGraphFunctionVariable(torch._check).call_function(tx, [holds, *message], {})

    handlers[torch._check_tensor_all] = check


def _trace_whether_exporting() -> None:
    """Let Dynamo of 2.11 know that it compiles and does not export, as 2.12 and 2.13 do.

    It takes `torch.compiler.is_exporting()` for true, and transformers (5.23) then makes a mask for each
    prompt, even for one that has none: attention that is causal by itself reads it, and flash kernels
    take none.
    """
    if not torch.__version__.startswith("2.11."):
        return
    from torch._dynamo.variables import ConstantVariable
    from torch._dynamo.variables.torch import TorchInGraphFunctionVariable

    def exporting(self: Any, tx: Any) -> Any:
        tx.mark_inconsistent_side_effects()
        return ConstantVariable.create(torch.compiler._is_exporting_flag)

    TorchInGraphFunctionVariable._get_handlers()[torch.compiler.is_exporting] = exporting
