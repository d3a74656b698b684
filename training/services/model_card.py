"""The model card of a trained model, in the Hub's README format. Names are escaped in its Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator

from huggingface_hub import ModelCardData

from training.improvement import changes, kept_sentence, measured_after, stopped_sentence
from training.models import TrainedModel
from training.recipes import PARAMETERS, show

MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~!])")


def model_card(model: TrainedModel) -> str:
    sections = [
        f"---\n{_front_matter(model)}\n---",
        f"# {plain(model.name)}",
        _about(model),
        "## Training\n\n" + "\n".join(_settings_table(model)),
        "## Results\n\n" + "\n".join(_results(model)),
        "## Data\n\n" + "\n".join(_data(model)),
        "## How to use it\n\n" + _usage(model),
        "## Made with\n\n" + "\n".join(_versions(model)),
    ]
    return "\n\n".join(sections) + "\n"


def plain(text: str) -> str:
    """One line of Markdown that shows as exactly this text."""
    return MARKDOWN.sub(r"\\\1", one_line(text))


def one_line(text: str) -> str:
    """Line breaks of any kind become spaces: a line `---` in a name would end the front matter."""
    return " ".join(text.split())


def _front_matter(model: TrainedModel) -> str:
    licence = str(model.base_model.facts.get("licence") or "") if model.base_model else ""
    data = ModelCardData(
        base_model=one_line(model.base_model_name),
        library_name="peft",
        license=licence.lower() or None,
        pipeline_tag="text-generation",
        tags=["dpo", "lora", "preference", "preference-tuning", "text-generation"],
        datasets=[one_line(model.dataset_name)] if model.dataset_name else None,
    )
    text: str = data.to_yaml()
    return text.strip()


def _about(model: TrainedModel) -> str:
    start = _start(model)
    return (
        f"A LoRA adapter for **{plain(model.base_model_name)}**, tuned on pairs of preferred and rejected "
        "answers with Direct Preference Optimization (DPO).\n"
        f"Training started from {start}, which is also the reference that DPO compares with."
    )


def _start(model: TrainedModel) -> str:
    parent = model.parent.name if model.parent else model.parent_name
    if parent:
        return f"**{plain(parent)}** (an adapter on {plain(model.base_model_name)}, not the bare base)"
    return f"{plain(model.base_model_name)} itself"


def _settings_table(model: TrainedModel) -> Iterator[str]:
    yield "| Setting | Value |"
    yield "| --- | --- |"
    yield "| Method | DPO (sigmoid loss) with LoRA |"
    for parameter in PARAMETERS:
        if parameter.name in model.parameters:
            yield f"| `{parameter.name}` | {plain(show(parameter, model.parameters[parameter.name]))} |"
    result = model.result
    if result.get("step"):
        yield f"| Steps | {result['step']} of {result.get('total_steps', result['step'])} |"
    if result.get("num_tokens"):
        yield f"| Tokens processed | {result['num_tokens']:,} |"
    if result.get("num_trainable_parameters"):
        yield f"| Trained parameters | {result['num_trainable_parameters']:,} |"
    if result.get("seconds"):
        yield f"| Duration | {result['seconds'] / 60:.1f} minutes |"


def _results(model: TrainedModel) -> Iterator[str]:
    rows = changes(model.result)
    if not rows:
        yield "No validation data was held out, so nothing was measured on unseen pairs."
        return
    yield f"On held-out pairs, before the first step and {measured_after(model.result)}:"
    yield ""
    yield "| Metric | Before | After |"
    yield "| --- | ---: | ---: |"
    for row in rows:
        yield f"| {row.label} | {row.before_text} | {row.after_text} |"
    for sentence in (kept_sentence(model.result), stopped_sentence(model.result)):
        if sentence:
            yield f"\n{plain(sentence)}"


def _data(model: TrainedModel) -> Iterator[str]:
    yield f"- Dataset: {plain(model.dataset_name) or 'not recorded'}"
    yield f"- SHA-256 of the file: `{model.dataset_sha256 or 'not recorded'}`"
    if model.result.get("data_sha256"):
        yield f"- SHA-256 of the tokenised training pairs: `{model.result['data_sha256']}`"


def _usage(model: TrainedModel) -> str:
    base = one_line(model.base_model_name).replace("\\", "").replace('"', "")
    return f"""```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "path/to/this/folder")

messages = [{{"role": "user", "content": "Hello"}}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
answer = model.generate(**inputs, max_new_tokens=200)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```"""


def _versions(model: TrainedModel) -> Iterator[str]:
    yield "- Preference Studio"
    for name, version in sorted((model.result.get("versions") or {}).items()):
        yield f"- {plain(str(name))} {plain(str(version))}"
    if model.result.get("adapter_sha256"):
        yield f"- SHA-256 of `adapter_model.safetensors`: `{model.result['adapter_sha256']}`"
