"""The flags that several scripts share. Defaults are the published ones where the paper or its code gives one."""

import argparse
from collections.abc import Sequence

from utils import cli
from utils.storage.formats import SPLITS


def add_model_arguments(parser: cli.ArgumentParser) -> None:
    """What every script needs to load models and rows, and to evaluate."""
    group = parser.add_argument_group("model and data")
    group.add_argument(
        "--dataset", type=cli.path, default="sst2",
        help="sst2, yelp, snippets, tofu, mmlu, sciq, wmdp, plays, plays-questions, plays-both, or a folder with the "
        "splits",
    )  # fmt: skip
    group.add_argument(
        "--tofu_split", choices=["forget01", "forget05", "forget10"],
        help="tofu: the last 2, 10 or 20 authors are to be forgotten (default: forget10)",
    )  # fmt: skip
    group.add_argument(
        "--tofu_authors", type=cli.positive_int, metavar="N", help="tofu: keep only the first N authors to retain"
    )
    group.add_argument(
        "--mmlu_pair", choices=["economics", "physics", "law"], help="mmlu: what is forgotten (default: economics)"
    )
    group.add_argument("--wmdp_part", choices=["bio", "chem", "cyber"], help="wmdp: what is forgotten (default: bio)")
    group.add_argument(
        "--template", type=cli.template,
        help="classification: what stands around {text}, \\n for a line end (default: the published template)",
    )  # fmt: skip
    group.add_argument(
        "--prompt_format", choices=["plain", "chat"], help="chat: the model's own chat template (default: plain)"
    )
    group.add_argument(
        "--max_new_tokens", type=cli.positive_int,
        help="most tokens of a free answer (default: as published, 200 of an answer, 256 of a continuation)",
    )  # fmt: skip
    group.add_argument(
        "--max_length", type=cli.positive_int, default=1024, help="most tokens a row may have; text is cut"
    )
    group.add_argument("--set_pad_id", action="store_true", help="pad with the end-of-sequence token")
    group.add_argument(
        "--device", choices=["auto", "cuda", "mps", "cpu", "balanced"], default="auto",
        help="where to compute (balanced: the layers of one model spread over all GPUs)",
    )  # fmt: skip
    group.add_argument(
        "--dtype", choices=["auto", "bfloat16", "float32", "float16"], default="auto", help="of the frozen weights"
    )
    group.add_argument(
        "--attn_implementation",
        choices=["auto", "eager", "sdpa", "flash_attention_2"],
        default="auto",
        help="auto: SDPA where the model has it; on a CPU matrix products over blocks of queries in its place",
    )
    group.add_argument(
        "--shard", action="store_true",
        help="with accelerate launch: each process holds a part of every layer, for models larger than one GPU",
    )  # fmt: skip
    group.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    group.add_argument("--eval_batch_size", type=cli.positive_int, default=32, help="rows at a time in evaluation")
    group.add_argument(
        "--max_eval_samples", type=cli.non_negative_int, help="rows a split of the final evaluation, at most (0: none)"
    )
    group.add_argument("--max_train_samples", type=cli.positive_int, help="train rows to use, forget share kept")
    group.add_argument("--forget_share", type=cli.fraction, help="share of forget rows among --max_train_samples")
    group.add_argument(
        "--forget_only", type=cli.path, metavar="FILE",
        help="leave out forget rows that name nobody of this list (its form: data/snippets/forget_names.txt)",
    )  # fmt: skip
    group.add_argument(
        "--rows_seed", type=cli.seed, default=42, help="which rows --max_train_samples and --max_eval_samples draw"
    )
    group.add_argument(
        "--validation_share", type=cli.fraction, metavar="S",
        help="put this share of the train rows aside and evaluate on them instead of the test rows: to choose settings",
    )  # fmt: skip
    group.add_argument(
        "--final", action="store_true", help="with --validation_share: evaluate on the test rows, after all choices"
    )
    group.add_argument("--seed", type=cli.seed, default=42, help="of batches, unlearning labels and initialisation")
    group.add_argument("--output_path", type=cli.path, help="folder to write (default: the published name)")
    group.add_argument("--overwrite", action="store_true", help="replace an existing output folder of this project")


