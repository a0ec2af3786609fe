"""The flags of the scripts that unlearn, and which of them go together with which method."""

import argparse
from collections.abc import Iterable

from utils import cli
from utils.arguments import add_fresh_scores, add_retain_ratio
from utils.data.load import SNIPPETS_FOLDER
from utils.data.names import Person, read_names
from utils.interventions.corruption import FAMILIES, ORDERS, has_strength
from utils.unlearning.methods import CONSTANTS, METHODS

NO_TRAINING = (
    "micro_batch_size", "logit_chunk", "gradient_checkpointing", "compile", "max_steps", "max_rows", "max_grad_norm",
    "length_pool", "eval_steps", "curve_samples", "save_steps", "dry_run", "resume", "tune", "retain_loss",
    "retain_weight", "forget_per_batch", "retain_ratio", "stop_at_forget_accuracy", "stop_at_retain_accuracy",
    "max_minutes", "curve_splits", "logits_path",
)  # fmt: skip
GATED = ("eco", "gate", "refusal")  # the methods that put a gate in front of the model
TRAINED_HERE = ("tfidf", "features")  # gates that spul.py trains before the prompt
TRAINING = ("eco_threshold", "eco_conformal", "eco_max_fpr", "gate_augment")  # of a gate that is trained here
CLASSIFIER = ("eco_classifier", "eco_classifier_epochs", "eco_classifier_lr")
ECO_SEARCH = (
    "eco_metric", "eco_target", "eco_samples", "eco_steps", "eco_start", "eco_eps", "eco_lr", "eco_sigma_min",
    "eco_bisect",
)  # fmt: skip


def add_common_arguments(group: argparse._ArgumentGroup) -> None:
    """What both scripts that unlearn ask for: which rows, in what batches, and where files lie."""
    add_fresh_scores(group)
    group.add_argument("--forget_size", type=cli.fraction, default=1.0, help="share of train_forget to unlearn")
    group.add_argument(
        "--forget_per_batch", type=cli.non_negative_int, default=0,
        help="forget rows in every batch, where there is a retain loss (0: all rows mixed, as published)",
    )  # fmt: skip
    add_retain_ratio(group)
    group.add_argument(
        "--stop_at_forget_accuracy", type=cli.share, metavar="A",
        help="stop once the accuracy (of free answers: probability) on train_forget, measured every --eval_steps, is "
        "at most A (in [0, 1])",
    )  # fmt: skip
    group.add_argument(
        "--stop_at_retain_accuracy", type=cli.share, default=0.0, metavar="R",
        help="... and only while the one on test_retain is at least R",
    )  # fmt: skip
    group.add_argument(
        "--refusals", type=cli.path, metavar="FILE",
        help="what forgotten rows with free answers are answered with, a sentence a line (default: data/refusals.txt)",
    )  # fmt: skip
    group.add_argument(
        "--logits_path", type=cli.path,
        help="file of what the model says before it unlearns (default: saved_logits/<model>-<dataset>-<key>)",
    )  # fmt: skip
    group.add_argument(
        "--parent_path", type=cli.path, help="where the base model of --model_checkpoints lies, if it was moved"
    )


def add_spul_arguments(parser: cli.ArgumentParser) -> None:
    """What spul.py learns: the prompt, its start, and the loss."""
    group = parser.add_argument_group("SPUL")
    add_common_arguments(group)
    group.add_argument("--ptuning_num_tokens", type=cli.positive_int, default=30, help="p, virtual tokens")
    group.add_argument("--ptuning_hidden_size", type=cli.positive_int, default=128, help="h, width of the encoder")
    group.add_argument("--alpha", type=cli.non_negative_float, default=0.5, help="weight of L_r")
    group.add_argument("--beta", type=cli.non_negative_float, default=0.5, help="weight of L_kl")
    group.add_argument(
        "--hide", type=cli.non_negative_float, default=0.0, metavar="W",
        help="weight of L_hide, which keeps the label of a forget row from standing out among the label words",
    )  # fmt: skip
    group.add_argument(
        "--hide_like", type=cli.path, metavar="CHECKPOINT",
        help="--hide makes them as likely as this model does, qlora.py --exclude_forget say (default: equally likely)",
    )  # fmt: skip
    group.add_argument(
        "--prompt_encoder", choices=["mlp", "lstm", "embedding"], default="mlp", help="what produces the virtual tokens"
    )
    start = group.add_mutually_exclusive_group()
    start.add_argument("--init_text", type=cli.text, help="start from the embeddings of this instruction")
    start.add_argument(
        "--init_checkpoint", type=cli.path, help="start from the encoder of an earlier spul.py checkpoint"
    )


def add_behind_arguments(parser: cli.ArgumentParser) -> None:
    """The gate that spul.py trains a prompt behind."""
    group = parser.add_argument_group("behind a gate")
    group.add_argument(
        "--gate", type=cli.path,
        help="train and serve the prompt behind this gate: tfidf or features, which is trained first, or a checkpoint "
        "that has one (baselines.py --unlearn_method=gate)",
    )  # fmt: skip
    add_gate_training_arguments(group)


