"""Merges: what is lost equals the formula, principal is never beaten, and the maps undo hidden bases."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_statistics import SHAPES, moments_of, random_activations, random_output

from asymgqa_peft.groups import Partition
from asymgqa_peft.heads import AttentionWeights, HeadShape, SharedHeads, SharedShape
from asymgqa_peft.method.merge import group_costs, merge_layer, merge_losses, merge_notes, pair_costs
from asymgqa_peft.method.statistics import LayerMoments

MERGES = ["mean", "aligned", "principal"]
UNEQUAL: dict[str, Partition] = {
    "mha": ((1, 2, 3), (0,)),
    "partial rotary": ((0, 2), (1, 3)),
    "no rotary": ((0, 1, 2, 3),),
    "gqa": ((0, 2), (1,)),
}


def calibrated(shape: HeadShape, seed: int = 0, bias: bool = True, tokens: int = 40):
    """Random projections, the activations they give, and their moments."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    heads, kv, dim, width = shape.num_attention_heads, shape.base_kv_heads, shape.head_dim, shape.hidden_size
    rows = {"query": heads * dim, "key": kv * dim, "value": kv * dim}
    loud = 1 + draw(kv).abs().repeat_interleave(dim)[:, None]  # heads of different energies
    weights = {part: draw(count, width) / width**0.5 for part, count in rows.items()}
    weights["key"], weights["value"] = weights["key"] * loud, weights["value"] * loud
    biases = {f"{part}_bias": 0.3 * draw(count) if bias else None for part, count in rows.items()}
    weights = AttentionWeights(**weights, output=random_output(shape, seed), **biases)
    hidden = draw(1, tokens, width) @ (draw(width, width) / width**0.5)
    return weights, hidden, moments_of(shape, project(weights, hidden), output=weights.output)


def project(weights: AttentionWeights, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
    parts = ("query", "key", "value")
    return {
        part: torch.nn.functional.linear(hidden, getattr(weights, part), getattr(weights, f"{part}_bias"))
        for part in parts
    }


def rotary_part(heads: torch.Tensor, shape: HeadShape) -> torch.Tensor:
    """Rotary dimensions as complex numbers, pairs (j, j + R/2): (..., D) real -> (..., R/2) complex."""
    first, second = heads[..., : shape.rotary_dim].chunk(2, dim=-1)
    return torch.complex(first.contiguous(), second.contiguous())


def realised_losses(
    moments: LayerMoments, weights: AttentionWeights, hidden: torch.Tensor, merged: SharedHeads, partition: Partition
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses per group, measured on the data: the members' own keys and values against what the queries now see."""
    shape = moments.shape
    kv, dim, r, half, rotary = (
        shape.base_kv_heads, shape.head_dim, shape.queries_per_kv, shape.rotary_dim // 2, shape.rotary_dim,
    )  # fmt: skip
    data = {part: x[0].unflatten(-1, (-1, dim)) for part, x in project(weights, hidden).items()}
    shared = {}
    for part in ("key", "value"):
        bias = getattr(merged, f"{part}_bias")
        shared[part] = torch.einsum("te,gde->tgd", hidden[0], getattr(merged, part)) + (0 if bias is None else bias)
    key_loss, value_loss = torch.zeros(2, len(partition), dtype=torch.float64)
    for g, group in enumerate(partition):
        for k, h in [(kv_head, kv_head * r + query) for kv_head in group for query in range(r)]:
            gain = torch.ones(half) if merged.query_gain is None else merged.query_gain[h]
            query = rotary_part(data["query"][:, h], shape)
            wanted, seen = rotary_part(data["key"][:, k], shape), rotary_part(shared["key"][:, g], shape)
            # error of q conj(kappa), its phase averaged out
            error = (wanted.conj() - gain * seen.conj()).abs().square().mean(0)
            key_loss[g] += (query.abs().square().mean(0) * error).sum() / 2
            if shape.pass_dim:
                mix = torch.eye(shape.pass_dim).double() if merged.query_mix is None else merged.query_mix[h]
                difference = data["key"][:, k, rotary:] - shared["key"][:, g, rotary:] @ mix
                scores = data["query"][:, h, rotary:] @ (difference - difference.mean(0)).T
                key_loss[g] += scores.square().mean()
            mix = torch.eye(dim).double() if merged.value_mix is None else merged.value_mix[h]
            difference = data["value"][:, k] - shared["value"][:, g] @ mix.T
            value_loss[g] += (difference @ weights.output[:, h * dim : h * dim + dim].T).square().sum(-1).mean()
    assert kv == sum(map(len, partition))
    return key_loss, value_loss


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(SHAPES)), st.sampled_from(MERGES), st.booleans(), st.integers(0, 999))
def test_realised_loss_equals_the_formula(name, merge, bias, seed):
    """group_costs == losses of the maps == losses measured token by token with the merged weights."""
    shape, partition = SHAPES[name], UNEQUAL[name]
    weights, hidden, moments = calibrated(shape, seed, bias)
    merged = merge_layer(moments, weights, partition, SharedShape.of_width(shape), merge)
    measured = realised_losses(moments, weights, hidden, merged, partition)
    by_maps = merge_losses(moments, partition, shape, merge)
    for seen, formula, energy in zip(measured, by_maps, (moments.key_energy, moments.value_energy), strict=True):
        torch.testing.assert_close(seen, formula, rtol=1e-6, atol=1e-6 * energy.item())
    costs = group_costs(moments, partition, shape, "residual", merge, 0.7, 0.2)
    expected = 0.7 * measured[0] / moments.key_energy + 0.2 * measured[1] / moments.value_energy
    torch.testing.assert_close(costs, expected, rtol=1e-6, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(sorted(SHAPES)), seed=st.integers(0, 9999), alike=st.floats(0, 1))
