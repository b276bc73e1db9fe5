"""The speed benchmarks run on small shapes, print their JSON line and notice what is wrong; what they rest on."""

from __future__ import annotations

import json
import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import sleep

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from asymgqa_peft.adapter.slots import HeadLayout
from asymgqa_peft.attention import register_grouped_sdpa
from asymgqa_peft.evaluate import perplexity
from asymgqa_peft.heads import HeadShape, SharedShape
from asymgqa_peft.method.costs import group_costs
from asymgqa_peft.method.statistics import LayerStatistics
from asymgqa_peft.method.threads import map_in_threads, share_of_cores, use_threads
from recipes import stdlib_text
from recipes.benchmarks import (
    conversion,
    decode,
    growth,
    memory,
    offloaded,
    overhead,
    own_text,
    quality_per_byte,
    scaling,
    shapes,
    wide_heads,
)
from recipes.text_file import read_text

RECIPES = Path(__file__).parents[1] / "recipes"
TINY = "--shape tiny --groups 2 --device cpu"


@pytest.fixture
def run(capsys):
    """Runs a benchmark's main in this process; the JSON object of its last line."""

    def result(benchmark, arguments: str) -> dict:
        benchmark.main(arguments.split())
        found = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert found["commit"] and found["torch"] and found["rows"]
        return found

    return result


# --------------------------------------------------------------------------------------------------- the scripts


def test_conversion_says_where_every_second_goes(run):
    result = run(conversion, f"{TINY} --blocks 8 --length 64 --rank 4")
    rows = {row["stage"]: row for row in result["rows"]}
    assert {"capture", "statistics", "targets", "search", "merge", "refit", "converted stream"} < rows.keys()
    total = rows.pop("total")
    assert sum(row["measured, s"] for row in rows.values()) == pytest.approx(total["measured, s"])
    assert result["kl_initialised"] < result["kl_classic"]
    assert result["cost_over_neighbour"] < 1


def test_an_offloaded_base_is_initialised_as_the_whole_one(run, monkeypatch):
    result = run(offloaded, f"{TINY} --blocks 16 --length 64 --rank 4")
    whole, again = result["arms"]
    assert (whole["arm"], again["arm"]) == ("whole", "offloaded") and whole["groups"] == again["groups"]
    assert again["adapters differ by"] == 0
    assert again["x whole"] == pytest.approx(again["seconds"] / whole["seconds"])
    (row,) = run(offloaded, f"{TINY} --blocks 16 --length 64 --rank 4 --layers 1 --only offloaded")["arms"]
    assert row["layers"] == 1 and row["all layers, s"] == pytest.approx(2 * row["seconds"])
    # An adapter of other weights is noticed.
    monkeypatch.setattr(offloaded, "cpu_offload", lambda base, **_: base.float().apply(perturb))
    with pytest.raises(SystemExit, match="the initialisations differ"):
        offloaded.main(f"{TINY} --blocks 16 --length 64 --rank 4".split())


def perturb(module: nn.Module) -> None:
    """Make a module another one."""
    for parameter in module.parameters(recurse=False):
        parameter.data *= 1 + 0.1 * torch.rand_like(parameter)


SMALL = "--device cpu --hidden 128 --layers 2 --vocab 64 --length 64 --rank 4 --documents 40 --steps 2 --warmup 1"


def test_scaling_measures_one_rank_in_this_process(capsys):
    rows = scaling.main(f"--worker {SMALL} --blocks 16".split())
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith('{"part"')] == rows
    initialization, recovery = rows
    assert (initialization["part"], recovery["part"]) == ("initialization", "recovery")
    assert initialization["tokens"] == 16 * 64 and recovery["tokens"] == 4 * 64
    assert all(row["ranks"] == 1 and row["seconds"] > 0 and row["peak_bytes"][0] > 0 for row in rows)


