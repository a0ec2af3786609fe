"""SPUL behind a gate: the step is that of the whole objective, and inference serves prompt and gate as one."""

import dataclasses
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import scripts
import tiny
import torch
from scripts import call, done, manifest_of, metrics_of, numbers, refused, stop_at, tree

from utils.data.batch import collate
from utils.data.splits import TRAIN_SPLITS
from utils.errors import UserError
from utils.evaluation.frozen import Frozen
from utils.evaluation.run import EvaluationSettings, evaluate_splits
from utils.interventions import gate_files, gates
from utils.interventions.gate_files import SEEN
from utils.interventions.prompt_encoders import EncoderSettings, build_encoder
from utils.interventions.served import load_served
from utils.models.forward import completion_hidden, completion_logits, prompt_prefix
from utils.storage.checkpoints import file_sha256, gate_sha256
from utils.tasks.classification import classification, label_words
from utils.tasks.rows import load_splits
from utils.unlearning import behind, gate_training, losses, objectives
from utils.unlearning.reference import Reference

# 16 rows to keep and 8 to forget hardly differ: half may be flagged.
GATE = ("--gate=tfidf", "--eco_max_fpr=0.5")
ALPHA, BETA = 0.5, 0.25


def spul(cwd, parent, data, *flags):
    return scripts.spul(cwd, parent, data, "--lr=1e-2", *flags)


def inference(cwd, *checkpoints, flags=()):
    return call(cwd, "inference_spul", "--model_checkpoints", *checkpoints, *scripts.ROWS, *flags)


def predictions_of(folder):
    return pd.read_json(folder / "predictions.jsonl", lines=True)


@pytest.fixture(scope="module")
def gated(fine_tuned, small_data):
    """A prompt behind a gate, beside its parent."""
    done(spul(fine_tuned.parent, fine_tuned, small_data, *GATE, "--output_path=gated"))
    return fine_tuned.parent / "gated"


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """A gate that says of the training rows what the test says."""

    unseen: dict
    description = {"threshold": 0.5}
    link = None


def probabilities(n_retain, n_forget, retain, forget):
    """Of rows with these numbers .9, of the others .1."""
    rows = {"train_retain": (n_retain, retain), "train_forget": (n_forget, forget)}
    return {split: np.where(np.isin(np.arange(n), flagged), 0.9, 0.1) for split, (n, flagged) in rows.items()}


@pytest.mark.parametrize(("retain", "forget"), [([1, 5, 14], [0, 1, 2, 4, 7]), ([2], list(range(8))), ([], [3])])
def test_a_full_step_is_that_of_the_whole_objective(fine_tuned, small_data, retain, forget):
    """Every row computed one by one as it is served, with the frozen model where the gate lets it through."""
    frames, served = load_splits(str(small_data)), load_served(str(fine_tuned), tiny.ON_CPU)
    settings = EvaluationSettings(max_length=96, eval_batch_size=5)
    frozen = Frozen()
    evaluate_splits(served, frames, frames.task, settings, "before", frozen)
    unseen = probabilities(16, 8, retain, [])
    unseen["train_forget"][forget] = SEEN  # the others were held out, and it flags none of them
    source = Source(unseen)
    rows = behind.training_rows(served, frames, settings, source, frozen)
    assert len(rows.examples) == len(retain) + len(forget)
    torch.manual_seed(0)
    encoder = build_encoder(served, EncoderSettings(ptuning_num_tokens=4, ptuning_hidden_size=16))
    reference = Reference(*hidden_states(served, rows.examples[: len(retain)]))
    terms = rows.examples, served.pad_id, reference, ALPHA, BETA, rows.shares
    objective = objectives.PromptTuning(served.model, encoder, *terms)
    halves = [rows for rows in np.array_split(np.arange(len(rows.examples)), 2) if len(rows)]  # two micro-batches
    parts = {}
    for half in halves:
        loss, found = objective(half.tolist(), len(forget), len(retain))
        loss.backward()
        for name, value in {"loss": loss, **found}.items():
            parts[name] = parts.get(name, 0.0) + float(value.detach())
    ours = [p.grad.clone() for p in encoder.parameters()]

    encoder.zero_grad()
    kept, dropped = objectives.prompt_rows(served.tokenizer, frames, 96, 42)
    whole = {"L_f": 0.0, "L_r": 0.0, "L_kl": 0.0}
    for examples, flagged, name in ((dropped, forget, "L_f"), (kept, retain, "L_r")):
        for i, example in enumerate(examples):
            plain = answered(served.model, example)
            now = answered(served.model, example, encoder()) if i in flagged else plain
            whole[name] += losses.token_nll(now, torch.tensor(example.completion)).sum() / len(examples)
            if name == "L_r":
                whole["L_kl"] += losses.token_kl(plain.detach(), now).sum() / len(examples)
    whole["loss"] = whole["L_f"] + ALPHA * whole["L_r"] + BETA * whole["L_kl"]
    whole["loss"].backward()
    assert parts == pytest.approx({name: float(value.detach()) for name, value in whole.items()}, rel=1e-4, abs=1e-6)
    theirs = [p.grad for p in encoder.parameters()]
    scale = max(float(g.abs().max()) for g in theirs)
    assert scale > 1e-4
    for mine, other in zip(ours, theirs):
        assert torch.allclose(mine, other, rtol=1e-3, atol=1e-5 * scale)


