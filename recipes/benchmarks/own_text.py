r"""Text that a model writes itself, to recover on where there is little text like that of later use.

    python recipes/benchmarks/own_text.py --model DIR --prompts train.txt --tokens 2e6 --out own.txt.xz

Samples from the model's own distribution (temperature 1, nothing cut off), each from a few tokens of the given text,
as LLM-QAT makes its data (Liu et al. 2023, arXiv 2305.17888). `wide_heads.py --text` reads the file.
"""

from __future__ import annotations

import argparse
import lzma
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from recipes.stdlib_text import token_ids


def main(arguments: list[str] | None = None) -> None:
    """Write the file."""
    args = parse_args(arguments)
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to("cuda" if on_gpu else "cpu").eval()
    # Whatever ends a text for a chat, here the model goes on with the next one.
    model.generation_config.eos_token_id = None
    ids = token_ids([open_text(path) for path in args.prompts], tokenizer)
    written, begin = 0, time.perf_counter()
    with lzma.open(args.out, "wt", encoding="utf-8", preset=1) as file:
        while written < args.tokens:
            starts = torch.randint(len(ids) - args.prompt_tokens, (args.batch_size, 1))
            prompts = ids[starts + torch.arange(args.prompt_tokens)].to(model.device)
            sampled = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=args.length - args.prompt_tokens,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                pad_token_id=tokenizer.eos_token_id,
            )
            for text in tokenizer.batch_decode(sampled, skip_special_tokens=True):
                file.write(text + "\n\n")
            written += sampled.numel()
            print(f"{written:,} tokens after {time.perf_counter() - begin:.0f} s", flush=True)


def open_text(path: Path) -> str:
    """A text file, .xz or plain."""
    with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as file:
        return file.read()


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--prompts", type=Path, nargs="+", required=True, help="text to take the beginnings from")
    parser.add_argument("--out", type=Path, required=True, help=".txt.xz file to write")
    parser.add_argument("--tokens", type=float, default=2e6, help="to write, at least")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sample, its beginning included")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="tokens of the beginning")
    parser.add_argument("--batch-size", type=int, default=1024, help="samples at a time")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
