"""What a person reads at the end of a run: the table, the sentences that say what it means, examples."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from utils.data.splits import SPLITS
from utils.evaluation.statistics import mean_and_spread
from utils.tasks.base import Task
from utils.tasks.classification import Classification
from utils.tasks.rows import TASKS

FORGET_SPLITS, RETAIN_SPLITS = ("train_forget", "test_forget"), ("train_retain", "test_retain")
FORGET_SHARES = {  # score: what its column is called
    "out_of_label": "forget answers out of label (train/test)",
    "label_accuracy": "forget label acc. (train/test)",  # of the most probable label word: what a refusal still tells
}
FALSE_POSITIVES = {
    "flagged": "retain rows flagged, % (train/test)",
    "flagged_accuracy": "of these answered rightly, % (train/test)",
}
DISTANCES = [
    "accuracy gap to the retain model, points (forget/retain)",
    "JS to the retain model, bits (train/test forget)",
]
OVERALL = "overall (forgetting/privacy/utility)"


def table(records: list[dict], ci: bool = False) -> str:
    """The records as a Markdown table, one line each: accuracy / weighted F1 of the four splits, in percent.

    Then two shares of the forget rows, in percent: answers that are no label, and rows whose most probable label word
    is their label. Behind the name of a split stands its number of rows. Where a record is of a model with a gate, the
    share of retain rows that it flags follows, and how many of those are still answered rightly. Where all records have
    it, the distance to the retain model follows. ci: whether 95 % intervals of the accuracies and the overall score are
    shown, too, and below the table what `p_values` says.
    """
    task = TASKS[records[0].get("task", Classification.kind)]
    text = _table_of(records, task, ci) if task.shown else _label_table(records, ci)
    return "\n".join([text, *p_values(records)]) if ci else text


def _label_table(records: list[dict], ci: bool) -> str:
    """`table` of rows that are answered with one of a few words."""
    gated = any("flagged" in entry["splits"]["train_retain"] for entry in records)
    header = ["method", *(f"{split} (acc/F1)" for split in SPLITS), *FORGET_SHARES.values()]
    header += FALSE_POSITIVES.values() if gated else []
    distances = all("distance_to_retain_model" in entry for entry in records)
    scored = ci and any("overall" in entry for entry in records)
    lines = [_with_counts(header, records) + DISTANCES * distances + [OVERALL] * scored]
    for entry in records:
        splits = entry["splits"]
        cells = [f"{_shown(splits[s], 'accuracy', ci)} / {100 * splits[s]['f1']:.1f}" for s in SPLITS]
        cells += [" / ".join(f"{100 * splits[s][score]:.1f}" for s in FORGET_SPLITS) for score in FORGET_SHARES]
        if gated:
            cells += [" / ".join(_percent(splits[s].get(score)) for s in RETAIN_SPLITS) for score in FALSE_POSITIVES]
        cells += _distance_cells([entry]) if distances else []
        lines.append([entry["method"], *cells, *([_overall([entry])] if scored else [])])
    return aligned(lines)


def _table_of(records: list[dict], task: type[Task], ci: bool) -> str:
    """The same of a `task` that has scores of its own: those that are shown, in percent, for every split; what is said
    of all splits together; distances to the retain model; and what a gate flags of each split."""
    shown = task.shown
    splits = [split for split in records[0]["splits"] if ":" not in split]
    scores = [name for name in shown if any(name in entry["splits"][s] for entry in records for s in splits)]
    summaries = list(dict.fromkeys(name for entry in records for name in entry.get("summary", {})))
    distances = list(dict.fromkeys(name for entry in records for name in entry.get("distance_to_retain_model", {})))
    gated = any("flagged" in entry["splits"][splits[0]] for entry in records)
    gaps = {f"accuracy_{side}": f"gap of {task.shown[task.headline]}, {side}" for side in ("forget", "retain")}
    header = ["method", *splits, *(gaps.get(name, name.replace("_", " ")) for name in [*summaries, *distances])]
    header += ["flagged, % (" + "/".join(splits) + ")"] * gated
    scored = ci and any("overall" in entry for entry in records)
    header += [OVERALL] * scored
    lines = [[f"{cell} n={records[0]['splits'][cell]['n']}" if cell in splits else cell for cell in header]]
    for entry in records:
        cells = [" / ".join(_shown(entry["splits"][s], name, ci) for name in scores) for s in splits]
        cells += [_number(entry.get("summary", {}).get(name)) for name in summaries]
        cells += [_number(entry.get("distance_to_retain_model", {}).get(name)) for name in distances]
        if gated:
            cells.append(" / ".join(_percent(entry["splits"][s].get("flagged")) for s in splits))
        lines.append([entry["method"], *cells, *([_overall([entry])] if scored else [])])
    return f"{aligned(lines)}\nper split, in %: {' / '.join(shown[name] for name in scores)}"


def p_values(records: list[dict], splits: Sequence[str] = ("test_retain", "train_forget")) -> list[str]:
    """A line for each method that was tested against another: McNemar's p-values of `splits`, medians over seeds."""
    lines = []
    tested = [entry for entry in records if "mcnemar" in entry]
    for method in dict.fromkeys(entry["method"] for entry in tested):
        tests = [entry["mcnemar"] for entry in tested if entry["method"] == method]
        medians = {s: np.median([test["p"][s] for test in tests]) for s in splits if all(s in t["p"] for t in tests)}
        if medians:
            told = ", ".join(f"{split} p = {_number(p)}" for split, p in medians.items())
            seeds = f", median over {len(tests)} seeds" if len(tests) > 1 else ""
            lines.append(f"{method} against {tests[0]['against']} (McNemar{seeds}): {told}")
    return lines


