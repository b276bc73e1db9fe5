"""Compare checkpoints and adapters: perplexity, KL to the first, bytes of KV cache, decode speed, lm-eval tasks.

    python recipes/evaluate.py recipes/tiny_model out/adapter out/plain --text book.txt --output evaluation.json
    python recipes/evaluate.py meta-llama/Llama-2-7b-hf out/plain --tasks mmlu --num-fewshot 5 --device cuda
    python recipes/evaluate.py out/plain --tasks mmlu_csv --task-folder recipes/tasks --task-metadata mmlu_zip=mmlu.zip

A model is a folder or a repository on the Hub, an adapter of any PEFT method included. The first one is what the
others' KL is taken to, and its tokenizer reads the texts. Prints a table, then one line of JSON. Tasks need
`pip install 'lm-eval[hf]'`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import AutoPeftModelForCausalLM
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

import asymgqa_peft  # noqa: F401  (registers the method with PEFT)
from asymgqa_peft.evaluate import (
    decode_speed,
    kl_to_reference,
    kv_cache_bytes_per_token,
    perplexity,
    strided_windows,
)
from asymgqa_peft.files import save_json
from recipes.folders import check_writable
from recipes.inputs import checked_models, is_adapter, load_tokenizer
from recipes.reporting import print_report, provenance

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    if args.output:
        check_writable(args.output.parent)
    tasks = find_tasks(args) if args.tasks else None
    checked_models(args.models, same_vocabulary=bool(args.text))
    tokenizer = load_tokenizer(args.models[0])
    batches = []
    if args.text:
        documents = islice(read_documents(args.text), args.max_documents)
        windows = strided_windows(
            documents, tokenizer, args.length, args.stride, args.batch_size, max_tokens=args.max_tokens
        )
        batches = list(windows)
    reference, rows = None, []
    for name in args.models:
        model = load_model(name, args)
        rows.append(measure(name, model, reference, batches, tokenizer, tasks, args))
        if reference is None and batches and len(args.models) > 1:
            reference = model
        del model  # not two converted models at a time
    settings = {key: value for key, value in vars(args).items() if key not in ("models", "output")}
    if args.output:
        save_json(args.output, {**provenance(args.device), "settings": settings, "rows": rows})
    print_report(rows, args.device, settings=settings)


def measure(
    name: str,
    model: nn.Module,
    reference: nn.Module | None,
    batches: list[dict[str, torch.Tensor]],
    tokenizer: PreTrainedTokenizerBase,
    tasks: TaskManager | None,
    args: argparse.Namespace,
) -> dict[str, object]:
    """One row of the table."""
    stock = model.get_base_model() if hasattr(model, "get_base_model") else model
    row = {
        "model": name,
        "class": type(stock).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "KV bytes/token": kv_cache_bytes_per_token(model, model.dtype),
    }
    if batches:
        row["perplexity"] = perplexity(model, batches, progress=True)
        row["KL to the first"] = None if reference is None else kl_to_reference(model, reference, batches)
    if args.decode_tokens:
        speed = decode_speed(model, args.decode_batch_size, args.decode_context, args.decode_tokens)
        row["decode tokens/s"] = speed
    return row if tasks is None else row | task_scores(model, tokenizer, tasks, args)


def task_scores(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, tasks: TaskManager, args: argparse.Namespace
) -> dict[str, float]:
    """lm-eval's metrics, "task metric" -> value; of a group of tasks the group's, of a tag those of all its tasks."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    language_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=args.batch_size, prefix_token_id=start)
    results = simple_evaluate(
        language_model,
        tasks=args.tasks,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        task_manager=tasks,
        log_samples=False,
        bootstrap_iters=0,
    )["results"]
    return {
        f"{task} {metric.split(',')[0]}": value
        for task in [task for task in results if task in args.tasks] or results
        for metric, value in results[task].items()
        if isinstance(value, float) and "stderr" not in metric
    }


