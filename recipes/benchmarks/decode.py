r"""Decoding one token against a long cache: attention alone, whole models, and which paths of transformers expand K/V.

    python recipes/benchmarks/decode.py --device cuda                          # everything
    python recipes/benchmarks/decode.py --device cuda --only attention --batches 1 32 --contexts 4096

Shape of Llama-2-7B by default, 32 KV heads to 8; our groups are unequal (the largest of 1.5 times the mean), so that
their padded layout has 48 query slots for 32 heads. Half the heads of twice the width take the same bytes. Parts:

- attention: one layer's attention on random caches, every kernel of PyTorch's SDPA, queries as they are (enable_gqa)
  or folded into (B, G, p, D). Outputs are checked against float64. Caches are cycled, so that none stays in the L2.
- model: whole models of few layers with random weights on a static cache, one decoding step in a CUDA graph.
- expansion: which attention implementation, cache and mask makes transformers write K/V out for every query slot.
- prefill: a prompt's forward through the same models, at its share of the matrix ceiling.
- batch: how many sequences of the longest context fit beside the full model's weights, by allocating them.

The floor is the bytes that a step must read at the bandwidth of a copy, measured in the same run. A cell that does not
fit in memory is reported and left out. Prints a table per part and one JSON line.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, LlamaConfig, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.integrations import flex_attention

from asymgqa_peft import AsymGQAConfig
from asymgqa_peft.adapter.slots import HeadLayout
from asymgqa_peft.attention import fold, register_grouped_sdpa
from asymgqa_peft.evaluate import cache_argument
from asymgqa_peft.heads import HeadShape, SharedShape
from asymgqa_peft.tables import markdown_table
from recipes.benchmarks import shapes
from recipes.reporting import print_report

PARTS = ("expansion", "attention", "model", "prefill", "batch")
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
MHA, EQUAL, WIDE, ADAPTER, MERGED, EXPANDED = (
    "MHA",
    "GQA, equal groups",
    "GQA, half the heads, twice as wide",
    "ours, adapter",
    "ours, merged",
    "gather and expand",
)
EQUAL_LORA = "GQA, equal groups + LoRA"
COLD_BYTES = 256 << 20
"""Caches that are cycled are together larger than any L2."""
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}


def main(arguments: list[str] | None = None) -> dict:
    """Run the parts asked for and print their tables and the JSON line."""
    args = parse_args(arguments)
    register_grouped_sdpa()
    args.dtype = shapes.working_dtype(args.device)
    config = shapes.shape_config(args.shape, args.layers)
    limits = shapes.ceilings(args.device)
    results = {part: PART[part](config, args, limits) for part in args.only}
    for part, rows in results.items():
        if rows:
            print(f"\n{part}\n{markdown_table(rows, aligned=True)}", flush=True)
    print("\ntargets")
    checks = targets(results) or [{"target": "none measured"}]
    print_report(checks, args.device, ceilings=limits, parts=results, arguments=vars(args))
    wrong = 0
    for rows in results.values():
        wrong += sum(str(row.get("failed")).startswith("WRONG") for row in rows)
    if wrong:
        raise SystemExit(f"{wrong} cells computed something wrong, see the column 'failed'.")
    return results


# ------------------------------------------------------------------------------------------- attention alone


def attention_part(config: LlamaConfig, args: argparse.Namespace, limits: dict[str, float]) -> list[dict]:
    """Rows of every cell, arm and path, with the fastest path of each arm marked by its ratios."""
    rows = []
    for batch in args.batches:
        for context in args.contexts:
            for arm in (MHA, EQUAL, WIDE, ADAPTER, MERGED, EXPANDED):
                for path in paths(args.device):
                    row = {"batch": batch, "context": context, "arm": arm, "path": path}
                    rows.append(row | guarded(attention_cell, config, args, limits, batch, context, arm, path))
            print(f"attention: batch {batch}, context {context} done", flush=True)
    return best_paths(rows)


def paths(device: str) -> list[str]:
    """Kernel and form of the queries."""
    kernels = ["default"]
    if device == "cuda":
        kernels = list(KERNELS)
    return [f"{kernel}, {form}" for kernel, form in itertools.product(kernels, ("enable_gqa", "folded"))]


def attention_cell(config, args, limits, batch: int, context: int, arm: str, path: str) -> dict:
    """Seconds of one call on a cold cache, its floor, and its error against float64."""
    kernel, form = path.split(", ")
    heads, dim = config.num_attention_heads, config.head_dim
    kv_heads = args.groups
    if arm == MHA:
        kv_heads = heads
    if arm == WIDE:
        # The same bytes in the cache.
        kv_heads, dim = kv_heads // 2, 2 * dim
    partition = contiguous(heads, kv_heads)
    if arm in (ADAPTER, MERGED, EXPANDED):
        partition = shapes.unequal_groups(heads, args.groups)
    shape = SharedShape.of_width(HeadShape(config.hidden_size, heads, heads, dim, dim))
    slots = HeadLayout(partition, shape, args.device, declared=False)
    bytes_read = 2 * batch * kv_heads * context * dim * args.dtype.itemsize
    copies = 1
    if args.device == "cuda":
        # So many that together they are larger than the L2: each call finds its cache cold.
        copies = max(1, math.ceil(COLD_BYTES / bytes_read))
    draw = partial(
        torch.randn,
        generator=torch.Generator(args.device).manual_seed(0),
        device=args.device,
        dtype=args.dtype,
    )
    query = draw(batch, 1, heads, dim)
    caches = []
    for _ in range(copies):
        key, value = draw(batch, kv_heads, context, dim), draw(batch, kv_heads, context, dim)
        caches.append((key, value))
    # Query head -> KV head, for the arm that repeats K and V.
    expanding = torch.tensor(
        [slot // slots.slots.slots_per_kv for slot in slots.slots.slot_of_head], device=args.device
    )
    # A merged model's own projection writes its queries into slots.
    padded = slots.scatter(query).transpose(1, 2).contiguous()

    def attend(key: Tensor, value: Tensor) -> Tensor:  # -> (B, 1, H or slots, D)
        if arm == EXPANDED:
            key, value = key.index_select(1, expanding), value.index_select(1, expanding)
            return attention(query.transpose(1, 2), key, value, form).transpose(1, 2)
        if arm == ADAPTER:
            return slots.gather(attention(slots.scatter(query).transpose(1, 2), key, value, form).transpose(1, 2))
        return attention(padded, key, value, form).transpose(1, 2)

    calls = [partial(attend, *cache) for cache in caches]
    chosen = nullcontext()
    if kernel in KERNELS:
        chosen = sdpa_kernel(KERNELS[kernel])
    with chosen:
        # A kernel that computes something else is not timed.
        error = relative_error(calls[0](), query, *caches[0], slots, expanding, gathered=arm != MERGED)
        if error > TOLERANCE[args.dtype]:
            raise WrongResult(f"relative error {error:.2g} against float64")
        seconds = shapes.graph_seconds(calls, args.device)
    floor = bytes_read / limits["copy GB/s"] / 1e9
    return {"us": seconds * 1e6, "floor, us": floor * 1e6, "error": error}


def kv_heads_of(arm: str, config: LlamaConfig, args: argparse.Namespace) -> int:
    """KV heads in the cache of an arm."""
    if arm == MHA:
        return config.num_key_value_heads
    if arm == WIDE:
        return args.groups // 2
    return args.groups


def contiguous(heads: int, kv_heads: int) -> list[list[int]]:
    """Equal groups of neighbours."""
    return [list(range(start, start + heads // kv_heads)) for start in range(0, heads, heads // kv_heads)]


def attention(query: Tensor, key: Tensor, value: Tensor, form: str) -> Tensor:
    """(B, slots, 1, D) against (B, kv_heads, S, D) -> (B, slots, 1, D), no mask, no expansion."""
    if form == "folded":
        # The slots of a KV head become query positions, which no kernel expands.
        shape = query.shape
        return F.scaled_dot_product_attention(fold(query, key.shape[1]), key, value).reshape(shape)
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=query.shape[1] != key.shape[1])


def relative_error(out: Tensor, query, key, value, slots: HeadLayout, source: Tensor, gathered: bool) -> float:
    """Largest error of the first sequence's heads against a float64 softmax, relative to their largest entry."""
    if not gathered:
        out = slots.gather(out)
    heads, query = out[0, 0].double(), query[0, 0].double()  # (H, D)
    key, value = key[0].double()[source], value[0].double()[source]  # (H, S, D)
    scores = torch.einsum("hd,hsd->hs", query, key) / query.shape[-1] ** 0.5
    exact = torch.einsum("hs,hsd->hd", scores.softmax(-1), value)
    return ((heads - exact).abs().max() / exact.abs().max()).item()


