"""Processors of models that also take videos, where torchvision, which reads those, is not installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

VIDEO = "video_processor"


def load_images_only(directory: Path, **options: Any) -> Any:
    """The processor in `directory` without its part for videos; all else is the stock class.

    Args:
        options: of `from_pretrained`.

    Raises:
        ValueError: no processor class that transformers has and that takes videos is named there.
        Exception: as `AutoProcessor.from_pretrained` does, where it is not the part for videos that fails.
    """
    import transformers
    from transformers import ProcessorMixin

    written, _ = ProcessorMixin.get_processor_dict(directory, **options)
    kind = getattr(transformers, str(written.get("processor_class")), None)
    if kind is None or VIDEO not in kind.get_attributes():
        raise ValueError(
            f"processor_class is {written.get('processor_class')!r}; allowed: one for videos, too"
        )
    return images_only(kind).from_pretrained(directory, **options)


def images_only(kind: Any) -> Any:
    """`kind`, a class of processors, without the part for videos."""
    parts = [name for name in kind.get_attributes() if name != VIDEO]
    # The same name, as a saved processor names its class.
    return type(kind.__name__, (kind,), {"get_attributes": staticmethod(lambda: list(parts)), VIDEO: None})
