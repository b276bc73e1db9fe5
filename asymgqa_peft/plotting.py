"""Pictures of a conversion: groups and costs per layer, similar heads, quality against the size of the KV cache, loss.

Every function writes ``path`` as PNG and as SVG, in place of any such suffix, and returns both paths. Figures are made
without pyplot: no global backend is chosen or changed, nothing stays open. Needs the extra ``plot``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .files import written_beside
from .groups import Partition

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .initialize import InitializationReport

WIDTH = 8.0  # inches: 100 pixels each in a README of 800 pixels, where 7 points are the least that can be read
DPI = 160
COLOUR_MAP = "cividis"  # the same order of lightness for every kind of colour vision, and in print
# Okabe and Ito's palette without its yellow, which is too faint for a line on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX*"  # seven colours and eight markers: 56 arms before a combination returns
POINT_KEYS = ("arm", "kv_bytes_per_token", "perplexity")
INSIDE = 6  # arms whose names find room beside the lines
LABEL_WIDTH = 0.09  # inches, a digit of a tick's label
CURVE_MARKS = 8  # markers along a loss curve, however many points it has
LOG_FACTOR = 4  # values that span more than this factor get a logarithmic axis

Curve = list[tuple[float, float]]


def plot_groups(report: InitializationReport, path: str | Path) -> list[Path]:
    """Draw the sizes of every layer's groups, and what the layer's grouping costs beside neighbour groups."""
    layers = len(report.head_groups)
    figure = _new_figure(height=1.6 + 0.22 * layers)
    sizes_axes, costs_axes = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    _draw_sizes(sizes_axes, report.head_groups)
    _draw_costs(costs_axes, report.costs, report.neighbour_costs)
    sizes_axes.set_yticks(range(0, layers, max(1, layers // 16)))
    sizes_axes.set_ylim(layers - 0.5, -0.5)  # the first layer on top
    sizes_axes.set_ylabel("layer")
    figure.legend(loc="outside lower right", ncols=2, frameon=False)
    return _save(figure, path)


def plot_similarities(
    before: torch.Tensor, after: torch.Tensor, partition: Partition | Sequence[Sequence[int]], path: str | Path
) -> list[Path]:
    """Draw how similar one layer's heads are, as they stand and once their bases are chosen.

    Args:
        before, after: (K, K), similarity of each pair of heads in the bases of the checkpoint, and in the best ones.
        partition: the layer's groups; heads are ordered by them and every group is framed.

    Raises:
        ValueError: unless the partition holds every one of the K heads once.
    """
    order = list(chain(*partition))
    ordered = []
    for given in (before, after):
        matrix = torch.as_tensor(given, dtype=torch.float64, device="cpu")
        if matrix.shape != (len(order), len(order)) or sorted(order) != list(range(len(order))):
            raise ValueError(
                f"partition holds heads {sorted(order)} and a similarity matrix has shape {tuple(matrix.shape)}: "
                "give (K, K) matrices and groups that hold each of the K heads once."
            )
        ordered.append(matrix[order][:, order].numpy())
    figure = _new_figure(height=3.9)
    axes = figure.subplots(1, 2)
    # One scale for both panels, and colours for similarities below zero only where there are any.
    scale = {"vmin": min(0.0, ordered[0].min(), ordered[1].min()), "vmax": 1.0, "cmap": COLOUR_MAP}
    for panel, matrix, title in zip(axes, ordered, ("as in the checkpoint", "in the best bases"), strict=True):
        image = panel.imshow(matrix, interpolation="nearest", **scale)
        panel.set_title(title)
        _frame_groups(panel, partition)
        _label_heads(panel, order)
    axes[0].set_ylabel("base KV head, ordered by group")
    figure.colorbar(image, ax=axes, label="similarity", shrink=0.8, pad=0.02)
    return _save(figure, path)


def plot_quality(points: Sequence[Mapping[str, Any]], path: str | Path) -> list[Path]:
    """Draw perplexity against KV bytes per token, a line per arm.

    Args:
        points: dicts with ``arm`` (name in the legend), ``kv_bytes_per_token`` and ``perplexity``. An arm of a single
            point, such as the base, is drawn with a dashed line at its perplexity.

    Raises:
        ValueError: if there is no point, or one lacks a key.
    """
    arms = _collect_arms(points)
    axes = _draw_lines(arms, "perplexity")
    for drawn, points_of_arm in zip(axes.get_lines(), arms.values(), strict=True):
        if len(points_of_arm) == 1:
            level = points_of_arm[0][1]
            axes.axhline(level, color=drawn.get_color(), linewidth=1, linestyle="--", zorder=0)
    sizes = sorted({size for size, _ in chain(*arms.values())})
    if sizes[0] > 0 and len(sizes) > 1:
        axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, _labels_apart(sizes))
    axes.set_xticks([], minor=True)
    axes.set_xlabel("KV cache, KiB per token")
    return _save(axes.figure, path)


def plot_losses(
    curves: Mapping[str, Sequence[Mapping[str, Any]] | Sequence[tuple[float, float]]],
    path: str | Path,
    key: str = "loss",
) -> list[Path]:
    """Draw how the loss of one or several recoveries fell.

    Args:
        curves: name in the legend -> ``trainer.state.log_history``, or pairs (step, loss). Losses are drawn over
            tokens where every log entry counts them (TRL's ``num_tokens``), over steps otherwise. A loss that is not
            finite leaves a gap.
        key: which entry of the logs: "loss" is what was trained on, and comparable only between arms of one objective;
            "eval_loss", or `AsymGQATrainer`'s "sft_loss" and "distillation_loss".

    Raises:
        ValueError: if there is no curve, or one without a finite loss.
    """
    if not curves:
        raise ValueError("curves is empty: give at least one log_history.")
    place, label = "step", "steps"
    entries = list(chain(*curves.values()))
    # No entry is a pair, and each that has the loss says after how many tokens.
    if all(isinstance(entry, Mapping) and (key not in entry or "num_tokens" in entry) for entry in entries):
        place, label = "num_tokens", "tokens"
    # All curves are checked before the first is drawn.
    lines = {name: _loss_curve(name, log, key, place) for name, log in curves.items()}
    axes = _draw_lines(lines, key.replace("_", " "))
    axes.set_xlim(left=0)
    axes.set_xlabel(label)
    if label == "tokens":
        from matplotlib.ticker import EngFormatter

        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 1 500 000 as "1.5M"
    return _save(axes.figure, path)


def _draw_sizes(axes: Axes, head_groups: list[list[list[int]]]) -> None:
    """Stacked bars of a layer's group sizes, largest first, each with its number."""
    from matplotlib import colormaps

    sizes = [sorted(map(len, partition), reverse=True) for partition in head_groups]
    largest = max(map(max, sizes))
    for index, layer in enumerate(sizes):
        start = 0
        for size in layer:
            shade = size / largest
            axes.barh(index, size, left=start, height=0.82, color=colormaps[COLOUR_MAP](shade), edgecolor="white")
            ink = "white"
            if shade > 0.55:  # the light half of the colour map
                ink = "black"
            axes.text(start + size / 2, index, str(size), ha="center", va="center", fontsize=8, color=ink)
            start += size
    axes.set_xlim(0, sum(sizes[0]))
    axes.set_xlabel("base KV heads")
    axes.set_title("sizes of the groups")
    axes.xaxis.get_major_locator().set_params(integer=True)
    _open_frame(axes)


def _draw_costs(axes: Axes, costs: Sequence[float], neighbour_costs: Sequence[float]) -> None:
    """Two dots per layer, joined."""
    layers = range(len(costs))
    axes.hlines(layers, costs, neighbour_costs, color="#D0D0D0", linewidth=2, zorder=1)
    axes.scatter(neighbour_costs, layers, s=28, color=COLOURS[1], marker="s", label="neighbour groups", zorder=2)
    axes.scatter(costs, layers, s=30, color=COLOURS[0], label="chosen groups", zorder=3)
    axes.set_xlim(left=0)
    axes.set_xlabel("cost (share of energy lost)")
    axes.set_title("cost of the grouping")
    _open_frame(axes)


def _frame_groups(axes: Axes, partition: Sequence[Sequence[int]]) -> None:
    """A square around every group's block of the diagonal."""
    from matplotlib.patches import Rectangle

    start = 0
    for group in partition:
        corner, side = (start - 0.5, start - 0.5), len(group)
        axes.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=COLOURS[1], linewidth=2, clip_on=False))
        start += side


