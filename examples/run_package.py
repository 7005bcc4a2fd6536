"""Run a package that `export_package.py` made: torch is all that is needed.

python examples/run_package.py vlm.pt2 inputs.pt [outputs.pt]
"""

import sys

import torch

path, inputs = sys.argv[1], torch.load(sys.argv[2])
# the package
package = torch._inductor.aoti_load_package(path)
outputs = package(**inputs)
# end of the package
assert "luvc_fx" not in sys.modules and "transformers" not in sys.modules

print("next token:", outputs["logits"][:, -1].argmax(-1).tolist())
print("rows kept of the prompt:", outputs["row_index"].tolist())
print("rows in the cache of each layer:", [keys.shape[2] for keys in outputs["keys"]])
if len(sys.argv) > 3:
    torch.save(outputs, sys.argv[3])
