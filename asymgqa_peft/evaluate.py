"""What a conversion costs and saves: perplexity, KL to the base, bytes of KV cache, decode speed."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import BatchEncoding, DynamicCache, PretrainedConfig, PreTrainedTokenizerBase

from .adapter.layer import SharedLayer
from .adapter.offload import device_of
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
        batches: dicts with `input_ids` (B, T) and optionally `attention_mask`, `position_ids` (of packed rows) and
            `labels`, all (B, T), or LongTensors (B, T). A token is predicted if it and its predecessor are attended
            and its label is not -100.
        progress: show a progress bar.

    Raises:
        ValueError: for a malformed batch, before any is computed; or if no token is predicted.
    """

    def cross_entropy(batch: dict[str, Tensor]) -> Tensor:
        logits, targets, mask = _predictions(model, batch)
        losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        return losses[mask.flatten()]

    return math.exp(_mean_over_tokens(cross_entropy, batches, "perplexity", progress))


@torch.no_grad()
def kl_to_reference(model: nn.Module, reference: nn.Module, batches: Iterable[Batch], progress: bool = False) -> float:
    """Mean KL(reference || model) of the next-token distributions, in nats per predicted token.

    `reference` may be `model` itself: then it is compared with its own base, the adapter disabled. Batches and errors
    are those of `perplexity`.
    """
    as_reference = nullcontext
    if reference is model:
        as_reference = model.disable_adapter

    def divergence(batch: dict[str, Tensor]) -> Tensor:
        logits, _, mask = _predictions(model, batch)
        with as_reference():
            expected, _, _ = _predictions(reference, batch)
        expected = F.log_softmax(expected.float(), -1).to(logits.device)
        losses = F.kl_div(F.log_softmax(logits.float(), -1), expected, reduction="none", log_target=True).sum(-1)
        return losses[mask]

    return _mean_over_tokens(divergence, batches, "KL", progress)


def _mean_over_tokens(
    losses_of: Callable[[dict[str, Tensor]], Tensor], batches: Iterable[Batch], name: str, progress: bool
) -> float:
    """Mean of what `losses_of` gives for the predicted tokens of each batch, (tokens,)."""
    total, count = 0.0, 0
    for batch in tqdm(checked_batches(batches), desc=name, disable=not progress):
        losses = losses_of(batch)
        total += losses.double().sum().item()
        count += len(losses)
    if count == 0:
        raise ValueError("batches hold no token to predict: give sequences of at least two attended tokens.")
    return total / count


