"""The arithmetic before a run: steps, memory, fit and time, against figures worked out by hand or
measured."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from training import estimates, recipes
from training.base_models import CATALOGUE, STARTER, catalogue_model, shape_of
from training.estimates import GIB, Machine, PairTokens
from training.watch_time import watch_seconds


def plain_cpu(cores: int) -> Machine:
    """Whatever this machine's processor is: the speed that the figures below were measured with."""
    machine = estimates.cpu_machine(memory_bytes=16 * GIB, cores=cores)
    return dataclasses.replace(machine, flops=cores * estimates.CPU_FLOPS_PER_CORE)


CPU = plain_cpu(2)
H200 = estimates.gpu_machine(name="NVIDIA H200", memory_bytes=139 * GIB)
TOKENS = PairTokens(prompt=158, chosen=213, rejected=217, longest=512)


def starter() -> estimates.ModelShape:
    shape = shape_of(STARTER.facts())
    assert shape is not None
    return shape


def estimate(machine: Machine = CPU, *, hub_id: str = STARTER.hub_id, pairs: int = 180, **values: Any) -> Any:
    model = catalogue_model(hub_id)
    assert model is not None
    shape = shape_of(model.facts())
    assert shape is not None
    return estimates.estimate_run(
        shape=shape, parameters=recipes.resolve(values), tokens=TOKENS, machine=machine,
        num_train_pairs=pairs, num_eval_pairs=20,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("pairs", "values", "expected"),
    [
        (180, {}, (12, 12)),  # 180 / 16 = 11.25: the last, smaller batch is a step too
        (160, {}, (10, 10)),
        (160, {"num_train_epochs": 2.0}, (10, 20)),
        (160, {"num_train_epochs": 0.25}, (10, 3)),
        (1, {}, (1, 1)),
        (0, {}, (0, 0)),
        (100_000, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}, (100_000, 100_000)),
    ],
)
def test_steps_are_pairs_by_effective_batch_rounded_up(pairs: int, values: Any, expected: Any) -> None:
    assert estimates.steps(pairs, recipes.resolve(values)) == expected


def test_the_studio_chooses_about_ten_evaluations_and_says_the_interval() -> None:
    assert estimates.evaluation_interval(100, 0, has_validation=True) == (
        10,
        11,
    )  # before step 1, then 10..100
    assert estimates.evaluation_interval(12, 0, has_validation=True) == (2, 7)
    assert estimates.evaluation_interval(12, 5, has_validation=True) == (5, 4)  # 0, 5, 10, 12
    assert estimates.evaluation_interval(12, 50, has_validation=True) == (50, 2)  # before and at the end
    assert estimates.evaluation_interval(12, 5, has_validation=False) == (0, 0)


def test_lora_parameters_of_the_starter_are_those_that_were_counted() -> None:
    """r=16 on all seven linear layers of SmolLM2-135M: 4.88M, as peft prints it."""
    assert estimates.lora_parameters(starter(), recipes.resolve({})) == 4_884_480
    two = recipes.resolve({"target_modules": ["q_proj", "v_proj"]})
    assert estimates.lora_parameters(starter(), two) == 16 * 30 * ((576 + 576) + (576 + 192))


def test_kinds_of_training_are_counted_as_the_engine_keeps_them() -> None:
    """SmolLM2-135M: 134.5M parameters, 49,152 tokens of width 576; presets by the layers that they stand for."""
    shape, values = starter(), recipes.resolve({})
    count = estimates.lora_parameters
    both = [count(shape, values | {"target_modules": [name]}) for name in ("attention", "mlp")]
    assert both[0] == count(shape, values | {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]})
    assert sum(both) == count(shape, values | {"target_modules": ["all-linear"]}) == 4_884_480

    full = estimates.memory(shape, values | {"finetuning_type": "full"}, TOKENS, H200)
    assert (full.weights, full.adapter) == (4 * shape.num_parameters, 12 * shape.num_parameters)
    lora = estimates.memory(shape, values, TOKENS, H200)
    small = estimates.memory(shape, values | {"quantization": "nf4"}, TOKENS, H200)
    assert lora.weights == 2 * shape.num_parameters
    vocabulary = 2 * 49_152 * 576
    assert small.weights == pytest.approx(
        0.516 * (shape.num_parameters - vocabulary) + 2 * vocabulary, rel=1e-3
    )


def test_kept_activations_agree_with_saved_tensor_hooks() -> None:
    """Measured on SmolLM2-135M, bytes per token of all layers: with the engine's own functions, and with peft's,
    which run where weights are divided."""
    tokens = PairTokens(prompt=0, longest=256)
    for dropout, parallelism, measured in (
        (0.0, "data", 846_363), (0.05, "data", 996_123), (0.0, "fsdp", 1_215_003), (0.05, "fsdp", 2_083_611)
    ):  # fmt: skip
        parameters = recipes.resolve({"lora_dropout": dropout, "per_device_train_batch_size": 1})
        found = estimates.memory(starter(), parameters | {"parallelism": parallelism}, tokens, CPU)
        assert measured <= found.activations / (2 * 256) <= 1.25 * measured


