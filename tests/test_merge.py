"""Merges: costs are what the shared heads lose, principal is never beaten, wider is never worse at equal bytes."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_statistics import SHAPES, moments_of, random_activations, random_output

from asymgqa_peft.choices import check_width
from asymgqa_peft.groups import Partition
from asymgqa_peft.heads import AttentionWeights, HeadShape, SharedHeads, SharedShape, mean_heads, part_members
from asymgqa_peft.method.costs import KEY_WEIGHT, VALUE_WEIGHT, group_costs, pair_costs
from asymgqa_peft.method.frequencies import next_eigenvalues, widened_frequencies
from asymgqa_peft.method.merge import merge_layer, merge_notes
from asymgqa_peft.method.statistics import LayerMoments

MERGES = ["mean", "aligned", "principal"]
UNEQUAL: dict[str, Partition] = {
    "mha": ((1, 2, 3), (0,)),
    "partial rotary": ((0, 2), (1, 3)),
    "no rotary": ((0, 1, 2, 3),),
    "gqa": ((0, 2), (1,)),
    "partial rotary, gqa": ((0, 2), (1,)),
}
# Below D, between D and 2 D (frequencies occur unequally often), beyond what a group can fill.
WIDTHS = {
    "mha": [4, 12, 16, 24],
    "partial rotary": [4, 12, 16, 20],
    "no rotary": [5, 12, 32],
    "gqa": [4, 8, 12, 18],
    "partial rotary, gqa": [3, 9, 12, 18],
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


def rotary_part(heads: torch.Tensor, shape: HeadShape | SharedShape) -> torch.Tensor:
    """Rotary dimensions as complex numbers, pairs (j, j + R/2): (..., D) real -> (..., R/2) complex."""
    first, second = heads[..., : shape.rotary_dim].chunk(2, dim=-1)
    return torch.complex(first.contiguous(), second.contiguous())


def seen_by_queries(
    weights: AttentionWeights, hidden: torch.Tensor, heads: SharedHeads
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What each query head h sees in the shared heads, token by token, in the bases of its own KV head.

    Returns:
        Complex rotary keys (T, H, R/2), pass-through keys (T, H, P) and values (T, H, D).
    """
    shape, base = heads.shape, heads.shape.base
    shared = {}
    for part in ("key", "value"):
        bias = getattr(heads, f"{part}_bias")
        shared[part] = torch.einsum("te,gde->tgd", hidden[0], getattr(heads, part)) + (0 if bias is None else bias)
    repeat = base.queries_per_kv
    gain, query_mix, value_mix = heads.query_gain, heads.query_mix, heads.value_mix
    if gain is None:
        gain = part_members(heads.partition, shape.frequencies).repeat_interleave(repeat, 0)
    if query_mix is None:
        query_mix = plain_mix(heads.partition, shape.pass_sources, base.pass_dim).mT.repeat_interleave(repeat, 0)
    if value_mix is None:
        value_mix = plain_mix(heads.partition, shape.value_sources, base.head_dim).repeat_interleave(repeat, 0)
    tokens, count = len(hidden[0]), base.num_attention_heads
    rotary = torch.zeros(tokens, count, base.rotary_dim // 2, dtype=torch.complex128)
    passing = torch.zeros(tokens, count, base.pass_dim, dtype=torch.float64)
    values = torch.zeros(tokens, count, base.head_dim, dtype=torch.float64)
    for g, group in enumerate(heads.partition):
        pairs = rotary_part(shared["key"][:, g], shape)
        rest = shared["key"][:, g, shape.rotary_dim :]
        for h in [kv * repeat + query for kv in group for query in range(repeat)]:
            # The score Re(gain_j q conj(z_j)) is that of the key conj(gain_j) z_j.
            for j, frequency in enumerate(shape.frequencies):
                rotary[:, h, frequency] += gain[h, j].conj() * pairs[:, j]
            passing[:, h] = rest @ query_mix[h]
            values[:, h] = shared["value"][:, g] @ value_mix[h].T
    return rotary, passing, values


def plain_mix(partition: Partition, sources, dim: int) -> torch.Tensor:
    """(K, N, M): how `mean_heads` uses a shared head."""
    members = part_members(partition, sources).double()
    mix = torch.zeros(len(members), dim, len(sources), dtype=torch.float64)
    for j, source in enumerate(sources):
        mix[:, source, j] = members[:, j]
    return mix


def own_of_queries(
    weights: AttentionWeights, hidden: torch.Tensor, base: HeadShape
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What each query head would see in its own KV head: as `seen_by_queries`."""
    data = project(weights, hidden)
    key = data["key"][0].unflatten(-1, (-1, base.head_dim)).repeat_interleave(base.queries_per_kv, 1)
    value = data["value"][0].unflatten(-1, (-1, base.head_dim)).repeat_interleave(base.queries_per_kv, 1)
    return rotary_part(key, base), key[..., base.rotary_dim :], value


def assert_nothing_lost(weights: AttentionWeights, hidden: torch.Tensor, heads: SharedHeads) -> None:
    """Every query head sees its own keys and values."""
    base = heads.shape.base
    own, seen = own_of_queries(weights, hidden, base), seen_by_queries(weights, hidden, heads)
    assert own[2].abs().max() > 0.1
    torch.testing.assert_close(seen, own, rtol=1e-9, atol=1e-9)


def realised_costs(
    moments: LayerMoments, weights: AttentionWeights, hidden: torch.Tensor, heads: SharedHeads
) -> torch.Tensor:
    """Cost per group, measured token by token: the members' own keys and values against what the queries now see."""
    base = moments.shape
    r, dim = base.queries_per_kv, base.head_dim
    query = project(weights, hidden)["query"][0].unflatten(-1, (-1, dim))
    own, seen = own_of_queries(weights, hidden, base), seen_by_queries(weights, hidden, heads)
    costs = torch.zeros(len(heads.partition), dtype=torch.float64)
    for g, group in enumerate(heads.partition):
        for h in [kv * r + member for kv in group for member in range(r)]:
            # The error of q conj(kappa), its phase averaged out.
            error = (own[0][:, h] - seen[0][:, h]).abs().square().mean(0)
            key_loss = (rotary_part(query[:, h], base).abs().square().mean(0) * error).sum() / 2
            difference = own[1][:, h] - seen[1][:, h]
            scores = query[:, h, base.rotary_dim :] @ (difference - difference.mean(0)).T
            key_loss = key_loss + scores.square().mean()
            difference = own[2][:, h] - seen[2][:, h]
            value_loss = (difference @ weights.output[:, h * dim : h * dim + dim].T).square().sum(-1).mean()
            costs[g] += KEY_WEIGHT * key_loss / moments.key_energy + VALUE_WEIGHT * value_loss / moments.value_energy
    return costs


def spectral_costs(moments: LayerMoments, weights: AttentionWeights, hidden, partition, shape: SharedShape):
    """The least cost there is (Eckart and Young), from singular values of the weighted data, not from moments."""
    base = moments.shape
    r, dim, tokens = base.queries_per_kv, base.head_dim, len(hidden[0])
    data = {part: x[0].unflatten(-1, (-1, dim)) for part, x in project(weights, hidden).items()}
    query = data["query"].unflatten(1, (-1, r))
    energy = rotary_part(query, base).abs().square().mean(0).sum(1)  # (K, F)
    kappa, passing = rotary_part(data["key"], base), data["key"][..., base.rotary_dim :]
    passing = passing - passing.mean(0)

    def tail(matrix: torch.Tensor, rank: int) -> torch.Tensor:
        return torch.linalg.svdvals(matrix)[rank:].square().sum() / tokens

    costs = []
    for group in partition:
        members = list(group)
        key_loss = torch.zeros((), dtype=torch.float64)
        for f in range(base.rotary_dim // 2):
            key_loss += tail(kappa[:, members, f] * energy[members, f].sqrt(), shape.frequencies.count(f)) / 2
        # R with R^T R = the metric, from a QR of the rows that read the head: no symmetric root as in the package.
        reads = [torch.linalg.qr(query[:, k, :, base.rotary_dim :].flatten(0, 1) / tokens**0.5)[1] for k in members]
        if base.pass_dim:
            weighted = [passing[:, k] @ root.T for k, root in zip(members, reads, strict=True)]
            key_loss += tail(torch.cat(weighted, 1), shape.pass_dim)
        columns = [weights.output[:, k * r * dim : (k + 1) * r * dim].unflatten(1, (r, dim)) for k in members]
        roots = [torch.linalg.qr(c.transpose(0, 1).flatten(0, 1))[1] for c in columns]
        weighted = [data["value"][:, k] @ root.T for k, root in zip(members, roots, strict=True)]
        value_loss = tail(torch.cat(weighted, 1), shape.head_dim)
        costs.append(KEY_WEIGHT * key_loss / moments.key_energy + VALUE_WEIGHT * value_loss / moments.value_energy)
    return torch.stack(costs)


def test_width_is_the_base_unless_said_otherwise():
    shape = SHAPES["mha"]
    assert SharedShape.of_width(shape) == SharedShape.of_width(shape, 8)
    assert SharedShape.of_width(shape, 12).frequencies == (0, 1, 2, 2, 3, 3)  # n_f differs


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(SHAPES)), st.sampled_from(MERGES), st.booleans(), st.integers(0, 999))
def test_costs_are_the_realised_losses(name, merge, bias, seed):
    """group_costs == what the queries lose token by token with the merged weights."""
    base, partition = SHAPES[name], UNEQUAL[name]
    weights, hidden, moments = calibrated(base, seed, bias)
    shape = SharedShape.of_width(base)
    heads = merge_layer(moments, weights, partition, shape, merge)
    costs = group_costs(moments, partition, shape, "residual", merge)
    torch.testing.assert_close(costs, realised_costs(moments, weights, hidden, heads), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("free_keys", "free_values"), [(True, True), (False, True), (True, False), (False, False)])
@pytest.mark.parametrize(("name", "width"), [(name, width) for name, widths in WIDTHS.items() for width in widths])
def test_costs_are_the_realised_losses_at_any_width(name, width, free_keys, free_values):
    """Also where a fixed basis leaves means of neighbouring parts, and where a group cannot fill the head."""
    base, partition = replace(SHAPES[name], free_keys=free_keys, free_values=free_values), UNEQUAL[name]
    weights, hidden, moments = calibrated(base, seed=width)
    shape = SharedShape.of_width(base, width)
    heads = merge_layer(moments, weights, partition, shape, "principal")
    assert heads.key.shape == heads.value.shape == (len(partition), width, base.hidden_size)
    costs = group_costs(moments, partition, shape, "residual", "principal")
    torch.testing.assert_close(costs, realised_costs(moments, weights, hidden, heads), rtol=1e-6, atol=1e-9)
    if free_keys and free_values:
        least = spectral_costs(moments, weights, hidden, partition, shape)
        torch.testing.assert_close(costs, least, rtol=1e-6, atol=1e-9)
    plain = mean_heads(weights, partition, shape)
    assert torch.equal(heads.key, plain.key) != free_keys and torch.equal(heads.value, plain.value) != free_values


def residual_costs(moments: LayerMoments, groups, merge: str = "principal", width: int | None = None) -> torch.Tensor:
    """Costs of groups that share heads of the given width."""
    return group_costs(moments, groups, SharedShape.of_width(moments.shape, width), "residual", merge)


def only(part: str, moments: LayerMoments) -> LayerMoments:
    """Moments whose costs are those of keys, or of values."""
    if part == "key":
        return replace(moments, value_cov=torch.zeros_like(moments.value_cov))
    zeros = {name: torch.zeros_like(getattr(moments, name)) for name in ("key_gram", "key_pass")}
    return replace(moments, **zeros)


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
    for part in ("key", "value"):
        alone = only(part, moments)
        mean, aligned, principal = (residual_costs(alone, groups, merge) for merge in MERGES)
        assert (principal <= torch.minimum(mean, aligned) + 1e-9).all(), part
        assert (principal >= 0).all()


@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25])
@pytest.mark.parametrize("name", SHAPES)
def test_costs_for_the_search_are_right_to_a_millionth(name, scale):
    """In float32, at any scale of the values: the plain cast loses the small ones, which is shown too."""
    shape = SHAPES[name]
    moments = calibrated(shape)[2]
    groups = [group for size in (2, 3, 4) for group in itertools.combinations(range(shape.base_kv_heads), size)]
    exact = residual_costs(moments, groups)
    moments = replace(moments, value_cov=scale**2 * moments.value_cov)
    quick = moments.for_search()
    found = residual_costs(quick, groups)
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
        residual_costs(moments, [(0, 1, 2)], merge).item() for merge in MERGES
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
    assert residual_costs(moments, alone, merge).abs().max() == 0


