"""Pages for people: sign in and out, the first account, one's own password, the list of people."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from django.conf import settings
from django.contrib import messages
from django.contrib.auth import login, logout, update_session_auth_hash
from django.contrib.auth.decorators import login_not_required
from django.contrib.auth.models import User
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render, resolve_url
from django.utils.http import url_has_allowed_host_and_scheme, urlencode
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_http_methods, require_POST
from django_htmx.http import HttpResponseClientRedirect

from studio.accounts import services
from studio.accounts.audit import audit
from studio.accounts.forms import AccountForm, PasswordForm, SignInForm

MODEL_BACKEND = "django.contrib.auth.backends.ModelBackend"


def _safe_next(request: HttpRequest) -> str:
    """Where to go after signing in; only ever an address of this studio."""
    target = request.POST.get("next") or request.GET.get("next") or ""
    own = url_has_allowed_host_and_scheme(
        target, allowed_hosts={request.get_host()}, require_https=request.is_secure()
    )
    return target if own else resolve_url(settings.LOGIN_REDIRECT_URL)


def _sign_in(request: HttpRequest, user: User) -> None:
    first_time = user.last_login is None
    login(request, user, backend=MODEL_BACKEND)
    audit("sign-in", request)
    if first_time:
        services.welcome(user)


@login_not_required
@never_cache
@require_http_methods(["GET", "HEAD", "POST"])
def sign_in(request: HttpRequest) -> HttpResponse:
    if getattr(request, "htmx", False):
        # A part of a page asked after the session had ended: the whole page must go, and come back here.
        here = urlsplit(request.headers.get("HX-Current-URL", "")).path or "/"
        return HttpResponseClientRedirect(f"{request.path}?{urlencode({'next': here})}")
    if request.user.is_authenticated:
        return redirect(_safe_next(request))
    form = SignInForm(request, data=request.POST or None)
    if request.method == "POST":
        if form.is_valid():
            _sign_in(request, form.get_user())
            return redirect(_safe_next(request))
        audit("sign-in refused", request, name=request.POST.get("username", "")[:150])
    context = {"form": form, "next": _safe_next(request), "nobody_yet": not User.objects.exists()}
    return render(request, "accounts/sign_in.html", context, status=422 if form.is_bound else 200)


def locked_out(request: HttpRequest, *_: Any) -> HttpResponse:
    """After too many wrong passwords for one name from one address."""
    audit("sign-in locked", request, name=request.POST.get("username", "")[:150])
    minutes = round(settings.AXES_COOLOFF_TIME * 60)
    return render(request, "accounts/locked_out.html", {"minutes": minutes}, status=429)


@require_POST
def sign_out(request: HttpRequest) -> HttpResponse:
    audit("sign-out", request)
    logout(request)
    return redirect("accounts:sign-in")


@login_not_required
@never_cache
@require_http_methods(["GET", "HEAD", "POST"])
def first_run(request: HttpRequest, token: str) -> HttpResponse:
    if not services.first_run_link_is_good(token):
        return render(request, "accounts/link_used.html", {"has_account": User.objects.exists()}, status=410)
    form = AccountForm(request.POST or None, first=True)
    if not form.is_valid():
        return render(
            request, "accounts/first_run.html", {"form": form}, status=422 if form.is_bound else 200
        )
    try:
        user = services.first_account_create(
            token=token,
            username=form.cleaned_data["username"],
            password=form.cleaned_data["password1"],
        )
    except services.LinkUsed:
        return render(request, "accounts/link_used.html", {"has_account": True}, status=410)
    _sign_in(request, user)
    audit("account made", request, name=user.get_username(), admin=True)
    return redirect(settings.LOGIN_REDIRECT_URL)


@require_http_methods(["GET", "HEAD", "POST"])
def password(request: HttpRequest) -> HttpResponse:
    user = request.user
    assert isinstance(user, User)  # noqa: S101 - nobody else gets past the middleware
    form = PasswordForm(user, request.POST or None)
    if not form.is_valid():
        return render(
            request,
            "accounts/password.html",
            {"form": form, "section": "account"},
            status=422 if form.is_bound else 200,
        )
    services.password_set(user=user, password=form.cleaned_data["new_password1"])
    update_session_auth_hash(request, user)
    audit("password changed", request)
    messages.success(request, "Your password is changed. Other browsers of yours are signed out.")
    return redirect("accounts:password")


def _admin_only(request: HttpRequest) -> None:
    if not request.user.is_superuser:
        raise PermissionDenied


@require_http_methods(["GET", "HEAD", "POST"])
def people(request: HttpRequest) -> HttpResponse:
    _admin_only(request)
    form = AccountForm(request.POST or None)
    if form.is_valid():
        user = services.account_create(
            username=form.cleaned_data["username"],
            password=form.cleaned_data["password1"],
            is_admin=form.cleaned_data["is_admin"],
        )
        audit("account made", request, name=user.get_username(), admin=user.is_superuser)
        messages.success(request, f"{user.get_username()} can sign in now. Tell them the password in person.")
        return redirect("accounts:people")
    context = {"form": form, "people": User.objects.order_by("username"), "section": "people"}
    return render(request, "accounts/people.html", context, status=422 if form.is_bound else 200)


@require_POST
def set_active(request: HttpRequest, user_id: int) -> HttpResponse:
    _admin_only(request)
    person = get_object_or_404(User, pk=user_id)
    active = request.POST.get("active") == "1"
    if person == request.user:
        messages.error(request, "You cannot disable your own account. Ask another administrator.")
    elif services.account_set_active(user=person, active=active):
        audit("account enabled" if active else "account disabled", request, name=person.get_username())
        messages.success(
            request, f"{person.get_username()} {'can sign in again' if active else 'is signed out'}."
        )
    return redirect("accounts:people")
