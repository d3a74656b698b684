"""What a person may ask in Try it, with its limits said in sentences."""

from __future__ import annotations

from typing import Any

from django import forms

from studio.serving.conversation import ConversationError, Turn, read_turns

PROMPT_CHARACTERS = 20_000
SYSTEM_CHARACTERS = 8_000
MAX_NEW_TOKENS = 2048
SEEDS = 2**31 - 1


def _between(low: float, high: float, what: str) -> dict[str, str]:
    sentence = f"{what} must be a number from {low:g} to {high:g}."
    return {"invalid": sentence, "required": sentence, "min_value": sentence, "max_value": sentence}


class TryForm(forms.Form):
    """`has_parent`: the left side may also be the model this one was trained from."""

    prompt = forms.CharField(
        max_length=PROMPT_CHARACTERS,
        strip=False,
        widget=forms.Textarea(attrs={"rows": 3, "placeholder": "Ask both models the same thing…"}),
        error_messages={
            "required": "Write a prompt first.",
            "max_length": f"The prompt has more than {PROMPT_CHARACTERS:,} characters. Shorten it.",
        },
    )
    system = forms.CharField(
        label="System prompt",
        required=False,
        max_length=SYSTEM_CHARACTERS,
        widget=forms.Textarea(attrs={"rows": 2}),
        help_text="Said to both before the conversation. Empty: the model's own default, if it has one.",
        error_messages={
            "max_length": f"The system prompt has more than {SYSTEM_CHARACTERS:,} characters. Shorten it."
        },
    )
    against = forms.ChoiceField(label="Compare with", required=False)
    temperature = forms.FloatField(
        min_value=0,
        max_value=2,
        initial=0.7,
        help_text="0 always takes the likeliest token; higher is more varied.",
        error_messages=_between(0, 2, "Temperature"),
    )
    top_p = forms.FloatField(
        label="Top-p",
        min_value=0.01,
        max_value=1,
        initial=0.95,
        help_text="Draws only from the likeliest tokens that together reach this share. 1 = from all.",
        error_messages=_between(0.01, 1, "Top-p"),
    )
    max_new_tokens = forms.IntegerField(
        label="Max tokens",
        min_value=1,
        max_value=MAX_NEW_TOKENS,
        initial=200,
        help_text="An answer is cut after so many tokens.",
        error_messages=_between(1, MAX_NEW_TOKENS, "Max tokens"),
    )
    seed = forms.IntegerField(
        min_value=0,
        max_value=SEEDS,
        initial=42,
        help_text="The same seed and settings give the same answers.",
        error_messages=_between(0, SEEDS, "Seed"),
    )
    history = forms.CharField(required=False, strip=False, widget=forms.HiddenInput)

    def __init__(self, *args: Any, has_parent: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.turns: list[Turn] = []
        choices = [("base", "The bare base")]
        if has_parent:
            choices.append(("parent", "The model it was trained from"))
        against = self.fields["against"]
        assert isinstance(against, forms.ChoiceField)  # noqa: S101 - declared above
        against.choices = choices
        against.error_messages["invalid_choice"] = (
            "Compare with the base, or with the model this one was trained from."
        )
        for name in ("temperature", "top_p"):
            self.fields[name].widget.attrs["step"] = "any"

    def clean_prompt(self) -> str:
        prompt: str = self.cleaned_data["prompt"]
        if not prompt.strip():
            raise forms.ValidationError("Write a prompt first.")
        return prompt

    def clean_against(self) -> str:
        return self.cleaned_data["against"] or "base"

    def clean(self) -> dict[str, Any]:
        data: dict[str, Any] = super().clean() or self.cleaned_data
        try:
            self.turns = read_turns(data.get("history", ""), against=data.get("against", "base"))
        except ConversationError as error:
            self.add_error(None, str(error))
        return data
