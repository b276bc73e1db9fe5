"""initialize_asymgqa_weights: theorems, determinism, all-or-nothing, errors, and the report."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from models import CASES, adapter_config, config_of, left_padded, prompt, random_model
from peft import get_peft_model
from peft.tuners.lora import LoraLayer

import asymgqa_peft
from asymgqa_peft import InitializationReport, initialize_asymgqa_weights
from asymgqa_peft.adapter.site import attention_sites, unwrap
from asymgqa_peft.batches import checked_batches
from asymgqa_peft.groups import HeadGroups
from asymgqa_peft.heads import SharedShape, mean_heads
from asymgqa_peft.initialize import walk as module
from asymgqa_peft.initialize.starts import row_starts
from asymgqa_peft.initialize.streams import Streams, recording
from asymgqa_peft.method.merge import merge_layer
from asymgqa_peft.method.refit import OutputRefit

IDS = prompt(16, 24)
HELD_OUT = prompt(4, 20, seed=9)


def wrapped(name: str = "llama", dtype: torch.dtype = torch.float32, **choices):
    config = adapter_config(**{"num_key_value_heads": 3, "r": 8} | choices)
    torch.manual_seed(0)
    return get_peft_model(random_model(config_of(CASES[name])).to(dtype), config).eval()


def initialised(name: str = "llama", batches=None, **choices):
    model = wrapped(name, **choices)
    return model, initialize_asymgqa_weights(model, batches or IDS.split(8), progress=False)


@torch.no_grad()
def error_to_base(model) -> float:
    with model.disable_adapter():
        wanted = model(input_ids=HELD_OUT).logits
    return ((model(input_ids=HELD_OUT).logits - wanted).norm() / wanted.norm()).item()


def state_of(model) -> dict:
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "trainable": {name: p.requires_grad for name, p in model.named_parameters()},
        "modes": {name: m.training for name, m in model.named_modules()},
        "hooks": {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()},
        "forwards": [name for name, module in model.named_modules() if "forward" in vars(module)],
        "groups": copy.deepcopy({name: config.head_groups for name, config in model.peft_config.items()}),
        "active": model.active_adapters,
    }


def assert_same_state(before: dict, after: dict) -> None:
    for part in before.keys() - {"tensors"}:
        assert before[part] == after[part], part
    assert before["tensors"].keys() == after["tensors"].keys()
    for name, tensor in before["tensors"].items():
        assert torch.equal(tensor, after["tensors"][name]), name


# --------------------------------------------------------------------------------------------------- theorems


@pytest.mark.parametrize("merge", ["mean", "aligned", "principal"])
@pytest.mark.parametrize("name", ["llama-bias", "qwen2-gqa", "qwen3", "gemma3", "stablelm", "olmo2", "phi3", "opt"])
def test_as_many_groups_as_heads_reproduce_the_model(name, merge):
    model, report = initialised(name, num_key_value_heads=CASES[name].kv_heads, merge=merge)
    assert error_to_base(model) < 1e-5
    assert report.costs == [0, 0]


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt_neox", "olmo2-gqa", "gemma2-gqa"])
def test_each_part_of_the_default_helps(name):
    """Better than the mean it starts from, than without refit, and (summed) than neighbours by the same cost.

    On enough tokens: with few, the refit learns them by heart.
    """
    batches = prompt(64, 48, seed=4).split(16)
    mean = wrapped(name, merge="mean", grouping="neighbour")
    plain, _ = initialised(name, batches, refit_output=False)
    full, report = initialised(name, batches)
    assert error_to_base(full) < error_to_base(plain) < error_to_base(mean)
    assert sum(report.costs) <= sum(report.neighbour_costs)


@pytest.mark.parametrize("name", ["llama", "qwen2-gqa", "phi"])
def test_refit_is_solved_on_the_converted_stream(name):
    """The last layer's LoRA is what a refit on the finished model's own inputs gives.

    It aims at the original stream behind the attention: the original output plus what earlier layers have lost, each
    token's error relative to its own stream. Rows that begin differently bring starts with them.
    """
    model, _ = initialised(name, r=4)
    starts = row_starts(checked_batches(IDS.split(8)), model.config.bos_token_id)
    assert sum(map(len, starts)) == 2 * len(IDS)
    batches = [*IDS.split(8), *starts]
    site = attention_sites(model)[-1]
    lora, layer = site.output, unwrap(model).get_submodule(site.name.rpartition(".")[0])
    originals = []
    with recording({"output": lora}, {"entering": layer}) as record, torch.no_grad(), model.disable_adapter():
        for batch in batches:
            model(input_ids=batch)
            originals.append(dict(record))
    with recording({}, {"inputs": lora.get_base_layer(), "entering": layer}) as record, torch.no_grad():
        refit, lost = OutputRefit(site.weights().output), []
        for batch, original in zip(batches, originals, strict=True):
            model(input_ids=batch)
            bias = lora.get_base_layer().bias
            target = original["output"] if bias is None else original["output"] - bias
            lost.append((original["entering"] - record["entering"]).flatten(0, 1))
            size = (original["entering"] + original["output"]).double().square().mean(-1, keepdim=True).sqrt()
            scales = 0.5 ** size.log2().round()
            refit.update(record["inputs"] * scales, (target + lost[-1].view_as(target)) * scales)
    assert torch.cat(lost).norm() > 1e-3  # earlier layers did lose something
    expected = lora.scaling["default"] * torch.mm(*reversed(refit.low_rank(4, lora.scaling["default"])))
    change = lora.get_delta_weight("default").double()
    assert (change - expected).norm() < 1e-3 * expected.norm()
    assert refit.objective(change) < refit.objective(0 * change)


@pytest.mark.parametrize("name", CASES)
def test_converted_stream_is_that_of_the_converted_model(name, monkeypatch):
    """Its attention runs once, for the refit: what is computed from its kept outputs is what the model computes."""
    streams = Streams([{"input_ids": batch} for batch in IDS.split(8)])
    monkeypatch.setattr(asymgqa_peft.initialize, "Streams", lambda batches: streams)
    groups = {"num_key_value_heads": len(CASES[name].groups[0]), "head_groups": CASES[name].groups}
    model, _ = initialised(name, grouping="neighbour", head_dim=CASES[name].head_dim, **groups)
    last = unwrap(model).get_submodule(attention_sites(model)[-1].layer_name)
    with recording({}, {"entering": last}) as record, torch.no_grad():
        for batch, hidden in zip(streams.batches, streams.current, strict=True):
            model(**batch)
            torch.testing.assert_close(hidden, record["entering"], rtol=1e-4, atol=1e-4)


def test_the_weights_are_those_of_the_merge():
    model, report = initialised("llama", merge="mean", refit_output=False)
    for site, partition in zip(attention_sites(model), report.head_groups, strict=True):
        expected = merge_layer(None, site.weights(), partition, SharedShape.of_width(site.shape), "mean")
        torch.testing.assert_close(site.key.lora_kv["default"].weight, expected.key.flatten(0, 1))
        assert site.value.lora_value_mix["default"].weight.abs().max() == 0


def test_padding_and_batching_do_not_matter():
    """Left-padded rows give what the same rows give unpadded, however they are batched."""
    padded = left_padded(3, batch=16, length=24)
    ids = padded["input_ids"]
    apart = [ids[:1, 3:], *ids[1:].split(5)]
    one, report = initialised(batches=[padded])
    other, same = initialised(batches=apart)
    assert report.head_groups == same.head_groups and report.tokens == same.tokens == 16 * 24 - 3
    torch.testing.assert_close(report.costs, same.costs, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        a, b = (model(input_ids=HELD_OUT).logits for model in (one, other))
    assert (a - b).norm() < 1e-3 * b.norm()


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt_neox"])
def test_packed_rows_are_the_documents_they_hold(name):
    """Positions that begin anew: no document sees another, as in their own rows."""
    packed = {"input_ids": IDS.view(4, 96), "position_ids": torch.arange(24).repeat(4, 4)}
    one, report = initialised(name, batches=[packed])
    other, same = initialised(name, batches=[IDS])
    run_on, _ = initialised(name, batches=[IDS.view(4, 96)])
    assert report.head_groups == same.head_groups
    with torch.no_grad():
        a, b, c = (model(input_ids=HELD_OUT).logits for model in (one, other, run_on))
    assert (a - b).norm() < 1e-3 * b.norm() < (c - b).norm()


@pytest.mark.parametrize("grouping", ["neighbour", "random", "symmetric", "asymmetric"])
@pytest.mark.parametrize("criterion", ["cosine", "residual"])
def test_every_arm_of_the_baselines(grouping, criterion):
    model, report = initialised(grouping=grouping, criterion=criterion, merge="aligned", num_key_value_heads=4)
    sizes = {tuple(len(group) for group in layer) for layer in report.head_groups}
    if grouping != "asymmetric":
        assert sizes == {(2, 2, 2, 2)}
    if grouping == "neighbour":
        assert report.head_groups == HeadGroups.neighbour(2, 8, 4).to_lists()
        assert report.costs == report.neighbour_costs
    elif grouping == "random":
        assert report.head_groups == HeadGroups.random(2, 8, 4, seed=0).to_lists()
    else:
        assert all(cost <= neighbour for cost, neighbour in zip(report.costs, report.neighbour_costs, strict=True))
    assert model.peft_config["default"].head_groups == report.head_groups
    assert model.base_model.head_groups("default").to_lists() == report.head_groups


def test_given_groups_are_kept_under_neighbour():
    groups = CASES["llama"].groups
    _, report = initialised(grouping="neighbour", head_groups=groups)
    assert report.head_groups == [[sorted(group) for group in layer] for layer in groups]


def test_second_call_starts_anew():
    model, report = initialised()
    first = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    again = initialize_asymgqa_weights(model, iter(IDS.split(8)), progress=False)
    assert again.head_groups == report.head_groups and again.costs == report.costs
    for name, parameter in model.named_parameters():
        if "o_proj" in name or "lora_B" in name or "lora_kv" in name or "mix" in name or "gain" in name:
            torch.testing.assert_close(parameter, first[name], msg=name)


def test_base_is_untouched_and_only_the_named_adapter_changes():
    model = wrapped()
    model.add_adapter("other", adapter_config())
    model.train()
    before = state_of(model)
    initialize_asymgqa_weights(model, IDS.split(8), adapter_name="other", progress=False)
    after = state_of(model)
    changed = {n for n, tensor in before["tensors"].items() if not torch.equal(tensor, after["tensors"][n])}
    assert changed and all(".other." in name for name in changed)
    for part in ("trainable", "modes", "hooks", "active"):
        assert before[part] == after[part], part
    assert before["groups"]["default"] == after["groups"]["default"]
    model.set_adapter("other")
    assert error_to_base(model.eval()) < 1


def test_gradients_reach_every_part_after_initialising():
    model, _ = initialised()
    model.train()
    model(input_ids=IDS[:2], labels=IDS[:2]).loss.backward()
    silent = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not [name for name in silent if "lora_A" not in name or "o_proj" in name]  # B = 0 elsewhere: A has none yet


def test_half_precision_base():
    reference, full = initialised()
    model, report = initialised(dtype=torch.bfloat16)
    assert report.head_groups == full.head_groups
    assert error_to_base(model.float()) < error_to_base(reference) + 0.05


@pytest.mark.parametrize("choices", [{"use_rslora": True, "lora_alpha": 64}, {"use_dora": True}])
def test_lora_variants_hold_the_same_refit(choices):
    plain, _ = initialised()
    variant, _ = initialised(**choices)
    assert error_to_base(variant) == pytest.approx(error_to_base(plain), rel=0.02)


def test_refit_needs_lora_on_the_output_projection():
    model, report = initialised(target_modules=["q_proj", "up_proj"])
    assert any("layers 0-1: no output refit, o_proj has no LoRA" in note for note in report.notes)
    without, _ = initialised(refit_output=False)
    assert error_to_base(model) == pytest.approx(error_to_base(without), rel=1e-4)


# -------------------------------------------------------------------------------------------- all or nothing


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("stage", ["capture", "search_partition", "merge_layer", "fit_heads", "low_rank"])
def test_interrupted_anywhere_the_model_is_as_before(stage, error, monkeypatch):
    """In the second layer, when the first is already written."""
    model, _ = initialised(grouping="symmetric", num_key_value_heads=4, fit_steps=1)
    model.peft_config["default"].grouping = "asymmetric"
    model.train()
    before, calls = state_of(model), []
    owner = {"capture": Streams, "low_rank": OutputRefit}.get(stage, module)
    original = getattr(owner, stage)

    def interrupted(*args, **kwargs):
        calls.append(stage)
        if len(calls) == (1 if stage == "capture" else 2):
            raise error("stop")
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, stage, interrupted)
    with pytest.raises(error, match="stop"):
        initialize_asymgqa_weights(model, prompt(16, 24, seed=3).split(8), progress=False)
    assert_same_state(before, state_of(model))
    monkeypatch.undo()
    initialize_asymgqa_weights(model, prompt(16, 24, seed=3).split(8), progress=False)
    with pytest.raises(AssertionError):  # without the error everything would have changed
        assert_same_state(before, state_of(model))


PROJECT = str(Path(asymgqa_peft.__file__).parent)
SETTING_UP = {
    "capture",
    "keep",
    "_passing_by",
    "passing",
    "hooks_removed",
    "recording",
    "evaluating",
    "all_or_nothing",
}


def lines_of_an_initialisation(model, stop: tuple | None = None) -> list[tuple[str, str, int]]:
    """File, function and number of every line of the project's code that runs; an interrupt at the first `stop`."""
    lines = {}

    def count(frame, event, _):
        line = (frame.f_code.co_filename, frame.f_code.co_name, frame.f_lineno)
        if event == "line":
            lines[line] = None
            if line == stop:
                sys.settrace(None)
                raise KeyboardInterrupt
        return count

    sys.settrace(lambda frame, *_: count if frame.f_code.co_filename.startswith(PROJECT) else None)
    try:
        initialize_asymgqa_weights(model, IDS[:8].split(4), progress=False)
    finally:
        sys.settrace(None)
    return list(lines)


