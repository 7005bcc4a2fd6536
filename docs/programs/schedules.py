"""A schedule is data."""

# a schedule
from luvc_fx import Merge, Prune, Schedule

schedule = Schedule(
    # behind half of the encoder blocks
    merge=(Merge(axis="width", keep=0.75, depth=0.5),),
    # before decoder layer 6, and before the last one
    prune=(Prune(keep=0.5, layer=6), Prune(keep=0.0, layer=-1)),
)
# end of a schedule

# as JSON
text = schedule.to_json()
assert Schedule.from_json(text) == schedule
# end of as JSON

# at a budget
layers = 28  # model.config.get_text_config().num_hidden_layers
half = Schedule.at_budget(0.5, layers)
print([(prune.layer, prune.keep) for prune in half.prune])
# end of at a budget
