r"""Evaluate checkpoints of any kind on the four splits, or answer new text with and without the unlearning prompt.

python inference_spul.py --dataset=sst2 --model_checkpoints=[local path to checkpoints] --forget_size=1.0

Several paths after --model_checkpoints give one table. Writes metrics.json and predictions.jsonl to
saved_results/<checkpoint>-<dataset>, or to --output_path.
"""

import hashlib
import os
from pathlib import Path
from time import perf_counter

from utils import cli
from utils.errors import note_once

LONGEST_NAME = 150  # characters of a default output folder
PREDICTION_COLUMNS = [
    "method", "checkpoint", "split", "text", "label_text", "prediction", "correct", "label_prediction",
    "label_probabilities", "label_mass", "loss",
]  # fmt: skip


def parse_args():
    from utils import arguments

    parser = cli.ArgumentParser(__doc__)
    parser.add_argument(
        "--model_checkpoints", type=cli.path, nargs="+", required=True, help="what spul.py or qlora.py wrote, or models"
    )
    arguments.add_model_arguments(parser)
    parser.add_argument("--forget_size", type=cli.fraction, default=1.0, help="share of train_forget that was unlearnt")
    parser.add_argument("--parent_path", type=cli.path, help="where the parent of the checkpoint lies, if it was moved")
    parser.add_argument(
        "--logits_path", type=cli.path, help="taken as in the published command; nothing is compared with a reference"
    )
    parser.add_argument(
        "--router", type=cli.path, help="ECO checkpoint: add a row with the prompt only where its classifier flags"
    )
    parser.add_argument("--force", action="store_true", help="take a --router that was trained on other data")
    parser.add_argument(
        "--show_examples",
        type=cli.non_negative_int,
        default=0,
        metavar="N",
        help="print the answers to N sentences of train_forget and N of test_retain",
    )
    group = parser.add_argument_group("new text (instead of the evaluation)")
    group.add_argument("--text", type=cli.text, action="append", help="answer this text (repeatable)")
    group.add_argument(
        "--input_file",
        type=cli.path,
        help="answer every text of this .txt (a line each), .csv, .jsonl or .parquet file",
    )
    group.add_argument("--json", action="store_true", help="print the answers as JSON lines instead of a table")
    parser.set_defaults(dataset=None)  # default: what the checkpoint was trained on, so that --text needs no hub
    args = parser.parse_args()
    if args.max_eval_samples == 0:
        parser.error("--max_eval_samples=0 leaves nothing to evaluate")
    if args.force and not args.router:
        parser.error("--force goes with --router")
    if args.json and not (args.text or args.input_file):
        parser.error("--json goes with --text or --input_file")
    of_evaluation = ("max_eval_samples", "show_examples", "output_path", "overwrite")
    given = [name for name in of_evaluation if getattr(args, name) != parser.get_default(name)]
    if given and (args.text or args.input_file):
        parser.error(f"--{given[0]} is of the evaluation, which --text and --input_file replace; leave it out")
    return args


def main(args):
    from utils import distributed
    from utils.data.load import dataset_name
    from utils.data.select import load_rows
    from utils.evaluation import figures, tables
    from utils.storage import checkpoints, files, outputs
    from utils.tasks.classification import label_words

    if args.logits_path:
        note_once("inference compares nothing with a reference, so --logits_path is not used")
    new_text = args.text or args.input_file
    if not args.dataset:
        manifest = checkpoints.first_manifest(args.model_checkpoints)
        if new_text and "label_words" in manifest:
            return predict(args, manifest["label_words"])
        args.dataset = manifest["arguments"]["dataset"] if manifest else "sst2"
    frames = load_rows(vars(args))
    words = label_words(frames)
    if new_text:
        return predict(args, words)

    names = "+".join(Path(os.path.abspath(name)).name for name in args.model_checkpoints)
    if len(names) > LONGEST_NAME:
        digest = hashlib.sha256(names.encode()).hexdigest()[:8]
        names = f"{names[:LONGEST_NAME]}...{len(args.model_checkpoints)}-{digest}"
    name = args.output_path or f"saved_results/{names}-{dataset_name(args.dataset)}"
    with outputs.claim([name], args) as output:
        records, predictions = evaluate(args, frames, words)
        if distributed.is_main():
            with output.new_folder() as folder:
                files.write_json(folder / "metrics.json", records)
                predictions.to_json(folder / "predictions.jsonl", orient="records", lines=True)
                figures.draw_comparison(records, path=folder / "comparison.png")
    print(tables.table(records))
    if sentence := tables.meaning(records):
        print(f"\n{sentence}")
    if args.show_examples:
        print(f"\n{tables.examples(predictions, args.show_examples)}\n")
    print(f"wrote {output}")


