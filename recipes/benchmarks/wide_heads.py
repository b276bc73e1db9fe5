r"""Perplexity of wide shared heads against narrow ones at equal bytes of cache, before and after self-distillation.

    python recipes/benchmarks/wide_heads.py --model DIR --data books --text books.txt.xz --out books.jsonl \
        --shares 1/2 1/4 1/8 1/16 --tokens 8e6 --seeds 0 1 2 [--arms 0/3]

One process runs its share of the grid (share of the cache x width x equal or unequal groups) and prints one JSON line
per measurement as soon as it is there: "untrained" for every calibration seed, "recovered" for the first seed and
every --tokens. Every line also goes to --out; lines found in --out or --done are not measured again. An arm that
fails gives a line with "error" and the others go on.

Texts, disjoint: training text to recover on, calibration text, validation text (the last 48 calibration blocks; look
at it for choices) and held-out text (look at it for tables only).

Recovery is what AsymGQATrainer does with distillation_weight 1 (AdamW, cosine, 5 % warm-up, clipping at 1, bf16
autocast over float32 weights, K/V and their mixes at half the rate), as a bare loop: the teacher's last hidden states
are computed once per text block for all arms, and the step is replayed as one CUDA graph.
"""

from __future__ import annotations

import argparse
import copy
import gc
import glob
import json
import lzma
import math
import time
import traceback
from fractions import Fraction
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from asymgqa_peft import AsymGQAConfig, initialize_asymgqa_weights
from asymgqa_peft.evaluate import kv_cache_bytes_per_token, perplexity
from recipes import pretrain_tiny, stdlib_text
from recipes.reporting import provenance

VALIDATION_BLOCKS = 48
CHUNK_BYTES = 2**28  # of the float32 logits of one chunk
START = time.perf_counter()


def main(arguments: list[str] | None = None) -> None:
    """Measure this process's share of the grid."""
    Grid(parse_args(arguments)).run()


# ------------------------------------------------------------------------------------------------------ texts


def read(path: str) -> str:
    """A text file, .xz or plain."""
    with (lzma.open if path.endswith(".xz") else open)(path, "rt", encoding="utf-8") as file:
        return file.read()


def texts(args: argparse.Namespace) -> tuple[list[str], list[str], list[str]]:
    """Training, calibration and held-out texts."""
    if args.data == "stdlib":
        return (
            stdlib_text.training_texts(args.stdlib),
            stdlib_text.validation_texts(args.stdlib),
            stdlib_text.held_out_texts(args.stdlib),
        )
    if args.data == "books":
        (path,) = args.text
        corpus = pretrain_tiny.load_corpus(argparse.Namespace(text=Path(path), stdlib=None))
        return corpus.training, corpus.validation, corpus.held_out
    return [read(path) for path in args.text], [read(args.calibration)], [read(args.held_out)]


def load_blocks(args: argparse.Namespace, tokenizer) -> dict[str, torch.Tensor]:
    """Blocks (N, T) for training, calibration, validation and measuring."""
    training, calibration, held_out = (
        stdlib_text.token_blocks(part, tokenizer, args.block_size) for part in texts(args)
    )
    return {
        "training": training,
        "calibration": calibration[:-VALIDATION_BLOCKS],
        "validation": calibration[-VALIDATION_BLOCKS:][: args.held_out_blocks],
        "held_out": held_out[: args.held_out_blocks],
    }


