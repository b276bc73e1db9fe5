"""recipes/pictures.py: the README's pictures, those of a user's own files, and what it says about wrong ones."""

import json

import pytest
import torch

from asymgqa_peft.initialize import InitializationReport
from recipes import pictures, stdlib_text

pytest.importorskip("matplotlib")


def report() -> InitializationReport:
    """Three layers of four heads in groups of 3 and 1; layer l's heads are alike by l / 4."""
    similarity = [
        [[1.0 if row == column else layer / 4 for column in range(4)] for row in range(4)] for layer in (1, 2, 3)
    ]
    return InitializationReport(
        head_groups=[[[0, 1, 3], [2]]] * 3,
        grouping="asymmetric",
        criterion="residual",
        merge="principal",
        costs=[0.1, 0.2, 0.3],
        neighbour_costs=[0.2, 0.2, 0.4],
        similarity_before=similarity,
        similarity_after=similarity,
        tokens=1,
        seconds={},
        search_seconds=0.0,
        peak_memory=0,
        notes=[],
    )


@pytest.fixture
def similarities(monkeypatch):
    """What was drawn of heads: (before, after, partition) of each call."""
    calls, draw = [], pictures.plot_similarities

    def record(before, after, partition, path):
        calls.append((before, after, partition))
        return draw(before, after, partition, path)

    monkeypatch.setattr(pictures, "plot_similarities", record)
    return calls


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_readme_pictures_are_drawn_from_the_bundled_model(similarities, tmp_path, monkeypatch):
    text = stdlib_text.validation_texts()[1][:6000]
    monkeypatch.setattr(stdlib_text, "validation_texts", lambda: [text])
    written = pictures.main(["--output", str(tmp_path)])
    assert names(tmp_path) == ["quality.png", "quality.svg", "similarities.png", "similarities.svg"]
    assert all(path.stat().st_size < 150_000 for path in written)
    ((before, after, partition),) = similarities
    assert sorted(head for group in partition for head in group) == list(range(16)) and len(partition) == 4
    others = ~torch.eye(16, dtype=torch.bool)
    assert torch.tensor(after)[others].mean() > torch.tensor(before)[others].mean() + 0.3


def test_the_measured_points_fit_the_bundled_model():
    """16, 8, 4 and 2 heads of 16 bits, every arm at all three of the latter, with where they come from."""
    values = json.loads((pictures.PICTURES / "quality.json").read_text())
    config = json.loads((pictures.RECIPES / "tiny_model" / "config.json").read_text())
    per_head = 2 * 2 * config["num_hidden_layers"] * config["head_dim"]
    sizes: dict[str, list[int]] = {}
    for row in values["rows"]:
        sizes.setdefault(row["arm"], []).append(row["kv_bytes_per_token"])
    base, *arms = sizes.values()
    assert base == [16 * per_head]
    assert len(arms) == 4 and all(arm == [8 * per_head, 4 * per_head, 2 * per_head] for arm in arms)
    assert {"commit", "device", "script", "calibration"} <= values.keys()


def test_a_report_gives_groups_and_the_middle_layer(similarities, tmp_path):
    report().save(tmp_path / "report.json")
    pictures.main(["--report", str(tmp_path / "report.json"), "--output", str(tmp_path / "out")])
    assert names(tmp_path / "out") == ["groups.png", "groups.svg", "similarities.png", "similarities.svg"]
    assert [before for before, _, _ in similarities] == [report().similarity_before[1]]
    pictures.main(["--report", str(tmp_path / "report.json"), "--layer", "0", "--output", str(tmp_path / "out")])
    assert similarities[1][0] == report().similarity_before[0]


def test_losses_come_from_trainer_states_and_from_lists(tmp_path, monkeypatch):
    log = [{"step": 1, "loss": 2.0, "sft_loss": 3.0}, {"step": 2, "loss": 1.0, "sft_loss": 2.5}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 2, "log_history": log}))
    (tmp_path / "log.json").write_text(json.dumps([[1, 2.0], [2, 1.5]]))
    calls, draw = [], pictures.plot_losses
    monkeypatch.setattr(pictures, "plot_losses", lambda *args, **kw: calls.append((args[0], kw)) or draw(*args, **kw))
    files = [f"ours={tmp_path / 'trainer_state.json'}", f"by hand={tmp_path / 'log.json'}"]
    pictures.main(["--losses", *files, "--output", str(tmp_path / "out")])
    assert names(tmp_path / "out") == ["losses.png", "losses.svg"]
    pictures.main(["--losses", files[0], "--loss", "sft_loss", "--output", str(tmp_path / "out")])
    assert calls == [
        ({"ours": log, "by hand": [[1, 2.0], [2, 1.5]]}, {"key": "loss"}),
        ({"ours": log}, {"key": "sft_loss"}),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read as JSON"),
        ("{", "cannot be read as JSON"),
        ("[]", 'has no list "rows" of points'),
        ('{"rows": [1]}', 'has no list "rows" of points'),
        ('{"rows": []}', "points is empty"),
        ('{"rows": [{"arm": "x"}]}', r"points\[0\] lacks kv_bytes_per_token, perplexity"),
    ],
)
def test_a_wrong_file_is_named_before_anything_is_drawn(content, message, tmp_path):
    path = tmp_path / "quality.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit, match=message):
        pictures.main(["--quality", str(path), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_wrong_options_name_the_remedy(tmp_path, capsys):
    report().save(tmp_path / "report.json")
    with pytest.raises(SystemExit, match="--layer 3: the model has layers 0 to 2"):
        pictures.main(["--report", str(tmp_path / "report.json"), "--layer", "3", "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="No such file.*nowhere.json"):
        pictures.main(["--report", str(tmp_path / "nowhere.json"), "--output", str(tmp_path / "out")])
    (tmp_path / "state.json").write_text('{"loss": 1}')
    with pytest.raises(SystemExit, match="holds no log_history"):
        pictures.main(["--losses", f"a={tmp_path / 'state.json'}", "--output", str(tmp_path / "out")])
    (tmp_path / "log.json").write_text("[[1, 2.0]]")
    with pytest.raises(SystemExit, match="2 files have 1 names"):
        pictures.main(["--losses", *[f"a={tmp_path / 'log.json'}"] * 2, "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        pictures.main(["--losses", str(tmp_path / "state.json")])
    assert "is not NAME=FILE" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