def _label_heads(axes: Axes, order: Sequence[int]) -> None:
    """Head indices along both sides, while there is room for them."""
    labels, fontsize, rotation = list(order), 8, 0
    if len(labels) > 16:
        fontsize, rotation = 7, 90
    if len(labels) > 32:
        labels = []
    axes.set_xticks(range(len(labels)), labels, fontsize=fontsize, rotation=rotation)
    axes.set_yticks(range(len(labels)), labels, fontsize=fontsize)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)  # they would cover the frames of the outer groups


def _collect_arms(points: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    """(bytes, perplexity) of every arm in order of size, arms in order of appearance."""
    arms: dict[str, Curve] = {}
    for index, point in enumerate(points):
        if missing := sorted(set(POINT_KEYS) - point.keys()):
            raise ValueError(f"points[{index}] lacks {', '.join(missing)}: every point needs {', '.join(POINT_KEYS)}.")
        arms.setdefault(point["arm"], []).append((float(point["kv_bytes_per_token"]), float(point["perplexity"])))
    if not arms:
        raise ValueError("points is empty: give at least one measured arm.")
    for line in arms.values():
        line.sort()
    return arms


def _loss_curve(name: str, log: Sequence[Any], key: str, place: str) -> Curve:
    """(`place`, loss) of every entry that has the loss, in order."""
    curve, logged = [], set()
    try:
        for entry in log:
            if isinstance(entry, Mapping):
                logged |= entry.keys()
                if key not in entry:
                    continue
                entry = entry[place], entry[key]
            where, loss = entry
            curve.append((float(where), float(loss)))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"curves[{name!r}] is no log_history and no list of (step, loss) ({type(error).__name__}: {error})."
        ) from error
    if not any(math.isfinite(loss) for _, loss in curve):
        seen = f"it has {len(curve)} points"
        if logged:
            seen = f"its entries hold {', '.join(sorted(logged))}"
        raise ValueError(f"curves[{name!r}] has no finite {key!r}; {seen}: log it, or choose another key.")
    return curve


