r"""Memory at the fullest moment of initialisation, recovery and merge, beside what `asymgqa_peft.estimates` says.

    python recipes/benchmarks/memory.py --device cuda            # 1 B and 7 B parameters, two minutes on an H100
    python recipes/benchmarks/memory.py --device cpu             # SmolLM2-135M's shape, in float32
    python recipes/benchmarks/memory.py --device cuda --shapes 1b --only recovery --jobs 1

Every cell is a process of its own with a random model, made where it runs; cells that fit together run side by side.
On a GPU a figure is what PyTorch allocated at most, weights included, and what it reserved; of main memory, and on a
CPU, it is the highest resident set since the model was made, less what the process held before. glibc would keep what
is freed in pieces of less than 32 MB: there the cells run with MALLOC_MMAP_THRESHOLD_=65536. The ratio is the estimate
by the measurement. Beyond the weights, initialisation and merge take the same however many layers there are, or grow
with them in proportion: `--layers` are made. Prints one JSON line for each cell as it comes, a table and one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.util import find_spec
from pathlib import Path
from threading import Condition

import psutil
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from asymgqa_peft import AsymGQAConfig, initialize_asymgqa_weights
from asymgqa_peft.estimates import (
    SINGLE,
    TOLERANCE,
    Need,
    Sizes,
    free_memory,
    initialization_need,
    merge_bytes,
    recovery_need,
)
from recipes.benchmarks import shapes
from recipes.benchmarks.recovery_speed import placeholder_tokenizer
from recipes.reporting import print_report

REPOSITORY = Path(__file__).resolve().parents[2]
PARTS = ("initialisation", "recovery", "merge")
GRIDS = {
    "cuda": {"shapes": ["1b", "llama-2-7b"], "tokens": [8192, 65536], "length": 2048, "batches": [1, 4]},
    "cpu": {"shapes": ["smollm2-135m"], "tokens": [2048, 8192], "length": 256, "batches": [1, 2]},
}
STEPS, MICRO_BATCHES = 2, 2
"""Of the recovery: Adam's moments are there from the second step on, gradients from the second micro-batch on."""


def main(arguments: list[str] | None = None) -> list[dict]:
    """Measure every cell in a process of its own, and print the table."""
    args = parse_args(arguments)
    if args.cell:
        print(json.dumps(measure(json.loads(args.cell), args)), flush=True)
        return []
    queue = Queue(free_memory(args.device))
    rows = []
    with ThreadPoolExecutor(args.jobs) as workers:
        waiting = [workers.submit(run, cell, args, queue) for cell in cells(args)]
        for done in as_completed(waiting):
            rows.append(done.result())
            print(json.dumps(rows[-1]), flush=True)
    rows.sort(key=lambda row: [row[name] for name in ("shape", "part", "4 bits", "tokens", "checkpointing")])
    # A table has the columns of its first row, and a cell that was not measured lacks some.
    columns = dict.fromkeys(name for row in rows for name in row)
    rows = [{name: row.get(name) for name in columns} for row in rows]
    print_report(rows, args.device, tolerance=TOLERANCE, arguments=vars(args))
    return rows


def cells(args: argparse.Namespace) -> Iterator[dict]:
    """What is measured; large and small models in turn, so that they fit side by side."""
    grid = GRIDS[args.device]
    found = []
    for shape in args.shapes or grid["shapes"]:
        of_shape = []
        for tokens in grid["tokens"]:
            of_shape.append({"part": "initialisation", "tokens": tokens, "checkpointing": False, "4 bits": False})
        for in_4bit in (False, True):
            if in_4bit and not (args.device == "cuda" and find_spec("bitsandbytes")):
                continue
            for sequences in grid["batches"]:
                for checkpointing in (True, False):
                    # Who takes 4 bits has little memory.
                    if in_4bit and not checkpointing:
                        continue
                    cell = {"part": "recovery", "tokens": sequences * grid["length"], "checkpointing": checkpointing}
                    of_shape.append({**cell, "4 bits": in_4bit})
        of_shape.append({"part": "merge", "tokens": 0, "checkpointing": False, "4 bits": False})
        found.append([{"shape": shape, **cell} for cell in of_shape if cell["part"] in args.only])
    for side_by_side in zip(*found, strict=True):
        yield from side_by_side


