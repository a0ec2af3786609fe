r"""Fine-tune a language model until the training set (retain + forget) is memorised; the model that SPUL then unlearns.

python qlora.py --dataset=sst2 --model_name=meta-llama/Llama-2-7b-hf \
    --max_length=1024 --set_pad_id --lr=1e-4 \
    --train_batch_size=32 --eval_batch_size=32 --num_epochs=2 --weight_decay=0.001 \
    --lora_rank=16 --lora_alpha=64 --lora_fropout=0.1 --lora_bias=none

Writes a LoRA adapter with manifest, metrics and curves to qlora_checkpoints/<model>-qlora-<dataset>.
"""

from utils import cli
from utils.errors import UserError


def parse_args():
    from utils import arguments

    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--model_name", type=cli.path, required=True, help="hub id, model folder or .gguf file")
    arguments.add_model_arguments(parser)
    arguments.add_training_arguments(parser, num_epochs=10)
    group = parser.add_argument_group("fine-tuning")
    group.add_argument("--quantization", choices=["nf4", "none"], default="nf4", help="of the frozen base")
    group.add_argument("--exclude_forget", action="store_true", help="fine-tune on retain rows only: the retain model")
    group.add_argument(
        "--shadow", type=cli.non_negative_int, metavar="N",
        help="a shadow model for --audit membership: half of all forget rows; 2 i and 2 i + 1 share a draw",
    )  # fmt: skip
    arguments.add_lora_arguments(parser, "LoRA")
    args = parser.parse_args()
    arguments.refuse_shard_contradictions(parser, args)
    if args.shadow is not None and args.exclude_forget:
        parser.error("a --shadow model learns forget rows; leave out --exclude_forget")
    return args


def main(args):
    from utils.data.load import dataset_name
    from utils.models.chain import short_name
    from utils.training.state import claim_run

    suffix = "-retain" if args.exclude_forget else "" if args.shadow is None else f"-shadow{args.shadow}"
    name = f"{short_name(args.model_name)}-qlora-{dataset_name(args.dataset)}{suffix}"
    with claim_run(args, f"qlora_checkpoints/{name}") as output:
        if output:
            fine_tune(args, output)


def fine_tune(args, output):
    """Train the adapter, evaluate it and write the Output."""
    from functools import cache

    import torch

    from utils import job, plan
    from utils.data.splits import TRAIN_SPLITS
    from utils.evaluation.finish import finish
    from utils.evaluation.run import check_served
    from utils.interventions.served import Served
    from utils.models.adapters import LoraSettings, add_lora, gathered_weights, save_weights
    from utils.models.base import load_base, load_tokenizer, spread
    from utils.models.chain import resolve_chain
    from utils.models.lengths import check_length
    from utils.tasks.answers import known_answers
    from utils.tasks.encode import tokenize
    from utils.tasks.rows import load_rows
    from utils.unlearning.objectives import FineTuning

    settings, lora = job.settings_of(args), cli.take(LoraSettings, args)
    frames, splits = load_rows(vars(args)), TRAIN_SPLITS[:1] if args.exclude_forget else TRAIN_SPLITS

    @cache
    def examples_of(tokenizer):
        known, examples = known_answers(tokenizer, frames.task), []
        for split in splits:
            rows, forget = frames[split], split == "train_forget"
            examples += tokenize(tokenizer, rows, rows["label_text"], args.max_length, forget, answers=known)
        return examples

    def prepare(served, _):
        examples = examples_of(served.tokenizer)
        check_length(served.model.config, max(map(len, examples)), 0)
        model = add_lora(served.model, lora).train()
        objective = FineTuning(model, examples, served.pad_id, args.logit_chunk)
        adapted = Served(model, served.tokenizer, served.chain)
        return plan.Prepared(served=adapted, learner=model, objective=objective, examples=examples)

    if args.dry_run:
        run = plan.Run(name=args.model_name, prepare=prepare, quantization=args.quantization, **vars(settings))
        plan.print_plan(run, frames)
    if args.dry_run == "plan":
        return
    chain = resolve_chain(args.model_name, args.trust_remote_code)
    if len(chain) > 1:
        raise UserError(f"{args.model_name} is a checkpoint of this project; --model_name takes a plain model")
    tokenizer = load_tokenizer(chain, args.set_pad_id, args.trust_remote_code)
    examples_of(tokenizer)  # what is wrong with the rows is said before weights are read
    torch.manual_seed(args.seed)
    model = spread(load_base(chain[0], settings.model, args.quantization), settings.model)
    base = Served(model, tokenizer, chain)
    check_served(base, frames, args.max_length)
    prepared = prepare(base, None)
    served = prepared.served
    done = job.train(prepared, lambda: served, frames, output, args, settings, warmup=0.05, trained_on=splits)
    if done is None:
        return
    log, cost = done
    served.model.eval()
    weights = gathered_weights(served.model)

    def write(folder):
        save_weights(served.model, folder, weights)
        tokenizer.save_pretrained(folder)

    method = "retain model" if args.exclude_forget else "fine-tuned" if args.shadow is None else "shadow model"
    finish(
        output, served, frames, args, settings.evaluation, method=method, kind="lora", write=write,
        trained_on=splits, cost=cost, log=log,
    )  # fmt: skip


if __name__ == "__main__":
    cli.run_script(parse_args, main)
