"""The rotary frequencies of wide heads, as a stock configuration says them.

A head of W dimensions that turns at the base's frequencies, each several times, is RoPE of type "longrope": every
stock frequency is divided by a factor of its own, so that stock / wanted frequency as the factor gives any list.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..families import Family
from ..heads import SharedShape


@dataclass(frozen=True)
class WideRope:
    """What the longrope parameters of wide heads are made of.

    Attributes:
        theta: base of the stock frequencies.
        short_factor, long_factor: W_r / 2 factors each, for inputs up to `original_max_position_embeddings` and
            beyond.
        original_max_position_embeddings: where the one ends and the other begins; they are equal but for a base that
            is of type longrope itself.
        attention_factor: of the plain model's cosines and sines.
        scores_scale: what the queries' rotary part has to be multiplied with beside it.
    """

    theta: float
    short_factor: list[float]
    long_factor: list[float]
    original_max_position_embeddings: int
    attention_factor: float
    scores_scale: float


def refusal_of_rope(config: PretrainedConfig) -> str | None:
    """Why no list of frequencies stands for a configuration's RoPE; None where one does."""
    parameters = config.rope_parameters
    if "rope_theta" not in parameters:
        return "its layers have rotary embeddings of different types"
    rope_type = parameters.get("rope_type", "default")
    if rope_type not in ("default", "linear", "llama3", "yarn", "longrope"):
        return f"its RoPE is of type {rope_type!r}, whose frequencies depend on the length of the input"
    return None


def rope_of(config: PretrainedConfig, heads: SharedShape) -> WideRope:
    """Factors that give each rotary pair of a shared head the base's frequency it stands for."""
    parameters = config.rope_parameters
    theta = parameters["rope_theta"]
    limit = config.max_position_embeddings
    if parameters.get("rope_type", "default") != "longrope":
        wanted, scaling = _base_frequencies(config, heads, None)
        factors = _factors(wanted[list(heads.frequencies)], theta)
        # Engines derive an attention factor of 1 from equal limits, whatever is written: the base's goes into the
        # queries, once for the queries and once for the keys.
        return WideRope(theta, factors, factors, limit, 1.0, scaling**2)
    limit = parameters["original_max_position_embeddings"]
    short, scaling = _base_frequencies(config, heads, None)
    long, _ = _base_frequencies(config, heads, limit + 1)
    pairs = list(heads.frequencies)
    return WideRope(theta, _factors(short[pairs], theta), _factors(long[pairs], theta), limit, scaling, 1.0)


def _base_frequencies(config: PretrainedConfig, heads: SharedShape, length: int | None) -> tuple[Tensor, float]:
    """Inverse frequencies (R / 2,) of the base, in radians per position, and the factor of its cosines and sines."""
    rope_type = config.rope_parameters.get("rope_type", "default")
    if rope_type == "default":
        return _stock_frequencies(heads.base.rotary_dim, config.rope_parameters["rope_theta"]), 1.0
    frequencies, scaling = ROPE_INIT_FUNCTIONS[rope_type](config, device="cpu", seq_len=length)
    return frequencies, float(scaling)


def _stock_frequencies(dimensions: int, theta: float) -> Tensor:
    """theta^(-2 j / dimensions), in the float32 in which transformers computes them."""
    exponents = torch.arange(0, dimensions, 2, dtype=torch.int64).float() / dimensions
    return 1.0 / theta**exponents


def _factors(wanted: Tensor, theta: float) -> list[float]:
    """The factor of each stock frequency that gives the wanted one, (W_r / 2,), as exactly as float32 can.

    transformers computes 1 / (factor * theta^(2 j / W_r)) in float32. Of the factors next to the quotient the one
    whose result is nearest is taken: an error of one part in 10^7 would be seen thousands of positions on.
    """
    exponents = torch.arange(0, 2 * len(wanted), 2, dtype=torch.int64).float() / (2 * len(wanted))
    powers = theta**exponents
    factors = (1.0 / (wanted.double() * powers.double())).float()
    best, least = factors, torch.full_like(wanted, torch.inf)
    candidate = factors
    for _ in range(4):
        candidate = torch.nextafter(candidate, torch.zeros_like(candidate))
    for _ in range(9):
        error = (1.0 / (candidate * powers) - wanted).abs()
        best = torch.where(error < least, candidate, best)
        least = torch.minimum(error, least)
        candidate = torch.nextafter(candidate, torch.full_like(candidate, torch.inf))
    return [float(factor) for factor in best]


def wide_config(config: PretrainedConfig, heads: SharedShape, rope: WideRope, family: Family) -> PretrainedConfig:
    """The configuration with heads of W dimensions at their frequencies, and everything else as it is."""
    wide = copy.deepcopy(config)
    wide.head_dim = heads.head_dim
    kept = {name: value for name, value in config.rope_parameters.items() if name in family.rope_fields}
    if "partial_rotary_factor" in kept:
        # The same fraction of a wider head, which the class rounds down, may be another number than W_r.
        kept["partial_rotary_factor"] = heads.rotary_dim / heads.head_dim
    wide.rope_parameters = kept | {
        "rope_type": "longrope",
        "rope_theta": rope.theta,
        "short_factor": rope.short_factor,
        "long_factor": rope.long_factor,
        "original_max_position_embeddings": rope.original_max_position_embeddings,
        "factor": config.max_position_embeddings / rope.original_max_position_embeddings,
        "attention_factor": rope.attention_factor,
    }
    if hasattr(wide, "original_max_position_embeddings"):
        wide.original_max_position_embeddings = rope.original_max_position_embeddings
    return wide
