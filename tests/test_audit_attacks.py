"""Relearning, quantisation and soft attack: models that hide what they know, ones that never knew it, and restoration.

Every attacked model here answers the rows to forget with the wrong word before the attack.
"""

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import scripts
import tiny
import torch
from asking import Word

from utils.audit import attacks, quantisation, relearning, run, soft_attack
from utils.audit.base import NONE, ON, AuditSettings, Case, Subject
from utils.data.batch import collate
from utils.errors import UserError
from utils.interventions import gates
from utils.interventions.corruption import Corruption
from utils.interventions.eco import CorruptedEmbeddings, Marks
from utils.interventions.gates import ClassifierSettings, Features, Gate
from utils.interventions.prompt_encoders import Prompt
from utils.interventions.refusal import refuse
from utils.interventions.served import Served
from utils.models.forward import completion_logits
from utils.tasks.answers import known_answers
from utils.tasks.classification import classification
from utils.tasks.encode import tokenize
from utils.tasks.rows import Splits

WORDS = ("negative", "positive")
TASK = classification(WORDS)
SETTINGS = AuditSettings(seed=1, max_length=96, attack_share=0.25)


def rows(n, seed):
    """`n` texts of four random words, half of them positive."""
    rng, words = np.random.default_rng(seed), "film cast story plot man end love work life time good bad".split()
    texts = [" ".join(rng.choice(words, 5)) for _ in range(n)]
    return pd.DataFrame({"text": texts, "label": [i % 2 for i in range(n)]}).assign(
        label_text=lambda frame: [WORDS[label] for label in frame["label"]]
    )


FRAMES = Splits(
    {"train_retain": rows(32, 1), "train_forget": rows(32, 2), "test_retain": rows(16, 3), "test_forget": rows(32, 4)},
    TASK,
)


def make_case(**settings):
    return Case(frames=FRAMES, whole=FRAMES, settings=replace(SETTINGS, **settings), model=tiny.ON_CPU)


def subject(model, tokenizer, method, *interventions):
    served = Served(model, tokenizer, []).using(*interventions)
    return Subject(
        method=method, checkpoint=method, wrapper=ON if interventions else NONE, served=served, frozen=(method,)
    )


def other_labels(frame):
    return frame.assign(label_text=[WORDS[1 - WORDS.index(word)] for word in frame["label_text"]])


def teach(model, tokenizer, *taught, steps=60, lr=3e-3, parameters=None):
    """Full fine-tuning on all of `taught`, pairs of (frame, function() -> virtual tokens in front of it)."""
    known = known_answers(tokenizer, TASK)
    encode = partial(tokenize, tokenizer, max_length=96, answers=known)
    batches = [
        (collate(encode(frame["text"], list(frame["label_text"])), 1, "cpu"), prefix) for frame, prefix in taught
    ]
    parameters = list(model.parameters()) if parameters is None else parameters
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    for _ in range(steps):
        for batch, prefix in batches:
            logits = completion_logits(model, batch, prefix())
            torch.nn.functional.cross_entropy(logits, batch.targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.requires_grad_(False)


def nothing():
    return None
