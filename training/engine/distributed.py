"""The ranks that train one model together: who does which share, sums over all, and one common end.

There is no wrapper around the model. A step's micro-batches are shared out over the ranks, each adds up the
gradient of its share, and one sum over ranks gives every rank the gradient of the stated batch: the number of
devices changes nothing but the time. Knows no losses and no files.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import nn

from training.contract import ExitCode, RunConfig
from training.engine.errors import (
    DivergedError,
    EngineError,
    Explanation,
    InterruptedRunError,
    PeerFailedError,
    PeerLostError,
    RefusedError,
    explain,
)
from training.engine.launch import RENDEZVOUS_VARIABLE, rank, world_size

T = TypeVar("T")

# Who waits for a dead rank is ended by its launcher; a frozen or evaluating one may take hours.
TIMEOUT = timedelta(days=7)
BUCKET = 32 * 2**20  # numbers summed over the ranks at once

_ERRORS: dict[int, type[EngineError]] = {
    int(ExitCode.REFUSED): RefusedError,
    int(ExitCode.DIVERGED): DivergedError,
    int(ExitCode.INTERRUPTED): InterruptedRunError,
}


@dataclasses.dataclass(frozen=True)
class World:
    """The ranks and this one among them. Alone, every method is what it says without any communication.

    `lockstep`: each rank must run the model equally often, since a pass of one needs all (sharded weights).
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    lockstep: bool = False
    config: RunConfig | None = None

    @classmethod
    def join(cls, config: RunConfig) -> World:
        """Find the other ranks. Blocks until all are there."""
        size = world_size()
        if size == 1:
            if config.parallelism == "fsdp":
                raise RefusedError(
                    "The parallelism fsdp divides a model between devices, and this run has one.",
                    "Set num_devices to 2 or more, or the parallelism to data.",
                )
            return cls(config=config)
        world = cls(
            rank(), size, int(os.environ.get("LOCAL_RANK", rank())), config.parallelism == "fsdp", config
        )
        cuda = torch.cuda.is_available() and config.device != "cpu"
        if cuda and world.local_rank >= torch.cuda.device_count():
            raise RefusedError(
                f"The run was started on {size} devices, and this machine has {torch.cuda.device_count()}.",
                "Set num_devices to what the machine has.",
            )
        world._start(cuda=cuda)
        return world

    def _start(self, *, cuda: bool) -> None:
        from torch import distributed

        # A run that its supervisor froze for a while is not a hang.
        os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
        file = os.environ.get(RENDEZVOUS_VARIABLE)
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            init_method=f"file://{file}" if file else "env://",
            rank=self.rank,
            world_size=self.size,
            timeout=TIMEOUT,
            device_id=torch.device("cuda", self.local_rank) if cuda else None,
        )

    def leave(self) -> None:
        from torch import distributed

        if self.size > 1 and distributed.is_initialized():
            distributed.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Rank 0: the one that writes."""
        return self.rank == 0

    # --- shares -----------------------------------------------------------------------------------

    def shares(self, costs: Sequence[int]) -> list[list[int]]:
        """Indices of what each rank does, in order: the dearest first to whoever has least. No communication."""
        shares: list[list[int]] = [[] for _ in range(self.size)]
        loads = [0] * self.size
        for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
            least = loads.index(min(loads))
            shares[least].append(index)
            loads[least] += costs[index]
        return [sorted(share) for share in shares]

    def share(self, items: Sequence[T], cost: Callable[[T], int]) -> list[tuple[T, bool]]:
        """This rank's items, and whether each counts. In lockstep the shorter shares are filled up with items
        that do not.
        """
        shares = self.shares([cost(item) for item in items])
        mine = [(items[index], True) for index in shares[self.rank]]
        missing = self.missing([len(share) for share in shares])
        return mine + [(item, False) for item in items[:1] for _ in range(missing)]

    def missing(self, passes: Sequence[int]) -> int:
        """How many passes this rank must add to its own for all to have equally many."""
        return max(passes) - passes[self.rank] if self.lockstep else 0

    # --- agreement --------------------------------------------------------------------------------

    def together(self, work: Callable[[], T]) -> list[T]:
        """What `work` gave on each rank (values that JSON can carry). An error of one ends it on all.

        An error goes before an interrupt, and a lower rank before a higher: all ranks raise the same.
        """
        if self.size == 1:
            return [work()]
        error: Exception | None = None
        mine: dict[str, Any] = {}
        try:
            mine["value"] = work()
        except PeerLostError:
            raise
        except Exception as caught:
            error = caught
            mine["error"] = dataclasses.asdict(explain(caught, self.config))
        everyone = self._exchange(mine)
        failures = [(number, one["error"]) for number, one in enumerate(everyone) if "error" in one]
        if not failures:
            return [one["value"] for one in everyone]
        number, first = min(
            failures, key=lambda failure: (failure[1]["exit_code"] == ExitCode.INTERRUPTED, failure[0])
        )
        if number == self.rank and error is not None:
            raise error
        raise as_error(Explanation(**first)) from error

    def on_main(self, work: Callable[[], T]) -> T:
        """`work` of rank 0, whose value all get (its JSON: a tuple becomes a list)."""
        if self.size == 1:
            return work()
        value: T = self.together(lambda: work() if self.is_main else None)[0]  # type: ignore[assignment]
        return value

    def require_same(self, what: str, value: str) -> None:
        """Ranks that no longer hold the same weights would train nonsense."""
        if self.size > 1 and len(set(self.together(lambda: value))) > 1:
            raise PeerFailedError(
                f"The devices no longer agree on {what}.",
                "Retry the task: it goes on from its last checkpoint.",
                exit_code=1,
            )

    def _exchange(self, mine: dict[str, Any]) -> list[dict[str, Any]]:
        from torch import distributed

        content = torch.frombuffer(bytearray(json.dumps(mine).encode()), dtype=torch.uint8)
        try:
            lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            distributed.all_gather(lengths, torch.tensor([len(content)]))
            longest = max(int(length) for length in lengths)
            rows = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
            distributed.all_gather(rows, nn.functional.pad(content, (0, longest - len(content))))
        except RuntimeError as error:
            raise _lost(error) from error
        return [
            json.loads(row[: int(length)].numpy().tobytes())
            for row, length in zip(rows, lengths, strict=True)
        ]

    # --- sums -------------------------------------------------------------------------------------

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Every rank's gradients become their sum; a missing one counts as zero. All ranks get the same bits."""
        if self.size == 1:
            return
        bucket: list[nn.Parameter] = []
        for parameter in parameters:
            if bucket and sum(other.numel() for other in bucket) + parameter.numel() > BUCKET:
                self._sum(bucket)
                bucket = []
            bucket.append(parameter)
        if bucket:
            self._sum(bucket)

    def _sum(self, parameters: Sequence[nn.Parameter]) -> None:
        from torch import distributed

        flat = torch.cat([
            (torch.zeros_like(one) if one.grad is None else one.grad).flatten() for one in parameters
        ])  # fmt: skip
        try:
            distributed.all_reduce(flat)
        except RuntimeError as error:
            raise _lost(error) from error
        for one, part in zip(parameters, torch.split(flat, [one.numel() for one in parameters]), strict=True):
            one.grad = part.view_as(one)


ALONE = World()


def as_error(explanation: Explanation) -> EngineError:
    """The error of another rank, for this one to end in the same way."""
    kind = _ERRORS.get(explanation.exit_code)
    if kind is not None:
        return kind(explanation.sentence, explanation.next_step)
    return PeerFailedError(explanation.sentence, explanation.next_step, exit_code=explanation.exit_code)


def _lost(error: RuntimeError) -> PeerLostError:
    return PeerLostError(
        "The process of another device ended without a word.",
        "The last lines of the log say more; retrying goes on from the last checkpoint.",
    )
