"""A random model whose logits are wider than its tokenizer, and its log-probs by one forward."""

from __future__ import annotations

import numpy as np
import torch

PADDING = 13  # logits beyond the tokenizer's ids
TOLERANCE = 1e-4  # nats, float32


def save_padded_model(folder):
    """A random model whose logits are wider than its tokenizer and prefer the excess."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet
    )
    bpe.train_from_iterator(["the answer is 42 and the question was long"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>")
    config = Qwen2Config(
        vocab_size=len(tokenizer) + PADDING,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight[-PADDING:] = 2 * model.model.embed_tokens.weight[:PADDING]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def forward_logprobs(model, tokenizer, prompt, completion, temperature=1.0):
    """Log-probs of a completion's tokens by one forward pass of Transformers."""
    ids = torch.tensor([[*prompt, *completion.token_ids.tolist()]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(prompt) - 1 : -1, : tokenizer.vocab_size]
    logprobs = (logits / temperature).log_softmax(-1)
    return logprobs[torch.arange(len(logits)), ids[0, len(prompt) :]].numpy()


def largest_gap(model, tokenizer, prompts, completions, temperature=1.0):
    n = len(completions) // len(prompts)
    return max(
        np.abs(
            forward_logprobs(model, tokenizer, prompts[i // n], completion, temperature)
            - completion.logprobs
        ).max()
        for i, completion in enumerate(completions)
    )
