"""The filter of the task list."""

from __future__ import annotations

from django import forms
from django.db.models import QuerySet

from training.models import TrainingTask

Status = TrainingTask.Status
GROUPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "active": ("Queued and running", (Status.QUEUED, Status.RUNNING, Status.CANCELLING)),
    "done": ("Finished, with a model", (Status.SUCCEEDED, Status.STOPPED)),
    "failed": ("Failed", (Status.FAILED,)),
    "cancelled": ("Cancelled", (Status.CANCELLED,)),
    "draft": ("Drafts", (Status.DRAFT,)),
}


class TaskFilterForm(forms.Form):
    q = forms.CharField(
        label="Search by name",
        required=False,
        max_length=120,
        widget=forms.TextInput(attrs={"type": "search", "placeholder": "Task, model or dataset name"}),
    )
    status = forms.ChoiceField(
        required=False,
        choices=[("", "All tasks"), *((key, label) for key, (label, _) in GROUPS.items())],
        error_messages={"invalid_choice": "There is no such group of tasks. Choose one from the list."},
    )

    def apply(self, tasks: QuerySet[TrainingTask]) -> QuerySet[TrainingTask]:
        """Narrow by the fields that are valid; a wrong one narrows nothing."""
        words = self.cleaned_data.get("q", "")
        if words:
            found = [
                tasks.filter(**{f"{field}__icontains": words})
                for field in ("name", "model_name", "dataset__name", "base_model__name")
            ]
            tasks = found[0] | found[1] | found[2] | found[3]
        group = self.cleaned_data.get("status", "")
        return tasks.filter(status__in=GROUPS[group][1]) if group else tasks