def without_reference(records: list[dict]) -> str | None:
    """What cannot be said of free answers without a retain model among `records`, in a sentence; None with one."""
    task = TASKS[records[0].get("task", Classification.kind)]
    if not task.generates or any("distance_to_retain_model" in entry for entry in records):
        return None
    return (
        "No retain model (qlora.py --exclude_forget) is among --model_checkpoints, so there is no forget quality and "
        "no similarity gap."
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _overall(entries: list[dict]) -> str:
    """The overall score and its three parts, over seeds; empty where there is none."""
    found = [entry["overall"] for entry in entries if "overall" in entry]
    if not found:
        return ""
    score, *parts = (
        _mean_and_spread([one[name] for one in found], 2) for name in ("score", "forgetting", "privacy", "utility")
    )
    return f"{score} ({' / '.join(parts)})"


def _shown(scores: dict, name: str, ci: bool) -> str:
    """A score of a split in percent, with `ci` an accuracy with its interval; records of earlier versions lack it."""
    interval = scores.get("accuracy_ci") if ci and name == "accuracy" else None
    return _percent(scores.get(name)) + (f" [{_percent(interval[0])}, {_percent(interval[1])}]" if interval else "")


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


def aligned(lines: list[list[str]]) -> str:
    """Rows of cells, the header first, as a Markdown table."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |" for line in lines)


def _distance_cells(entries: list[dict]) -> list[str]:
    """Mean accuracy gaps in points, of forget and of retain rows, then the two Jensen-Shannon divergences in bits."""
    rows = [entry["distance_to_retain_model"] for entry in entries]
    gaps = [_mean_and_spread([100 * row[f"accuracy_{side}"] for row in rows], 1) for side in ("forget", "retain")]
    js = [_mean_and_spread([row[f"js_{s}"] for row in rows], 3) for s in FORGET_SPLITS if f"js_{s}" in rows[0]]
    return [" / ".join(gaps), *([" / ".join(js)] if js else [])]


def _mean_and_spread(values: Sequence[float], digits: int) -> str:
    """The mean, with the standard deviation (n - 1) behind it where there are several values."""
    mean, spread = mean_and_spread(values)
    return f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if len(values) > 1 else "")


def comparison_table(records: list[dict]) -> str:
    """The records as a Markdown table, one line per method in the order of first appearance.

    Accuracies and the shares of `table` in percent, distance to the retain model, learning rate, seconds per
    training step, most memory in GiB. Over seeds: mean and standard deviation.
    """
    headline = records[0].get("headline", "accuracy")
    labelled = all("out_of_label" in entry["splits"][SPLITS[0]] for entry in records)
    forget_shares = FORGET_SHARES if labelled else {}
    distances = DISTANCES if labelled else DISTANCES[:1]
    header = ["method", *SPLITS, *forget_shares.values(), *distances, "learning rate", "s/step", "GiB"]
    lines = [_with_counts(header, records)]
    for method in dict.fromkeys(entry["method"] for entry in records):
        entries = [entry for entry in records if entry["method"] == method]
        scores = [[entry["splits"][split] for entry in entries] for split in SPLITS]
        cells = [_mean_and_spread([100 * score[headline] for score in column], 1) for column in scores]
        shares = [
            " / ".join(_mean_and_spread([100 * s[share] for s in scores[i]], 1) for i in (1, 3))
            for share in forget_shares
        ]
        rates = sorted({entry["search"]["lr"] for entry in entries if "search" in entry})
        costs = [entry["training"] for entry in entries if entry.get("training")]
        seconds = [cost["seconds_per_step"] for cost in costs if cost["seconds_per_step"]]
        lines.append([
            method + (" (target)" if method == "retain model" else ""), *cells, *shares, *_distance_cells(entries),
            ", ".join(f"{rate:g}" for rate in rates), f"{np.mean(seconds):.2f}" if seconds else "",
            f"{max(cost['peak_memory_bytes'] for cost in costs) / 2**30:.1f}" if costs else "",
        ])  # fmt: skip
    return aligned(lines)


def comparison(records: list[dict]) -> str:
    """`comparison_table`, and below it the number of seeds where there are several, overall scores and McNemar's
    p-values."""
    seeds = len({entry["seed"] for entry in records})
    said = [f"mean ± standard deviation over {seeds} seeds"] if seeds > 1 else []
    methods = dict.fromkeys(entry["method"] for entry in records if "overall" in entry)
    for method in methods:
        said.append(f"{method}, {OVERALL}: {_overall([entry for entry in records if entry['method'] == method])}")
    lines = [*said, *p_values(records, ("test_retain",))]
    return "\n\n".join([comparison_table(records), *(["\n".join(f"- {line}" for line in lines)] if lines else [])])


def race_table(race: dict[str, Any]) -> str:
    """What race.json says (utils.race), a line per route: seconds until the first step was done and until the goal, and
    the scores of the two splits at the end in percent, on the rows of the curve and on those of the last evaluation."""

    def both(curve: dict[str, float], final: dict[str, float], split: str) -> str:
        return f"{100 * curve[split]:.1f} / {100 * final[split]:.1f}"

    splits, goal = ("train_forget", "test_retain"), race["goal"]
    counts = [f"{race['rows']['curve'][s]} / {race['rows']['final'][s]} rows" for s in splits]
    header = ["route", "first step, s", "steps", "time, s", "goal reached after"]
    lines = [[*header, *(f"{s}, % ({n})" for s, n in zip(splits, counts)), "at the goal, evaluated anew"]]
    tuned = race["fine_tuned"]
    lines.append(["fine-tuned", "", "", "", "", *(both(tuned["curve"], tuned["final"], s) for s in splits), ""])
    over = {"budget": f"not within {race['budget_minutes']:g} min", "schedule": "not by the end of its schedule"}
    for name, route in race["routes"].items():
        reached = route["seconds_to_goal"]
        lines.append([
            name, f"{route['first_step_done']:.1f}", str(route["steps"]), f"{route['seconds']:.1f}",
            over[route["ended"]] if reached is None else f"{reached:.1f} s",
            *(both(route["curve"][-1], route["final"], s) for s in splits), "yes" if route["confirmed"] else "no",
        ])  # fmt: skip
    said = (
        f"goal: {race['score']} on train_forget at most {100 * goal['train_forget']:g} %, on test_retain no more than "
        f"{100 * goal['retain_drop']:g} % of the rows below the fine-tuned model"
    )
    return "\n\n".join([aligned(lines), f"{said}; the clock counts {race['clock']}"])


def gate_table(settings: dict[str, Any]) -> str:
    """What a gate's classifier does on the four splits, and on rewritten test rows, as text; shares in percent.

    settings: what gate.json says.
    """
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
        aligned(lines),
    ]
    if settings.get("evasion"):  # of earlier versions
        evasions = [["names rewritten", "flagged, % (train_forget)", "flagged, % (test_forget)"]]
        for evasion, share in settings["evasion"].items():
            shares = [f"{100 * share[s]:.1f}" if s in share else "" for s in ("train_forget", "test_forget")]
            evasions.append([evasion, *shares])
        text.append(aligned(evasions))
    if settings.get("rewritings"):
        text.append(_rewritings(settings))
    return "\n".join(text)


def ledger_table(ledger: dict[str, Any]) -> str:
    """The requests of a ledger as text, one line each."""
    lines = [["request", "state", "added", "revoked", "checkpoint"]]
    for entry in ledger["requests"]:
        state = "active" if entry["active"] else "revoked"
        lines.append([entry["name"], state, entry["date"], entry["revoked"] or "", entry["checkpoint"]])
    return aligned(lines)


def request_tables(requests: dict[str, Any]) -> str:
    """Which request acts on whose forget rows, in percent of train_forget / test_forget, and what each cost, as text.

    requests: that of a record, as utils.evaluation.requests.evaluate_requests makes it.
    """
    names, owned = requests["names"], requests["interference"]
    header = ["acts on rows of, %"]
    header += [f"{name} n={'/'.join(str(owned[name][s]['n']) for s in FORGET_SPLITS)}" for name in owned]
    lines = [header]
    for name in names:
        shares = [[own[split]["acts"][name] for split in FORGET_SPLITS] for own in owned.values()]
        lines.append([name, *(" / ".join(f"{100 * share:.1f}" for share in pair) for pair in shares)])
    missed = [[own[split]["none"] for split in FORGET_SPLITS] for own in owned.values()]
    lines.append(["(none)", *(" / ".join(f"{100 * share:.1f}" for share in pair) for pair in missed)])
    costs = [["request", "training rows", "training seconds", "bytes"]]
    for name in names:
        cells = [requests[key][name] for key in ("rows", "seconds", "bytes")]
        costs.append([name, *("" if cell is None else f"{cell:,}" for cell in cells)])
    return f"{aligned(lines)}\n\n{aligned(costs)}"


def _rewritings(settings: dict[str, Any]) -> str:
    """The share of rewritten test rows that a gate flags, as text; in brackets without --gate_augment.

    settings: what gate.json says.
    """
    found, before = settings["rewritings"], settings.get("rewritings_plain", {})
    splits = list(next(iter(found.values())))
    lines = [["test rows rewritten", *(f"{split}, %" for split in splits), "rows"]]
    for name, parts in found.items():
        cells = []
        for split in splits:
            cell = f"{100 * parts[split]['flagged']:.1f}" if split in parts else ""
            if split in before.get(name, {}):
                cell += f" ({100 * before[name][split]['flagged']:.1f})"
            cells.append(cell)
        lines.append(
            [name, *cells, " / ".join(str(parts[split]["rows"]) if split in parts else "0" for split in splits)]
        )
    text = aligned(lines)
    if before:
        text += "\nin brackets: the gate trained without --gate_augment"
    if settings["names_by"] != "list":
        said = "capitals show where names are" if settings["names_by"] == "capitals" else "no names are known"
        text += f"\n{said}: give a list (--forget_only or --eco_names) to rewrite the names of people"
    return text


def meaning(records: list[dict]) -> str | None:
    """What the last record changed against the fine-tuned or merged one, in two sentences; None without that pair."""
    before = next((entry for entry in records if entry["method"] in ("fine-tuned", "merged")), None)
    after = records[-1]
    if before is None or after is before:
        return None
    old, new = before["splits"], after["splits"]
    task = TASKS[after.get("task", Classification.kind)]
    if task.shown:
        name = task.headline
        pairs = {split: (100 * old[split][name], 100 * new[split][name]) for split in SPLITS}
        told = ", ".join(f"{split} {now:.1f} % ({was:.1f} % before)" for split, (was, now) in pairs.items())
        return f"{task.shown[name]} with {after['method']}: {told}."
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


def examples(predictions: pd.DataFrame, n: int) -> str:
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
