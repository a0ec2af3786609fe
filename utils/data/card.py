"""The data card of a folder: the front matter of its README.md, as the hub has it."""

from pathlib import Path

import yaml

from utils.errors import UserError, first_line
from utils.storage.reading import regular_file


def categories(folder: Path) -> list[str]:
    """The `task_categories` that the README.md in `folder` names; none without a card. Raises UserError on a card that
    cannot be read."""
    path = folder / "README.md"
    if not path.is_file():
        return []
    try:
        parts = regular_file(path).read_text(encoding="utf-8-sig").split("---\n", 2)
        if len(parts) < 3 or parts[0].strip():
            return []
        card = yaml.safe_load(parts[1])
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} has no readable front matter ({first_line(error)}); mend or remove it") from None
    named = card.get("task_categories", []) if isinstance(card, dict) else []
    listed = named if isinstance(named, list) else [named]
    return [name for name in listed if isinstance(name, str)]
