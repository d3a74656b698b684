"""Everything that changes accounts: the first-run link, new people, who may sign in."""

from __future__ import annotations

import hashlib
import logging
import secrets
from datetime import timedelta

from django.conf import settings
from django.contrib.auth.models import User
from django.db import transaction
from django.utils import timezone

from datasets_app.services import example_dataset_ensure
from studio.accounts.models import FirstRunLink

logger = logging.getLogger("studio.accounts")


class LinkUsed(Exception):
    """The link was used, has expired, or an account exists already."""


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def first_run_link_create() -> str:
    """A fresh token while nobody has an account, and every earlier one void; "" once somebody has."""
    with transaction.atomic():
        FirstRunLink.objects.all().delete()
        if User.objects.exists():
            return ""
        token = secrets.token_urlsafe(32)
        FirstRunLink.objects.create(
            digest=_digest(token), expires=timezone.now() + timedelta(hours=settings.FIRST_RUN_HOURS)
        )
    return token


def first_run_link_is_good(token: str) -> bool:
    return (
        FirstRunLink.objects.filter(
            digest=_digest(token), used__isnull=True, expires__gt=timezone.now()
        ).exists()
        and not User.objects.exists()
    )


def first_account_create(*, token: str, username: str, password: str) -> User:
    """Use the link up and make the account in one transaction: two browsers cannot both win."""
    now = timezone.now()
    with transaction.atomic():
        links = FirstRunLink.objects.filter(digest=_digest(token), used__isnull=True, expires__gt=now)
        if links.update(used=now) != 1 or User.objects.exists():
            raise LinkUsed
        return User.objects.create_superuser(username, password=password)


def account_create(*, username: str, password: str, is_admin: bool) -> User:
    return User.objects.create_user(username, password=password, is_superuser=is_admin, is_staff=is_admin)


def account_set_active(*, user: User, active: bool) -> bool:
    """Let somebody in again, or keep them out from their next request on; False when it was so already."""
    return User.objects.filter(pk=user.pk, is_active=not active).update(is_active=active) == 1


def password_set(*, user: User, password: str) -> None:
    user.set_password(password)
    user.save(update_fields=["password"])


def welcome(user: User) -> None:
    """At somebody's first sign-in: their example dataset. Not having it must not keep them out."""
    try:
        example_dataset_ensure(user)
    except Exception:
        logger.exception("The example dataset could not be made for %s", user.pk)
