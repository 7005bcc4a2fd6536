"""Assert that packed training equals the stock single-conversation forward, pixels included."""

from __future__ import annotations

import numpy as np
import torch
from model import build_model, build_processor, image_features
from packing import CONVERSATION_TURNS, converse, pack
from PIL import Image
from scenes import Question, sample
from train import read
from transformers import BatchFeature


def stock_inputs(image: Image.Image, conversation: list[Question]) -> BatchFeature:
    """What a user sends for this conversation, answers included: processor and chat template."""
    messages = []
    for turn, question in enumerate(conversation):
        text = {"type": "text", "text": question.text}
        content = [text] if turn else [{"type": "image"}, text]
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": question.answer})
    prompt = build_processor().apply_chat_template(messages)
    return build_processor()(images=image, text=prompt, return_tensors="pt")


@torch.no_grad()
def main() -> None:
    """Compare the answer logits of every conversation of a few packed scenes."""
    torch.manual_seed(0)
    model = build_model().eval()
    scenes = [sample("train", i) for i in range(4)]
    batch = pack(scenes, np.random.default_rng(3))
    packed, _ = read(model, batch, image_features(model, batch.pixels))
    rows = torch.nonzero(batch.targets >= 0)[:, 0]
    rng = np.random.default_rng(3)
    for b, scene in enumerate(scenes):
        mine, at = packed[rows == b], 0
        for conversation in converse(scene.questions, rng, CONVERSATION_TURNS):
            inputs = stock_inputs(scene.image, conversation)
            assert torch.equal(inputs["pixel_values"][0], batch.pixels[b])
            logits = model(**inputs).logits[0]
            ends = torch.nonzero(inputs["input_ids"][0] == model.config.text_config.eos_token_id)
            places = torch.cat([ends - 2, ends - 1], 1).flatten()  # before the answer, before eos
            if at + len(places) > len(mine):
                break  # this conversation did not fit into the packed row
            torch.testing.assert_close(mine[at : at + len(places)], logits[places])
            at += len(places)
        assert at == len(mine)
    print("packed logits equal the stock forward")


if __name__ == "__main__":
    main()
