"""Preference datasets: upload, formats, validation, preview."""

from __future__ import annotations

from django.apps import AppConfig


class DatasetsConfig(AppConfig):
    name = "datasets_app"
