r"""Fine-tune a language model until the training set (retain + forget) is memorised; the model that SPUL then unlearns.

python qlora.py --dataset=sst2 --model_name=meta-llama/Llama-2-7b-hf \
    --max_length=1024 --set_pad_id --lr=1e-4 \
    --train_batch_size=32 --eval_batch_size=32 --num_epochs=2 --weight_decay=0.001 \
    --lora_rank=16 --lora_alpha=64 --lora_fropout=0.1 --lora_bias=none

Writes a LoRA adapter with manifest, metrics and curves to qlora_checkpoints/<model>-qlora-<dataset>.
"""

from time import perf_counter

from utils import arguments, cli
from utils.errors import UserError


def parse_args():
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--model_name", type=cli.path, required=True, help="hub id, model folder or .gguf file")
    arguments.add_model_arguments(parser)
    arguments.add_training_arguments(parser, num_epochs=10)
    group = parser.add_argument_group("fine-tuning")
    group.add_argument("--quantization", choices=["nf4", "none"], default="nf4", help="of the frozen base")
    group.add_argument(
        "--exclude_forget", action="store_true", help="fine-tune on retain only: the retrained reference"
    )
    arguments.add_lora_arguments(parser, "LoRA")
    return parser.parse_args()


def main(args):
    from utils.data.load import dataset_name
    from utils.models.chain import short_name
    from utils.training.state import claim_run

    suffix = "-retain" if args.exclude_forget else ""
    name = f"{short_name(args.model_name)}-qlora-{dataset_name(args.dataset)}{suffix}"
    with claim_run(args, f"qlora_checkpoints/{name}") as output:
        if output:
            fine_tune(args, output)


def fine_tune(args, output):
    """Train the adapter, evaluate it and write the Output."""
    import torch

    from utils import distributed, plan
    from utils.data.batch import collate
    from utils.data.select import fingerprint, load_rows
    from utils.data.splits import TRAIN_SPLITS
    from utils.evaluation import figures, tables
    from utils.evaluation.record import make_record
    from utils.evaluation.run import accuracies, check_rows, evaluate_splits
    from utils.interventions.served import Loaded
    from utils.models.adapters import add_lora, save_weights
    from utils.models.base import load_base, load_tokenizer
    from utils.models.chain import resolve_chain
    from utils.models.forward import completion_logits
    from utils.models.lengths import check_length
    from utils.storage import checkpoints, outputs
    from utils.tasks.answers import known_answers
    from utils.tasks.classification import label_words
    from utils.tasks.encode import tokenize
    from utils.training.loop import Training
    from utils.unlearning import losses

    frames = load_rows(vars(args))
    words = label_words(frames)
    if args.dry_run:
        plan.print_plan("lora", args, args.model_name, frames)
    if args.dry_run == "plan":
        return
    chain = resolve_chain(args.model_name, args.trust_remote_code)
    if len(chain) > 1:
        raise UserError(f"{args.model_name} is a checkpoint of this project; --model_name takes a plain model")
    tokenizer = load_tokenizer(chain, args.set_pad_id, args.trust_remote_code)
    splits = TRAIN_SPLITS[:1] if args.exclude_forget else TRAIN_SPLITS
    known, examples = known_answers(tokenizer, words), []
    for split in splits:
        texts, labels = frames[split]["text"], frames[split]["label_text"]
        examples += tokenize(tokenizer, texts, labels, args.max_length, split == "train_forget", answers=known)

    torch.manual_seed(args.seed)
    base = load_base(chain[0], args, args.quantization)
    check_length(base.config, max(map(len, examples)), 0)
    check_rows(base.config, tokenizer, frames, args)
    model = add_lora(base, args)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    print(f"training {sum(p.numel() for p in parameters.values()):,} LoRA parameters on {len(examples):,} rows")

    def loss(rows, n_forget, n_retain):
        batch = collate([examples[i] for i in rows], tokenizer.pad_token_id, base.device)
        nll = losses.token_nll(completion_logits(model, batch), batch.targets)
        return losses.mean_over_rows(nll, n_forget + n_retain), {}

    loaded = Loaded(model, tokenizer, None, chain)

    run = Training(
        parameters=parameters,
        examples=examples,
        loss=loss,
        args=args,
        state_path=outputs.state_path(output),
        fingerprint=fingerprint({split: frames[split] for split in splits}),
        chain=chain,
        warmup=0.05,
        evaluate=lambda: accuracies(loaded, frames, words, args),
    )
    model.train()
    if args.dry_run:
        return plan.print_probe(run, loaded, frames, words)
    log = run.run()
    model.eval()

    records, start = None, perf_counter()
    if args.max_eval_samples != 0:
        scores, _ = evaluate_splits(loaded, frames, words, args, "evaluating")
        method = "retrained" if args.exclude_forget else "fine-tuned"
        records = [make_record(method, output, args.model_name, args, scores, perf_counter() - start, run.cost)]
    if not distributed.is_main():
        return
    with output.new_folder() as folder:
        save_weights(model, folder)
        tokenizer.save_pretrained(folder)
        checkpoints.write_manifest(folder, output, "lora", chain, args, run.fingerprint, words, records, run.cost)
        figures.write_curves(folder, log)
    if records:
        print(tables.table(records))
    print(f"wrote {output}")


if __name__ == "__main__":
    cli.run(parse_args, main)
