"""Measure a plain checkpoint the way anybody would serve it: stock transformers, nothing of this project imported.

    python recipes/serve_plain.py out/quickstart/plain --blocks out/quickstart/held_out.safetensors

Takes several checkpoints too. Prints one JSON line for each: class, KV heads that the cache holds, parameters,
perplexity, greedy decode speed.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import sys
import time

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel


@torch.no_grad()
def perplexity(model, blocks: torch.Tensor, batch_size: int = 8) -> float:
    """exp of the mean next-token loss over blocks (N, T), all of one length."""
    total = 0.0
    for batch in blocks.split(batch_size):
        total += model(input_ids=batch, labels=batch).loss.item() * len(batch)
    return math.exp(total / len(blocks))


@torch.no_grad()
def decode(model, prompts: torch.Tensor, new_tokens: int, repeats: int = 3) -> tuple[float, DynamicCache]:
    """Greedy tokens per second after a prefill of the prompts (B, T), median of repeats, and the last cache."""
    # transformers 5.24 calls the cache another name.
    takes_cache = "cache" in inspect.signature(model.forward).parameters
    name = "cache" if takes_cache else "past_key_values"
    cache = DynamicCache(config=model.config)
    cached = {name: cache}
    first = model(prompts, **cached, logits_to_keep=1).logits.argmax(-1)
    speeds = []
    for _ in range(repeats):
        token = first
        start = time.perf_counter()
        for _ in range(new_tokens):
            token = model(token, **cached).logits.argmax(-1)
        speeds.append(prompts.numel() / prompts.shape[1] * new_tokens / (time.perf_counter() - start))
        # Back to the end of the prompts: a prefill for each repeat would take longer than what is measured.
        cache.crop(-new_tokens)
    return sorted(speeds)[repeats // 2], cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="model", help="folder of a plain checkpoint")
    parser.add_argument("--blocks", required=True, help="safetensors file with 'blocks' (N, T): held-out token ids")
    parser.add_argument("--batch-size", type=int, default=32, help="sequences decoded together")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens decoded for the speed")
    args = parser.parse_args()

    # All of them first: a wrong folder is told before anything is measured.
    models = [load(folder) for folder in args.models]
    blocks = load_file(args.blocks)["blocks"]
    for model in models:
        print(json.dumps(measure(model, blocks, args)), flush=True)


def load(folder: str) -> PreTrainedModel:
    """The checkpoint in float32, or one line that says why not."""
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    except (OSError, ValueError) as error:
        message = " ".join(str(error).split())
        raise SystemExit(f"{folder}: {message} A run's plain checkpoint lies in its plain/.") from error


def measure(model: PreTrainedModel, blocks: torch.Tensor, args: argparse.Namespace) -> dict:
    """The JSON line of one model."""
    prompts = blocks[: args.batch_size, : blocks.shape[1] - args.new_tokens]
    speed, cache = decode(model, prompts, args.new_tokens)
    # The point of this script.
    assert "asymgqa_peft" not in sys.modules
    bytes_per_token = 0
    for layer in cache.layers:
        kv_heads, head_dim = layer.keys.shape[1], layer.keys.shape[3]
        bytes_per_token += 2 * kv_heads * head_dim * layer.keys.itemsize
    return {
        "class": type(model).__name__,
        "cache_kv_heads": cache.layers[0].keys.shape[1],
        "cache_bytes_per_token": bytes_per_token,
        "parameters": model.num_parameters(),
        "perplexity": perplexity(model, blocks),
        "decode_tokens_per_s": speed,
    }


if __name__ == "__main__":
    main()
