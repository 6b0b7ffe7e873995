"""Multiple-choice questions of commonsense reasoning, in the JSON of the LLM-Adapters collection (arXiv 2304.01933).

A file is a list of {"instruction": ..., "answer": "answer2"}. An instruction names its choices and how they are called:
"Please choose the correct answer to the question: ... Answer1: ... Answer2: ... Answer format: answer1/answer2", with
empty lines between its parts. The collection's eight tasks (BoolQ, PIQA, SIQA, HellaSwag, WinoGrande, ARC-Easy,
ARC-Challenge, OpenBookQA) and its commonsense_170k.json are of this form.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple


class ChoiceQuestion(NamedTuple):
    """One multiple-choice question."""

    question: str
    choices: list[str]
    answer: int
    """Index of the right choice."""
    labels: list[str]
    """What the instruction calls the choices: answer1, answer2 ..., or true and false."""
    instruction: str
    """The whole entry as it is put to a model that follows instructions."""


_QUESTION = re.compile(r"\APlease .*?(?:question|sentence)(?:: | with true or false, question: )", re.DOTALL)
"""What stands before the question itself, in the wordings of the eight tasks."""


def read_questions(path: str | Path) -> list[ChoiceQuestion]:
    """Read one JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not of this form; the message names the entry.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: give a folder that holds questions as train.json and test.json")
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(entries, list):
        raise ValueError(f"{path} holds a {type(entries).__name__}, where a list of questions is expected")
    questions = []
    for number, entry in enumerate(entries, start=1):
        try:
            questions.append(parse_question(entry))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, entry {number}: {error!r}") from error
    return questions


def parse_question(entry: Mapping[str, str]) -> ChoiceQuestion:
    """Take one entry apart.

    Raises:
        ValueError: no "Answer format:", choices that are not all there, or an answer that is none of them.
        KeyError: "instruction" or "answer" is missing.
    """
    instruction, answer = entry["instruction"], entry["answer"]
    body, separator, form = instruction.rpartition("Answer format:")
    labels = [label.strip() for label in form.strip().split("/")]
    if not separator or len(labels) < 2:
        raise ValueError(f"no 'Answer format:' with two or more choices in {instruction!r}")
    if answer not in labels:
        raise ValueError(f"answer {answer!r} is none of {', '.join(labels)} in {instruction!r}")
    question, choices = _question_and_choices(body.strip(), labels)
    return ChoiceQuestion(_QUESTION.sub("", question, count=1), choices, labels.index(answer), labels, instruction)


def _question_and_choices(body: str, labels: list[str]) -> tuple[str, list[str]]:
    """The question, and the texts of its choices; the labels themselves (true, false) where there are no texts."""
    if not labels[0][-1].isdigit():
        return body, labels
    pattern = r"\s*".join(rf"\b{re.escape(label)}:\s*(.*?)" for label in labels)
    found = re.search(rf"^(.*?)\s*{pattern}\s*$", body, re.DOTALL | re.IGNORECASE)
    if found is None:
        raise ValueError(f"the choices {', '.join(labels)} are not all in {body!r}")
    question, *choices = found.groups()
    return question, choices
