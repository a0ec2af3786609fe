"""WMDP (arXiv 2403.03218): questions that stand for hazardous knowledge. They are fetched from the hub, never copied.

SPUL's second version forgets WMDP-bio and retains SciQ.
"""

import numpy as np
import pandas as pd

from utils.data.known.sciq import sciq_tables
from utils.data.known.tables import CHOICE_COLUMNS, hub_tables, multiple_choice, without_equal_choices
from utils.errors import UserError

HUB_ID = "cais/wmdp"
PARTS = {"bio": "biology", "chem": "chemistry", "cyber": "cybersecurity"}
TRAIN_SHARE = 900 / 1273  # of WMDP-bio in SPUL v2: 900 rows are trained on, 373 tested
REMEDY = "get access to it on the hub, or fetch it into the hub's cache first"


def read_wmdp(wmdp_part: str = "bio", seed: int = 42) -> dict[str, pd.DataFrame]:
    """SPUL's second protocol as {split: DataFrame with columns question, choices, answer, subject}.

    wmdp_part: bio (1,273 rows), chem (408) or cyber (1,987). The hub has one split, test. train_forget are 900 of
    1,273 of its rows drawn by `seed`, test_forget the others, order kept; chem and cyber are divided in the same
    proportion. train_retain and test_retain are SciQ's 12,679 and 1,000 rows, from the hub (`sciq_tables`). Rows with
    two equal choices are left out of any split, with a note.

    Raises UserError for an unknown part, where the hub cannot be reached, and for rows that are no multiple choice.
    """
    if wmdp_part not in PARTS:
        raise UserError(f"WMDP has no part {wmdp_part!r}; choose one of {', '.join(PARTS)}")
    config = f"wmdp-{wmdp_part}"
    (rows,) = hub_tables(HUB_ID, ["test"], CHOICE_COLUMNS[:3], config, REMEDY)
    rows = multiple_choice(rows, f"test of {HUB_ID} ({config})").assign(subject=PARTS[wmdp_part])
    train = np.zeros(len(rows), dtype=bool)
    train[np.random.default_rng(seed).permutation(len(rows))[: round(TRAIN_SHARE * len(rows))]] = True
    retain = sciq_tables(None, seed)
    return {
        "train_retain": retain["train"],
        "train_forget": without_equal_choices(rows[train], f"{HUB_ID} ({config}, train)"),
        "test_retain": retain["test"],
        "test_forget": without_equal_choices(rows[~train], f"{HUB_ID} ({config}, test)"),
    }