def best_paths(rows: list[dict]) -> list[dict]:
    """Add to the fastest path of each arm and cell its ratio to the fastest of MHA and of equal groups."""
    fastest: dict[tuple, dict] = {}
    for row in rows:
        if "us" not in row:
            continue
        cell = (row["batch"], row["context"], row["arm"])
        if cell not in fastest or row["us"] < fastest[cell]["us"]:
            fastest[cell] = row
    for (batch, context, _), row in fastest.items():
        mha, equal = fastest.get((batch, context, MHA)), fastest.get((batch, context, EQUAL))
        if mha:
            row["MHA / it"] = mha["us"] / row["us"]
        if equal:
            row["it / equal"] = row["us"] / equal["us"]
    columns = ("batch", "context", "arm", "path", "us", "floor, us", "error", "MHA / it", "it / equal", "failed")
    return with_columns(rows, columns)


def with_columns(rows: list[dict], columns: Sequence[str]) -> list[dict]:
    """The rows with these columns, in this order; None where a row has no value."""
    return [dict(zip(columns, map(row.get, columns), strict=True)) for row in rows]


# ---------------------------------------------------------------------------------------------- whole models


class FullLayer(StaticLayer):
    """A static cache that is full: every step writes its last position and sees all, so that no mask is needed.

    It stands for a serving engine, whose kernels know each sequence's length.
    """

    is_compileable = False

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write the last position."""
        self.keys[:, :, -1:] = key_states
        self.values[:, :, -1:] = value_states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens before this one."""
        return self.max_cache_len - 1


