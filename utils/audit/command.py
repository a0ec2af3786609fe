"""`inference_spul.py --audit`: from the command line to the report."""

from argparse import Namespace
from collections.abc import Sequence

from utils import cli, job
from utils.audit import report, run
from utils.audit.audits import AUDITS
from utils.audit.base import Audit, AuditSettings
from utils.errors import UserError
from utils.evaluation.evaluate import CheckpointSettings
from utils.storage import files, outputs
from utils.tasks.rows import Splits


def audit(args: Namespace, frames: Splits, name: str) -> None:
    """Attack the checkpoints on `frames`, write the report and print it; with --dry_run only say what it takes.

    name: of the output folder where the command's `args` give none; all of them say what must not be replaced.
    """
    model, settings = job.settings_of(args).model, cli.take(AuditSettings, args)
    asked, audits = cli.take(CheckpointSettings, args), run.chosen_audits(args.audit)
    refuse_unread(settings, audits)
    if args.dry_run:
        print(run.estimate(asked, audits, frames, model, settings))
        return
    with outputs.claim([args.output_path or name], args) as output:
        found = run.audit_checkpoints(asked, audits, frames, model, settings)
        with output.new_folder() as folder:
            files.write_json(folder / "audit.json", found)
            if any(entry["headline"] for entry in found["audits"]):
                report.draw_audit(found, path=folder / "audit.png")
    print(report.audit_table(found, args.every_measure))
    print(f"wrote {output}")


def refuse_unread(settings: AuditSettings, audits: Sequence[Audit]) -> None:
    """Raise UserError on a setting that only audits read which do not run."""
    plain = AuditSettings()
    for name in dict.fromkeys(name for audit in AUDITS.values() for name in audit.reads):
        owners = [audit.name for audit in AUDITS.values() if name in audit.reads]
        given = getattr(settings, name) != getattr(plain, name)
        if given and not any(audit.name in owners for audit in audits):
            raise UserError(f"--{name} is for --audit {' and '.join(owners)}; name one of them, or leave it out")
