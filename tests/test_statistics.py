"""Streaming statistics: theorems about LayerStatistics, LayerMoments and the recording hooks."""

import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from asymgqa_peft.heads import HeadShape
from asymgqa_peft.initialize.streams import recording
from asymgqa_peft.method.linalg import metric_root
from asymgqa_peft.method.statistics import LayerMoments, LayerStatistics

SHAPES = {
    "mha": HeadShape(24, 4, 4, 8, 8),
    "partial rotary": HeadShape(24, 4, 4, 8, 4),
    "no rotary": HeadShape(24, 4, 4, 8, 0),
    "gqa": HeadShape(24, 6, 3, 6, 6),
    "partial rotary, gqa": HeadShape(24, 6, 3, 6, 2),
}


def random_activations(shape: HeadShape, batch: int, time: int, seed: int = 0, dtype=torch.float64) -> dict:
    """Correlated heads with unequal energies: every entry of every Gram is nonzero."""
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int) -> torch.Tensor:
        size = heads * shape.head_dim
        mix = torch.randn(size, size, generator=generator, dtype=torch.float64) / size**0.5
        sample = torch.randn(batch, time, size, generator=generator, dtype=torch.float64) @ mix
        return (sample + 0.3 * torch.randn(size, generator=generator, dtype=torch.float64)).to(dtype)

    kv = shape.base_kv_heads
    return {"query": draw(shape.num_attention_heads), "key": draw(kv), "value": draw(kv)}


