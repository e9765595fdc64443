"""What every engine can do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from lmrl_env.types import Completion, Sampling

if TYPE_CHECKING:
    import torch


class Engine(Protocol):
    """Samples responses of a language model whose weights can be replaced.

    Attributes:
        version: of the weights that it samples from; 0 before the first update.
    """

    version: int

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids."""

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling: Sampling,
        n: int,
        seeds: Sequence[int],
    ) -> list[Completion]:
        """Sample n responses to each prompt.

        Args:
            prompt_ids: token ids of the prompts, without padding.
            sampling: how to draw.
            n: responses to each prompt.
            seeds: one non-negative seed a response, ``len(prompt_ids) * n`` of them; a response
                depends on its prompt, the weights, ``sampling`` and its own seed only.

        Returns:
            ``len(prompt_ids) * n`` completions, those to one prompt adjacent.
        """

    def update_weights(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int
    ) -> None:
        """Replace the weights, and forget every cached prefix.

        Args:
            named_tensors: full tensors under the names of the Transformers model's state dict.
            version: stamped on every completion from now on.
        """

    def sleep(self) -> None:
        """Free the accelerator's memory as far as the engine can, until ``wake``."""

    def wake(self) -> None:
        """Be ready to generate again."""

    def close(self) -> None:
        """Free everything."""
