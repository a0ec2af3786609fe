"""What a training run will cost, before it is started: `--dry_run`.

Rows, tokens, steps and padding are counted on the tokenised rows themselves. The peak of memory is

    peak = process + weights + trained + reference + heap x max(step, evaluation)

    process     what this process holds once libraries and rows are loaded, and 60 MiB that the first step adds for
                kernels; with nf4 also the weights as they are read before they are packed, in the wider of --dtype
                and the file's type, which stay with the C library (nothing on a GPU)
    weights     the frozen parameters in --dtype; nf4: 4 bits and 1/64 of a float32 for each in a linear layer
    trained     what is learnt, in float32: a parameter and AdamW's two moments, 12 bytes each; the gradient is part of
                the step. With the kind `full` all parameters, and none is frozen (rmu: those of three layers, the
                others are, in float32)
    reference   hidden states of the retain rows (L_kl), d numbers in --dtype for each completion token
    step        the most that is alive at once during forward and backward pass of the largest micro-batch
    evaluation  the same of the widest evaluation batch, without gradients
    heap        1.4 on a CPU: the C library keeps freed blocks below 32 MiB (measured: 1.31 to 1.47 times what is alive,
                1.00 when it is told to give them back); 1 on a GPU, where torch's own count is meant

`step` and `evaluation` are no fitted formulas: the real forward pass, loss and backward pass run on fake tensors, which
have shapes but no numbers, and every storage is counted from its creation to its end. So whatever decides about memory
(architecture, attention implementation, shared prompt, LoRA, checkpointing) is in the figure. Not in it: what a GGUF
file takes while it is converted, and the work space of matrix products.
"""

import contextlib
import time
import weakref

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from utils import distributed
from utils.data.batch import Batch, collate
from utils.data.select import sample_rows
from utils.data.splits import SPLITS
from utils.evaluation.run import check_rows
from utils.evaluation.scores import score_rows
from utils.interventions.prompt_encoders import VirtualTokens
from utils.models.adapters import add_lora
from utils.models.attention import set_attention
from utils.models.base import load_tokenizer, pick_device, pick_dtype
from utils.models.chain import load_config, refuse_prompted, resolve_chain, stored_quantization
from utils.models.forward import completion_hidden, completion_logits, prompt_prefix
from utils.models.layers import checkpoint_layers, record_activations
from utils.models.lengths import check_length, check_tokens
from utils.tasks.answers import known_answers
from utils.tasks.classification import draw_unlearning_labels, label_words
from utils.tasks.encode import tokenize
from utils.training.loop import Training
from utils.unlearning import losses, rmu
from utils.unlearning.methods import METHODS
from utils.unlearning.reference import Reference, hidden_states, token_counts

HEAP, KERNELS = 1.4, 60 * 2**20  # on a CPU; see above
NF4_BYTES = 0.5 + 4 / 64  # of a weight: 4 bits, and a float32 scale for every 64
PROBED = 5  # batches that are timed: the middle ones of as many groups of equal size, by padded length