def random_output(shape: HeadShape, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    width = shape.num_attention_heads * shape.head_dim
    return torch.randn(shape.hidden_size, width, generator=generator, dtype=torch.float64)


def moments_of(shape: HeadShape, *batches: dict, output: torch.Tensor | None = None) -> LayerMoments:
    statistics = LayerStatistics(shape)
    for batch in batches:
        statistics.update(**batch)
    return statistics.moments(random_output(shape) if output is None else output)


TENSORS = [
    "key_gram", "key_root", "key_pass", "pass_root", "value_cov", "value_root", "key_cosine", "value_cosine",
]  # fmt: skip


def assert_same(a: LayerMoments, b: LayerMoments, tolerance: float = 1e-10) -> None:
    assert a.tokens == b.tokens
    for name in TENSORS:
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("name", SHAPES)
def test_moments_equal_the_definition(name):
    """Token by token, head by head, straight from the docstring."""
    shape = SHAPES[name]
    data = random_activations(shape, 3, 7)
    output = random_output(shape)
    moments = moments_of(shape, data, output=output)
    kv, r, dim, half = shape.base_kv_heads, shape.queries_per_kv, shape.head_dim, shape.rotary_dim // 2
    query = data["query"].reshape(-1, kv, r, dim)
    key, value = (data[part].reshape(-1, kv, dim) for part in ("key", "value"))
    metric = [sum(w.T @ w for w in output.split(dim, dim=1)[k * r : (k + 1) * r]) for k in range(kv)]
    centred = key[..., shape.rotary_dim :] - key[..., shape.rotary_dim :].mean(0)
    for k in range(kv):
        torch.testing.assert_close(moments.value_root[k] @ moments.value_root[k], metric[k])
        for m in range(kv):
            for f in range(half):
                kappa = torch.complex(key[:, :, f], key[:, :, f + half])
                energy = (query[..., f] ** 2 + query[..., f + half] ** 2).mean(0).sum(-1)
                gram = (energy[k] * energy[m]).sqrt() * (kappa[:, k] * kappa[:, m].conj()).mean()
                torch.testing.assert_close(moments.key_gram[f, k, m], gram)
            block = moments.value_cov[k * dim : (k + 1) * dim, m * dim : (m + 1) * dim]
            outer = value[:, k].T @ value[:, m] / len(key)
            torch.testing.assert_close(block, moments.value_root[k] @ outer @ moments.value_root[m])
            cosine = torch.cosine_similarity(key[:, k], key[:, m], dim=-1).mean()
            torch.testing.assert_close(moments.key_cosine[k, m], cosine)
            cosine = torch.cosine_similarity(value[:, k], value[:, m], dim=-1).mean()
            torch.testing.assert_close(moments.value_cosine[k, m], cosine)
            rest = shape.pass_dim
            if rest:
                block = moments.key_pass[k * rest : (k + 1) * rest, m * rest : (m + 1) * rest]
                outer = centred[:, k].T @ centred[:, m] / len(key)
                torch.testing.assert_close(block, moments.pass_root[k] @ outer @ moments.pass_root[m])
    for k in range(kv if shape.pass_dim else 0):
        tail = query[:, k, :, shape.rotary_dim :].flatten(0, 1)
        torch.testing.assert_close(moments.pass_root[k] @ moments.pass_root[k], tail.T @ tail / len(key))


@settings(max_examples=20, deadline=None)
@given(
    name=st.sampled_from(sorted(SHAPES)),
    cuts=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    order=st.randoms(use_true_random=False),
    seed=st.integers(0, 99),
)
def test_streaming_equals_whole_batch(name, cuts, order, seed):
    shape = SHAPES[name]
    data = random_activations(shape, sum(cuts), 5, seed)
    mask = torch.rand(sum(cuts), 5, generator=torch.Generator().manual_seed(seed)) < 0.8
    mask[:, 0] = True
    data["mask"] = mask
    split = [x.split(cuts) for x in data.values()]
    pieces = [dict(zip(data, parts, strict=True)) for parts in zip(*split, strict=True)]
    order.shuffle(pieces)
    assert_same(moments_of(shape, *pieces), moments_of(shape, data))


@pytest.mark.parametrize("name", SHAPES)
def test_padding_counts_for_nothing(name):
    shape = SHAPES[name]
    data = random_activations(shape, 2, 6)
    padded = {part: torch.cat((torch.full_like(x[:, :3], 1e3), x), dim=1) for part, x in data.items()}
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[:, :3] = 0
    assert_same(moments_of(shape, {**padded, "mask": mask}), moments_of(shape, data))
    assert moments_of(shape, padded).value_energy > 100 * moments_of(shape, data).value_energy  # they would count


def test_half_precision_is_no_worse_than_its_rounding():
    shape = SHAPES["mha"]
    rounded = random_activations(shape, 4, 64, dtype=torch.bfloat16)
    exact = {part: x.double() for part, x in rounded.items()}
    assert_same(moments_of(shape, rounded), moments_of(shape, exact), tolerance=1e-5)


def test_phases_of_rotary_position_leave_the_gram_alone():
    """RoPE turns all heads' keys of a token alike: the Gram of keys before and after is the same."""
    shape = SHAPES["mha"]
    data = random_activations(shape, 2, 6)
    angle = torch.rand(1, 6, 1, shape.head_dim // 2, dtype=torch.float64) * 6
    first, second = data["key"].unflatten(-1, (-1, shape.head_dim)).chunk(2, dim=-1)
    turned = torch.cat((first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()), -1)
    after = moments_of(shape, {**data, "key": turned.flatten(2)})
    before = moments_of(shape, data)
    torch.testing.assert_close(after.key_gram, before.key_gram)
    assert not torch.allclose(turned.flatten(2), data["key"], atol=0.1)


@pytest.mark.parametrize("part", ["query", "key", "value"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_is_an_error(part, bad):
    shape = SHAPES["partial rotary"]
    data = random_activations(shape, 2, 3)
    data[part][1, 2, -1] = bad
    with pytest.raises(ValueError, match="NaN or inf"):
        moments_of(shape, data)


def test_no_tokens_is_an_error():
    shape = SHAPES["mha"]
    data = random_activations(shape, 2, 3)
    with pytest.raises(ValueError, match="attention_mask"):
        moments_of(shape, {**data, "mask": torch.zeros(2, 3)})


def test_root_can_be_inverted_even_where_nothing_reads_a_head():
    metric = torch.zeros(3, 4, 4, dtype=torch.float64)
    metric[0] = torch.diag(torch.tensor([4.0, 1.0, 0.0, 0.0], dtype=torch.float64))
    metric[1] = torch.eye(4, dtype=torch.float64) * 1e-3
    root = metric_root(metric)
    inverse = torch.linalg.inv(root)
    assert torch.isfinite(inverse).all()
    torch.testing.assert_close(root @ root, metric, atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(root @ inverse, torch.eye(4, dtype=torch.float64).repeat(3, 1, 1))


def test_recording_removes_its_hooks_and_names_what_never_ran():
    used, unused = nn.Linear(3, 3), nn.Linear(3, 3)
    silent = pytest.raises(ValueError, match="layer 3 v_proj never ran")
    with silent, recording({"layer 3 k_proj": used, "layer 3 v_proj": unused}):
        used(torch.zeros(1, 3))
    with pytest.raises(KeyboardInterrupt), recording({}, {"o_proj": used}):
        raise KeyboardInterrupt  # is not hidden by the check
    x = torch.randn(1, 3)
    with recording({"out": used}, {"in": used}) as record:
        y = used(x)
    assert record["in"] is x and record["out"] is y
    for module in (used, unused):
        assert not module._forward_hooks and not module._forward_pre_hooks


def _reduced_on_rank(rank: int, world: int, path: str, results) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{path}", rank=rank, world_size=world)
    shape = SHAPES["partial rotary"]
    data = random_activations(shape, 4, 5)
    statistics = LayerStatistics(shape)
    for index in range(rank, 4, world):
        statistics.update(**{part: x[index : index + 1] for part, x in data.items()})
    statistics.reduce()
    moments = statistics.moments(random_output(shape))
    results[rank] = {name: getattr(moments, name).numpy() for name in TENSORS} | {"tokens": moments.tokens}
    torch.distributed.destroy_process_group()


@pytest.mark.slow  # seconds, nearly all of them imports; test_initialize.py runs the whole path on two ranks
def test_two_ranks_equal_one(tmp_path):
    shape = SHAPES["partial rotary"]
    alone = moments_of(shape, random_activations(shape, 4, 5))
    results = mp.get_context("spawn").Manager().dict()
    mp.spawn(_reduced_on_rank, args=(2, str(tmp_path / "rendezvous"), results), nprocs=2)
    for rank in (0, 1):
        assert results[rank]["tokens"] == alone.tokens
        for name in TENSORS:
            torch.testing.assert_close(torch.from_numpy(results[rank][name]), getattr(alone, name))
            assert (results[rank][name] == results[0][name]).all()
