"""Planted answer: heads that secretly share K/V in unequal groups, each behind its own basis, are found and merged.

The model is exactly representable with G heads, but no two heads look alike: keys differ by a random complex number
per rotary frequency (an invertible matrix where RoPE does not reach), values by a random invertible matrix.

Behind norms, whose scales differ between frequencies by a factor of ten: where a norm spans a head, keys differ by a
rotation per frequency, which is what its divisor does not see; where it spans the layer, by any complex number.
"""

import pytest
import torch
from models import CASES, adapter_config, config_of, prompt, random_model
from peft import get_peft_model
from torch import nn

from asymgqa_peft import initialize_asymgqa_weights
from asymgqa_peft.adapter.site import attention_sites
from asymgqa_peft.families import find_family, head_shape

MHA = [[[0, 3, 5, 6], [1], [2, 4, 7]], [[0, 1], [2, 5], [3, 4, 6, 7]]]
GQA = [[[0, 2, 3], [1]], [[0], [1, 2, 3]]]
PLANTED = {
    "llama": MHA,
    "llama-bias": MHA,
    "llama-gqa": GQA,
    "qwen2": MHA,
    "phi": MHA,
    "stablelm": MHA,
    "opt": MHA,
    "qwen3": MHA,
    "qwen3-gqa": GQA,
    "gemma3": MHA,
    "olmo2": MHA,
    "olmo2-gqa": GQA,
}


def plant(model: nn.Module, planted: list, seed: int = 0) -> None:
    """Rewrite a random model's projections so that each planted group shares one key and one value."""
    generator = torch.Generator().manual_seed(seed)
    family, shape = find_family(model.config), head_shape(model.config)
    for site, groups in zip(attention_sites(model), planted, strict=True):
        for norm in site.norms().values():
            _spread_scales(norm, shape, family, generator)
        query, key, value, output = (
            getattr(site.attention, name) for name in (family.query, family.key, family.value, family.output)
        )
        for group in groups:
            for kv in group:
                turn, back = _key_basis(shape, generator)
                _copy_rows(key, group[0], kv, turn, shape.head_dim)
                basis = _invertible(shape.head_dim, generator)
                _copy_rows(value, group[0], kv, basis, shape.head_dim)
                for head in range(kv * shape.queries_per_kv, (kv + 1) * shape.queries_per_kv):
                    _copy_rows(query, head, head, back, shape.head_dim)
                    columns = slice(head * shape.head_dim, (head + 1) * shape.head_dim)
                    output.weight[:, columns] = output.weight[:, columns] @ torch.linalg.inv(basis)


def _copy_rows(projection: nn.Linear, source: int, target: int, basis: torch.Tensor, dim: int) -> None:
    """Rows of head `target` become `basis` times those of head `source`, biases too."""
    for tensor in (projection.weight, projection.bias):
        if tensor is not None:
            heads = tensor.unflatten(0, (-1, dim))
            heads[target] = basis @ heads[source]


def _spread_scales(norm: nn.Module, shape, family, generator: torch.Generator, within: float = 0.0) -> None:
    """Scales from 0.3 to 3 by rotary pair, the two of a pair apart by `within`; every head its own where it can."""
    heads = norm.weight.numel() // shape.head_dim
    pairs = torch.logspace(-0.5, 0.5, shape.head_dim // 2).repeat(heads, 1)
    pairs = pairs * (0.7 + 0.6 * torch.rand(heads, 1, generator=generator))
    scale = torch.cat((pairs * (1 + within), pairs * (1 - within)), dim=1)
    norm.weight.copy_(scale.flatten() - family.norm_offset)


def _invertible(dim: int, generator: torch.Generator) -> torch.Tensor:
    left, right = (torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0] for _ in range(2))
    return left @ torch.diag(torch.rand(dim, generator=generator) * 1.5 + 0.5) @ right


def _key_basis(shape, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A change of basis (D, D) of the keys that commutes with RoPE, and the queries' that undoes it in the scores."""
    basis, rotary = torch.zeros(shape.head_dim, shape.head_dim), shape.rotary_dim
    basis[rotary:, rotary:] = _invertible(shape.pass_dim, generator)
    angle = torch.rand(rotary // 2, generator=generator) * 6.283
    size = torch.rand(rotary // 2, generator=generator) * 1.5 + 0.5
    if shape.norm_span == "head":
        size = torch.ones_like(size)
    first, second = torch.arange(rotary // 2), torch.arange(rotary // 2) + rotary // 2
    basis[first, first] = basis[second, second] = size * angle.cos()
    basis[second, first], basis[first, second] = size * angle.sin(), -size * angle.sin()
    return basis, torch.linalg.inv(basis).T


def relative_error(model: nn.Module, reference: torch.Tensor) -> float:
    return ((model(input_ids=prompt(4, 20, seed=9)).logits - reference).norm() / reference.norm()).item()


@pytest.fixture(params=sorted(PLANTED))
def case(request) -> str:
    """Every planted model in turn: rotary, biased, GQA base, partial rotary, no rotary."""
    return request.param


@pytest.fixture
def secret(case):
    """A model with a planted answer, and its logits."""
    model = random_model(config_of(CASES[case]))
    with torch.no_grad():
        plant(model, PLANTED[case])
        return model, model(input_ids=prompt(4, 20, seed=9)).logits


def convert(secret, case: str, **choices):
    base, reference = secret
    planted = PLANTED[case]
    largest = max(len(group) for layer in planted for group in layer)
    config = adapter_config(num_key_value_heads=len(planted[0]), max_group_size=largest, **choices)
    model = get_peft_model(base, config).eval()
    report = initialize_asymgqa_weights(model, prompt(16, 24).split(8), progress=False)
    with torch.no_grad():
        return report, relative_error(model, reference)


@pytest.mark.parametrize("refit_output", [False, True])
def test_planted_groups_are_recovered_exactly(secret, case, refit_output):
    report, error = convert(secret, case, refit_output=refit_output)
    assert report.head_groups == PLANTED[case]
    assert error < 1e-3
    assert max(report.costs) < 1e-6 < 0.05 < min(report.neighbour_costs)


def test_cosine_and_mean_fail_by_a_wide_margin(secret, case):
    report, error = convert(secret, case, criterion="cosine", merge="mean", refit_output=False)
    assert report.head_groups != PLANTED[case]
    assert error > 0.1


def test_the_right_groups_with_the_mean_fail_too(secret, case):
    """The basis is what matters: neither the groups alone nor the norm alone would do."""
    choices = {"grouping": "neighbour", "head_groups": PLANTED[case], "refit_output": False}
    report, error = convert(secret, case, merge="mean", **choices)
    assert report.head_groups == PLANTED[case]
    assert error > 0.1


def test_no_two_heads_of_a_group_look_alike(secret, case):
    report, _ = convert(secret, case)
    for before, after, groups in zip(report.similarity_before, report.similarity_after, PLANTED[case], strict=True):
        inside = [(k, m) for group in groups for k in group for m in group if k < m]
        outside = [(k, m) for k in range(len(before)) for m in range(k) if not any({k, m} <= set(g) for g in groups)]
        assert min(after[k][m] for k, m in inside) > 0.999 > 0.9 > max(after[k][m] for k, m in outside)
        assert max(abs(before[k][m]) for k, m in inside) < 0.9
