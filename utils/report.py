"""What a person reads at the end of a run: the table, the sentence that says what it means, examples, pictures."""

import json
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np

from utils.cli import first_line, note_once
from utils.files import new_file, write_json
from utils.splits import SPLITS

FORGET_SPLITS = ("train_forget", "test_forget")
FORGET_SHARES = {  # score: what its column is called
    "out_of_label": "forget answers out of label (train/test)",
    "label_accuracy": "forget label acc. (train/test)",  # of the most probable label word: what a refusal still tells
}
DISTANCES = ["accuracy gap to retrained, points (forget/retain)", "JS to retrained, bits (train/test forget)"]
FILLS = ("full", "none", "left")

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  (the backend without a screen has to be chosen first)


def picture(draw: Callable[..., pyplot.Figure]) -> Callable[..., None]:
    """Makes function(...) -> figure one of (..., path) that saves it. It is decoration: a failure is only a note."""

    def drawn(*arguments, path: Path) -> None:
        try:
            with new_file(path) as file:
                draw(*arguments).savefig(file, dpi=150, format="png")
        except Exception as error:
            note_once(f"there is no picture {Path(path).name} ({first_line(error)})")
        finally:
            pyplot.close("all")

    return drawn


def _plain(name: str) -> str:
    """`name` as matplotlib draws it letter by letter: between two `$` it would read a formula."""
    return name.replace("$", r"\$")


def table(records):
    """The records as text: accuracy / weighted F1 in percent for the four splits and their numbers of rows; then how
    many forget answers are no label, and how many forget rows have their label as the most probable label word."""
    header = ["method", *(f"{split} (acc/F1)" for split in SPLITS), *FORGET_SHARES.values()]
    distances = all("distance_to_retrained" in entry for entry in records)
    lines = [_with_counts(header, records) + DISTANCES * distances]
    for entry in records:
        splits = entry["splits"]
        cells = [f"{100 * splits[s]['accuracy']:.1f} / {100 * splits[s]['f1']:.1f}" for s in SPLITS]
        cells += [" / ".join(f"{100 * splits[s][score]:.1f}" for s in FORGET_SPLITS) for score in FORGET_SHARES]
        lines.append([entry["method"], *cells, *(_distance_cells([entry]) if distances else [])])
    return _aligned(lines)


def _with_counts(header: list[str], records: list[dict]) -> list[str]:
    """The header with the number of rows behind the name of each split: a percentage of 26 rows is not one of 2,600."""
    named = []
    for cell in header:
        split = cell.split(" ")[0]
        if split in SPLITS:
            counts = sorted({entry["splits"][split]["n"] for entry in records})
            cell += f" n={'/'.join(map(str, counts))}"
        named.append(cell)
    return named


