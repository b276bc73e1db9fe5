"""Data sets for the offline tasks of this folder. lm-eval passes `--task-metadata` as keyword arguments."""

from __future__ import annotations

import csv
import io
import zipfile
from pathlib import Path

from datasets import Dataset, DatasetDict

LETTERS = "ABCD"
ARC_SPLITS = ("train", "validation")


def load_text(text_file: str, **_: object) -> DatasetDict:
    """One document: the whole file."""
    return DatasetDict(test=Dataset.from_list([{"text": Path(text_file).read_text(encoding="utf-8")}]))


def load_mmlu(mmlu_zip: str, subjects: str | None = None, shots: int | str = 5, **_: object) -> DatasetDict:
    """MMLU's test questions, each behind its subject's description and `shots` worked examples.

    Args:
        mmlu_zip: zip file with the authors' CSV files.
        subjects: names with commas between, e.g. "anatomy,virology"; default is all 57.
        shots: worked examples, the first ones of the subject's dev file.
    """
    with zipfile.ZipFile(mmlu_zip) as archive:
        wanted = _subjects(archive)
        if subjects:
            wanted = subjects.split(",")
        rows = []
        for subject in wanted:
            rows += _questions(archive, subject, int(shots))
        return DatasetDict(test=Dataset.from_list(rows))


def load_arc(subset: str, arc_folder: str, splits: str = "validation", **_: object) -> DatasetDict:
    """ARC's questions of four columns of choices; those whose answer is in none of them are left out.

    Args:
        subset: "easy" or "challenge".
        arc_folder: folder with arc_easy_train.csv, arc_easy_validation.csv and the like: question, four choices of
            which some may be empty, the answer's letter.
        splits: "train", "validation" or both with a comma between.
    """
    rows = []
    for split in splits.split(","):
        if split not in ARC_SPLITS:
            raise ValueError(f"splits={splits!r}: {split!r} is none of {', '.join(ARC_SPLITS)}.")
        with Path(arc_folder, f"arc_{subset}_{split}.csv").open(encoding="utf-8", newline="") as file:
            for question, *columns, letter in csv.reader(file):
                # Such files have lost a fifth choice, and all choices of questions with numbers for letters.
                column = LETTERS.find(letter)
                if column >= 0 and columns[column]:
                    choices = [choice for choice in columns if choice]
                    empty = columns[:column].count("")
                    rows.append({"question": question, "choices": choices, "answer": column - empty})
    return DatasetDict(test=Dataset.from_list(rows))


def _subjects(archive: zipfile.ZipFile) -> list[str]:
    ending = "_test.csv"
    return sorted(Path(name).name.removesuffix(ending) for name in archive.namelist() if name.endswith(ending))


def _questions(archive: zipfile.ZipFile, subject: str, shots: int) -> list[dict]:
    about = subject.replace("_", " ")
    head = f"The following are multiple choice questions (with answers) about {about}.\n\n"
    for row in _rows(archive, "dev", subject)[:shots]:
        head += f"{_ask(row)} {row[5]}\n\n"
    questions = []
    for row in _rows(archive, "test", subject):
        questions.append({"prompt": head + _ask(row), "answer": LETTERS.index(row[5]), "subject": subject})
    return questions


def _rows(archive: zipfile.ZipFile, split: str, subject: str) -> list[list[str]]:
    name = f"data/{split}/{subject}_{split}.csv"
    if name not in archive.namelist():
        raise ValueError(f"subjects={subject!r}: {archive.filename} has no {name}; known: {_subjects(archive)}.")
    with archive.open(name) as file:
        return list(csv.reader(io.TextIOWrapper(file, encoding="utf-8", newline="")))


def _ask(row: list[str]) -> str:
    choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, row[1:5], strict=True))
    return f"{row[0].strip()}\n{choices}\nAnswer:"