def strided_windows(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    stride: int,
    batch_size: int = 1,
    max_tokens: int | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Batches that score every token of every document once, with `length - stride` tokens of context or more.

    Windows of `length` tokens start every `stride` tokens; what an earlier window has scored is context only, with
    label -100. A window holds one document: none sees another. Each document starts with the tokenizer's bos (or, for
    want of one, eos) token, so that its first token is scored too. Documents end after `max_tokens` tokens in all.

    Returns:
        Dicts of `input_ids`, `attention_mask` and `labels`, each (B, T), for `perplexity` and `kl_to_reference`, with
        B up to `batch_size` and T up to `length`, padded on the right.

    Raises:
        ValueError: unless 0 < stride < length.
    """
    if not 0 < stride < length:
        raise ValueError(f"stride={stride} must be at least 1 and less than length={length}: windows have to overlap.")
    tokens = _token_ids(documents, tokenizer, max_tokens)
    windows = (window for ids in tokens for window in _windows(ids, length, stride))
    # Apart, because a generator would check its arguments only when the first batch is asked for.
    return _padded_batches(windows, batch_size, tokenizer.pad_token_id or 0)


def kv_cache_bytes_per_token(config_or_model: PretrainedConfig | nn.Module, dtype: torch.dtype) -> int:
    """Bytes of keys and values that a cache of `dtype` holds for one token, over all layers.

    In each layer 2 * stored K/V heads * head dimension * bytes of a number: of a stock configuration its
    `num_key_value_heads * head_dim`, of a model what its layers store, with the adapter in effect if it is wrapped.
    """
    config, modules = config_or_model, ()
    if isinstance(config_or_model, nn.Module):
        config, modules = config_or_model.config, config_or_model.modules()
    if any(isinstance(module, SharedLayer) for module in modules):
        numbers = 0
        for site in attention_sites(config_or_model):
            numbers += math.prod(site.cached_heads())
    else:
        shape = head_shape(config)
        numbers = config.num_hidden_layers * shape.base_kv_heads * shape.head_dim
    return 2 * numbers * dtype.itemsize


@torch.no_grad()
def decode_speed(
    model: nn.Module, batch_size: int = 8, context: int = 256, new_tokens: int = 32, repeats: int = 3
) -> float:
    """Tokens generated per second by greedy decoding after a prefill of `context` random tokens, median of repeats."""
    device = device_of(model)
    synchronize = torch.get_device_module(device).synchronize
    prompt = torch.randint(0, model.config.vocab_size, (batch_size, context), device=device)
    speeds = []
    with evaluating(model):
        for _ in range(repeats):
            cache = {cache_argument(model): DynamicCache(config=model.config)}
            token = model(prompt, **cache, use_cache=True, logits_to_keep=1).logits.argmax(-1)
            synchronize()
            start = time.perf_counter()
            for _ in range(new_tokens):
                token = model(token, **cache, use_cache=True).logits.argmax(-1)
            synchronize()
            speeds.append(batch_size * new_tokens / (time.perf_counter() - start))
    return sorted(speeds)[repeats // 2]


def cache_argument(model: nn.Module) -> str:
    """What a model's forward calls its cache: transformers 5.24 has renamed it."""
    return "cache" if "cache" in inspect.signature(unwrap(model).forward).parameters else "past_key_values"


def _predictions(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (B, T - 1, V), targets (B, T - 1) and mask (B, T - 1) of a checked batch."""
    inputs = BatchEncoding(batch).to(device_of(model))
    ids = inputs["input_ids"]
    labels = inputs.pop("labels", ids)  # only choose what counts: given to the model, they would cost a loss
    attended = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    mask = attended[:, 1:] & attended[:, :-1] & (labels[:, 1:] != IGNORED)
    with evaluating(model):
        logits = model(**inputs, use_cache=False).logits
    return logits[:, :-1], ids[:, 1:].to(logits.device), mask.to(logits.device)


def _token_ids(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, max_tokens: int | None
) -> Iterator[list[int]]:
    """Each document's tokens, with a start token before them unless the tokenizer wrote one or has none."""
    start = tokenizer.bos_token_id
    if start is None:
        start = tokenizer.eos_token_id
    left = max_tokens
    for text in documents:
        if left is not None:
            # A token is rarely as long as this: the rest of a large file need not be tokenised.
            text = text[: 32 * left]
        ids = list(tokenizer(text, verbose=False).input_ids)
        if start is not None and ids[:1] != [start]:
            ids.insert(0, start)
        yield ids[:left]
        if left is not None:
            left -= len(ids[:left])
            if left == 0:
                return


def _windows(ids: list[int], length: int, stride: int) -> Iterator[tuple[list[int], int]]:
    """(ids of a window, how many of its first are context only) over one document."""
    scored = 1  # the first token has no predecessor
    for begin in range(0, len(ids), stride):
        if scored < len(ids):
            yield ids[begin : begin + length], scored - begin
        scored = begin + length


def _padded_batches(
    windows: Iterator[tuple[list[int], int]], batch_size: int, pad_token_id: int
) -> Iterator[dict[str, Tensor]]:
    while chosen := list(islice(windows, batch_size)):
        ids, attended, labels = [], [], []
        for window, context in chosen:
            ids.append(torch.tensor(window))
            attended.append(torch.ones_like(ids[-1]))
            labels.append(ids[-1].clone())
            labels[-1][:context] = IGNORED
        yield {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_token_id),
            "attention_mask": pad_sequence(attended, batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        }
