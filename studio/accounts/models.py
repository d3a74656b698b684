"""The one-time link that makes the first account. People themselves are Django's own users."""

from __future__ import annotations

from django.db import models


class FirstRunLink(models.Model):
    """Only the digest of the token is kept: who reads the database cannot use the link."""

    digest = models.CharField(max_length=64, unique=True)
    created = models.DateTimeField(auto_now_add=True)
    expires = models.DateTimeField()
    used = models.DateTimeField(null=True, blank=True)

    def __str__(self) -> str:
        return f"first-run link of {self.created:%Y-%m-%d %H:%M}"
