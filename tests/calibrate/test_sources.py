"""Text in every wrapping reads the same; what is not text is refused with counts."""

import json
import logging
import socket

import pytest

from compressor.calibrate import sources
from compressor.calibrate.sources import read_documents
from compressor.errors import ConfigError, DataError

TEXT = "one two three\nfour five\n"
CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "well"}]


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


def write_parquet(path, rows):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_a_text_file_is_one_document(tmp_path):
    assert read_documents(write(tmp_path / "a.txt", TEXT)) == [TEXT]
    assert read_documents(write(tmp_path / "LICENCE", TEXT)) == [TEXT]  # any other suffix is text


def test_rows_of_jsonl_and_parquet_are_documents(tmp_path):
    rows = [{"text": "one two"}, {"text": "three"}]
    assert read_documents(write(tmp_path / "a.jsonl", jsonl(*rows))) == ["one two", "three"]
    assert read_documents(write_parquet(tmp_path / "a.parquet", rows)) == ["one two", "three"]


def test_a_folder_is_read_by_name_and_the_rest_is_counted(tmp_path, caplog):
    write(tmp_path / "b.txt", "second")
    write(tmp_path / "a" / "x.jsonl", jsonl({"text": "first"}))
    write(tmp_path / "c.png", b"\x89PNG")
    write(tmp_path / "d.json", "{}")
    assert read_documents(str(tmp_path)) == ["first", "second"]
    assert "2 of 4 files are not text" in caplog.text


@pytest.mark.parametrize(
    ("row", "chat", "column", "expected"),
    [
        ({"id": "7", "text": "t"}, False, None, "t"),
        ({"text": "t", "messages": CHAT}, False, None, "t"),
        ({"text": "t", "messages": CHAT}, True, None, CHAT),
        ({"body": "t"}, False, None, "t"),
        ({"text": "t", "body": "b"}, False, "body", "b"),
    ],
)
def test_the_column_is_the_named_one_or_the_obvious_one(tmp_path, row, chat, column, expected):
    assert read_documents(write(tmp_path / "a.jsonl", jsonl(row)), column, chat) == [expected]
    assert read_documents(write_parquet(tmp_path / "a.parquet", [row]), column, chat) == [expected]


BAD = {
    "empty": ("a.txt", b"", "no text \\(1 blank documents\\)"),
    "blank": ("a.txt", b" \n\r\n\t", "no text"),
    "no rows": ("a.jsonl", b"\n", "no text \\(0 blank documents\\)"),
    "binary": (
        "a.txt",
        b"ab\x00cd\x00",
        "binary, not text \\(the first of 2 zero bytes is at 2\\)",
    ),
    "UTF-16": ("a.txt", "text".encode("utf-16"), "binary"),
    "Latin-1": (
        "a.txt",
        "caf\xe9 cr\xe8me".encode("latin-1"),
        "not UTF-8: byte 0xe9 at offset 3 \\(2 bad places\\)",
    ),
    "Latin-1 row": ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', "a.jsonl:2: not UTF-8"),
    "cut row": ("a.jsonl", b'{"text": "a"}\n{"text": "b', "a.jsonl:2: not JSON"),
    "deep row": ("a.jsonl", b"[" * 100_000, "a.jsonl:1: not JSON"),
    "row of a list": ("a.jsonl", b"[1, 2]\n", "a.jsonl:1: a list, not an object"),
    "number": ("a.jsonl", b'{"text": 7}\n', "a.jsonl:1: column 'text' holds a int"),
    "list of texts": ("a.jsonl", b'{"text": ["a"]}\n', "column 'text' holds a list"),
    "unclear column": ("a.jsonl", b'{"a": "x", "b": "y"}\n', "which column .* one of: a, b"),
    "row without it": (
        "a.jsonl",
        b'{"text": "x"}\n{"texts": "y"}\n',
        "a.jsonl:2: no column 'text'; did you mean 'texts'",
    ),
    "parquet": ("a.parquet", b"PAR1 not really", "a.parquet: not a readable parquet file"),
}


@pytest.mark.parametrize(("name", "data", "message"), BAD.values(), ids=BAD.keys())
def test_what_is_not_text_is_refused(tmp_path, name, data, message):
    with pytest.raises(DataError, match=message):
        read_documents(write(tmp_path / name, data))


