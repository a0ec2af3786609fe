"""What a person reads of a benchmark: the table, the sentences that say what it means, and the picture."""

from functools import partial
from statistics import median

import numpy as np
from scipy import stats

from utils.evaluation.figures import picture, pyplot

GIB = 2**30
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
COLUMNS = ("work", "path", "rows", "s/pass", "rows/s", "peak GiB", "of floor", "times faster", "memory")
WIDTHS = (22, 20, 4, 8, 8, 8, 8, 12, 6)


def label(record):
    """What the table calls the record's path."""
    name = f"{record['path']} {SHORT[record['dtype']]}"
    return f"{name}, no prompt" if record["part"] == "inference" and not record["p"] else name


def rows(records, cell, header):
    """The table's lines of one cell; the last two columns compare ours with the plain path of that line."""
    lines = [_line(COLUMNS)] if header else []
    found = [record for record in records if record["name"] == cell.name and record["part"] == cell.part]
    for record in found:
        start = [record["name"], label(record), max(record["rows"])]
        if record["error"]:
            lines.append(f"{_line(start)}  failed: {record['error']}")
            continue
        faster, memory = ratio(found[-1], record) if record["path"] == "plain" and not found[-1]["error"] else ("", "")
        cells = [record["seconds_per_pass"], record["rows_per_second"], record["peak_bytes"] / GIB]
        share = "" if record["floor_share"] is None else f"{100 * record['floor_share']:.0f} %"
        lines.append(_line([*start, *cells, share, faster, memory]))
    return "\n".join(lines)


def _line(cells):
    texts = [f"{c:.2f}" if isinstance(c, float) else str(c) for c in cells]
    return "  ".join(t.ljust(w) if i < 2 else t.rjust(w) for i, (t, w) in enumerate(zip(texts, WIDTHS)))


def ratio(ours, plain):
    """(times faster, share of the memory) of `ours` against `plain`: the median over passes on the same rows."""
    faster = median(slow / fast for slow, fast in zip(plain["seconds"], ours["seconds"]))
    return faster, ours["peak_bytes"] / plain["peak_bytes"]


def ratios(records):
    """Every plain record with what ours (the same work, with the prompt) gains over it."""
    result = []
    for plain in _measured(records):
        for ours in _measured(records):
            same = all(plain[key] == ours[key] for key in ("part", "name", "p"))
            if same and plain["path"] == "plain" and ours["path"] == "ours":
                faster, memory = ratio(ours, plain)
                names = {key: plain[key] for key in ("part", "name", "task", "p", "length")}
                result.append({**names, "plain": label(plain), "times_faster": faster, "memory_share": memory})
    return result


def linear_fit(records):
    """Seconds a step = a + b rows, least squares over the passes of `rows`; None where it was not measured."""
    found = [record for record in _measured(records) if record["part"] == "rows"]
    if not found:
        return None
    fit = stats.linregress(found[0]["rows"], found[0]["seconds"])
    return {"seconds": fit.intercept, "seconds_per_row": fit.slope, "r_squared": fit.rvalue**2}


def prompt_cost(records):
    """Time with the prompt over time without it, minus 1, in inference; None where it was not measured."""
    found = {r["p"] > 0: r for r in _measured(records) if r["part"] == "inference" and r["path"] == "ours"}
    if len(found) < 2:
        return None
    return median(slow / fast for slow, fast in zip(found[True]["seconds"], found[False]["seconds"])) - 1


def adapter_cost(records):
    """{method: (time, memory)} of training an adapter with it over those of LoRA fine-tuning on as many rows."""
    found = [record for record in _measured(records) if record["part"] == "adapters"]
    plain = next((record for record in found if record["name"] == "LoRA fine-tuning"), None)
    if plain is None:
        return {}
    return {
        record["name"]: (
            record["seconds_per_pass"] / plain["seconds_per_pass"],
            record["peak_bytes"] / plain["peak_bytes"],
        )
        for record in found
        if record is not plain
    }