def add_training_arguments(parser: cli.ArgumentParser, num_epochs: int) -> None:
    """What every training script needs. `num_epochs` is the published default of the script."""
    group = parser.add_argument_group("training")
    group.add_argument("--lr", type=cli.positive_float, default=1e-4, help="peak learning rate")
    group.add_argument("--train_batch_size", type=cli.positive_int, default=32, help="rows per optimisation step")
    group.add_argument(
        "--micro_batch_size",
        type=cli.positive_int,
        help="rows per forward pass, to save memory (default: the whole batch; on a CPU 512 tokens, in as little time)",
    )
    group.add_argument(
        "--logit_chunk", type=cli.non_negative_int, default=1024, metavar="N",
        help="completion tokens whose logits are held at a time; more are done in pieces, made again in the backward "
        "pass (0: all at once)",
    )  # fmt: skip
    group.add_argument(
        "--gradient_checkpointing", nargs="?", choices=["layers", "selective"], const="layers",
        help="compute each layer's inner values again in the backward pass: all (layers; about a third more time), or "
        "those that cost little (selective)",
    )  # fmt: skip
    group.add_argument(
        "--compile", action="store_true", help="compile the layers (CUDA): slow first steps, faster ones afterwards"
    )
    group.add_argument("--num_epochs", type=cli.positive_int, default=num_epochs, help="passes over the training rows")
    group.add_argument("--max_steps", type=cli.positive_int, help="stop after so many steps, schedule included")
    group.add_argument(
        "--max_rows", type=cli.positive_int, help="stop before more rows than these are read, schedule included"
    )
    group.add_argument(
        "--max_minutes", type=cli.positive_float,
        help="stop after so many minutes of preparation and steps, of which the log then tells; the schedule stays",
    )  # fmt: skip
    group.add_argument("--weight_decay", type=cli.non_negative_float, default=0.001, help="of AdamW")
    group.add_argument("--max_grad_norm", type=cli.positive_float, default=0.3, help="gradient norm is clipped to this")
    group.add_argument(
        "--length_pool", type=cli.non_negative_int, metavar="K",
        help="sort rows by length within K batches to save padding; 0: not at all (default: as published, 50 batches "
        "or a quarter of the epoch, whichever is less)",
    )  # fmt: skip
    group.add_argument(
        "--eval_steps", type=cli.positive_int,
        help="accuracy (of free answers: probability) on --curve_splits every so many steps",
    )  # fmt: skip
    group.add_argument(
        "--curve_splits", nargs="+", choices=SPLITS, default=list(SPLITS), metavar="SPLIT",
        help="the splits that --eval_steps evaluates",
    )  # fmt: skip
    group.add_argument(
        "--curve_samples", type=cli.positive_int, default=200, help="rows a split that --eval_steps evaluates"
    )
    group.add_argument("--save_steps", type=cli.positive_int, default=100, help="save the resumable state this often")
    group.add_argument(
        "--dry_run",
        nargs="?",
        const="plan",
        choices=["plan", "probe"],
        help="only say what the run will take (plan: without loading weights; probe: load them and time some steps)",
    )
    group.add_argument("--resume", action="store_true", help="continue the interrupted run of this command")


def add_lora_arguments(parser: cli.ArgumentParser, title: str) -> None:
    """The adapter that qlora.py trains, or baselines.py with --tune=lora."""
    group = parser.add_argument_group(title)
    group.add_argument("--lora_rank", type=cli.positive_int, default=16, help="r")
    group.add_argument("--lora_alpha", type=cli.positive_float, default=64, help="scale is lora_alpha / lora_rank")
    group.add_argument(
        "--lora_dropout", "--lora_fropout", type=cli.below_one, default=0.1, help="in front of the adapter"
    )
    group.add_argument(
        "--lora_bias", choices=["none", "all", "lora_only"], default="none", help="biases to train, in --dtype"
    )
    group.add_argument(
        "--lora_target_modules",
        nargs="+",
        metavar="NAME",
        help="layers to adapt, or all-linear (default: PEFT's choice)",
    )


