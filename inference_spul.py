r"""Evaluate checkpoints of any kind on the four splits, or answer new text with and without the unlearning prompt.

python inference_spul.py --dataset=sst2 --model_checkpoints=[local path to checkpoints] --forget_size=1.0

Several paths after --model_checkpoints give one table; with --together they are unlearning requests that one model
serves; with --audit they are attacked instead. Writes metrics.json and predictions.jsonl, or audit.json, to
saved_results/<checkpoint>-<dataset>, or to --output_path.
"""

import hashlib
import os
from pathlib import Path

from utils import cli
from utils.errors import note_once

LONGEST_NAME = 150  # characters of a default output folder


def parse_args():
    from utils import arguments
    from utils.audit.names import AUDIT_NAMES

    parser = cli.ArgumentParser(__doc__)
    parser.add_argument(
        "--model_checkpoints", type=cli.path, nargs="+", help="what spul.py or qlora.py wrote, or models"
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
        "--without_gate", action="store_true", help="add a row for what stands behind a gate, in front of every query"
    )
    arguments.add_report_arguments(parser)
    group = parser.add_argument_group("new text (instead of the evaluation)")
    group.add_argument("--text", type=cli.text, action="append", help="answer this text (repeatable)")
    group.add_argument(
        "--input_file",
        type=cli.path,
        help="answer every text of this .txt (a line each), .csv, .jsonl or .parquet file",
    )
    group.add_argument("--json", action="store_true", help="print the answers as JSON lines instead of a table")
    arguments.add_request_arguments(parser)
    arguments.add_audit_arguments(parser, AUDIT_NAMES)
    parser.set_defaults(dataset=None)  # default: what the checkpoint was trained on, so that --text needs no hub
    args = parser.parse_args()
    arguments.refuse_shard_contradictions(parser, args)
    arguments.refuse_audit_contradictions(parser, args)
    arguments.refuse_request_contradictions(parser, args)
    if args.max_eval_samples == 0:
        parser.error("--max_eval_samples=0 leaves nothing to evaluate")
    if args.force and not args.router:
        parser.error("--force goes with --router")
    arguments.refuse_text_contradictions(parser, args)
    return args


def main(args):
    from utils import distributed, job
    from utils.evaluation import export, figures, requests, tables
    from utils.evaluation.evaluate import CheckpointSettings, evaluate_checkpoints
    from utils.evaluation.run import refuse_probe
    from utils.storage import checkpoints, files, outputs
    from utils.tasks.rows import data_arguments, load_rows, recorded_task, refuse_recorded

    if args.logits_path:
        note_once("inference compares nothing with a reference, so --logits_path is not used")
    if args.add or args.revoke:
        return edit(args)
    asked, new_text = None, args.text or args.input_file
    if args.requests or args.together:
        asked = requests.find_requests(cli.take(requests.RequestSettings, args))
        args.model_checkpoints = [requests.path_of(request) for request in asked]
        if new_text:
            return predict(args, None, asked)
    if not args.dataset:
        manifest = checkpoints.first_manifest(args.model_checkpoints)
        if new_text and (task := recorded_task(manifest)):
            refuse_recorded(vars(args))
            return predict(args, task)
        known = manifest["arguments"]["dataset"] if manifest else "sst2"
        args.dataset = requests.dataset_of(asked) if asked else known
        vars(args).update(data_arguments(manifest, vars(args)))
    frames = load_rows(vars(args))
    if new_text:
        return predict(args, frames.task)

    if args.audit is not None:
        from utils.audit.command import audit

        return audit(args, frames, default_name(args))
    settings = job.settings_of(args)
    refuse_probe(settings.evaluation, frames.task)
    with outputs.claim([args.output_path or default_name(args)], args) as output:
        how = frames, settings.model, settings.evaluation
        if asked:
            records, predictions = requests.evaluate_requests(asked, *how)
        else:
            records, predictions = evaluate_checkpoints(cli.take(CheckpointSettings, args), *how)
        if distributed.is_main():
            with output.new_folder() as folder:
                files.write_json(folder / "metrics.json", records)
                predictions.to_json(folder / "predictions.jsonl", orient="records", lines=True)
                if args.export:
                    export.write_open_unlearning(folder, records, predictions, frames.task)
                figures.draw_comparison(records, path=folder / "comparison.png")
                if figures.gates_differ(records):
                    figures.draw_false_positives(records, path=folder / "false_positives.png")
    print(tables.table(records, args.ci))
    if asked:
        print(f"\n{tables.request_tables(records[0]['requests'])}")
    for sentence in filter(None, (tables.meaning(records), tables.without_reference(records))):
        print(f"\n{sentence}")
    if args.show_examples:
        print(f"\n{tables.examples(predictions, args.show_examples)}\n")
    print(f"wrote {output}")


def default_name(args):
    """The output folder of an evaluation, or an audit, without --output_path."""
    from utils.data.load import dataset_name

    names = "+".join(Path(os.path.abspath(name)).name for name in args.model_checkpoints)
    if len(names) > LONGEST_NAME:
        digest = hashlib.sha256(names.encode()).hexdigest()[:8]
        names = f"{names[:LONGEST_NAME]}...{len(args.model_checkpoints)}-{digest}"
    return f"saved_results/{names}-{dataset_name(args.dataset)}{'' if args.audit is None else '-audit'}"


def predict(args, task, asked=None):
    """Print the answers to the new texts. task: that of checkpoints that record none of their own.

    asked: the requests that are served together, instead of one checkpoint after the other.
    """
    from utils import job
    from utils.evaluation.evaluate import CheckpointSettings
    from utils.evaluation.predict import TextSettings, predict_checkpoints, predict_together

    model, texts = job.settings_of(args).model, cli.take(TextSettings, args)
    if asked:
        predict_together(asked, model, texts)
    else:
        predict_checkpoints(cli.take(CheckpointSettings, args), task, model, texts)


def edit(args):
    """Add a request to the ledger or revoke one, and print the ledger."""
    from utils import distributed
    from utils.evaluation.tables import ledger_table
    from utils.interventions import ledger

    def change():
        if args.add:
            return ledger.add(args.requests, *args.add, args.trust_remote_code, args.parent_path)
        return ledger.revoke(args.requests, args.revoke)

    print(ledger_table(distributed.on_main(change)))


if __name__ == "__main__":
    cli.run_script(parse_args, main)