def print_plan(kind, args, name, frames):
    """Print rows, tokens, steps, padding, disk and estimated peak memory of a run; no weight is read or fetched.

    kind: what is trained, `prompt`, `lora` or `full` (all parameters). name: the model (hub id, folder, .gguf file) or
    checkpoint it is trained on. frames: the four splits as the run selects them.
    """
    chain = resolve_chain(name, args.trust_remote_code, getattr(args, "parent_path", None), weights=False)
    refuse_prompted(chain)
    tokenizer = load_tokenizer(chain, args.set_pad_id, args.trust_remote_code)
    quantization = getattr(args, "quantization", "none")
    config = load_config(chain[0], args.trust_remote_code, quantization)
    examples = training_rows(kind, args, tokenizer, frames)
    batches = [rows for _, rows in schedule(args, examples).steps_from(0)]
    shares = [share for rows in batches for share in distributed.shares(rows, lambda i: len(examples[i]))]
    micro = [part for rows in shares for part in _parts(rows, args.micro_batch_size) if part]
    longest = max(map(len, examples))
    check_length(config, longest, virtual_tokens(kind, args))
    check_tokens(config, tokenizer, examples)
    check_rows(config, tokenizer, frames, args, virtual_tokens(kind, args))

    real = sum(len(examples[i]) for rows in micro for i in rows)
    padded = sum(padded_size(rows, examples) for rows in micro)
    forget = sum(example.forget for example in examples)
    seen = sum(map(len, batches))
    print(f"dry run: nothing is written\nmodel    {name} ({config.model_type})")
    print(f"rows     {len(examples):,}: {len(examples) - forget:,} to keep, {forget:,} to forget")
    print(f"steps    {len(batches):,} of {args.train_batch_size} rows; {seen:,} rows are read")
    print(f"tokens   {real:,} and {padded - real:,} of padding ({1 - real / padded:.1%}); longest row {longest:,}")
    merged = any(link.kind == "lora" for link in chain)
    sizes = memory(config, kind, args, *shapes(args, tokenizer, frames, examples, micro), merged)
    sizes["reference"] = reference_tokens(kind, args, examples) * sizes["hidden bytes"]
    print(disk_line(sizes))
    print(memory_line(pick_device(args.device), sizes))


def training_rows(kind, args, tokenizer, frames):
    """The examples that a run of this kind trains on: retain, then forget; the labels of forget rows as it has them."""
    retain, forget = frames["train_retain"], frames["train_forget"]
    if getattr(args, "retain_loss", None) == "none":
        retain = retain.head(0)
    known = known_answers(tokenizer, label_words(frames))
    examples = tokenize(tokenizer, retain["text"], retain["label_text"], args.max_length, answers=known)
    if getattr(args, "exclude_forget", False):
        return examples
    words = draw_unlearning_labels(len(forget), args.seed) if kind == "prompt" else forget["label_text"]
    return examples + tokenize(tokenizer, forget["text"], words, args.max_length, forget=True, answers=known)


def reference_tokens(kind, args, examples):
    """How many vectors of d numbers the run's reference has: what spul.py or the rival compares with (kl: of retain
    rows; dpo: also of the preferred answers; rmu: at every token, its activations)."""
    if kind == "prompt":
        return sum(len(e.completion) for e in examples if not e.forget) if args.beta else 0
    method = METHODS.get(getattr(args, "unlearn_method", None))
    if method is None:
        return 0
    if method.forget is None:
        return sum(len(e) for e in examples if not e.forget)
    forget, retain = method.reference * (1 + method.preferred), args.retain_loss == "kl"
    return sum(len(e.completion) * (forget if e.forget else retain) for e in examples)


def schedule(args, examples):
    """The Training whose batches are the run's; it cannot run."""
    return Training({}, examples, None, args, None, "", [], 0.0)


def virtual_tokens(kind, args):
    return args.ptuning_num_tokens if kind == "prompt" else 0


def padded_size(rows, examples):
    """Tokens of a batch, padding included."""
    return len(rows) * max(len(examples[i]) for i in rows)


def shapes(args, tokenizer, frames, examples, micro):
    """(rows, tokens a row, completion tokens a row) of the largest micro-batch and of the widest evaluation batch."""
    rows = max(micro, key=lambda rows: (padded_size(rows, examples), len(rows)))
    completion = max(len(example.completion) for example in examples)
    known = known_answers(tokenizer, label_words(frames))
    evaluated = [sample_rows(frame, args.max_eval_samples, args.rows_seed) for frame in frames.values()]
    others = [
        example
        for frame in evaluated
        if args.max_eval_samples != 0
        for example in tokenize(tokenizer, frame["text"], frame["label_text"], args.max_length, answers=known)
    ]
    widest = max(map(len, [*examples, *others]))
    train = len(rows), max(len(examples[i]) for i in rows), completion
    return train, (min(args.eval_batch_size, max(len(examples), len(others))), widest, completion)


