"""The recipes that ask models for needles and instructions: prompts are what they say, measures are right."""

from __future__ import annotations

import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import wrap
from recovery_runs import save_base
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes import instructions, needles
from recipes.inputs import load_tokenizer

TINY = Path(needles.__file__).parent / "tiny_model"
GROUPS = [[list(range(6)), [6, 7, 8, 9], [10, 11, 12], [13, 14, 15]]] * 6
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory, model, tokenizer) -> list[str]:
    """A base that chats, an adapter on it that says nothing sensible, and the merged model, in float32."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = TEMPLATE
    for part in (model, tokenizer):
        part.save_pretrained(root / "base")
    wrapped = wrap(AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float32), GROUPS)
    wrapped.save_pretrained(root / "adapter")
    wrapped.merge_and_unload().save_pretrained(root / "plain")
    return [str(root / name) for name in ("base", "adapter", "plain")]


def prompts_of(test: str, context: int, tokenizer, **options) -> list[needles.Prompt]:
    args = SimpleNamespace(**{"repeats": 2, "depths": [0.0, 0.5, 1.0], "seed": 0, **options})
    return needles.make_prompts(test, context, tokenizer, args)


NEEDLE = {
    "passkey": r"The (pass key) is (\d+)\. Remember it\. \d+ is the pass key\.",
    "multikey": r"One of the special magic numbers for (\S+) is: (\d+)\.",
}


@pytest.mark.parametrize("test", needles.TESTS)
def test_prompts_fill_the_context_and_hide_the_answer_at_the_depth(test, tokenizer):
    prompts = prompts_of(test, 400, tokenizer)
    assert [prompt.depth for prompt in prompts] == [0.0, 0.5, 1.0] * 2
    for prompt in prompts:
        assert 396 <= len(prompt.ids) + len(prompt.answer_ids) + needles.REPLY_MARGIN <= 400
        text = tokenizer.decode(prompt.ids)
        assert tokenizer.decode(prompt.ids + prompt.answer_ids) == f"{text} {prompt.answer}"
        _, haystack, question, reply = text.split("\n")
        hidden = {about: value for about, value in re.findall(NEEDLE[test], haystack)}
        (asked,) = [about for about in hidden if about in question and about in reply]
        assert hidden[asked] == prompt.answer and len(hidden) == {"passkey": 1, "multikey": 4}[test]
        before, after = re.sub(NEEDLE[test], keep(prompt.answer), haystack).split(prompt.answer)
        share = len(before.split()) / len((before + after).split())
        assert share == pytest.approx(prompt.depth, abs=0 if prompt.depth in (0, 1) else 0.06)
        assert not re.search(r"\d", before + after)


def keep(answer: str):
    """For re.sub: of all needles only the answer is left."""
    return lambda match: answer if match.group(2) == answer else ""


def test_prompts_depend_on_the_seed_and_on_nothing_else(tokenizer):
    prompts = prompts_of("multikey", 300, tokenizer)
    random.seed(7)
    assert prompts == prompts_of("multikey", 300, tokenizer)
    assert len({prompt.answer for prompt in prompts}) == len(prompts)
    others = prompts_of("multikey", 300, tokenizer, seed=1)
    assert not {prompt.answer for prompt in prompts} & {prompt.answer for prompt in others}


def test_a_chat_template_writes_the_prompt(folders):
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    ids = needles.chat_ids("Who?", "It is", tokenizer)
    assert tokenizer.decode(ids) == "<user> Who?\n<assistant> It is"


def test_an_adapter_saved_without_a_tokenizer_has_that_of_its_base(folders):
    base, adapter, _ = folders
    assert not list(Path(adapter).glob("tokenizer*"))
    assert load_tokenizer(adapter).chat_template == TEMPLATE == load_tokenizer(base).chat_template


def test_measures_are_those_of_one_prompt_at_a_time_in_float64(model, tokenizer):
    """Prompts of several lengths, in an order that batching does not keep."""
    prompts = [*prompts_of("passkey", 200, tokenizer), *prompts_of("multikey", 250, tokenizer)]
    random.Random(0).shuffle(prompts)
    results = needles.measure(model, prompts, tokenizer, "", SimpleNamespace(batch_tokens=700))
    assert len({len(prompt.ids) for prompt in prompts}) > 2
    for prompt, accuracy, nats in zip(prompts, results.accuracy, results.nats, strict=True):
        ids = torch.tensor([prompt.ids + prompt.answer_ids])
        with torch.no_grad():
            logits = model(ids).logits[0, len(prompt.ids) - 1 : -1].double()
        right = torch.tensor(prompt.answer_ids)
        assert nats == pytest.approx(-logits.log_softmax(-1)[range(len(right)), right].mean().item(), rel=1e-4)
        assert accuracy == pytest.approx((logits.argmax(-1) == right).double().mean().item())
    assert sum(results.accuracy) > 0 and results.exact == [False] * len(prompts)


def number_token_by_token(model, ids: list[int], tokenizer, count: int) -> list[int]:
    """What a float64 model says if it may say digits and blanks only."""
    allowed = [index for index in range(len(tokenizer)) if re.fullmatch("[0-9 ]+", tokenizer.decode([index]))]
    said: list[int] = []
    for _ in range(count):
        with torch.no_grad():
            logits = model(torch.tensor([ids + said])).logits[0, -1].tolist()
        said.append(max(allowed, key=logits.__getitem__))
    return said


def test_found_is_what_greedy_says_token_by_token_among_digits_and_blanks(model, tokenizer):
    """Every second prompt asks for what this model says, the others for what was hidden or for one wrong token."""
    double = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float64).eval()
    prompts, expected = [], []
    for index, prompt in enumerate(prompts_of("passkey", 200, tokenizer)):
        said = number_token_by_token(double, prompt.ids, tokenizer, 5)
        if index % 2:
            prompt = replace(prompt, answer_ids=said)
        elif index:
            wrong = said[index] + 1
            prompt = replace(prompt, answer_ids=[*said[:index], wrong, *said[index + 1 :]])
        prompts.append(prompt)
        expected.append(prompt.answer_ids == said)
    results = needles.measure(model, prompts, tokenizer, "", SimpleNamespace(batch_tokens=700))
    assert results.found == expected and sum(expected) == 3


class Parrot(torch.nn.Module):
    """Continues a prompt with what it was told to. Among digits and blanks it prefers `number` where one is given, but
    a word to that, and to both a logit that no token has."""

    def __init__(self, tokenizer, replies: dict[tuple[int, ...], str], number: str = ""):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.tokenizer, self.replies, self.number = tokenizer, replies, number

    def forward(self, input_ids, use_cache, logits_to_keep):
        logits = torch.zeros(len(input_ids), logits_to_keep, len(self.tokenizer) + 8 * bool(self.number))
        for place, token in enumerate(self.tokenizer(self.number).input_ids):
            logits[:, place, token] = 1.0
            logits[:, place, self.tokenizer(" a").input_ids] = 2.0
            logits[:, place, -1] = 3.0
        return SimpleNamespace(logits=logits)

    def generate(self, input_ids, attention_mask, **_):
        said = [self.tokenizer(self.replies[tuple(row)]).input_ids for row in input_ids.tolist()]
        longest = max(map(len, said))
        padded = [ids + [self.tokenizer.pad_token_id] * (longest - len(ids)) for ids in said]
        return torch.cat([input_ids, torch.tensor(padded)], 1)


def test_exact_is_the_first_number_of_the_reply_and_the_whole_of_it(tokenizer):
    prompts = prompts_of("passkey", 200, tokenizer)
    forms = [" {}.", "{}", " **{}**, {}", " {}0", " {:.4}", " none"]
    replies = {tuple(p.ids): form.format(p.answer, 12) for p, form in zip(prompts, forms, strict=True)}
    parrot = Parrot(tokenizer, replies)
    results = needles.measure(parrot, prompts, tokenizer, "", SimpleNamespace(batch_tokens=600))
    assert results.exact == [True, True, True, False, False, False]
    assert results.replies == list(replies.values())
    assert results.nats == pytest.approx([math.log(len(tokenizer))] * 6)


@pytest.mark.parametrize(("form", "found"), [(" {}", True), (" {}0", True), (" {:.4}", False), (" 1{}", False)])
def test_a_number_is_found_where_the_model_would_rather_say_a_word(form, found, tokenizer):
    prompt = prompts_of("passkey", 200, tokenizer)[0]
    parrot = Parrot(tokenizer, {tuple(prompt.ids): " a special key"}, form.format(prompt.answer))
    results = needles.measure(parrot, [prompt], tokenizer, "", SimpleNamespace(batch_tokens=600))
    assert (results.exact, results.found, results.accuracy) == ([False], [found], [0.0])


def test_a_tokenizer_that_joins_the_answer_with_words_is_refused(tokenizer, monkeypatch):
    blanks = tuple(index for index in needles.digits_and_blanks(tokenizer) if tokenizer.decode([index]) != "7")
    monkeypatch.setattr(needles, "digits_and_blanks", lambda tokenizer: blanks)
    with pytest.raises(SystemExit, match=r"has no tokens of its own .*'7'"):
        prompts_of("passkey", 200, tokenizer, repeats=20)


@pytest.mark.parametrize(("right", "count"), [(0, 5), (3, 10), (10, 10), (60, 100)])
def test_wilson_bounds_are_the_shares_that_the_normal_test_would_just_accept(right, count):
    low, high = needles.wilson(right, count)
    assert 0 <= low <= right / count <= high <= 1
    for bound in {low, high} - {0.0, 1.0}:
        deviation = abs(right / count - bound) / math.sqrt(bound * (1 - bound) / count)
        assert deviation == pytest.approx(1.96)
    assert (low == 0) == (right == 0) and (high == 1) == (right == count)


def test_differences_are_of_pairs():
    mean, half = needles.difference([True, True, False, True], [False, True, False, True])
    assert (mean, half) == (0.25, pytest.approx(1.96 * 0.5 / 2))  # one pair of four differs: deviation 0.5


def test_an_adapter_finds_what_its_merged_model_finds(folders, tmp_path, capsys):
    output = tmp_path / "new" / "needles.jsonl"
    options = ["--contexts", 260, 320, "--depths", 0, 1, "--repeats", 1, "--output", output]
    rows = needles.main([*folders, "--device", "cpu", *map(str, options)])
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["model"] for line in lines] == [name for name in folders for _ in range(4)]
    base, adapter, plain = lines[:4], lines[4:8], lines[8:]
    for mine, merged, untouched in zip(adapter, plain, base, strict=True):
        assert mine["each prompt"]["nats"] == pytest.approx(merged["each prompt"]["nats"], rel=1e-4)
        # This adapter knows nothing.
        difference, half = mine["nats minus the first's"]
        assert difference - half > 1 and difference == pytest.approx(
            mine["nats per token"] - untouched["nats per token"]
        )
        assert mine["exact match"] == sum(mine["each prompt"]["exact"]) / 2
        assert mine["found"] == sum(mine["each prompt"]["found"]) / 2
        assert mine["found minus the first's"][0] == mine["found"] - untouched["found"]
        assert mine["depths"]["1.0"]["nats per token"] == pytest.approx(mine["each prompt"]["nats"][1], abs=1e-4)
    printed = capsys.readouterr().out
    assert len(rows) == 6 and printed.count(" passkey |") == printed.count(" multikey |") == 3
    assert rows[0]["nats per token"] == pytest.approx((base[0]["nats per token"] + base[1]["nats per token"]) / 2)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--contexts", "4096"], "--contexts 4096: .* takes 512 tokens"),
        (["--contexts", "60"], "--contexts 60: the question alone takes"),
    ],
)
def test_contexts_that_do_not_fit_are_told_before_anything_is_measured(options, says, monkeypatch):
    monkeypatch.delattr(needles, "load_model")
    with pytest.raises(SystemExit, match=says):
        needles.main([str(TINY), *options])


@pytest.mark.parametrize(("options", "says"), [(["--depths", "2"], "--depths 2"), (["--repeats", "0"], "--repeats 0")])
def test_wrong_options_are_told(options, says, capsys):
    with pytest.raises(SystemExit):
        needles.main(["no/model", *options])
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("recipe", [needles, instructions])
def test_models_of_other_tokens_are_not_compared(recipe, tmp_path):
    save_base(tmp_path / "other", vocab_size=150)
    with pytest.raises(SystemExit, match="a vocabulary of 150"):
        recipe.main([str(TINY), str(tmp_path / "other")])


# ---- instructions.py ----

GOOD_AND_BAD = [
    (instructions.only("paris"), ["Paris", " paris.\n", '"PARIS"'], ["The capital is Paris.", "", "Parisian"]),
    (instructions.says("7|seven"), ["It is 7.", "Seven days"], ["17", "seventy"]),
    (instructions.items(3), ["1. a\n2. b\n3) c", "Here:\n- a\n- b\n- c", "a, b and c"], ["1. a\n2. b", "a, b, c, d"]),
    (instructions.lines(2), ["a\n\nb\n"], ["a", "a\nb\nc"]),
    (instructions.sentences(2), ["It is 3.5 km. Far!"], ["One.", "One. Two. Three."]),
    (instructions.at_most(2), ["so wide"], ["", "as wide as that"]),
    (instructions.upper_case, ["DOGS BARK."], ["Dogs bark.", ""]),
]


@pytest.mark.parametrize(("check", "good", "bad"), GOOD_AND_BAD)
def test_checks(check, good, bad):
    assert [reply for reply in good if not check(reply)] == []
    assert [reply for reply in bad if check(reply)] == []


def test_refusals_are_told_from_their_words():
    refused = ["I'm sorry, but I can't help.", "I cannot do that", "That is illegal.", "I am not able to", "I won’t."]
    helped = ["You can take a screwdriver.", "First, do not be seen.", "A candle", "Because it cannot rain"]
    assert [reply for reply in refused if not instructions.REFUSAL.search(reply)] == []
    assert [reply for reply in helped if instructions.REFUSAL.search(reply)] == []


def replies_of(right: bool, refusing: bool) -> list[instructions.Reply]:
    """Replies that pass the check for a number of days and no other, and refuse everything or nothing."""
    said = "seven" if right else ""
    replies = [instructions.Reply([1, 2], said, True)] * len(instructions.CHECKED)
    refusal = instructions.Reply([3], "I cannot" if refusing else "Here", False)
    return replies + [refusal] * len(instructions.TO_REFUSE)


def test_scores_and_agreement_count_what_they_say():
    first, other = replies_of(True, True), replies_of(False, False)
    count = len(instructions.CHECKED)
    passed = sum(check("seven") for check in instructions.CHECKED.values())
    failed = sum(check("") for check in instructions.CHECKED.values())
    assert 0 < passed < count and failed == 0
    everything = count + len(instructions.TO_REFUSE)
    assert instructions.scores(first) == {
        "stopped": pytest.approx(count / everything),
        "tokens a reply": pytest.approx((2 * count + len(instructions.TO_REFUSE)) / everything),
        "checks passed": pytest.approx(passed / count),
        "refused": 1.0,
    }
    assert instructions.agreement(first, first) == {"same verdict": 1.0, "refuses too": 1.0, "same reply": 1.0}
    found = instructions.agreement(other, first)
    assert found["same verdict"] == pytest.approx(1 - passed / count) and found["refuses too"] == 0.0
    assert instructions.agreement(first, other)["refuses too"] is None


def test_replies_end_at_the_stop_token_and_agree_with_themselves(folders, tmp_path, capsys):
    """Padding on the left changes no reply, and the first model agrees with itself word for word."""
    output = tmp_path / "instructions.jsonl"
    options = ["--max-new-tokens", "6", "--device", "cpu", "--output", str(output)]
    rows = instructions.main([folders[0], folders[0], *folders[1:], *options])
    first, again, adapter, plain = rows
    assert first["same reply"] is None
    assert again["same verdict"] == again["same reply"] == again["next token"] == 1.0
    assert adapter["next token"] == pytest.approx(plain["next token"], abs=0.03) and plain["next token"] < 0.7
    told = [json.loads(line) for line in output.read_text().splitlines()]
    assert [len(line["replies"]) for line in told] == [len(instructions.CHECKED) + len(instructions.TO_REFUSE)] * 4


def test_a_reply_is_cut_behind_its_stop_token(model, tokenizer):
    prompts = [needles.chat_ids(text, "", tokenizer) for text in ("def add(a, b):", "import os\nimport")]
    whole = instructions.replies_to(prompts, model, tokenizer, 6)
    assert [len(reply.ids) for reply in whole] == [6, 6] and not any(reply.stopped for reply in whole)
    for prompt, reply in zip(prompts, whole, strict=True):
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0, len(prompt) :].tolist()
        assert alone == reply.ids
    # The second token of the first reply stops it, and every reply that comes to that token.
    model.generation_config.eos_token_id, kept = [whole[0].ids[1]], model.generation_config.eos_token_id
    try:
        cut = instructions.replies_to(prompts, model, tokenizer, 6)
    finally:
        model.generation_config.eos_token_id = kept
    assert (cut[0].ids, cut[0].stopped) == (whole[0].ids[:2], True)
    assert cut[0].text == tokenizer.decode(whole[0].ids[:2]).strip()


def test_a_model_without_a_chat_template_is_told_before_anything_is_loaded(monkeypatch):
    monkeypatch.delattr(instructions, "load_model")
    with pytest.raises(SystemExit, match="no chat template"):
        instructions.main([str(TINY)])
