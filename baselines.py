r"""Unlearn with a rival of SPUL: fine-tune the model itself against train_forget, or only instruct it.

python baselines.py --dataset=sst2 --model_checkpoints=[local path to checkpoints] \
    --max_length=1024 --set_pad_id --lr=1e-4 \
    --train_batch_size=32 --eval_batch_size=32 --num_epochs=10 --weight_decay=0.001 \
    --unlearn_method=gradient_ascent

Writes a checkpoint with manifest, metrics and curves to
unlearn_checkpoints/<method>_<model>_<dataset>-<forget_size>_<time>.
"""

import contextlib
import dataclasses
from time import perf_counter

from utils import arguments, cli

ECO_METRICS = ("accuracy", "f1", "precision", "recall", "label_accuracy", "out_of_label")
NO_TRAINING = (
    "micro_batch_size", "gradient_checkpointing", "compile", "max_steps", "max_rows", "max_grad_norm", "length_pool",
    "eval_steps", "curve_samples", "save_steps", "dry_run", "resume", "tune", "retain_loss", "retain_weight",
    "forget_per_batch", "retain_ratio", "stop_at_forget_accuracy", "logits_path",
)  # fmt: skip
ECO_SEARCH = (
    "eco_metric", "eco_target", "eco_samples", "eco_steps", "eco_start", "eco_eps", "eco_lr", "eco_sigma_min",
    "eco_bisect",
)  # fmt: skip


def parse_args():
    from utils.unlearning.methods import IN_CONTEXT, METHODS

    parser = cli.ArgumentParser(__doc__)
    parser.add_argument(
        "--model_checkpoints", type=cli.path, required=True, help="what qlora.py wrote, or a plain model"
    )
    parser.add_argument("--unlearn_method", required=True, choices=[*METHODS, *IN_CONTEXT, "eco"], help="the rival")
    arguments.add_model_arguments(parser)
    arguments.add_training_arguments(parser, num_epochs=1)
    group = parser.add_argument_group("unlearning")
    group.add_argument("--forget_size", type=cli.fraction, default=1.0, help="share of train_forget to unlearn")
    group.add_argument("--retain_loss", choices=["none", "ce", "kl"], help="on retain rows (default: the method's)")
    group.add_argument("--retain_weight", type=cli.positive_float, help="of the retain loss (default: the method's)")
    group.add_argument("--tune", choices=["full", "lora"], default="full", help="all weights, or a new LoRA adapter")
    group.add_argument(
        "--forget_per_batch",
        type=cli.non_negative_int,
        default=0,
        help="forget rows in every batch of a method with a retain loss (0: all rows mixed, as published)",
    )
    arguments.add_retain_ratio(group)
    group.add_argument(
        "--stop_at_forget_accuracy", type=cli.share, metavar="A",
        help="stop once train_forget accuracy, measured every --eval_steps, is at most A (in [0, 1])",
    )  # fmt: skip
    group.add_argument(
        "--logits_path", type=cli.path, help="file of reference quantities (default: saved_logits/<...>)"
    )
    group.add_argument(
        "--parent_path", type=cli.path, help="where the base model of --model_checkpoints lies, if it was moved"
    )
    group = parser.add_argument_group("constants of the methods (default: the authors')")
    group.add_argument("--method_beta", type=cli.positive_float, help="beta of npo, simnpo, dpo, undial, wga, satimp")
    group.add_argument("--method_beta2", type=cli.non_negative_float, help="beta2 of satimp")
    group.add_argument("--method_delta", type=cli.non_negative_float, help="margin of simnpo")
    group.add_argument("--rmu_layer", type=cli.non_negative_int, help="layer that rmu steers (default: 7 of 32)")
    group.add_argument("--rmu_steering", type=cli.positive_float, help="c of rmu")
    arguments.add_lora_arguments(parser, "LoRA (with --tune=lora)")
    group = parser.add_argument_group("prompting and icul")
    group.add_argument(
        "--forget_names",
        type=cli.path,
        help="prompting: file with the people to forget (default: --forget_only, or that of snippets)",
    )
    group.add_argument(
        "--instruction", type=cli.text, help="prompting: the instruction itself, instead of one made of the names"
    )
    group.add_argument("--icul_flipped", type=cli.positive_int, default=1, help="icul: forget rows, labels flipped")
    group.add_argument("--icul_correct", type=cli.non_negative_int, default=2, help="icul: retain rows behind them")
    add_eco_arguments(parser)
    args = parser.parse_args()
    refuse_contradictions(parser, args)
    return args