def test_principal_is_never_beaten(name, seed, alike):
    """On any statistics, also where heads are nearly alike and the mean is nearly right."""
    shape = SHAPES[name]
    data = random_activations(shape, 2, 30, seed)
    for part in ("key", "value"):
        heads = data[part].unflatten(-1, (-1, shape.head_dim))
        data[part] = ((1 - alike) * heads + alike * heads[..., :1, :]).flatten(-2)
    moments = moments_of(shape, data)
    heads = range(shape.base_kv_heads)
    groups = [group for size in range(1, len(heads) + 1) for group in itertools.combinations(heads, size)]
    losses = {merge: merge_losses(moments, groups, shape, merge) for merge in MERGES}
    for part, energy in ((0, moments.key_energy), (1, moments.value_energy)):
        for other in ("mean", "aligned"):
            assert (losses["principal"][part] <= losses[other][part] + 1e-9 * energy).all(), (part, other)
        assert (losses["principal"][part] >= -1e-9 * energy).all()


@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25])
@pytest.mark.parametrize("name", SHAPES)
def test_costs_for_the_search_are_right_to_a_millionth(name, scale):
    """In float32, at any scale of the values: the plain cast loses the small ones, which is shown too."""
    shape = SHAPES[name]
    moments = calibrated(shape)[2]
    groups = [group for size in (2, 3, 4) for group in itertools.combinations(range(shape.base_kv_heads), size)]
    exact = group_costs(moments, groups, shape, "residual", "principal")
    moments = replace(moments, value_cov=scale**2 * moments.value_cov)
    quick = moments.for_search()
    found = group_costs(quick, groups, shape, "residual", "principal")
    assert quick.value_cov.dtype == (torch.float32 if shape.free_values else torch.float64)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6 * exact.max().item())
    if scale < 1 and shape.free_values:
        assert not moments.value_cov.float().any()


def test_the_choice_of_basis_matters():
    """Not vacuous: on random heads the three merges really differ, by a margin."""
    shape = SHAPES["mha"]
    moments = calibrated(shape)[2]
    mean, aligned, principal = (
        group_costs(moments, [(0, 1, 2)], shape, "residual", merge).item() for merge in MERGES
    )  # fmt: skip
    assert principal < 0.9 * aligned < 0.81 * mean


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("name", SHAPES)
def test_lone_heads_are_untouched(name, merge):
    shape = SHAPES[name]
    weights, _, moments = calibrated(shape)
    alone = tuple((k,) for k in range(shape.base_kv_heads))
    merged = merge_layer(moments, weights, alone, SharedShape.of_width(shape), merge)
    for part in ("key", "key_bias", "value", "value_bias"):
        torch.testing.assert_close(getattr(merged, part).flatten(0, 1), getattr(weights, part))
    for part in ("query_gain", "query_mix", "value_mix"):
        tensor = getattr(merged, part)
        if tensor is not None:
            identity = torch.ones(()) if part == "query_gain" else torch.eye(tensor.shape[-1])
            torch.testing.assert_close(tensor, identity.to(tensor).expand_as(tensor))
    assert group_costs(moments, alone, shape, "residual", merge).abs().max() == 0