def memory(config, kind, args, train, evaluation, merged=False):
    """Bytes by the names of the module's equation, for batches of the shapes (rows, tokens, completion tokens a row).

    Also `parameters` (number trained), `all parameters`, `output` (bytes of the weights that are written: what is
    trained, in float32; with `full` the whole model in --dtype) and `hidden bytes` (of one token's hidden state).
    merged: a LoRA is merged into the model, whose weights are plain for that whatever they are on the disk.
    `step` and `evaluation` are None for architectures whose shapes depend on the numbers (mixtures of experts).
    """
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    process = distributed.peak_memory() + KERNELS if device == "cpu" else 0
    model_dtype = torch.float32 if kind == "full" else dtype
    with torch.device("meta"):
        options = {"dtype": model_dtype, "trust_remote_code": args.trust_remote_code}
        model = AutoModelForCausalLM.from_config(config, **options).eval()
        every = sum(parameter.numel() for parameter in model.parameters())
        quantization = _frozen_as(config, kind, args, merged)
        if device == "cpu" and quantization == "nf4":
            in_4_bits = stored_quantization(config) == "4-bit"
            read_as = max(dtype.itemsize, (config.dtype or torch.float32).itemsize)
            process += int(every * (NF4_BYTES if in_4_bits else read_as))
        weights, unpacked = _weights(model, quantization)
        set_attention(model, args.attn_implementation, device)
        if args.gradient_checkpointing:
            checkpoint_layers(model)
        model.requires_grad_(kind == "full")
        learner = model
        if kind == "prompt":
            sizes = args.ptuning_num_tokens, model.get_input_embeddings().weight.shape[1], args.ptuning_hidden_size
            learner = VirtualTokens(args.prompt_encoder, *sizes)
        elif kind == "lora":
            learner = model = add_lora(model, args).train()
        if getattr(args, "unlearn_method", None) == "rmu":
            rmu.restrict_to_rmu_layers(model, args)
        if kind == "full":
            weights = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    trained = sum(p.numel() for p in learner.parameters() if p.requires_grad)
    try:
        with FakeTensorMode():
            for module in {model, learner}:
                _fake(module)
            numerics = torch.autocast("cpu", dtype, enabled=kind == "full" and dtype != torch.float32)
            step = unpacked + _alive_at_most(lambda: _train(model, learner, kind, args, train, numerics))
            evaluated = unpacked + _alive_at_most(lambda: _evaluate(model, learner, kind, evaluation, numerics))
    except (RuntimeError, NotImplementedError):  # what fake tensors raise where a shape depends on numbers
        step = evaluated = None
    hidden = config.get_text_config().hidden_size * model_dtype.itemsize
    return {
        "process": process,
        "weights": weights,
        "trained": 12 * trained,
        "reference": 0,
        "heap": HEAP if device == "cpu" else 1,
        "step": step,
        "evaluation": evaluated,
        "parameters": trained,
        "output": every * dtype.itemsize if kind == "full" else 4 * trained,
        "all parameters": every,
        "hidden bytes": hidden,
    }


def peak(sizes):
    """The equation at the top; None where step and evaluation are unknown."""
    if sizes["step"] is None:
        return None
    fixed = sum(sizes[name] for name in ("process", "weights", "trained", "reference"))
    return fixed + sizes["heap"] * max(sizes["step"], sizes["evaluation"])


def _frozen_as(config, kind, args, merged):
    """`nf4` where the frozen linear layers have 4 bits, else `none`."""
    if kind == "full" or merged:
        return "none"
    if stored_quantization(config) == "4-bit":
        return "nf4"
    return getattr(args, "quantization", "none") if kind == "lora" else "none"


def _weights(model, quantization):
    """Bytes of the parameters, and of the largest one that is unpacked for a product (0 without quantisation)."""
    if quantization == "none":
        return sum(p.numel() * p.element_size() for p in model.parameters()), 0
    head = model.get_output_embeddings()
    linear = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    packed = sum(int(w.numel() * NF4_BYTES) for w in linear)
    plain = sum(p.numel() * p.element_size() for p in model.parameters()) - sum(w.nbytes for w in linear)
    return packed + plain, max(w.nbytes for w in linear)


