"""What luvc_fx knows of the insides of transformers, with the versions in which it was seen to work."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch


def install_output_hooks(model: torch.nn.Module) -> int:
    """Install transformers' lazy output-capturing hooks now; returns how many modules were asked.

    Without them the first traced forward of a fresh model meets a lock and falls into pieces
    (transformers 5.17 - 5.24). A model that is not a transformers one has none.
    """
    try:
        from transformers import PreTrainedModel
        from transformers.utils.output_capturing import maybe_install_capturing_hooks
    except ImportError:
        return 0
    asked = 0
    for module in model.modules():
        models = [m for m in module.modules() if isinstance(m, PreTrainedModel)]
        # Installing is recursive and does not look whether a part has its hooks: a second set would
        # collect every hidden state twice. A model with such a part gets its own on demand.
        if isinstance(module, PreTrainedModel) and not any(map(_has_output_hooks, models)):
            maybe_install_capturing_hooks(module)
            asked += 1
    return asked


_INSTALLED = "_output_capturing_hooks_installed"

OutputHooks = frozenset[tuple[str, int | str]]
"""Names of modules, each with the number of a forward hook, or with the mark that it has its output hooks."""


def output_hooks(model: torch.nn.Module) -> OutputHooks:
    """The forward hooks of all modules, and which of them transformers (5.17 - 5.23) has marked."""
    found: set[tuple[str, int | str]] = set()
    for name, module in model.named_modules():
        found.update((name, number) for number in module._forward_hooks)
        if _INSTALLED in vars(module):
            found.add((name, _INSTALLED))
    return frozenset(found)


def remove_output_hooks(model: torch.nn.Module, hooks: OutputHooks) -> None:
    """Take these hooks and marks off; those of modules that are gone are gone with them."""
    modules = dict(model.named_modules())
    for name, hook in hooks:
        if name not in modules:
            continue
        module = modules[name]
        if hook == _INSTALLED and _INSTALLED in vars(module):
            delattr(module, _INSTALLED)
        elif hook != _INSTALLED:
            kinds = (
                module._forward_hooks,
                module._forward_hooks_with_kwargs,
                module._forward_hooks_always_called,
            )
            for kind in kinds:
                kind.pop(hook, None)


def _has_output_hooks(model: torch.nn.Module) -> bool:
    return bool(getattr(model, "_output_capturing_hooks_installed", False))


def is_flash(config: Any) -> bool:
    """Whether a part of a model with this config calls FlashAttention (transformers 5.17 - 5.24)."""
    return "flash" in str(getattr(config, "_attn_implementation", ""))


def attention_name(config: Any) -> str:
    """The `attn_implementation` of a part of a model with this config (transformers 5.17 - 5.24)."""
    return str(config._attn_implementation)


def set_attention(config: Any, name: str) -> None:
    """Let models made of this config attend by that `attn_implementation` (transformers 5.17 - 5.24)."""
    config._attn_implementation = name


def is_dispatched(module: torch.nn.Module) -> bool:
    """Whether accelerate (1.15) moves a module's inputs and weights: it hangs a hook on it."""
    return hasattr(module, "_hf_hook")


def calls_flash_attn(config: Any) -> bool:
    """Whether a decoder with this config calls the package flash-attn 2, as operators that graphs keep.

    Where it is missing, transformers (5.17 - 5.24) takes kernels of the hub; the operators came with 2.7.
    """
    return getattr(config, "_attn_implementation", "") == "flash_attention_2" and _has_flash_attn()


def _has_flash_attn() -> bool:
    from transformers.utils import is_flash_attn_2_available

    if not is_flash_attn_2_available():
        return False
    importlib.import_module("flash_attn")
    return hasattr(torch.ops.flash_attn, "_flash_attn_varlen_forward")


def reads_one_position() -> bool:
    """Whether FlashAttention on one query reads if its position is one of packed rows (5.17, not 5.23).

    In a batch of one row that is a wait for the device in each layer, and the end of a graph.
    """
    from transformers import modeling_flash_attention_utils as utils

    return utils._is_packed_sequence(torch.zeros(1, 1, dtype=torch.int64), 1) is not False


def cache_argument(function: Callable[..., Any]) -> str:
    """The argument for the cache of a forward, or of another function that `generate` calls.

    `past_key_values`; from transformers 5.24 on `cache`, beside which the old name is taken up to 5.40. Where
    ``**kwargs`` takes it, it has the name of the installed version.
    """
    parameters = inspect.signature(function).parameters
    known = [name for name in ("cache", "past_key_values") if name in parameters]
    return known[0] if known else cache_argument_of_generate()


@functools.cache
def cache_argument_of_generate() -> str:
    """The argument of `generate` for the cache, which it passes on to every forward."""
    from transformers import GenerationMixin

    return cache_argument(GenerationMixin.prepare_inputs_for_generation)


def cache_arguments(forward: Callable[..., Any]) -> set[str]:
    """The arguments in which calls of a model's forward, its `generate` and its masks may bring the cache."""
    return {"past_key_values", cache_argument(forward), cache_argument_of_generate()}


def with_past_key_values(kwargs: dict[str, Any], cache_arguments: set[str]) -> dict[str, Any]:
    """Arguments of such a call, with the cache as `past_key_values`, however the call named it.

    In a call with both names `cache` counts, as in transformers (5.24).
    """
    if "cache" not in kwargs or "cache" not in cache_arguments:
        return kwargs
    rest = {name: given for name, given in kwargs.items() if name != "cache"}
    return {**rest, "past_key_values": kwargs["cache"]}


def cache_of(output: Any) -> Any:
    """The cache in an output of a forward or of `generate`, or None: its `past_key_values`, later `cache`."""
    return getattr(output, _cache_field(output), None)


def set_cache(output: Any, cache: Any) -> None:
    """Let `cache` be the one in an output of a forward."""
    setattr(output, _cache_field(output), cache)


def _cache_field(output: Any) -> str:
    return "cache" if hasattr(output, "cache") else "past_key_values"


def merged_generation_config(model: Any, arguments: Mapping[str, Any]) -> Any:
    """The `GenerationConfig` that `generate` runs with, given its arguments by their names.

    Keywords go before the config that is passed, that one before the model's own, and that before defaults;
    what is None in one is taken from the next (transformers 5.17 - 5.24).
    """
    from transformers import GenerationMixin

    own = inspect.signature(GenerationMixin.generate).parameters
    options = {name: given for name, given in arguments.items() if name not in own}
    config, _ = model._prepare_generation_config(arguments.get("generation_config"), **options)
    return config


def default_of_option(name: str) -> Any:
    """What `generate` takes where an option is set nowhere (transformers 5.17 - 5.24)."""
    from transformers import GenerationConfig

    return GenerationConfig._get_default_generation_params().get(name)
