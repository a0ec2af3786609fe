"""What a training run will cost, before it is started: `--dry_run`.

Rows, tokens, steps and padding are counted on the tokenised rows themselves. The peak of memory is

    peak = process + weights + trained + gathered + reference + heap x max(step, evaluation)

    process     what this process holds once libraries and rows are loaded, and 60 MiB that the first step adds for
                kernels; with nf4 also the weights as they are read before they are packed, in the wider of --dtype
                and the file's type: 2.6 times, as NF4_READ says (nothing on a GPU)
    weights     the frozen parameters in --dtype; nf4: 4 bits and 1/64 of a float32 for each in a linear layer
    trained     what is learnt, in float32: a parameter and AdamW's two moments, 12 bytes each; the gradient is part of
                the step. With --tune=full all parameters, and none is frozen (rmu: those of three layers, the others
                are, in float32)
    gathered    with --shard: three times the largest layer (the one that computes, the next one, and the buffer that it
                arrives in), and twice its gradient, if it is trained (all of it, and the buffer in which it is added)
    reference   what the objective compares with: d numbers for each of its tokens
    step        the most that is alive at once during forward and backward pass of the largest micro-batch
    evaluation  the same of the widest evaluation batch, without gradients; where several completions are scored behind
                one prompt also the keys and values of KEPT prompt tokens
    heap        1.6 on a CPU: the C library keeps freed blocks below 32 MiB (measured: 1.31 to 1.47 times what is alive,
                1.00 when it is told to give them back), and an estimate that errs shall err upward; 1 on a GPU, where
                torch's own count is meant

`step` and `evaluation` are no fitted formulas: the objective that the run itself trains by goes through its forward and
backward pass on fake tensors, which have shapes but no numbers, and every storage is counted from its creation to its
end. So whatever decides about memory (method, architecture, attention implementation, shared prompt, LoRA,
checkpointing) is in the figure. Not in it: what a GGUF
file takes while it is converted, and the work space of matrix products.

With --shard all of it is about one process of n. `weights` and `trained` count 1/n of what lies in layers, adapters
left out. `step` is that of a process's own rows; the gradient of a layer ends in it as soon as it is there, and 1/n of
it is kept. Not in it: the whole model, which lies in the machine's memory once a process while it is loaded.
"""

import contextlib
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from utils import distributed
from utils.data.batch import Batch, Example, collate, micro_batches
from utils.data.select import sample_rows
from utils.distributed import peak_memory
from utils.evaluation import saved
from utils.evaluation.run import EvaluationSettings, check_rows, chosen
from utils.evaluation.scores import decide, score_rows
from utils.interventions.prompt_encoders import VirtualTokens
from utils.interventions.served import KEPT, LOGITS, Served
from utils.models.attention import set_attention
from utils.models.base import ModelSettings, load_tokenizer, pick_device, pick_dtype, refuse_shards
from utils.models.chain import load_config, refuse_prompted, resolve_chain, stored_quantization
from utils.models.forward import HEAD_ROWS, completion_hidden, completion_logits, prompt_prefix
from utils.models.layers import checkpoint_layers, decoder_layers
from utils.models.lengths import check_tokens
from utils.storage.checkpoints import Link
from utils.tasks.answers import known_answers
from utils.tasks.base import Task
from utils.tasks.encode import tokenize
from utils.tasks.rows import Splits
from utils.training.loop import Objective, Training, TrainingSettings
from utils.unlearning.reference import HIDDEN_STATES, Loader, Measure, Reference

