"""A merger of your own: neighbours are averaged at even distances, whatever they show."""

import sys
from dataclasses import dataclass

import torch
from shipped import shipped

import luvc_fx
from luvc_fx import Merge, Schedule
from luvc_fx.mergers import MERGERS, Merger


# the merger
@dataclass(frozen=True, slots=True)
class Pool(Merger):
    """Average neighbours along the axis, at even distances."""

    name = "pool"

    def merge(self, tokens, sizes, representatives, shortening, feature):
        if shortening.runs is not None:
            raise ValueError("pool cannot tell the picture from its padding")
        axis = 2 if shortening.axis == "width" else 1
        length = tokens.shape[axis]
        left = length * shortening.after // shortening.before
        group = torch.arange(length, device=tokens.device) * left // length
        first = -(-torch.arange(left, device=tokens.device) * length // left)  # of each group

        def total(x):
            shape = [*x.shape[:axis], left, *x.shape[axis + 1 :]]
            return x.new_zeros(shape).index_add(axis, group, x)

        mass = total(tokens.float() * sizes.unsqueeze(-1))
        sizes = total(sizes)
        merged = (mass / sizes.unsqueeze(-1)).to(tokens.dtype)
        return merged, sizes, representatives.index_select(axis, first)


MERGERS.put(Pool())
schedule = Schedule(merge=Merge("width", keep=0.75, depth=0.5, method="pool"))
# end of the merger

inner = sys.argv[1] if len(sys.argv) > 1 else "inductor"
model, inputs = shipped()
luvc_fx.compile(model, schedule, inner=inner, strict=True)
with torch.no_grad():
    rows = model(**inputs).row_index
(vision,) = luvc_fx.report_of(model).of_kind("vision")
print(vision)
assert rows.shape[1] == inputs["input_ids"].shape[1] - 16 * 4  # a quarter of a grid of 16 x 16
