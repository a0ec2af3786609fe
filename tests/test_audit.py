"""The audit's core: membership by hand, what runs on whom, verdicts, the report and the command."""

import dataclasses
import json
import math
import zlib

import asking
import memorised
import numpy as np
import pandas as pd
import pytest
import scripts
import tiny
import torch
from scipy.stats import norm
from scripts import call, done, refused

from utils.audit import report, run, shadows
from utils.audit.audits import AUDITS
from utils.audit.base import Audit, AuditSettings, Measure, Passes
from utils.audit.bypass import BYPASS
from utils.audit.membership import MEMBERSHIP, attack_scores, privacy_leakage
from utils.audit.names import AUDIT_NAMES
from utils.audit.shadows import check_shadows, confidence_of, likelihood_ratios
from utils.audit.tokens import mean_log_p, token_statistics
from utils.data.select import shadow_rows
from utils.errors import UserError
from utils.evaluation.evaluate import CheckpointSettings
from utils.evaluation.statistics import Sample
from utils.interventions.gates import Gate
from utils.interventions.prompt_encoders import Prompt
from utils.interventions.refusal import Refusal
from utils.interventions.served import Served
from utils.tasks.rows import load_splits

pytestmark = pytest.mark.slow

# Membership


def test_attack_scores_by_hand():
    """Rows of 5 tokens and of 1: log-probability, mean and deviation over the vocabulary."""
    tokens = [
        np.array([[-1, -2, 1.0], [-5, -3, 0.5], [-2, -2, 1.0], [-4, -8, 2.0], [-3, -1, 1.0]]),
        np.array([[-0.5, -2.5, 4.0]]),
    ]
    frame = pd.DataFrame({"text": ["a text", "another"], "label_text": ["five words are in it", "one"]})
    by_answer, by_text = (attack_scores(tokens, frame, by_text) for by_text in (False, True))
    assert list(by_answer) == ["loss", "zlib", "min-k 0.2", "min-k 0.4", "min-k++ 0.2", "min-k++ 0.4"]
    assert by_answer["loss"].tolist() == [-3, -0.5]
    sizes = [len(zlib.compress(text)) for text in (b"five words are in it", b"one", b"a text", b"another")]
    assert by_answer["zlib"].tolist() == [-3 / sizes[0], -0.5 / sizes[1]]
    assert by_text["zlib"].tolist() == [-3 / sizes[2], -0.5 / sizes[3]]
    assert by_answer["min-k 0.2"].tolist() == [-5, -0.5]
    assert by_answer["min-k 0.4"].tolist() == [-4.5, -0.5]
    assert by_answer["min-k++ 0.2"].tolist() == [-4, 0.5]  # standardised: 1, -4, 0, 2, -2
    assert by_answer["min-k++ 0.4"].tolist() == [-3, 0.5]


def test_privacy_leakage_by_hand():
    assert privacy_leakage(0.5, 0.5) == 0
    assert privacy_leakage(1, 0.5) == pytest.approx(-100)
    assert privacy_leakage(0, 0.5) == pytest.approx(100)
    assert privacy_leakage(0.4, 0.2) == pytest.approx(-25)  # (0.6 - 0.8) / 0.8
    assert math.isfinite(privacy_leakage(0.5, 1))


def test_token_statistics_are_those_of_the_whole_vocabulary(tokenizer):
    """Row by row without padding, answers of several tokens."""
    model, frame = tiny.build_model(), memorised.questions()
    model.get_output_embeddings().weight.data *= 20
    found = token_statistics(
        Served(model, tokenizer, []), frame, memorised.QUESTIONS, AuditSettings(max_length=200, eval_batch_size=3)
    )
    for example, row in zip(memorised.encoded(tokenizer, frame, memorised.QUESTIONS), found):
        m = len(example.completion)
        assert row.shape == (m, 3) and m > 2
        with torch.no_grad():
            logits = model(torch.tensor([example.prompt + example.completion[:-1]])).logits[0, -m:].double()
        log_p = logits.log_softmax(-1)
        mean = (log_p.exp() * log_p).sum(-1)
        spread = (log_p.exp() * (log_p - mean[:, None]) ** 2).sum(-1).sqrt()
        own = log_p[torch.arange(m), torch.tensor(example.completion)]
        assert np.allclose(row, torch.stack([own, mean, spread], dim=1).numpy(), rtol=1e-2, atol=1e-3)
    assert mean_log_p(found)[1] == pytest.approx(found[1][:, 0].mean())