def add_eco_arguments(parser):
    """ECO's gate, corruption and search (arXiv 2406.07933); defaults are the authors' where they gave one."""
    from utils.interventions.corruption import FAMILIES

    group = parser.add_argument_group("eco")
    group.add_argument(
        "--eco_classifier", type=cli.path, default="tfidf", help="tfidf, features, or an encoder (hub id, folder)"
    )
    group.add_argument("--eco_classifier_epochs", type=cli.positive_int, default=30, help="of an encoder")
    group.add_argument("--eco_classifier_lr", type=cli.positive_float, default=2e-5, help="of an encoder")
    decision = group.add_mutually_exclusive_group()
    decision.add_argument(
        "--eco_threshold", type=cli.below_one, help="flag above this probability (default: by --eco_max_fpr)"
    )
    decision.add_argument(
        "--eco_conformal",
        type=cli.fraction,
        metavar="A",
        help="split conformal: flag retain rows with probability at most A",
    )
    decision.add_argument(
        "--eco_max_fpr",
        type=cli.fraction,
        default=0.01,
        help="flag a new retain row with about this probability at most",
    )
    group.add_argument(
        "--eco_corruption", choices=FAMILIES, default="noise-first", metavar="FAMILY", help=", ".join(FAMILIES)
    )
    group.add_argument("--eco_dims", type=cli.positive_int, default=1, help="numbers of each embedding to corrupt")
    group.add_argument(
        "--eco_tokens", choices=["all", "entities"], default="all", help="all but the last, or names only"
    )
    group.add_argument(
        "--eco_names",
        type=cli.path,
        help="list of names (default: --forget_only, or that of snippets): entities, evasion test",
    )
    group.add_argument(
        "--eco_token_classifier", type=cli.path, help="finds names for --eco_tokens=entities (hub id, folder)"
    )
    group.add_argument("--eco_strength", type=cli.non_negative_float, help="sigma; given, there is no search")
    group.add_argument("--eco_metric", choices=ECO_METRICS, default="accuracy", help="what the search compares")
    group.add_argument(
        "--eco_target",
        type=eco_target,
        default="auto",
        help="v_r: a number, a retrained checkpoint, or auto: the model's score on retain rows of --validation_share",
    )
    group.add_argument("--eco_samples", type=cli.positive_int, default=200, help="rows that the search evaluates")
    group.add_argument("--eco_steps", type=cli.non_negative_int, default=10, help="zeroth-order steps")
    group.add_argument("--eco_bisect", type=cli.non_negative_int, default=4, help="halvings of the gap around v_r")
    group.add_argument(
        "--eco_start", type=cli.positive_float, help="first sigma (default: the best of a coarse ladder)"
    )
    group.add_argument("--eco_eps", type=cli.fraction, default=0.999, help="eps as a share of the first sigma")
    group.add_argument("--eco_lr", type=cli.positive_float, default=100.0, help="of the zeroth-order search")
    group.add_argument("--eco_sigma_min", type=cli.positive_float, default=0.1, help="smallest sigma")


def eco_target(text):
    """A share of --eco_metric (float), `auto` or the path of a checkpoint, for argparse."""
    try:
        float(text)
    except ValueError:
        return cli.path(text)
    return cli.share(text)


