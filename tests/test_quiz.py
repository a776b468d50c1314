"""The quiz at the end of each notebook: five questions, three answers each, one of them right, all of them explained.

A quiz is plain Markdown with `<details>`, so that it works on GitHub, in JupyterLab and on Colab alike.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import jupytext
import pytest

SCRIPTS = sorted((Path(__file__).parent.parent / "notebooks" / "src").glob("*.py"))
ANSWER = re.compile(r"<details><summary>([A-Z])\. (.*?)</summary>\n\n(Right|No): (.*?)\n</details>", re.S)


@dataclass
class Question:
    """A question, its answers in order, which of them is right, and what each says when it is opened."""

    text: str
    answers: list[str]
    right: list[int]
    explanations: list[str]


def _questions(script: Path) -> list[Question]:
    last = jupytext.read(script).cells[-1].source
    quiz = last[last.index("## Quiz\n") : last.index("## In short\n")]
    found = []
    for number, text, answers in re.findall(r"^\*\*(\d)\. (.*?)\*\*\n(.*?)(?=^\*\*\d|\Z)", quiz, re.S | re.M):
        rows = ANSWER.findall(answers)
        assert "".join(letter for letter, *_ in rows) == "ABC" and int(number) == len(found) + 1
        right = [i for i, (_, _, verdict, _) in enumerate(rows) if verdict == "Right"]
        found.append(Question(text, [row[1] for row in rows], right, [row[3] for row in rows]))
    return found


QUESTIONS = {script.stem: _questions(script) for script in SCRIPTS}


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_notebook_asks_five_questions_and_explains_every_answer(name):
    questions = QUESTIONS[name]
    assert len(questions) == 5
    for question in questions:
        assert question.text.endswith("?") and len(question.right) == 1
        assert len(set(question.answers)) == 3 and all(len(text.split()) >= 7 for text in question.explanations)


@pytest.mark.parametrize("name", QUESTIONS)
def test_neither_place_nor_length_gives_an_answer_away(name):
    questions = QUESTIONS[name]
    assert len({question.right[0] for question in questions}) == 3
    for question in questions:
        lengths = [len(answer) for answer in question.answers]
        assert max(lengths) <= 1.4 * min(lengths), question.text


def test_over_the_course_the_right_answer_is_no_longer_or_shorter_than_the_others():
    questions = [question for several in QUESTIONS.values() for question in several]
    for extreme in (max, min):
        at_the_end = sum(
            len(question.answers[question.right[0]]) == extreme(map(len, question.answers)) for question in questions
        )
        assert at_the_end / len(questions) < 0.5
