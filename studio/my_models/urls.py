"""Addresses of My Models."""

from __future__ import annotations

from django.urls import path

from studio.my_models import views

app_name = "my_models"
urlpatterns = [
    path("", views.model_list, name="list"),
    path("<uuid:model_id>/", views.model_detail, name="detail"),
    path("<uuid:model_id>/rename/", views.model_rename, name="rename"),
    path("<uuid:model_id>/delete/", views.model_delete, name="delete"),
    path("<uuid:model_id>/download/", views.model_download, name="download"),
]