@pytest.mark.parametrize("name", SHAPES)
def test_heads_behind_hidden_bases_merge_without_loss(name):
    """All heads are one head in its own basis: principal loses nothing, the mean nearly everything."""
    shape = SHAPES[name]
    weights, hidden, _ = calibrated(shape)
    weights = hide_in_bases(weights, shape, [[k for k in range(shape.base_kv_heads)]], seed=3)
    moments = moments_of(shape, project(weights, hidden), output=weights.output)
    group = [tuple(range(shape.base_kv_heads))]
    assert group_costs(moments, group, shape, "residual", "principal").item() < 1e-9
    assert group_costs(moments, group, shape, "residual", "mean").item() > 0.2


def hide_in_bases(weights: AttentionWeights, shape: HeadShape, planted, seed: int) -> AttentionWeights:
    """Give every head of a planted group the keys and values of its first, each behind a random invertible basis."""
    generator = torch.Generator().manual_seed(seed)
    dim, half = shape.head_dim, shape.rotary_dim // 2
    parts = {}
    for part in ("key", "value"):
        bias = getattr(weights, f"{part}_bias")
        rows = getattr(weights, part) if bias is None else torch.cat((getattr(weights, part), bias[:, None]), 1)
        heads = rows.unflatten(0, (-1, dim)).clone()
        for group in planted:
            for k in group:
                basis = torch.eye(dim, dtype=torch.float64)
                free = 0 if part == "value" else shape.rotary_dim
                random = torch.randn(dim - free, dim - free, generator=generator, dtype=torch.float64)
                basis[free:, free:] = torch.linalg.qr(random)[0] * torch.linspace(0.5, 2, dim - free)
                if free:
                    c = torch.randn(half, 2, generator=generator, dtype=torch.float64)
                    basis[:half, :half], basis[half:free, half:free] = c[:, 0].diag(), c[:, 0].diag()
                    basis[half:free, :half], basis[:half, half:free] = c[:, 1].diag(), -c[:, 1].diag()
                heads[k] = basis @ heads[group[0]] if k != group[0] else heads[k]
        flat = heads.flatten(0, 1)
        parts[part] = flat if bias is None else flat[:, :-1]
        parts[f"{part}_bias"] = None if bias is None else flat[:, -1]
    return replace(weights, **parts)


def test_costs_do_not_depend_on_the_bases_heads_live_in():
    """Gauge freedom: rotating a head's values and undoing it in o_proj changes no residual cost, but the cosine."""
    shape = SHAPES["mha"]
    weights, hidden, moments = calibrated(shape)
    dim = shape.head_dim
    basis = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(5)))[0]
    value, output, value_bias = weights.value.clone(), weights.output.clone(), weights.value_bias.clone()
    value[:dim], value_bias[:dim] = basis @ value[:dim], basis @ value_bias[:dim]
    output[:, :dim] = output[:, :dim] @ basis.T
    turned = replace(weights, value=value, output=output, value_bias=value_bias)
    other = moments_of(shape, project(turned, hidden), output=output)
    groups = [(0, 1), (0, 2, 3), (0, 1, 2, 3)]
    for merge, same in (("principal", True), ("aligned", True), ("mean", False)):
        a = group_costs(moments, groups, shape, "residual", merge)
        b = group_costs(other, groups, shape, "residual", merge)
        assert torch.allclose(a, b, rtol=1e-6) == same, merge
    cosines = [group_costs(m, groups, shape, "cosine", "mean") for m in (moments, other)]
    assert not torch.allclose(*cosines, rtol=1e-2)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("criterion", ["cosine", "residual"])
def test_batched_costs_equal_costs_one_by_one(name, merge, criterion, monkeypatch):
    shape = SHAPES[name]
    moments = calibrated(shape)[2]
    heads = range(shape.base_kv_heads)
    groups = [g for n in (2, 1, 3) for g in itertools.combinations(heads, n)]
    groups = groups[::2] + groups[1::2]  # sizes interleaved
    together = group_costs(moments, groups, shape, criterion, merge)
    monkeypatch.setattr("asymgqa_peft.method.merge._CHUNK_ELEMENTS", 1)
    one_by_one = torch.cat([group_costs(moments, [group], shape, criterion, merge) for group in groups])
    torch.testing.assert_close(together, one_by_one)
    pairs = pair_costs(moments, shape, criterion, merge)
    assert torch.equal(pairs, pairs.T) and pairs.diagonal().eq(0).all()
    for pair in itertools.combinations(heads, 2):
        torch.testing.assert_close(pairs[pair], group_costs(moments, [pair], shape, criterion, merge)[0])