def _draw_lines(lines: Mapping[str, Curve], quantity: str) -> Axes:
    """A figure with each line in its own colour and marker; a logarithmic axis where positive values span a factor."""
    inside, height = len(lines) <= INSIDE, 4.5
    if not inside:
        height += 0.1 * len(lines)  # the legend goes below
    axes = _new_figure(height).subplots()
    values = []
    for index, (name, line) in enumerate(lines.items()):
        style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
        marked = max(1, len(line) // CURVE_MARKS)
        axes.plot(*zip(*line, strict=True), markersize=6, linewidth=1.8, label=name, markevery=marked, **style)
        values += [value for _, value in line if math.isfinite(value)]
    axes.set_ylabel(f"{quantity} (lower is better)")
    smallest = min(values, default=0.0)
    if smallest > 0 and max(values) > LOG_FACTOR * smallest:
        axes.set_yscale("log")
        axes.yaxis.get_major_locator().set_params(subs=(1.0, 2.0, 5.0))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    if inside:
        axes.legend(frameon=False)
    else:
        axes.figure.legend(loc="outside lower center", ncols=2, frameon=False)
    axes.grid(color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    _open_frame(axes)
    return axes


def _labels_apart(sizes: Sequence[float]) -> list[str]:
    """Sizes in KiB; "" where a label would run into that of a larger size."""
    octaves = [math.log2(max(size, 1.0)) for size in sizes]
    per_octave = 0.85 * WIDTH / max(octaves[-1] - octaves[0], 1.0)  # inches
    labels = [""] * len(sizes)
    # From the largest on: `free` is where the label to the right begins.
    free = math.inf
    for index in reversed(range(len(sizes))):
        label, place = f"{sizes[index] / 1024:g}", octaves[index] * per_octave
        half = 0.5 * LABEL_WIDTH * (len(label) + 1)
        if place + half <= free:
            labels[index], free = label, place - half
    return labels


def _open_frame(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _new_figure(height: float) -> Figure:
    """A figure of README width, outside pyplot's registry."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("Plotting needs matplotlib: pip install matplotlib") from error
    return Figure(figsize=(WIDTH, height), layout="constrained")


def _save(figure: Figure, path: str | Path) -> list[Path]:
    """Write PNG and SVG beside each other, each whole or not at all; the same figure gives the same bytes."""
    from matplotlib import rc_context

    stem = Path(path)
    if stem.suffix.lower() in (".png", ".svg"):  # no other suffix: the .5 of "qwen2.5" stays
        stem = stem.with_suffix("")
    written = []
    for form, metadata in (("png", {}), ("svg", {"Date": None})):
        written.append(stem.with_name(f"{stem.name}.{form}"))
        with written_beside(written[-1]) as beside, rc_context({"svg.hashsalt": "asymgqa_peft"}):
            figure.savefig(beside, format=form, dpi=DPI, facecolor="white", metadata=metadata)
    return written