def test_interrupted_at_any_line_the_model_is_as_before():
    """All lines that patch, hook or switch something, and some others; where each runs for the first time."""
    model = wrapped(num_key_value_heads=4)
    model.train()
    before, lines = state_of(model), lines_of_an_initialisation(copy.deepcopy(model))
    chosen = [line for line in lines if line[1] in SETTING_UP]
    assert {line[1] for line in chosen} == SETTING_UP
    for line in [*chosen, *random.Random(0).sample(lines, 15)]:
        with pytest.raises(KeyboardInterrupt):
            lines_of_an_initialisation(model, line)
        assert_same_state(before, state_of(model))


# ---------------------------------------------------------------------------------------------------- errors


def refused(match: str, batches=None, model=None, **kwargs) -> None:
    model = wrapped() if model is None else model
    before = state_of(model) if hasattr(model, "peft_config") else None
    with pytest.raises(ValueError, match=match):
        initialize_asymgqa_weights(model, IDS.split(8) if batches is None else batches, progress=False, **kwargs)
    if before:
        assert_same_state(before, state_of(model))


def test_bad_batches_are_refused():
    refused("batches is empty", [])
    refused("batches is a Tensor", IDS)
    refused("batches is a dict", {"input_ids": IDS})
    refused("batches is a int", 3)
    refused(r"batches\[1\]: input_ids must be integers.*\(5,\)", [IDS[:8], torch.zeros(5, dtype=torch.long)])
    refused(r"batches\[0\]: input_ids must be integers.*float32", [IDS.float()])
    refused(r"batches\[0\]: input_ids must be integers.*NoneType", [{"labels": IDS}])
    refused(r"batches\[0\] is a str of text: tokenise it", ["a text"])
    refused(r"batches\[0\]: attention_mask", [{"input_ids": IDS, "attention_mask": torch.ones(16, 23)}])