def refuse_spul_contradictions(parser: cli.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit 2 on flags of spul.py that would be ignored, or that cannot work together (so it sees all `args`)."""
    if args.forget_per_batch >= args.train_batch_size:
        parser.error("--forget_per_batch must be smaller than --train_batch_size")
    refuse_stopping_blindly(parser, args)
    if args.hide_like and not args.hide:
        parser.error("--hide_like says what --hide aims at; give --hide a weight above 0")
    flag = given(parser, args, TRAINING)
    if flag and not args.gate:
        parser.error(f"--{flag} goes with --gate")
    if flag and args.gate not in TRAINED_HERE:
        parser.error(f"--gate={args.gate} is trained already; leave out --{flag}")
    if args.gate and args.retain_ratio:
        parser.error("--retain_ratio draws from all retain rows; leave it out with --gate, which leaves few of them")


def refuse_stopping_blindly(parser: cli.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit 2 where a run is to stop at an accuracy that it does not measure (some flags, of all `args`)."""
    if args.stop_at_retain_accuracy and args.stop_at_forget_accuracy is None:
        parser.error("--stop_at_retain_accuracy goes with --stop_at_forget_accuracy")
    if args.stop_at_forget_accuracy is None:
        return
    if not args.eval_steps:
        parser.error("--stop_at_forget_accuracy needs --eval_steps")
    needed = ["train_forget", *(["test_retain"] if args.stop_at_retain_accuracy else [])]
    if missing := next((split for split in needed if split not in args.curve_splits), None):
        parser.error(f"a run that stops by {missing} needs it among --curve_splits")


def add_unlearning_arguments(parser: cli.ArgumentParser) -> None:
    """What baselines.py asks for beside the method: its rows, its retain loss, what is trained, when it stops."""
    group = parser.add_argument_group("unlearning")
    add_common_arguments(group)
    group.add_argument("--retain_loss", choices=["none", "ce", "kl"], help="on retain rows (default: the method's)")
    group.add_argument("--retain_weight", type=cli.positive_float, help="of the retain loss (default: the method's)")
    group.add_argument("--tune", choices=["full", "lora"], default="full", help="all weights, or a new LoRA adapter")


def add_constants(parser: cli.ArgumentParser) -> None:
    """The constants that the methods declare."""
    group = parser.add_argument_group("constants of the methods (default: the authors')")
    kinds = {"rmu_layer": cli.non_negative_int, "method_beta2": cli.non_negative_float}
    kinds |= {flag: cli.non_negative_float for flag in ("method_delta", "method_epsilon")}
    kinds["method_dual_warmup"] = cli.share
    for flag, meaning in CONSTANTS.items():
        owners = ", ".join(name for name, method in METHODS.items() if flag in method.constants)
        group.add_argument(f"--{flag}", type=kinds.get(flag, cli.positive_float), help=f"{owners}: {meaning}")


def add_context_arguments(parser: cli.ArgumentParser) -> None:
    """What prompting and icul put around a text."""
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


def add_gate_arguments(parser: cli.ArgumentParser) -> None:
    """The gate of eco, gate and refusal: one that is there, or how one is trained."""
    group = parser.add_argument_group("gate (of eco, gate and refusal)")
    group.add_argument("--gate", type=cli.path, help="a checkpoint whose gate is taken instead of training one")
    group.add_argument(
        "--eco_classifier", type=cli.path, default="tfidf", help="tfidf, features, or an encoder (hub id, folder)"
    )
    group.add_argument("--eco_classifier_epochs", type=cli.positive_int, default=30, help="of an encoder")
    group.add_argument("--eco_classifier_lr", type=cli.positive_float, default=2e-5, help="of an encoder")
    add_gate_training_arguments(group)


def add_gate_training_arguments(group: argparse._ArgumentGroup) -> None:
    """How strict a gate is that is trained here, and whether on rewritten rows, too."""
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
        "--gate_augment", action="store_true", help="train it on rewritten rows, too: typos, initials, questions, ..."
    )


