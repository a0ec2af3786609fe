"""Can the forgotten answer still be read off inside the model?

Lens: the states after several layers go through the model's own final norm and head (logit lens, nostalgebraist 2020;
Patil et al. 2024, arXiv 2309.17410, find deleted answers with it). Where there are label words
it counts for which rows the true one is the likeliest of them. Of free answers it counts the share of a row's tokens
that are the arg max over the vocabulary, each behind the true ones before it.

Linear probe: where there are label words, a logistic regression on the states of half of the rows to forget, which is
asked about the other half. It learns the task itself, too (sentiment, say), so its number alone shows no leak: that
of the retain-only model is what it counts against. Fitted to shuffled labels it shows what nothing but chance reaches.

The best layer is the one with the largest share on this very subject and these rows. That is generous to the attacker,
and as generous to the retain-only model.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from utils.audit.base import Audit, Case, Measure, Passes, Subject
from utils.audit.states import chosen_layers, states_of
from utils.evaluation.statistics import Sample
from utils.tasks import metrics
from utils.tasks.answers import known_answers


def measure(subject: Subject, case: Case) -> list[Measure]:
    """Lens and, where there are label words, linear probe on train_forget, as served."""
    layers = chosen_layers(subject.served)
    hits, states = _read(subject, case, layers)
    measures = [] if hits is None else _lens(hits, layers)
    if case.task.words:
        measures += _linear(states, list(case.frames["train_forget"]["label_text"]), case, headline=hits is None)
    return measures


def _read(subject: Subject, case: Case, layers: Sequence[int]) -> tuple[np.ndarray | None, np.ndarray | None]:
    """(hits (L, n) in [0, 1] of the lens, states (L, n, d)); without hits where words begin alike, without states where
    answers are free."""
    served, frame, words = subject.served, case.frames["train_forget"], case.task.words
    known = known_answers(served.tokenizer, case.task)
    firsts = [known.ids[word][0] for word in words]
    hits, states = np.zeros((len(layers), len(frame))), {}
    for i, example, inside, logits in states_of(served, frame, known, case.settings, layers, first=bool(words)):
        if words:
            best = logits[:, 0, firsts].argmax(-1)
            hits[:, i] = [firsts[at] == example.completion[0] for at in best.tolist()]
            states[i] = inside[:, 0].cpu().numpy()
        else:
            guesses = logits.argmax(-1).cpu().numpy()
            hits[:, i] = (guesses == np.array(example.completion)).mean(1)
    if len(set(firsts)) < len(firsts):
        case.note("probe: label words begin with the same token, so the lens cannot tell them apart and is left out.")
        hits = None
    return hits, np.stack([states[i] for i in range(len(frame))], axis=1) if words else None


def _lens(hits: np.ndarray, layers: Sequence[int]) -> list[Measure]:
    """Measures of `hits` (L, n): that of the best layer, and that of each."""
    best = hits[hits.mean(1).argmax()]
    rest = [Measure(name=f"lens, layer {number}", sample=Sample(row)) for number, row in zip(layers, hits)]
    return [Measure(name="lens, best layer", sample=Sample(best), headline=True), *rest]


def _linear(states: np.ndarray, labels: Sequence[str], case: Case, headline: bool) -> list[Measure]:
    """Measures of a linear probe on `states` (L, n, d) of rows with these `labels`."""
    counts = Counter(labels)
    if len(counts) < 2 or min(counts.values()) < 2:
        case.note("probe: a linear probe needs two labels or more, each of two rows or more, so it is left out.")
        return []
    found = [metrics.probe_hits(layer, labels, case.settings.seed, standardised=True) for layer in states]
    hits, shuffled = max(found, key=lambda pair: pair[0].mean())
    return [
        Measure(name="linear probe, best layer", sample=Sample(hits), headline=headline),
        Measure(name="linear probe, shuffled labels", sample=Sample(shuffled), compared=False),
    ]


PROBE = Audit(
    name="probe",
    asks="Can the answers of the rows to forget still be read off hidden states?",
    measure=measure,
    passes=lambda case: Passes(forward=len(case.frames["train_forget"])),
)
