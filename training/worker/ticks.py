"""Tells open pages that there is something new: one small message to the channel layer, or none.

The database has the data; pages also look by themselves every second. So a failing layer is counted and left
alone for a moment, and never holds up a run. `async_to_sync(group_send)` would open a connection per call:
one plain redis client speaks the layer's own wire format instead.
"""

from __future__ import annotations

import logging
import time
import uuid
from typing import Any

import redis
from channels.layers import get_channel_layer
from channels_redis.pubsub import RedisPubSubChannelLayer
from channels_redis.utils import _consistent_hash, decode_hosts
from django.conf import settings
from redis.backoff import NoBackoff
from redis.retry import Retry

logger = logging.getLogger(__name__)

QUIET_SECONDS = 2.0
TIMEOUT = 0.5


class Ticker:
    """Sends `tick` to a task's group. `failures` counts what did not arrive."""

    def __init__(self) -> None:
        self.failures = 0
        self._quiet_until = 0.0
        self._layer: Any = get_channel_layer()
        self._clients: list[redis.Redis] = []
        self._prefix = "asgi"
        if isinstance(self._layer, RedisPubSubChannelLayer):
            config = settings.CHANNEL_LAYERS["default"].get("CONFIG", {})
            self._prefix = config.get("prefix", "asgi")
            for host in decode_hosts(config.get("hosts")):
                self._clients.append(
                    redis.Redis.from_url(
                        host["address"],
                        socket_timeout=TIMEOUT,
                        socket_connect_timeout=TIMEOUT,
                        retry=Retry(NoBackoff(), 0),  # the client's own retries would hold up the run
                    )
                )

    def tick(self, task_id: uuid.UUID, seq: int) -> bool:
        """True: the layer took it."""
        if not self._clients or time.monotonic() < self._quiet_until:
            return False
        channel = f"{self._prefix}__group__task.{task_id}"
        client = self._clients[_consistent_hash(channel, len(self._clients))]
        try:
            client.publish(channel, self._layer.serialize({"type": "tick", "seq": seq}))
        except Exception as error:  # redis raises its own, the socket's and the codec's errors
            if not self.failures:
                logger.warning(
                    "Live updates are not reaching the pages (%s); they look by themselves.", error
                )
            self.failures += 1
            self._quiet_until = time.monotonic() + QUIET_SECONDS
            return False
        return True

    def close(self) -> None:
        for client in self._clients:
            client.close()
