r"""Learn the unlearning prompt: p virtual tokens that make a frozen model forget train_forget and keep the rest (SPUL).

python spul.py --dataset=sst2 --model_checkpoints=[local path to checkpoints] \
    --max_length=1024 --set_pad_id --lr=1e-4 \
    --train_batch_size=32 --eval_batch_size=32 --num_epochs=10 --weight_decay=0.001 \
    --forget_size=1.0 --ptuning_num_tokens=30 --ptuning_hidden_size=128 --alpha=0.5 --beta=0.5

Writes a PEFT prompt with manifest, metrics and curves to
unlearn_checkpoints/spul_<model>_<dataset>-<forget_size>_<time>.
"""

from time import perf_counter

from utils import arguments, cli
from utils.errors import UserError, note_once


def parse_args():
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument(
        "--model_checkpoints",
        type=cli.path,
        required=True,
        help="what qlora.py wrote, or a plain model (hub id, folder)",
    )
    arguments.add_model_arguments(parser)
    arguments.add_training_arguments(parser, num_epochs=10)
    group = parser.add_argument_group("SPUL")
    group.add_argument("--forget_size", type=cli.fraction, default=1.0, help="share of train_forget to unlearn")
    group.add_argument("--ptuning_num_tokens", type=cli.positive_int, default=30, help="p, virtual tokens")
    group.add_argument("--ptuning_hidden_size", type=cli.positive_int, default=128, help="h, width of the encoder")
    group.add_argument("--alpha", type=cli.non_negative_float, default=0.5, help="weight of L_r")
    group.add_argument("--beta", type=cli.non_negative_float, default=0.5, help="weight of L_kl")
    group.add_argument(
        "--prompt_encoder", choices=["mlp", "lstm", "embedding"], default="mlp", help="what produces the virtual tokens"
    )
    start = group.add_mutually_exclusive_group()
    start.add_argument("--init_text", type=cli.text, help="start from the embeddings of this instruction")
    start.add_argument(
        "--init_checkpoint", type=cli.path, help="start from the encoder of an earlier spul.py checkpoint"
    )
    group.add_argument(
        "--forget_per_batch",
        type=cli.non_negative_int,
        default=0,
        help="forget rows in every batch (0: all rows mixed, as published)",
    )
    arguments.add_retain_ratio(group)
    group.add_argument(
        "--logits_path", type=cli.path, help="file of reference logits (default: saved_logits/<model>-<dataset>-<key>)"
    )
    group.add_argument(
        "--parent_path", type=cli.path, help="where the base model of --model_checkpoints lies, if it was moved"
    )
    args = parser.parse_args()
    if args.forget_per_batch >= args.train_batch_size:
        parser.error("--forget_per_batch must be smaller than --train_batch_size")
    return args


def main(args):
    from utils.data.load import dataset_name
    from utils.models.chain import short_name
    from utils.training.state import claim_run

    name = f"spul_{short_name(args.model_checkpoints)}_{dataset_name(args.dataset)}-{args.forget_size}"
    with claim_run(args, f"unlearn_checkpoints/{name}", timed=True) as output:
        if output:
            learn_prompt(args, output)


