"""The policy under training: a causal language model as log-probabilities of response tokens."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from lmrl_env.attention import PACKED_ATTENTION, use_attention
from lmrl_env.categorical import log_prob_and_entropy
from lmrl_env.errors import ConfigurationError, ModelError
from lmrl_env.linear import use_onednn
from lmrl_env.packed_row import Integers, PackedLayout, cells, to_device
from lmrl_env.rms_norm import use_fused_norms
from lmrl_env.tokenizer import model_path

LOGITS_AT_ONCE = 2**24
"""Most elements of a logits tensor that exist at one time."""


def load_model(
    model: str,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    attention: str = "packed",
    gradient_checkpointing: bool = False,
) -> PreTrainedModel:
    """Load a causal language model whose sampler and trainer see the same distribution.

    Dropout is off, in training mode too. Weights are read from safetensors only, and no code that
    comes with them is run.

    Args:
        model: ``tiny``, a folder in the Transformers format, or a hub id.
        dtype: of the weights, such as ``"bfloat16"``.
        device: where they shall be.
        attention: ``packed``, ``sdpa``, ``eager`` or ``flash_attention_2``.
        gradient_checkpointing: whether a backward pass computes the activations of a block again
            instead of keeping them. The model is then in training mode, without which
            Transformers would keep them.

    Raises:
        ModelError: if the model cannot be loaded, or lacks some of its weights.
        ConfigurationError: if there is no such dtype, or the model cannot do what is asked.
    """
    torch_dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(torch_dtype, torch.dtype) or not torch_dtype.is_floating_point:
        raise ConfigurationError(
            f"dtype {dtype!r} is no floating-point type: expected one such as 'bfloat16'"
        )
    path = model_path(model)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        for name in _dropouts(config):
            setattr(config.get_text_config(), name, 0.0)
        loaded: PreTrainedModel
        report: dict[str, Any]
        loaded, report = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=torch_dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )  # type: ignore[misc]
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        where = "folder" if os.path.isdir(path) else "name"
        raise ModelError(
            f"cannot load the model {where} {model!r}: expected 'tiny', a folder with config.json "
            f"and *.safetensors, or a hub id that can be reached ({error})"
        ) from error
    if report["missing_keys"]:
        raise ModelError(
            f"the weights of {model!r} lack {sorted(report['missing_keys'])}, which would be left "
            "at random: expected a complete causal language model; download or export it again"
        )
    # Sampling is the engines' work; a hub model's own settings may not even be valid to save.
    own = loaded.generation_config
    loaded.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id
    )
    loaded.to(device).eval()  # type: ignore[arg-type]
    use_attention(loaded, attention)
    if loaded.device.type == "cpu":
        use_onednn(loaded)
        use_fused_norms(loaded)
    if gradient_checkpointing:
        _checkpoint_gradients(loaded)
    return loaded


def _checkpoint_gradients(model: PreTrainedModel) -> None:
    try:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise ConfigurationError(
            f"gradient checkpointing does not fit {type(model).__name__} ({error}): leave it out"
        ) from error
    model.train()


def _dropouts(config: PreTrainedConfig) -> dict[str, float]:
    """Return the dropout probabilities of a configuration that are not 0."""
    return {
        name: value
        for name, value in config.get_text_config().to_dict().items()
        if ("drop" in name) and isinstance(value, float) and value > 0
    }


class Lengths(NamedTuple):
    """Lengths of prompts and responses on the CPU, so that a GPU is not asked for them.

    NumPy's arrays, which no module around the policy moves to a device.

    Attributes:
        prompts: shape (q,), int64, at least 1.
        prompt_index: shape (n,), int64: which prompt each response continues.
        responses: shape (n,), int64, at least 1.
        common: tokens that all prompts begin with, fewer than the shortest has, and forwarded
            once for all of them.
    """

    prompts: Integers
    prompt_index: Integers
    responses: Integers
    common: int = 0


class TokenBatch(NamedTuple):
    """Prompts and the responses to them.

    Attributes:
        prompt_ids: shape (q, P), int64, left-aligned, 0 at padding.
        prompt_lengths: shape (q,), int64, at least 1.
        prompt_index: shape (n,), int64: which prompt each response continues.
        response_ids: shape (n, K), int64, left-aligned, 0 at padding.
        response_lengths: shape (n,), int64, at least 1.
        lengths: the same lengths on the CPU; without them a GPU is asked and waited for.
    """

    prompt_ids: Tensor
    prompt_lengths: Tensor
    prompt_index: Tensor
    response_ids: Tensor
    response_lengths: Tensor
    lengths: Lengths | None = None

    def lengths_on_cpu(self) -> Lengths:
        """Return the lengths on the CPU."""
        if self.lengths is not None:
            return self.lengths
        return Lengths(
            prompts=self.prompt_lengths.cpu().numpy(),
            prompt_index=self.prompt_index.cpu().numpy(),
            responses=self.response_lengths.cpu().numpy(),
        )


def response_states(model: PreTrainedModel, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Return the last hidden state at each response token's predecessor: the state it was acted in.

    Args:
        model: a causal language model, as ``load_model`` gives it.
        batch: prompts and responses, on the model's device.

    Returns:
        Hidden states of shape (T, H), with gradient, T the number of response tokens in the order
        of rows; and where those tokens stand in the flattened (n · K), shape (T,).

    Raises:
        ModelError: if the model does not hand the layout of a packed row to its attention.
    """
    rows, columns = cells(batch.lengths_on_cpu().responses)
    packed = model.config.get_text_config()._attn_implementation == PACKED_ATTENTION
    hidden, before = (_packed if packed else _padded)(model, batch, rows, columns)
    places = rows * batch.response_ids.shape[1] + columns
    return (
        hidden.index_select(0, to_device(before, hidden.device)),
        to_device(places, hidden.device),
    )


