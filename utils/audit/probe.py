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
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from utils.audit.base import Audit, Case, Measure, Passes, Subject
from utils.audit.states import chosen_layers, states_of
from utils.evaluation.statistics import Sample
from utils.tasks.answers import known_answers

SHUFFLES = 5  # fits that the control averages, as utils.tasks.metrics.probe_accuracy


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
    hits = [probe_hits(layer, labels, case.settings.seed) for layer in states]
    best = int(np.argmax([row.mean() for row in hits]))
    shuffled = probe_hits(states[best], labels, case.settings.seed, SHUFFLES)
    return [
        Measure(name="linear probe, best layer", sample=Sample(hits[best]), headline=headline),
        Measure(name="linear probe, shuffled labels", sample=Sample(shuffled), compared=False),
    ]


def probe_hits(states: np.ndarray, labels: Sequence[str], seed: int, shuffles: int = 0) -> np.ndarray:
    """Whether a logistic regression on standardised `states` (n, d) tells the labels of rows that it has not seen.

    Half of the rows are fitted, drawn by `seed` with the same shares of every label; the result (m,) is 0 or 1 for
    each of the others, in the order in which they were drawn. shuffles: instead the mean of so many fits to shuffled
    labels. C = 1, scikit-learn's default, as in utils.tasks.metrics.probe_accuracy.
    """
    truth = np.asarray(labels)
    fitted, asked = train_test_split(np.arange(len(truth)), test_size=0.5, stratify=truth, random_state=seed)
    rng = np.random.default_rng(seed)
    taught = [rng.permutation(truth[fitted]) for _ in range(shuffles)] or [truth[fitted]]
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=10_000))
    return np.mean([probe.fit(states[fitted], own).predict(states[asked]) == truth[asked] for own in taught], axis=0)


PROBE = Audit(
    name="probe",
    asks="Can the answers of the rows to forget still be read off hidden states?",
    measure=measure,
    passes=lambda case: Passes(forward=len(case.frames["train_forget"])),
)
