"""Arithmetic operations that a teacher writes beside an answer, like `24 - (7 + 3) = 14`: are they right?"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Sequence

_LONGEST = 300
_ARITHMETIC = re.compile(r"[\d\s.+\-*/()]+")
_NUMBER = re.compile(r"\s*-?\d[\d,]*(?:\.\d+)?\s*")
_SIGNS = str.maketrans({"×": "*", "÷": "/", "−": "-", ",": None})
_OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def operation_problem(operation: str, answers: Sequence[str]) -> str | None:
    """What is wrong with an operation, as "reason: detail"; None when nothing is, or when there is no operation.

    Its result must be what is on its left side, to a thousandth, and the answer where that is one number.
    """
    if not operation.strip():
        return None
    calculation, equals, stated = operation.rpartition("=")
    result, left = calculate(stated), calculate(calculation)
    if not equals or result is None or left is None:
        return f"operation cannot be read: {operation}"
    if not math.isclose(left, result, rel_tol=1e-3, abs_tol=5e-3):
        return f"operation is wrong: {operation}"
    wanted = calculate(answers[0]) if len(answers) == 1 and _NUMBER.fullmatch(answers[0]) else None
    if wanted is not None and not math.isclose(wanted, result, rel_tol=1e-3, abs_tol=5e-3):
        return f"operation has another result than the answer: {operation}"
    return None


def calculate(text: str) -> float | None:
    """The value of an expression of numbers, + - * / and parentheses; None for anything else.

    >>> calculate("24 - (7 + 3)")
    14.0
    """
    plain = text.translate(_SIGNS).strip()
    if len(plain) > _LONGEST or not _ARITHMETIC.fullmatch(plain):
        return None
    try:
        return _value(ast.parse(plain, mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return float(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError("not arithmetic")
