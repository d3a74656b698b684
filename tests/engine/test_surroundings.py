"""What libraries say on the error stream of a command: nothing that its reader can do nothing about."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from tests.engine.conftest import NewRun
from training.engine.chat import Models
from training.engine.finished import find_kept, greeting, load_config, load_kept
from training.engine.placement import Placement
from training.engine.policy import load_tokenizer
from training.engine.surroundings import without_peft_s_old_name


def test_no_command_is_told_of_peft_s_old_name_for_checkpointing(new_run: NewRun, tiny_model: Path) -> None:
    run = new_run(max_steps=1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert run.train() == 0  # a new adapter
        continued = new_run("continued", max_steps=1, adapter_path=str(run.path / "adapter"))
        assert continued.train() == 0
        config = load_config(run.path)  # as evaluate, merge and generate do
        hello = [greeting(load_tokenizer(config))]
        load_kept(config, find_kept(run.path, ""), Placement.choose(config), hello)
        Models(str(tiny_model)).attach({"tuned": str(run.path / "adapter")})
    assert not [str(one.message) for one in said if "is_gradient_checkpointing" in str(one.message)]


def test_every_other_warning_is_still_heard() -> None:
    with pytest.warns(FutureWarning, match="`is_something_else` is deprecated"), without_peft_s_old_name():
        warnings.warn("`is_something_else` is deprecated", FutureWarning, stacklevel=1)
    with pytest.warns(UserWarning), without_peft_s_old_name():
        warnings.warn("`is_gradient_checkpointing` is deprecated", UserWarning, stacklevel=1)