def test_too_few_tokens_are_refused():
    refused("batches hold 24 tokens, at least 32 are needed", [IDS[:1]])
    mask = torch.zeros_like(IDS)
    refused("batches hold 0 tokens", [{"input_ids": IDS, "attention_mask": mask}])
    initialised(batches=[IDS[:2]])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_weights_and_activations_name_the_layer(bad):
    model = wrapped()
    with torch.no_grad():
        attention_sites(model)[1].attention.v_proj.base_layer.weight[0, 0] = bad
    state = initialised_state(model)
    with pytest.raises(ValueError, match="layer 1: NaN or inf in the base's value projection"):
        initialize_asymgqa_weights(model, IDS.split(8), progress=False)
    assert initialised_state(model) == state
    model = wrapped()
    with torch.no_grad():
        model.base_model.model.model.layers[0].mlp.down_proj.base_layer.weight[0, 0] = bad
    with pytest.raises(ValueError, match="layer 1: NaN or inf in the activations"):
        initialize_asymgqa_weights(model, IDS.split(8), progress=False)


def test_interrupted_the_frequencies_of_wide_heads_are_as_before(monkeypatch):
    def frequencies(model) -> list:
        return [site.layout("default").shape.frequencies for site in attention_sites(model)]

    model = wrapped(num_key_value_heads=3, head_dim=12)
    before = frequencies(model)
    finished = copy.deepcopy(model)
    initialize_asymgqa_weights(finished, IDS.split(8), progress=False)
    assert frequencies(finished) != before
    state = state_of(model)
    monkeypatch.setattr(OutputRefit, "low_rank", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        initialize_asymgqa_weights(model, IDS.split(8), progress=False)
    assert frequencies(model) == before
    assert_same_state(state, state_of(model))


def initialised_state(model) -> tuple:
    return model.peft_config["default"].head_groups, {
        name: p.sum().item() for name, p in model.named_parameters() if "default" in name
    }


def test_unfit_models_are_refused():
    refused("model is a LlamaForCausalLM", model=random_model(config_of(CASES["llama"])))
    refused("adapter_name='nobody' is unknown", adapter_name="nobody")
    merged = wrapped()
    merged.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        initialize_asymgqa_weights(merged, IDS.split(8))
    model = wrapped()
    with model.disable_adapter(), pytest.raises(ValueError, match="is disabled"):
        initialize_asymgqa_weights(model, IDS.split(8))


# ---------------------------------------------------------------------------------------------------- report


def test_report_survives_a_file(tmp_path):
    _, report = initialised()
    assert report.tokens == IDS.numel() and report.peak_memory > 0
    assert {"statistics", "targets", "search", "merge", "refit"} <= report.seconds.keys()
    assert 0 < report.search_seconds <= sum(report.seconds.values())
    path = tmp_path / "new" / "report.json"
    report.save(path)
    path.write_text("old", encoding="utf-8")
    report.save(path)
    assert InitializationReport.load(path) == report
    assert json.loads(path.read_text(encoding="utf-8"))["head_groups"] == report.head_groups
    assert list(path.parent.iterdir()) == [path]
    for text in ("[1]", "{}", "no json", '{"head_groups": []}'):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="report.json.*InitializationReport"):
            InitializationReport.load(path)


