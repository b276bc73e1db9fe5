"""Tiny random models of every supported family, and adapters on them with unequal groups and no parameter at rest.

The bases that most tests use come first: three of them, small, that between them have every feature of the adapter
(GQA, biases, partial rotary). The table of every family's features is `CASES`. Wrapping changes a base in place, so
each call makes a new one.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass, field
from functools import cache

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from asymgqa_peft import AsymGQAConfig

CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
"""What forward calls its cache: transformers 5.24 has renamed it."""
VOCAB = 101
LAYERS = 2
HEADS = 8


def tiny_config(model_type: str, **changes):
    """The stock configuration of a family; a change to None leaves the family's own default."""
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 96,
        "head_dim": 8,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "pad_token_id": 0,
        **changes,
    }
    return AutoConfig.for_model(model_type, **{name: v for name, v in values.items() if v is not None})


def random_model(config, seed: int = 0, attention: str = "eager") -> PreTrainedModel:
    """A stock model whose every parameter is random and large enough to matter."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    generator = torch.Generator().manual_seed(seed)
    # Tied embeddings stay small: with large ones a model repeats its input whatever its attention does.
    large = None if config.tie_word_embeddings else model.get_input_embeddings().weight
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2:
                parameter.add_(0.2 * noise)
            elif parameter is large:
                parameter.copy_(noise)
            else:
                parameter.copy_(parameter.shape[1] ** -0.5 * noise)
    model.generation_config.eos_token_id = None  # generation tests want a fixed length
    return model


def tiny_llama(**changes) -> PreTrainedModel:
    """MHA: E 48, H = K = 6, D 8."""
    sizes = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 6}
    return random_model(tiny_config("llama", **sizes | changes), attention="sdpa")


def tiny_qwen2(**changes) -> PreTrainedModel:
    """GQA base with K/V bias: E 64, H 8, K 4, D 8."""
    sizes = {"hidden_size": 64, "num_key_value_heads": 4}
    return random_model(tiny_config("qwen2", **sizes | changes), attention="sdpa")


def tiny_phi(**changes) -> PreTrainedModel:
    """Partial rotary, biases everywhere, `dense` for o_proj: E 48, H = K = 6, D 8, R 4."""
    sizes = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 6, "partial_rotary_factor": 0.5}
    return random_model(tiny_config("phi", **sizes | changes), attention="sdpa")


BASES = {"llama": tiny_llama, "qwen2": tiny_qwen2, "phi": tiny_phi}
# Unequal groups of a base's KV heads, layer by layer; heads in order, as an adapter saves them.
GROUPS_OF_6 = [[[0, 2, 3, 5], [1, 4]], [[1, 2, 3, 4], [0, 5]]]
GROUPS_OF_4 = [[[0, 2, 3], [1]], [[0, 1, 3], [2]]]
GROUPS = {"llama": GROUPS_OF_6, "qwen2": GROUPS_OF_4, "phi": GROUPS_OF_6}
OTHER_GROUPS_OF_6 = [[[0, 1, 5], [3], [2, 4]], [[2], [0, 3, 4], [1, 5]]]
OTHER_GROUPS_OF_4 = [[[2], [0], [1, 3]], [[0, 3], [1], [2]]]
OTHER_GROUPS = {"llama": OTHER_GROUPS_OF_6, "qwen2": OTHER_GROUPS_OF_4, "phi": OTHER_GROUPS_OF_6}


def adapter_config(groups: list | None = None, **changes) -> AsymGQAConfig:
    """A config with the groups of every layer, or with 2 groups that are still to be chosen."""
    fields = {"num_key_value_heads": 2, "r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}
    if groups is not None:
        fields |= {"num_key_value_heads": len(groups[0]), "head_groups": groups}
    return AsymGQAConfig(**fields | changes)


def wrap(base: PreTrainedModel, groups: list | None = None, seed: int = 1, **changes) -> PeftModel:
    """An adapter on `base` (changed in place), every parameter of it random: no gain, mix, bias or LoRA at rest."""
    config = adapter_config(groups, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # LoRA starts from the global generator
        model = get_peft_model(base, config).eval()
    perturb(model, seed)
    return model


def perturb(model: PeftModel, seed: int = 1) -> None:
    """Move every trainable parameter of the active adapter by noise of its own size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                scale = parameter.std().item() if parameter.numel() > 1 and parameter.std() > 0 else 0.2
                noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
                parameter.add_((max(scale, 0.05) * noise).to(parameter.dtype))


