"""A file takes its place whole or not at all."""

import pytest

from asymgqa_peft.files import written_beside


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
