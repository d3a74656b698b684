"""Kinds of adapters, the layers they go on, and what a run may start from."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.conftest import NewRun, RunFolder, run_maker
from tests.engine.interruptions import LeaveAt
from tests.engine.policies import bend, summed, tiny_config, tiny_data, tiny_policy
from tests.engine.starts import assert_starts_at_ln_2
from tests.tiny import build_tiny_model
from training.contract import ExitCode
from training.engine.adapters import new_adapter
from training.engine.outputs import save_adapter
from training.engine.policy import load_tokenizer
from training.engine.target_modules import resolve

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "rslora+dora": {"use_dora": True, "use_rslora": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_is_what_peft_computes_from_the_files(
    tiny_model: Path, tmp_path: Path, kind: str
) -> None:
    """Rank 4, so that alpha / r and alpha / sqrt(r) are far apart; magnitudes of DoRA moved as well."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = tiny_config(tiny_model, lora_r=4, **KINDS[kind])
    policy = tiny_policy(config, bent=False)
    with torch.no_grad():
        for name, tensor in policy.trainable.items():
            if "magnitude" in name:
                tensor.mul_(1.1)
    bend(policy)
    save_adapter(policy, load_tokenizer(config), config, tmp_path)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (settings["use_dora"], settings["use_rslora"]) == ("dora" in kind, "rslora" in kind)
    expected, bare = [], []
    with torch.no_grad():
        for pair in tiny_data(tiny_model):
            for side in (pair.chosen, pair.rejected):
                ids = torch.tensor([[*pair.prompt.tolist(), *side.tolist()]])
                rows, labels = torch.arange(len(side)) + len(pair.prompt) - 1, torch.tensor(side.tolist())
                for values, logits in ((expected, model(ids).logits), (bare, None)):
                    if logits is None:
                        with model.disable_adapter():
                            logits = model(ids).logits
                    values.append(logits[0].double().log_softmax(-1)[rows, labels].sum())
    with policy.inference():
        torch.testing.assert_close(
            summed(policy, tiny_data(tiny_model)), torch.stack(expected), rtol=1e-6, atol=5e-5
        )
    with policy.reference():
        torch.testing.assert_close(
            summed(policy, tiny_data(tiny_model)), torch.stack(bare), rtol=1e-6, atol=5e-5
        )
    assert not torch.allclose(torch.stack(expected), torch.stack(bare), atol=0.1)


@pytest.mark.parametrize("kind", ["dora", pytest.param("rslora", marks=pytest.mark.slow)])
def test_a_run_of_each_kind_resumes_bit_for_bit_and_is_continued(new_run: NewRun, kind: str) -> None:
    settings = KINDS[kind] | {"max_steps": 4, "lora_dropout": 0.1, "learning_rate": 1e-2}
    undisturbed, run = new_run("undisturbed", **settings), new_run("interrupted", **settings)
    assert undisturbed.train() == 0
    assert run.train(LeaveAt(run, 2)) == ExitCode.INTERRUPTED
    assert run.train() == 0
    assert run.result["adapter_sha256"] == undisturbed.result["adapter_sha256"]
    assert run.result["adapter"] == {
        "kind": kind, "r": 16, "lora_alpha": 32,
        "target_modules": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
    }  # fmt: skip
    again = new_run("again", adapter_path=str(run.path / "adapter"), max_steps=1)
    assert again.train() == 0
    assert_starts_at_ln_2(again)
    assert again.result["adapter"]["kind"] == kind
    assert f"The adapter that training starts from decides: use_{kind} True." in again.texts()


def test_result_counts_and_hashes_of_an_adapter(new_run: NewRun, sft_run: RunFolder) -> None:
    from transformers import AutoModelForCausalLM

    run = new_run("facts", adapter_path=str(sft_run.path / "adapter"), max_steps=1)
    assert run.train() == 0
    fresh, result = sft_run.result, run.result
    assert fresh["start_sha256"] == fresh["reference_sha256"] == ""
    assert result["base_sha256"] == fresh["base_sha256"]
    assert len(result["start_sha256"]) == 64
    assert result["weights_sha256"] == result["reference_sha256"] != fresh["weights_sha256"]
    # q, k, v, o, gate, up, down of two layers over widths of 32, 16 and 64, rank 4
    one = 4 * ((32 + 32) + 2 * (32 + 16) + (32 + 32) + 3 * (32 + 64))
    model = AutoModelForCausalLM.from_pretrained(run.config.model_path)
    base = sum(tensor.numel() for tensor in model.parameters())
    for found in (fresh, result):  # the frozen copy of the adapter that is the reference is not counted
        assert found["num_trainable_parameters"] == 2 * one
        assert found["num_parameters"] == base + 2 * one


