"""A ledger of unlearning requests: which were added and revoked over one frozen model, and by which checkpoints."""

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from utils.data.select import fingerprint
from utils.errors import UserError
from utils.interventions.together import NAME, Request, refuse_apart, refuse_name, resolve_request
from utils.storage import files, schemas
from utils.storage.schemas import Digest, Schema, Text

VERSION = 1
ISO = r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}\+00:00$"
Moment = Annotated[str, Field(pattern=ISO), AfterValidator(datetime.fromisoformat)]


class Entry(Schema):
    """One request. checkpoint: relative to the ledger's folder. date: when it was last added. forget_fingerprint: of
    its train_forget rows, None where they were not to be had."""

    name: Annotated[str, Field(pattern=NAME)]
    checkpoint: Text
    sha256: Digest
    date: Moment
    forget_fingerprint: Digest | None
    active: bool
    revoked: Moment | None

    @model_validator(mode="after")
    def _is_active_or_revoked(self) -> "Entry":
        if self.active == (self.revoked is not None):
            raise ValueError("a request is either active or has a date on which it was revoked")
        return self


class Ledger(Schema):
    """requests.json. model_sha256: of the frozen model, link by link, base first."""

    what, remedy = "ledger of requests", "restore it"
    version: Literal[1]
    model_sha256: Annotated[list[Digest], Field(min_length=1)]
    requests: Annotated[list[Entry], Field(min_length=1)]

    @model_validator(mode="after")
    def _has_each_once(self) -> "Ledger":
        names = [entry.name for entry in self.requests]
        hashes = [entry.sha256 for entry in self.requests if entry.active]
        if len(set(names)) < len(names) or len(set(hashes)) < len(hashes):
            raise ValueError("a name or an active checkpoint stands there twice")
        return self


def active_requests(path: str, trust_remote_code: bool, parent: str | None = None) -> list[Request]:
    """The active requests of the ledger at `path`, in its order.

    parent: where the parent of all of them lies, if it was moved. Raises UserError where the ledger is damaged or has
    none, and where a checkpoint is not the one that was added.
    """
    ledger = schemas.read(path, Ledger)
    found = _verified(path, ledger, trust_remote_code, parent)
    if not found:
        raise UserError(f"{path} has no active request; add one with --add")
    return found


def add(path: str, name: str, checkpoint: str, trust_remote_code: bool, parent: str | None = None) -> dict[str, Any]:
    """The ledger at `path`, which need not exist yet, with the request `name` active in it, by that checkpoint.

    A request that was revoked becomes active again. Raises UserError, and changes nothing, where it cannot be served
    with the active ones, or the name is in use.
    """
    refuse_name(name)
    request = resolve_request(name, checkpoint, trust_remote_code, parent)
    if not os.path.isdir(checkpoint):
        raise UserError(f"{checkpoint} is no folder on this machine; a ledger records where checkpoints lie")

    def change(ledger: dict[str, Any] | None) -> dict[str, Any]:
        ledger = ledger or {"version": VERSION, "model_sha256": request.model, "requests": []}
        known = next((entry for entry in ledger["requests"] if entry["name"] == name), None)
        if known and known["active"]:
            raise UserError(f"{name!r} is active in {path} already; revoke it first, or choose another name")
        if known and known["sha256"] != request.sha256:
            raise UserError(f"{name!r} stands for another checkpoint in {path}; choose another name")
        if request.model != ledger["model_sha256"]:
            raise UserError(f"{checkpoint} was made for another frozen model than {path}; keep a ledger for each")
        refuse_apart([*_verified(path, ledger, trust_remote_code, parent), request])
        rows = request.forget_rows
        entry = {
            "name": name,
            "checkpoint": os.path.relpath(os.path.realpath(checkpoint), _folder(path)),
            "sha256": request.sha256,
            "date": _now(),
            "forget_fingerprint": rows and fingerprint({"train_forget": rows["train_forget"]}),
            "active": True,
            "revoked": None,
        }
        return _with(ledger, entry)

    return _edit(path, change)


def revoke(path: str, name: str) -> dict[str, Any]:
    """The ledger at `path` with the request `name` revoked in it; its checkpoint is not looked at.

    Raises UserError, and changes nothing, where there is no such active request.
    """

    def change(ledger: dict[str, Any] | None) -> dict[str, Any]:
        entries = (ledger or {"requests": []})["requests"]
        known = next((entry for entry in entries if entry["name"] == name), None)
        if known is None:
            names = ", ".join(entry["name"] for entry in entries) or "none"
            raise UserError(f"{path} has no request {name!r}; it has {names}")
        if not known["active"]:
            raise UserError(f"{name!r} was revoked on {known['revoked']} already; nothing is left to revoke")
        return _with(ledger, {**known, "active": False, "revoked": _now()})

    return _edit(path, change)


def _verified(path: str, ledger: dict[str, Any], trust_remote_code: bool, parent: str | None) -> list[Request]:
    """The active requests of a ledger that was read from `path`, every checkpoint compared with its hash."""
    found = []
    for entry in ledger["requests"]:
        if not entry["active"]:
            continue
        checkpoint = os.path.relpath(os.path.join(_folder(path), entry["checkpoint"]))
        request = resolve_request(entry["name"], checkpoint, trust_remote_code, parent)
        if request.sha256 != entry["sha256"] or request.model != ledger["model_sha256"]:
            raise UserError(
                f"{checkpoint} is not what {path} records for {entry['name']!r} (SHA-256 differs); restore it or "
                "revoke the request"
            )
        found.append(request)
    return found


def _with(ledger: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    """The ledger with this entry in the place of the one of its name, or behind all."""
    entries = {other["name"]: other for other in ledger["requests"]} | {entry["name"]: entry}
    return {**ledger, "requests": list(entries.values())}


def _edit(path: str, change: Callable[[dict[str, Any] | None], dict[str, Any]]) -> dict[str, Any]:
    """Replace the ledger at `path` by `change` of it (None where there is none); one process at a time does."""
    with files.workplace(path, wait=True) as place:
        ledger = change(schemas.read(path, Ledger) if os.path.lexists(path) else None)
        (place / files.NEW).write_text(json.dumps(ledger, indent=2) + "\n", encoding="utf-8")
        files.publish(place, path)
    return ledger


def _folder(path: str) -> str:
    """The folder that holds the ledger, from which its checkpoints are counted."""
    return os.path.dirname(os.path.realpath(path))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