def test_similarities_are_symmetric_and_bounded():
    _, report = initialised()
    for before, after in zip(report.similarity_before, report.similarity_after, strict=True):
        for matrix in map(torch.tensor, (before, after)):
            torch.testing.assert_close(matrix, matrix.T)
            torch.testing.assert_close(matrix.diagonal(), torch.ones(8))
        assert torch.tensor(after).min() > -1e-6


@torch.no_grad()
def beside_massive_tokens(size: float) -> float:
    """Relative error of the second attention's output at all tokens but the rows' first.

    Behind the first layer the stream is larger by so much at every row's first token, in the converted model by a
    third more, in another direction.
    """
    model, seen = wrapped(), []
    first, second = attention_sites(model)
    massive, lost = size * torch.randn(2, model.config.hidden_size, generator=torch.Generator().manual_seed(4))

    def enlarge(_module, _args, output):
        output[:, 0] += massive
        if not first.output.disable_adapters:
            output[:, 0] += lost / 3

    unwrap(model).get_submodule(first.layer_name).register_forward_hook(enlarge)
    initialize_asymgqa_weights(model, prompt(64, 48, seed=4).split(16), progress=False)
    second.output.register_forward_hook(lambda _module, _args, output: seen.append(output[:, 1:].clone()))
    model(input_ids=HELD_OUT)
    with model.disable_adapter():
        model(input_ids=HELD_OUT)
    converted, wanted = seen
    return ((converted - wanted).norm() / wanted.norm()).item()


