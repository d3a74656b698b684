"""One line per part of the studio; each part owns its own addresses."""

from __future__ import annotations

from django.urls import include, path
from django.views.generic import RedirectView

urlpatterns = [
    path("", RedirectView.as_view(pattern_name="tasks:list"), name="home"),
    path("", include("studio.accounts.urls")),
    path("datasets/", include("datasets_app.urls")),
    path("tasks/", include("studio.wizard.urls")),
    path("tasks/", include("training.monitor.urls")),
    path("models/", include("studio.my_models.urls")),
    path("models/", include("studio.serving.urls")),
]
