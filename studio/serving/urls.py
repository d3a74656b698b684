"""Addresses of Try it."""

from __future__ import annotations

from django.urls import path

from studio.serving import views

app_name = "serving"
urlpatterns = [
    path("<uuid:model_id>/try/", views.try_model, name="try"),
    path("<uuid:model_id>/try/stream/", views.stream, name="stream"),
]
