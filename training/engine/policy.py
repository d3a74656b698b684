"""The model that is trained: a frozen base, its adapter, and the reference that the policy starts from.

Knows peft and transformers; knows nothing of pairs' meaning, losses or files of a run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from training.activation_memory import ActivationPlan
from training.contract import RunConfig, file_sha256
from training.engine.data import TokenizedPair
from training.engine.distributed import ALONE, World
from training.engine.errors import RefusedError
from training.engine.logps import Head
from training.engine.packed import choose_layout, tried, use_shared_prefix
from training.engine.plain import CompletionStates, Layout, padded_states
from training.engine.routing import recorded_routing
from training.engine.sharding import divide_frozen_weights

POLICY, REFERENCE = "default", "reference"  # adapter names in peft
PROBE_TOLERANCE = 1e-3  # nats; layouts and heads that differ by more are wrong, not rounded


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the model computes and in what."""

    device: torch.device
    dtype: torch.dtype
    world: World = ALONE

    @classmethod
    def choose(cls, config: RunConfig, world: World = ALONE) -> Placement:
        cuda = torch.cuda.is_available()
        if config.device not in {"auto", "cpu", "cuda"}:
            raise RefusedError(f"The device {config.device!r} is not known.", "Use auto, cpu or cuda.")
        if config.device == "cuda" and not cuda:
            raise RefusedError("This machine has no usable CUDA device.", "Choose the device auto or cpu.")
        on_cuda = cuda and config.device != "cpu"
        bf16 = on_cuda and torch.cuda.is_bf16_supported()
        names = {"auto": "bfloat16" if bf16 else "float32", "float32": "float32", "bfloat16": "bfloat16"}
        if config.dtype not in names:
            raise RefusedError(f"The dtype {config.dtype!r} is not known.", "Use auto, float32 or bfloat16.")
        if config.dtype == "bfloat16" and on_cuda and not bf16:
            raise RefusedError("This GPU has no bfloat16.", "Choose the dtype auto or float32.")
        device = torch.device("cpu")
        if on_cuda:
            device = torch.device("cuda", world.local_rank)
            torch.cuda.set_device(device)
        return cls(device, getattr(torch, names[config.dtype]), world)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def exact(self) -> bool:
        return self.dtype == torch.float32

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=not self.exact)


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
    """Base + adapter. `reference()` computes as the model that training started from."""

    model: Any  # PeftModel
    scorer: Scorer
    head: Head
    weights_sha256: str
    has_reference_adapter: bool
    reference_sentence: str
    activations: ActivationPlan | None = None

    @property
    def layout_name(self) -> str:
        return getattr(self.scorer.layout, "__name__", "")

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: tensor for name, tensor in self.model.named_parameters() if tensor.requires_grad}

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """No gradient, no dropout, and the adapter that training started from, or none."""
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                if self.has_reference_adapter:
                    self._activate(REFERENCE)
                    yield
                else:
                    with self.model.disable_adapter():
                        yield
        finally:
            if self.has_reference_adapter:
                self._activate(POLICY)
            self.model.train(was_training)

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train(was_training)

    def _activate(self, name: str) -> None:
        """peft makes the active adapter trainable: the reference must stay frozen."""
        self.model.set_adapter(name, inference_mode=name == REFERENCE)


