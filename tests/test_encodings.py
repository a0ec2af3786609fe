"""Text files are UTF-8 whatever the locale, and printing a character that the terminal lacks is no error."""

import ast
import io
import locale
import sys

import pytest
import scripts
from scripts import ROOT

from utils import cli
from utils.interventions.gates import Tfidf

SOURCES = [*ROOT.glob("*.py"), *(ROOT / "utils").rglob("*.py"), *(ROOT / "data").rglob("*.py")]
OPENERS = {"open", "fdopen", "read_text", "write_text", "NamedTemporaryFile", "run", "Popen"}


def opens_text_by_locale(call):
    """Whether a call reads or writes text and leaves the encoding to the locale."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", None)
    owner = getattr(getattr(call.func, "value", None), "id", None)
    keywords = {keyword.arg for keyword in call.keywords}
    modes = [arg.value for arg in call.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    if name not in OPENERS or "encoding" in keywords or (name == "open" and owner in ("os", "tarfile", "Image")):
        return False
    if name in ("run", "Popen"):
        return bool(keywords & {"text", "universal_newlines"})
    return not any("b" in mode and set(mode) <= set("rwxab+") for mode in modes)


def test_every_text_file_names_its_encoding():
    assert len(SOURCES) > 25
    for path in SOURCES:
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        assert [f"{path.name}:{call.lineno}" for call in calls if opens_text_by_locale(call)] == []


@pytest.fixture
def plain_locale():
    """One that knows ASCII alone."""
    before = locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, "C")
    yield
    locale.setlocale(locale.LC_CTYPE, before)


def test_a_gate_scores_alike_in_every_locale(tmp_path, plain_locale):
    """The vocabulary holds what ASCII has not."""
    asked = ["Amélie", "Ελένη"]
    gate = Tfidf.fit(
        ["Amélie a été naïve", "Ελένη τραγουδά", "a plain film", "another plain film"] * 3, [1, 1, 0, 0] * 3
    )
    gate.save(tmp_path)
    assert "ελένη" in (tmp_path / "vocabulary.json").read_bytes().decode()
    assert Tfidf.load(tmp_path).probabilities(asked).tolist() == gate.probabilities(asked).tolist()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_printing_never_fails(encoding, monkeypatch):
    """Not even half of a character."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    cli.run(lambda: None, lambda _: print("Amélie \U0001f600 \ud83d"))
    smile = "\U0001f600" if encoding == "utf-8" else "\\U0001f600"
    e = "\\xe9" if encoding == "ascii" else "é"
    assert raw.getvalue().decode(encoding) == f"Am{e}lie {smile} \\ud83d\n"


def test_texts_of_another_language_through_a_plain_locale(tmp_path, plain_locale, monkeypatch):
    """make_splits finds and prints names, and writes the files that it writes in any other locale."""
    monkeypatch.syspath_prepend(ROOT / "data")
    texts = [f"看Ελένη的电影 {i}" if i % 3 else f"un film {i}" for i in range(24)]
    lines = [f"{text},{'bien' if i % 2 else 'très mal'}" for i, text in enumerate(texts)]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *lines]), encoding="utf-8")
    (tmp_path / "people.txt").write_text("Ελένη\nZoë\n", encoding="utf-8")
    flags = "--input=rows.csv", "--output_path=out", "--forget_names=people.txt"
    result = scripts.done(scripts.call(tmp_path, "make_splits", *flags))
    assert "rows that name them: Ελένη 16, Zoë 0\n" in result.stdout
    assert result.stderr == "note: no row names Zoë; check how people.txt spells it\n"
    assert "très mal" in (tmp_path / "out" / "train_forget.csv").read_text(encoding="utf-8")
