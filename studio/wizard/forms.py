"""The forms of the four steps. Fields of step 3 are built from `training.recipes`; each form knows its draft.

`values()` is what the draft service takes; the same values, set on an unsaved draft, give the live summary.
"""

from __future__ import annotations

import re
import uuid
from typing import Any

from django import forms
from django.utils import timezone

from datasets_app.models import Dataset
from training import recipes
from training.base_models import linear_modules
from training.models import BaseModel, TrainedModel, TrainingTask
from training.services.draft_checks import NAME_LIMIT, lora_of_parent
from training.services.queue import most_gpus

Evaluation = TrainingTask.Evaluation
THOUSANDS = re.compile(r"\d{1,3}(,\d{3})+")
NAME_TOO_LONG = "Use at most %(limit_value)d characters; these are %(show_value)d."


class ModelStepForm(forms.Form):
    """`model` is `base:<id>` or `parent:<id>`: a row this person may see, never a path."""

    model = forms.CharField(error_messages={"required": "Choose a base model first."})

    def __init__(self, *args: Any, task: TrainingTask, **kwargs: Any) -> None:
        self.task = task
        super().__init__(*args, **kwargs)

    @staticmethod
    def chosen(task: TrainingTask) -> str:
        if task.parent_model_id:
            return f"parent:{task.parent_model_id}"
        return f"base:{task.base_model_id}" if task.base_model_id else ""

    def clean_model(self) -> tuple[BaseModel, TrainedModel | None]:
        kind, _, raw = self.cleaned_data["model"].partition(":")
        try:
            key = uuid.UUID(raw)
        except ValueError:
            raise forms.ValidationError("Choose one of the listed models.") from None
        if kind == "parent":
            parent = TrainedModel.objects.for_user(self.task.owner).filter(pk=key).first()
            if parent is None:
                raise forms.ValidationError("This model is no longer in My Models. Choose another.")
            if parent.base_model is None:
                raise forms.ValidationError(
                    f"The base of “{parent.name}” ({parent.base_model_name}) is gone. Add it again first."
                )
            return parent.base_model, parent
        base = BaseModel.objects.for_user(self.task.owner).filter(pk=key).first()
        if base is None:
            raise forms.ValidationError("This model is no longer listed. Choose another.")
        return base, None

    def values(self) -> dict[str, Any]:
        base, parent = self.cleaned_data["model"]
        return {"base_model": base, "parent_model": parent}


def written_number(text: str, *, whole: bool = False) -> float:
    """5e-6, 5,5 and, where only whole numbers are meant, 1,024. Raises ValueError for anything else."""
    text = text.strip()
    if "_" in text:
        raise ValueError("Python would read this, people do not write it")
    if whole and THOUSANDS.fullmatch(text):
        return float(text.replace(",", ""))
    return float(text.replace(",", "."))


class PercentField(forms.FloatField):
    """A share as people write it: 10, 12.5, 12,5."""

    def clean(self, value: Any) -> Any:
        try:
            return super().clean(written_number(str(value)) if value else value)
        except ValueError:
            raise forms.ValidationError(self.error_messages["invalid"], code="invalid") from None