def test_cosine_cost_counts_each_head_against_its_mates():
    shape = SHAPES["mha"]
    moments = calibrated(shape)[2]
    cosine = (moments.key_cosine + moments.value_cosine) / 2
    partition = ((0, 1, 3), (2,))
    mates = [cosine[0, [1, 3]].mean(), cosine[1, [0, 3]].mean(), cosine[3, [0, 1]].mean(), torch.tensor(1.0)]
    total = group_costs(moments, partition, shape, "cosine", "mean").sum()
    torch.testing.assert_close(total, 1 - torch.stack([m.double() for m in mates]).mean())


@pytest.mark.parametrize(("free_keys", "free_values"), [(False, True), (True, False), (False, False)])
def test_fixed_bases_fall_back_to_the_mean_and_say_so(free_keys, free_values):
    free = SHAPES["partial rotary"]
    shape = HeadShape(free.hidden_size, 4, 4, 8, 4, free_keys, free_values)
    weights, _, moments = calibrated(shape)
    partition = ((0, 1), (2, 3))
    merged = merge_layer(moments, weights, partition, SharedShape.of_width(shape), "principal")
    mean = merge_layer(None, weights, partition, SharedShape.of_width(shape), "mean")
    best = merge_layer(moments, weights, partition, SharedShape.of_width(free), "principal")
    wanted_key, wanted_value = best if free_keys else mean, best if free_values else mean
    torch.testing.assert_close(merged.key, wanted_key.key)
    torch.testing.assert_close(merged.value, wanted_value.value)
    assert (merged.query_gain is None, merged.query_mix is None) == (not free_keys,) * 2
    assert (merged.value_mix is None) == (not free_values)
    notes = " ".join(merge_notes(shape, "principal"))
    assert ["keys" in notes, "values" in notes] == [not free_keys, not free_values]
    assert not merge_notes(free, "principal")


def test_mean_needs_no_statistics_and_the_others_say_that_they_do():
    shape = SHAPES["gqa"]
    weights, _, _ = calibrated(shape)
    merged = merge_layer(None, weights, ((0, 2), (1,)), SharedShape.of_width(shape), "mean")
    heads = weights.key.unflatten(0, (-1, shape.head_dim))
    torch.testing.assert_close(merged.key, torch.stack(((heads[0] + heads[2]) / 2, heads[1])))
    assert merged.query_gain is merged.query_mix is merged.value_mix is None
    with pytest.raises(ValueError, match="merge='aligned' needs calibration"):
        merge_layer(None, weights, ((0, 2), (1,)), SharedShape.of_width(shape), "aligned")


def test_aligned_restores_the_norm_the_mean_loses():
    shape = SHAPES["mha"]
    weights, hidden, moments = calibrated(shape)
    energies = {}
    for merge in ("mean", "aligned"):
        merged = merge_layer(moments, weights, ((0, 1, 2, 3),), SharedShape.of_width(shape), merge)
        key = torch.nn.functional.linear(hidden, merged.key[0], merged.key_bias)
        energies[merge] = key.square().mean()
    base = project(weights, hidden)["key"].square().mean()
    torch.testing.assert_close(energies["aligned"], base)
    assert energies["mean"] < 0.5 * base


def test_shared_weights_keep_the_base_scale():
    """Training starts from them: neither K/V nor the maps may hide a large scale."""
    shape = HeadShape(64, 8, 8, 8, 8)
    weights, _, moments = calibrated(shape, tokens=200)
    merged = merge_layer(moments, weights, ((0, 1, 2, 3), (4, 5, 6, 7)), SharedShape.of_width(shape), "principal")
    for part in ("key", "value"):
        ratio = getattr(merged, part).norm() / getattr(weights, part).norm() * 2
        assert 0.3 < ratio < 3, part
    for mix in (merged.query_gain.abs(), merged.value_mix.square().sum((-2, -1)).sqrt() / shape.head_dim**0.5):
        assert 0.3 < mix.mean() < 3
