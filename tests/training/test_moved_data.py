"""The data folder is all there is to back up: restored elsewhere, everything in it is found again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.training.model_folders import make_model_folder
from training.models import BaseModel
from training.services.base_models import catalogue_ensure, download_folder

pytestmark = pytest.mark.django_db


@pytest.mark.parametrize("source", [BaseModel.Source.HUB, BaseModel.Source.CATALOGUE])
def test_a_downloaded_model_is_found_below_the_new_folder(source: str, data_dir: Path, alice: Any) -> None:
    catalogue_ensure()
    if source == BaseModel.Source.HUB:
        row = BaseModel.objects.create(owner=alice, source=source, name="team/tiny")
    else:
        row = BaseModel.objects.get(name="Qwen/Qwen3-0.6B")
    folder = make_model_folder(download_folder(row.pk))
    BaseModel.objects.filter(pk=row.pk).update(status="ready", path=f"/old/disk/base_models/{row.pk}")
    catalogue_ensure()
    row.refresh_from_db()
    assert (row.status, row.path) == ("ready", str(folder))


def test_a_folder_of_the_server_stays_where_it_is(data_dir: Path, alice: Any) -> None:
    row = BaseModel.objects.create(
        owner=alice, source="folder", name="mine", path="/srv/mine", status="ready"
    )
    make_model_folder(download_folder(row.pk))
    catalogue_ensure()
    row.refresh_from_db()
    assert row.path == "/srv/mine"