def add_retain_ratio(group: argparse._ArgumentGroup) -> None:
    """For the scripts that unlearn: how many of the retain rows an epoch uses."""
    group.add_argument(
        "--retain_ratio",
        type=cli.positive_float,
        metavar="R",
        help="each epoch uses R retain rows per forget row, drawn anew every epoch (default: all retain rows)",
    )


def add_request_arguments(parser: cli.ArgumentParser) -> None:
    """Several unlearning requests that one model serves, from the command line or from a ledger."""
    group = parser.add_argument_group("several unlearning requests over one model")
    group.add_argument(
        "--together", action="store_true", help="serve all --model_checkpoints, each with its gate, as one model"
    )
    group.add_argument(
        "--request_names", nargs="+", metavar="NAME",
        help="what they are called (default: the distinct part of each path)",
    )  # fmt: skip
    group.add_argument(
        "--requests", type=cli.path, metavar="FILE",
        help="serve the active requests of this ledger instead of --model_checkpoints",
    )  # fmt: skip
    edit = group.add_mutually_exclusive_group()
    edit.add_argument(
        "--add", type=cli.named_path, metavar="NAME=PATH", help="only add this checkpoint to the ledger as a request"
    )
    edit.add_argument("--revoke", type=cli.text, metavar="NAME", help="only revoke this request of the ledger")


def add_report_arguments(parser: cli.ArgumentParser) -> None:
    """What an evaluation prints and writes beside its table."""
    add_fresh_scores(parser)
    parser.add_argument(
        "--show_examples", type=cli.non_negative_int, default=0, metavar="N",
        help="print the answers to N sentences of train_forget and N of test_retain",
    )  # fmt: skip
    parser.add_argument(
        "--probe", action="store_true",
        help="multiple choice: can the answer still be read off the logits? A logistic regression on half of the rows",
    )  # fmt: skip
    parser.add_argument(
        "--ci", action="store_true",
        help="print the 95 %% interval of each accuracy, p-values of McNemar's test against the fine-tuned model, and "
        "with a retain model the overall score",
    )  # fmt: skip
    parser.add_argument(
        "--export", choices=["open-unlearning"],
        help="also write <method>_EVAL.json and <method>_SUMMARY.json as open-unlearning does",
    )  # fmt: skip


def add_fresh_scores(group: argparse._ActionsContainer) -> None:
    """For scripts that read what an earlier run has said of a frozen model."""
    group.add_argument(
        "--fresh_scores", action="store_true",
        help="score the frozen model anew instead of taking what an earlier run has left in saved_scores/",
    )  # fmt: skip


def refuse_shard_contradictions(parser: cli.ArgumentParser, args: argparse.Namespace) -> None:
    """End the command if flags do not go with --shard. All of its `args` are looked at, whichever the script has."""
    if not args.shard:
        return
    if args.device in ("mps", "balanced"):
        parser.error(f"--shard is for one CUDA device or CPU a process; leave out --device={args.device}")
    if getattr(args, "compile", False):
        parser.error("--shard gathers layers between kernels, which --compile would fuse; leave one of them out")
    if getattr(args, "audit", None) is not None:
        parser.error("--shard does not go with --audit; use one device, or --device=balanced")
    if getattr(args, "quantization", "none") != "none":
        parser.error("4-bit weights cannot be cut into shards; with --shard give --quantization=none")


def refuse_text_contradictions(parser: cli.ArgumentParser, args: argparse.Namespace) -> None:
    """End the command if --json has no new text, or if flags of the evaluation go with one. All of its `args` are
    needed: what new text makes no use of would be ignored."""
    if not (args.text or args.input_file):
        if args.json:
            parser.error("--json goes with --text or --input_file")
        return
    of_evaluation = (
        "max_eval_samples", "show_examples", "probe", "ci", "export", "output_path", "overwrite", "fresh_scores",
    )  # fmt: skip
    if given := [name for name in of_evaluation if getattr(args, name) != parser.get_default(name)]:
        parser.error(f"--{given[0]} is of the evaluation, which --text and --input_file replace; leave it out")


