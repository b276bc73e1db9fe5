"""The output refit: optimality, rank, and that it never does harm on its own data."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asymgqa_peft.method.refit import OutputRefit

E, WIDTH, TOKENS = 10, 12, 60


def problem(seed: int = 0, tokens: int = TOKENS):
    """A projection W, correlated inputs Z of unequal directions, targets that take a full-rank change."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    weight = draw(E, WIDTH)
    inputs = draw(2, tokens // 2, WIDTH) @ (draw(WIDTH, WIDTH) * torch.logspace(0, -2, WIDTH))
    targets = inputs @ (weight + draw(E, WIDTH)).T + 0.1 * draw(2, tokens // 2, E)
    return weight, inputs, targets


def fitted(weight, inputs, targets, **kwargs) -> OutputRefit:
    refit = OutputRefit(weight, **kwargs)
    refit.update(inputs, targets)
    return refit


def error(weight, inputs, targets) -> torch.Tensor:
    return (targets - inputs @ weight.T).square().sum()


def gram(inputs) -> torch.Tensor:
    """Z Z^T (H D, H D) of inputs Z^T (B, T, H D)."""
    z = inputs.flatten(0, 1).T
    return z @ z.T


def test_change_is_the_ridge_solution():
    weight, inputs, targets = problem()
    z, y = inputs.flatten(0, 1).T, targets.flatten(0, 1).T
    ridge = 1e-3 * gram(inputs).diagonal().mean() * torch.eye(WIDTH).double()
    solution = (y @ z.T + weight @ ridge) @ torch.linalg.inv(gram(inputs) + ridge)
    torch.testing.assert_close(weight + fitted(weight, inputs, targets, damping=1e-3).change(), solution)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), rank=st.integers(1, 14), scaling=st.sampled_from([0.25, 1.0, 2.0]))
def test_never_raises_the_error_and_a_higher_rank_is_no_worse(seed, rank, scaling):
    weight, inputs, targets = problem(seed)
    refit = fitted(weight, inputs, targets)
    lora_a, lora_b = refit.low_rank(rank, scaling)
    assert lora_a.shape == (min(rank, E), WIDTH) and lora_b.shape == (E, min(rank, E))
    change = scaling * lora_b @ lora_a
    before, after = error(weight, inputs, targets), error(weight + change, inputs, targets)
    assert after < before
    torch.testing.assert_close(refit.objective(change) - refit.objective(0 * change), after - before)
    ridge = refit.damping * gram(inputs).diagonal().mean()
    larger = scaling * torch.mm(*reversed(refit.low_rank(rank + 1, scaling)))
    penalised = [error(weight + x, inputs, targets) + ridge * x.square().sum() for x in (change, larger)]
    assert penalised[1] <= penalised[0] * (1 + 1e-9)


@pytest.mark.parametrize("scaling", [0.5, -0.5])
@pytest.mark.parametrize("rank", [min(E, WIDTH), E + 3])
def test_enough_rank_is_the_full_solution(rank, scaling):
    refit = fitted(*problem())
    lora_a, lora_b = refit.low_rank(rank, scaling)
    torch.testing.assert_close(scaling * lora_b @ lora_a, refit.change())


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_activation_metric_beats_plain_svd(rank):
    """The rank goes where activations go. Over seeds: never worse, and much better at least once."""
    ratios = []
    for seed in range(8):
        weight, inputs, targets = problem(seed)
        refit = fitted(weight, inputs, targets, damping=1e-8)
        left, values, right = torch.linalg.svd(refit.change())
        plain = left[:, :rank] @ values[:rank].diag() @ right[:rank]
        ours = torch.mm(*reversed(refit.low_rank(rank)))
        ratios.append((error(weight + ours, inputs, targets) / error(weight + plain, inputs, targets)).item())
    assert max(ratios) <= 1 + 1e-9 and min(ratios) < 0.5


