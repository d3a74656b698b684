"""A lease on a row: whoever wins the conditional update owns the work until the lease runs out.

Used by dataset jobs here and by training tasks in `training` (which may import this app). Every later write of
the owner says `lease_epoch = mine`; zero rows changed means another owner took over, and the writer must stop.
Time is the database's clock, so that workers whose clocks differ still agree.
"""

from __future__ import annotations

from typing import Any

from django.db import models


class LeasedRow(models.Model):
    """The columns of a lease."""

    lease_owner = models.CharField(max_length=200, blank=True, default="")
    lease_epoch = models.PositiveIntegerField(default=0)
    lease_until = models.DateTimeField(null=True, blank=True)
    attempts = models.PositiveIntegerField(default=0)  # claims since the last progress
    rung_at = models.DateTimeField(null=True, blank=True)  # when the broker was last told

    class Meta:
        abstract = True


LeaseFields = dict[str, Any]
