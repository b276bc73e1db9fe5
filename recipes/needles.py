"""Does a model still find what stands far back in a long text? Passkey and multi-key needle tests.

    python recipes/needles.py out/smollm2 out/mine/adapter out/mine/plain --output needles.jsonl
    python recipes/needles.py recipes/tiny_model out/mine/plain --contexts 256 512 --repeats 2     # a trial on a CPU

`passkey` hides one number in a text that repeats itself (Mohtashami & Jaggi, 2023, arXiv 2305.16300); `multikey` hides
four numbers with names and asks for one (`niah_multikey_1` of RULER, Hsieh et al., 2024, arXiv 2404.06654). RULER's
own tasks in lm-eval download essays and word lists; the text here is made up by a seeded generator instead, the same
on every machine. Every model answers the same prompts, those of the first one's tokenizer and chat template, whose
reply is begun for it ("The pass key is"). Three measures:

    exact match             share of greedy replies whose first number is the right one
    found                   share of prompts whose right number greedy gives among those tokens alone that hold only
                            digits and blanks: has the model found it, whatever words it would rather begin with?
                            Looks as far as the answer goes: a longer number that begins with it counts
    token accuracy, nats    of the right answer's tokens, each predicted after the right ones before it: a graded
                            measure, which still moves where a small model answers nothing right

A model is a checkpoint or an adapter, a folder or a repository. Prints a line of JSON for every model, test and
context as soon as it is known, with every prompt's result, then a table. Intervals are 95 %: Wilson's for shares, and
for the differences to the first model, prompt by prompt, the normal one.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import groupby
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from recipes.evaluate import load_model
from recipes.folders import check_writable
from recipes.inputs import checked_models, load_tokenizer
from recipes.reporting import print_report, provenance

NORMAL_95 = 1.96
REPLY_MARGIN = 4
"""Tokens that a greedy reply may be longer than the answer."""

# The published passkey filler; and words of the multi-key filler and of its keys, which share none.
PASSKEY_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
ADJECTIVES = ["old", "young", "tall", "quiet", "cheerful", "tired", "clever", "honest", "famous", "lonely"]
PEOPLE = ["baker", "teacher", "sailor", "farmer", "doctor", "painter", "driver", "student", "singer", "tailor"]
VERBS = ["carried", "painted", "forgot", "bought", "repaired", "described", "borrowed", "cleaned", "sold", "hid"]
THINGS = ["lamp", "basket", "ladder", "violin", "map", "kettle", "blanket", "mirror", "clock", "barrel"]
PLACES = ["harbour", "market", "station", "garden", "library", "bridge", "valley", "school", "museum", "river"]
TIMES = ["in the morning", "after lunch", "before the storm", "last winter", "on Sunday", "at night", "every day"]
KEY_ADJECTIVES = ["amber", "brisk", "coral", "dusty", "elastic", "frozen", "golden", "hollow", "ivory", "jagged"]
KEY_NOUNS = ["falcon", "glacier", "hammer", "island", "jacket", "kitten", "lantern", "meadow", "needle", "orchid"]


@dataclass(frozen=True)
class Task:
    """What one prompt hides and asks, before it is given its length.

    Attributes:
        head, question: what stands before and after the long text.
        needles: sentences to hide, each with its depth, 0 at the beginning of the text to 1 at its end.
        filler: endless sentences to hide them in.
        reply: how the reply begins.
        answer: the number that goes on from there.
    """

    head: str
    needles: list[tuple[float, str]]
    filler: Iterator[str]
    question: str
    reply: str
    answer: str


@dataclass(frozen=True)
class Prompt:
    """A prompt and the tokens of its right answer."""

    depth: float
    ids: list[int]
    answer_ids: list[int]
    answer: str


@dataclass
class Results:
    """What a model made of some prompts, in their order: whether greedy is right, and greedy among digits and blanks,
    token accuracy, nats per token, and what greedy said."""

    exact: list[bool] = field(default_factory=list)
    found: list[bool] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    nats: list[float] = field(default_factory=list)
    replies: list[str] = field(default_factory=list)

    def extend(self, other: Results) -> None:
        """Append another's."""
        self.exact += other.exact
        self.found += other.found
        self.accuracy += other.accuracy
        self.nats += other.nats
        self.replies += other.replies