def add_eco_arguments(parser: cli.ArgumentParser) -> None:
    """ECO's corruption and search (arXiv 2406.07933); defaults are the authors' where they gave one."""
    group = parser.add_argument_group("eco")
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
        help="list of names (default: --forget_only, or that of snippets): entities, rewritings",
    )
    group.add_argument(
        "--eco_token_classifier", type=cli.path, help="finds names for --eco_tokens=entities (hub id, folder)"
    )
    group.add_argument("--eco_strength", type=cli.non_negative_float, help="sigma; given, there is no search")
    group.add_argument(
        "--eco_metric", type=cli.text, metavar="SCORE",
        help="what the search compares, a score of metrics.json (default: accuracy, label_accuracy of multiple choice, "
        "probability of free answers)",
    )  # fmt: skip
    group.add_argument(
        "--eco_target",
        type=eco_target,
        default="auto",
        help="v_r: a number, a retain model, or auto: the model's score on retain rows of --validation_share",
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


def eco_target(text: str) -> float | str:
    """A share of --eco_metric (float), `auto` or the path of a checkpoint, for argparse."""
    try:
        float(text)
    except ValueError:
        return cli.path(text)
    return cli.share(text)


def refuse_contradictions(parser: cli.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit 2 on flags that the chosen method would ignore, or that cannot work together (so it sees all `args`).

    Those of the published command are taken by every method, so that only its name need be changed.
    """
    name = args.unlearn_method
    if args.forget_per_batch >= args.train_batch_size:
        parser.error("--forget_per_batch must be smaller than --train_batch_size")
    refuse_stopping_blindly(parser, args)
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
    method = METHODS.get(name)
    refuses = name == "refusal" or (method and (method.flipped or method.refused or method.preferred == "refusal"))
    if args.refusals and not refuses:
        parser.error(f"--refusals is what forgotten rows are answered with, and {name} teaches no answer; leave it out")
    lora = [flag for flag in vars(args) if flag.startswith("lora_")]
    if args.tune != "lora" and (flag := given(parser, args, lora)):
        parser.error(f"--{flag} goes with --tune=lora")
    if name != "icul" and (flag := given(parser, args, ["icul_flipped", "icul_correct"])):
        parser.error(f"--{flag} goes with --unlearn_method=icul")
    if name == "prompting" and not (
        args.instruction or args.forget_names or args.forget_only or args.dataset == "snippets"
    ):
        parser.error("prompting needs --forget_names, --forget_only or --instruction (only snippets has a list)")
    of_gate = [*TRAINING, *CLASSIFIER, "eco_names"]
    if name in GATED:
        refuse_gate_contradictions(parser, args)
    elif flag := given(parser, args, ["gate", "fresh_scores", *of_gate]):
        parser.error(f"--{flag} goes with --unlearn_method={', '.join(GATED)}")
    if name == "eco":
        refuse_eco_contradictions(parser, args)
    elif flag := given(parser, args, [flag for flag in vars(args) if flag.startswith("eco_") and flag not in of_gate]):
        parser.error(f"--{flag} goes with --unlearn_method=eco")
    if name != "prompting" and (args.instruction or args.forget_names):
        parser.error("--instruction and --forget_names go with --unlearn_method=prompting")
    if args.instruction and args.forget_names:
        parser.error("--instruction replaces the one made of --forget_names; leave out one of them")


def given(parser: cli.ArgumentParser, args: argparse.Namespace, flags: Iterable[str]) -> str | None:
    """The first of `flags` that `args` does not have at its default, or None."""
    return next((flag for flag in flags if getattr(args, flag) != parser.get_default(flag)), None)


def refuse_gate_contradictions(parser: cli.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit 2 on flags of the gate that would be ignored (so it sees all `args`)."""
    if args.gate and (flag := given(parser, args, [*TRAINING, *CLASSIFIER])):
        parser.error(f"--gate takes a gate that is trained already; leave out --{flag}")
    if args.gate and args.eco_names and args.eco_tokens != "entities":
        parser.error("--gate takes a gate that is trained already, so nothing needs --eco_names; leave it out")
    from utils.interventions.gates import CLASSIFIERS  # takes a second, which only these methods shall wait

    no_encoder = args.eco_classifier in CLASSIFIERS and not CLASSIFIERS[args.eco_classifier].validates
    if no_encoder and (flag := given(parser, args, CLASSIFIER[1:])):
        parser.error(f"--{flag} goes with an encoder as --eco_classifier")


def refuse_eco_contradictions(parser: cli.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit 2 on flags of ECO that would be ignored (so it sees all `args`)."""
    family, searched = args.eco_corruption, args.eco_strength is None and has_strength(args.eco_corruption)
    if not has_strength(family) and args.eco_strength is not None:
        parser.error(f"--eco_corruption={family} has no strength; leave out --eco_strength")
    if not searched and (flag := given(parser, args, ECO_SEARCH)):
        parser.error(f"no strength is searched for; leave out --{flag}")
    if family in ORDERS and given(parser, args, ["eco_dims"]):
        parser.error(f"--eco_corruption={family} moves whole embeddings; leave out --eco_dims")
    names = args.eco_names or args.forget_only or args.eco_token_classifier or args.dataset == "snippets"
    if args.eco_tokens == "entities" and not names:
        parser.error("--eco_tokens=entities needs --eco_names or --eco_token_classifier")
    if args.eco_tokens == "all" and args.eco_token_classifier:
        parser.error("--eco_token_classifier goes with --eco_tokens=entities")
    if searched and args.eco_target == "auto" and (args.final or not args.validation_share):
        parser.error(
            "--eco_target=auto looks at retain rows that --validation_share keeps from model and test; give that flag, "
            "without --final, here and to qlora.py, or give a number or a retain model"
        )


def listed_people(dataset: str, *paths: str | None) -> list[Person]:
    """The people of the first list that is given, or else of the embedded data set; nobody without one."""
    embedded = SNIPPETS_FOLDER / "forget_names.txt" if dataset == "snippets" else None
    chosen = next(filter(None, paths), embedded)
    return read_names(chosen) if chosen else []