def load_tokenizer(config: RunConfig) -> Any:
    """The tokenizer of the model folder; refuses one without a chat template."""
    from transformers import AutoTokenizer

    folder = Path(config.model_path)
    if not (folder / "config.json").is_file():
        raise RefusedError(
            f"The base model's folder {folder.name!r} has no config.json.", "Choose the base model again."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise RefusedError(
            f"The tokenizer of the base model cannot be read: {_first_line(error)}",
            "Download the base model again, or choose another.",
        ) from error
    if config.chat_template_path:
        tokenizer.chat_template = Path(config.chat_template_path).read_text(encoding="utf-8")
    if not tokenizer.chat_template:
        raise RefusedError(
            "The base model has no chat template, so its conversations cannot be written the way it expects.",
            "Choose an instruct model, or put a chat_template.jinja file into the model's folder.",
        )
    return tokenizer


def load_policy(config: RunConfig, placement: Placement, probe: Sequence[TokenizedPair]) -> Policy:
    """Base weights, adapter, reference; the layout is the fast one where it is right for the model."""
    base = _load_base(config, placement)
    decoder, head = _parts(base)
    torch.manual_seed(config.seed)  # the adapter's first weights
    model = _continue_adapter(base, config) if config.adapter_path else _new_adapter(base, config)
    if placement.world.lockstep:
        divide_frozen_weights(decoder, placement.device, placement.world)
    model.to(placement.device)
    name = config.base_model_name or Path(config.model_path).name
    policy = Policy(
        model=model,
        scorer=Scorer(model, decoder, padded_states, placement),
        head=head,
        weights_sha256=_weights_sha256(config),
        has_reference_adapter=bool(config.adapter_path),
        reference_sentence=(
            f"The reference is {name} with the adapter that training starts from."
            if config.adapter_path
            else f"The reference is {name}."
        ),
    )
    _check_head(policy, base, probe[0])
    return policy


def use_fast_layout(policy: Policy, pairs: Sequence[TokenizedPair]) -> str:
    """Switch to packed pairs if the model gives the same with them. Says which layout runs, and why."""
    base, placement = policy.model.get_base_model(), policy.scorer.placement
    before = base.config._attn_implementation
    decoder, device = policy.scorer.decoder, placement.device
    with policy.reference(), placement.autocast():
        expected = padded_states(decoder, tried(pairs), device)
        use_shared_prefix(base)
        layout, reason = choose_layout(decoder, pairs, device, dtype=placement.dtype, expected=expected)
    policy.scorer.layout = layout
    if not reason:
        if any(len(pair.rejected) for pair in pairs):
            return "Each prompt is computed once for both of its answers."
        return "Examples are computed in one row, without padding."
    base.set_attn_implementation(before)
    return f"Each prompt is computed once per answer, the slower way: {reason}."


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300]


