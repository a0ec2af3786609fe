"""The paths that the benchmark times, each in a process of its own, so that its peak memory is its own.

`ours` runs the project's own scripts and functions; `plain` is what the paper's code does, repaired just enough to run,
from library parts: PEFT's prompt encoder (`get_peft_model`) and transformers' Trainer with gradient checkpointing,
logits of every position, virtual tokens in front of every row, and full-vocabulary rows of reference logits; for the
baselines that the paper does not have, a second model in place of those.
"""

import contextlib
import copy
import dataclasses
import functools
import importlib
import os
import sys
import time
from pathlib import Path

import torch

import utils.models.quiet  # noqa: F401  isort: skip  (before PEFT is imported)
from peft import LoraConfig, PromptEncoderConfig, get_peft_model
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainerCallback, TrainingArguments

from utils import cli, distributed
from utils.data.batch import collate
from utils.evaluation.scores import score_rows
from utils.interventions.prompt_encoders import Prompt
from utils.interventions.served import Served, load_served
from utils.models import pieces
from utils.models.base import ModelSettings, keep_one_format, load_tokenizer, pick_device
from utils.models.chain import resolve_chain
from utils.models.forward import completion_logits
from utils.models.layers import record_activations
from utils.tasks.classification import classification, draw_unlearning_labels, label_words
from utils.tasks.encode import tokenize
from utils.tasks.rows import load_splits
from utils.training.loop import Training
from utils.unlearning import objectives, reference, rmu
from utils.unlearning.losses import token_kl
from utils.unlearning.methods import METHODS, MethodSettings


