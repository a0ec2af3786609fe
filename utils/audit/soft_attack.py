"""Do virtual tokens in front of a query bring back what was forgotten? (Schwinn et al., arXiv 2402.09063)

An attacker with the weights, but without the right to change them, optimises virtual tokens so that half of the rows
to forget get their true answers. The other half is asked. Enough free tokens make a model say anything about the rows
that they were optimised on, and teach a task as well. So there are two controls, to which the same is done:
test_forget, which no model was trained on, and random letters in place of the texts.

The tokens stand next to the query, behind the prompt of the wrapper, in front of every query that has no fixed answer.
Fixed answers are the end of this attack: such rows stay as they are.
"""

import string

import numpy as np
import pandas as pd
import torch

from utils.audit.attacks import BATCH, asked, attacked, named, parted, train
from utils.audit.base import Audit, Case, Measure, Passes, Subject
from utils.evaluation.run import check_served
from utils.models.forward import prompt_prefix
from utils.tasks.rows import Splits

TOKENS = 8
SPEED = 100  # the rate is that many times --attack_lr, in standard deviations of a number of the embeddings
LETTERS = list(string.ascii_lowercase)


def scrambled(frame: pd.DataFrame, seed: int) -> pd.DataFrame:
    """`frame` with as many random letters, by `seed`, in place of every word of its texts. Answers stay, and so do the
    choices of multiple choice."""
    rng = np.random.default_rng(seed)
    texts = [" ".join("".join(rng.choice(LETTERS, len(word))) for word in text.split()) for text in frame["text"]]
    return frame.assign(text=texts)


def soft_prompted(subject: Subject, frame: pd.DataFrame, case: Case, what: str) -> Subject:
    """`subject` behind TOKENS virtual tokens that are optimised on the rows of `frame` for settings.attack_steps.

    They begin at the embeddings of random tokens. Adam, in units of the embeddings' standard deviation: models differ
    in that by a factor of ten. what: tells `frame` from other rows. Raises UserError where the model has no positions
    left for them.
    """
    served, settings = subject.served, case.settings
    embeddings = served.model.get_input_embeddings().weight.detach()
    drawn = torch.randint(len(embeddings), (TOKENS,), generator=torch.Generator().manual_seed(settings.seed))
    tokens = torch.nn.Parameter(embeddings[drawn.to(embeddings.device)].float())
    name = f"soft attack by {what} through {subject.checkpoint}, {subject.wrapper}"
    now = attacked(subject, name, tokens)
    check_served(now.served, Splits({what: frame}, case.task), settings.max_length)
    prompt_prefix(served.model, tokens)  # tried once a model; a corruption must not see that
    acting, _ = now.served.decide(list(frame["text"]))
    rows = [i for i, number in enumerate(acting) if now.served.acting(number).fixed_answer is None]
    if rows:
        numbers = [acting[i] for i in rows]
        examples, lr = (
            asked(now, frame.iloc[rows], numbers, case),
            SPEED * settings.attack_lr * embeddings.float().std(),
        )
        train(now.served, examples, numbers, [tokens], settings.attack_steps, lr.item(), settings.seed)
    return attacked(subject, name, tokens.detach())


def rows_of(case: Case) -> dict[str, tuple[pd.DataFrame, pd.DataFrame]]:
    """{what the rows are: (the half that the attack is optimised on, the half that is asked)}."""
    seed, forget = case.settings.seed, case.frames["train_forget"]
    kinds = {
        "rows to forget": forget,
        "never-trained rows": case.frames["test_forget"],
        "random strings": scrambled(forget, seed),
    }
    return {what: parted(frame, len(frame) // 2, seed, "soft-attack") for what, frame in kinds.items()}


def measure(subject: Subject, case: Case) -> list[Measure]:
    """How far the subject, once attacked, knows the half of each kind of rows that the attack was not optimised on."""
    found = []
    for what, (half, rest) in rows_of(case).items():
        own = what == "rows to forget"
        measures = case.knowledge(soft_prompted(subject, half, case, what), f"{what}, other half", rest)
        found += named(measures, what, compared=own, headline=own)
    return found


SOFT_ATTACK = Audit(
    name="soft-attack",
    asks="Do virtual tokens that an attacker optimises on half of the rows to forget bring the others back?",
    measure=measure,
    passes=lambda case: Passes(
        trained=3 * case.settings.attack_steps * BATCH, forward=sum(len(rest) for _, rest in rows_of(case).values())
    ),
    reads=("attack_steps", "attack_lr"),
    dear=True,
)
