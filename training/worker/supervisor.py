"""One attempt at a task, from the claim to its end: prepares the run, watches the engine, writes how it
ended.

Imports no torch. Whatever happens to this process, the engine ends with it and the lease tells the others.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from django.conf import settings
from django.db import InterfaceError, OperationalError, close_old_connections, transaction

from training.contract import EVENTS_FILE, Result
from training.models import Run, TrainingTask
from training.services.history import Level, event_add
from training.services.outputs import (
    UnusableAdapter,
    outputs_forget,
    read_result,
    trained_model_create,
    unentered_result,
)
from training.services.queue import ring, runnable_tasks
from training.states import Fenced
from training.worker import machine, probe
from training.worker.endings import Asked, Circumstances, Ending, Then, judge
from training.worker.engine_process import EngineProcess, log_tail
from training.worker.finish import is_cancelling, prune_checkpoints, write_end
from training.worker.keeper import LeaseKeeper
from training.worker.leases import Lease, claim_next, hold
from training.worker.orders import Orders
from training.worker.prepare import NotRunnable, Prepared, memory_retries, prepare
from training.worker.progress import ProgressWatch
from training.worker.publish import publish, publish_earlier
from training.worker.shutdown import Shutdown
from training.worker.tail import Line, TailReader
from training.worker.ticks import Ticker
from training.worker.timing import Times, times

logger = logging.getLogger(__name__)

T = TypeVar("T")
DATABASE_PAUSE = 0.5


def run_next(shutdown: Shutdown) -> bool:
    """Take the oldest task that may run and see it through. False: there was none for this machine."""
    limits = times()
    if shutdown.wanted:
        return False
    lease = claim_next(who=machine.identity(), times=limits)
    if lease is None:
        return False
    supervisor = Supervisor(lease, limits, shutdown)
    try:
        supervisor.run()
    except Fenced as fenced:
        logger.warning("%s", fenced)
    except Exception:
        logger.exception("The supervisor of task %s failed", lease.task_id)
        supervisor.give_up()
    finally:
        supervisor.close()
    if (
        not shutdown.wanted
    ):  # devices are free: wake whoever waits for them, rather than leave that to the sweep
        for waiting in list(runnable_tasks().values_list("pk", flat=True)[: len(supervisor.attempt.devices)]):
            ring(waiting)
    return True


class Supervisor:
    """Holds one lease. Its keeper's threads renew it and freeze or kill the engine when it is lost."""

    def __init__(self, lease: Lease, limits: Times, shutdown: Shutdown) -> None:
        self.lease = lease
        self.limits = limits
        self.shutdown = shutdown
        self.engine: EngineProcess | None = None
        self.ticker = Ticker()
        self.keeper = LeaseKeeper(lease, limits)
        self.keeper.start()
        self.task = TrainingTask.objects.select_related(
            "base_model", "parent_model", "dataset", "validation_dataset"
        ).get(pk=lease.task_id)
        self.attempt = Run.objects.select_related("task").get(task_id=lease.task_id, epoch=lease.epoch)

    def close(self) -> None:
        if self.engine is not None and not self.engine.has_ended():
            self.engine.end_now()
        self.keeper.stop()
        self.ticker.close()

    def give_up(self) -> None:
        """After an error that nobody foresaw: the attempt counts, so that it cannot be tried for ever."""
        if self.engine is not None:
            self.engine.end_now()
        with contextlib.suppress(Fenced):
            self._finish(
                Ending(
                    then=Then.TRY_AGAIN,
                    text="The worker met an error of its own; the details are in the worker's log.",
                    with_log=True,
                )
            )

    def run(self) -> None:
        self._kill_leftovers()
        publish_earlier(self.lease)
        earlier = unentered_result(self.task)
        if earlier is not None:
            self._tell("An earlier attempt had finished; its result is entered now.")
            self._keep_model(*earlier)
            return
        try:
            prepared = prepare(self.task, self.attempt)
        except NotRunnable as problem:
            self._finish(Ending(then=Then.FAIL, text=str(problem), next_step=problem.next_step))
        except OSError as error:
            logger.exception("Task %s could not be prepared", self.task.pk)
            self._finish(_disk_problem("The run could not be prepared", error))
        else:
            self.keeper.check()
            engine, kills = self._start(prepared), probe.oom_kills()
            asked = self._watch(engine)
            self._judge(prepared, engine, asked, oom_killed=probe.oom_kills() > kills >= 0)

    # --- before -----------------------------------------------------------------------------------

    def _kill_leftovers(self) -> None:
        """Engines of ended attempts on this machine hold memory and files that the next one needs."""
        here = Run.objects.filter(host=self.attempt.host, boot_id=self.attempt.boot_id, engine_pid__gt=0)
        earlier = here.filter(task_id=self.task.pk, epoch__lt=self.lease.epoch)
        for run in (here.exclude(ended=None) | earlier).order_by("-started")[:50]:
            if machine.kill_group_of(run.engine_pid, run.engine_created):
                logger.warning("Ended an engine left over from attempt %s of %s.", run.epoch, run.task_id)

    def _start(self, prepared: Prepared) -> EngineProcess:
        for note in prepared.notes:
            self._tell(note, level="warning")
        engine = self.engine = EngineProcess(prepared.run_dir, device=self.attempt.device)
        self.keeper.guard(engine)
        again = ", from the beginning: no checkpoint could be continued" if self.lease.epoch > 1 else ""
        where = f", from step {prepared.resumed_from}" if prepared.resumed_from else again
        device = "CPU" if self.attempt.device == "cpu" else self.attempt.device.replace(",", ", ")
        number = f"Attempt {self.lease.epoch}" if self.lease.epoch > 1 else "The run"

        @transaction.atomic
        def write() -> None:
            Run.objects.filter(pk=self.attempt.pk).update(
                engine_pid=engine.pid,
                engine_created=engine.created,
                resumed_from_step=prepared.resumed_from,
            )
            plan = {**hold(self.lease).plan, **self._inputs(prepared)}
            TrainingTask.objects.filter(pk=self.task.pk).update(plan=plan)
            event_add(
                self.task.pk, f"{number} started on {self.attempt.host} ({device}){where}.", source="worker"
            )

        self._persist(write)
        return engine

    def _inputs(self, prepared: Prepared) -> dict[str, Any]:
        """What the model's page must still know when the rows behind it were deleted before a later attempt."""
        inputs = {"config": prepared.config_json, "base_model_name": prepared.base_name}
        if (dataset := self.task.dataset) is not None:
            inputs |= {"dataset_name": dataset.name, "dataset_sha256": dataset.sha256}
        return inputs

    # --- while it runs ----------------------------------------------------------------------------

    def _watch(self, engine: EngineProcess) -> Asked:
        """Until the engine has ended and its last event is stored. Answers what was asked of it."""
        reader = TailReader(self.attempt.folder / EVENTS_FILE)
        progress = ProgressWatch(self.limits, now=time.monotonic())
        orders = Orders(engine, self.keeper, self.shutdown, self.limits, self.attempt.folder)
        while True:
            ended = engine.has_ended()  # before reading: what it wrote last must be read after its end
            self.keeper.check()
            lines = self._store_next(reader)
            now = time.monotonic()
            for line in lines:
                if line.event is not None:
                    progress.event(now, is_step=line.event["type"] == "metrics")
            if engine.frozen:
                progress.pause(now)
            if ended and not lines:
                return orders.asked
            if not ended:
                orders.follow(now, hangs=progress.stalled(now))
            time.sleep(self.limits.watch_every)  # so that there are no more than 4 transactions a second

    def _store_next(self, reader: TailReader) -> list[Line]:
        lines = reader.read()
        if lines:
            seq = self._persist(lambda: publish(self.lease, lines, offset=reader.offset))
            self.ticker.tick(self.task.pk, seq)
        return lines

    def _persist(self, write: Callable[[], T]) -> T:
        """Until the database takes it, or the lease is lost, or the worker must go (the next attempt reads
        on).
        """
        while True:
            try:
                return write()
            except (OperationalError, InterfaceError) as error:
                logger.warning("Task %s: the database does not answer: %s", self.task.pk, error)
                close_old_connections()
                self.keeper.check()
                if self.shutdown.wanted:
                    raise Fenced(f"Task {self.task.pk}: shut down while the database is away.") from error
                time.sleep(DATABASE_PAUSE)

    def _tell(self, text: str, *, level: Level = "info") -> None:
        @transaction.atomic
        def write() -> None:
            hold(self.lease)
            event_add(self.task.pk, text, source="worker", level=level)

        self._persist(write)

    # --- the end ----------------------------------------------------------------------------------

    def _judge(self, prepared: Prepared, engine: EngineProcess, asked: Asked, *, oom_killed: bool) -> None:
        assert engine.exit_code is not None  # noqa: S101 - it has ended
        result = read_result(prepared.run_dir)
        ending = judge(
            Circumstances(
                exit_code=engine.exit_code,
                result=result,
                asked=asked,
                memory_retries=memory_retries(self.task),
                micro_batch=prepared.config.per_device_train_batch_size,
                oom_killed=oom_killed,
            )
        ).seen_from(Path(settings.DATA_DIR))
        if ending.then is Then.DONE and result is not None:
            self._keep_model(prepared.run_dir, result)
        else:
            self._finish(ending, exit_code=engine.exit_code)

    def _keep_model(self, run_dir: Path, result: Result) -> None:
        try:
            self._persist(
                lambda: trained_model_create(
                    self.task, epoch=self.lease.epoch, run_dir=run_dir, result=result
                )
            )
        except UnusableAdapter as problem:
            self._finish(Ending(then=Then.TRY_AGAIN, text=str(problem), with_log=True))
        except OSError as error:
            logger.exception("The model of task %s could not be moved", self.task.pk)
            self._finish(_disk_problem("The finished model could not be moved to My Models", error))
        except Fenced:
            if not is_cancelling(self.lease):
                raise
            self._finish(Ending(then=Then.CANCELLED, text="Cancelled."))
        else:
            prune_checkpoints(self.task)
            self.ticker.tick(self.task.pk, 0)

    def _finish(self, ending: Ending, *, exit_code: int | None = None) -> None:
        log = log_tail(self.engine.log_path) if self.engine is not None and ending.with_log else ""
        self._persist(lambda: write_end(self.lease, ending, exit_code=exit_code, log=log))
        self.ticker.tick(self.task.pk, 0)
        if ending.then is Then.CANCELLED:
            outputs_forget(self.task)


def _disk_problem(what: str, error: OSError) -> Ending:
    return Ending(
        then=Then.FAIL,
        text=f"{what}: {error.strerror or error}.",
        next_step="Check that the data directory has free space and may be written, then Retry.",
    )
