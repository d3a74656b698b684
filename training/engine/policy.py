"""The model that is trained: a frozen base, its adapter, and the reference that the policy starts from.

Knows peft and transformers; knows nothing of pairs' meaning, losses or files of a run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from training.activation_memory import ActivationPlan
from training.contract import RunConfig
from training.engine.adapters import (
    POLICY,
    REFERENCE,
    add_frozen,
    facts,
    frozen_adapter,
    inherited,
    settings_of,
    trained_model,
    whole_model,
)
from training.engine.base_model import load_base, parts, unknown_head, weights_sha256
from training.engine.base_model import load_tokenizer as load_tokenizer
from training.engine.cpu_products import BY_ONEDNN, prefers_onednn
from training.engine.data import TokenizedPair
from training.engine.errors import RefusedError
from training.engine.logps import Head
from training.engine.packed import choose_layout, tried, use_shared_prefix
from training.engine.placement import Placement as Placement
from training.engine.plain import CompletionStates, Layout, padded_states
from training.engine.products import FLOAT32_BETWEEN, widen
from training.engine.reference_model import ReferenceChoice, SeparateReference, other_vocabulary
from training.engine.routing import recorded_routing
from training.engine.sharding import divide_frozen_weights
from training.engine.starting_point import (
    ADAPTER_SETTINGS,
    BASE_FILE,
    base_note,
    base_sha256,
    open_starting_point,
)

PROBE_TOLERANCE = 1e-3  # nats; layouts and heads that differ by more are wrong, not rounded


class Scorer(nn.Module):
    """pairs -> completion states, under the run's precision. What a distributed wrapper would wrap."""

    def __init__(self, model: nn.Module, decoder: nn.Module, layout: Layout, placement: Placement) -> None:
        super().__init__()
        self.model = model
        self._decoder = [decoder]  # in a list, for it is a submodule of the model already
        self.layout = layout
        self.placement = placement
        self.routed = False  # record what a mixture's routers decide

    @property
    def decoder(self) -> nn.Module:
        return self._decoder[0]

    def forward(self, pairs: Sequence[TokenizedPair]) -> CompletionStates:
        with self.placement.autocast(), recorded_routing(self.decoder, self.routed):
            return self.layout(self.decoder, pairs, self.placement.device)


@dataclasses.dataclass
class Policy:
    """What is trained: base + adapter, or all of a base. `reference()` computes as what it is compared with."""

    model: Any  # PeftModel, or with full fine-tuning the base itself
    scorer: Scorer
    head: Head
    weights_sha256: str  # what training starts from
    reference_sha256: str
    reference_sentence: str
    activations: ActivationPlan | None = None
    # How the reference is computed: the adapter switched off, another adapter switched on, a model of its own
    # in this one's place, or (where this is a reference) as it is.
    reference_by: Literal["base", "adapter", "model", "itself"] = "base"
    separate: SeparateReference[Policy] | None = None
    numerics: str = ""  # what else the reference's numbers depend on
    pairs: Sequence[TokenizedPair] = ()  # that the layout has to be right for
    notes: tuple[str, ...] = ()  # for the log
    base_sha256: str = ""  # of the base's weights alone
    start_sha256: str = ""  # of what training starts from beside the base

    @property
    def base(self) -> Any:
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def trajectory_sha256(self) -> str:
        """Of the weights that the steps depend on: where they start, and the reference if it is another."""
        if self.reference_sha256 == self.weights_sha256:
            return self.weights_sha256
        return hashlib.sha256(f"{self.weights_sha256} {self.reference_sha256}".encode()).hexdigest()

    @property
    def checkpoint_files(self) -> dict[str, str]:
        """What a checkpoint needs beside weights, to be a starting point: an adapter's settings, its base."""
        if facts(self.model) is None:
            return {}
        settings = json.dumps(settings_of(self.model), indent=1, sort_keys=True)
        return {ADAPTER_SETTINGS: settings, BASE_FILE: base_note(self.base_sha256)}

    @property
    def reference_head(self) -> Head:
        """The vocabulary projection of the reference: the policy's own unless the reference is another model."""
        return self.head if self.separate is None else self.separate.get().head

    @property
    def layout_name(self) -> str:
        return getattr(self.scorer.layout, "__name__", "")

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: tensor for name, tensor in self.model.named_parameters() if tensor.requires_grad}

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Within it `model`, `scorer` and `head` are the reference's. No gradient, no dropout."""
        with self.inference(), contextlib.ExitStack() as after:
            if self.reference_by == "base":
                after.enter_context(self.model.disable_adapter())
            elif self.reference_by == "adapter":
                after.callback(self._activate, POLICY)
                self._activate(REFERENCE)
            elif self.reference_by == "model":
                assert self.separate is not None  # noqa: S101
                other, own = self.separate.get(), (self.model, self.scorer, self.head)
                after.callback(self._be, *own)
                self._be(other.model, other.scorer, other.head)
            yield

    def _be(self, model: Any, scorer: Scorer, head: Head) -> None:
        self.model, self.scorer, self.head = model, scorer, head

    def rest_reference(self) -> None:
        """The reference is not needed for a while: a model of its own may give up its memory."""
        if self.separate is not None:
            placement = self.scorer.placement
            self.separate.rest(placement.device, lambda keep: all(placement.world.together(lambda: keep)))

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        model = self.model
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            model.train(was_training)

    def _activate(self, name: str) -> None:
        """peft makes the active adapter trainable: the reference must stay frozen."""
        self.model.set_adapter(name, inference_mode=name == REFERENCE)