def answered(model, example, vectors=None):
    prefix = None if vectors is None else prompt_prefix(model, vectors)
    return completion_logits(model, collate([example], 0, "cpu"), prefix)


def hidden_states(served, examples):
    sizes = {i: len(example.completion) for i, example in enumerate(examples)}
    if not examples:
        return torch.zeros(0, tiny.SIZES["hidden_size"]), sizes
    with torch.no_grad():
        return completion_hidden(served.model, collate(examples, served.pad_id, "cpu")), sizes


def test_weights_are_shares_of_the_rows_that_count():
    """A row to keep that the classifier was fitted to says nothing about what it flags; one to forget is trained on."""
    unseen = probabilities(10, 4, [1, 2], [0])
    unseen["train_retain"][:2] = SEEN
    unseen["train_forget"][3] = SEEN
    found = behind.flagged(Source(unseen))
    assert found.shares == losses.Shares(forget=2 / 4, retain=1 / 8)
    assert np.flatnonzero(found.flags["train_retain"]).tolist() == [2]
    assert np.flatnonzero(found.flags["train_forget"]).tolist() == [0, 3]


def test_a_cross_fitted_gate_knows_every_row_to_forget():
    """Whatever the folds said: the classifier that is kept was fitted to all of them. Of rows to keep they decide."""
    found = behind.flagged(Source(probabilities(10, 4, [1, 2], [0])))
    assert found.shares == losses.Shares(forget=1.0, retain=2 / 10)
    assert found.flags["train_forget"].all()
    assert np.flatnonzero(found.flags["train_retain"]).tolist() == [1, 2]


def test_a_gate_that_keeps_nothing_apart_is_refused():
    with pytest.raises(UserError, match="flags no row to forget"):
        behind.flagged(Source(probabilities(4, 4, [1], [])))
    with pytest.raises(UserError, match="flags every row to keep"):
        behind.flagged(Source(probabilities(4, 4, range(4), [1])))


def test_prompt_and_gate_are_served_as_one(gated, fine_tuned, tmp_path):
    """Rows that the gate lets through are answered as before, and the manifest names the gate by its hash."""
    manifest = manifest_of(gated)
    assert manifest["gate"] == {"sha256": gate_sha256(gated)}
    assert {"gate/gate.json", "gate/classifier.safetensors", "gate/unseen.safetensors"} <= set(manifest["files"])
    done(inference(tmp_path, gated, flags=["--output_path=out"]))
    done(inference(tmp_path, fine_tuned, flags=["--output_path=before"]))
    (record,), rows, before = (
        metrics_of(tmp_path / "out"),
        predictions_of(tmp_path / "out"),
        predictions_of(tmp_path / "before"),
    )
    assert record["method"] == "SPUL behind a gate" and record["splits"]["train_forget"]["flagged"] > 0
    through = ~rows["flagged"]
    assert 0 < through.sum() < len(rows)
    assert rows["loss"][through].tolist() == pytest.approx(before["loss"][through].tolist(), rel=1e-4)
    assert (rows["loss"] - before["loss"])[~through].abs().max() > 1
    then = metrics_of(gated)
    assert [entry["method"] for entry in then] == ["merged", "SPUL behind a gate"]
    for split, scores in record["splits"].items():
        assert numbers(scores) == pytest.approx(numbers(then[-1]["splits"][split]), rel=1e-4)


