"""Addresses of this part."""

from __future__ import annotations

from django.urls import URLPattern, URLResolver, path, register_converter

from datasets_app import views


class DownloadKind:
    """Which of a dataset's files."""

    regex = "original|pairs|findings"

    def to_python(self, value: str) -> str:
        return value

    def to_url(self, value: str) -> str:
        return value


register_converter(DownloadKind, "dataset_file")

app_name = "datasets"
urlpatterns: list[URLPattern | URLResolver] = [
    path("", views.dataset_list, name="list"),
    path("new/", views.dataset_new, name="new"),
    path("example/", views.example_download, name="example"),
    path("<uuid:dataset_id>/", views.dataset_detail, name="detail"),
    path("<uuid:dataset_id>/rename/", views.dataset_rename, name="rename"),
    path("<uuid:dataset_id>/again/", views.dataset_again, name="again"),
    path("<uuid:dataset_id>/delete/", views.dataset_delete, name="delete"),
    path("<uuid:dataset_id>/download/<dataset_file:kind>/", views.dataset_download, name="download"),
]
