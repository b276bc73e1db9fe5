"""Pictures: both files are written, what is drawn is what was given, and nothing global changes."""

import builtins
import sys
from types import SimpleNamespace

import pytest
import torch

from asymgqa_peft import plotting

matplotlib = pytest.importorskip("matplotlib")
Figure = pytest.importorskip("matplotlib.figure").Figure

REPORT = SimpleNamespace(
    head_groups=[[[0, 2, 3, 5], [1, 4]], [[0], [1, 2, 3, 4, 5]]], costs=[0.25, 0.125], neighbour_costs=[0.5, 0.375]
)
POINTS = [
    {"arm": "base", "kv_bytes_per_token": 16384, "perplexity": 38.0},
    {"arm": "neighbour", "kv_bytes_per_token": 4096, "perplexity": 2670.0},
    {"arm": "neighbour", "kv_bytes_per_token": 8192, "perplexity": 313.0},
]
LOGS = {  # as Trainer and TRL write them: the last entry sums up and has no loss
    "distilled": [
        {"loss": 2.0, "num_tokens": 1e6, "step": 10},
        {"loss": 0.25, "num_tokens": 2e6, "step": 20},
        {"train_loss": 1.1, "step": 20},
    ],
    "SFT": [{"loss": 3.0, "num_tokens": 1e6, "step": 10}, {"loss": 2.5, "num_tokens": 2e6, "step": 20}],
}
SIMILARITIES = torch.arange(36.0).reshape(6, 6) / 36


def draw_groups(path):
    return plotting.plot_groups(REPORT, path)


def draw_similarities(path):
    return plotting.plot_similarities(SIMILARITIES, SIMILARITIES, REPORT.head_groups[0], path)


def draw_quality(path):
    return plotting.plot_quality(POINTS, path)


def draw_losses(path):
    return plotting.plot_losses(LOGS, path)


PLOTS = [draw_groups, draw_similarities, draw_quality, draw_losses]


def texts(labels):
    return [label.get_text() for label in labels]


def curves(axes):
    """Points of all lines by their names in the legend."""
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines}


def contents(paths):
    return [path.read_bytes() for path in paths]


def settings():
    """Matplotlib's, without the backend: to read it is to choose it."""
    return {key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != "backend"}


