"""What a conversion costs and saves: perplexity, KL to the base, bytes of KV cache, decode speed."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import DynamicCache, PretrainedConfig, PreTrainedTokenizerBase

from .adapter.site import attention_sites, evaluating, unwrap
from .batches import Batch, checked_batches
from .families import head_shape

IGNORED = -100
"""Label of a token that is not predicted, as everywhere in transformers."""


@torch.no_grad()
def perplexity(model: nn.Module, batches: Iterable[Batch], progress: bool = False) -> float:
    """exp of the mean next-token cross-entropy over all predicted tokens of all batches.

    Args:
        model: a causal language model, wrapped or plain; it is evaluated in eval mode and left as it was.
        batches: dicts with `input_ids` (B, T) and optionally `attention_mask` (B, T) and `labels` (B, T), or
            LongTensors (B, T). A token is predicted if it and its predecessor are attended and its label is not -100.
        progress: show a progress bar.

    Raises:
        ValueError: for a malformed batch, before any is computed; or if no token is predicted.
    """
    total, count = 0.0, 0
    for batch in tqdm(checked_batches(batches), desc="perplexity", disable=not progress):
        logits, targets, mask = _predictions(model, batch)
        losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        total += losses.double()[mask.flatten()].sum().item()
        count += int(mask.sum())
    _check_predicted(count)
    return math.exp(total / count)


@torch.no_grad()
def kl_to_reference(model: nn.Module, reference: nn.Module, batches: Iterable[Batch], progress: bool = False) -> float:
    """Mean KL(reference || model) of the next-token distributions, in nats per predicted token.

    `reference` may be `model` itself: then it is compared with its own base, the adapter disabled. Batches and errors
    are those of `perplexity`.
    """
    total, count = 0.0, 0
    for batch in tqdm(checked_batches(batches), desc="KL", disable=not progress):
        logits, _, mask = _predictions(model, batch)
        if reference is model:
            with model.disable_adapter():
                expected, _, _ = _predictions(model, batch)
        else:
            expected, _, _ = _predictions(reference, batch)
        expected = F.log_softmax(expected.float(), -1).to(logits.device)
        losses = F.kl_div(F.log_softmax(logits.float(), -1), expected, reduction="none", log_target=True).sum(-1)
        total += losses.double()[mask].sum().item()
        count += int(mask.sum())
    _check_predicted(count)
    return total / count


def strided_windows(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int, stride: int, batch_size: int = 1
) -> Iterator[dict[str, Tensor]]:
    """Batches that score every token of every document once, with `length - stride` tokens of context or more.

    Windows of `length` tokens start every `stride` tokens; what an earlier window has scored is context only, with
    label -100. A window holds one document: none sees another. Each document starts with the tokenizer's bos (or, for
    want of one, eos) token, so that its first token is scored too.

    Args:
        documents: texts.
        tokenizer: makes the tokens.
        length: T, tokens in a window.
        stride: new tokens in a window, less than `length`; fewer give more context and cost more time.
        batch_size: B, windows in a batch, padded on the right.

    Returns:
        Dicts of `input_ids`, `attention_mask` and `labels`, each (B, T), for `perplexity` and `kl_to_reference`.

    Raises:
        ValueError: unless 0 < stride < length.
    """
    if not 0 < stride < length:
        raise ValueError(f"stride={stride} must be at least 1 and less than length={length}: windows have to overlap.")
    return _batches_of_windows(documents, tokenizer, length, stride, batch_size)


def _batches_of_windows(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int, stride: int, batch_size: int
) -> Iterator[dict[str, Tensor]]:
    # Apart from its caller, because a generator would check its arguments only when the first batch is asked for.
    pad_token_id = tokenizer.pad_token_id or 0
    waiting = []
    for text in documents:
        for window in _windows(_token_ids(text, tokenizer), length, stride):
            waiting.append(window)
            if len(waiting) == batch_size:
                yield _padded_batch(waiting, pad_token_id)
                waiting = []
    if waiting:
        yield _padded_batch(waiting, pad_token_id)


def kv_cache_bytes_per_token(config_or_model: PretrainedConfig | nn.Module, dtype: torch.dtype) -> int:
    """Bytes of keys and values that the cache holds for one token, over all layers.

    In each layer they are 2 * stored K/V heads * head dimension * bytes of a number: `num_key_value_heads * head_dim`
    of a configuration, and under an adapter what its layers store.

    Args:
        config_or_model: a stock configuration, a plain model, or a wrapped one (then with the adapter in effect).
        dtype: of the cache, normally the model's.
    """
    if isinstance(config_or_model, PretrainedConfig):
        shape = head_shape(config_or_model)
        numbers = config_or_model.num_hidden_layers * shape.base_kv_heads * shape.head_dim
    else:
        numbers = 0
        for site in attention_sites(config_or_model):
            heads, head_dim = site.cached_heads()
            numbers += heads * head_dim
    return 2 * numbers * dtype.itemsize


@torch.no_grad()
def decode_speed(
    model: nn.Module, batch_size: int = 8, context: int = 256, new_tokens: int = 32, repeats: int = 3
) -> float:
    """Tokens generated per second by greedy decoding after a prefill of `context` random tokens, median of repeats."""
    device = next(model.parameters()).device
    prompt = torch.randint(0, model.config.vocab_size, (batch_size, context), device=device)
    speeds = []
    with evaluating(model):
        for _ in range(repeats):
            cache = {_cache_argument(model): DynamicCache(config=model.config)}
            token = _greedy(model(prompt, **cache, use_cache=True, logits_to_keep=1).logits)
            _synchronize(device)
            start = time.perf_counter()
            for _ in range(new_tokens):
                token = _greedy(model(token, **cache, use_cache=True).logits)
            _synchronize(device)
            speeds.append(batch_size * new_tokens / (time.perf_counter() - start))
    return sorted(speeds)[repeats // 2]


def _cache_argument(model: nn.Module) -> str:
    """What a model's forward calls its cache: transformers 5.24 has renamed it."""
    return "cache" if "cache" in inspect.signature(unwrap(model).forward).parameters else "past_key_values"