def sentences(result):
    """What the run says, a sentence each."""
    records, lines = result["records"], []
    rates = ", ".join(f"{SHORT[k]} {v / 1e9:,.0f}" for k, v in result["machine"]["matmul_flop_per_second"].items())
    lines.append(f"Matrix products on this machine: {rates} GFLOP/s.")
    for entry in result["ratios"]:
        if entry["part"] in ("training", "fine_tuning", "baselines", "reference", "inference"):
            lines.append(
                f"{entry['name']}: {entry['times_faster']:.1f} times as fast as {entry['plain']} "
                f"in {entry['memory_share']:.2f} times the memory."
            )
    for record in _measured(records):
        if record["part"] == "training" and record["path"] == "ours":
            lines.append(
                f"{record['name']}: {100 * record['floor_share']:.0f} % of the floor of 4 N T operations (model FLOP "
                f"utilisation), N = {result['machine']['model_weights']:,} weights outside embeddings and head."
            )
    if cost := adapter_cost(records):
        most = max(cost, key=lambda name: cost[name][1])
        parts = [f"{name} {time:.2f} times the time and {memory:.2f}" for name, (time, memory) in cost.items()]
        lines.append(
            f"Against LoRA fine-tuning on as many rows, --tune=lora takes: {', '.join(parts)} times the memory."
        )
        lines.append(f"{most} takes the most memory: {cost[most][1]:.2f} times.")
    if (cost := prompt_cost(records)) is not None:
        lines.append(f"Inference with the prompt takes {100 * cost:+.1f} % of the time without it.")
    if fit := result["linear_in_rows"]:
        lines.append(
            f"A step of rows of 64 tokens takes {fit['seconds']:.2f} s + {1000 * fit['seconds_per_row']:.1f} ms a row "
            f"(R2 = {fit['r_squared']:.4f})."
        )
    for task in ("training", "reference", "inference"):
        found = [entry for entry in result["ratios"] if entry["part"] == "lengths" and entry["task"] == task]
        if found:
            by_length = ", ".join(f"{entry['times_faster']:.1f} at {entry['length']}" for entry in found)
            lines.append(f"Times faster than plain fp32 in {task} by tokens a row: {by_length}.")
    return lines


@picture
def draw(result):
    """Milliseconds a row over text length, times faster by work, seconds a step over rows, as far as they were
    measured; reads without colour."""
    records, ratios = _measured(result["records"]), [e for e in result["ratios"] if e["part"] != "lengths"]
    by_length = [r for r in records if r["part"] == "lengths" and r["task"] == "training"]
    by_rows = [r for r in records if r["part"] == "rows"]
    panels = {
        1.1: by_length and partial(_draw_lengths, records=by_length),
        1.2: (ratios or not by_length + by_rows) and partial(_draw_ratios, ratios=ratios),
        1.0: by_rows and partial(_draw_rows, records=by_rows, fit=result["linear_in_rows"]),
    }
    panels = {width: panel for width, panel in panels.items() if panel}
    size = 4.3 * len(panels), max(3.8, 1 + 0.4 * len(ratios))
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=size, squeeze=False, gridspec_kw={"width_ratios": list(panels)}
    )
    for ax, panel in zip(axes[0], panels.values()):
        panel(ax)
        ax.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


def _draw_lengths(ax, records):
    for path, style, floor in (("plain", "k--o", "k:"), ("ours", "k-s", "k-.")):
        found = [record for record in records if record["path"] == path]
        if found:
            lengths = [record["length"] for record in found]
            ax.plot(lengths, [1000 / r["rows_per_second"] for r in found], style, label=label(found[0]))
            floors = [1000 * r["floor_share"] / r["rows_per_second"] for r in found]
            ax.plot(lengths, floors, floor, alpha=0.4, label=f"floor {SHORT[found[0]['dtype']]}")
            ax.set_xticks(lengths, lengths)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(lengths, lengths)
    ax.legend(frameon=False)
    ax.set(xlabel="tokens a row", ylabel="ms a row, one training step")


def _draw_ratios(ax, ratios):
    names = [f"{entry['name']}\nagainst {entry['plain']}" for entry in ratios]
    bars = ax.barh(names, [entry["times_faster"] for entry in ratios], color="0.75", edgecolor="black", hatch="//")
    ax.bar_label(
        bars, [f"{e['times_faster']:.1f}x, {e['memory_share']:.2f} memory" for e in ratios], padding=3, fontsize=8
    )
    ax.axvline(1, color="black", linewidth=0.8)
    ax.tick_params(axis="y", labelsize=7)
    ax.invert_yaxis()
    ax.margins(x=0.35)
    ax.set(xlabel="times faster than the plain path")


def _draw_rows(ax, records, fit):
    sizes = np.array(records[0]["rows"])
    ax.plot(sizes, records[0]["seconds"], "ko", fillstyle="none", label=label(records[0]))
    ends = np.array([0, sizes.max()])
    ax.plot(ends, fit["seconds"] + fit["seconds_per_row"] * ends, "k-", linewidth=1, label="fitted line")
    ax.set_ylim(0, None)
    ax.legend(frameon=False)
    ax.set(xlabel="rows of 64 tokens", ylabel="s a training step")


def _measured(records):
    return [record for record in records if not record["error"]]
