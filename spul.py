r"""Learn the unlearning prompt: p virtual tokens that make a frozen model forget train_forget and keep the rest (SPUL).

python spul.py --dataset=sst2 --model_checkpoints=[local path to checkpoints] \
    --max_length=1024 --set_pad_id --lr=1e-4 \
    --train_batch_size=32 --eval_batch_size=32 --num_epochs=10 --weight_decay=0.001 \
    --forget_size=1.0 --ptuning_num_tokens=30 --ptuning_hidden_size=128 --alpha=0.5 --beta=0.5

Writes a PEFT prompt with manifest, metrics and curves to
unlearn_checkpoints/spul_<model>_<dataset>-<forget_size>_<time>.
"""

from utils import cli
from utils.errors import note_once


def parse_args():
    from utils import arguments
    from utils.unlearning import flags

    parser = cli.ArgumentParser(__doc__)
    parser.add_argument(
        "--model_checkpoints",
        type=cli.path,
        required=True,
        help="what qlora.py wrote, or a plain model (hub id, folder)",
    )
    arguments.add_model_arguments(parser)
    arguments.add_training_arguments(parser, num_epochs=10)
    flags.add_spul_arguments(parser)
    flags.add_behind_arguments(parser)
    args = parser.parse_args()
    arguments.refuse_shard_contradictions(parser, args)
    flags.refuse_spul_contradictions(parser, args)
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
    from functools import cache

    import torch

    from utils import job, plan
    from utils.data.select import learnt_by
    from utils.evaluation.finish import finish, show_merged
    from utils.interventions import gate_files, prompt_encoders
    from utils.models.chain import resolve_chain
    from utils.models.lengths import check_length
    from utils.tasks.rows import load_rows
    from utils.unlearning import behind, hiding, reference
    from utils.unlearning.objectives import PromptTuning, prompt_rows

    asked, settings = cli.take(prompt_encoders.EncoderSettings, args), job.settings_of(args)
    p = asked.ptuning_num_tokens
    if args.beta:
        reference.try_place(args.logits_path)
    elif args.logits_path:
        note_once("without L_kl (--beta=0) there is no reference, so --logits_path is not used")
    frames = load_rows(vars(args))
    hidden = hiding.find(cli.take(hiding.HidingSettings, args), frames, settings.model, prompt_rows)

    @cache
    def load_model():
        return job.load_frozen(args.model_checkpoints, args.parent_path, settings, frames, p)

    gate, start = behind.find_gate(args, frames, settings.model, load_model), None

    def prepare(served, load, frozen=None):
        rows = behind.training_rows(served, frames, settings.evaluation, gate, frozen)
        check_length(served.model.config, max(map(len, rows.examples)), p)
        kept, n_kept = {"train_retain": rows.retain}, len(rows.retain)
        compared = load(served, rows.examples, range(n_kept), kept) if args.beta and n_kept else None
        torch.manual_seed(args.seed)
        encoder = prompt_encoders.build_encoder(served, asked).to(served.model.device)
        terms = rows.examples, served.pad_id, compared, args.alpha, args.beta, rows.shares
        objective = PromptTuning(served.model, encoder, *terms, hidden.term(served, rows.examples, p), args.logit_chunk)
        beside = [link for link in (start, gate and gate.link, hidden.link) if link]
        return plan.Prepared(served=served, learner=encoder, objective=objective, examples=rows.examples, beside=beside)

    if args.dry_run:
        source = {"name": args.model_checkpoints, "parent": args.parent_path, "evaluates_before": True}
        plan.print_plan(plan.Run(**source, prepare=prepare, p=p, **vars(settings)), frames)
    if args.dry_run == "plan":
        return
    start = resolve_chain(args.init_checkpoint, args.trust_remote_code)[-1] if args.init_checkpoint else None
    served = load_model()
    if start:
        prompt_encoders.refuse_other_start(start, served.chain[-1])
    before, frozen = ([], None) if args.dry_run else show_merged(served, frames, settings.evaluation)
    if args.forget_size == 1 and served.manifest and not learnt_by(served.manifest, frames):
        note_once(f"{args.model_checkpoints} was fine-tuned on other rows than the ones selected here")
    load = plan.blank_reference if args.dry_run else reference.loader(cli.take(reference.ReferenceSettings, args))
    prepared = prepare(served, load, frozen)
    encoder, in_front = prepared.learner, gate.gate(served) if gate else None
    if start:
        prompt_encoders.load_encoder(encoder, start)

    def prompted():
        return served.using(prompt_encoders.Prompt(vectors=encoder().detach(), gate=in_front))

    done = job.train(prepared, prompted, frames, output, args, settings, warmup=0.1, evaluates_before=True)
    if done is None:
        return
    log, cost = done

    def write(folder):
        prompt_encoders.save(encoder, args.model_checkpoints, folder)
        served.tokenizer.save_pretrained(folder)
        if gate:
            gate_files.save(in_front, gate.description, gate.unseen, folder)

    finish(
        output, prompted(), frames, args, settings.evaluation, method="SPUL behind a gate" if gate else "SPUL",
        kind="prompt", write=write, before=before, cost=cost, log=log, frozen=frozen,
    )  # fmt: skip


if __name__ == "__main__":
    cli.run_script(parse_args, main)
