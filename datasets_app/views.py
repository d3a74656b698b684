"""The pages of the datasets: list, upload, one dataset, and its downloads."""

from __future__ import annotations

import uuid
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from django.contrib import messages
from django.core.paginator import Page, Paginator
from django.http import HttpRequest, HttpResponse, HttpResponseBase, QueryDict
from django.shortcuts import get_object_or_404, redirect, render
from django.utils.http import url_has_allowed_host_and_scheme
from django.views.decorators.http import require_GET, require_http_methods, require_POST
from django.views.decorators.vary import vary_on_headers
from django_htmx.http import HttpResponseClientRedirect

from datasets_app import preview, services
from datasets_app.downloads import file_download
from datasets_app.formats import FORMATS
from datasets_app.forms import NameForm, UploadForm
from datasets_app.models import Dataset
from datasets_app.uploads import refusal_of
from datasets_app.validation import format_title

DATASETS_PER_PAGE = 25
PAIRS_PER_PAGE = 5
FINDINGS_PER_PAGE = 10
SEED_FORMATS = ("messages", "preferred_output", "prompt")  # shown in full on the upload page


def _dataset_for(request: HttpRequest, dataset_id: uuid.UUID) -> Dataset:
    return get_object_or_404(Dataset.objects.for_user(request.user), pk=dataset_id)


def _is_htmx(request: HttpRequest) -> bool:
    return bool(getattr(request, "htmx", False))


def _target(request: HttpRequest) -> str:
    """The id of the element htmx will replace; "" for a whole page."""
    htmx = getattr(request, "htmx", None)
    return (htmx.target or "") if htmx else ""


def _go(request: HttpRequest, url: str) -> HttpResponse:
    return HttpResponseClientRedirect(url) if _is_htmx(request) else redirect(url)


@require_GET
@vary_on_headers("HX-Request", "HX-Target")
def dataset_list(request: HttpRequest) -> HttpResponse:
    page = _page(Dataset.objects.for_user(request.user), DATASETS_PER_PAGE, request.GET.get("page"))
    context = {
        "section": "datasets",
        "page": page,
        "busy": any(dataset.status in services.BUSY for dataset in page),
    }
    partial = "#rows" if _target(request) == "rows" else ""
    return render(request, f"datasets_app/list.html{partial}", context)


@require_http_methods(["GET", "POST"])
def dataset_new(request: HttpRequest) -> HttpResponse:
    if request.method == "GET":
        return _upload_page(request, UploadForm(initial={"next": request.GET.get("next", "")}))
    form = UploadForm(request.POST, request.FILES)
    refusal = refusal_of(request)
    if refusal:
        form.errors.clear()
        form.add_error("file", refusal.text)
        return _upload_page(request, form, status=refusal.status)
    if not form.is_valid():
        return _upload_page(request, form, status=422)
    try:
        dataset = services.dataset_create(
            request.user, upload=form.cleaned_data["file"], name=form.cleaned_data["name"]
        )
    except services.AlreadyUploaded as error:
        dataset = error.dataset
        messages.info(request, f"{error} It was kept once; this is the earlier one.")
    return _go(request, _after_upload(request, form.cleaned_data["next"], dataset))


def _after_upload(request: HttpRequest, wanted: str, dataset: Dataset) -> str:
    """Back to where the upload was started, with the new dataset chosen; else to its own page."""
    allowed = url_has_allowed_host_and_scheme(
        wanted, allowed_hosts={request.get_host()}, require_https=request.is_secure()
    )
    if not wanted or not allowed:
        return dataset.get_absolute_url()
    parts = urlsplit(wanted)
    query = QueryDict(parts.query, mutable=True)
    query["dataset"] = str(dataset.pk)
    return urlunsplit(parts._replace(query=query.urlencode()))


