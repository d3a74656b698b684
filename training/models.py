"""Fine-tuning tasks, what their runs reported, the machines that run them, and the models that came out."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from django.conf import settings
from django.db import models
from django.db.models import Q
from django.urls import reverse
from django.utils import timezone

from datasets_app.leases import LeasedRow
from datasets_app.models import Dataset


class BaseModelQuerySet(models.QuerySet["BaseModel"]):
    def for_user(self, user: Any) -> BaseModelQuerySet:
        """The catalogue and the starter are everybody's; a folder or Hub id is its owner's."""
        return self.filter(Q(owner=None) | Q(owner=user))


class BaseModel(LeasedRow):
    """A model that a task can start from, and where its files are.

    absent -> queued -> downloading -> ready | failed
    """

    class Source(models.TextChoices):
        STARTER = "starter", "Starter model"
        CATALOGUE = "catalogue", "Catalogue"
        FOLDER = "folder", "Folder on the server"
        HUB = "hub", "Hub id"

    class Status(models.TextChoices):
        ABSENT = "absent", "Not on disk"
        QUEUED = "queued", "Waiting for download"
        DOWNLOADING = "downloading", "Downloading"
        READY = "ready", "On disk"
        FAILED = "failed", "Failed"

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    owner = models.ForeignKey(
        settings.AUTH_USER_MODEL, null=True, blank=True, on_delete=models.CASCADE, related_name="base_models"
    )
    source = models.CharField(max_length=20, choices=Source.choices)
    kind = models.CharField(max_length=20, blank=True, default="")  # instruct | thinking | base | moe
    name = models.CharField(max_length=200)  # Hub id, or the folder's name
    path = models.CharField(
        max_length=1000, blank=True, default=""
    )  # a row's own path; never taken from a request
    revision = models.CharField(max_length=64, blank=True, default="")
    status = models.CharField(max_length=20, choices=Status.choices, default=Status.ABSENT)
    problem = models.TextField(blank=True, default="")
    bytes_done = models.PositiveBigIntegerField(default=0)
    bytes_total = models.PositiveBigIntegerField(default=0)
    facts = models.JSONField(default=dict)  # architecture, parameters, context length, module names, licence
    created = models.DateTimeField(auto_now_add=True)

    objects = BaseModelQuerySet.as_manager()

    class Meta:
        ordering = ["created"]
        constraints = [  # two clicks make one row; what is everybody's has no owner and is made at the start alone
            models.UniqueConstraint(
                fields=["owner", "name"], condition=Q(source="hub"), name="one_row_per_hub_id"
            ),
            models.UniqueConstraint(
                fields=["owner", "path"], condition=Q(source="folder"), name="one_row_per_folder"
            ),
        ]

    def __str__(self) -> str:
        return self.name

    @property
    def is_ready(self) -> bool:
        return self.status == self.Status.READY


class TrainingTaskQuerySet(models.QuerySet["TrainingTask"]):
    def for_user(self, user: Any) -> TrainingTaskQuerySet:
        """What this person may see: their own."""
        return self.filter(owner=user)


class TrainingTask(LeasedRow):
    """One fine-tuning task; a draft is the wizard's state.

    draft -> queued -> running -> succeeded | stopped | failed
                  \\-> cancelled    running -> cancelling -> cancelled
    A status changes only through `training.states`, by a conditional update. `desired_state` is what the person
    wants ("run", "stop" = end early and keep the model, "cancel"); the worker reads it at every heartbeat.
    """

    class Status(models.TextChoices):
        DRAFT = "draft", "Draft"
        QUEUED = "queued", "Queued"
        RUNNING = "running", "Running"
        CANCELLING = "cancelling", "Cancelling"
        SUCCEEDED = "succeeded", "Succeeded"
        STOPPED = "stopped", "Stopped, model kept"
        FAILED = "failed", "Failed"
        CANCELLED = "cancelled", "Cancelled"

    class Desired(models.TextChoices):
        RUN = "run"
        STOP = "stop"
        CANCEL = "cancel"

    class Evaluation(models.TextChoices):
        SPLIT = "split", "Hold out a share of the training data"
        FILE = "file", "Use another dataset"
        NONE = "none", "No validation"

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    owner = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="tasks")
    created = models.DateTimeField(auto_now_add=True)
    updated = models.DateTimeField(auto_now=True)

    # --- what the wizard fills in
    name = models.CharField("Task Display Name", max_length=120, blank=True, default="")
    model_name = models.CharField("Custom Model Name", max_length=120, blank=True, default="")
    base_model = models.ForeignKey(
        BaseModel, null=True, blank=True, on_delete=models.SET_NULL, related_name="tasks"
    )
    parent_model = models.ForeignKey(  # start from a model of My Models; base_model is then that model's base
        "training.TrainedModel", null=True, blank=True, on_delete=models.SET_NULL, related_name="child_tasks"
    )
    dataset = models.ForeignKey(
        Dataset, null=True, blank=True, on_delete=models.SET_NULL, related_name="tasks"
    )
    evaluation = models.CharField(max_length=10, choices=Evaluation.choices, default=Evaluation.SPLIT)
    validation_share = models.FloatField(default=0.1)
    validation_dataset = models.ForeignKey(
        Dataset, null=True, blank=True, on_delete=models.SET_NULL, related_name="validates_tasks"
    )
    eval_steps = models.PositiveIntegerField(default=0)  # 0 = chosen by the studio
    parameters = models.JSONField(default=dict)  # names of training.recipes; only what the person set
    num_devices = models.PositiveSmallIntegerField(
        default=1
    )  # GPUs of one machine that it trains on together

    # --- where it stands
    status = models.CharField(max_length=20, choices=Status.choices, default=Status.DRAFT)
    desired_state = models.CharField(max_length=10, choices=Desired.choices, default=Desired.RUN)
    queued_at = models.DateTimeField(null=True, blank=True)
    started_at = models.DateTimeField(null=True, blank=True)
    ended_at = models.DateTimeField(null=True, blank=True)
    phase = models.CharField(max_length=30, blank=True, default="")
    phase_done = models.PositiveIntegerField(default=0)
    phase_total = models.PositiveIntegerField(default=0)
    phase_unit = models.CharField(max_length=20, blank=True, default="")
    step = models.PositiveIntegerField(default=0)
    total_steps = models.PositiveIntegerField(default=0)
    plan = models.JSONField(default=dict)  # the engine's PlanEvent, and the resolved configuration
    last_seq = models.PositiveBigIntegerField(default=0)
    error = models.TextField(blank=True, default="")  # one sentence
    next_step = models.TextField(blank=True, default="")  # what the person can do
    log_tail = models.TextField(blank=True, default="")  # last lines of engine.log, when failed

    objects = TrainingTaskQuerySet.as_manager()

    class Meta:
        ordering = ["-created"]
        indexes = [models.Index(fields=["owner", "-created"]), models.Index(fields=["status", "queued_at"])]

    def __str__(self) -> str:
        if self.name:
            return self.name
        begun = timezone.localtime(self.created)
        return f"Draft of {begun.day} {begun:%b, %H:%M}"

    def get_absolute_url(self) -> str:
        return reverse("tasks:detail", args=[self.id])

    @property
    def folder(self) -> Path:
        """One directory per attempt lies below it: `e1/`, `e2/`… each is a run directory of the engine."""
        return Path(settings.RUNS_DIR) / str(self.id)

    @property
    def is_terminal(self) -> bool:
        return self.status in {
            self.Status.SUCCEEDED,
            self.Status.STOPPED,
            self.Status.FAILED,
            self.Status.CANCELLED,
        }


class Run(models.Model):
    """One attempt at a task: which process on which machine, under which epoch of the lease."""

    task = models.ForeignKey(TrainingTask, on_delete=models.CASCADE, related_name="runs")
    epoch = models.PositiveIntegerField()
    host = models.CharField(max_length=200)
    boot_id = models.CharField(max_length=64)
    pid = models.PositiveIntegerField(default=0)  # of the supervisor
    pid_created = models.FloatField(default=0.0)  # a pid alone may belong to a stranger after a reboot
    engine_pid = models.PositiveIntegerField(default=0)
    engine_created = models.FloatField(default=0.0)
    events_offset = models.PositiveBigIntegerField(default=0)  # bytes of events.jsonl that are rows already
    device = models.CharField(
        max_length=2000, blank=True, default=""
    )  # "cpu", or GPU uuids with commas between
    started = models.DateTimeField(default=timezone.now)  # a claim says `Now()`, the clock of `queued_at`
    ended = models.DateTimeField(null=True, blank=True)
    exit_code = models.IntegerField(null=True, blank=True)
    reason = models.TextField(blank=True, default="")
    resumed_from_step = models.PositiveIntegerField(default=0)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["task", "epoch"], name="one_run_per_epoch")]
        ordering = ["epoch"]

    def __str__(self) -> str:
        return f"{self.task_id} attempt {self.epoch}"

    @property
    def devices(self) -> list[str]:
        return self.device.split(",")

    @property
    def folder(self) -> Path:
        return self.task.folder / f"e{self.epoch}"


class MetricPoint(models.Model):
    """All metric values of one step of one split; replayed steps after a resume are the same point."""

    task = models.ForeignKey(TrainingTask, on_delete=models.CASCADE, related_name="points")
    seq = models.PositiveBigIntegerField()
    step = models.PositiveIntegerField()
    split = models.CharField(max_length=5)  # train | eval
    values = models.JSONField()  # metric key -> number or null
    time = models.FloatField()  # unix seconds, by the engine's clock

    class Meta:
        constraints = [models.UniqueConstraint(fields=["task", "split", "step"], name="one_point_per_step")]
        indexes = [models.Index(fields=["task", "seq"])]
        ordering = ["seq"]

    def __str__(self) -> str:
        return f"{self.task_id} {self.split} {self.step}"


class TaskEvent(models.Model):
    """A sentence in a task's history: what the engine said, what the worker saw, what a person did."""

    task = models.ForeignKey(TrainingTask, on_delete=models.CASCADE, related_name="events")
    seq = models.PositiveBigIntegerField()
    time = models.FloatField()
    level = models.CharField(max_length=10, default="info")  # info | warning | error
    source = models.CharField(max_length=10, default="engine")  # engine | worker | person
    text = models.TextField()
    dedupe = models.CharField(max_length=64, blank=True, default="")  # same event read twice is stored once

    class Meta:
        constraints = [
            models.UniqueConstraint(
                fields=["task", "dedupe"], condition=~Q(dedupe=""), name="one_row_per_event"
            )
        ]
        indexes = [models.Index(fields=["task", "seq"])]
        ordering = ["seq"]

    def __str__(self) -> str:
        return self.text[:80]


