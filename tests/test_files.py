"""A file or a folder takes its place whole or not at all."""

import json
import multiprocessing as mp
import os
import shutil
import warnings
from pathlib import Path

import pytest

from asymgqa_peft.files import folder_beside, save_json, written_beside


def test_a_file_takes_its_place_and_its_folder_is_made(tmp_path):
    path = tmp_path / "new" / "report.json"
    with written_beside(path) as beside:
        beside.write_text("half")
        assert not path.exists() and beside.parent.parent == path.parent
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


def test_an_interrupt_keeps_the_old_folder_and_what_the_user_has_beside_it(tmp_path):
    path = tmp_path / "plain"
    own = [path, tmp_path / "plain.partial", tmp_path / "plain.replaced"]
    for folder in own:
        folder.mkdir()
        (folder / "old").touch()
    with pytest.raises(KeyboardInterrupt), folder_beside(path) as beside:
        (beside / "half").touch()
        raise KeyboardInterrupt
    with folder_beside(path) as beside:
        (beside / "new").touch()
    assert sorted(tmp_path.iterdir()) == own
    assert [[file.name for file in folder.iterdir()] for folder in own] == [["new"], ["old"], ["old"]]


def killed_while_it_writes(path):
    with folder_beside(path) as beside:
        (beside / "half").touch()
        os._exit(9)


def test_what_a_killed_process_left_is_told_and_stays(tmp_path):
    path = tmp_path / "plain"
    process = mp.get_context("spawn").Process(target=killed_while_it_writes, args=(path,))
    process.start()
    process.join()
    (left,) = tmp_path.iterdir()
    with pytest.warns(UserWarning, match=f"{left.name}: left by a process that was killed while it wrote"):
        save_json(path, {})
    assert (left / "plain" / "half").exists() and path.read_text() == "{}\n"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_json(tmp_path / "other", {})


def test_at_no_moment_are_both_folders_gone(tmp_path, monkeypatch):
    """Whatever is renamed or removed, an old or a new folder is whole right afterwards, where a kill could come."""
    path, seen = tmp_path / "plain", []

    def watched(function):
        def call(*args, **kwargs):
            function(*args, **kwargs)
            seen.append({file.name for file in tmp_path.rglob("*") if file.is_file()})

        return call

    path.mkdir()
    (path / "old").touch()
    with folder_beside(path) as beside:
        (beside / "new").touch()
        monkeypatch.setattr(Path, "rename", watched(Path.rename))
        monkeypatch.setattr(shutil, "rmtree", watched(shutil.rmtree))
    assert len(seen) == 3 and all(seen) and seen[-1] == {"new"}


@pytest.mark.parametrize("which", [1, 2])
def test_an_interrupt_between_the_renames_puts_the_old_folder_back(which, tmp_path, monkeypatch):
    path, calls = tmp_path / "plain", []
    rename = Path.rename

    def interrupted(self, target):
        calls.append(target)
        if len(calls) == which:
            raise KeyboardInterrupt
        return rename(self, target)

    path.mkdir()
    (path / "old").touch()
    with pytest.raises(KeyboardInterrupt), folder_beside(path) as beside:
        (beside / "new").touch()
        monkeypatch.setattr(Path, "rename", interrupted)
    assert list(tmp_path.rglob("*")) == [path, path / "old"]


def test_of_two_writers_each_leaves_a_whole_folder(tmp_path):
    """One begins and ends while the other writes: the last to end has the name, nothing is mixed."""
    path = tmp_path / "plain"
    with folder_beside(path) as first:
        (first / "a").write_text("first")
        with folder_beside(path) as second:
            (second / "b").write_text("second")
        assert [file.name for file in path.iterdir()] == ["b"]
        (first / "c").write_text("first")
    assert sorted(file.name for file in path.iterdir()) == ["a", "c"] and list(tmp_path.iterdir()) == [path]


def _save_again_and_again(path: Path, name: str) -> None:
    for _ in range(200):
        with folder_beside(path) as beside:
            for part in "abc":
                (beside / part).write_text(name)


def test_processes_that_write_one_target_never_mix(tmp_path):
    path = tmp_path / "plain"
    writers = [mp.get_context("fork").Process(target=_save_again_and_again, args=(path, name)) for name in "xyz"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert sorted(file.name for file in path.iterdir()) == ["a", "b", "c"] and list(tmp_path.iterdir()) == [path]
    assert len({file.read_text() for file in path.iterdir()}) == 1


def test_the_permissions_of_a_folder_stay_and_nobody_else_reads_what_is_being_written(tmp_path):
    path, new = tmp_path / "plain", tmp_path / "new"
    path.mkdir(mode=0o700)
    new.mkdir()
    for folder, mode in ((path, 0o700), (new, new.stat().st_mode & 0o777)):
        with folder_beside(folder) as beside:
            assert beside.parent.stat().st_mode & 0o777 == 0o700
        assert folder.stat().st_mode & 0o777 == mode
    with folder_beside(tmp_path / "absent"):
        pass
    assert (tmp_path / "absent").stat().st_mode == new.stat().st_mode


def test_what_no_folder_can_take_the_place_of_is_told_before_the_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    refusals = {
        "": "no name of its own",
        ".": "no name of its own",
        "there/..": "no name of its own",
        "/": "no name of its own",
        "link": f"symbolic link: give the folder it leads to, '{tmp_path / 'there'}'",
        "dangling": "symbolic link",
        "/proc": "mount point",
        "file": "is a file",
    }
    before = sorted(tmp_path.rglob("*"))
    for path, says in refusals.items():
        with pytest.raises(ValueError, match=says), folder_beside(path):
            pytest.fail("the work has begun")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_link_that_somebody_planted_is_not_followed(tmp_path):
    """Names beside are new ones, so that nobody can have put anything there."""
    (tmp_path / "private").write_text("mine")
    for name in ("report.json.partial", f"report.json.{os.getpid()}.partial"):
        (tmp_path / name).symlink_to(tmp_path / "private")
    save_json(tmp_path / "report.json", {})
    assert (tmp_path / "private").read_text() == "mine"


def test_json_is_whole_or_absent(tmp_path):
    path = tmp_path / "new" / "report.json"
    save_json(path, {"costs": [1.5, None]})
    assert json.loads(path.read_text()) == {"costs": [1.5, None]}
    with pytest.raises(TypeError):
        save_json(path, {"costs": object()})
    assert json.loads(path.read_text()) == {"costs": [1.5, None]} and list(path.parent.iterdir()) == [path]
