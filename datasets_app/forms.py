"""What a person types or chooses about a dataset."""

from __future__ import annotations

from typing import Any

from django import forms
from django.conf import settings
from django.core.files.uploadedfile import UploadedFile

from datasets_app.formats.encodings import HEAD_BYTES, FileRefused, refuse_if_not_text
from datasets_app.uploads import readable_size

NAME_TOO_LONG = "Use at most %(limit_value)d characters; these are %(show_value)d."


class NameForm(forms.Form):
    name = forms.CharField(
        label="Name",
        max_length=200,
        error_messages={
            "required": "Write a name, so that you find the dataset again.",
            "max_length": NAME_TOO_LONG,
        },
    )


class UploadForm(forms.Form):
    """`next` is checked by the view, not here."""

    file = forms.FileField(
        label="Dataset file",
        error_messages={
            "required": "Choose a file first. A folder cannot be uploaded; choose the .jsonl file inside it.",
            "missing": "Choose a file first. A folder cannot be uploaded; choose the .jsonl file inside it.",
            "invalid": "The file did not arrive. Choose it again.",
            "empty": "The file is empty. Choose a file with one preference pair on each line.",
        },
    )
    name = forms.CharField(
        label="Name",
        required=False,
        max_length=200,
        help_text="Optional; the file's name otherwise.",
        error_messages={"max_length": NAME_TOO_LONG},
    )
    next = forms.CharField(required=False, widget=forms.HiddenInput)

    @property
    def max_bytes(self) -> int:
        return int(settings.UPLOAD_MAX_BYTES)

    @property
    def limit(self) -> str:
        return readable_size(settings.UPLOAD_MAX_BYTES)

    def clean_file(self) -> UploadedFile:
        """What is no text at all is refused at once; everything else is for the validation to judge."""
        file: Any = self.cleaned_data["file"]
        head = file.read(HEAD_BYTES)
        file.seek(0)
        try:
            refuse_if_not_text(head)
        except FileRefused as error:
            raise forms.ValidationError(f"{error.found} {error.next_step}", code=error.code) from None
        assert isinstance(file, UploadedFile)  # noqa: S101
        return file
