"""Fine-tuning tasks, their workers and their live pages."""

from __future__ import annotations

from django.apps import AppConfig


class TrainingConfig(AppConfig):
    name = "training"