def filled_cache(config, kind: str, batch: int, kv_heads: int, context: int, args: argparse.Namespace) -> StaticCache:
    """A static cache of one position less than `context` random tokens, the same for the same number of heads."""
    cache = StaticCache(config=config, max_cache_len=context)
    if kind == "full":
        cache.layers = [FullLayer(context) for _ in cache.layers]
    generator = torch.Generator(args.device).manual_seed(0)
    one = torch.zeros(batch, kv_heads, 1, config.head_dim, device=args.device, dtype=args.dtype)
    for layer in cache.layers:
        layer.lazy_initialization(one, one)
        for tensor in (layer.keys, layer.values):
            tensor.normal_(generator=generator)
    return cache


MODEL_PATHS = {  # name -> (attention implementation, cache)
    "full cache, no mask": ("sdpa", "full"),
    "static cache, sdpa": ("sdpa", "static"),
    "static cache, grouped_sdpa": ("grouped_sdpa", "static"),
}


def model_part(config: LlamaConfig, args: argparse.Namespace, limits: dict[str, float]) -> list[dict]:
    """Rows of every cell, arm and path; logits of our two arms are compared."""
    rows, outputs = [], {}
    for arm, build in builders(config, args):
        model = build().eval()
        weights = sum(p.numel() * p.itemsize for p in model.parameters())
        for batch, context, path in itertools.product(args.batches, args.contexts, MODEL_PATHS):
            row = {"batch": batch, "context": context, "arm": arm, "path": path}
            cell = guarded(model_cell, model, config, args, limits, batch, context, arm, path, weights, outputs)
            rows.append(row | cell)
        print(f"model: {arm} done", flush=True)
        del model
        release(args.device)
    rows.sort(key=lambda row: (row["batch"], row["context"], row["path"]))
    return with_model_ratios(rows)


