"""One prompt with images, made by a model's own processor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from luvc_fx.generate.rgb import to_rgb
from luvc_fx.methods.checks import shown
from luvc_fx.report.errors import InputError, cannot

if TYPE_CHECKING:
    from PIL.Image import Image


def make_prompt(model: Any, processor: Any, images: Sequence[Image], text: str) -> dict[str, Any]:
    """One user's turn, images first: by the chat template, or image tokens and the text without one.

    Args:
        images: of any mode and orientation; `to_rgb` is what the processor gets.

    Raises:
        InputError: a text that the prompt cannot hold, or a processor that cannot make the prompt.
    """
    token = image_token(model, processor)
    if not isinstance(text, str):
        raise InputError(f"the prompt is {shown(text)}; allowed: a text")
    if not text.strip():
        raise InputError("the prompt is empty")
    if token in text:
        raise InputError(f"the prompt must not contain {token!r}: images are put in front of it")
    images = [to_rgb(image) for image in images]
    try:
        if getattr(processor, "chat_template", None):
            content = [{"type": "image", "image": image} for image in images]
            turn = {"role": "user", "content": [*content, {"type": "text", "text": text}]}
            inputs = processor.apply_chat_template(
                [turn], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        else:
            prompt = "\n".join([*[token] * len(images), text])
            inputs = processor(images=images, text=prompt, return_tensors="pt")
    except Exception as error:
        raise cannot(f"{type(processor).__name__} cannot make the prompt", error) from error
    if not (inputs["input_ids"] == model.config.image_token_id).any():
        raise InputError(f"the prompt of {type(processor).__name__} holds no visual token ({token!r})")
    return dict(inputs.to(model.device, model.dtype))


def image_token(model: Any, processor: Any) -> str:
    """The text that stands for an image in a prompt."""
    token = getattr(processor, "image_token", None)
    if token is None and not hasattr(processor, "tokenizer"):
        raise InputError(f"processor is {shown(processor)}; allowed: a processor of transformers")
    if token is None:
        token = processor.tokenizer.convert_ids_to_tokens(model.config.image_token_id)
    return str(token)
