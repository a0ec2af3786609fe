"""Datasets of the hub, fetched or taken from its cache."""

from typing import TYPE_CHECKING

from utils.errors import UserError, first_line

if TYPE_CHECKING:  # it takes seconds to import, and a folder of tables needs none of it
    from datasets import DatasetDict

LOCAL = "pass a local folder to --dataset"


def from_hub(hub_id: str, config: str | None = None, remedy: str = LOCAL) -> "DatasetDict":
    """All splits of the hub's dataset `hub_id`, of its configuration `config` where it has several.

    remedy: what the user is told to do where this fails. Raises UserError for whatever the hub's client raises.
    """
    from datasets import load_dataset

    try:
        return load_dataset(*filter(None, (hub_id, config)))
    except Exception as error:  # the hub client raises a dozen types: offline, not found, gated, broken
        name = f"{hub_id} ({config})" if config else hub_id
        raise UserError(f"cannot fetch dataset {name} ({first_line(error)}); {remedy}") from None
