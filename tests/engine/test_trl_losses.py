"""Every loss and method against TRL 1.16: same pairs, same LoRA with B not zero, value and gradient.

Where TRL has another definition, or none, the test says what differs and compares with a value written out in
the test from the model's own logits. One trainer of each kind serves all cases.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from tests.engine.policies import bend, gradients, tiny_config, tiny_data, tiny_policy
from tests.engine.test_trl import rows_of, rows_of_trl, trl_trainer
from tests.tiny import tiny_pairs
from training.engine.data import TokenizedPair, tokenize_pairs
from training.engine.logps import token_logps
from training.engine.losses import LOSSES
from training.engine.objective import Objective, PairLogps, mean_chosen_tokens
from training.engine.policy import Policy, load_tokenizer
from training.engine.preflight import LOSS_TYPES

pytestmark = pytest.mark.slow
COUNT, BETA = 5, 0.3
Settings = dict[str, Any]


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> Policy:
    found = tiny_policy(tiny_config(tiny_model), bent=False)
    bend(found)
    return found


@pytest.fixture(scope="module")
def pairs(tiny_model: Path) -> list[TokenizedPair]:
    return tiny_data(tiny_model, COUNT)


def same_weights(model: Any, policy: Policy) -> list[torch.nn.Parameter]:
    """Copies the policy's adapter into TRL's model; its parameters in the policy's order."""
    theirs = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    assert set(theirs) == set(policy.trainable)
    with torch.no_grad():
        for name, tensor in policy.trainable.items():
            theirs[name].copy_(tensor)
    return [theirs[name] for name in policy.trainable]


def ours(policy: Policy, pairs: list[TokenizedPair], **settings: Any) -> tuple[float, torch.Tensor]:
    """Loss of one step over the pairs, and its gradient, as the loop computes them."""
    config = dataclasses.replace(tiny_config(Path("model")), **({"beta": BETA} | settings))
    objective = Objective(config)
    if objective.is_sft:
        none = pairs[0].rejected[:0]
        pairs = [dataclasses.replace(pair, rejected=none) for pair in pairs]
    states = policy.scorer(pairs)
    tokens = token_logps(states.hidden, states.labels, policy.head)
    reference = None
    if objective.needs_reference:
        with policy.reference():
            before = policy.scorer(pairs)
            reference = token_logps(before.hidden, before.labels, policy.head)
    losses = objective.losses(
        PairLogps.of(states, tokens, reference), tokens_per_pair=mean_chosen_tokens(pairs)
    )
    policy.model.zero_grad()
    losses.mean().backward()
    return losses.mean().item(), gradients(policy)


def assert_agree(
    found: tuple[float, torch.Tensor], loss: torch.Tensor, weights: list[torch.nn.Parameter]
) -> None:
    for tensor in weights:
        tensor.grad = None
    loss.backward()
    expected = torch.cat([tensor.grad.flatten() for tensor in weights if tensor.grad is not None])
    assert found[0] == pytest.approx(loss.item(), rel=1e-5)
    assert ((found[1] - expected).norm() / expected.norm()).item() < 1e-4


@pytest.fixture(scope="module")
def dpo(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, policy: Policy) -> Any:
    trainer = trl_trainer(tiny_model, COUNT, tmp_path_factory.mktemp("dpo"), bf16_full_eval=False)
    trainer.weights = same_weights(trainer.model, policy)
    return trainer


