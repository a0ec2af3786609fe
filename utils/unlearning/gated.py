"""What the methods eco, gate and refusal put behind a gate: corrupted embeddings, nothing, or a fixed answer."""

from collections.abc import Callable, Sequence
from pathlib import Path

from utils.data.names import Person
from utils.evaluation import figures, tables
from utils.interventions import eco, gate_files, refusal
from utils.interventions.base import Intervention
from utils.interventions.gate_files import GateSource
from utils.interventions.served import Served
from utils.models.base import ModelSettings
from utils.tasks.rows import Splits
from utils.unlearning import eco_search

Writer = Callable[[Path], None]


def behind_gate(
    method: str,
    served: Served,
    frames: Splits,
    names: Sequence[Person],
    source: GateSource,
    settings: eco_search.EcoSettings,
    model: ModelSettings,
) -> tuple[Intervention, Writer]:
    """(what `method` puts in front of the plain model `served`, function(folder) that writes it with its gate).

    names, settings, model: as `eco_search.learn` takes them. Prints what a gate flags that was trained here.
    """
    gate, description = source.gate(served), source.description
    if source.link is None:  # else it was said when the gate was trained
        print(tables.gate_table(description))
    if method == "eco":
        made, found = eco_search.learn(served, frames, names, gate, settings, model)
    else:
        made = refusal.refuse(served, frames.task, gate) if method == "refusal" else Intervention(gate=gate)

    def write(folder: Path) -> None:
        gate_files.save(gate, description, source.unseen, folder)
        if description.get("roc"):
            figures.draw_roc(description, path=folder / "gate_roc.png")
        if method == "refusal":
            refusal.save(made, folder)
        elif method == "eco":
            eco.save(made, found, folder)
            if found["curve"]:
                figures.draw_strength(found, path=folder / "strength.png")

    return made, write
