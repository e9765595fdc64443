"""A training run: its folder, its log, its clock, its checkpoints, and its clean end."""

from __future__ import annotations

import atexit
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from gymnasium.vector import VectorEnv
from torch import nn
from transformers.utils import logging as transformers_logging

from lmrl_env.batch_plan import BatchPlan
from lmrl_env.checkpoint import TRAINER, accuracies
from lmrl_env.distributed import (
    all_lists,
    all_sum,
    any_rank,
    make_accelerator,
    shutdown,
)
from lmrl_env.env import unwrap
from lmrl_env.errors import ConfigurationError
from lmrl_env.evaluation import evaluate
from lmrl_env.ledger import PARTS, PREFIX, lap, shares, spent_on, synchronize
from lmrl_env.manifest import make_manifest
from lmrl_env.manifest_table import print_manifest
from lmrl_env.plotting import plot_curves
from lmrl_env.profiling import trace_steps, write_ledger
from lmrl_env.progress import ProgressDisplay
from lmrl_env.provenance import provenance
from lmrl_env.questions import warn_of_overlap
from lmrl_env.random_states import seed_generators
from lmrl_env.registration import resolve_engine
from lmrl_env.resumption import Resumption
from lmrl_env.rollout import Rollout
from lmrl_env.run_folder import (
    FAULTS_FILE,
    RunFolder,
    default_run_dir,
    finite,
    sample_record,
    spec_record,
)
from lmrl_env.run_setup import load_reference, load_trained_model, make_envs, start_engine
from lmrl_env.sampling import BatchSampler
from lmrl_env.settings import check_settings
from lmrl_env.signals import StopRequest
from lmrl_env.tokenizer import load_tokenizer
from lmrl_env.training_state import (
    OPTIMIZER_FILE,
    Trained,
    TrainingState,
    read_ahead,
    restore_optimizer,
    restore_other,
    restore_random_states,
    save_checkpoint,
)
from lmrl_env.verifier_errors import settle_verifier_errors, verifier_warning
from lmrl_env.waiting import phase
from lmrl_env.weight_sync import sync_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


ASYNC_TIS_CAP = 5.0
"""``--tis-cap`` where samples are one step old and no cap is given."""