class DataStepForm(forms.Form):
    """Which pairs, and how it is seen whether the model generalises."""

    dataset = forms.ModelChoiceField(
        queryset=Dataset.objects.none(),
        error_messages={
            "required": "Choose a dataset, or upload one.",
            "invalid_choice": "This dataset is not there any more. Choose another.",
        },
    )
    evaluation = forms.ChoiceField(choices=Evaluation.choices)
    validation_percent = PercentField(
        label="Share held out",
        required=False,
        min_value=0.1,
        max_value=50,
        error_messages={
            "invalid": "Give the share as a number of percent; 10 is usual.",
            "min_value": "Hold out more than 0 percent; 10 is usual.",
            "max_value": "Hold out at most 50 percent; 10 is usual.",
        },
    )
    validation_dataset = forms.ModelChoiceField(
        queryset=Dataset.objects.none(),
        required=False,
        label="Validation dataset",
        empty_label="Choose a dataset",
        error_messages={"invalid_choice": "This dataset is not there any more. Choose another."},
    )
    eval_steps = forms.IntegerField(
        label="Evaluate every … steps",
        required=False,
        min_value=0,
        max_value=1_000_000,
        error_messages={
            "invalid": "Give a whole number of steps, or 0 to let the studio choose.",
            "min_value": "Give 0 or more steps; 0 lets the studio choose.",
            "max_value": "That is more steps than a run has. 0 lets the studio choose.",
        },
    )

    def __init__(self, *args: Any, task: TrainingTask, chosen: str = "", **kwargs: Any) -> None:
        self.task = task
        kwargs.setdefault(
            "initial",
            {
                "dataset": chosen or task.dataset_id,
                "evaluation": task.evaluation,
                "validation_percent": recipes.number(round(task.validation_share * 100, 3)),
                "validation_dataset": task.validation_dataset_id,
                "eval_steps": task.eval_steps,
            },
        )
        super().__init__(*args, **kwargs)
        own = Dataset.objects.for_user(task.owner)
        for name in ("dataset", "validation_dataset"):
            field = self.fields[name]
            assert isinstance(field, forms.ModelChoiceField)  # noqa: S101
            field.queryset = own
            field.widget.attrs["form"] = "step-form"  # the page has the upload between the halves of the form

    def clean(self) -> dict[str, Any]:
        cleaned = super().clean() or {}
        kind = cleaned.get("evaluation")
        if kind in (Evaluation.FILE, Evaluation.NONE):
            self.errors.pop("validation_percent", None)  # what is not used need not be right
        if kind == Evaluation.SPLIT and "validation_percent" in cleaned and not cleaned["validation_percent"]:
            self.add_error("validation_percent", "Give the share to hold out; 10 percent is usual.")
        if kind == Evaluation.FILE and "validation_dataset" in cleaned and not cleaned["validation_dataset"]:
            self.add_error("validation_dataset", "Choose the dataset to validate on.")
        return cleaned

    def values(self) -> dict[str, Any]:
        """What is right in the form; the draft's own value where the form is wrong."""
        cleaned, task = self.cleaned_data, self.task
        percent = cleaned.get("validation_percent")
        return {
            "dataset": cleaned.get("dataset", task.dataset),
            "evaluation": cleaned.get("evaluation", task.evaluation),
            "validation_share": round(percent / 100, 6) if percent else task.validation_share,
            "validation_dataset": cleaned.get("validation_dataset", task.validation_dataset),
            "eval_steps": cleaned.get("eval_steps", task.eval_steps) or 0,
        }


class ParameterField(forms.CharField):
    """A number as people write it (5e-6), checked by the recipe so that every refusal names the usual range."""

    def __init__(self, parameter: recipes.Parameter) -> None:
        self.parameter = parameter
        super().__init__(
            label=parameter.label,
            max_length=40,
            widget=forms.TextInput(
                attrs={"inputmode": "decimal", "autocomplete": "off", "spellcheck": "false"}
            ),
            error_messages={
                "required": f"Give {parameter.label} a number; {recipes.number(parameter.default)} is the default.",
                "max_length": f"{parameter.label} must be a number; the usual range is {parameter.usual}.",
            },
        )

    def clean(self, value: Any) -> int | float:
        text = str(super().clean(value))
        try:
            number = written_number(text, whole=self.parameter.kind == "int")
        except ValueError:
            raise forms.ValidationError(recipes.problem(self.parameter, text)) from None
        if sentence := recipes.problem(self.parameter, number):
            raise forms.ValidationError(sentence)
        return int(number) if self.parameter.kind == "int" else number


