"""The one way from an address to a model: its owner's, or 404."""

from __future__ import annotations

from uuid import UUID

from django.http import HttpRequest
from django.shortcuts import get_object_or_404

from training.models import TrainedModel


def model_for(request: HttpRequest, model_id: UUID) -> TrainedModel:
    """A stranger's model and one that does not exist answer alike."""
    models = TrainedModel.objects.for_user(request.user)
    return get_object_or_404(models.select_related("task", "base_model", "parent"), pk=model_id)
