"""Try it: one prompt to the base and to the tuned model, side by side."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any
from uuid import UUID

from asgiref.sync import sync_to_async
from django.http import HttpRequest, HttpResponse, HttpResponseBase, JsonResponse, StreamingHttpResponse
from django.shortcuts import render
from django.views.decorators.http import require_http_methods, require_POST

from studio.my_models.loading import model_for
from studio.serving.conversation import TUNED, Turn, write_turns
from studio.serving.forms import TryForm
from studio.serving.questions import NotTriable, question_from, why_not
from studio.serving.turns import PageEvent, Question, chat_room
from training.models import TrainedModel


@require_http_methods(["GET", "POST"])
async def try_model(request: HttpRequest, model_id: UUID) -> HttpResponse:
    """GET: the page. POST: the same without JavaScript, both answers at once."""
    model = await sync_to_async(model_for)(request, model_id)
    form = _form(model, request.POST if request.method == "POST" else None)
    if not form.is_bound:
        return await _page(request, model, form, turns=[], problem=why_not(model))
    if not form.is_valid():
        return await _page(request, model, form, turns=form.turns, status=422)
    data = form.cleaned_data
    texts, notes, problem = await _whole_answers(model, form)
    turns = list(form.turns)
    if not problem:
        turns.append(Turn(data["prompt"], texts.get(data["against"], ""), texts.get(TUNED, "")))
    history = write_turns(turns, against=data["against"])
    next_form = _form(model, None, {**data, "history": history, "prompt": data["prompt"] if problem else ""})
    return await _page(request, model, next_form, turns=turns, notes=notes, problem=problem)


@require_POST
async def stream(request: HttpRequest, model_id: UUID) -> HttpResponseBase:
    """The same as JSON lines while the answers come. Closing the connection stops them."""
    model = await sync_to_async(model_for)(request, model_id)
    form = _form(model, request.POST)
    if not form.is_valid():
        text = " ".join(str(error) for errors in form.errors.values() for error in errors)
        return JsonResponse({"type": "error", "text": text}, status=422)
    try:
        question = question_from(model, form)
    except NotTriable as refusal:
        return JsonResponse({"type": "error", "text": str(refusal)}, status=409)
    response = StreamingHttpResponse(_lines(question), content_type="application/x-ndjson")
    response.headers["Cache-Control"] = "no-store"
    response.headers["X-Accel-Buffering"] = "no"  # a proxy must not wait for the end
    return response


async def _lines(question: Question) -> AsyncIterator[bytes]:
    async with aclosing(chat_room().answer(question)) as events:
        async for event in events:
            yield json.dumps(event).encode() + b"\n"


def _form(model: TrainedModel, data: Any, initial: dict[str, Any] | None = None) -> TryForm:
    return TryForm(data, initial=initial, has_parent=model.parent is not None)


async def _whole_answers(
    model: TrainedModel, form: TryForm
) -> tuple[dict[str, str], dict[str, PageEvent], str]:
    """Text and closing event by side, and what went wrong."""
    texts: dict[str, str] = {}
    notes: dict[str, PageEvent] = {}
    try:
        question = question_from(model, form)
    except NotTriable as refusal:
        return texts, notes, str(refusal)
    async with aclosing(chat_room().answer(question)) as events:
        async for event in events:
            if event["type"] == "text":
                texts[event["side"]] = texts.get(event["side"], "") + event["text"]
            elif event["type"] == "done":
                notes[event["side"]] = event
            elif event["type"] == "error":
                return texts, notes, event["text"]
    return texts, notes, ""


async def _page(
    request: HttpRequest, model: TrainedModel, form: TryForm, *, status: int = 200, **more: Any
) -> HttpResponse:
    against = form["against"].value()
    context = {"section": "models", "model": model, "form": form, "against": against or "base", **more}
    context["knobs"] = [form[name] for name in ("temperature", "top_p", "max_new_tokens", "seed")]
    return await sync_to_async(render)(request, "serving/try.html", context, status=status)
