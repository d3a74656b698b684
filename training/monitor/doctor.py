"""Reads the curves of a run and says, in plain words, what they mean and what to do. Pure rules over series.

Each rule answers with a finding or nothing. Thresholds are rules of thumb and stand here by name; where the
data cannot carry a verdict, the finding says so instead of guessing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from training.monitor.series import Curves, numbers, smoothed

LN2 = math.log(2)

MIN_TRAIN_POINTS = 8
MIN_EVALS = 3
SMOOTHING = 0.8
LOSS_TOLERANCE = 0.01  # a change below this is not called a change
RISE_SHARE = 0.15  # of the drop so far; validation loss that gave back more is rising
SETTLED_SHARE = 0.3  # of the run; before it, "not falling" may only be the warm-up
STUCK_BAND = 0.015  # around ln 2
EARLY_SHARE = 0.25
TRIVIAL_LOSS, TRIVIAL_ACCURACY = 0.05, 0.99
DISPLACED_NATS, DISPLACED_SHARE = 10.0, 0.2
KL_LARGE, KL_VERY_LARGE = 0.3, 1.0  # nats per token
SPIKE_FACTOR, SPIKE_WINDOW = 8.0, 100

SEVERITIES = ("bad", "warning", "good", "info")  # the order on the page


@dataclass(frozen=True, kw_only=True)
class Finding:
    code: str
    severity: str
    title: str
    text: str
    action: str
    offer: str = ""  # "stop": ending the run now and keeping the model is the advice


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a rule may look at."""

    curves: Curves
    total_steps: int
    running: bool
    kept: bool  # a model came out

    def values(self, key: str) -> list[tuple[int, float]]:
        return numbers(self.curves.get(key, []))

    @property
    def step(self) -> int:
        series = self.curves.get("loss", [])
        return series[-1][0] if series else 0

    @property
    def settled(self) -> bool:
        """Far enough that a flat curve means something."""
        enough = len(self.values("loss")) >= 2 * MIN_TRAIN_POINTS
        return enough and (not self.running or self.step >= SETTLED_SHARE * self.total_steps)


Rule = Callable[[Run], Finding | None]


def read_curves(curves: Curves, *, total_steps: int, running: bool, kept: bool = False) -> list[Finding]:
    """All findings, the gravest first."""
    run = Run(curves=curves, total_steps=total_steps, running=running, kept=kept)
    found = [finding for rule in RULES if (finding := rule(run)) is not None]
    codes = {finding.code for finding in found}
    if codes & {"stuck", "not-a-number"}:  # the general reading would only repeat the special one
        found = [finding for finding in found if finding.code not in {"high", "train-falls", "too-early"}]
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))


# --- the three readings of the loss curves ---------------------------------------------------------------
def loss_reading(run: Run) -> Finding | None:
    train, evals = run.values("loss"), run.values("eval_loss")
    if not train:
        missing = "no training step has been reported yet" if run.running else "no training step was reported"
        return _too_early(missing, run)
    if len(train) < MIN_TRAIN_POINTS:
        return _too_early(f"{len(train)} of at least {MIN_TRAIN_POINTS} training points so far", run)
    train_falls = _train_falls(train)
    if len(evals) < (MIN_EVALS if run.running else 2):
        return _without_validation(run, train_falls=train_falls, num_evals=len(evals))
    first, last = evals[0][1], evals[-1][1]
    best_step, best = min(evals, key=lambda point: point[1])
    rising = last - best > max(LOSS_TOLERANCE, RISE_SHARE * (first - best))
    if rising and train_falls:
        return Finding(
            code="overfitting",
            severity="warning",
            title="The model may be overfitting",
            text=f"Training loss decreases but validation loss increases: it was lowest at step {best_step} "
            f"({best:.3f}) and is {last:.3f} now. The model learns these pairs by heart.",
            action="Stop training and use the current model. For the next run: fewer epochs, a lower "
            "learning_rate, a higher beta, or more varied pairs.",
            offer="stop" if run.running else "",
        )
    if first - last > LOSS_TOLERANCE and not rising:
        return _learning(run, evals)
    if rising or run.settled:
        return Finding(
            code="high",
            severity="warning",
            title="The losses stay high or rise",
            text=f"Validation loss went from {first:.3f} to {last:.3f}, and training loss "
            f"{'falls' if train_falls else 'does not fall either'}.",
            action="Your training data or configuration may need adjustment. Review your dataset (is chosen "
            "clearly and consistently better?) and your parameters (learning_rate first).",
        )
    return _too_early("no clear direction yet", run)


