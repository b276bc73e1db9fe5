"""Merge an adapter into its base: a plain checkpoint with tokenizer and model card, pushed to the Hub if asked.

    python recipes/merge_and_push.py out/adapter --output out/plain
    python recipes/merge_and_push.py me/adapter --output out/plain --push me/model-gqa
    python recipes/merge_and_push.py out/adapter --output out/published --adapter-only --push me/model-gqa-adapter

An adapter or base is a folder or a repository on the Hub. The base is read unquantised in --dtype from its files and
merged on the CPU as the output is written: no more than a layer and a file of --max-shard-size is in memory. The
output is written beside and renamed at the end; a repository is private unless --public, and changes in one commit.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file

from asymgqa_peft import AsymGQAConfig, InitializationReport, export_report
from asymgqa_peft.card import Conversion, base_licence, model_card
from asymgqa_peft.hub import check_push_target, name_base, push_folder, save_merged, write_card
from asymgqa_peft.mistakes import in_one_line, model_called
from asymgqa_peft.published import check_files
from recipes.folders import replacing
from recipes.inputs import checked_base

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class Options:
    """What to publish and how, as on the command line, whose help says more; its defaults stand here.

    Attributes:
        adapter: folder or repository of the adapter.
        output: folder to write.
        overwrite: replace a model that `output` holds.
        adapter_only: save and push the adapter instead of the merged model.
        base: folder or repository of the base; None is what the adapter names.
        dtype: dtype of the merged weights, or "auto".
        max_shard_size: largest weights file.
        duplicate_kv_heads, cached_tokens: layout of unequal groups, as for `merge_and_unload`.
        push: repository to push to.
        public: make a new repository public.
        exist_ok: replace what the repository holds.
        base_model: the base on the Hub, if it is loaded from a folder.
        report, evaluation: JSON files that the card reads.
        calibration_data, recovery_data: what the initialisation and the training read, in words.
    """

    adapter: str
    output: Path
    overwrite: bool = False
    adapter_only: bool = False
    base: str | None = None
    dtype: str = "auto"
    max_shard_size: str = "5GB"
    duplicate_kv_heads: bool = False
    cached_tokens: int | None = None
    push: str | None = None
    public: bool = False
    exist_ok: bool = False
    base_model: str | None = None
    report: Path | None = None
    evaluation: Path | None = None
    calibration_data: str | None = None
    recovery_data: str | None = None


def main(arguments: list[str] | None = None) -> None:
    publish(parse_args(arguments))


def publish(args: Options) -> None:
    """Write the merged model, or the adapter alone, and push it if asked."""
    card = card_arguments(args)
    with replacing(args.output, args.overwrite) as folder:
        if args.push:
            with in_one_line(f"--push {args.push}"):
                check_push_target(args.push, private=not args.public, exist_ok=args.exist_ok)
        config = load_adapter_config(args.adapter)
        write = write_adapter if args.adapter_only else write_merged
        write(folder, config, args, name=args.push or args.output.name, **card)
    print(f"Saved in {args.output}", flush=True)
    if args.push:
        print(f"Pushed to {push(args)}")


def write_merged(folder: Path, config: AsymGQAConfig, args: Options, name: str, **card) -> None:
    """Merge base and adapter while the plain model is written, tell what that saves."""
    source = base_source(config, args)
    checked_base(source, base_revision(config, args), args.adapter)
    # Weights stay in their files until they are used; others than safetensors are written anew beside the output.
    on_disk = {"device_map": {"": "disk"}, "offload_folder": folder.with_name("offload")}
    base = AutoModelForCausalLM.from_pretrained(
        source, revision=base_revision(config, args), dtype=args.dtype, **on_disk
    )
    # Not PeftModel.from_pretrained, which would write an offloaded base anew.
    model = get_peft_model(base, config)
    set_peft_model_state_dict(model, load_peft_weights(args.adapter))
    layout = {"duplicate_kv_heads": args.duplicate_kv_heads, "cached_tokens": args.cached_tokens}
    report = export_report(model, **layout)
    print(report, flush=True)
    tokenizer = find_tokenizer(args.adapter, source)
    conversion = Conversion.of(model, args.base_model)
    shards = {"max_shard_size": args.max_shard_size}
    save_merged(model, tokenizer, folder, conversion, name=name, **shards, **layout, **card)
    report.save(folder / "export_report.json")
    copy_sentencepiece(source, base_revision(config, args), folder)


def write_adapter(folder: Path, config: AsymGQAConfig, args: Options, name: str, **card) -> None:
    """Copy the adapter and describe it; no model is loaded."""
    source = base_source(config, args)
    if args.push and not args.base_model and Path(source).exists():
        raise SystemExit(f"--push {args.push}: the base {source} is a folder: name its repository with --base-model.")
    adapter = Path(args.adapter)
    if not adapter.exists():
        adapter = Path(snapshot_download(args.adapter, allow_patterns=list(ADAPTER_FILES)))
    elif any((adapter / file).is_symlink() for file in ADAPTER_FILES):
        # In the Hub's cache all files are links; elsewhere they may lead to what is not to be published.
        raise SystemExit(
            f"{adapter}: {' or '.join(ADAPTER_FILES)} is a symbolic link, put the files themselves there."
        )
    with in_one_line(args.adapter):
        for file in ADAPTER_FILES:
            shutil.copy(adapter / file, folder / file)
        check_files(folder, ADAPTER_FILES)
    base = checked_base(source, base_revision(config, args), args.adapter)
    conversion = Conversion.from_configs(config, base, base_model=args.base_model)
    if args.push:
        name_base(folder / "adapter_config.json", conversion)
    if tokenizer := find_tokenizer(args.adapter, source):
        tokenizer.save_pretrained(folder)
    licence = base_licence(conversion.base_source, conversion.base_revision)
    write_card(folder, model_card(conversion, name=name, licence=licence, **card))


def push(args: Options) -> str:
    """Upload the finished output; where that breaks off, say how to repeat it without merging again."""
    options = {"private": not args.public, "exist_ok": args.exist_ok}
    try:
        return push_folder(args.output, args.push, **options)
    except ConnectionError as error:
        call = f"push_folder({str(args.output)!r}, {args.push!r}, **{options})"
        again = f'python -c "from asymgqa_peft.hub import push_folder; {call}"'
        raise SystemExit(f"{error}\nThe result lies in {args.output}. To push it again:\n    {again}") from error


def load_adapter_config(adapter: str) -> AsymGQAConfig:
    """The adapter's configuration, before any weights are read."""
    with in_one_line(model_called(adapter)):
        config = PeftConfig.from_pretrained(adapter)
    if not isinstance(config, AsymGQAConfig):
        raise SystemExit(f"{adapter} is a {config.peft_type.value} adapter, not of asymgqa_peft: merge it with PEFT.")
    return config


