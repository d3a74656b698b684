"""One form per act: sign in, make an account. Rules for names and passwords are Django's own."""

from __future__ import annotations

from typing import Any

from django import forms
from django.contrib.auth.forms import AuthenticationForm, PasswordChangeForm, UserCreationForm


def _dress(form: forms.BaseForm) -> None:
    """Tie each field to its help and its errors for screen readers."""
    for name, field in form.fields.items():
        described_by = [f"help_{name}"] if field.help_text else []
        if form.is_bound and name in form.errors:
            field.widget.attrs["aria-invalid"] = "true"
            described_by.append(f"errors_{name}")
        if described_by:
            field.widget.attrs["aria-describedby"] = " ".join(described_by)
    wrong = [name for name in form.fields if form.is_bound and name in form.errors]
    if wrong:  # the cursor goes to the first thing to mend
        for field in form.fields.values():
            field.widget.attrs.pop("autofocus", None)
        form.fields[wrong[0]].widget.attrs["autofocus"] = True


class SignInForm(AuthenticationForm):
    error_messages = {
        "invalid_login": "This name and password do not belong together. Upper and lower case count in both.",
        "inactive": "This name and password do not belong together. Upper and lower case count in both.",
    }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fields["username"].label = "Name"
        _dress(self)


class AccountForm(UserCreationForm):  # type: ignore[type-arg]
    is_admin = forms.BooleanField(
        label="May add and disable people", required=False, help_text="Sees the People page."
    )

    def __init__(self, *args: Any, first: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fields["username"].label = "Name"
        self.fields["username"].help_text = "Letters, digits and @ . + - _; up to 150 characters."
        self.fields["password1"].help_text = "At least 10 characters, and not a common password."
        self.fields["password2"].label = "Password again"
        self.fields["password2"].help_text = ""
        if first:
            del self.fields["is_admin"]  # the first account always may
        else:
            self.fields["username"].widget.attrs.pop("autofocus", None)  # the list above comes first
        _dress(self)


class PasswordForm(PasswordChangeForm):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fields["old_password"].label = "Password now"
        self.fields["old_password"].widget.attrs.pop("autofocus", None)
        self.fields["new_password1"].help_text = "At least 10 characters, and not a common password."
        self.fields["new_password2"].label = "New password again"
        self.fields["new_password2"].help_text = ""
        _dress(self)