def builders(config: LlamaConfig, args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Arm -> a function that makes its model on the device."""
    heads = config.num_attention_heads
    equal = shapes.shape_config(args.shape, args.layers, num_key_value_heads=args.groups)
    lora = {"r": args.rank, "lora_alpha": args.rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    partition = shapes.unequal_groups(config.num_key_value_heads, args.groups)
    if heads != config.num_key_value_heads:
        raise SystemExit(f"--shape {args.shape} is no MHA model: the MHA arm needs one.")
    layers = [partition] * config.num_hidden_layers
    ours = AsymGQAConfig(num_key_value_heads=args.groups, head_groups=layers, **lora)
    yield MHA, partial(shapes.random_llama, config, args.device, args.dtype)
    yield EQUAL, partial(shapes.random_llama, equal, args.device, args.dtype)
    wide = AsymGQAConfig(num_key_value_heads=args.groups // 2, head_dim=2 * config.head_dim, **lora)

    def wide_model() -> nn.Module:
        model = get_peft_model(shapes.random_llama(config, args.device, args.dtype), wide).merge_and_unload()
        # transformers asks longrope for the longest position in every step, which no CUDA graph can. Here both lists
        # of factors are one, so the answer changes nothing.
        model.model.rotary_emb.rope_type = "default"
        return model

    yield WIDE, wide_model
    yield EQUAL_LORA, lambda: get_peft_model(shapes.random_llama(equal, args.device, args.dtype), LoraConfig(**lora))
    yield ADAPTER, lambda: get_peft_model(shapes.random_llama(config, args.device, args.dtype), ours)
    yield MERGED, lambda: get_peft_model(shapes.random_llama(config, args.device, args.dtype), ours).merge_and_unload()


@torch.no_grad()
def model_cell(model, config, args, limits, batch: int, context: int, arm: str, path: str, weights, outputs) -> dict:
    """Seconds of one decoding step, its floor, and whether adapter and merged model say the same."""
    implementation, kind = MODEL_PATHS[path]
    inner = model
    if isinstance(model, PeftModel):
        inner = model.get_base_model()
    inner.set_attn_implementation(implementation)
    kv_heads = kv_heads_of(arm, config, args)
    cache = filled_cache(inner.config, kind, batch, kv_heads, context, args)
    token = torch.zeros(batch, 1, dtype=torch.long, device=args.device)

    cached_as = {cache_argument(inner): cache}

    def step() -> Tensor:
        for layer in cache.layers:
            # Every step is the last one of the context.
            layer.cumulative_length.fill_(context - 1)
        return model(input_ids=token, **cached_as, use_cache=True).logits

    found = {}
    logits = step()[0, -1].double().cpu()
    if arm == ADAPTER:
        outputs[batch, context, path] = logits
    elif arm == MERGED and (batch, context, path) in outputs:
        adapter = outputs[batch, context, path]
        found["error to adapter"] = ((logits - adapter).abs().max() / adapter.abs().max()).item()
        if found["error to adapter"] > 5 * TOLERANCE[args.dtype]:
            raise WrongResult(f"adapter and merged differ by {found['error to adapter']:.2g}")
    seconds = shapes.graph_seconds([step], args.device)
    width = inner.config.head_dim
    cached = 2 * config.num_hidden_layers * batch * kv_heads * context * width * args.dtype.itemsize
    # The embedding is looked up, not read.
    embedding = config.vocab_size * config.hidden_size * args.dtype.itemsize
    floor = (weights - embedding + cached) / limits["copy GB/s"] / 1e9
    return {"us": seconds * 1e6, "floor, us": floor * 1e6, **found}


@torch.no_grad()
def prefill_part(config: LlamaConfig, args: argparse.Namespace, limits: dict[str, float]) -> list[dict]:
    """Seconds of a prompt's forward of one sequence, and its share of the matrix ceiling."""
    rows, equal = [], {}
    for arm, build in builders(config, args):
        if arm not in (MHA, EQUAL, WIDE):
            continue
        model = build().eval()
        for context in args.contexts:
            row = {"context": context, "arm": arm}
            row |= guarded(prefill_cell, model, context, args, limits)
            if arm == EQUAL:
                equal[context] = row.get("ms")
            if equal.get(context) and "ms" in row:
                row["it / equal"] = row["ms"] / equal[context]
            rows.append(row)
        print(f"prefill: {arm} done", flush=True)
        del model
        release(args.device)
    rows.sort(key=lambda row: row["context"])
    return with_columns(rows, ("context", "arm", "ms", "share of the ceiling", "it / equal", "failed"))


def prefill_cell(model, context: int, args: argparse.Namespace, limits: dict[str, float]) -> dict[str, float]:
    """Milliseconds of a prefill, and the share that its FLOPs take of them at the matrix ceiling."""
    tokens = torch.zeros(1, context, dtype=torch.long, device=args.device)
    seconds = shapes.median_seconds(lambda: model(input_ids=tokens, use_cache=True, logits_to_keep=1), args.device)
    config = model.config
    # The embedding is looked up, and the head sees one position.
    weights = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name and "lm_head" not in name)
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * context
    flops = context * (2 * weights + attention)
    ceiling = limits.get("bfloat16 TFLOP/s", limits["float32 TFLOP/s"]) * 1e12
    return {"ms": seconds * 1e3, "share of the ceiling": flops / seconds / ceiling}


