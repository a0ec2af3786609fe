"""Does the forgotten come back when the prompt, the gate or the corruption is dropped?

Whoever has the weights can leave the wrapper out. What the model then knows is the upper bound of every wrapper.
"""

from utils.audit.base import Audit, Case, Measure, Passes, Subject


def measure(subject: Subject, case: Case) -> list[Measure]:
    """How far the subject knows the answers of the rows to forget. Its variants are subjects of their own."""
    return case.knowledge(subject, "train_forget", case.frames["train_forget"])


BYPASS = Audit(
    name="bypass",
    asks="What does the model know of the rows to forget, with the wrapper and without it?",
    measure=measure,
    passes=lambda case: Passes(forward=len(case.frames["train_forget"])),
)