def _load_base(config: RunConfig, placement: Placement) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        settings = AutoConfig.from_pretrained(
            config.model_path, local_files_only=True, trust_remote_code=False
        )
        capped = getattr(settings.get_text_config(), "attn_logit_softcapping", None) is not None
        base = AutoModelForCausalLM.from_pretrained(
            config.model_path,
            config=settings,
            dtype=placement.dtype,
            attn_implementation="eager" if capped else None,  # SDPA cannot cap; None: SDPA where it is right
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except MemoryError:
        raise
    except Exception as error:
        raise RefusedError(
            f"The base model cannot be loaded: {_first_line(error)}",
            "Download the base model again, or choose another.",
        ) from error
    base.requires_grad_(False)
    base.config.use_cache = False
    if not placement.exact:
        # Frozen weights in bfloat16 halve the memory; a float32 residual stream keeps most of the exactness.
        base.get_input_embeddings().register_forward_hook(lambda _module, _inputs, output: output.float())
    return base


def _parts(base: Any) -> tuple[nn.Module, Head]:
    """The decoder without its projection, and the projection with what the architecture does to logits."""
    decoder = getattr(base, base.base_model_prefix, None)
    output = base.get_output_embeddings()
    if decoder is None or decoder is base or not isinstance(output, nn.Linear):
        raise _unknown_head(base)
    text = base.config.get_text_config()
    scale = float(getattr(text, "logit_scale", None) or 1.0) / float(
        getattr(text, "logits_scaling", None) or 1.0
    )
    softcap = float(getattr(text, "final_logit_softcapping", None) or 0.0)
    return decoder, Head(output.weight, output.bias, scale, softcap)


def _unknown_head(base: Any) -> RefusedError:
    return RefusedError(
        f"Models of the type {base.config.model_type!r} have an output layer that is not known here.",
        "Choose a decoder model such as Llama, Qwen, Mistral, Gemma or SmolLM.",
    )


def _check_head(policy: Policy, base: Any, pair: TokenizedPair) -> None:
    """The model's own logits against ours, once: a head that does more than ours is refused."""
    ids = torch.from_numpy(pair.prompt[-32:].astype("int64"))[None].to(policy.scorer.placement.device)
    size = policy.head.weight.shape[0]
    if int(max(part.max() for part in (pair.prompt, pair.chosen, pair.rejected) if len(part))) >= size:
        raise RefusedError(
            "The tokenizer has more tokens than the base model.",
            "Download the base model again, or choose another.",
        )
    with policy.reference(), policy.scorer.placement.autocast():
        theirs = base(input_ids=ids, use_cache=False).logits[0].float()
        ours = policy.head.logits(policy.scorer.decoder(input_ids=ids, use_cache=False).last_hidden_state[0])
    if not torch.isfinite(theirs).all():
        raise RefusedError(
            "The base model answers with numbers that are not finite: its weights are damaged.",
            "Download the base model again, or choose another.",
        )
    if float((ours - theirs).abs().max()) > (PROBE_TOLERANCE if policy.scorer.placement.exact else 0.5):
        raise _unknown_head(base)


def _new_adapter(base: Any, config: RunConfig) -> Any:
    from peft import LoraConfig, get_peft_model

    try:
        return get_peft_model(
            base,
            LoraConfig(
                task_type="CAUSAL_LM",
                r=config.lora_r,
                lora_alpha=config.lora_alpha,
                lora_dropout=config.lora_dropout,
                target_modules=list(config.target_modules) or "all-linear",
            ),
        )
    except ValueError as error:
        raise RefusedError(
            f"The adapter cannot be put on this model: {_first_line(error)}",
            "Choose target_modules that the model has.",
        ) from error


def _continue_adapter(base: Any, config: RunConfig) -> Any:
    """The policy starts as base + adapter; a frozen copy of the same adapter is the reference."""
    from peft import LoraConfig, PeftConfig, PeftModel

    folder = Path(config.adapter_path)
    if not (folder / "adapter_model.safetensors").is_file():
        raise RefusedError(
            "The adapter to start from has no adapter_model.safetensors.",
            "Choose another model to start from.",
        )
    try:
        settings = PeftConfig.from_pretrained(str(folder))
        if not isinstance(settings, LoraConfig):
            raise ValueError(f"it is of the kind {settings.peft_type}, not LoRA")
        settings.lora_dropout = config.lora_dropout
        settings.inference_mode = False
        model = PeftModel.from_pretrained(
            base, folder, adapter_name=POLICY, is_trainable=True, config=settings
        )
        model.load_adapter(folder, REFERENCE, is_trainable=False)
        _check_adapter(model, folder)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise RefusedError(
            f"The adapter to start from does not fit the base model: {_first_line(error)}",
            "Choose the base model that the adapter was trained on.",
        ) from error
    model.set_adapter(POLICY)
    return model


def _check_adapter(model: Any, folder: Path) -> None:
    """peft only warns about weights that it could not place."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        names = set(file.keys())
    placed = set(get_peft_model_state_dict(model, adapter_name=POLICY, save_embedding_layers=False))
    if names != placed:
        raise ValueError(f"{len(names ^ placed)} of its weights have no place in the model")


def _weights_sha256(config: RunConfig) -> str:
    """One hash over everything that makes the reference: base weights, its configuration, the adapter."""
    folders = [Path(config.model_path)] + ([Path(config.adapter_path)] if config.adapter_path else [])
    total = hashlib.sha256()
    for folder in folders:
        for path in sorted(
            [*folder.glob("*.safetensors"), *folder.glob("config.json"), *folder.glob("adapter_config.json")]
        ):
            total.update(f"{path.name} {file_sha256(path)}\n".encode())
        total.update(b"--\n")
    return total.hexdigest()
