"""`--audit`: every audit on every subject, and what each number says beside that of the retain-only model."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

import numpy as np
from tqdm import tqdm

from utils import distributed
from utils.audit.audits import AUDITS
from utils.audit.base import NO_GATE, NONE, ON, Audit, AuditSettings, Case, Measure, Subject
from utils.audit.membership import PRIVACY, privacy_leakage
from utils.audit.shadows import check_shadows
from utils.errors import UserError
from utils.evaluation.evaluate import CheckpointSettings, check_model
from utils.evaluation.record import method_names
from utils.evaluation.run import chosen, note_other_rows
from utils.evaluation.statistics import DRAWS, LEVEL, difference, mean_and_spread
from utils.evaluation.tables import aligned
from utils.interventions.served import LOADERS, Served, load_served
from utils.models.base import ModelSettings
from utils.models.chain import resolve_chain
from utils.storage.checkpoints import Link
from utils.tasks.rows import Splits, refuse_other_form
from utils.unlearning.flags import listed_people

VERSION = 1
LEAKS, OVER, ALIKE = "leaks", "over-unlearnt", "as the retain model"


def chosen_audits(names: Sequence[str]) -> list[Audit]:
    """The audits of those names; of none every one that is not dear, of `all` every one."""
    if "all" in names:
        return list(AUDITS.values())
    return [audit for audit in AUDITS.values() if audit.name in names or (not names and not audit.dear)]


def audit_checkpoints(
    asked: CheckpointSettings, audits: Sequence[Audit], whole: Splits, model: ModelSettings, settings: AuditSettings
) -> dict[str, Any]:
    """The report of `audits` on all checkpoints, as audit.json holds it.

    Of each checkpoint with a wrapper the frozen model alone is audited, too: once, however many wrappers stand in front
    of it, and not where it is one of the checkpoints itself. Raises UserError where checkpoints, rows or shadow models
    do not go together, and where a model gives numbers that are not finite.
    """
    if distributed.world_size() > 1:
        raise UserError("--audit runs in one process; start it with python, not accelerate launch")
    check_shadows(settings.shadows, whole)
    case = make_case(whole, model, settings)
    names = asked.model_checkpoints
    chains = [resolve_chain(name, model.trust_remote_code, asked.parent_path) for name in names]
    note_other_rows(chains, whole, asked.forget_size)
    for chain in chains:
        refuse_other_form(chain[-1].manifest, whole.task, chain[-1].name)
    found: list[tuple[Subject, Audit, list[Measure], float]] = []
    done = {frozen_model(chain) for chain in chains if chain[-1].kind not in LOADERS}
    with tqdm(desc="audits", unit="audit", dynamic_ncols=True) as progress:
        for method, name in zip(method_names(chains), names):
            for subject in _subjects(method, name, asked, case, done):
                done.add(subject.frozen)
                for audit in audits:
                    if subject.wrapper == NO_GATE and audit.name != "bypass":
                        continue
                    progress.set_postfix_str(f"{audit.name} of {subject.name}")
                    start = perf_counter()
                    measures = audit.measure(subject, case)
                    _refuse_infinite(measures, audit, subject)
                    found.append((replace(subject, served=None), audit, measures, perf_counter() - start))
                    progress.update()
    return _report(found, case, settings)


def frozen_model(chain: Sequence[Link]) -> tuple[str, ...]:
    """What tells the frozen model of `chain` from others: the hashes of all links that are no wrapper."""
    return tuple(link.sha256 for link in chain if link.kind not in LOADERS)


def _refuse_infinite(measures: Sequence[Measure], audit: Audit, subject: Subject) -> None:
    samples = [part for measure in measures for part in (measure.sample.values, measure.sample.others)]
    if not all(np.isfinite(part).all() for part in samples if part is not None):
        raise UserError(
            f"{audit.name} finds numbers that are not finite in {subject.name}; use --dtype=float32 or leave it out"
        )


def make_case(whole: Splits, model: ModelSettings, settings: AuditSettings) -> Case:
    """The rows that are looked at, and whom they name."""
    return Case(
        frames=Splits(chosen(whole, settings), whole.task), whole=whole, settings=settings, model=model,
        people=listed_people(settings.dataset, settings.forget_only),
    )  # fmt: skip


def _subjects(
    method: str, name: str, asked: CheckpointSettings, case: Case, done: set[tuple[str, ...]]
) -> Iterator[Subject]:
    """The frozen model of checkpoint `name` unless it is `done`, then the checkpoint as it is served, then without its
    gate."""
    served = load_served(name, case.model, asked.parent_path, case.settings.max_length)
    check_model(served, case.frames, case.settings.max_length)
    frozen = frozen_model(served.chain)
    wrapper = ON if served.interventions else NONE
    subject = Subject(method=method, checkpoint=str(name), wrapper=wrapper, served=served, frozen=frozen)
    if wrapper == ON and frozen not in done:
        yield subject.plain
    yield subject
    if served.is_gated:
        yield replace(subject, wrapper=NO_GATE, served=served.ungated)


def _report(
    found: Sequence[tuple[Subject, Audit, list[Measure], float]], case: Case, settings: AuditSettings
) -> dict[str, Any]:
    """What audit.json holds."""
    retain = {
        (audit.name, measure.name): measure
        for subject, audit, measures, _ in found
        if subject.method == "retain model"
        for measure in measures
    }
    if not retain:
        case.note(
            "No retain model (qlora.py --exclude_forget) is among --model_checkpoints, or several are, so most numbers "
            "have nothing to be compared with."
        )
    entries, leakage = [], {}
    for subject, audit, measures, seconds in found:
        for measure in measures:
            reference = retain.get((audit.name, measure.name)) if subject.method != "retain model" else None
            entry = {
                "audit": audit.name, "measure": measure.name, "headline": measure.headline, "method": subject.method,
                "checkpoint": subject.checkpoint, "wrapper": subject.wrapper,
                **_estimate(measure, reference, settings.seed), "seconds": seconds,
            }  # fmt: skip
            if reference is not None and (audit.name, measure.name) == PRIVACY:
                leakage[subject.name] = privacy_leakage(measure.sample.value(), reference.sample.value())
                entry["privacy_leakage"] = leakage[subject.name]
            entries.append(entry)
    if leakage:
        said = ", ".join(f"{name} {value:+.1f}" for name, value in leakage.items())
        case.note(f"Privacy leakage (MUSE; percent; below 0: too little was unlearnt, above 0: too much): {said}.")
    return {
        "version": VERSION, "level": LEVEL, "draws": DRAWS, "seed": settings.seed, "dataset": settings.dataset,
        "rows": {split: len(frame) for split, frame in case.frames.items()},
        "asks": {audit.name: audit.asks for _, audit, _, _ in found}, "audits": entries,
        "over_checkpoints": _over_checkpoints(entries), "notes": case.notes,
    }  # fmt: skip


def _over_checkpoints(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each number that several checkpoints of one method have, several seeds say: how many they are, mean and
    standard deviation of the values, and of the advantages where there are some."""
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for entry in entries:  # "SPUL (seed1)" and "SPUL (seed2)" are of one method: see `method_names`
        key = entry["audit"], entry["measure"], entry["method"].split(" (")[0], entry["wrapper"]
        groups.setdefault(key, []).append(entry)
    found = []
    for key, group in groups.items():
        if len(group) > 1:
            row = dict(zip(("audit", "measure", "method", "wrapper"), key)) | {"n": len(group)}
            for name in ("value", "advantage"):
                if all(name in entry for entry in group):
                    row[name], row[f"{name}_deviation"] = mean_and_spread([entry[name] for entry in group])
            found.append({**row, "headline": group[0]["headline"]})
    return found


