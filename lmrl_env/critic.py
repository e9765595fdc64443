"""The critic: a language model's body with a scalar head, as values of the states of a response."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmrl_env.distributed import all_sum
from lmrl_env.policy import TokenBatch, at_tokens, response_states

if TYPE_CHECKING:
    from accelerate import Accelerator


class Critic(nn.Module):
    """V(q, o₍<ₜ₎), the return that is expected before token t of a response.

    The head starts at 0, so that the values do.

    Args:
        model: a causal language model, as ``load_model`` gives it, which becomes the critic's own:
            its weights are where the critic starts. Its output embedding is not used.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self._no_split_modules = model._no_split_modules  # what Accelerate shards one by one
        self.head = nn.Linear(model.config.get_text_config().hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.to(model.device)
        output = model.get_output_embeddings()
        if output.weight is not model.get_input_embeddings().weight:
            output.requires_grad_(False)

    def forward(self, batch: TokenBatch) -> Tensor:
        """Return the values, shape (n, K), float32 or float64, in units of reward, 0 at padding.

        Args:
            batch: prompts and responses, on the model's device.
        """
        states, places = response_states(self.model, batch)
        values = self.head(states).squeeze(-1)
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        return at_tokens(values, places, batch.response_ids.shape)


def explained_variance(
    accelerator: Accelerator, values: Tensor, returns: Tensor, mask: Tensor
) -> float | None:
    """Return 1 - Var(R - V) / Var(R) over the action tokens of all ranks; None if Var(R) is 0.

    Args:
        accelerator: of this rank.
        values: shape (n, K), before the updates.
        returns: shape (n, K).
        mask: shape (n, K), bool.
    """
    kept, errors = returns[mask].double(), (returns - values)[mask].double()
    sums = [kept.sum(), kept.square().sum(), errors.sum(), errors.square().sum()]
    moments = all_sum(accelerator, [len(kept), *(value.item() for value in sums)])
    n, r, r2, e, e2 = moments.tolist()
    variance = r2 / n - (r / n) ** 2
    return 1 - (e2 / n - (e / n) ** 2) / variance if variance > 1e-12 else None
