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
    "llama-3.1-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
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


def shape_config(shape: str, layers: int | None = None, **changes) -> LlamaConfig:
    """The Llama configuration of a named shape, with fewer layers or other changes."""
    sizes = _COMMON | SHAPES[shape] | changes
    return LlamaConfig(**sizes | {"num_hidden_layers": layers or sizes["num_hidden_layers"]})


def random_llama(config: LlamaConfig, device: str, dtype: torch.dtype, seed: int = 0) -> LlamaForCausalLM:
    """A Llama with random weights, made on the device in its dtype."""
    torch.manual_seed(seed)
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=dtype).eval()


def unequal_groups(heads: int, groups: int) -> list[list[int]]:
    """Unequal groups of interleaved heads: the largest has 1.5 times the mean, the smallest half of it."""
    mean = heads // groups
    extra = [mean // 2 if index % 2 == 0 and index + 1 < groups else 0 for index in range(groups)]
    sizes = [mean + e if e else mean - (extra[i - 1] if i % 2 else 0) for i, e in enumerate(extra)]
    order = sorted(range(heads), key=lambda head: (head % 3, head))
    starts = [sum(sizes[:index]) for index in range(groups)]
    return [sorted(order[start : start + size]) for start, size in zip(starts, sizes, strict=True)]


@torch.no_grad()
def plant_similar_heads(model: LlamaForCausalLM, sources: int, noise: float = 0.5, seed: int = 0) -> None:
    """Give the KV heads of each layer one of `sources` keys and values plus noise: something for a search to find."""
    generator = torch.Generator().manual_seed(seed)
    heads, dim = model.config.num_key_value_heads, model.config.head_dim
    for layer in model.model.layers:
        source = torch.randint(sources, (heads,), generator=generator)
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            own = projection.weight.unflatten(0, (heads, dim))
            shared = own[source.to(own.device)]  # a copy: indexing by a tensor
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
    """What the device reaches on its best work: TFLOP/s of large products per dtype, GB/s of a copy (read + write)."""
    large = torch.device(device).type == "cuda"
    size, dtypes = (8192, ("bfloat16", "float32", "float64")) if large else (512, ("float32", "float64"))
    found = {}
    for name in dtypes:
        matrix = torch.randn(size, size, device=device).to(getattr(torch, name))
        found[f"{name} TFLOP/s"] = 2 * size**3 / median_seconds(lambda m=matrix: m @ m, device) / 1e12
    source = torch.zeros(1 << (30 if large else 24), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found["copy GB/s"] = 2 * source.numel() / median_seconds(lambda: target.copy_(source), device) / 1e9
    return found


def reset_peak(device: str) -> int:
    """Start to watch the device's memory; bytes allocated now (0 on a CPU)."""
    if torch.device(device).type != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak_bytes(device: str) -> int | None:
    """Most bytes allocated since `reset_peak`; None on a CPU."""
    return torch.cuda.max_memory_allocated() if torch.device(device).type == "cuda" else None


REPLAY_SECONDS = 0.1
"""A graph is replayed up to 20 times per measurement, but no longer than this."""


def graph_seconds(calls: list[Callable[[], object]], device: str, repeats: int = 7) -> float:
    """Median seconds per call, all calls in one CUDA graph: what the kernels take without the launching of them."""
    if torch.device(device).type != "cuda":
        return median_seconds(lambda: [call() for call in calls], device, repeats) / len(calls)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:3] if len(calls) > 3 else calls * 3:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.empty_cache()  # while capturing nothing can be given back
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    once = median_seconds(graph.replay, device, repeats=1, warmup=1)
    rounds = max(1, min(20 // len(calls), int(REPLAY_SECONDS / once)))

    def replay() -> None:
        for _ in range(rounds):
            graph.replay()

    return median_seconds(replay, device, repeats) / len(calls) / rounds
