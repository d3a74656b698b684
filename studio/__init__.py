"""The Django project. The Celery application is made here so that every process knows the same broker."""

from __future__ import annotations

from studio.celery import app as celery_app

__all__ = ["celery_app"]
