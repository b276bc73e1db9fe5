"""Pictures of a conversion: groups and costs per layer, similar heads, quality against the size of the KV cache.

Every function writes ``path`` as PNG and as SVG and returns both paths. Figures are made without pyplot: no global
backend is chosen or changed, nothing stays open. Needs the extra ``plot``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

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


def plot_groups(report: InitializationReport, path: str | Path) -> list[Path]:
    """Draw the sizes of every layer's groups, and what the layer's grouping costs beside neighbour groups.

    Args:
        report: what `initialize_asymgqa_weights` returned, or loaded from its JSON.
        path: where to write; a suffix .png or .svg is replaced.
    """
    layers = len(report.head_groups)
    figure = _new_figure(height=1.6 + 0.22 * layers)
    sizes_axes, costs_axes = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    _draw_sizes(sizes_axes, [sorted(map(len, partition), reverse=True) for partition in report.head_groups])
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
        before: (K, K), similarity of each pair of heads in the bases of the checkpoint.
        after: (K, K), the same in the best bases.
        partition: the layer's groups; heads are ordered by them and every group is framed.
        path: where to write; a suffix .png or .svg is replaced.

    Raises:
        ValueError: unless the partition holds every one of the K heads once.
    """
    order = [head for group in partition for head in group]
    matrices = [torch.as_tensor(matrix, dtype=torch.float64, device="cpu") for matrix in (before, after)]
    for matrix in matrices:
        if matrix.shape != (len(order), len(order)) or sorted(order) != list(range(len(order))):
            raise ValueError(
                f"partition holds heads {sorted(order)} and a similarity matrix has shape {tuple(matrix.shape)}: "
                "give (K, K) matrices and groups that hold each of the K heads once."
            )
    ordered = [matrix[order][:, order] for matrix in matrices]
    figure = _new_figure(height=4.3)
    axes = figure.subplots(1, 2)
    scale = {"vmin": min(0.0, *(float(matrix.min()) for matrix in ordered)), "vmax": 1.0, "cmap": COLOUR_MAP}
    for panel, matrix, title in zip(axes, ordered, ("as in the checkpoint", "in the best bases"), strict=True):
        image = panel.imshow(matrix.numpy(), interpolation="nearest", **scale)
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
        path: where to write; a suffix .png or .svg is replaced.

    Raises:
        ValueError: if there is no point, or one lacks a key.
    """
    arms = _collect_arms(points)
    figure = _new_figure(height=4.5)
    axes = figure.subplots()
    for index, (arm, line) in enumerate(arms.items()):
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        sizes, perplexities = zip(*sorted(line), strict=True)
        axes.plot(sizes, perplexities, color=colour, marker=marker, markersize=6, linewidth=1.8, label=arm)
        if len(line) == 1:
            axes.axhline(perplexities[0], color=colour, linewidth=1, linestyle="--", zorder=0)
    _scale_quality(axes, [point for line in arms.values() for point in line])
    axes.legend(frameon=False)
    axes.grid(color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    _open_frame(axes)
    return _save(figure, path)


def _draw_sizes(axes: Axes, sizes: list[list[int]]) -> None:
    """Stacked bars of a layer's group sizes, largest first, each with its number."""
    from matplotlib import colormaps

    largest = max(max(layer) for layer in sizes)
    for index, layer in enumerate(sizes):
        start = 0
        for size in layer:
            shade = size / largest
            axes.barh(index, size, left=start, height=0.82, color=colormaps[COLOUR_MAP](shade), edgecolor="white")
            ink = "black" if shade > 0.55 else "white"
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
    shown = range(len(order)) if len(order) <= 32 else []
    labels = [order[position] for position in shown]
    fontsize = 8 if len(order) <= 16 else 7
    axes.set_xticks(shown, labels, fontsize=fontsize, rotation=90 if len(order) > 16 else 0)
    axes.set_yticks(shown, labels, fontsize=fontsize)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)  # they would cover the frames of the outer groups


def _collect_arms(points: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """(bytes, perplexity) of every arm, arms in order of appearance."""
    arms: dict[str, list[tuple[float, float]]] = {}
    for index, point in enumerate(points):
        missing = [key for key in POINT_KEYS if key not in point]
        if missing:
            raise ValueError(f"points[{index}] lacks {', '.join(missing)}: every point needs {', '.join(POINT_KEYS)}.")
        arms.setdefault(point["arm"], []).append((float(point["kv_bytes_per_token"]), float(point["perplexity"])))
    if not arms:
        raise ValueError("points is empty: give at least one measured arm.")
    return arms


def _scale_quality(axes: Axes, measured: list[tuple[float, float]]) -> None:
    """Ticks at the measured cache sizes; a logarithmic axis where values span a factor."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, StrMethodFormatter

    sizes, perplexities = sorted({size for size, _ in measured}), [perplexity for _, perplexity in measured]
    if sizes[0] > 0 and len(sizes) > 1:
        axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size / 1024:g}" for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("KV cache, KiB per token")
    axes.set_ylabel("perplexity (lower is better)")
    if max(perplexities) > 4 * min(perplexities):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _open_frame(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _new_figure(height: float) -> Figure:
    """A figure of README width, outside pyplot's registry."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("Plotting needs matplotlib: pip install asymgqa_peft[plot]") from error
    return Figure(figsize=(WIDTH, height), layout="constrained")


def _save(figure: Figure, path: str | Path) -> list[Path]:
    """Write PNG and SVG beside each other; the same figure gives the same bytes."""
    from matplotlib import rc_context

    path = Path(path)
    stem = path.with_suffix("") if path.suffix.lower() in (".png", ".svg") else path  # keep the .5 of "qwen2.5"
    stem.parent.mkdir(parents=True, exist_ok=True)
    written = [stem.with_name(f"{stem.name}.{suffix}") for suffix in ("png", "svg")]
    with rc_context({"svg.hashsalt": "asymgqa_peft"}):
        figure.savefig(written[0], dpi=DPI, facecolor="white")
        figure.savefig(written[1], facecolor="white", metadata={"Date": None})
    return written
