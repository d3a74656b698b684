"""What the templates show about a task, gathered from its rows: list rows, outcome, settings, history."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from django.urls import reverse
from django.utils import timezone

from training import states
from training.contract import LOG_FILE
from training.improvement import MetricChange, changes, kept_sentence, stopped_sentence
from training.models import TaskEvent, TrainedModel, TrainingTask
from training.monitor.charts import CHARTS
from training.monitor.exports import log_tail
from training.monitor.feed import TONES, loss_series, phase_of
from training.monitor.progress import BETWEEN_STEPS, duration_words, percent
from training.monitor.series import Curves, Series, latest, numbers, sparkline
from training.recipes import PARAMETERS, resolve, show

EVENTS_SHOWN = 300
Status = TrainingTask.Status
DELETABLE = states.TERMINAL | {Status.DRAFT}


@dataclass(frozen=True, kw_only=True)
class TaskRow:
    task: TrainingTask
    href: str
    tone: str
    where: str  # "Reference pass 40/180 pairs", "step 12/60"
    percent: int
    duration: str
    spark: str
    spark_words: str
    can_retry: bool
    can_delete: bool

    @property
    def is_active(self) -> bool:
        return self.task.status in {Status.QUEUED, Status.RUNNING, Status.CANCELLING}


def task_rows(tasks: list[TrainingTask]) -> list[TaskRow]:
    losses = loss_series(tasks)
    return [_row(task, losses[task.id]) for task in tasks]


def _row(task: TrainingTask, loss: Series) -> TaskRow:
    running = task.status == Status.RUNNING
    return TaskRow(
        task=task,
        href=draft_href(task) if task.status == Status.DRAFT else task.get_absolute_url(),
        tone=TONES.get(task.Status(task.status), ""),
        where=_where(task) if running else "",
        percent=percent(task.step, task.total_steps),
        duration=duration_words(seconds_run(task)),
        spark=sparkline(loss),
        spark_words=_spark_words(loss),
        can_retry=task.status in states.RETRYABLE,
        can_delete=task.status in DELETABLE,
    )


def draft_href(task: TrainingTask) -> str:
    """The first step of the wizard that still lacks something."""
    if task.base_model_id is None:
        step = "model"
    elif task.dataset_id is None:
        step = "data"
    else:
        step = "review" if task.name and task.model_name else "settings"
    return reverse("setup:step", args=[task.id, step])


def can_stop(task: TrainingTask) -> bool:
    """Stop and keep makes sense: it runs (or continues later) and nobody asked for an end yet."""
    if task.desired_state != TrainingTask.Desired.RUN:
        return False
    return task.status == Status.RUNNING or (task.status == Status.QUEUED and task.checkpoints.exists())


def seconds_run(task: TrainingTask) -> float | None:
    if task.started_at is None:
        return None
    return ((task.ended_at or timezone.now()) - task.started_at).total_seconds()


def _where(task: TrainingTask) -> str:
    if task.phase in {"training", *BETWEEN_STEPS} and task.total_steps:
        return f"step {task.step}/{task.total_steps}"
    return phase_of(task)


def _spark_words(loss: Series) -> str:
    points = numbers(loss)
    if len(points) < 2:
        return "No training loss yet"
    return f"Training loss from {points[0][1]:.3f} to {points[-1][1]:.3f} over {points[-1][0]} steps"


# --- the task page -------------------------------------------------------------------------------------
SHOWN_CHANGES = {"eval_rewards/accuracies", "eval_rewards/margins", "eval_loss", "eval_kl"}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The model that came out, and what changed on the validation pairs."""

    model: TrainedModel
    changes: list[MetricChange]
    kept: str  # which step's model it is
    stopped: str  # why the run ended early by itself


def outcome_of(task: TrainingTask) -> Outcome | None:
    model = TrainedModel.objects.filter(task=task).first()
    if model is None:
        return None
    return Outcome(
        model=model,
        changes=[row for row in changes(model.result) if row.key in SHOWN_CHANGES],
        kept=kept_sentence(model.result),
        stopped=stopped_sentence(model.result),
    )


def settings_of(task: TrainingTask) -> list[tuple[str, str, bool]]:
    """(label as in the wizard, value, whether it differs from the default), as the newest attempt has them.

    They may differ from what was chosen: half the batch after running out of memory, the rank of an adapter
    that is trained on.
    """
    values = resolve({**task.parameters, **task.plan.get("config", {})})
    return [
        (
            parameter.label,
            show(parameter, values[parameter.name]),
            values[parameter.name] != parameter.default,
        )
        for parameter in PARAMETERS
    ]


def latest_values(curves: Curves) -> list[tuple[str, str, str, str]]:
    """(chart, metric key, training value, validation value) of every drawn metric, as a table."""
    titles: dict[str, str] = {}
    for chart in CHARTS:
        for key in chart.keys:
            titles.setdefault(key.removeprefix("eval_"), chart.title)
    return [
        (title, key, _short(latest(curves, key)), _short(latest(curves, f"eval_{key}")))
        for key, title in titles.items()
    ]


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.5g}"


@dataclass(frozen=True)
class EventRow:
    event: TaskEvent
    moment: datetime


def history_of(task: TrainingTask) -> list[EventRow]:
    """The newest events, newest first."""
    events = task.events.filter(seq__lte=task.last_seq).order_by("-seq")[:EVENTS_SHOWN]
    return [EventRow(event, datetime.fromtimestamp(event.time, UTC)) for event in events]


def newest_log(task: TrainingTask) -> str:
    """The end of the newest attempt's log; the path comes from the row alone."""
    run = task.runs.order_by("-epoch").first()
    return log_tail(run.folder / LOG_FILE) if run is not None else ""


def plan_facts(task: TrainingTask) -> list[tuple[str, Any]]:
    """What the engine said about this run's data and machine."""
    plan = task.plan or {}
    facts = [
        ("Training pairs", plan.get("num_train_pairs")),
        ("Validation pairs", plan.get("num_eval_pairs")),
        ("Cut to max_context_length", plan.get("num_truncated")),
        ("Left out", plan.get("num_dropped")),
        ("Device", " · ".join(str(plan[key]) for key in ("device", "dtype") if plan.get(key))),
    ]
    return [(label, value) for label, value in facts if value not in (None, "")]
