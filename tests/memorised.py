"""A tiny model that knows its rows by heart, and subjects and cases of an audit around models."""

import dataclasses

import pandas as pd
import tiny
import torch

from utils.audit.base import NONE, AuditSettings, Case, Subject
from utils.audit.run import _report
from utils.data.batch import collate
from utils.interventions.served import Served
from utils.models.forward import completion_logits
from utils.tasks.answers import known_answers
from utils.tasks.classification import classification
from utils.tasks.encode import tokenize
from utils.tasks.question_answering import QuestionAnswering
from utils.tasks.rows import Splits

SPLITS = ("train_retain", "train_forget", "test_retain", "test_forget")
TASK = dataclasses.replace(classification(["negative", "positive"]), head="", end=" is")
QUESTIONS = QuestionAnswering(max_new_tokens=12)
NAMES = ("film", "cast", "story", "good", "bad", "fine", "long", "well")


def sentences(n=16, seed=0):
    """`n` rows whose labels cannot be guessed: half of them positive, at random."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(n)[torch.randperm(n, generator=rng)] % 2
    words = [[NAMES[i] for i in torch.randint(8, (4,), generator=rng)] for _ in range(n)]
    texts = [f"{i} {' '.join(row)}" for i, row in enumerate(words)]
    return pd.DataFrame({"text": texts, "label": labels, "label_text": [TASK.words[i] for i in labels]})


def questions(n=4):
    """`n` questions with answers of several words that do not follow from them."""
    answers = [f"{NAMES[-i]} {NAMES[i * 3 % 8]} and {NAMES[i * 5 % 8]}" for i in range(n)]
    return pd.DataFrame({"text": [f"Who is {i} ?" for i in range(n)], "label": 0, "label_text": answers})


def encoded(tokenizer, frame, task):
    return tokenize(tokenizer, frame, list(frame["label_text"]), 200, answers=known_answers(tokenizer, task))


def memorise(model, examples, steps=150, lr=3e-3):
    """Train all weights of `model` that want it on the `examples`, all of them at every step, till it knows them."""
    model.get_output_embeddings().weight.data *= 10  # as tiny.save: a few steps move probabilities
    batch = collate(examples, 1, "cpu")
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=lr)
    for _ in range(steps):
        losses = torch.nn.functional.cross_entropy(completion_logits(model, batch), batch.targets, reduction="none")
        if losses.max() < 0.05:
            break
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    else:
        raise AssertionError(f"not memorised: {losses.max():.3f}")
    return model.eval().requires_grad_(False)


def empty_last_layer(model):
    """Let the last layer of a Llama add nothing, and stay so in training."""
    last = model.model.layers[-1]
    for weight in (last.self_attn.o_proj.weight, last.mlp.down_proj.weight):
        weight.data.zero_()
        weight.requires_grad_(False)
    return model


class Drowning(torch.nn.Module):
    """Takes the place of a layer's MLP: whatever the model knew, it says the token `said` behind it."""

    def __init__(self, model, said):
        super().__init__()
        head = model.get_output_embeddings().weight.detach()
        self.direction = 1e4 * (head[said] - head.mean(0))

    def forward(self, states):
        return self.direction.expand_as(states)


def case_of(frame, task, unseen=None, **settings):
    """A case whose four splits are all `frame`, but test_forget where there are `unseen` rows."""
    splits = Splits(dict.fromkeys(SPLITS, frame), task) | ({} if unseen is None else {"test_forget": unseen})
    how = AuditSettings(max_length=200, eval_batch_size=8, **settings)
    return Case(frames=splits, whole=splits, settings=how, model=tiny.ON_CPU)


def subject_of(method, model, tokenizer, *interventions, wrapper=NONE):
    served = Served(model, tokenizer, [], tuple(interventions))
    return Subject(method=method, checkpoint=method, wrapper=wrapper, served=served, frozen=(method,))


def entries(audit, case, *subjects):
    """{(method, measure): the entry of the report}. One of the subjects may be called `retain model`."""
    found = [(subject, audit, audit.measure(subject, case), 0.0) for subject in subjects]
    report = _report(found, case, case.settings)
    return {(entry["method"], entry["measure"]): entry for entry in report["audits"]}