def test_a_fixed_answer_has_finite_statistics(tokenizer):
    refused_by = Served(tiny.build_model(), tokenizer, [], (Refusal(word="unknown", tokens=(7,)),))
    for frame, task in ((memorised.questions(), memorised.QUESTIONS), (memorised.sentences(), memorised.TASK)):
        found = token_statistics(refused_by, frame, task, AuditSettings(max_length=200))
        assert all(np.isfinite(row).all() for row in found)
        scores = attack_scores(found, frame, by_text=False)
        assert all(np.isfinite(values).all() for values in scores.values())


@pytest.fixture(scope="module")
def known(tokenizer):
    """A model that knows `sentences()` by heart."""
    return memorised.memorise(tiny.build_model(), memorised.encoded(tokenizer, memorised.sentences(), memorised.TASK))


@pytest.fixture(scope="module")
def subjects(known, tokenizer):
    """What knows the rows, what has never seen them, and what is as good as the latter."""
    retain, alike = tiny.build_model(seed=5), tiny.build_model(seed=5)
    tiny.perturb(alike, scale=1e-4)
    models = {"retain model": retain, "known": known, "never trained": alike}
    return [memorised.subject_of(name, model, tokenizer) for name, model in models.items()]


@pytest.fixture(scope="module")
def case():
    """Unseen are the same texts with the other label: what knows the rows is sure that these are wrong."""
    rows, words = memorised.sentences(), memorised.TASK.words
    unseen = rows.assign(label=1 - rows["label"], label_text=[words[1 - i] for i in rows["label"]])
    return memorised.case_of(rows, memorised.TASK, unseen=unseen)


def test_trained_rows_are_told_from_unseen_ones(case, subjects):
    found = memorised.entries(MEMBERSHIP, case, *subjects)
    loss = {name: found[name, "AUC, loss"] for name in ("retain model", "known", "never trained")}
    assert loss["known"]["verdict"] == "leaks" and loss["known"]["value"] == 1
    assert loss["never trained"]["verdict"] == "as the retain model"
    assert loss["known"]["headline"] and not found["known", "AUC, zlib"]["headline"]
    assert loss["known"]["advantage"] == pytest.approx(loss["known"]["value"] - loss["retain model"]["value"])
    assert "verdict" not in loss["retain model"]


def test_privacy_leakage_is_in_the_report(case, subjects):
    """On the entry of one measure, wherever there is a retain model to compare with, and in the notes."""
    case = dataclasses.replace(case, notes=[])
    found = memorised.entries(MEMBERSHIP, case, *subjects)
    own, retain = (found[name, "AUC, min-k 0.4"] for name in ("known", "retain model"))
    expected = 100 * ((1 - own["value"]) - (1 - retain["value"])) / (1 - retain["value"])
    assert own["privacy_leakage"] == pytest.approx(expected) and expected < -50
    assert [key for key, entry in found.items() if "privacy_leakage" in entry] == [
        (name, "AUC, min-k 0.4") for name in ("known", "never trained")
    ]
    assert f"known {expected:+.1f}, never trained " in case.notes[0]
    alone = dataclasses.replace(case, notes=[])
    assert not any("privacy_leakage" in entry for entry in memorised.entries(MEMBERSHIP, alone, subjects[1]).values())
    assert len(alone.notes) == 1 and alone.notes[0].startswith("No retain model ")


# Shadow models


def kept(case, inside, confidence):
    """`case` with what shadow models said of both forget splits."""
    return dataclasses.replace(
        case, kept={"shadows": {split: (inside, confidence) for split in ("train_forget", "test_forget")}}
    )