def add_audit_arguments(parser: cli.ArgumentParser, names: Sequence[str]) -> None:
    """What `--audit` looks at, and with which means. names: of the audits."""
    group = parser.add_argument_group("audit (instead of the evaluation)")
    group.add_argument(
        "--audit", nargs="*", choices=["all", *names], metavar="NAME",
        help=f"what would an attacker find? Audits: {', '.join(names)}, or all (default: those that take minutes)",
    )  # fmt: skip
    group.add_argument(
        "--dry_run", action="store_true", help="--audit: only say what each audit will take, by the time of some rows"
    )
    group.add_argument("--every_measure", action="store_true", help="--audit: print every measure, not the headlines")
    group.add_argument(
        "--attack_steps",
        type=cli.positive_int,
        default=20,
        help="--audit: optimisation steps of relearning, soft attack",
    )
    group.add_argument("--attack_lr", type=cli.positive_float, default=1e-3, help="--audit: their learning rate")
    group.add_argument(
        "--attack_share", type=cli.fraction, default=0.1, metavar="S",
        help="--audit: the share of the forget rows that such an attacker has",
    )  # fmt: skip
    group.add_argument(
        "--samples", type=cli.positive_int, default=32, help="--audit sampling: answers drawn for each question"
    )
    group.add_argument(
        "--shadows", type=cli.path, nargs="+", default=(), metavar="PATH",
        help="--audit membership: shadow models of qlora.py --shadow=N, in pairs",
    )  # fmt: skip


def refuse_audit_contradictions(parser: cli.ArgumentParser, args: argparse.Namespace) -> None:
    """End the command if flags do not go with --audit, or not without it. All of its `args` are needed: what is not of
    an audit would be ignored."""
    own = ("dry_run", "every_measure", "attack_steps", "attack_lr", "attack_share", "samples", "shadows")
    others = (
        "router", "without_gate", "force", "show_examples", "probe", "ci", "export", "text", "input_file", "together",
        "requests", "logits_path", "fresh_scores",
    )  # fmt: skip
    named = own if args.audit is None else others
    if given := [name for name in named if getattr(args, name) != parser.get_default(name)]:
        parser.error(f"--{given[0]} {'goes with' if args.audit is None else 'does not go with'} --audit")


def refuse_request_contradictions(parser: cli.ArgumentParser, args: argparse.Namespace) -> None:
    """End the command if flags do not go together. All of its `args` are needed: --add and --revoke replace the rest
    of the command."""
    edit = "add" if args.add else "revoke" if args.revoke else None
    if edit and not args.requests:
        parser.error(f"--{edit} goes with --requests")
    if not args.requests and not args.model_checkpoints:
        parser.error("the following arguments are required: --model_checkpoints, or --requests")
    if args.requests:
        taken = {"model_checkpoints": args.model_checkpoints, "together": args.together, "router": args.router}
        if given := [name for name, value in taken.items() if value]:
            parser.error(f"--requests serves what its ledger names; leave out --{given[0]}")
    if args.request_names and not args.together:
        parser.error("--request_names goes with --together")
    if args.request_names and len(args.request_names) != len(args.model_checkpoints):
        parser.error("--request_names needs one name for each of the --model_checkpoints")
    if args.without_gate and (args.together or args.requests):
        parser.error("--without_gate is about one checkpoint at a time; leave it out with --together and --requests")
    if args.together and args.router:
        parser.error("--together serves checkpoints behind gates of their own; leave out --router")
    kept = {"requests", "parent_path", "trust_remote_code", edit}
    given = [name for name in vars(args) if name not in kept and getattr(args, name) != parser.get_default(name)]
    if edit and given:
        parser.error(f"--{edit} only edits the ledger; leave out --{given[0]}")