def _learning(run: Run, evals: list[tuple[int, float]]) -> Finding:
    first, last = evals[0][1], evals[-1][1]
    recent = [value for _, value in evals[-4:]]
    if (
        len(evals) >= 6
        and max(recent) - min(recent) < LOSS_TOLERANCE / 2
        and recent[0] - last < LOSS_TOLERANCE / 4
    ):
        return Finding(
            code="levelled",
            severity="info",
            title="Validation loss has levelled off",
            text=f"It fell from {first:.3f} to {last:.3f} and hardly moved over the last four evaluations.",
            action="More steps will bring little. Stopping now keeps the model as good as it is."
            if run.running
            else "Fewer steps would have done as well.",
            offer="stop" if run.running else "",
        )
    fell = f"validation loss went from {first:.3f} to {last:.3f}."
    if run.running:
        title, text = "Your model is learning well", f"Both losses decrease steadily; {fell}"
        action = "Continue training."
    else:
        title, text = "The model was learning well", f"Both losses decreased; {fell}"
        action = _judge(run)
    return Finding(code="learning", severity="good", title=title, text=text, action=action)


def _without_validation(run: Run, *, train_falls: bool, num_evals: int) -> Finding:
    if run.running and num_evals:
        plural = "" if num_evals == 1 else "s"
        return _too_early(f"{num_evals} evaluation{plural} so far, {MIN_EVALS} are needed", run)
    if train_falls:
        return Finding(
            code="train-falls",
            severity="info",
            title="Training loss decreases",
            text="Without a validation loss nobody can tell learning from memorising.",
            action="Hold out a share of the pairs (10 % is usual) in the next run.",
        )
    return _too_early("training loss has no clear direction", run)


def _too_early(reason: str, run: Run) -> Finding:
    return Finding(
        code="too-early",
        severity="info",
        title="Too early to say" if run.running else "Too little data to say",
        text=f"{reason[0].upper()}{reason[1:]}.",
        action="Look again after the next evaluations." if run.running else _judge(run),
    )


def _judge(run: Run) -> str:
    if run.kept:
        return "Try the model beside its base on prompts it has not seen."
    return "No model of this run is kept, so there are only these curves to judge by."


