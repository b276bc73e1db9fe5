"""Perplexity, KL, cache bytes: against formulas written out, with padding and wrapped models."""

import math

import pytest
import torch
from models import CACHE, GROUPS, VOCAB, prompt, tiny_llama, wrap
from transformers import BatchEncoding, DynamicCache

from asymgqa_peft.evaluate import (
    decode_speed,
    kl_to_reference,
    kv_cache_bytes_per_token,
    perplexity,
    strided_windows,
)


def token_losses(model, ids: torch.Tensor) -> list[float]:
    """Next-token losses of one unpadded sequence (T,), one prediction at a time."""
    probabilities = torch.softmax(model(ids[None]).logits[0].detach().double(), -1)
    return [-math.log(probabilities[t, ids[t + 1]]) for t in range(len(ids) - 1)]


def test_perplexity_is_token_weighted_over_batches_of_unequal_length():
    model = tiny_llama()
    short, long = torch.randint(0, VOCAB, (1, 5)), torch.randint(0, VOCAB, (1, 17))
    losses = token_losses(model, short[0]) + token_losses(model, long[0])
    expected = math.exp(sum(losses) / len(losses))
    mean_of_batches = math.exp(0.5 * (sum(losses[:4]) / 4 + sum(losses[4:]) / 16))
    assert abs(expected - mean_of_batches) > 1e-3 * expected  # the weighting matters here
    assert perplexity(model, [short, {"input_ids": long}]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_counted(side):
    model = tiny_llama()
    ids = prompt(1, 12)
    pad = torch.zeros(1, 24, dtype=torch.long)
    padded = torch.cat((pad, ids) if side == "left" else (ids, pad), dim=1)
    mask = torch.cat((pad, torch.ones_like(ids)) if side == "left" else (torch.ones_like(ids), pad), dim=1)
    expected = perplexity(model, [ids])
    assert perplexity(model, [{"input_ids": padded, "attention_mask": mask}]) == pytest.approx(expected, rel=1e-4)
    assert perplexity(model, [padded]) != pytest.approx(expected, rel=1e-2)


def test_packed_documents_do_not_see_each_other():
    model, ids = tiny_llama(), prompt(4, 12)
    labels = ids.clone()
    labels[:, 0] = -100
    packed = {
        "input_ids": ids.view(1, 48),
        "position_ids": torch.arange(12).repeat(1, 4),
        "labels": labels.view(1, 48),
    }
    expected = perplexity(model, [ids])
    assert perplexity(model, [packed]) == pytest.approx(expected, rel=1e-4)
    del packed["position_ids"]
    assert perplexity(model, [packed]) != pytest.approx(expected, rel=1e-2)


def test_kl_is_zero_to_itself_and_the_formula_to_another():
    model, other = tiny_llama(), tiny_llama()
    with torch.no_grad():
        other.lm_head.weight.mul_(1.7)
    ids = torch.randint(0, VOCAB, (3, 9))
    p, q = (torch.log_softmax(m(ids).logits[:, :-1].double(), -1) for m in (other, model))
    expected = (p.exp() * (p - q)).sum(-1).mean().item()
    assert expected > 1e-2
    assert kl_to_reference(model, other, [ids]) == pytest.approx(expected, rel=1e-4)
    assert kl_to_reference(model, tiny_llama(), [ids]) == pytest.approx(0.0, abs=1e-9)


def test_kl_of_a_wrapped_model_to_its_own_base():
    base = tiny_llama()
    ids = torch.randint(0, VOCAB, (2, 11))
    reference = tiny_llama()
    model = wrap(base, GROUPS["llama"])
    own = kl_to_reference(model, model, [ids])
    assert own == pytest.approx(kl_to_reference(model, reference, [ids]), rel=1e-5)
    assert own > 1e-3


def test_cache_bytes_equal_what_a_cache_holds():
    base = tiny_llama()
    model = wrap(base, GROUPS["llama"])

    def held(use) -> int:
        cache = DynamicCache(config=base.config)
        use(torch.randint(0, VOCAB, (1, 10)), **{CACHE: cache})
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) // 10

    assert kv_cache_bytes_per_token(model, torch.float32) == held(model)
    with model.disable_adapter():
        assert (
            kv_cache_bytes_per_token(model, torch.float32)
            == held(model)
            == 2 * kv_cache_bytes_per_token(model, torch.float16)
        )
    assert held(model) * 3 == kv_cache_bytes_per_token(tiny_llama().config, torch.float32)
    plain = model.merge_and_unload()
    assert kv_cache_bytes_per_token(plain, torch.float32) == held(plain)


def test_mode_is_restored_and_speed_is_positive():
    model = tiny_llama().train()
    perplexity(model, [torch.randint(0, VOCAB, (1, 4))])
    assert decode_speed(model, batch_size=1, context=4, new_tokens=2, repeats=1) > 0
    assert model.training


