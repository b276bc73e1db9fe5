"""The table of what engines did; exits with 1 if one failed on a checkpoint of ours.

python tests/engines/table.py out/engines/results "CHECKPOINT..." NAME...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from recipes.reporting import print_report

CONTROL = "base"  # not ours: shows what an engine makes of the model before conversion
COLUMNS = ("engine", "version", "checkpoint", "class", "largest logit difference", "greedy tokens", "KV heads")


def main(results: Path, checkpoints: list[str], names: list[str]) -> bool:
    rows = [read_row(results, name, checkpoint) for name in names for checkpoint in checkpoints]
    print_report(rows)
    return all(row["result"] == "OK" for row in rows if not row["checkpoint"].startswith(CONTROL))


def read_row(results: Path, name: str, checkpoint: str) -> dict:
    """What compare.py wrote; a row that says so if the engine was not installed or died."""
    file = results / f"{name}.{checkpoint}.json"
    row = {"result": f"FAIL: no result, see {results.parent / 'logs' / name}.log"}
    row |= json.loads(file.read_text()) if file.exists() else {}
    row |= {"engine": name, "checkpoint": f"{CONTROL} (control)" if checkpoint == CONTROL else checkpoint}
    return {column: row.get(column) for column in (*COLUMNS, "tokenizer", "result")}


if __name__ == "__main__":
    sys.exit(not main(Path(sys.argv[1]), sys.argv[2].split(), sys.argv[3:]))
