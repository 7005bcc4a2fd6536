"""The entry point `lmms_eval.models`: light, as the harness loads it whatever model it runs."""

from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """Tells the harness where the model `luvc_hf` is."""
    return ModelManifest(model_id="luvc_hf", chat_class_path="luvc_hf.LuvcHf")
