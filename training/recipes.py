"""Every parameter of a training once: name, label, default, ranges, help. Forms, pages, API and docs read it.

Pure: knows no Django, no model and no page. Names are those of `training.contract.RunConfig`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

Kind = Literal["int", "float", "modules"]
Group = Literal["basic", "advanced"]

MODULE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,99}")
MAX_MODULES = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameter:
    """`low` and `high` are refused beyond; `usual_low` to `usual_high` is where good runs are found."""

    name: str
    label: str  # what the page calls it
    title: str  # the same in everyday words
    default: Any
    low: float
    high: float
    usual_low: float
    usual_high: float
    help: str
    increase: str
    decrease: str
    kind: Kind
    group: Group
    low_excluded: bool = False
    suggestions: tuple[float, ...] = ()

    @property
    def usual(self) -> str:
        if self.kind == "modules":
            return "all linear layers"
        return f"{number(self.usual_low)} to {number(self.usual_high)}"


PARAMETERS: tuple[Parameter, ...] = (
    Parameter(
        name="num_train_epochs", label="epoch", title="Passes over the data", kind="float", group="basic",
        default=1.0, low=0, low_excluded=True, high=100, usual_low=1, usual_high=3, suggestions=(1, 2, 3),
        help="How often the run goes through all training pairs.",
        increase="More chances to learn each pair, but the model may become good at these pairs and worse at "
        "anything new. Preference tuning overfits quickly; rarely go above 2.",
        decrease="Finishes sooner, but the model may see too little to change.",
    ),
    Parameter(
        name="per_device_train_batch_size", label="batch_size", title="Pairs at once", kind="int",
        group="basic", default=2, low=1, high=1024, usual_low=1, usual_high=16, suggestions=(1, 2, 4, 8),
        help="How many pairs are worked on together before the next group. This is what fills the memory.",
        increase="Steadier updates and often better use of the hardware, but clearly more memory.",
        decrease="Less memory; raise gradient_accumulation_steps by the same factor to keep the updates "
                 "as steady.",
    ),
    Parameter(
        name="learning_rate", label="learning_rate", title="Size of each update", kind="float", group="basic",
        default=5e-5, low=0, low_excluded=True, high=1, usual_low=1e-6, usual_high=1e-4,
        suggestions=(5e-6, 2e-5, 5e-5, 1e-4),
        help="How far each update moves the adapter. Preference tuning wants less than ordinary fine-tuning.",
        increase="Learns faster, but the run can become unstable and never settle on a good model.",
        decrease="Steadier and finer, but slower; too little and nothing is learned at all.",
    ),
    Parameter(
        name="lora_r", label="lora_rank", title="Capacity of the adapter", kind="int", group="basic",
        default=16, low=1, high=1024, usual_low=4, usual_high=64, suggestions=(4, 8, 16, 32, 64),
        help="How much the LoRA adapter can express: the rank of the matrices that are trained.",
        increase="(for example 32 or 64) Can take up more complex preferences, at the price of more memory.",
        decrease="(for example 4 or 8) Less memory and a smaller file, but complex preferences may not "
                 "fit in.",
    ),
    Parameter(
        name="max_length", label="max_context_length", title="Longest example", kind="int",
        group="advanced", default=1024, low=16, high=1_000_000, usual_low=256, usual_high=8192,
        suggestions=(512, 1024, 2048, 4096),
        help="The most tokens of one prompt with one answer. What is longer is truncated, and the run "
             "says how often.",
        increase="Learns from longer texts, but memory grows with it.",
        decrease="Less memory and faster steps, but more pairs are cut.",
    ),
    Parameter(
        name="warmup_ratio", label="warmup_ratio", title="Share of gentle start", kind="float",
        group="advanced", default=0.1, low=0, high=1, usual_low=0.03, usual_high=0.1,
        suggestions=(0, 0.03, 0.05, 0.1),
        help="The share of all steps in which the learning rate climbs from zero. It is there for stability.",
        increase="A gentler start; beyond 0.1 it mostly costs learning time.",
        decrease="Full speed sooner; with 0 the first updates may be rough.",
    ),
    Parameter(
        name="gradient_accumulation_steps", label="gradient_accumulation_steps", title="Batches per update",
        kind="int", group="advanced", default=8, low=1, high=4096, usual_low=1, usual_high=32,
        suggestions=(1, 4, 8, 16),
        help="How many batches are added up before one update: a larger batch without its memory. 1 "
             "switches it off.",
        increase="Steadier updates for no more memory, but fewer updates per pass.",
        decrease="More updates per pass, each from fewer pairs and therefore noisier.",
    ),
    Parameter(
        name="target_modules", label="target_modules", title="Layers that are trained", kind="modules",
        group="advanced", default=(), low=0, high=MAX_MODULES, usual_low=2, usual_high=7,
        help="Which parts of the model carry an adapter. Nothing chosen means all linear layers except "
             "the head.",
        increase="(more layers) The adaptation reaches more of the model; more parameters are trained.",
        decrease="(for example q_proj and v_proj only) A smaller adapter that changes attention alone.",
    ),
    Parameter(
        name="beta", label="beta", title="Pull towards the reference", kind="float", group="advanced",
        default=0.1, low=0, low_excluded=True, high=100, usual_low=0.01, usual_high=1,
        suggestions=(0.05, 0.1, 0.3, 0.5),
        help="The KL regularisation of DPO: how closely the trained model stays to the reference model.",
        increase="Stays closer to the original behaviour: less overfitting to the pairs, a weaker effect.",
        decrease="Follows the preferences more freely, with more risk of losing other abilities.",
    ),
    Parameter(
        name="lora_alpha", label="lora_alpha", title="Strength of the adapter", kind="int", group="advanced",
        default=32, low=1, high=4096, usual_low=8, usual_high=128, suggestions=(16, 32, 64),
        help="Scales what the adapter adds: its effect is multiplied by lora_alpha / lora_rank. Twice the "
             "rank is usual.",
        increase="A stronger effect per update, much like a higher learning rate.",
        decrease="A milder effect; learning takes longer to show.",
    ),
    Parameter(
        name="lora_dropout", label="lora_dropout", title="Random omission", kind="float", group="advanced",
        default=0.05, low=0, high=0.95, usual_low=0, usual_high=0.2, suggestions=(0, 0.05, 0.1),
        help="The share of the adapter's inputs left out at random in training, so that it relies on no "
             "single one.",
        increase="Helps small datasets against overfitting; learning becomes slower.",
        decrease="Learns more directly; 0 switches it off.",
    ),
    Parameter(
        name="seed", label="seed", title="Seed of chance", kind="int", group="advanced",
        default=42, low=0, high=2**31 - 1, usual_low=0, usual_high=2**31 - 1,
        help="Decides the order of the pairs, the validation split and every random draw. "
        "The same seed gives the same run.",
        increase="Any other number is another, equally good draw.",
        decrease="Any other number is another, equally good draw.",
    ),
)  # fmt: skip
BY_NAME: Mapping[str, Parameter] = {parameter.name: parameter for parameter in PARAMETERS}
# A run that trains an adapter on cannot choose these: its matrices are there already.
OF_THE_ADAPTER = ("lora_r", "lora_alpha", "target_modules")


@dataclasses.dataclass(frozen=True)
class Difference:
    """A parameter that is not at its default."""

    parameter: Parameter
    value: str
    default: str


def number(value: object) -> str:
    """A number as people write it in this field: 5e-6, 0.1, 1024."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e15:
        return f"{value:.10g}"
    mantissa, _, exponent = f"{value:.6e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def show(parameter: Parameter, value: object) -> str:
    """A value as the page shows it."""
    if parameter.kind == "modules":
        names = value if isinstance(value, (list, tuple)) else ()
        return ", ".join(str(name) for name in names) or "all linear layers"
    return number(value)