def learn_prompt(args, output):
    """Train the prompt, evaluate it and write the Output."""
    import torch
    from safetensors.torch import save_file

    from utils import distributed, plan
    from utils.data.batch import collate
    from utils.data.select import fingerprint, learnt_by, load_rows
    from utils.data.splits import TRAIN_SPLITS
    from utils.evaluation import figures, tables
    from utils.evaluation.record import make_record
    from utils.evaluation.run import accuracies, check_rows, evaluate_splits, note_other_length
    from utils.interventions.served import Loaded, load_served
    from utils.models.chain import refuse_prompted
    from utils.models.forward import completion_logits, prompt_prefix
    from utils.models.lengths import check_length
    from utils.storage import checkpoints, outputs
    from utils.tasks.answers import known_answers
    from utils.tasks.classification import draw_unlearning_labels, label_words
    from utils.tasks.encode import tokenize
    from utils.training.loop import Training
    from utils.unlearning import losses, reference

    if args.beta:
        reference.try_place(args)
    frames = load_rows(vars(args))
    words = label_words(frames)
    if args.dry_run:
        plan.print_plan("prompt", args, args.model_checkpoints, frames)
    if args.dry_run == "plan":
        return

    loaded = load_served(args.model_checkpoints, args, args.parent_path)
    refuse_prompted(loaded.chain)
    model, tokenizer = loaded.model, loaded.tokenizer
    check_rows(model.config, tokenizer, frames, args, args.ptuning_num_tokens)
    note_other_length(loaded, frames, args)
    records = [] if args.dry_run else report_merge(loaded, frames, words, args)

    used = fingerprint({split: frames[split] for split in TRAIN_SPLITS})
    tuned = loaded.chain[-1].manifest
    if args.forget_size == 1 and tuned and not learnt_by(tuned, frames):
        print(f"note: {args.model_checkpoints} was fine-tuned on other rows than the ones selected here")
    unlearning = draw_unlearning_labels(len(frames["train_forget"]), args.seed)
    retain, forget = frames["train_retain"], frames["train_forget"]
    known = known_answers(tokenizer, words)
    examples = tokenize(tokenizer, retain["text"], retain["label_text"], args.max_length, answers=known)
    examples += tokenize(tokenizer, forget["text"], unlearning, args.max_length, forget=True, answers=known)
    check_length(model.config, max(map(len, examples)), args.ptuning_num_tokens)

    unprompted = None
    if args.beta:
        make = plan.blank_reference if args.dry_run else reference.load_reference
        unprompted = make(loaded, examples, range(len(retain)), {"train_retain": retain}, args)
    elif args.logits_path:
        note_once("without L_kl (--beta=0) there is no reference, so --logits_path is not used")
    torch.manual_seed(args.seed)
    encoder = build_encoder(args, loaded).to(model.device)
    print(f"training {sum(p.numel() for p in encoder.parameters()):,} parameters on {len(examples):,} rows")

    def loss(rows, n_forget, n_retain):
        batch = collate([examples[i] for i in rows], tokenizer.pad_token_id, model.device)
        is_forget = batch.forget[batch.rows]
        prefix = prompt_prefix(model, encoder())
        if unprompted is None:
            logits, kl = completion_logits(model, batch, prefix), None
        else:
            logits, reference_logits = completion_logits(model, batch, prefix, unprompted.of(rows))
            kl = losses.token_kl(reference_logits, logits[~is_forget])
        nll = losses.token_nll(logits, batch.targets)
        return losses.spul_loss(nll, kl, is_forget, n_forget, n_retain, args.alpha, args.beta)

    def prompted():
        return Loaded(model, tokenizer, encoder().detach(), loaded.chain)

    run = Training(
        parameters=dict(encoder.named_parameters()),
        examples=examples,
        loss=loss,
        args=args,
        state_path=outputs.state_path(output),
        fingerprint=used,
        chain=loaded.chain,
        warmup=0.1,
        evaluate=lambda: accuracies(prompted(), frames, words, args),
    )
    if args.dry_run:
        referred = unprompted.examples(examples) if unprompted else []
        return plan.print_probe(run, prompted(), frames, words, referred, evaluations=2)
    log = run.run()

    if args.max_eval_samples != 0:
        start = perf_counter()
        scores, _ = evaluate_splits(prompted(), frames, words, args, "SPUL")
        cost = perf_counter() - start, run.cost
        records.append(make_record("SPUL", output, loaded.base_name, args, scores, *cost))
    if not distributed.is_main():
        return
    with output.new_folder() as folder:
        encoder.config.base_model_name_or_path = args.model_checkpoints
        encoder.config.inference_mode = True
        encoder.config.save_pretrained(folder)
        save_file({"prompt_embeddings": encoder().detach().cpu().contiguous()}, folder / "adapter_model.safetensors")
        save_file({k: v.cpu().contiguous() for k, v in encoder.state_dict().items()}, folder / "encoder.safetensors")
        tokenizer.save_pretrained(folder)
        checkpoints.write_manifest(
            folder, output, "prompt", loaded.chain, args, run.fingerprint, words, records, run.cost
        )
        figures.write_curves(folder, log)
    if records:
        print(tables.table(records))
    print(f"wrote {output}")


def report_merge(loaded, frames, words, args):
    """Print accuracy before and after LoRA was merged into the unquantised base; returns the merged model's records."""
    from utils.evaluation import tables
    from utils.evaluation.record import make_record
    from utils.evaluation.run import evaluate_splits

    if args.max_eval_samples == 0:
        return []
    start = perf_counter()
    scores, _ = evaluate_splits(loaded, frames, words, args, "before SPUL")
    last = loaded.chain[-1]
    after = make_record(
        "merged" if last.kind == "lora" else "base", last.path, loaded.base_name, args, scores, perf_counter() - start
    )
    before = (last.manifest or {}).get("metrics") or []
    print(tables.table([*before, after]))
    return [after]


def build_encoder(args, loaded):
    """The prompt encoder: new, started from --init_text, or from the encoder that --init_checkpoint trained."""
    from utils.interventions.prompt_encoders import VirtualTokens, start_from_text
    from utils.models.chain import resolve_chain
    from utils.storage import checkpoints
    from utils.storage.reading import Like, read_tensors

    embeddings, start = loaded.model.get_input_embeddings(), None
    if args.init_text is not None:
        start = start_from_text(loaded.tokenizer, embeddings, args.init_text, args.ptuning_num_tokens)
    encoder = VirtualTokens(
        args.prompt_encoder, args.ptuning_num_tokens, embeddings.weight.shape[1], args.ptuning_hidden_size, start
    )
    if args.init_checkpoint:
        chain = resolve_chain(args.init_checkpoint, args.trust_remote_code)
        if chain[-1].kind != "prompt":
            raise UserError(f"{args.init_checkpoint} is no prompt; --init_checkpoint takes what spul.py wrote")
        checkpoints.verify_parent(loaded.chain[-1], chain[-1])
        expected = {name: Like(tuple(tensor.shape)) for name, tensor in encoder.state_dict().items()}
        what = "encoder of this --prompt_encoder, --ptuning_num_tokens and --ptuning_hidden_size"
        remedy = "pass those that it was trained with"
        encoder.load_state_dict(read_tensors(chain[-1].path / "encoder.safetensors", expected, what, remedy))
    return encoder


if __name__ == "__main__":
    cli.run(parse_args, main)