@pytest.fixture(scope="module")
def sft_run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> RunFolder:
    make = run_maker(tmp_path_factory.mktemp("sft"), tiny_model)
    run = make("sft", method="sft", learning_rate=2e-2, num_train_epochs=2, lora_r=4, lora_alpha=8)
    assert run.train() == 0
    return run


def checkpoint_of(run: RunFolder) -> Path:
    return sorted((run.path / "checkpoints").glob("step-*"))[-1]


def test_sft_then_dpo_then_dpo_each_from_a_checkpoint_of_the_one_before(
    sft_run: RunFolder, new_run: NewRun
) -> None:
    before = sft_run
    for name in ("dpo-1", "dpo-2"):
        run = new_run(name, adapter_path=str(checkpoint_of(before)), max_steps=4, learning_rate=2e-2)
        assert run.train() == 0
        assert_starts_at_ln_2(run)
        start = run.points("eval")[0]
        assert start["eval_logps/chosen"] == pytest.approx(
            before.result["metrics"]["eval_logps/chosen"], rel=1e-5
        )
        assert start["eval_logps/chosen"] != pytest.approx(
            before.result["initial_metrics"]["eval_logps/chosen"], rel=1e-3
        )
        assert run.result["metrics"]["eval_kl"] > 1e-5
        assert run.result["adapter"]["r"] == 4
        assert "with the adapter that training starts from" in run.result["reference"]
        before = run


@pytest.mark.slow
def test_a_checkpoint_and_the_adapter_of_the_same_step_are_the_same_start(
    sft_run: RunFolder, new_run: NewRun
) -> None:
    starts = []
    for name, folder in (("adapter", sft_run.path / "adapter"), ("checkpoint", checkpoint_of(sft_run))):
        run = new_run(name, adapter_path=str(folder), max_steps=2, learning_rate=1e-2)
        assert run.train() == 0
        starts.append(run)
    assert starts[0].points("train") == starts[1].points("train")
    assert starts[0].result["adapter_sha256"] == starts[1].result["adapter_sha256"]


