"""Batches for the training, at its pace or one step ahead of it."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from gymnasium.vector import VectorEnv

from lmrl_env.batch_plan import BatchPlan
from lmrl_env.env import unwrap
from lmrl_env.rollout import Rollout, rollout

if TYPE_CHECKING:
    from lmrl_env.engines.engine import Engine


class BatchSampler:
    """Plays the rollouts of a rank; the engine sleeps in between.

    One step ahead it does not: the next batch is begun as soon as one is handed out, and is
    sampled by the weights of then while that one is trained on.

    Args:
        engine: samples.
        plan: says which questions and seeds.
        steps: of the run, behind which nothing is begun.
        temperature: of the samples.
        parts: of a rollout: one is graded while the next is sampled.
        ahead: whether to sample one step ahead; then weights must be replaced behind ``wait``.
    """

    def __init__(
        self,
        engine: Engine,
        plan: BatchPlan,
        *,
        steps: int,
        temperature: float,
        parts: int,
        ahead: bool,
    ):
        self._engine = engine
        self._plan = plan
        self._steps = steps
        self._temperature = temperature
        self._parts = parts
        self._thread = ThreadPoolExecutor(1) if ahead else None
        self._next: Future[Rollout] | None = None

    def rollout(self, envs: VectorEnv[Any, Any, Any], step: int, refill: int = 0) -> Rollout:
        """Return a batch.

        Args:
            envs: to play in.
            step: from 1.
            refill: number of a further rollout of the step.
        """
        if self._thread is None:
            self._engine.wake()
            batch = self._play(envs, step, refill)
            self._engine.sleep()  # the training may need its memory
            return batch
        if refill:
            return self._thread.submit(self._play, envs, step, refill).result()
        begun = self._next or self._thread.submit(self._play, envs, step, 0)
        self._next = None
        if step < self._steps:
            self._next = self._thread.submit(self._play, envs, step + 1, 0)
        return begun.result()

    def _play(self, envs: VectorEnv[Any, Any, Any], step: int, refill: int) -> Rollout:
        return rollout(
            envs,
            self._engine,
            question_ids=self._plan.question_ids(
                step, unwrap(envs).prompts.questions.parts, refill=refill
            ),
            seeds=self._plan.seeds(step, refill=refill),
            temperature=self._temperature,
            parts=self._parts,
        )

    def wait(self) -> Rollout | None:
        """Return the batch that was begun ahead, if there is one, when the engine is done."""
        return None if self._next is None else self._next.result()

    def put(self, batch: Rollout) -> None:
        """Take a batch for the next step that was sampled before, by a run that is resumed."""
        self._next = Future()
        self._next.set_result(batch)

    def close(self) -> None:
        """Begin nothing more, and wait for what is under way."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
