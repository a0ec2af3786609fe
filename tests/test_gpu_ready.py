"""What a GPU would refuse, or wait for, seen on a machine without one: see tests/fake_device.py.

A training step may wait twice: for its losses, and for the norm of its gradient. Everything else that it sends to the
device goes from pinned memory while the CPU goes on.
"""

from types import SimpleNamespace

import pytest
import tiny
import torch
from fake_device import DEVICE, Asked, fake_device, send
from transformers import AutoModelForCausalLM, LlamaConfig

from utils.data.batch import Example, collate, to_device
from utils.distributed import peak_memory
from utils.interventions.prompt_encoders import VirtualTokens
from utils.interventions.served import Served
from utils.models.adapters import LoraSettings, add_lora
from utils.models.attention import CAUSAL
from utils.models.base import pick_dtype
from utils.plan import blank_reference
from utils.training.loop import Training, TrainingSettings
from utils.unlearning import hiding, reference
from utils.unlearning.losses import Shares
from utils.unlearning.methods import METHODS, Answers, CompletionTokens, MethodSettings
from utils.unlearning.objectives import FineTuning, PromptTuning, objective_of
from utils.unlearning.tuning import only_adapter_dropout, trainable

pytestmark = pytest.mark.slow

CONFIG = LlamaConfig(**{**tiny.SIZES, "num_hidden_layers": 1, "hidden_size": 64}, **tiny.COMMON)
PAD, WORDS = 1, ((9,), (10, 11))
ROWS = [  # answers of one token and of two
    Example((5, 6, 7, 8), (9,), forget=False),
    Example((5, 6, 7), (9, 10), forget=False),
    Example((5, 6, 7, 3, 2), (9,), forget=True),
    Example((5, 4, 7), (10, 11), forget=True),
]
REFUSALS = [Example(row.prompt, (12,), forget=True) for row in ROWS if row.forget]


def load(dtype=torch.float32):
    """A model without numbers, with the attention that it would have on a GPU."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG, attn_implementation=CAUSAL, dtype=dtype)
    return Served(
        model.eval().requires_grad_(False), SimpleNamespace(pad_token_id=PAD), [SimpleNamespace(sha256="", path=None)]
    )


def spul(shares=None, hidden=None, chunk=0, dtype=torch.float32):
    served = load(dtype)
    with torch.device("meta"):
        encoder = VirtualTokens("mlp", 4, CONFIG.hidden_size, 16, torch.zeros(4, CONFIG.hidden_size))
    compared = blank_reference(served, ROWS, [0, 1], {})
    more = shares, hidden, chunk
    return encoder, PromptTuning(served.model, encoder, ROWS, PAD, compared, 0.5, 0.5, *more)


def fine_tuning():
    model = add_lora(load().model, LoraSettings()).train()
    return model, FineTuning(model, ROWS, PAD)


def method(name, retain_loss=None, lora=None, chunk=0):
    kind = METHODS[name]
    settings = MethodSettings(
        unlearn_method=name, retain_loss=retain_loss or kind.retain_loss, retain_weight=0.5, logit_chunk=chunk
    )
    served = load()
    served = Served(trainable(served.model, lora, kind, settings), served.tokenizer, served.chain)
    rows = tiny.rows_of(kind, ROWS, REFUSALS)
    objective = objective_of(kind)(kind, served, rows, {"train_retain": None}, settings, "", blank_reference)
    only_adapter_dropout(served.model)
    return served.model, objective


LIKE = {row.prompt: [0.3, 0.7] for row in ROWS}
STEPS = {
    "fine-tuning": fine_tuning,
    "SPUL behind a gate": lambda: spul(Shares(0.5, 0.1, 1.0, 2.0)),
    "SPUL in bfloat16 that hides": lambda: spul(hidden=hiding.Hiding(1.0, WORDS), dtype=torch.bfloat16),
    "SPUL that hides like a model, in pieces": lambda: spul(hidden=hiding.Hiding(1.0, WORDS, LIKE), chunk=2),
    "dpo in pieces, with LoRA": lambda: method("dpo", "kl", lora=LoraSettings(), chunk=2),
}


@pytest.mark.parametrize("case", STEPS)
def test_a_step_waits_for_what_it_logs_alone(case, tmp_path):
    """Nothing is on the wrong device, and micro-batches wait no further time."""
    learner, objective = STEPS[case]()
    with fake_device() as waits:
        send(learner, objective)
        training = Training(
            parameters={name: p for name, p in learner.named_parameters() if p.requires_grad},
            examples=ROWS, loss=objective, settings=TrainingSettings(micro_batch_size=3), recorded={},
            state_path=tmp_path / "state", fingerprint="", chain=[], warmup=0.0,
        )  # fmt: skip
        assert {p.device.type for p in training.parameters.values()} == {DEVICE}
        optimizer = training.optimizer()
        training.update(optimizer, {"step": 1, **training.accumulate([0, 1, 2, 3])})
    assert waits == [("number", "loop._summed"), ("number", "sharding.clip_grad_norm")]


@pytest.mark.parametrize("name", ["undial", "rmu", "pdu"])
def test_the_loss_of_a_method_waits_for_nothing(name):
    """Methods that differ in what they look at; dpo is above."""
    learner, objective = method(name)
    with fake_device() as waits:
        send(learner, objective)
        loss, parts = objective([1, 2], 1, 1)
        assert {value.device.type for value in (loss, *parts.values())} == {DEVICE}
        if after_step := getattr(objective, "after_step", None):
            after_step(dict.fromkeys(parts, 1.0), 1.0)
    assert waits == []


def test_no_forget_loss_waits():
    with fake_device() as waits:
        values, logits = torch.ones(3, device=DEVICE), torch.ones(3, 5, device=DEVICE)
        targets = rows = torch.ones(3, dtype=torch.long, device=DEVICE)
        tokens = CompletionTokens(logits, logits, targets)
        answers = Answers.of(values, values, rows, 2, Answers.of(values, values, rows, 2))
        for name, kind in METHODS.items():
            looked_at = (logits, logits) if kind.activations else (answers if kind.of_answers else tokens,)
            constants = () if kind.activations else MethodSettings(unlearn_method=name).constants(kind)
            assert kind.forget(*looked_at, *constants).device.type == DEVICE
    assert waits == []


def test_the_reference_comes_back_once_a_batch():
    served = load()
    with fake_device() as waits:
        send(served.model)
        reference._compute(served, ROWS, {0: 1, 1: 2}, 1, reference.HIDDEN_STATES)
    assert waits == [("read", "reference._compute")] * 2


@pytest.mark.parametrize(
    "kind, attention, asked", [("SPUL", CAUSAL, 0), ("fine-tuning", CAUSAL, 0), ("fine-tuning", "sdpa", 2)]
)
def test_transformers_asks_whether_rows_are_padded(kind, attention, asked):
    """On real numbers, since it asks no fake tensor: twice a pass, where it makes the mask for SDPA."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG, attn_implementation=attention).eval().requires_grad_(False)
    encoder = VirtualTokens("mlp", 4, CONFIG.hidden_size, 16)
    prompts = PromptTuning(model, encoder, ROWS, PAD, None, 0.5, 0.0)
    objective = prompts if kind == "SPUL" else FineTuning(add_lora(model, LoraSettings()), ROWS, PAD)
    objective([0, 2], 1, 1)  # the first pass tries the prompt's keys and values
    with Asked() as found:
        objective([0, 2], 1, 1)[0].backward()
    assert found.places == ["transformers.masking_utils"] * asked


