"""Text to token ids and back: which ids exist, which end a response, where a stop string ends."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lmrl_env.errors import ModelError

TINY_MODEL = Path(__file__).parent / "assets" / "tiny"
"""Folder of the base model that ships with the package."""


def model_path(name: str) -> str:
    """Return what Transformers should load for a model name: ``tiny``, a folder or a hub id."""
    return str(TINY_MODEL) if name == "tiny" else name


class Tokenizer:
    """A model's tokenizer, with what the token MDP needs to know of it.

    Attributes:
        vocab_size: V, the ids that the tokenizer can emit are ``range(V)``; a model's logits
            may be wider by padding.
        eos_token_ids: ids that end a response.
        context_length: most tokens that the model can attend to.
    """

    def __init__(self, tokenizer: Any, eos_token_ids: Sequence[int], context_length: int):
        self._tokenizer = tokenizer
        self._backend = _plain_backend(tokenizer)
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1
        self.eos_token_ids = tuple(sorted(set(eos_token_ids)))
        self.context_length = context_length

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, with the special tokens that the model expects around it."""
        return self._tokenizer(text)["input_ids"]

    def encode_prompts(self, prompts: Sequence[str]) -> list[list[int]]:
        """Return the ids of many texts at once."""
        return self._tokenizer(list(prompts))["input_ids"] if prompts else []

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of a text within a response: no special token is added, none is read."""
        return self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)[
            "input_ids"
        ]

    def decode(self, token_ids: Sequence[int] | npt.NDArray[Any]) -> str:
        """Return the text of token ids, special tokens spelled out."""
        if isinstance(token_ids, np.ndarray):
            token_ids = token_ids.tolist()
        if self._backend is not None:  # a third of the time: stop strings ask for many short texts
            return self._backend.decode(token_ids, skip_special_tokens=False)
        return self._tokenizer.decode(
            token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def decode_response(self, token_ids: Sequence[int] | npt.NDArray[Any]) -> str:
        """Return the text of a response, without the EOS that may end it."""
        if len(token_ids) and token_ids[-1] in self.eos_token_ids:
            token_ids = token_ids[:-1]
        return self.decode(token_ids)

    @lru_cache(maxsize=8)  # noqa: B019  (a tokenizer lives as long as its process)
    def stop_strings(self, stop: tuple[str, ...]) -> StopStrings:
        """Return the matcher of some stop strings."""
        return StopStrings(self, stop)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tokenizer:
        return self


def _plain_backend(tokenizer: Any) -> Any:
    """Return what decodes behind a tokenizer of Transformers, or None if it does more itself."""
    from transformers import PreTrainedTokenizerFast

    plain = all(
        getattr(type(tokenizer), name, None) is getattr(PreTrainedTokenizerFast, name)
        for name in ("decode", "_decode")
    )
    return tokenizer.backend_tokenizer if plain else None


class StopStrings:
    """Finds the token that completes a stop string, although tokens straddle it.

    Attributes:
        may_complete: shape (V,), bool; False where a token can complete none of the strings,
            so that a table look-up clears nearly every token without decoding.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]):
        self._tokenizer = tokenizer
        self._stop = stop
        self._tail = max((len(s.encode()) for s in stop), default=0) + 1
        self.may_complete: npt.NDArray[np.bool_] = np.zeros(tokenizer.vocab_size, dtype=np.bool_)
        if stop:
            # A decoder may treat the first token of a text differently: decode behind an anchor.
            anchor = tokenizer.encode("a")
            skip = len(tokenizer.decode(anchor))
            for token in range(tokenizer.vocab_size):
                piece = tokenizer.decode([*anchor, token])[skip:]
                self.may_complete[token] = any(_may_complete(piece, s) for s in stop)

    def completed_by_last(self, response_ids: Sequence[int] | npt.NDArray[Any]) -> bool:
        """Return whether the last token of a response completes a stop string.

        Earlier tokens are taken not to have completed one: the response would have ended there.
        """
        if not len(response_ids) or not self.may_complete[response_ids[-1]]:
            return False
        text = self._tokenizer.decode(response_ids[-self._tail :])
        return any(s in text for s in self._stop)


def _may_complete(piece: str, stop: str) -> bool:
    """Return whether a token of this text can hold the last character of a stop string."""
    if "\N{REPLACEMENT CHARACTER}" in piece:  # part of a character: only decoding can tell
        return not stop.isascii()
    return stop in piece or any(piece.startswith(stop[-k:]) for k in range(1, len(stop) + 1))


@lru_cache(maxsize=8)
def load_tokenizer(model: str) -> Tokenizer:
    """Load the tokenizer of a model, once per process.

    Args:
        model: ``tiny``, a folder in the Transformers format, or a hub id.

    Raises:
        ModelError: if there is no such model, or its tokenizer or configuration cannot be read.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    path = model_path(model)
    try:
        config = AutoConfig.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        where = "folder" if os.path.isdir(path) else "name"
        raise ModelError(
            f"cannot load the tokenizer of the model {where} {model!r}: expected 'tiny', a folder "
            f"with config.json and tokenizer files, or a hub id that can be reached ({error})"
        ) from error
    try:
        eos = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # the file is optional
        eos = None
    eos_token_ids = [eos] if isinstance(eos, int) else list(eos or [])
    if tokenizer.eos_token_id is not None:
        eos_token_ids.append(tokenizer.eos_token_id)
    if not eos_token_ids:
        raise ModelError(
            f"the model {model!r} names no EOS token, so no response could ever terminate: set "
            "eos_token in its tokenizer_config.json"
        )
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        raise ModelError(
            f"the configuration of {model!r} has no max_position_embeddings: add it, since prompts "
            "must be checked against the context"
        )
    return Tokenizer(tokenizer, eos_token_ids, context)
