"""What policy and reference think of every single pair, over the run: `pairs/step-000040.parquet`.

A file holds the validation pairs of an evaluation at its step, and the training pairs met since the file
before, each as it was in its own step: those values are free. Columns: `training/pair_columns.py`.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from training.contract import PAIRS_DIR, Metric, Split
from training.engine.data import TokenizedPair
from training.engine.distributed import ALONE, World
from training.engine.objective import Objective, PairLogps, mean_chosen_tokens
from training.engine.reference import ReferenceLogps
from training.engine.step_files import step_path, write_durably
from training.pair_columns import PAIR_COLUMNS

if TYPE_CHECKING:
    import pyarrow

Row = dict[str, Any]
SUMS = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Kept on the device, so that a step does not wait for it."""

    split: Split
    step: int
    pairs: Sequence[TokenizedPair]
    sums: torch.Tensor  # [5, B] float64: SUMS and the losses; without a reference its rows are NaN
    dropout: bool

    def rows(self, objective: Objective) -> list[Row]:
        sums = self.sums.cpu()
        logps = _pair_logps(self.pairs, dict(zip(SUMS, sums, strict=False)))
        margins = objective.pair_metrics(logps).get(Metric.REWARDS_MARGINS)
        return [
            self._row(
                index, pair, sums[:, index].tolist(), None if margins is None else float(margins[index])
            )
            for index, pair in enumerate(self.pairs)
        ]

    def _row(self, index: int, pair: TokenizedPair, sums: list[float], margin: float | None) -> Row:
        row: Row = {
            "id": pair.id,
            "split": self.split,
            "step": self.step,
            "dropout": self.dropout,
            "truncated": pair.truncated,
            "chosen_tokens": len(pair.chosen),
            "rejected_tokens": len(pair.rejected),
        }
        for name, value in zip(SUMS, sums, strict=False):
            length = len(pair.chosen if name.endswith("chosen") else pair.rejected)
            row[f"{name}_logps"] = _number(value) if length else None
            row[f"{name}_mean_logps"] = _number(value / length) if length else None
        return row | {"margin": _number(margin), "loss": _number(sums[-1])}


class PairRecord:
    """Collects pairs as they are met; `flush` writes those of all ranks, merged with what the file already has."""

    def __init__(
        self, run_dir: Path, objective: Objective, world: World = ALONE, *, wanted: bool = True
    ) -> None:
        self._wanted = wanted
        self._world = world
        self._folder = run_dir / PAIRS_DIR
        self._objective = objective
        self._pending: list[_Batch] = []

    def add(
        self,
        split: Split,
        step: int,
        pairs: Sequence[TokenizedPair],
        logps: PairLogps,
        losses: torch.Tensor,
        *,
        dropout: bool = False,
    ) -> None:
        """Values [B] of a forward pass at the weights of `step` (optimizer steps done)."""
        if not self._wanted:
            return
        nothing = torch.full_like(logps.policy_chosen, math.nan)
        columns = [getattr(logps, name) for name in SUMS]
        sums = torch.stack(
            [(nothing if c is None else c).detach() for c in columns] + [losses.detach().double()]
        )
        self._pending.append(_Batch(split, step, tuple(pairs), sums, dropout))

    def add_start(
        self, pairs: Iterable[TokenizedPair], reference: ReferenceLogps, *, policy_is_reference: bool
    ) -> None:
        """Training pairs before step 1. Where the policy is its reference, its values are known without a pass."""
        scored = [pair for pair in pairs if pair in reference]
        if not scored:
            return
        sides = np.array([_side_sums(pair, reference) for pair in scored]).T  # [2, B]
        chosen, rejected = torch.from_numpy(sides.copy())
        unknown = torch.full_like(chosen, math.nan)
        policy = (chosen, rejected) if policy_is_reference else (unknown, unknown)
        logps = _pair_logps(scored, dict(zip(SUMS, (*policy, chosen, rejected), strict=True)))
        losses = self._objective.losses(logps, tokens_per_pair=mean_chosen_tokens(scored))
        self.add("train", 0, scored, logps, losses)

    def flush(self, step: int) -> None:
        """Write what was collected as the file of `step`. Of a step met again, the new rows stand."""
        if not self._wanted:
            return
        shares = self._world.together(
            lambda: [row for batch in self._pending for row in batch.rows(self._objective)]
        )
        self._pending.clear()
        rows = [row for share in shares for row in share]
        if rows:
            self._world.on_main(lambda: self._write(step, rows))

    def _write(self, step: int, rows: list[Row]) -> None:
        import pyarrow
        from pyarrow import parquet

        path = step_path(self._folder, step, ".parquet")
        new = {(row["split"], row["step"]) for row in rows}
        if path.exists():
            before = parquet.read_table(path, use_threads=False).to_pylist()
            rows = [row for row in before if (row["split"], row["step"]) not in new] + rows
        rows.sort(key=lambda row: (row["split"], row["step"]))
        table = pyarrow.Table.from_pylist(rows, schema=_schema())
        content = io.BytesIO()
        parquet.write_table(table, content, compression="zstd")
        write_durably(path, content.getvalue())


def _pair_logps(pairs: Sequence[TokenizedPair], sums: dict[str, torch.Tensor]) -> PairLogps:
    """From sums [B] alone: what pair metrics and losses need."""
    lengths = [[len(pair.chosen) for pair in pairs], [len(pair.rejected) for pair in pairs]]
    return PairLogps(
        policy_tokens=torch.empty(0),
        chosen_lengths=torch.tensor(lengths[0], dtype=torch.float64),
        rejected_lengths=torch.tensor(lengths[1], dtype=torch.float64),
        **sums,
    )


def _side_sums(pair: TokenizedPair, reference: ReferenceLogps) -> tuple[float, float]:
    tokens = reference.token_logps([pair], torch.device("cpu")).double()
    split = len(pair.chosen)
    return float(tokens[:split].sum()), float(tokens[split:].sum())


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _schema() -> pyarrow.Schema:
    import pyarrow

    kinds = {
        "id": pyarrow.string(),
        "split": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
        "step": pyarrow.int32(),
        "dropout": pyarrow.bool_(),
        "truncated": pyarrow.bool_(),
        "chosen_tokens": pyarrow.int32(),
        "rejected_tokens": pyarrow.int32(),
    }
    return pyarrow.schema(
        [pyarrow.field(name, kinds.get(name, pyarrow.float64())) for name in PAIR_COLUMNS],
        metadata=dict(PAIR_COLUMNS),
    )
