r"""Perplexity of shared heads at equal bytes of cache, before and after a recovery: arms, widths, objectives, options.

    python recipes/benchmarks/wide_heads.py --model DIR --data books --text books.txt.xz --out books.jsonl \
        --shares 1/2 1/4 1/8 1/16 --tokens 8e6 --seeds 0 1 2 [--arms 0/3]
    python recipes/benchmarks/wide_heads.py --model DIR --text train.txt --calibration validation.txt \
        --held-out test.txt --out study.jsonl --shares 2/3 --widths 128 --tokens 4e6 \
        --recover "--batch-size 4 --learning-rate 7e-4" "--batch-size 4 --learning-rate 7e-4 --match-hidden 1"
    [the same] --widths 64 --groupings neighbour --merge mean --no-refit --recover "" "--objective sft"   # classic GQA

One process runs its share of the grid (share of the cache x width x equal or unequal groups) and prints one JSON line
per measurement as soon as it is there: "untrained" for every calibration seed; for the first seed "recovered" for
every --tokens of every --recover, and "plain" for the checkpoint that the last of them gives. Every line also goes to
--out; lines found in --out or --done are not measured again. An arm that fails gives a line with "error" and the
others go on.

Texts, disjoint: training text to recover on, calibration text, validation text (the last 48 calibration blocks; look
at it for choices) and held-out text (look at it for tables only). Recovery is that of `recovery_loop`.
"""

from __future__ import annotations

import argparse
import copy
import gc
import glob
import json
import math
import shlex
import time
import traceback
import zlib
from fractions import Fraction
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from asymgqa_peft import AsymGQAConfig, initialize_asymgqa_weights
from asymgqa_peft.evaluate import kv_cache_bytes_per_token, perplexity
from recipes import pretrain_tiny, stdlib_text
from recipes.benchmarks import recovery_loop
from recipes.benchmarks.recovery_loop import BLOCKS_A_FORWARD, Lessons, Recovery, RecoveryOptions, works_in_bf16
from recipes.folders import replacing
from recipes.reporting import provenance
from recipes.text_file import read_text

VALIDATION_BLOCKS = 48
FITTED_BLOCKS = 2  # in a step of --fit-steps
START = time.perf_counter()


def main(arguments: list[str] | None = None) -> None:
    """Measure this process's share of the grid."""
    Grid(parse_args(arguments)).run()


# ------------------------------------------------------------------------------------------------------ texts


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
    return [read_text(path) for path in args.text], [read_text(args.calibration)], [read_text(args.held_out)]


def load_blocks(args: argparse.Namespace, tokenizer) -> dict[str, torch.Tensor]:
    """Blocks (N, T) for training, calibration, validation and measuring."""
    training, calibration, held_out = (
        stdlib_text.token_blocks(part, tokenizer, args.block_size) for part in texts(args)
    )
    calibration, validation = calibration[:-VALIDATION_BLOCKS], calibration[-VALIDATION_BLOCKS:]
    return {
        "training": torch.cat([training, *[calibration] * args.train_on_calibration]),
        "calibration": calibration,
        "validation": validation[: args.held_out_blocks],
        "held_out": held_out[: args.held_out_blocks],
    }


