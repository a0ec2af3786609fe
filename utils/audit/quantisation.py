"""Does what was forgotten come back when the weights are quantised? (Zhang et al., arXiv 2410.16454)

Unlearning may move weights by less than what rounding takes away. The linear layers of the decoder are rounded as
bitsandbytes stores them, and computed with in the model's dtype. nf4: 4-bit NormalFloat, blocks of 64 (QLoRA, arXiv
2305.14314, section 3). int8: whole numbers, each row scaled by its largest size (LLM.int8(), arXiv 2208.07339, section
2.1); activations are left as they are.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from bitsandbytes import functional
from transformers.pytorch_utils import Conv1D

from utils.audit.attacks import attacked, named
from utils.audit.base import Audit, Case, Measure, Passes, Subject
from utils.evaluation.statistics import Sample
from utils.interventions.gates import states_anew
from utils.interventions.served import Served
from utils.models.layers import decoder_of


def nf4(weight: torch.Tensor) -> torch.Tensor:
    """`weight` (n, d) as it is in 4-bit NormalFloat, in its own dtype."""
    values, state = functional.quantize_4bit(weight.contiguous(), blocksize=64, quant_type="nf4")
    return functional.dequantize_4bit(values, state).to(weight.dtype)


def int8(weight: torch.Tensor) -> torch.Tensor:
    """`weight` (n, d) as it is in 8 bits, in its own dtype. bitsandbytes takes it in float16."""
    values, scales, _ = functional.int8_vectorwise_quant(weight.half().contiguous())
    return functional.int8_vectorwise_dequant(values, scales).to(weight.dtype)


ROUNDED = {"nf4": nf4, "int8": int8}


def linear_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The linear layers of the decoder of `model`, without head and embeddings, and without what is quantised already
    (bitsandbytes has layers of its own for that). GPT-2 writes them as Conv1D."""
    return [layer for layer in decoder_of(model).modules() if type(layer) in (torch.nn.Linear, Conv1D)]


@contextmanager
def quantised(model: torch.nn.Module, kind: str) -> Iterator[None]:
    """While open, the weights of `linear_layers` are those that `kind` of ROUNDED leaves; then the old ones again.

    Both are in memory meanwhile. A Conv1D has its weight transposed, (d, n).
    """
    layers = linear_layers(model)
    kept = [layer.weight.data for layer in layers]
    try:
        for layer, weight in zip(layers, kept):
            turned = isinstance(layer, Conv1D)
            layer.weight.data = ROUNDED[kind](weight.T).T.contiguous() if turned else ROUNDED[kind](weight)
        yield
    finally:
        for layer, weight in zip(layers, kept):
            layer.weight.data = weight


def _flags(served: Served, texts: Sequence[str]) -> np.ndarray:
    """(n,) bool: which of the `texts` a gate flags."""
    return np.array([said["flagged"] for said in served.decide(texts)[1]])


def measure(subject: Subject, case: Case) -> list[Measure]:
    """How far the subject knows the rows to forget once its model is quantised; behind a gate also the share of rows
    of train_forget and test_retain of which it then says something else. Only a gate that reads hidden states can."""
    model, found = subject.served.model, []
    if not linear_layers(model):
        case.note(f"quantisation: {subject.name} has no linear layer that is not quantised already, so nothing is said")
        return []
    frame = case.frames["train_forget"]
    texts = [text for split in ("train_forget", "test_retain") for text in case.frames[split]["text"]]
    gated = subject.served.is_gated
    before = _flags(subject.served, texts) if gated else None
    for kind in ROUNDED:
        with quantised(model, kind), states_anew(model):
            now = attacked(subject, kind)
            found += named(case.knowledge(now, "train_forget", frame), kind, headline=kind == "nf4")
            if gated:
                changed = (_flags(now.served, texts) != before).astype(float)
                found.append(Measure(name=f"flags that flip, {kind}", sample=Sample(changed), compared=False))
    return found


QUANTISATION = Audit(
    name="quantisation",
    asks="Do rows to forget come back when the linear layers are quantised?",
    measure=measure,
    passes=lambda case: Passes(forward=len(ROUNDED) * len(case.frames["train_forget"])),
)
