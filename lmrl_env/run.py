"""A training run: its folder, its log, its clock, its checkpoints, and its clean end."""

from __future__ import annotations

import atexit
import dataclasses
import json
import math
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import VectorEnv
from torch import nn
from transformers.utils import logging as transformers_logging

from lmrl_env.allocator import keep_freed_memory
from lmrl_env.batch_plan import BatchPlan
from lmrl_env.checkpoint import (
    OPTIMIZER_FILE,
    latest_checkpoint,
    load_optimizer,
    load_other,
    read_state,
    save_checkpoint,
)
from lmrl_env.distributed import all_sum, any_rank, make_accelerator
from lmrl_env.env import unwrap
from lmrl_env.errors import ConfigurationError, GradingError
from lmrl_env.evaluation import evaluate
from lmrl_env.options import check_range
from lmrl_env.plotting import plot_curves
from lmrl_env.policy import Policy, load_model
from lmrl_env.progress import ProgressDisplay
from lmrl_env.prompts import PromptTable
from lmrl_env.provenance import provenance
from lmrl_env.questions import warn_of_overlap
from lmrl_env.registration import make_engine, resolve_engine
from lmrl_env.rollout import VERIFIER_ERRORS, Rollout, rollout
from lmrl_env.run_folder import RunFolder
from lmrl_env.weight_sync import sync_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


ASYNC_TIS_CAP = 2.0
"""``--tis-cap`` where samples are one step old and no cap is given."""

VERIFIER_ERRORS_WARNED_OF = 0.01
"""Share of responses without a verdict above which a run warns."""