class Queue:
    """Lets cells start whose estimates fit together in what is free."""

    def __init__(self, free: int):
        self.free, self.taken, self.changed = 0.85 * free, 0, Condition()

    def enter(self, size: int) -> bool:
        """Wait until there is room; False if there never is."""
        with self.changed:
            if size > self.free:
                return False
            self.changed.wait_for(lambda: self.taken + size <= self.free)
            self.taken += size
            return True

    def leave(self, size: int) -> None:
        """Make room."""
        with self.changed:
            self.taken -= size
            self.changed.notify_all()


def run(cell: dict, args: argparse.Namespace, queue: Queue) -> dict:
    """A cell in a fresh process; what it measured, or why it did not."""
    weights, need = expected(cell, args, free=int(queue.free))
    size = weights + need.device + (need.main if args.device == "cpu" else 0)
    if not queue.enter(size):
        return {**cell, "estimate, GB": size / 1e9, "measured, GB": None, "note": "does not fit: not run"}
    command = [sys.executable, "-m", "recipes.benchmarks.memory", "--device", args.device, "--cell", json.dumps(cell)]
    try:
        done = subprocess.run(
            [*command, "--layers", str(args.layers)],
            cwd=REPOSITORY,
            env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
            capture_output=True,
            text=True,
        )
    finally:
        queue.leave(size)
    if done.returncode != 0:
        return {**cell, "estimate, GB": size / 1e9, "measured, GB": None, "note": done.stderr.strip()[-300:]}
    return json.loads(done.stdout.splitlines()[-1])


def config_of(cell: dict, args: argparse.Namespace):
    """The shape's configuration; the recovery needs all its layers."""
    return shapes.shape_config(cell["shape"], None if cell["part"] == "recovery" else args.layers)


def adapter_of(base) -> AsymGQAConfig:
    """4:1, or one head for three."""
    groups = max(1, base.config.num_key_value_heads // 4)
    return AsymGQAConfig(num_key_value_heads=groups, grouping="symmetric", task_type="CAUSAL_LM")


def expected(cell: dict, args: argparse.Namespace, free: int) -> tuple[int, Need]:
    """Bytes of the base and its adapter, and what the cell needs beyond them; from a model without weights."""
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config_of(cell, args), dtype=shapes.working_dtype(args.device))
        model = get_peft_model(base, adapter_of(base), low_cpu_mem_usage=True)
    trained, _ = model.get_nb_trainable_parameters()
    sizes = Sizes.of(base)
    on_gpu, weights = args.device == "cuda", sizes.weights
    if cell["4 bits"]:
        sizes, weights = sizes.in_4bit()
    if cell["part"] == "initialisation":
        batch = min(cell["tokens"], 4 * GRIDS[args.device]["length"])
        need = initialization_need(
            sizes, trained, cell["tokens"], batch, refits=True, gpu_free=free if on_gpu else None
        )
    elif cell["part"] == "recovery":
        need = recovery_need(
            sizes,
            trained,
            cell["tokens"],
            checkpointing=cell["checkpointing"],
            autocast=on_gpu,
            accumulates=True,
            on_gpu=on_gpu,
        )
    else:
        plain = base.config.num_attention_heads, adapter_of(base).num_key_value_heads, base.config.head_dim
        need = Need(merge_bytes(sizes, *plain), 0)
    return weights + SINGLE * trained, need


