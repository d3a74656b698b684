"""Adding a model on step 1: a download, a folder on the server, a Hub id. Then back to the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import UUID

from django.conf import settings
from django.contrib import messages
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import redirect
from django.views.decorators.http import require_POST

from studio.wizard import pages
from studio.wizard.drafts_of import draft_for, row_or_404
from studio.wizard.forms import FolderForm, HubForm
from studio.wizard.views import step_page
from training.models import BaseModel, TrainingTask
from training.services import drafts
from training.services.base_models import (
    ModelProblem,
    base_model_download,
    base_model_from_folder,
    base_model_from_hub,
)


@require_POST
def model_download(request: HttpRequest, task_id: UUID) -> HttpResponse:
    """Ask for the files of a listed model; the draft's own choice stays as it is."""
    try:
        draft_for(request, task_id)
        row = row_or_404(BaseModel.objects.for_user(request.user), request.POST.get("base_model"))
        if row is None:
            raise Http404
        row = base_model_download(row)
        messages.success(request, f"{row.name}: {row.get_status_display().lower()}.")
    except ModelProblem as problem:
        messages.error(request, str(problem))
    except drafts.NotADraft:
        return redirect("tasks:detail", task_id)
    return redirect("setup:step", task_id, "model")


@require_POST
def model_folder(request: HttpRequest, task_id: UUID) -> HttpResponse:
    form = FolderForm(request.POST, roots=[str(root) for root in settings.MODEL_ROOTS])
    return _add(
        request,
        task_id,
        "folder_form",
        form,
        lambda task, values: base_model_from_folder(task.owner, **values),
    )


@require_POST
def model_hub(request: HttpRequest, task_id: UUID) -> HttpResponse:
    form = HubForm(request.POST)
    return _add(
        request, task_id, "hub_form", form, lambda task, values: base_model_from_hub(task.owner, **values)
    )


def _add(
    request: HttpRequest,
    task_id: UUID,
    name: str,
    form: Any,
    add: Callable[[TrainingTask, dict[str, Any]], BaseModel],
) -> HttpResponse:
    """Add a model and choose it for the draft; a refusal stands at its form."""
    try:
        task = draft_for(request, task_id)
        if form.is_valid():
            row = add(task, form.cleaned_data)
            drafts.draft_save_model(task, base_model=row, parent_model=None)
            messages.success(request, f"{row.name} was added and is chosen.")
            return redirect("setup:step", task.pk, "model")
    except ModelProblem as problem:
        form.add_error(None, str(problem))
    except drafts.NotADraft:
        return redirect("tasks:detail", task_id)
    context, values = pages.model_step(task)
    return step_page(request, task, "model", context | {name: form}, values=values)