def base_source(config: AsymGQAConfig, args: Options) -> str:
    """Folder or repository to load the base from."""
    source = args.base or config.base_model_name_or_path
    if not source:
        raise SystemExit(f"{args.adapter} does not name its base: pass it with --base.")
    return source


def base_revision(config: AsymGQAConfig, args: Options) -> str | None:
    """The revision that the adapter names, unless another base is given."""
    return None if args.base else config.revision


def find_tokenizer(*sources: str) -> PreTrainedTokenizerBase | None:
    """The first tokenizer found: the adapter's, which training may have changed, or the base's."""
    for source in sources:
        try:
            return AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            reason = error
    print(f"No tokenizer is saved, none was found: {reason}", flush=True)
    return None


def copy_sentencepiece(source: str, revision: str | None, folder: Path) -> None:
    """The base's tokenizer.model, which transformers 5 does not save beside tokenizer.json; llama.cpp prefers it."""
    file = cached_file(source, "tokenizer.model", revision=revision, _raise_exceptions_for_missing_entries=False)
    # Links are how the Hub's cache keeps files; one in somebody's folder is not followed.
    if file is not None and not (Path(source).exists() and Path(file).is_symlink()):
        shutil.copy(file, folder)


def card_arguments(args: Options) -> dict:
    """What the card is told beside the adapter's own facts."""
    evaluation = report = None
    if args.evaluation:
        with in_one_line("--evaluation"):
            evaluation = json.loads(args.evaluation.read_text(encoding="utf-8"))
    if args.report:
        with in_one_line("--report"):
            report = InitializationReport.load(args.report)
    return {
        "report": report,
        "evaluation": evaluation["rows"] if isinstance(evaluation, dict) else evaluation,
        "calibration_data": args.calibration_data,
        "recovery_data": args.recovery_data,
    }


def parse_args(arguments: list[str] | None) -> Options:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # what is not given is left to the defaults of Options
    )
    parser.add_argument("adapter", help="folder or repository of an asymgqa_peft adapter")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a model that --output holds")
    parser.add_argument("--adapter-only", action="store_true", help="do not merge: save and push the adapter")
    parser.add_argument("--base", help="folder or repository of the base; default: what the adapter names")
    parser.add_argument("--dtype", help="dtype of the merged weights; default: the base's own")
    parser.add_argument("--max-shard-size", help=f"largest weights file (default {Options.max_shard_size})")
    layout = parser.add_argument_group("unequal groups")
    layout.add_argument(
        "--duplicate-kv-heads",
        action="store_true",
        help="store large groups' K/V heads more than once where that takes fewer bytes than padding; the cache then "
        "holds more than num_key_value_heads",
    )
    layout.add_argument(
        "--cached-tokens",
        type=int,
        metavar="N",
        help="tokens in the cache, over all sequences, for that comparison; default: one sequence of full length",
    )
    hub = parser.add_argument_group("Hub (log in with `hf auth login` or set HF_TOKEN)")
    hub.add_argument("--push", metavar="OWNER/NAME", help="repository to push to")
    hub.add_argument("--public", action="store_true", help="make a new repository public")
    hub.add_argument("--exist-ok", action="store_true", help="replace what the repository holds")
    card = parser.add_argument_group("model card (what is not given is stated as such)")
    card.add_argument("--base-model", metavar="OWNER/NAME", help="the base on the Hub, if loaded from a folder")
    card.add_argument("--report", type=Path, help="JSON of the initialisation report")
    card.add_argument("--evaluation", type=Path, help='JSON: rows such as {"model": "base", "perplexity": 9.1}')
    card.add_argument("--calibration-data", help="what the initialisation read, in words")
    card.add_argument("--recovery-data", help="what the adapter was trained on, in words")
    args = Options(**vars(parser.parse_args(arguments)))
    if args.dtype != "auto" and not isinstance(getattr(torch, args.dtype, None), torch.dtype):
        parser.error(f"--dtype {args.dtype}: not a dtype of torch, e.g. bfloat16.")
    return args


if __name__ == "__main__":
    main()
