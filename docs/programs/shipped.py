"""The model that luvc_fx ships, and a prompt about its image: what the other programs begin with."""

from luvc_fx.apps.demo import ask, load_model


def prompt(model, processor, image, text):
    """One user's turn with an image, by the chat template."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device, model.dtype)


def shipped():
    """The model, and the inputs of its first question."""
    model, processor = load_model()
    question = ask()
    return model, dict(prompt(model, processor, question.image, question.text))


if __name__ == "__main__":
    print(shipped()[1]["input_ids"].shape)