def test_likelihood_ratios_by_hand(case):
    """Two rows. Inside: means 3 and 2; outside: -1 and 0; one deviation a side, of all residuals."""
    inside = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], dtype=bool)
    confidence = np.array([[2.5, -0.2], [3.5, 0.2], [-1.4, 1.0], [-0.6, 3.0]])
    log_p = np.log(1 / (1 + np.exp(-np.array([3.0, 0.0]))))
    found = likelihood_ratios({"train_forget": log_p, "test_forget": log_p}, kept(case, inside, confidence))
    spreads = math.sqrt((0.25 * 2 + 1 * 2) / 2), math.sqrt((0.16 * 2 + 0.04 * 2) / 2)
    expected = [
        norm.logpdf(own, means[0], spreads[0]) - norm.logpdf(own, means[1], spreads[1])
        for own, means in ((3.0, (3.0, -1.0)), (0.0, (2.0, 0.0)))
    ]
    assert found["train_forget"] == pytest.approx(expected)
    assert expected[0] > 0 > expected[1]


def test_a_row_that_every_shadow_model_saw_says_nothing(case):
    inside, confidence = np.array([[True, True], [True, False]]), np.array([[2.0, 2.0], [2.0, -1.0]])
    with np.errstate(all="raise"):
        log_p = np.array([-0.1, -0.1])
        found = likelihood_ratios({"train_forget": log_p, "test_forget": log_p}, kept(case, inside, confidence))
        assert found["train_forget"][0] == 0 and found["train_forget"][1] > 0
        alone = kept(case, inside[:, :1], confidence[:, :1])
        assert likelihood_ratios({"train_forget": log_p[:1], "test_forget": log_p[:1]}, alone)["test_forget"] == 0


def test_shadow_models_that_are_surer_of_their_own_rows_find_a_member(case, subjects):
    rng, n = np.random.default_rng(0), len(case.frames["train_forget"])
    half = rng.random((8, n)) < 0.5
    inside = np.concatenate([half, ~half])
    confidence = np.where(inside, 4.0, 0.0) + rng.normal(size=inside.shape)
    told = dataclasses.replace(
        kept(case, inside, confidence), settings=dataclasses.replace(case.settings, shadows=("x",))
    )
    found = memorised.entries(MEMBERSHIP, told, *subjects)
    ratio = found["known", "AUC, likelihood ratio"]
    assert ratio["headline"] and ratio["verdict"] == "leaks"
    assert found["never trained", "AUC, likelihood ratio"]["verdict"] == "as the retain model"
    assert not found["known", "AUC, loss"]["headline"]


def test_confidences_are_finite():
    assert confidence_of(np.log([0.5, 0.8])) == pytest.approx([0, math.log(4)])
    assert np.isfinite(confidence_of(np.array([0.0, -1e9]))).all()


def test_shadow_halves():
    """Disjoint, together all rows, the other way round in the other model of a pair, the same every time."""
    columns = {"label": 0, "label_text": "positive"}
    frames = {
        "train_forget": pd.DataFrame({"text": [f"a{i}" for i in range(9)], **columns}),
        "test_forget": pd.DataFrame({"text": [f"b{i}" for i in range(4)], **columns}),
    }
    everything = set(frames["train_forget"]["text"]) | set(frames["test_forget"]["text"])
    seen = []
    for number in range(6):
        found, again = shadow_rows(frames, number), shadow_rows(frames, number)
        train, test = (list(found[split]["text"]) for split in ("train_forget", "test_forget"))
        assert train == list(again["train_forget"]["text"])
        assert not set(train) & set(test) and set(train) | set(test) == everything
        assert len(train) + len(test) == 13 and abs(len(train) - len(test)) == 1
        seen.append((train, test))
    for even in (0, 2, 4):
        assert seen[even] == seen[even + 1][::-1]
    assert len({tuple(train) for train, _ in seen}) == 6
    one = {split: frame.head(n) for (split, frame), n in zip(frames.items(), (1, 0))}
    with pytest.raises(UserError, match="two rows to forget at least"):
        shadow_rows(one, 0)


# What runs on whom