def test_tokens_with_massive_states_do_not_decide_the_refit(monkeypatch):
    undisturbed = beside_massive_tokens(0)
    assert beside_massive_tokens(1000) < 2 * undisturbed
    monkeypatch.setattr(module, "error_scales", lambda normed: torch.ones_like(normed[..., :1]))
    assert beside_massive_tokens(1000) > 20 * undisturbed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_errors_are_relative_to_the_tokens_states(dtype):
    """Within a factor of the root of two, by powers of two, of which no product is rounded."""
    states = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    states *= torch.tensor([1e-3, 0.1, 1.0, 30.0, 400.0]).to(dtype)[:, None]
    states[1, 4] = 0
    scales = module.error_scales(states)
    assert scales.shape == (2, 5, 1) and scales.dtype == dtype and scales[1, 4] == 1
    sizes = (states.double() * scales.double()).square().mean(-1).sqrt()
    sizes[1, 4] = 1
    assert sizes.min() > 0.7 and sizes.max() < 1.42
    assert set(torch.frexp(scales.float())[0].flatten().tolist()) == {0.5}


def test_what_is_lost_is_made_up_for_up_to_the_state_itself():
    lost, state = torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    lost[0, 1] *= 1000
    lost[2, 2:] *= 1e-3
    state[1, 0] = 0
    found = module.no_larger(lost, state)
    lengths = torch.minimum(lost.norm(dim=-1), state.norm(dim=-1))
    torch.testing.assert_close(found, torch.nn.functional.normalize(lost, dim=-1) * lengths[..., None])
    assert torch.equal(found[2, 2:], lost[2, 2:]) and not found[1, 0].any()
    assert not module.no_larger(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)).any()


