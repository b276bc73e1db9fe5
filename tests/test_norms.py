"""Keys through norms: what the norms of shared heads make, against activations in float64, and where it is exact."""

from dataclasses import replace

import pytest
import torch
from models import adapted, adapter_config, prompt, random_model, tiny_config
from peft import get_peft_model
from test_planted import relative_error
from test_statistics import SHAPES, moments_of, random_output

from asymgqa_peft import initialize_asymgqa_weights
from asymgqa_peft.adapter.site import attention_sites
from asymgqa_peft.heads import AttentionWeights, HeadShape, SharedHeads, SharedShape, mean_heads
from asymgqa_peft.method.merge import merge_layer
from asymgqa_peft.method.norms import divisor_spread

SPANS = ["head", "layer"]
PARTITION = ((0, 2, 3), (1,))
LONE = ((2,), (0,), (3,), (1,))


def normed_shape(span: str, name: str = "mha") -> HeadShape:
    return replace(SHAPES[name], norm_span=span)


def norm(rows: torch.Tensor, scale: torch.Tensor, span: str) -> torch.Tensor:
    """RMS norm of heads (N, heads, D), over each or over all of them."""
    dims = -1 if span == "head" else (-2, -1)
    return rows * rows.square().mean(dims, keepdim=True).rsqrt() * scale