def _aligned(lines):
    """Rows of cells, the header first, as a Markdown table."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |" for line in lines)


def _distance_cells(entries):
    """Mean accuracy gaps in points, of forget and of retain rows, then the two Jensen-Shannon divergences in bits."""
    rows = [entry["distance_to_retrained"] for entry in entries]
    gaps = [_mean_and_spread([100 * row[f"accuracy_{side}"] for row in rows], 1) for side in ("forget", "retain")]
    js = [_mean_and_spread([row[f"js_{split}"] for row in rows], 3) for split in FORGET_SPLITS]
    return [" / ".join(gaps), " / ".join(js)]


def _mean_and_spread(values, digits):
    """The mean, with the standard deviation (n - 1) behind it where there are several values."""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def write_comparison(folder, records):
    """table.md, metrics.json and tradeoff.png of `utils.compare`: one record per method and seed."""
    write_json(Path(folder) / "metrics.json", records)
    with new_file(Path(folder) / "table.md") as file:
        file.write_text(comparison_table(records) + "\n", encoding="utf-8")
    draw_tradeoff(records, path=Path(folder) / "tradeoff.png")


def comparison_table(records):
    """One line per method, in the order of first appearance: accuracy in percent (mean and standard deviation over
    seeds), distance to the retrained model, cost of a training step."""
    header = ["method", *SPLITS, *FORGET_SHARES.values(), *DISTANCES, "learning rate", "s/step", "GiB"]
    lines = [_with_counts(header, records)]
    for method in dict.fromkeys(entry["method"] for entry in records):
        entries = [entry for entry in records if entry["method"] == method]
        scores = [[entry["splits"][split] for entry in entries] for split in SPLITS]
        cells = [_mean_and_spread([100 * score["accuracy"] for score in column], 1) for column in scores]
        shares = [
            " / ".join(_mean_and_spread([100 * s[share] for s in scores[i]], 1) for i in (1, 3))
            for share in FORGET_SHARES
        ]
        rates = sorted({entry["search"]["lr"] for entry in entries if "search" in entry})
        costs = [entry["training"] for entry in entries if entry.get("training")]
        seconds = [cost["seconds_per_step"] for cost in costs if cost["seconds_per_step"]]
        lines.append([
            method + (" (target)" if method == "retrained" else ""), *cells, *shares, *_distance_cells(entries),
            ", ".join(f"{rate:g}" for rate in rates), f"{np.mean(seconds):.2f}" if seconds else "",
            f"{max(cost['peak_memory_bytes'] for cost in costs) / 2**30:.1f}" if costs else "",
        ])  # fmt: skip
    return _aligned(lines)


@picture
def draw_tradeoff(records):
    """Forget accuracy against retain accuracy, train and test: a small mark per seed, a large one for the mean. Every
    method has its own shape, so that it reads without colour and no label can overlap."""
    shapes = "osD^v<>phHdX*P8" + "x+1234|_"
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.8), sharey=True)
    methods = list(dict.fromkeys(entry["method"] for entry in records))
    for panel, phase in zip(panels, ("train", "test")):
        for i, method in enumerate(methods):
            splits = [entry["splits"] for entry in records if entry["method"] == method]
            retain, forget = ([100 * s[f"{phase}_{kind}"]["accuracy"] for s in splits] for kind in ("retain", "forget"))
            target, shape = method == "retrained", shapes[i % len(shapes)]
            style = {"marker": shape, "color": "black" if target else f"C{i % 10}", "linestyle": "none"}
            if len(splits) > 1:
                panel.plot(retain, forget, markersize=4, alpha=0.5, **style)
            label = "retrained (target)" if target else _plain(method)
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


def gate_table(settings):
    """What ECO's classifier does on the four splits, and when names are rewritten, as text."""
    rates, held = settings["rates"], settings["calibration"]
    lines = [["split", "flagged, %", "wrong, %"]]
    lines += [
        [split, f"{100 * rate['flagged']:.1f}", f"{100 * rate['wrong']:.1f}" if "wrong" in rate else ""]
        for split, rate in rates.items()
        if isinstance(rate, dict)
    ]
    text = [
        f"classifier {settings['classifier']}, threshold {settings['threshold']:.4f} set on the scores "
        f"of {held['retain']} retain and {held['forget']} forget rows not seen in fitting, AUC {held['auc']:.3f}; "
        f"{rates['auc_train']:.3f} on train, {rates['auc_test']:.3f} on test",
        _aligned(lines),
    ]
    if settings["evasion"]:
        evasions = [["names rewritten", "flagged, % (train_forget)", "flagged, % (test_forget)"]]
        for evasion, share in settings["evasion"].items():
            shares = [f"{100 * share[s]:.1f}" if s in share else "" for s in ("train_forget", "test_forget")]
            evasions.append([evasion, *shares])
        text.append(_aligned(evasions))
    return "\n".join(text)


@picture
def draw_strength(curve, metric, target, chosen):
    """The metric on train_forget against the strength of ECO's corruption; target and choice marked."""
    figure, axes = pyplot.subplots(figsize=(5, 3.4))
    axes.semilogx([point["strength"] for point in curve], [point["metric"] for point in curve], "o-", color="black")
    axes.axhline(target, linestyle="--", color="gray", label="target")
    axes.axvline(chosen, linestyle=":", color="gray", label="chosen")
    axes.set(xlabel="strength of the corruption", ylabel=f"{metric} on train_forget", ylim=(-0.02, 1.02))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    return figure