def _upload_page(request: HttpRequest, form: UploadForm, *, status: int = 200) -> HttpResponse:
    template = "datasets_app/_upload_form.html" if _is_htmx(request) else "datasets_app/new.html"
    context = {
        "section": "datasets",
        "form": form,
        "shapes": [FORMATS[key] for key in SEED_FORMATS],
        "more_shapes": [shape for key, shape in FORMATS.items() if key not in SEED_FORMATS],
    }
    return render(request, template, context, status=status)


@require_GET
@vary_on_headers("HX-Request", "HX-Target")
def dataset_detail(request: HttpRequest, dataset_id: uuid.UUID) -> HttpResponse:
    dataset = _dataset_for(request, dataset_id)
    target = _target(request)
    partial = f"#{target}" if target in {"dataset", "pairs", "findings"} else ""
    return render(request, f"datasets_app/detail.html{partial}", _detail_context(request, dataset))


def _page(rows: Any, size: int, number: str | None) -> Page[Any]:
    return Paginator(rows, size).get_page(number)


def _detail_context(request: HttpRequest, dataset: Dataset) -> dict[str, Any]:
    return {
        "section": "datasets",
        "dataset": dataset,
        "busy": dataset.status in services.BUSY,
        "format_title": format_title(dataset.format),
        "summary": preview.summary(dataset),
        "length_bias": preview.length_bias(dataset),
        "histograms": preview.histograms(dataset),
        "whole_file": preview.whole_file_findings(dataset),
        "pairs": _page(preview.Pairs(dataset), PAIRS_PER_PAGE, request.GET.get("pairs")),
        "findings": _page(preview.Findings(dataset), FINDINGS_PER_PAGE, request.GET.get("findings")),
        "name_form": NameForm(initial={"name": dataset.name}),
    }


@require_POST
def dataset_rename(request: HttpRequest, dataset_id: uuid.UUID) -> HttpResponse:
    dataset = _dataset_for(request, dataset_id)
    form = NameForm(request.POST)
    if not form.is_valid():
        context = {**_detail_context(request, dataset), "name_form": form}
        return render(request, "datasets_app/detail.html", context, status=422)
    services.dataset_rename(dataset, name=form.cleaned_data["name"])
    messages.success(request, "The name was changed.")
    return redirect(dataset)


@require_POST
def dataset_again(request: HttpRequest, dataset_id: uuid.UUID) -> HttpResponse:
    dataset = _dataset_for(request, dataset_id)
    if not services.dataset_validate_again(dataset):
        messages.info(request, "This dataset does not wait for another validation.")
    return redirect(dataset)


@require_http_methods(["GET", "POST"])
def dataset_delete(request: HttpRequest, dataset_id: uuid.UUID) -> HttpResponse:
    dataset = _dataset_for(request, dataset_id)
    problem = ""
    if request.method == "POST":
        try:
            services.dataset_delete(dataset)
        except services.DatasetInUse as error:
            problem = str(error)
        else:
            messages.success(request, f"“{dataset.name}” was deleted.")
            return redirect("datasets:list")
    context = {
        "section": "datasets",
        "dataset": dataset,
        "problem": problem,
        "using": services.tasks_using(dataset),
        "mentioned": services.tasks_mentioning(dataset),
    }
    return render(request, "datasets_app/delete.html", context, status=409 if problem else 200)


@require_GET
def dataset_download(request: HttpRequest, dataset_id: uuid.UUID, kind: str) -> HttpResponseBase:
    dataset = _dataset_for(request, dataset_id)
    stem = dataset.original_name.rsplit(".", 1)[0] or "dataset"
    path, filename = {
        "original": (dataset.original_path, dataset.original_name),
        "pairs": (dataset.pairs_path, f"{stem}.pairs.jsonl"),
        "findings": (dataset.issues_path, f"{stem}.findings.jsonl"),
    }[kind]
    return file_download(path, filename=filename)


@require_GET
def example_download(request: HttpRequest) -> HttpResponseBase:
    return file_download(services.EXAMPLE_PATH, filename=services.EXAMPLE_PATH.name)
