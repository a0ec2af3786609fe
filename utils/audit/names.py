"""The names of the audits, apart from their code: the command line needs them before anything heavy is imported."""

AUDIT_NAMES = (
    "membership",
    "bypass",
    "evasion",
    "inversion",
    "relearning",
    "quantisation",
    "probe",
    "sampling",
    "soft-attack",
)
