"""The vLLM server engine: samples on one or several vLLM servers, on this machine or others."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

from lmrl_env.engines import vllm_ranks as ranks
from lmrl_env.engines.vllm_client import (
    FIRST_PAUSE,
    LONGEST_PAUSE,
    InFlight,
    ServerLost,
    ServerRefused,
    VllmClient,
)
from lmrl_env.engines.vllm_requests import (
    check_request,
    make_completion,
    padding_bias,
    sampling_options,
)
from lmrl_env.engines.vllm_transfer import FIRST_STAMP, TRANSFERS, WeightSync
from lmrl_env.errors import ConfigurationError, EngineError, WeightSyncError
from lmrl_env.tokenizer import Tokenizer, model_path
from lmrl_env.types import Completion, Sampling

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

ROUTE = "/inference/v1/generate"
"""vLLM's route from token ids to token ids, which takes all of its sampling parameters."""

ATTEMPTS = 8
"""Servers that may be lost under one response before the run stops."""


class _Server:
    """A server with what is known of it.

    Attributes:
        client: speaks to it.
        outstanding: responses that it was asked for and has not answered.
        problem: why it is asked for none, or None.
    """

    def __init__(self, url: str):
        self.client = VllmClient(url)
        self.outstanding = 0
        self.problem: str | None = None
        self.capacity = 0


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
            deadline: seconds that a server may take to start, to come back, to answer for a
                response, or for a phase of a weight update.

        Raises:
            ConfigurationError: if there is no server, or one is not as it has to be.
            EngineError: if one cannot be reached in time.
        """
        from transformers import AutoConfig

        self.version = 0
        self._tokenizer = tokenizer
        self._deadline = deadline
        config = AutoConfig.from_pretrained(model_path(model)).get_text_config()
        self._padding = padding_bias(tokenizer, config.vocab_size)
        self._servers = [_Server(url) for url in dict.fromkeys(servers)]
        if not self._servers:
            raise ConfigurationError(
                "no server: expected URLs such as servers='http://host:8000,http://host:8001', of "
                "servers started with `lmrl serve MODEL`"
            )
        settings = [server.client.wait_until_up(deadline) for server in self._servers]
        for server, setting in zip(self._servers, settings, strict=True):
            _check_settings(server.client, setting, dtype, max_model_len)
            server.capacity = setting["scheduler_config"]["max_num_seqs"]
        backends = {setting["weight_transfer_config"]["backend"] for setting in settings}
        if len(backends) > 1:
            raise ConfigurationError(
                f"the servers expect weights in different ways, {sorted(backends)}: start all of "
                "them with the same --weight-transfer"
            )
        self._max_model_len: int = min(s["model_config"]["max_model_len"] for s in settings)
        self._sync = WeightSync(TRANSFERS[backends.pop()](), deadline)
        self._changed = threading.Condition()  # guards the servers' figures
        self._syncing = threading.Lock()  # held while a server's weights are replaced
        self._closed = threading.Event()
        for server in self._servers:
            if (stamp := server.client.weight_stamp()) != self._sync.stamp:
                server.problem = f"{server.client} holds the weights {stamp!r} of an earlier run"

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
        bodies = [
            {
                "token_ids": prompts[i // n],
                "sampling_params": sampling_options(sampling, seed, self._tokenizer, self._padding),
            }
            for i, seed in enumerate(seeds)
        ]
        if not bodies:
            return []
        self._check_weights()
        in_flight = InFlight()
        width = min(len(bodies), sum(server.capacity for server in self._servers))
        with ThreadPoolExecutor(width, thread_name_prefix="vllm-server") as pool:
            futures = [pool.submit(self._complete, body, in_flight) for body in bodies]
            try:
                for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                in_flight.abort()
                with self._changed:
                    self._changed.notify_all()
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
        self._check_open()
        ranks.barrier()  # no rank generates any more
        tensors = iter(named_tensors)
        failure = None
        if ranks.is_first():
            try:
                self._send(tensors, version)
            except Exception as error:
                failure = error
        for _ in tensors:  # gathering them is collective: every rank goes through all
            pass
        self._sync.stamp, message = ranks.from_first(
            (self._sync.stamp, None if failure is None else str(failure))
        )
        if failure is not None:
            raise failure
        if message is not None:
            raise WeightSyncError(f"rank 0 could not sync version {version}: {message}")
        if not ranks.is_first():
            self._regain(self._servers)
        self.version = version

    def sleep(self) -> None:
        """Do nothing: the servers' memory is their own."""

    def wake(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Forget the servers, which go on running."""
        self._closed.set()
        with self._changed:
            self._changed.notify_all()
        with self._syncing:
            self._sync.close()

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise EngineError("the vLLM server engine is closed: make a new one")

    def _check_weights(self) -> None:
        """Refuse to sample, before any sync, from weights that are not the model's."""
        self._check_open()
        problems = [server.problem for server in self._servers if server.problem]
        if problems and self._sync.stamp == FIRST_STAMP:
            raise EngineError(
                f"{'; '.join(problems)}: expected those that it was started with; update_weights "
                "first, or start it anew"
            )

    def _complete(self, body: dict[str, Any], in_flight: InFlight) -> Completion:
        """Return one response, from whichever server answers."""
        data = json.dumps(body).encode()
        problem: EngineError | None = None
        for _ in range(ATTEMPTS):
            server = self._acquire(in_flight)
            try:
                answer = server.client.request(
                    "POST", ROUTE, data, self._deadline, "write a response", in_flight
                )
                return self._completion(server, answer)
            except ServerLost as error:
                problem = error
            except ServerRefused as error:
                if error.status == 400:
                    raise ConfigurationError(f"vLLM refuses the request: {error}") from error
                if error.status < 500:
                    raise
                problem = error
            finally:
                self._release(server)
            if not in_flight.aborted:
                self._lose(server, str(problem))
        raise EngineError(
            f"{ATTEMPTS} servers were lost under one response, the last one: {problem}; look at "
            "their logs"
        )

    def _completion(self, server: _Server, answer: dict[str, Any]) -> Completion:
        """Check that a server ended a response, with the right weights.

        Raises:
            ServerLost: if not.
        """
        (choice,) = answer["choices"]
        if choice["finish_reason"] not in ("stop", "length"):
            raise ServerLost(f"{server.client} broke off a response ({choice['finish_reason']})")
        stamps = {span["version"] for span in choice["weight_versions"]}
        if stamps != {self._sync.stamp}:
            raise ServerLost(
                f"{server.client} samples from the weights {sorted(stamps)} instead of "
                f"{self._sync.stamp!r}"
            )
        logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
        return make_completion(choice["token_ids"], logprobs, choice["finish_reason"], self.version)

    def _acquire(self, in_flight: InFlight) -> _Server:
        """Return the server with the fewest outstanding responses, of those that can be asked."""
        end = time.monotonic() + self._deadline
        with self._changed:
            while True:
                self._check_open()
                if in_flight.aborted:
                    raise ServerLost("the call was broken off")
                able = [server for server in self._servers if server.problem is None]
                if able:
                    server = min(able, key=lambda s: s.outstanding)
                    server.outstanding += 1
                    return server
                if not self._changed.wait(max(0.0, end - time.monotonic())):
                    raise EngineError(
                        f"no server could be asked for a response for {self._deadline:g} s: "
                        + "; ".join(str(server.problem) for server in self._servers)
                    )

    def _release(self, server: _Server) -> None:
        with self._changed:
            server.outstanding -= 1

    def _lose(self, server: _Server, problem: str) -> None:
        """Ask a server for nothing until it is back with the right weights."""
        with self._changed:
            if server.problem is not None:
                return
            server.problem = problem
        logger.warning("%s; its responses are asked of another server or of itself again", problem)
        threading.Thread(target=self._recover, args=(server,), daemon=True).start()

    def _recover(self, server: _Server) -> None:
        """Try a lost server again and again, and bring it up to date."""
        pause = FIRST_PAUSE
        while not self._closed.wait(pause):
            try:
                stamp = server.client.weight_stamp()
                with self._syncing:
                    if server.problem is not None and not self._closed.is_set():
                        if stamp != self._sync.stamp:
                            self._sync.resync(server.client)
                        self._regain([server])
                return
            except EngineError as error:
                server.problem = str(error)
                pause = min(2 * pause, LONGEST_PAUSE)

    def _regain(self, servers: Sequence[_Server]) -> None:
        with self._changed:
            for server in servers:
                server.problem = None
            self._changed.notify_all()

    def _send(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Replace the weights of every server that can be reached."""
        with self._syncing:
            reached = [server for server in self._servers if _is_reached(server)]
            lost = self._sync.update([server.client for server in reached], tensors, version)
            self._regain([server for server in reached if server.client not in lost])
        for server in reached:
            if server.client in lost:
                self._lose(server, str(lost[server.client]))


def _is_reached(server: _Server) -> bool:
    """Return whether a server can be reached, if it could not be before."""
    if server.problem is None:
        return True
    try:
        server.client.weight_stamp()
    except ServerLost as error:
        logger.warning("%s; it is left out of the sync", error)
        return False
    return True


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