def with_model_ratios(rows: list[dict]) -> list[dict]:
    """Ratios of every arm to MHA, to equal groups, and to equal groups with LoRA, on the same path."""
    cells = {}
    for row in rows:
        cells[row["batch"], row["context"], row["path"], row["arm"]] = row.get("us")
    for row in rows:
        for name, arm in (("it / MHA", MHA), ("it / equal", EQUAL), ("it / equal + LoRA", EQUAL_LORA)):
            other = cells.get((row["batch"], row["context"], row["path"], arm))
            if other and "us" in row:
                row[name] = row["us"] / other
    columns = ("batch", "context", "path", "arm", "us", "floor, us", "it / MHA", "it / equal", "it / equal + LoRA")
    return with_columns(rows, (*columns, "error to adapter", "failed"))


# ------------------------------------------------------------------------------------------------- expansion


class _Given(Exception):
    """Leaves a step once its kernel has been called."""


class LargestWrite(TorchDispatchMode):
    """Elements of the largest tensor that any operation writes anew; views are not written."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        out = function(*arguments, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.numel() == tensor.untyped_storage().nbytes() // tensor.itemsize:
                self.elements = max(self.elements, tensor.numel())
        return out


def expansion_part(_config: LlamaConfig, args: argparse.Namespace, _limits: dict[str, float]) -> list[dict]:
    """Whether a decoding step writes K or V out for every query slot, on each path of transformers."""
    rows = []
    for slots_per_kv in (6, 8):
        slots = 2 * slots_per_kv
        sizes = {"hidden_size": 8 * slots, "num_attention_heads": slots, "num_key_value_heads": 2, "head_dim": 64}
        config = shapes.shape_config("tiny", 1, **sizes)
        model = shapes.random_llama(config, args.device, args.dtype)
        implementations = ("eager", "sdpa", "flex_attention", "grouped_sdpa")
        for implementation, cache, padded in itertools.product(implementations, ("dynamic", "static"), (False, True)):
            row = {"slots": slots, "implementation": implementation, "cache": cache, "left padding": padded}
            found = guarded(column_expands, model, config, implementation, cache, padded)
            compiled = {}
            if cache == "static" and implementation != "flex_attention":
                compiled = guarded(column_expands_compiled, model, config, implementation, padded)
            rows.append(row | compiled | found)
    columns = ("slots", "implementation", "cache", "left padding", "expands", "expands, compiled", "failed")
    return with_columns(rows, columns)


def column_expands(*arguments) -> dict[str, bool]:
    """The cell of `expands`."""
    return {"expands": expands(*arguments)}


def column_expands_compiled(*arguments) -> dict[str, bool]:
    """The cell of `expands_compiled`."""
    return {"expands, compiled": expands_compiled(*arguments)}


LENGTH, BATCH = 512, 2


@torch.no_grad()
def decoding_inputs(model, config: LlamaConfig, implementation: str, cache: str, padded: bool) -> dict:
    """Arguments of a decoding step after a prefill of LENGTH tokens."""
    # The prefill is not what is watched.
    model.set_attn_implementation("sdpa")
    ids = torch.zeros(BATCH, LENGTH, dtype=torch.long, device=model.device)
    mask = torch.ones(BATCH, LENGTH + 1, dtype=torch.long, device=model.device)
    mask[0, : LENGTH // 4] = 0
    held = DynamicCache(config=config)
    if cache == "static":
        held = StaticCache(config=config, max_cache_len=LENGTH + 8)
    prefill_mask = step_mask = None
    if padded:
        prefill_mask, step_mask = mask[:, :-1], mask
    # Fills the cache.
    name = cache_argument(model)
    model(input_ids=ids, attention_mask=prefill_mask, use_cache=True, **{name: held})
    model.set_attn_implementation(implementation)
    return {"input_ids": ids[:, :1], "attention_mask": step_mask, name: held, "use_cache": True}


@torch.no_grad()
def expands(model, config: LlamaConfig, implementation: str, cache: str, padded: bool) -> bool:
    """Whether some operation of a step writes as many elements as K or V have after the expansion."""
    inputs = decoding_inputs(model, config, implementation, cache, padded)
    if implementation == "flex_attention":
        # No dispatch mode sees into its kernel: look at what the kernel is given.
        watched = mock.patch.object(flex_attention, "compile_friendly_flex_attention", side_effect=_Given)
        with watched as kernel, suppress(_Given):
            model(**inputs)
        query, key = kernel.call_args.args[:2]
        return query.shape[1] == key.shape[1]
    with LargestWrite() as watched:
        model(**inputs)
    return watched.elements >= BATCH * config.num_attention_heads * LENGTH * config.head_dim


@torch.no_grad()
def expands_compiled(model, config: LlamaConfig, implementation: str, padded: bool) -> bool:
    """The same of the graph that torch.compile makes of the step, which takes other branches."""
    inputs = decoding_inputs(model, config, implementation, "static", padded)
    written = []

    def record(graph, _examples):
        for node in graph.graph.nodes:
            value = node.meta.get("example_value")
            if isinstance(value, Tensor) and node.target in ("reshape", "contiguous", torch.repeat_interleave):
                written.append(tuple(value.shape))
        return graph.forward

    torch._dynamo.reset()
    torch.compile(model, backend=record, fullgraph=True)(**inputs)
    torch._dynamo.reset()
    for shape in written:
        if len(shape) == 4:
            _, heads, positions, dim = shape
            if (heads, dim) == (config.num_attention_heads, config.head_dim) and positions >= LENGTH:
                return True
    return False


# ------------------------------------------------------------------------------------------------ largest batch


def batch_part(config: LlamaConfig, args: argparse.Namespace, _limits: dict[str, float]) -> list[dict]:
    """Sequences of the longest context that fit beside the weights of all layers."""
    full = shapes.shape_config(args.shape)
    context, rows = max(args.contexts), []
    heads, largest_group = full.num_attention_heads, 0
    for group in shapes.unequal_groups(full.num_key_value_heads, args.groups):
        largest_group = max(largest_group, len(group))
    query_slots = {MHA: heads, EQUAL: heads, MERGED: args.groups * largest_group}
    for arm, queries in query_slots.items():
        kv_heads = kv_heads_of(arm, full, args)
        weights = parameters(full, queries, kv_heads) * args.dtype.itemsize
        sequence = 2 * full.num_hidden_layers * kv_heads * context * full.head_dim * args.dtype.itemsize
        fitting = largest_batch(full, kv_heads, context, weights, args)
        row = {"context": context, "arm": arm, "weights, GB": weights / 1e9, "cache per sequence, GB": sequence / 1e9}
        rows.append(row | {"largest batch": fitting})
        # The first row is MHA's.
        rows[-1]["x MHA"] = fitting / max(1, rows[0]["largest batch"])
        print(f"batch: {arm} done", flush=True)
    return rows


def parameters(config: LlamaConfig, queries: int, kv_heads: int) -> int:
    """Parameters of the full model with so many query slots and KV heads."""
    width, layers = config.hidden_size, config.num_hidden_layers
    attention = 2 * width * config.head_dim * (queries + kv_heads)
    return layers * (attention + 3 * width * config.intermediate_size) + 2 * config.vocab_size * width


def largest_batch(config: LlamaConfig, kv_heads: int, context: int, weights: int, args: argparse.Namespace) -> int:
    """Largest batch whose caches can be allocated beside `weights` bytes and 1 GB of working memory, tried out."""
    if args.device != "cuda":
        return int(16e9 - weights) // (2 * config.num_hidden_layers * kv_heads * context * config.head_dim * 4)
    release(args.device)
    held = [torch.empty(weights + 10**9, dtype=torch.uint8, device=args.device)]
    fits, too_many = 0, 1
    while too_many - fits > 1 or allocates(config, kv_heads, context, too_many, args):
        middle = (fits + too_many) // 2
        if too_many - fits <= 1:
            # The bound itself fits: double it.
            fits, too_many = too_many, 2 * too_many
        elif allocates(config, kv_heads, context, middle, args):
            fits = middle
        else:
            too_many = middle
    held.clear()
    release(args.device)
    return fits


def allocates(config: LlamaConfig, kv_heads: int, context: int, batch: int, args: argparse.Namespace) -> bool:
    """Whether all layers' caches of a batch can be allocated now."""
    size, caches = (batch, kv_heads, context, config.head_dim), []
    try:
        for _ in range(2 * config.num_hidden_layers):
            caches.append(torch.empty(size, dtype=args.dtype, device=args.device))
    except torch.OutOfMemoryError:
        return False
    finally:
        caches.clear()
        release(args.device)
    return True