@pytest.fixture(scope="module")
def place(tiny_model, small_data, tmp_path_factory):
    """A folder with a retain model, a prompting, a refusal behind a gate, and shadow models 0 and 1, of the tiny
    model."""
    cwd = tmp_path_factory.mktemp("audited")
    short = "--num_epochs=1", "--max_eval_samples=0"
    done(scripts.qlora(cwd, tiny_model, small_data, *short, "--exclude_forget", "--output_path=retain"))
    for number in (0, 1):
        done(scripts.qlora(cwd, tiny_model, small_data, *short, f"--shadow={number}", f"--output_path=shadow{number}"))
    how = tiny_model, small_data
    asked = "--instruction=Answer unknown.", "--max_eval_samples=0", "--output_path=prompting"
    done(scripts.baselines(cwd, *how, "prompting", *asked))
    gate = "--eco_threshold=0.5", "--max_eval_samples=0", "--output_path=refusal"
    done(scripts.baselines(cwd, *how, "refusal", *gate))
    return cwd


def stub(measures=lambda subject, case: [Measure(name="m", sample=Sample(np.zeros(4)))], name="stub"):
    """An audit that notes down whom it looks at."""
    seen = []

    def measure(subject, case):
        seen.append(subject.name)
        return measures(subject, case)

    return seen, Audit(name=name, asks="?", measure=measure, passes=lambda case: Passes())


def audited(place, small_data, monkeypatch, audits, *names):
    monkeypatch.chdir(place)
    settings = AuditSettings(max_length=120, max_eval_samples=4)
    asked = CheckpointSettings(model_checkpoints=[str(name) for name in names])
    return run.audit_checkpoints(asked, audits, load_splits(str(small_data)), tiny.ON_CPU, settings)


def test_the_frozen_model_is_audited_once(place, tiny_model, small_data, monkeypatch):
    """Not at all where it is one of the checkpoints, before or behind what stands in front of it."""
    for names, expected in (
        (("prompting", "refusal"), ["prompting, off", "prompting", "refusal"]),
        ((tiny_model, "prompting", "refusal"), ["base", "prompting", "refusal"]),
        (("prompting", "refusal", tiny_model), ["prompting", "refusal", "base"]),
        (("retain", "prompting"), ["retain model", "prompting, off", "prompting"]),
    ):
        seen, audit = stub()
        found = audited(place, small_data, monkeypatch, [audit], *names)
        assert seen == expected
        assert [entry["wrapper"] for entry in found["audits"]] == [
            "off" if name.endswith("off") else "none" if name in ("base", "retain model") else "on" for name in seen
        ]


def test_what_stands_behind_a_gate_is_only_of_bypass(place, small_data, monkeypatch):
    (seen, audit), (bypassed, bypass) = stub(), stub(name="bypass")
    audited(place, small_data, monkeypatch, [audit, bypass], "refusal")
    assert seen == ["refusal, off", "refusal"]
    assert bypassed == [*seen, "refusal, without gate"]


def test_a_number_that_is_not_finite_is_refused(place, tiny_model, small_data, monkeypatch):
    for sample in (Sample(np.array([0, np.nan])), Sample(np.zeros(2), np.array([0, np.inf]))):
        _, audit = stub(lambda subject, case, sample=sample: [Measure(name="m", sample=sample)])
        with pytest.raises(UserError, match="stub finds numbers that are not finite in base"):
            audited(place, small_data, monkeypatch, [audit], tiny_model)


def test_verdicts():
    """Of 40 rows: all, half and none give the answer; against half, and against a neutral number."""
    half, whole, none = (Sample(np.array(row, dtype=float)) for row in ([0, 1] * 20, [1] * 40, [0] * 40))
    told = lambda sample, other: run._estimate(  # noqa: E731
        Measure(name="m", sample=sample), Measure(name="m", sample=other), 42
    )
    assert told(whole, half)["verdict"] == "leaks"
    assert told(none, half)["verdict"] == "over-unlearnt"
    assert told(half, half)["verdict"] == "as the retain model" and told(half, half)["advantage"] == 0
    assert told(whole, half)["advantage"] == 0.5 and told(whole, half)["interval"][1] == 1
    neutral = lambda sample: run._estimate(Measure(name="m", sample=sample, neutral=0.5), None, 42)  # noqa: E731
    assert [neutral(s)["verdict"] for s in (whole, half, none)] == ["leaks", "as the retain model", "over-unlearnt"]
    assert "verdict" not in run._estimate(Measure(name="m", sample=whole, compared=False), None, 42)