@torch.no_grad()
def error_at_starts(batches: list[torch.Tensor], starts_are_added: bool, monkeypatch) -> float:
    """Relative error behind the last layer at rows' first tokens, of tokens that begin no row of the batches."""
    with monkeypatch.context() as patched:
        if not starts_are_added:
            patched.setattr(asymgqa_peft.initialize, "row_starts", lambda batches, beginning: [])
        model, _ = initialised(batches=batches)
    others = torch.tensor(sorted(set(range(64)) - set(torch.cat(batches)[:, 0].tolist())))
    last = unwrap(model).get_submodule(attention_sites(model)[-1].layer_name)
    with recording({"hidden": last}) as record:
        model(input_ids=others[:, None])
        converted = record["hidden"]
        with model.disable_adapter():
            model(input_ids=others[:, None])
        return ((converted - record["hidden"]).norm() / record["hidden"].norm()).item()


def test_rows_begin_as_well_with_tokens_that_began_none(monkeypatch):
    """Two long rows have two first tokens and say nothing of others; rows of one token do."""
    batches = [prompt(2, 1024, seed=4)]
    found = error_at_starts(batches, True, monkeypatch)
    assert found < 0.85 * error_at_starts(batches, False, monkeypatch)


def test_starts_come_from_all_rows_however_they_are_batched():
    rows = torch.arange(2 * 80).view(2, 80)
    expected = torch.tensor([16, 48, 96, 128])[:, None]
    (starts,) = row_starts([{"input_ids": rows}], beginning=None)
    assert torch.equal(starts, expected)
    (apart,) = row_starts([{"input_ids": row[None]} for row in rows], beginning=None)
    assert torch.equal(apart, expected)
    positions = torch.arange(80).repeat(2)[None]
    (packed,) = row_starts([{"input_ids": rows.view(1, 160), "position_ids": positions}], beginning=None)
    assert torch.equal(packed, expected)
    padded = torch.cat([torch.full((2, 7), 999), rows], 1)
    (masked,) = row_starts([{"input_ids": padded, "attention_mask": (padded != 999).long()}], beginning=None)
    assert torch.equal(masked, expected)
    (with_beginning,) = row_starts([{"input_ids": rows}], beginning=7)
    assert with_beginning.flatten().tolist() == [7, 16, 48, 7, 96, 128]
    # No batch is larger than those that were given.
    many = row_starts([{"input_ids": torch.arange(400)[None] + row} for row in range(80)], beginning=None)
    assert max(map(len, many)) <= 400 and sum(map(len, many)) == 80 * 12