def at_tokens(values: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
    """Return values of tokens where these stand, and 0 at padding.

    Args:
        values: shape (T,).
        places: shape (T,), int64, in the flattened result.
        shape: (n, K), of the result.
    """
    return values.new_zeros(shape.numel()).scatter(0, places, values).view(shape)


def _packed(
    model: PreTrainedModel, batch: TokenBatch, rows: Integers, columns: Integers
) -> tuple[Tensor, Integers]:
    """Return hidden states (·, H), and which one predicts each response token, (T,)."""
    prompt_lengths, prompt_index, response_lengths, common = batch.lengths_on_cpu()
    device = batch.prompt_ids.device
    # Nothing is predicted from a response's last token.
    layout = PackedLayout(prompt_lengths, prompt_index, response_lengths - 1, device, common)
    width, length = batch.prompt_ids.shape[1], batch.response_ids.shape[1]
    column = torch.arange(max(width, length), device=device)
    starts = batch.prompt_lengths[batch.prompt_index][:, None]
    base: Any = model.base_model
    hidden = layout.forward(
        base,
        layout.pack(batch.prompt_ids, batch.response_ids),
        layout.pack(column[:width].expand(len(prompt_lengths), -1), starts + column[:length]),
        use_cache=False,
    ).last_hidden_state[0]
    prompt_ends = layout.prompt_ends[prompt_index]
    before = np.where(columns > 0, layout.response_starts[rows] + columns - 1, prompt_ends[rows])
    return hidden, before


def _padded(
    model: PreTrainedModel, batch: TokenBatch, rows: Integers, columns: Integers
) -> tuple[Tensor, Integers]:
    """Return hidden states (·, H), and which one predicts each response token, (T,)."""
    lengths = batch.lengths_on_cpu()
    length = batch.response_ids.shape[1]
    column = torch.arange(length, device=batch.response_ids.device)
    places = batch.prompt_lengths[batch.prompt_index][:, None] + column
    ids = F.pad(batch.prompt_ids[batch.prompt_index], (0, length)).scatter(
        1, places, batch.response_ids
    )
    # Padding stands behind what counts, where a causal model does not look: no mask.
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    before = rows * ids.shape[1] + lengths.prompts[lengths.prompt_index][rows] + columns - 1
    return hidden.flatten(0, 1), before


class Policy(nn.Module):
    """Log-probabilities and entropies of response tokens under a causal language model.

    A prompt is forwarded once for all its responses, all stand in one row without padding, and
    logits exist for a part of the tokens at a time. Models whose attention cannot do so, such as
    those with sliding windows, take a plain padded forward of every prompt and response.

    Args:
        model: a causal language model without dropout, as ``load_model`` gives it.
        vocab_size: V, ids that the tokenizer can emit; the softmax is over these alone.

    Raises:
        ModelError: if the model drops out, has fewer than V logits, or logits that are not its
            output embedding applied to the last hidden state.
    """

    def __init__(self, model: PreTrainedModel, vocab_size: int):
        super().__init__()
        self.model = model
        self._no_split_modules = model._no_split_modules  # what Accelerate shards one by one
        self.vocab_size = vocab_size
        if dropouts := _dropouts(model.config):
            raise ModelError(
                f"the model has {dropouts}: expected no dropout, since trainer and engine must see "
                "the same distribution; use load_model, which sets it to 0"
            )
        _check_head(model, vocab_size)

    def forward(
        self, batch: TokenBatch, *, temperature: float, with_entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return log-probability and entropy of each response token.

        log π(yₖ | x, y₍<ₖ₎) = log softmax(logits / temperature)[yₖ], in nats

        Args:
            batch: prompts and responses, on the model's device.
            temperature: above 0, divides the logits.
            with_entropy: whether to compute −Σᵥ π(v) log π(v) too.

        Returns:
            Log-probabilities and entropies (or None), both of shape (n, K), float32, 0 at
            padding; gradients flow through both.

        Raises:
            ConfigurationError: if the temperature is not above 0.
            ModelError: if the model does not hand the layout of a packed row to its attention.
        """
        if not temperature > 0:
            raise ConfigurationError(
                f"temperature {temperature} is not above 0: a greedy policy has no log-probability "
                "gradient; sample and train at the same positive temperature"
            )
        states, places = response_states(self.model, batch)
        targets = batch.response_ids.flatten().index_select(0, places)
        logprobs, entropies = self._token_statistics(states, targets, temperature, with_entropy)
        shape = batch.response_ids.shape
        entropy = None if entropies is None else at_tokens(entropies, places, shape)
        return at_tokens(logprobs, places, shape), entropy

    def _token_statistics(
        self, states: Tensor, targets: Tensor, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return log-probability and entropy, (t,), of the targets that states (t, H) predict."""

        def statistics(states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
            logits = self.model.get_output_embeddings()(states)[:, : self.vocab_size]
            return log_prob_and_entropy(logits, targets, temperature, with_entropy=with_entropy)

        tokens_at_once = max(1, LOGITS_AT_ONCE // self.vocab_size)
        if len(states) <= tokens_at_once:
            return statistics(states, targets)
        logprobs, entropies = zip(
            *(
                checkpoint(statistics, *chunk, use_reentrant=False)
                for chunk in zip(
                    states.split(tokens_at_once), targets.split(tokens_at_once), strict=True
                )
            ),
            strict=True,
        )
        return torch.cat(logprobs), torch.cat(entropies) if with_entropy else None


def _check_head(model: PreTrainedModel, vocab_size: int) -> None:
    """Refuse a model whose logits are not its output embedding of the last hidden state.

    The output embedding is made to return known logits once: a soft cap or a scale shows.
    """
    head = model.get_output_embeddings()
    width = head.weight.shape[0]
    if width < vocab_size:
        raise ModelError(
            f"the model has {width} logits and the tokenizer {vocab_size} tokens: expected at "
            "least as many logits; load model and tokenizer from the same folder"
        )
    known = torch.linspace(-100, 100, width, dtype=head.weight.dtype, device=head.weight.device)
    inputs = []

    def give_known_logits(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        inputs.append(args[0])
        return known.expand_as(output)

    token = torch.zeros(1, 1, dtype=torch.int64, device=head.weight.device)
    handle = head.register_forward_hook(give_known_logits)
    try:
        with torch.no_grad():
            logits = model(input_ids=token, use_cache=False).logits
            hidden = model.base_model(input_ids=token, use_cache=False).last_hidden_state
    finally:
        handle.remove()
    if not torch.equal(logits[0, 0], known) or not torch.equal(inputs[0], hidden):
        raise ModelError(
            f"logits of {type(model).__name__} are not its output embedding of the last hidden "
            "state (a soft cap, a scale?): such a model would be trained on wrong log-probs; use "
            "one without"
        )
