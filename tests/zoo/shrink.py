"""Shrinks the default configuration of a model type: numbers get small, structure and activations stay.

Numbers are replaced by the name of their field (``RULES``); lists with an entry for each layer, such as
``layer_types``, keep one layer of each distinct kind; ids of special tokens move into the small vocabulary. What does
not follow from names is in ``overrides``.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import MISSING, fields
from functools import cache
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from zoo.overrides import AFTER, BEFORE, MROPE, OVERRIDES

VOCABULARY = 96
HIDDEN = 16
# Feed-forward widths that differ from each other and from the hidden size, so that mixed-up axes show.
DENSE, EXPERT, SHARED = 24, 20, 12
LAYERS = 2
# Small ids mean the same in every vocabulary; larger ones move to the end of the small one.
FIRST_WORD = 4

# Fields that some types read although their default is None.
REQUIRED = {"head_dim": 8, "num_key_value_heads": 2}

Rule = int | Callable[[int], int]

# The first pattern that matches the whole name of a field gives its largest value; 0 and -1 stay, as they mean "off".
RULES: list[tuple[str, Rule]] = [
    (r"chunk_size_feed_forward|is_encoder_decoder|pretraining_tp|type_vocab_size|model_parallel_size", lambda n: n),
    (r".*vocab_size.*|unpadded_vocab_size", VOCABULARY),
    # Experts and routing.
    (r"num_experts_per_tok(en)?|moe_topk|top_k_experts|moe_top_k|moe_k|num_experts_per_token", 2),
    (r"n_group|num_expert_group", 2),
    (r"(mamba_)?n_?groups", 1),
    (r"num_query_tokens|latent_query_num", 4),
    (r"topk_group", lambda n: 1),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", 2),
    (r"num_experts|n_routed_experts|num_local_experts|moe_num_experts", 4),
    (r"zero_expert_num", 2),
    (r"first_k_dense_replace|num_dense_layers", 1),
    (r".*shared_experts?_intermediate_size|shared_intermediate_size|share_expert_dim", SHARED),
    (r"moe_intermediate_size|expert_ffn_hidden_size", EXPERT),
    (r"moe_hidden_size", 8),
    (
        r".*intermediate_size.*|.*ffn_dim|d_ff|dim_ff|ffn_hidden_size|dff|mlp_dim|feed_forward_size|d_inner|n_inner",
        DENSE,
    ),
    # Heads.
    (r".*num_key_value_heads|num_kv_heads|kv_n_heads|.*num_query_groups", lambda n: 1 if n < 8 else 2),
    (r".*(num_)?(attention|mamba|linear|resampler|n)_heads?|.*num_heads|n_heads?|linear_num_(key|value)_heads", 2),
    (r"q_lora_rank", 14),
    (r"kv_lora_rank", 10),
    (r"o_lora_rank|.*_rank|hc_lowrank", 6),
    (r"qk_rope_head_dim|rotary_dim", 4),
    (r"qk_nope_head_dim", 6),
    (r".*head_dim|d_kv|d_head|dim_head|attention_head_size|.*head_size", 8),
    # Layers.
    (r"(num|n)_.*layers?|.*num_layers|n_layer|.*_layers|depth|.*_depth|num_blocks|layers", LAYERS),
    (r"conv_dim|(subsampling_)?conv_channels|num_conv_pos_embeddings", 8),
    (r"num_conv_pos_embedding_groups", 2),
    # Vision and audio towers, which only have to exist.
    (r"patch_size", 4),
    (r"image_size", 16),
    (r"num_position_embeddings|image_seq_length|num_image_tokens", 16),
    # Lengths.
    (r"sliding_window.*|window_size|attention_window_size|local_attention|attention_chunk_size", 8),
    (r".*max.*_positions?(_embeddings)?|n_positions|n_ctx|max_seq_len|context_length|model_max_length", 64),
    # Widths of the stream.
    (r"hidden_size_per_layer_input", 6),
    (r"(input_|output_)?embedding_size", 10),
    (r".*hidden_size|d_model|n_embd|dim_model|.*embed(ding)?_(dim|size)|emb_dim|.*proj_dim", HIDDEN),
    (r"(.*_)?(out|output|in|input)_(hidden_size|dim|size)|lru_width|projection_dim", HIDDEN),
    (r"(mamba_)?(d_state|state_size|ssm_state_size)", 6),
    (r"(mamba_)?chunk_size|context_size", 8),
]
COMPILED = [(re.compile(pattern), rule) for pattern, rule in RULES]
TOKEN = re.compile(
    r".*token_(id|index|ids)|.*_tokens?_ids?|(im_\w+|image_patch)_id|(unk|mask)_index|begin_suppress_tokens"
)
MIXTURE = re.compile(r"(num|n)_(local_|routed_)?experts|moe_num_experts")


def small_number(name: str, value: int) -> int:
    """The small value of a field with one number."""
    if value <= 0:
        return value
    for pattern, rule in COMPILED:
        if pattern.fullmatch(name):
            return min(value, rule(value) if callable(rule) else rule)
    return value


def shrink_value(name: str, value: Any, tokens: dict[int, int]) -> Any:
    """The small version of a field's value: numbers by name, also within lists and dictionaries."""
    if name == "apply_spec_augment":
        # It puts one vector in the place of frames.
        return False
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, (list, tuple)):
        return type(value)(shrink_value(name, item, tokens) for item in value)
    if isinstance(value, int):
        if TOKEN.fullmatch(name):
            return tokens.setdefault(value, value if value < FIRST_WORD else VOCABULARY - 1 - len(tokens))
        return small_number(name, value)
    if name.endswith("layerdrop"):
        # A layer that is left out by chance sees no token.
        return 0.0
    if isinstance(value, float) and name in ("initializer_range", "init_std"):
        # With inputs as narrow as here, 0.02 would leave every activation in its linear middle.
        return max(value, 0.1)
    return value