# our settings -> what TRL is told
DPO_CASES: list[tuple[Settings, Settings]] = [
    ({}, {"loss_types": ["sigmoid"]}),
    ({"loss_type": "ipo"}, {"loss_types": ["ipo"]}),
    ({"loss_type": "hinge"}, {"loss_types": ["hinge"]}),
    ({"loss_type": "robust"}, {"loss_types": ["robust"]}),
    ({"loss_type": "robust", "label_smoothing": 0.2}, {"loss_types": ["robust"], "label_smoothing": 0.2}),
    (
        {"loss_type": "exo_pair", "label_smoothing": 0.01},
        {"loss_types": ["exo_pair"], "label_smoothing": 0.01},
    ),
    ({"loss_type": "apo_zero"}, {"loss_types": ["apo_zero"]}),
    ({"loss_type": "apo_down"}, {"loss_types": ["apo_down"]}),
    ({"loss_type": "nca_pair"}, {"loss_types": ["nca_pair"]}),
    ({"loss_type": "sppo_hard"}, {"loss_types": ["sppo_hard"]}),
    ({"dpo_normalize_logratios_by_length": True}, {"loss_types": ["sigmoid_norm"]}),
    ({"rpo_alpha": 0.7}, {"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]}),
    (
        {"rpo_alpha": 0.4, "loss_type": "hinge"},
        {"loss_types": ["hinge", "sft"], "loss_weights": [1.0, 0.4]},
    ),
]


@pytest.mark.parametrize(("settings", "told"), DPO_CASES, ids=[str(case[0]) for case in DPO_CASES])
def test_dpo_agrees_with_trl(
    dpo: Any, policy: Policy, pairs: list[TokenizedPair], settings: Settings, told: Settings
) -> None:
    for name, value in ({"loss_weights": [1.0], "label_smoothing": 0.0} | told).items():
        setattr(dpo, name, value)
    batch = next(iter(dpo.get_train_dataloader()))
    assert rows_of(pairs) == rows_of_trl(batch)
    assert_agree(ours(policy, pairs, **settings), dpo.compute_loss(dpo.model, dict(batch)), dpo.weights)


def test_every_loss_type_is_compared_above() -> None:
    assert {case[0].get("loss_type", "sigmoid") for case in DPO_CASES} == set(LOSS_TYPES) == set(LOSSES)


def side_logps(model: Any, pairs: list[TokenizedPair], side: str) -> list[torch.Tensor]:
    """Token log-probabilities of each pair's side from the model's own logits, one sequence at a time."""
    found = []
    for pair in pairs:
        answer = getattr(pair, side).tolist()
        logits = model(input_ids=torch.tensor([[*pair.prompt.tolist(), *answer]])).logits[0].double()
        rows = torch.arange(len(answer)) + len(pair.prompt) - 1
        found.append(logits[rows].log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)])
    return found


@pytest.mark.parametrize("changes", [{"label_smoothing": 0.2}, {"label_smoothing": 0.2, "rpo_alpha": 0.5}])
def test_conservative_dpo_agrees_with_its_equation(
    dpo: Any, policy: Policy, pairs: list[TokenizedPair], changes: Settings
) -> None:
    """TRL 1.16 passes `label_smoothing` over under the loss type sigmoid; cDPO (Mitchell 2023) smooths there:
    -(1 - eps) log sigmoid(h) - eps log sigmoid(-h)."""
    logps = [side_logps(dpo.model, pairs, side) for side in ("chosen", "rejected")]
    with torch.no_grad(), dpo.model.disable_adapter():
        before = [side_logps(dpo.model, pairs, side) for side in ("chosen", "rejected")]
    ratios = [
        torch.stack([now.sum() - then.sum() for now, then in zip(*both, strict=True)])
        for both in zip(logps, before, strict=True)
    ]
    h = BETA * (ratios[0] - ratios[1])
    loss = (-0.8 * functional.logsigmoid(h) - 0.2 * functional.logsigmoid(-h)).mean()
    loss = loss - changes.get("rpo_alpha", 0.0) * torch.cat(logps[0]).mean()
    assert_agree(ours(policy, pairs, **changes), loss, dpo.weights)


