"""Addresses of the task list, the task pages and their data."""

from __future__ import annotations

from django.urls import path

from training.monitor.views import actions, feeds, pages

app_name = "tasks"
urlpatterns = [
    path("", pages.task_list, name="list"),
    path("<uuid:task_id>/", pages.task_detail, name="detail"),
    path("<uuid:task_id>/cancel/", actions.cancel, name="cancel"),
    path("<uuid:task_id>/stop/", actions.stop, name="stop"),
    path("<uuid:task_id>/retry/", actions.retry, name="retry"),
    path("<uuid:task_id>/duplicate/", actions.duplicate, name="duplicate"),
    path("<uuid:task_id>/delete/", actions.delete, name="delete"),
    path("<uuid:task_id>/points/", feeds.task_points, name="points"),
    path("<uuid:task_id>/metrics.csv", feeds.task_csv, name="csv"),
    path("<uuid:task_id>/log/", feeds.task_log, name="log"),
]
