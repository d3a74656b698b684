"""The strict getters: a value is understood, or the start is refused with a sentence that says what is allowed."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from django.core.exceptions import ImproperlyConfigured
from hypothesis import given
from hypothesis import strategies as st

from studio import env


@pytest.fixture(autouse=True)
def own_list_of_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "_known", set())


@pytest.mark.parametrize(
    ("raw", "value"), [("1", True), ("Yes", True), (" on ", True), ("0", False), ("FALSE", False)]
)
def test_yes_and_no_have_several_spellings(monkeypatch: pytest.MonkeyPatch, raw: str, value: bool) -> None:
    monkeypatch.setenv("X_FLAG", raw)
    assert env.env_bool("X_FLAG", not value) is value


@pytest.mark.parametrize("raw", ["", "2", "ja", "None"])
def test_anything_else_is_no_yes_and_no_no(monkeypatch: pytest.MonkeyPatch, raw: str) -> None:
    monkeypatch.setenv("X_FLAG", raw)
    with pytest.raises(ImproperlyConfigured, match=r"X_FLAG=.* is not a yes or a no"):
        env.env_bool("X_FLAG", True)


def test_numbers_keep_to_their_range(monkeypatch: pytest.MonkeyPatch) -> None:
    assert env.env_int("X_NUMBER", 7, low=1, high=9) == 7
    monkeypatch.setenv("X_NUMBER", "9")
    assert env.env_int("X_NUMBER", 7, low=1, high=9) == 9
    monkeypatch.setenv("X_NUMBER", "10")
    with pytest.raises(ImproperlyConfigured, match="from 1 to 9"):
        env.env_int("X_NUMBER", 7, low=1, high=9)


@given(st.text(alphabet=st.characters(blacklist_characters="\0", blacklist_categories=["Cs"])))
def test_no_text_gets_past_a_number_that_is_none(raw: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("X_NUMBER", raw)
        try:
            assert 1 <= env.env_int("X_NUMBER", 7, low=1, high=9) <= 9
        except ImproperlyConfigured as error:
            assert "X_NUMBER" in str(error)


def test_a_list_forgets_blanks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("X_LIST", " a, ,b,")
    assert env.env_list("X_LIST", "z") == ["a", "b"]


def test_a_choice_is_one_of_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("X_CHOICE", "info")
    assert env.env_choice("X_CHOICE", "WARNING", ("INFO", "WARNING")) == "INFO"
    monkeypatch.setenv("X_CHOICE", "loud")
    with pytest.raises(ImproperlyConfigured, match="is not one of INFO, WARNING"):
        env.env_choice("X_CHOICE", "WARNING", ("INFO", "WARNING"))


def test_a_file_is_no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("X_FOLDER", str(tmp_path / "file"))
    with pytest.raises(ImproperlyConfigured, match="is a file, not a folder"):
        env.env_path("X_FOLDER", tmp_path)


def test_a_folder_is_made_when_it_is_to_be_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("X_FOLDER", str(tmp_path / "a/b"))
    assert not env.env_path("X_FOLDER", tmp_path).exists()
    assert env.env_path("X_FOLDER", tmp_path, make=True).is_dir()


def test_a_folder_that_is_made_is_nobody_elses_and_one_that_was_there_keeps_its_rights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The database below it holds sessions and password hashes: other people on the machine must not read it."""
    monkeypatch.setenv("X_FOLDER", str(tmp_path / "deep" / "new"))
    assert stat.S_IMODE(env.env_path("X_FOLDER", tmp_path, make=True).stat().st_mode) == 0o700
    (tmp_path / "shared").mkdir(mode=0o755)
    monkeypatch.setenv("X_FOLDER", str(tmp_path / "shared"))
    assert stat.S_IMODE(env.env_path("X_FOLDER", tmp_path, make=True).stat().st_mode) == 0o755


def test_a_secret_may_lie_in_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("hush\n")
    monkeypatch.setenv("X_SECRET_FILE", str(tmp_path / "secret"))
    assert env.env_secret("X_SECRET") == "hush"
    monkeypatch.setenv("X_SECRET_FILE", str(tmp_path / "gone"))
    with pytest.raises(ImproperlyConfigured, match="cannot be read"):
        env.env_secret("X_SECRET")


def test_a_variable_nobody_reads_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("X_KNOWN", "1")
    monkeypatch.setenv("X_KNWON", "1")
    env.env_bool("X_KNOWN", False)
    with pytest.raises(ImproperlyConfigured, match="Unknown setting X_KNWON") as problem:
        env.reject_unknown("X_")
    assert "X_KNOWN" in str(problem.value)


def test_a_file_of_settings_yields_to_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / ".env"
    file.write_text("# a comment\n\nX_ONE=from file\nX_TWO = 'quoted # whole'\nX_THREE=a#b  # a remark\n")
    monkeypatch.setenv("X_ONE", "from environment")
    for name in ("X_TWO", "X_THREE"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    env.env_file("X_ENV_FILE", file)
    assert [env.env_str(name, "?") for name in ("X_ONE", "X_TWO", "X_THREE")] == [
        "from environment",
        "quoted # whole",
        "a#b",
    ]


def test_a_bad_line_in_that_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("X_ONE=1\nnonsense\n")
    with pytest.raises(ImproperlyConfigured, match=r"line 2: 'nonsense' is not of the form NAME=value"):
        env.env_file("X_ENV_FILE", file)


def test_a_missing_default_file_is_fine_and_a_missing_named_one_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    env.env_file("X_ENV_FILE", tmp_path / "none.env")
    monkeypatch.setenv("X_ENV_FILE", str(tmp_path / "none.env"))
    with pytest.raises(ImproperlyConfigured, match="cannot be read"):
        env.env_file("X_ENV_FILE", tmp_path / "other")
