r"""The published experiment at small scale: what a task loses when a fine-tuned model's KV heads are shared.

    python recipes/task_accuracy.py --model DIR --output out/sst2       # every arm, every ratio: hours on a CPU
    python recipes/task_accuracy.py --output out/sst2 --ratios 4 --seeds 0 --recover 0 10000

An MHA model is fine-tuned on SST-2 (sentence -> good or bad), converted at each ratio by each arm with groups and
statistics from training sentences only, recovered on 0, 10,000 and 60,000 training examples, and measured on the
official development set, 872 sentences, which nothing is chosen on: --choose measures on the last 2,000 training
examples instead, which are never trained on. SST-2 is read from the folder --data (train.tsv and dev.tsv: the
training set; test.tsv: the development set) or downloaded. Prints mean accuracy and largest deviation over seeds, and
one JSON line. An interrupted run goes on where it stopped; processes with other options may share --output.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from peft import get_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from asymgqa_peft import AsymGQAConfig, initialize_asymgqa_weights
from recipes.experiments import ARMS, Cells, arm_config, distilled, train
from recipes.folders import replacing
from recipes.reporting import print_report

RECIPES = Path(__file__).resolve().parent
QUESTION, ANSWERS = " It was", (" bad", " good")
SET_ASIDE = 2000
"""Training examples that are never trained on: choices are made on them."""


@dataclass(frozen=True)
class Examples:
    """Tokenised sentences, each followed by the question, and their labels (0 bad, 1 good)."""

    prompts: list[list[int]]
    labels: list[int]
    answers: tuple[int, int]

    def __getitem__(self, part: slice) -> Examples:
        return Examples(self.prompts[part], self.labels[part], self.answers)

    def shuffled(self, count: int, seed: int) -> Examples:
        """`count` of them in a seeded random order."""
        order = torch.randperm(len(self.prompts), generator=torch.Generator().manual_seed(seed))
        prompts, labels = [], []
        for index in order[:count].tolist():
            prompts.append(self.prompts[index])
            labels.append(self.labels[index])
        return Examples(prompts, labels, self.answers)

    def rows(self, whole: bool) -> Dataset:
        """Training rows; the loss counts the answer, or the whole sequence."""
        ids, targets = [], []
        for prompt, label in zip(self.prompts, self.labels, strict=True):
            answer = self.answers[label]
            ids.append([*prompt, answer])
            if whole:
                targets.append([*prompt, answer])
            else:
                targets.append([-100] * len(prompt) + [answer])
        return Dataset.from_dict({"input_ids": ids, "labels": targets})

    def batches(self, size: int, pad: int) -> list[dict[str, torch.Tensor]]:
        """Right-padded prompts: dicts of input_ids and attention_mask, (B, T)."""
        found = []
        for start in range(0, len(self.prompts), size):
            prompts = [torch.tensor(prompt) for prompt in self.prompts[start : start + size]]
            # -1 is no token, so that the mask can be told from the padded ids.
            ids = pad_sequence(prompts, batch_first=True, padding_value=-1)
            found.append({"input_ids": ids.masked_fill(ids < 0, pad), "attention_mask": (ids >= 0).long()})
        return found


def main(arguments: list[str] | None = None) -> list[dict]:
    """Run what is missing and print the table."""
    args = parse_args(arguments)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    training_rows, development_rows = read_sst2(args.data)
    training, development = tokenised(training_rows, tokenizer), tokenised(development_rows, tokenizer)
    training, set_aside = training[:-SET_ASIDE], training[-SET_ASIDE:]
    measured, folder = development, "runs"
    if args.choose:
        measured, folder = set_aside, "choices"
    task = Task(training, measured, tokenizer, args)
    cells = Cells(args.output / folder)
    for seed in args.seeds:
        base = task.fine_tuned(seed)
        key = {"ratio": "1:1", "arm": "MHA", "examples": len(training.prompts), "seed": seed}
        cells.get(key, partial(task.untouched, base))
        for ratio, arm, count in itertools.product(args.ratios, args.arms, args.recover):
            key = {"ratio": f"{ratio}:1", "arm": arm, "examples": count, "seed": seed}
            cells.get(key, partial(task.convert, base, arm, ratio, count, seed))
    table = summary(cells.all())
    print_report(table, args.device, arguments=vars(args))
    return table


def read_sst2(folder: Path | None) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """(training, development) sentences with labels, from local files, or without a folder from the Hub."""
    if folder is not None:
        training = _read_tsv(folder / "train.tsv") + _read_tsv(folder / "dev.tsv")
        return training, _read_tsv(folder / "test.tsv")
    loaded = load_dataset("stanfordnlp/sst2")
    training, development = loaded["train"], loaded["validation"]
    return (
        list(zip(training["sentence"], training["label"], strict=True)),
        list(zip(development["sentence"], development["label"], strict=True)),
    )


def _read_tsv(path: Path) -> list[tuple[str, int]]:
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [(row["sentence"], int(row["label"])) for row in reader]


def tokenised(rows: list[tuple[str, int]], tokenizer: PreTrainedTokenizerBase) -> Examples:
    """Sentences with the question after them; every example starts with the end-of-text token."""
    bad, good = tokenizer(list(ANSWERS), add_special_tokens=False).input_ids
    answers = (bad[0], good[0])
    # The model answers with one token, so that the first ones must differ.
    if answers[0] == answers[1]:
        raise ValueError(
            f"the tokenizer begins {ANSWERS[0]!r} and {ANSWERS[1]!r} with the same token: change ANSWERS."
        )
    texts, labels = [], []
    for sentence, label in rows:
        texts.append(sentence.strip() + QUESTION)
        labels.append(label)
    ids = tokenizer(texts, add_special_tokens=False).input_ids
    return Examples([[tokenizer.eos_token_id, *row] for row in ids], labels, answers)


@dataclass(frozen=True)
class Task:
    """What all cells share: examples to train on and to measure on, and the options."""

    training: Examples
    measured: Examples
    tokenizer: PreTrainedTokenizerBase
    args: argparse.Namespace

    def fine_tuned(self, seed: int) -> Path:
        """Folder of the MHA model fine-tuned with this seed, all its weights; trained if absent."""
        args, folder = self.args, self.args.output / f"mha-{seed}"
        if not folder.exists():
            model = self._load(args.model)
            rows = self.training.shuffled(len(self.training.prompts), seed).rows(whole=False)
            steps = math.ceil(len(rows) * args.epochs / args.batch_size)
            options = {"steps": steps, "batch_size": args.batch_size, "learning_rate": args.fine_tuning_rate}
            train(model, self.tokenizer, rows, seed=seed, group_by_length=True, **options)
            # Whole or not at all: a run that goes on takes what it finds.
            with replacing(folder, overwrite=False) as beside:
                model.save_pretrained(beside)
        return folder

    def untouched(self, base: Path) -> dict:
        """Accuracy of the fine-tuned MHA model."""
        return {"accuracy": accuracy(self._load(base), self.measured, self.tokenizer)}

    def convert(self, base: Path, arm: str, ratio: int, count: int, seed: int) -> dict:
        """Accuracy of one conversion after recovery on `count` examples."""
        args, model = self.args, self._load(base)
        groups = model.config.num_key_value_heads // ratio
        options = {"r": args.rank, "lora_alpha": args.rank, "seed": seed, "task_type": "CAUSAL_LM"}
        model = get_peft_model(model, AsymGQAConfig(num_key_value_heads=groups, **options, **arm_config(arm)))
        calibration = self.training.shuffled(args.calibration_examples, seed)
        batches = calibration.batches(256, self.tokenizer.pad_token_id)
        initialize_asymgqa_weights(model, batches, progress=False)
        if count:
            # SFT learns the answers; distillation has something to learn from every token.
            weight, rate = 0.0, args.sft_rate
            if distilled(arm):
                weight, rate = 1.0, args.learning_rate
            train(
                model,
                self.tokenizer,
                self.training.shuffled(count, seed).rows(whole=distilled(arm)),
                steps=math.ceil(count / args.batch_size),
                batch_size=args.batch_size,
                learning_rate=rate,
                seed=seed,
                distillation_weight=weight,
                group_by_length=True,
            )
        return {"accuracy": accuracy(model, self.measured, self.tokenizer)}

    def _load(self, folder: Path) -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(self.args.device)


@torch.no_grad()
def accuracy(model: torch.nn.Module, examples: Examples, tokenizer: PreTrainedTokenizerBase) -> float:
    """Share, in percent, of examples whose right answer has the higher logit after the prompt."""
    model.eval()
    device = next(model.parameters()).device
    guesses = []
    for batch in examples.batches(256, tokenizer.pad_token_id):
        ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
        # Prompts are padded on the right.
        last = mask.sum(1) - 1
        logits = model(input_ids=ids, attention_mask=mask).logits[torch.arange(len(last), device=device), last]
        guesses.append(logits[:, examples.answers].argmax(1).cpu())
    return 100 * (torch.cat(guesses) == torch.tensor(examples.labels)).double().mean().item()


def summary(cells: list[dict]) -> list[dict]:
    """One row per ratio and arm: mean accuracy and largest deviation over seeds, a column per number of examples."""
    groups: dict[tuple, dict[int, list[float]]] = {}
    for cell in cells:
        # (ratio, arm) -> number of examples -> one accuracy per seed.
        groups.setdefault((cell["ratio"], cell["arm"]), {}).setdefault(cell["examples"], []).append(cell["accuracy"])
    counts = sorted({cell["examples"] for cell in cells if cell["arm"] != "MHA"})
    order = ["MHA", *ARMS]
    rows = []
    for ratio, arm in sorted(groups, key=lambda key: (key[0], order.index(key[1]))):
        results = groups[ratio, arm]
        if arm == "MHA":
            # One number, whatever the conversions recover on.
            results = dict.fromkeys(counts, *results.values())
        row = {"ratio": ratio, "arm": arm}
        for count in counts:
            row[f"{count:,}"] = spread(results.get(count))
        rows.append(row | {"seeds": max(map(len, results.values()), default=0)})
    return rows


def spread(values: list[float] | None) -> str | None:
    """Mean and largest deviation from it."""
    if not values:
        return None
    mean = statistics.fmean(values)
    return f"{mean:.1f} +- {max(abs(value - mean) for value in values):.1f}"


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=RECIPES / "tiny_model", help="folder of an MHA model")
    parser.add_argument("--data", type=Path, help="folder of SST-2; default: the data set on the Hub")
    parser.add_argument("--output", type=Path, default=Path("out/task_accuracy"), help="fine-tuned models and results")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ratios", type=int, nargs="*", default=[2, 4, 8], help="base KV heads per shared head")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help="default: all")
    parser.add_argument("--recover", type=int, nargs="+", default=[0, 10_000, 60_000], help="examples of recovery")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--choose", action="store_true", help="measure on training examples that were set aside")
    parser.add_argument("--rank", type=int, default=64, help="LoRA rank")
    parser.add_argument("--batch-size", type=int, default=64, help="examples per step")
    parser.add_argument("--epochs", type=float, default=3.0, help="of fine-tuning the MHA model")
    parser.add_argument("--fine-tuning-rate", type=float, default=1e-4, help="learning rate of the MHA model")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="of the recovery by distillation")
    parser.add_argument("--sft-rate", type=float, default=1e-3, help="of the recovery by SFT")
    parser.add_argument("--calibration-examples", type=int, default=4096)
    args = parser.parse_args(arguments)
    if args.data and not (args.data / "train.tsv").is_file():
        parser.error(f"--data {args.data} holds no train.tsv: name the folder of SST-2, or leave --data out.")
    return args


if __name__ == "__main__":
    main()
