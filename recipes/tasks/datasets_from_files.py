"""Data sets for the offline tasks of this folder. lm-eval passes `--task-metadata` as keyword arguments."""

from __future__ import annotations

import csv
import io
import zipfile
from pathlib import Path

from datasets import Dataset, DatasetDict

LETTERS = "ABCD"


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
