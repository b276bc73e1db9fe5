"""The rotary frequencies of wide heads, as a stock configuration says them.

A head of W dimensions that turns at the base's frequencies, each several times, is RoPE of type "longrope": every
stock frequency is divided by a factor of its own, so that stock / wanted frequency as the factor gives any list.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..families import Family
from ..heads import SharedShape


def refusal_of_rope(config: PretrainedConfig) -> str | None:
    """Why no list of frequencies stands for a configuration's RoPE; None where one does."""
    parameters = config.rope_parameters
    if "rope_theta" not in parameters:
        return "its layers have rotary embeddings of different types"
    rope_type = parameters.get("rope_type", "default")
    if rope_type not in ("default", "linear", "llama3", "yarn", "longrope"):
        return f"its RoPE is of type {rope_type!r}, whose frequencies depend on the length of the input"
    return None


def wide_config(config: PretrainedConfig, heads: SharedShape, family: Family) -> tuple[PretrainedConfig, float]:
    """The configuration with heads of W dimensions at their frequencies, and everything else as it is.

    Returns:
        The configuration, and what the queries' rotary part has to be multiplied with beside it.
    """
    parameters, limit, pairs = config.rope_parameters, config.max_position_embeddings, list(heads.frequencies)
    theta = parameters["rope_theta"]
    wanted, scaling = _base_frequencies(config, heads, None)
    short = long = _factors(wanted[pairs], theta)
    # Engines derive an attention factor of 1 from equal limits, whatever is written: the base's goes into the
    # queries, once for the queries and once for the keys.
    attention_factor, scores_scale = 1.0, scaling**2
    if parameters.get("rope_type", "default") == "longrope":
        # Other frequencies beyond the limit that it was trained with.
        limit = parameters["original_max_position_embeddings"]
        beyond, _ = _base_frequencies(config, heads, limit + 1)
        long = _factors(beyond[pairs], theta)
        attention_factor, scores_scale = scaling, 1.0
    wide = copy.deepcopy(config)
    wide.head_dim = heads.head_dim
    kept = {name: value for name, value in parameters.items() if name in family.rope_fields}
    if "partial_rotary_factor" in kept:
        # The same fraction of a wider head, which the class rounds down, may be another number than W_r.
        kept["partial_rotary_factor"] = heads.rotary_dim / heads.head_dim
    wide.rope_parameters = kept | {
        "rope_type": "longrope",
        "rope_theta": theta,
        "short_factor": short,
        "long_factor": long,
        "original_max_position_embeddings": limit,
        "factor": config.max_position_embeddings / limit,
        "attention_factor": attention_factor,
    }
    if hasattr(wide, "original_max_position_embeddings"):
        wide.original_max_position_embeddings = limit
    return wide, scores_scale


def _base_frequencies(config: PretrainedConfig, heads: SharedShape, length: int | None) -> tuple[Tensor, float]:
    """Inverse frequencies (R / 2,) of the base, in radians per position, and the factor of its cosines and sines."""
    rope_type = config.rope_parameters.get("rope_type", "default")
    if rope_type == "default":
        # In the float32 in which transformers computes them; on the CPU, whatever device a caller makes weights on.
        exponents = (
            torch.arange(0, heads.base.rotary_dim, 2, dtype=torch.int64, device="cpu").float() / heads.base.rotary_dim
        )
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0
    with torch.device("cpu"):  # some of them make tensors on the default device first
        frequencies, scaling = ROPE_INIT_FUNCTIONS[rope_type](config, device="cpu", seq_len=length)
    return frequencies, float(scaling)


def _factors(wanted: Tensor, theta: float) -> list[float]:
    """The factor of each stock frequency that gives the wanted one, (W_r / 2,), as exactly as float32 can.

    transformers computes 1 / (factor * theta^(2 j / W_r)) in float32. Of the factors next to the quotient the one
    whose result is nearest is taken: an error of one part in 10^7 would be seen thousands of positions on.
    """
    exponents = torch.arange(0, 2 * len(wanted), 2, dtype=torch.int64, device=wanted.device).float() / (
        2 * len(wanted)
    )
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