def test_the_frozen_model_answers_once(gated, fine_tuned, small_data):
    """What was scored before the prompt was learnt is taken where it does not act, and nothing else is computed."""
    frames, served = load_splits(str(small_data)), load_served(str(gated), tiny.ON_CPU, max_length=96)
    settings, words = EvaluationSettings(max_length=96, eval_batch_size=4), label_words(frames)
    frozen = Frozen()
    evaluate_splits(served.plain, frames, classification(words), settings, "before", frozen)
    splits, rows = evaluate_splits(served, frames, classification(words), settings, "all")
    marked = Frozen({split: [row | {"loss": -1.0} for row in rows] for split, rows in frozen.rows.items()})
    again, reused = evaluate_splits(served, frames, classification(words), settings, "some", marked)
    assert (reused["loss"] == -1).tolist() == (~rows["flagged"]).tolist()
    assert reused["prediction"].tolist() == rows["prediction"].tolist()
    assert all(again[s]["flagged"] == splits[s]["flagged"] for s in load_splits(str(small_data)))


def test_the_bare_prompt_is_shown_beside_the_gated_one(gated, fine_tuned, tmp_path):
    """Behind the fine-tuned model in one command, the rows that the gate lets through are those of that model."""
    names = ["fine-tuned", "SPUL behind a gate", "SPUL behind a gate without gate"]
    done(inference(tmp_path, fine_tuned, gated, flags=["--without_gate", "--output_path=out"]))
    assert [record["method"] for record in metrics_of(tmp_path / "out")] == names
    rows = predictions_of(tmp_path / "out")
    plain, served, bare = (rows[rows["method"] == name].reset_index() for name in names)
    through = ~served["flagged"].astype(bool)
    assert served["loss"][through].tolist() == plain["loss"][through].tolist()  # taken over
    assert (bare["loss"] - served["loss"])[through].abs().max() > 1e-3
    assert bare["loss"][~through].tolist() == pytest.approx(served["loss"][~through].tolist(), rel=1e-3, abs=1e-5)
    done(inference(tmp_path, gated, flags=["--output_path=alone"]))
    alone = predictions_of(tmp_path / "alone")
    assert alone["loss"].tolist() == pytest.approx(served["loss"].tolist(), rel=1e-3, abs=1e-5)
    told = json.loads(done(inference(tmp_path, gated, flags=["--without_gate", "--text=a film", "--json"])).stdout)
    assert list(told) == ["text", "without prompt", "with prompt", "without gate"]
    none = "none of --model_checkpoints has one"
    refused(tmp_path, none, "inference_spul", "--model_checkpoints", fine_tuned, "--without_gate")


