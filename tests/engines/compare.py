"""Run one engine on one checkpoint and hold what it computes against the reference; runs in the engine's environment.

    python tests/engines/compare.py NAME RUNNER out/engines/checkpoints/unequal out/engines/results

RUNNER is a module beside this one with a class `Engine` (see serve_transformers.py). Prints one line, writes
results/NAME.CHECKPOINT.json, and exits with 1 where the engine fails.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
import tempfile
import traceback
from pathlib import Path

import numpy as np
from safetensors import safe_open

# Of logits, by the checkpoint's dtype: transformers itself is off by up to 0.2 in bfloat16.
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.25}
APART = 1.0  # another model's logits differ by more than this, or the comparison shows nothing


def main(name: str, runner: str, checkpoint: Path, results: Path) -> bool:
    before = digest(checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    row = {"engine": name, "version": None, "checkpoint": checkpoint.name, "class": config["architectures"][0]}
    try:
        with tempfile.TemporaryDirectory() as scratch:
            engine_class = importlib.import_module(runner).Engine
            row["version"] = engine_class.version
            engine = engine_class(checkpoint, Path(scratch), config["dtype"])
            row |= measure(engine, checkpoint, TOLERANCES[config["dtype"]])
        failures = judge(row, checkpoint, TOLERANCES[config["dtype"]])
    except (Exception, SystemExit) as error:  # whatever an engine raises is its result, a converter's refusal too
        traceback.print_exc()
        failures = [f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"]
    if digest(checkpoint) != before:
        failures.append("the checkpoint was changed")
    row["result"] = "FAIL: " + "; ".join(failures) if failures else "OK"
    results.mkdir(parents=True, exist_ok=True)
    (results / f"{name}.{checkpoint.name}.json").write_text(json.dumps(row))
    print(" | ".join(f"{column}: {value}" for column, value in row.items()), flush=True)
    return not failures


def measure(engine, checkpoint: Path, tolerance: float) -> dict:
    """What the table shows of one engine on one checkpoint."""
    reference, facts = load_reference(checkpoint)
    cases = range(len(facts["prompts"]))
    logits = [engine.logits(reference[f"ids.{case}"].tolist()) for case in cases]
    same = all(same_tokens(engine, reference, case, tolerance) for case in cases)
    others = [load_reference(other)[0] for other in other_checkpoints(checkpoint)]
    return {
        # NumPy's maximum and minimum, unlike Python's, do not lose a NaN.
        "largest logit difference": float(np.max([difference(logits[n], reference[f"logits.{n}"]) for n in cases])),
        "to another model": float(np.min([difference(logits[0], other["logits.0"]) for other in others])),
        "greedy tokens": "same" if same else "different",
        "KV heads": engine.kv_heads(),
        "tokenizer": compare_tokenizer(engine, reference, facts["prompts"]),
    }


def judge(row: dict, checkpoint: Path, tolerance: float) -> list[str]:
    """What is wrong with a row, empty if nothing."""
    expected = load_reference(checkpoint)[1]["kv_heads"]
    return [
        failure
        for failure, failed in {
            f"logits differ by more than {tolerance}": not row["largest logit difference"] <= tolerance,
            "another model's logits are no further": not row["to another model"] > APART,
            "other tokens": row["greedy tokens"] != "same",
            f"not {expected} KV heads": row["KV heads"] != expected,
        }.items()
        if failed
    ]


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest absolute difference of two (T, V); NaN if either holds one."""
    if ours.shape != theirs.shape:
        raise ValueError(f"the engine's logits have shape {ours.shape}, the reference's {theirs.shape}")
    return float(np.abs(ours - theirs).max())


def same_tokens(engine, reference: dict, case: int, tolerance: float) -> bool:
    """Whether a greedy continuation is the reference's up to where logits within the tolerance allow another."""
    close = np.flatnonzero(reference[f"margins.{case}"] < 2 * tolerance)
    expected = reference[f"greedy.{case}"][: close[0] if len(close) else None].tolist()
    return not expected or engine.greedy(reference[f"ids.{case}"].tolist(), len(expected)) == expected


def compare_tokenizer(engine, reference: dict, prompts: list[str]) -> str:
    """Whether the engine reads the prompts as the same ids; it may not be able to load the tokenizer at all."""
    try:
        read = [list(engine.tokenize(prompt)) for prompt in prompts]
    except Exception as error:
        traceback.print_exc()
        return f"not loaded ({type(error).__name__})"
    expected = [reference[f"ids.{case}"].tolist() for case in range(len(prompts))]
    return "same ids" if read == expected else "other ids"


def load_reference(checkpoint: Path) -> tuple[dict[str, np.ndarray], dict]:
    """ids.N (T,), logits.N (T, V), greedy.N and margins.N (n,) of prompt N; all prompts' text, the KV heads."""
    with safe_open(checkpoint.with_name(reference_name(checkpoint) + ".reference.safetensors"), "numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
        facts = {name: json.loads(value) for name, value in file.metadata().items()}
    return tensors, facts


def other_checkpoints(checkpoint: Path) -> list[Path]:
    files = checkpoint.parent.glob("*.reference.safetensors")
    names = sorted(file.name.removesuffix(".reference.safetensors") for file in files)
    return [checkpoint.with_name(name) for name in names if name != reference_name(checkpoint)]


def reference_name(checkpoint: Path) -> str:
    """NAME.DTYPE is another dtype of NAME: held against the same adapter."""
    return checkpoint.name.partition(".")[0]


def digest(folder: Path) -> str:
    """Of every file's name and content: what an engine loads is what the package wrote."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()


if __name__ == "__main__":
    sys.exit(not main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])))
