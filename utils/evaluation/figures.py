"""The pictures that a run leaves. They are decoration: one that fails is a note."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from utils.data.splits import SPLITS
from utils.errors import first_line, note_once
from utils.storage.files import new_file
from utils.tasks.classification import Classification
from utils.tasks.rows import TASKS

FILLS = ("full", "none", "left")
matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  (the backend without a screen has to be chosen first)
from matplotlib.ticker import MaxNLocator  # noqa: E402


def picture(draw: Callable[..., pyplot.Figure]) -> Callable[..., None]:
    """Makes of function(...) -> figure a function(..., path=) that saves the figure there as PNG.

    It is decoration: a failure is only a note.
    """

    def drawn(*arguments: object, path: Path) -> None:
        try:
            with new_file(path) as file:
                draw(*arguments).savefig(file, dpi=150, format="png")
        except Exception as error:
            note_once(f"there is no picture {Path(path).name} ({first_line(error)})")
        finally:
            pyplot.close("all")

    return drawn


def plain(name: str) -> str:
    """`name` as matplotlib draws it letter by letter: between two `$` it would read a formula."""
    return name.replace("$", r"\$")


@picture
def draw_tradeoff(records: list[dict]) -> pyplot.Figure:
    """Forget accuracy against retain accuracy, in percent, on train and test rows.

    A small mark stands for each seed, a large one for the mean. Every method has its own shape, so that it reads
    without colour and no label can overlap. records: as utils.evaluation.record.make_record gives them.
    """
    shapes = "osD^v<>phHdX*P8" + "x+1234|_"
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.8), sharey=True)
    methods = list(dict.fromkeys(entry["method"] for entry in records))
    for panel, phase in zip(panels, ("train", "test")):
        for i, method in enumerate(methods):
            splits = [entry["splits"] for entry in records if entry["method"] == method]
            retain, forget = ([100 * s[f"{phase}_{kind}"]["accuracy"] for s in splits] for kind in ("retain", "forget"))
            target, shape = method == "retain model", shapes[i % len(shapes)]
            style = {"marker": shape, "color": "black" if target else f"C{i % 10}", "linestyle": "none"}
            if len(splits) > 1:
                panel.plot(retain, forget, markersize=4, alpha=0.5, **style)
            label = "retain model (target)" if target else plain(method)
            edge = {} if shape in "x+1234|_" else {"markeredgecolor": "black", "fillstyle": FILLS[i // 10 % 3]}
            size = 13 - 7 * i / len(methods)  # those drawn later are smaller, so that none hides another
            panel.plot(np.mean(retain), np.mean(forget), markersize=size, label=label, **style, **edge)
        panel.plot(
            100, 0, marker="*", markersize=16, color="white", markeredgecolor="black", linestyle="none", label="ideal"
        )
        panel.set(title=phase, xlabel=f"{phase}_retain accuracy, % (keep)", xlim=(-4, 104), ylim=(-4, 104))
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("forget accuracy, % (forget)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="center left", bbox_to_anchor=(0.8, 0.5), fontsize=9)
    figure.tight_layout(rect=(0, 0, 0.8, 1))
    return figure


@picture
def draw_race(race: dict[str, Any]) -> pyplot.Figure:
    """Both scores of the goal over minutes, a line per route; a star where a route is at the goal, a dashed line where
    that begins. race: what race.json says (utils.race)."""
    figure, panels = pyplot.subplots(1, 2, figsize=(10.5, 4), sharex=True)
    goal = race["goal"]
    for panel, split in zip(panels, ("train_forget", "test_retain")):
        for i, (name, route) in enumerate(race["routes"].items()):
            curve, at = route["curve"], route["seconds_to_goal"]
            minutes, shares = ([scale * p[key] for p in curve] for key, scale in (("seconds", 1 / 60), (split, 100)))
            style = {"color": f"C{i}", "marker": "os^Dv"[i % 5], "linestyle": ("-", "--", ":", "-.")[i % 4]}
            panel.plot(minutes, shares, label=plain(name), markersize=4, linewidth=1.4, markevery=(i, 3), **style)
            if at is not None:
                share = next(100 * point[split] for point in curve if point["seconds"] == at)
                panel.plot(at / 60, share, marker="*", markersize=14, color=f"C{i}", markeredgecolor="black")
        panel.axhline(100 * goal[split], color="gray", linestyle=(0, (2, 2)), linewidth=1)
        panel.set(title=split, xlabel="minutes (loading, gate, reference, steps)", ylim=(-3, 103))
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(f"{race['score'].replace('_', ' ')}, %")
    handles, labels = panels[0].get_legend_handles_labels()
    handles.append(pyplot.Line2D([], [], marker="*", markersize=12, color="white", markeredgecolor="black"))
    figure.legend(handles, [*labels, "at the goal"], frameon=False, ncols=4, loc="upper center")
    figure.tight_layout(rect=(0, 0, 1, 0.92))
    return figure


@picture
def draw_strength(settings: dict[str, Any]) -> pyplot.Figure:
    """The metric on train_forget against the strength of ECO's corruption; target and choice marked. settings: what
    eco.json says."""
    curve, metric, target = settings["curve"], settings["metric"], settings["target"]
    figure, axes = pyplot.subplots(figsize=(5, 3.4))
    axes.semilogx([point["strength"] for point in curve], [point["metric"] for point in curve], "o-", color="black")
    axes.axhline(target, linestyle="--", color="gray", label="target")
    axes.axvline(settings["corruption"]["strength"], linestyle=":", color="gray", label="chosen")
    axes.set(xlabel="strength of the corruption", ylabel=f"{metric} on train_forget", ylim=(-0.02, 1.02))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    return figure


@picture
def draw_roc(settings: dict[str, Any]) -> pyplot.Figure:
    """Recall against false positive rate (log scale) of a gate on plain and on rewritten test rows, each threshold
    marked; pale, of the gate that was trained without rewritten rows. settings: what gate.json says."""
    figure, axes = pyplot.subplots(figsize=(5.6, 4))
    lowest = 1e-3
    gates = {"": settings["roc"], ", not augmented": settings.get("roc_plain", {})}
    for (suffix, curves), color in zip(gates.items(), ("black", "C1")):
        for (rows, found), style, marker in zip(curves.items(), ("-", "--"), "os"):
            rates, recall = np.array(found["curve"]).T
            axes.plot(np.maximum(rates, lowest), recall, style, color=color, linewidth=1.3, label=rows + suffix)
            at = max(found["at_threshold"][0], lowest), found["at_threshold"][1]
            axes.plot(*at, marker, color=color, markersize=7, fillstyle="none", clip_on=False)
    axes.plot([], [], "o", color="gray", fillstyle="none", label="threshold")
    axes.set(xscale="log", xlim=(lowest, 1), ylim=(-0.02, 1.02))
    axes.set(xlabel="false positive rate on rows to keep", ylabel="recall on rows to forget")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right", fontsize=8)
    figure.tight_layout()
    return figure


@picture
def draw_comparison(records: list[dict]) -> pyplot.Figure:
    """Bars of the headline (percent) per split and method; hatched, so that it reads without colour."""
    task, columns = TASKS[records[0].get("task", Classification.kind)], min(4, len(records))
    figure, axes = pyplot.subplots(figsize=(8, 3.4 + 0.2 * math.ceil(len(records) / columns)))
    width, headline = 0.8 / len(records), records[0].get("headline", "accuracy")
    for i, (entry, hatch) in enumerate(zip(records, ("", "//", "..", "xx", "\\\\", "++", "oo", "**") * len(records))):
        shares = [100 * entry["splits"][split][headline] for split in SPLITS]
        places = np.arange(len(SPLITS)) + (i - (len(records) - 1) / 2) * width
        bars = axes.bar(places, shares, width * 0.94, label=plain(entry["method"]), hatch=hatch, edgecolor="white")
        if len(records) <= 4:
            axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
    axes.set_xticks(range(len(SPLITS)), [split.replace("_", " ") for split in SPLITS])
    axes.set(ylabel=f"{task.shown.get(headline, headline)}, %", ylim=(0, 105))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=columns, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.tight_layout()
    return figure


@picture
def draw_false_positives(records: list[dict]) -> pyplot.Figure:
    """Of each model with a gate: what it flags of test_retain, against how many of these rows are still answered
    rightly, and how many rows to forget are."""
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 3.8))
    gated = [entry for entry in records if "flagged" in entry["splits"]["test_retain"]]
    for i, entry in enumerate(gated):
        kept, share = entry["splits"]["test_retain"], 100 * entry["splits"]["test_retain"]["flagged"]
        style = {"marker": "osD^vPX*"[i % 8], "linestyle": "none", "color": f"C{i % 10}", "alpha": 0.8}
        for panel, value in zip(
            panels, (kept.get("flagged_accuracy"), entry["splits"]["test_forget"][entry.get("headline", "accuracy")])
        ):
            if value is not None:
                panel.plot(share, 100 * value, label=plain(entry["method"]), **style)
    for panel, title in zip(panels, ("of these answered rightly, %", "test_forget answered rightly, %")):
        panel.set(xlabel="test_retain rows flagged, %", ylabel=title, ylim=(-4, 104))
        panel.set_xlim(left=-0.04 * panel.get_xlim()[1])
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[1].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="center left", bbox_to_anchor=(0.74, 0.5), fontsize=8)
    figure.tight_layout(rect=(0, 0, 0.74, 1))
    return figure


def gates_differ(records: list[dict]) -> bool:
    """Whether there are models behind gates that flag more and fewer rows to keep, so that a curve says something."""
    return len({entry["splits"]["test_retain"].get("flagged") for entry in records} - {None}) > 1


@picture
def draw_curves(log: list[dict], measured: str = "accuracy") -> pyplot.Figure:
    """The losses over steps, and beside them the score `measured` on the way, if any was."""
    losses = [line for line in log if "loss" in line]
    scores = [line for line in log if measured in line]
    figure, axes = pyplot.subplots(1, 1 + bool(scores), figsize=(5 + 5 * bool(scores), 3.6), squeeze=False)
    steps = [line["step"] for line in losses]
    names = [key for key in losses[0] if key.startswith("L_")] or ["loss"]
    for style, name in zip(("-", "--", ":", "-."), names):
        axes[0][0].plot(
            steps,
            [line[name] for line in losses],
            style,
            label=name.replace("L_", "$L_{") + "}$" if name != "loss" else "loss",
            linewidth=1.2,
        )
    axes[0][0].set(xlabel="step", ylabel="loss per row")
    if all(line[name] >= 0 for line in losses for name in names):  # gradient ascent goes below
        axes[0][0].set_ylim(bottom=0)
    axes[0][0].legend(frameon=False)
    if scores:
        steps = [line["step"] for line in scores]
        for style, split in zip(("-", "--", "-.", ":"), scores[0][measured]):
            shares = [100 * line[measured][split] for line in scores]
            axes[0][1].plot(steps, shares, style, label=split, marker="o", markersize=3)
        axes[0][1].set(xlabel="step", ylabel=f"{measured.replace('_', ' ')}, %", ylim=(0, 101))
        axes[0][1].legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))  # off the curves
    for panel in axes[0]:
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.tight_layout()
    return figure