def work(spec, connection):
    """Run the path of `spec` (rounds.Bench writes it); what it prints goes to a file."""
    log = os.open(Path(spec["work"]) / "log.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    PATHS[spec["task"], spec["path"]](spec, Clock(connection))


class Clock:
    """Times the passes. Each waits for a message of the benchmark and is answered by seconds, peak memory and loss."""

    def __init__(self, connection):
        self.connection, self.loss = connection, None

    def begin(self):
        """Say that the next pass can begin, and wait until it may; the process ends when no more is wanted."""
        self.connection.send("ready")
        try:
            self.connection.recv()
        except EOFError:
            sys.exit()
        _synchronise()
        self.start = time.perf_counter()

    def end(self):
        _synchronise()
        seconds = time.perf_counter() - self.start
        self.connection.send({"seconds": seconds, "peak_bytes": distributed.peak_memory(), "loss": self.loss})

    @contextlib.contextmanager
    def timed(self):
        self.begin()
        yield
        self.end()


def _synchronise():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def our_training(spec, clock):
    """The script itself (spul.py, baselines.py) on the spec's batches; a pass is a step, optimiser and log included."""
    step = Training.accumulate

    def steps(self, done):
        for i, rows in enumerate(spec["batches"]):
            with clock.timed():
                yield i + 1, rows

    def noted_step(self, rows):
        sums = step(self, rows)
        clock.loss = sums["loss"]
        return sums

    Training._upcoming, Training.accumulate = steps, noted_step
    _run_script(spec)


def our_reference(spec, clock):
    """The reference pass of spul.py over its retain rows, to a new file each time, written and read back."""
    load = reference.load_reference

    def repeated(*inputs, settings, **more):
        for i in range(len(spec["sizes"])):
            own = dataclasses.replace(settings, logits_path=f"{spec['work']}/reference-{i}.safetensors")
            with clock.timed():
                found = load(*inputs, settings=own, **more)
        return found

    reference.load_reference = repeated
    _run_script(spec)


def _run_script(spec):
    """The spec's script as its command line runs it, in this process."""
    module = importlib.import_module(spec["script"])
    module.main(_parsed(module, spec))


def _parsed(module, spec):
    """What the script's command line for this spec says."""
    sys.argv = [
        f"{spec['script']}.py",
        *spec["arguments"],
        f"{'--model_name' if spec['script'] == 'qlora' else '--model_checkpoints'}={spec['model']}",
        f"--dataset={spec['data']}",
        f"--max_length={spec['max_length']}",
        f"--device={spec['device']}",
        f"--dtype={spec['dtype']}",
        f"--seed={spec['seed']}",
        f"--train_batch_size={spec['batch_size']}",
        f"--eval_batch_size={spec['batch_size']}",
        "--max_eval_samples=0",
        f"--output_path={spec['work']}/checkpoint",
    ]
    if spec["script"] != "qlora":
        sys.argv.append(f"--logits_path={spec['work']}/logits.safetensors")
    if spec["p"]:
        sys.argv.append(f"--ptuning_num_tokens={spec['p']}")
    return module.parse_args()


def plain_training(spec, clock):
    """Trainer with the published settings; a pass is what lies between its on_step_begin and on_step_end."""
    make = _published if spec.get("published", True) else _unpublished
    model, batches, loss_of = (_fine_tuned if spec["script"] == "qlora" else make)(spec)

    class PlainTrainer(Trainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(batches, batch_size=None)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = loss_of(model, inputs)
            clock.loss = loss.item()
            return loss

    class Steps(TrainerCallback):
        def on_step_begin(self, *_, **__):
            clock.begin()

        def on_step_end(self, *_, **__):
            clock.end()

    arguments = TrainingArguments(
        output_dir=spec["work"],
        max_steps=len(batches),
        learning_rate=1e-4,
        weight_decay=1e-3,
        max_grad_norm=0.3,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        gradient_checkpointing=spec["script"] != "qlora",
        remove_unused_columns=False,
        use_cpu=model.device.type == "cpu",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=spec["seed"],
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # as many as ours; else Trainer spreads a batch over all GPUs
    PlainTrainer(model, arguments, train_dataset=batches, callbacks=[Steps()]).train()


def _fine_tuned(spec):
    """PEFT's LoRA of qlora.py's defaults: (model, batches, the loss that the model itself computes)."""
    examples, tokenizer = examples_of(spec)
    torch.manual_seed(spec["seed"])
    config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=64, lora_dropout=0.1)
    model = get_peft_model(_plain_model(spec), config).train()
    batches = [
        _plain_batch(model, [examples[i] for i in rows], tokenizer.pad_token_id, spec) for rows in spec["batches"]
    ]
    keys = ("input_ids", "attention_mask", "labels")
    return model, [{key: batch[key] for key in keys} for batch in batches], lambda model, batch: model(**batch).loss


def _published(spec):
    """SPUL and the baselines of its paper: (model, batches, loss of a batch)."""
    examples, tokenizer = examples_of(spec)
    model = _plain_model(spec)
    batches = [
        _plain_batch(model, [examples[i] for i in rows], tokenizer.pad_token_id, spec) for rows in spec["batches"]
    ]
    if spec["script"] == "spul":
        model = _with_prompt_encoder(model, spec)
    else:
        model.requires_grad_(True)

    def loss(model, inputs):
        keys = ("input_ids", "attention_mask", "labels")
        outputs = model(**{key: inputs[key] for key in keys})  # given labels, the model computes a loss of its own
        return _plain_loss(outputs.logits, inputs, spec["losses"], spec["script"] == "spul")

    return model, batches, loss


def _unpublished(spec):
    """The other baselines as their authors' code has them: (model, batches, loss of a batch). The losses are those of
    baselines.py; what feeds them are logits of every position and, for a reference, a second model in every step."""
    args = _parsed(importlib.import_module("baselines"), spec)
    examples, tokenizer = examples_of(spec)
    model = _plain_model(spec)
    before = copy.deepcopy(model)
    method, frames, asked = METHODS[args.unlearn_method], load_splits(spec["data"]), cli.take(MethodSettings, args)
    asked = dataclasses.replace(asked, logit_chunk=0)  # the plain path has all logits anyway
    model.requires_grad_(True)
    if method.activations:
        rmu.train_three_layers(model, asked.rmu_layer)
    rows = objectives.Rows(tokenizer, frames, method, asked)
    served = Served(model, tokenizer, [])
    pieces.completion_logits = rmu.completion_logits = _with_logits_of_every_position
    kind = PlainSteering if method.activations else PlainObjective
    load = functools.partial(SecondModel, before, asked.rmu_layer)
    objective = kind(method, served, rows, frames, asked, "", load)

    def loss(_, inputs):
        numbers = inputs["numbers"]
        n_forget = sum(examples[i].forget for i in numbers)
        return objective(numbers, n_forget, len(numbers) - n_forget)[0]

    return model, [{"numbers": numbers} for numbers in spec["batches"]], loss


class PlainObjective(objectives.TokenObjective):
    """A TokenObjective that reads both answers of dpo."""

    def _read(self, number):
        return number


class PlainSteering(rmu.SteeringObjective):
    """A SteeringObjective that runs the layers behind the one that it steers."""

    def __init__(self, *inputs):
        super().__init__(*inputs)
        self.layers = self.layers[0], None


class SecondModel:
    """In place of a cached Reference: the model `before` unlearning, which runs in every step."""

    def __init__(self, before, layer, served, examples, chosen, frames, measure=None, depends_on=None):
        self.before, self.examples, self.chosen, self.pad_id = before, examples, set(chosen), served.pad_id
        self.layer = measure and rmu.steered_layers(before, layer)[0][0]

    def has(self, number):
        return number in self.chosen

    @torch.no_grad()
    def of(self, numbers, device=None):
        """Its logits (N, |V|) at the completion tokens of the examples `numbers`; of rmu, activations (tokens, d)."""
        batch = collate([self.examples[i] for i in numbers if self.has(i)], self.pad_id, self.before.device)
        if self.layer is None:
            return _with_logits_of_every_position(self.before, batch)
        with record_activations(self.layer) as seen:
            _with_logits_of_every_position(self.before, batch)
        return seen["activations"][batch.attention_mask.bool()]


def _with_logits_of_every_position(model, batch, prompt=None, reference=None, head=None):
    """Stands in for utils.models.forward.completion_logits; `reference` holds logits already."""
    output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    logits = _at_completions(output.logits, vars(batch))
    return logits if reference is None else (logits, reference)


def examples_of(spec):
    """The rows as the script numbers them: train_retain, if it trains on any, then train_forget; and the tokenizer."""
    frames = load_splits(spec["data"])
    tokenizer = load_tokenizer(resolve_chain(spec["model"]), False)
    retain, forget = frames["train_retain"], frames["train_forget"]
    words = draw_unlearning_labels(len(forget), spec["seed"]) if spec["flipped"] else forget["label_text"]
    examples = tokenize(tokenizer, forget["text"], words, spec["max_length"], forget=True)
    if spec["losses"].keys() & {"retain", "kl"}:
        examples = tokenize(tokenizer, retain["text"], retain["label_text"], spec["max_length"]) + examples
    return examples, tokenizer


def _plain_model(spec):
    """The model as transformers loads it, in 4 bits where the spec's command says so."""
    dtype, device, options = getattr(torch, spec["dtype"]), pick_device(spec["device"]), {}
    if "--quantization=nf4" in spec["arguments"]:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=dtype, device_map={"": device}, **options)
    keep_one_format(model)
    return model.eval().requires_grad_(False)


def _with_prompt_encoder(model, spec):

    config = PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=spec["p"], encoder_hidden_size=128)
    torch.manual_seed(spec["seed"])
    return get_peft_model(model, config)


