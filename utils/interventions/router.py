"""A router: the gate of an ECO checkpoint in front of a SPUL prompt."""

from collections.abc import Sequence

from utils.errors import UserError
from utils.interventions import gate_files
from utils.interventions.gates import CLASSIFIERS
from utils.interventions.served import Served
from utils.models.base import ModelSettings
from utils.models.chain import resolve_chain
from utils.storage.checkpoints import Link


def find_router(
    name: str | None, chains: Sequence[list[Link]], settings: ModelSettings, parent: str | None, force: bool
) -> Link | None:
    """The Link of the ECO checkpoint `name`; None without one. Raises UserError unless it fits every prompt among the
    `chains` of the checkpoints that are evaluated.

    parent: where the parent of `name` lies, if it was moved. force: take a gate that was trained on other data.
    """
    if not name:
        return None
    prompts = [chain for chain in chains if chain[-1].kind == "prompt"]
    if not prompts:
        raise UserError("--router goes in front of a prompt; add what spul.py wrote to --model_checkpoints")
    *above, link = resolve_chain(name, settings.trust_remote_code, parent)
    if not gate_files.has_gate(link):
        raise UserError(f"{name} has no gate; --router takes what baselines.py wrote with eco, gate or refusal")
    for *model, prompt in prompts:
        if link.manifest["data_fingerprint"] != prompt.manifest["data_fingerprint"] and not force:
            raise UserError(
                f"the classifier of {name} was trained on other data than {prompt.path}; train one on the same "
                "rows, or take it nevertheless with --force"
            )
        named = link.manifest["arguments"].get("eco_classifier")
        if named in CLASSIFIERS and CLASSIFIERS[named].reads_states and above[-1].sha256 != model[-1].sha256:
            raise UserError(
                f"the classifier of {name} reads the hidden states of another model than that of {prompt.path}; "
                "train one on the same model"
            )
    return link


def routed(served: Served, router: Link, settings: ModelSettings, max_length: int) -> Served:
    """`served` with its prompt only in front of the queries that the gate of the Link `router` flags."""
    return served.behind(gate_files.load(router.path, served.plain, settings.trust_remote_code, max_length))