def find_tasks(args: argparse.Namespace) -> TaskManager:
    """lm-eval's catalogue of --task-folder, and of its own tasks if others are asked for."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise SystemExit("--tasks needs lm-eval: pip install 'lm-eval[hf]'") from error

    options = {"include_path": args.task_folder, "metadata": dict(args.task_metadata)}
    manager = TaskManager(include_defaults=False, **options)
    if set(args.tasks) - set(manager.all_tasks):
        manager = TaskManager(**options)
    if unknown := sorted(set(args.tasks) - set(manager.all_tasks)):
        raise SystemExit(f"--tasks {unknown[0]}: neither lm-eval nor --task-folder {args.task_folder} has it.")
    return manager


def load_model(name: str, args: argparse.Namespace) -> nn.Module:
    """A checkpoint, or an adapter on the base that it names."""
    loader = AutoPeftModelForCausalLM if is_adapter(name) else AutoModelForCausalLM
    return loader.from_pretrained(name, dtype=args.dtype).to(args.device).eval()


def read_documents(files: list[str]) -> Iterator[str]:
    """A document per .txt file, and per line of a .jsonl file its "text"."""
    for path in map(Path, files):
        if path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as lines:
                yield from (text_of(json.loads(line), path) for line in lines if line.strip())
        else:
            yield path.read_text(encoding="utf-8")


def text_of(row: dict, path: Path) -> str:
    """A row's text; exits where there is none."""
    if "text" not in row:
        raise SystemExit(f'--text {path}: a line has {sorted(row)} and no "text": rename the column.')
    return row["text"]


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="folders or repositories of checkpoints and adapters")
    parser.add_argument("--dtype", default="auto", help="dtype to load in; default: as saved")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, default=4, help="sequences at a time (default %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file to write, for merge_and_push.py --evaluation")
    text = parser.add_argument_group("perplexity and KL")
    text.add_argument(
        "--text", nargs="+", metavar="FILE", help=".txt (one document) or .jsonl files (a document per line)"
    )
    text.add_argument("--max-documents", type=int, metavar="N", help="read the first N documents only")
    text.add_argument("--max-tokens", type=int, metavar="N", help="read the first N tokens only, over all documents")
    text.add_argument("--length", type=int, default=1024, help="tokens in a window (default %(default)s)")
    text.add_argument("--stride", type=int, help="new tokens in a window (default: half of --length)")
    speed = parser.add_argument_group("decode speed")
    speed.add_argument("--decode-tokens", type=int, default=32, help="tokens to generate; 0: do not measure")
    speed.add_argument("--decode-context", type=int, default=256, help="tokens in the cache before")
    speed.add_argument("--decode-batch-size", type=int, default=8, help="sequences decoded together")
    tasks = parser.add_argument_group("lm-eval")
    tasks.add_argument("--tasks", type=lambda names: names.split(","), help="names with commas between, e.g. mmlu")
    tasks.add_argument("--num-fewshot", type=int, help="worked examples; default: the task's own")
    tasks.add_argument("--limit", type=int, help="questions per task, for a trial run")
    tasks.add_argument("--task-folder", help="folder of further task files, e.g. recipes/tasks")
    tasks.add_argument(
        "--task-metadata",
        nargs="+",
        default=[],
        type=lambda pair: tuple(pair.split("=", 1)),
        metavar="KEY=VALUE",
        help="passed to the task files, e.g. text_file=book.txt",
    )
    args = parser.parse_args(arguments)
    args.stride = args.stride or args.length // 2
    if not 0 < args.stride < args.length:
        parser.error(f"--stride {args.stride} must be at least 1 and less than --length {args.length}.")
    if bad := [pair for pair in args.task_metadata if len(pair) != 2]:
        parser.error(f"--task-metadata {bad[0][0]}: write KEY=VALUE.")
    if missing := [file for file in args.text or [] if not Path(file).is_file()]:
        parser.error(f"--text {missing[0]}: no such file.")
    return args


if __name__ == "__main__":
    main()