def layer(
    span: str,
    within: float = 0.0,
    tokens: int = 60,
    like_first: bool = False,
    name: str = "mha",
    signs: bool = False,
    empty: tuple[int, ...] = (),
):
    """Random projections with norms, their activations before and behind the norms, and moments.

    ``within``: how far the scales of a rotary pair are apart. ``like_first``: all keys are rotations of the first's.
    ``signs``: the scales of some heads are negative. ``empty``: heads whose keys have no third rotary pair.
    """
    shape, generator = normed_shape(span, name), torch.Generator().manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    def scale(heads: int) -> torch.Tensor:
        count = 1 if span == "head" else heads
        pairs = torch.logspace(-0.5, 0.5, shape.head_dim // 2, dtype=torch.float64) * (1 + 0.3 * draw(count, 1).abs())
        if signs:
            pairs = pairs * draw(count, 1).sign()
        return torch.cat((pairs * (1 + within), pairs * (1 - within)), dim=1).flatten()

    heads, kv, dim, width = shape.num_attention_heads, shape.base_kv_heads, shape.head_dim, shape.hidden_size
    key = draw(kv, dim, width)
    if like_first:
        for head in range(1, kv):
            size = torch.ones(dim // 2, 1, dtype=torch.float64)
            turned = torch.complex(*key[0].chunk(2)) * torch.polar(size, draw(dim // 2, 1))
            key[head] = torch.cat((turned.real, turned.imag))
    for head in empty:
        key[head].unflatten(0, (2, -1))[:, 2] = 0
    weights = AttentionWeights(
        query=draw(heads * dim, width),
        key=key.flatten(0, 1),
        value=draw(kv * dim, width),
        output=random_output(shape),
        query_norm=scale(heads),
        key_norm=scale(kv),
    )
    hidden = draw(1, tokens, width) @ (draw(width, width) / width**0.5)
    raw = {part: torch.nn.functional.linear(hidden, getattr(weights, part)) for part in ("query", "key", "value")}
    activations = {"value": raw["value"]}
    for part in ("query", "key"):
        rows = raw[part][0].unflatten(-1, (-1, dim))
        scales = getattr(weights, f"{part}_norm").reshape(-1, dim)
        activations[part] = norm(rows, scales, span).flatten(-2)[None]
        activations[f"{part}_before_norm"] = raw[part]
    return weights, hidden[0], activations, moments_of(shape, activations, output=weights.output)


def fitted_queries(shared: SharedHeads, weights: AttentionWeights, hidden: torch.Tensor) -> torch.Tensor:
    """What the shared norm of the queries gets, (N, H, W)."""
    base, pairs = shared.shape.base, list(shared.shape.frequencies)
    query = (hidden @ weights.query.T).unflatten(-1, (-1, base.head_dim)) * shared.query_scale
    turned = torch.complex(*query.chunk(2, dim=-1))[..., pairs] * shared.query_gain
    return torch.cat((turned.real, turned.imag), dim=-1)


def scores(shared: SharedHeads, weights: AttentionWeights, hidden: torch.Tensor) -> torch.Tensor:
    """Attention scores before RoPE, (H, N, N), of the shared heads and their norms."""
    span, base = shared.shape.base.norm_span, shared.shape.base
    query = norm(fitted_queries(shared, weights, hidden), shared.query_norm, span)
    key = norm(torch.einsum("ne,gwe->ngw", hidden, shared.key), shared.key_norm, span)
    group_of = {head: group for group, members in enumerate(shared.partition) for head in members}
    groups = [group_of[head // base.queries_per_kv] for head in range(base.num_attention_heads)]
    return torch.einsum("nhw,mhw->hnm", query, key[:, groups])


def base_scores(activations: dict, shape: HeadShape) -> torch.Tensor:
    query, key = (activations[part][0].unflatten(-1, (-1, shape.head_dim)) for part in ("query", "key"))
    return torch.einsum("nhd,mhd->hnm", query, key.repeat_interleave(shape.queries_per_kv, 1))


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("name", ["mha", "gqa"])
def test_statistics_before_the_norm_against_float64(span: str, name: str):
    _, _, activations, moments = layer(span, name=name)
    shape = moments.shape
    key = activations["key_before_norm"][0].unflatten(-1, (-1, shape.head_dim))
    pairs = torch.complex(*key.chunk(2, dim=-1))
    expected = torch.einsum("nkf,nlf->fkl", pairs, pairs.conj()) / len(key)
    torch.testing.assert_close(moments.key_gram_before_norm, expected)
    query = activations["query_before_norm"][0].unflatten(-1, (-1, 2, shape.head_dim // 2))
    torch.testing.assert_close(moments.query_power, query.square().sum(-2).mean(0))
    behind = activations["query"][0].unflatten(-1, (-1, 2, shape.head_dim // 2))
    torch.testing.assert_close(moments.query_energy, behind.square().sum(-2).mean(0))
    assert (moments.query_energy - moments.query_power).abs().max() > 0.1


# With scales of their own, heads of a layer's norm differ in size as well, which aligning does not undo.
@pytest.mark.parametrize(("name", "partition"), [("mha", PARTITION), ("gqa", ((0, 2), (1,)))])
@pytest.mark.parametrize(("span", "merge"), [("head", "aligned"), ("head", "principal"), ("layer", "principal")])
def test_heads_that_are_rotations_of_each_other_share_one_exactly(span: str, merge: str, name: str, partition):
    weights, hidden, activations, moments = layer(span, like_first=True, name=name)
    base, expected, found = moments.shape, base_scores(activations, moments.shape), {}
    for method in ("mean", merge):
        shared = merge_layer(moments, weights, partition, SharedShape.of_width(base), method)
        if method == "mean":
            gain = torch.ones(base.num_attention_heads, base.rotary_dim // 2, dtype=torch.complex128)
            scale = torch.ones(base.num_attention_heads, base.head_dim, dtype=torch.float64)
            shared = replace(shared, query_gain=gain, query_scale=scale)
        found[method] = (scores(shared, weights, hidden) - expected).norm() / expected.norm()
    assert found[merge] < 1e-10 < 0.1 < found["mean"]


@pytest.mark.parametrize("span", SPANS)
def test_scales_that_differ_within_a_pair_cost_little_and_it_is_measured(span: str):
    errors, spreads = [], []
    for within in (0.0, 0.05, 0.2):
        weights, hidden, activations, moments = layer(span, within, like_first=True)
        shared = merge_layer(moments, weights, PARTITION, SharedShape.of_width(moments.shape), "principal")
        expected = base_scores(activations, moments.shape)
        errors.append(((scores(shared, weights, hidden) - expected).norm() / expected.norm()).item())
        own = (hidden @ weights.query.T).unflatten(-1, (-1, 8))
        fitted = fitted_queries(shared, weights, hidden)
        if span == "layer":
            own, fitted = own.flatten(1)[:, None], fitted.flatten(1)[:, None]
        spreads.append(divisor_spread(own, fitted, torch.arange(own.shape[1])))
    assert errors[0] < 1e-10 and spreads[0] < 1e-10
    assert 1e-3 < errors[1] < 0.15 and errors[1] < errors[2] < 0.5
    assert 1e-3 < spreads[1] < 0.1 and spreads[1] < spreads[2] < 0.3


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("width", [8, 16, 12])
def test_mean_squares_are_those_of_the_activations(span: str, width: int):
    """The divisors of shared keys and fitted queries are on average those of the base."""
    weights, hidden, activations, moments = layer(span, signs=span == "layer")
    shape = SharedShape.of_width(moments.shape, width)
    shared = merge_layer(moments, weights, PARTITION, shape, "principal")
    key = torch.einsum("ne,gwe->ngw", hidden, shared.key)
    own = activations["key_before_norm"][0].unflatten(-1, (-1, 8))
    if span == "layer":
        torch.testing.assert_close(key.square().mean(), own.square().mean())
        query = fitted_queries(shared, weights, hidden)
        torch.testing.assert_close(query.square().mean(), activations["query_before_norm"].square().mean())
        return
    for index, members in enumerate(PARTITION):
        torch.testing.assert_close(key[:, index].square().mean(), own[:, list(members)].square().mean())


def test_rows_that_are_zero_throughout_keep_scales_of_one():
    """A lone head's key without a pair, and the queries of a head whose mates alone have that pair."""
    weights, _, _, moments = layer("layer", empty=(0, 1))
    shared = merge_layer(moments, weights, PARTITION, SharedShape.of_width(moments.shape), "principal")
    assert shared.key[1, 2].abs().max() == 0 and shared.query_gain[0, 2].abs() < 1e-12
    assert torch.equal(shared.key_norm[1, [2, 6]], torch.ones(2).double())
    torch.testing.assert_close(shared.query_norm[0, [2, 6]], torch.ones(2).double())


def test_logits_keep_their_mean_energy():
    """What members get back of their keys, times their queries: the same before and behind the shared norms."""
    weights, hidden, activations, moments = layer("head")
    shared = merge_layer(moments, weights, PARTITION, SharedShape.of_width(moments.shape), "principal")
    query = fitted_queries(shared, weights, hidden)
    key = torch.einsum("ne,gwe->ngw", hidden, shared.key)
    # Divisors at their root mean squares over tokens, which is what the number in the norm is computed from.
    query = query / query.square().mean((0, 2), keepdim=True).sqrt() * shared.query_norm
    key = key / key.square().mean((0, 2), keepdim=True).sqrt() * shared.key_norm
    query, key = (torch.complex(*rows.chunk(2, dim=-1)) for rows in (query, key))
    groups = [0, 1, 0, 0]
    energy = (query.abs().square().mean(0) * key.abs().square().mean(0)[groups]).sum()
    kept = moments.key_energy * 2 - 2 * principal_loss(moments)
    assert energy.item() == pytest.approx(kept.item(), rel=0.008)  # divisors of single tokens differ
    assert abs(energy / (moments.key_energy * 2) - 1) > 0.1  # not the energy of all that there was


def principal_loss(moments) -> torch.Tensor:
    lost = torch.zeros((), dtype=torch.float64)
    for members in PARTITION:
        gram = moments.key_gram[:, list(members)][:, :, list(members)]
        lost += torch.linalg.eigvalsh(gram)[:, :-1].sum() / 2
    return lost


@pytest.mark.parametrize("span", SPANS)
def test_lone_heads_stay_bitwise_what_they_are(span: str):
    weights, _, _, moments = layer(span, within=0.2)
    shape = SharedShape.of_width(moments.shape)
    shared = merge_layer(moments, weights, LONE, shape, "principal")
    mean = mean_heads(weights, LONE, shape)
    for name in ("key", "query_norm", "key_norm"):
        assert torch.equal(getattr(shared, name), getattr(mean, name))
    assert torch.equal(shared.key, weights.key.unflatten(0, (4, 8))[[2, 0, 3, 1]])
    assert shared.query_gain is None and shared.query_scale is None


def test_one_head_as_wide_as_all_is_lossless_behind_a_norm_of_the_layer():
    weights, hidden, activations, moments = layer("layer")
    common = weights.key_norm[:8].repeat(4)
    behind = activations["key"] / weights.key_norm * common
    moments = moments_of(moments.shape, {**activations, "key": behind}, output=weights.output)
    weights = replace(weights, key_norm=common)
    expected = base_scores({**activations, "key": behind}, moments.shape)
    for width, exact in ((32, True), (16, False)):
        shared = merge_layer(
            moments, weights, ((0, 1, 2, 3),), SharedShape.of_width(moments.shape, width), "principal"
        )
        error = (scores(shared, weights, hidden) - expected).norm() / expected.norm()
        assert (error < 1e-10) == exact


def test_a_spread_of_divisors_is_what_was_put_in():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4000, 2, 8, generator=generator, dtype=torch.float64)
    assert divisor_spread(rows, 3 * rows[:, :1], torch.tensor([0, 0])) > 0.1
    assert divisor_spread(rows[:, :1], 3 * rows[:, :1], torch.tensor([0])) < 1e-12
    noise = torch.exp(0.05 * torch.randn(4000, 1, 1, generator=generator, dtype=torch.float64))
    assert divisor_spread(rows[:, :1], noise * rows[:, :1], torch.tensor([0])) == pytest.approx(0.05, rel=0.05)


@pytest.mark.parametrize("name", ["qwen3", "olmo2", "qwen3-wide", "olmo2-wide"])
@torch.no_grad()
def test_empty_slots_of_the_plain_model_stay_zero_behind_the_norm(name: str):
    plain = adapted(name).merge_and_unload().eval()
    site, seen = attention_sites(plain)[0], []
    source = site.query_norm
    source.register_forward_hook(lambda _module, _args, output: seen.append(output))
    plain(input_ids=prompt())
    slots = seen[0].reshape(2 * 12, site.shape.num_attention_heads, -1)
    empty = slots.abs().amax((0, 2)) == 0
    assert 0 < empty.sum() < len(empty) and empty.sum() == len(empty) - 8
    assert seen[0].isfinite().all()


def test_the_report_tells_how_far_norms_are_off_and_only_then():
    for model_type in ("qwen3", "olmo2", "llama"):
        base = random_model(tiny_config(model_type))
        for groups, expected in ((4, model_type != "llama"), (8, False)):
            model = get_peft_model(random_model(base.config), adapter_config(num_key_value_heads=groups)).eval()
            report = initialize_asymgqa_weights(model, prompt(8, 24).split(4), progress=False)
            notes = [note for note in report.notes if "norms of shared heads divide" in note]
            assert len(notes) == expected
            if groups == 8:
                truth = base(input_ids=prompt(4, 20, seed=9)).logits
                assert relative_error(model, truth) < 1e-5
