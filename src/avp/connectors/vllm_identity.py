"""The identity of a checkpoint folder, as transformers would give it, without a model in memory."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from avp.connectors.layout import cache_layout
from avp.connectors.loading import gguf_digest
from avp.connectors.weights import keep_fingerprint, kept_fingerprint, tokenizer_fingerprint, weights_fingerprint
from avp.errors import ModelNotFound, UnsupportedCache
from avp.identity import ModelIdentity


def checkpoint_identity(folder: Path, *, name: str, tokenizer: PreTrainedTokenizerBase | None = None) -> ModelIdentity:
    """What `HuggingFaceConnector.from_pretrained(folder).identity` is.

    Raises:
        ModelNotFound: no checkpoint is there. UnsupportedCache: AVP does not carry its cache.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ModelNotFound(
            f"{folder} holds no checkpoint: {str(error).splitlines()[0][:200]}. Fix: pass the folder of the model."
        ) from error
    if (folder / "adapter_config.json").exists():
        raise UnsupportedCache(
            f"an adapter lies in {folder}: transformers would load it, vLLM does not. Fix: merge it, or move it away."
        )
    layout = cache_layout(config, _generation(folder, config))
    values = kept_fingerprint(folder)
    if values is None:
        values = weights_fingerprint(_mapped(folder, config) or _loaded(folder))
        keep_fingerprint(folder, values)
    weights = gguf_digest(folder, values) or values
    return ModelIdentity(name, config.model_type, weights, tokenizer_fingerprint(tokenizer), layout)


def _generation(folder: Path, config: PreTrainedConfig) -> GenerationConfig:
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_model_config(config)


def _mapped(folder: Path, config: PreTrainedConfig) -> PreTrainedModel | None:
    """The model with tensors that are views of its files; None where names or dtypes are not those of the files."""
    try:
        state = {
            name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()
        }
    except SafetensorError as error:
        raise ModelNotFound(f"the weights in {folder} cannot be read: {error}. Fix: download them again.") from error
    if config.dtype == torch.float16 and any(tensor.dtype != torch.float16 for tensor in state.values()):
        return None  # transformers would round them to float16 first
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    found = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    if found.unexpected_keys or any(tensor.is_meta for tensor in model.state_dict().values()):
        return None
    return model


def _loaded(folder: Path) -> PreTrainedModel:
    """The model as transformers loads it, for checkpoints whose names it translates."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return model
