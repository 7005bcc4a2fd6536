"""One model over several processes by the tensor-parallel plan of transformers, with a token budget.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py \\
        [MODEL_DIR INPUTS.pt [OUTPUTS.pt [SCHEDULE [INNER]]]]

SCHEDULE is a preset or a JSON file; INPUTS.pt a prompt saved by `torch.save`. Without arguments the model
that luvc_fx ships is asked about its image.
Each process holds a share of the decoder's weights and picks, from the same numbers, the same tokens.
Run without torchrun it is one process with the whole model.
"""

import os
import sys

import torch
from transformers import AutoModelForImageTextToText
from transformers.distributed.configuration_utils import DistributedConfig

import luvc_fx
from luvc_fx import Schedule
from luvc_fx.apps.demo import MODEL_DIR, ask, load_model


def main(model_dir, inputs_path=None, outputs_path=None, schedule="image", inner="inductor", new_tokens=8):
    """Compile, run one forward and one generate, and write what this process got."""
    if schedule.endswith(".json"):
        schedule = Schedule.load(schedule)
    # the plan
    config = DistributedConfig(tp_plan="auto") if "RANK" in os.environ else None  # torchrun sets RANK
    model = AutoModelForImageTextToText.from_pretrained(model_dir, distributed_config=config).eval()
    luvc_fx.compile(model, schedule, inner=inner)
    # end of the plan
    inputs = torch.load(inputs_path) if inputs_path else shipped_prompt(model)
    with torch.no_grad():
        out = model(**inputs)
        tokens = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    report = luvc_fx.report_of(model)
    rank = int(os.environ.get("RANK", 0))
    print(
        f"process {rank}: {out.row_index.shape[1]} rows of the prompt left, answer {tokens[0].tolist()[-4:]}"
    )
    if rank == 0:
        print(report)
    if outputs_path:
        found = {"logits": out.logits, "row_index": out.row_index, "tokens": tokens}
        cache = out.cache if hasattr(out, "cache") else out.past_key_values  # before transformers 5.24
        found["heads"] = [layer.keys.shape[1] for layer in cache.layers]
        torch.save({**found, "report": report.to_json()}, outputs_path.format(rank=rank))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def shipped_prompt(model):
    """The first question about the image that luvc_fx ships."""
    question, processor = ask(), load_model()[1]
    content = [{"type": "image", "image": question.image}, {"type": "text", "text": question.text}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device, model.dtype)


if __name__ == "__main__":
    main(*(sys.argv[1:] or [MODEL_DIR]))
