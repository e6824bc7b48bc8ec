"""Finished pieces of work: found again, made again when damaged, told apart by what they depend
on.
"""

import threading

import pytest
import torch
from support.stores import Asked

from compressor.errors import CheckpointError
from compressor.files.documents import differences
from compressor.resume import store
from compressor.resume.store import NOWHERE, FolderStore, ReadOnlyStore, SharedStore


def counting(made):
    def make():
        made.append(None)
        return {"value": torch.full((3,), float(len(made)))}

    return make


def test_a_piece_is_made_once(tmp_path):
    made = []
    first = FolderStore(tmp_path).recall("thing", [1], counting(made))
    again = FolderStore(tmp_path).recall("thing", [1], counting(made))
    assert len(made) == 1 and torch.equal(first["value"], again["value"])
    assert len(list(tmp_path.iterdir())) == 1


def test_kind_key_and_scope_tell_pieces_apart(tmp_path):
    made, store = [], FolderStore(tmp_path)
    for where, kind, key in (
        (store, "a", 1),
        (store, "a", 2),
        (store, "b", 1),
        (store.within("x"), "a", 1),
        (store.within("y"), "a", 1),
    ):
        where.recall(kind, key, counting(made))
    assert len(made) == 5


def test_without_a_folder_nothing_is_kept():
    made = []
    NOWHERE.recall("thing", 1, counting(made))
    NOWHERE.within("x").recall("thing", 1, counting(made))
    assert len(made) == 2


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-40], lambda data: data[:20] + b"?" + data[21:], lambda data: b""]
)
def test_a_damaged_piece_is_made_again_with_a_warning(tmp_path, caplog, damage):
    made = []
    FolderStore(tmp_path).recall("thing", 1, counting(made))
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    FolderStore(tmp_path).recall("thing", 1, counting(made))
    assert len(made) == 2 and f"{path} is damaged" in caplog.text
    FolderStore(tmp_path).recall("thing", 1, counting(made))
    assert len(made) == 2


def test_the_value_of_the_first_run_has_the_layout_of_the_next(tmp_path):
    value = torch.arange(6.0).reshape(2, 3).T
    first = FolderStore(tmp_path).recall("thing", 1, lambda: value)
    assert first.is_contiguous() and torch.equal(first, value)


def test_a_piece_is_read_onto_the_devices_that_it_was_on(tmp_path, monkeypatch, device):
    FolderStore(tmp_path).recall("thing", 1, lambda: [torch.ones(2, device=device), torch.zeros(2)])
    assert [each.device.type for each in FolderStore(tmp_path).recall("thing", 1, None)] == [
        device,
        "cpu",
    ]
    with monkeypatch.context() as patch:
        patch.setattr(
            store,
            "encode",
            lambda *args: ({"list": [{"tensor": ["0", "cuda:1"]}]}, {"0": torch.ones(2)}),
        )
        patch.setattr(store, "decode", lambda *args, **options: None)
        FolderStore(tmp_path).recall("of a GPU", 1, lambda: None)
    monkeypatch.setattr(store, "load", lambda content: {"0": Asked()})
    assert FolderStore(tmp_path).recall("of a GPU", 1, None) == ["cuda:1"]
    assert ReadOnlyStore(tmp_path).recall("of a GPU", 1, None) == ["cuda"]


def test_what_cannot_be_written_is_named_and_leaves_nothing(tmp_path):
    (tmp_path / "store").write_text("a file")
    with pytest.raises(CheckpointError, match=r"store.*could not be written"):
        FolderStore(tmp_path / "store").recall("thing", 1, lambda: 1)


def test_processes_that_share_a_store_wait_for_the_one_that_makes_a_piece(tmp_path):
    made, started, release = [], threading.Event(), threading.Event()

    def slow():
        started.set()
        release.wait(10)
        return counting(made)()

    threads = [threading.Thread(target=SharedStore(tmp_path).recall, args=("thing", 1, slow))]
    threads[0].start()
    started.wait(10)
    threads.append(
        threading.Thread(target=SharedStore(tmp_path).recall, args=("thing", 1, counting(made)))
    )
    threads[1].start()
    release.set()
    for thread in threads:
        thread.join()
    assert len(made) == 1


def test_differences_name_the_place_and_both_values():
    before, now = {"a": {"b": [1, {"c": 2}]}, "same": 0}, {"a": {"b": [1, {"c": 3}, 4]}, "same": 0}
    assert differences(before, now) == [
        "a.b.1.c is 2 there and 3 here",
        "a.b.2 is absent there and 4 here",
    ]
    assert differences(now, now) == []