def train(model: torch.nn.Module, ids: torch.Tensor, steps: int = 5) -> list[float]:
    """The losses of a few steps of AdamW on one batch; the model stays in training mode."""
    optimiser = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses


def tensors(model: torch.nn.Module, part: str = "") -> dict[str, torch.Tensor]:
    """Copies of what a model holds under names with `part` in them; of everything by default."""
    return {name: value.clone() for name, value in model.state_dict().items() if part in name}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same names, of which there are some, with the same tensors to the last bit."""
    assert expected
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@torch.no_grad()
def logits(model: torch.nn.Module, **options) -> torch.Tensor:
    """(2, 11, V) in fp32, on fixed random tokens."""
    return model(input_ids=prompt(2, 11, seed=5), **options).logits.float()


MHA_GROUPS = [[[6, 1, 3, 0, 7], [5, 2], [4]], [[2], [7, 0, 5, 3, 6], [1, 4]]]
GQA_GROUPS = [[[3, 1], [0], [2]], [[1], [2], [3, 0]]]  # of the base's 4 KV heads
EQUAL_GROUPS = [[[6, 1], [3, 0], [5, 2], [7, 4]], [[2, 7], [0, 5], [3, 4], [1, 6]]]
HALVES = [[[6, 1, 3, 0], [5, 2, 7, 4]], [[2, 7, 0, 5], [3, 4, 1, 6]]]
SINGLE_GROUPS = [[[3], [1], [0], [2], [7], [5], [6], [4]], [[k] for k in range(8)]]
SHIFTED_THETA = {"rope_type": "default", "rope_theta": 500.0}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "short_factor": [1.0, 1.1, 1.3, 1.2],
    "long_factor": [1.0, 2.5, 3.0, 4.0],
    "original_max_position_embeddings": 8,
}


@dataclass(frozen=True)
class Case:
    """One row of the table: a stock configuration and groups of its KV heads, different in each of its two layers."""

    model_type: str
    overrides: dict = field(default_factory=dict)
    kv_heads: int = HEADS
    groups: list = field(default_factory=lambda: MHA_GROUPS)
    plain_class: str | None = None  # of the merged model; None: the base's
    plain_heads: tuple[int, int] | None = None  # its query and KV heads; None: slots of the largest group, groups
    head_dim: int | None = None  # of the shared heads; None: the base's

    @property
    def num_groups(self) -> int:
        """G."""
        return len(self.groups[0])

    @property
    def slots(self) -> int:
        """Query slots of the adapter: every group gets as many as the largest needs."""
        return self.num_groups * max(len(g) for layer in self.groups for g in layer) * (HEADS // self.kv_heads)

    @property
    def plain_counts(self) -> tuple[int, int]:
        """num_attention_heads and num_key_value_heads of the merged model."""
        return self.plain_heads or (self.slots, self.num_groups)


def _gqa(model_type: str, overrides: dict | None = None, **expected) -> Case:
    return Case(model_type, overrides or {}, 4, GQA_GROUPS, **expected)


BIAS = {"attention_bias": True}
SQUARE = {"hidden_size": 64, "head_dim": None}
GEMMA = {"head_dim": 12}
SLIDING = ["sliding_attention", "full_attention"]
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
GEMMA2 = {"sliding_window": 6, "query_pre_attn_scalar": 12, "attn_logit_softcapping": 20.0, **BIAS, **GEMMA}
GEMMA3 = {"sliding_window": 6, "layer_types": SLIDING, "query_pre_attn_scalar": 12, **BIAS, **GEMMA}
PHI = {"partial_rotary_factor": 0.5}
LONG = {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 8, **SQUARE}
STABLELM = {"use_qkv_bias": True, "partial_rotary_factor": 0.5, **SQUARE}
OLMO2 = {"rms_norm_eps": 0.3, **BIAS}  # so large that a norm over padded slots with the wrong epsilon would show
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 64, "enable_bias": True, **SQUARE}
BARE_OPT = {**OPT, "enable_bias": False, "layer_norm_elementwise_affine": False, "tie_word_embeddings": True}
NEOX = {"rotary_pct": 0.5, "rotary_emb_base": 500.0, "attention_bias": True, **SQUARE}
BARE_NEOX = {"attention_bias": False, "hidden_act": "gelu_new", "tie_word_embeddings": True}
ONE_GROUP = [[[6, 1, 3, 0, 7, 5, 2, 4]], [[2, 7, 0, 5, 3, 6, 1, 4]]]
TWO_TO_ONE = [[[6, 1, 3, 0], [5, 2], [4, 7]], [[2, 1], [7, 0, 5, 3], [6, 4]]]

CASES: dict[str, Case] = {
    "llama": Case("llama", {"rope_parameters": LLAMA3_ROPE}, plain_class="MistralForCausalLM"),
    "llama-gqa": _gqa("llama", {"rope_parameters": SHIFTED_THETA}, plain_class="MistralForCausalLM"),
    "llama-bias": Case("llama", {**BIAS, "mlp_bias": True}, plain_heads=(24, 3)),  # the least p >= 5 with 3 p | 96
    "llama-equal": Case("llama", SQUARE | {"tie_word_embeddings": True}, groups=EQUAL_GROUPS),
    "mistral": Case("mistral", {"sliding_window": 6}),
    "mistral-gqa": _gqa("mistral", {"sliding_window": 6}),
    "qwen2": Case("qwen2", QWEN_WINDOW),
    "qwen2-gqa": _gqa("qwen2", QWEN_WINDOW),
    "qwen2-full-gqa": _gqa("qwen2", plain_class="LlamaForCausalLM"),
    "qwen3": Case("qwen3", BIAS),
    "qwen3-gqa": _gqa("qwen3", BIAS),
    "gemma": Case("gemma", {**BIAS, **GEMMA}),
    "gemma-gqa": _gqa("gemma", {**BIAS, **GEMMA}),
    "gemma2": Case("gemma2", GEMMA2, plain_heads=(24, 3)),
    "gemma2-gqa": _gqa("gemma2", GEMMA2),
    "gemma3": Case("gemma3_text", GEMMA3, plain_heads=(24, 3)),
    "gemma3-gqa": _gqa("gemma3_text", GEMMA3),
    "phi": Case("phi", PHI),
    "phi-gqa": _gqa("phi", PHI),
    "stablelm": Case("stablelm", STABLELM, groups=TWO_TO_ONE, plain_heads=(8, 4)),  # sizes 4, 2, 2: gcd 2
    "stablelm-odd": Case("stablelm", STABLELM, plain_heads=(8, 8)),
    "stablelm-gqa": _gqa("stablelm", STABLELM, plain_heads=(8, 4)),
    "stablelm-equal": Case("stablelm", STABLELM, groups=EQUAL_GROUPS),
    "olmo": Case("olmo", BIAS),
    "olmo-gqa": _gqa("olmo", BIAS),
    "olmo-clipped": Case("olmo", {"clip_qkv": 0.7}),
    "olmo2": Case("olmo2", OLMO2),
    "olmo2-gqa": _gqa("olmo2", OLMO2),
    "olmo2-equal": Case("olmo2", OLMO2, groups=EQUAL_GROUPS),
    "olmo2-single": Case("olmo2", OLMO2, groups=SINGLE_GROUPS),  # G = K, listed out of order
    "phi3": Case("phi3", {"sliding_window": 6}),
    "phi3-gqa": _gqa("phi3", {"partial_rotary_factor": 0.5}),
    "phi3-equal": Case("phi3", groups=EQUAL_GROUPS),
    "llama-wide": Case("llama", {"rope_parameters": LLAMA3_ROPE}, plain_class="MistralForCausalLM", head_dim=16),
    "llama-wide-odd": Case("llama", {"rope_parameters": SHIFTED_THETA}, plain_class="MistralForCausalLM", head_dim=12),
    "llama-widest": Case("llama", SQUARE, groups=HALVES, plain_class="MistralForCausalLM", head_dim=32),
    "llama-wide-gqa": _gqa("llama", {"rope_parameters": LINEAR_ROPE}, plain_class="MistralForCausalLM", head_dim=16),
    "mistral-wide": Case("mistral", {"sliding_window": 6, "rope_parameters": YARN_ROPE}, head_dim=16),
    "qwen2-wide": Case("qwen2", QWEN_WINDOW, head_dim=16),
    "qwen2-wide-gqa": _gqa("qwen2", QWEN_WINDOW, head_dim=12),
    "qwen2-full-wide": Case("qwen2", groups=EQUAL_GROUPS, plain_class="LlamaForCausalLM", head_dim=16),
    "gemma-wide": Case("gemma", {**BIAS, **GEMMA}, head_dim=24),
    "gemma2-wide": Case("gemma2", GEMMA2, plain_heads=(24, 3), head_dim=24),
    "phi-wide": Case("phi", PHI, head_dim=16),
    "phi-wide-gqa": _gqa("phi", PHI, head_dim=12),
    "phi3-wide": Case("phi3", {"sliding_window": 6}, plain_class="MistralForCausalLM", head_dim=16),
    "phi3-wide-gqa": _gqa("phi3", plain_class="MistralForCausalLM", head_dim=16),
    "phi3-wide-long": Case(
        "phi3",
        LONG,
        HEADS,
        HALVES,
        plain_class="MistralForCausalLM",
        head_dim=16,
    ),
    "olmo-wide": Case("olmo", BIAS, head_dim=16),
    "qwen3-wide": Case("qwen3", {**BIAS, "rope_parameters": YARN_ROPE}, head_dim=16),
    "qwen3-wide-gqa": _gqa("qwen3", BIAS, head_dim=12),
    "olmo2-wide": Case("olmo2", {**OLMO2, "rope_parameters": LLAMA3_ROPE}, head_dim=12),
    "olmo2-wide-gqa": _gqa("olmo2", OLMO2, head_dim=16),
    "opt": Case("opt", OPT, plain_heads=(8, 8)),
    "opt-single": Case("opt", OPT, groups=ONE_GROUP, plain_class="GPTBigCodeForCausalLM"),
    "opt-bare": Case("opt", BARE_OPT, groups=ONE_GROUP, plain_class="GPTBigCodeForCausalLM"),
    "gpt_neox": Case("gpt_neox", NEOX, plain_class="PhiForCausalLM"),
    "gpt_neox-equal": Case("gpt_neox", NEOX | BARE_NEOX, groups=EQUAL_GROUPS, plain_class="PhiForCausalLM"),
    "gpt_neox-single": Case("gpt_neox", NEOX, groups=SINGLE_GROUPS, plain_class="PhiForCausalLM"),
    "gpt_neox-serial": Case("gpt_neox", NEOX | {"use_parallel_residual": False}, plain_heads=(8, 8)),
    "gpt_neox-wide": Case("gpt_neox", NEOX, plain_class="PhiForCausalLM", head_dim=16),
    "gpt_neox-wide-odd": Case(
        "gpt_neox", NEOX | {"rope_parameters": dict(YARN_ROPE)}, plain_class="PhiForCausalLM", head_dim=12
    ),
}


def config_of(case: Case):
    """The stock configuration of a case: 8 heads, head_dim not hidden_size / heads where that is allowed."""
    return tiny_config(case.model_type, num_key_value_heads=case.kv_heads, **case.overrides)


@cache
def stock(name: str) -> PreTrainedModel:
    """The untouched base of a case. Shared: do not change it."""
    return random_model(config_of(CASES[name]))


@cache
def _adapted(name: str) -> PeftModel:
    return wrap(copy.deepcopy(stock(name)), CASES[name].groups, head_dim=CASES[name].head_dim)


def adapted(name: str) -> PeftModel:
    """A fresh copy of a case's base with its random adapter."""
    return copy.deepcopy(_adapted(name))


def prompt(batch: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Random token ids (B, T), none of them the padding id 0."""
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(padding: int = 3, **kwargs) -> dict[str, torch.Tensor]:
    """Inputs whose first row starts with `padding` padding tokens."""
    input_ids = prompt(**kwargs)
    mask = torch.ones_like(input_ids)
    input_ids[0, :padding], mask[0, :padding] = 0, 0
    return {"input_ids": input_ids, "attention_mask": mask}
