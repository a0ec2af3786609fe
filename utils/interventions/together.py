"""Several unlearning requests over one frozen model: each is a checkpoint with a gate, and one acts on a query."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import pandas as pd

from utils.data.select import learnt_by
from utils.errors import UserError, first_line, note_once
from utils.interventions import gate_files
from utils.interventions.served import LOADERS, Served, load_chain
from utils.models.base import ModelSettings
from utils.models.chain import resolve_chain
from utils.storage.checkpoints import Link
from utils.tasks.rows import recorded_rows

NAME = r"^[^\s=|\x00-\x1f]([^=|\x00-\x1f]*[^\s=|\x00-\x1f])?$"  # of a request; = and | separate names elsewhere
FORGET_SPLITS = ("train_forget", "test_forget")


@dataclass(frozen=True)
class Request:
    """An unlearning request. chain: the Links of its checkpoint, base first."""

    name: str
    chain: list[Link]

    @property
    def link(self) -> Link:
        return self.chain[-1]

    @property
    def sha256(self) -> str:
        return self.link.sha256

    @property
    def model(self) -> list[str]:
        """The hashes of the frozen model that the request is about, link by link, base first."""
        return [link.sha256 for link in self.chain[:-1]]

    @cached_property
    def forget_rows(self) -> dict[str, pd.DataFrame] | None:
        """{forget split: its rows}, loaded by the arguments of its training; None, with a note, where the train rows
        are not those that it was trained on."""
        manifest = self.link.manifest
        try:
            frames = recorded_rows(manifest)
            problem = None if learnt_by(manifest, frames) else "they have changed since"
        except UserError as error:
            problem = first_line(error)
        if problem is None:
            return {split: frames[split] for split in FORGET_SPLITS}
        note_once(f"the rows that {self.link.path} was trained on are not to be had ({problem}); they are left out")
        return None


def refuse_name(name: str) -> None:
    """Raise UserError unless `name` can be that of a request."""
    if not re.fullmatch(NAME, name):
        raise UserError(f"{name!r} is no name of a request; use one line without '=' and '|'")


def resolve_request(name: str, path: str, trust_remote_code: bool, parent: str | None = None) -> Request:
    """The Request that the checkpoint at `path` serves. Raises UserError where it has no gate.

    parent: where its parent lies, if it was moved.
    """
    chain = resolve_chain(path, trust_remote_code, parent)
    if not gate_files.has_gate(chain[-1]):
        raise UserError(f"{path} has no gate; requests are checkpoints that carry one")
    return Request(name, chain)


def refuse_apart(requests: Sequence[Request]) -> None:
    """Raise UserError unless the `requests` can be served together.

    Their names and checkpoints must differ; frozen model and label words must be the same.
    """
    by_name, by_hash = {}, {}
    for request in requests:
        path, first = request.link.path, requests[0]
        if request.name in by_name:
            other = by_name[request.name].link.path
            raise UserError(f"{other} and {path} are both called {request.name!r}; give them other names")
        if request.model != first.model:
            raise UserError(f"{path} was made for another frozen model than {first.link.path}; serve them apart")
        if request.sha256 in by_hash:
            raise UserError(f"{by_hash[request.sha256].link.path} and {path} are the same checkpoint; name it once")
        kinds = [link.manifest.get("task", "classification") for link in (request.link, first.link)]
        if request.link.manifest["label_words"] != first.link.manifest["label_words"] or kinds[0] != kinds[1]:
            raise UserError(f"{path} was made for other label words than {first.link.path}; serve them apart")
        by_name[request.name], by_hash[request.sha256] = request, request


def serve_together(requests: Sequence[Request], settings: ModelSettings, max_length: int = 1024) -> Served:
    """One Served of all `requests`, whose frozen model is loaded once.

    The interventions stand in the order of the checkpoints' hashes: of two gates with equal margins the first wins,
    whatever the order of the requests. max_length: of a gate that reads hidden states.
    """
    requests = sorted(requests, key=lambda request: request.sha256)
    served, found = load_chain(requests[0].chain[:-1], settings, max_length), []
    for request in requests:
        intervention = LOADERS[request.link.kind](request.link, served, settings, max_length)
        found.append(replace(intervention, request=request.name))
    chain = [*served.chain, *(request.link for request in requests)]
    return replace(served, chain=chain, interventions=tuple(found))
