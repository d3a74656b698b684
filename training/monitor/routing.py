"""Addresses of the websockets."""

from __future__ import annotations

from typing import Any

from django.urls import path

from training.monitor.consumers import TaskConsumer

websocket_urlpatterns: list[Any] = [path("ws/tasks/<uuid:task_id>/", TaskConsumer.as_asgi())]