def test_starting_points_that_cannot_be_used_are_refused(
    sft_run: RunFolder, new_run: NewRun, tmp_path: Path, tiny_model: Path
) -> None:
    def copy(source: Path, name: str) -> Path:
        return Path(shutil.copytree(source, tmp_path / name))

    adapter, checkpoint = sft_run.path / "adapter", checkpoint_of(sft_run)
    damaged = copy(checkpoint, checkpoint.name)
    (damaged / "optimizer.safetensors").write_bytes(b"half")
    tokens = copy(adapter, "tokens")
    vocabulary = json.loads((tokens / "tokenizer.json").read_text())
    names = vocabulary["model"]["vocab"]
    names["Ġ"], names["!"] = names["!"], names["Ġ"]
    (tokens / "tokenizer.json").write_text(json.dumps(vocabulary))
    head = copy(adapter, "head")
    settings = json.loads((head / "adapter_config.json").read_text())
    (head / "adapter_config.json").write_text(json.dumps(settings | {"modules_to_save": ["lm_head"]}))
    prompt = copy(adapter, "prompt")
    (prompt / "adapter_config.json").write_text(
        json.dumps({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4})
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    other = build_tiny_model(tmp_path / "other", seed=1)  # the same shapes, other weights
    cases: list[tuple[dict[str, Any], str]] = [
        ({"adapter_path": str(empty)}, "has no adapter_model.safetensors"),
        ({"adapter_path": str(tiny_model)}, "is a whole model, not an adapter"),
        ({"adapter_path": str(damaged)}, "optimizer.safetensors of"),
        ({"adapter_path": str(adapter), "model_path": str(other)}, "it was trained on other weights"),
        ({"adapter_path": str(checkpoint), "model_path": str(other)}, "it was trained on other weights"),
        ({"adapter_path": str(tokens)}, "its tokenizer has another vocabulary"),
        ({"adapter_path": str(head)}, "it uses modules_to_save"),
        ({"adapter_path": str(prompt)}, "PROMPT_TUNING, not LoRA"),
        ({"adapter_path": str(adapter), "use_dora": True}, "use_dora is asked for"),
        ({"reference_adapter_path": str(tokens)}, "its tokenizer has another vocabulary"),
    ]
    for number, (changes, words) in enumerate(cases):
        run = new_run(f"run-{number}", **changes)
        assert run.train() == ExitCode.REFUSED, words
        assert words in run.result["error"]
        assert run.result["next_step"]


def test_an_adapter_on_the_output_layer_is_refused(new_run: NewRun, tiny_model: Path, tmp_path: Path) -> None:
    """Its product would be passed over: the vocabulary projection is computed from its own weight."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    get_peft_model(base, LoraConfig(target_modules=["lm_head"])).save_pretrained(tmp_path / "head")
    run = new_run(adapter_path=str(tmp_path / "head"))
    assert run.train() == ExitCode.REFUSED
    assert "it changes the output layer" in run.result["error"]


@pytest.mark.parametrize(
    ("wanted", "layers"),
    [
        (("attention",), {"q_proj", "k_proj", "v_proj", "o_proj"}),
        (("mlp",), {"gate_proj", "up_proj", "down_proj"}),
        (("mlp", "q_proj"), {"gate_proj", "up_proj", "down_proj", "q_proj"}),
        (("layers.1.mlp.up_proj",), {"up_proj"}),
    ],
)
def test_presets_and_names_become_the_layers_of_the_model(
    tiny_model: Path, wanted: tuple[str, ...], layers: set[str]
) -> None:
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    model = new_adapter(base, tiny_config(tiny_model, target_modules=wanted))
    adapted = [name.removesuffix(".lora_A.default.weight") for name, _ in model.named_parameters()
               if "lora_A" in name]  # fmt: skip
    assert {name.rpartition(".")[2] for name in adapted} == layers
    assert len(adapted) == (1 if "1" in wanted[0] else 2 * len(layers))


class Phi(torch.nn.Module):
    """GPT-NeoX's way of naming: `dense` is the attention's, and the end of an mlp's name elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = torch.nn.ModuleDict({"dense": torch.nn.Linear(2, 2)})
        self.mlp = torch.nn.ModuleDict({"dense": torch.nn.Linear(2, 2), "fc": torch.nn.Linear(2, 2)})
        self.head = torch.nn.Linear(2, 2)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head


def test_a_name_that_two_presets_share_is_written_out() -> None:
    assert resolve(Phi(), ("attention",)) == ["attention.dense"]
    assert resolve(Phi(), ("mlp",)) == ["fc", "mlp.dense"]
    assert resolve(Phi(), ("dense",)) == ["dense"]
    assert resolve(Phi(), ()) == resolve(Phi(), ("all-linear",)) == ["dense", "fc"]
    shared = Phi()
    shared.mlp["head"] = torch.nn.Linear(2, 2)  # named like the layer that gives the vocabulary
    assert resolve(shared, ()) == ["dense", "fc", "mlp.head"]


def test_layers_that_the_model_has_not_are_refused_with_those_it_has(new_run: NewRun) -> None:
    run = new_run(target_modules=("q_proj", "qkv", "lm_head"))
    assert run.train() == ExitCode.REFUSED
    assert run.result["error"] == "The model has no 'qkv' and no 'lm_head' to put an adapter on."
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in run.result["next_step"]


def test_quantisation_is_refused_before_anything_is_loaded(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        "training.engine.policy.load_base", lambda *_: (_ for _ in ()).throw(AssertionError("loaded"))
    )
    run = new_run("missing", quantization="nf4")
    if find_spec("bitsandbytes") is None:
        assert run.train() == ExitCode.REFUSED
        assert "needs bitsandbytes, which is not installed here" in run.result["error"]
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/bitsandbytes.py").write_text("raise RuntimeError('CUDA 11 was expected')\n")
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    run = new_run("on-cpu", quantization="nf4")
    assert run.train() == ExitCode.REFUSED
    assert "works on a CUDA device only" in run.result["error"]
    assert "loading_model" not in {event.get("phase") for event in run.events}


def test_a_bitsandbytes_that_does_not_load_is_told_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: Path
) -> None:
    from training.engine.errors import RefusedError
    from training.engine.quantization import check_quantization

    (tmp_path / "bitsandbytes.py").write_text("raise RuntimeError('CUDA 11 was expected')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RefusedError, match="does not load: CUDA 11 was expected"):
        check_quantization(tiny_config(tiny_model, quantization="nf4"), torch.device("cuda"))