@pytest.mark.parametrize("name", SHAPES)
def test_heads_behind_hidden_bases_merge_without_loss(name):
    """All heads are one head in its own basis: principal loses nothing, the mean nearly everything."""
    shape = SHAPES[name]
    weights, hidden, _ = calibrated(shape)
    weights = hide_in_bases(weights, shape, [[k for k in range(shape.base_kv_heads)]], seed=3)
    moments = moments_of(shape, project(weights, hidden), output=weights.output)
    group = [tuple(range(shape.base_kv_heads))]
    assert residual_costs(moments, group).item() < 1e-9
    assert residual_costs(moments, group, "mean").item() > 0.2


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
        a = residual_costs(moments, groups, merge)
        b = residual_costs(other, groups, merge)
        assert torch.allclose(a, b, rtol=1e-6) == same, merge
    cosines = [group_costs(m, groups, SharedShape.of_width(shape), "cosine", "mean") for m in (moments, other)]
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
    narrow = SharedShape.of_width(shape)
    together = group_costs(moments, groups, narrow, criterion, merge)
    monkeypatch.setattr("asymgqa_peft.method.costs.CHUNK_ELEMENTS", 1)
    one_by_one = torch.cat([group_costs(moments, [group], narrow, criterion, merge) for group in groups])
    torch.testing.assert_close(together, one_by_one)
    pairs = pair_costs(moments, criterion, merge)
    assert torch.equal(pairs, pairs.T) and pairs.diagonal().eq(0).all()
    for pair in itertools.combinations(heads, 2):
        torch.testing.assert_close(pairs[pair], group_costs(moments, [pair], narrow, criterion, merge)[0])


