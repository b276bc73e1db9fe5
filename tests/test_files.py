"""A file or a folder takes its place whole or not at all."""

import json
import shutil
from pathlib import Path

import pytest

from asymgqa_peft.files import folder_beside, save_json, written_beside


def test_a_file_takes_its_place_and_its_folder_is_made(tmp_path):
    path = tmp_path / "new" / "report.json"
    with written_beside(path) as beside:
        beside.write_text("half")
        assert not path.exists() and beside.parent == path.parent
    assert path.read_text() == "half" and list(path.parent.iterdir()) == [path]


def test_an_interrupt_keeps_the_old_file_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), written_beside(path) as beside:
        beside.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_takes_the_place_of_another(tmp_path):
    path = tmp_path / "new" / "plain"
    for text in ("old", "new"):
        with folder_beside(path) as beside:
            assert not list(beside.iterdir()) and path.exists() is (text == "new")
            (beside / text).touch()
        assert [file.name for file in path.iterdir()] == [text] and list(path.parent.iterdir()) == [path]


def test_an_interrupt_keeps_the_old_folder(tmp_path):
    path = tmp_path / "plain"
    path.mkdir()
    (path / "old").touch()
    (tmp_path / "plain.partial").mkdir()  # what a killed run left
    with pytest.raises(KeyboardInterrupt), folder_beside(path) as beside:
        (beside / "half").touch()
        raise KeyboardInterrupt
    assert list(path.iterdir()) == [path / "old"] and list(tmp_path.iterdir()) == [path]


def test_at_no_moment_are_both_folders_gone(tmp_path, monkeypatch):
    """Whatever is renamed or removed, an old or a new folder is whole right afterwards, where a kill could come."""
    path, seen = tmp_path / "plain", []

    def watched(function):
        def call(*args, **kwargs):
            function(*args, **kwargs)
            seen.append({file.name for folder in tmp_path.iterdir() for file in folder.iterdir()})

        return call

    path.mkdir()
    (path / "old").touch()
    with folder_beside(path) as beside:
        (beside / "new").touch()
        monkeypatch.setattr(Path, "rename", watched(Path.rename))
        monkeypatch.setattr(shutil, "rmtree", watched(shutil.rmtree))
    assert len(seen) == 4 and all(seen) and seen[-1] == {"new"}


def test_json_is_whole_or_absent(tmp_path):
    path = tmp_path / "new" / "report.json"
    save_json(path, {"costs": [1.5, None]})
    assert json.loads(path.read_text()) == {"costs": [1.5, None]}
    with pytest.raises(TypeError):
        save_json(path, {"costs": object()})
    assert json.loads(path.read_text()) == {"costs": [1.5, None]} and list(path.parent.iterdir()) == [path]
