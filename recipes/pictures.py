r"""Draw a conversion: groups and similar heads, perplexity against the KV cache, losses of recovery.

    python recipes/pictures.py                                              # the README's two, on the bundled model
    python recipes/pictures.py --report out/llama2-7b/initialization.json --layer 16 --output out/pictures
    python recipes/pictures.py --quality quality.json --output out/pictures
    python recipes/pictures.py --losses distilled=out/a/checkpoint-500/trainer_state.json sft=losses.json \
        --output out/pictures

Without --report, --quality and --losses: the heads of one layer of the bundled model, which is initialised for it at
4:1 (about a minute on 2 cores), and the measured points of recipes/pictures/quality.json. Needs the extra plot. Every
picture is written as PNG and SVG.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from asymgqa_peft.initialize import InitializationReport, initialize_asymgqa_weights
from asymgqa_peft.plotting import plot_groups, plot_losses, plot_quality, plot_similarities

RECIPES = Path(__file__).parent
PICTURES = RECIPES / "pictures"


def main(arguments: list[str] | None = None) -> list[Path]:
    """Draw what was asked for; returns the files written."""
    args = parse_args(arguments)
    try:
        written = draw(args)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error
    for path in written:
        print(f"{path}  {path.stat().st_size / 1e3:.0f} kB")
    return written


def draw(args: argparse.Namespace) -> list[Path]:
    """The README's pictures, or those of the files given. All files are read before anything is drawn."""
    if not (args.report or args.quality or args.losses):
        quality = plot_quality(read_points(PICTURES / "quality.json"), args.output / "quality")
        return [*quality, *draw_heads(initialise_bundled_model(), args.layer, args.output)]
    report = args.report and InitializationReport.load(args.report)
    points = args.quality and read_points(args.quality)
    # A name that is given twice would hide the first of its files.
    curves = {name: read_log_history(path) for name, path in args.losses}
    if len(curves) < len(args.losses):
        raise ValueError(f"--losses: {len(args.losses)} files have {len(curves)} names: give each its own.")
    written = []
    if args.report:
        if report.similarity_before:
            # Choices that need no statistics leave none to draw.
            written += draw_heads(report, args.layer, args.output)
        written += plot_groups(report, args.output / "groups")
    if args.quality:
        written += plot_quality(points, args.output / "quality")
    if args.losses:
        written += plot_losses(curves, args.output / "losses", key=args.loss)
    return written


def draw_heads(report: InitializationReport, layer: int | None, output: Path) -> list[Path]:
    """Similarity of one layer's heads, by default of the middle layer."""
    layers = len(report.head_groups)
    layer = layers // 2 if layer is None else layer
    if not 0 <= layer < layers:
        raise ValueError(f"--layer {layer}: the model has layers 0 to {layers - 1}.")
    return plot_similarities(
        report.similarity_before[layer],
        report.similarity_after[layer],
        report.head_groups[layer],
        output / "similarities",
    )


def initialise_bundled_model() -> InitializationReport:
    """The bundled model at 4:1, calibrated on all validation texts of the standard library.

    Without the output refit, which changes neither groups nor similarities: both are of the original model.
    """
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from asymgqa_peft import AsymGQAConfig
    from recipes.stdlib_text import token_blocks, validation_texts

    folder = RECIPES / "tiny_model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    groups = base.config.num_attention_heads // 4
    config = AsymGQAConfig(num_key_value_heads=groups, refit_output=False, task_type="CAUSAL_LM")
    blocks = token_blocks(validation_texts(), tokenizer, 512)
    return initialize_asymgqa_weights(get_peft_model(base, config), blocks.split(8))


def read_points(path: Path) -> Sequence[Mapping]:
    """Points of `plot_quality`: the list "rows" of what quality_per_byte.py or a hand wrote."""
    value = read_json(path)
    rows = None
    if isinstance(value, dict):
        rows = value.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(
            f'{path} has no list "rows" of points: {{"rows": [{{"arm", "kv_bytes_per_token", "perplexity"}}, ...]}}.'
        )
    return rows


def read_log_history(path: Path) -> Sequence:
    """A Trainer's log: a trainer_state.json, or the list log_history alone."""
    value = read_json(path)
    log = value
    if isinstance(value, dict):
        log = value.get("log_history")
    if not isinstance(log, list):
        raise ValueError(f"{path} holds no log_history: give a checkpoint's trainer_state.json, or the list itself.")
    return log


def read_json(path: Path) -> dict | list:
    """The file's content; ValueError with its name if there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}).") from error


def named_file(text: str) -> tuple[str, Path]:
    """NAME=FILE."""
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not NAME=FILE, e.g. distilled=out/checkpoint-500/trainer_state.json"
        )
    return name, Path(path)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options; the module's docstring shows their use."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--report", type=Path, help="what report.save() wrote: groups and costs per layer, similarities"
    )
    parser.add_argument("--layer", type=int, help="layer of the similarities; default: the middle one")
    parser.add_argument("--quality", type=Path, help="JSON whose rows have arm, kv_bytes_per_token and perplexity")
    parser.add_argument(
        "--losses", type=named_file, nargs="+", default=[], metavar="NAME=FILE", help="log histories, a curve each"
    )
    parser.add_argument("--loss", default="loss", help="entry of the logs to draw, e.g. eval_loss or sft_loss")
    parser.add_argument("--output", type=Path, default=PICTURES, help="folder; files in it are replaced")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
