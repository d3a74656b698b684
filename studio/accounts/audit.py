"""One line per act that must be found again: who, what, on whom, from where. Goes to logs/audit.log."""

from __future__ import annotations

import json
import logging

from django.http import HttpRequest

logger = logging.getLogger("studio.audit")


def audit(action: str, request: HttpRequest, **facts: object) -> None:
    user = getattr(request, "user", None)
    line = {
        "action": action,
        "by": user.get_username() if user is not None and user.is_authenticated else "",
        "ip": request.META.get("REMOTE_ADDR", ""),
        **facts,
    }
    logger.info(json.dumps(line, ensure_ascii=True, default=str))