def load_policy(config: RunConfig, placement: Placement, probe: Sequence[TokenizedPair]) -> Policy:
    """Base weights, what is trained on them, reference; in the plain layout, which is right for every model."""
    start = open_starting_point(config.adapter_path)
    choice = ReferenceChoice.of(config, start)
    base = load_base(config, placement)
    torch.manual_seed(config.seed)  # the adapter's first weights
    model = trained_model(base, config, start)
    if choice.within and choice.start is not None:
        add_frozen(model, choice.start, choice.model_path)
    policy = _computing(config, placement, base, model)
    policy.base_sha256 = base_sha256(Path(config.model_path))
    policy.start_sha256 = "" if start is None else start.sha256
    policy.weights_sha256 = weights_sha256(Path(config.model_path), start)
    policy.reference_sha256 = weights_sha256(choice.model_path, choice.start)
    policy.reference_sentence = choice.sentence
    policy.reference_by = "model" if not choice.within else "adapter" if choice.start else "base"
    if start is not None and config.finetuning_type == "lora":
        policy.notes = tuple(filter(None, [inherited(config, start)]))
    if not choice.within:
        policy.pairs = probe
        policy.separate = SeparateReference(
            lambda: _load_reference(config, choice, policy),
            num_bytes=max(
                sum(tensor.numel() * tensor.element_size() for tensor in model.parameters()),
                sum(file.stat().st_size for file in choice.model_path.glob("*.safetensors")),
            ),
            num_trainable=sum(tensor.numel() for tensor in policy.trainable.values()),
        )
    _check_head(policy, base, probe[0])
    return policy


def _load_reference(config: RunConfig, choice: ReferenceChoice, policy: Policy) -> Policy:
    """The reference as a model of its own, in the policy's precision, in a layout that is right for the same pairs."""
    placement = policy.scorer.placement
    base = load_base(dataclasses.replace(config, model_path=str(choice.model_path)), placement)
    if config.finetuning_type == "full" or choice.start is None:
        model = whole_model(base, choice.start, choice.model_path)
    else:
        model = frozen_adapter(base, choice.start, choice.model_path)
    reference = _computing(config, placement, base, model.eval())
    reference.reference_by = "itself"
    if reference.head.weight.shape[0] != policy.head.weight.shape[0]:
        raise other_vocabulary(choice.model_path)
    _check_head(reference, base, policy.pairs[0])
    use_fast_layout(reference, policy.pairs)
    return reference


def _computing(config: RunConfig, placement: Placement, base: Any, model: Any) -> Policy:
    decoder, head = parts(base)
    if placement.world.lockstep:
        divide_frozen_weights(decoder, placement.device, placement.world)
    if config.quantization == "none":  # what is quantised lies on its device already
        model.to(placement.device)
    if not (placement.exact and config.finetuning_type == "full"):  # a reference rounds as what is trained
        widen(decoder)
    if head.weight.dtype != placement.dtype:
        head = dataclasses.replace(head, compute_dtype=placement.dtype)
    numerics = " ".join(
        ([] if placement.exact else [FLOAT32_BETWEEN])  # a reference that rounded otherwise is another
        + ([] if config.finetuning_type == "lora" else [config.finetuning_type])
        + ([] if config.quantization == "none" else [config.quantization])
        + ([BY_ONEDNN] if placement.device.type == "cpu" and prefers_onednn() else [])
    )
    return Policy(
        model, Scorer(model, decoder, padded_states, placement), head, "", "", "", numerics=numerics
    )


def use_fast_layout(policy: Policy, pairs: Sequence[TokenizedPair]) -> str:
    """Switch to packed pairs if the model gives the same with them. Says which layout runs, and why."""
    base, placement = policy.base, policy.scorer.placement
    before = base.config._attn_implementation
    decoder, device = policy.scorer.decoder, placement.device
    with policy.inference(), placement.autocast():
        expected = padded_states(decoder, tried(pairs), device)
        use_shared_prefix(base)
        layout, reason = choose_layout(decoder, pairs, device, dtype=placement.dtype, expected=expected)
    policy.scorer.layout, policy.pairs = layout, pairs
    if not reason:
        if any(len(pair.rejected) for pair in pairs):
            return "Each prompt is computed once for both of its answers."
        return "Examples are computed in one row, without padding."
    base.set_attn_implementation(before)
    return f"Each prompt is computed once per answer, the slower way: {reason}."


def _check_head(policy: Policy, base: Any, pair: TokenizedPair) -> None:
    """The model's own logits against ours, once: a head that does more than ours is refused."""
    ids = torch.from_numpy(pair.prompt[-32:].astype("int64"))[None].to(policy.scorer.placement.device)
    size = policy.head.weight.shape[0]
    if int(max(part.max() for part in (pair.prompt, pair.chosen, pair.rejected) if len(part))) >= size:
        raise RefusedError(
            f"The tokenizer has more tokens than the base model in {base.name_or_path}.",
            "Download the base model again, or choose another.",
        )
    with policy.inference(), policy.scorer.placement.autocast():
        theirs = base(input_ids=ids, use_cache=False).logits[0].float()
        # Called by itself, as training calls it: what a base does before its decoder would show here.
        states = policy.scorer.decoder(input_ids=ids, use_cache=False).last_hidden_state[0]
    with policy.inference():
        ours = policy.head.logits(states)
    if not torch.isfinite(theirs).all():
        raise RefusedError(
            f"The base model in {base.name_or_path} answers with numbers that are not finite: its weights are damaged.",
            "Download the base model again, or choose another.",
        )
    if float((ours - theirs).abs().max()) > (PROBE_TOLERANCE if policy.scorer.placement.exact else 0.5):
        raise unknown_head(base)