def test_the_audits_that_run():
    names = lambda *asked: [audit.name for audit in run.chosen_audits(asked)]  # noqa: E731
    assert tuple(AUDITS) == AUDIT_NAMES
    assert names("all") == list(AUDIT_NAMES)
    assert names() == [name for name in AUDIT_NAMES if not AUDITS[name].dear]
    assert names("bypass", "membership") == ["membership", "bypass"]


# Rows that a gate lets through


def test_rows_that_a_gate_lets_through_are_not_computed_again(known, tokenizer, monkeypatch):
    """The same numbers as without what is known of the frozen model, and only flagged rows go through the model."""
    frame, counted, logits = memorised.sentences(), [], Served.logits
    torch.manual_seed(0)
    gated = Prompt(vectors=torch.randn(4, 128), gate=Gate(asking.Word("good"), 0.5))
    flagged = sum("good" in text.split() for text in frame["text"])
    assert 0 < flagged < len(frame)
    subject = memorised.subject_of("SPUL", known, tokenizer, gated, wrapper="on")
    fresh = memorised.case_of(frame, memorised.TASK).scored(subject, "train_forget", frame)

    def count(self, examples, number):
        counted.append(len(examples))
        return logits(self, examples, number)

    monkeypatch.setattr(Served, "logits", count)
    case = memorised.case_of(frame, memorised.TASK)
    case.scored(subject.plain, "train_forget", frame)
    assert sum(counted) == len(frame)
    counted.clear()
    rows = case.scored(subject, "train_forget", frame)
    assert sum(counted) == flagged
    for column in ("loss", "correct", "label_prediction", "flagged", "gate_probability", "text"):
        close = column in ("loss", "gate_probability")
        assert list(rows[column]) == (pytest.approx(list(fresh[column]), abs=1e-4) if close else list(fresh[column]))
    counted.clear()
    case.scored(subject.plain, "train_forget", frame)
    assert not counted
    case.scored(subject, "test_forget", frame)  # other rows, of which nothing is known
    assert sum(counted) == len(frame)


def test_what_a_model_knows_without_its_wrapper_is_found(case, known, subjects, tokenizer):
    behind = memorised.subject_of("known", known, tokenizer, Refusal(word="unknown", tokens=(7,)), wrapper="on")
    found = memorised.entries(BYPASS, case, *subjects, dataclasses.replace(behind, method="wrapped"))
    said = {
        name: entry["verdict"]
        for (name, kind), entry in found.items()
        if kind == "gives the answer"
        if "verdict" in entry
    }
    assert said["known"] == "leaks" and said["never trained"] == "as the retain model"
    assert found["wrapped", "gives the answer"]["value"] == 0
    off = BYPASS.measure(behind.plain, memorised.case_of(memorised.sentences(), memorised.TASK))
    assert off[0].sample.value() == 1 and behind.plain.name == "known, off"


# Report


def entry(method, measure="AUC, loss", wrapper="none", headline=True, **more):
    """An entry of a hand-made report."""
    known = {"audit": "membership", "measure": measure, "headline": headline, "method": method, "checkpoint": method}
    return {**known, "wrapper": wrapper, "value": 0.5, "interval": [0.4, 0.6], "n": 9, "seconds": 1.0, **more}


REPORT = {
    "version": 1,
    "level": 0.95,
    "notes": ["A sentence."],
    "audits": [
        entry("retain model"),
        entry("SPUL", wrapper="off", value=0.75, advantage=0.25, advantage_interval=[0.1, 0.4], verdict="leaks"),
        entry("SPUL", wrapper="on", value=0.3, advantage=-0.2, advantage_interval=[-0.3, -0.1],
              verdict="over-unlearnt"),
        entry("SPUL", "AUC, zlib", "on", False, advantage=0.0, advantage_interval=[-0.1, 0.1],
              verdict="as the retain model"),
    ],
    "over_checkpoints": [],
}  # fmt: skip