@pytest.fixture
def drawn(monkeypatch):
    """The figures saved, in order."""
    figures, savefig = [], Figure.savefig

    def record(figure, *args, **options):
        if figure not in figures:  # once as PNG, once as SVG
            figures.append(figure)
        savefig(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", record)
    return figures


@pytest.mark.parametrize("draw", PLOTS)
@pytest.mark.parametrize("name", ["picture", "picture.png", "picture.svg"])
def test_png_and_svg_are_written(draw, name, tmp_path):
    written = draw(tmp_path / "new" / name)
    assert written == [tmp_path / "new" / "picture.png", tmp_path / "new" / "picture.svg"]
    assert written[0].read_bytes().startswith(b"\x89PNG")
    assert "<svg" in written[1].read_text(encoding="utf-8")


def test_other_suffixes_are_part_of_the_name(tmp_path):
    written = draw_quality(str(tmp_path / "qwen2.5"))
    assert written == [tmp_path / "qwen2.5.png", tmp_path / "qwen2.5.svg"]


@pytest.mark.parametrize("draw", PLOTS)
def test_same_input_same_bytes(draw, tmp_path):
    assert contents(draw(tmp_path / "a")) == contents(draw(tmp_path / "b"))


@pytest.mark.parametrize("draw", PLOTS)
def test_an_interrupt_leaves_the_former_picture(draw, tmp_path, monkeypatch):
    written = draw(tmp_path / "picture")
    former = contents(written)

    def interrupted(figure, path, **options):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw(tmp_path / "picture")
    assert sorted(tmp_path.iterdir()) == written
    assert contents(written) == former


@pytest.mark.parametrize("draw", PLOTS)
def test_nothing_global_changes(draw, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    before = settings()
    draw(tmp_path / "picture")
    assert "matplotlib.pyplot" not in sys.modules  # so no backend was chosen and no figure registered
    assert settings() == before


def test_groups_and_costs_are_drawn(drawn, tmp_path):
    draw_groups(tmp_path / "picture")
    sizes, costs = drawn[0].axes
    assert [bar.get_width() for bar in sizes.patches] == [4, 2, 5, 1]
    assert texts(sizes.texts) == ["4", "2", "5", "1"]
    offsets = {dots.get_label(): dots.get_offsets().tolist() for dots in costs.collections[1:]}
    assert offsets == {"neighbour groups": [[0.5, 0], [0.375, 1]], "chosen groups": [[0.25, 0], [0.125, 1]]}


def test_similarities_are_ordered_by_group(drawn, tmp_path):
    draw_similarities(tmp_path / "picture")
    panel = drawn[0].axes[0]
    order = [0, 2, 3, 5, 1, 4]
    assert torch.equal(torch.tensor(panel.images[0].get_array()), SIMILARITIES[order][:, order].double())
    assert texts(panel.get_yticklabels()) == list(map(str, order))
    assert [(frame.get_x(), frame.get_width()) for frame in panel.patches] == [(-0.5, 4), (3.5, 2)]


def test_arms_are_drawn_in_order_of_size(drawn, tmp_path):
    draw_quality(tmp_path / "picture")
    axes = drawn[0].axes[0]
    assert curves(axes)["neighbour"] == [[4096, 2670], [8192, 313]]
    assert curves(axes)["base"] == [[16384, 38]]
    assert texts(axes.get_xticklabels()) == ["4", "8", "16"]
    assert axes.get_yscale() == "log"


def test_labels_keep_apart_and_many_arms_are_named_below(drawn, tmp_path):
    sizes = [640, 1152, 1280, 2048, 8192, 9216, 16384]
    points = [{"arm": f"arm {size}", "kv_bytes_per_token": size, "perplexity": 9.0} for size in sizes]
    plotting.plot_quality(points, tmp_path / "many")
    axes = drawn[0].axes[0]
    assert texts(axes.get_xticklabels()) == ["0.625", "", "1.25", "2", "8", "9", "16"]
    assert axes.get_legend() is None and len(drawn[0].legends[0].get_texts()) == len(sizes)
    plotting.plot_quality(points[: plotting.INSIDE], tmp_path / "few")
    assert not drawn[1].legends and len(drawn[1].axes[0].get_legend().get_texts()) == plotting.INSIDE


def test_one_point_is_enough(tmp_path):
    plotting.plot_quality(POINTS[:1], tmp_path / "picture")
    plotting.plot_losses({"SFT": [(1, 3.0)]}, tmp_path / "losses")


def drawn_losses(figure):
    axes = figure.axes[0]
    return axes.get_xlabel(), curves(axes)


def test_losses_are_drawn_over_tokens(drawn, tmp_path):
    draw_losses(tmp_path / "picture")
    where, lines = drawn_losses(drawn[0])
    assert where == "tokens"
    assert lines == {"distilled": [[1e6, 2.0], [2e6, 0.25]], "SFT": [[1e6, 3.0], [2e6, 2.5]]}
    assert drawn[0].axes[0].get_yscale() == "log"  # 3 is more than four times 0.25


def test_losses_are_drawn_over_steps_unless_every_curve_counts_tokens(drawn, tmp_path):
    plotting.plot_losses({"SFT": LOGS["SFT"], "by hand": [(5, 2.75), (10, 2.5)]}, tmp_path / "picture")
    where, lines = drawn_losses(drawn[0])
    assert where == "steps"
    assert lines == {"SFT": [[10, 3.0], [20, 2.5]], "by hand": [[5, 2.75], [10, 2.5]]}
    assert drawn[0].axes[0].get_yscale() == "linear"


def test_another_entry_of_the_logs(drawn, tmp_path):
    log = [{"loss": 1.0, "step": 1}, {"eval_loss": 4.0, "step": 1}, {"eval_loss": 3.0, "step": 2}]
    plotting.plot_losses({"SFT": log}, tmp_path / "picture", key="eval_loss")
    assert drawn_losses(drawn[0])[1] == {"SFT": [[1, 4.0], [2, 3.0]]}
    assert drawn[0].axes[0].get_ylabel().startswith("eval loss")


def test_a_loss_that_is_not_finite_leaves_a_gap(drawn, tmp_path):
    plotting.plot_losses({"SFT": [(1, 3.0), (2, float("nan")), (3, 2.0)]}, tmp_path / "picture")
    line = drawn[0].axes[0].lines[0]
    assert line.get_xdata().tolist() == [1, 2, 3]
    assert torch.tensor(line.get_ydata()).isnan().tolist() == [False, True, False]


def test_bad_input_names_the_remedy(tmp_path):
    with pytest.raises(ValueError, match="points is empty"):
        plotting.plot_quality([], tmp_path / "picture")
    with pytest.raises(ValueError, match=r"points\[1\] lacks kv_bytes_per_token, perplexity"):
        plotting.plot_quality([POINTS[0], {"arm": "x"}], tmp_path / "picture")
    with pytest.raises(ValueError, match="curves is empty"):
        plotting.plot_losses({}, tmp_path / "picture")
    with pytest.raises(ValueError, match=r"curves\['SFT'\] has no finite 'eval_loss'; its entries hold loss, num_tok"):
        plotting.plot_losses({"SFT": LOGS["SFT"]}, tmp_path / "picture", key="eval_loss")
    with pytest.raises(ValueError, match=r"curves\['SFT'\] has no finite 'loss'; it has 1 points"):
        plotting.plot_losses({"SFT": [(1, float("inf"))]}, tmp_path / "picture")
    with pytest.raises(ValueError, match=r"curves\['SFT'\] is no log_history"):
        plotting.plot_losses({"SFT": [{"loss": 1.0}]}, tmp_path / "picture")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="each of the K heads once"):
        plotting.plot_similarities(SIMILARITIES, SIMILARITIES, [[0, 1], [1, 2]], tmp_path / "picture")
    with pytest.raises(ValueError, match="each of the K heads once"):
        plotting.plot_similarities(SIMILARITIES[:5], SIMILARITIES, REPORT.head_groups[0], tmp_path / "picture")


@pytest.mark.parametrize("draw", PLOTS)
def test_missing_matplotlib_names_the_extra(draw, tmp_path, monkeypatch):
    real_import = builtins.__import__

    def without_matplotlib(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        draw(tmp_path / "picture")