class Letters:
    """A tokenizer: a token per letter. `bos` and `eos` are ids or None; `adds_bos` is whether it writes bos itself."""

    pad_token_id = 60

    def __init__(self, bos: int | None = 1, eos: int | None = 2, adds_bos: bool = False) -> None:
        self.bos_token_id, self.eos_token_id, self.adds_bos = bos, eos, adds_bos

    def __call__(self, text: str, verbose: bool = True) -> BatchEncoding:
        start = [self.bos_token_id] if self.adds_bos else []
        return BatchEncoding({"input_ids": start + [3 + ord(letter) - ord("a") for letter in text]})


DOCUMENTS = ["thequickbrownfox", "", "jumps", "overthelazydogandrunsawayintothewood"]


def one_by_one(model, documents, first: int, length: int, stride: int) -> list[float]:
    """Loss of every token, each from a run of its own, with the context that its window gives it."""
    losses = []
    for ids in ([first, *(3 + ord(letter) - ord("a") for letter in text)] for text in documents):
        for position in range(1, len(ids)):
            window = max(0, -(-(position + 1 - length) // stride)) * stride  # the first that reaches it
            logits = model(torch.tensor([ids[window:position]])).logits[0, -1].double()
            losses.append(-torch.log_softmax(logits, -1)[ids[position]].item())
    return losses


@pytest.mark.parametrize(("length", "stride", "batch_size"), [(8, 3, 3), (8, 4, 1), (9, 8, 4), (5, 1, 2), (64, 32, 2)])
@torch.no_grad()
def test_strided_windows_score_every_token_once_within_its_document(length, stride, batch_size):
    model = tiny_llama().double()
    losses = one_by_one(model, DOCUMENTS, 1, length, stride)
    assert len(losses) == sum(map(len, DOCUMENTS))
    batches = list(strided_windows(DOCUMENTS, Letters(), length, stride, batch_size))
    assert max(len(batch["input_ids"]) for batch in batches) == batch_size
    assert max(batch["input_ids"].shape[1] for batch in batches) <= length
    assert sum(int((batch["labels"] != -100).sum()) for batch in batches) == len(losses)
    assert perplexity(model, batches) == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-6)


@torch.no_grad()
def test_overlap_and_document_borders_matter():
    """What the windows do is seen in the numbers: no overlap, or one long document, gives others."""
    model = tiny_llama()
    strided, apart, joined = (
        perplexity(model, strided_windows(documents, Letters(), 8, stride))
        for documents, stride in ((DOCUMENTS, 2), (DOCUMENTS, 7), (["".join(DOCUMENTS)], 2))
    )
    assert apart != pytest.approx(strided, rel=1e-3) and joined != pytest.approx(strided, rel=1e-3)


@pytest.mark.parametrize(
    ("tokenizer", "start"),
    [(Letters(), 1), (Letters(adds_bos=True), 1), (Letters(bos=None), 2), (Letters(bos=None, eos=None), None)],
)
def test_documents_start_with_one_start_token(tokenizer, start):
    (batch,) = strided_windows(["abc"], tokenizer, 8, 4)
    expected = [3, 4, 5] if start is None else [start, 3, 4, 5]
    assert batch["input_ids"].tolist() == [expected] and batch["labels"].tolist() == [[-100, *expected[1:]]]


@pytest.mark.parametrize("stride", [0, 8, 9])
def test_windows_without_overlap_are_refused(stride):
    with pytest.raises(ValueError, match=f"stride={stride} .*length=8"):
        strided_windows(DOCUMENTS, Letters(), 8, stride)


def test_labels_choose_what_kl_and_perplexity_count():
    model, other = tiny_llama(), tiny_llama()
    with torch.no_grad():
        other.lm_head.weight.mul_(1.7)
    ids = torch.randint(0, VOCAB, (2, 9))
    labels = ids.clone()
    labels[:, :5] = -100
    p, q = (torch.log_softmax(m(ids).logits[:, 4:-1].double(), -1) for m in (other, model))
    expected = (p.exp() * (p - q)).sum(-1).mean().item()
    assert kl_to_reference(model, other, [{"input_ids": ids, "labels": labels}]) == pytest.approx(expected, rel=1e-4)
    assert kl_to_reference(model, other, [ids]) != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no token"),
        ([torch.zeros(2, 1, dtype=torch.long)], "no token"),
        ([torch.zeros(3, dtype=torch.long)], "LongTensors"),
        ([torch.zeros(2, 3)], "LongTensors"),
        ([{"labels": torch.zeros(2, 3)}], "input_ids"),
        (["text"], "str"),
    ],
)
def test_bad_batches_are_named(batches, message):
    with pytest.raises(ValueError, match=message):
        perplexity(tiny_llama(), batches)
