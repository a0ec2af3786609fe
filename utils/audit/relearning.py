"""Does what was forgotten come back when an attacker with the weights trains on a little of it? (relearning)

After Hu et al. (arXiv 2406.13356, section 4): the attacker has some of the rows to forget, fine-tunes on these, and all
others of them are asked. Beside it stands the same with rows to keep, of which the attacker has as many: what comes
back there was not taught but only hidden. The retain-only model is attacked alike. So what a model learns in general
from such rows is no leak.

The attacker trains through the wrapper as it is served. Where that gives a fixed answer there is nothing to train, and
the rows are trained on as the model alone is asked. Afterwards all are asked through the wrapper, fixed answers and
gates included.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pandas as pd
import torch

from utils.audit.attacks import BATCH, asked, attacked, named, parted, train
from utils.audit.base import Audit, Case, Measure, Passes, Subject
from utils.data.select import sample_rows
from utils.interventions.gates import states_anew
from utils.models.adapters import LoraSettings, add_lora

# The scale, alpha / rank, is that of qlora.py.
LORA = LoraSettings(lora_rank=8, lora_alpha=32, lora_dropout=0.0, lora_target_modules=["all-linear"])


@contextmanager
def relearnt(subject: Subject, frame: pd.DataFrame, case: Case, what: str) -> Iterator[Subject]:
    """While open, the model of `subject` is fine-tuned on the rows of `frame`; the Subject that it is then.

    That is by LoRA of rank 8 in float32 on all linear layers but the head, for settings.attack_steps. Then the weights
    are what they were, bit for bit: the adapter stood beside them. what: tells `frame` from other rows.
    """
    served, settings = subject.served, case.settings
    acting = [n if served.acting(n).fixed_answer is None else None for n in served.decide(list(frame["text"]))[0]]
    examples = asked(subject, frame, acting, case)
    now = attacked(subject, f"relearning {what} through {subject.checkpoint}, {subject.wrapper}")
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        adapted = add_lora(served.model, LORA).eval()
    try:
        parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        train(now.served, examples, acting, parameters, settings.attack_steps, settings.attack_lr, settings.seed)
        with states_anew(served.model):
            yield now
    finally:
        adapted.unload().requires_grad_(False)


def rows_of(case: Case) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """(the forget rows that the attacker has, the other forget rows, as many rows to keep as the attacker has)."""
    forget, seed = case.frames["train_forget"], case.settings.seed
    some, rest = parted(forget, round(case.settings.attack_share * len(forget)), seed, "relearning")
    return some, rest, sample_rows(case.frames["train_retain"], len(some), seed)


def measure(subject: Subject, case: Case) -> list[Measure]:
    """How far the subject knows the forget rows that the attacker does not have, after each of two attacks."""
    some, rest, retain = rows_of(case)
    found = []
    for what, frame in (("some forget rows", some), ("retain rows", retain)):
        with relearnt(subject, frame, case, what) as now:
            found += named(case.knowledge(now, "train_forget, rest", rest), f"after {what}", headline=frame is some)
    return found


RELEARNING = Audit(
    name="relearning",
    asks="Do rows to forget come back when an attacker fine-tunes on a few others of them?",
    measure=measure,
    passes=lambda case: Passes(trained=2 * case.settings.attack_steps * BATCH, forward=2 * len(rows_of(case)[1])),
    reads=("attack_steps", "attack_lr", "attack_share"),
    dear=True,
)