def test_a_column_of_plain_text_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match="column 'body' was asked for, but plain text has no columns"
    ):
        read_documents(write(tmp_path / "a.txt", TEXT), "body")


def test_a_column_named_twice_differently_is_refused():
    with pytest.raises(ConfigError, match="names the column 'page', and column 'text' was asked"):
        read_documents("org/name:default:train:page", column="text")


@pytest.mark.parametrize("source", ["nowhere.txt", "some/folder", "a:b"])
def test_a_missing_path_lists_what_a_source_can_be(source):
    with pytest.raises(
        DataError,
        match=f"{source}: no such file or folder; a source is .*org/name:config:split.*self",
    ):
        read_documents(source)


def test_a_folder_without_text_is_refused(tmp_path):
    write(tmp_path / "a.bin", b"x")
    with pytest.raises(DataError, match=r"none of its 1 files ends in \.txt"):
        read_documents(str(tmp_path))


@pytest.mark.parametrize("ends", [b"\r\n", b"\r"], ids=["CRLF", "CR"])
def test_line_ends_are_unified_and_counted(tmp_path, caplog, ends):
    assert read_documents(write(tmp_path / "a.txt", TEXT.encode().replace(b"\n", ends))) == [TEXT]
    assert "2 carriage returns" in caplog.text


def test_a_byte_order_mark_is_dropped(tmp_path):
    assert read_documents(write(tmp_path / "a.txt", TEXT.encode("utf-8-sig"))) == [TEXT]
    assert read_documents(
        write(tmp_path / "a.jsonl", jsonl({"text": "x"}).encode("utf-8-sig"))
    ) == ["x"]


def test_huge_lines_are_counted(tmp_path, caplog):
    data = "short\n" + "x" * (sources.LONG_LINE + 1) + "\n"
    assert read_documents(write(tmp_path / "a.txt", data)) == [data]
    assert f"1 lines are longer than {sources.LONG_LINE} characters" in caplog.text


def test_blank_documents_are_skipped_and_counted(tmp_path, caplog):
    rows = [{"text": "a"}, {"text": " "}, {"text": None}, {"text": "b"}]
    assert read_documents(write(tmp_path / "a.jsonl", jsonl(*rows))) == ["a", "b"]
    assert "2 of 4 documents are blank" in caplog.text


def test_reading_stops_at_the_limit_and_says_so(tmp_path, caplog):
    text = write(tmp_path / "a.txt", "é" * 10)
    assert read_documents(text, limit=7) == ["é" * 3]  # the torn fourth character is dropped
    assert "the first 7 of 20 bytes" in caplog.text
    rows = write(tmp_path / "a.jsonl", jsonl(*({"text": "abcd"} for _ in range(9))) + "not JSON")
    assert read_documents(rows, limit=7) == ["abcd", "abcd"]
    assert "the first 8 characters (2 documents)" in caplog.text


def test_a_character_torn_before_the_limit_is_still_an_error(tmp_path):
    with pytest.raises(DataError, match="not UTF-8"):
        read_documents(write(tmp_path / "a.txt", b"ab\xc3cdefgh"), limit=7)