def evaluate(args, frames, words):
    """One record per checkpoint, and a DataFrame with one prediction per checkpoint and row."""
    import pandas as pd

    from utils import job
    from utils.evaluation.record import make_record, method_names, with_distances
    from utils.evaluation.run import check_served, evaluate_splits, note_other_length, note_other_rows
    from utils.interventions.router import find_router, routed
    from utils.interventions.served import load_served
    from utils.models.chain import resolve_chain

    settings = job.settings_of(args)
    chains = [resolve_chain(name, args.trust_remote_code, args.parent_path) for name in args.model_checkpoints]
    router = find_router(args.router, chains, settings.model, args.parent_path, args.force)
    note_other_rows(chains, frames, args.forget_size)
    records, predictions, names = [], [], method_names(chains)
    texts = [text for frame in frames.values() for text in frame["text"]]
    for method, name in zip(names, args.model_checkpoints):
        served = load_served(name, settings.model, args.parent_path, args.max_length)
        check_served(served, frames, args.max_length)
        note_other_length(served, texts, args.max_length)
        variants = {method: served}
        if router and served.chain[-1].kind == "prompt":
            variants[f"{method} + router"] = routed(served, router, settings.model, args.max_length)
        for variant, model in variants.items():
            start, manifest = perf_counter(), model.manifest
            splits, rows = evaluate_splits(model, frames, words, settings.evaluation, variant)
            seconds, training = perf_counter() - start, manifest.get("training")
            entry = make_record(variant, name, model.base_name, settings.evaluation, splits, seconds, training)
            records.append({**entry, "seed": manifest.get("seed", entry["seed"])})
            columns = [*PREDICTION_COLUMNS, *(["flagged", "gate_probability"] if model.is_gated else [])]
            predictions.append(rows.assign(method=variant, checkpoint=str(name))[columns])
        del served, model, variants  # two models need not fit at once
    return with_distances(records, predictions), pd.concat(predictions, ignore_index=True)


def predict(args, words):
    """Print each checkpoint's answer to each new text; for a prompt, without and with it side by side.

    Lines appear as they are answered, those of several checkpoints with the last one: two models need not fit at once.
    words: the label words for models that record none of their own.
    """
    from utils import job
    from utils.data.load import read_texts
    from utils.evaluation.predict import answer_rows, variants_of
    from utils.evaluation.run import check_texts, note_other_length
    from utils.interventions.router import find_router
    from utils.interventions.served import load_served
    from utils.models.chain import resolve_chain

    settings, several = job.settings_of(args), len(args.model_checkpoints) > 1
    texts = [*(args.text or []), *(read_texts(args.input_file) if args.input_file else [])]
    rows = [{"text": text} for text in texts]
    named = args.model_checkpoints if args.router else []
    chains = [resolve_chain(name, args.trust_remote_code, args.parent_path) for name in named]
    router = find_router(args.router, chains, settings.model, args.parent_path, args.force)
    for number, name in enumerate(args.model_checkpoints, 1):
        served = load_served(name, settings.model, args.parent_path, args.max_length)
        own_words = served.manifest.get("label_words", words)
        check_texts(served, texts, own_words, args.max_length)
        note_other_length(served, texts, args.max_length)
        prefix, last = f"{Path(name).name}: " if several else "", number == len(args.model_checkpoints)
        variants = variants_of(served, router, settings.model, args.max_length, prefix)
        answer_rows(rows, variants, own_words, args.max_length, args.eval_batch_size, args.json, last)
        del served, variants


if __name__ == "__main__":
    cli.run_script(parse_args, main)
