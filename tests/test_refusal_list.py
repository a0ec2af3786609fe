"""The embedded list of refusals."""

import difflib
from itertools import combinations
from pathlib import Path

LIST = Path(__file__).resolve().parents[1] / "data" / "refusals.txt"


def test_refusals_are_a_hundred_plain_sentences():
    text = LIST.read_text(encoding="ascii")
    sentences = text.split("\n")
    assert sentences.pop() == ""  # one line break at the end
    assert len(sentences) == 100
    for sentence in sentences:
        assert sentence.isprintable() and sentence == " ".join(sentence.split())
        assert 3 <= len(sentence.split()) <= 15
        assert sentence[0].isupper() and sentence[-1] == "."


def test_no_refusal_says_nearly_the_same_as_another():
    """At most three quarters of the letters of any two are alike, in order."""
    sentences = LIST.read_text(encoding="ascii").lower().splitlines()
    matcher = difflib.SequenceMatcher(autojunk=False)
    for one, other in combinations(sentences, 2):
        matcher.set_seqs(one, other)
        assert matcher.quick_ratio() < 0.75 or matcher.ratio() < 0.75, (one, other)