def test_clean_text_warns_of_nothing(tmp_path, caplog):
    read_documents(write(tmp_path / "a.txt", TEXT), limit=len(TEXT))
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_local_sources_open_no_socket(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    write(tmp_path / "a.txt", TEXT)
    write(tmp_path / "b.jsonl", jsonl({"text": "x"}))
    write_parquet(tmp_path / "c.parquet", [{"text": "y"}])
    assert read_documents(str(tmp_path)) == [TEXT, "x", "y"]


@pytest.fixture
def hub(monkeypatch):
    """Stand-in for the hub: records what was asked for and serves three rows."""
    import datasets

    asked = []

    def load_dataset(name, config, split, streaming):
        asked.append((name, config, split, streaming))
        if name == "org/missing":
            raise datasets.exceptions.DatasetNotFoundError(
                "no data set org/missing\nand more lines"
            )
        return datasets.Dataset.from_list([{"text": f"t{i}", "body": f"b{i}"} for i in range(3)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    return asked


def test_hub_data_sets(hub):
    assert read_documents("org/name:config:train") == ["t0", "t1", "t2"]
    assert read_documents("name::train:body") == ["b0", "b1", "b2"]
    assert read_documents("org/name:c:train[:2%]", limit=100) == ["t0", "t1", "t2"]
    assert read_documents("org/name:c:train", "body", limit=2) == ["b0"]
    assert hub == [
        ("org/name", "config", "train", False),
        ("name", None, "train", False),
        ("org/name", "c", "train[:2%]", False),  # slices cannot be streamed
        ("org/name", "c", "train", True),
    ]


def test_a_hub_failure_is_one_line_that_names_the_variables(hub):
    with pytest.raises(
        DataError,
        match=r"^org/missing:c:train: .*no data set org/missing \(.*HF_HUB_OFFLINE.*HF_TOKEN.*\)$",
    ):
        read_documents("org/missing:c:train")


def test_a_local_path_wins_over_a_data_set(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "name:c:train", TEXT)
    assert read_documents("name:c:train") == [TEXT]
    assert hub == []


def test_a_source_is_one_registered_function(monkeypatch):
    monkeypatch.setattr(sources, "SOURCES", [*sources.SOURCES])

    @sources.source("a number of words words:NUMBER", lambda text: text.startswith("words:"))
    def read_words(request):
        return ["word"] * int(request.source.removeprefix("words:"))

    assert read_documents("words:3", limit=8) == ["word"] * 2
    with pytest.raises(DataError, match="a source is a number of words words:NUMBER, a hub data"):
        read_documents("nowhere.txt")


ROWS = [{"id": 1, "text": "one, two"}, {"id": 2, "text": "three\nfour"}]
TABLES = {
    "list.json": json.dumps(ROWS),
    "lines.json": "".join(json.dumps(row) + "\n" for row in ROWS),
    "lines.ndjson": "".join(json.dumps(row) + "\n" for row in ROWS),
    "table.csv": 'id,text\n1,"one, two"\n2,"three\nfour"\n',
    "table.tsv": 'id\ttext\n1\tone, two\n2\t"three\nfour"\n',
}


@pytest.mark.parametrize("name", TABLES)
def test_rows_of_json_and_tables_are_documents_as_those_of_jsonl_are(tmp_path, name, caplog):
    path = write(tmp_path / name, TABLES[name].encode())
    assert read_documents(path) == ["one, two", "three\nfour"]
    assert ("read as rows, a document each" in caplog.text) == (not name.endswith(".ndjson"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "[1]", r"a\.json, row 1: a int, where a list of objects is read"),
        ("a.json", "[{", r"a\.json: not JSON"),
        ("a.csv", "id,text\n1\n", r"a\.csv, row 1: has more or fewer fields"),
        ("a.csv", 'id,text\n1,"open\n', r"a\.csv: not a table of ','-separated values"),
    ],
)
def test_damaged_json_and_tables_name_the_row(tmp_path, name, text, message):
    with pytest.raises(DataError, match=message):
        read_documents(write(tmp_path / name, text.encode()))


def test_a_long_field_of_a_table_is_read(tmp_path):
    text = "x" * 200_000
    assert read_documents(write(tmp_path / "a.csv", f"text\n{text}\n".encode())) == [text]


def test_markup_read_as_prose_is_a_warning(tmp_path, caplog):
    read_documents(write(tmp_path / "page.html", b"<p>text</p>"))
    assert "page.html: read as plain text, with its markup" in caplog.text


def test_lone_surrogates_are_replaced_and_counted(tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", b'{"text": "a \\ud83d b"}\n{"text": "\\ud83d\\ude00"}\n')
    assert read_documents(path) == ["a \ufffd b", "\U0001f600"]
    assert "1 documents hold halves of characters" in caplog.text


def test_a_chat_may_hold_messages_that_only_call_tools(tmp_path):
    call = {"role": "assistant", "tool_calls": [{"id": "1", "type": "function"}]}
    chat = [{"role": "user", "content": "x"}, call, {"role": "tool", "content": "y"}]
    path = write(tmp_path / "a.jsonl", json.dumps({"messages": chat}).encode())
    assert read_documents(path, chat=True) == [chat]
    path = write(tmp_path / "b.jsonl", json.dumps({"messages": [{"role": "user"}]}).encode())
    with pytest.raises(DataError, match="neither text nor a list of"):
        read_documents(path, chat=True)