def test_cosine_cost_counts_each_head_against_its_mates():
    shape = SHAPES["mha"]
    moments = calibrated(shape)[2]
    cosine = (moments.key_cosine + moments.value_cosine) / 2
    partition = ((0, 1, 3), (2,))
    mates = [cosine[0, [1, 3]].mean(), cosine[1, [0, 3]].mean(), cosine[3, [0, 1]].mean(), torch.tensor(1.0)]
    total = group_costs(moments, partition, SharedShape.of_width(shape), "cosine", "mean").sum()
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


# ------------------------------------------------------------------------------------------------------ wide heads


def narrow_principal(moments: LayerMoments, group, part: str):
    """Encode and decode of heads of the base's width as they were before heads could be wide."""
    base, members = moments.shape, torch.tensor([group])
    if part == "rotary":
        gram = moments.key_gram[:, members[:, :, None], members[:, None, :]].transpose(0, 1)
        root = moments.key_root[:, members].transpose(0, 1).to(gram.dtype)
        top = torch.linalg.eigh(gram)[1][..., -1]
        encode, decode = top.conj() * root, top / root
        scale = decode.abs().square().mean(-1, keepdim=True).sqrt()
        scale = scale * torch.exp(1j * decode.sum(-1, keepdim=True).angle())
        return encode * scale, decode / scale
    weighted, root, dim = {
        "pass": (moments.key_pass, moments.pass_root, base.pass_dim),
        "value": (moments.value_cov, moments.value_root, base.head_dim),
    }[part]
    rows = (members[:, :, None] * dim + torch.arange(dim)).flatten(1)
    roots = root[members]
    basis = torch.linalg.eigh(weighted[rows[:, :, None], rows[:, None, :]])[1][..., -dim:]

    def times(matrix: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bmnd,bndc->bmnc", matrix.unflatten(-1, (len(group), dim)), blocks).flatten(-2)

    encode, decode = times(basis.mT, roots), times(basis.mT, torch.linalg.inv(roots)).mT
    values, vectors = torch.linalg.eigh((roots @ roots).mean(1))
    mean_root = (vectors * values.sqrt().unsqueeze(-2)) @ vectors.mT
    mean_inverse = (vectors / values.sqrt().unsqueeze(-2)) @ vectors.mT
    left, _, right = torch.linalg.svd(basis.mT @ (roots @ mean_inverse.unsqueeze(1)).flatten(1, 2))
    scale = math.sqrt(len(group))
    return mean_inverse @ (left @ right).mT @ encode / scale, decode @ (left @ right) @ mean_root * scale


@pytest.mark.parametrize("head_dim", [None, "D"])
@pytest.mark.parametrize("name", SHAPES)
def test_heads_of_the_base_width_are_those_of_the_narrow_merge_to_the_last_bit(name, head_dim):
    base, partition = SHAPES[name], UNEQUAL[name]
    weights, _, moments = calibrated(base, bias=False)
    shape = SharedShape.of_width(base, base.head_dim if head_dim else None)
    heads = merge_layer(moments, weights, partition, shape, "principal")
    r, half, rotary = base.queries_per_kv, base.rotary_dim // 2, base.rotary_dim
    key, value = (x.unflatten(0, (-1, base.head_dim)) for x in (weights.key, weights.value))
    for g, group in enumerate(partition):
        first = group[0] * r
        if half:
            encode, decode = narrow_principal(moments, group, "rotary")
            shared = torch.einsum("fn,nfe->fe", encode[0], rotary_part(key[list(group)].mT, base).mT.contiguous())
            assert torch.equal(heads.key[g, :rotary], torch.cat((shared.real, shared.imag)))
            assert torch.equal(heads.query_gain[first], decode[0, :, 0].conj())
        if base.pass_dim:
            encode, decode = narrow_principal(moments, group, "pass")
            assert torch.equal(heads.key[g, rotary:], encode[0] @ key[list(group), rotary:].flatten(0, 1))
            assert torch.equal(heads.query_mix[first], decode[0, : base.pass_dim].mT)
        encode, decode = narrow_principal(moments, group, "value")
        assert torch.equal(heads.value[g], encode[0] @ value[list(group)].flatten(0, 1))
        assert torch.equal(heads.value_mix[first], decode[0, : base.head_dim])


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(["mha", "partial rotary", "no rotary"]), st.integers(0, 999), st.integers(1, 3))
def test_fewer_wider_heads_of_the_same_bytes_never_lose_more(name, seed, cut):
    """Two groups in one head of twice the width: the two narrow heads side by side are one of the choices."""
    base = replace(SHAPES[name], num_attention_heads=8, base_kv_heads=8)
    moments = moments_of(base, random_activations(base, 2, 60, seed))
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed)).tolist()
    four = [tuple(sorted(order[start:end])) for start, end in itertools.pairwise([0, cut, 4, 5, 8])]
    two = [tuple(sorted(four[0] + four[1])), tuple(sorted(four[2] + four[3]))]
    costs = []
    for width, partition in ((8, four), (16, two), (32, [tuple(range(8))])):
        shape = SharedShape.of_width(base, width)
        costs.append(group_costs(moments, partition, shape, "residual", "principal").sum().item())
    # Never more, and on random heads strictly less.
    assert costs[0] > costs[1] + 1e-3
    assert costs[1] > costs[2] + 1e-3


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_one_head_as_wide_as_all_holds_every_head(name, bias):
    base = SHAPES[name]
    weights, hidden, moments = calibrated(base, bias=bias)
    everyone = (tuple(range(base.base_kv_heads)),)
    shape = SharedShape.of_width(base, base.base_kv_heads * base.head_dim)
    heads = merge_layer(moments, weights, everyone, shape, "principal")
    assert_nothing_lost(weights, hidden, heads)
    assert group_costs(moments, everyone, shape, "residual", "principal").item() == 0
    if base.rotary_dim:
        plain = mean_heads(weights, everyone, shape)
        torch.testing.assert_close(heads.key[:, : shape.rotary_dim], plain.key[:, : shape.rotary_dim])


