"""The four steps: guard, load the draft, form, one service call, respond."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from django.contrib import messages
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.urls import reverse
from django.views.decorators.http import require_GET, require_http_methods, require_POST
from django.views.decorators.vary import vary_on_headers
from django_htmx.http import HttpResponseClientRedirect

from datasets_app.models import Dataset
from studio.wizard import pages
from studio.wizard.drafts_of import draft_for, row_or_404
from studio.wizard.forms import DataStepForm, ModelStepForm, SettingsStepForm
from training.models import BaseModel, TrainedModel, TrainingTask
from training.services import draft_checks as checks
from training.services import drafts
from training.services.base_models import ModelProblem, base_model_download

PARTIALS = {"model": "models", "data": "dataset-status"}  # the part of a step that is asked for again


@require_POST
def setup_new(request: HttpRequest) -> HttpResponse:
    """A draft, perhaps with a dataset or a model that the person came from."""
    dataset = row_or_404(Dataset.objects.for_user(request.user), _given(request, "dataset"))
    parent = row_or_404(TrainedModel.objects.for_user(request.user), _given(request, "parent_model"))
    task = drafts.draft_create(request.user, dataset=dataset, parent_model=parent)
    return redirect("setup:step", task.pk, "model")


def _given(request: HttpRequest, name: str) -> str | None:
    return request.POST.get(name) or request.GET.get(name)


@require_http_methods(["GET", "POST"])
@vary_on_headers("HX-Request", "HX-Target")
def setup_step(request: HttpRequest, task_id: UUID, step: str) -> HttpResponse:
    """One page of the wizard. A task that is no draft any more shows its own page instead."""
    try:
        task = draft_for(request, task_id)
        if early := pages.too_early(task, step):
            messages.warning(request, f"First finish “{pages.STEP_NAMES[early.step]}”: {early.text}")
            return _go(request, reverse("setup:step", args=[task.pk, early.step]))
        if request.method == "POST" and request.POST.get("go") in checks.STEPS:
            return _leave(request, task, step, to=request.POST["go"])
        return STEP_VIEWS[step](request, task)
    except drafts.NotADraft:
        messages.info(request, "This task has been created already.")
        return _go(request, reverse("tasks:detail", args=[task_id]))


def _go(request: HttpRequest, url: str) -> HttpResponse:
    """A part of a page cannot be replaced by another page: then the browser is sent there as a whole."""
    return HttpResponseClientRedirect(url) if getattr(request, "htmx", False) else redirect(url)


def _leave(request: HttpRequest, task: TrainingTask, step: str, *, to: str) -> HttpResponse:
    """To another step, with whatever is right in this one kept."""
    if step in FORMS:
        form = FORMS[step](request.POST, task=task)
        if form.is_valid() or step != "model":
            SAVES[step](task, **form.values())
    return redirect("setup:step", task.pk, to)


def step_page(
    request: HttpRequest,
    task: TrainingTask,
    step: str,
    context: dict[str, Any],
    *,
    values: dict[str, Any] | None = None,
) -> HttpResponse:
    """The page, or the part that htmx asks for. `values`: what the form shows but the draft does not hold yet."""
    htmx = getattr(request, "htmx", None)
    partial = f"#{htmx.target}" if htmx and htmx.target and htmx.target == PARTIALS.get(step) else ""
    shown = pages.as_if(task, values or {})
    refused = any(context[name].errors for name in ("form", "hub_form", "folder_form") if context.get(name))
    settled = partial and not context.get("loading") and not context.get("is_waiting")
    frame = {
        "section": "tasks",
        "task": task,
        "shown": shown,
        "step": step,
        "steps": pages.stepper(task, step),
        "summary": pages.summary(shown),
    }
    response = render(
        request, f"wizard/{step}.html{partial}", frame | context, status=422 if refused else 200
    )
    if settled and request.GET.get("waiting"):
        response["HX-Trigger"] = "draftchanged"  # what it waited for is here: the summary is asked for again
    return response


def _to_next(task: TrainingTask, form: Any, step: str) -> HttpResponse | None:
    """On to the next step; None when this one is not right yet, with the reasons added to the form."""
    waiting = [problem.text for problem in checks.draft_problems(task) if problem.step == step]
    for text in waiting:
        form.add_error(None, text)
    following = checks.STEPS[checks.STEPS.index(step) + 1]
    return None if waiting else redirect("setup:step", task.pk, following)


def _model(request: HttpRequest, task: TrainingTask) -> HttpResponse:
    form = ModelStepForm(request.POST if request.method == "POST" else None, task=task)
    if form.is_valid():
        values = form.values()
        try:
            if values["base_model"].status not in checks.COMING:
                values["base_model"] = base_model_download(values["base_model"])
            drafts.draft_save_model(task, **values)
            if response := _to_next(task, form, "model"):
                return response
        except ModelProblem as problem:
            form.add_error(None, str(problem))
    context, values = pages.model_step(task, form, ticked=request.GET.get("model", ""))
    return step_page(request, task, "model", context, values=values)


def _data(request: HttpRequest, task: TrainingTask) -> HttpResponse:
    if request.method == "POST":
        form = DataStepForm(request.POST, task=task)
        if form.is_valid():
            drafts.draft_save_data(task, **form.values())
            if response := _to_next(task, form, "data"):
                return response
    else:
        form = DataStepForm(task=task, chosen=request.GET.get("dataset") or pages.newest_dataset(task))
    back = reverse("setup:step", args=[task.pk, "data"])
    context, values = pages.data_step(task, form, back=back)
    context["waited"] = "waiting" in request.GET
    return step_page(request, task, "data", context, values=values)


def _settings(request: HttpRequest, task: TrainingTask) -> HttpResponse:
    form = SettingsStepForm(request.POST if request.method == "POST" else None, task=task)
    if form.is_valid():
        drafts.draft_save_settings(task, **form.values())
        if response := _to_next(task, form, "settings"):
            return response
    context, values = pages.settings_step(task, form)
    return step_page(request, task, "settings", context, values=values)


def _review(request: HttpRequest, task: TrainingTask) -> HttpResponse:
    if request.method == "POST":
        if not drafts.task_submit(task, by=request.user):
            return redirect("tasks:detail", task.pk)
        page = step_page(request, task, "review", pages.review_step(task))
        page.status_code = 422
        return page
    return step_page(request, task, "review", pages.review_step(task))


STEP_VIEWS = {"model": _model, "data": _data, "settings": _settings, "review": _review}
SAVES: dict[str, Any] = {
    "model": drafts.draft_save_model,
    "data": drafts.draft_save_data,
    "settings": drafts.draft_save_settings,
}
FORMS: dict[str, Any] = {"model": ModelStepForm, "data": DataStepForm, "settings": SettingsStepForm}


@require_POST
def setup_summary(request: HttpRequest, task_id: UUID, step: str) -> HttpResponse:
    """The summary card as it would be with what the form holds now; nothing is saved."""
    try:
        task = draft_for(request, task_id)
    except drafts.NotADraft:
        return HttpResponse(headers={"HX-Redirect": reverse("tasks:detail", args=[task_id])})
    shown, errors = task, []
    if step in FORMS:
        form = FORMS[step](request.POST, task=task)
        if form.is_valid() or step != "model":
            shown = pages.as_if(task, form.values())
        if form.errors:
            errors = [str(text) for texts in form.errors.values() for text in texts]
    context = {"task": task, "shown": shown, "summary": pages.summary(shown, errors=errors), "step": step}
    return render(request, "wizard/_live.html", context)


@require_GET
def choosing_a_model(request: HttpRequest) -> HttpResponse:
    rows = BaseModel.objects.filter(owner=None)
    return render(request, "wizard/choosing.html", {"section": "tasks"} | pages.choosing(rows))
