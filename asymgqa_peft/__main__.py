"""`python -m asymgqa_peft plan MODEL`: what a model could be converted to, what that takes, and what to run next."""

from __future__ import annotations

import argparse
import json

from .estimates import CALIBRATION_TOKENS, CARDS, RECOVERY_TOKENS
from .footprint import Footprint
from .mistakes import in_one_line, model_called
from .planner import Choice, Plan, plan
from .tables import text_table


def main(arguments: list[str] | None = None) -> None:
    """Plan, and print a table with the commands or one JSON object; errors are one line."""
    args = parse_args(arguments)
    with in_one_line(model_called(args.model)):
        found = plan(args.model, args.context, args.batch, args.gpu)
    if args.json:
        print(json.dumps(found.to_dict()))
    else:
        print(described(found))


def described(found: Plan) -> str:
    """The plan for a terminal."""
    base, card = found.base, found.gpu.upper()
    held = f"{found.batch} x {found.context:,} tokens"
    lines = [
        f"{found.model}: {base.model_class} of {_short(base.parameters)} parameters, {base.query_slots} query and "
        f"{base.kv_heads} KV heads of {base.head_dim}",
        f"Its cache takes {base.kv_bytes_per_token:,} bytes a token: {_gigabytes(found.base_cache_bytes)} for {held}.",
        "",
        text_table([_row(number, choice, base, held) for number, choice in enumerate(found.choices, 1)]),
        "",
    ]
    lines += [f"Refused: {reason}" for reason in found.refused]
    for number, choice in enumerate(found.choices, 1):
        lines += [f"{number}: {note}" for note in choice.notes]
    for engines in dict.fromkeys(tuple(choice.engines) for choice in found.choices):
        numbers = [str(number) for number, choice in enumerate(found.choices, 1) if tuple(choice.engines) == engines]
        lines.append(f"Engines that have run checkpoints like {', '.join(numbers)}: {', '.join(engines)}.")
    lines += [
        "What an engine needs besides: recipes/ENGINES.md.",
        f"Memory and hours are estimates for one {card}. Memory is of the fullest moment, main memory without what "
        "Python and PyTorch take and with a merge there (recipes write it layer by layer, in less). Hours are the "
        "rates of one H200 on models of 1 B (recovery) and 7 B (initialisation), scaled by published bf16 ceilings; "
        "much smaller models reach less. "
        f"{CALIBRATION_TOKENS:,} tokens of initialisation, {RECOVERY_TOKENS:,} of recovery: the time grows with them.",
        '"4-bit": fits over a 4-bit base, whose speed was not measured; "-": does not fit.',
        "Groups of up to N heads are counted as the most unequal ones. Quality on this model is unknown before you "
        "measure it: recipes/RESULTS.md has what was measured on others.",
        "",
    ]
    lines += [f"{number}: {choice.command}" for number, choice in enumerate(found.choices, 1)]
    return "\n".join(lines)


def _row(number: int, choice: Choice, base: Footprint, held: str) -> dict[str, object]:
    candidate, needed = choice.candidate, choice.estimate
    up_to = "" if candidate.grouping == "symmetric" else "up to "
    row = {
        "": number,
        "heads": f"{candidate.num_key_value_heads} x {candidate.head_dim}",
        "groups of": f"{up_to}{candidate.largest_group}",
        "cache": f"{choice.share:.1%}",
        "bytes/token": choice.plain.kv_bytes_per_token,
        held: _gigabytes(choice.cache_bytes),
        "parameters": _short(choice.plain.parameters),
        "prefill FLOPs": f"{choice.plain.prefill_flops_per_token / base.prefill_flops_per_token:.2f}x",
        "class": choice.plain.model_class.removesuffix("ForCausalLM"),
        "GPU memory": None,
        "main memory": None,
        "initialise": None,
        "recover": None,
    }
    if needed:
        row["GPU memory"] = _gigabytes(max(needed.initialization_bytes, needed.recovery_bytes))
        row["main memory"] = _gigabytes(needed.main_bytes)
        row["initialise"] = row["recover"] = "4-bit"
        if not needed.load_in_4bit:
            row["initialise"] = _duration(needed.initialization_hours)
            row["recover"] = _duration(needed.recovery_hours)
    return row


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"


def _duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:.2g} h"
    minutes = 60 * hours
    return f"{minutes:.2g} min" if minutes >= 1 else f"{60 * minutes:.2g} s"


def _short(count: int) -> str:
    return f"{count / 1e9:.3g} B" if count >= 1e9 else f"{count / 1e6:.3g} M"


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(prog="python -m asymgqa_peft", description=__doc__)
    planning = parser.add_subparsers(required=True).add_parser("plan", help="what a model could be converted to")
    planning.add_argument("model", help="folder or Hub id; its config.json is read, no weights")
    planning.add_argument(
        "--context", type=int, help="tokens of each cached sequence (default: what the model takes, up to 32,768)"
    )
    planning.add_argument("--batch", type=int, default=1, help="cached sequences (default %(default)s)")
    planning.add_argument("--gpu", choices=CARDS, default="h100", help="card to convert on (default %(default)s)")
    planning.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
