"""Small random models of several architectures, and a tokenizer of letters."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer as RawTokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from lmrl_env.tokenizer import Tokenizer

LETTERS = "abcdefghijkl"
EOS = len(LETTERS)
VOCAB_SIZE = len(LETTERS) + 1
MODEL_WIDTH = 16  # logits beyond the vocabulary, as padded models have them
CONTEXT = 64

SIZES = {"vocab_size": MODEL_WIDTH, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS = {
    "qwen2": lambda: Qwen2Config(
        **SIZES, **HEADS, intermediate_size=48, max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
    ),
    "llama": lambda: LlamaConfig(
        **SIZES, **HEADS, intermediate_size=48, max_position_embeddings=CONTEXT
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=MODEL_WIDTH, n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, summary_first_dropout=0.0,
        bos_token_id=None, eos_token_id=None,
    ),
    "mistral": lambda: MistralConfig(
        **SIZES, **HEADS, intermediate_size=48, max_position_embeddings=CONTEXT, sliding_window=4
    ),
}  # fmt: skip


def random_model(
    architecture: str, dtype: torch.dtype = torch.float64, seed: int = 0
) -> PreTrainedModel:
    """Return a model whose next-token distributions are far from uniform."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[architecture]()).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
            else:  # biases and gains
                parameter.add_(0.3 * torch.randn_like(parameter))
    if dtype == torch.float64:
        norm_in_float64(model)
    return model


def norm_in_float64(model: PreTrainedModel) -> None:
    """Replace the norms of Transformers, which round to float32 whatever the model's dtype."""
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if type(norm).__name__.endswith("RMSNorm"):
                exact = torch.nn.RMSNorm(norm.weight.shape, norm.variance_epsilon)
                exact.weight = norm.weight
                setattr(parent, name, exact)


def letter_tokenizer(*, eos: tuple[int, ...] = (EOS,), context: int = CONTEXT) -> Tokenizer:
    """Return a tokenizer whose tokens are the letters and an EOS."""
    raw = RawTokenizer(WordLevel({**{c: i for i, c in enumerate(LETTERS)}, "<eos>": EOS}, "a"))
    raw.pre_tokenizer = Split("", "isolated")
    raw.decoder = Fuse()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=raw), eos, context)