class Run:
    """The folder ``config.json metrics.jsonl samples.jsonl curves.png checkpoints/step-N/``.

    It watches for Ctrl-C and SIGTERM: the loop over ``steps`` then ends after the step at hand,
    with a checkpoint. A second Ctrl-C ends at once.

    Args:
        args: the program's arguments, with the fields that ``algos/`` share.
        algorithm_file: of the program, which the run is named after.

    Attributes:
        accelerator: of this rank.
        plan: which part of a batch belongs to which rank, optimiser step and micro-batch.
        folder: what is kept of the run.
        checkpoint: folder to resume from, or None.

    Raises:
        ConfigurationError: if the folder already holds a run that is not to be resumed.
    """

    def __init__(self, args: Any, algorithm_file: str):
        self.args = args
        self.algorithm = Path(algorithm_file).stem
        for name in ("steps", "epochs", "eval_questions", "max_new_tokens", "rollout_parts"):
            check_range(args, name, least=1)
        check_range(args, "micro_batch_tokens", least=1)
        for name in ("seed", "lr", "warmup_steps", "weight_decay"):
            check_range(args, name, least=0)
        for name in ("entropy_coef", "eval_every", "checkpoint_every"):
            check_range(args, name, least=0)
        for name in ("temperature", "max_grad_norm", "tis_cap"):
            check_range(args, name, above=0)
        check_range(args, "adam_beta2", least=0, most=1)
        check_range(args, "async_depth", least=0, most=1)
        check_range(args, "keep_checkpoints", least=0)
        check_range(args, "lora_rank", least=1)
        check_range(args, "wait_limit", above=0)
        if args.async_depth and args.tis_cap is None:
            args.tis_cap = ASYNC_TIS_CAP
        args.run_dir = args.resume or args.run_dir or _default_run_dir(self.algorithm, args)
        self.folder = RunFolder(args.run_dir)
        if not args.resume and self.folder.holds_a_run:
            raise ConfigurationError(
                f"--run-dir {args.run_dir!r} already holds a run: name another folder, or go on "
                f"with --resume {args.run_dir}"
            )
        keep_freed_memory()
        self.accelerator = make_accelerator(args.device, args.dtype, args.tracker, args.run_dir)
        self.is_main = self.accelerator.is_main_process
        self.plan = BatchPlan(
            self.accelerator,
            questions=args.prompts_per_step,
            group_size=args.group_size,
            updates=args.updates_per_step,
            epochs=args.epochs,
            max_tokens=args.micro_batch_tokens,
            seed=args.seed,
        )
        self.checkpoint = latest_checkpoint(self.folder.checkpoints) if args.resume else None
        self.last_step = 0
        if self.checkpoint is not None:
            self.last_step = int(read_state(self.checkpoint)["step"])
        torch.manual_seed(args.seed)
        transformers_logging.disable_progress_bar()
        self.display = ProgressDisplay(args.steps, self.last_step, self.is_main)
        self._stack = ExitStack()
        self._started = time.perf_counter()
        self._stop_signal: signal.Signals | None = None
        self._stopping = False
        self._warned = False
        self._batch_saved = self.last_step > 0
        self._others: dict[str, tuple[nn.Module, torch.optim.Optimizer]] = {}
        self._sampler = ThreadPoolExecutor(1)
        self._next_batch: Future[Rollout] | None = None

    def load_model(self) -> PreTrainedModel:
        """Load the model to train: that of the checkpoint when the run is resumed."""
        return load_model(str(self.checkpoint or self.args.model), device=self.accelerator.device)

    def make_envs(self) -> tuple[VectorEnv[Any, Any, Any], VectorEnv[Any, Any, Any]]:
        """Make this rank's environments, to train in and to evaluate in."""
        args = self.args
        common = {
            "model": args.model,
            "engine": args.engine,
            "max_new_tokens": args.max_new_tokens,
            "tokens_per_step": args.max_new_tokens,
            "autoreset_mode": "Disabled",
        }
        slots = math.ceil(args.eval_questions / self.accelerator.num_processes)
        try:
            envs = gym.make_vec(
                args.env,
                self.plan.groups * args.group_size,
                questions=args.questions,
                group_size=args.group_size,
                **common,
            )
            eval_envs = gym.make_vec(
                args.env,
                slots,
                questions=args.eval_set or args.questions,
                split="all" if args.eval_set else "heldout",
                **common,
            )
        except (gym.error.Error, ImportError, TypeError) as error:
            raise ConfigurationError(
                f"--env {args.env!r} cannot be made ({error}): expected an id such as MathR1-v0 or "
                "my_module:MyEnv-v0 of a module here or installed, over make_token_vector_env"
            ) from error
        return envs, eval_envs

    # --- begin

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._stop_signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._stop_signal = signal.Signals(number)

    def start(
        self,
        envs: VectorEnv[Any, Any, Any],
        eval_envs: VectorEnv[Any, Any, Any],
        policy: nn.Module,
    ) -> None:
        """Write ``config.json``, start trackers, engine and display, and evaluate the start.

        Args:
            envs: to train in.
            eval_envs: to evaluate in.
            policy: as ``prepare`` returned it.
        """
        args, tables = self.args, (unwrap(envs).prompts, unwrap(eval_envs).prompts)
        if self.is_main:
            overlap = warn_of_overlap(tables[0].questions, tables[1].questions)
            config = {
                **vars(args),
                "algorithm": self.algorithm,
                "ranks": self.accelerator.num_processes,
                "env_spec": _spec_record(envs.spec),
                "train_questions": f"{tables[0].questions.report}; {tables[0].dropped} too long",
                "eval_questions_set": f"{tables[1].questions.report}; {tables[1].dropped} too long",
                "overlap": overlap or None,
                "used": {
                    "engine": resolve_engine(args.engine),
                    "device": str(self.accelerator.device),
                },
                **provenance(),
            }
            self.folder.write_config(config)
            self._print_heading(tables[0], tables[1])
            if overlap:
                self._show(overlap, style="bold red")
        if args.tracker:
            values = {k: v for k, v in vars(args).items() if v is not None}
            self.accelerator.init_trackers("lmrl_env", config=values)
        self._canary_prompt = tables[0][0].tolist()
        module = self.accelerator.unwrap_model(policy).model
        self._engine = make_engine(
            args.engine,
            args.model,
            max_model_len=max(table.width for table in tables) + args.max_new_tokens,
            module=None if args.async_depth else module,
            dtype=args.dtype,
            seed=args.seed,
        )
        self._sync_weights(policy)
        if self.is_main:
            self.folder.keep_rows(self.last_step if self.checkpoint else None)
        atexit.register(self._stack.close)  # an error must not leave a terminal without a cursor
        self._stack.enter_context(self.display)
        for row in self.folder.rows:
            self.display.update(row)
        for number in (signal.SIGINT, signal.SIGTERM):
            self._stack.callback(signal.signal, number, signal.signal(number, self._on_signal))
        if self.last_step == 0:
            self._write_row(self.evaluate(eval_envs))

    def _show(self, text: str, style: str = "") -> None:
        """Print a line on the first rank; text is never taken for markup."""
        self.display.console.print(text, style=style, markup=False, soft_wrap=True)

    def _print_heading(self, train: PromptTable, heldout: PromptTable) -> None:
        args = self.args
        self._show(f"{self.algorithm} trains {args.model} in {args.env}, into {self.folder.path}")
        if args.resume:
            source = self.checkpoint or "the start, since the run has no checkpoint yet"
            self._show(f"going on from {source}")
        evaluated = f", {min(args.eval_questions, len(heldout))} of them asked at an evaluation"
        for name, table, asked in (("train", train, ""), ("held-out", heldout, evaluated)):
            note = f", {table.dropped} too long for the context" if table.dropped else ""
            note += asked
            self._show(f"{name} questions: {table.questions.report}{note}", style="dim")

    def restore(self, policy: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Put the optimiser back that the run is resumed with.

        Args:
            policy: as ``prepare`` returned it.
            optimizer: as ``prepare`` returned it.
        """
        if self.checkpoint is not None:
            load_optimizer(self.checkpoint / OPTIMIZER_FILE, optimizer)

    def add(self, name: str, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Make a further module and its optimiser, a critic say, part of the checkpoints.

        Where the run is resumed, both are put back.

        Args:
            name: of its files.
            module: as ``prepare`` returned it.
            optimizer: as ``prepare`` returned it.
        """
        self._others[name] = module, optimizer
        if self.checkpoint is not None:
            load_other(self.checkpoint, name, module, optimizer)

    def load_reference(self, vocab_size: int) -> nn.Module:
        """Return the policy that the run started from, frozen, on this rank's device.

        Args:
            vocab_size: V, ids that the tokenizer can emit.
        """
        model = load_model(self.args.model, device=self.accelerator.device)
        policy = Policy(model, vocab_size).requires_grad_(False)
        return self.accelerator.prepare_model(policy, evaluation_mode=True)

    # --- sampling

    def rollout(self, envs: VectorEnv[Any, Any, Any], step: int, refill: int = 0) -> Rollout:
        """Return a batch of this rank.

        With ``--async-depth 1`` the next step's is begun at once, and is sampled by the weights of
        now while this one is trained on.

        Args:
            envs: to play in.
            step: from 1.
            refill: number of a further rollout of the step.
        """
        if not self.args.async_depth:
            return self._play(envs, step, refill)
        begun = None if refill else self._next_batch
        future = begun or self._sampler.submit(self._play, envs, step, refill)
        if not refill:
            last = step == self.args.steps
            self._next_batch = None if last else self._sampler.submit(self._play, envs, step + 1, 0)
        return future.result()

    def _play(self, envs: VectorEnv[Any, Any, Any], step: int, refill: int) -> Rollout:
        return rollout(
            envs,
            self._engine,
            question_ids=self.plan.question_ids(
                step, unwrap(envs).prompts.questions.parts, refill=refill
            ),
            seeds=self.plan.seeds(step, refill=refill),
            temperature=self.args.temperature,
            parts=self.args.rollout_parts,
        )

    # --- verifiers that fail

    def settle_verifier_errors(self, batch: Rollout) -> Rollout:
        """Treat responses whose verifier timed out or crashed as ``--on-verifier-error`` says.

        Args:
            batch: of this rank.

        Returns:
            The batch; with ``drop`` without the groups of such responses in its mask.

        Raises:
            GradingError: with ``stop``, on all ranks, if a rank has such a response.
        """
        failed = batch.has_verifier_error
        choice = self.args.on_verifier_error
        if choice == "stop" and any_rank(self.accelerator, bool(failed.any())):
            raise GradingError(
                "--on-verifier-error stop: "
                + (_describe(batch, int(failed.argmax())) if failed.any() else "on another rank")
                + "; correct the verifier, give it a longer timeout, or take zero or drop"
            )
        return batch.drop_groups(failed, self.args.group_size) if choice == "drop" else batch

    def _warn_of_verifier_errors(self, metrics: Mapping[str, Any]) -> None:
        """Say once that too many responses were left without a verdict."""
        for prefix in ("", "eval/"):
            shares = {s: metrics.get(f"{prefix}verifier/{s}") or 0.0 for s in VERIFIER_ERRORS}
            if sum(shares.values()) > VERIFIER_ERRORS_WARNED_OF and not self._warned:
                self._warned = True
                listed = ", ".join(f"{status} {share:.1%}" for status, share in shares.items())
                self._show(
                    f"warning: step {self.last_step}: the verifier did not finish on many "
                    f"{'held-out ' if prefix else ''}responses ({listed}), which counts as wrong "
                    "where --on-verifier-error does not say otherwise; this is said once, the "
                    f"shares are {prefix}verifier/* in metrics.jsonl",
                    style="bold yellow",
                )

    # --- the clock

    def steps(self) -> Iterator[int]:
        """Yield the numbers of the steps to do, from 1, until a signal asks to stop."""
        while self.last_step < self.args.steps and not self._stopping:
            self.last_step += 1
            self._step_started = time.perf_counter()
            yield self.last_step

    def is_stopping(self) -> bool:
        """Return whether a signal reached any rank; every rank calls, once a step."""
        self._stopping = any_rank(self.accelerator, self._stop_signal is not None)
        if self._stopping:
            self._show("a signal asked to stop: ending with a checkpoint")
        return self._stopping

    def is_due(self, every: int) -> bool:
        """Return whether something that happens every so many steps happens after this one.

        It also happens after the last step; 0 is at the last step only.
        """
        last = self.last_step == self.args.steps
        return last or (every > 0 and self.last_step % every == 0)

    # --- engine and evaluation

    def _sync_weights(self, policy: nn.Module) -> float:
        if self._next_batch is not None:
            self._next_batch.result()  # the engine is busy until then
        return sync_weights(
            self.accelerator,
            policy,
            self._engine,
            self.last_step,
            prompt_ids=self._canary_prompt,
            temperature=self.args.temperature,
            max_new_tokens=self.args.max_new_tokens,
            dtype=self.args.dtype,
        )

    def sync(self, policy: nn.Module, batch: Rollout, train_seconds: float) -> dict[str, float]:
        """Give the engine the new weights, and return where the step's time went.

        Sampled tokens per second count those that the batch was left with.

        Args:
            policy: as ``prepare`` returned it.
            batch: the step's rollout, whose times it is.
            train_seconds: of the step's updates.
        """
        started = time.perf_counter()
        gap = self._sync_weights(policy)
        sync_seconds = time.perf_counter() - started
        ages = (self.last_step - 1 - batch.versions).sum()
        counts = [batch.mask.sum(), ages, len(batch.versions)]
        tokens, age, responses = all_sum(self.accelerator, counts).tolist()
        return {
            "mismatch/canary_logprob_abs_max": gap,
            "sampling/staleness": age / responses,
            "throughput/sample_tokens_per_s": tokens / batch.sample_seconds,
            "throughput/step_seconds": time.perf_counter() - self._step_started,
            "time/sample": batch.sample_seconds,
            "time/verify": batch.env_seconds,
            "time/train": train_seconds,
            "time/sync": sync_seconds,
        }

    def evaluate(self, eval_envs: VectorEnv[Any, Any, Any]) -> dict[str, float | None]:
        """Return ``eval/*`` metrics of the engine's weights."""
        return evaluate(
            eval_envs,
            self._engine,
            self.accelerator,
            questions=self.args.eval_questions,
            temperature=self.args.temperature,
            seed=self.args.seed,
        )

    # --- the log

    def log(
        self, metrics: Mapping[str, Any], batch: Rollout, envs: VectorEnv[Any, Any, Any]
    ) -> None:
        """Append a row to ``metrics.jsonl`` and a group of responses to ``samples.jsonl``.

        Args:
            metrics: of the step, the same on every rank.
            batch: of this rank; the first rank's first group is written.
            envs: that it was sampled in.
        """
        self._write_row(metrics)
        if self.is_main:
            decode = unwrap(envs).tokenizer.decode
            self.folder.append_samples(self.last_step, batch, self.args.group_size, decode)
        if self.args.save_batch and not self._batch_saved:
            name = self.args.save_batch
            if self.accelerator.num_processes > 1:
                name = f"{name}.rank{self.accelerator.process_index}"
            batch.save(name, group_size=self.args.group_size, args=vars(self.args))
            self._batch_saved = True

    def _write_row(self, metrics: Mapping[str, Any]) -> None:
        self._warn_of_verifier_errors(metrics)
        row = {"step": self.last_step, **metrics}
        self.accelerator.log({k: v for k, v in metrics.items() if v is not None}, self.last_step)
        if self.is_main:
            self.folder.append_row(row)
            self.display.update(row)

    # --- checkpoints and the end

    def save(self, policy: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Write ``checkpoints/step-N`` and ``curves.png``."""
        self.accelerator.wait_for_everyone()
        if self.is_main:
            folder = self.folder.checkpoints / f"step-{self.last_step}"
            model = self.accelerator.unwrap_model(policy).model
            state = {"step": self.last_step}
            save_checkpoint(folder, model, self.args.model, optimizer, state, self._others)
            plot_curves(self.folder.rows, self.folder.path / "curves.png", self._title())
        self.accelerator.wait_for_everyone()

    def _title(self) -> str:
        args = self.args
        return f"{self.algorithm}, {args.env}, {args.model}, {args.questions}, seed {args.seed}"

    def finish(self, *envs: VectorEnv[Any, Any, Any]) -> None:
        """Say how accuracy moved and where everything is; close environments and engine."""
        self._stack.close()
        if self.is_main:
            self._summarize()
        self._sampler.shutdown()
        for each in envs:
            each.close()
        self._engine.close()

    def _summarize(self) -> None:
        evaluated = [row for row in self.folder.rows if row.get("eval/accuracy") is not None]
        if evaluated:
            first, last = evaluated[0], evaluated[-1]
            self._show(
                f"held-out accuracy {first['eval/accuracy']:.1%} (step {first['step']}) → "
                f"{last['eval/accuracy']:.1%} (step {last['step']}), "
                f"{last['eval/questions']} questions at temperature {self.args.temperature}",
                style="bold",
            )
        minutes, seconds = divmod(round(time.perf_counter() - self._started), 60)
        self._show(f"{self.last_step} of {self.args.steps} steps in {minutes} min {seconds} s")
        for path in sorted(self.folder.path.iterdir()):
            self._show(f"  {path}{'/' if path.is_dir() else ''}")
        if self.last_step < self.args.steps:
            self._show(f"go on with: python {sys.argv[0]} --resume {self.folder.path}")


def _spec_record(spec: EnvSpec | None) -> dict[str, Any] | None:
    """Return a spec as JSON can hold it, functions by their path."""
    if spec is None:
        return None
    paths: dict[str, Any] = {
        name: f"{function.__module__}:{function.__qualname__}"
        for name in ("entry_point", "vector_entry_point")
        if callable(function := getattr(spec, name))
    }
    return json.loads(dataclasses.replace(spec, **paths).to_json())


def _describe(batch: Rollout, row: int) -> str:
    """Return a response that has no verdict, as an error names it."""
    return (
        f"the verifier's status is {batch.verifier_status[row]!r} for response {row} to question "
        f"{batch.question_ids[row]}, gold answer {batch.answers[row]!r}: "
        f"{batch.responses[row][-500:]!r}"
    )


def _default_run_dir(algorithm: str, args: Any) -> str:
    """Return ``runs/ALGORITHM-ENV-SEED-TIME``."""
    name = args.env.rsplit(":", 1)[-1]
    return f"runs/{algorithm}-{name}-s{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
