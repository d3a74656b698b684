"""Runs uvicorn on a listening socket that the supervisor made: `python -m studio.launch.web FD`.

The socket outlives this process, so a restart of the web part refuses no connection: they wait in the queue.
"""

from __future__ import annotations

import os
import socket
import sys

import uvicorn


def main() -> None:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "studio.settings")
    listener = socket.socket(fileno=int(sys.argv[1]))
    from django.conf import settings

    from studio.asgi import application

    config = uvicorn.Config(
        application,
        lifespan="off",
        log_config=None,  # Django's logging
        access_log=False,
        server_header=False,
        proxy_headers=bool(settings.TRUSTED_PROXIES),
        forwarded_allow_ips=settings.TRUSTED_PROXIES,
        ws="websockets-sansio",
        ws_max_size=64 * 1024,
        ws_ping_interval=20.0,
        ws_ping_timeout=20.0,
        timeout_graceful_shutdown=2,
        timeout_keep_alive=15,
        h11_max_incomplete_event_size=64 * 1024,
    )
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
