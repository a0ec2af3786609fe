r"""Evaluate checkpoints of any kind on the four splits, or answer new text with and without the unlearning prompt.

python inference_spul.py --dataset=sst2 --model_checkpoints=[local path to checkpoints] --forget_size=1.0

Several paths after --model_checkpoints give one table. Writes metrics.json and predictions.jsonl to
saved_results/<checkpoint>-<dataset>, or to --output_path.
"""

import dataclasses
import hashlib
import json
import os
import sys
from pathlib import Path
from time import perf_counter

from utils import arguments, cli
from utils.errors import UserError, note_once

PRINTED_TOGETHER = 4  # batches of new texts: sorted by length among them they are padded less
LONGEST_NAME = 150  # characters of a default output folder
PREDICTION_COLUMNS = [
    "method", "checkpoint", "split", "text", "label_text", "prediction", "correct", "label_prediction",
    "label_probabilities", "label_mass", "loss",
]  # fmt: skip


def parse_args():
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

    from utils.evaluation.record import make_record, with_distances
    from utils.evaluation.run import check_rows, evaluate_splits, note_other_length
    from utils.interventions.served import load_served

    chains = resolve(args)
    router = find_router(args, chains)
    note_other_rows(args, chains, frames)
    records, predictions, names = [], [], method_names(chains)
    for method, name in zip(names, args.model_checkpoints):
        loaded = load_served(name, args, args.parent_path)
        check_rows(
            loaded.model.config,
            loaded.tokenizer,
            frames,
            args,
            0 if loaded.prompt is None else len(loaded.prompt),
            loaded.template,
        )
        note_other_length(loaded, frames, args)
        variants = {method: loaded}
        if router and loaded.prompt is not None:
            variants[f"{method} + router"] = routed(loaded, router, args)
        for variant, model in variants.items():
            start = perf_counter()
            splits, rows = evaluate_splits(model, frames, words, args, variant)
            training = (loaded.chain[-1].manifest or {}).get("training")
            entry = make_record(variant, name, loaded.base_name, args, splits, perf_counter() - start, training)
            records.append({**entry, "seed": (loaded.chain[-1].manifest or entry)["seed"]})
            columns = [*PREDICTION_COLUMNS, *(["flagged", "gate_probability"] if model.gate else [])]
            predictions.append(rows.assign(method=variant, checkpoint=str(name))[columns])
        del loaded, model, variants  # two models need not fit at once
    return with_distances(records, predictions), pd.concat(predictions, ignore_index=True)


def resolve(args):
    """The chain of Links of every checkpoint."""
    from utils.models.chain import resolve_chain

    return [resolve_chain(name, args.trust_remote_code, args.parent_path) for name in args.model_checkpoints]


def note_other_rows(args, chains, frames):
    """Say which checkpoints were trained on other rows than those that the train columns of the table are about."""
    from utils.data.select import learnt_by

    for chain in chains:
        manifest = chain[-1].manifest
        if manifest is None or (chain[-1].kind == "lora" and args.forget_size < 1):  # it knows more rows than these
            continue
        if not learnt_by(manifest, frames):
            note_once(
                f"{chain[-1].path} was trained on other rows than the train columns show; give this command the "
                "--dataset, --max_train_samples, --forget_share, --forget_only, --rows_seed, --validation_share and "
                "--forget_size of its training"
            )


def find_router(args, chains):
    """The Link of --router, or None. Raises UserError unless it fits every prompt among the `chains`."""
    from utils.models.chain import resolve_chain

    if not args.router:
        return None
    prompts = [chain for chain in chains if chain[-1].kind == "prompt"]
    if not prompts:
        raise UserError("--router goes in front of a prompt; add what spul.py wrote to --model_checkpoints")
    *above, link = resolve_chain(args.router, args.trust_remote_code, args.parent_path)
    if link.kind != "eco":
        raise UserError(f"{args.router} is no ECO checkpoint; --router takes what baselines.py wrote with eco")
    for *model, prompt in prompts:
        if link.manifest["data_fingerprint"] != prompt.manifest["data_fingerprint"] and not args.force:
            raise UserError(
                f"the classifier of {args.router} was trained on other data than {prompt.path}; train one on the same "
                "rows, or take it nevertheless with --force"
            )
        reads_states = link.manifest["arguments"].get("eco_classifier") == "features"
        if reads_states and above[-1].sha256 != model[-1].sha256:
            raise UserError(
                f"the classifier of {args.router} reads the hidden states of another model than that of {prompt.path}; "
                "train one on the same model"
            )
    return link


def routed(loaded, router, args):
    """`loaded` with its prompt only in front of the queries that the classifier of the Link `router` flags."""
    from utils.interventions import eco

    return dataclasses.replace(loaded, gate=eco.load_gate(router, dataclasses.replace(loaded, prompt=None), args))