class Checkpoint(models.Model):
    """A checkpoint that counts: complete on disk and entered under the right epoch."""

    task = models.ForeignKey(TrainingTask, on_delete=models.CASCADE, related_name="checkpoints")
    epoch = models.PositiveIntegerField()
    step = models.PositiveIntegerField()
    path = models.CharField(max_length=1000)  # below the task's folder, so that a data directory may be moved
    created = models.DateTimeField(auto_now_add=True)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["task", "epoch", "step"], name="one_checkpoint_row")]
        ordering = ["step", "epoch"]

    def __str__(self) -> str:
        return f"{self.task_id} step {self.step}"

    @property
    def folder(self) -> Path:
        return self.task.folder / self.path


class WorkerHost(models.Model):
    """A machine with a worker: what it has, and when it was last heard of."""

    host = models.CharField(max_length=200)
    queue = models.CharField(max_length=20)  # gpu | default
    boot_id = models.CharField(max_length=64)
    pid = models.PositiveIntegerField()
    last_seen = models.DateTimeField()
    slots = models.PositiveIntegerField(default=1)
    ram_bytes = models.PositiveBigIntegerField(default=0)
    gpus = models.JSONField(default=list)  # [{"uuid", "name", "memory_bytes"}]

    class Meta:
        constraints = [models.UniqueConstraint(fields=["host", "queue"], name="one_row_per_worker")]

    def __str__(self) -> str:
        return f"{self.host} {self.queue}"


