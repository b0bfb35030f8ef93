"""Every silent fault of the method that this project states a law against has a test that is marked with its number."""

import ast
from pathlib import Path

TRAPS = {3, 4, *range(6, 14), *range(18, 30), 31, 34, 35, 36, 39, *range(41, 49)}


def marked(file):
    """Numbers in `@pytest.mark.trap(n)` on the test functions of a file."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.trap":
                    yield ast.literal_eval(mark.args[0])


def test_every_trap_has_a_test():
    found = {number for file in Path(__file__).parent.glob("test_*.py") for number in marked(file)}
    assert found >= TRAPS, sorted(TRAPS - found)
