"""The options of one `generate` call, and which of them leave visual tokens alone.

They are set in three places: as keywords, in a `GenerationConfig` that is passed, and in the model's own.
transformers itself merges them here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from transformers import GenerationConfig

from luvc_fx import _compat

KEEPING: Mapping[str, Collection[Any]] = {
    # The decoder's first step sees a part of the prompt, or none of its images.
    "prefill_chunk_size": (None,),
    "is_assistant": (None, False),
    "token_healing": (None, False),
    # Several tokens are proposed, and some of them are taken back out of the cache.
    "assistant_early_exit": (None,),
    "prompt_lookup_num_tokens": (None,),
    "use_mtp": (None, False),
    # A cache of another kind, or none.
    "cache_implementation": (None, "dynamic", "static"),
    "use_cache": (None, True),
    # Decoding loops outside of transformers, which handle the cache themselves.
    "penalty_alpha": (None, 0),
    "dola_layers": (None,),
    "num_beam_groups": (None, 1),
    "constraints": (None,),
    "force_words_ids": (None,),
}
"""Options with which all visual tokens stay, and of each the values with which they may go."""

KEEPING_ARGUMENTS = ("assistant_model", "custom_generate")
"""Arguments of `generate`, no options, with which all visual tokens stay."""

READ_BY_LIMITS = {
    "num_beams",
    "num_return_sequences",
    "output_attentions",
    "compile_config",
    "disable_compile",
}
"""Options that `luvc_fx.generate.limits` reads one by one: what they keep depends on the model."""

_HARMLESS = {
    "length": """
        max_length max_new_tokens min_length min_new_tokens early_stopping max_time stop_strings max_cache_len
    """,
    "the choice among logits": """
        do_sample temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff length_penalty
        diversity_penalty repetition_penalty encoder_repetition_penalty no_repeat_ngram_size
        renormalize_logits encoder_no_repeat_ngram_size bad_words_ids sequence_bias forced_bos_token_id
        forced_eos_token_id suppress_tokens begin_suppress_tokens watermarking_config
        exponential_decay_length_penalty remove_invalid_values
    """,
    "a second run of the model, on text and over a cache of its own": "guidance_scale",
    "output, hidden states of the rows that enter each layer": """
        output_hidden_states output_scores output_logits return_dict_in_generate
    """,
    "special tokens": "pad_token_id bos_token_id eos_token_id decoder_start_token_id",
    "without effect but beside one of KEEPING, or in `generate_batch`": """
        num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold assistant_lookbehind
        max_matching_ngram_size target_lookbehind assistant_ensemble_weight speculation_type cache_config
        low_memory continuous_batching_config
    """,
    "the config itself": "_from_model_config transformers_version _commit_hash",
}
HARMLESS = {name for names in _HARMLESS.values() for name in names.split()}
"""Options that change nothing for visual tokens, whatever their values are."""


def merged(model: Any, arguments: Mapping[str, Any]) -> GenerationConfig:
    """The options that `generate` would run with: keywords, the config that is passed, the model's own.

    Args:
        arguments: of `generate`, by their names.

    Raises:
        Exception: whatever transformers raises of options that contradict each other.
    """
    return _compat.merged_generation_config(model, arguments)


def keeping_argument(arguments: Mapping[str, Any]) -> str:
    """The argument of `generate`, no option, with which all visual tokens stay; empty without one."""
    given = {name: arguments.get(name) for name in KEEPING_ARGUMENTS}
    return next((_shown(name, value) for name, value in given.items() if value is not None), "")


def keeping_option(options: GenerationConfig) -> str:
    """The option with which all visual tokens stay, and its value; empty without one."""
    for name, others in KEEPING.items():
        given = getattr(options, name, None)
        if given not in others:
            return _shown(name, given)
    for name in unknown():
        given = getattr(options, name, None)
        if given is not None and given != _compat.default_of_option(name):
            return _shown(name, given) + " (an option that luvc_fx does not know)"
    return ""


def _shown(name: str, given: Any) -> str:
    plain = isinstance(given, (bool, int, float, str))
    return f"{name}={given!r}" if plain else f"{name}={getattr(given, '__name__', type(given).__name__)}"


def unknown() -> tuple[str, ...]:
    """Options of the installed transformers that nobody has looked at: set, they keep all visual tokens."""
    return tuple(sorted(vars(GenerationConfig()).keys() - KEEPING.keys() - READ_BY_LIMITS - HARMLESS))
