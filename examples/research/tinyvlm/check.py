"""Assert that packed training equals the stock one-conversation forward, in every family, pixels included.

python -m examples.research.tinyvlm.check
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from torch import nn

from examples.research.tinyvlm.families import Family, family
from examples.research.tinyvlm.family_qwen2_vl import patches
from examples.research.tinyvlm.model import EOS
from examples.research.tinyvlm.packing import CONVERSATION_TURNS, converse, pack, tokens
from examples.research.tinyvlm.scenes import Question, Scene, sample
from examples.research.tinyvlm.train import read, visual
from examples.research.tinyvlm.videos import Video, film


def stock_inputs(kind: Family, scene: Scene | Video, conversation: list[Question]) -> Any:
    """What a user sends for this conversation, answers included: processor and chat template."""
    messages = []
    images = [image for image, _ in scene.frames]
    for turn, question in enumerate(conversation):
        text = {"type": "text", "text": question.text}
        content = [text] if turn else [*[{"type": "image"}] * len(images), text]
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": question.answer})
    processor = kind.processor()
    prompt = processor.apply_chat_template(messages)
    return processor(images=images, text=[prompt], return_tensors="pt")


@torch.no_grad()
def check(kind: Family, model: nn.Module, scenes: list[Scene] | list[Video]) -> None:
    """Compare the answer logits of every conversation of a few packed scenes."""
    frames = len(scenes[0].frames)
    batch = pack(scenes, np.random.default_rng(3), kind.side, kind=kind)
    packed, _ = read(model, batch, visual(model, kind, batch))
    rows = torch.nonzero(batch.targets >= 0)[:, 0]
    rng = np.random.default_rng(3)
    for b, scene in enumerate(scenes):
        mine, at = packed[rows == b], 0
        for conversation in converse(scene.questions, rng, CONVERSATION_TURNS):
            inputs = stock_inputs(kind, scene, conversation)
            own = batch.pixels[b * frames : (b + 1) * frames]
            assert torch.equal(inputs["pixel_values"], patches(own) if kind.name == "qwen2_vl" else own)
            logits = model(**inputs).logits[0]
            ids, targets, _ = tokens(conversation)
            assert ids[-1] == EOS
            places = [len(logits) - len(ids) + i for i, target in enumerate(targets) if target >= 0]
            if at + len(places) > len(mine):
                break  # this conversation did not fit into the packed row
            torch.testing.assert_close(mine[at : at + len(places)], logits[places], rtol=1e-4, atol=1e-4)
            at += len(places)
        assert at == len(mine)
    print(f"{kind.name}, {frames} frames: packed logits equal the stock forward")


def main() -> None:
    """Every family on images, InternVL on a video, too."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    for name in ("llava", "internvl", "qwen2_vl"):
        torch.manual_seed(0)
        kind = family(name)
        model = kind.build().eval()
        check(kind, model, [sample("train", i, scene) for i, scene in enumerate(kind.kinds)])
        if name == "internvl":
            check(kind, model, [film("train", 0, 4), film("train", 1, 4)])


if __name__ == "__main__":
    main()
