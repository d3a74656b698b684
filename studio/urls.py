"""One line per part of the studio; each part owns its own addresses."""

from __future__ import annotations

from django.urls import include, path
from django.views.generic import RedirectView

from studio.health import health

handler400 = "studio.errors.bad_request"
handler403 = "studio.errors.permission_denied"
handler404 = "studio.errors.page_not_found"
handler500 = "studio.errors.server_error"

urlpatterns = [
    path("", RedirectView.as_view(pattern_name="tasks:list"), name="home"),
    path("health/", health, name="health"),
    path("", include("studio.accounts.urls")),
    path("datasets/", include("datasets_app.urls")),
    path("tasks/", include("studio.wizard.urls")),
    path("tasks/", include("training.monitor.urls")),
    path("models/", include("studio.my_models.urls")),
    path("models/", include("studio.serving.urls")),
]
