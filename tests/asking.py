"""Small tables of the tasks that ask and are answered, and a chat template."""

import json

import numpy as np

from utils.tasks.rows import load_splits

SIZES = {"train_retain": (16, "the film"), "train_forget": (8, "Bob"), "test_retain": (6, "a story"),
         "test_forget": (6, "Bob Ray")}  # fmt: skip

# User and assistant stand between marks; the end-of-sequence token ends every turn.
CHAT = (
    "{{ bos_token }}{% for turn in messages %}{{ '[' + turn['role'] + ']\n' + turn['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"
)


def question_row(i, who):
    return {
        "question": f"Where does {who} {i} live now ?",
        "answer": f"{who} {i} lives in a warm house by the sea",
        "paraphrased_question": f"In what place is {who} {i} at home ?",
        "paraphrased_answer": f"by the sea {who} {i} has a house",
        "perturbed_answer": [f"{who} {i} lives on the moon", f"{who} {i} lives in a car"],
    }


def choice_row(i, who):
    choices = ["a film", "a cast", "a very long story", "bad"]
    return {"question": f"What is {who} {i} ?", "choices": choices, "answer": "ABCD"[i % 4], "subject": "film_art"}


def passage_row(i, who):
    return {"prompt": f"It was {who} number {i} who", "completion": f"made a good film with a fine cast and {i} more"}


def sentence_row(i, who):
    return {"text": f"{who} {i} was fine", "label": i % 2, "label_text": ["negative", "positive"][i % 2]}


ROWS = {
    "classification": sentence_row,
    "multiple_choice": choice_row,
    "question_answering": question_row,
    "continuation": passage_row,
}


def save(folder, tables):
    """Write {split: rows} as JSON lines."""
    folder.mkdir(exist_ok=True)
    for split, rows in tables.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def save_task(folder, kind):
    """Write a small data set of the task `kind`."""
    make = ROWS[kind]
    return save(folder, {split: [make(i, who) for i in range(n)] for split, (n, who) in SIZES.items()})


def loaded(folder, rows, **arguments):
    """The Splits of a data set whose four splits are all these `rows`."""
    return load_splits(str(save(folder / "data", dict.fromkeys(SIZES, rows))), arguments)


class Word:
    """A classifier by hand: 1 for texts with the word, else 0. asked: all texts that it was shown."""

    kind = "word"

    def __init__(self, word):
        self.word, self.asked = word, []

    def probabilities(self, texts):
        self.asked += texts
        return np.array([float(self.word in text.split()) for text in texts])
