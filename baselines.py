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
import time

import torch

from utils import cli
from utils.methods import CONSTANTS, IN_CONTEXT, METHODS


def parse_args():
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--model_checkpoints", required=True, help="what qlora.py wrote, or a plain model")
    parser.add_argument("--unlearn_method", required=True, choices=[*METHODS, *IN_CONTEXT], help="the rival")
    cli.add_model_arguments(parser)
    cli.add_training_arguments(parser, num_epochs=1)
    group = parser.add_argument_group("unlearning")
    group.add_argument("--forget_size", type=cli.fraction, default=1.0, help="share of train_forget to unlearn")
    group.add_argument("--retain_loss", choices=["none", "ce", "kl"], help="on retain rows (default: the method's)")
    group.add_argument("--retain_weight", type=cli.positive_float, help="of the retain loss (default: the method's)")
    group.add_argument("--tune", choices=["full", "lora"], default="full", help="all weights, or a new LoRA adapter")
    group.add_argument(
        "--forget_per_batch",
        type=cli.non_negative_int,
        default=0,
        help="forget rows in every batch of a method with a retain loss (0: random batches)",
    )
    group.add_argument(
        "--stop_at_forget_accuracy", type=cli.share, metavar="A",
        help="stop once train_forget accuracy, measured every --eval_steps, is at most A (in [0, 1])",
    )  # fmt: skip
    group.add_argument("--logits_path", help="file of reference quantities (default: saved_logits/<...>)")
    group.add_argument("--parent_path", help="where the base model of --model_checkpoints lies, if it was moved")
    group = parser.add_argument_group("constants of the methods (default: the authors')")
    group.add_argument("--method_beta", type=cli.positive_float, help="beta of npo, simnpo, dpo, undial, wga, satimp")
    group.add_argument("--method_beta2", type=cli.non_negative_float, help="beta2 of satimp")
    group.add_argument("--method_delta", type=cli.non_negative_float, help="margin of simnpo")
    group.add_argument("--rmu_layer", type=cli.non_negative_int, help="layer that rmu steers (default: 7 of 32)")
    group.add_argument("--rmu_steering", type=cli.positive_float, help="c of rmu")
    cli.add_lora_arguments(parser, "LoRA (with --tune=lora)")
    group = parser.add_argument_group("prompting and icul")
    group.add_argument("--forget_names", help="prompting: file with the people to forget (default: that of snippets)")
    group.add_argument("--instruction", help="prompting: the instruction itself, instead of one made of the names")
    group.add_argument("--icul_flipped", type=cli.positive_int, default=1, help="icul: forget rows, labels flipped")
    group.add_argument("--icul_correct", type=cli.non_negative_int, default=2, help="icul: retain rows behind them")
    args = parser.parse_args()
    refuse_contradictions(parser, args)
    return args


def refuse_contradictions(parser, args):
    """Exit 2 on flags that the chosen method would ignore, or that cannot work together."""
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
        args.retain_weight = args.retain_weight or method.retain_weight
    else:
        training = ("retain_loss", "retain_weight", "stop_at_forget_accuracy", "logits_path", *CONSTANTS)
        ignored = [flag for flag in training if getattr(args, flag) is not None] + ["tune"] * (args.tune == "lora")
        if ignored:
            parser.error(f"{name} trains nothing; leave out --{ignored[0]}")
    if name == "prompting" and not (args.instruction or args.forget_names or args.dataset == "snippets"):
        parser.error("prompting needs --forget_names or --instruction (only snippets has a list of names)")
    if name != "prompting" and (args.instruction or args.forget_names):
        parser.error("--instruction and --forget_names go with --unlearn_method=prompting")
    if args.instruction and args.forget_names:
        parser.error("--instruction replaces the one made of --forget_names; leave out one of them")


def main(args):
    from utils import data, models, training

    name = models.short_name(args.model_checkpoints)
    stem = f"{args.unlearn_method}_{name}_{data.dataset_name(args.dataset)}-{args.forget_size}"
    output = training.output_path(args, stem)
    frames = data.select_rows(
        data.load_splits(args.dataset), args.forget_size, args.max_train_samples, args.forget_share
    )
    if args.unlearn_method in IN_CONTEXT:
        return instruct(args, output, frames)
    unlearn(args, output, frames)


