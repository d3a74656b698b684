"""HTTP and websockets in one application. A socket must come from an allowed origin and a signed-in session.

A request's body is limited before Django takes it; files leave in pieces.
"""

from __future__ import annotations

import os

import django

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "studio.settings")
django.setup(set_prefix=False)  # loads the apps, so it comes before the imports below

from channels.auth import AuthMiddlewareStack  # noqa: E402
from channels.routing import ProtocolTypeRouter, URLRouter  # noqa: E402
from channels.security.websocket import AllowedHostsOriginValidator  # noqa: E402

from studio.request_body import BodyLimit, SpoolingHandler  # noqa: E402
from studio.streaming import PiecewiseHandler  # noqa: E402
from training.monitor.routing import websocket_urlpatterns  # noqa: E402


class Handler(PiecewiseHandler, SpoolingHandler):
    """Django's, with what comes in spooled on the data disk and what goes out sent in pieces."""


application = ProtocolTypeRouter(
    {
        "http": BodyLimit(Handler()),
        "websocket": AllowedHostsOriginValidator(AuthMiddlewareStack(URLRouter(websocket_urlpatterns))),
    }
)
