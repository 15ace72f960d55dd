"""How a question and its answer are written as one text. Imports no torch."""

from __future__ import annotations

QUESTION, ANSWER = "{question}", "{answer}"
QA_TEMPLATE = f"Question: {QUESTION}\nAnswer: {ANSWER}"
"""The template of TOFU and MUSE for models without a chat template."""


def template_problem(template: str) -> str | None:
    """Say what is wrong with a template, None for a sound one."""
    at = [template.find(mark) for mark in (QUESTION, ANSWER)]
    if min(at) < 0 or at[0] > at[1] or any(template.count(mark) > 1 for mark in (QUESTION, ANSWER)):
        return f"expected a text with {QUESTION} and, after it, {ANSWER}, each once"
    return None


def qa_prompt(template: str, question: str) -> str:
    """Return what stands before the answer."""
    return template.partition(ANSWER)[0].replace(QUESTION, question)


def qa_text(template: str, question: str, answer: str) -> str:
    """Return a question with its answer."""
    return qa_prompt(template, question) + answer + template.partition(ANSWER)[2]
