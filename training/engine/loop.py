"""The steps of a run: order, gradient, update, metrics, evaluation, checkpoints, and when to leave."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from training.activation_memory import TRAIN_BUDGET
from training.contract import Metric, RunConfig
from training.engine.checkpoints import Identity, prune_checkpoints, save_checkpoint, tensors_sha256
from training.engine.data import TokenizedPair, noun_of, within_budget
from training.engine.divergence import is_exploding, require_calm_gradients, require_finite_updates
from training.engine.errors import InterruptedRunError, RefusedError, is_disk_full
from training.engine.evaluation import Evaluator
from training.engine.events import EventLog, finite
from training.engine.interrupts import Interrupts
from training.engine.logps import token_logps
from training.engine.metrics import Window, as_evaluation
from training.engine.objective import Objective, PairLogps, mean_chosen_tokens
from training.engine.order import Order
from training.engine.pair_record import PairRecord
from training.engine.policy import Policy
from training.engine.reference import ReferenceLogps
from training.engine.routing import LoadBalance
from training.engine.stopping import Best, Stopping, Verdict
from training.engine.watch import Watch

Values = dict[str, float | None]
StoppedBy = Literal["request", "early_stopping", "kl_budget"]
logger = logging.getLogger(__name__)


@dataclasses.dataclass
class RunState:
    """What a checkpoint carries beside tensors, as JSON. Order and dropout follow from `step` alone."""

    step: int = 0  # optimizer steps done
    num_tokens: int = 0
    seconds: float = 0.0  # spent by earlier attempts up to their checkpoint
    phase_seconds: dict[str, float] = dataclasses.field(default_factory=dict)  # likewise
    nonfinite_streak: int = 0
    exploding_streak: int = 0
    grad_norms: list[float] = dataclasses.field(default_factory=list)  # of the last calm steps
    initial_metrics: Values = dataclasses.field(default_factory=dict)
    last_training: Values = dataclasses.field(default_factory=dict)
    last_evaluation: Values = dataclasses.field(default_factory=dict)
    best: Best = dataclasses.field(default_factory=Best)

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> RunState:
        return cls(**(state | {"best": Best(**state.get("best", {}))}))


def decayed(parameters: Collection[torch.nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay is for matrices: it would pull norms, biases and DoRA's lengths away from where they work."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class Loop:
    """Holds what the steps share. `run` is the whole story."""

    def __init__(
        self,
        *,
        config: RunConfig,
        run_dir: Path,
        policy: Policy,
        train: Sequence[TokenizedPair],
        evaluation: Sequence[TokenizedPair],
        reference: ReferenceLogps | None,
        order: Order,
        events: EventLog,
        interrupts: Interrupts,
        identity: Identity,
        fingerprint: dict[str, str],
        watch: Watch | None = None,
    ) -> None:
        self.config, self.run_dir, self.policy = config, run_dir, policy
        self.train, self.evaluation, self.reference = train, evaluation, reference
        self.order, self.events, self.interrupts = order, events, interrupts
        self.identity, self.fingerprint = identity, fingerprint
        self.state = RunState()
        self.objective = Objective(config)
        self.world = policy.scorer.placement.world
        self.record = PairRecord(run_dir, self.objective, self.world, wanted=config.record_pairs)
        self.scorer = policy.scorer
        self.balance = LoadBalance.of(policy.scorer, config.router_aux_loss_coef)
        if self.balance is not None and self.world.lockstep:
            raise RefusedError(  # its extra passes depend on how a rank's own pairs are cut
                "The parallelism fsdp cannot keep the use of the experts balanced.",
                "Set router_aux_loss_coef to 0, or the parallelism to data.",
            )
        self.evaluator = Evaluator(policy, evaluation, reference, self.objective, self.balance)
        self.trainable = policy.trainable
        plan = policy.activations
        self.has_dropout = config.finetuning_type != "full" and config.lora_dropout > 0
        self.budget = plan.token_budget if plan else TRAIN_BUDGET[policy.scorer.placement.device.type]
        self.optimizer = torch.optim.AdamW(
            decayed(self.trainable.values(), config.weight_decay), lr=config.learning_rate, fused=True
        )
        self.schedule = self._schedule()
        self.watch, self.stopping = watch, Stopping(config)
        self.stopped_by: StoppedBy | None = None
        self._verdict = Verdict(is_best=False)
        self._evaluated_step = self._checkpoint_step = -1
        self._saved = time.monotonic()

    def run(self) -> Literal["succeeded", "stopped"]:
        """Steps until the last, a stop or an interrupt. A checkpoint precedes everything that may be long.

        A stop that was asked for before the first step lets that one be taken: then there is a model to keep.
        """
        self.policy.model.train()
        self._record_start()
        try:
            while True:
                asked_to_stop = any(self.world.together(self._asked_to_stop))
                done = self.state.step >= self.order.total_steps
                stopping = not done and self.state.step > 0 and asked_to_stop
                if self._evaluation_due(done or stopping):
                    self._evaluate()
                if status := self._ended(done=done, stopping=stopping):
                    return status
                self._say_progress()
                self._step()
                if self.world.on_main(self._checkpoint_due):
                    self._checkpoint()
        except InterruptedRunError:
            if self.state.step > 0 and self.optimizer.state:
                self._checkpoint()
            raise InterruptedRunError(
                f"The run was interrupted at step {self.state.step} of {self.order.total_steps}.",
                "Start it again: it goes on from there.",
            ) from None
        except Exception as error:
            self._say_what_is_kept(error)
            raise

    def _ended(self, *, done: bool, stopping: bool) -> Literal["succeeded", "stopped"] | None:
        """A run that its own evaluations ended has succeeded; `stopped` is what a person asked for."""
        if done:
            return "succeeded"
        if self._verdict.stop:
            self.stopped_by = self._verdict.stop
            self.events.log(self._verdict.sentence)
            return "succeeded"
        if stopping:
            self.stopped_by = "request"
            self.events.log(f"Stopped at step {self.state.step}, as asked. What was learned is kept.")
            return "stopped"
        return None

    def _say_what_is_kept(self, error: Exception) -> None:
        if is_disk_full(error) and self.state.best.step:
            with contextlib.suppress(OSError):
                self.events.log(f"The checkpoint of step {self.state.best.step}, the best so far, is kept.")

    def _asked_to_stop(self) -> bool:
        self.interrupts.check()
        return self.interrupts.stop_requested

    def score(self, pairs: Sequence[TokenizedPair], tokens_per_pair: float) -> tuple[torch.Tensor, PairLogps]:
        """Each pair's share of the step's loss [B], with gradient, and the log-probabilities behind it."""
        states = self.scorer(pairs)
        tokens = token_logps(states.hidden, states.labels, self.policy.head)
        before = None if self.reference is None else self.reference.token_logps(pairs, tokens.device)
        logps = PairLogps.of(states, tokens, before)
        losses = self.objective.losses(logps, tokens_per_pair=tokens_per_pair)
        return (losses if self.balance is None else self.balance.added(losses, states.routing)), logps

    def _schedule(self) -> Callable[[int], float]:
        """Share of the highest learning rate at a step (0-based). A function: nothing to restore."""
        from transformers import get_scheduler

        total = self.order.total_steps
        # The first step of a warm-up has the rate 0: a run of nothing but warm-up would train nothing.
        warmup = min(math.ceil(total * self.config.warmup_ratio), total - 1)
        scheduler = get_scheduler(
            self.config.lr_scheduler_type,
            torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0),
            num_warmup_steps=warmup,
            num_training_steps=total,
        )
        share: Callable[[int], float] = scheduler.lr_lambdas[0]
        return share

    def _step(self) -> None:
        """One optimizer step: the gradient is the mean over its pairs, however micro-batches cut them."""
        began = time.monotonic()
        step = self.state.step
        learning_rate = self.config.learning_rate * self.schedule(step)
        micro_batches = self.order.micro_batches(step)
        num_pairs = sum(len(indices) for indices in micro_batches)
        tokens_per_pair = mean_chosen_tokens([self.train[i] for indices in micro_batches for i in indices])
        num_tokens = sum(self.train[index].num_tokens for indices in micro_batches for index in indices)
        shares = self.world.together(
            lambda: self._accumulate(step, micro_batches, num_pairs, tokens_per_pair)
        )
        self.world.sum_gradients(self.trainable.values())
        limit = self.config.max_grad_norm if self.config.max_grad_norm > 0 else math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.trainable.values(), limit))
        values = Window.merged(self.objective, [window for window, _ in shares]).values()
        values |= LoadBalance.values([balance for _, balance in shares])
        usable = math.isfinite(norm) and finite(values[Metric.LOSS]) is not None
        if usable:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

        self.state.step += 1
        self.state.num_tokens += num_tokens
        values |= {
            Metric.GRAD_NORM: norm,
            Metric.LEARNING_RATE: learning_rate,
            Metric.EPOCH: self.order.epoch_after(self.state.step),
            Metric.NUM_TOKENS: self.state.num_tokens,
            Metric.TOKENS_PER_SECOND: num_tokens / (time.monotonic() - began),
        }
        self.state.last_training = {key: finite(value) for key, value in values.items()}
        self.events.metrics("train", self.state.step, values)
        self._say_progress()
        self._watch(usable, norm)

    def _accumulate(
        self, step: int, micro_batches: list[list[int]], num_pairs: int, tokens_per_pair: float
    ) -> tuple[dict[str, Any], list[float] | None]:
        """This rank's share of the step's gradient, added up; sums for the metrics, of its pairs.

        Whole micro-batches: for each draws its own dropout, and has its own auxiliary loss.
        """
        window = Window(self.objective)
        cut = [
            list(within_budget([self.train[index] for index in indices], budget=self.budget))
            for indices in micro_batches
        ]
        shares = self.world.shares([sum(pair.num_tokens for part in parts for pair in part) for parts in cut])
        for micro_step in shares[self.world.rank]:
            reseed = functools.partial(self.order.reseed_dropout, step, micro_step)
            reseed()
            if self.balance is not None:
                self.balance.begin(cut[micro_step], self.scorer, reseed)
            for pairs in cut[micro_step]:
                losses, logps = self.score(pairs, tokens_per_pair)
                (losses.sum() / num_pairs).backward()  # type: ignore[no-untyped-call]
                window.add(losses, logps, truncated=sum(pair.truncated for pair in pairs))
                self.record.add("train", step, pairs, logps, losses, dropout=self.has_dropout)
                window.add_sampled_kl(logps)
                self._say_progress()  # a step may take an hour: whoever watches must not take it for a hang
        for _ in range(self.world.missing([sum(len(cut[index]) for index in share) for share in shares])):
            losses, _ = self.score(cut[0][0], tokens_per_pair)  # for the other ranks: its gradient is zero
            (losses.sum() * 0.0).backward()  # type: ignore[no-untyped-call]
        return window.state(), None if self.balance is None else self.balance.end()

    def _watch(self, usable: bool, norm: float) -> None:
        """What happened to this update, for the log; raises `DivergedError` when it happens again and again."""
        state, max_norm = self.state, self.config.max_grad_norm
        remedy = "Lower the learning_rate, or raise warmup_ratio"
        remedy += " or beta." if self.objective.needs_reference else "."
        state.nonfinite_streak = 0 if usable else state.nonfinite_streak + 1
        if not usable:
            self.events.log(
                f"Step {state.step} gave a loss or gradient that is not finite: skipped.", "warning"
            )
            require_finite_updates(state.nonfinite_streak, remedy)
        elif is_exploding(state.grad_norms, norm, max_norm):
            state.exploding_streak += 1
            self.events.log(
                f"Step {state.step} had a gradient norm of {norm:.3g}, far above the usual.", "warning"
            )
            require_calm_gradients(state.exploding_streak, norm, state.grad_norms, remedy)
        else:
            state.exploding_streak = 0

    def _evaluation_due(self, last: bool) -> bool:
        step, every = self.state.step, self.config.eval_steps
        if not (self.evaluation or self.watch) or self._evaluated_step == step:
            return False
        return last or step == 0 or (every > 0 and step % every == 0)

    def _evaluate(self) -> None:
        total, unit = len(self.evaluation), f"{noun_of(self.objective.sides)}s"

        def progress(done: int) -> None:
            self.events.phase("evaluating", done=done, total=total, unit=unit)
            self.interrupts.check()

        self.events.phase("evaluating", total=total, unit=unit)
        values: Values = {}
        if self.evaluation:
            values = self.evaluator.evaluate(progress, record=self.record, step=self.state.step)
            self.record.flush(self.state.step)
        if self.watch:
            look = functools.partial(self.watch.look, self.state.step, self.interrupts.check)
            values |= as_evaluation(self.world.on_main(look))
        self.policy.rest_reference()
        self.events.metrics("eval", self.state.step, values)
        self.state.last_evaluation = {key: finite(value) for key, value in values.items()}
        if self.state.step == 0:
            self.state.initial_metrics = self.state.last_evaluation
        self._evaluated_step = self.state.step
        if self.evaluation:
            self._judge()

    def _judge(self) -> None:
        best = self.state.best
        self._verdict = self.stopping.judge(
            best, self.state.step, self.state.last_evaluation, self.state.last_training
        )
        if self._verdict.is_best and self.config.load_best_model_at_end and self.optimizer.state:
            if self._checkpoint_step != self.state.step:
                self._checkpoint()
            self.world.on_main(lambda: prune_checkpoints(self.run_dir, spare=best.step))

    def _checkpoint_due(self) -> bool:
        if self.state.nonfinite_streak or self.state.exploding_streak or not self.optimizer.state:
            return False
        step = self.state.step
        on_time = time.monotonic() - self._saved >= self.config.save_seconds
        return on_time or step % self.config.save_steps == 0 or step >= self.order.total_steps

    def _record_start(self) -> None:
        if self.state.step == 0 and self.reference is not None:
            if self.world.is_main:
                other = self.config.reference_model_path or self.config.reference_adapter_path
                met = (self.train[i] for i in self.order.pairs_met())
                self.record.add_start(met, self.reference, policy_is_reference=not other)
            self.record.flush(0)

    def _checkpoint(self) -> None:
        self.record.flush(self.state.step)  # before: what the checkpoint has behind it is on disk
        state = dataclasses.replace(
            self.state,
            seconds=self.events.seconds(),
            phase_seconds=self.events.phase_seconds(),
        )
        self.world.require_same("the weights", tensors_sha256(self.trainable))

        def save() -> None:
            path = save_checkpoint(
                self.run_dir,
                step=self.state.step,
                run_id=self.config.run_id,
                identity=self.identity,
                fingerprint=self.fingerprint,
                trainable=self.trainable,
                optimizer=self.optimizer,
                state=dataclasses.asdict(state),
                spare=self.state.best.step,
                extra_files=self.policy.checkpoint_files,
            )
            self.events.checkpoint(self.state.step, str(path.relative_to(self.run_dir)))

        self.world.on_main(save)
        self._checkpoint_step = self.state.step
        self._saved = time.monotonic()

    def _say_progress(self) -> None:
        self.events.phase("training", done=self.state.step, total=self.order.total_steps, unit="steps")