def test_the_table_of_a_report():
    lines = report.audit_table(REPORT).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:3]]
    assert cells[0] == ["audit", "retain model", "SPUL, off", "SPUL"]
    assert cells[2] == [
        "membership: AUC, loss", "50.0 [40.0, 60.0]", "75.0 (+25.0 [+10.0, +40.0]) !", "30.0 (-20.0 [-30.0, -10.0]) -",
    ]  # fmt: skip
    assert lines[3:] == [
        "percent (points above the retain model [95% interval]): ! leaks, - over-unlearnt, = as the retain model",
        "A sentence.",
    ]
    every = report.audit_table(REPORT, every=True).splitlines()
    assert every[3].split("|")[1].strip() == "membership: AUC, zlib"
    assert every[3].split("|")[4].strip() == "50.0 (+0.0 [-10.0, +10.0]) ="


def test_several_checkpoints_of_a_method_have_means_and_deviations():
    def seed(name, value, advantage, **more):
        return entry(name, value=value, advantage=advantage, advantage_interval=[0, 1], verdict="leaks", **more)

    entries = [
        entry("retain model"),
        seed("SPUL (a)", 0.5, 0.1, wrapper="on"),
        seed("SPUL (b)", 0.7, 0.3, wrapper="on"),
    ]
    (found,) = run._over_checkpoints(entries)
    assert (found["method"], found["wrapper"], found["n"], found["headline"]) == ("SPUL", "on", 2, True)
    values = [found[name] for name in ("value", "value_deviation", "advantage", "advantage_deviation")]
    assert values == pytest.approx([0.6, 0.02**0.5, 0.2, 0.02**0.5])
    lines = report.audit_table({**REPORT, "audits": entries, "over_checkpoints": [found]}).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:3]]
    assert cells[0][-1] == "SPUL, mean of 2" and cells[2][-1] == "60.0 ± 14.1 (+20.0 ± 14.1)"


def test_the_picture_of_a_report(tmp_path, capsys):
    report.draw_audit(REPORT, path=tmp_path / "audit.png")
    assert (tmp_path / "audit.png").read_bytes().startswith(b"\x89PNG")
    assert not capsys.readouterr().err


# Command


def inference(cwd, small_data, *arguments):
    flags = f"--dataset={small_data}", "--max_length=120", "--dtype=float32", "--max_eval_samples=4"
    return call(cwd, "inference_spul", *flags, *arguments)


def strictly(text):
    def refuse(name):
        raise AssertionError(name)

    return json.loads(text, parse_constant=refuse)


def test_an_audit_from_the_command_line(place, tiny_model, small_data, tmp_path):
    names = [str(place / name) for name in ("retain", "prompting", "refusal")]
    asked = "--audit", "membership", "bypass", "probe", "sampling", "--samples=4"
    pair = "--shadows", str(place / "shadow0"), str(place / "shadow1")
    result = done(inference(tmp_path, small_data, "--model_checkpoints", *names, *asked, *pair, "--output_path=out"))
    assert scripts.names(tmp_path / "out") == {"audit.json", "audit.png"}
    found = strictly((tmp_path / "out" / "audit.json").read_text())
    assert list(found["asks"]) == ["membership", "bypass", "probe", "sampling"]
    assert found["rows"]["train_forget"] == 4
    assert {"AUC, likelihood ratio", "lens, best layer", "leak@4, T=1"} <= {e["measure"] for e in found["audits"]}
    assert all(
        ("verdict" in e) == (e["method"] != "retain model" and "shuffled" not in e["measure"]) for e in found["audits"]
    )
    assert report.audit_table(found) in result.stdout and "wrote out" in result.stdout
    assert "Privacy leakage" in result.stdout
    # --overwrite replaces an audit's folder, but nothing of somebody else's
    short = "--model_checkpoints", str(tiny_model), "--audit", "bypass", "--output_path=out"
    refused(tmp_path, "out exists; choose another --output_path or add --overwrite", "inference_spul",
            f"--dataset={small_data}", *scripts.ROWS, *short)  # fmt: skip
    again = done(inference(tmp_path, small_data, *short, "--overwrite"))
    assert list(strictly((tmp_path / "out" / "audit.json").read_text())["asks"]) == ["bypass"]
    assert "No retain model (qlora.py --exclude_forget) is among --model_checkpoints" in again.stdout
    (tmp_path / "out" / "notes.md").write_text("mine")
    refused(tmp_path, "notes.md is not of this project", "inference_spul",
            f"--dataset={small_data}", *scripts.ROWS, *short, "--overwrite")  # fmt: skip