def _plain_batch(model, examples, pad_id, spec):
    """A batch as a collator for completions gives it: labels (B, T) with -100 at all but the completion's tokens; and
    the cached reference logits (M, |V|) of the completion tokens of its retain rows."""
    rows = [torch.tensor(example.prompt + example.completion) for example in examples]
    inputs = {
        "input_ids": pad_sequence(rows, batch_first=True, padding_value=pad_id),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        "forget": torch.tensor([example.forget for example in examples]),
    }
    inputs["labels"] = torch.full_like(inputs["input_ids"], -100)
    for row, example in zip(inputs["labels"], examples):
        row[len(example.prompt) : len(example) + 1] = torch.tensor(example.completion)
    retain = [example for example in examples if not example.forget]
    if retain and "kl" in spec["losses"]:  # computed the cheap way: making the cache is not what is measured here
        with torch.no_grad():
            inputs["reference"] = completion_logits(model, collate(retain, pad_id, model.device)).cpu()
    return inputs


def _plain_loss(logits, inputs, weights, over_rows):
    """The weighted sum of the losses that `weights` names: cross-entropy on `forget` and on `retain` rows, over all
    positions with a mask, as published, and `kl` on retain rows, at the positions that predict their completion. Means
    over completion tokens, or with `over_rows` of their sums over rows."""
    virtual = logits.shape[1] - inputs["labels"].shape[1]
    labels = torch.nn.functional.pad(inputs["labels"], (virtual, 0), value=-100)[:, 1:]
    shifted = logits[:, :-1].contiguous()
    total = 0.0
    for part, mask in (("forget", inputs["forget"]), ("retain", ~inputs["forget"])):
        if part in weights and mask.any():
            nll = torch.nn.functional.cross_entropy(
                shifted[mask].flatten(0, 1).float(), labels[mask].flatten(), reduction="sum"
            )
            n = mask.sum() if over_rows else (labels[mask] != -100).sum()
            total = total + weights[part] * nll / n
    if "reference" in inputs:
        retain = ~inputs["forget"]
        predicted = shifted[(labels != -100) & retain[:, None]].float()
        n = retain.sum() if over_rows else len(predicted)
        total = total + weights["kl"] * token_kl(inputs["reference"], predicted).sum() / n
    return total


