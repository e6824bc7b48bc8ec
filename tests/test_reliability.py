"""The page about faults says what their tests say."""

import ast

from faults import page


def test_the_page_is_that_of_the_tests():
    assert page.PAGE.read_text(encoding="utf-8") == page.render(), (
        "run `python -m tests.faults.page`"
    )


def test_every_test_of_a_fault_carries_the_marker():
    for path in page.FOLDER.glob("test_*.py"):
        marks = [
            ast.unparse(node)
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.Assign)
        ]
        assert "pytestmark = pytest.mark.faults" in marks, path.name


def test_no_fault_is_left_out():
    assert [*page.faults()] == [f"F{number:02}" for number in range(1, 37)]