@settings(max_examples=15, deadline=None)
@given(cut=st.integers(1, TOKENS // 2 - 1), seed=st.integers(0, 99))
def test_streaming_equals_whole_batch_and_padding_does_not_count(cut, seed):
    weight, inputs, targets = problem(seed)
    whole = fitted(weight, inputs, targets)
    parts = OutputRefit(weight)
    mask = torch.ones(2, TOKENS // 2 - cut + 2)
    mask[:, -2:] = 0
    junk = torch.full((2, 2, 1), 1e3, dtype=torch.float64)
    parts.update(
        torch.cat((inputs[:, cut:], junk.expand(-1, -1, WIDTH)), 1),
        torch.cat((targets[:, cut:], junk.expand(-1, -1, E)), 1),
        mask,
    )
    parts.update(inputs[:, :cut], targets[:, :cut])
    torch.testing.assert_close(parts.change(), whole.change())


def test_nothing_to_repair_changes_nothing():
    weight, inputs, _ = problem()
    refit = fitted(weight, inputs, inputs @ weight.T)
    lora_a, lora_b = refit.low_rank(3)
    assert (lora_b @ lora_a).norm() < 1e-9 * weight.norm()
    assert torch.isfinite(lora_a).all() and lora_b.norm() > 0  # both zero would never train
    identity = torch.eye(WIDTH // 3).double().expand(3, -1, -1)
    torch.testing.assert_close(refit.output_mix(3), identity, rtol=0, atol=1e-9)


def test_before_any_token_nothing_changes():
    weight, _, _ = problem()
    refit = OutputRefit(weight)
    assert not refit.change().any()
    lora_a, lora_b = refit.low_rank(3)
    assert not (lora_b @ lora_a).any()


def test_a_head_mix_is_the_identity_where_a_head_writes_nothing():
    """In the directions that o_proj does not read from a head, any matrix is as good: it stays the one that it is."""
    weight, inputs, targets = problem()
    weight[:, :4] = 0  # the first of three heads, and a direction of the second
    weight[:, 4] = 0
    first, second, third = fitted(weight, inputs, targets).output_mix(3)
    identity = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(first, identity)
    torch.testing.assert_close(second[0], identity[0])
    assert (third - identity).abs().max() > 0.1


def test_factors_are_balanced():
    lora_a, lora_b = fitted(*problem()).low_rank(4, scaling=2.0)
    torch.testing.assert_close(lora_a.norm(), lora_b.norm())


def test_not_finite_is_an_error():
    weight, inputs, targets = problem()
    inputs[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or inf"):
        fitted(weight, inputs, targets).low_rank(2)


def test_sums_that_rounding_left_indefinite_take_a_stronger_ridge():
    """By more than the ridge, as those of 16 bits on a GPU are where nearly all energy has one direction."""
    weight, inputs, targets = problem()
    spoilt, damped = fitted(weight, inputs, targets), fitted(weight, inputs, targets, damping=0.1)
    values, vectors = torch.linalg.eigh(gram(inputs))
    mean = values.mean()
    for refit in (spoilt, damped):
        # The least eigenvalue becomes -0.05 of the mean one: a ridge of 0.001 or 0.01 does not lift it above zero.
        refit._inputs -= (values[0] + 0.05 * mean) * torch.outer(vectors[:, 0], vectors[:, 0])
    assert torch.linalg.eigvalsh(spoilt._inputs)[0] < -0.04 * mean
    torch.testing.assert_close(spoilt.change(), damped.change())


def test_subspace_iteration_finds_the_best_change_of_a_wide_layer():
    """Wide enough to leave the exact eigensolver: as good as the exact singular vectors."""
    generator = torch.Generator().manual_seed(0)
    width, tokens, rank = 200, 600, 4
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64) * torch.logspace(0, -1, width)
    inputs = torch.randn(1, tokens, width, generator=generator, dtype=torch.float64) @ mix
    weight, other = torch.randn(2, width, width, generator=generator, dtype=torch.float64)
    refit = fitted(weight, inputs, inputs @ other.T)
    ridge = refit.damping * gram(inputs).diagonal().mean() * torch.eye(width).double()
    values, vectors = torch.linalg.eigh(gram(inputs) + ridge)
    root = vectors * values.sqrt() @ vectors.T
    left = torch.linalg.svd(refit.change() @ root)[0][:, :rank]

    def lost(change):
        return ((change - refit.change()) @ root).norm()

    lora_a, lora_b = refit.low_rank(rank)
    assert lora_a.shape == (rank, width) and lora_b.shape == (width, rank)
    assert lost(lora_b @ lora_a) < lost(left @ left.T @ refit.change()) * 1.001


def head_matrices(heads: int, seed: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = WIDTH // heads
    return torch.eye(size).double() + 0.5 * torch.randn(heads, size, size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("heads", [2, 3, 6])
def test_head_mix_finds_matrices_that_stood_in_front_of_the_output(heads):
    weight, inputs, _ = problem()
    planted = head_matrices(heads)
    targets = inputs @ (weight @ torch.block_diag(*planted)).T
    mix = fitted(weight, inputs, targets, damping=1e-12).output_mix(heads)
    torch.testing.assert_close(mix, planted, rtol=2e-3, atol=2e-3)


def test_with_head_mix_is_the_regression_on_mixed_inputs():
    weight, inputs, targets = problem()
    mix = head_matrices(3)
    mixed = inputs @ torch.block_diag(*mix).T
    ours, direct = fitted(weight, inputs, targets).with_output_mix(mix), fitted(weight, mixed, targets)
    torch.testing.assert_close(ours.change(), direct.change())
    change = ours.change()
    expected = error(weight + change, mixed, targets) - targets.square().sum()
    torch.testing.assert_close(ours.objective(change), expected)


def test_mix_and_low_rank_beat_low_rank_alone_where_heads_turned():
    weight, inputs, _ = problem()
    targets = inputs @ (weight @ torch.block_diag(*head_matrices(3))).T
    refit = fitted(weight, inputs, targets)
    alone = refit.objective(torch.mm(*reversed(refit.low_rank(2))))
    mixed = refit.with_output_mix(refit.output_mix(3))
    together = mixed.objective(torch.mm(*reversed(mixed.low_rank(2))))
    assert together - refit.objective(refit.change()) < 0.1 * (alone - refit.objective(refit.change()))


@pytest.mark.parametrize(("width", "factorisation"), [(400, "qr"), (60, "eigh")])
def test_factorisations_take_one_thread_and_give_the_others_back(width: int, factorisation: str, monkeypatch):
    """More of them wait for each other at every column, on a busy machine for most of the time."""
    generator = torch.Generator().manual_seed(0)
    refit = OutputRefit(torch.randn(width, 24, generator=generator))
    refit.update(torch.randn(1, 90, 24, generator=generator), torch.randn(1, 90, width, generator=generator))
    threads, own = [], getattr(torch.linalg, factorisation)

    def watched(matrix):
        if matrix.shape[-2] == width:
            threads.append(torch.get_num_threads())
        return own(matrix)

    monkeypatch.setattr(torch.linalg, factorisation, watched)
    torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        refit.low_rank(4)
        assert set(threads) == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
