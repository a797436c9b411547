"""A transformers config to a CacheLayout, or a refusal that names what AVP does not carry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from transformers import GenerationConfig, PreTrainedConfig
from transformers.cache_utils import DynamicCache

from avp.errors import UnsupportedCache
from avp.identity import CacheLayout, LayerLayout, canonical_json

_CARRIED = {"DynamicLayer": "full_attention", "DynamicSlidingWindowLayer": "sliding_attention"}
_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")


def cache_layout(config: PreTrainedConfig, generation: GenerationConfig | None = None) -> CacheLayout:
    """The layout of the KV-cache of a decoder with this config.

    Raises:
        UnsupportedCache: encoder-decoder, MLA, state-space, hybrid, chunked or shared layers, an unknown rope scaling.
    """
    if config.is_encoder_decoder:
        raise UnsupportedCache(
            f"{config.model_type} is an encoder-decoder; AVP carries decoder-only models. Fix: hand over text."
        )
    if generation is not None and generation.cache_implementation == "quantized":
        raise UnsupportedCache(
            f"{config.model_type} is set to a quantized cache, which AVP does not carry. "
            "Fix: unset generation_config.cache_implementation; AVP's codecs make the hand-over small."
        )
    text = config.get_text_config(decoder=True)
    fields = cast(Mapping[str, object], text.to_dict())
    _refuse_unknown(text.model_type, fields)
    kinds = _layer_kinds(text, fields)
    heads = _number(fields.get("num_attention_heads"), 1)
    kv_heads = int(_number(fields.get("num_key_value_heads"), heads))
    head_dim = int(_number(fields.get("head_dim"), _number(fields.get("hidden_size"), 0) // max(heads, 1)))
    window = int(_number(fields.get("sliding_window"), 0))
    softcap = float(_number(fields.get("attn_logit_softcapping"), 0))
    scalar = _number(fields.get("query_pre_attn_scalar"), 0)
    scale = float(scalar) ** -0.5 if scalar else float(_number(fields.get("attention_multiplier"), 0))
    layers = tuple(
        LayerLayout(
            kv_heads,
            head_dim,
            window if kind == "sliding_attention" else 0,
            _rope(text.model_type, fields, kind),
            softcap,
            scale,
        )
        for kind in kinds
    )
    return CacheLayout(layers)


def _refuse_unknown(name: str, fields: Mapping[str, object]) -> None:
    if fields.get("kv_lora_rank"):
        raise UnsupportedCache(
            f"{name} keeps latent keys and values (MLA), which AVP does not carry yet. Fix: hand over text."
        )
    if fields.get("num_kv_shared_layers"):
        raise UnsupportedCache(
            f"{name} shares one KV between layers, which AVP does not carry yet. Fix: hand over text."
        )


def _layer_kinds(text: PreTrainedConfig, fields: Mapping[str, object]) -> list[str]:
    """Kind of each layer; what transformers itself would cache for it decides."""
    found = [type(layer).__name__ for layer in DynamicCache(config=text).layers]
    named = fields.get("layer_types")
    named = named if isinstance(named, list) and len(named) == len(found) else found
    for index, (kind, name) in enumerate(zip(found, named, strict=True)):
        if kind not in _CARRIED or (name != kind and name != _CARRIED[kind]):
            raise UnsupportedCache(
                f"layer {index} of {text.model_type} is of type {name} ({kind}), which AVP does not carry. "
                "Carried are full and sliding-window attention. Fix: hand over text."
            )
    return [_CARRIED[kind] for kind in found]


def _rope(name: str, fields: Mapping[str, object], kind: str) -> str:
    rope = fields.get("rope_parameters")
    if not isinstance(rope, dict):
        return ""
    rope = rope.get(kind, rope) if kind in rope or "full_attention" in rope else rope
    if isinstance(rope, dict) and rope.get("rope_type", "default") not in _ROPE_TYPES:
        raise UnsupportedCache(
            f"{name} scales its rotary positions by {rope.get('rope_type')!r}, which AVP does not know. Fix: "
            f"hand over text."
        )
    return canonical_json({"partial": fields.get("partial_rotary_factor"), **(rope if isinstance(rope, dict) else {})})


def _number(value: object, default: float) -> float:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else default
