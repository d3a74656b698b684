"""What every template may use: the studio's version and the address of Plotly's bundle."""

from __future__ import annotations

from django.conf import settings
from django.http import HttpRequest


def studio(request: HttpRequest) -> dict[str, str]:
    return {
        "studio_version": settings.VERSION,
        "plotly_path": f"plotly-{settings.PLOTLY_VERSION}/plotly.min.js",
    }
