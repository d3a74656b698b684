"""A lease on a row: whoever wins the conditional update owns the work until the lease runs out.

Used by dataset jobs here and by training tasks in `training` (which may import this app). Every later write
of the owner says `lease_epoch = mine`; zero rows changed means another owner took over, and the writer must
stop. Time is the database's clock, so that workers whose clocks differ still agree.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, TypeVar

from django.db import models, transaction
from django.db.models import F, Q
from django.db.models.functions import Now


class LeasedRow(models.Model):
    """The columns of a lease."""

    lease_owner = models.CharField(max_length=200, blank=True, default="")
    lease_epoch = models.PositiveIntegerField(default=0)
    lease_until = models.DateTimeField(null=True, blank=True)
    attempts = models.PositiveIntegerField(default=0)  # claims since the last progress
    rung_at = models.DateTimeField(null=True, blank=True)  # when the broker was last told

    class Meta:
        abstract = True


Row = TypeVar("Row", bound=LeasedRow)


def lease_is_free() -> Q:
    """Nobody holds the row now: never claimed, given back, or run out by the database's clock."""
    return Q(lease_until=None) | Q(lease_until__lt=Now())


def bell_is_due(after: timedelta) -> Q:
    """Nobody told the broker lately: the message was lost, or never sent."""
    return Q(rung_at=None) | Q(rung_at__lt=Now() - after)


def claim(
    queryset: models.QuerySet[Row], pk: Any, *, owner: str, ttl: timedelta, **fields: Any
) -> int | None:
    """Take the lease of one row of `queryset` if it is free, and set `fields`; the new epoch, or None.

    `queryset` says which states may be claimed. It may filter on the row's own columns only: a join would
    make the condition a subquery, which PostgreSQL does not check again after waiting for the row's lock.
    """
    # The update's lock lasts to the end of the transaction, so the epoch read back is this claim's.
    with transaction.atomic(using=queryset.db):
        changed = (
            queryset.filter(pk=pk)
            .filter(lease_is_free())
            .update(
                lease_owner=owner[:200],
                lease_epoch=F("lease_epoch") + 1,
                lease_until=Now() + ttl,
                attempts=F("attempts") + 1,
                **fields,
            )
        )
        if changed != 1:
            return None
        epoch: int = (
            queryset.model._default_manager.using(queryset.db)
            .values_list("lease_epoch", flat=True)
            .get(pk=pk)
        )
        return epoch


def renew(queryset: models.QuerySet[Row], pk: Any, epoch: int, *, ttl: timedelta, **fields: Any) -> bool:
    """Push the end of the lease out and set `fields`. False: fenced, stop at once.

    A lease that ran out but that nobody took is still renewed: the epoch says who owns it, not the clock.
    """
    return guarded_update(queryset, pk, epoch, lease_until=Now() + ttl, **fields)


def guarded_update(queryset: models.QuerySet[Row], pk: Any, epoch: int, **fields: Any) -> bool:
    """Write as the owner of `epoch`. False: fenced, nothing was changed."""
    return queryset.filter(pk=pk, lease_epoch=epoch).update(**fields) == 1


def release(queryset: models.QuerySet[Row], pk: Any, epoch: int, **fields: Any) -> bool:
    """Give the lease back and set `fields` (the end state, or `queued` again). False: fenced.

    The epoch stays, so that a later write of this owner still counts only until the next claim.
    """
    return guarded_update(queryset, pk, epoch, lease_owner="", lease_until=None, **fields)