@pytest.mark.parametrize("name", ["mha", "partial rotary", "no rotary"])
def test_lone_heads_are_untouched_in_a_head_of_twice_the_width(name):
    """The second half of such a head stays zero, and so does everything that reads it."""
    base = SHAPES[name]
    weights, hidden, moments = calibrated(base)
    alone = tuple((k,) for k in range(base.base_kv_heads))
    shape = SharedShape.of_width(base, 2 * base.head_dim)
    heads = merge_layer(moments, weights, alone, shape, "principal")
    plain = mean_heads(weights, alone, shape)
    for part in ("key", "key_bias", "value", "value_bias"):
        torch.testing.assert_close(getattr(heads, part), getattr(plain, part))
        assert (getattr(heads, part) == 0).sum() >= getattr(heads, part).numel() / 2
    if heads.query_gain is not None:
        torch.testing.assert_close(heads.query_gain.real, part_members(alone, shape.frequencies).double())
        assert heads.query_gain.imag.abs().max() < 1e-9
    torch.testing.assert_close(heads.value_mix, plain_mix(alone, shape.value_sources, base.head_dim))


def test_heads_in_twice_the_dimensions_need_one_head_of_twice_the_width():
    """Planted: keys of 8 heads lie in two complex dimensions per frequency, values in 2 D. Two narrow heads fail."""
    base = HeadShape(32, 8, 8, 8, 8)
    generator = torch.Generator().manual_seed(0)
    weights, hidden, _ = calibrated(base, tokens=200)
    key, value = weights.key.unflatten(0, (8, 8)).clone(), weights.value.unflatten(0, (8, 8)).clone()
    sources = rotary_part(key[:2].mT, base).mT  # (2, F, E)
    mixture = torch.randn(8, 2, 4, 2, generator=generator, dtype=torch.float64)
    planted = torch.einsum("ksf,sfe->kfe", torch.view_as_complex(mixture), sources)
    key = torch.cat((planted.real, planted.imag), dim=1)
    value = torch.randn(8, 8, 16, generator=generator, dtype=torch.float64) @ value[:2].flatten(0, 1)
    weights = replace(weights, key=key.flatten(0, 1), value=value.flatten(0, 1), key_bias=None, value_bias=None)
    moments = moments_of(base, project(weights, hidden), output=weights.output)
    everyone = (tuple(range(8)),)
    wide, narrow = SharedShape.of_width(base, 16), SharedShape.of_width(base)
    heads = merge_layer(moments, weights, everyone, wide, "principal")
    assert_nothing_lost(weights, hidden, heads)
    assert group_costs(moments, everyone, wide, "residual", "principal").item() < 1e-12
    halves = [(group, tuple(sorted({*range(8)} - {*group}))) for group in itertools.combinations(range(8), 4)]
    totals = [group_costs(moments, two, narrow, "residual", "principal").sum().item() for two in halves]
    assert min(totals) > 0.05


