"""Does an equation have a given value? For MAWPS, where `x=3-1` and `x+1=3` are the same answer."""

from __future__ import annotations

import ast
import operator
import re

OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
STEP = 1e-3


def solves(equation: str, value: float) -> bool:
    """Whether `value` is within 1e-4 (relative above 1) of a solution of an equation in x: one step of Newton's method
    moves it by less. Text that is no equation, or one that does not depend on x there, is not solved."""
    try:
        left, right = (_parse(side) for side in equation.lower().split("="))
        here, beside = (_compute(left, x) - _compute(right, x) for x in (value, value + STEP))
        slope = abs(beside - here) / STEP
        return slope > 1e-9 and abs(here) <= 1e-4 * max(1.0, abs(value)) * slope
    except (ValueError, SyntaxError, ZeroDivisionError, OverflowError, RecursionError):
        return False


def _parse(text: str) -> ast.expr:
    """`2x` and `2(x+1)` mean products."""
    text = re.sub(r"(?<=[\dx)])\s*(?=[x(])", "*", text.strip())
    return ast.parse(text, mode="eval").body


def _compute(node: ast.expr, x: float) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.Name) and node.id == "x":
        return x
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_compute(node.left, x), _compute(node.right, x))
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_compute(node.operand, x))
    raise ValueError("not arithmetic")