class TrainedModelQuerySet(models.QuerySet["TrainedModel"]):
    def for_user(self, user: Any) -> TrainedModelQuerySet:
        """What this person may see: their own."""
        return self.filter(owner=user)


class TrainedModel(models.Model):
    """What came out of a task: an adapter in its own folder. Made in the transaction that ends the task."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    owner = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="trained_models"
    )
    task = models.OneToOneField(
        TrainingTask, null=True, blank=True, on_delete=models.SET_NULL, related_name="trained_model"
    )
    name = models.CharField(max_length=120)
    base_model = models.ForeignKey(
        BaseModel, null=True, on_delete=models.SET_NULL, related_name="trained_models"
    )
    base_model_name = models.CharField(max_length=200)  # survives the row above
    parent = models.ForeignKey(
        "self", null=True, blank=True, on_delete=models.SET_NULL, related_name="children"
    )
    parent_name = models.CharField(max_length=120, blank=True, default="")  # of a parent that was deleted
    dataset_name = models.CharField(max_length=200, blank=True, default="")
    dataset_sha256 = models.CharField(max_length=64, blank=True, default="")
    parameters = models.JSONField(default=dict)  # the resolved configuration
    result = models.JSONField(default=dict)  # the engine's result.json
    size_bytes = models.PositiveBigIntegerField(default=0)
    created = models.DateTimeField(auto_now_add=True)

    objects = TrainedModelQuerySet.as_manager()

    class Meta:
        ordering = ["-created"]

    def __str__(self) -> str:
        return self.name

    def get_absolute_url(self) -> str:
        return reverse("my_models:detail", args=[self.id])

    @property
    def folder(self) -> Path:
        return Path(settings.MODELS_DIR) / str(self.id)