def _fake(model):
    """Replace every parameter and buffer, all on the meta device, by a fake tensor on the CPU; shared ones stay so."""
    made = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is not None and id(old) not in made:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    made[id(old)] = torch.nn.Parameter(new, old.requires_grad) if tensors is module._parameters else new
                if old is not None:
                    tensors[name] = made[id(old)]


def _batch(rows, tokens, completion):
    """A Batch of that shape; its numbers mean nothing."""
    zeros = torch.zeros(rows * completion, dtype=torch.long)
    ids = torch.zeros(rows, tokens, dtype=torch.long)
    return Batch(ids, ids, zeros, zeros, zeros, None)


def _train(model, learner, kind, args, shape, numerics):
    """Forward and backward pass of one micro-batch, as the scripts have them; cross-entropy stands for the forget
    losses of the rivals, which are functions of the same logits."""
    with numerics:
        loss = _loss(model, learner, kind, args, _batch(*shape))
    loss.backward()


def _loss(model, learner, kind, args, batch):
    method = METHODS.get(getattr(args, "unlearn_method", None))
    if method and method.forget is None:
        layers, _ = rmu.rmu_layers(model, args)
        with record_activations(*layers) as seen:
            completion_logits(model, batch)
        return losses.rmu(seen["activations"], torch.zeros(())).sum()
    prefix = prompt_prefix(model, learner()) if kind == "prompt" else None
    kl = 0
    if getattr(args, "beta", 0) or (method and (method.reference or args.retain_loss == "kl")):
        head = model.get_output_embeddings().weight.shape[-1]  # of some OPT models narrower than their layers
        hidden = torch.zeros(len(batch.rows), head)
        logits, reference = completion_logits(model, batch, prefix, hidden, _head_copy(model))
        kl = losses.token_kl(reference, logits).sum()
    else:
        logits = completion_logits(model, batch, prefix)
    return losses.token_nll(logits, batch.targets).sum() + kl


def _head_copy(model):
    """What objectives.frozen_head gives, in shape (a deep copy of a fake tensor belongs to another fake world)."""
    head = model.get_output_embeddings()
    if not head.weight.requires_grad:
        return None
    copy = torch.nn.Linear(*reversed(head.weight.shape), bias=head.bias is not None, dtype=head.weight.dtype)
    return copy.requires_grad_(False)


@torch.no_grad()
def _evaluate(model, learner, kind, shape, numerics):
    with numerics:
        prefix = prompt_prefix(model, learner()) if kind == "prompt" else None
        completion_logits(model, _batch(*shape), prefix).log_softmax(-1)


def _alive_at_most(work):
    """The most bytes of storages created by `work` that are alive at once."""
    with _Storages() as storages:
        work()
    return storages.most


class _Storages(TorchDispatchMode):
    """Counts the bytes of every storage from its creation to its end."""

    def __init__(self):
        super().__init__()
        self.alive = self.most = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for tensor in tree_leaves((args, kwargs)):  # parameters, which are counted elsewhere
            if isinstance(tensor, torch.Tensor):
                self.known.add(tensor.untyped_storage())
        result = function(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.known:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage):
        size = storage.nbytes()
        self.known.add(storage)
        self.alive += size
        self.most = max(self.most, self.alive)
        weakref.finalize(storage, self._end, size)

    def _end(self, size):
        self.alive -= size


def disk_line(sizes):
    """What the run writes; its state is replaced by a new file, so both exist for a moment."""
    output = sizes["output"]
    state = 2 * sizes["trained"]
    total = output + state + sizes["reference"]
    parts = f"{_size(output)} of weights, {_size(state)} of state while it runs"
    reference = f", {_size(sizes['reference'])} of reference" if sizes["reference"] else ""
    return f"disk     {_size(total)}: {parts}{reference}"


def memory_line(device, sizes):
    """The peak and its parts."""
    names = [name for name in ("process", "weights", "trained", "reference") if sizes[name]]
    parts = ", ".join(f"{name} {_size(sizes[name])}" for name in names)
    if peak(sizes) is None:
        return f"memory   {parts}; the step is not known for this architecture, try --dry_run=probe"
    which = "step" if sizes["step"] >= sizes["evaluation"] else "evaluation"
    parts = f"{parts}, {which} {_size(sizes['heap'] * sizes[which])}"
    return f"memory   about {_size(peak(sizes))} at its peak on {device}: {parts}"


