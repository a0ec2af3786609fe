"""What a model says about each token of the true answers."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from utils.audit.base import AuditSettings
from utils.evaluation.answering import by_length, tokenized
from utils.interventions.served import Served
from utils.tasks.answers import known_answers
from utils.tasks.base import Task

LEAST_VARIANCE = 1e-6  # as open-unlearning


@torch.inference_mode()
def token_statistics(served: Served, frame: pd.DataFrame, task: Task, settings: AuditSettings) -> list[np.ndarray]:
    """For each row (m, 3) of its answer's m tokens: the log-probability in nats, and the mean and the standard
    deviation of log-probabilities over the vocabulary, each token weighted by its probability."""
    known = known_answers(served.tokenizer, task)
    acting, _ = served.decide(list(frame["text"]))
    examples = tokenized(served, frame, list(frame["label_text"]), known, settings.max_length, acting)
    found: dict[int, np.ndarray] = {}
    for rows in by_length(examples, settings.eval_batch_size, acting):
        for i, logits in zip(rows, served.logits([examples[i] for i in rows], acting[rows[0]])):
            log_p = logits.float().log_softmax(-1)
            p, finite = log_p.exp(), log_p.clamp(min=-1e4)  # a fixed answer gives other words no probability
            mean = (p * finite).sum(-1)
            variance = ((p * finite**2).sum(-1) - mean**2).clamp(min=LEAST_VARIANCE)
            own = finite.gather(-1, torch.tensor(examples[i].completion, device=logits.device)[:, None])[:, 0]
            found[i] = torch.stack([own, mean, variance.sqrt()], dim=1).double().cpu().numpy()
    return [found[i] for i in range(len(examples))]


def mean_log_p(tokens: Sequence[np.ndarray]) -> np.ndarray:
    """(n,): the mean log-probability of each row's tokens, of what `token_statistics` gives."""
    return np.array([row[:, 0].mean() for row in tokens])