def _predictions(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (B, T - 1, V), targets (B, T - 1) and mask (B, T - 1) of a checked batch."""
    device = next(model.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in batch.items()}
    ids = inputs["input_ids"]
    labels = inputs.pop("labels", ids)  # only choose what counts: given to the model, they would cost a loss
    attended = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    mask = attended[:, 1:] & attended[:, :-1] & (labels[:, 1:] != IGNORED)
    with evaluating(model):
        logits = model(**inputs, use_cache=False).logits
    return logits[:, :-1], ids[:, 1:].to(logits.device), mask.to(logits.device)


def _token_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A document's tokens, with a start token before them unless the tokenizer wrote one or has none."""
    ids = list(tokenizer(text, verbose=False).input_ids)
    start = tokenizer.bos_token_id
    if start is None:
        start = tokenizer.eos_token_id
    if start is not None and ids[:1] != [start]:
        ids.insert(0, start)
    return ids


def _windows(ids: list[int], length: int, stride: int) -> Iterator[tuple[list[int], int]]:
    """(ids of a window, how many of its first are context only) over one document."""
    scored = 1  # the first token has no predecessor
    for begin in range(0, len(ids), stride):
        if scored < len(ids):
            yield ids[begin : begin + length], scored - begin
        scored = begin + length


def _padded_batch(windows: list[tuple[list[int], int]], pad_token_id: int) -> dict[str, Tensor]:
    shape = (len(windows), max(len(ids) for ids, _ in windows))
    batch = {
        "input_ids": torch.full(shape, pad_token_id),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, IGNORED),
    }
    for row, (ids, context) in enumerate(windows):
        batch["input_ids"][row, : len(ids)] = torch.tensor(ids)
        batch["attention_mask"][row, : len(ids)] = 1
        batch["labels"][row, context : len(ids)] = torch.tensor(ids[context:])
    return batch


def _check_predicted(count: int) -> None:
    if count == 0:
        raise ValueError("batches hold no token to predict: give sequences of at least two attended tokens.")


def _greedy(logits: Tensor) -> Tensor:
    return logits[:, -1:].argmax(-1)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
