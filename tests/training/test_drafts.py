"""Drafts: what is saved, what stands in the way, what a submission does, and what a stranger's row cannot do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from datasets_app.models import Dataset
from training import recipes
from training.base_models import STARTER
from training.models import BaseModel, TaskEvent, TrainedModel, TrainingTask
from training.services import draft_checks as checks
from training.services import drafts, queue

pytestmark = pytest.mark.django_db
Status = TrainingTask.Status


@pytest.fixture
def base(db: None) -> BaseModel:
    return BaseModel.objects.create(
        source="starter", name=STARTER.hub_id, kind="instruct", status="ready", facts=STARTER.facts()
    )


def make_dataset(owner: Any, *, pairs: int = 200, prompts: int | None = None, **fields: Any) -> Dataset:
    row = Dataset.objects.create(
        owner=owner, name="Pairs", original_name="p.jsonl", num_pairs=pairs, **{"status": "ready", **fields}
    )
    row.pairs_sha256 = str(row.pk)
    row.save()
    row.folder.mkdir(parents=True)
    with row.pairs_path.open("w") as file:
        for number in range(pairs):
            prompt = [{"role": "user", "content": f"Question {number % (prompts or pairs)}"}]
            pair = {"id": str(number), "prompt": prompt, "chosen": [], "rejected": []}
            file.write(json.dumps(pair) + "\n")
    return row


@pytest.fixture
def draft(alice: Any, base: BaseModel, data_dir: Path) -> TrainingTask:
    """Ready to be submitted."""
    task = drafts.draft_create(alice, dataset=make_dataset(alice))
    drafts.draft_save_model(task, base_model=base, parent_model=None)
    drafts.draft_save_settings(task, name="Task", model_name="Model", parameters={"beta": 0.2})
    return task


def reload(task: TrainingTask) -> TrainingTask:
    return TrainingTask.objects.get(pk=task.pk)


def texts(task: TrainingTask, step: str = "") -> str:
    return " ".join(p.text for p in checks.draft_problems(task) if step in ("", p.step))


def parent_of(owner: Any, base: BaseModel | None, **parameters: Any) -> TrainedModel:
    return TrainedModel.objects.create(
        owner=owner, name="Polite v1", base_model=base, base_model_name="base", parameters=parameters
    )


# --- saving -------------------------------------------------------------------------------------------------
def test_an_empty_draft_lacks_each_step_in_order(alice: Any) -> None:
    task = drafts.draft_create(alice)
    assert [problem.step for problem in checks.draft_problems(task)] == [
        "model",
        "data",
        "settings",
        "settings",
    ]
    assert checks.furthest_step(checks.draft_problems(task)) == "model"


def test_a_draft_survives_in_the_database_and_only_differences_are_kept(draft: TrainingTask) -> None:
    again = reload(draft)
    assert again.parameters == {"beta": 0.2}
    assert (again.name, again.model_name, again.status) == ("Task", "Model", "draft")
    everything = dict(recipes.resolve({})) | {"target_modules": []}
    drafts.draft_save_settings(again, name="Task", model_name="Model", parameters=everything)
    assert reload(draft).parameters == {}


def test_a_saved_list_of_layers_is_dropped_when_the_next_model_has_none_of_them(draft: TrainingTask) -> None:
    parameters = {"target_modules": ["q_proj"], "beta": 0.2}
    drafts.draft_save_settings(draft, name="T", model_name="M", parameters=parameters)
    same = BaseModel.objects.create(source="hub", name="a/b", status="ready", facts=STARTER.facts())
    drafts.draft_save_model(draft, base_model=same, parent_model=None)
    assert reload(draft).parameters == parameters
    facts = STARTER.facts() | {"linear_modules": ["c_attn"], "lora_units": {"c_attn": 8}}
    other = BaseModel.objects.create(source="hub", name="a/c", status="ready", facts=facts)
    drafts.draft_save_model(draft, base_model=other, parent_model=None)
    assert reload(draft).parameters == {"beta": 0.2}


def test_a_run_from_my_models_has_the_rank_and_layers_of_that_adapter(
    draft: TrainingTask, base: BaseModel, alice: Any
) -> None:
    parent = parent_of(alice, base, lora_r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], beta=0.5)
    drafts.draft_save_model(draft, base_model=base, parent_model=parent)
    locked = {"lora_r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
    assert reload(draft).parameters == {"beta": 0.2, **locked}
    drafts.draft_save_settings(draft, name="T", model_name="M", parameters={"lora_r": 64, "beta": 0.3})
    assert reload(draft).parameters == {"beta": 0.3, **locked}
    assert checks.draft_problems(reload(draft)) == []
    drafts.draft_save_model(draft, base_model=base, parent_model=None)
    assert reload(draft).parameters == {"beta": 0.3}


def test_a_draft_made_from_a_model_starts_there(alice: Any, base: BaseModel) -> None:
    parent = parent_of(alice, base, lora_r=8)
    task = drafts.draft_create(alice, parent_model=parent)
    assert (task.base_model, task.parent_model, task.parameters) == (base, parent, {"lora_r": 8})


def test_a_task_that_was_created_is_not_changed_by_a_page_left_open(draft: TrainingTask, alice: Any) -> None:
    stale = reload(draft)
    assert drafts.task_submit(draft, by=alice) == []
    with pytest.raises(drafts.NotADraft):
        drafts.draft_save_settings(stale, name="Other", model_name="Other", parameters={})
    assert reload(draft).name == "Task"


def test_a_duplicate_has_the_same_choices_and_other_names(draft: TrainingTask) -> None:
    TrainingTask.objects.filter(pk=draft.pk).update(
        eval_steps=7, validation_share=0.2, status="failed", step=9
    )
    copy = drafts.draft_from_task(reload(draft))
    assert copy.pk != draft.pk and copy.status == "draft" and copy.step == 0
    assert (copy.name, copy.model_name) == ("Task copy", "Model copy")
    for field in ("base_model", "dataset", "parameters", "eval_steps", "validation_share", "owner"):
        assert getattr(copy, field) == getattr(reload(draft), field)
    TrainingTask.objects.filter(pk=draft.pk).update(name="x" * 120)
    assert len(drafts.draft_from_task(reload(draft)).name) <= 120


# --- problems -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("status", "words"),
    [
        ("ready", ""),
        ("queued", ""),
        ("downloading", ""),
        ("absent", "not on this machine"),
        ("failed", "broke"),
    ],
)
def test_a_model_may_still_be_coming_but_must_come(
    draft: TrainingTask, base: BaseModel, status: str, words: str
) -> None:
    BaseModel.objects.update(status=status, problem="It broke." if status == "failed" else "")
    found = texts(reload(draft), "model")
    assert (words in found) if words else found == ""


def test_a_model_without_a_chat_template_is_refused_before_the_engine_does(
    draft: TrainingTask, base: BaseModel
) -> None:
    BaseModel.objects.update(facts=STARTER.facts() | {"has_chat_template": False})
    assert "no chat template" in texts(reload(draft), "model")


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ("queued", "still being validated"),
        ("validating", "still being validated"),
        ("invalid", "cannot be used"),
    ],
)
def test_a_dataset_must_be_ready(draft: TrainingTask, status: str, words: str) -> None:
    Dataset.objects.update(status=status)
    assert words in texts(reload(draft), "data")


def test_rows_of_somebody_else_are_refused_even_when_they_are_in_the_draft(
    draft: TrainingTask, mallory: Any, alice: Any, base: BaseModel
) -> None:
    theirs = make_dataset(mallory)
    TrainingTask.objects.filter(pk=draft.pk).update(dataset=theirs)
    assert "not yours" in texts(reload(draft), "data")
    BaseModel.objects.update(owner=mallory)
    assert "not yours" in texts(reload(draft), "model")
    TrainingTask.objects.filter(pk=draft.pk).update(parent_model=parent_of(mallory, base))
    assert "My Models" in texts(reload(draft), "model")
    assert drafts.task_submit(draft, by=alice) != []
    assert reload(draft).status == "draft"


def test_the_base_of_a_parent_that_is_gone_is_named(draft: TrainingTask, alice: Any) -> None:
    TrainingTask.objects.filter(pk=draft.pk).update(parent_model=parent_of(alice, None))
    assert "“Polite v1” (base) is gone" in texts(reload(draft), "model")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"validation_share": 0.0}, "above 0"),
        ({"validation_share": -1.0}, "above 0"),
        ({"validation_share": 0.9}, "at most 50"),
        ({"evaluation": "sometimes"}, "Choose how"),
        ({"evaluation": "file"}, "Choose the dataset to validate on"),
        ({"eval_steps": 10**7}, "whole number"),
    ],
)
def test_evaluation_settings_of_the_row_are_checked_again(
    draft: TrainingTask, fields: Any, words: str
) -> None:
    TrainingTask.objects.filter(pk=draft.pk).update(**fields)
    assert words in texts(reload(draft), "data")


def test_the_training_data_cannot_validate_itself(draft: TrainingTask) -> None:
    TrainingTask.objects.filter(pk=draft.pk).update(evaluation="file", validation_dataset=draft.dataset)
    assert "is the training dataset" in texts(reload(draft), "data")


def test_pairs_that_share_one_prompt_cannot_be_split(draft: TrainingTask, alice: Any) -> None:
    TrainingTask.objects.filter(pk=draft.pk).update(dataset=make_dataset(alice, pairs=20, prompts=1))
    assert "share one prompt" in texts(reload(draft), "data")
    TrainingTask.objects.filter(pk=draft.pk).update(evaluation="none")
    assert texts(reload(draft)) == ""


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"parameters": {"learning_rate": -1}}, "learning_rate must be above 0; the usual range"),
        ({"parameters": {"owner": 2}}, "owner is not a parameter"),
        ({"parameters": {"target_modules": ["lm_head"]}}, "no layers named lm_head"),
        ({"parameters": {"target_modules": "q_proj"}}, "must be a list"),
        ({"name": " "}, "Give the task a name"),
        ({"model_name": ""}, "Give the model a name"),
    ],
)
def test_settings_of_the_row_are_checked_again(draft: TrainingTask, fields: Any, words: str) -> None:
    TrainingTask.objects.filter(pk=draft.pk).update(**fields)
    task = reload(draft)
    assert words in texts(task, "settings")
    checks.draft_warnings(task), checks.draft_estimate(task), checks.pair_counts(task)  # never raise


# --- warnings and numbers -------------------------------------------------------------------------------------
@pytest.mark.parametrize(("pairs", "warned"), [(99, True), (100, False), (100_000, False), (100_001, True)])
def test_an_unusual_number_of_pairs_is_warned_about_and_not_refused(
    draft: TrainingTask, pairs: int, warned: bool
) -> None:
    Dataset.objects.update(num_pairs=pairs)
    task = reload(draft)
    assert any("recommended" in warning.text for warning in checks.draft_warnings(task)) is warned
    assert checks.draft_problems(task) == []


def test_longer_texts_than_max_length_and_context_are_warned_about(draft: TrainingTask) -> None:
    tokens = {"prompt": 400, "chosen": 300, "rejected": 300, "total_max": 5000}
    Dataset.objects.update(stats={"tokens_estimate": tokens})
    assert "about 5,000 tokens" in " ".join(w.text for w in checks.draft_warnings(reload(draft)))
    TrainingTask.objects.filter(pk=draft.pk).update(parameters={"max_length": 9000})
    (warning,) = [w.text for w in checks.draft_warnings(reload(draft)) if "was made for" in w.text]
    assert "8,192" in warning


def test_counts_and_estimate_follow_the_split(draft: TrainingTask) -> None:
    assert checks.pair_counts(draft) == (180, 20)
    estimate = checks.draft_estimate(draft)
    assert estimate is not None and (estimate.effective_batch, estimate.total_steps) == (16, 12)
    draft.evaluation = "none"
    assert checks.pair_counts(draft) == (200, 0)
    draft.evaluation, draft.validation_dataset = "file", make_dataset(draft.owner, pairs=30)
    assert checks.pair_counts(draft) == (200, 30)


def test_a_missing_pairs_file_is_a_problem_and_not_an_error(draft: TrainingTask) -> None:
    assert draft.dataset is not None
    draft.dataset.pairs_path.unlink()
    Dataset.objects.update(pairs_sha256="elsewhere")
    assert texts(reload(draft), "data")


# --- submitting -------------------------------------------------------------------------------------------------
def test_a_submitted_draft_is_queued_once_and_the_worker_is_told(
    draft: TrainingTask, alice: Any, monkeypatch: pytest.MonkeyPatch, django_capture_on_commit_callbacks: Any
) -> None:
    rung: list[str] = []
    monkeypatch.setattr(queue, "ring", lambda task_id: rung.append(str(task_id)))
    second_tab = reload(draft)
    with django_capture_on_commit_callbacks(execute=True):
        assert drafts.task_submit(draft, by=alice) == []
        assert drafts.task_submit(second_tab, by=alice) == []
    assert rung == [str(draft.pk)]
    task = reload(draft)
    assert task.status == Status.QUEUED and task.queued_at is not None
    assert [event.text for event in TaskEvent.objects.filter(task=task)] == ["alice created the task."]


def test_a_draft_with_a_problem_is_not_queued(draft: TrainingTask, alice: Any) -> None:
    BaseModel.objects.update(status="absent")
    (problem,) = drafts.task_submit(draft, by=alice)
    assert problem.step == "model" and reload(draft).status == "draft"
    assert not TaskEvent.objects.exists()


def test_pairs_that_could_not_be_read_once_are_counted_the_next_time(draft: TrainingTask) -> None:
    assert draft.dataset is not None
    draft.validation_share = 0.2
    pairs = draft.dataset.pairs_path
    away = pairs.rename(pairs.with_name("away"))
    assert checks.pair_counts(draft) == (0, 0)
    away.rename(pairs)
    assert checks.pair_counts(draft) == (160, 40)
