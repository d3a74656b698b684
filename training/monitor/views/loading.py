"""The one way from an address to a task: its owner's, or 404."""

from __future__ import annotations

from uuid import UUID

from django.http import HttpRequest
from django.shortcuts import get_object_or_404

from training.models import TrainingTask


def task_for(request: HttpRequest, task_id: UUID) -> TrainingTask:
    """A stranger's task and one that does not exist answer alike."""
    tasks = TrainingTask.objects.for_user(request.user)
    return get_object_or_404(tasks.select_related("base_model", "dataset", "parent_model"), pk=task_id)
