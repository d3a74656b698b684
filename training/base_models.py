"""The catalogue of base models: facts of models people start from, and what the estimates need of them.

Pure: knows no Django, no torch and no disk. What a folder says about itself is read by
`training.model_folder`,
rows are kept by `training.services.base_models`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from training.estimates import ModelShape

STARTER_FOLDER = "SmolLM2-135M-Instruct"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)

KINDS: dict[str, tuple[str, str]] = {
    "instruct": (
        "Instruct",
        "Start here for most conversational uses. An instruct model already follows instructions; preference "
        "tuning polishes how it answers.",
    ),
    "thinking": (
        "Thinking",
        "For tasks that need step-by-step reasoning. The model thinks aloud before it answers, so your pairs "
        "should show the reasoning you want, too.",
    ),
    "base": (
        "Base (dense)",
        "For the most freedom to customise. Little or no chat training is in the way; teach the format with "
        "supervised fine-tuning first if your conversations look unlike plain text.",
    ),
    "moe": (
        "MoE",
        "Mixture of experts: for production that needs both high quality and speed. All experts must be "
        "in memory, "
        "but only a few work on each token. The adapter is trained on the attention layers.",
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CatalogueModel:
    """One known model. Numbers are those of its published config; parameters are counted from them."""

    hub_id: str
    kind: str
    licence: str
    context_length: int
    num_parameters: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    note: str = ""
    gated: bool = False
    has_chat_template: bool = True
    num_experts: int = 0
    experts_per_token: int = 0
    hidden_act: str = "silu"
    is_starter: bool = False

    @property
    def active_parameters(self) -> int:
        """Parameters that work on one token: all but the experts that sit it out."""
        idle = max(0, self.num_experts - self.experts_per_token)
        return self.num_parameters - self.num_layers * idle * 3 * self.hidden_size * self.intermediate_size

    @property
    def lora_units(self) -> dict[str, int]:
        h, i = self.hidden_size, self.intermediate_size
        a, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        units = {"q_proj": h + a, "k_proj": h + kv, "v_proj": h + kv, "o_proj": a + h}
        if not self.num_experts:  # experts are fused tensors, which carry no adapter
            units |= {"gate_proj": h + i, "up_proj": h + i, "down_proj": i + h}
        return {name: unit * self.num_layers for name, unit in units.items()}

    def facts(self) -> dict[str, Any]:
        """What a row of the database holds about this model before it is on disk."""
        return {
            "num_parameters": self.num_parameters,
            "active_parameters": self.active_parameters,
            "context_length": self.context_length,
            "licence": self.licence,
            "gated": self.gated,
            "note": self.note,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_layers": self.num_layers,
            "attention_width": self.num_heads * self.head_dim,
            "vocab_size": self.vocab_size,
            "experts_per_token": self.experts_per_token or 1,
            "num_experts": self.num_experts,
            "hidden_act": self.hidden_act,
            "linear_modules": list(self.lora_units),
            "lora_units": self.lora_units,
            "has_chat_template": self.has_chat_template,
            "weights_bytes": self.num_parameters * 2,
        }


def _shape(
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    vocab: int,
    total: int,
) -> dict[str, int]:
    return {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_layers": layers, "num_heads": heads,
        "num_kv_heads": kv_heads, "head_dim": head_dim, "vocab_size": vocab, "num_parameters": total,
    }  # fmt: skip


_SMOL_135M = _shape(576, 1536, 30, 9, 3, 64, 49152, 134_515_008)
_SMOL_360M = _shape(960, 2560, 32, 15, 5, 64, 49152, 361_821_120)
_SMOL_1_7B = _shape(2048, 8192, 24, 32, 32, 64, 49152, 1_711_376_384)
_QWEN25_05B = _shape(896, 4864, 24, 14, 2, 64, 151936, 494_032_768)
_QWEN25_15B = _shape(1536, 8960, 28, 12, 2, 128, 151936, 1_543_714_304)
_QWEN25_7B = _shape(3584, 18944, 28, 28, 4, 128, 152064, 7_615_616_512)
_DISTILL_15B = _shape(1536, 8960, 28, 12, 2, 128, 151936, 1_777_088_000)
_QWEN3_06B = _shape(1024, 3072, 28, 16, 8, 128, 151936, 596_049_920)
_QWEN3_17B = _shape(2048, 6144, 28, 16, 8, 128, 151936, 1_720_574_976)
_QWEN3_4B = _shape(2560, 9728, 36, 32, 8, 128, 151936, 4_022_468_096)
_QWEN3_8B = _shape(4096, 12288, 36, 32, 8, 128, 151936, 8_190_735_360)
_LLAMA_1B = _shape(2048, 8192, 16, 32, 8, 64, 128256, 1_235_814_400)
_LLAMA_3B = _shape(3072, 8192, 28, 24, 8, 128, 128256, 3_212_749_824)
_GEMMA_1B = _shape(1152, 6912, 26, 4, 1, 256, 262144, 999_885_952)
_MISTRAL_7B = _shape(4096, 14336, 32, 32, 8, 128, 32768, 7_248_023_552)
_SMOL3_3B = _shape(2048, 11008, 36, 16, 4, 128, 128256, 3_075_098_624)
_QWEN3_30B = _shape(2048, 768, 48, 32, 4, 128, 151936, 30_532_122_624)
_OLMOE_7B = _shape(2048, 1024, 16, 16, 16, 128, 50304, 6_919_161_856)

_APACHE = "Apache-2.0"
_LLAMA = "Llama 3.2 Community"
_GEMMA = "Gemma Terms of Use"
_128K, _256K = 131_072, 262_144


def _model(
    hub_id: str, kind: str, licence: str, context: int, shape: Mapping[str, Any], **more: Any
) -> CatalogueModel:
    return CatalogueModel(
        hub_id=hub_id, kind=kind, licence=licence, context_length=context, **shape, **more
    )  # fmt: skip


CATALOGUE: tuple[CatalogueModel, ...] = (
    _model(
        "HuggingFaceTB/SmolLM2-135M-Instruct", "instruct", _APACHE, 8192, _SMOL_135M, is_starter=True,
        note="Comes with the studio and trains on any machine: the quickest way to see the whole road once.",
    ),
    _model(
        "Qwen/Qwen3-4B-Instruct-2507", "instruct", _APACHE, _256K, _QWEN3_4B,
        note="A good first choice on a GPU: answers directly, many languages.",
    ),
    _model("Qwen/Qwen2.5-0.5B-Instruct", "instruct", _APACHE, 32768, _QWEN25_05B),
    _model("Qwen/Qwen2.5-1.5B-Instruct", "instruct", _APACHE, 32768, _QWEN25_15B),
    _model("Qwen/Qwen2.5-7B-Instruct", "instruct", _APACHE, 32768, _QWEN25_7B),
    _model("HuggingFaceTB/SmolLM2-360M-Instruct", "instruct", _APACHE, 8192, _SMOL_360M),
    _model("HuggingFaceTB/SmolLM2-1.7B-Instruct", "instruct", _APACHE, 8192, _SMOL_1_7B),
    _model("meta-llama/Llama-3.2-1B-Instruct", "instruct", _LLAMA, _128K, _LLAMA_1B, gated=True),
    _model("meta-llama/Llama-3.2-3B-Instruct", "instruct", _LLAMA, _128K, _LLAMA_3B, gated=True),
    _model(
        "google/gemma-3-1b-it", "instruct", _GEMMA, 32768, _GEMMA_1B, gated=True, hidden_act="gelu_pytorch_tanh"
    ),
    _model("mistralai/Mistral-7B-Instruct-v0.3", "instruct", _APACHE, 32768, _MISTRAL_7B),
    _model(
        "Qwen/Qwen3-4B-Thinking-2507", "thinking", _APACHE, _256K, _QWEN3_4B,
        note="Always thinks before it answers; strong for its size.",
    ),
    _model("HuggingFaceTB/SmolLM3-3B", "thinking", _APACHE, 65536, _SMOL3_3B, note="Thinking can be "
                                                                                   "switched off."),
    _model("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "thinking", "MIT", _128K, _DISTILL_15B),
    _model("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "thinking", "MIT", _128K, _QWEN25_7B),
    _model(
        "Qwen/Qwen3-4B", "base", _APACHE, 40960, _QWEN3_4B,
        note="Dense, with a switchable thinking mode: room to shape it your way.",
    ),
    _model("Qwen/Qwen3-4B-Base", "base", _APACHE, 32768, _QWEN3_4B, note="Pretrained only."),
    _model("Qwen/Qwen3-0.6B", "base", _APACHE, 40960, _QWEN3_06B),
    _model("Qwen/Qwen3-1.7B", "base", _APACHE, 40960, _QWEN3_17B),
    _model("Qwen/Qwen3-8B", "base", _APACHE, 40960, _QWEN3_8B),
    _model(
        "Qwen/Qwen3-30B-A3B", "moe", _APACHE, 40960, _QWEN3_30B, num_experts=128, experts_per_token=8,
        note="30B parameters, 3B at work on each token.",
    ),
    _model(
        "Qwen/Qwen3-30B-A3B-Instruct-2507", "moe", _APACHE, _256K, _QWEN3_30B,
        num_experts=128, experts_per_token=8,
    ),
    _model(
        "allenai/OLMoE-1B-7B-0125-Instruct", "moe", _APACHE, 4096, _OLMOE_7B,
        num_experts=64, experts_per_token=8,
        note="Open in everything, training data included.",
    ),
)  # fmt: skip
STARTER = next(model for model in CATALOGUE if model.is_starter)


def shape_of(facts: Mapping[str, Any]) -> ModelShape | None:
    """The numbers the estimates need, or None when the facts do not hold them."""
    try:
        return ModelShape(
            num_parameters=int(facts["num_parameters"]),
            active_parameters=int(facts.get("active_parameters") or 0),
            hidden_size=int(facts["hidden_size"]),
            intermediate_size=int(facts["intermediate_size"]),
            num_layers=int(facts["num_layers"]),
            attention_width=int(facts["attention_width"]),
            vocab_size=int(facts["vocab_size"]),
            lora_units={str(name): int(unit) for name, unit in facts["lora_units"].items()},
            experts_per_token=int(facts.get("experts_per_token") or 1),
            gated_silu=(
                facts.get("hidden_act") in {"silu", "swish"}
                and not facts.get("num_experts")
                and {"gate_proj", "up_proj", "down_proj"} <= set(facts["lora_units"])
            ),
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def linear_modules(facts: Mapping[str, Any]) -> tuple[str, ...]:
    """The names a LoRA adapter can be put on, in the order of a layer."""
    names = facts.get("linear_modules")
    return tuple(str(name) for name in names) if isinstance(names, list) else ()


def hub_id_problem(hub_id: str) -> str:
    """Why this is not the name of a model on the Hub, or ""."""
    if not HUB_ID.fullmatch(hub_id) or ".." in hub_id or "--" in hub_id:
        return (
            "A Hub id looks like owner/model, for example Qwen/Qwen3-4B-Instruct-2507: letters, digits, "
            "dots, "
            "dashes and underscores, with one slash."
        )
    return ""


def catalogue_model(hub_id: str) -> CatalogueModel | None:
    return next((model for model in CATALOGUE if model.hub_id.lower() == hub_id.lower()), None)


def kinds_of(models: Iterable[CatalogueModel]) -> dict[str, list[CatalogueModel]]:
    """The models by kind, in the order of the page."""
    return {kind: [model for model in models if model.kind == kind] for kind in KINDS}
