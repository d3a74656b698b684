"""Loaders of the wizard's views: a draft or row that this person may see, else 404."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from django.core.exceptions import ValidationError
from django.db.models import QuerySet
from django.http import Http404, HttpRequest
from django.shortcuts import get_object_or_404

from training.models import TrainingTask
from training.services.drafts import NotADraft


def draft_for(request: HttpRequest, task_id: UUID) -> TrainingTask:
    """Raises `NotADraft` for a task that was created meanwhile."""
    rows = TrainingTask.objects.for_user(request.user).select_related(
        "owner", "base_model", "parent_model", "dataset", "validation_dataset"
    )
    task: TrainingTask = get_object_or_404(rows, pk=task_id)
    if task.status != TrainingTask.Status.DRAFT:
        raise NotADraft
    return task


def row_or_404(rows: QuerySet[Any], key: str | None) -> Any:
    """A row that was named in a request, or None when none was."""
    if not key:
        return None
    try:
        return get_object_or_404(rows, pk=key)
    except (ValueError, ValidationError):
        raise Http404 from None
