"""Every silent fault of the method that this project states a law against has a test that is marked with its number.

traps.md is the list of them; its last column is what the markers say.
"""

import ast
import re
from pathlib import Path

HERE = Path(__file__).parent
TRAPS = {*range(1, 38), *range(39, 49)}


def marked(file):
    """Numbers in `@pytest.mark.trap(n)` on the test functions of a file."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.trap":
                    yield ast.literal_eval(mark.args[0])


def asserts(test):
    """Whether a test can fail: it asserts, expects an error, or calls a helper that is named for it."""
    names = [ast.unparse(node.func).split(".")[-1] for node in ast.walk(test) if isinstance(node, ast.Call)]
    return any(isinstance(node, ast.Assert) for node in ast.walk(test)) or any(
        name.startswith(("assert_", "check_")) or name in ("raises", "warns") for name in names
    )


def test_every_marked_test_can_fail():
    idle = [
        f"{file.name}::{test.name}"
        for file in sorted(HERE.glob("test_*.py"))
        for test in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(test, ast.FunctionDef) and any("trap(" in ast.unparse(mark) for mark in test.decorator_list)
        if not asserts(test)
    ]
    assert not idle


MARKED = {file.name: set(marked(file)) for file in sorted(HERE.glob("test_*.py"))}
ROWS = [
    re.fullmatch(r"\| (\d+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|", line)
    for line in HERE.joinpath("traps.md").read_text("utf-8").splitlines()
    if re.match(r"\| \d", line)
]


def test_every_trap_has_a_test():
    found = set().union(*MARKED.values())
    assert found >= TRAPS, sorted(TRAPS - found)


def test_every_row_of_the_table_has_its_number_and_every_marked_number_a_row():
    assert all(ROWS)
    assert [int(row[1]) for row in ROWS] == list(range(1, len(ROWS) + 1))
    assert set().union(*MARKED.values()) <= set(range(1, len(ROWS) + 1))


def test_the_table_names_the_files_whose_tests_carry_each_number():
    wrong = {}
    for row in ROWS:
        files = ", ".join(f"`{name}`" for name, numbers in MARKED.items() if int(row[1]) in numbers)
        if row[4] != (files or "not yet"):
            wrong[int(row[1])] = files or "not yet"
    assert not wrong, "write these into the last column of tests/traps.md"
