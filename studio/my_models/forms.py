"""The two small forms of My Models: a search, and a new name."""

from __future__ import annotations

from typing import Any

from django import forms
from django.db.models import Q, QuerySet

from training.models import TrainedModel

NAME_LENGTH = 120


class SearchForm(forms.Form):
    q = forms.CharField(
        label="Search models",
        required=False,
        max_length=200,
        widget=forms.SearchInput(attrs={"placeholder": "Name, base model or dataset"}),
        error_messages={"max_length": "Search for at most 200 characters."},
    )

    def apply(self, models: QuerySet[TrainedModel]) -> QuerySet[TrainedModel]:
        """Every word must be somewhere in the name, the base model's or the dataset's."""
        for word in str(self.cleaned_data.get("q", "")).split()[:10]:
            models = models.filter(
                Q(name__icontains=word) | Q(base_model_name__icontains=word) | Q(dataset_name__icontains=word)
            )
        return models


class RenameForm(forms.Form):
    name = forms.CharField(
        max_length=NAME_LENGTH,
        widget=forms.TextInput(attrs={"autocomplete": "off"}),
        error_messages={
            "required": "A model needs a name.",
            "max_length": f"A name has at most {NAME_LENGTH} characters. Choose a shorter one.",
        },
    )

    def clean_name(self) -> str:
        name = " ".join(str(self.cleaned_data["name"]).split())
        if not name.isprintable():
            raise forms.ValidationError("The name has characters that cannot be shown. Type it by hand.")
        return name

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.errors:
            self.fields["name"].widget.attrs |= {"aria-invalid": "true", "aria-describedby": "name-errors"}
