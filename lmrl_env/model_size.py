"""How large a model is, and how much memory training it takes, from its configuration alone."""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lmrl_env.engines.local import CACHE_BYTES
from lmrl_env.engines.vllm import VllmEngine
from lmrl_env.errors import ModelError
from lmrl_env.policy import LOGITS_AT_ONCE
from lmrl_env.tokenizer import model_path

FINGERPRINT_BYTES = 2**20


class ModelSize(NamedTuple):
    """Figures of a causal language model.

    Attributes:
        architecture: class of Transformers.
        parameters: tied ones counted once.
        adapter_width: sum over linear layers, the output embedding left out, of inputs and
            outputs: what a LoRA of rank 1 has in parameters.
        layers: number of blocks.
        hidden: width of a state.
        keys: width of a token's keys in one layer, and of its values.
        inner: width of the feed-forward part.
        logits: width of the output embedding.
    """

    architecture: str
    parameters: int
    adapter_width: int
    layers: int
    hidden: int
    keys: int
    inner: int
    logits: int


class Memory(NamedTuple):
    """An item of the memory that a rank needs.

    Attributes:
        name: what it is for.
        bytes: how much.
        formula: how it was computed.
    """

    name: str
    bytes: int
    formula: str


def model_size(model: str) -> ModelSize:
    """Return a model's figures without loading its weights.

    Args:
        model: ``tiny``, a folder with ``config.json``, or a hub id.

    Raises:
        ModelError: if Transformers cannot build the model.
    """
    try:
        config = AutoConfig.from_pretrained(model_path(model), trust_remote_code=False)
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the size of {model!r} cannot be told ({error}): expected 'tiny', a folder with "
            "config.json, or a hub id that can be reached, of a causal language model"
        ) from error
    head = built.get_output_embeddings()
    linear = [m for m in built.modules() if isinstance(m, nn.Linear) and m is not head]
    text = config.get_text_config()
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return ModelSize(
        architecture=type(built).__name__,
        parameters=sum(parameter.numel() for parameter in built.parameters()),
        adapter_width=sum(layer.in_features + layer.out_features for layer in linear),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        keys=(getattr(text, "num_key_value_heads", None) or heads) * head_dim,
        inner=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        logits=head.weight.shape[0],
    )


def weights_fingerprint(model: str) -> str | None:
    """Return a SHA-256 over name, size and both ends of every weight file, or None without any.

    The first and the last MiB of a file tell models apart in no time however large they are. Of
    a hub id, whose files are Transformers' matter, it is None.
    """
    files = sorted(Path(model_path(model)).glob("*.safetensors"))
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(FINGERPRINT_BYTES))
            file.seek(max(0, size - FINGERPRINT_BYTES))
            digest.update(file.read())
    return digest.hexdigest() if files else None


def training_memory(
    size: ModelSize,
    *,
    tokens: int,
    bfloat16: bool,
    checkpointing: bool,
    lora_rank: int | None,
    critic: bool,
    reference: bool,
    shards: int,
) -> list[Memory]:
    """Return what a training step of one rank needs, by item.

    The activations are those that Transformers' blocks keep for the backward pass: measured ones
    of Qwen2 in float32 are within 5% of the formula.

    Args:
        size: of the model.
        tokens: of a micro-batch.
        bfloat16: whether it computes in mixed precision; some activations stay in float32.
        checkpointing: whether only the blocks' inputs are kept.
        lora_rank: of adapters that are trained instead of the weights.
        critic: whether a second model of that size is trained.
        reference: whether a frozen copy is kept.
        shards: ranks that weights, gradients and optimiser are spread over.
    """
    parameters, spread = size.parameters, f" / {shards} ranks" if shards > 1 else ""
    models = "2 models × " if critic else ""
    adapters = (lora_rank or 0) * size.adapter_width
    trained = adapters or parameters
    copies = 1 + critic
    activation = 3 if bfloat16 else 4
    block = 10 * size.hidden + 4 * size.keys + 4 * size.inner
    kept = size.layers * size.hidden * 4 + block * activation
    if not checkpointing:
        kept = size.layers * block * activation
    logits = min(LOGITS_AT_ONCE, tokens * size.logits)
    items = [
        Memory(
            "weights",
            copies * (parameters + adapters) * 4 // shards,
            f"{models}{parameters + adapters:,} × 4 B{spread}",
        ),
        Memory("gradients", copies * trained * 4 // shards, f"{models}{trained:,} × 4 B{spread}"),
        Memory("Adam", copies * trained * 8 // shards, f"{models}{trained:,} × 8 B{spread}"),
        Memory(
            "activations",
            tokens * kept,
            f"{tokens:,} tokens × ({size.layers} layers × {size.hidden} × 4 B + one block's "
            f"{block:,} × {activation})"
            if checkpointing
            else f"{tokens:,} tokens × {size.layers} layers × {block:,} × {activation} B",
        ),
        Memory("logits", 3 * logits * 4, f"3 × {logits:,} × 4 B"),
    ]
    if reference:
        items.insert(1, Memory("reference", parameters * 4, f"{parameters:,} × 4 B"))
    return items


def vllm_memory(size: ModelSize, *, bfloat16: bool, gpu_bytes: int | None) -> list[Memory]:
    """Return what the in-process vLLM engine takes, by item.

    Args:
        size: of the model.
        bfloat16: whether its weights are.
        gpu_bytes: memory of the GPU, or None where there is none.
    """
    if gpu_bytes is not None:
        share = inspect.signature(VllmEngine).parameters["gpu_memory_utilization"].default
        return [Memory("vLLM", int(share * gpu_bytes), f"{share} of the GPU, cache included")]
    element = 2 if bfloat16 else 4
    return [
        Memory("engine weights", size.parameters * element, f"{size.parameters:,} × {element} B"),
        Memory("KV cache", 2**30, "VLLM_CPU_KVCACHE_SPACE, 1 GiB unless it is set"),
    ]


def local_engine_memory(
    size: ModelSize, *, rows: int, width: int, bfloat16: bool, own_weights: bool
) -> list[Memory]:
    """Return what sampling with the local engine needs, by item.

    Args:
        size: of the model.
        rows: responses that are sampled together.
        width: most tokens of a question and its response.
        bfloat16: whether it computes in mixed precision.
        own_weights: whether the engine does not sample with the trainer's own module.
    """
    per_token = 2 * size.layers * size.keys * (2 if bfloat16 else 4)
    cache = rows * width * per_token
    formula = f"{rows} rows × {width:,} tokens × {per_token:,} B"
    if cache > CACHE_BYTES:
        cache, formula = CACHE_BYTES, f"limit; {formula} in parts"
    items = [Memory("KV cache", cache, formula)]
    if own_weights:
        copy = f"{size.parameters:,} × 4 B"
        items.insert(0, Memory("engine weights", size.parameters * 4, copy))
    return items
