"""A Python interpreter that the model can call in the middle of a response."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium.vector import VectorEnv, VectorWrapper

from lmrl_env.env import unwrap
from lmrl_env.errors import ConfigurationError
from lmrl_env.sandbox import SandboxResult, run_python, warn_unless_filtered
from lmrl_env.wrappers.outcome_reward import add_info

_CUT = "\n...\n"


class PythonTool(VectorWrapper):
    r"""Runs the programs that a response calls for, and shows the model what they print.

    A call is ``<python>PROGRAM</python>``. With the token that completes it a step of K tokens
    ends, in its slot; the program runs in a sandbox (``lmrl_env.sandbox``), and its output is
    inserted behind the call:

        <python>print(6 * 7)</python>
        <output>
        42
        </output>

    The inserted tokens are state and not action: they count towards the budget ``max_new_tokens``,
    ``response_mask`` is False there, and no algorithm's loss depends on their log-probs. Where a
    program raises, the last line of the traceback follows what it printed; where it is stopped,
    the reason. A response may call any number of times, and each program begins anew. A call that
    is not closed is text, and so is one that ends with the response or its budget. ``info``
    gains ``tool_calls``, the number of calls, for the slots that end.

    Gao et al. 2022, "PAL: Program-aided Language Models", arXiv:2211.10435; Feng et al. 2025,
    "ReTool", arXiv:2504.11536, trains such calls and leaves their output out of the loss.

    >>> from lmrl_env import make_token_vector_env
    >>> envs = make_token_vector_env(1, template="none", max_new_tokens=96, tokens_per_step=96)
    >>> envs = PythonTool(envs)
    >>> observations, _ = envs.reset(seed=0)
    >>> action = envs.unwrapped.tokenizer.encode("<python>print(6 * 7)</python>")
    >>> action += [-1] * (96 - len(action))
    >>> observations, *_ = envs.step([action])
    >>> text = envs.unwrapped.tokenizer.decode(observations["input_ids"][0])
    >>> "<python>print(6 * 7)</python>\n<output>\n42\n</output>\n" in text
    True

    Args:
        envs: a ``TokenVectorEnv``; wrappers that change observations belong above this one.
        opening: begins a call; ``"```python\n"`` and ``closing="\n```"`` are fenced blocks.
        closing: ends it.
        output_format: what is inserted, with ``{output}`` once.
        max_output_tokens: of the output; the middle of a longer one is left out.
        timeout: seconds of processor time for a program.
        memory_limit: bytes for a program.
        workers: programs that run at the same time.

    Raises:
        ConfigurationError: for an empty tag, an ``output_format`` without ``{output}``, or a
            number outside of its range.
    """

    def __init__(
        self,
        envs: VectorEnv,
        *,
        opening: str = "<python>",
        closing: str = "</python>",
        output_format: str = "\n<output>\n{output}\n</output>\n",
        max_output_tokens: int = 256,
        timeout: float = 2.0,
        memory_limit: int = 2**30,
        workers: int = 4,
    ):
        super().__init__(envs)
        self._token_mdp = env = unwrap(envs)
        self._cut = env.tokenizer.encode_text(_CUT)
        if not opening or not closing or output_format.count("{output}") != 1:
            raise ConfigurationError(
                f"opening={opening!r}, closing={closing!r}, output_format={output_format!r}: "
                "expected tags that are not empty, and a format with {output} once"
            )
        least = len(self._cut) + 2
        if max_output_tokens < least or timeout <= 0 or memory_limit <= 0 or workers < 1:
            raise ConfigurationError(
                f"max_output_tokens={max_output_tokens}, timeout={timeout}, "
                f"memory_limit={memory_limit}, workers={workers}: expected at least {least} tokens "
                "and 1 worker, and positive seconds and bytes"
            )
        self.output_format = output_format
        self.max_output_tokens = max_output_tokens
        self.timeout = timeout
        self.memory_limit = memory_limit
        self.workers = workers
        warn_unless_filtered()
        env.pause_at([closing])
        self._closing = env.tokenizer.stop_strings((closing,))
        inner = rf"(?:(?!{re.escape(opening)}).)*?"
        self._call = re.compile(
            f"{re.escape(opening)}({inner}){re.escape(closing)}", flags=re.DOTALL
        )

    def step(
        self, actions: Any
    ) -> tuple[Any, npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any], dict[str, Any]]:
        """Step, and insert the output of the calls that it completed."""
        observations, rewards, terminations, truncations, info = self.env.step(actions)
        programs = self._programs()
        with ThreadPoolExecutor(self.workers) as pool:
            for slot, output in zip(programs, pool.map(self._run, programs.values()), strict=True):
                state = self._token_mdp.insert_tokens(slot, output)
                for key, value in state.items():
                    observations[key][slot] = value
        ended = np.logical_or(terminations, truncations)
        if ended.any():
            calls = [self._count(slot) if ended[slot] else 0 for slot in range(self.num_envs)]
            add_info(info, "tool_calls", np.array(calls), ended)
        return observations, rewards, terminations, truncations, info

    def _programs(self) -> dict[int, str]:
        """Return by slot the programs of the calls that end with the tokens written last."""
        env = self._token_mdp
        programs = {}
        for slot in np.flatnonzero(env.running & (env.response_lengths > 0)):
            turn = env.last_turn(slot)
            if self._closing.completed_by_last(turn):
                call = self._call.search(env.tokenizer.decode(turn))
                if call is not None:
                    programs[int(slot)] = call.group(1)
        return programs

    def _run(self, program: str) -> list[int]:
        """Run a program and return the tokens to insert."""
        result = run_python(program, timeout=self.timeout, memory_limit=self.memory_limit)
        encode = self._token_mdp.tokenizer.encode_text
        before, after = self.output_format.split("{output}")
        output = encode(_shown(result, self.timeout))
        if len(output) > self.max_output_tokens:
            kept = self.max_output_tokens - len(self._cut)
            output = [*output[: kept - kept // 2], *self._cut, *output[-(kept // 2) :]]
        return [*encode(before), *output, *encode(after)]

    def _count(self, slot: int) -> int:
        """Return how many times tokens were inserted into a slot's response."""
        _, is_action = self._token_mdp.response(slot)
        return int((is_action[:-1] & ~is_action[1:]).sum())


def _shown(result: SandboxResult, timeout: float) -> str:
    r"""Return what the model sees of a program's run.

    >>> _shown(SandboxResult("error", "2\n", "Traceback ...\nNameError: x\n", 1), 1.0)
    '2\nNameError: x'
    """
    reasons = {
        "ok": "",
        "error": (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1],
        "timeout": f"stopped after {timeout:g} seconds",
        "output": "stopped: too much output",
    }
    parts = (result.stdout.rstrip(), reasons[result.status])
    return "\n".join(part for part in parts if part)
