"""The pages of My Models: list, one model, rename, delete, download."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import UUID

from asgiref.sync import sync_to_async
from django.contrib import messages
from django.core.paginator import Paginator
from django.http import HttpRequest, HttpResponse, HttpResponseBase, StreamingHttpResponse
from django.shortcuts import redirect, render
from django.utils.http import content_disposition_header
from django.utils.text import slugify
from django.views.decorators.http import require_GET, require_http_methods
from django.views.decorators.vary import vary_on_headers
from django_htmx.http import HttpResponseClientRedirect
from django_htmx.middleware import HtmxDetails

from studio.accounts.audit import audit
from studio.my_models.archive import ArchiveError, files_of, in_threads, zip_chunks
from studio.my_models.forms import RenameForm, SearchForm
from studio.my_models.loading import model_for
from studio.my_models.rows import detail_context, model_rows
from training.models import TrainedModel
from training.services.trained_models import (
    model_card,
    trained_model_delete,
    trained_model_dependants,
    trained_model_rename,
)

PAGE_SIZE = 24


class HtmxRequest(HttpRequest):
    htmx: HtmxDetails


@require_GET
@vary_on_headers("HX-Request")
def model_list(request: HtmxRequest) -> HttpResponse:
    form = SearchForm(request.GET)
    status = 200 if form.is_valid() else 422
    mine = TrainedModel.objects.for_user(request.user).select_related("task")
    page = Paginator(form.apply(mine), PAGE_SIZE).get_page(request.GET.get("page"))
    context = {
        "section": "models",
        "form": form,
        "page": page,
        "rows": model_rows(list(page.object_list)),
        "query": request.GET.get("q", "").strip(),
    }
    template = "my_models/list.html#models" if request.htmx else "my_models/list.html"
    return render(request, template, context, status=status)


@require_GET
def model_detail(request: HtmxRequest, model_id: UUID) -> HttpResponse:
    model = model_for(request, model_id)
    context = detail_context(model) | {"card": model_card(model)}
    return render(request, "my_models/detail.html", context)


@require_http_methods(["GET", "POST"])
@vary_on_headers("HX-Request")
def model_rename(request: HtmxRequest, model_id: UUID) -> HttpResponse:
    """GET: the name as a field, on a page of its own without JavaScript. `?as=text`: the name, unedited."""
    model = model_for(request, model_id)
    if request.method == "GET":
        form = None if request.GET.get("as") == "text" else RenameForm(initial={"name": model.name})
        return _name(request, model, form)
    form = RenameForm(request.POST)
    if not form.is_valid():
        return _name(request, model, form, status=422)
    trained_model_rename(model, name=form.cleaned_data["name"])
    return _name(request, model, None) if request.htmx else redirect(model)


def _name(
    request: HtmxRequest, model: TrainedModel, form: RenameForm | None, *, status: int = 200
) -> HttpResponse:
    if form is None and request.htmx.current_url_abs_path == request.path:
        return HttpResponseClientRedirect(model.get_absolute_url())  # from the page that has only this form
    context: dict[str, Any] = {"section": "models", "model": model, "form": form}
    template = "my_models/rename.html#model-name" if request.htmx else "my_models/rename.html"
    return render(request, template, context, status=status)


@require_http_methods(["GET", "POST"])
def model_delete(request: HtmxRequest, model_id: UUID) -> HttpResponse:
    """GET asks, and says what depends on the model."""
    model = model_for(request, model_id)
    if request.method == "GET":
        context = {"section": "models", "model": model, "dependants": trained_model_dependants(model)}
        return render(request, "my_models/delete.html", context)
    answer = trained_model_delete(model, by=request.user)
    messages.add_message(request, messages.SUCCESS if answer.ok else messages.WARNING, answer.text)
    if answer.ok:
        audit("model.delete", request, model=model.pk)
    return redirect("my_models:list") if answer.ok else redirect(model)


@require_GET
async def model_download(request: HtmxRequest, model_id: UUID) -> HttpResponseBase:
    """Adapter, tokenizer and card as one zip, made while it is sent."""
    model = await sync_to_async(model_for)(request, model_id)
    try:
        chunks, name = await sync_to_async(_archive)(model)
    except ArchiveError as error:
        await sync_to_async(messages.error)(request, str(error))
        return redirect(model)
    audit("model.download", request, model=model.pk)
    response = StreamingHttpResponse(in_threads(chunks), content_type="application/zip")
    response.headers["Content-Disposition"] = content_disposition_header(True, f"{name}.zip") or "attachment"
    return response


def _archive(model: TrainedModel) -> tuple[Any, str]:
    base = model.base_model
    files = files_of(model.folder, tokenizer_from=Path(base.path) if base and base.path else None)
    name = slugify(model.name)[:80] or f"model-{str(model.pk)[:8]}"
    return zip_chunks(files, prefix=name, readme=model_card(model), written=model.created), name