def test_rows_that_begin_alike_need_no_starts():
    rows = torch.arange(2 * 80).view(2, 80)
    rows[:, 0] = 5
    assert row_starts([{"input_ids": rows}], beginning=5) == []
    positions = torch.cat([torch.arange(30), torch.arange(50)]).expand(2, -1)
    # Packed documents begin within rows, and differently.
    assert len(row_starts([{"input_ids": rows, "position_ids": positions}], beginning=5)) == 1


def test_few_tokens_for_the_refit_are_told():
    few, enough = prompt(16, 24), prompt(16, 32 * 64 // 16)  # of 64 numbers that enter o_proj
    for ids, refit_output, is_told in ((few, True, True), (few, False, False), (enough, True, False)):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            initialize_asymgqa_weights(wrapped(refit_output=refit_output), ids.split(8), progress=False)
        assert any("384 tokens, under 32 for each of the 64" in str(warning.message) for warning in told) == is_told


# ----------------------------------------------------------------------------------------------------- ranks


def _failing_search(*_, **__):
    raise RuntimeError("no groups today")


def _initialise_on_rank(rank: int, world: int, path: str, results) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{path}", rank=rank, world_size=world)
    model, searched, search = wrapped(), [], module.search_partition

    def counted(*args, **kwargs):
        searched.append(1)
        return search(*args, **kwargs)

    module.search_partition = counted
    report = initialize_asymgqa_weights(model, IDS.split(4)[rank::world], progress=False)
    turns = len(searched)
    tensors = {n: p.detach().numpy() for n, p in model.named_parameters() if p.requires_grad}
    try:
        initialize_asymgqa_weights(wrapped(), IDS.split(4) if rank else [], progress=False)
        message = None
    except ValueError as error:
        message = str(error)
    if rank == 1:
        module.search_partition = _failing_search
    try:
        initialize_asymgqa_weights(wrapped(), IDS.split(4)[rank::world], progress=False)
        failure = None
    except RuntimeError as error:
        failure = str(error)
    results[rank] = dataclasses.asdict(report), tensors, message, turns, failure
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_end_alike_and_as_one_process_does(world, tmp_path):
    alone, report = initialised()
    results = mp.get_context("spawn").Manager().dict()
    mp.spawn(_initialise_on_rank, args=(world, str(tmp_path / "rendezvous"), results), nprocs=world)
    for rank in range(world):
        seen, tensors, message, turns, failure = results[rank]
        assert turns == len(range(rank, len(report.head_groups), world))  # ranks take turns
        assert "no groups today" in failure  # of rank 1's turn, raised on every rank
        assert seen["head_groups"] == report.head_groups and seen["tokens"] == report.tokens
        assert f"empty on 1 of {world} ranks" in message  # on every rank: none is left waiting
        for name, parameter in alone.named_parameters():
            if parameter.requires_grad:
                assert (tensors[name] == results[0][1][name]).all(), name
                scale = parameter.abs().max().item() + 1e-6
                assert abs(tensors[name] - parameter.detach().numpy()).max() < 1e-2 * scale, name


NEEDS_NO_DATA = {"grouping": "neighbour", "merge": "mean", "refit_output": False}


@pytest.mark.parametrize(
    ("choices", "attentions", "mlps"),
    [
        # Of two layers and two batches, a third with starts for a refit; of the first batch, the first layer runs to
        # find out what layers return.
        ({}, [1 + 3 + 3 + 3, 3 + 3 + 3], [1 + 3 + 3, 0]),  # statistics, targets, refit; targets, converted stream
        ({"refit_output": False}, [1 + 2 + 2, 2], [1 + 2, 0]),
        ({"grouping": "neighbour", "merge": "mean"}, [1 + 3 + 3, 3 + 3], [1 + 3 + 3, 0]),
        (NEEDS_NO_DATA, [0, 0], [0, 0]),
        (NEEDS_NO_DATA | {"grouping": "random"}, [0, 0], [0, 0]),
    ],
)
def test_nothing_runs_that_no_choice_needs(choices, attentions, mlps):
    model, runs = wrapped(**choices), {"key": [0, 0], "mlp": [0, 0]}
    for site in attention_sites(model):
        layer = unwrap(model).get_submodule(site.layer_name)
        for name, inner in (("key", site.key), ("mlp", layer.mlp)):

            def count(*_, name=name, index=site.layer) -> None:
                runs[name][index] += 1

            inner.register_forward_pre_hook(count)
    report = initialize_asymgqa_weights(model, IDS.split(8), progress=False)
    assert runs == {"key": attentions, "mlp": mlps}
    assert report.tokens == (IDS.numel() if any(attentions) else 0)
    assert {"capture", "statistics", "refit"}.isdisjoint(report.seconds) == (not any(attentions))


def test_a_report_without_statistics_says_so(tmp_path):
    """The groups are those of the configuration, the heads their means; costs are left out, not made up."""
    model, report = initialised(**NEEDS_NO_DATA)
    assert report.head_groups == HeadGroups.neighbour(2, 8, 3).to_lists()
    assert report.costs == report.neighbour_costs == report.similarity_before == report.similarity_after == []
    assert any("no costs and no similarities" in note for note in report.notes)
    report.save(tmp_path / "report.json")
    assert InitializationReport.load(tmp_path / "report.json") == report
    for site in attention_sites(model):
        expected = mean_heads(site.weights(), report.head_groups[site.layer], SharedShape.of_width(site.shape))
        torch.testing.assert_close(site.key.lora_kv["default"].weight, expected.key.flatten(0, 1))
    _, refitted = initialised(**NEEDS_NO_DATA | {"refit_output": True})
    assert refitted.costs == [] and refitted.tokens == IDS.numel()


def test_every_lora_but_the_refit_starts_at_zero():
    model, _ = initialised()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    assert layers
    for name, layer in layers.items():
        assert layer.lora_B["default"].weight.any().item() == name.endswith("o_proj"), name
