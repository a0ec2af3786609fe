"""What a person reads at the end of a run: the table, the sentence that says what it means, examples, pictures."""

import json
from pathlib import Path

import matplotlib
import numpy as np

from utils.splits import SPLITS

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  (the backend without a screen has to be chosen first)


def table(records):
    """The records as text: accuracy / weighted F1 in percent for the four splits, then the out-of-label share."""
    header = ["method", *(f"{split} (acc/F1)" for split in SPLITS), "forget answers out of label (train/test)"]
    lines = [header]
    for entry in records:
        splits = entry["splits"]
        cells = [f"{100 * splits[s]['accuracy']:.1f} / {100 * splits[s]['f1']:.1f}" for s in SPLITS]
        out = " / ".join(f"{100 * splits[s]['out_of_label']:.1f}" for s in ("train_forget", "test_forget"))
        lines.append([entry["method"], *cells, out])
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |" for line in lines)


def meaning(records):
    """One sentence: what the last record changed against the fine-tuned one; None where there is no such pair."""
    before = next((entry for entry in records if entry["method"] in ("fine-tuned", "merged")), None)
    after = records[-1]
    if before is None or after is before:
        return None
    old, new = before["splits"], after["splits"]
    share = {split: (100 * old[split]["accuracy"], 100 * new[split]["accuracy"]) for split in SPLITS}
    return (
        f"With {after['method']} the model answers {share['train_forget'][1]:.1f} % of the reviews to forget as their "
        f"authors did ({share['train_forget'][0]:.1f} % before; unseen ones {share['test_forget'][1]:.1f} %), and "
        f"{share['test_retain'][1]:.1f} % of unseen other reviews ({share['test_retain'][0]:.1f} % before; "
        f"training reviews {share['train_retain'][1]:.1f} %, {share['train_retain'][0]:.1f} % before)."
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


def draw_comparison(records, path):
    """Bars of accuracy (percent) per split and method; hatched, so that it reads without colour."""
    figure, axes = pyplot.subplots(figsize=(8, 3.6))
    width = 0.8 / len(records)
    for i, (entry, hatch) in enumerate(zip(records, ("", "//", "..", "xx", "\\\\", "++", "oo", "**") * len(records))):
        shares = [100 * entry["splits"][split]["accuracy"] for split in SPLITS]
        places = np.arange(len(SPLITS)) + (i - (len(records) - 1) / 2) * width
        bars = axes.bar(places, shares, width * 0.94, label=entry["method"], hatch=hatch, edgecolor="white")
        if len(records) <= 4:
            axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
    axes.set_xticks(range(len(SPLITS)), [split.replace("_", " ") for split in SPLITS])
    axes.set(ylabel="accuracy, %", ylim=(0, 110))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=min(4, len(records)), loc="upper center", bbox_to_anchor=(0.5, 1.16))
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def write_curves(folder, log):
    """training.jsonl and training.png in `folder`: every logged loss, and the accuracies, against the step."""
    (Path(folder) / "training.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
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
    axes[0][0].set(xlabel="step", ylabel="nats per row")
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
    figure.savefig(Path(folder) / "training.png", dpi=150)
    pyplot.close(figure)