def resolve(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Every parameter, the given values over the defaults. Call `problems` first: nothing is checked here."""
    given = {name: parameters[name] for name in BY_NAME if name in parameters}
    resolved = {parameter.name: given.get(parameter.name, parameter.default) for parameter in PARAMETERS}
    resolved["target_modules"] = tuple(resolved["target_modules"])
    return resolved


def continuing(chosen: Mapping[str, Any], adapter: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Resolved parameters of a run that trains an adapter on, and in words what that overrode.

    `adapter` are the resolved parameters under which the adapter was made.
    """
    given = {name: adapter[name] for name in OF_THE_ADAPTER if name in adapter}
    before, after = resolve(chosen), resolve({**chosen, **given})
    overridden = [
        f"{BY_NAME[name].label} {show(BY_NAME[name], after[name])} instead of {show(BY_NAME[name], before[name])}"
        for name in OF_THE_ADAPTER
        if after[name] != before[name]
    ]
    return after, overridden


def problems(parameters: object) -> dict[str, str]:
    """What makes these parameters unusable, by name; each sentence names the usual range. Never raises."""
    if not isinstance(parameters, Mapping):
        return {"parameters": "The parameters must be given as names with values."}
    found: dict[str, str] = {}
    for name, value in parameters.items():
        parameter = BY_NAME.get(name) if isinstance(name, str) else None
        if parameter is None:
            found[str(name)[:100]] = (
                f"{str(name)[:100]} is not a parameter. Known ones are: {', '.join(BY_NAME)}."
            )
        elif sentence := problem(parameter, value):
            found[name] = sentence
    return found


def problem(parameter: Parameter, value: object) -> str:
    """The sentence that refuses this value, or ""."""
    if parameter.kind == "modules":
        return _modules_problem(value)
    usual = f"the usual range is {parameter.usual}"
    what = "a whole number" if parameter.kind == "int" else "a number"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return f"{parameter.label} must be {what}; {usual}."
    if isinstance(value, float) and not math.isfinite(value):
        return f"{parameter.label} must be {what}, not infinite or NaN; {usual}."
    if parameter.kind == "int" and value != int(value):
        return f"{parameter.label} must be a whole number; {usual}."
    if parameter.low_excluded and value <= parameter.low:
        return f"{parameter.label} must be above {number(parameter.low)}; {usual}."
    if value < parameter.low:
        return f"{parameter.label} must be at least {number(parameter.low)}; {usual}."
    if value > parameter.high:
        return f"{parameter.label} must be at most {number(parameter.high)}; {usual}."
    return ""


def _modules_problem(value: object) -> str:
    if not isinstance(value, (list, tuple)):
        return "target_modules must be a list of layer names; leave it empty for all linear layers."
    if len(value) > MAX_MODULES:
        return f"target_modules names {len(value)} layers; at most {MAX_MODULES} are possible."
    for name in value:
        if not isinstance(name, str) or not MODULE_NAME.fullmatch(name):
            return "target_modules holds a name that no layer can have; choose from the list of the model."
    return ""


def warnings(parameters: Mapping[str, Any]) -> dict[str, str]:
    """What will run but is seldom meant, by name. Expects values without `problems`."""
    values = resolve(parameters)
    found: dict[str, str] = {}
    if values["learning_rate"] > 1e-4:
        found["learning_rate"] = (
            f"learning_rate {number(values['learning_rate'])} is high for preference tuning: the run may become "
            "unstable or drift from its reference. 5e-5 is the default, 5e-6 a careful start."
        )
    elif values["learning_rate"] < 5e-7:
        found["learning_rate"] = (
            f"learning_rate {number(values['learning_rate'])} is so low that an adapter will hardly move. "
            "Try 1e-6 or more."
        )
    if values["num_train_epochs"] > 3:
        found["num_train_epochs"] = (
            f"{number(values['num_train_epochs'])} passes: preference tuning overfits quickly, 1 to 2 are "
            f"usual. "
            "Watch the validation loss."
        )
    if not 0.01 <= values["beta"] <= 1:
        found["beta"] = f"beta {number(values['beta'])} is outside 0.01 to 1, where good runs are found."
    elif values["beta"] < 0.05:
        found["beta"] = f"beta {number(values['beta'])} is aggressive: the model may lose other abilities."
    if values["lora_alpha"] > 4 * values["lora_r"]:
        found["lora_alpha"] = (
            f"lora_alpha is {number(values['lora_alpha'] / values['lora_r'])} times lora_rank; twice is "
            f"usual, "
            "more acts like a higher learning rate."
        )
    if values["warmup_ratio"] > 0.5:
        found["warmup_ratio"] = "More than half of the run would be warm-up. 0.03 to 0.1 is recommended."
    if values["lora_dropout"] > 0.5:
        found["lora_dropout"] = "More than half of the adapter's inputs would be dropped. 0 to 0.2 is usual."
    if values["max_length"] < 128:
        found["max_length"] = "Fewer than 128 tokens cut most conversations. 256 or more is usual."
    return found


# Upper bound of each band of beta, its name, and what to expect there.
BETA_BANDS: tuple[tuple[float, str, str], ...] = (
    (0.05, "aggressive", "follows the preferences freely; watch for lost abilities"),
    (0.3, "standard", "the usual balance; 0.1 is where to start"),
    (math.inf, "conservative", "stays close to the reference; the effect is weaker"),
)


def beta_band(beta: float) -> tuple[str, str]:
    """The name of the band this beta lies in, and what to expect there."""
    for upper, name, expectation in BETA_BANDS:
        if beta < upper or (upper == math.inf):
            return name, expectation
    raise AssertionError("the last band has no upper bound")


def differences(parameters: Mapping[str, Any]) -> list[Difference]:
    """What differs from the defaults, in screen order."""
    values = resolve(parameters)
    return [
        Difference(parameter, show(parameter, values[parameter.name]), show(parameter, parameter.default))
        for parameter in PARAMETERS
        if values[parameter.name] != parameter.default
    ]
