import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from compressor.errors import ConfigError
from compressor.files.yaml import MAX_BYTES, dump, parse_document, parse_yaml, read_text

PLAIN = (
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)


def refused(text: str) -> str:
    """Message with which `text` is refused, checked to be one line that begins with the place."""
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "recipe.yaml")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("recipe.yaml:")
    assert caught.value.exit_code == 2
    return message


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("-2.", -2.0),
        ("0x10", 16),
        ("0o17", 15),
        ("-7", -7),
        ("on", "on"),
        ("No", "No"),
        ("true", True),
        ("~", None),
        ("2024-01-01", "2024-01-01"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("'1e-3'", "1e-3"),
        ('"null"', "null"),
        ("nan", "nan"),
    ],
)
def test_scalars_mean_what_they_look_like(text, value):
    parsed = parse_yaml(f"key: {text}", "recipe.yaml")["key"]
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize("text", [".nan", ".NaN", ".inf", "-.Inf", "1e999", "-1e400"])
def test_numbers_that_are_not_finite_are_refused(text):
    assert refused(f"a: 1\nkey: {text}").startswith(
        f"recipe.yaml:2: '{text}' is not a finite number"
    )


def test_leading_zero_is_refused_as_ambiguous():
    assert "write 10" in refused("key: 010")


@pytest.mark.parametrize("digits", [31, 5000])
def test_numbers_too_long_to_mean_anything_are_refused(digits):
    assert "characters" in refused("key: " + "9" * digits)


def test_repeated_key_names_both_lines():
    message = refused("allocation:\n  keep: 0.5\n  count: bits\n  keep: 0.6\n")
    assert message == "recipe.yaml:4: key 'keep' is repeated; it stands at recipe.yaml:2 already"


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system ['true']",
        "!!python/name:os.system ''",
        "!!str 5",
        "!mine x",
    ],
)
def test_tags_are_refused(tag):
    assert refused(f"a: 1\nkey: {tag}").startswith("recipe.yaml:2: the tag")


def test_alias_bomb_is_refused_at_its_first_alias():
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
    )
    assert refused(bomb).startswith("recipe.yaml:2: '*a0' is a YAML alias")


@pytest.mark.parametrize(
    "text",
    [
        "[" * 5000 + "]" * 5000,
        "{a: " * 5000 + "}" * 5000,
        "\n".join(" " * i + "a:" for i in range(1000)),
    ],
)
def test_deep_nesting_is_refused(text):
    assert "nested deeper" in refused(text)


def test_unclosed_nesting_is_refused():
    assert "nested deeper" in refused("[" * 5000)


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "---\n"])
def test_empty_document_is_refused_or_null(text):
    if text == "---\n":
        assert parse_yaml(text, "recipe.yaml") is None
    else:
        assert "empty" in refused(text)


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("a: [1, 2\nb: 3", 2, "not YAML"),
        ("a: 1\n\tb: 2", 2, "not YAML"),
        ("a: 1\n---\nb: 2", 2, "another document"),
        ("a: 1\n? [x, y]\n: 2", 2, "a key must be text"),
        ("a: 1\nb: \x07", 2, "character #x0007"),
    ],
)
def test_broken_yaml_names_its_line(text, line, reason):
    message = refused(text)
    assert message.startswith(f"recipe.yaml:{line}: ")
    assert reason in message


def test_places_of_keys_and_items():
    places = parse_document("a:\n  b: 1\nc:\n- x\n- d: 2\n", "f").places
    assert places[("a", "b")] == "f:2"
    assert places[("c", 1)] == "f:5"
    assert places[("c", 1, "d")] == "f:5"


def test_fifty_megabytes_are_refused_at_once(tmp_path):
    path = tmp_path / "big.yaml"
    path.write_bytes(b"a: [" + b"1, " * (50 * 2**20 // 3) + b"]")
    begin = time.monotonic()
    with pytest.raises(ConfigError, match=rf"big\.yaml:1: longer than {MAX_BYTES} bytes"):
        read_text(path)
    assert time.monotonic() - begin < 1


def test_file_that_is_not_text_or_not_a_file(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"a: 1\nb: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml:2: byte 11 is not UTF-8"):
        read_text(tmp_path / "latin.yaml")
    with pytest.raises(ConfigError, match="not a regular file"):
        read_text(tmp_path)
    with pytest.raises(ConfigError, match="no such file"):
        read_text(tmp_path / "missing.yaml")


def test_byte_order_mark_and_windows_line_ends(tmp_path):
    (tmp_path / "windows.yaml").write_bytes(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n")
    assert parse_yaml(read_text(tmp_path / "windows.yaml"), "f") == {"a": 1, "b": 2}


@given(
    st.recursive(
        PLAIN,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    )
)
@example({"\x85": "a\u2028b"})
def test_dump_is_read_back_to_the_same_value(value):
    restored = parse_yaml(dump({"value": value}), "dump")["value"]
    assert restored == value
    assert repr(restored) == repr(value)


@pytest.mark.parametrize(
    "text", ["1e5", "08", "0o7", ".5", "yes", "null", "", "*", "a: b", "1e400"]
)
def test_text_that_looks_like_something_else_stays_text(text):
    assert parse_yaml(dump({"key": text}), "dump") == {"key": text}