def test_what_the_engine_does_not_replace_is_not_counted_as_replaced() -> None:
    shape, values = starter(), recipes.resolve({})
    assert estimates.is_fused(shape, values)
    assert estimates.is_fused(shape, values | {"target_modules": ["mlp"]})
    for changes in (
        {"use_dora": True}, {"quantization": "nf4"}, {"finetuning_type": "full"}, {"parallelism": "fsdp"},
        {"target_modules": ["attention"]},
    ):  # fmt: skip
        assert not estimates.is_fused(shape, values | changes), changes
    gelu, mixture = (catalogue_model(name) for name in ("google/gemma-3-1b-it", "Qwen/Qwen3-30B-A3B"))
    for model in (gelu, mixture):
        assert model is not None
        other = shape_of(model.facts())
        assert other is not None and not other.gated_silu
    unknown = shape_of(STARTER.facts() | {"hidden_act": ""})
    assert unknown is not None and not estimates.is_fused(unknown, values)


def test_the_width_of_keys_follows_from_their_layer() -> None:
    assert starter().key_value_width == 192
    facts = STARTER.facts()
    joined = shape_of(facts | {"lora_units": {"qkv_proj": 30 * (576 + 960)}})
    assert joined is not None and joined.key_value_width == joined.attention_width


def test_a_measured_run_is_estimated_within_a_third() -> None:
    """The starter on the example data, two cores: 2.66 GB at the peak, 12 steps, 4 evaluations, 230 s.

    Its reference pass came from the cache, so that part of the estimate is taken off.
    """
    found = estimates.estimate_run(
        shape=starter(),
        parameters=recipes.resolve({}),
        tokens=PairTokens(prompt=45, chosen=23, rejected=56, longest=260),
        machine=CPU,
        num_train_pairs=185,
        num_eval_pairs=21,
        eval_steps=4,
    )
    assert (found.total_steps, found.num_evaluations) == (12, 4)
    assert found.memory.total == pytest.approx(2.66e9, rel=0.33)
    reference = 206 * (45 + 23 + 56) * 2 * 134_515_008 / CPU.flops
    assert found.seconds - reference == pytest.approx(230, rel=0.33)


def test_memory_follows_what_the_help_says() -> None:
    base = estimate(H200).memory
    assert estimate(H200, per_device_train_batch_size=4).memory.activations == pytest.approx(
        2 * base.activations
    )
    assert estimate(H200, lora_r=32).memory.adapter == 2 * base.adapter
    assert estimate(H200, max_length=256).memory.activations < 0.6 * base.activations
    assert estimate(H200, max_length=4096).memory == base  # no pair is longer than 512
    assert estimate(H200, gradient_accumulation_steps=64).memory == base


def test_a_large_batch_is_computed_in_parts_that_fit_the_engine_s_budget() -> None:
    assert estimate(CPU, per_device_train_batch_size=64).memory == estimate(CPU).memory
    gpu = [estimate(H200, per_device_train_batch_size=size).memory.activations for size in (32, 64, 128)]
    assert gpu[0] < gpu[1] == gpu[2]


def test_a_small_model_fits_and_a_large_one_is_refused_with_numbers() -> None:
    assert estimate().fit.verdict == "fits"
    found = estimate(hub_id="Qwen/Qwen3-30B-A3B")
    assert found.fit.verdict == "too_large"
    assert "16.0 GB" in found.fit.sentence and "weights alone do not fit" in found.fit.sentence
    assert estimate(H200, hub_id="Qwen/Qwen3-4B-Instruct-2507").fit.verdict == "fits"


def test_between_fitting_and_not_there_is_tight() -> None:
    # So near to the limit the engine computes activations again: what that needs is what counts.
    need = estimate(estimates.cpu_machine(memory_bytes=1, cores=2)).memory.total
    assert need < estimate().memory.total
    for share, verdict in ((0.79, "fits"), (0.81, "tight"), (0.94, "tight"), (0.96, "too_large")):
        machine = estimates.cpu_machine(memory_bytes=int(need / share), cores=2)
        assert estimate(machine).fit.verdict == verdict, share
    assert estimate(estimates.cpu_machine(memory_bytes=0, cores=2)).fit.verdict == "unknown"


def test_time_grows_with_pairs_passes_and_model_and_shrinks_with_the_machine() -> None:
    base = estimate().seconds
    assert estimate(pairs=1800).seconds > 5 * base
    assert estimate(num_train_epochs=3.0).seconds > 1.5 * base
    assert estimate(hub_id="Qwen/Qwen3-4B").seconds > 10 * base
    assert estimate(H200).seconds < base / 2