@pytest.mark.parametrize("width", [8, 12, 16, 32])
def test_wide_weights_keep_the_base_scale_and_maps_stay_near_the_plain_ones(width):
    """Training starts from them: neither K/V nor the maps may hide a large scale."""
    base = HeadShape(64, 8, 8, 8, 4)
    weights, _, moments = calibrated(base, tokens=200)
    partition = ((0, 1, 2, 3), (4, 5, 6, 7))
    shape = SharedShape.of_width(base, width)
    heads = merge_layer(moments, weights, partition, shape, "principal")
    for part in ("key", "value"):
        ratio = getattr(heads, part).norm(dim=-1).mean() / getattr(weights, part).norm(dim=-1).mean()
        assert 0.3 < ratio < 3, part
    gain, mix = part_members(partition, shape.frequencies), plain_mix(partition, shape.value_sources, 8)
    for found, plain in ((heads.query_gain, gain), (heads.value_mix, mix)):
        assert 0.5 < found.norm() / plain.norm() < 2
        alignment = (found * plain).sum().real / (found.norm() * plain.norm())
        assert alignment > 0.4  # a basis of no choice gives about 0


@pytest.mark.parametrize("merge", ["mean", "aligned"])
@pytest.mark.parametrize("width", [4, 12, 16])
def test_means_refuse_a_width(merge, width):
    base = SHAPES["mha"]
    weights, _, moments = calibrated(base)
    expected = f"head_dim={width} .*merge='{merge}'.*8 dimensions.*principal.*head_dim=None"
    with pytest.raises(ValueError, match=expected):
        merge_layer(moments, weights, UNEQUAL["mha"], SharedShape.of_width(base, width), merge)
    with pytest.raises(ValueError, match=expected):
        check_width(merge, width, 8)
    for fine in ((merge, None, 8), (merge, 8, 8), ("principal", width, 8)):
        check_width(*fine)


