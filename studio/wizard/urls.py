"""Addresses of the four steps."""

from __future__ import annotations

from django.urls import URLPattern, URLResolver, path, register_converter

from studio.wizard import model_views, views
from training.services.draft_checks import STEPS


class StepConverter:
    """The name of a step."""

    regex = "|".join(STEPS)

    def to_python(self, value: str) -> str:
        return value

    def to_url(self, value: str) -> str:
        return value


register_converter(StepConverter, "step")

app_name = "setup"
urlpatterns: list[URLPattern | URLResolver] = [
    path("new/", views.setup_new, name="new"),
    path("help/choosing-a-model/", views.choosing_a_model, name="choosing"),
    path("<uuid:task_id>/setup/<step:step>/", views.setup_step, name="step"),
    path("<uuid:task_id>/setup/<step:step>/summary/", views.setup_summary, name="summary"),
    path("<uuid:task_id>/setup/model/download/", model_views.model_download, name="download"),
    path("<uuid:task_id>/setup/model/folder/", model_views.model_folder, name="folder"),
    path("<uuid:task_id>/setup/model/hub/", model_views.model_hub, name="hub"),
]