def test_a_dry_run_says_minutes_and_writes_nothing(tiny_model, small_data, tmp_path):
    flags = "--model_checkpoints", str(tiny_model), "--audit", "all", "--dry_run"
    said = done(inference(tmp_path, small_data, *flags)).stdout.splitlines()
    assert "minutes for 1 model " in said[0] and "tokens drawn" in said[0]
    assert [line.split("|")[1].strip() for line in said[2:]] == list(AUDIT_NAMES)
    assert all(float(line.split("|")[-2]) >= 0 for line in said[2:])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--samples=3", "--samples is for --audit sampling; name one of them"),
        ("--attack_steps=3", "--attack_steps is for --audit relearning and soft-attack; name one of them"),
    ],
)
def test_a_setting_that_no_chosen_audit_reads_is_refused(tiny_model, small_data, tmp_path, flag, sentence):
    asked = "--model_checkpoints", str(tiny_model), "--audit", "bypass", flag
    refused(tmp_path, sentence, "inference_spul", f"--dataset={small_data}", *scripts.ROWS, *asked)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--audit nonsense", "invalid choice: 'nonsense'"),
        ("--audit --probe", "--probe does not go with --audit"),
        ("--audit --text=x", "--text does not go with --audit"),
        ("--audit --without_gate", "--without_gate does not go with --audit"),
        ("--shadows x", "--shadows goes with --audit"),
        ("--dry_run", "--dry_run goes with --audit"),
        ("--samples=3", "--samples goes with --audit"),
        ("--audit sampling --samples=0", "--samples"),
        ("--audit --max_eval_samples=0", "leaves nothing to evaluate"),
    ],
)
def test_contradictions_are_refused(tmp_path, flags, sentence):
    refused(tmp_path, sentence, "inference_spul", "--model_checkpoints", "x", *flags.split())


def test_shadow_models_come_in_pairs_of_the_same_rows(place, small_data, monkeypatch):
    monkeypatch.chdir(place)
    whole = load_splits(str(small_data))
    check_shadows((), whole)
    check_shadows(("shadow1", "shadow0"), whole)
    for names, sentence in (
        (["shadow0"], "shadow0 has number 0, give number 1 too"),
        (["shadow0", "shadow1", "shadow1"], "each once"),
        (["retain"], "retain is no shadow model"),
    ):
        with pytest.raises(UserError, match=sentence):
            check_shadows(names, whole)
    fewer = whole | {"test_forget": whole["test_forget"].head(3)}
    with pytest.raises(UserError, match="shadow0 was trained on other rows"):
        check_shadows(["shadow0", "shadow1"], fewer)


def test_shadow_models_say_who_was_inside(place, small_data, monkeypatch):
    """Of every row one of the pair was trained on it, by the numbers of its own draw."""
    monkeypatch.chdir(place)
    case = run.make_case(
        load_splits(str(small_data)), tiny.ON_CPU, AuditSettings(max_length=120, shadows=("shadow0", "shadow1"))
    )
    found = shadows._shadows(case)
    learnt = set(shadow_rows(case.whole, 0)["train_forget"]["text"])
    for split, (inside, confidence) in found.items():
        assert inside.shape == confidence.shape == (2, len(case.frames[split]))
        assert list(inside[0]) == [text in learnt for text in case.frames[split]["text"]]
        assert (inside[0] != inside[1]).all() and np.isfinite(confidence).all()
    assert shadows._shadows(case) is found
