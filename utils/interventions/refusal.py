"""A gate with a fixed answer behind it, and no model: the plainest thing that a prompt has to be compared with."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from utils.data.batch import Example
from utils.errors import UserError
from utils.interventions import gate_files
from utils.interventions.base import Intervention
from utils.interventions.gates import Gate
from utils.models.base import FrozenModel, ModelSettings
from utils.storage import schemas
from utils.storage.checkpoints import Link
from utils.storage.files import write_json
from utils.storage.schemas import Schema, Text
from utils.tasks.answers import known_answers
from utils.tasks.base import Task
from utils.tasks.encode import Tokens
from utils.tasks.rows import recorded_task

FILE = "refusal.json"
UNLIKELY = -40.0  # log-probability of every other token: as good as none, and finite


class RefusalFile(Schema):
    """refusal.json."""

    what = "description of a refusal"
    answer: Text


@dataclass(frozen=True, eq=False, kw_only=True)
class Refusal(Intervention):
    """Every flagged query is answered with the `tokens` of the same word; the model is not asked."""

    word: str
    tokens: Tokens

    @property
    def fixed_answer(self) -> Tokens:
        return self.tokens

    def fixed_logits(self, model: torch.nn.Module, examples: Sequence[Example]) -> torch.Tensor:
        """(N, |V|): 0 at the next token of the answer where the completion has followed it so far, else UNLIKELY."""
        size = model.get_output_embeddings().weight.shape[0]
        places = [(example.completion, i) for example in examples for i in range(len(example.completion))]
        logits = torch.full((len(places), size), UNLIKELY, device=model.device)
        for n, (completion, i) in enumerate(places):
            if completion[:i] == self.tokens[:i] and i < len(self.tokens):
                logits[n, self.tokens[i]] = 0.0
        return logits


def refuse(served: FrozenModel, task: Task, gate: Gate | None = None, answer: str | None = None) -> Refusal:
    """A Refusal that gives one of the answers that unlearning teaches, the first refusal of `task` where none is given.

    task: decides whether an answer ends in a token of its own. Raises UserError on an answer of another version.
    """
    answer = answer or task.refusals[0]
    if task.words and answer not in (*task.refusals, *task.taught):
        raise UserError(f"{answer!r} is no answer of a refusal; make the checkpoint again")
    return Refusal(word=answer, tokens=known_answers(served.tokenizer, task).ids[answer], gate=gate)


def save(intervention: Refusal, folder: Path) -> None:
    write_json(folder / FILE, {"answer": intervention.word})


def load(link: Link, served: FrozenModel, model_settings: ModelSettings, max_length: int) -> Refusal:
    """What the checkpoint `link` answers, and its gate."""
    found = schemas.read(link.path / FILE, RefusalFile)
    gate = gate_files.load(link.path, served, model_settings.trust_remote_code, max_length)
    return refuse(served, recorded_task(link.manifest), gate, found["answer"])
