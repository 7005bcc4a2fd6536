"""A picture of the visual tokens that stay, stage by stage: the one of the documentation."""

import sys
from pathlib import Path

from PIL import Image, ImageChops
from shipped import shipped

import luvc_fx
from luvc_fx.apps.demo import load_model

path = sys.argv[1]
model, inputs = shipped()
_, processor = load_model()

# the picture
luvc_fx.picture(model, inputs, "image", processor=processor, path=path)
# end of the picture

drawn, shown = (Image.open(file) for file in (path, Path(__file__).parents[1] / "images" / "kept.png"))
assert drawn.size == shown.size
different = ImageChops.difference(drawn.convert("RGB"), shown.convert("RGB")).convert("L")
assert different.point(lambda level: level > 8).getbbox() is None, "docs/images/kept.png is another picture"