HEAP, KERNELS = 1.6, 60 * 2**20  # on a CPU; see above
NF4_READ = 2.6  # times the weights as they are read: in the mapped file, before packing, and a fifth; fitted to one run
NF4_BYTES = 0.5 + 4 / 64  # of a weight: 4 bits, and a float32 scale for every 64
PROBED = 5  # batches that are timed: the middle ones of as many groups of equal size, by padded length


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a script trains. served: the model with the adapter that it got. learner: holds the parameters that learn.
    examples: the rows. compared: those that the numbers of its reference count, where they are others. beside: other
    checkpoints that it depends on, which a resumed run must find unchanged. numerics: the context in which everything
    is computed."""

    served: Served
    learner: torch.nn.Module
    objective: Objective
    examples: list[Example]
    compared: list[Example] | None = None
    beside: list[Link] = field(default_factory=list)
    numerics: Callable[[], AbstractContextManager] = contextlib.nullcontext

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.learner.named_parameters() if p.requires_grad}

    @property
    def reference(self) -> Reference | None:
        return getattr(self.objective, "reference", None)

    @property
    def whole_step(self) -> Callable[[], AbstractContextManager]:
        """The context of a step in which the objective shares work between its micro-batches, if it does so. That work
        is not done within `numerics`, which no objective of this kind has."""
        return getattr(self.objective, "whole_step", contextlib.nullcontext)

    @property
    def buffers(self) -> dict[str, torch.Tensor]:
        """Scalars of the objective that are part of a resumable state."""
        return getattr(self.objective, "buffers", {})

    @property
    def after_step(self) -> Callable[[dict[str, float], float], dict[str, float]] | None:
        """What the objective does after each step, as utils.training.loop.Training takes it."""
        return getattr(self.objective, "after_step", None)

    def loss(
        self, rows: list[int], n_forget: int, n_retain: int, step: Sequence[int] | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """What the objective gives, in the numbers of the run: see utils.training.loop.Objective."""
        with self.numerics():
            return self.objective(rows, n_forget, n_retain, step)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run as far as it decides about time and memory.

    name: the model or checkpoint that is trained on. prepare: function(served, load) -> Prepared, by which the run
    itself is prepared; it gets a model without numbers and a Loader that computes nothing. p: virtual tokens.
    quantization: of the frozen base. full: every weight may be trained. parent: see resolve_chain. evaluates_before:
    whether the frozen model is evaluated, too.
    """

    name: str
    prepare: Callable[[Served, Loader], Prepared]
    model: ModelSettings
    training: TrainingSettings
    evaluation: EvaluationSettings
    p: int = 0
    quantization: str = "none"
    full: bool = False
    parent: str | None = None
    evaluates_before: bool = False


def print_plan(run: Run, frames: Splits) -> None:
    """Print rows, tokens, steps, padding, disk and estimated peak memory of a run; no weight is read or fetched.

    frames: the four splits as the run selects them. Raises UserError on what the run would refuse.
    """
    trusted = run.model.trust_remote_code
    chain = resolve_chain(run.name, trusted, run.parent, weights=False)
    refuse_prompted(chain)
    tokenizer = load_tokenizer(chain, run.model.set_pad_id, trusted)
    config = load_config(chain[0], trusted, run.quantization)
    sizes, prepared = _on_meta(run, config, tokenizer, chain)
    examples = prepared.examples
    batches = [rows for _, rows in schedule(run.training, examples).steps_from(0)]
    shares = [share for rows in batches for share in distributed.shares(rows, lambda i: len(examples[i]))]
    device, size = pick_device(run.model.device), run.training.micro_batch_size
    micro = [part for rows in shares for part in micro_batches(rows, examples, size, device)]
    longest = max(map(len, examples))
    check_tokens(config, tokenizer, examples)
    check_rows(config, tokenizer, frames, run.evaluation.max_length, run.p)

    real = sum(len(examples[i]) for rows in micro for i in rows)
    padded = sum(padded_size(rows, examples) for rows in micro)
    forget = sum(example.forget for example in examples)
    seen = sum(map(len, batches))
    print(f"dry run: nothing is written\nmodel    {run.name} ({config.model_type})")
    print(f"rows     {len(examples):,}: {len(examples) - forget:,} to keep, {forget:,} to forget")
    print(f"steps    {len(batches):,} of {run.training.train_batch_size} rows; {seen:,} rows are read")
    print(f"tokens   {real:,} and {padded - real:,} of padding ({1 - real / padded:.1%}); longest row {longest:,}")
    if run.evaluation.max_eval_samples != 0:
        print(evaluation_line(run, tokenizer, frames))
    largest = max(micro, key=lambda rows: (padded_size(rows, examples), len(rows)))
    shape = evaluation_shape(run.evaluation, tokenizer, frames, examples)
    sizes |= _alive(prepared, largest, shape, sizes, after_another=run.full and len(micro) > len(shares))
    if sizes["evaluation"] and shares_prompts(tokenizer, frames):
        rows, tokens, _ = shape
        positions = max(tokens, min(KEPT, rows * tokens))
        sizes["evaluation"] += positions * position_bytes(config, prepared.served.model.dtype)
    print(disk_line(sizes))
    print(memory_line(device, sizes))