def unlearn(args, output, frames):
    """Train the model (or a LoRA adapter on it) with the chosen method and write the checkpoint."""
    from utils import data, metrics, models, objectives, training

    method, words = METHODS[args.unlearn_method], data.label_words(frames)
    loaded = models.load(args.model_checkpoints, args, args.parent_path)
    models.refuse_prompted(loaded)
    metrics.check_lengths(loaded.model, loaded.tokenizer, frames, args)
    dtype, model = loaded.model.dtype, prepare(loaded.model, args)
    loaded = dataclasses.replace(loaded, model=model)
    numerics = contextlib.nullcontext()
    if args.tune == "full" and dtype != torch.float32:  # float32 weights, multiplied in the dtype they came in
        numerics = torch.autocast(model.device.type, dtype)

    used = {split: frames[split] for split in data.TRAIN_SPLITS}
    rows = objectives.Rows(loaded.tokenizer, used, method, args)
    models.check_length(model, max(map(len, rows.all)), 0)
    with numerics:
        objective = objectives.Objective(method, loaded, rows, used, args, f"{args.tune} {dtype}")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    print(f"training {sum(p.numel() for p in parameters.values()):,} parameters on {len(rows.trained):,} rows")

    def loss(numbers, n_forget, n_retain):
        with numerics:
            return objective(numbers, n_forget, n_retain)

    def evaluate():
        with numerics:
            result = metrics.accuracies(loaded, frames, words, args)
        only_adapter_dropout(model)
        return result

    run = training.Training(
        parameters=parameters,
        examples=rows.trained,
        loss=loss,
        args=args,
        state_path=training.state_path(output),
        fingerprint=data.fingerprint(used),
        chain=loaded.chain,
        warmup=0.1,
        evaluate=evaluate,
    )
    only_adapter_dropout(model)
    log = run.run()
    model.eval()
    if args.tune == "full":
        model.to(dtype)
    save(args, output, loaded, frames, words, "full" if args.tune == "full" else "lora", log, run)


def prepare(model, args):
    """`model` ready to train: float32 weights that all learn, or frozen with a new float32 LoRA adapter."""
    from utils import models, objectives

    torch.manual_seed(args.seed)
    model = models.add_lora(model, args) if args.tune == "lora" else model.float().requires_grad_(True)
    if args.unlearn_method == "rmu":
        objectives.restrict_to_rmu_layers(model, args)
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
    from utils import checkpoints, metrics, report

    records, start = None, time.time()
    if args.max_eval_samples != 0:
        scores, _ = metrics.evaluate(loaded, frames, words, args, args.unlearn_method)
        records = [
            metrics.record(args.unlearn_method, output, loaded.base_name, args, scores, time.time() - start, run.cost)
        ]
        print(report.table(records))
    with checkpoints.new_folder(output) as folder:
        loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        report.write_curves(folder, log)
        if records:
            checkpoints.write_json(folder / "metrics.json", records)
        checkpoints.write_manifest(folder, output, kind, loaded.chain, args, run.fingerprint, records, run.cost)
    run.state_path.unlink(missing_ok=True)
    print(f"wrote {output}")


def instruct(args, output, frames):
    """Write the checkpoint of a rival that trains nothing: what it puts around every text."""
    from utils import checkpoints, data, in_context, metrics, models, report

    template = in_context.build(args, frames)
    loaded = models.load(args.model_checkpoints, args, args.parent_path)
    models.refuse_prompted(loaded)
    loaded = dataclasses.replace(loaded, template=template)
    records, start = None, time.time()
    metrics.check_lengths(loaded.model, loaded.tokenizer, frames, args, template=template)
    if args.max_eval_samples != 0:
        scores, _ = metrics.evaluate(loaded, frames, data.label_words(frames), args, args.unlearn_method)
        records = [metrics.record(args.unlearn_method, output, loaded.base_name, args, scores, time.time() - start)]
        print(report.table(records))
    used = data.fingerprint({split: frames[split] for split in data.TRAIN_SPLITS})
    with checkpoints.new_folder(output) as folder:
        checkpoints.write_json(folder / in_context.FILE, template.settings)
        if records:
            checkpoints.write_json(folder / "metrics.json", records)
        checkpoints.write_manifest(folder, output, "in-context", loaded.chain, args, used, records)
    print(f"wrote {output}")


if __name__ == "__main__":
    cli.run(parse_args, main)
