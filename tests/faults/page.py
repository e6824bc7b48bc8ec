"""Writes docs/reliability.md, the list of faults, from the docstrings of their tests: `python -m
tests.faults.page`.

A docstring is one line, "fault: what happens".
"""

import ast
from pathlib import Path

FOLDER = Path(__file__).parent
PAGE = FOLDER.parents[1] / "docs" / "reliability.md"
HEAD = """# Reliability

What goes wrong, and what happens then. Every line is a test of the command line, run by `make faults`; the page is written from these
tests by `python -m tests.faults.page`.

| | Fault | What happens |
|---|---|---|
"""


def faults() -> dict[str, tuple[str, str]]:
    """Number of every fault that has a test, with the fault and what happens. Raises ValueError for
    a docstring of another form.
    """
    found = {}
    for path in sorted(FOLDER.glob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_f"):
                continue
            number = node.name.split("_")[1].upper()
            text = " ".join((ast.get_docstring(node) or "").split())
            fault, colon, expected = text.partition(": ")
            if not colon or number in found:
                raise ValueError(
                    f"{path.name}: {node.name} needs a docstring 'fault: what happens' and "
                    "a number of its own"
                )
            found[number] = fault, expected.rstrip(".")
    return dict(sorted(found.items()))


def render() -> str:
    rows = [
        f"| {number} | {fault} | {expected} |\n" for number, (fault, expected) in faults().items()
    ]
    return HEAD + "".join(rows)


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(render(), encoding="utf-8")