def refuse_contradictions(parser, args):
    """Exit 2 on flags that the chosen method would ignore, or that cannot work together. Those of the published command
    are taken by every method, so that only its name need be changed."""
    from utils.unlearning.methods import CONSTANTS, METHODS

    name = args.unlearn_method
    if args.forget_per_batch >= args.train_batch_size:
        parser.error("--forget_per_batch must be smaller than --train_batch_size")
    if args.stop_at_forget_accuracy is not None and not args.eval_steps:
        parser.error("--stop_at_forget_accuracy needs --eval_steps")
    if name in METHODS:
        method = METHODS[name]
        for flag in CONSTANTS:
            if getattr(args, flag) is not None and flag not in method.constants:
                parser.error(f"--{flag} is no constant of {name}")
        if method.fixed and args.retain_loss:
            parser.error(f"the retain loss of {name} is part of the method; leave out --retain_loss")
        args.retain_loss = args.retain_loss or method.retain_loss
        if args.retain_loss == "none" and args.retain_weight:
            parser.error("--retain_weight needs a --retain_loss")
        if args.retain_loss == "none" and args.forget_per_batch:
            parser.error(f"--forget_per_batch needs retain rows; {name} has none without --retain_loss")
        if args.retain_loss == "none" and args.retain_ratio:
            parser.error(f"--retain_ratio needs retain rows; {name} has none without --retain_loss")
        args.retain_weight = args.retain_weight or method.retain_weight
    else:
        if flag := given(parser, args, [*NO_TRAINING, *CONSTANTS]):
            parser.error(f"{name} trains nothing; leave out --{flag}")
    lora = [flag for flag in vars(args) if flag.startswith("lora_")]
    if args.tune != "lora" and (flag := given(parser, args, lora)):
        parser.error(f"--{flag} goes with --tune=lora")
    if name != "icul" and (flag := given(parser, args, ["icul_flipped", "icul_correct"])):
        parser.error(f"--{flag} goes with --unlearn_method=icul")
    if name == "prompting" and not (
        args.instruction or args.forget_names or args.forget_only or args.dataset == "snippets"
    ):
        parser.error("prompting needs --forget_names, --forget_only or --instruction (only snippets has a list)")
    if name == "eco":
        refuse_eco_contradictions(parser, args)
    elif flag := given(parser, args, [flag for flag in vars(args) if flag.startswith("eco_")]):
        parser.error(f"--{flag} goes with --unlearn_method=eco")
    if name != "prompting" and (args.instruction or args.forget_names):
        parser.error("--instruction and --forget_names go with --unlearn_method=prompting")
    if args.instruction and args.forget_names:
        parser.error("--instruction replaces the one made of --forget_names; leave out one of them")


def given(parser, args, flags):
    """The first of `flags` that is not at its default, or None."""
    return next((flag for flag in flags if getattr(args, flag) != parser.get_default(flag)), None)


def refuse_eco_contradictions(parser, args):
    """Exit 2 on flags of ECO that would be ignored."""
    from utils.interventions.corruption import ORDERS, has_strength

    family, searched = args.eco_corruption, args.eco_strength is None and has_strength(args.eco_corruption)
    if not has_strength(family) and args.eco_strength is not None:
        parser.error(f"--eco_corruption={family} has no strength; leave out --eco_strength")
    if not searched and (flag := given(parser, args, ECO_SEARCH)):
        parser.error(f"no strength is searched for; leave out --{flag}")
    if family in ORDERS and given(parser, args, ["eco_dims"]):
        parser.error(f"--eco_corruption={family} moves whole embeddings; leave out --eco_dims")
    no_encoder = args.eco_classifier in ("tfidf", "features")
    if no_encoder and (flag := given(parser, args, ["eco_classifier_epochs", "eco_classifier_lr"])):
        parser.error(f"--{flag} goes with an encoder as --eco_classifier")
    names = args.eco_names or args.forget_only or args.eco_token_classifier or args.dataset == "snippets"
    if args.eco_tokens == "entities" and not names:
        parser.error("--eco_tokens=entities needs --eco_names or --eco_token_classifier")
    if args.eco_tokens == "all" and args.eco_token_classifier:
        parser.error("--eco_token_classifier goes with --eco_tokens=entities")
    if searched and args.eco_target == "auto" and (args.final or not args.validation_share):
        parser.error(
            "--eco_target=auto looks at retain rows that --validation_share keeps from model and test; give that flag, "
            "without --final, here and to qlora.py, or give a number or a retrained checkpoint"
        )


def main(args):
    from utils.data.load import dataset_name
    from utils.models.chain import short_name
    from utils.training.state import claim_run
    from utils.unlearning.methods import METHODS

    name = f"{short_name(args.model_checkpoints)}_{dataset_name(args.dataset)}-{args.forget_size}"
    with claim_run(
        args, f"unlearn_checkpoints/{args.unlearn_method}_{name}", timed=True, trains=args.unlearn_method in METHODS
    ) as output:
        if output:
            run_method(args, output)


