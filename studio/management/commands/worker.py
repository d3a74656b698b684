"""`python manage.py worker --queue gpu|default`: one Celery worker with the flags this studio needs."""

from __future__ import annotations

import os
import sys
import time
from argparse import ArgumentParser
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand
from kombu import Connection

from training.worker.probe import gpus

BROKER_PATIENCE_SECONDS = 10.0
DEFAULT_CONCURRENCY = 2  # datasets and downloads: a long one does not hold up a short one


class Command(BaseCommand):
    help = "Run a worker: “gpu” trains (a slot per GPU, or STUDIO_GPU_SLOTS), “default” prepares data."

    requires_system_checks: list[str] = []  # most are about the pages, which a worker does not even import

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--queue", choices=["gpu", "default"], required=True)

    def handle(self, *args: Any, **options: Any) -> None:
        queue = options["queue"]
        slots = gpu_slots() if queue == "gpu" else DEFAULT_CONCURRENCY
        env = dict(os.environ)
        if settings.CELERY_BROKER_URL != "memory://" and not broker_answers(BROKER_PATIENCE_SECONDS):
            self.stderr.write("The broker does not answer: this worker looks into the database for work.")
            env.pop("STUDIO_REDIS_URL_FILE", None)
            env["STUDIO_REDIS_URL"] = "none"
        env["CELERY_SKIP_CHECKS"] = "1"
        # Celery's warning about root is about pickle; these workers take JSON only.
        env["PYTHONWARNINGS"] = "ignore:You're running the worker with superuser privileges"
        command = celery_command(queue, slots)
        os.chdir(settings.BASE_DIR)
        # The same process goes on as Celery: whoever started it sends its signals to the right place.
        os.execve(command[0], command, env)  # noqa: S606 - fixed arguments, no shell


def gpu_slots() -> int:
    return settings.GPU_SLOTS or len(gpus()) or 1


def celery_command(queue: str, slots: int) -> list[str]:
    name = f"{queue}@{settings.WORKER_NAME}"
    flags = ["--queues", queue, "--concurrency", str(slots), "--hostname", name, "--pool", "prefork"]
    # Gossip and mingle let workers ask each other things that here the database knows.
    quiet = ["--without-gossip", "--without-mingle", "--loglevel", "WARNING"]
    return [sys.executable, "-m", "celery", "--quiet", "--app", "studio", "worker", *flags, *quiet]


def broker_answers(patience: float) -> bool:
    deadline = time.monotonic() + patience
    while True:
        try:
            with Connection(settings.CELERY_BROKER_URL, connect_timeout=2) as connection:
                connection.ensure_connection(max_retries=1, interval_start=0, timeout=2)
            return True
        except Exception:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.5)
