"""Classification of a text: the published template, the label words, and the words that unlearning teaches."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from utils.data.splits import TRAIN_SPLITS, UNLEARNING_LABELS

TEMPLATE_HEAD = "### Text: "
TEMPLATE_TAIL = "\n\n### Question: What is the sentiment of the given text?\n\n### Sentiment:"


def label_words(frames: Mapping[str, pd.DataFrame]) -> list[str]:
    """The answers that count as in-label, ordered by label number."""
    pairs = pd.concat([frames[split][["label", "label_text"]] for split in TRAIN_SPLITS]).drop_duplicates()
    return list(pairs.sort_values("label")["label_text"])


def draw_unlearning_labels(n: int, seed: int) -> list[str]:
    """y~ of L_f: n words drawn once, uniformly from {neutral, unknown}, by `seed`."""
    return [UNLEARNING_LABELS[i] for i in np.random.default_rng(seed).integers(len(UNLEARNING_LABELS), size=n)]