def explicit_values(config: PreTrainedConfig) -> dict[str, Any]:
    """The values that a configuration was made with: defaults, before derivation, and what its owner set."""
    try:
        default: PreTrainedConfig | None = type(config)()
    except Exception:  # Some defaults are not valid; then every value counts as set.
        default = None
    values = {}
    for field in fields(type(config)):
        if field.name in base_fields():
            continue
        # Not by attribute: transformers refuses to read a value that differs between layers.
        value = vars(config).get(field.name)
        if default is not None and not isinstance(value, PreTrainedConfig) and value == vars(default).get(field.name):
            value = value if field.default is MISSING else field.default
        values[field.name] = value
    return values


@cache
def base_fields() -> set[str]:
    """Fields of every configuration; those of transformers 5.0 are no dataclasses, and cannot be shrunk."""
    return {field.name for field in fields(PreTrainedConfig)} - {"is_encoder_decoder"}


def layer_columns(config: PreTrainedConfig) -> dict[str, list[Any]]:
    """The fields of ``config`` that have an entry for each layer."""
    count = getattr(config, "num_hidden_layers", None)
    if not isinstance(count, int) or count < 2:
        return {}
    values = {field.name: vars(config).get(field.name) for field in fields(type(config))}
    return {name: list(v) for name, v in values.items() if isinstance(v, (list, tuple)) and len(v) == count}


def chosen_layers(columns: dict[str, list[Any]], mixture: bool) -> list[int]:
    """The first layer of each distinct kind, and at least two layers; three where one of them is to become dense."""
    distinct = [column for column in columns.values() if not is_range(column)]
    kinds = [repr(kind) for kind in zip(*distinct, strict=True)]
    layers = sorted({kinds.index(kind) for kind in kinds})
    wanted = LAYERS + mixture
    return [0] * (wanted - max(len(layers), 1)) + (layers or [0]) if len(layers) < wanted else layers


def is_range(column: list[Any]) -> bool:
    """Whether every layer has its own index."""
    return column == list(range(len(column)))


def shrink(config: PreTrainedConfig, tokens: dict[int, int] | None = None) -> PreTrainedConfig:
    """A small configuration of the same class and structure as ``config``, which has default values."""
    tokens = {} if tokens is None else tokens
    values = explicit_values(config)
    small: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            small[name] = shrink(value, tokens)
        elif name != "rope_parameters":
            small[name] = shrink_value(name, value, tokens)
    mixture = any(MIXTURE.fullmatch(name) for name in values)
    columns = layer_columns(config)
    if mixture and "mlp_only_layers" in values:
        small["mlp_only_layers"] = [0]
    elif mixture and "first_k_dense_replace" in values and "mlp_layer_types" not in values:
        small["first_k_dense_replace"] = 1
    if columns or mixture:
        layers = chosen_layers(columns, mixture)
        small[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(layers)
        for name, column in columns.items():
            if isinstance(values[name], (list, tuple, type(None))):
                kept = range(len(layers)) if is_range(column) else (column[layer] for layer in layers)
                small[name] = shrink_value(name, list(kept), tokens)
        if set(small.get("mlp_layer_types") or ()) == {"sparse"}:
            small["mlp_layer_types"][0] = "dense"
    if shared := values.get("num_kv_shared_layers"):
        count = small["num_hidden_layers"]
        small["num_kv_shared_layers"] = count if shared == values["num_hidden_layers"] else count // 2
    rope = vars(config).get("rope_parameters")
    if isinstance(rope, dict) and (
        values.get("rope_parameters") or "mrope_section" in rope or config.model_type in MROPE
    ):
        small["rope_parameters"] = shrink_rope(rope)
        if config.model_type in MROPE:
            small["rope_parameters"]["mrope_section"] = [1, 1, 2]
    for name, number in REQUIRED.items():
        if name in values and vars(config).get(name) is None:
            small[name] = number
    small = {name: value for name, value in small.items() if value is not None}
    small.update(copy.deepcopy(OVERRIDES.get(config.model_type, {})))
    result = type(config)(**small)
    vars(result).update(copy.deepcopy(AFTER.get(config.model_type, {})))
    return result


def shrink_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters for heads of eight channels: sections of frequencies sum to four."""
    small: dict[str, Any] = {}
    for name, value in rope.items():
        if isinstance(value, dict):
            small[name] = shrink_rope(value)
        elif name == "mrope_section":
            small[name] = [2, 1, 1] if len(value) == 3 else [1] * len(value)
        else:
            small[name] = value
    return small


def tiny_config(model_type: str, **values: Any) -> PreTrainedConfig:
    """The small configuration of a model type; ``values`` replace defaults before numbers get small."""
    return shrink(AutoConfig.for_model(model_type, **{**BEFORE.get(model_type, {}), **values}))
