"""How an audit is shown: one table of the headlines, and one picture."""

from typing import Any

import numpy as np
from matplotlib import pyplot

from utils.audit.base import NONE, ON
from utils.evaluation.figures import picture, plain
from utils.evaluation.tables import aligned

MARKS = {"leaks": "!", "over-unlearnt": "-", "as the retain model": "="}
COLOURS = {"leaks": "C3", "over-unlearnt": "C0", "as the retain model": "0.6", None: "0.85"}


def audit_table(report: dict[str, Any], every: bool = False) -> str:
    """The report as a Markdown table, one line for each measure that stands for its audit, or for `every` measure.

    A cell is the value in percent and, where it is compared, how far it is above the retain-only model's, in points,
    with the interval of that. Several checkpoints of one method have a column more: means and standard deviations.
    """
    shown = [entry for entry in (*report["audits"], *report["over_checkpoints"]) if entry["headline"] or every]
    subjects, kinds = list(dict.fromkeys(map(_subject, shown))), list(dict.fromkeys(map(_kind, shown)))
    cells = {(_kind(entry), _subject(entry)): _cell(entry) for entry in shown}
    lines = [["audit", *subjects]]
    lines += [[": ".join(kind), *(cells.get((kind, subject), "") for subject in subjects)] for kind in kinds]
    said = ", ".join(f"{mark} {verdict}" for verdict, mark in MARKS.items())
    meaning = f"percent (points above the retain model [{report['level']:.0%} interval]): {said}"
    return "\n".join([aligned(lines), meaning, *report["notes"]])


def _subject(entry: dict[str, Any]) -> str:
    several = [] if "checkpoint" in entry else [f"mean of {entry['n']}"]
    return ", ".join([entry["method"], *([] if entry["wrapper"] in (ON, NONE) else [entry["wrapper"]]), *several])


def _kind(entry: dict[str, Any]) -> tuple[str, str]:
    return entry["audit"], entry["measure"]


def _cell(entry: dict[str, Any]) -> str:
    value = f"{100 * entry['value']:.1f}"
    if "value_deviation" in entry:
        value += f" ± {100 * entry['value_deviation']:.1f}"
        gain = "advantage" in entry and f" ({100 * entry['advantage']:+.1f} ± {100 * entry['advantage_deviation']:.1f})"
        return value + (gain or "")
    if "advantage" not in entry:
        low, high = entry["interval"]
        return f"{value} [{100 * low:.1f}, {100 * high:.1f}]"
    low, high = entry["advantage_interval"]
    gain = f"{100 * entry['advantage']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
    return f"{value} ({gain}) {MARKS[entry['verdict']]}"


@picture
def draw_audit(report: dict[str, Any]) -> pyplot.Figure:
    """For every audit's headline a panel with a bar for each subject: points above the retain-only model, with their
    interval; where nothing is compared the value itself."""
    entries = [entry for entry in report["audits"] if entry["headline"]]
    kinds, subjects = list(dict.fromkeys(map(_kind, entries))), list(dict.fromkeys(map(_subject, entries)))
    columns = min(3, len(kinds))
    rows = -(-len(kinds) // columns)
    size = 4 * columns + 1.5, rows * (1.1 + 0.26 * len(subjects))
    figure, panels = pyplot.subplots(rows, columns, figsize=size, squeeze=False, sharey=True)
    for panel in panels.flat[len(kinds) :]:
        panel.set_visible(False)
    for panel, kind in zip(panels.flat, kinds):
        for entry in (entry for entry in entries if _kind(entry) == kind):
            compared = "advantage" in entry
            value, interval = (
                entry[name] for name in (("advantage", "advantage_interval") if compared else ("value", "interval"))
            )
            at = subjects.index(_subject(entry))
            error = np.abs(np.array(interval) - value)[:, None] * 100
            panel.barh(at, 100 * value, color=COLOURS[entry.get("verdict")], edgecolor="black", linewidth=0.5)
            panel.errorbar(100 * value, at, xerr=error, color="black", capsize=2, linewidth=1)
        panel.set_title(": ".join(kind), fontsize=9)
        panel.set_yticks(range(len(subjects)), [plain(subject) for subject in subjects], fontsize=8)
        panel.axvline(0, color="black", linewidth=0.8)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="x", alpha=0.3)
    panels[0][0].invert_yaxis()
    figure.supxlabel("points above the retain model (pale bars: the value, in percent)", fontsize=9)
    figure.tight_layout()
    return figure