# That the list of waits would not be empty.


@pytest.mark.parametrize(
    "work, waits",
    [
        (lambda: torch.zeros(3, device=DEVICE).sum().item(), [("number", "test_gpu_ready.<lambda>")]),
        (lambda: torch.zeros(3, device=DEVICE).tolist(), [("number", "test_gpu_ready.<lambda>")]),
        (lambda: bool(torch.zeros(3, device=DEVICE).any()), [("number", "test_gpu_ready.<lambda>")]),
        (lambda: torch.zeros(3, device=DEVICE).cpu(), [("read", "test_gpu_ready.<lambda>")]),
        (lambda: torch.zeros(3).to(DEVICE), [("copy", "test_gpu_ready.<lambda>")]),
        (lambda: torch.tensor([3], device=DEVICE), [("copy", "test_gpu_ready.<lambda>")]),
        (lambda: torch.zeros(3).to(DEVICE, non_blocking=True), [("copy", "test_gpu_ready.<lambda>")]),
        (lambda: torch.zeros(3).pin_memory().to(DEVICE), [("copy", "test_gpu_ready.<lambda>")]),
        (lambda: torch.zeros(3, device=DEVICE)[torch.zeros(1).long()], [("copy", "test_gpu_ready.<lambda>")]),
        (lambda: to_device(torch.zeros(3), DEVICE), []),
        (lambda: collate(ROWS, PAD, DEVICE), []),
        (lambda: torch.zeros(3, device=DEVICE) * torch.tensor(2.0), []),  # a number that the CPU has
    ],
)
def test_what_counts_as_a_wait(work, waits):
    with fake_device() as found:
        work()
    assert found == waits


def test_two_devices_do_not_mix():
    with fake_device(), pytest.raises(RuntimeError, match="two devices"):
        torch.zeros(3, device=DEVICE) + torch.zeros(3)


@pytest.mark.parametrize("fast, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_the_dtype_is_one_that_the_gpu_computes_in(fast, dtype, monkeypatch):
    """Not one that it emulates, which torch counts as supported, too."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or fast)
    assert {pick_dtype("auto", device) for device in ("cuda", "cuda:1", "balanced")} == {dtype}
    assert pick_dtype("float32", "cuda") == torch.float32


def test_peak_memory_is_that_of_all_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda i: [3, 4][i])
    assert peak_memory() == 7


def test_on_the_cpu_nothing_is_copied():
    tensor = torch.zeros(3)
    assert to_device(tensor, "cpu") is tensor is to_device(tensor, torch.device("cpu"))
