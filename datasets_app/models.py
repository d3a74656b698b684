"""A dataset: the file as it came, what validation found, and the canonical pairs on disk."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from django.conf import settings
from django.db import models
from django.urls import reverse

from datasets_app.leases import LeasedRow


class DatasetQuerySet(models.QuerySet["Dataset"]):
    def for_user(self, user: Any) -> DatasetQuerySet:
        """What this person may see: their own."""
        return self.filter(owner=user)


class Dataset(LeasedRow):
    """queued -> validating -> ready | invalid | failed.

    `invalid`: no usable pair. `ready`: at least one pair; `num_errors` lines were left out. `failed`: the job
    itself could not finish (`problem` says why). Files live in `folder`: `original` (as uploaded) and
    `pairs.jsonl` (canonical pairs, see `training.contract.RunConfig`).
    """

    class Status(models.TextChoices):
        QUEUED = "queued", "Waiting for validation"
        VALIDATING = "validating", "Validating"
        READY = "ready", "Ready"
        INVALID = "invalid", "No usable pairs"
        FAILED = "failed", "Validation failed"

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    owner = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="datasets")
    name = models.CharField(max_length=200)
    original_name = models.CharField(max_length=255)  # shown as text only, never a path
    is_example = models.BooleanField(default=False)
    created = models.DateTimeField(auto_now_add=True)

    status = models.CharField(max_length=20, choices=Status.choices, default=Status.QUEUED)
    problem = models.TextField(blank=True, default="")
    lines_done = models.PositiveIntegerField(default=0)  # progress of validation
    bytes_done = models.PositiveBigIntegerField(default=0)

    size_bytes = models.PositiveBigIntegerField(default=0)
    sha256 = models.CharField(max_length=64, blank=True, default="")  # of the original file
    pairs_sha256 = models.CharField(max_length=64, blank=True, default="")  # of pairs.jsonl
    format = models.CharField(max_length=40, blank=True, default="")  # key of datasets_app.formats
    num_lines = models.PositiveIntegerField(default=0)
    num_pairs = models.PositiveIntegerField(default=0)
    num_errors = models.PositiveIntegerField(default=0)
    num_warnings = models.PositiveIntegerField(default=0)
    stats = models.JSONField(default=dict)  # histograms, turns, prompts; see datasets_app.validation

    objects = DatasetQuerySet.as_manager()

    class Meta:
        ordering = ["-created"]
        indexes = [models.Index(fields=["owner", "-created"])]

    def __str__(self) -> str:
        return self.name

    def get_absolute_url(self) -> str:
        return reverse("datasets:detail", args=[self.id])

    @property
    def folder(self) -> Path:
        return Path(settings.DATASETS_DIR) / str(self.id)

    @property
    def original_path(self) -> Path:
        return self.folder / "original"

    @property
    def pairs_path(self) -> Path:
        return self.folder / "pairs.jsonl"

    @property
    def issues_path(self) -> Path:
        """Every finding of the validation, one JSON object a line (all of them, not a sample)."""
        return self.folder / "issues.jsonl"

    @property
    def is_ready(self) -> bool:
        return self.status == self.Status.READY