def method_names(chains):
    """What the table calls each checkpoint. Those of one method carry as much of their paths as tells them apart."""
    names = []
    for chain in chains:
        last = chain[-1]
        arguments = last.manifest["arguments"] if last.manifest else {}
        retrained = "retrained" if arguments.get("exclude_forget") else None
        known = {"model": "base", "lora": "fine-tuned", "prompt": "SPUL"}  # the others carry their method
        names.append(arguments.get("unlearn_method") or retrained or known[last.kind])
    paths = [Path(os.path.abspath(chain[-1].name)) for chain in chains]
    if repeated := [path for path in paths if paths.count(path) > 1]:
        raise UserError(f"--model_checkpoints names {repeated[0]} more than once; name it once")
    alike = [[path for other, path in zip(names, paths) if other == name] for name in names]
    return [
        f"{name} ({distinct_part(path, among)})" if len(among) > 1 else name
        for name, path, among in zip(names, paths, alike)
    ]


def distinct_part(path, among):
    """The shortest end of `path` that no other of `among` ends in."""
    ends = (Path(*path.parts[-n:]) for n in range(1, len(path.parts)))
    return next((end for end in ends if sum(other.parts[-len(end.parts) :] == end.parts for other in among) == 1), path)


def predict(args, words):
    """Print each checkpoint's answer to each new text; for a prompt, without and with it side by side.

    Lines appear as they are answered, those of several checkpoints with the last one: two models need not fit at once.
    words: the label words for models that record none of their own.
    """
    import pandas as pd
    from tqdm import tqdm

    from utils.data.load import read_texts
    from utils.evaluation.run import check_texts, note_other_length
    from utils.interventions.served import load_served

    texts = [*(args.text or []), *(read_texts(args.input_file) if args.input_file else [])]
    rows = [{"text": text} for text in texts]
    size = PRINTED_TOGETHER * args.eval_batch_size
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    router = find_router(args, resolve(args)) if args.router else None
    for number, name in enumerate(args.model_checkpoints, 1):
        loaded = load_served(name, args, args.parent_path)
        own_words = (loaded.chain[-1].manifest or {}).get("label_words", words)
        check_texts(loaded, texts, own_words, args)
        note_other_length(loaded, {"new": pd.DataFrame({"text": texts})}, args)
        prefix = f"{Path(name).name}: " if len(args.model_checkpoints) > 1 else ""
        variants = {f"{prefix}{variant}": model for variant, model in variants_of(loaded, router, args).items()}
        with tqdm(total=len(rows), desc="answering", unit="text", disable=len(parts) == 1, mininterval=1) as progress:
            for part in parts:
                answer_rows(part, variants, own_words, args)
                progress.update(len(part))
                if number == len(args.model_checkpoints):
                    with tqdm.external_write_mode(file=sys.stdout):
                        print("\n".join(shown(row, args.json) for row in part), flush=True)


def variants_of(loaded, router, args):
    """{what the answer is called: the model that gives it}: as loaded, and without what unlearning added to it."""
    plain = dataclasses.replace(loaded, prompt=None, gate=None, corruption=None, marks=None)
    if loaded.prompt is not None:
        routers = {"with router": routed(loaded, router, args)} if router else {}
        return {"without prompt": plain, "with prompt": loaded, **routers}
    if loaded.corruption is not None:
        return {"without ECO": plain, "with ECO": loaded}
    return {"answer": loaded}


def answer_rows(rows, variants, words, args):
    """Put into each of the `rows`, {"text"}, what every one of the `variants` answers."""
    from utils.evaluation.answering import answer_texts

    texts = [row["text"] for row in rows]
    for variant, model in variants.items():
        answers = answer_texts(model, texts, words, args.max_length, args.eval_batch_size)
        for row, (word, probability) in zip(rows, answers):
            row[variant] = {"answer": word, "probability": round(probability, 4)}
        if model.gate is not None:
            for row, flag, share in zip(rows, *model.gate.decide(texts)):
                row[variant] |= {"flagged": bool(flag), "gate_probability": round(float(share), 4)}


def shown(row, as_json):
    """One row of answers as a JSON line, or as the text with a line for each answer below it."""
    if as_json:
        return json.dumps(row, allow_nan=False)
    lines = [row["text"]]
    for variant, value in row.items():
        if variant != "text":
            gate = f", gate {100 * value['gate_probability']:.1f} %" if "flagged" in value else ""
            gate += {True: ": flagged", False: ": let through"}.get(value.get("flagged"), "")
            lines.append(f"    {variant:15} {value['answer']} ({100 * value['probability']:.1f} %{gate})")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(parse_args, main)
