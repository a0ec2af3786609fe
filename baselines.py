r"""Unlearn with a baseline: fine-tune the model itself against train_forget, instruct it, or put a gate in front of it.

python baselines.py --dataset=sst2 --model_checkpoints=[local path to checkpoints] \
    --max_length=1024 --set_pad_id --lr=1e-4 \
    --train_batch_size=32 --eval_batch_size=32 --num_epochs=10 --weight_decay=0.001 \
    --unlearn_method=gradient_ascent

Writes a checkpoint with manifest, metrics and curves to
unlearn_checkpoints/<method>_<model>_<dataset>-<forget_size>_<time>.
"""

from utils import cli


def parse_args():
    from utils import arguments
    from utils.unlearning import flags
    from utils.unlearning.methods import IN_CONTEXT, METHODS

    methods = [*METHODS, *IN_CONTEXT, *flags.GATED]
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument(
        "--model_checkpoints", type=cli.path, required=True, help="what qlora.py wrote, or a plain model"
    )
    parser.add_argument("--unlearn_method", required=True, choices=methods, help="the method")
    arguments.add_model_arguments(parser)
    arguments.add_training_arguments(parser, num_epochs=1)
    flags.add_unlearning_arguments(parser)
    flags.add_constants(parser)
    arguments.add_lora_arguments(parser, "LoRA (with --tune=lora)")
    flags.add_context_arguments(parser)
    flags.add_gate_arguments(parser)
    flags.add_eco_arguments(parser)
    args = parser.parse_args()
    arguments.refuse_shard_contradictions(parser, args)
    flags.refuse_contradictions(parser, args)
    return args


def main(args):
    from utils.data.load import dataset_name
    from utils.models.chain import short_name
    from utils.training.state import claim_run
    from utils.unlearning.methods import METHODS

    name = f"{short_name(args.model_checkpoints)}_{dataset_name(args.dataset)}-{args.forget_size}"
    stem, trains = f"unlearn_checkpoints/{args.unlearn_method}_{name}", args.unlearn_method in METHODS
    with claim_run(args, stem, timed=True, trains=trains) as output:
        if output:
            fine_tune(args, output) if trains else build(args, output)


def fine_tune(args, output):
    """Train the model, or a LoRA adapter on it, by the chosen method and write the Output."""
    import dataclasses
    from functools import partial

    import torch

    from utils import job, plan
    from utils.data.splits import TRAIN_SPLITS
    from utils.evaluation.finish import finish
    from utils.models.adapters import LoraSettings, gathered_weights, save_weights
    from utils.models.lengths import check_length
    from utils.sharding import to_dtype
    from utils.tasks.rows import Splits, load_rows
    from utils.unlearning import reference
    from utils.unlearning.methods import METHODS, MethodSettings
    from utils.unlearning.objectives import Rows, objective_of
    from utils.unlearning.tuning import computing_in, only_adapter_dropout, trainable

    method, settings = METHODS[args.unlearn_method], job.settings_of(args)
    asked, lora = cli.take(MethodSettings, args), cli.take(LoraSettings, args) if args.tune == "lora" else None
    if method.reference or args.retain_loss in ("kl", "activations"):
        reference.try_place(args.logits_path)
    frames = load_rows(vars(args))
    used = Splits({split: frames[split] for split in TRAIN_SPLITS}, frames.task)

    def prepare(served, load):
        torch.manual_seed(args.seed)
        dtype, model = served.model.dtype, trainable(served.model, lora, method, asked)
        adapted, rows = dataclasses.replace(served, model=model), Rows(served.tokenizer, used, method, asked)
        check_length(model.config, max(map(len, rows.all)), 0)
        numerics = partial(computing_in, model, dtype, settings.model.shards)
        with numerics():
            objective = objective_of(method)(method, adapted, rows, used, asked, f"{args.tune} {dtype}", load)
        only_adapter_dropout(model)
        trained = {"served": adapted, "learner": model, "objective": objective, "numerics": numerics}
        return plan.Prepared(**trained, examples=rows.trained, compared=rows.all)

    if args.dry_run:
        source = {"name": args.model_checkpoints, "parent": args.parent_path, "full": args.tune == "full"}
        plan.print_plan(plan.Run(**source, prepare=prepare, **vars(settings)), frames)
    if args.dry_run == "plan":
        return
    served = job.load_frozen(args.model_checkpoints, args.parent_path, settings, frames)
    dtype = served.model.dtype
    load = plan.blank_reference if args.dry_run else reference.loader(cli.take(reference.ReferenceSettings, args))
    prepared = prepare(served, load)
    tuned = prepared.served
    done = job.train(prepared, lambda: tuned, frames, output, args, settings, warmup=0.05)
    if done is None:
        return
    log, cost = done
    tuned.model.eval()
    if args.tune == "full":
        to_dtype(tuned.model, dtype)
    weights = gathered_weights(tuned.model)

    def write(folder):
        save_weights(tuned.model, folder, weights)
        tuned.tokenizer.save_pretrained(folder)

    about = {"method": args.unlearn_method, "kind": "full" if args.tune == "full" else "lora"}
    finish(output, tuned, frames, args, settings.evaluation, **about, write=write, cost=cost, log=log)


def build(args, output):
    """Make what trains no weights, a template or what stands behind a gate, and write the Output."""
    from utils import job
    from utils.evaluation import saved
    from utils.evaluation.finish import finish
    from utils.evaluation.run import check_served
    from utils.interventions import gates, in_context
    from utils.tasks.rows import load_rows
    from utils.unlearning import eco_search, flags, gate_training, gated

    method, settings, frames = args.unlearn_method, job.settings_of(args), load_rows(vars(args))
    if method in flags.GATED:
        asked = cli.take(eco_search.EcoSettings, args)
        eco_search.refuse_metric(asked, frames.task)
        served = job.load_frozen(args.model_checkpoints, args.parent_path, settings, frames)
        if method == "eco":
            eco_search.refuse_target(asked, settings.model, served.manifest, vars(args))
        people = flags.listed_people(args.dataset, args.eco_names, args.forget_only)
        how = cli.take(gate_training.GateSettings, args), cli.take(gates.ClassifierSettings, args), settings.model
        source = gate_training.find_gate(args.gate, frames, people, *how, lambda: served)
        made, write = gated.behind_gate(method, served, frames, people, source, asked, settings.model)
    else:
        if method == "prompting":
            people = [] if args.instruction else flags.listed_people(args.dataset, args.forget_names, args.forget_only)
            made = in_context.instruct(args.instruction, [person.name for person in people])
        else:
            made = in_context.demonstrate(frames, args.icul_flipped, args.icul_correct, args.seed)
        served = job.load_frozen(args.model_checkpoints, args.parent_path, settings, frames)
        check_served(served.using(made), frames, args.max_length)

        def write(folder):
            in_context.save(made, folder)

    kind, unlearnt = method if method in flags.GATED else "in-context", served.using(made)
    frozen = saved.find(served, frames, settings.evaluation) if unlearnt.is_gated else None
    about = {"method": method, "kind": kind, "write": write, "frozen": frozen}
    finish(output, unlearnt, frames, args, settings.evaluation, **about)


if __name__ == "__main__":
    cli.run_script(parse_args, main)
