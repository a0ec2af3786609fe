"""An evaluation in the files that open-unlearning writes, for whoever compares with it or reads them with its tools.

For each method `<method>_EVAL.json`, {metric: {"agg_value": number, "value_by_index": {"0": {...}, ...}}}, and
`<method>_SUMMARY.json`, {metric: number} (its src/evals/base.py). The index is the place of a row in its split. Of
question answering the metrics have its names (its configs/eval/tofu_metrics) where they are the same quantity. Others
are called `<split>_accuracy` and `<split>_loss`, the loss in nats a row.

Three things differ. An extraction strength of 0 is 1/n there, n the number of tokens. Its tokens end before the
end-of-sequence token, which ours have. `retain` is the whole of train_retain here, or as many rows as were asked for.
privleak and the mia_ metrics are left out, since they need log-probabilities of single tokens or rows of other authors.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from utils.storage.files import write_json
from utils.storage.outputs import exported_stems
from utils.tasks.base import Recorded, Task
from utils.tasks.question_answering import QuestionAnswering

Metric = dict[str, Any]  # {"agg_value", "value_by_index"}
TOFU_SETS = {"train_forget": "forget", "train_retain": "retain", "real_authors": "ra", "world_facts": "wf"}
MEMORISED = {"exact_memorisation": "exact_memorization", "extraction_strength": "extraction_strength"}


def write_open_unlearning(folder: Path, records: Sequence[dict], predictions: pd.DataFrame, task: Task) -> None:
    """Write both files of every record into `folder`. predictions: the rows of all records, with `method`."""
    for record, stem in zip(records, exported_stems([record["method"] for record in records])):
        found = metrics_of(record, predictions[predictions["method"] == record["method"]], task)
        write_json(folder / f"{stem}_EVAL.json", dict(sorted(found.items())))
        summary = {name: metric["agg_value"] for name, metric in sorted(found.items())}
        write_json(folder / f"{stem}_SUMMARY.json", summary)


def metrics_of(record: dict, rows: pd.DataFrame, task: Task) -> dict[str, Metric]:
    """{metric: {"agg_value", and where it has rows "value_by_index"}} of one record. rows: its predictions."""
    found: dict[str, Metric] = {}
    for split in dict.fromkeys(rows["split"]):
        own, scores = rows[rows["split"] == split], record["splits"][split]
        if task.kind != QuestionAnswering.kind:
            found |= _of_any(split, own, scores)
        elif split in TOFU_SETS:
            found |= _of_questions(TOFU_SETS[split], own, scores)
        if split == "train_forget":
            found |= {
                theirs: _metric(scores[ours], {"score": own[ours]}) for ours, theirs in MEMORISED.items() if ours in own
            }
    whole = record.get("summary", {}) | record.get("distance_to_retain_model", {})
    return found | {name: {"agg_value": whole[name]} for name in ("model_utility", "forget_quality") if name in whole}


def _of_any(split: str, rows: pd.DataFrame, scores: Recorded) -> dict[str, Metric]:
    """Accuracy and loss of the rows of one split."""
    columns = {"accuracy": "correct", "loss": "loss"}
    return {
        f"{split}_{name}": _metric(scores[name], {"score": rows[column].astype(float)})
        for name, column in columns.items()
        if name in scores
    }


def _of_questions(name: str, rows: pd.DataFrame, scores: Recorded) -> dict[str, Metric]:
    """What open-unlearning says of the set `name` of TOFU. The probability is that of the answer alone, and where ours
    was normalised by wrong answers that stands beside it."""
    losses = rows["loss"] / rows["tokens"]
    plain = np.exp(-losses)
    found = {f"{name}_Q_A_Prob": _metric(plain.mean(), {"prob": plain, "avg_loss": losses})}
    if name in ("ra", "wf") and not np.allclose(plain, rows["probability"]):
        found[f"{name}_Q_A_Prob_normalised"] = _metric(scores["probability"], {"prob": rows["probability"]})
    if "rouge_l_recall" in scores:
        found[f"{name}_Q_A_ROUGE"] = _metric(
            scores["rouge_l_recall"], {"rougeL_recall": rows["rouge_l_recall"], "rougeL_f1": rows["rouge_l_f1"]}
        )
    if "truth_score" in scores:
        ratio = "forget_truth_ratio" if name == "forget" else f"{name}_Truth_Ratio"
        found[ratio] = _metric(scores["truth_score"], {"score": rows["truth_ratio_geometric"]})
    return found


def _metric(value: float, columns: Mapping[str, pd.Series]) -> Metric:
    """columns: {what a number is called: (n,) of the rows}. What is no finite number becomes None."""
    numbers = {name: [float(x) if np.isfinite(x) else None for x in column] for name, column in columns.items()}
    by_index = {str(i): dict(zip(numbers, cells)) for i, cells in enumerate(zip(*numbers.values()))}
    return {"agg_value": float(value), "value_by_index": by_index}