def test_scaling_compares_ranks_with_one():
    one = {"part": "initialization", "ranks": 1, "seconds": 6.0, "tokens": 90, "groups": ["a"], "peak_bytes": [2**30]}
    two = one | {"ranks": 2, "seconds": 4.0, "peak_bytes": [2**30, 2**31]}
    trained = {"part": "recovery", "ranks": 1, "seconds": 2.0, "tokens": 100, "peak_bytes": [2**30]}
    slower = trained | {"ranks": 2, "seconds": 2.5, "tokens": 200}
    found = scaling.table([one, two, trained, slower])
    assert [row["speed-up"] for row in found] == pytest.approx([1, 1.5, 1, 1.6])
    assert [row["efficiency"] for row in found] == pytest.approx([1, 0.75, 1, 0.8])
    assert found[1]["peak GiB per rank"] == 2
    assert list(scaling.checks(found).values()) == [True, True, False]
    # Ranks that differ, from one rank or among each other, or that are no faster, are noticed.
    for changes in ({"groups": ["b"]}, {"groups": ["a", "b"]}, {"seconds": 7.0}):
        assert sum(scaling.checks(scaling.table([one, two | changes])).values()) == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", [{1: ["4"]}, {2: ["4", "5"]}, {4: ["4", "5", "6", "7"]}]),
        ("--side-by-side", [{1: ["4"], 2: ["5", "6"]}, {4: ["4", "5", "6", "7"]}]),
    ],
)
def test_scaling_gives_every_rank_a_gpu(options: str, expected: list[dict], monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert scaling.waves(scaling.parse_args(f"--device cuda {options}".split())) == expected
    with pytest.raises(SystemExit, match="--ranks 8 needs as many GPUs, 4 are visible"):
        scaling.waves(scaling.parse_args(["--device", "cuda", "--ranks", "1", "8"]))


@pytest.mark.slow
def test_scaling_keeps_what_was_measured_when_a_group_fails(tmp_path):
    out = tmp_path / "lines.jsonl"
    # One rank warms up on fewer tokens than an initialisation needs, two on enough.
    few = SMALL.replace("--length 64", "--length 40")
    with pytest.raises(SystemExit, match=r"the processes on \[1\] ranks ended early"):
        scaling.main(f"{few} --ranks 1 2 --blocks 16 --parts initialization --out {out}".split())
    (line,) = out.read_text().splitlines()
    assert json.loads(line)["ranks"] == 2 and len(json.loads(line)["peak_bytes"]) == 2
    scaling.main(f"{SMALL} --ranks 1 2 --blocks 16 --out {out}".split())
    groups = {tuple(row["groups"]) for row in map(json.loads, out.read_text().splitlines()[1:]) if "groups" in row}
    assert len(groups) == 1


def test_decode_measures_every_arm(run):
    result = run(decode, f"{TINY} --only attention model batch --layers 1 --batches 1 --contexts 64 --rank 4")
    parts = result["parts"]
    arms = {decode.MHA, decode.EQUAL, decode.WIDE, decode.ADAPTER, decode.MERGED, decode.EXPANDED}
    assert {row["arm"] for row in parts["attention"]} == arms
    assert all(row["us"] > 0 and row["error"] < 1e-4 for row in parts["attention"])
    assert not any(row["failed"] for part in ("attention", "model") for row in parts[part])
    assert {row["error to adapter"] < 1e-4 for row in parts["model"] if row["arm"] == decode.MERGED} == {True}
    assert parts["batch"][2]["x MHA"] == pytest.approx(4, rel=0.01)


@pytest.mark.parametrize(
    ("slots", "implementation", "cache", "padded", "expected"),
    [
        (12, "eager", "dynamic", False, True),
        (12, "sdpa", "dynamic", False, False),
        (12, "flex_attention", "dynamic", True, True),  # 12 is no power of two
        (16, "flex_attention", "dynamic", True, False),
        (12, "grouped_sdpa", "static", True, False),
    ],
)
def test_expansion_is_seen_where_it_happens(slots, implementation, cache, padded, expected):
    model, config = expansion_model(slots)
    assert decode.expands(model, config, implementation, cache, padded) is expected


@pytest.mark.parametrize(("implementation", "expected"), [("sdpa", True), ("grouped_sdpa", False)])
def test_expansion_is_seen_in_a_compiled_step(implementation: str, expected: bool):
    model, config = expansion_model(12)
    assert decode.expands_compiled(model, config, implementation, padded=False) is expected


def expansion_model(slots: int):
    """What the part 'expansion' looks at."""
    register_grouped_sdpa()
    sizes = {"hidden_size": 8 * slots, "num_attention_heads": slots, "num_key_value_heads": 2, "head_dim": 64}
    config = shapes.shape_config("tiny", 1, **sizes)
    return shapes.random_llama(config, "cpu", torch.float32), config


def test_overhead_compares_with_lora(run):
    rows = run(overhead, "--device cpu --batch 1 --length 32 --steps 1 --rank 4")["rows"]
    assert [row["arm"] for row in rows][0] == "LoRA" and len(rows) == 5
    assert rows[0]["step x LoRA"] == 1 and all(row["step, ms"] > 0 for row in rows)


def test_growth_fits_exponents(run):
    result = run(growth, "--device cpu --only files")
    assert result["adapter, bytes exponent"] == pytest.approx(1, abs=0.05)
    shapes_of_width = []
    for width in (1, 2, 4):
        sizes = growth.SIZES["cpu"]
        model = growth.wrapped(sizes, sizes["at"] | {"width": width}, growth.parse_args(["--device", "cpu"]))
        heads = model.peft_config["default"]
        shapes_of_width.append((heads.num_key_value_heads, heads.head_dim))
    assert shapes_of_width == [(4, 16), (2, 32), (1, 64)]
    assert growth.slope([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert growth.slope([1, 2], [3, None]) is None


def test_memory_measures_a_process_beside_its_estimate(run):
    """Of a tiny model the libraries' own buffers are most; what is estimated is there in any case."""
    (row,) = run(memory, "--device cpu --shapes tiny --only merge")["rows"]
    assert 0 < row["estimate, GB"] < row["measured, GB"]
    assert row["ratio"] == pytest.approx(row["estimate, GB"] / row["measured, GB"])


def test_cells_wait_for_room_and_one_that_never_fits_does_not_run():
    queue, order = memory.Queue(100), []
    assert not queue.enter(86) and queue.enter(50)

    def second() -> None:
        queue.enter(50)
        order.append("second starts")

    with ThreadPoolExecutor(1) as beside:
        waiting = beside.submit(second)
        assert not waiting.done()
        order.append("first ends")
        queue.leave(50)
    assert order == ["first ends", "second starts"]


def test_quality_per_byte_ranks_points_by_budget(run, tmp_path):
    recovered = {"arm": "recovered", "KV bytes/token": 3072, "recovered": 6.0}
    (tmp_path / "results.jsonl").write_text(json.dumps({"rows": [recovered, {**recovered, "recovered": 8.0}]}) + "\n")
    small = "--ratios 4 --bits 16 4 --blocks 4 --block-size 128 --held-out-blocks 2 --rank 4 --device cpu"
    result = run(quality_per_byte, f"{small} --results {tmp_path / 'results.jsonl'} --plot {tmp_path / 'plot'}")
    points = {row["arm"]: row for row in result["rows"]}
    assert points["recovered"]["perplexity"] == 7 and points["recovered"]["share of MHA"] == 0.25
    assert points["MHA, 4 bits"]["kv_bytes_per_token"] == points["MHA, 16 bits"]["kv_bytes_per_token"] * 5 / 16
    assert points["MHA, 4 bits"]["perplexity"] != points["MHA, 16 bits"]["perplexity"]
    assert result["choices"][2]["arm"] == "recovered"
    assert {path.suffix for path in tmp_path.glob("plot.*")} == {".png", ".svg"}


# ------------------------------------------------------------------------------------- what the scripts would miss


def test_attention_of_other_groups_is_noticed():
    query, cache = torch.randn(1, 1, 4, 8), torch.randn(2, 1, 2, 16, 8)
    shape = SharedShape.of_width(HeadShape(16, 4, 4, 4, 4))
    slots = HeadLayout(((0, 1), (2, 3)), shape, torch.device("cpu"), declared=False)
    out = decode.attention(query.transpose(1, 2), cache[0], cache[1], "folded").transpose(1, 2)
    right, wrong = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    assert decode.relative_error(out, query, *cache, slots, right, gathered=True) < 1e-6
    assert decode.relative_error(out, query, *cache, slots, wrong, gathered=True) > 0.1


def test_a_cell_that_fails_costs_no_other():
    def fails(error: Exception) -> dict:
        raise error

    assert decode.guarded(fails, torch.OutOfMemoryError("x")) == {"failed": "out of memory"}
    assert "no kernel" in decode.guarded(fails, RuntimeError("no kernel"))["failed"]
    assert decode.guarded(fails, decode.WrongResult("0.5"))["failed"].startswith("WRONG")


@pytest.mark.parametrize(("heads", "groups"), [(32, 8), (16, 4), (8, 2), (6, 1)])
def test_unequal_groups_are_a_partition(heads: int, groups: int):
    partition = shapes.unequal_groups(heads, groups)
    assert len(partition) == groups and min(map(len, partition)) > 0
    assert sorted(head for group in partition for head in group) == list(range(heads))


def test_rounding_to_a_grid_is_within_half_a_step():
    states = torch.randn(2, 3, 5, 40, generator=torch.Generator().manual_seed(0))
    steps = (states.amax(-1) - states.amin(-1)).max() / 15
    error = (quality_per_byte.rounded(states, 4) - states).abs().max()
    assert 0.1 * steps < error < 0.6 * steps
    assert (quality_per_byte.rounded(states, 8) - states).abs().max() < error / 8


# -------------------------------------------------------------------------------------------------- what they rest on


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def test_threads_keep_order_and_give_the_count_back(two_threads):
    counts = map_in_threads(lambda item: (item, torch.get_num_threads()), [3, 1, 2])
    assert counts == [(3, 1), (1, 1), (2, 1)] and torch.get_num_threads() == 2
    with pytest.raises(ZeroDivisionError):
        map_in_threads(lambda item: 1 / item, [1, 0])
    assert torch.get_num_threads() == 2


def test_workers_serve_their_caller_again_and_end_with_it():
    before, found = set(threading.enumerate()), []
    with ThreadPoolExecutor(1, initializer=use_threads, initargs=(3,)) as caller:
        for _ in range(2):
            call = caller.submit(map_in_threads, lambda _: (sleep(0.02), threading.current_thread())[1], range(3))
            found.append(set(call.result()))
    assert found[0] == found[1] and len(found[0]) == 3
    for worker in found[0]:
        worker.join(timeout=10)
    assert set(threading.enumerate()) <= before


def test_several_callers_do_not_take_threads_from_each_other():
    """As in an initialisation on a GPU, where two searches run beside a thread that takes statistics."""
    torch.get_num_threads()
    torch.set_num_threads(3)
    try:

        def call(_) -> tuple[int, int]:
            workers = map_in_threads(lambda _: (threading.get_ident(), torch.get_num_threads(), sleep(0.02)), range(6))
            assert {threads for _, threads, _ in workers} == {1}
            return len({identity for identity, _, _ in workers}), torch.get_num_threads()

        with ThreadPoolExecutor(2, initializer=use_threads, initargs=(3,)) as callers:
            found = [callers.submit(call, index) for index in range(6)]
            own = [call(index) for index in range(3)]
            assert [future.result() for future in found] + own == [(3, 3)] * 9
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize(("processes", "allowed", "expected"), [("4", 1, 3), ("4", 2, 2), ("1", 1, 1), ("24", 1, 1)])
def test_a_launchers_one_thread_becomes_a_share_of_the_cores(processes, allowed, expected, two_threads, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    torch.set_num_threads(allowed)
    with share_of_cores():
        assert torch.get_num_threads() == expected
    assert torch.get_num_threads() == allowed


def test_costs_do_not_depend_on_threads(two_threads):
    shape = HeadShape(48, 6, 6, 8, 8)
    statistics, generator = LayerStatistics(shape), torch.Generator().manual_seed(0)
    statistics.update(*(torch.randn(2, 200, 48, generator=generator) for _ in range(3)))
    moments = statistics.moments(torch.randn(48, 48, generator=generator))
    groups = [(0, 1), (2, 3), (1, 4, 5), (0, 2, 3, 4), (5,)]
    shared = SharedShape.of_width(shape)
    threaded = group_costs(moments, groups, shared, "residual", "principal")
    torch.set_num_threads(1)
    assert threaded.min() == 0 < threaded.max()
    alone = group_costs(moments, groups, shared, "residual", "principal")
    torch.testing.assert_close(threaded, alone, rtol=1e-12, atol=0)


def test_seconds_of_a_call_are_positive():
    assert 0 < shapes.graph_seconds([lambda: nn.functional.relu(torch.ones(8))] * 2, "cpu") < math.inf


@pytest.mark.slow
def test_wide_heads_are_measured_against_narrow_ones_of_the_same_bytes(tmp_path):
    """Every stage of two arms, the plain export saying what the adapter says; a second run measures nothing again."""
    out = tmp_path / "lines.jsonl"
    command = ["--model", str(RECIPES / "tiny_model"), "--data", "stdlib", "--out", str(out), "--device", "cpu"]
    command += ["--shares", "1/8", "--widths", "32", "64", "--groupings", "symmetric", "--tokens", "2048"]
    command += ["--batch-size", "4", "--block-size", "128", "--micro-batch", "2", "--calibration-blocks", "12"]
    wide_heads.main([*command, "--held-out-blocks", "2"])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["base", *["untrained", "recovered", "plain"] * 2]
    narrow, wide = lines[1:4], lines[4:]
    assert {line["kv_bytes"] for line in (*narrow[:2], *wide[:2])} == {lines[0]["kv_bytes"] // 8}
    assert wide[0]["validation"] < narrow[0]["validation"]  # the same bytes keep more
    for untrained, recovered, plain in (narrow, wide):
        assert abs(recovered["held_out"] - untrained["held_out"]) > 1e-3 * untrained["held_out"]  # it was trained
        assert plain["plain_held_out"] == pytest.approx(recovered["held_out"], rel=1e-4)
    wide_heads.main([*command, "--held-out-blocks", "2"])
    assert len(out.read_text().splitlines()) == len(lines)
    wide_heads.main([*command, "--held-out-blocks", "2", "--widths", "64", "--fit-steps", "4"])
    fitted = [json.loads(line) for line in out.read_text().splitlines()][len(lines) :]
    assert [line["fit_steps"] for line in fitted] == [4, 4, 4]  # other measurements than those of the same arm
    assert fitted[0]["validation"] != wide[0]["validation"]


def kept_models(folder: Path, *options: str) -> tuple[list[Path], list[dict]]:
    """What wide_heads.py keeps of one head of 64 instead of 16 of 32, as plain checkpoints, and its lines."""
    out, plain = folder / "lines.jsonl", folder / "plain"
    command = ["--model", str(RECIPES / "tiny_model"), "--data", "stdlib", "--out", str(out), "--device", "cpu"]
    command += ["--shares", "1/8", "--widths", "64", "--groupings", "symmetric", "--block-size", "128"]
    command += ["--calibration-blocks", "12", "--held-out-blocks", "2", "--save-plain", str(plain)]
    wide_heads.main([*command, *options])
    return list(plain.iterdir()), [json.loads(line) for line in out.read_text().splitlines()]


def test_without_tokens_the_untrained_models_are_kept(tmp_path):
    """As a plain checkpoint that is as far from the base as the line says."""
    (folder,), lines = kept_models(tmp_path, "--tokens")
    untrained = next(line for line in lines if line["stage"] == "untrained")
    assert folder.name == untrained["saved"] and "untrained" in folder.name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    blocks = stdlib_text.token_blocks(stdlib_text.held_out_texts(), tokenizer, 128)[:2]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert perplexity(model, [blocks]) == pytest.approx(untrained["held_out"], rel=1e-4)
    assert untrained["held_out_x_base"] > 1.01  # of this model, not of the base


def test_with_tokens_the_recovered_models_alone_are_kept(tmp_path):
    """Also where a calibration seed is measured untrained only."""
    (folder,), lines = kept_models(tmp_path, "--tokens", "256", "--batch-size", "2", "--seeds", "0", "1")
    assert [line["stage"] for line in lines] == ["base", "untrained", "recovered", "plain", "untrained"]
    assert [line["stage"] for line in lines if line.get("saved") == folder.name] == ["recovered"]


# Special tokens, a system message of its own, and a blank before a user's words.
CHAT_TEMPLATE = (
    "<|pad|>system Help.<|endoftext|>\n"
    "{% for message in messages %}<|pad|>{{ message['role'] }} {{ message['content'] }}<|endoftext|>\n{% endfor %}"
)


@pytest.fixture
def chat_model(tmp_path) -> Path:
    """The bundled model, whose tokenizer has a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(RECIPES / "tiny_model")
    tokenizer.chat_template = CHAT_TEMPLATE
    for part in (AutoModelForCausalLM.from_pretrained(RECIPES / "tiny_model"), tokenizer):
        part.save_pretrained(tmp_path / "chat")
    return tmp_path / "chat"


def samples_of(arguments: list[str], out: Path, monkeypatch) -> tuple[torch.Tensor, str]:
    """Ids (B, T) of one batch that own_text.py samples, and the file that it writes."""
    batches = []
    write = own_text.texts
    monkeypatch.setattr(own_text, "texts", lambda sampled, *rest: batches.append(sampled) or write(sampled, *rest))
    own_text.main([*arguments, "--out", str(out), "--tokens", "1", "--length", "40", "--batch-size", "3"])
    (batch,) = batches
    return batch, read_text(out)


def test_conversations_begin_as_the_chat_template_does_and_keep_special_tokens(chat_model, tmp_path, monkeypatch):
    sampled, written = samples_of(["--model", str(chat_model), "--chat"], tmp_path / "own.txt.xz", monkeypatch)
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    begin = tokenizer("<|pad|>system Help.<|endoftext|>\n<|pad|>user").input_ids
    assert sampled.shape == (3, 40) and sampled[:, : len(begin)].tolist() == [begin] * 3
    assert len({tuple(row) for row in sampled.tolist()}) == 3
    special = set(tokenizer.all_special_ids)
    expected = [token for token in sampled.flatten().tolist() if token in special]
    assert [token for token in tokenizer(written).input_ids if token in special] == expected and len(expected) >= 9


def test_a_conversation_is_tokenised_to_what_it_was(chat_model):
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    said = [{"role": "user", "content": "Who ?"}, {"role": "assistant", "content": "It is 3 . Isn 't it?"}]
    ids = tokenizer(tokenizer.apply_chat_template(said, tokenize=False)).input_ids
    (text,) = own_text.texts(torch.tensor([ids]), tokenizer, chat=True)
    assert tokenizer(text).input_ids == ids


def test_samples_begin_with_tokens_of_the_text(tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"def number_{count}(): return {count}\n" for count in range(50)))
    command = ["--model", str(RECIPES / "tiny_model"), "--prompts", str(text), "--prompt-tokens", "8"]
    sampled, written = samples_of(command, tmp_path / "own.txt.xz", monkeypatch)
    tokenizer = AutoTokenizer.from_pretrained(RECIPES / "tiny_model")
    for begin in tokenizer.batch_decode(sampled[:, :8]):
        assert begin in text.read_text() and begin in written


@pytest.mark.parametrize(
    ("options", "says"),
    [([], "no chat template"), (["--length", "7"], "--length 7: a sample begins with .* tokens already")],
)
def test_conversations_that_cannot_begin_are_told_before_the_model_is_loaded(options, says, chat_model, monkeypatch):
    monkeypatch.delattr(own_text, "AutoModelForCausalLM")
    model = chat_model if options else RECIPES / "tiny_model"
    with pytest.raises(SystemExit, match=says):
        own_text.main(["--model", str(model), "--chat", "--out", "none.txt.xz", *options])


def test_text_to_begin_with_or_a_chat_is_asked_for(capsys):
    with pytest.raises(SystemExit):
        own_text.main(["--model", "none", "--out", "none.txt.xz"])
    assert "--prompts --chat is required" in capsys.readouterr().err