class SettingsStepForm(forms.Form):
    """Names, and every parameter of the recipe."""

    model_name = forms.CharField(
        label="Custom Model Name",
        max_length=NAME_LIMIT,
        error_messages={"required": "Give the model a name.", "max_length": NAME_TOO_LONG},
    )
    name = forms.CharField(
        label="Task Display Name",
        max_length=NAME_LIMIT,
        error_messages={"required": "Give the task a name.", "max_length": NAME_TOO_LONG},
    )

    def __init__(self, *args: Any, task: TrainingTask, **kwargs: Any) -> None:
        self.task = task
        self.modules = linear_modules(task.base_model.facts) if task.base_model else ()
        self.locked = lora_of_parent(task.parent_model)  # an adapter to start from has decided these
        values = recipes.resolve(({} if recipes.problems(task.parameters) else task.parameters) | self.locked)
        initial: dict[str, Any] = {
            "model_name": task.model_name or suggested_model_name(task),
            "name": task.name or suggested_task_name(task),
        }
        for parameter in recipes.PARAMETERS:
            value = values[parameter.name]
            # No list means all layers, and that is how it is shown.
            layers = parameter.kind == "modules"
            initial[parameter.name] = list(value or self.modules) if layers else recipes.number(value)
        kwargs.setdefault("initial", initial)
        super().__init__(*args, **kwargs)
        for parameter in recipes.PARAMETERS:
            self.fields[parameter.name] = self._field(parameter)
        most = max(most_gpus(), task.num_devices)
        if most > 1:  # with one GPU there is nothing to choose
            self.fields["num_devices"] = forms.TypedChoiceField(
                coerce=int,
                initial=task.num_devices,
                choices=[(number, str(number)) for number in range(1, most + 1)],
                error_messages={
                    "required": "Choose how many GPUs the run gets.",
                    "invalid_choice": f"Choose from 1 to {most} GPUs.",
                },
            )

    def _field(self, parameter: recipes.Parameter) -> forms.Field:
        locked = parameter.name in self.locked
        if parameter.kind != "modules":
            field = ParameterField(parameter)
            field.disabled = locked
            return field
        return forms.MultipleChoiceField(
            label=parameter.label,
            required=bool(self.modules) and not locked,
            disabled=locked,
            choices=[(name, name) for name in self.modules],
            widget=forms.CheckboxSelectMultiple,
            error_messages={
                "required": "Choose at least one layer to train; all linear layers is the default.",
                "invalid_choice": "%(value)s is not a layer of this model. Choose from the list.",
            },
        )

    def values(self) -> dict[str, Any]:
        """What is right in the form; the draft's own value where the form is wrong."""
        cleaned, task = self.cleaned_data, self.task
        kept = {} if recipes.problems(task.parameters) else task.parameters
        parameters = recipes.resolve(kept) | {
            name: cleaned[name] for name in recipes.BY_NAME if name in cleaned
        }
        parameters["target_modules"] = list(parameters["target_modules"])
        if set(parameters["target_modules"]) >= set(self.modules):
            parameters["target_modules"] = []  # all of them is what an empty list means
        return {
            "name": cleaned.get("name", task.name),
            "model_name": cleaned.get("model_name", task.model_name),
            "parameters": parameters,
            "num_devices": cleaned.get("num_devices", self.task.num_devices),
        }


class FolderForm(forms.Form):
    """A folder on the server: one of the allowed roots, and a path below it."""

    root = forms.TypedChoiceField(coerce=int, label="Below", error_messages={"required": "Choose a folder."})
    relative = forms.CharField(
        label="Folder",
        max_length=500,
        error_messages={"required": "Name the folder of the model, for example my-model."},
    )

    def __init__(self, *args: Any, roots: list[Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        field = self.fields["root"]
        assert isinstance(field, forms.TypedChoiceField)  # noqa: S101
        field.choices = [(number, str(root)) for number, root in enumerate(roots)]


class HubForm(forms.Form):
    hub_id = forms.CharField(
        label="Hub id",
        max_length=200,
        error_messages={
            "required": "Give the id of a model on the Hub, for example Qwen/Qwen3-4B-Instruct-2507.",
            "max_length": "A Hub id is shorter than that. It looks like owner/model.",
        },
    )


def suggested_model_name(task: TrainingTask) -> str:
    source = (
        task.parent_model.name
        if task.parent_model
        else (task.base_model.name if task.base_model else "Model")
    )
    return f"{source.rpartition('/')[2][: NAME_LIMIT - 12]}-aligned-v1"


def suggested_task_name(task: TrainingTask) -> str:
    today = timezone.localdate()
    about = task.dataset.name.removeprefix("Example: ") if task.dataset else "Alignment"
    return f"DPO {about[: NAME_LIMIT - 20]} {today:%d %b}"