@pytest.mark.parametrize("start", [8, 16])
@pytest.mark.parametrize("name", ["mha", "partial rotary"])
def test_dimensions_left_over_go_to_the_frequencies_that_keep_most(name, start):
    """What one more pair keeps is what the cost falls by; the choice is the best of all over two layers."""
    base = SHAPES[name]
    partition = UNEQUAL["mha"]
    layers = [only("key", calibrated(base, seed)[2]) for seed in range(2)]
    shape, count = SharedShape.of_width(base, start), base.rotary_dim // 2

    def total(frequencies, layer) -> float:
        width = start + 2 * (len(frequencies) - len(shape.frequencies))
        wider = replace(shape, head_dim=width, frequencies=frequencies)
        return group_costs(layer, partition, wider, "residual", "principal").sum().item()

    energies = [next_eigenvalues(layer, partition, shape) for layer in layers]
    for layer, energy in zip(layers, energies, strict=True):
        for frequency in range(count):
            wider = tuple(sorted((*shape.frequencies, frequency)))
            saved = total(shape.frequencies, layer) - total(wider, layer)
            assert energy[frequency].item() == pytest.approx(saved, abs=1e-12)
        assert energy.max() > 0
    for more in range(count + 1):
        found = widened_frequencies(energies, shape, len(shape.frequencies) + more)
        assert list(found) == sorted(found)
        choices = [
            tuple(sorted((*shape.frequencies, *chosen))) for chosen in itertools.combinations(range(count), more)
        ]
        costs = [sum(total(choice, layer) for layer in layers) for choice in choices]
        assert sum(total(found, layer) for layer in layers) == pytest.approx(min(costs), abs=1e-12)
    for pairs in (len(shape.frequencies) - 1, len(shape.frequencies) + count + 1):
        with pytest.raises(ValueError, match=f"pairs={pairs} must be"):
            widened_frequencies(energies, shape, pairs)


@pytest.mark.parametrize("name", SHAPES)
def test_pairs_rank_groups_of_any_width(name):
    """A wide head holds any pair, so that pairs are always those of narrow heads."""
    base = SHAPES[name]
    moments = calibrated(base)[2]
    wide = SharedShape.of_width(base, 2 * base.head_dim)
    pairs = list(itertools.combinations(range(base.base_kv_heads), 2))
    assert group_costs(moments, pairs, wide, "residual", "principal").eq(0).all()
    found = pair_costs(moments, "residual", "principal")
    narrow = residual_costs(moments, pairs)
    for pair, cost in zip(pairs, narrow, strict=True):
        assert found[pair] == cost > 0
