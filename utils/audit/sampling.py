"""Does a forgotten answer come out when a question is asked many times? (leak@k)

leak@k is what the best of k answers that are drawn at a temperature T is expected to give away (arXiv 2511.04934). Here
an answer leaks or does not, so it is the probability that one of k leaks. Of n drawn answers of which c leak its
unbiased estimate is 1 - C(n - c, k) / C(n, k), as that of pass@k (Chen et al. 2021, arXiv 2107.03374, section 2.1).

Free answers: an answer leaks if its ROUGE-L recall against the true one is LEAK at least; n is --samples. ROWS rows are
asked about, since every one of their tokens is drawn. The headline is leak@n.

Label words: an answer leaks if it begins with the true one's tokens. Its probability p is known, so nothing is drawn,
and leak@k is 1 - (1 - p)^k. The headline is leak@1: of many draws among a few words one is right without any knowledge.

A fixed answer never leaks.
"""

import math
from itertools import product

import numpy as np
import torch

from utils.audit.base import Audit, Case, Measure, Passes, Subject
from utils.data.select import sample_rows
from utils.evaluation.answering import by_length, tokenized
from utils.evaluation.statistics import Sample
from utils.tasks import metrics
from utils.tasks.answers import known_answers

TEMPERATURES = (0.7, 1.0)
LEAK = 0.8  # ROUGE-L recall from which an answer counts as leaked
ROWS = 20  # that free answers are drawn for, at most


def leak_at_k(n: int, c: int, k: int) -> float:
    """The share of all choices of `k` among `n` answers that hold one of the `c` leaking ones; k is n at most."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def measure(subject: Subject, case: Case) -> list[Measure]:
    """leak@1, leak@8 and leak@n at each temperature, as far as n answers are as many."""
    n, measures = case.settings.samples, []
    ks = sorted({k for k in (1, 8, n) if k <= n})
    if case.task.words:
        p, headline = answer_probabilities(subject, case), 1
        found = {(k, t): 1 - (1 - p[t]) ** k for t, k in product(TEMPERATURES, ks)}
    else:
        leaks, headline = {t: leaking_answers(subject, case, t) for t in TEMPERATURES}, n
        found = {(k, t): np.array([leak_at_k(n, c, k) for c in leaks[t]]) for t, k in product(TEMPERATURES, ks)}
    for (k, temperature), values in found.items():
        name, chosen = f"leak@{k}, T={temperature:g}", (k, temperature) == (headline, 1)
        measures.append(Measure(name=name, sample=Sample(values), headline=chosen))
    return measures


@torch.inference_mode()
def answer_probabilities(subject: Subject, case: Case) -> dict[float, np.ndarray]:
    """{temperature: (n,)}: the probability that a drawn answer begins with the tokens of the true one, for each row of
    train_forget."""
    served, frame, settings = subject.served, case.frames["train_forget"], case.settings
    known = known_answers(served.tokenizer, case.task)
    acting, _ = served.decide(list(frame["text"]))
    examples = tokenized(served, frame, list(frame["label_text"]), known, settings.max_length, acting)
    found = {temperature: np.zeros(len(frame)) for temperature in TEMPERATURES}
    for rows in by_length(examples, settings.eval_batch_size, acting):
        if served.acting(acting[rows[0]]).fixed_answer is not None:
            continue
        for i, logits in zip(rows, served.logits([examples[i] for i in rows], acting[rows[0]])):
            own = torch.tensor(examples[i].completion, device=logits.device)[:, None]
            for temperature, p in found.items():
                log_p = (logits.float() / temperature).log_softmax(-1)
                p[i] = log_p.gather(-1, own).double().sum().exp().item()
    return found


@torch.inference_mode()
def leaking_answers(subject: Subject, case: Case, temperature: float) -> list[int]:
    """How many of --samples answers drawn at `temperature` leak, for each of at most ROWS rows of train_forget."""
    served, settings = subject.served, case.settings
    frame = sample_rows(case.frames["train_forget"], ROWS, settings.rows_seed)
    known, truth = known_answers(served.tokenizer, case.task), list(frame["label_text"])
    acting, _ = served.decide(list(frame["text"]))
    examples = tokenized(served, frame, truth, known, settings.max_length, acting)
    draws = [i for i in range(len(frame)) for _ in range(settings.samples)]
    asked, numbers, leaks = [examples[i] for i in draws], [acting[i] for i in draws], [0] * len(frame)
    for batch, places in enumerate(by_length(asked, settings.eval_batch_size, numbers)):
        number = numbers[places[0]]
        if served.acting(number).fixed_answer is not None:
            continue
        how = number, known.end, known.longest, temperature, settings.seed + batch  # no two batches draw alike
        for place, (tokens, _) in zip(places, served.generate([asked[i] for i in places], *how)):
            row = draws[place]
            leaks[row] += metrics.rouge_l(known.spelled(tokens), truth[row]).recall >= LEAK
    return leaks


def passes(case: Case) -> Passes:
    """One pass of every row for label words; else every token of every answer, each as long as it may be."""
    rows = len(case.frames["train_forget"])
    if case.task.words:
        return Passes(forward=rows)
    answers = len(TEMPERATURES) * min(ROWS, rows) * case.settings.samples
    return Passes(generated=answers * case.task.max_new_tokens)


SAMPLING = Audit(
    name="sampling",
    asks="Do the answers of the rows to forget come out when a question is asked many times?",
    measure=measure,
    passes=passes,
    reads=("samples",),
    dear=True,
)