def _size(n_bytes):
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**29 else f"{n_bytes / 2**20:.1f} MiB"


def _parts(rows, size):
    size = size or len(rows)
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def blank_reference(loaded, examples, rows, frames, args, measure=hidden_states, settings=None):
    """A Reference of zeros: it costs a step what the real one does, takes no time to make and writes no file."""
    sizes = token_counts(examples, rows, measure)
    model = loaded.model
    head = model.get_output_embeddings().weight.shape[-1]  # of some OPT models narrower than their layers
    d = head if measure is hidden_states else model.config.get_text_config().hidden_size
    return Reference(torch.zeros(sum(sizes.values()), d, dtype=model.dtype), sizes)


def print_probe(run, loaded, frames, words, referred=(), evaluations=1, numerics=None):
    """Time a few of the run's steps, evaluation batches and passes over `referred`, the examples that its reference is
    about, and print what the whole run will take. `evaluations`: how often it evaluates, beside --eval_steps.
    `numerics`: the context in which it does what is no step."""
    examples, optimizer = run.examples, run.optimizer()
    batches = [rows for _, rows in run.steps_from(0)]
    by_size = sorted(batches, key=lambda rows: padded_size(rows, examples))

    def step(rows):
        run.update(optimizer, {"step": 1, **run.accumulate(rows)})

    step(by_size[-1])  # the first step is slow, and the largest has the peak of memory
    seconds = {"training": len(batches) * _mean_seconds(step, by_size)}
    with numerics or contextlib.nullcontext():
        seconds |= _without_gradient(run, loaded, frames, words, referred, evaluations, len(batches))
    total = ", ".join(f"{name} {_duration(value)}" for name, value in seconds.items() if value)
    print(f"time     about {_duration(sum(seconds.values()))} after loading: {total}")
    print(f"         {seconds['training'] / len(batches):.2f} s a step, peak so far {_size(distributed.peak_memory())}")


def _without_gradient(run, loaded, frames, words, referred, evaluations, steps):
    """{"reference", "evaluation"}: seconds of the whole run, whose processes share the batches out."""
    args, seconds = run.args, {}
    if referred:
        rows = sorted(referred, key=len)
        seconds["reference"] = _seconds(
            lambda part: completion_hidden(loaded.model, collate(part, loaded.pad_id, loaded.model.device)),
            _parts(rows, args.eval_batch_size),
        )
    curve = steps // args.eval_steps if args.eval_steps else 0
    plans = [(evaluations * (args.max_eval_samples != 0), args.max_eval_samples), (curve, args.curve_samples)]
    seconds["evaluation"] = sum(n * _evaluation_seconds(loaded, frames, words, args, rows) for n, rows in plans if n)
    return {name: value / distributed.world_size() for name, value in seconds.items()}


def _evaluation_seconds(loaded, frames, words, args, n_rows):
    import pandas as pd

    rows = pd.concat([sample_rows(frames[split], n_rows) for split in SPLITS], ignore_index=True)
    order = rows["text"].str.len().sort_values(kind="stable").index
    score = lambda part: score_rows(loaded, rows.loc[part], words, args.max_length, args.eval_batch_size)  # noqa: E731
    return _seconds(score, _parts(order, args.eval_batch_size))


def _seconds(work, batches):
    """What `work` on all `batches` (sorted by size) will take, from a few of them."""
    return len(batches) * _mean_seconds(work, batches)


def _mean_seconds(work, batches):
    groups = min(PROBED, len(batches))
    times = []
    for i in range(groups):
        start = time.perf_counter()
        work(batches[(2 * i + 1) * len(batches) // (2 * groups)])
        times.append(time.perf_counter() - start)
    return sum(times) / groups


def _duration(seconds):
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min" if minutes >= 3 else f"{seconds:.0f} s"
