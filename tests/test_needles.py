"""The recipes that ask models for needles and instructions: prompts are what they say, measures are right."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import save_base, wrap
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes import instructions, needles

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
    args = SimpleNamespace(repeats=2, depths=[0.0, 0.5, 1.0], seed=0, **options)
    return needles.make_prompts(test, context, tokenizer, args)


@pytest.mark.parametrize("test", needles.TESTS)
def test_prompts_fill_the_context_and_hide_the_answer_where_they_say(test, tokenizer):
    prompts = prompts_of(test, 400, tokenizer)
    assert [prompt.depth for prompt in prompts] == [0.0, 0.5, 1.0] * 2
    for prompt in prompts:
        longest = len(prompt.ids) + len(prompt.answer_ids) + needles.REPLY_MARGIN
        assert 390 <= longest <= 400
        text = tokenizer.decode(prompt.ids)
        assert tokenizer.decode(prompt.ids + prompt.answer_ids) == f"{text} {prompt.answer}"
        _, haystack, question, reply = text.split("\n")
        # What the text says about the thing that the reply is about.
        about = reply.removeprefix("The ").removesuffix(" is").removesuffix(" mentioned in the provided text")
        (needle,) = {sentence for sentence in sentences_of(haystack) if f"{about} is" in needle_of(sentence)}
        assert prompt.answer in needle and about in question.replace("What is the ", "")
        others = haystack.split(needle)
        share = len(others[0]) / (len(others[0]) + len(others[-1]))
        assert abs(share - prompt.depth) < 0.35, (share, prompt.depth)
    assert prompts == prompts_of(test, 400, tokenizer)
    assert len({prompt.answer for prompt in prompts}) == len(prompts)


def sentences_of(text: str) -> list[str]:
    return [sentence.strip() for sentence in text.replace("One of the", "The").split(".")]


def needle_of(sentence: str) -> str:
    return sentence.lower().replace("numbers", "number").removeprefix("the ")