@pytest.fixture(scope="module")
def legacy(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, policy: Policy
) -> Iterator[Callable[[str], Any]]:
    """TRL's experimental CPO (for SimPO) and ORPO trainers."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    made: dict[str, Any] = {}

    def make(kind: str) -> Any:
        if kind in made:
            return made[kind]
        config, trainer = {"cpo": (CPOConfig, CPOTrainer), "orpo": (ORPOConfig, ORPOTrainer)}[kind]
        rows = [
            {
                "prompt": "a",
                "chosen": [{"role": "user", "content": "a"}, *row["chosen"]],
                "rejected": [{"role": "user", "content": "a"}, *row["rejected"]],
            }
            for row in tiny_pairs(COUNT)
        ]
        folder = tmp_path_factory.mktemp(kind)
        made[kind] = trainer(
            model=AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32),
            args=config(
                output_dir=str(folder), beta=BETA, use_cpu=True, bf16=False, report_to=[],
                gradient_checkpointing=False, max_length=1024, remove_unused_columns=False,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=load_tokenizer(tiny_config(tiny_model)),
            peft_config=LoraConfig(
                task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear"
            ),
        )  # fmt: skip
        made[kind].weights = same_weights(made[kind].model, policy)
        return made[kind]

    yield make


def legacy_batch(pairs: list[TokenizedPair]) -> dict[str, torch.Tensor]:
    """The same token ids as ours: these trainers tokenise text in a way of their own."""
    batch = {}
    for side in ("chosen", "rejected"):
        rows = [[*pair.prompt.tolist(), *getattr(pair, side).tolist()] for pair in pairs]
        width = max(map(len, rows))
        ids, mask = torch.zeros(2, len(rows), width, dtype=torch.int64)
        labels = torch.full((len(rows), width), -100)
        for number, (row, pair) in enumerate(zip(rows, pairs, strict=True)):
            ids[number, : len(row)], mask[number, : len(row)] = torch.tensor(row), 1
            labels[number, len(pair.prompt) : len(row)] = torch.tensor(row[len(pair.prompt) :])
        batch |= {f"{side}_input_ids": ids, f"{side}_attention_mask": mask, f"{side}_labels": labels}
    return batch


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_simpo_agrees_with_trl(
    legacy: Callable[[str], Any], policy: Policy, pairs: list[TokenizedPair], smoothing: float
) -> None:
    trainer = legacy("cpo")
    trainer.loss_type, trainer.simpo_gamma, trainer.cpo_alpha = "simpo", 0.8, 0.0
    trainer.beta, trainer.label_smoothing = 2.5, smoothing
    loss, _ = trainer.get_batch_loss_metrics(trainer.model, legacy_batch(pairs))
    found = ours(policy, pairs, beta=2.5, simpo_gamma=0.8, label_smoothing=smoothing)
    assert_agree(found, loss, trainer.weights)


def test_orpo_agrees_with_trl_but_for_the_tokens_of_the_prompt(
    legacy: Callable[[str], Any], policy: Policy, pairs: list[TokenizedPair]
) -> None:
    """TRL's likelihood part also learns the prompt; here it is the answer's alone, as in the paper's y given x.
    The odds-ratio part is TRL's, the likelihood is written out."""
    trainer = legacy("orpo")
    trainer.beta = 0.4
    chosen, rejected, *_ = trainer.concatenated_forward(trainer.model, legacy_batch(pairs))
    losses, *_ = trainer.odds_ratio_loss(chosen, rejected)
    answers = torch.cat(side_logps(trainer.model, pairs, "chosen"))
    assert_agree(
        ours(policy, pairs, method="orpo", beta=0.4), -losses.mean() - answers.mean(), trainer.weights
    )


def test_sft_agrees_with_trl(
    tiny_model: Path, tmp_path: Path, policy: Policy, pairs: list[TokenizedPair]
) -> None:
    """On prompt and completion, the loss on the completion alone."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in tiny_pairs(COUNT)]
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32),
        args=SFTConfig(
            output_dir=str(tmp_path), per_device_train_batch_size=COUNT, use_cpu=True, bf16=False,
            gradient_checkpointing=False, report_to=[], max_length=None, completion_only_loss=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(tiny_config(tiny_model)),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear"
        ),
    )  # fmt: skip
    weights = same_weights(trainer.model, policy)
    batch = next(iter(trainer.get_train_dataloader()))
    tokenizer = load_tokenizer(tiny_config(tiny_model))
    examples, _ = tokenize_pairs(tiny_pairs(COUNT), tokenizer, max_length=1024, sides=("chosen",))
    assert {(*e.prompt.tolist(), *e.chosen.tolist()) for e in examples} == rows_of_trl(batch)
    assert int((batch["labels"] != -100).sum()) == sum(len(e.chosen) for e in examples)
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(trainer.model, dict(batch))
    assert_agree(ours(policy, examples, method="sft"), loss, weights)