# -------------------------------------------------------------------------------------------------- plumbing


PART = {
    "attention": attention_part,
    "model": model_part,
    "prefill": prefill_part,
    "expansion": expansion_part,
    "batch": batch_part,
}


class WrongResult(ValueError):
    """What was timed computes something else."""


def guarded(cell: Callable[..., dict], *args) -> dict:
    """A cell's figures, or why there are none; the other cells go on."""
    try:
        return cell(*args)
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    except WrongResult as error:
        return {"failed": f"WRONG: {error}"}
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        return {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:60]}"}
    finally:
        release(shapes.default_device())


def release(device: str) -> None:
    """Give freed memory back."""
    gc.collect()
    if device == "cuda":
        # What PyTorch holds back would count as taken.
        torch.cuda.empty_cache()


def targets(results: dict[str, list[dict]]) -> list[dict]:
    """The targets beside what was measured, from the worst cell."""
    found = []

    def add(target: str, values: list[float | None], limit: float, at_most: bool) -> None:
        values = [value for value in values if value]
        if not values:
            return
        if at_most:
            worst = max(values)
            met = worst <= limit
        else:
            worst = min(values)
            met = worst >= limit
        found.append({"target": target, "limit": limit, "worst cell": worst, "met": "yes" if met else "NO"})

    def of(part: str, arm: str, column: str, **cell: object) -> list[float | None]:
        """A column of one arm's rows, of those that agree with `cell`."""
        values = []
        for row in results.get(part, []):
            if row["arm"] == arm and cell.items() <= row.items():
                values.append(row[column])
        return values

    for arm in (ADAPTER, MERGED):
        add(f"attention, {arm} / equal groups", of("attention", arm, "it / equal"), 1.03, True)
    add("attention, half the heads, twice as wide / equal groups", of("attention", WIDE, "it / equal"), 1.05, True)
    longest = max((row["context"] for row in results.get("attention", [])), default=0)
    long = of("attention", MERGED, "MHA / it", context=longest)
    add(f"attention, MHA / ours at context {longest}", long, 3.0, False)
    add("attention, MHA / ours at every context", of("attention", MERGED, "MHA / it"), 3.0, False)
    for arm, column in ((MERGED, "it / equal"), (ADAPTER, "it / equal + LoRA")):
        for path in MODEL_PATHS:
            add(f"model, {arm}, {column}, {path}", of("model", arm, column, path=path), 1.05, True)
    add("largest batch, ours / MHA", of("batch", MERGED, "x MHA"), 3.5, False)
    return found


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--shape", choices=shapes.SHAPES, default="llama-2-7b")
    parser.add_argument("--layers", type=int, default=4, help="layers of the models of the part 'model'")
    parser.add_argument("--groups", type=int, default=8, help="G")
    parser.add_argument("--rank", type=int, default=32, help="LoRA rank")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="B")
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 16384, 32768], help="S")
    parser.add_argument("--device", default=shapes.default_device())
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
