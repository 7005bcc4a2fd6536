"""A prepare step of your own on a captured graph: a product with one is the other factor."""

import torch
from torch import fx

from luvc_fx import Prune, Schedule
from luvc_fx.graph.nodes import op_name


# the step
def drop_ones(graph, schedule):
    """Take products with the number one out, as some ports of models have them.

    A product::

        %y = mul(%x, 1.0)
        %z = relu(%y)

    goes::

        %z = relu(%x)
    """
    found = [n for n in graph.nodes if op_name(n) == "mul" and n.args[1:] in ((1,), (1.0,))]

    def edit():
        for node in found:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)

    return edit if found else None


# end of the step


def model(x):
    return torch.relu(x * 1.0) + x


captured = fx.symbolic_trace(model)
x = torch.randn(4)
wanted = captured(x)
schedule = Schedule(prune=Prune(keep=0.5, layer=1))

# the check
edit = drop_ones(captured.graph, schedule)
assert edit is not None
edit()
captured.graph.lint()
captured.recompile()
assert torch.equal(captured(x), wanted)
assert drop_ones(captured.graph, schedule) is None  # nothing is left to do
# end of the check
