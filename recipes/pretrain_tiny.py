"""Pretrain a small model with one KV head per query head, to have something real to convert.

Without options this trains the bundled model (`recipes/tiny_model`) on the text of Python's standard library:

    python recipes/pretrain_tiny.py

With `--text` it trains on a text file of your own instead, for instance a 25 M parameter model on books:

    python recipes/pretrain_tiny.py --text books.txt.xz --out books_model --vocab-size 8192 --hidden-size 512 \
        --layers 8 --heads 16 --head-dim 32 --intermediate-size 1024 --batch-size 96 --learning-rate 1.5e-3 \
        --dropout 0.15 --weight-decay 1.0 --tokens 56e6 --max-shard-size 15MB

`--form qwen3` and `--form olmo2` train models with a norm between k_proj and the attention, per head and across all
heads, instead of a Llama.

The tokenizer, a byte-level BPE, is trained on the same text. The weights with the lowest perplexity on the validation
text are kept, written in bfloat16, loaded again and measured in float32 on the held-out text, which nothing else
looks at. The last line printed is one JSON object with the results. A GPU is used if there is one; the bundled model
needs about 90 seconds on one NVIDIA H100.

Both texts are small for their models (3 and 6 M tokens), so training goes over them many times, and regularisation
decides the result; so does the shape. Validation perplexity at 3.9 M parameters, each the best point of its cosine
schedule (learning rate 3e-3; 6e-3 was worse at weight decay 0.1 without dropout):

    hidden   head dim   weight decay   dropout   tokens   validation perplexity
    256      16         0.1            0         60 M     14.59
    256      16         0.1            0         120 M    15.24
    256      16         0.1            0.05      120 M    14.15
    256      16         0.1            0.1       45 M     13.74
    256      16         0.1            0.15      90 M     12.71
    256      16         0.5            0.1       60 M     12.38
    256      16         1.2            0.1       60 M     11.50
    256      24         1.2            0.1       60 M     11.11
    192      24         1.2            0.1       60 M     10.71
    192      32         1.2            0.1       60 M     10.60
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Olmo2Config,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from recipes import stdlib_text
from recipes.text_file import read_text

END_OF_TEXT, PADDING = "<|endoftext|>", "<|pad|>"
RECIPES = Path(__file__).resolve().parent

# A text file is cut into pieces of about this many characters, which the tokenizer then encodes in parallel.
PIECE_CHARACTERS = 50_000
HELD_OUT_SHARE, VALIDATION_SHARE = 0.04, 0.02

FORMS = {"llama": LlamaConfig, "qwen3": Qwen3Config, "olmo2": Olmo2Config}

# KV heads averaged into one to show that they differ.
AVERAGED_HEADS = 4

WARMUP_SHARE = 0.03
# The steps between which the speed is measured; compilation is over by the first.
BENCHMARK_STEPS = (20, 60)
EVALUATIONS = 25


@dataclass(frozen=True)
class Corpus:
    """Three disjoint lists of texts, and in words where they come from."""

    name: str
    training: list[str]
    validation: list[str]
    held_out: list[str]


@dataclass(frozen=True)
class TrainingRecord:
    """What a training run did; perplexities are on the validation text."""

    steps: int
    tokens: int
    epochs: float
    best_step: int
    validation_perplexity: float
    seconds: float
    tokens_per_second: float


@dataclass(frozen=True)
class Measurement:
    """The saved checkpoint, measured in float32 on the held-out text."""

    parameters: int
    held_out_tokens: int
    held_out_perplexity: float
    held_out_bits_per_byte: float
    neighbour_mean_perplexity: float


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; their defaults are those of the bundled model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("text")
    data.add_argument("--text", type=Path, help="plain text file, .xz or not; default: Python's standard library")
    data.add_argument("--stdlib", type=Path, help="folder of another standard library; default: the running Python's")
    data.add_argument(
        "--python-version", default=platform.python_version(), help="version of --stdlib, for the card (%(default)s)"
    )
    shape = parser.add_argument_group("model")
    shape.add_argument("--form", choices=list(FORMS), default="llama", help="architecture (%(default)s)")
    shape.add_argument(
        "--norm-spread",
        type=float,
        default=1.0,
        help="largest by smallest scale that the norms of queries and keys start from, over the rotary frequencies: "
        "in large models they end up an order of magnitude apart (%(default)s)",
    )
    shape.add_argument("--vocab-size", type=int, default=2048, help="entries of the BPE tokenizer (%(default)s)")
    shape.add_argument("--hidden-size", type=int, default=192, help="model width (%(default)s)")
    shape.add_argument("--layers", type=int, default=6, help="number of layers (%(default)s)")
    shape.add_argument("--heads", type=int, default=16, help="query heads, as many KV heads (%(default)s)")
    shape.add_argument("--head-dim", type=int, default=32, help="head dimension (%(default)s)")
    shape.add_argument("--intermediate-size", type=int, default=320, help="MLP width (%(default)s)")
    shape.add_argument("--block-size", type=int, default=512, help="tokens of context (%(default)s)")
    training = parser.add_argument_group("training")
    training.add_argument("--tokens", type=float, default=60e6, help="training tokens (%(default).3g)")
    training.add_argument(
        "--minutes", type=float, help="shorten the schedule if the measured speed needs more than this; default: never"
    )
    training.add_argument("--batch-size", type=int, default=64, help="blocks per step (%(default)s)")
    training.add_argument("--learning-rate", type=float, default=3e-3, help="peak of the cosine (%(default)s)")
    training.add_argument("--weight-decay", type=float, default=1.2, help="AdamW's, on matrices only (%(default)s)")
    training.add_argument("--dropout", type=float, default=0.1, help="on the residual projections (%(default)s)")
    training.add_argument("--seed", type=int, default=0, help="initial weights, order, dropout (%(default)s)")
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, default=RECIPES / "tiny_model", help="output folder (recipes/tiny_model)")
    output.add_argument("--max-shard-size", default="5GB", help="largest weight file (%(default)s)")
    args = parser.parse_args(arguments)
    if args.heads % AVERAGED_HEADS:
        parser.error(f"--heads {args.heads} must be a multiple of {AVERAGED_HEADS}, to measure {AVERAGED_HEADS}:1")
    return args


def load_corpus(args: argparse.Namespace) -> Corpus:
    """The standard library, or the pieces of `--text` with its end held out."""
    if args.text is None:
        return Corpus(
            name=f"the standard library of CPython {args.python_version}",
            training=stdlib_text.training_texts(args.stdlib),
            validation=stdlib_text.validation_texts(args.stdlib),
            held_out=stdlib_text.held_out_texts(args.stdlib),
        )
    pieces = read_pieces(args.text)
    held_out = math.ceil(len(pieces) * HELD_OUT_SHARE)
    validation = math.ceil(len(pieces) * VALIDATION_SHARE)
    if held_out + validation >= len(pieces):
        raise ValueError(f"--text {args.text} holds {len(pieces)} piece(s) of text, too few to hold some out")
    end = len(pieces) - held_out
    return Corpus(
        name=f"the text file {args.text.name}",
        training=pieces[: end - validation],
        validation=pieces[end - validation : end],
        held_out=pieces[end:],
    )


def read_pieces(path: Path) -> list[str]:
    """A text file, cut at blank lines into pieces of about `PIECE_CHARACTERS`, in order."""
    pieces, piece, length = [], [], 0
    for paragraph in read_text(path).split("\n\n"):
        piece.append(paragraph)
        length += len(paragraph) + 2
        if length >= PIECE_CHARACTERS:
            pieces.append("\n\n".join(piece))
            piece, length = [], 0
    if piece:
        pieces.append("\n\n".join(piece))
    return pieces


def train_tokenizer(texts: Sequence[str], vocab_size: int, block_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocab_size` entries; the end-of-text token also begins a text, padding has its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # every byte, so that no text is out of vocabulary
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        model_max_length=block_size,
        clean_up_tokenization_spaces=False,
    )


def build_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A model with random weights, one KV head per query head and tied embeddings."""
    config = FORMS[args.form](
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        head_dim=args.head_dim,
        max_position_embeddings=args.block_size,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for projection in residual_projections(model):
            # As in GPT-2: the residual stream's variance must not grow with depth.
            projection.weight.div_(math.sqrt(2 * args.layers))
        for norm in head_norms(model):
            # The slowest frequencies come last in each half of a head, and get the largest scales.
            pairs = args.norm_spread ** torch.linspace(-0.5, 0.5, args.head_dim // 2)
            norm.weight.copy_(pairs.repeat(norm.weight.numel() // len(pairs)))
    return model


def head_norms(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The norms of queries and keys; none in a Llama."""
    norms = []
    for layer in model.model.layers:
        for name in ("q_norm", "k_norm"):
            if hasattr(layer.self_attn, name):
                norms.append(getattr(layer.self_attn, name))
    return norms


def residual_projections(model: PreTrainedModel) -> list[torch.nn.Linear]:
    """The projections whose output is added to the residual stream."""
    projections = []
    for layer in model.model.layers:
        projections += [layer.self_attn.o_proj, layer.mlp.down_proj]
    return projections


def add_dropout(model: PreTrainedModel, probability: float) -> list[torch.utils.hooks.RemovableHandle]:
    """Dropout on the residual projections' outputs, which has no setting of its own; returns the hooks' handles."""
    if probability == 0:
        return []

    def drop(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        return F.dropout(output, probability, module.training)

    return [projection.register_forward_hook(drop) for projection in residual_projections(model)]


def training_batches(
    ids: torch.LongTensor, block_size: int, batch_size: int, generator: torch.Generator
) -> Iterator[torch.LongTensor]:
    """Endless batches (batch_size, block_size); every epoch cuts at another offset and shuffles the blocks."""
    if len(ids) < (batch_size + 1) * block_size:
        raise ValueError(f"{len(ids)} training tokens do not fill one step; lower --batch-size or --block-size")
    while True:
        # Another offset in every epoch: no token always stands at the same place of its block.
        offset = int(torch.randint(block_size, (1,), generator=generator))
        count = (len(ids) - offset) // block_size
        blocks = ids[offset : offset + count * block_size].view(count, block_size)
        for rows in torch.randperm(count, generator=generator).split(batch_size):
            if len(rows) == batch_size:
                yield blocks[rows.to(ids.device)]


def next_token_loss(hidden: torch.Tensor, embedding: torch.Tensor, ids: torch.LongTensor) -> torch.Tensor:
    """Mean cross-entropy of the tied output layer: `hidden` (B, T, E), `embedding` (vocabulary, E), `ids` (B, T)."""
    logits = F.linear(hidden[:, :-1], embedding).float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def build_optimizer(model: PreTrainedModel, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices, vectors = [], []
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            matrices.append(parameter)
        else:
            vectors.append(parameter)
    groups = [
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=True)


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to zero."""
    warmup = max(1, int(steps * WARMUP_SHARE))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train(
    model: PreTrainedModel, ids: torch.LongTensor, validation: torch.LongTensor, args: argparse.Namespace
) -> TrainingRecord:
    """Train in place; on return the model holds the weights with the lowest validation perplexity."""
    loss_of = next_token_loss
    if ids.is_cuda:
        # Layer by layer: compiling the whole model would materialise a causal mask and lose flash attention.
        for layer in model.model.layers:
            layer.compile()
        loss_of = torch.compile(next_token_loss)
    handles = add_dropout(model, args.dropout)
    optimizer = build_optimizer(model, args)
    batches = training_batches(ids, args.block_size, args.batch_size, torch.Generator().manual_seed(args.seed))
    step_tokens = args.batch_size * args.block_size
    steps = max(1, round(args.tokens / step_tokens))
    # Left on the device: reading a loss each step would stall it.
    losses: list[torch.Tensor] = []
    best_perplexity, best_step, best_weights = math.inf, 0, {}
    step, start = 0, time.perf_counter()
    while step < steps:
        factor = learning_rate_factor(step, steps)
        losses.append(training_step(model, loss_of, optimizer, next(batches), factor * args.learning_rate))
        step += 1
        if step in BENCHMARK_STEPS:
            # Wait for the device.
            losses[-1].item()
            if step == BENCHMARK_STEPS[0]:
                benchmark = time.perf_counter()
            else:
                steps = affordable_steps(steps, start, benchmark, args.minutes)
        if step % max(1, steps // EVALUATIONS) == 0 or step == steps:
            # The best weights so far are kept: with many epochs the last ones may have learnt the text by heart.
            value = perplexity(model, validation, args.batch_size)
            if value < best_perplexity:
                best_perplexity, best_step = value, step
                best_weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
            tokens, elapsed = step * step_tokens / 1e6, time.perf_counter() - start
            print(
                f"step {step}/{steps}  {tokens:.1f} M tokens  training loss {torch.stack(losses).mean().item():.4f}  "
                f"validation perplexity {value:.4f}  {tokens / elapsed:.3f} M tokens/s  {elapsed:.0f} s",
                flush=True,
            )
            losses.clear()
    seconds = time.perf_counter() - start
    for handle in handles:
        handle.remove()
    # Not strict: the tied output layer is no parameter of its own.
    model.load_state_dict(best_weights, strict=False)
    tokens = steps * step_tokens
    return TrainingRecord(steps, tokens, tokens / len(ids), best_step, best_perplexity, seconds, tokens / seconds)


def training_step(
    model: PreTrainedModel,
    loss_of: Callable[..., torch.Tensor],
    optimizer: torch.optim.Optimizer,
    batch: torch.LongTensor,
    learning_rate: float,
) -> torch.Tensor:
    """One step of the optimiser; returns the loss, detached and still on the device."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=batch.is_cuda):
        hidden = model.model(input_ids=batch, use_cache=False).last_hidden_state
        loss = loss_of(hidden, model.lm_head.weight, batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def affordable_steps(steps: int, start: float, benchmark: float, minutes: float | None) -> int:
    """How many of `steps` fit in `minutes` since `start`; `benchmark` is when the measuring of the speed began."""
    now = time.perf_counter()
    first, last = BENCHMARK_STEPS
    per_step = (now - benchmark) / (last - first)
    print(f"{per_step * 1e3:.1f} ms a step, {steps * per_step:.0f} s in all", flush=True)
    if minutes is None:
        return steps
    return max(last, min(steps, last + int((start + minutes * 60 - now) / per_step)))


@torch.no_grad()
def perplexity(model: PreTrainedModel, blocks: torch.LongTensor, batch_size: int) -> float:
    """exp of the mean negative log-likelihood of each block's tokens but its first, in the model's own precision."""
    training = model.training
    model.eval()
    total = 0.0
    # Another precision: not worth compiling again.
    with torch.compiler.set_stance("force_eager"):
        for batch in blocks.split(batch_size):
            hidden = model.model(input_ids=batch, use_cache=False).last_hidden_state
            total += next_token_loss(hidden, model.lm_head.weight, batch).item() * len(batch)
    model.train(training)
    return math.exp(total / len(blocks))


@torch.no_grad()
def average_neighbour_heads(model: PreTrainedModel, heads_per_group: int) -> PreTrainedModel:
    """A copy whose K and V are averaged over each run of neighbouring heads (the classic GQA merge).

    The averages are repeated for every head of the run, so the copy keeps its shapes and computes what the grouped
    model would.
    """
    merged = copy.deepcopy(model)
    head_dim = merged.config.head_dim
    for layer in merged.model.layers:
        weights = [layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight]
        if merged.config.model_type == "olmo2":
            # Its norm has a scale of its own for every head.
            weights.append(layer.self_attn.k_norm.weight)
        for weight in weights:
            # Every head of a run gets the run's mean, which computes the same as one shared head: (G, K/G, D, ...).
            heads = weight.unflatten(0, (-1, heads_per_group, head_dim))
            weight.copy_(heads.mean(1, keepdim=True).expand_as(heads).reshape_as(weight))
    return merged


def measure(out: Path, corpus: Corpus, args: argparse.Namespace, device: torch.device) -> Measurement:
    """Load what was saved and measure it, as it is and with each run of neighbouring KV heads averaged."""
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).to(device)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    blocks = stdlib_text.token_blocks(corpus.held_out, tokenizer, args.block_size).to(device)
    # Bits per byte can be compared across tokenizers.
    tokens_per_byte = blocks.numel() / sum(len(tokenizer.decode(block).encode()) for block in blocks)
    value = perplexity(model, blocks, args.batch_size)
    return Measurement(
        parameters=model.num_parameters(),
        held_out_tokens=blocks.numel(),
        held_out_perplexity=value,
        held_out_bits_per_byte=math.log2(value) * tokens_per_byte,
        neighbour_mean_perplexity=perplexity(average_neighbour_heads(model, AVERAGED_HEADS), blocks, args.batch_size),
    )


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, args: argparse.Namespace) -> None:
    """Write bfloat16 weights, configuration and tokenizer, and with `--text` the held-out text too."""
    args.out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(args.out, max_shard_size=args.max_shard_size)
    tokenizer.save_pretrained(args.out)
    if args.text is not None:
        (args.out / "held_out.txt").write_text("\n\n".join(corpus.held_out), encoding="utf-8")


def command_line(args: argparse.Namespace, tokens: int) -> str:
    """The command that repeats this run, every choice spelled out; folders and time limits are left to the reader."""
    options = [
        "form",
        "norm_spread",
        "vocab_size",
        "hidden_size",
        "layers",
        "heads",
        "head_dim",
        "intermediate_size",
        "block_size",
    ]
    options += ["batch_size", "learning_rate", "weight_decay", "dropout", "seed"]
    words = ["python", "recipes/pretrain_tiny.py"]
    if args.text is not None:
        words += ["--text", args.text.name]
    for name in options:
        value = getattr(args, name)
        words += [f"--{name.replace('_', '-')}", value if isinstance(value, str) else f"{value:g}"]
    return shlex.join([*words, "--tokens", str(tokens)])


def as_code(names: Sequence[str]) -> str:
    """Names in Markdown's code style, commas between."""
    return ", ".join(f"`{name}`" for name in names)


def model_card(args: argparse.Namespace, corpus: Corpus, record: TrainingRecord, measured: Measurement) -> str:
    """The README.md of the output folder."""
    ratio = measured.neighbour_mean_perplexity / measured.held_out_perplexity
    if args.text is None:
        licence = (
            "The text is Python's standard library, under the Python Software Foundation License; "
            "these weights are under Apache-2.0."
        )
        held_out = "\n".join(
            [
                "Never trained on, nor used for the tokenizer, nor used to choose anything:",
                "",
                "- modules: " + as_code(stdlib_text.HELD_OUT_MODULES),
                "- help topics: " + as_code(stdlib_text.HELD_OUT_TOPICS),
                "",
                "Choices (learning rate, length, which weights to keep) were made on:",
                "",
                "- modules: " + as_code(stdlib_text.VALIDATION_MODULES),
                "- help topics: " + as_code(stdlib_text.VALIDATION_TOPICS),
                "",
                "Another Python version's standard library gives slightly different text, hence slightly different "
                "perplexities.",
            ]
        )
    else:
        licence = "The text's own licence applies to the text; these weights are under Apache-2.0."
        held_out = (
            f"The last {HELD_OUT_SHARE:.0%} of the file, in `held_out.txt`; choices were made on the "
            f"{VALIDATION_SHARE:.0%} before it."
        )
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# A tiny multi-head-attention model

A byte-level BPE tokenizer and a model of the {args.form} form, trained from scratch on {corpus.name}.
It has one KV head per query head, is small enough to ship and trained enough that its heads matter. It is here to be
converted, not to be talked to.

| | |
|---|---|
| parameters | {measured.parameters:,} (embeddings tied), bfloat16 |
| shape | {args.layers} layers, hidden size {args.hidden_size}, {args.heads} query and {args.heads} KV heads of \
{args.head_dim}, MLP {args.intermediate_size}, vocabulary {args.vocab_size}, context {args.block_size} |
| training text | {sum(map(len, corpus.training)):,} characters of {corpus.name} |
| tokens seen | {record.tokens:,} in {record.steps:,} steps, {record.epochs:.1f} times the text; weights of step \
{record.best_step:,} kept |
| seed | {args.seed} |
| held-out perplexity | **{measured.held_out_perplexity:.3f}** ({measured.held_out_bits_per_byte:.3f} bits per byte) |
| the same, every {AVERAGED_HEADS} neighbouring KV heads averaged | \
{measured.neighbour_mean_perplexity:.2f} ({ratio:.1f} times) |
| validation perplexity | {record.validation_perplexity:.3f} |

Perplexity is measured on the saved weights in float32, token-weighted, on {measured.held_out_tokens:,} held-out
tokens in non-overlapping blocks of {args.block_size}, the texts joined by `{END_OF_TEXT}`; each block's first token is
not predicted.

## Held-out text

{held_out}

## Training

    {command_line(args, record.tokens)}

AdamW (0.9, 0.95), gradient norm clipped at 1, {WARMUP_SHARE:.0%} warm-up and cosine to zero, bfloat16 autocast;
the text is shuffled anew in every epoch. On a GPU the order of sums varies, so another run gives close numbers, not
the same bits.

## Licence

{licence}
"""


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    corpus = load_corpus(args)
    tokenizer = train_tokenizer(corpus.training, args.vocab_size, args.block_size)
    ids = stdlib_text.token_ids(corpus.training, tokenizer).to(device)
    validation = stdlib_text.token_blocks(corpus.validation, tokenizer, args.block_size).to(device)
    model = build_model(args, tokenizer).to(device)
    print(
        f"{model.num_parameters():,} parameters; {len(ids):,} training tokens of {corpus.name}, "
        f"{sum(map(len, corpus.training)) / len(ids):.2f} characters each",
        flush=True,
    )
    record = train(model, ids, validation, args)
    save(model, tokenizer, corpus, args)
    measured = measure(args.out, corpus, args, device)
    (args.out / "README.md").write_text(model_card(args, corpus, record, measured), encoding="utf-8")
    print(json.dumps({**asdict(record), **asdict(measured)}))


if __name__ == "__main__":
    main()
