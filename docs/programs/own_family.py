"""A family whose features enter its forward by an argument of another name."""

import inspect
import sys

import torch
from shipped import shipped
from transformers import LlavaForConditionalGeneration

import luvc_fx
from luvc_fx.generate import families
from luvc_fx.generate.encoder_outputs import encoder_output

INNER = sys.argv[1] if len(sys.argv) > 1 else "inductor"


class Port(LlavaForConditionalGeneration):
    """A LLaVA as somebody ported it: the forward takes encoded images as `image_embeds`."""

    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        image_embeds=None,
        **kwargs,
    ):
        outputs = None if image_embeds is None else {"image": encoder_output(image_embeds)}
        return super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=outputs,
            **kwargs,
        )


# the family


def as_embeds(kwargs, modality, output):
    """Features go in as `image_embeds`."""
    return {**kwargs, "image_embeds": output.pooler_output}


class PortFamily(families.Family):
    @classmethod
    def recognises(cls, model):
        return "image_embeds" in inspect.signature(model.forward).parameters

    def feature_entry(self):
        return as_embeds


families.FAMILIES = (PortFamily, *families.FAMILIES)
# end of the family

model, inputs = shipped()
with torch.no_grad(), luvc_fx.applied(model, "image", inner=INNER, strict=True):
    wanted = model.generate(**inputs, max_new_tokens=3, do_sample=False)

model.__class__ = Port
luvc_fx.compile(model, "image", inner=INNER, strict=True)
with torch.no_grad():
    answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)
assert torch.equal(answer, wanted)
for graph in luvc_fx.report_of(model).graphs[:2]:
    assert graph.rewritten, graph