def main(arguments: list[str] | None = None) -> list[dict]:
    """Measure every model and print the table, whose rows are returned."""
    args = parse_args(arguments)
    if args.output:
        check_writable(args.output.parent)
    check_contexts(args)
    tokenizer = load_tokenizer(args.models[0])
    prompts = {}
    for test in args.tests:
        for context in args.contexts:
            prompts[test, context] = make_prompts(test, context, tokenizer, args)
    facts = provenance(args.device)
    first: dict[tuple, Results] = {}
    rows = []
    for name in args.models:
        model = load_model(name, args)
        measured = {}
        for key, chosen in prompts.items():
            measured[key] = measure(model, chosen, tokenizer, f"{name} {key[0]} {key[1]}", args)
            line = {"model": name, "test": key[0], "context": key[1], **summary(chosen, measured[key], first.get(key))}
            tell(line | facts | {"seed": args.seed, "dtype": str(model.dtype)}, args.output)
        del model  # not two at a time
        rows += table_rows(name, measured, first, args)
        first = first or measured
    print_report(rows, args.device, settings=vars(args))
    return rows


def check_contexts(args: argparse.Namespace) -> None:
    """Exit, before anything is loaded, if a model is none, or too short for a context, or of another vocabulary."""
    for name, config in checked_models(args.models, same_vocabulary=True).items():
        longest = getattr(config, "max_position_embeddings", None)
        if longest is not None and max(args.contexts) > longest:
            raise SystemExit(f"--contexts {max(args.contexts)}: {name} takes {longest} tokens, leave out longer ones.")


def passkey(depth: float, rng: random.Random) -> Task:
    """One number of five digits."""
    key = str(rng.randrange(10_000, 100_000))
    return Task(
        head="There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
        "I will quiz you about the important information there.",
        needles=[(depth, f"The pass key is {key}. Remember it. {key} is the pass key.")],
        filler=repeated_filler(),
        question="What is the pass key?",
        reply="The pass key is",
        answer=key,
    )


def multikey(depth: float, rng: random.Random) -> Task:
    """Four numbers of seven digits, the one asked for at `depth`, the others anywhere."""
    keys = []
    for adjective, noun in zip(rng.sample(KEY_ADJECTIVES, 4), rng.sample(KEY_NOUNS, 4), strict=True):
        keys.append(f"{adjective}-{noun}")
    values = [str(value) for value in rng.sample(range(1_000_000, 10_000_000), 4)]
    depths = [depth, rng.random(), rng.random(), rng.random()]
    needles = []
    for place, key, value in zip(depths, keys, values, strict=True):
        needles.append((place, f"One of the special magic numbers for {key} is: {value}."))
    return Task(
        head="A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.",
        needles=needles,
        filler=invented_filler(rng),
        question=f"What is the special magic number for {keys[0]} mentioned in the provided text?",
        reply=f"The special magic number for {keys[0]} mentioned in the provided text is",
        answer=values[0],
    )


TESTS: dict[str, Callable[[float, random.Random], Task]] = {"passkey": passkey, "multikey": multikey}


def repeated_filler() -> Iterator[str]:
    """The same sentences over and over."""
    while True:
        yield PASSKEY_FILLER


def invented_filler(rng: random.Random) -> Iterator[str]:
    """Sentences of which hardly two are the same, without a number."""
    while True:
        who = f"{rng.choice(ADJECTIVES)} {rng.choice(PEOPLE)}"
        what = f"{rng.choice(VERBS)} a {rng.choice(THINGS)} near the {rng.choice(PLACES)}"
        yield f"The {who} {what} {rng.choice(TIMES)}."