@pytest.mark.parametrize("fast", [False, True])
def test_a_processor_with_fast_products_is_estimated_as_one(
    monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    monkeypatch.setattr(estimates, "is_amd_with_avx512", lambda: fast)
    found = estimates.cpu_machine(memory_bytes=GIB, cores=2).flops
    assert found == 2 * (estimates.AMD_AVX512_FLOPS_PER_CORE if fast else estimates.CPU_FLOPS_PER_CORE)


def test_watch_prompts_are_answered_by_the_reference_once_and_at_each_evaluation() -> None:
    """Four prompts of 60 tokens on one core, measured: 32 tokens took 4.0 s, the prompts before them 0.9 s."""
    one = plain_cpu(1)

    def seconds(
        machine: Machine = one, *, evaluations: int = 1, eval_pairs: int = 20, **settings: Any
    ) -> float:
        return watch_seconds(
            recipes.resolve({}) | settings, machine, active_parameters=starter().num_parameters, prompt=60,
            num_eval_pairs=eval_pairs, num_evaluations=evaluations,
        )  # fmt: skip

    cold = seconds(watch_temperature=0.0)
    assert cold / 2 == pytest.approx(4.9, rel=0.15)
    assert seconds(watch_temperature=0.0, evaluations=3) == pytest.approx(2 * cold)
    scoring = 2 * 4 * (60 + 32) * 2 * starter().num_parameters / one.flops
    assert seconds() - cold == pytest.approx(scoring)
    assert seconds(watch_max_new_tokens=64) > 1.5 * seconds()
    assert seconds(eval_pairs=2) < seconds() < 2 * seconds(eval_pairs=2)
    assert seconds(eval_pairs=0) == seconds(watch_prompts=0) == seconds(evaluations=0) == 0
    assert seconds(parallelism="fsdp") == 0
    for without in ({"method": "sft"}, {"method": "orpo"}, {"simpo_gamma": 0.5}):
        assert seconds(**without) == pytest.approx(cold / 2), (
            "no reference answers, and none is compared with"
        )
    assert seconds(eval_pairs=0, watch_path="prompts.jsonl") == seconds()
    assert seconds(H200) == pytest.approx(2 * 32 * 0.025, rel=0.05)


def test_a_short_run_s_time_has_its_watch_prompts() -> None:
    watched, blind = (
        estimates.estimate_run(
            shape=starter(), parameters=recipes.resolve({}) | {"watch_prompts": count}, tokens=TOKENS, machine=H200,
            num_train_pairs=16, num_eval_pairs=20,
        )
        for count in (4, 0)
    )  # fmt: skip
    assert watched.num_evaluations == 2
    assert watched.seconds - blind.seconds == pytest.approx(3 * 32 * 0.025, rel=0.1)


def test_a_mixture_of_experts_costs_its_active_parameters() -> None:
    moe = catalogue_model("Qwen/Qwen3-30B-A3B")
    assert moe is not None and moe.active_parameters == pytest.approx(3.3e9, rel=0.05)
    dense = estimate(H200, hub_id="Qwen/Qwen3-8B", pairs=5000).seconds
    assert estimate(H200, hub_id="Qwen/Qwen3-30B-A3B", pairs=5000).seconds < dense


def test_gpus_are_told_apart_by_whole_names() -> None:
    speeds = {
        name: estimates.gpu_machine(name=name, memory_bytes=GIB).flops / 1e12 / estimates.UTILISATION
        for name in (
            "NVIDIA A100-SXM4-80GB",
            "NVIDIA A10",
            "NVIDIA L40S",
            "NVIDIA L4",
            "NVIDIA RTX A4000",
            "Tesla T4",
        )
    }
    assert [round(speed) for speed in speeds.values()] == [312, 125, 362, 121, 60, 65]


def test_every_model_of_the_catalogue_can_be_estimated() -> None:
    for model in CATALOGUE:
        found = estimate(H200, hub_id=model.hub_id)
        assert found.total_steps == 12 and found.seconds > 0 and found.memory.total > 2 * model.num_parameters


def test_numbers_are_shown_as_people_write_them() -> None:
    assert estimates.show_bytes(1.5 * GIB) == "1.5 GB"
    assert estimates.show_bytes(139 * GIB) == "139 GB"
    assert estimates.show_seconds(40) == "about a minute"
    assert estimates.show_seconds(600) == "about 10 minutes"
    assert estimates.show_seconds(4 * 3600) == "about 4 hours"
    assert estimates.show_seconds(10**12) == "more than a year"
    assert [estimates.show_count(v) for v in (134_515_008, 4_022_468_096, 30_532_122_624)] == [
        "135M",
        "4.0B",
        "30.5B",
    ]
