"""What a person meets when something did not work: a sentence, and a way on. Never a traceback.

The 500 page touches neither the database nor the session: they may be what broke.
"""

from __future__ import annotations

from dataclasses import dataclass

from django.conf import settings
from django.core.exceptions import RequestDataTooBig, TooManyFieldsSent, TooManyFilesSent
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.template.loader import render_to_string


@dataclass(frozen=True)
class Problem:
    status: int
    title: str
    sentence: str
    next_step: str


BAD_REQUEST = Problem(
    400,
    "This request could not be read",
    "The browser sent something the studio does not understand.",
    "Go back, reload the page and try again.",
)
TOO_LARGE = Problem(
    413,
    "That was too large",
    f"A form may hold at most {settings.DATA_UPLOAD_MAX_MEMORY_SIZE // 1024 // 1024} MB of text "
    f"and a dataset file at most {settings.UPLOAD_MAX_BYTES // 1024 // 1024} MB.",
    "Split the file, or ask whoever runs this studio to raise STUDIO_UPLOAD_MAX_MB.",
)
FORBIDDEN = Problem(
    403,
    "You cannot do that",
    "Your account does not have the right to see or change this.",
    "Ask whoever runs this studio, or sign in with another account.",
)
STALE_FORM = Problem(
    403,
    "This form was open for too long",
    "You signed in or out in another tab, or cookies are blocked, so the form could not be trusted. "
    "Nothing was changed.",
    "Go back, reload the page and send it again.",
)
NOT_FOUND = Problem(
    404,
    "There is nothing here",
    "The address is wrong, the thing was deleted, or it belongs to another account.",
    "Check the address, or start from your tasks.",
)
SERVER_ERROR = Problem(
    500,
    "Something went wrong in the studio",
    "The fault is ours, not yours. What happened is in the log file web.log, in the data folder under logs.",
    "Go back and try again. If it stays, look at the log, or start the studio anew.",
)


def problem_page(request: HttpRequest, problem: Problem) -> HttpResponse:
    return render(request, "errors/problem.html", {"problem": problem}, status=problem.status)


def bad_request(request: HttpRequest, exception: Exception) -> HttpResponse:
    if isinstance(exception, RequestDataTooBig | TooManyFieldsSent | TooManyFilesSent):
        return problem_page(request, TOO_LARGE)
    # The page's own header asks for the host, which may be what is wrong.
    return HttpResponse(render_to_string("errors/bare.html", {"problem": BAD_REQUEST}), status=400)


def permission_denied(request: HttpRequest, exception: Exception) -> HttpResponse:
    return problem_page(request, FORBIDDEN)


def csrf_failure(request: HttpRequest, reason: str = "") -> HttpResponse:
    return problem_page(request, STALE_FORM)


def page_not_found(request: HttpRequest, exception: Exception) -> HttpResponse:
    return problem_page(request, NOT_FOUND)


def server_error(request: HttpRequest) -> HttpResponse:
    return HttpResponse(render_to_string("errors/bare.html", {"problem": SERVER_ERROR}), status=500)