def meaning(records):
    """What the last record changed against the fine-tuned one, in two sentences; None where there is no such pair."""
    before = next((entry for entry in records if entry["method"] in ("fine-tuned", "merged")), None)
    after = records[-1]
    if before is None or after is before:
        return None
    old, new = before["splits"], after["splits"]
    share = {split: (100 * old[split]["accuracy"], 100 * new[split]["accuracy"]) for split in SPLITS}
    ranked = {split: 100 * new[split]["label_accuracy"] for split in FORGET_SPLITS}
    return (
        f"With {after['method']} the model gives {share['train_forget'][1]:.1f} % of the rows to forget their label "
        f"({share['train_forget'][0]:.1f} % before; of unseen ones {share['test_forget'][1]:.1f} %), and "
        f"{share['test_retain'][1]:.1f} % of the other unseen rows ({share['test_retain'][0]:.1f} % before; "
        f"of training rows {share['train_retain'][1]:.1f} %, {share['train_retain'][0]:.1f} % before). "
        f"Whoever has it rank the label words instead still reads the label of {ranked['train_forget']:.1f} % of the "
        f"rows to forget ({ranked['test_forget']:.1f} % of unseen ones)."
    )


def examples(predictions, n):
    """The answers of every method to the first `n` sentences of train_forget and `n` of test_retain, as text.

    predictions: DataFrame with columns method, split, text, label_text, prediction. Chosen are sentences that the
    fine-tuned model answers rightly where there are any, since only those can be forgotten.
    """
    lines = []
    known = predictions[predictions["correct"] & (predictions["method"] == "fine-tuned")]
    for split, title in (("train_forget", "to forget"), ("test_retain", "to keep")):
        rows = predictions[predictions["split"] == split]
        pool = known if (known["split"] == split).any() else rows
        for text in pool.loc[pool["split"] == split, "text"].drop_duplicates().head(n):
            answers = rows[rows["text"] == text]
            said = ", ".join(f"{method}: {word}" for method, word in zip(answers["method"], answers["prediction"]))
            lines += [f"[{title}, truly {answers['label_text'].iloc[0]}] {text}", f"    {said}"]
    return "\n".join(lines)


@picture
def draw_comparison(records):
    """Bars of accuracy (percent) per split and method; hatched, so that it reads without colour."""
    figure, axes = pyplot.subplots(figsize=(8, 3.6))
    width = 0.8 / len(records)
    for i, (entry, hatch) in enumerate(zip(records, ("", "//", "..", "xx", "\\\\", "++", "oo", "**") * len(records))):
        shares = [100 * entry["splits"][split]["accuracy"] for split in SPLITS]
        places = np.arange(len(SPLITS)) + (i - (len(records) - 1) / 2) * width
        bars = axes.bar(places, shares, width * 0.94, label=_plain(entry["method"]), hatch=hatch, edgecolor="white")
        if len(records) <= 4:
            axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
    axes.set_xticks(range(len(SPLITS)), [split.replace("_", " ") for split in SPLITS])
    axes.set(ylabel="accuracy, %", ylim=(0, 110))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=min(4, len(records)), loc="upper center", bbox_to_anchor=(0.5, 1.16))
    figure.tight_layout()
    return figure


def write_curves(folder, log):
    """training.jsonl and training.png in `folder`: every logged loss, and the accuracies, against the step."""
    (Path(folder) / "training.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log), encoding="utf-8")
    _draw_curves(log, path=Path(folder) / "training.png")


@picture
def _draw_curves(log):
    losses = [line for line in log if "loss" in line]
    accuracies = [line for line in log if "accuracy" in line]
    figure, axes = pyplot.subplots(1, 1 + bool(accuracies), figsize=(5 + 5 * bool(accuracies), 3.6), squeeze=False)
    steps = [line["step"] for line in losses]
    names = [key for key in losses[0] if key.startswith("L_")] or ["loss"]
    for style, name in zip(("-", "--", ":"), names):
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
    if accuracies:
        steps = [line["step"] for line in accuracies]
        for style, split in zip(("-", "--", "-.", ":"), accuracies[0]["accuracy"]):
            shares = [100 * line["accuracy"][split] for line in accuracies]
            axes[0][1].plot(steps, shares, style, label=split, marker="o", markersize=3)
        axes[0][1].set(xlabel="step", ylabel="accuracy, %", ylim=(0, 101))
        axes[0][1].legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))  # off the curves
    figure.tight_layout()
    return figure
