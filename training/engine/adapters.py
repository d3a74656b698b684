"""What is trained on a base model: an adapter (LoRA, DoRA, rsLoRA), new or continued, or all of its weights.

Knows peft; knows nothing of pairs, losses or the files of a run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from training.contract import AdapterFacts, AdapterKind, RunConfig
from training.engine.errors import RefusedError
from training.engine.experts import explain_dropout, split_experts
from training.engine.products import LOW
from training.engine.starting_point import StartingPoint, base_sha256, same_tokens
from training.engine.surroundings import without_peft_s_old_name
from training.engine.target_modules import resolve

POLICY, REFERENCE = "default", "reference"  # adapter names in peft
KINDS: dict[tuple[bool, bool], AdapterKind] = {
    (False, False): "lora",
    (False, True): "dora",
    (True, False): "rslora",
    (True, True): "rslora+dora",
}
# Kinds of LoRA whose output is not base + low-rank product of the same layer's input, or that train more than it.
UNKNOWN_KINDS = (
    "modules_to_save", "trainable_token_indices", "layer_replication", "alora_invocation_tokens",
    "use_qalora", "use_bdlora", "arrow_config",
)  # fmt: skip


def trained_model(base: Any, config: RunConfig, start: StartingPoint | None) -> Any:
    """What the steps change, over a frozen base: a PeftModel, or with full fine-tuning the base itself."""
    if config.finetuning_type == "full":
        return whole_model(base, start, Path(config.model_path)).requires_grad_(True)
    return new_adapter(base, config) if start is None else continued_adapter(base, config, start)


def whole_model(base: Any, start: StartingPoint | None, model_path: Path) -> Any:
    """The base with all weights of a checkpoint, or with an adapter's product added to its own."""
    if start is None:
        return base
    if start.is_adapter:
        return frozen_adapter(base, start, model_path).merge_and_unload()
    with _fitting(start):
        _copy(dict(base.named_parameters()), start.tensors())
    return base


def frozen_adapter(base: Any, start: StartingPoint, model_path: Path) -> Any:
    """A PeftModel that only computes."""
    _check_adapter(start, model_path)
    with _fitting(start):
        return _with_adapter(base, start, dropout=0.0).requires_grad_(False)


def new_adapter(base: Any, config: RunConfig) -> Any:
    """A PeftModel whose adapter changes nothing yet (B = 0).

    LoRA (Hu et al. 2021, arXiv 2106.09685): W x + alpha / r * B A x. rsLoRA (Kalajdzievski 2023, arXiv
    2312.03732): alpha / sqrt(r) instead. DoRA (Liu et al. 2024, arXiv 2402.09353, equation 5): the columns of
    W + alpha / r * B A have a length of their own, which is trained.
    """
    from peft import LoraConfig, get_peft_model

    layers, experts = split_experts(base, config.target_modules)
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
        target_modules=[] if experts and not layers else resolve(base, layers),
        target_parameters=experts or None,
    )
    try:
        with without_peft_s_old_name():
            model = get_peft_model(base, settings)
        _measure_lengths(model)
        return model
    except ValueError as error:
        explain_dropout(error, config.lora_dropout)
        raise RefusedError(
            f"The adapter cannot be put on this model: {_first_line(error)}",
            "Choose target_modules that the model has.",
        ) from error


def _measure_lengths(model: Any) -> None:
    """DoRA's, in float32: peft rounds them to what low weights are kept in, and then policy and base are not one."""
    for module in model.modules():
        lengths = getattr(module, "lora_magnitude_vector", {})
        for vector in lengths.values():
            weight = module.get_base_layer().weight
            if weight.dtype in LOW and weight.ndim == 2:
                vector.weight.data = torch.linalg.norm(weight.float(), dim=1).to(vector.weight.dtype)


def continued_adapter(base: Any, config: RunConfig, start: StartingPoint) -> Any:
    """A PeftModel that starts as base + adapter. Rank and kind are the adapter's, the dropout is the run's."""
    _check_adapter(start, Path(config.model_path))
    _check_kind(config, start)
    with _fitting(start):
        return _with_adapter(base, start, dropout=config.lora_dropout)


def add_frozen(model: Any, start: StartingPoint, model_path: Path) -> None:
    """A second adapter beside the policy's: the reference."""
    _check_adapter(start, model_path)
    with _fitting(start):
        model.add_adapter(REFERENCE, _settings(start, dropout=0.0))
        _check_head(model)
        place(model, start, REFERENCE)
    model.set_adapter(POLICY)


def place(model: Any, start: StartingPoint, name: str) -> None:
    """Copy an adapter's weights onto the adapter `name`; each must have its place there, and fill it."""
    from peft import set_peft_model_state_dict
    from peft.utils.save_and_load import get_peft_model_state_dict

    tensors = start.tensors()
    if start.is_checkpoint:  # a run keeps its parameters under the names that they have in the model
        own = {
            key.replace(f".{name}", f".{POLICY}"): parameter
            for key, parameter in model.named_parameters()
            if key.endswith(f".{name}") or f".{name}." in key
        }
        _copy(own, tensors)
        return
    expected = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    if set(tensors) != set(expected):
        raise ValueError(f"{len(set(tensors) ^ set(expected))} of its weights have no place in the model")
    set_peft_model_state_dict(model, tensors, adapter_name=name)


