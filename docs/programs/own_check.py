"""A pass of your own: the image features that enter the text must be finite numbers."""

import sys

import torch
from shipped import shipped

import luvc_fx
from luvc_fx import passes
from luvc_fx.dynamo import rewrite
from luvc_fx.graph.emit import emit


# the pass
def check_features(context):
    """Check, while the graph runs, that no feature is infinite or NaN.

    A fusion::

        %fused : [1, 21, 8] = masked_scatter(%embeds, %mask, %features)

    gets a check of what it takes::

        _assert_async(all(isfinite(%features)), "the image features are not finite")
        %fused : [1, 21, 8] = masked_scatter(%embeds, %mask, %features)
    """
    decoder = context.anatomy.decoder
    if decoder is None:
        return

    def body(features):
        finite = features.isfinite().all()
        torch.ops.aten._assert_async.msg(finite, "the image features are not finite")
        return ()

    for features in decoder.features:
        emit(context.graph, "check features", body, features)


# end of the pass

# In luvc_fx it would stand in the tuple of passes/__init__.py.
rewrite.PASSES = (*passes.PASSES, check_features)

inner = sys.argv[1] if len(sys.argv) > 1 else "inductor"
model, inputs = shipped()
luvc_fx.compile(model, "image", inner=inner, strict=True)
with torch.no_grad():
    model(**inputs)
    broken = {**inputs, "pixel_values": torch.full_like(inputs["pixel_values"], torch.nan)}
    try:
        model(**broken)
    except RuntimeError as error:
        print(error)
    else:
        raise AssertionError("the check let it through")