def training_order(count: int, needed: int, seed: int) -> torch.Tensor:
    """Indices of blocks, epoch after epoch, each in a seeded order of its own."""
    generator = torch.Generator().manual_seed(seed)
    epochs = [torch.randperm(count, generator=generator) for _ in range(-(-needed // count))]
    return torch.cat(epochs)[:needed]


# --------------------------------------------------------------------------------------------------- the model


class Stack:
    """The decoder layers of a Llama or a model of like layers, called one by one.

    The model's own forward would build a causal mask while a CUDA graph is captured, and lose flash attention.
    """

    def __init__(self, model: torch.nn.Module, block_size: int) -> None:
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        if causal.config.model_type not in ("llama", "mistral", "qwen3", "olmo2"):
            raise SystemExit(f"{causal.config.model_type}: this script calls layers like Llama's only")
        self.inner = causal.model
        self.head = causal.get_output_embeddings().weight
        self.positions = torch.arange(block_size, device=self.head.device)[None]
        with torch.no_grad():
            self.rotary = self.inner.rotary_emb(self.head[:1, None], position_ids=self.positions)

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids (B, T) -> what enters the output layer, (B, T, E)."""
        states = self.inner.embed_tokens(ids)
        for layer in self.inner.layers:
            states = layer(
                states,
                attention_mask=None,
                position_ids=self.positions,
                position_embeddings=self.rotary,
                past_key_values=None,
                use_cache=False,
            )
            if isinstance(states, tuple):
                states = states[0]
        return self.inner.norm(states)


def autocast(device: torch.device):
    """bf16 on a GPU, nothing on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


@torch.no_grad()
def teacher_states(base, blocks: torch.Tensor, args: argparse.Namespace, device: torch.device) -> torch.Tensor:
    """The base's last hidden states at the positions that predict, (N, T - 1, E), in the dtype the head works in."""
    stack = Stack(base, args.block_size)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    states = torch.empty(len(blocks), args.block_size - 1, base.config.hidden_size, dtype=dtype, device=device)
    for start in range(0, len(blocks), args.batch_size):
        with autocast(device):
            hidden = stack.hidden(blocks[start : start + args.batch_size].to(device))
        states[start : start + len(hidden)] = hidden[:, :-1]
    return states


# ---------------------------------------------------------------------------------------------------- the loss


def kl_terms(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (n, V) -> sum of KL(teacher || student), its gradient with respect to the student's logits."""
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    p = log_p.exp()
    return (p * (log_p - log_q)).sum(), log_q.exp() - p


def logits(features: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Float32 logits; half-precision products are not rounded."""
    if features.is_cuda:
        return torch.mm(features, head.t(), out_dtype=torch.float32)
    return features @ head.t()


class DistillationLoss(torch.autograd.Function):
    """Summed KL in chunks of `rows` positions; the gradient is formed while the logits are at hand."""

    terms = staticmethod(kl_terms)

    @staticmethod
    def forward(ctx, student, teacher, head, rows):
        gradient = torch.empty_like(student)
        total = torch.zeros((), device=student.device)
        for start in range(0, len(student), rows):
            chunk = slice(start, start + rows)
            loss, slope = DistillationLoss.terms(logits(student[chunk], head), logits(teacher[chunk], head))
            total += loss
            gradient[chunk] = slope.to(head.dtype) @ head
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, scale):
        (gradient,) = ctx.saved_tensors
        return gradient * scale, None, None, None


def rows_per_chunk(micro_batch: int, block_size: int, vocabulary: int) -> int:
    """Whole blocks, as many as CHUNK_BYTES allow and as divide a micro-batch: all chunks have one shape."""
    blocks = max(1, CHUNK_BYTES // (4 * vocabulary * (block_size - 1)))
    while micro_batch % min(blocks, micro_batch):
        blocks -= 1
    return min(blocks, micro_batch) * (block_size - 1)


# ------------------------------------------------------------------------------------------------- the training


class Recovery:
    """One model's optimiser and step; `run` trains from the weights that the model has now."""

    def __init__(self, model, head: torch.Tensor, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device, self.model = args, device, model.train()
        self.stack = Stack(model, args.block_size)
        if args.compile:
            torch._dynamo.reset()
            torch._dynamo.config.recompile_limit = 64  # every layer is a graph of its own
            for layer in self.stack.inner.layers:
                layer.compile(dynamic=False)
        self.head = head
        self.rows = rows_per_chunk(args.micro_batch, args.block_size, len(head))
        lora = [p for name, p in model.named_parameters() if p.requires_grad and is_low_rank(name)]
        shared = [p for name, p in model.named_parameters() if p.requires_grad and not is_low_rank(name)]
        self.parameters = lora + shared
        self.start = [p.detach().clone() for p in self.parameters]
        on_gpu = device.type == "cuda"

        def group(parameters, scale):
            rate = torch.zeros((), device=device) if on_gpu else 0.0
            return {"params": parameters, "lr": rate, "scale": scale}

        self.optimizer = torch.optim.AdamW(
            [group(lora, 1.0), group(shared, args.kv_scale)],
            lr=torch.zeros((), device=device) if on_gpu else 0.0,
            weight_decay=0.0,
            fused=True if on_gpu else None,
            capturable=on_gpu,
        )
        blocks, length = args.batch_size, args.block_size
        self.ids = torch.zeros(blocks, length, dtype=torch.long, device=device)
        self.teacher = torch.zeros(blocks, length - 1, head.shape[1], dtype=head.dtype, device=device)
        self.loss = torch.zeros((), device=device)
        self.graph = None
        self.mode = "eager"
        if on_gpu and args.graph:
            self.capture()

    def step(self) -> None:
        """Forward, backward and update on what `ids` and `teacher` hold."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss.zero_()
        positions = self.args.batch_size * (self.args.block_size - 1)
        for start in range(0, self.args.batch_size, self.args.micro_batch):
            part = slice(start, start + self.args.micro_batch)
            with autocast(self.device):
                hidden = self.stack.hidden(self.ids[part])
            student = hidden[:, :-1].to(self.head.dtype).flatten(0, 1)
            teacher = self.teacher[part].flatten(0, 1)
            loss = DistillationLoss.apply(student, teacher, self.head, self.rows) / positions
            loss.backward()
            self.loss += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self.optimizer.step()

    def capture(self) -> None:
        """Record the step as a CUDA graph; where that fails, steps stay eager."""
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self.step()
            torch.cuda.current_stream().wait_stream(side)
            self.reset()
            self.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.step()
            self.graph, self.mode = graph, "graph"
        except Exception as error:
            print(f"# no CUDA graph, eager steps: {error!r}"[:500], flush=True)
            torch.cuda.synchronize()
            self.graph = None
            self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """The weights of the beginning, and an optimiser that has seen nothing."""
        for parameter, value in zip(self.parameters, self.start, strict=True):
            parameter.copy_(value)
        for state in self.optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()

    def run(self, blocks: torch.Tensor, states: torch.Tensor, order: torch.Tensor, rate: float) -> dict:
        """Train on `order`, indices into blocks (N, T) and states (N, T - 1, E); leaves the model in eval mode."""
        self.model.train()  # shared heads are decoded in training mode only
        self.reset()
        steps = len(order) // self.args.batch_size
        warmup = max(1, steps // 20)
        order = order.to(self.device)
        losses, begin = [], time.perf_counter()
        for step in range(steps):
            chosen = order[step * self.args.batch_size : (step + 1) * self.args.batch_size]
            torch.index_select(blocks, 0, chosen, out=self.ids)
            torch.index_select(states, 0, chosen, out=self.teacher)
            for group in self.optimizer.param_groups:
                value = rate * group["scale"] * cosine_factor(step, steps, warmup)
                if torch.is_tensor(group["lr"]):
                    group["lr"].fill_(value)
                else:
                    group["lr"] = value
            if self.graph is None:
                self.step()
            else:
                self.graph.replay()
            if step % max(1, steps // 20) == 0 or step == steps - 1:
                losses.append(self.loss.clone())
        losses = [round(loss.item(), 5) for loss in losses]
        self.model.eval()
        seconds = time.perf_counter() - begin
        tokens = steps * self.args.batch_size * self.args.block_size
        return {
            "steps": steps,
            "mode": self.mode,
            "train_seconds": round(seconds, 2),
            "tokens_per_second": round(tokens / seconds),
            "losses": losses,
        }


def is_low_rank(name: str) -> bool:
    """Whether a trained parameter is LoRA's; the others are shared heads, gains, mixes and norms."""
    return ".lora_A." in name or ".lora_B." in name


def cosine_factor(step: int, steps: int, warmup: int) -> float:
    """transformers' cosine schedule with warm-up."""
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# ----------------------------------------------------------------------------------------------------- the grid


def grid(args: argparse.Namespace, kv_heads: int, head_dim: int) -> list[dict]:
    """Arms: G heads of W with G W = share K D. One group is neither equal nor unequal."""
    arms = []
    for share in args.shares:
        for width in args.widths or [head_dim, 2 * head_dim, 4 * head_dim]:
            groups = Fraction(share) * kv_heads * head_dim / width
            if groups.denominator != 1 or not 1 <= groups <= kv_heads or width > 256:
                continue
            for grouping in args.groupings:
                if groups == 1 and grouping != args.groupings[0]:
                    continue
                if grouping == "symmetric" and kv_heads % int(groups):
                    continue
                arms.append({"share": share, "groups": int(groups), "width": width, "grouping": grouping})
    return arms


class Grid:
    """What all arms share, and the lines measured so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(self.device).eval()
        self.base.requires_grad_(False)
        self.blocks = load_blocks(args, self.tokenizer)
        self.found = finished([*args.done, str(args.out)] if args.out else args.done)
        head = self.base.get_output_embeddings().weight.detach()
        self.head = head.to(torch.bfloat16) if self.device.type == "cuda" else head
        self.order, self.training, self.states = None, None, None
        self.provenance = {
            "model": args.name,
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "commit": provenance("cpu")["commit"],
            "rank": args.rank,
            "calibration_blocks": args.calibration_blocks,
            "batch": [args.batch_size, args.block_size],
        }
        if self.device.type == "cuda" and args.compile_loss:
            DistillationLoss.terms = staticmethod(torch.compile(kl_terms, dynamic=False))

    def run(self) -> None:
        """All measurements of this process: every arm's first seed with its recovery, then the other seeds."""
        config = self.base.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        arms = grid(self.args, config.num_key_value_heads, head_dim)
        index, count = map(int, self.args.arms.split("/"))
        mine = [arm for number, arm in enumerate(arms) if number % count == index]
        sizes = {name: f"{blocks.numel():,}" for name, blocks in self.blocks.items()}
        print(f"# {len(mine)} of {len(arms)} arms, tokens {sizes}", flush=True)
        self.reference = self.measured(self.base)
        self.emit(
            {"stage": "base"}, self.reference | {"kv_bytes": kv_cache_bytes_per_token(self.base, torch.bfloat16)}
        )
        longest = 0.0
        for position, seed in enumerate(self.args.seeds):
            for arm in mine:
                tokens = self.args.tokens if position == 0 else []
                key = {**arm, "seed": seed, "merge": self.args.merge}
                left = self.args.deadline - (time.perf_counter() - START)
                if left < 1.1 * longest:
                    print(f"# stopped before {key}: {left:.0f} s left, an arm took {longest:.0f} s", flush=True)
                    return
                begin = time.perf_counter()
                try:
                    self.arm(key, head_dim, tokens)
                except Exception as error:
                    traceback.print_exc()
                    self.emit({"stage": "error", **key}, {"error": repr(error)[:400]})
                longest = max(longest, time.perf_counter() - begin)
                gc.collect()
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()

    def arm(self, key: dict, head_dim: int, budgets: list[float]) -> None:
        """One arm with one calibration seed: initialised, measured, recovered, measured, exported, measured."""
        args = self.args
        untrained = {"stage": "untrained", **key}
        recoveries = []
        for tokens in budgets:
            recoveries.append({"stage": "recovered", **key, "tokens": int(tokens), "rate": args.learning_rate})
        missing = [stage for stage in recoveries if not self.has(stage)]
        if self.has(untrained) and not missing:
            return
        options = {"head_dim": key["width"]} if key["width"] != head_dim else {}
        config = AsymGQAConfig(
            num_key_value_heads=key["groups"],
            grouping=key["grouping"],
            merge=key["merge"],
            seed=key["seed"],
            r=args.rank,
            lora_alpha=args.rank,
            task_type="CAUSAL_LM",
            **options,
        )
        model = get_peft_model(copy.deepcopy(self.base), config)
        calibration = self.blocks["calibration"]
        drawn = torch.randperm(len(calibration), generator=torch.Generator().manual_seed(key["seed"]))
        batches = calibration[drawn[: args.calibration_blocks]].split(args.batch_size)
        begin = time.perf_counter()
        report = initialize_asymgqa_weights(model, batches, progress=False)
        seconds = round(time.perf_counter() - begin, 2)
        common = {
            "initialize_seconds": seconds,
            "largest_group": max(max(map(len, layer)) for layer in report.head_groups),
            "kv_bytes": kv_cache_bytes_per_token(model, torch.bfloat16),
            "kv_bytes_expected": 2 * 2 * len(report.head_groups) * key["groups"] * key["width"],
        }
        if not self.has(untrained):
            self.emit(untrained, common | self.measured(model))
        if missing:
            recovery = Recovery(model, self.head, args, self.device)
            for stage in missing:
                blocks, states, order = self.training_data(stage["tokens"])
                trained = recovery.run(blocks, states, order, stage["rate"])
                line = common | self.measured(model) | trained | {"peak_gib": self.peak()}
                self.emit(stage, line)
                self.save(model, stage)
            del recovery
        if key["seed"] == args.seeds[0]:
            stage = {"stage": "plain", **key}
            if not self.has(stage):
                try:
                    self.emit(stage, plain_costs(model.merge_and_unload(), self))
                except Exception as error:  # the measurements before it stand
                    traceback.print_exc()
                    self.emit({"stage": "error", **key}, {"where": "plain", "error": repr(error)[:400]})

    def training_data(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Blocks, the teacher's states of each, and the order for `tokens` tokens; states are computed once."""
        args = self.args
        if self.states is None:
            needed = max(steps_of(budget, args) for budget in args.tokens) * args.batch_size
            order = training_order(len(self.blocks["training"]), needed, args.data_seed)
            used, self.order = order.unique(return_inverse=True)
            self.training = self.blocks["training"][used].to(self.device)
            begin = time.perf_counter()
            self.states = teacher_states(self.base, self.training, args, self.device)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            seconds, size = time.perf_counter() - begin, self.states.numel() * self.states.element_size()
            print(f"# teacher: {len(used)} blocks in {seconds:.1f} s, {size / 2**30:.2f} GiB", flush=True)
        return self.training, self.states, self.order[: steps_of(tokens, args) * args.batch_size]

    def measured(self, model) -> dict:
        """Perplexities in float32 over the base's; validation text for choices, held-out text for tables."""
        values = {}
        for name in ("validation", "held_out"):
            with torch.compiler.set_stance("force_eager"):  # another precision: not worth compiling again
                value = perplexity(model, self.blocks[name].split(self.args.batch_size))
            values[name] = value
            if hasattr(self, "reference"):
                values[f"{name}_x_base"] = value / self.reference[name]
        return values

    def peak(self) -> float | None:
        """GiB that this process has taken at most."""
        return round(torch.cuda.max_memory_allocated() / 2**30, 2) if self.device.type == "cuda" else None

    def save(self, model, stage: dict) -> None:
        """Keep the adapter where --save says."""
        if self.args.save:
            name = f"{self.args.name}_G{stage['groups']}_W{stage['width']}_{stage['grouping']}_{stage['tokens']}"
            model.save_pretrained(self.args.save / name)

    def has(self, key: dict) -> bool:
        """Whether this measurement is there already."""
        return identity({"model": self.args.name, **key}) in self.found

    def emit(self, key: dict, values: dict) -> None:
        """Print a line and append it to --out."""
        line = json.dumps({**self.provenance, **key, **values, "at": round(time.perf_counter() - START)})
        print(line, flush=True)
        if self.args.out and not (key["stage"] == "base" and self.has(key)):
            with self.args.out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        self.found.add(identity({"model": self.args.name, **key}))


def plain_costs(plain, grid: Grid) -> dict:
    """What the stock checkpoint is and costs: parameters, slots, prefill FLOPs a token at --context, perplexity."""
    config, context = plain.config, grid.args.context
    unique = {id(p): p for p in plain.parameters()}.values()
    matrices = sum(m.weight.numel() for m in plain.modules() if isinstance(m, torch.nn.Linear))
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * context
    measured = grid.measured(plain)
    return {
        "class": type(plain).__name__,
        "slots": config.num_attention_heads,
        "head_dim": config.head_dim,
        "cache_heads": config.num_key_value_heads,
        "parameters": sum(p.numel() for p in unique),
        "prefill_flops_per_token": 2 * matrices + attention,  # causal: half of the context on average
        **{f"plain_{name}": value for name, value in measured.items()},
    }


def identity(line: dict) -> tuple:
    """What makes two lines the same measurement."""
    names = ("model", "stage", "share", "groups", "width", "grouping", "merge", "seed", "tokens", "rate")
    return tuple(str(line.get(name)) for name in names)


def finished(patterns: list[str]) -> set[tuple]:
    """Identities of the lines in files; errors do not count."""
    found = set()
    for pattern in patterns:
        for path in glob.glob(pattern):
            for line in Path(path).read_text(encoding="utf-8").splitlines():
                if line.startswith("{") and '"stage": "error"' not in line:
                    found.add(identity(json.loads(line)))
    return found


def steps_of(tokens: float, args: argparse.Namespace) -> int:
    """Optimiser steps of so many tokens."""
    return max(1, int(tokens) // (args.batch_size * args.block_size))


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the base")
    parser.add_argument("--name", help="what to call it in the lines; default: the folder's name")
    parser.add_argument("--data", choices=("books", "stdlib", "files"), default="files")
    parser.add_argument("--text", nargs="*", default=[], help="training text; with --data books the one file")
    parser.add_argument("--calibration", help="with --data files")
    parser.add_argument("--held-out", help="with --data files")
    parser.add_argument("--stdlib", help="folder of another standard library, with --data stdlib")
    parser.add_argument("--out", type=Path, help="file to append lines to; what it holds is not measured again")
    parser.add_argument("--done", nargs="*", default=[], help="files (patterns) with lines of earlier runs")
    parser.add_argument("--arms", default="0/1", metavar="i/n", help="the arms i, i + n, i + 2n, ...")
    parser.add_argument("--shares", nargs="+", default=["1/2", "1/4", "1/8", "1/16"], help="of the base's cache")
    parser.add_argument("--widths", nargs="+", type=int, help="head dims; default: 1, 2 and 4 times the base's")
    parser.add_argument("--groupings", nargs="+", default=["symmetric", "asymmetric"])
    parser.add_argument("--merge", default="principal")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="calibration seeds; the first is trained")
    parser.add_argument("--tokens", type=float, nargs="*", default=[8e6], help="recoveries, each from the start")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--kv-scale", type=float, default=0.5)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--data-seed", type=int, default=0, help="order of the training text")
    parser.add_argument("--calibration-blocks", type=int, default=128)
    parser.add_argument("--held-out-blocks", type=int, help="measure on the first of them only")
    parser.add_argument("--block-size", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=32, help="blocks a step")
    parser.add_argument("--micro-batch", type=int, help="blocks a forward; default: --batch-size")
    parser.add_argument("--context", type=int, default=2048, help="of the prefill whose FLOPs are counted")
    parser.add_argument("--deadline", type=float, default=math.inf, help="seconds after which no arm is begun")
    parser.add_argument("--save", type=Path, help="folder for the recovered adapters")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-graph", dest="graph", action="store_false", help="eager steps")
    parser.add_argument("--no-compile", dest="compile_loss", action="store_false", help="the loss in eager mode")
    parser.add_argument("--compile", action="store_true", help="also the layers: about a minute an arm on 30 layers")
    args = parser.parse_args(arguments)
    args.name = args.name or Path(args.model).name
    args.micro_batch = args.micro_batch or args.batch_size
    if args.batch_size % args.micro_batch:
        parser.error("--micro-batch must divide --batch-size")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    return args


if __name__ == "__main__":
    main()