def run_method(args, output):
    """Train or build what --unlearn_method asks for and write the Output."""
    from utils import plan
    from utils.data.select import load_rows
    from utils.unlearning import reference
    from utils.unlearning.methods import IN_CONTEXT, METHODS

    method = METHODS.get(args.unlearn_method)
    if method and (method.reference or args.retain_loss in ("kl", "activations")):
        reference.try_place(args)
    frames = load_rows(vars(args))
    if args.dry_run:
        plan.print_plan("lora" if args.tune == "lora" else "full", args, args.model_checkpoints, frames)
    if args.dry_run == "plan":
        return
    if args.unlearn_method == "eco":
        return gate(args, output, frames)
    if args.unlearn_method in IN_CONTEXT:
        return instruct(args, output, frames)
    unlearn(args, output, frames)


def unlearn(args, output, frames):
    """Train the model (or a LoRA adapter on it) with the chosen method and write the checkpoint."""
    import torch

    from utils import plan
    from utils.data.select import fingerprint
    from utils.data.splits import TRAIN_SPLITS
    from utils.evaluation.run import accuracies, check_rows, note_other_length
    from utils.interventions.served import load_served
    from utils.models.chain import refuse_prompted
    from utils.models.lengths import check_length
    from utils.storage import outputs
    from utils.tasks.classification import label_words
    from utils.training.loop import Training
    from utils.unlearning import objectives, reference
    from utils.unlearning.methods import METHODS

    method, words = METHODS[args.unlearn_method], label_words(frames)
    loaded = load_served(args.model_checkpoints, args, args.parent_path)
    refuse_prompted(loaded.chain)
    check_rows(loaded.model.config, loaded.tokenizer, frames, args)
    note_other_length(loaded, frames, args)
    dtype, model = loaded.model.dtype, prepare(loaded.model, args)
    loaded = dataclasses.replace(loaded, model=model)
    numerics = contextlib.nullcontext()
    if args.tune == "full" and dtype != torch.float32:  # float32 weights, multiplied in the dtype they came in
        numerics = torch.autocast(model.device.type, dtype)

    used = {split: frames[split] for split in TRAIN_SPLITS}
    rows = objectives.Rows(loaded.tokenizer, used, method, args)
    check_length(model.config, max(map(len, rows.all)), 0)
    load = plan.blank_reference if args.dry_run else reference.load_reference
    with numerics:
        objective = objectives.Objective(method, loaded, rows, used, args, f"{args.tune} {dtype}", load)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    print(f"training {sum(p.numel() for p in parameters.values()):,} parameters on {len(rows.trained):,} rows")

    def loss(numbers, n_forget, n_retain):
        with numerics:
            return objective(numbers, n_forget, n_retain)

    def evaluate():
        with numerics:
            result = accuracies(loaded, frames, words, args)
        only_adapter_dropout(model)
        return result

    run = Training(
        parameters=parameters,
        examples=rows.trained,
        loss=loss,
        args=args,
        state_path=outputs.state_path(output),
        fingerprint=fingerprint(used),
        chain=loaded.chain,
        warmup=0.05,
        evaluate=evaluate,
    )
    only_adapter_dropout(model)
    if args.dry_run:
        referred = objective.reference.examples(rows.all) if objective.reference else []
        return plan.print_probe(run, loaded, frames, words, referred, numerics=numerics)
    log = run.run()
    model.eval()
    if args.tune == "full":
        model.to(dtype)
    save(args, output, loaded, frames, words, "full" if args.tune == "full" else "lora", log, run)


def prepare(model, args):
    """`model` ready to train: float32 weights that all learn, or frozen with a new float32 LoRA adapter."""
    import torch

    from utils.models.adapters import add_lora
    from utils.models.base import dequantized
    from utils.unlearning import rmu

    torch.manual_seed(args.seed)
    if args.tune == "lora":
        model = add_lora(model, args)
    else:
        model = dequantized(model).float().requires_grad_(True)
    if args.unlearn_method == "rmu":
        rmu.restrict_to_rmu_layers(model, args)
    return model.eval()  # no dropout while the reference is computed


def only_adapter_dropout(model):
    """Switch on the dropout in front of a new adapter, and no other: with the model's own (GPT-2, OPT) a comparison
    with the reference, which is computed without, would not start at 0."""
    model.eval()
    for name, module in model.named_modules():
        if "lora_dropout" in name:
            module.train()