def schedule(settings: TrainingSettings, examples: list[Example]) -> Training:
    """The Training whose batches are the run's; it cannot run."""
    return Training({}, examples, None, settings, {}, None, "", [], 0.0)


def padded_size(rows: Sequence[int], examples: Sequence[Example]) -> int:
    """Tokens of a batch, padding included."""
    return len(rows) * max(len(examples[i]) for i in rows)


def evaluation_line(run: Run, tokenizer: Any, frames: Splits) -> str:
    """How much is evaluated, and how often."""
    settings, known, tokens, n_rows = run.evaluation, known_answers(tokenizer, frames.task), 0, 0
    for frame in frames.values():
        rows = sample_rows(frame, settings.max_eval_samples, settings.rows_seed)
        tokens += sum(map(len, tokenize(tokenizer, rows, rows["label_text"], settings.max_length, answers=known)))
        n_rows += len(rows)
    before = "; before the training, too, unless saved_scores/ has that already" if run.evaluates_before else ""
    return f"scored   {n_rows:,} rows of {tokens:,} tokens after the training{before}"


def shares_prompts(tokenizer: Any, frames: Splits) -> bool:
    """Whether several completions of one prompt are scored, behind its keys and values."""
    first, task = pd.concat([frame.head(1) for frame in frames.values()]), frames.task
    known = known_answers(tokenizer, task)
    return any(len(asked) > 1 for asked in task.asks(first)) or any(len(known.ids[word]) > 1 for word in task.words)


def position_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Of the keys and values of one token in all layers."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * width * dtype.itemsize