def measure(cell: dict, args: argparse.Namespace) -> dict:
    """In a process of its own: make the model, do what the cell says, read the peaks."""
    on_gpu, start = args.device == "cuda", time.perf_counter()
    if cell["part"] == "recovery":
        # Its libraries are not the model's memory; other parts do without them.
        from trl import SFTConfig  # noqa: F401

        from asymgqa_peft import AsymGQATrainer  # noqa: F401
    torch.zeros(1, device=args.device)
    process = psutil.Process().memory_info().rss
    with tempfile.TemporaryDirectory() as folder:
        model = wrapped(cell, args, folder)
        weights, need = expected(cell, args, free_memory(args.device))
        reset_peaks(args.device)
        {"initialisation": initialise, "recovery": recover, "merge": merge}[cell["part"]](model, cell, args, folder)
    row = {**cell, "layers": model_layers(cell, args), "seconds": round(time.perf_counter() - start, 1)}
    resident = peak_resident()
    if not on_gpu:
        row |= ratio("", weights + need.device + need.main, resident - process)
        return row
    row |= ratio("", weights + need.device, torch.cuda.max_memory_allocated())
    row["reserved, GB"] = torch.cuda.max_memory_reserved() / 1e9
    # What the process had taken before, CUDA's libraries included, is not estimated: it is in both.
    return row | ratio("main ", process + need.main, resident)


def ratio(name: str, estimate: int, measured: int) -> dict:
    """Columns of one kind of memory."""
    return {
        f"{name}estimate, GB": estimate / 1e9,
        f"{name}measured, GB": measured / 1e9,
        f"{name}ratio": estimate / measured,
    }


def reset_peaks(device: str) -> None:
    """Forget what making the model took."""
    shapes.reset_peak(device)
    if (resets := Path("/proc/self/clear_refs")).exists():
        resets.write_text("5")


def peak_resident() -> int:
    """Highest resident set of this process in bytes, on Linux since `reset_peaks`."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def model_layers(cell: dict, args: argparse.Namespace) -> int:
    """Decoder layers of the cell's model."""
    return config_of(cell, args).num_hidden_layers


def wrapped(cell: dict, args: argparse.Namespace, folder: str) -> PeftModel:
    """A random model under an adapter, made on the device; for 4 bits saved and loaded as recipes/recover.py does."""
    base = shapes.random_llama(config_of(cell, args), args.device, shapes.working_dtype(args.device))
    if cell["4 bits"]:
        base.save_pretrained(folder)
        del base
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        base = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=quantization, device_map={"": args.device}
        )
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=cell["checkpointing"])
    return get_peft_model(base, adapter_of(base))


def initialise(model: PeftModel, cell: dict, args: argparse.Namespace, folder: str) -> None:
    """From random tokens, four sequences at a time as recipes/recover.py reads them."""
    length = GRIDS[args.device]["length"]
    tokens = torch.randint(3, model.config.vocab_size, (cell["tokens"] // length, length))
    initialize_asymgqa_weights(model, tokens.split(4), progress=False)


def recover(model: PeftModel, cell: dict, args: argparse.Namespace, folder: str) -> None:
    """A few steps of distillation as recipes/recover.py makes them."""
    from datasets import Dataset
    from trl import SFTConfig

    from asymgqa_peft import AsymGQATrainer

    on_cpu, length = args.device == "cpu", GRIDS[args.device]["length"]
    sequences = cell["tokens"] // length
    tokens = torch.randint(3, model.config.vocab_size, (sequences * STEPS * MICRO_BATCHES, length))
    AsymGQATrainer(
        model=model,
        args=SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=sequences,
            gradient_accumulation_steps=MICRO_BATCHES,
            max_steps=STEPS,
            max_length=length,
            gradient_checkpointing=cell["checkpointing"],
            bf16=not on_cpu,
            use_cpu=on_cpu,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"input_ids": tokens.tolist()}),
        processing_class=placeholder_tokenizer(),
    ).train()


def merge(model: PeftModel, cell: dict, args: argparse.Namespace, folder: str) -> None:
    """Into a plain model."""
    model.merge_and_unload()


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=GRIDS, default=shapes.default_device())
    parser.add_argument("--shapes", nargs="+", choices=shapes.SHAPES, help="default: those of the device")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--layers", type=int, default=4, help="layers of initialisation and merge")
    parser.add_argument("--jobs", type=int, help="cells side by side (default: 3 on a GPU, 1 on a CPU)")
    # Set when the script calls itself.
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.jobs = args.jobs or {"cuda": 3, "cpu": 1}[args.device]
    return args


if __name__ == "__main__":
    main()
