"""The bare recovery loop of the benchmarks: loss and step against autograd, its shortcuts against doing without."""

from __future__ import annotations

import copy

import pytest
import torch
from models import adapter_config, random_model, tiny_config, wrap
from peft import get_peft_model
from torch.nn import functional as F

from asymgqa_peft import initialize_asymgqa_weights
from recipes.benchmarks import recovery_loop, wide_heads
from recipes.benchmarks.recovery_loop import Recovery, RecoveryOptions, RoundedWeights, Stack, lessons_of

BLOCKS, LENGTH, VOCAB = 4, 12, 101


@pytest.fixture
def base():
    """9 query and 3 KV heads, as in SmolLM2."""
    sizes = {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 3}
    return random_model(tiny_config("llama", **sizes), attention="sdpa").requires_grad_(False)


@pytest.fixture
def blocks():
    return torch.randint(0, VOCAB, (BLOCKS, LENGTH), generator=torch.Generator().manual_seed(0))


GROUPS = [[[0, 2], [1]], [[0], [1, 2]], [[0, 1], [2]]]


def options(*words: str) -> RecoveryOptions:
    """Options as the command line gives them."""
    common = ["--model", "x", "--batch-size", str(BLOCKS), "--micro-batch", "2", *words]
    return wide_heads.parse_args(common).recoveries[0]


def recovery(base, words: str = "", width: int | None = None, **settings) -> Recovery:
    """Of an adapter whose every parameter is random."""
    model = wrap(copy.deepcopy(base), GROUPS, head_dim=width, refit_output=False)
    return Recovery(model, base, base.lm_head.weight, options(*words.split()), LENGTH, **settings)


# --------------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("objective", ["kl", "sft"])
def test_the_loss_in_chunks_is_the_weighted_sum_in_float64(objective: str):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 12, 16, dtype=torch.float64, generator=generator)
    head = torch.randn(50, 16, dtype=torch.float64, generator=generator)
    labels, weights = torch.arange(12) * 4, torch.linspace(0.1, 2.0, 12, dtype=torch.float64)
    student.requires_grad_()
    expected = F.cross_entropy(student @ head.T, labels, reduction="none")
    if objective == "kl":
        q, p = (student @ head.T).log_softmax(-1), (teacher @ head.T).log_softmax(-1)
        expected = F.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    terms = recovery_loop.TERMS[objective]
    loss = recovery_loop.LogitLoss.apply(student, teacher, labels, weights, head, 4, terms)
    torch.testing.assert_close(loss.double(), (weights * expected).sum(), rtol=1e-6, atol=0)
    gradient = torch.autograd.grad(3 * loss, student)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(3 * (weights * expected).sum(), student)[0])


# --------------------------------------------------------------------------------------------------------- the step


@pytest.mark.parametrize("words", ["", "--objective sft", "--token-weights loss", "--match-hidden 0.7"])
def test_a_step_has_the_gradient_of_the_whole_batch(base, blocks, words: str):
    """Against the models' own forward passes; gradients are clipped at norm 1."""
    loop = recovery(base, words)
    lessons = lessons_of(base, base.lm_head.weight, blocks, with_loss=True)
    loop.ids.copy_(blocks)
    loop.teacher.copy_(lessons.states)
    if "loss" in words:
        loop.weights.copy_(lessons.loss)
    student = loop.model(blocks, output_hidden_states=True)
    wanted = base(blocks, output_hidden_states=True)
    labels = blocks[:, 1:].flatten()
    q, p = (x.logits[:, :-1].flatten(0, 1).log_softmax(-1) for x in (student, wanted))
    loss = F.kl_div(q, p, log_target=True, reduction="none").sum(-1).unflatten(0, (BLOCKS, -1))
    own = F.nll_loss(p, labels, reduction="none").unflatten(0, (BLOCKS, -1))
    if "sft" in words:
        loss = F.nll_loss(q, labels, reduction="none")
    if "loss" in words:
        loss = loss * own / own.mean(1, keepdim=True)
    loss = loss.mean()
    if "hidden" in words:
        # The last state that transformers returns is normed already.
        last = []
        handles = [
            model.model.norm.register_forward_pre_hook(lambda _, args: last.append(args[0]))
            for model in (loop.model.get_base_model(), base)
        ]
        loop.model(blocks), base(blocks)
        for handle in handles:
            handle.remove()
        pairs = [*zip(student.hidden_states[1:-1], wanted.hidden_states[1:-1], strict=True), tuple(last)]
        errors = [((s - t).square().sum(-1) / t.square().sum(-1)).mean() for s, t in pairs]
        loss = loss + 0.7 * sum(errors) / len(errors)
    expected = torch.autograd.grad(loss, loop.parameters)
    norm = torch.stack([gradient.norm() for gradient in expected]).norm()
    assert norm > 0.1
    scale = min(1.0, 1.0 / (norm.item() + 1e-6))
    loop.set_rate(0.0)
    loop.step()
    torch.testing.assert_close(loop.loss, loss.detach(), rtol=1e-5, atol=1e-6)
    for parameter, gradient in zip(loop.parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, scale * gradient, rtol=1e-3, atol=1e-6)


