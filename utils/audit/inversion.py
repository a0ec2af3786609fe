"""Does the artefact itself name whom it forgets?

Whoever holds a prompt can look up which words its virtual tokens lie near (as Khashabi et al., arXiv 2112.08348, read
continuous prompts), and whoever holds a gate can ask it about names. Neither needs a row that is to be forgotten. Each
name of a forgotten person gets a score; its AUC is against other names of the training rows that are about as frequent.
"""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from scipy.stats import rankdata

from utils.audit.base import ON, Audit, Case, Measure, Passes, Subject
from utils.data.names import mentions
from utils.data.rewritings import capitalised_names
from utils.evaluation.statistics import Sample
from utils.interventions.gates import Gate
from utils.interventions.prompt_encoders import Prompt
from utils.interventions.served import Served
from utils.tasks.encode import Tokens, completion_ids

CONTROLS = 5  # other names for each forgotten one
SHOWN = 8  # words of a prompt, in the report
POSSESSIVE = re.compile("['’]s?$")


def forgotten_names(case: Case) -> Counter[str]:
    """{surname, the last word of a listed name: rows of train_forget that mention its person}."""
    counts, surnames = Counter(), {person.name: person.name.split()[-1] for person in case.people}
    for text in case.whole["train_forget"]["text"]:
        counts.update({surnames[name] for name in mentions(text, case.people)})
    return counts


def other_names(case: Case) -> Counter[str]:
    """{last word of a capitalised name: rows of train_retain that have it}, without the words of any listed name and
    words of one letter."""
    listed = {w.casefold() for person in case.people for name in (person.name, *person.spellings) for w in name.split()}
    counts = Counter()
    for text in case.whole["train_retain"]["text"]:
        found = {_last_word(text[name.start : name.end]) for name in capitalised_names(text)}
        counts.update(word for word in found if len(word) > 1 and word.casefold() not in listed)
    return counts


def _last_word(name: str) -> str:
    return POSSESSIVE.sub("", name.split()[-1])


def matched(forgotten: Counter[str], others: Counter[str], pieces: dict[str, Tokens], seed: int) -> list[str]:
    """For each of the `forgotten`, the most frequent first, CONTROLS of the `others`, each once: those nearest in
    frequency, of these those nearest in the number of word pieces, of these as `seed` draws. Fewer if they run out."""
    left = [str(word) for word in np.random.default_rng(seed).permutation(sorted(others))]
    chosen: list[str] = []
    for name in sorted(forgotten, key=lambda name: (-forgotten[name], name)):
        size = len(pieces[name])
        left.sort(key=lambda word: (abs(others[word] - forgotten[name]), abs(len(pieces[word]) - size)))
        chosen, left = chosen + left[:CONTROLS], left[CONTROLS:]
    return chosen


@torch.inference_mode()
def likeness(served: Served, vectors: torch.Tensor) -> np.ndarray:
    """(p, |V|) cosines of the `vectors` (p, d) with the input embeddings of the tokenizer's word pieces."""
    embeddings = served.model.get_input_embeddings().weight[: len(served.tokenizer)].float()
    directions = torch.nn.functional.normalize(vectors.to(embeddings))
    return (directions @ embeddings.T / embeddings.norm(dim=1).clamp(min=1e-12)).cpu().numpy()


def nearness(cosines: np.ndarray, pieces: Sequence[Tokens]) -> np.ndarray:
    """(n,) in [0, 1]: for each name, given as word `pieces`, the mean of their ranks in the vocabulary. The piece with
    the largest of its `cosines` (p, |V|) over virtual tokens has rank 1, that with the smallest 0."""
    largest = cosines.max(0)
    ranks = (rankdata(largest) - 1) / (len(largest) - 1)
    return np.array([ranks[list(tokens)].mean() for tokens in pieces])


def nearest_words(served: Served, cosines: np.ndarray) -> list[str]:
    """The word pieces nearest to the virtual tokens, in their order, each once and SHOWN at most, as far as they can be
    printed."""
    words = (served.tokenizer.decode([int(token)]).strip() for token in cosines.argmax(1))
    return list(dict.fromkeys(word for word in words if word and word.isprintable() and "\ufffd" not in word))[:SHOWN]


def measure(subject: Subject, case: Case) -> list[Measure]:
    """AUCs of forgotten names against others: by the cosines of a prompt, and by the log odds of a gate."""
    served = subject.served
    prompts = [intervention.vectors for intervention in served.interventions if isinstance(intervention, Prompt)]
    gates = [intervention.gate for intervention in served.interventions if intervention.gate is not None]
    if subject.wrapper != ON or not (prompts or gates):
        return []
    cosines = likeness(served, torch.cat(prompts)) if prompts else None
    if prompts and (words := nearest_words(served, cosines)):
        case.note(f"The nearest words to the prompt of {subject.name}: {', '.join(words)}.")
    forgotten, others = forgotten_names(case), other_names(case)
    if len(forgotten) < 2 or not others:
        case.note(
            "Inversion needs names of two people to forget and of others to keep, which are unknown here; list people "
            "with --forget_only."
        )
        return []
    pieces = {name: completion_ids(served.tokenizer, name) for name in (*forgotten, *others)}
    sides = sorted(forgotten), matched(forgotten, others, pieces, case.settings.rows_seed)
    found = []
    if prompts:
        found.append(("prompt", [nearness(cosines, [pieces[name] for name in names]) for names in sides]))
    if gates:
        found.append(("gate", [log_odds(gates, names) for names in sides]))
    return [
        Measure(name=f"AUC of forgotten names, {by}", sample=Sample(*scores), neutral=0.5, headline=True)
        for by, scores in found
    ]


def log_odds(gates: Sequence[Gate], names: Sequence[str]) -> np.ndarray:
    """(n,): how far the probabilities that `gates` give to the bare `names` lie above the threshold, in log odds; of
    several gates the largest."""
    return np.max([gate.margins(gate.probabilities(names)) for gate in gates], axis=0)


INVERSION = Audit(
    name="inversion",
    asks="Does the prompt or the gate itself name whom it forgets?",
    measure=measure,
    passes=lambda case: Passes(),
)