def test_a_gate_is_trained_once_and_taken_by_others(fine_tuned, small_data, tmp_path):
    """The same gate in front of a prompt, a refusal and ECO; by its threshold's flag it is the one made on the spot."""
    gate = "--eco_max_fpr=0.5", "--output_path=gate"
    done(scripts.baselines(tmp_path, fine_tuned, small_data, "gate", *gate))
    done(spul(tmp_path, fine_tuned, small_data, "--gate=gate", "--output_path=taken", "--max_eval_samples=4"))
    done(spul(tmp_path, fine_tuned, small_data, *GATE, "--output_path=made", "--max_eval_samples=4"))
    taken, made = tree(tmp_path / "taken"), tree(tmp_path / "made")
    assert taken["adapter_model.safetensors"] == made["adapter_model.safetensors"]
    assert taken["gate"] == made["gate"] and taken["gate/gate.json"] == made["gate/gate.json"]
    done(scripts.baselines(tmp_path, fine_tuned, small_data, "refusal", "--gate=gate", "--output_path=refusal"))
    eco = "--gate=taken", "--eco_strength=3", "--output_path=eco"
    done(scripts.baselines(tmp_path, fine_tuned, small_data, "eco", *eco))
    hashes = {manifest_of(tmp_path / name)["gate"]["sha256"] for name in ("gate", "taken", "made", "refusal", "eco")}
    assert len(hashes) == 1

    result = done(inference(tmp_path, fine_tuned, "gate", "refusal", flags=["--output_path=out"]))
    assert "retain rows flagged, % (train/test)" in result.stdout
    assert not (tmp_path / "out/false_positives.png").exists()  # of one gate there is nothing to draw
    wide = "--eco_threshold=0", "--output_path=wide", "--max_eval_samples=0"
    done(scripts.baselines(tmp_path, fine_tuned, small_data, "gate", *wide))
    done(inference(tmp_path, "gate", "wide", flags=["--output_path=drawn"]))
    assert (tmp_path / "drawn/false_positives.png").read_bytes().startswith(b"\x89PNG")
    rows = predictions_of(tmp_path / "out")
    plain, gate, refusal = (rows[rows["method"] == m].reset_index() for m in ("fine-tuned", "gate", "refusal"))
    assert gate["loss"].tolist() == pytest.approx(plain["loss"].tolist(), rel=1e-4)  # it only says what it flags
    flagged = refusal["flagged"].astype(bool)
    assert flagged.tolist() == gate["flagged"].astype(bool).tolist() and 0 < flagged.sum() < len(rows)
    assert set(refusal["prediction"][flagged]) == {"un"}  # one token is looked at where every label has one
    assert not refusal["correct"][flagged].any()
    assert refusal["prediction"][~flagged].tolist() == plain["prediction"][~flagged].tolist()
    assert refusal["label_prediction"][flagged].nunique() == 1  # nothing is left to rank
    assert refusal["label_mass"][flagged].max() < 1e-9
    told = done(inference(tmp_path, "refusal", flags=["--text=" + refusal["text"][flagged].iloc[0], "--json"])).stdout
    assert json.loads(told)["with refusal"]["answer"] == "unknown"


def test_a_refusal_of_several_tokens(fine_tuned, small_data, tmp_path):
    """`unknown` may be several tokens, and label words too."""
    frames = load_splits(str(small_data))
    for split, frame in frames.items():
        words = frame["label_text"].map({"positive": "a very good film", "negative": "a very bad film"})
        (tmp_path / "data").mkdir(exist_ok=True)
        frame.assign(label_text=words).to_csv(tmp_path / "data" / f"{split}.csv", index=False)
    flags = "--eco_threshold=0", "--output_path=refusal"
    done(scripts.baselines(tmp_path, fine_tuned, tmp_path / "data", "refusal", *flags))
    done(inference(tmp_path, "refusal", flags=["--output_path=out"]))
    rows = predictions_of(tmp_path / "out")
    assert set(rows["prediction"]) == {"unknown"} and not rows["correct"].any()
    assert np.isfinite(rows["loss"]).all() and rows["loss"].min() > 10


@pytest.mark.parametrize("flags", [[], ["--forget_per_batch=3"]])
def test_a_gate_without_a_mistake_leaves_rows_to_forget_alone(fine_tuned, small_data, tmp_path, flags):
    """Then there is nothing to compare with the frozen model."""
    (tmp_path / "data").mkdir()
    for split, frame in load_splits(str(small_data)).items():
        name = " zebra zebra" if split.endswith("forget") else ""
        frame.assign(text=frame["text"] + name).to_csv(tmp_path / "data" / f"{split}.csv", index=False)
    gate = "--gate=tfidf", "--eco_threshold=0.5", "--output_path=out", *flags
    result = done(spul(tmp_path, fine_tuned, tmp_path / "data", *gate))
    assert "the gate leaves 0 of 16 rows to keep and 8 of 8 to forget" in result.stdout
    losses = [json.loads(line) for line in (tmp_path / "out/training.jsonl").read_text().splitlines()]
    before = metrics_of(tmp_path / "out")[0]["splits"]["train_retain"]
    assert all(line["L_r"] == pytest.approx(before["loss"]) for line in losses)  # all of it is a constant
    assert metrics_of(tmp_path / "out")[1]["splits"]["train_retain"]["loss"] == before["loss"]