def evaluation_shape(
    settings: EvaluationSettings, tokenizer: Any, frames: Splits, examples: list[Example]
) -> tuple[int, int, int]:
    """(rows, tokens a row, completion tokens a row) of the widest evaluation batch."""
    known, others = known_answers(tokenizer, frames.task), []
    for frame in frames.values() if settings.max_eval_samples != 0 else ():
        rows = sample_rows(frame, settings.max_eval_samples, settings.rows_seed)
        others += tokenize(tokenizer, rows, rows["label_text"], settings.max_length, answers=known)
    widest = max(map(len, [*examples, *others]))
    completion = max(len(example.completion) for example in examples)
    rows = min(settings.eval_batch_size, max(len(examples), len(others)))
    return min(rows, max(1, LOGITS // completion)) if frames.task.generates else rows, widest, completion


def _on_meta(run: Run, config: PreTrainedConfig, tokenizer: Any, chain: list[Link]) -> tuple[dict[str, Any], Prepared]:
    """(bytes by the names of the module's equation but for step and evaluation, the prepared run), on a model without
    numbers.

    Also `parameters` (number trained), `all parameters`, `output` (bytes of the weights that are written: what is
    trained, in float32; the whole model in --dtype where all of it may be) and `unpacked` (of the largest 4-bit layer).
    """
    device = pick_device(run.model.device)
    dtype = pick_dtype(run.model.dtype, device)
    process = peak_memory() + KERNELS if device == "cpu" else 0
    with torch.device("meta"):
        options = {"dtype": dtype, "trust_remote_code": run.model.trust_remote_code}
        model = AutoModelForCausalLM.from_config(config, **options).eval().requires_grad_(False)
        every = sum(parameter.numel() for parameter in model.parameters())
        quantization = _frozen_as(run, config, any(link.kind == "lora" for link in chain))
        if device == "cpu" and quantization == "nf4":
            in_4_bits = stored_quantization(config) == "4-bit"
            read_as = max(dtype.itemsize, (config.dtype or torch.float32).itemsize)
            process += int(every * (NF4_BYTES if in_4_bits else NF4_READ * read_as))
        weights, unpacked = _weights(model, quantization)
        unpacked = max(unpacked, _converted(model, device))
        set_attention(model, run.model.attn_implementation, device)
        if run.model.gradient_checkpointing:
            checkpoint_layers(model, run.model.gradient_checkpointing)
        refuse_shards(run.model, chain[0], config, device)
        layers = list(decoder_layers(model)) if run.model.shards > 1 else []
        prepared = run.prepare(Served(model, tokenizer, chain), blank_reference)
        if run.full:
            weights = sum(p.nbytes for p in prepared.served.model.parameters() if not p.requires_grad)
    trained = sum(p.numel() for p in prepared.parameters.values())
    others, cut = 1 - 1 / run.model.shards, [p for layer in layers for p in _cut(layer)]
    return {
        "process": process,
        "weights": weights - int(others * sum(p.nbytes for p in cut if not p.requires_grad)),
        "trained": 12 * (trained - int(others * sum(p.numel() for p in cut if p.requires_grad))),
        "gathered": max((_gathered(layer) for layer in layers), default=0),
        "reference": prepared.reference.values.nbytes if prepared.reference else 0,
        "heap": HEAP if device == "cpu" else 1,
        "parameters": trained,
        "output": every * dtype.itemsize if run.full else 4 * trained,
        "all parameters": every,
        "unpacked": unpacked,
        "shards": run.model.shards,
        "layers": layers,
    }, prepared


def _cut(layer: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters of a layer that --shard cuts: all but those of adapters."""
    return [parameter for name, parameter in layer.named_parameters() if "lora_" not in name]


def _gathered(layer: torch.nn.Module) -> int:
    """Bytes: see `gathered` at the top."""
    return sum(3 * p.nbytes + 2 * p.nbytes * p.requires_grad for p in _cut(layer))


def _alive(
    prepared: Prepared,
    rows: list[int],
    evaluation: tuple[int, int, int],
    sizes: dict[str, Any],
    after_another: bool = False,
) -> dict[str, int | None]:
    """{"step", "evaluation"} for the largest micro-batch and a batch of that shape; None for architectures whose shapes
    depend on the numbers (mixtures of experts). sizes: what `_on_meta` gave. after_another: the step has several
    micro-batches, and all gradients of the first are there while the next one is computed."""
    unpacked, shards = sizes["unpacked"], []
    forget = sum(prepared.examples[i].forget for i in rows)

    def train() -> None:
        with prepared.whole_step():
            for _ in range(1 + after_another):
                prepared.loss(rows, forget, len(rows) - forget)[0].backward()

    def keep_shard(parameter: torch.nn.Parameter) -> None:
        shards.append(parameter.grad.new_empty(parameter.numel() // sizes["shards"]))
        parameter.grad = None

    @torch.no_grad()
    def evaluate() -> None:
        model, learner = prepared.served.model, prepared.learner
        with prepared.numerics():
            prefix = prompt_prefix(model, learner()) if isinstance(learner, VirtualTokens) else None
            completion_logits(model, _batch(*evaluation), prefix).log_softmax(-1)

    try:
        with FakeTensorMode():
            _fake(prepared)
            for parameter in (p for layer in sizes["layers"] for p in _cut(layer) if p.requires_grad):
                parameter.register_post_accumulate_grad_hook(keep_shard)
            return {"step": unpacked + _alive_at_most(train), "evaluation": unpacked + _alive_at_most(evaluate)}
    except (RuntimeError, NotImplementedError):  # what fake tensors raise where a shape depends on numbers
        return {"step": None, "evaluation": None}


def peak(sizes: dict[str, Any]) -> float | None:
    """The equation at the top; None where step and evaluation are unknown."""
    if sizes["step"] is None:
        return None
    fixed = sum(sizes[name] for name in ("process", "weights", "trained", "gathered", "reference"))
    return fixed + sizes["heap"] * max(sizes["step"], sizes["evaluation"])


def _frozen_as(run: Run, config: PreTrainedConfig, merged: bool) -> str:
    """`nf4` where the frozen linear layers have 4 bits, else `none`: a LoRA is merged into plain weights."""
    if run.full or merged:
        return "none"
    return "nf4" if stored_quantization(config) == "4-bit" else run.quantization


def _converted(model: PreTrainedModel, device: str) -> int:
    """Bytes of the words of a half-precision head that a GPU converts to float32 at a time (utils.models.forward). On a
    CPU, and where the head is trained, what is converted is among the tensors of the step."""
    head = model.get_output_embeddings()
    if device == "cpu" or head.weight.dtype == torch.float32:
        return 0
    return min(HEAD_ROWS, head.weight.shape[0]) * head.weight.shape[1] * torch.float32.itemsize


def _weights(model: PreTrainedModel, quantization: str) -> tuple[int, int]:
    """Bytes of the parameters, and of the largest one that is unpacked for a product (0 without quantisation)."""
    if quantization == "none":
        return sum(p.numel() * p.element_size() for p in model.parameters()), 0
    head = model.get_output_embeddings()
    linear = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    packed = sum(int(w.numel() * NF4_BYTES) for w in linear)
    plain = sum(p.numel() * p.element_size() for p in model.parameters()) - sum(w.nbytes for w in linear)
    return packed + plain, max(w.nbytes for w in linear)


def _fake(prepared: Prepared) -> None:
    """Replace every tensor of the model, the learner and the objective, all on the meta device, by a fake one on the
    CPU; shared ones stay so."""
    made: dict[int, torch.Tensor] = {}

    def fake(old: torch.Tensor) -> torch.Tensor:
        if id(old) not in made:
            new = torch.empty(old.shape, dtype=old.dtype)
            parameter = isinstance(old, torch.nn.Parameter)
            made[id(old)] = torch.nn.Parameter(new, old.requires_grad) if parameter else new
        return made[id(old)]

    objective = prepared.objective
    parts = vars(objective)
    for part in (prepared.served.model, prepared.learner, *parts.values()):
        for module in part.modules() if isinstance(part, torch.nn.Module) else ():
            for tensors in (module._parameters, module._buffers):
                tensors.update({name: fake(old) for name, old in tensors.items() if old is not None and old.is_meta})
    for name, part in parts.items():
        if isinstance(part, torch.Tensor):
            setattr(objective, name, fake(part))
    if prepared.reference:
        prepared.reference.values = fake(prepared.reference.values)


def _batch(rows: int, tokens: int, completion: int) -> Batch:
    """A Batch of that shape; its numbers mean nothing."""
    zeros = torch.zeros(rows * completion, dtype=torch.long)
    ids = torch.zeros(rows, tokens, dtype=torch.long)
    return Batch(ids, ids, zeros, zeros, zeros, zeros[:0], zeros)


def _alive_at_most(work: Callable[[], object]) -> int:
    """The most bytes of storages created by `work` that are alive at once."""
    with _Storages() as storages:
        work()
    return storages.most


class _Storages(TorchDispatchMode):
    """Counts the bytes of every storage from its creation to its end."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.most = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        for tensor in tree_leaves((args, kwargs)):  # parameters, which are counted elsewhere
            if isinstance(tensor, torch.Tensor):
                self.known.add(tensor.untyped_storage())
        result = function(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.known:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self.known.add(storage)
        self.alive += size
        self.most = max(self.most, self.alive)
        weakref.finalize(storage, self._end, size)

    def _end(self, size: int) -> None:
        self.alive -= size


def disk_line(sizes: dict[str, Any]) -> str:
    """What the run writes; its state is replaced by a new file, so both exist for a moment."""
    output = sizes["output"]
    state = 2 * 12 * sizes["parameters"]
    total = output + state + sizes["reference"]
    parts = f"{_size(output)} of weights, {_size(state)} of state while it runs"
    reference = f", {_size(sizes['reference'])} of reference" if sizes["reference"] else ""
    return f"disk     {_size(total)}: {parts}{reference}"


def memory_line(device: str, sizes: dict[str, Any]) -> str:
    """The peak and its parts."""
    names = [name for name in ("process", "weights", "trained", "gathered", "reference") if sizes[name]]
    parts = ", ".join(f"{name} {_size(sizes[name])}" for name in names)
    if peak(sizes) is None:
        return f"memory   {parts}; the step is not known for this architecture, try --dry_run=probe"
    which = "step" if sizes["step"] >= sizes["evaluation"] else "evaluation"
    parts = f"{parts}, {which} {_size(sizes['heap'] * sizes[which])}"
    where = device if sizes["shards"] == 1 else f"{device}, in each of {sizes['shards']} processes"
    return f"memory   about {_size(peak(sizes))} at its peak on {where}: {parts}"


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**29 else f"{n_bytes / 2**20:.1f} MiB"


def _parts(rows: Sequence, size: int) -> list[Sequence]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def blank_reference(
    served: Served,
    examples: Sequence[Example],
    rows: Sequence[int],
    frames: Splits,
    measure: Measure = HIDDEN_STATES,
    depends_on: list[Any] | None = None,
) -> Reference:
    """A Reference of zeros: it costs a step what the real one does, takes no time to make and writes no file."""
    sizes, model = measure.counts(examples, rows), served.model
    head = model.get_output_embeddings().weight.shape[-1]  # of some OPT models narrower than their layers
    d = model.config.get_text_config().hidden_size if measure.every_token else head
    return Reference(torch.zeros(sum(sizes.values()), d, dtype=model.dtype), sizes)


def print_probe(
    training: Training,
    prepared: Prepared,
    served: Served,
    frames: Splits,
    settings: EvaluationSettings,
    evaluates_before: bool = False,
) -> None:
    """Time a few of the run's steps, evaluation batches and passes over the rows that its reference is about, and print
    what the whole run will take.

    served: the model as it is evaluated. evaluates_before: whether the frozen model is evaluated, too. What is taken
    from saved_scores/, and what a gate lets through of rows that are known, takes no time.
    """
    examples, optimizer = training.examples, training.optimizer()
    batches = [rows for _, rows in training.steps_from(0)]
    by_size = sorted(batches, key=lambda rows: padded_size(rows, examples))

    def step(rows: list[int]) -> None:
        training.update(optimizer, {"step": 1, **training.accumulate(rows)})

    step(by_size[-1])  # the first step is slow, and the largest has the peak of memory
    seconds = {"training": len(batches) * _mean_seconds(step, by_size)}
    works, final = [], chosen(frames, settings)  # how often which model scores which rows, and whether some are known
    if settings.max_eval_samples != 0:
        works.append((1, served, final, evaluates_before))
        if evaluates_before and not saved.find(served, frames, settings).knows(final):
            works.append((1, served.plain, final, False))
    if every := training.settings.eval_steps:
        curve = {split: sample_rows(frames[split], settings.curve_samples) for split in settings.curve_splits}
        works.append((len(batches) // every, served, curve, served.is_gated))
    with prepared.numerics():
        others = {"reference": _reference_seconds(prepared, settings.eval_batch_size)}
        others["evaluation"] = sum(
            n * _evaluation_seconds(one, pd.concat(parts.values(), ignore_index=True), frames.task, settings, known)
            for n, one, parts, known in works
        )
    seconds |= {name: value / distributed.world_size() for name, value in others.items()}  # batches are shared out
    total = ", ".join(f"{name} {_duration(value)}" for name, value in seconds.items() if value)
    print(f"time     about {_duration(sum(seconds.values()))} after loading: {total}")
    print(f"         {seconds['training'] / len(batches):.2f} s a step, peak so far {_size(peak_memory())}")


def _reference_seconds(prepared: Prepared, batch_size: int) -> float:
    if not prepared.reference:
        return 0.0
    served = prepared.served
    rows = sorted(prepared.reference.examples(prepared.compared or prepared.examples), key=len)
    return _seconds(
        lambda part: completion_hidden(served.model, collate(part, served.pad_id, served.model.device)),
        _parts(rows, batch_size),
    )


def _evaluation_seconds(
    served: Served, rows: pd.DataFrame, task: Task, settings: EvaluationSettings, known: bool
) -> float:
    """Of these rows. known: whether what the frozen model says is, so that rows on which nothing acts take no time."""
    if known:
        acting, _ = decide(served, rows)
        rows = rows.iloc[[i for i, number in enumerate(acting) if number is not None]].reset_index(drop=True)
    if not len(rows):
        return 0.0
    order = rows["text"].str.len().sort_values(kind="stable").index

    def score(part: pd.Index) -> None:
        score_rows(served, rows.loc[part], task, settings.max_length, settings.eval_batch_size)

    return _seconds(score, _parts(order, settings.eval_batch_size))


def _seconds(work: Callable[[Any], object], batches: list[Any]) -> float:
    """What `work` on all `batches` (sorted by size) will take, from a few of them."""
    return len(batches) * _mean_seconds(work, batches)


def _mean_seconds(work: Callable[[Any], object], batches: list[Any]) -> float:
    groups = min(PROBED, len(batches))
    times = []
    for i in range(groups):
        start = time.perf_counter()
        work(batches[(2 * i + 1) * len(batches) // (2 * groups)])
        times.append(time.perf_counter() - start)
    return sum(times) / groups


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min" if minutes >= 3 else f"{seconds:.0f} s"
