"""Series and figures: what is drawn, what is thinned, and what no name can do to Plotly."""

from __future__ import annotations

import json
import math

import plotly.graph_objects as go
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.contract import KL_PAIRS, Metric
from training.monitor.charts import CHARTS, chart_by_id, figure, payload
from training.monitor.progress import duration_words, phase_marks, phase_words, seconds_per_step
from training.monitor.series import Series, curves_from, smoothed, sparkline, thin

METRICS = {value for name, value in vars(Metric).items() if not name.startswith("_")}


def test_every_trace_is_a_metric_of_the_contract() -> None:
    for chart in CHARTS:
        for key in chart.keys:
            assert key.removeprefix("eval_") in METRICS, key


@pytest.mark.parametrize(
    ("chart_id", "keys"),
    [
        ("loss", {"loss", "eval_loss"}),
        ("rewards/accuracies", {"rewards/accuracies", "eval_rewards/accuracies"}),
        ("kl", {"kl", "eval_kl"}),
        ("logps", {"logps/chosen", "logps/rejected", "eval_logps/chosen", "eval_logps/rejected"}),
        (
            "rewards/margins",
            {"rewards/chosen", "rewards/rejected", "rewards/margins", "eval_rewards/margins"},
        ),
        ("learning_rate", {"learning_rate", "grad_norm"}),
    ],
)
def test_each_promised_chart_draws_its_metrics(chart_id: str, keys: set[str]) -> None:
    chart = chart_by_id(chart_id)
    assert chart is not None
    assert set(chart.keys) == keys


def test_the_training_kl_is_called_an_estimate_and_the_validation_kl_exact() -> None:
    names = {trace.key: trace.name for trace in chart_by_id("kl").traces}  # type: ignore[union-attr]
    assert "estimate on training tokens" in names["kl"]
    assert "exact" in names["eval_kl"]


def test_plotly_accepts_every_figure() -> None:
    rows = [
        (step, dict.fromkeys(METRICS, 0.5) | {f"eval_{key}": 0.4 for key in METRICS}) for step in range(9)
    ]
    for item in payload(curves_from(rows)):
        go.Figure(item["figure"])  # raises on any property Plotly does not know


def test_a_figure_holds_the_points_in_step_order_and_a_gap_for_a_nan() -> None:
    curves = curves_from(
        [(2, {"loss": float("nan")}), (1, {"loss": 0.7}), (3, {"loss": 0.6, "eval_loss": 0.65})]
    )
    train, evaluation = figure(CHARTS[0], curves)["data"]
    assert (train["x"], train["y"]) == ([1, 2, 3], [0.7, None, 0.6])
    assert (evaluation["x"], evaluation["y"]) == ([3], [0.65])


def test_a_key_with_markup_reaches_no_figure() -> None:
    curves = curves_from([(1, {"<img src=x onerror=alert(1)>": 1.0, "loss": 0.5})])
    assert "<" not in json.dumps(payload(curves))


def test_infinity_never_reaches_the_page() -> None:
    curves = curves_from([(1, {"loss": math.inf, "kl": True, "grad_norm": "12"})])
    text = json.dumps(payload(curves), allow_nan=False)
    assert "Infinity" not in text
    assert curves == {"loss": [(1, None)], "kl": [(1, None)], "grad_norm": [(1, None)]}


# --- thinning ------------------------------------------------------------------------------------------------
values = st.one_of(st.none(), st.floats(-1e6, 1e6))


@given(st.lists(values, min_size=1, max_size=400), st.integers(5, 120))
def test_thinning_keeps_ends_extremes_order_and_the_limit(ys: list[float | None], limit: int) -> None:
    series: Series = list(enumerate(ys))
    thinned = thin(series, limit)
    assert len(thinned) <= max(limit, 5)
    assert thinned[0] == series[0]
    assert thinned[-1] == series[-1]
    assert thinned == sorted(set(thinned), key=lambda point: point[0])
    assert set(thinned) <= set(series)
    numbers = [y for y in ys if y is not None]
    kept = [y for _, y in thinned if y is not None]
    if numbers:
        assert (min(kept), max(kept)) == (min(numbers), max(numbers))
    if None in ys:
        assert None in [y for _, y in thinned]


def test_one_spike_among_a_hundred_thousand_points_survives() -> None:
    series: Series = [(step, 1.0) for step in range(100_000)]
    series[54_321] = (54_321, 99.0)
    thinned = thin(series)
    assert len(thinned) <= 2000
    assert (54_321, 99.0) in thinned


def test_smoothing_starts_at_the_first_value_and_a_constant_stays_constant() -> None:
    assert smoothed([(1, 3.0), (2, None), (3, 3.0)], 0.9) == [
        (1, pytest.approx(3.0)),
        (3, pytest.approx(3.0)),
    ]
    assert smoothed([(1, 0.0), (2, 1.0)], 0.5)[1][1] == pytest.approx(2 / 3)


def test_a_sparkline_needs_two_points_and_stays_inside_its_box() -> None:
    assert sparkline([(1, 0.5)]) == ""
    for pair in sparkline([(1, 9.0), (2, -4.0), (50, 2.0)]).split():
        x, y = map(float, pair.split(","))
        assert 0 <= x <= 120
        assert 0 <= y <= 32


# --- words ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (None, ""),
        (0, "0 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3840, "1 h 04 min"),
        (190_000, "2 d 4 h"),
    ],
)
def test_durations_in_words(seconds: float | None, words: str) -> None:
    assert duration_words(seconds) == words


def test_phases_in_words() -> None:
    assert phase_words("reference", 40, 180, "pairs") == "Reference pass 40/180 pairs"
    assert phase_words("loading_model", 0, 0, "") == "Loading model"
    assert phase_words("training", 3, 60, "steps") == "Training"


def test_the_pace_counts_evaluations_but_not_a_night_switched_off() -> None:
    steady = [(step, 100.0 + 2 * step) for step in range(11)]
    assert seconds_per_step(steady) == pytest.approx(2.0)
    overnight = [*steady, *((step, 50_000.0 + 2 * step) for step in range(11, 22))]
    pace = seconds_per_step(overnight)
    assert pace is not None
    assert 2.0 < pace < 3.0
    assert seconds_per_step(steady[:1]) is None


@pytest.mark.parametrize("phase", ["evaluating", "watching"])
def test_what_comes_between_steps_is_shown_within_training(phase: str) -> None:
    states = {mark.key: mark.state for mark in phase_marks(phase, finished=False)}
    assert states == {
        "starting": "done", "loading_model": "done", "preparing_data": "done", "reference": "done",
        "training": "now", "saving": "ahead",
    }  # fmt: skip
    assert {mark.state for mark in phase_marks("saving", finished=True)} == {"done"}


def test_the_caption_says_on_how_many_pairs_the_exact_divergence_is_measured() -> None:
    chart = chart_by_id("kl")
    assert chart is not None and f"{KL_PAIRS} validation pairs at most" in chart.caption
