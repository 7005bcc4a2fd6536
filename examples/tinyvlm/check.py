"""Assert that packed training equals the stock one-conversation forward, in every family.

For the LLaVA the stock side starts from the processor and the chat template, pixels included; for the
others from ids and pixels, so that the models find positions and visual tokens by themselves.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from families import Family, family
from model import EOS, build_processor
from packing import CONVERSATION_TURNS, converse, pack, tokens
from qwen2_vl import patches
from scenes import Question, Scene, sample
from torch import nn
from train import read, visual
from videos import Video, film


def llava_inputs(scene: Scene, conversation: list[Question]) -> dict[str, Any]:
    """What a user sends for this conversation, answers included: processor and chat template."""
    messages = []
    for turn, question in enumerate(conversation):
        text = {"type": "text", "text": question.text}
        content = [text] if turn else [{"type": "image"}, text]
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": question.answer})
    prompt = build_processor().apply_chat_template(messages)
    return build_processor()(images=scene.image, text=prompt, return_tensors="pt")


def plain_inputs(
    kind: Family, pixels: torch.Tensor, frames: int, conversation: list[Question]
) -> dict[str, Any]:
    """The same without a processor: `pixels` are those of the scene's frames."""
    layout = kind.layout(frames, kind.grid())
    ids = torch.tensor([layout.ids + tokens(conversation)[0]])
    if kind.name == "internvl":
        return {"input_ids": ids, "pixel_values": pixels}
    side = pixels.shape[-1] // 8
    return {
        "input_ids": ids,
        "pixel_values": patches(pixels),
        "image_grid_thw": torch.tensor([[1, side, side]] * frames),
        "mm_token_type_ids": (ids == 3).long(),
    }


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
            own = batch.pixels[b * frames : (b + 1) * frames]
            if kind.name == "llava":
                inputs = llava_inputs(scene, conversation)
                assert torch.equal(inputs["pixel_values"], own)
            else:
                inputs = plain_inputs(kind, own, frames, conversation)
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
    for name in ("llava", "internvl", "qwen2_vl"):
        torch.manual_seed(0)
        kind = family(name)
        model = kind.build().eval()
        check(kind, model, [sample("train", i, scene) for i, scene in enumerate(kind.kinds)])
        if name == "internvl":
            check(kind, model, [film("train", 0, 4), film("train", 1, 4)])


if __name__ == "__main__":
    main()