class Run:
    """The folder ``config.json metrics.jsonl samples.jsonl curves.png checkpoints/step-N/``.

    It watches for Ctrl-C and SIGTERM: the loop over ``steps`` then ends after the step at hand,
    with a checkpoint. A second signal ends at once.

    Args:
        args: the program's arguments, with the fields that ``algos/`` share.
        algorithm_file: of the program, which the run is named after.

    Attributes:
        accelerator: of this rank.
        plan: which part of a batch belongs to which rank, optimiser step and micro-batch.
        folder: what is kept of the run.
        checkpoint: folder to resume from, or None.

    Raises:
        ConfigurationError: if the folder already holds a run that is not to be resumed, or one
            that these settings cannot go on with.
        RunFolderError: if another process is in the folder, or all its checkpoints are damaged.
    """

    def __init__(self, args: Any, algorithm_file: str):
        self.args = args
        self.algorithm = Path(algorithm_file).stem
        if args.async_depth and args.tis_cap is None:
            args.tis_cap = ASYNC_TIS_CAP
        args.run_dir = args.resume or args.run_dir or default_run_dir(self.algorithm, args)
        self.folder = RunFolder(args.run_dir)
        if not args.resume and self.folder.holds_a_run:
            raise ConfigurationError(
                f"--run-dir {args.run_dir!r} already holds a run: name another folder, or go on "
                f"with --resume {args.run_dir}"
            )
        self.accelerator = make_accelerator(
            args.device,
            args.dtype,
            args.tracker,
            args.run_dir,
            wait_limit=args.wait_limit,
            max_grad_norm=args.max_grad_norm,
        )
        check_settings(args, self.accelerator.num_processes)
        self.is_main = self.accelerator.is_main_process
        self.plan = BatchPlan(
            self.accelerator,
            questions=args.prompts_per_step,
            group_size=args.group_size,
            updates=args.updates_per_step,
            epochs=args.epochs,
            max_tokens=args.micro_batch_tokens,
            seed=args.seed,
            report=self._report_fault,
        )
        self._stop_request = StopRequest()  # before the first file: from then on work can be lost
        self._stack = ExitStack()
        self._stack.callback(self._stop_request.close)
        self._stack.callback(self.folder.unlock)
        settings = {**vars(args), "algorithm": self.algorithm}
        try:
            self._resumption = Resumption(self.folder, self.accelerator, settings)
        except BaseException:
            self._stack.close()
            raise
        self.checkpoint, self.last_step = self._resumption.checkpoint, self._resumption.step
        seed_generators(args.seed)
        transformers_logging.disable_progress_bar()
        self.display = ProgressDisplay(args.steps, self.last_step, self.is_main)
        self._started = time.perf_counter()
        self._spent = dict.fromkeys(PARTS, 0.0)
        self._stopping = False
        self._warned = False
        self._reported: set[str] = set()
        self._batch_saved = self.last_step > 0
        self._others: dict[str, Trained] = {}

    def load_model(self) -> PreTrainedModel:
        """Load the model to train: that of the checkpoint when the run is resumed."""
        return load_trained_model(self.args, self.checkpoint, self.accelerator.device)

    def make_envs(self) -> tuple[VectorEnv[Any, Any, Any], VectorEnv[Any, Any, Any]]:
        """Make this rank's environments, to train in and to evaluate in."""
        ranks = self.accelerator.num_processes
        envs, eval_envs = make_envs(self.args, self.plan.groups, ranks)
        self._plan_ahead(envs, eval_envs)
        return envs, eval_envs

    def _plan_ahead(self, *envs: VectorEnv[Any, Any, Any]) -> None:
        """Print what the run will do, and end the program there with ``--dry-run``."""
        train, heldout = (unwrap(each).prompts for each in envs)
        self._manifest = make_manifest(self.args, self.algorithm, self.plan, train, heldout)
        self._print_heading()
        print_manifest(self._manifest, self.display.console)
        if self.args.dry_run:
            for each in envs:
                each.close()
            self._close()
            shutdown(self.accelerator)
            raise SystemExit(0)

    # --- begin

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
        atexit.register(self._break_off)
        try:
            self._start(envs, eval_envs, policy)
        except BaseException:
            self._break_off()
            raise

    def _start(
        self,
        envs: VectorEnv[Any, Any, Any],
        eval_envs: VectorEnv[Any, Any, Any],
        policy: nn.Module,
    ) -> None:
        for each in (envs, eval_envs):
            self._stack.callback(each.close)
        args, tables = self.args, (unwrap(envs).prompts, unwrap(eval_envs).prompts)
        if self.is_main:
            overlap = warn_of_overlap(tables[0].questions, tables[1].questions)
            config = {
                **self._resumption.settings,
                "ranks": self.accelerator.num_processes,
                "env_spec": spec_record(envs.spec),
                "train_questions": f"{tables[0].questions.report}; {tables[0].dropped} too long",
                "eval_questions_set": f"{tables[1].questions.report}; {tables[1].dropped} too long",
                "overlap": overlap or None,
                "used": {
                    "engine": resolve_engine(args.engine),
                    "device": str(self.accelerator.device),
                },
                **provenance(),
            }
            for line in self._resumption.begin(config):
                self._show(line, style="bold yellow")
            self.folder.write_manifest(self._manifest)
            if overlap:
                self._show(overlap, style="bold red")
        if args.tracker:
            values = {k: v for k, v in vars(args).items() if v is not None}
            options = self._resumption.tracker_options(args.tracker)
            self.accelerator.init_trackers("lmrl_env", config=values, init_kwargs=options)
        self._canary_prompt = tables[0][0].tolist()
        max_model_len = max(table.width for table in tables) + args.max_new_tokens
        self._engine = start_engine(self.accelerator, args, policy, max_model_len)
        self._stack.callback(self._engine.close)
        self._sampler = BatchSampler(
            self._engine,
            self.plan,
            steps=args.steps,
            temperature=args.temperature,
            parts=args.rollout_parts,
            ahead=bool(args.async_depth),
        )
        self._stack.callback(self._sampler.close)
        self._sync_weights(policy)
        self._stack.enter_context(self.display)
        for row in self.folder.rows:
            self.display.update(row)
        lap()  # the ledger begins here
        if self.last_step == 0 and not self.is_stopping():
            self._write_row(self.evaluate(eval_envs))

    def _show(self, text: str, style: str = "") -> None:
        """Print a line on the first rank; text is never taken for markup."""
        self.display.console.print(text, style=style, markup=False, soft_wrap=True)

    def _print_heading(self) -> None:
        args = self.args
        self._show(f"{self.algorithm} trains {args.model} in {args.env}, into {self.folder.path}")

    def restore(self, policy: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Put the optimiser back that the run is resumed with.

        Args:
            policy: as ``prepare`` returned it.
            optimizer: as ``prepare`` returned it.
        """
        if self.checkpoint is not None:
            file = self.checkpoint / TRAINER / OPTIMIZER_FILE
            restore_optimizer(file, policy, optimizer)

    def add(self, name: str, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Make a further module and its optimiser, a critic say, part of the checkpoints.

        Where the run is resumed, both are put back.

        Args:
            name: of its files.
            module: as ``prepare`` returned it.
            optimizer: as ``prepare`` returned it.

        Raises:
            ConfigurationError: under DeepSpeed, whose engine trains one module.
        """
        if self.accelerator.distributed_type == "DEEPSPEED":
            raise ConfigurationError(
                f"a {name} beside the policy: DeepSpeed's engine trains one module; launch with "
                "examples/accelerate/fsdp2.yaml or ddp.yaml"
            )
        self._others[name] = module, optimizer
        if self.checkpoint is not None:
            folder = self.checkpoint / TRAINER
            restore_other(folder, name, self.accelerator, module, optimizer)

    def load_reference(self, policy: nn.Module) -> nn.Module:
        """Return the policy that the run started from, frozen, on this rank's device.

        Args:
            policy: as ``prepare`` returned it.
        """
        return load_reference(self.accelerator, self.args, policy)

    # --- sampling

    @phase("sampling")
    @spent_on("sampling")
    def rollout(self, envs: VectorEnv[Any, Any, Any], step: int, refill: int = 0) -> Rollout:
        """Return a batch of this rank.

        With ``--async-depth 1`` the next step's is begun at once, and is sampled by the weights of
        now while this one is trained on. Otherwise the engine sleeps until the weights are synced.

        Args:
            envs: to play in.
            step: from 1.
            refill: number of a further rollout of the step.
        """
        return self._sampler.rollout(envs, step, refill)

    @phase("grading")
    @spent_on("grading")
    def settle_verifier_errors(self, batch: Rollout) -> Rollout:
        """Treat responses whose verifier timed out or crashed as ``--on-verifier-error`` says.

        Args:
            batch: of this rank.

        Returns:
            The batch; with ``drop`` without the groups of such responses in its mask.

        Raises:
            GradingError: with ``stop``, on all ranks, if a rank has such a response.
        """
        choice = self.args.on_verifier_error
        return settle_verifier_errors(self.accelerator, batch, choice, self.args.group_size)

    # --- faults that a run survives

    def _report_fault(
        self, what: str, detail: str, batch: Rollout, causes: Mapping[int, list[str]]
    ) -> None:
        """Say what happened, once, and keep the responses that caused it; every rank calls."""
        decode = load_tokenizer(self.args.model).decode
        records = all_lists(
            self.accelerator,
            [
                {"step": self.last_step, "not_finite": names, **sample_record(batch, row, decode)}
                for row, names in causes.items()
            ],
        )
        if self.is_main and records:
            self.folder.append_faults(records)
            detail += f"; they are in {self.folder.path / FAULTS_FILE}"
        if what not in self._reported:
            self._reported.add(what)
            self._show(f"warning: step {self.last_step}: {what}: {detail}", style="bold yellow")

    # --- the clock

    def steps(self) -> Iterator[int]:
        """Yield the numbers of the steps to do, from 1, until a signal asks to stop.

        An error in the loop's body closes environments, engine and display.
        """
        if self.checkpoint is not None:
            self._restore_sampling(self.checkpoint / TRAINER)
        self.is_stopping()
        profiler = None
        if self.args.profile and self.is_main:
            profiler = self._stack.enter_context(trace_steps(self.args.profile, self.folder.path))
        synchronize(bool(self.args.profile))
        self._stack.callback(synchronize, False)
        try:
            while self.last_step < self.args.steps and not self._stopping:
                self.last_step += 1
                self._step_started = time.perf_counter()
                with phase("training"):
                    yield self.last_step
                if profiler is not None:
                    profiler.step()
        except GeneratorExit:  # the loop is left by an error, which drops this generator
            self._break_off()
            raise

    def is_stopping(self) -> bool:
        """Return whether a signal reached any rank; every rank calls, once a step."""
        if not self._stopping:
            received = self._stop_request.received is not None
            self._stopping = any_rank(self.accelerator, received)
            if self._stopping:
                self._show(f"a signal asked to stop: ending after step {self.last_step}")
        return self._stopping

    def is_due(self, every: int) -> bool:
        """Return whether something that happens every so many steps happens after this one.

        It also happens after the last step; 0 is at the last step only.
        """
        last = self.last_step == self.args.steps
        return last or (every > 0 and self.last_step % every == 0)

    # --- engine and evaluation

    def _sync_weights(self, policy: nn.Module) -> float:
        self._sampler.wait()  # the engine is busy until then
        self._engine.wake()
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

    @phase("sync")
    @spent_on("sync")
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

    @phase("evaluation")
    @spent_on("evaluation")
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

    @spent_on("logging")
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
        warning = verifier_warning(metrics)
        if warning is not None and not self._warned:
            self._warned = True
            self._show(f"warning: step {self.last_step}: {warning}", style="bold yellow")
        row = finite({"step": self.last_step, **metrics, **self._lap()})
        logged = {k: v for k, v in row.items() if k != "step" and v is not None}
        self.accelerator.log(logged, self.last_step)
        if self.is_main:
            self.folder.append_row(row)
            self.display.update(row)

    def _lap(self) -> dict[str, float]:
        """Return where the time since the last row went: its log and checkpoint included."""
        seconds = lap()
        self._spent = {part: spent + seconds[part] for part, spent in self._spent.items()}
        return {PREFIX + part: each for part, each in seconds.items()}

    # --- checkpoints and the end

    @phase("checkpoint")
    @spent_on("checkpoint")
    def save(self, policy: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Write ``checkpoints/step-N`` and ``curves.png``, and delete old checkpoints.

        Raises:
            RunFolderError: on all ranks, if the checkpoint cannot be written.
        """
        values = {
            "step": self.last_step,
            "next_question": self.last_step * self.args.prompts_per_step,
            "ranks": self.accelerator.num_processes,
        }
        trained = (policy, optimizer)
        ahead = self._sampler.wait()
        state = TrainingState.gather(self.accelerator, values, trained, self._others, ahead)
        save_checkpoint(self.accelerator, self.folder, policy, state, self.args.model)
        if self.is_main:
            checkpoints = self.folder.checkpoints
            checkpoints.prune(self.args.keep_checkpoints, accuracies(self.folder.rows))
            try:
                plot_curves(self.folder.rows, self.folder.path / "curves.png", self._title())
            except OSError as error:  # the rows are safe, from which it can be drawn later
                self._show(f"warning: curves.png is not written: {error}", style="bold yellow")

    def _restore_sampling(self, folder: Path) -> None:
        """Put random states back, and the batch that was sampled ahead."""
        restore_random_states(folder, self.accelerator.process_index)
        ahead = read_ahead(folder)
        if not self.args.async_depth or self.last_step >= self.args.steps:
            return
        if ahead is None:
            self._show("from here on not the same bit for bit: no batch had been sampled ahead")
            return
        if ahead.mask.shape[1] != self.args.max_new_tokens:
            self._show("the batch sampled ahead has another --max-new-tokens: sampling a new one")
            return
        self._sampler.put(ahead.take(self.plan.own))

    def _title(self) -> str:
        args = self.args
        return f"{self.algorithm}, {args.env}, {args.model}, {args.questions}, seed {args.seed}"

    def finish(self, *envs: VectorEnv[Any, Any, Any]) -> None:
        """Say how accuracy moved and where everything is; close environments and engine."""
        self._close()
        for each in envs:
            each.close()
        if self.is_main:
            self._lap()
            if self.args.profile:
                write_ledger(self.folder.rows, self.folder.path)
            self._summarize()

    def _close(self) -> None:
        """Close environments, engine, display, lock and signals; a second call does nothing."""
        atexit.unregister(self._break_off)
        self._stack.close()

    def _break_off(self) -> None:
        """Close everything after an error, and say what there is to go on with."""
        self._close()
        if not self.is_main or not (self.folder.path / "config.json").exists():
            return
        checkpoints = self.folder.checkpoints
        last = checkpoints.folder(checkpoints.steps[-1]) if checkpoints.steps else None
        self._show(
            f"broken off in step {self.last_step}: "
            + (f"the last checkpoint is {last}" if last else "no checkpoint yet")
            + f"; go on with: {self._resume_command}",
            style="bold red",
        )

    @property
    def _resume_command(self) -> str:
        return f"python {sys.argv[0]} --resume {self.folder.path}"

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
        self._show(f"time: {shares(self._spent)}")
        for path in sorted(self.folder.path.glob("[!.]*")):
            self._show(f"  {path}{'/' if path.is_dir() else ''}")
        if self.last_step < self.args.steps:
            self._show(f"go on with: {self._resume_command}")