def test_every_run_starts_anew_and_moves_everything(base, blocks):
    loop = recovery(base)
    lessons = lessons_of(base, base.lm_head.weight, blocks, with_loss=False)
    order = torch.arange(BLOCKS).repeat(6)
    first = loop.run(blocks, lessons, order)
    assert first["losses"][-1] < 0.9 * first["losses"][0]
    moved = [not torch.equal(parameter, start) for parameter, start in zip(loop.parameters, loop.start, strict=True)]
    assert all(moved)
    assert loop.run(blocks, lessons, order)["losses"] == first["losses"]


def test_the_average_of_weights_is_exponential(base, blocks, monkeypatch):
    loop = recovery(base, "--ema 0.75")
    lessons = lessons_of(base, base.lm_head.weight, blocks, with_loss=False)
    seen = [[start.clone() for start in loop.start]]
    step = loop.step

    def recorded() -> None:
        step()
        seen.append([parameter.detach().clone() for parameter in loop.parameters])

    monkeypatch.setattr(loop, "step", recorded)
    loop.run(blocks, lessons, torch.arange(BLOCKS).repeat(3))
    assert len(seen) == 4
    for index, parameter in enumerate(loop.parameters):
        expected = seen[0][index]
        for weights in seen[1:]:
            expected = 0.75 * expected + 0.25 * weights[index]
        torch.testing.assert_close(parameter.detach(), expected)


def test_kv_heads_learn_at_a_rate_of_their_own(base):
    loop = recovery(base, "--kv-scale 0.25")
    loop.set_rate(8.0)
    assert [group["lr"] for group in loop.optimizer.param_groups] == [8.0, 2.0]
    slow = {id(parameter) for parameter in loop.optimizer.param_groups[1]["params"]}
    found = {name.split(".")[-3] for name, parameter in loop.model.named_parameters() if id(parameter) in slow}
    assert found == {"lora_kv", "lora_query_gain", "lora_value_mix"}


def test_options_that_contradict_each_other_are_refused(capsys):
    for words, said in (("--micro-batch 3", "must divide"), ("--objective sft --match-hidden 1", "sft")):
        with pytest.raises(SystemExit):
            options(*words.split())
        assert said in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------- the shortcuts


@pytest.mark.parametrize("width", [None, 16])
def test_the_stack_is_the_model(base, blocks, width: int | None):
    model = wrap(copy.deepcopy(base), GROUPS, head_dim=width).train()
    for each in (base, model):
        hidden = Stack(each, LENGTH).hidden(blocks)
        torch.testing.assert_close(hidden @ base.lm_head.weight.T, each(blocks).logits, rtol=1e-4, atol=1e-4)


def test_lessons_are_the_bases_states_and_its_loss_with_mean_one(base, blocks):
    lessons = lessons_of(base, base.lm_head.weight, blocks, with_loss=True)
    logits = base(blocks).logits[:, :-1]
    torch.testing.assert_close(lessons.states @ base.lm_head.weight.T, logits, rtol=1e-4, atol=1e-4)
    loss = F.cross_entropy(logits.mT, blocks[:, 1:], reduction="none")
    torch.testing.assert_close(lessons.loss, loss / loss.mean(1, keepdim=True), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lessons.loss.mean(1), torch.ones(BLOCKS))


def test_rounding_once_is_what_autocast_does_at_every_use(base, blocks, monkeypatch):
    monkeypatch.setattr(recovery_loop, "works_in_bf16", lambda device: True)
    model = wrap(copy.deepcopy(base), GROUPS).train()
    stack, before = Stack(model, LENGTH), {name: p.detach().clone() for name, p in model.named_parameters()}
    rounded = RoundedWeights([stack], torch.device("cpu"))

    def gradients() -> tuple:
        with recovery_loop.autocast(torch.device("cpu")):
            hidden = stack.hidden(blocks)
        return hidden, *torch.autograd.grad(hidden.square().sum(), [p for p in model.parameters() if p.requires_grad])

    expected = gradients()
    with rounded.in_use():
        types = {p.dtype for name, p in model.named_parameters() if "mlp" in name and "lora" not in name}
        found = gradients()
    assert types == {torch.bfloat16}
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("width", [None, 16])
def test_all_layers_share_one_compiled_graph(base, blocks, width: int | None):
    """Whatever their groups: a graph for each layer takes minutes to compile."""
    loop = recovery(base, width=width)
    loop.ids.copy_(blocks)
    expected = torch.autograd.grad(loop.loss_of(slice(0, 2)), loop.parameters)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for layer in loop.stack.inner.layers:
        layer.compile(backend="aot_eager", dynamic=False)
    found = torch.autograd.grad(loop.loss_of(slice(0, 2)), loop.parameters)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ the baselines


def test_neighbour_mean_without_refit_is_classic_gqa(base, blocks):
    """What the benchmark calls so is the mean of neighbouring heads, whatever text it is calibrated on."""
    config = adapter_config(grouping="neighbour", merge="mean", refit_output=False)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        before = model(blocks).logits
    initialize_asymgqa_weights(model, [blocks], progress=False)
    with torch.no_grad():
        torch.testing.assert_close(model(blocks).logits, before)
        assert (before - base(blocks).logits).abs().max() > 0.1
