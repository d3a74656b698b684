"""Addresses of this part."""

from __future__ import annotations

from django.urls import URLPattern, URLResolver

app_name = "my_models"
urlpatterns: list[URLPattern | URLResolver] = []
