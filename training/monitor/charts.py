"""Which charts a task has, and their Plotly figures from series. Pure: plain dictionaries, no Plotly import.

Chart ids and trace keys are metric keys. Colours are named by role and chosen in the browser (light, dark).
Every text in a figure is a constant of this file: no name given by a person can reach Plotly's markup.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from training.contract import KL_PAIRS
from training.monitor.series import Series, thin

LN2 = math.log(2)


@dataclass(frozen=True, kw_only=True)
class Trace:
    key: str
    name: str
    role: (
        str  # train | eval | chosen | rejected | chosen-eval | rejected-eval | margin | margin-eval | second
    )
    axis: str = "y"

    @property
    def is_eval(self) -> bool:
        return self.key.startswith("eval_")


@dataclass(frozen=True, kw_only=True)
class Guide:
    """A dotted line with a meaning, at a fixed value."""

    value: float
    label: str


@dataclass(frozen=True, kw_only=True)
class Chart:
    id: str
    title: str
    caption: str  # what is drawn
    good: str  # what a healthy run looks like
    y_title: str
    traces: tuple[Trace, ...]
    y2_title: str = ""
    logarithmic: bool = False  # may be drawn on a log axis: no value at or below zero
    percent: bool = False
    guide: Guide | None = field(default=None)

    @property
    def dom_id(self) -> str:
        return "chart-" + self.id.replace("/", "-").replace("_", "-")

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(trace.key for trace in self.traces)


CHARTS: tuple[Chart, ...] = (
    Chart(
        id="loss",
        title="Model Loss",
        caption="Training loss: how well the model learns from your training data. "
        "Validation loss: how well it generalizes to unseen data.",
        good="Both start at 0.693 (ln 2, no preference yet) and fall steadily.",
        y_title="loss",
        logarithmic=True,
        guide=Guide(value=LN2, label="0.693 = no preference learned"),
        traces=(
            Trace(key="loss", name="Training loss", role="train"),
            Trace(key="eval_loss", name="Validation loss", role="eval"),
        ),
    ),
    Chart(
        id="rewards/accuracies",
        title="DPO accuracy",
        caption="Share of pairs in which the model, measured against the reference, "
        "favours the chosen answer over the rejected one. Before the first step both are equal, and no pair "
        "counts.",
        good="Rises from 50 % and settles. 100 % within a few steps means the pairs are too easy.",
        y_title="accuracy",
        percent=True,
        guide=Guide(value=0.5, label="50 % = a coin toss"),
        traces=(
            Trace(key="rewards/accuracies", name="Training", role="train"),
            Trace(key="eval_rewards/accuracies", name="Validation", role="eval"),
        ),
    ),
    Chart(
        id="kl",
        title="KL divergence",
        caption="How far the model has moved from the reference, in nats per token of the answers. "
        f"The validation line is exact, over the whole vocabulary, on {KL_PAIRS} validation pairs at most; "
        "the training line is an estimate "
        "on training tokens.",
        good="Grows slowly and stays small. A sharp climb means that the model leaves what it knew: "
        "raise beta.",
        y_title="nats per token",
        logarithmic=True,
        traces=(
            Trace(key="kl", name="Training (estimate on training tokens)", role="train"),
            Trace(key="eval_kl", name="Validation (exact)", role="eval"),
        ),
    ),
    Chart(
        id="logps",
        title="Log-probabilities per side",
        caption="How likely the model finds each answer: log-probabilities summed over its tokens, in nats, "
        "averaged over pairs. Higher is likelier.",
        good="Rejected falls, chosen stays level or rises. When both fall, the model makes both answers "
        "unlikely.",
        y_title="nats per answer",
        traces=(
            Trace(key="logps/chosen", name="Chosen", role="chosen"),
            Trace(key="logps/rejected", name="Rejected", role="rejected"),
            Trace(key="eval_logps/chosen", name="Chosen, validation", role="chosen-eval"),
            Trace(key="eval_logps/rejected", name="Rejected, validation", role="rejected-eval"),
        ),
    ),
    Chart(
        id="rewards/margins",
        title="Rewards and margin",
        caption="beta times how much likelier the model finds an answer than the reference does. "
        "The margin is chosen minus rejected.",
        good="The margin widens, mostly because rejected goes down while chosen stays at or above zero.",
        y_title="reward",
        guide=Guide(value=0.0, label=""),
        traces=(
            Trace(key="rewards/chosen", name="Chosen", role="chosen"),
            Trace(key="rewards/rejected", name="Rejected", role="rejected"),
            Trace(key="rewards/margins", name="Margin", role="margin"),
            Trace(key="eval_rewards/margins", name="Margin, validation", role="margin-eval"),
        ),
    ),
    Chart(
        id="learning_rate",
        title="Learning rate and gradient norm",
        caption="The size of each step (right axis), and the length of the gradient before it is clipped "
        "(left axis).",
        good="The learning rate warms up, then decays. The gradient norm stays in one range, without tall "
        "spikes.",
        y_title="gradient norm",
        y2_title="learning rate",
        logarithmic=True,
        traces=(
            Trace(key="grad_norm", name="Gradient norm", role="train"),
            Trace(key="learning_rate", name="Learning rate", role="second", axis="y2"),
        ),
    ),
)


def chart_by_id(chart_id: str) -> Chart | None:
    return next((chart for chart in CHARTS if chart.id == chart_id), None)


def figure(chart: Chart, curves: Mapping[str, Series]) -> dict[str, Any]:
    """The figure as Plotly takes it; the browser adds colours, the smoothed lines and later points."""
    return {
        "data": [_trace(trace, curves.get(trace.key, [])) for trace in chart.traces],
        "layout": _layout(chart),
    }


def payload(curves: Mapping[str, Series]) -> list[dict[str, Any]]:
    """All charts, ready for `json_script`."""
    return [
        {
            "id": chart.id,
            "element": chart.dom_id,
            "title": chart.title,
            "logarithmic": chart.logarithmic,
            "figure": figure(chart, curves),
        }
        for chart in CHARTS
    ]


def _trace(trace: Trace, series: Series) -> dict[str, Any]:
    points = thin(series)
    return {
        "type": "scatter",
        "mode": "lines+markers" if trace.is_eval else "lines",
        "name": trace.name,
        "x": [step for step, _ in points],
        "y": [_rounded(value) for _, value in points],
        "yaxis": trace.axis,
        "connectgaps": False,
        "meta": {"key": trace.key, "role": trace.role, "smooth": not trace.is_eval and trace.axis == "y"},
    }


def _layout(chart: Chart) -> dict[str, Any]:
    layout: dict[str, Any] = {
        "margin": {"l": 58, "r": 58 if chart.y2_title else 14, "t": 8, "b": 40},
        "hovermode": "x unified",
        "hoverlabel": {"namelength": -1},
        "showlegend": True,
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "xanchor": "left", "yanchor": "bottom"},
        "xaxis": {"title": {"text": "step"}, "rangemode": "tozero", "hoverformat": ",d", "zeroline": False},
        "yaxis": {
            "title": {"text": chart.y_title},
            "zeroline": False,
            "automargin": True,
            "hoverformat": ".5~g",
        },
        "uirevision": chart.id,
    }
    if chart.percent:
        layout["yaxis"] |= {"tickformat": ".0%", "hoverformat": ".1%", "range": [-0.03, 1.05]}
    if chart.y2_title:
        layout["yaxis2"] = {
            "title": {"text": chart.y2_title},
            "overlaying": "y",
            "tickmode": "auto",
            "side": "right",
            "showgrid": False,
            "zeroline": False,
            "rangemode": "tozero",
            "automargin": True,
            "exponentformat": "e",
            "hoverformat": ".4~g",
        }
    if chart.guide is not None:
        layout["shapes"] = [
            {
                "type": "line",
                "xref": "paper",
                "x0": 0,
                "x1": 1,
                "y0": chart.guide.value,
                "y1": chart.guide.value,
                "layer": "below",
                "line": {"width": 1, "dash": "dot"},
                "label": {"text": chart.guide.label, "textposition": "end", "yanchor": "bottom"},
            }
        ]
    return layout


def _rounded(value: float | None) -> float | None:
    """Six significant digits: more cannot be seen, and they double the page."""
    return None if value is None else float(f"{value:.6g}")
