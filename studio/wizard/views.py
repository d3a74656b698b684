"""The four steps: guard, load the draft, form, one service call, respond."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from django.conf import settings
from django.contrib import messages
from django.core.exceptions import ValidationError
from django.db.models import QuerySet
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect
from django.shortcuts import get_object_or_404, redirect, render
from django.urls import reverse
from django.views.decorators.http import require_GET, require_http_methods, require_POST
from django.views.decorators.vary import vary_on_headers

from datasets_app.models import Dataset
from studio.wizard import pages
from studio.wizard.forms import DataStepForm, FolderForm, HubForm, ModelStepForm, SettingsStepForm
from training.base_models import KINDS
from training.models import BaseModel, TrainedModel, TrainingTask
from training.services import drafts
from training.services.base_models import (
    ModelProblem,
    base_model_download,
    base_model_from_folder,
    base_model_from_hub,
)

ON_DISK = (BaseModel.Status.READY, BaseModel.Status.QUEUED, BaseModel.Status.DOWNLOADING)


def _task_for(request: HttpRequest, task_id: UUID) -> TrainingTask:
    rows = TrainingTask.objects.for_user(request.user)
    return get_object_or_404(
        rows.select_related("base_model", "parent_model", "dataset", "validation_dataset"), pk=task_id
    )


def _draft_for(request: HttpRequest, task_id: UUID) -> TrainingTask:
    task = _task_for(request, task_id)
    if task.status != TrainingTask.Status.DRAFT:
        raise drafts.NotADraft
    return task


def _own(rows: QuerySet[Any], key: str | None) -> Any:
    """A row that was named in a request; 404 for anything this person may not see."""
    if not key:
        return None
    try:
        return get_object_or_404(rows, pk=key)
    except (ValueError, ValidationError):
        raise Http404 from None


@require_POST
def setup_new(request: HttpRequest) -> HttpResponse:
    dataset = _own(Dataset.objects.for_user(request.user), request.POST.get("dataset"))
    parent = _own(TrainedModel.objects.for_user(request.user), request.POST.get("parent_model"))
    task = drafts.draft_create(request.user, dataset=dataset, parent_model=parent)
    return redirect("setup:step", task.pk, "model")


@require_http_methods(["GET", "POST"])
@vary_on_headers("HX-Request", "HX-Target")
def setup_step(request: HttpRequest, task_id: UUID, step: str) -> HttpResponse:
    """One page of the wizard. A task that is no draft any more shows its own page instead."""
    try:
        task = _draft_for(request, task_id)
        furthest = drafts.furthest_step(drafts.draft_problems(task))
        if drafts.STEPS.index(step) > drafts.STEPS.index(furthest):
            messages.warning(request, f"First finish “{pages.STEP_NAMES[furthest]}”.")
            return redirect("setup:step", task.pk, furthest)
        return STEP_VIEWS[step](request, task)
    except drafts.NotADraft:
        messages.info(request, "This task has been created already.")
        return redirect("tasks:detail", task_id)


def _step_page(
    request: HttpRequest, task: TrainingTask, step: str, context: dict[str, Any], *, status: int = 200
) -> HttpResponse:
    htmx = getattr(request, "htmx", None)
    partial = f"#{htmx.target}" if htmx and htmx.target in ("models", "dataset-status") else ""
    return render(
        request,
        f"wizard/{step}.html{partial}",
        {
            "section": "tasks",
            "task": task,
            "step": step,
            "steps": pages.stepper(task, step),
            "summary": context.pop("summary", None) or pages.summary(task),
            **context,
        },
        status=status,
    )


def _model(request: HttpRequest, task: TrainingTask) -> HttpResponse:
    form = ModelStepForm(request.POST if request.method == "POST" else None, task=task)
    if request.method == "POST" and form.is_valid():
        try:
            values = form.values()
            if values["base_model"].status not in ON_DISK:
                values["base_model"] = base_model_download(values["base_model"])
            drafts.draft_save_model(task, **values)
            return redirect("setup:step", task.pk, "data")
        except ModelProblem as problem:
            form.add_error("model", str(problem))
    status = 422 if form.errors else 200
    context = pages.model_step(task, form, ticked=request.GET.get("model", ""))
    return _step_page(request, task, "model", context, status=status)


def _data(request: HttpRequest, task: TrainingTask) -> HttpResponse:
    if request.method == "POST":
        form = DataStepForm(request.POST, task=task)
        if form.is_valid():
            drafts.draft_save_data(task, **form.values())
            waiting = [problem for problem in drafts.draft_problems(task) if problem.step == "data"]
            if not waiting:
                return redirect("setup:step", task.pk, "settings")
            for problem in waiting:
                form.add_error(None, problem.text)
    else:
        form = DataStepForm(task=task, chosen=request.GET.get("dataset", ""))
    back = reverse("setup:step", args=[task.pk, "data"])
    status = 422 if form.is_bound and form.errors else 200
    return _step_page(request, task, "data", pages.data_step(task, form, back=back), status=status)


def _settings(request: HttpRequest, task: TrainingTask) -> HttpResponse:
    form = SettingsStepForm(request.POST if request.method == "POST" else None, task=task)
    if request.method == "POST" and form.is_valid():
        drafts.draft_save_settings(task, **form.values())
        return redirect("setup:step", task.pk, "review")
    status = 422 if form.errors else 200
    return _step_page(request, task, "settings", pages.settings_step(task, form), status=status)


def _review(request: HttpRequest, task: TrainingTask) -> HttpResponse:
    if request.method == "POST":
        if not drafts.task_submit(task, by=request.user):
            return redirect("tasks:detail", task.pk)
        return _step_page(request, task, "review", pages.review_step(task), status=422)
    return _step_page(request, task, "review", pages.review_step(task))


STEP_VIEWS = {"model": _model, "data": _data, "settings": _settings, "review": _review}


@require_POST
def setup_summary(request: HttpRequest, task_id: UUID, step: str) -> HttpResponse:
    """The summary card as it would be with what the form holds now; nothing is saved."""
    try:
        task = _draft_for(request, task_id)
    except drafts.NotADraft:
        return HttpResponse(headers={"HX-Redirect": reverse("tasks:detail", args=[task_id])})
    shown, errors = task, []
    if step in FORMS:
        form = FORMS[step](request.POST, task=task)
        if form.is_valid():
            shown = pages.as_if(task, form.values())
        else:
            errors = [text for texts in form.errors.values() for text in texts]
    context = {"task": shown, "summary": pages.summary(shown, errors=errors), "step": step}
    return render(request, "wizard/_summary.html", context)


FORMS: dict[str, Any] = {"model": ModelStepForm, "data": DataStepForm, "settings": SettingsStepForm}


@require_POST
def model_download(request: HttpRequest, task_id: UUID) -> HttpResponse:
    task = _task_for(request, task_id)
    row = _own(BaseModel.objects.for_user(request.user), request.POST.get("base_model"))
    if row is None:
        raise Http404
    return _after_model(request, task, lambda: base_model_download(row), choose=False)


@require_POST
def model_folder(request: HttpRequest, task_id: UUID) -> HttpResponse:
    task = _task_for(request, task_id)
    form = FolderForm(request.POST, roots=[str(root) for root in settings.MODEL_ROOTS])
    if not form.is_valid():
        return _refused(request, task, folder_form=form)
    values = form.cleaned_data
    return _after_model(
        request,
        task,
        lambda: base_model_from_folder(task.owner, root=values["root"], relative=values["relative"]),
        folder_form=form,
    )


@require_POST
def model_hub(request: HttpRequest, task_id: UUID) -> HttpResponse:
    task = _task_for(request, task_id)
    form = HubForm(request.POST)
    if not form.is_valid():
        return _refused(request, task, hub_form=form)
    return _after_model(
        request,
        task,
        lambda: base_model_from_hub(task.owner, hub_id=form.cleaned_data["hub_id"]),
        hub_form=form,
    )


def _after_model(
    request: HttpRequest, task: TrainingTask, add: Any, *, choose: bool = True, **forms: Any
) -> HttpResponse:
    """Add or download a model, choose it for the draft, and go back to step 1; a refusal stands at its form."""
    try:
        row = add()
        if choose:
            drafts.draft_save_model(task, base_model=row, parent_model=None)
    except ModelProblem as problem:
        for form in forms.values():
            form.add_error(None, str(problem))
        if not forms:
            messages.error(request, str(problem))
            return redirect("setup:step", task.pk, "model")
        return _refused(request, task, **forms)
    except drafts.NotADraft:
        return redirect("tasks:detail", task.pk)
    messages.success(request, f"{row.name}: {row.get_status_display().lower()}.")
    return HttpResponseRedirect(reverse("setup:step", args=[task.pk, "model"]))


def _refused(request: HttpRequest, task: TrainingTask, **forms: Any) -> HttpResponse:
    context = pages.model_step(task, ModelStepForm(task=task)) | forms
    return _step_page(request, task, "model", context, status=422)


@require_GET
def choosing_a_model(request: HttpRequest) -> HttpResponse:
    rows = BaseModel.objects.filter(owner=None)
    blank = drafts.draft_unsaved()
    groups = [
        (kind, name, guidance, [pages.card(row, blank) for row in rows if row.kind == kind])
        for kind, (name, guidance) in KINDS.items()
    ]
    return render(request, "wizard/choosing.html", {"section": "tasks", "groups": groups})