def training_order(count: int, needed: int, seed: int) -> torch.Tensor:
    """Indices of blocks, epoch after epoch, each in a seeded order of its own."""
    generator = torch.Generator().manual_seed(seed)
    epochs = [torch.randperm(count, generator=generator) for _ in range(-(-needed // count))]
    return torch.cat(epochs)[:needed]


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
        self.head = head.to(torch.bfloat16) if works_in_bf16(self.device) else head
        self.order: torch.Tensor | None = None
        self.training: torch.Tensor | None = None
        self.lessons: Lessons | None = None
        self.tokens_per_second = math.inf  # of the last recovery
        self.provenance = {
            "model": args.name,
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "commit": provenance("cpu")["commit"],
        }

    def run(self) -> None:
        """All measurements of this process: every arm's first seed with its recoveries, then the other seeds."""
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
        for seed in self.args.seeds:
            for arm in mine:
                key = {**arm, "seed": seed}
                for name in ("merge", "refit", "rank", "calibration_blocks"):
                    key[name] = getattr(self.args, name)
                if self.args.fit_steps:
                    key["fit_steps"] = self.args.fit_steps
                if self.seconds_left() < 1.1 * longest:
                    print(f"# stopped before {key}: {self.seconds_left():.0f} s left", flush=True)
                    return
                begin = time.perf_counter()
                try:
                    self.arm(key, head_dim)
                except Exception as error:
                    traceback.print_exc()
                    self.emit({"stage": "error", **key}, {"error": repr(error)[:400]})
                longest = max(longest, time.perf_counter() - begin)
                gc.collect()
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()

    def seconds_left(self) -> float:
        """Until --deadline."""
        return self.args.deadline - (time.perf_counter() - START)

    def arm(self, key: dict, head_dim: int) -> None:
        """One arm with one calibration seed: initialised, measured, recovered, measured, exported, measured."""
        args = self.args
        untrained, plain = {"stage": "untrained", **key}, {"stage": "plain", **key}
        recoveries = []
        if key["seed"] == args.seeds[0]:
            recoveries = self.missing_recoveries(key)
        if self.has(untrained) and not recoveries:
            return
        model, common = self.initialized(key, head_dim)
        if not self.has(untrained):
            saved = {}
            # With --tokens it is the recovered models that --save and --save-plain ask for.
            if not any(options.tokens for options in args.recoveries):
                saved = self.save(model, untrained)
            self.emit(untrained, common | self.measured(model) | saved)
        start = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
        for options, lines in recoveries:
            with torch.no_grad():
                for name, weight in start.items():
                    model.get_parameter(name).copy_(weight)
            self.recover(model, options, lines, common)
        if key["seed"] == args.seeds[0] and not self.has(plain):
            try:
                self.emit(plain, plain_costs(model.merge_and_unload(), self))
            except Exception as error:  # the measurements before it stand
                traceback.print_exc()
                self.emit({"stage": "error", **key}, {"where": "plain", "error": repr(error)[:400]})

    def missing_recoveries(self, key: dict) -> list[tuple[RecoveryOptions, list[dict]]]:
        """Every recovery of an arm with the lines, one for each number of tokens, that are still to be measured."""
        missing = []
        for options in self.args.recoveries:
            lines = []
            for tokens in options.tokens:
                line = {"stage": "recovered", **key, "tokens": tokens, "rate": options.learning_rate}
                line["batch"] = [options.batch_size, self.args.block_size]
                line["training"] = [len(self.blocks["training"]), self.args.data_seed]
                for name in OPTIONS:
                    line[name] = getattr(options, name)
                if not self.has(line):
                    lines.append(line)
            if lines:
                missing.append((options, lines))
        return missing

    def initialized(self, key: dict, head_dim: int) -> tuple[torch.nn.Module, dict]:
        """The adapter on a copy of the base, calibrated, and what to say of it in every line."""
        args = self.args
        options = {"head_dim": key["width"]} if key["width"] != head_dim else {}
        config = AsymGQAConfig(
            num_key_value_heads=key["groups"],
            grouping=key["grouping"],
            merge=key["merge"],
            refit_output=key["refit"],
            fit_steps=key.get("fit_steps", 0),
            seed=key["seed"],
            r=args.rank,
            lora_alpha=args.rank,
            task_type="CAUSAL_LM",
            **options,
        )
        model = get_peft_model(copy.deepcopy(self.base), config)
        calibration = self.blocks["calibration"]
        drawn = torch.randperm(len(calibration), generator=torch.Generator().manual_seed(key["seed"]))
        batches = calibration[drawn[: args.calibration_blocks]].split(
            FITTED_BLOCKS if args.fit_steps else BLOCKS_A_FORWARD
        )
        begin = time.perf_counter()
        report = initialize_asymgqa_weights(model, batches, progress=False)
        return model, {
            "initialize_seconds": round(time.perf_counter() - begin, 2),
            "largest_group": max(max(map(len, layer)) for layer in report.head_groups),
            "kv_bytes": kv_cache_bytes_per_token(model, torch.bfloat16),
            "kv_bytes_expected": 2 * 2 * len(report.head_groups) * key["groups"] * key["width"],
        }

    def recover(self, model, options: RecoveryOptions, lines: list[dict], common: dict) -> None:
        """Train the initialised model for every number of tokens in `lines`, each from the start, and measure."""
        args, recovery = self.args, None
        for line in lines:
            needed = 30 + line["tokens"] / self.tokens_per_second
            if self.seconds_left() < needed:
                print(
                    f"# left out, {self.seconds_left():.0f} s are left and it takes {needed:.0f}: {line}", flush=True
                )
                continue
            self.prepare_lessons()
            if recovery is None:
                # Not before it is needed: it puts the model back to its start.
                recovery = Recovery(model, self.base, self.head, options, args.block_size, args.compile, args.graph)
            order = self.order[: options.steps(line["tokens"], args.block_size) * options.batch_size]
            trained = recovery.run(self.training, self.lessons, order) | {"peak_gib": self.peak()}
            self.tokens_per_second = trained["tokens_per_second"]
            self.emit(line, common | self.measured(model) | trained | self.save(model, line))

    def prepare_lessons(self) -> None:
        """Blocks, the base's lessons on each and their order, computed once for the longest recovery."""
        if self.lessons is not None:
            return
        args, needed = self.args, 0
        for options in args.recoveries:
            for tokens in options.tokens:
                needed = max(needed, options.steps(tokens, args.block_size) * options.batch_size)
        order = training_order(len(self.blocks["training"]), needed, args.data_seed)
        used, self.order = order.unique(return_inverse=True)
        self.training = self.blocks["training"][used].to(self.device)
        begin = time.perf_counter()
        with_loss = any(options.token_weights == "loss" for options in args.recoveries)
        self.lessons = recovery_loop.lessons_of(self.base, self.head, self.training, with_loss)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds, states = time.perf_counter() - begin, self.lessons.states
        size = states.numel() * states.element_size()
        print(f"# the base: {len(used)} blocks in {seconds:.1f} s, {size / 2**30:.2f} GiB", flush=True)

    def measured(self, model) -> dict:
        """Perplexities in float32 over the base's; validation text for choices, held-out text for tables."""
        values = {}
        for name in ("validation", "held_out"):
            with torch.compiler.set_stance("force_eager"):  # another precision: not worth compiling again
                value = perplexity(model, self.blocks[name].split(BLOCKS_A_FORWARD))
            values[name] = value
            if hasattr(self, "reference"):
                values[f"{name}_x_base"] = value / self.reference[name]
        return values

    def peak(self) -> float | None:
        """GiB that this process has taken at most."""
        return round(torch.cuda.max_memory_allocated() / 2**30, 2) if self.device.type == "cuda" else None

    def save(self, model, line: dict) -> dict:
        """Keep the adapter where --save says, the plain checkpoint where --save-plain says; what to say of it."""
        if not (self.args.save or self.args.save_plain):
            return {}
        parts = [self.args.name, f"G{line['groups']}", f"W{line['width']}", line["grouping"], line["merge"]]
        if line["stage"] == "recovered":
            parts += [line["objective"], f"{line['tokens'] / 1e6:g}M"]
        else:
            parts.append(line["stage"])
        number = zlib.crc32(repr(identity({"model": self.args.name, **line})).encode())  # no two lines share a folder
        name = "_".join([*parts, f"{number:08x}"])
        if self.args.save:
            model.save_pretrained(self.args.save / name)
        if self.args.save_plain:
            self.args.save_plain.mkdir(parents=True, exist_ok=True)
            with replacing(self.args.save_plain / name, overwrite=True) as folder:
                copy.deepcopy(model).merge_and_unload().save_pretrained(folder)
                self.tokenizer.save_pretrained(folder)
        return {"saved": name}

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


OPTIONS = ("objective", "token_weights", "match_hidden", "kv_scale", "warmup", "ema")
"""Options of a recovery that its line holds beside tokens, rate and batch."""

IDENTITY = (
    *(
        "model",
        "stage",
        "share",
        "groups",
        "width",
        "grouping",
        "merge",
        "refit",
        "rank",
        "calibration_blocks",
        "seed",
        "fit_steps",
    ),
    *("tokens", "rate", "batch", *OPTIONS),
)
"""What makes two lines the same measurement."""


def identity(line: dict) -> tuple:
    """The values of `IDENTITY` in a line."""
    return tuple(str(line.get(name)) for name in IDENTITY)


def finished(patterns: list[str]) -> set[tuple]:
    """Identities of the lines in files; errors do not count."""
    found = set()
    for pattern in patterns:
        for path in glob.glob(pattern):
            for line in Path(path).read_text(encoding="utf-8").splitlines():
                if line.startswith("{") and '"stage": "error"' not in line:
                    found.add(identity(json.loads(line)))
    return found


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
    parser.add_argument("--merge", choices=("mean", "aligned", "principal"), default="principal")
    parser.add_argument("--no-refit", dest="refit", action="store_false", help="of the output: leave o_proj alone")
    parser.add_argument("--fit-steps", type=int, default=0, help="gradient steps a layer in the initialisation")
    parser.add_argument("--rank", type=int, default=64, help="of LoRA")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="calibration seeds; the first is trained")
    parser.add_argument("--data-seed", type=int, default=0, help="order of the training text")
    parser.add_argument("--calibration-blocks", type=int, default=128)
    parser.add_argument(
        "--train-on-calibration", type=int, default=0, metavar="N", help="times that training holds calibration too"
    )
    parser.add_argument("--held-out-blocks", type=int, help="measure on the first of them only")
    parser.add_argument("--block-size", type=int, default=512)
    parser.add_argument("--context", type=int, default=2048, help="of the prefill whose FLOPs are counted")
    parser.add_argument("--deadline", type=float, default=math.inf, help="seconds: what takes longer is not begun")
    parser.add_argument("--save", type=Path, help="folder for the recovered adapters, without --tokens the untrained")
    parser.add_argument("--save-plain", type=Path, help="folder for the same models as plain checkpoints")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-graph", dest="graph", action="store_false", help="eager steps")
    parser.add_argument("--compile", action="store_true", help="the layers too, not only the loss")
    parser.add_argument(
        "--recover",
        nargs="+",
        default=[""],
        metavar="OPTIONS",
        help="recoveries of one initialised model: each string holds the options below that it has of its own",
    )
    recovery_loop.add_options(parser)
    args = parser.parse_args(arguments)
    try:
        args.recoveries = [own_options(args, text) for text in args.recover]
    except ValueError as error:
        parser.error(str(error))
    args.name = args.name or Path(args.model).name
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    return args


def own_options(args: argparse.Namespace, text: str) -> RecoveryOptions:
    """A recovery's options: those of the command line, but for what `text` says."""
    parser = argparse.ArgumentParser(prog="--recover", allow_abbrev=False)
    recovery_loop.add_options(parser)
    parser.set_defaults(**vars(args))
    return RecoveryOptions.of(parser.parse_args(shlex.split(text)))


if __name__ == "__main__":
    main()