def _train_falls(train: list[tuple[int, float]]) -> bool:
    """The last fifth lies below the first by more than the noise of the two means."""
    values = [value for _, value in train]
    size = max(3, len(values) // 5)
    head, tail = values[:size], values[-size:]
    drop = sum(head) / size - sum(tail) / size
    noise = math.sqrt((_variance(head) + _variance(tail)) / size)
    return drop > max(LOSS_TOLERANCE, noise)


def _variance(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / len(values)


# --- signs of particular trouble ----------------------------------------------------------------------------
def not_a_number(run: Run) -> Finding | None:
    series = run.curves.get("loss", [])
    if not series or series[-1][1] is not None:
        return None
    return Finding(
        code="not-a-number",
        severity="bad",
        title="The loss is no longer a number",
        text=f"At step {series[-1][0]} the loss overflowed: the updates have become too large.",
        action="Lower learning_rate (a tenth of it is a safe next try) and use a longer warm-up.",
    )


def stuck(run: Run) -> Finding | None:
    """Loss stays at ln 2: the policy is still the reference."""
    train = run.values("loss")
    if not run.settled:
        return None
    recent = [value for _, value in train[len(train) // 2 :]]
    margins = [value for _, value in run.values("rewards/margins")[-len(recent) :]]
    if abs(median(recent) - LN2) > STUCK_BAND or (margins and abs(median(margins)) > 2 * STUCK_BAND):
        return None
    return Finding(
        code="stuck",
        severity="warning",
        title="The loss is stuck at 0.693",
        text="0.693 is ln 2, the loss of a model that prefers neither answer: it has hardly moved away from "
        "its reference.",
        action="Raise learning_rate (three to ten times), check that warm-up is over, or train longer; then "
        "check that chosen and rejected really differ.",
    )


def trivially_separable(run: Run) -> Finding | None:
    """Loss near 0 and accuracy 1 within the first quarter of the run."""
    early = max(2 * MIN_TRAIN_POINTS, EARLY_SHARE * run.total_steps)
    losses = [point for point in smoothed(run.curves.get("loss", []), SMOOTHING) if point[0] <= early]
    right = [value for step, value in run.values("rewards/accuracies") if step <= early]
    if len(losses) < 5 or len(right) < 5 or run.total_steps < 2 * MIN_TRAIN_POINTS:
        return None
    if losses[-1][1] > TRIVIAL_LOSS or sum(right[-5:]) / 5 < TRIVIAL_ACCURACY:
        return None
    return Finding(
        code="trivial",
        severity="warning",
        title="The pairs are told apart almost at once",
        text=f"By step {losses[-1][0]} the loss is near zero and accuracy near 100 %. Something simple, such "
        "as length or a fixed phrase, may give the chosen answers away.",
        action="Look at the pairs: chosen and rejected should differ only in what you want to improve. A "
        "lower learning_rate and a higher beta slow the effect but do not mend the data.",
    )


def likelihood_displacement(run: Run) -> Finding | None:
    """The chosen answers themselves become much less likely."""
    key = "eval_logps/chosen" if len(run.values("eval_logps/chosen")) >= 2 else "logps/chosen"
    points = run.values(key) if key.startswith("eval_") else smoothed(run.curves.get(key, []), SMOOTHING)
    if len(points) < (2 if key.startswith("eval_") else 2 * MIN_TRAIN_POINTS):
        return None
    first, last = points[0][1], points[-1][1]
    drop = first - last
    if drop < max(DISPLACED_NATS, DISPLACED_SHARE * abs(first)):
        return None
    return Finding(
        code="displacement",
        severity="bad" if drop > 0.5 * abs(first) and drop > 3 * DISPLACED_NATS else "warning",
        title="The chosen answers become less likely",
        text=f"Their log-probability fell from {first:.0f} to {last:.0f} nats. The margin may still grow, "
        "because the rejected answers fall faster: this is called likelihood displacement.",
        action="Lower learning_rate, raise beta or train fewer epochs. When the pairs are nearly alike, make "
        "the difference between chosen and rejected clearer.",
    )


def large_divergence(run: Run) -> Finding | None:
    exact = run.values("eval_kl")
    points = exact or smoothed(run.curves.get("kl", []), SMOOTHING)
    if not points or points[-1][1] < KL_LARGE:
        return None
    last = points[-1][1]
    kind = "exact, on validation answers" if exact else "an estimate on training tokens"
    return Finding(
        code="kl",
        severity="bad" if last >= KL_VERY_LARGE else "warning",
        title="The model is far from its reference",
        text=f"KL divergence is {last:.2f} nats per token ({kind}). Abilities that the pairs do not show may "
        "be lost.",
        action="Raise beta or lower learning_rate, and compare the model with its base on everyday prompts "
        "before you use it.",
    )


def gradient_spikes(run: Run) -> Finding | None:
    values = run.values("grad_norm")
    if len(values) < 20:
        return None
    usual = median(value for _, value in values)
    spikes = [
        (step, value) for step, value in values[-SPIKE_WINDOW:] if value > max(SPIKE_FACTOR * usual, 1e-6)
    ]
    if not spikes:
        return None
    step, value = max(spikes, key=lambda point: point[1])
    return Finding(
        code="spikes",
        severity="warning" if len(spikes) >= 3 else "info",
        title="The gradient spikes",
        text=f"{len(spikes)} of the last {min(len(values), SPIKE_WINDOW)} steps had a gradient over "
        f"{SPIKE_FACTOR:.0f} times the usual {usual:.3g}; the tallest was {value:.3g} at step {step}.",
        action="Clipping holds single ones. If they keep coming, lower learning_rate, enlarge the effective "
        "batch, or look for broken pairs.",
    )


RULES: tuple[Rule, ...] = (
    not_a_number, stuck, trivially_separable, likelihood_displacement, large_divergence, gradient_spikes,
    loss_reading,
)  # fmt: skip
