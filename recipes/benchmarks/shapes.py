"""What the benchmarks share: models of true shape with random weights, a device's measured ceilings, clocks."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

_COMMON = {"max_position_embeddings": 32768 + 1024, "tie_word_embeddings": False}
SHAPES = {
    "llama-2-7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "llama-2-70b": {
        "vocab_size": 32000,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "llama-3.1-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    },
}


def default_device() -> str:
    """A GPU if there is one."""
    if torch.cuda.is_available():
        return "cuda"
    return "cpu"


def working_dtype(device: str) -> torch.dtype:
    """bfloat16 on a GPU, float32 on a CPU, where bfloat16 is slow."""
    if torch.device(device).type == "cuda":
        return torch.bfloat16
    return torch.float32


def shape_config(shape: str, layers: int | None = None, **changes) -> LlamaConfig:
    """The Llama configuration of a named shape, with fewer layers or other changes."""
    sizes = _COMMON | SHAPES[shape] | changes
    if layers:
        sizes["num_hidden_layers"] = layers
    return LlamaConfig(**sizes)


def random_llama(config: LlamaConfig, device: str, dtype: torch.dtype, seed: int = 0) -> LlamaForCausalLM:
    """A Llama with random weights, made on the device in its dtype."""
    torch.manual_seed(seed)
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=dtype).eval()


def unequal_groups(heads: int, groups: int) -> list[list[int]]:
    """Unequal groups of interleaved heads: the largest has 1.5 times the mean, the smallest half of it."""
    mean = heads // groups
    sizes = [mean] * groups
    # Of each two groups the first takes half of the second's heads.
    for first in range(0, groups - 1, 2):
        sizes[first] += mean // 2
        sizes[first + 1] -= mean // 2
    order = sorted(range(heads), key=lambda head: (head % 3, head))
    partition, start = [], 0
    for size in sizes:
        partition.append(sorted(order[start : start + size]))
        start += size
    return partition


@torch.no_grad()
def plant_similar_heads(model: LlamaForCausalLM, sources: int, noise: float = 0.5, seed: int = 0) -> None:
    """Give the KV heads of each layer one of `sources` keys and values plus noise: something for a search to find."""
    generator = torch.Generator().manual_seed(seed)
    heads, dim = model.config.num_key_value_heads, model.config.head_dim
    for layer in model.model.layers:
        # Which of the heads it resembles.
        source = torch.randint(sources, (heads,), generator=generator)
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            own = projection.weight.unflatten(0, (heads, dim))
            # Indexing by a tensor copies, so that writing below does not change what is read.
            shared = own[source.to(own.device)]
            # Divided, so that keys and values keep their size.
            own.copy_((shared + noise * own) / (1 + noise**2) ** 0.5)


def synchronize(device: str | torch.device) -> None:
    """Wait until the device is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(call: Callable[[], object], device: str, repeats: int = 5, warmup: int = 2) -> float:
    """Median wall time of a call."""
    for _ in range(warmup):
        call()
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[repeats // 2]


def ceilings(device: str) -> dict[str, float]:
    """Measure and print what the device reaches on its best work.

    Returns:
        TFLOP/s of large matrix products, an entry per dtype, and GB/s of a copy (read and write).
    """
    size, copied, dtypes = 512, 1 << 24, ("float32", "float64")
    if torch.device(device).type == "cuda":
        size, copied, dtypes = 8192, 1 << 30, ("bfloat16", "float32", "float64")
    found = {}
    for name in dtypes:
        matrix = torch.randn(size, size, device=device).to(getattr(torch, name))
        found[f"{name} TFLOP/s"] = 2 * size**3 / median_seconds(lambda m=matrix: m @ m, device) / 1e12
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found["copy GB/s"] = 2 * copied / median_seconds(lambda: target.copy_(source), device) / 1e9
    print("measured ceilings: " + ", ".join(f"{name} {value:,.1f}" for name, value in found.items()), flush=True)
    return found


def print_checks(checks: dict[str, bool]) -> None:
    """A line per target: met or not."""
    for target, met in checks.items():
        verdict = "met" if met else "NOT MET"
        print(f"{verdict}: {target}", flush=True)


def reset_peak(device: str) -> int:
    """Start to watch the device's memory; bytes allocated now (0 on a CPU)."""
    if torch.device(device).type != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak_beyond(before: int, device: str) -> int | None:
    """Most bytes allocated at a time since `reset_peak`, less the `before` that it gave; None on a CPU."""
    if torch.device(device).type != "cuda":
        return None
    return torch.cuda.max_memory_allocated() - before


REPLAY_SECONDS = 0.1
"""A graph is replayed up to 20 times per measurement, but no longer than this."""


def graph_seconds(calls: list[Callable[[], object]], device: str, repeats: int = 7) -> float:
    """Median seconds per call, all calls in one CUDA graph: what the kernels take without the launching of them."""

    def call_all() -> None:
        for call in calls:
            call()

    if torch.device(device).type != "cuda":
        return median_seconds(call_all, device, repeats) / len(calls)
    # PyTorch wants a few warm-up calls on another stream before it captures.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in (calls * 3)[:3]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    # While a graph is captured, no memory can be given back.
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call_all()
    once = median_seconds(graph.replay, device, repeats=1, warmup=1)
    # Several replays per clock reading: one of a short graph is too short to time.
    rounds = max(1, min(20 // len(calls), int(REPLAY_SECONDS / once)))

    def replay() -> None:
        for _ in range(rounds):
            graph.replay()

    return median_seconds(replay, device, repeats) / len(calls) / rounds