@pytest.mark.long
def test_dry_run_says_how_many_rows_are_left(fine_tuned, small_data, tmp_path):
    for kind in ("plan", "probe"):
        result = done(spul(tmp_path, fine_tuned, small_data, *GATE, f"--dry_run={kind}"))
        left = next(line for line in result.stdout.splitlines() if line.startswith("the gate leaves"))
        kept, forget = int(left.split()[3]), int(left.split()[10])
        assert left == f"the gate leaves {kept} of 16 rows to keep and {forget} of 8 to forget"
        if kind == "plan":
            assert f"rows     {kept + forget}: {kept} to keep, {forget} to forget" in result.stdout
    assert tree(tmp_path) == {}
    assert kept < 16
    refused(tmp_path, "use --dry_run=probe", *command(fine_tuned, small_data, "--gate=features", "--dry_run"))
    features = "--gate=features", "--dry_run=probe", "--eco_max_fpr=0.5"
    assert "the gate leaves" in done(spul(tmp_path, fine_tuned, small_data, *features)).stdout


def command(parent, data, *flags):
    return "spul", f"--model_checkpoints={parent}", f"--dataset={data}", *scripts.SPUL, *flags


@pytest.mark.parametrize(
    ("sentence", "flags"),
    {
        "--eco_max_fpr goes with --gate": ["--eco_max_fpr=0.5"],
        "is trained already; leave out --eco_threshold": ["--gate=./gated", "--eco_threshold=0.2"],
        "leave it out with --gate": ["--gate=tfidf", "--retain_ratio=2"],
        "./nothing does not exist": ["--gate=./nothing"],
        "has no gate; --gate takes": ["--gate=./fine-tuned"],
        "was trained on other data than the rows selected here": ["--gate=./gated", "--forget_size=0.5"],
        "flags every row to keep": ["--gate=tfidf", "--eco_threshold=0"],
        "flags no row to forget": ["--gate=tfidf", "--eco_threshold=0.999"],
        "needs at least 99 retain rows": ["--gate=tfidf"],
    }.items(),
)
def test_what_cannot_be_trained(gated, fine_tuned, small_data, sentence, flags):
    refused(fine_tuned.parent, sentence, *command(fine_tuned, small_data, *flags, "--output_path=new"))