def facts(model: Any) -> AdapterFacts | None:
    """What a model card says of the adapter; None where there is none."""
    if not hasattr(model, "peft_config"):
        return None
    settings = model.peft_config[POLICY]
    return AdapterFacts(
        kind=KINDS[settings.use_rslora, settings.use_dora],
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        target_modules=sorted([*(settings.target_modules or []), *(settings.target_parameters or [])]),
    )


def settings_of(model: Any) -> dict[str, Any]:
    """peft's settings of the trained adapter as JSON values; sets are sorted, so that equal is equal."""
    data = model.peft_config[POLICY].to_dict() | {"inference_mode": True}
    return {key: sorted(value) if isinstance(value, set) else value for key, value in data.items()}


def inherited(config: RunConfig, start: StartingPoint) -> str:
    """A sentence about settings that the adapter has decided otherwise; "" where there are none."""
    theirs = start.settings or {}
    pairs = {"lora_r": "r", "lora_alpha": "lora_alpha", "use_dora": "use_dora", "use_rslora": "use_rslora"}
    other = [f"{n} {theirs.get(k)}" for n, k in pairs.items() if theirs.get(k, False) != getattr(config, n)]
    return f"The adapter that training starts from decides: {', '.join(other)}." if other else ""


def _with_adapter(base: Any, start: StartingPoint, *, dropout: float) -> Any:
    from peft import get_peft_model

    with without_peft_s_old_name():
        model = get_peft_model(base, _settings(start, dropout=dropout))
    _check_head(model)
    place(model, start, POLICY)
    return model


def _settings(start: StartingPoint, *, dropout: float) -> Any:
    from peft import LoraConfig, PeftConfig

    settings = PeftConfig.from_peft_type(**(start.settings or {}))  # type: ignore[no-untyped-call]
    if not isinstance(settings, LoraConfig):
        raise ValueError(f"it is of the kind {settings.peft_type}, not LoRA")
    odd = [name for name in UNKNOWN_KINDS if getattr(settings, name, None)]
    if odd or settings.bias != "none":
        raise ValueError(f"it uses {' and '.join(odd or ['bias'])}, which cannot be trained on here")
    settings.lora_dropout, settings.inference_mode = dropout, False
    return settings


def _check_head(model: Any) -> None:
    """The vocabulary projection is computed from its own weight: an adapter on it would be passed over."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(model.get_base_model().get_output_embeddings(), BaseTunerLayer):
        raise ValueError("it changes the output layer, which cannot be trained on here")


def _check_adapter(start: StartingPoint, model_path: Path) -> None:
    """Before anything is loaded onto the base: shapes alone do not tell two models of one family apart."""
    if not start.is_adapter:
        raise RefusedError(
            f"{start.folder} is a checkpoint of full fine-tuning: an adapter cannot stand on it.",
            "Set finetuning_type to full, or write it as a model folder (merge with --checkpoint) and choose that "
            "as the base model.",
        )
    reason = ""
    if start.base_sha256 and start.base_sha256 != base_sha256(model_path):
        reason = "it was trained on other weights"
    elif not same_tokens(start.folder, model_path):
        reason = "its tokenizer has another vocabulary"
    if reason:
        raise _unfitting(start, reason)


def _check_kind(config: RunConfig, start: StartingPoint) -> None:
    for name in ("use_dora", "use_rslora"):
        if getattr(config, name) and not (start.settings or {}).get(name):
            raise RefusedError(
                f"{name} is asked for, and the adapter that training starts from was made without it.",
                f"Set {name} to false, or start from the base model.",
            )


def _copy(own: Mapping[str, nn.Parameter], tensors: Mapping[str, torch.Tensor]) -> None:
    if set(own) != set(tensors):
        raise ValueError(f"{len(set(own) ^ set(tensors))} of its weights have no place in the model")
    with torch.no_grad():
        for name, parameter in own.items():
            if parameter.shape != tensors[name].shape:
                raise ValueError(f"{name} has the shape {tuple(tensors[name].shape)}")
            parameter.copy_(tensors[name])


@contextlib.contextmanager
def _fitting(start: StartingPoint) -> Iterator[None]:
    """What peft and torch say about weights that do not fit, as a refusal."""
    try:
        yield
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise _unfitting(start, _first_line(error)) from error


def _unfitting(start: StartingPoint, reason: str) -> RefusedError:
    return RefusedError(
        f"The adapter to start from, {start.folder}, does not fit the base model: {reason}",
        "Choose the base model that the adapter was trained on.",
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300]