def make_prompts(
    test: str, context: int, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace
) -> list[Prompt]:
    """`repeats` prompts for every depth, each of `context` tokens with the answer, or a few less."""
    prompts = []
    for repeat in range(args.repeats):
        for depth in args.depths:
            rng = random.Random(f"{args.seed} {test} {context} {depth} {repeat}")
            prompts.append(make_prompt(TESTS[test](depth, rng), context, tokenizer))
    return prompts


def make_prompt(task: Task, context: int, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """The task in a text as long as the context allows.

    Raises:
        SystemExit: if the context is too short for the task without any filler, or the tokenizer joins the answer
            with other characters, so that it cannot be found.
    """
    bare = len(reply_ids(task, [], tokenizer))
    answer_ids = reply_ids(task, [], tokenizer, with_answer=True)[bare:]
    if not set(answer_ids) <= set(digits_and_blanks(tokenizer)):
        tokens = tokenizer.convert_ids_to_tokens(answer_ids)
        raise SystemExit(
            f"{task.answer} has no tokens of its own in this tokenizer, but {tokens}: take another model."
        )
    limit = context - len(answer_ids) - REPLY_MARGIN
    room = limit - bare
    if room < 0:
        raise SystemExit(f"--contexts {context}: the question alone takes {context - room} tokens, leave it out.")
    # Whole sentences from the end, words before the first of them: like a text of which the beginning is cut off.
    words: list[str] = []
    while len(words) < room:  # a word has at least one token
        words += next(task.filler).split(" ")
    cost = partial(tokens_in_a_text, tokenizer=tokenizer)
    first = len(words)
    while first and room >= cost(words[first - 1]):
        first -= 1
        room -= cost(words[first])
    # The words' own lengths may not add up.
    while len(ids := reply_ids(task, words[first:], tokenizer)) > limit:
        first += 1
    return Prompt(task.needles[0][0], ids, answer_ids, task.answer)


@cache
def tokens_in_a_text(word: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of a word that follows another one."""
    alone, followed = tokenizer(["a", f"a {word}"], add_special_tokens=False).input_ids
    return len(followed) - len(alone)


@cache
def digits_and_blanks(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Indices of the tokens whose text holds nothing but digits and blanks, one at least."""
    # Behind a letter, since some tokenizers drop a blank at the beginning of a text.
    letter = tokenizer("a", add_special_tokens=False).input_ids
    texts = tokenizer.batch_decode([[*letter, index] for index in range(len(tokenizer))])
    chosen = []
    for index, text in enumerate(texts):
        if re.fullmatch("a[0-9 ]+", text):
            chosen.append(index)
    return tuple(chosen)


def reply_ids(
    task: Task, filler: list[str], tokenizer: PreTrainedTokenizerBase, with_answer: bool = False
) -> list[int]:
    """Tokens of the whole prompt up to the beginning of the reply, or up to the answer's end."""
    reply = f"{task.reply} {task.answer}" if with_answer else task.reply
    return chat_ids(f"{task.head}\n{hidden(task.needles, filler)}\n{task.question}", reply, tokenizer)


def hidden(needles: list[tuple[float, str]], filler: list[str]) -> str:
    """The filler's words with the needles between its sentences."""
    # Words after which a sentence has ended; 0 is the beginning, in whose cut sentence a needle does no harm.
    ends = [0]
    for count, word in enumerate(filler, start=1):
        if word.endswith("."):
            ends.append(count)
    pieces, last = [], 0
    for depth, needle in sorted(needles):
        place = ends[round(depth * (len(ends) - 1))]
        pieces += [*filler[last:place], needle]
        last = place
    return " ".join([*pieces, *filler[last:]])


def chat_ids(question: str, reply: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of a question in the chat template and of how the reply begins; without a template of the text alone."""
    if not tokenizer.chat_template:
        return tokenizer(f"{question}\n{reply}", verbose=False).input_ids
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    # The template has written the special tokens.
    return tokenizer(text + reply, add_special_tokens=False, verbose=False).input_ids


def measure(
    model: nn.Module, prompts: list[Prompt], tokenizer: PreTrainedTokenizerBase, name: str, args: argparse.Namespace
) -> Results:
    """Results in the order of the prompts."""
    # Prompts of one length make a batch without padding, so that a result depends on its own prompt alone.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].ids))
    results, done = Results(), []
    with tqdm(total=len(prompts), desc=name) as bar:
        for length, group in groupby(order, key=lambda index: len(prompts[index].ids)):
            indices = list(group)
            size = max(1, args.batch_tokens // length)
            for start in range(0, len(indices), size):
                chosen = indices[start : start + size]
                results.extend(answer([prompts[index] for index in chosen], model, tokenizer))
                done += chosen
                bar.update(len(chosen))
    back = sorted(range(len(done)), key=done.__getitem__)
    return Results(*([values[index] for index in back] for values in vars(results).values()))


@torch.no_grad()
def answer(prompts: list[Prompt], model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Results:
    """A model's answers to prompts of one length."""
    device = next(model.parameters()).device
    results = Results()
    ids = torch.tensor([prompt.ids for prompt in prompts], device=device)
    answers = [torch.tensor(prompt.answer_ids, device=device) for prompt in prompts]
    # Behind shorter answers, where nothing is read, and nothing before can see it.
    targets = pad_sequence(answers, batch_first=True)
    kept = targets.shape[1] + 1
    logits = model(input_ids=torch.cat([ids, targets], 1), use_cache=False, logits_to_keep=kept).logits[:, :-1]
    predicted = logits.argmax(-1)
    # Up to the first mistake, greedy has read the right tokens too: all are right here where they are in greedy.
    allowed = torch.tensor(digits_and_blanks(tokenizer), device=logits.device)
    numbers = allowed[logits[..., allowed].argmax(-1)]  # (B, answer)
    nats = -logits.float().log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)  # (B, answer)
    replies = greedy(model, ids, tokenizer, kept - 1 + REPLY_MARGIN)
    for row, (prompt, right) in enumerate(zip(prompts, answers, strict=True)):
        count = len(right)
        results.found.append(torch.equal(numbers[row, :count], right))
        results.accuracy.append((predicted[row, :count] == right).double().mean().item())
        results.nats.append(nats[row, :count].double().mean().item())
        results.replies.append(replies[row])
        number = re.search(r"\d+", replies[row])
        results.exact.append(number is not None and number.group() == prompt.answer)
    return results


def greedy(model: nn.Module, ids: torch.Tensor, tokenizer: PreTrainedTokenizerBase, new_tokens: int) -> list[str]:
    """What the model says after prompts (B, T) of one length."""
    generated = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        # Some models ask for a penalty, which would keep them from repeating what they have read.
        repetition_penalty=1.0,
        pad_token_id=tokenizer.pad_token_id or 0,
    )
    return tokenizer.batch_decode(generated[:, ids.shape[1] :], skip_special_tokens=True)


def summary(prompts: list[Prompt], results: Results, first: Results | None) -> dict[str, object]:
    """Shares, intervals, and each prompt's result."""
    depths: dict[str, dict] = {}
    for depth in sorted({prompt.depth for prompt in prompts}):
        here = [index for index, prompt in enumerate(prompts) if prompt.depth == depth]
        depths[str(depth)] = {
            "exact match": statistics.mean(results.exact[index] for index in here),
            "found": statistics.mean(results.found[index] for index in here),
            "nats per token": statistics.mean(results.nats[index] for index in here),
        }
    row = {
        "prompts": len(prompts),
        "longest prompt": max(len(prompt.ids) for prompt in prompts),
        "exact match": statistics.mean(results.exact),
        "interval": wilson(sum(results.exact), len(prompts)),
        "found": statistics.mean(results.found),
        "found interval": wilson(sum(results.found), len(prompts)),
        "token accuracy": statistics.mean(results.accuracy),
        "nats per token": statistics.mean(results.nats),
        "depths": depths,
    }
    if first is not None:
        row["exact match minus the first's"] = difference(results.exact, first.exact)
        row["found minus the first's"] = difference(results.found, first.found)
        row["nats minus the first's"] = difference(results.nats, first.nats)
    each = {
        "exact": [int(value) for value in results.exact],
        "found": [int(value) for value in results.found],
        "nats": [round(value, 5) for value in results.nats],
        "reply": results.replies,
    }
    return row | {"each prompt": each}


def wilson(right: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (Wilson, 1927), which is right for shares of 0 and 1 too."""
    share, squared = right / count, NORMAL_95**2
    middle = (share + squared / (2 * count)) / (1 + squared / count)
    half = NORMAL_95 * math.sqrt(share * (1 - share) / count + squared / (4 * count**2)) / (1 + squared / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def difference(values: list[float], others: list[float]) -> tuple[float, float]:
    """Mean difference of pairs and half of its 95 % interval."""
    differences = [float(value) - other for value, other in zip(values, others, strict=True)]
    return statistics.mean(differences), NORMAL_95 * statistics.stdev(differences) / math.sqrt(len(differences))


def table_rows(
    name: str,
    measured: dict[tuple[str, int], Results],
    first: dict[tuple[str, int], Results],
    args: argparse.Namespace,
) -> list[dict]:
    """A row for each test: exact match and found at each context, the other measures over all contexts."""
    rows = []
    for test in args.tests:
        row, whole, reference = {"model": name, "test": test}, Results(), Results()
        for context in args.contexts:
            results = measured[test, context]
            for measure_name, right in (("exact match", results.exact), ("found", results.found)):
                low, high = wilson(sum(right), len(right))
                row[f"{measure_name} at {context}"] = f"{statistics.mean(right):.2f} ({low:.2f}-{high:.2f})"
            whole.extend(results)
            if first:
                reference.extend(first[test, context])
        row["token accuracy"] = statistics.mean(whole.accuracy)
        row["nats per token"] = statistics.mean(whole.nats)
        for measure_name, field_name in (("exact match", "exact"), ("found", "found"), ("nats", "nats")):
            change = None
            if first:
                mean, half = difference(getattr(whole, field_name), getattr(reference, field_name))
                change = f"{mean:+.3f} ± {half:.3f}"
            row[f"{measure_name} minus the first's"] = change
        rows.append(row)
    return rows


def tell(line: dict, output: Path | None) -> None:
    """Print a line of JSON and append it to the file, if there is one."""
    text = json.dumps(line)
    tqdm.write(text)
    if output:
        with output.open("a", encoding="utf-8") as file:
            file.write(text + "\n")


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="folders or repositories of checkpoints and adapters")
    parser.add_argument("--tests", nargs="+", choices=TESTS, default=list(TESTS))
    parser.add_argument("--contexts", nargs="+", type=int, default=[1024, 2048, 4096, 8192], help="tokens")
    parser.add_argument("--depths", nargs="+", type=float, default=[0.0, 0.25, 0.5, 0.75, 1.0], help="0 to 1")
    parser.add_argument("--repeats", type=int, default=10, help="prompts per test, context and depth (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of numbers, names and text")
    parser.add_argument("--batch-tokens", type=int, default=32_768, help="tokens in a batch (default %(default)s)")
    parser.add_argument("--dtype", default="auto", help="dtype to load in; default: as saved")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="file to append the lines of JSON to")
    args = parser.parse_args(arguments)
    if wrong := [depth for depth in args.depths if not 0 <= depth <= 1]:
        parser.error(f"--depths {wrong[0]}: a depth is 0 (the beginning) to 1 (the end).")
    if args.repeats < 1 or args.repeats * len(args.depths) < 2:
        parser.error(f"--repeats {args.repeats}: an interval needs two prompts or more.")
    return args


if __name__ == "__main__":
    main()
