"""The vLLM server engine: samples on one or several vLLM servers, on this machine or others."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

from lmrl_env.engines import vllm_ranks as ranks
from lmrl_env.engines.vllm_client import InFlight, ServerLost, VllmClient
from lmrl_env.engines.vllm_pool import ServerPool
from lmrl_env.engines.vllm_requests import (
    check_request,
    make_completion,
    padding_bias,
    sampling_options,
)
from lmrl_env.engines.vllm_sync import WeightSync
from lmrl_env.engines.vllm_transfer import TRANSFERS
from lmrl_env.errors import ConfigurationError, WeightSyncError
from lmrl_env.tokenizer import Tokenizer, model_path
from lmrl_env.types import Completion, Sampling

if TYPE_CHECKING:
    import torch

ROUTE = "/inference/v1/generate"
"""vLLM's route from token ids to token ids, which takes all of its sampling parameters."""


class VllmServerEngine:
    """Samples on vLLM 0.32 servers, started with ``lmrl serve``; vLLM is not needed on this side.

    Every response is a request of its own, with its own seed, to the server that has the fewest.
    A server that is lost is tried again and again in the background; what it had not answered is
    asked of the others, or of itself once it is back: the seed makes it the same response. Each
    response bears the stamp of the weights that produced it; a server that was started anew, and
    so holds other weights than it should, is given the right ones before it is asked again.

    ``generate`` may run in another thread than the trainer, but not during ``update_weights``.
    Under ``torch.distributed`` all ranks share the servers: ``update_weights`` is then collective,
    and rank 0 sends.

    Attributes:
        version: of the weights that it samples from; 0 before the first update.
    """

    def __init__(
        self,
        model: str,
        tokenizer: Tokenizer,
        servers: Sequence[str],
        *,
        dtype: str = "float32",
        max_model_len: int | None = None,
        deadline: float = 600.0,
    ):
        """Connect to servers, and wait for those that are starting.

        Args:
            model: ``tiny``, a folder in the Transformers format, or a hub id: what they serve.
            tokenizer: of that model.
            servers: their URLs, such as ``http://host:8000``.
            dtype: of their computation: ``float32``, ``bfloat16`` or ``float16``.
            max_model_len: tokens of a prompt and its response together that they must hold;
                None takes what they do.
            deadline: seconds that a server may take to start or for a phase of a weight update,
                and that all of them may be away.

        Raises:
            ConfigurationError: if there is no server, or one is not as it has to be.
            EngineError: if one cannot be reached in time.
        """
        from transformers import AutoConfig

        self.version = 0
        self._tokenizer = tokenizer
        config = AutoConfig.from_pretrained(model_path(model)).get_text_config()
        self._padding = padding_bias(tokenizer, config.vocab_size)
        clients = [VllmClient(url) for url in dict.fromkeys(servers)]
        if not clients:
            raise ConfigurationError(
                "no server: expected URLs such as servers='http://host:8000,http://host:8001', of "
                "servers started with `lmrl serve MODEL`"
            )
        settings = [client.wait_until_up(deadline) for client in clients]
        for client, setting in zip(clients, settings, strict=True):
            _check_settings(client, setting, dtype, max_model_len)
        backends = {setting["weight_transfer_config"]["backend"] for setting in settings}
        if len(backends) > 1:
            raise ConfigurationError(
                f"the servers expect weights in different ways, {sorted(backends)}: start all of "
                "them with the same --weight-transfer"
            )
        self._max_model_len: int = min(s["model_config"]["max_model_len"] for s in settings)
        self._most_at_once: int = sum(s["scheduler_config"]["max_num_seqs"] for s in settings)
        sync = WeightSync(TRANSFERS[backends.pop()](), deadline)
        self._pool = ServerPool(clients, sync, deadline)

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
        untempered softmax.

        Args:
            prompt_ids: token ids of the prompts, without padding.
            sampling: how to draw.
            n: responses to each prompt.
            seeds: one non-negative seed a response, ``len(prompt_ids) * n`` of them.

        Returns:
            ``len(prompt_ids) * n`` completions, those to one prompt adjacent.

        Raises:
            ConfigurationError: if an argument is out of its range.
            EngineError: if the engine is closed, the logits are not finite, or no server with
                the right weights answers within the deadline.
            PromptTooLongError: if a prompt and its response exceed what the servers hold.
        """
        check_request(prompt_ids, sampling, n, seeds, self._max_model_len)
        prompts = [list(map(int, token_ids)) for token_ids in prompt_ids]
        bodies = [self._request(prompts[i // n], sampling, seed) for i, seed in enumerate(seeds)]
        if not bodies:
            return []
        self._pool.check_weights()
        in_flight = InFlight()
        with ThreadPoolExecutor(min(len(bodies), self._most_at_once)) as threads:
            futures = [
                threads.submit(self._pool.ask, ROUTE, body, self._completion, in_flight)
                for body in bodies
            ]
            try:
                for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                    future.result()
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                in_flight.abort()
                self._pool.wake_waiting()
                raise
        return [future.result() for future in futures]

    def update_weights(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int
    ) -> None:
        """Replace the weights of all servers together, and forget every cached prefix.

        A server that cannot be reached is left out; once it is back, it is brought up to date
        before it is asked for anything.

        Args:
            named_tensors: full tensors under the names of the Transformers model's state dict.
            version: stamped on every completion from now on.

        Raises:
            EngineError: if the engine is closed.
            WeightSyncError: if a server refuses the weights.
        """
        self._pool.check_open()
        ranks.barrier()  # no rank generates any more
        tensors = iter(named_tensors)
        failure = None
        if ranks.is_first():
            try:
                self._pool.update_weights(tensors, version)
            except Exception as error:
                failure = error
        for _ in tensors:  # gathering them is collective: every rank goes through all
            pass
        stamp, message = ranks.from_first(
            (self._pool.stamp, None if failure is None else str(failure))
        )
        if failure is not None:
            raise failure
        if message is not None:
            raise WeightSyncError(f"rank 0 could not sync version {version}: {message}")
        if not ranks.is_first():
            self._pool.expect_weights(stamp)
        self.version = version

    def sleep(self) -> None:
        """Do nothing: the servers' memory is their own."""

    def wake(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Forget the servers, which go on running."""
        self._pool.close()

    def _request(self, prompt_ids: list[int], sampling: Sampling, seed: int) -> bytes:
        """Return the body of the request for one response."""
        options = sampling_options(sampling, seed, self._tokenizer, self._padding)
        return json.dumps({"token_ids": prompt_ids, "sampling_params": options}).encode()

    def _completion(self, server: VllmClient, answer: dict[str, Any]) -> Completion:
        """Check that a server ended a response, with the right weights.

        Raises:
            ServerLost: if not.
        """
        (choice,) = answer["choices"]
        if choice["finish_reason"] not in ("stop", "length"):
            raise ServerLost(f"{server} broke off a response ({choice['finish_reason']})")
        stamps = {span["version"] for span in choice["weight_versions"]}
        if stamps != {self._pool.stamp}:
            raise ServerLost(
                f"{server} samples from the weights {sorted(stamps)} instead of "
                f"{self._pool.stamp!r}"
            )
        logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
        return make_completion(choice["token_ids"], logprobs, choice["finish_reason"], self.version)


def _check_settings(
    server: VllmClient, settings: dict[str, Any], dtype: str, max_model_len: int | None
) -> None:
    """Check that a server computes what is expected of it.

    Raises:
        ConfigurationError: if not.
    """
    model = settings["model_config"]
    transfer = settings["weight_transfer_config"]
    found = {
        "dtype": model["dtype"].removeprefix("torch."),
        "logprobs_mode": model["logprobs_mode"],
        "weight transfer": transfer and transfer["backend"],
    }
    for name, expected in (
        ("dtype", (dtype,)),
        ("logprobs_mode", ("processed_logprobs",)),
        ("weight transfer", tuple(TRANSFERS)),
    ):
        if found[name] not in expected:
            raise ConfigurationError(
                f"{server} has {name}={found[name]!r}: expected {' or '.join(expected)}; start it "
                f"with `lmrl serve MODEL --dtype {dtype}`"
            )
    if max_model_len is not None and model["max_model_len"] < max_model_len:
        raise ConfigurationError(
            f"{server} has max_model_len={model['max_model_len']}: expected {max_model_len} or "
            f"more; start it with `lmrl serve MODEL --max-model-len {max_model_len}`"
        )