def save(args, output, loaded, frames, words, kind, log, run):
    """Evaluate what was trained and write its folder."""
    from utils import distributed
    from utils.evaluation import figures, tables
    from utils.evaluation.record import make_record
    from utils.evaluation.run import evaluate_splits
    from utils.models.adapters import save_weights
    from utils.storage import checkpoints

    records, start = None, perf_counter()
    if args.max_eval_samples != 0:
        scores, _ = evaluate_splits(loaded, frames, words, args, args.unlearn_method)
        records = [
            make_record(args.unlearn_method, output, loaded.base_name, args, scores, perf_counter() - start, run.cost)
        ]
    if not distributed.is_main():
        return
    with output.new_folder() as folder:
        save_weights(loaded.model, folder)
        loaded.tokenizer.save_pretrained(folder)
        checkpoints.write_manifest(folder, output, kind, loaded.chain, args, run.fingerprint, words, records, run.cost)
        figures.write_curves(folder, log)
    if records:
        print(tables.table(records))
    print(f"wrote {output}")


def instruct(args, output, frames):
    """Write the checkpoint of a rival that trains nothing: what it puts around every text."""
    from utils import distributed
    from utils.data.select import fingerprint
    from utils.data.splits import TRAIN_SPLITS
    from utils.evaluation import tables
    from utils.evaluation.record import make_record
    from utils.evaluation.run import check_rows, evaluate_splits, note_other_length
    from utils.interventions import in_context
    from utils.interventions.served import load_served
    from utils.models.chain import refuse_prompted
    from utils.storage import checkpoints, files
    from utils.tasks.classification import label_words

    template = in_context.build(args, frames)
    loaded = load_served(args.model_checkpoints, args, args.parent_path)
    refuse_prompted(loaded.chain)
    loaded = dataclasses.replace(loaded, template=template)
    records, start = None, perf_counter()
    check_rows(loaded.model.config, loaded.tokenizer, frames, args, template=template)
    note_other_length(loaded, frames, args)
    if args.max_eval_samples != 0:
        scores, _ = evaluate_splits(loaded, frames, label_words(frames), args, args.unlearn_method)
        records = [make_record(args.unlearn_method, output, loaded.base_name, args, scores, perf_counter() - start)]
    if not distributed.is_main():
        return
    used = fingerprint({split: frames[split] for split in TRAIN_SPLITS})
    with output.new_folder() as folder:
        files.write_json(folder / in_context.FILE, template.settings)
        checkpoints.write_manifest(folder, output, "in-context", loaded.chain, args, used, label_words(frames), records)
    if records:
        print(tables.table(records))
    print(f"wrote {output}")


def gate(args, output, frames):
    """Train ECO's classifier, find its strength, and write the checkpoint."""
    from utils import distributed
    from utils.data.select import fingerprint
    from utils.data.splits import TRAIN_SPLITS
    from utils.evaluation import tables
    from utils.evaluation.record import make_record
    from utils.evaluation.run import check_rows, evaluate_splits, note_other_length
    from utils.interventions import eco
    from utils.interventions.served import load_served
    from utils.models.chain import refuse_prompted
    from utils.storage import checkpoints
    from utils.tasks.classification import label_words
    from utils.unlearning import eco_search

    loaded = load_served(args.model_checkpoints, args, args.parent_path)
    refuse_prompted(loaded.chain)
    check_rows(loaded.model.config, loaded.tokenizer, frames, args)
    note_other_length(loaded, frames, args)
    loaded, settings = eco_search.learn(args, loaded, frames)
    print(tables.gate_table(settings))
    records, start = None, perf_counter()
    if args.max_eval_samples != 0:
        scores, _ = evaluate_splits(loaded, frames, label_words(frames), args, "eco")
        records = [make_record("eco", output, loaded.base_name, args, scores, perf_counter() - start)]
    if not distributed.is_main():
        return
    used = fingerprint({split: frames[split] for split in TRAIN_SPLITS})
    with output.new_folder() as folder:
        eco.save(loaded, settings, folder)
        checkpoints.write_manifest(folder, output, "eco", loaded.chain, args, used, label_words(frames), records)
    if records:
        print(tables.table(records))
    print(f"wrote {output}")


if __name__ == "__main__":
    cli.run(parse_args, main)