def test_a_model_with_a_folder_called_gate_has_none(fine_tuned, tiny_model, small_data, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model/gate").mkdir()
    sentence = "has no gate; --gate takes"
    refused(tmp_path, sentence, *command(fine_tuned, small_data, "--gate=./model", "--output_path=new"))


def test_a_gate_that_is_trained_already_needs_no_names(gated, fine_tuned, small_data):
    parent = f"--model_checkpoints={fine_tuned}", f"--dataset={small_data}", *scripts.BASELINES
    flags = "--unlearn_method=refusal", "--gate=./gated", "--eco_names=names.txt", "--output_path=new"
    refused(fine_tuned.parent, "so nothing needs --eco_names", "baselines", *parent, *flags)


def test_a_run_does_not_go_on_behind_another_gate(fine_tuned, small_data, tmp_path):
    for name, rate in (("gate", 0.5), ("other", 0.6)):
        flags = f"--eco_max_fpr={rate}", f"--output_path={name}", "--max_eval_samples=0"
        done(scripts.baselines(tmp_path, fine_tuned, small_data, "gate", *flags))
    run = command(fine_tuned, small_data, "--gate=gate", "--output_path=out", "--save_steps=1", "--max_eval_samples=0")
    run = *run, "--beta=0"
    stop_at(tmp_path, 2, *run)
    shutil.rmtree(tmp_path / "gate")
    shutil.move(tmp_path / "other", tmp_path / "gate")
    refused(tmp_path, "was saved with model=", *run, "--resume")


def test_an_altered_gate_is_refused(gated, fine_tuned, tmp_path):
    for folder in (gated, fine_tuned, fine_tuned.parent / "tiny-llama"):
        shutil.copytree(folder, tmp_path / folder.name)
    file = tmp_path / "gated/gate/gate.json"
    file.write_text(file.read_text().replace('"threshold": 0.', '"threshold": 0.9'))
    refused(tmp_path, "is not the file its manifest names", "inference_spul", "--model_checkpoints", "gated")
    shutil.rmtree(tmp_path / "gated/gate")
    refused(tmp_path, "has lost its file gate/", "inference_spul", "--model_checkpoints", "gated")


def test_an_eco_checkpoint_of_an_earlier_version(fine_tuned, small_data, tmp_path):
    """There the gate lay among the other files, and eco.json described it."""
    flags = "--eco_max_fpr=0.5", "--eco_strength=3", "--output_path=eco"
    done(scripts.baselines(tmp_path, fine_tuned, small_data, "eco", *flags))
    done(inference(tmp_path, "eco", flags=["--output_path=now"]))
    eco, gate = tmp_path / "eco", tmp_path / "eco/gate"
    known = json.loads((eco / "eco.json").read_text()) | json.loads((gate / "gate.json").read_text())
    (eco / "eco.json").write_text(json.dumps(known))
    for name in ("classifier.safetensors", "vocabulary.json"):
        shutil.move(gate / name, eco / name)
    shutil.rmtree(gate)
    manifest = manifest_of(eco)
    del manifest["gate"]
    names = ["eco.json", "classifier.safetensors", "vocabulary.json"]
    manifest["files"] = {name: file_sha256(eco / name) for name in names}
    (eco / "manifest.json").write_text(json.dumps(manifest))
    done(inference(tmp_path, "eco", flags=["--output_path=then"]))
    now, then = predictions_of(tmp_path / "now"), predictions_of(tmp_path / "then")
    assert now["gate_probability"].tolist() == then["gate_probability"].tolist()
    assert now["loss"].tolist() == then["loss"].tolist()
    sentence = "is of an earlier version; train it again"
    refused(tmp_path, sentence, *command(fine_tuned, small_data, "--gate=./eco", "--output_path=new"))


def test_forget_rows_that_the_gate_misses_add_what_the_frozen_model_gives(fine_tuned, small_data):
    """By hand: the shares of a gate that flags half of both kinds."""
    shares = losses.Shares(forget=0.5, retain=0.25, forget_constant=1.0, retain_constant=0.1)
    parts = {"L_f": torch.tensor(2.0), "L_r": torch.tensor(4.0), "L_kl": torch.tensor(8.0)}
    loss, found = losses.behind_gate(parts, shares, 0.5, 3.0, 10.0)
    assert {name: float(value) for name, value in found.items()} == pytest.approx(
        {"L_f": 0.5 * 2 + 0.5 * 1.0, "L_r": 0.25 * 4 + 0.5 * 0.1, "L_kl": 0.25 * 8}
    )
    assert float(loss) == pytest.approx(1.5 + 3 * 1.05 + 10 * 2.0)
    hidden, found = losses.behind_gate(parts | {"L_hide": torch.tensor(6.0)}, shares, 0.5, 3.0, 10.0, 7.0)
    assert float(hidden - loss) == pytest.approx(7 * 0.5 * 6) and float(found["L_hide"]) == pytest.approx(3.0)


def test_unseen_scores_come_back_as_they_were(tmp_path, small_data, tiny_model):
    frames, served = load_splits(str(small_data)), load_served(str(tiny_model), tiny.ON_CPU)
    classifier = gates.ClassifierSettings(max_length=96)
    for conformal in (None, 0.3):
        settings = gate_training.GateSettings(eco_conformal=conformal, eco_max_fpr=0.3)
        made = gate_training.train_gate(None, frames, [], settings, classifier)
        folder = tmp_path / str(conformal)
        folder.mkdir()
        gate_files.save(made.gate(served), made.description, made.unseen, folder)
        link = dataclasses.make_dataclass("L", ["path", "name", "kind"])(folder, "x", "gate")
        stored = gate_files.StoredGate(link, {split: len(frames[split]) for split in TRAIN_SPLITS}, False, 96)
        for split in TRAIN_SPLITS:
            assert np.array_equal(stored.unseen[split], made.unseen[split])
            assert ((stored.unseen[split] == SEEN).mean() > 0.5) == (conformal is not None)
        assert stored.gate(served).threshold == made.description["threshold"]
