"""The catalogue's numbers, and folders read with suspicion."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.training.model_folders import LLAMA_CONFIG, make_model_folder, write_safetensors
from training import base_models
from training.base_models import CATALOGUE, KINDS
from training.model_folder import FolderProblem, read_folder, read_header


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_model_folder(tmp_path / "models" / "tiny")


def problem_of(folder: Path) -> str:
    with pytest.raises(FolderProblem) as caught:
        read_folder(folder, roots=[folder.parent])
    sentence = str(caught.value)
    assert sentence.endswith("."), sentence
    return sentence


# --- the catalogue ------------------------------------------------------------------------------------
def counted(model: base_models.CatalogueModel, *, tied: bool, qk_norm: bool, bias: bool) -> int:
    """Parameters of a Llama-like model, from its shape."""
    h, i, v = model.hidden_size, model.intermediate_size, model.vocab_size
    a, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    experts = model.num_experts or 1
    layer = 2 * h + h * a * 2 + h * kv * 2 + experts * 3 * h * i
    layer += 2 * model.head_dim * qk_norm + (a + 2 * kv) * bias + (h * model.num_experts)
    return v * h * (1 if tied else 2) + model.num_layers * layer + h


@pytest.mark.parametrize(
    ("hub_id", "tied", "qk_norm", "bias"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", True, False, False),
        ("HuggingFaceTB/SmolLM2-1.7B-Instruct", True, False, False),
        ("Qwen/Qwen2.5-0.5B-Instruct", True, False, True),
        ("Qwen/Qwen2.5-7B-Instruct", False, False, True),
        ("Qwen/Qwen3-4B-Instruct-2507", True, True, False),
        ("Qwen/Qwen3-8B", False, True, False),
        ("Qwen/Qwen3-30B-A3B", False, True, False),
        ("meta-llama/Llama-3.2-3B-Instruct", True, False, False),
        ("mistralai/Mistral-7B-Instruct-v0.3", False, False, False),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", False, False, True),
    ],
)
def test_parameters_of_the_catalogue_follow_from_the_shapes(
    hub_id: str, tied: bool, qk_norm: bool, bias: bool
) -> None:
    model = base_models.catalogue_model(hub_id)
    assert model is not None
    assert counted(model, tied=tied, qk_norm=qk_norm, bias=bias) == model.num_parameters


def test_the_catalogue_has_the_four_kinds_and_the_models_people_ask_for() -> None:
    by_kind = base_models.kinds_of(CATALOGUE)
    assert list(by_kind) == ["instruct", "thinking", "base", "moe"] == list(KINDS)
    for kind, hub_id in (
        ("instruct", "Qwen/Qwen3-4B-Instruct-2507"),
        ("thinking", "Qwen/Qwen3-4B-Thinking-2507"),
        ("base", "Qwen/Qwen3-4B"),
        ("moe", "Qwen/Qwen3-30B-A3B"),
        ("instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    ):
        assert hub_id in [model.hub_id for model in by_kind[kind]]


def test_every_catalogue_name_is_a_hub_id_and_unique() -> None:
    names = [model.hub_id for model in CATALOGUE]
    assert len(set(names)) == len(names)
    assert [base_models.hub_id_problem(name) for name in names] == [""] * len(names)
    assert all(base_models.shape_of(model.facts()) for model in CATALOGUE)


@pytest.mark.parametrize(
    "hub_id",
    [
        "../../etc", "a/b/c", "file:///etc/passwd", "C:\\x", "--flag", "a" * 200, "owner/" + "b" * 200,
        "owner/..",
        "owner/a..b", "/a/b", "owner/", "nofolder", "o/m@main", "o/m\n", "о/модель", "", " o/m", "-o/m",
        "o/.m",
    ],
)  # fmt: skip
def test_what_is_no_hub_id_is_refused(hub_id: str) -> None:
    assert "owner/model" in base_models.hub_id_problem(hub_id)


# --- folders ------------------------------------------------------------------------------------------
def test_a_good_folder_tells_its_facts(folder: Path) -> None:
    facts = read_folder(folder, roots=[folder.parent])
    assert facts["architecture"] == "LlamaForCausalLM"
    assert facts["linear_modules"] == [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ]
    assert facts["context_length"] == 4096 and facts["has_chat_template"] is True
    assert (
        facts["num_parameters"]
        == facts["active_parameters"]
        == 32 * 64 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    )
    assert facts["lora_units"]["q_proj"] == 2 * (32 + 32) and facts["lora_units"]["k_proj"] == 2 * (32 + 16)
    assert base_models.shape_of(facts) is not None
    assert base_models.linear_modules(facts)[0] == "q_proj"


def test_a_folder_as_transformers_saves_it_is_read(tmp_path: Path) -> None:
    """Through the real library, so that the fixture above cannot drift from what people have."""
    from tests.tiny import build_tiny_model

    real = build_tiny_model(tmp_path / "real")
    facts = read_folder(real, roots=[tmp_path])
    assert facts["has_chat_template"]
    assert facts["linear_modules"] == [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ]


def test_experts_and_their_router_carry_no_adapter(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "moe", num_experts=4)
    facts = read_folder(folder, roots=[tmp_path])
    assert facts["linear_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert facts["active_parameters"] < facts["num_parameters"]


def test_links_inside_the_roots_are_followed_and_links_out_of_them_refused(
    folder: Path, tmp_path: Path
) -> None:
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    (folder / "model.safetensors").rename(blobs / "abc")
    (folder / "model.safetensors").symlink_to(blobs / "abc")
    assert read_folder(folder, roots=[folder.parent])["num_layers"] == 2

    outside = tmp_path / "outside.safetensors"
    (blobs / "abc").rename(outside)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(outside)
    assert "outside the folders that are allowed" in problem_of(folder)


def test_a_folder_outside_the_roots_is_refused(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(FolderProblem, match="STUDIO_MODEL_ROOTS"):
        read_folder(folder, roots=[other])
    with pytest.raises(FolderProblem, match="STUDIO_MODEL_ROOTS"):
        read_folder(other / ".." / "models" / "tiny", roots=[other])
    link = other / "link"
    link.symlink_to(folder)
    with pytest.raises(FolderProblem, match="STUDIO_MODEL_ROOTS"):
        read_folder(link, roots=[other])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"auto_map": {"AutoModel": "evil.Model"}}, "names code to be run"),
        ({"model_file": "evil.py"}, "names code to be run"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized"),
        ({"architectures": ["CLIPModel"]}, "ForCausalLM"),
        ({"architectures": []}, "ForCausalLM"),
        ({"architectures": None}, "ForCausalLM"),
        ({"architectures": [{"a": 1}]}, "ForCausalLM"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000"),
        ({"hidden_size": -4}, "hidden_size = -4"),
        ({"hidden_size": "64"}, "hidden_size = 64"),
        ({"vocab_size": None}, "vocab_size"),
    ],
)
def test_a_config_that_cannot_be_or_needs_code_is_refused(
    folder: Path, change: dict[str, Any], words: str
) -> None:
    (folder / "config.json").write_text(json.dumps({**LLAMA_CONFIG, **change}))
    assert words in problem_of(folder)


@pytest.mark.parametrize(
    ("name", "words"),
    [("modeling_x.py", "holds code"), ("evil.so", "holds code")],
)
def test_a_folder_with_code_is_refused(folder: Path, name: str, words: str) -> None:
    (folder / name).write_text("import os")
    assert words in problem_of(folder)


def test_each_missing_part_is_named(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert "tokenizer is missing" in problem_of(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pickle" in problem_of(folder)
    (folder / "pytorch_model.bin").rename(folder / "model-Q4.gguf")
    assert "GGUF" in problem_of(folder)
    (folder / "model-Q4.gguf").rename(folder / "adapter_model.safetensors")
    assert "adapter" in problem_of(folder)
    (folder / "adapter_model.safetensors").unlink()
    assert "no *.safetensors" in problem_of(folder)
    (folder / "config.json").unlink()
    assert "config.json is missing" in problem_of(folder)
    with pytest.raises(FolderProblem, match="no such folder"):
        read_folder(folder / "nothing", roots=[folder.parent])


def test_large_or_broken_json_is_refused_without_reading_it_all(folder: Path) -> None:
    (folder / "config.json").write_bytes(b" " * (1024 * 1024 + 1))
    assert "larger than 1024 kB" in problem_of(folder)
    (folder / "config.json").write_bytes(b"[" * 100_000)
    assert "not valid JSON" in problem_of(folder)
    (folder / "config.json").write_bytes(b"\xff\xfe{")
    assert "not valid JSON" in problem_of(folder)
    (folder / "config.json").write_bytes(b"[]")
    assert "JSON object" in problem_of(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\x00" * 7, struct.pack("<Q", 10 * 1024**3) + b"{}", struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 4) + b"nope",
    ],
)  # fmt: skip
def test_a_header_that_cannot_be_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(FolderProblem):
        read_header(path)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
         "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}},
        {"a": {"dtype": "PICKLE", "shape": [2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": "x"}},
        {"a": 3},
    ],
)  # fmt: skip
def test_tensors_that_overlap_or_lie_are_refused(tmp_path: Path, header: dict[str, Any]) -> None:
    path = tmp_path / "m.safetensors"
    write_safetensors(path, header, b"\x00" * 16)
    with pytest.raises(FolderProblem):
        read_header(path)


@given(st.binary(max_size=200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_any_bytes_as_weights_give_facts_or_a_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", len(content)) + content)
    try:
        read_header(path)
    except FolderProblem as problem:
        assert str(problem)