def _estimate(measure: Measure, reference: Measure | None, seed: int) -> dict[str, Any]:
    """The value of a measure with its interval, and how far it is above that of the `reference`, with a verdict."""
    sample = measure.sample
    entry = {"value": sample.value(), "interval": list(sample.interval(seed)), "n": len(sample.values)}
    if not measure.compared:
        return entry
    if measure.neutral is not None:
        interval = [bound - measure.neutral for bound in entry["interval"]]
        advantage = entry["value"] - measure.neutral
    elif reference is not None:
        advantage, interval = difference(sample, reference.sample, seed)
    else:
        return entry
    verdict = LEAKS if interval[0] > 0 else OVER if interval[1] < 0 else ALIKE
    return {**entry, "advantage": advantage, "advantage_interval": list(interval), "verdict": verdict}


def estimate(
    asked: CheckpointSettings, audits: Sequence[Audit], whole: Splits, model: ModelSettings, settings: AuditSettings
) -> str:
    """What `audit_checkpoints` will take, as text: rows and tokens of each audit of one subject, and minutes for all
    subjects, by the time that some rows take on the first checkpoint."""
    case, name = make_case(whole, model, settings), asked.model_checkpoints[0]
    chains = [resolve_chain(path, model.trust_remote_code, asked.parent_path) for path in asked.model_checkpoints]
    n_subjects = len({*map(frozen_model, chains), *(tuple(link.sha256 for link in chain) for chain in chains)})
    served = load_served(name, model, asked.parent_path, settings.max_length)
    check_model(served, case.frames, settings.max_length)
    row, trained, token = seconds_a_row(served.plain, case)
    lines = [
        ["audit", "rows", "rows trained on", "tokens drawn", f"minutes for {n_subjects} model{'s' * (n_subjects > 1)}"]
    ]
    for audit in audits:
        passes = audit.passes(case)
        seconds = n_subjects * (passes.forward * row + passes.trained * trained + passes.generated * token)
        cells = (passes.forward, passes.trained, passes.generated)
        lines.append([audit.name, *(f"{cell:,}" for cell in cells), f"{seconds / 60:.1f}"])
    return aligned(lines)


def seconds_a_row(served: Served, case: Case) -> tuple[float, float, float]:
    """(seconds that a row takes in evaluation, in training, and a token takes to be drawn), by one batch of rows.

    A row is trained on in three times the time of its evaluation: forward, and twice that back. A token that is drawn
    reads one position where a row reads many, but waits for all weights; half a row's time is its upper bound here.
    """
    frame = case.frames["train_forget"].head(case.settings.eval_batch_size)
    subject = Subject(method="", checkpoint="", wrapper=NONE, served=served, frozen=())
    case.scored(subject, "warm up", frame.head(1))
    start = perf_counter()
    case.scored(subject, "timed", frame)
    seconds = (perf_counter() - start) / len(frame)
    return seconds, 3 * seconds, seconds / 2