def plain_reference(spec, clock):
    """Logits of every position, full-vocabulary rows of them kept and written; batches in the data's order."""
    examples, tokenizer = examples_of(spec)
    model = _plain_model(spec)
    for i, n in enumerate(spec["sizes"]):
        with clock.timed(), torch.no_grad():
            parts = _plain_passes(model, examples[:n], tokenizer.pad_token_id, spec)
            save_file({"logits": torch.cat(parts)}, Path(spec["work"]) / f"reference-{i}.safetensors")


def our_inference(spec, clock):
    """The scoring of inference_spul.py on the rows of train_retain, with a prompt or, for p = 0, without."""
    served = _loaded(spec)
    frames = load_splits(spec["data"])
    words = label_words(frames)
    if spec["p"]:
        torch.manual_seed(spec["seed"])
        embeddings = served.model.get_input_embeddings().weight
        prompt = torch.randn(spec["p"], embeddings.shape[1], device=embeddings.device) * embeddings.std().float()
        served = served.using(Prompt(vectors=prompt))
    for n in spec["sizes"]:
        with clock.timed():
            score_rows(
                served, frames["train_retain"].head(n), classification(words), spec["max_length"], spec["batch_size"]
            )


def plain_inference(spec, clock):
    """A PEFT model's arg max, the prompt in front of every row; batches in the data's order."""
    examples, tokenizer = examples_of(spec)
    model = _with_prompt_encoder(_plain_model(spec), spec).eval()
    for n in spec["sizes"]:
        with clock.timed(), torch.no_grad():
            for logits in _plain_passes(model, examples[:n], tokenizer.pad_token_id, spec):
                logits.argmax(-1).tolist()


def _plain_passes(model, examples, pad_id, spec):
    """Full-vocabulary logits (N, |V|) on the CPU at the completion tokens of each batch of `examples`."""
    results = []
    for start in range(0, len(examples), spec["batch_size"]):
        batch = vars(collate(examples[start : start + spec["batch_size"]], pad_id, model.device))
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        results.append(_at_completions(logits, batch).cpu())
    return results


def _at_completions(logits, batch):
    """Float32 logits (N, |V|) at completion tokens of (B, p + T, |V|), the p virtual tokens skipped."""
    offset = logits.shape[1] - batch["input_ids"].shape[1]
    return logits[batch["rows"], batch["positions"] + offset].float()


def _loaded(spec):
    """The model that the spec names."""
    return load_served(spec["model"], ModelSettings(device=spec["device"], dtype=spec["dtype"]))


PATHS = {
    ("training", "ours"): our_training,
    ("training", "plain"): plain_training,
    ("reference", "ours"): our_reference,
    ("reference", "plain"): plain_reference,
    ("inference", "ours"): our_inference,
    ("inference", "plain"): plain_inference,
}
