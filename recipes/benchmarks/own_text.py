r"""Text that a model writes itself, to recover on where there is little text like that of later use.

    python recipes/benchmarks/own_text.py --model DIR --prompts train.txt --tokens 2e6 --out own.txt.xz
    python recipes/benchmarks/own_text.py --model DIR --chat --tokens 8e6 --out chat.txt.xz

Samples from the model's own distribution (temperature 1, nothing cut off), each from a few tokens of the given text,
as LLM-QAT makes its data (Liu et al. 2023, arXiv 2305.17888). With --chat each begins with what the chat template
writes before a user's words, so that the model makes up a request, as in Magpie (Xu et al. 2024, arXiv 2406.08464),
and goes on to its reply. `wide_heads.py --text` reads the file.
"""

from __future__ import annotations

import argparse
import lzma
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, set_seed

from recipes.stdlib_text import token_ids
from recipes.text_file import read_text


def main(arguments: list[str] | None = None) -> None:
    """Write the file."""
    args = parse_args(arguments)
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if args.chat:
        ids = before_a_request(tokenizer)
        begun = len(ids)
    else:
        ids = token_ids([read_text(path) for path in args.prompts], tokenizer)
        begun = args.prompt_tokens
    if args.length <= begun:
        raise SystemExit(f"--length {args.length}: a sample begins with {begun} tokens already, make it longer.")
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to("cuda" if on_gpu else "cpu").eval()
    # Whatever ends a text for a chat, here the model goes on with the next one.
    model.generation_config.eos_token_id = None
    written, begin = 0, time.perf_counter()
    with lzma.open(args.out, "wt", encoding="utf-8", preset=1) as file:
        while written < args.tokens:
            if args.chat:
                prompts = ids.expand(args.batch_size, begun).to(model.device)
            else:
                starts = torch.randint(len(ids) - begun, (args.batch_size, 1))
                prompts = ids[starts + torch.arange(begun)].to(model.device)
            sampled = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=args.length - begun,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                # Some models ask for a penalty, which would make another distribution of it.
                repetition_penalty=1.0,
                pad_token_id=tokenizer.eos_token_id,
            )
            for text in texts(sampled, tokenizer, args.chat):
                file.write(text + "\n\n")
            written += sampled.numel()
            seconds = time.perf_counter() - begin
            print(f"{written:,} tokens after {seconds:.0f} s, {written / seconds:,.0f} tokens/s", flush=True)


def before_a_request(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Tokens (T,) that the chat template writes before a user's words, a default system message with them."""
    if not tokenizer.chat_template:
        raise SystemExit("--chat: this tokenizer has no chat template, give the text to begin with by --prompts.")
    requests = []
    for words in ("Why", "3"):
        text = tokenizer.apply_chat_template([{"role": "user", "content": words}], tokenize=False)
        # The template has written the special tokens.
        requests.append(tokenizer(text, add_special_tokens=False).input_ids)
    # Tokens that are the same whatever the words: many tokenizers join a blank before the first word to it.
    common = 0
    while requests[0][common] == requests[1][common]:
        common += 1
    return torch.tensor(requests[0][:common])


def texts(sampled: torch.Tensor, tokenizer: PreTrainedTokenizerBase, chat: bool) -> list[str]:
    """Samples (B, T) as text; conversations with their special tokens, as which the tokenizer reads them again.

    Other tokens may come back as others of the same text, since a model also spells a word in tokens that the
    tokenizer would not choose, and a sample may end within a character. Of 12 samples of SmolLM2-135M-Instruct, 320
    tokens each, 4 came back token by token; the others were at most 6 tokens shorter or 2 longer.
    """
    return tokenizer.batch_decode(sampled, skip_special_tokens=not chat, clean_up_tokenization_spaces=False)


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the model")
    begin = parser.add_mutually_exclusive_group(required=True)
    begin.add_argument("--prompts", type=Path, nargs="+", help="text to take the beginnings from")
    begin.add_argument("--chat", action="store_true", help="the model writes requests and replies instead")
    parser.add_argument("--out", type=Path, required=True, help=".txt.xz file to write")
    parser.add_argument("--tokens", type=float, default=2e6, help="to write, at least")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sample, its beginning included")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="tokens of --prompts in a sample")
    parser.add_argument("--batch-size", type=int, default=1024, help="samples at a time")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
