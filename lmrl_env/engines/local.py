"""The embedded engine: samples from a Transformers model in this process, on CPU or one GPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmrl_env.engines.decoder import Decoder
from lmrl_env.engines.kv_cache import BudgetCache
from lmrl_env.engines.prefill import prefill
from lmrl_env.engines.sampler import draw_tokens, row_uniforms
from lmrl_env.engines.shared_prompts import SharedPromptCache
from lmrl_env.errors import ConfigurationError, EngineError, PromptTooLongError, WeightSyncError
from lmrl_env.tokenizer import Tokenizer
from lmrl_env.types import Completion, Sampling

BATCH_SIZE = 512
"""Most rows of a batch."""

ROWS_AT_ONCE = 8
"""A batch shrinks by so many rows: every number of rows costs oneDNN a preparation of its own."""

LOGITS_AT_ONCE = 2**25
"""Most logits of one batch, unless one row has more; drawing from them takes several copies."""

CACHE_BYTES = 4 * 2**30
"""Most memory that the keys and values of one batch may take, unless one row takes more."""


class LocalEngine:
    """Samples from a Transformers model in this process.

    While the model is the trainer's own module, a weight update copies nothing. A prompt is
    forwarded once for all its samples, and rows whose responses have ended leave the
    batch, a few at a time.

    Args:
        model: a causal language model.
        tokenizer: of that model.
        batch_size: most rows that are sampled together.
        dtype: of the computation; ``bfloat16`` is mixed precision over float32 weights, as in
            the trainer.

    Attributes:
        version: of the weights; 0 before the first update.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        *,
        batch_size: int = BATCH_SIZE,
        dtype: str = "float32",
    ):
        self.version = 0
        self._mixed_precision = dtype == "bfloat16"
        self._model = model
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        self._is_eos = np.zeros(tokenizer.vocab_size, dtype=np.bool_)
        self._is_eos[[t for t in tokenizer.eos_token_ids if t < tokenizer.vocab_size]] = True

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        return self._tokenizer.encode(text)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        return self._tokenizer.decode(token_ids)

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling: Sampling,
        n: int,
        seeds: Sequence[int],
    ) -> list[Completion]:
        """Sample n responses to each prompt.

        At temperature 0 the likeliest token is taken, and its log-probability is that under the
        untempered softmax. Stops and budget are those of the token MDP: the token that completes
        a stop string is kept, and a response that stops with its last token has stopped.

        Args:
            prompt_ids: token ids of the prompts, without padding, each at least one.
            sampling: how to draw.
            n: responses to each prompt, at least 1.
            seeds: one non-negative seed a response, ``len(prompt_ids) * n`` of them; a response
                depends on its prompt, the weights, ``sampling`` and its own seed only, up to
                the rounding of matrix products of another batch size.

        Returns:
            ``len(prompt_ids) * n`` completions, those to one prompt adjacent.

        Raises:
            ConfigurationError: if an argument is out of its range.
            PromptTooLongError: if a prompt and the budget exceed the context.
            EngineError: if the model's logits are not finite.
            ModelError: if the model attends in a way of its own; see ``PackedLayout.forward``.
        """
        self._check_arguments(prompt_ids, sampling, n, seeds)
        prompts = [prompt for prompt in prompt_ids for _ in range(n)]
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))  # little padding
        completions: dict[int, Completion] = {}
        precision = torch.autocast(
            self._model.device.type, torch.bfloat16, enabled=self._mixed_precision
        )
        with torch.inference_mode(), precision, _evaluating(self._model):
            while len(completions) < len(prompts):
                left = order[len(completions) :][: self._batch_size]
                rows = left[: self._rows_at_once([prompts[row] for row in left], sampling)]
                sampled = self._sample(
                    [prompts[row] for row in rows], sampling, [seeds[row] for row in rows]
                )
                completions.update(zip(rows, sampled, strict=True))
        return [completions[row] for row in range(len(prompts))]

    def update_weights(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int
    ) -> None:
        """Replace the weights; those that already are the model's own are not copied.

        Args:
            named_tensors: full tensors under the names of the model's state dict; one name is
                enough for tied weights.
            version: stamped on every completion from now on.

        Raises:
            WeightSyncError: if a name is unknown or missing, or a shape differs; the weights are
                then partly replaced.
        """
        own = self._model.state_dict()
        given: set[int] = set()
        for name, tensor in named_tensors:
            if name not in own:
                raise WeightSyncError(
                    f"weight {name!r} is not in the engine's model: expected names of its state "
                    f"dict such as {next(iter(own))!r}; give the unwrapped model's names"
                )
            if tensor.shape != own[name].shape:
                raise WeightSyncError(
                    f"weight {name!r} has the shape {tuple(tensor.shape)}: expected "
                    f"{tuple(own[name].shape)}; gather sharded tensors first"
                )
            given.add(own[name].data_ptr())
            if tensor.data_ptr() != own[name].data_ptr():
                own[name].copy_(tensor)
        missing = [name for name, tensor in own.items() if tensor.data_ptr() not in given]
        if missing:
            raise WeightSyncError(
                f"an update without {missing[:5]} ({len(missing)} weights): expected the whole "
                "state dict; give every weight of the model"
            )
        self.version = version

    def sleep(self) -> None:
        """Do nothing: no cache outlives ``generate``, and the weights are the trainer's."""

    def wake(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing: the model belongs to whoever made it."""

    def _check_arguments(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling: Sampling,
        n: int,
        seeds: Sequence[int],
    ) -> None:
        shortest = min(map(len, prompt_ids), default=1)
        rows = len(prompt_ids) * n
        top_k_holds = sampling.top_k == -1 or sampling.top_k > 0
        for name, value, expected, holds in (
            ("n", n, "at least 1", n >= 1),
            ("max_new_tokens", sampling.max_new_tokens, "at least 1", sampling.max_new_tokens >= 1),
            ("temperature", sampling.temperature, "at least 0", sampling.temperature >= 0),
            ("top_p", sampling.top_p, "in (0, 1]", 0 < sampling.top_p <= 1),
            ("top_k", sampling.top_k, "-1 or more than 0", top_k_holds),
            ("number of seeds", len(seeds), f"{rows}, one a response", len(seeds) == rows),
            ("lowest seed", min(seeds, default=0), "at least 0", min(seeds, default=0) >= 0),
            ("shortest prompt", shortest, "at least 1 token", shortest >= 1),
        ):
            if not holds:
                raise ConfigurationError(f"{name} is {value}: expected {expected}; correct it")
        longest = max(map(len, prompt_ids), default=0)
        if longest + sampling.max_new_tokens > self._tokenizer.context_length:
            raise PromptTooLongError(
                f"a prompt of {longest} tokens and max_new_tokens={sampling.max_new_tokens} exceed "
                f"the model's context of {self._tokenizer.context_length} tokens; shorten the "
                "prompt or lower max_new_tokens"
            )

    def _rows_at_once(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> int:
        """Return how many of the next rows to sample together."""
        config = self._model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None)
        head_dim = head_dim or config.hidden_size // config.num_attention_heads
        width = max(map(len, prompts)) + sampling.max_new_tokens
        row_bytes = (
            2 * config.num_hidden_layers * heads * head_dim * width * self._model.dtype.itemsize
        )
        most = min(CACHE_BYTES // row_bytes, LOGITS_AT_ONCE // self._tokenizer.vocab_size)
        return max(1, min(self._batch_size, most))

    def _sample(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
    ) -> list[Completion]:
        """Sample one response to each prompt, all in one batch."""
        device, budget = self._model.device, sampling.max_new_tokens
        stops = self._tokenizer.stop_strings(sampling.stop)
        uniforms = np.stack([row_uniforms(seed, budget) for seed in seeds])
        tokens = np.zeros((len(prompts), budget), dtype=np.int32)
        logprobs = np.zeros((len(prompts), budget), dtype=np.float32)
        lengths = np.full(len(prompts), budget)
        stopped = np.zeros(len(prompts), dtype=np.bool_)
        rows = np.arange(len(prompts))  # those still in the batch
        goes_on = np.ones(len(prompts), dtype=np.bool_)  # which of them have not ended

        logits, cache, mask, positions = prefill(self._model, prompts, budget)
        decoder = None
        if Decoder.pays(self._model, len(prompts) * budget):
            decoder = Decoder(self._model, int(positions.max()) + budget)
        for t in range(budget):
            drawn, drawn_logprobs = draw_tokens(
                logits[:, : self._tokenizer.vocab_size],
                torch.from_numpy(uniforms[rows, t]).to(device),
                sampling,
            )
            # One transfer from the device: a token's id is exact in float64.
            both = torch.stack([drawn.double(), drawn_logprobs.double()]).cpu().numpy()
            tokens[rows, t], logprobs[rows, t] = both
            last = tokens[rows, t]
            ended = self._is_eos[last]
            for i in np.flatnonzero(stops.may_complete[last] & ~ended & goes_on):
                ended[i] = stops.completed_by_last(tokens[rows[i], : t + 1])
            ended &= goes_on
            goes_on &= ~ended
            stopped[rows[ended]] = True
            lengths[rows[ended]] = t + 1
            if not goes_on.any() or t + 1 == budget:
                break
            left = -(-goes_on.sum() // ROWS_AT_ONCE) * ROWS_AT_ONCE
            if left < len(rows):
                leaves = ~goes_on
                leaves[np.flatnonzero(leaves)[len(rows) - left :]] = False
                kept = cache.drop(leaves)
                rows, drawn, positions = rows[kept], drawn[kept], positions[kept]
                goes_on, mask = goes_on[kept], None if mask is None else mask[kept]
            if decoder is not None and isinstance(cache, SharedPromptCache):
                logits = decoder.step(drawn, positions + t, cache)
            else:
                logits = self._decode(drawn, positions + t, cache, mask)

        if not np.isfinite(logprobs[np.arange(budget) < lengths[:, None]]).all():
            raise EngineError(
                "the model's logits are not finite: expected numbers; its weights have diverged or "
                "overflow in this dtype, so go back to a checkpoint with a lower learning rate"
            )
        return [
            Completion(
                tokens[i, :k].copy(),
                logprobs[i, :k].copy(),
                "stop" if stop else "length",
                self.version,
            )
            for i, (k, stop) in enumerate(zip(lengths, stopped, strict=True))
        ]

    def _decode(
        self, tokens: Tensor, positions: Tensor, cache: BudgetCache, mask: Tensor | None
    ) -> Tensor:
        """Return the logits after one more token a row, (r, V)."""
        layout = {"layout": cache} if isinstance(cache, SharedPromptCache) else {}
        return self._model(
            input_ids=tokens[:, None],
            attention_mask=None if mask is None else mask[:, : cache.get_seq_length() + 1],
            position_ids=positions[:, None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **layout,
        ).logits[:, -1]


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Put every module in evaluation mode for a while."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
