"""Unlearning requests over one model: served together, added to a ledger and revoked without a trace."""

import json
import shutil

import pandas as pd
import pytest
import scripts
import several
import tiny
from scripts import call, done, manifest_of, metrics_of, refused

from utils.data.names import mentions, read_names
from utils.data.select import fingerprint
from utils.interventions import ledger
from utils.storage.checkpoints import weights_sha256
from utils.tasks.rows import load_rows

PEOPLE = {"niro": "Robert De Niro: De Niro", "grant": "Hugh Grant: Grant", "allen": "Woody Allen: Allen"}
GATE, STRENGTH = ("--eco_threshold=0.4", "--max_eval_samples=0"), ["--eco_strength=3"]
ONE = ["--eval_batch_size=1"]
FLAGS = *scripts.ROWS, "--overwrite", "--output_path=out"


@pytest.fixture(scope="module")
def place(tiny_model, tmp_path_factory):
    """A folder with a model, data about three people, and a checkpoint for each of them as a request."""
    folder = tmp_path_factory.mktemp("requests")
    shutil.copytree(tiny_model, folder / "model")
    (folder / "data").mkdir()
    for split, n in {"train_retain": 16, "train_forget": 7, "test_retain": 6, "test_forget": 3}.items():
        frame = pd.read_csv(tiny.SNIPPETS_FOLDER / f"{split}.csv")
        if split.endswith("forget"):
            frame = pd.concat([rows_about(frame, person, folder).head(n) for person in PEOPLE]).drop_duplicates("text")
        else:
            frame = frame.head(n)
        frame.to_csv(folder / "data" / f"{split}.csv", index=False)
    for person in PEOPLE:
        make(folder, person, "eco" if person == "allen" else "refusal")
    return folder


def rows_about(frame, person, folder):
    (folder / f"{person}.txt").write_text(PEOPLE[person])
    people = read_names(folder / f"{person}.txt")
    return frame[[bool(mentions(text, people)) for text in frame["text"]]]


def make(folder, person, method, *flags, model="model", name=None):
    flags = *(GATE if "--gate=niro" not in flags else GATE[1:]), *(STRENGTH if method == "eco" else []), *flags
    only = f"--forget_only={person}.txt", f"--output_path={name or person}"
    done(call(folder, "baselines", f"--model_checkpoints={model}", "--dataset=data", *scripts.ROWS,
              f"--unlearn_method={method}", *only, *flags))  # fmt: skip


def together(folder, *paths, flags=()):
    return call(folder, "inference_spul", "--model_checkpoints", *paths, "--together", *FLAGS, *flags)


def by_ledger(folder, *flags):
    return call(folder, "inference_spul", "--requests=requests.json", *flags)


def written(folder):
    return [json.loads(line) for line in (folder / "out" / "predictions.jsonl").read_text().splitlines()]


def predictions(folder, result):
    """(bytes, rows) of what the command wrote."""
    done(result)
    return (folder / "out" / "predictions.jsonl").read_bytes(), written(folder)


@pytest.fixture
def copy(place, tmp_path):
    """A copy of it that a test may change."""
    shutil.copytree(place, tmp_path / "copy", ignore=shutil.ignore_patterns("out", "requests.json"))
    return tmp_path / "copy"


def test_one_model_serves_all_and_the_order_does_not_matter(place):
    result = together(place, "niro", "grant", "allen")
    content, rows = predictions(place, result)
    (record,) = metrics_of(place / "out")
    assert record["method"] == "3 requests" and "| 3 requests |" in result.stdout
    assert {row["request"] for row in rows} == {"niro", "grant", "allen", None}
    assert all((row["request"] is not None) == row["flagged"] for row in rows)
    refusals = {row["prediction"] for row in rows if row["request"] in ("niro", "grant")}
    assert refusals == {"un"}  # the first token of "unknown"
    again, _ = predictions(place, together(place, "allen", "niro", "grant"))
    assert again == content
    (second,) = metrics_of(place / "out")
    unlike = {"seconds", "peak_memory_bytes"}
    assert {k: v for k, v in second.items() if k not in unlike} == {k: v for k, v in record.items() if k not in unlike}


def test_the_matrix_counts_which_request_acts_on_whose_rows(place):
    """Against the requests of the predictions on the same texts."""
    result = done(together(place, "niro", "grant", "allen"))
    (record,) = metrics_of(place / "out")
    said = {row["text"]: row["request"] for row in written(place)}
    about = record["requests"]
    assert about["names"] == sorted(PEOPLE)
    for person in PEOPLE:
        for split, own in about["interference"][person].items():
            texts = rows_about(pd.read_csv(place / "data" / f"{split}.csv"), person, place)["text"]
            acted = [said[text] for text in texts]
            assert own["n"] == len(texts)
            assert own["acts"] == {name: acted.count(name) / len(acted) for name in sorted(PEOPLE)}
            assert own["none"] == acted.count(None) / len(acted)
        files = [file for file in (place / person).rglob("*") if file.is_file()]
        assert about["bytes"][person] == sum(file.stat().st_size for file in files)
        assert about["seconds"][person] is about["rows"][person] is None
    own = about["interference"]["grant"]
    shares = " / ".join(f"{100 * own[split]['acts']['niro']:.1f}" for split in own)
    assert f"grant n={own['train_forget']['n']}/{own['test_forget']['n']}" in result.stdout and shares in result.stdout
    assert "(none)" in result.stdout


def test_a_request_changes_no_query_that_only_another_flags(place):
    """With one row a batch: in larger ones other rows stand beside it, which pads it differently."""
    alone, both = (
        predictions(place, together(place, *paths, flags=ONE))[1] for paths in (["allen"], ["allen", "niro"])
    )
    same = [(a, b) for a, b in zip(alone, both) if b["request"] != "niro"]
    assert 5 < len(same) < len(both)
    for a, b in same:
        unlike = {"method", "checkpoint", "gate_probability"} if b["request"] is None else {"method", "checkpoint"}
        assert {k: v for k, v in a.items() if k not in unlike} == {k: v for k, v in b.items() if k not in unlike}


def test_of_two_requests_behind_one_gate_the_lower_hash_acts(place):
    make(place, "niro", "eco", "--gate=niro", name="same-gate")
    lower = min(["niro", "same-gate"], key=lambda name: weights_sha256(place / name))
    for paths in (["niro", "same-gate"], ["same-gate", "niro"]):
        _, rows = predictions(place, together(place, *paths))
        assert {row["request"] for row in rows} == {lower, None}


def test_one_request_is_its_checkpoint(place):
    _, rows = predictions(place, together(place, "allen"))
    _, alone = predictions(place, call(place, "inference_spul", "--model_checkpoints=allen", *FLAGS))
    assert [row["loss"] for row in rows] == [row["loss"] for row in alone] and "request" not in alone[0]


def test_a_gated_prompt_is_a_request(place):
    """It acts as it does alone, and its training has a cost."""
    flags = "--gate=tfidf", *GATE, "--lr=1e-2", "--forget_only=grant.txt", "--output_path=prompt"
    done(scripts.spul(place, "model", "data", *flags))
    _, alone = predictions(place, call(place, "inference_spul", "--model_checkpoints=prompt", *FLAGS, *ONE))
    _, rows = predictions(place, together(place, "niro", "prompt", flags=ONE))
    losses = [(a["loss"], b["loss"]) for a, b in zip(alone, rows) if b["request"] == "prompt"]
    assert losses and all(a == b for a, b in losses)
    cost = manifest_of(place / "prompt")["training"]
    about = metrics_of(place / "out")[0]["requests"]
    assert about["rows"] == {"niro": None, "prompt": 8 * cost["steps"]}
    assert about["seconds"]["prompt"] == pytest.approx(cost["steps"] * cost["seconds_per_step"], abs=0.1)


def test_new_text_shows_which_request_acted(place):
    texts = [rows_about(pd.read_csv(place / "data" / "train_forget.csv"), "niro", place)["text"].iloc[0], "a film"]
    command = "--model_checkpoints", "niro", "grant", "--together", *scripts.ROWS, *(f"--text={text}" for text in texts)
    named = done(call(place, "inference_spul", *command, "--request_names", "B", "A"))
    assert ": flagged by B)" in named.stdout and "without requests" in named.stdout
    first, second = done(call(place, "inference_spul", *command, "--json")).stdout.splitlines()
    assert json.loads(first)["with requests"]["request"] == "niro"
    assert json.loads(first)["with requests"]["answer"] == "unknown"
    other = json.loads(second)
    assert other["with requests"]["request"] is None
    assert other["with requests"]["answer"] == other["without requests"]["answer"]


def test_adding_and_revoking_leaves_no_trace(copy):
    """Nor does the order in which the others came."""
    for name in ("niro", "allen"):
        done(by_ledger(copy, f"--add={name}={name}"))
    before, _ = predictions(copy, by_ledger(copy, *FLAGS))
    result = done(by_ledger(copy, "--add=grant=grant"))
    assert [line.split()[1:4:2] for line in result.stdout.splitlines()[2:]] == [
        ["niro", "active"], ["allen", "active"], ["grant", "active"],
    ]  # fmt: skip
    with_grant, rows = predictions(copy, by_ledger(copy, *FLAGS))
    assert with_grant != before and "grant" in {row["request"] for row in rows}
    assert "revoked" in done(by_ledger(copy, "--revoke=grant")).stdout
    after, _ = predictions(copy, by_ledger(copy, *FLAGS))
    assert after == before
    done(by_ledger(copy, "--revoke=niro"))
    done(by_ledger(copy, "--add=niro=niro"))
    again, _ = predictions(copy, by_ledger(copy, *FLAGS))
    assert again == before
    by_name, _ = predictions(copy, together(copy, "niro", "allen"))
    assert by_name == before
    assert "flagged by" in done(by_ledger(copy, "--text=De Niro is here", *scripts.ROWS)).stdout


def test_what_the_ledger_says(copy):
    (copy / "ledgers").mkdir()
    where = "--requests=ledgers/mine.json"
    done(call(copy, "inference_spul", where, "--add=Robert De Niro=niro"))
    file = copy / "ledgers" / "mine.json"
    found = json.loads(file.read_text())
    (entry,) = found["requests"]
    rows = load_rows({"dataset": str(copy / "data"), "forget_only": str(copy / "niro.txt")})
    expected = {"name": "Robert De Niro", "checkpoint": "../niro", "active": True, "revoked": None}
    assert expected.items() <= entry.items()
    assert entry["forget_fingerprint"] == fingerprint({"train_forget": rows["train_forget"]})
    assert found["model_sha256"] == [json.loads((copy / "niro" / "manifest.json").read_text())["parent"]["sha256"]]
    shutil.move(copy, copy.parent / "moved")  # the whole tree, ledger and checkpoints
    said = done(call(copy.parent / "moved" / "data", "inference_spul", "--requests=../ledgers/mine.json",
                     "--text=De Niro", *scripts.ROWS))  # fmt: skip
    assert "by Robert De Niro" in said.stdout


def test_rows_that_are_gone_are_left_out_with_a_note(copy):
    file = copy / "data" / "train_forget.csv"
    file.write_text(file.read_text().replace("Grant", "Someone"))
    result = done(by_ledger(copy, "--add=grant=grant"))
    assert "the rows that grant was trained on are not to be had" in result.stderr
    assert json.loads((copy / "requests.json").read_text())["requests"][0]["forget_fingerprint"] is None
    result = done(together(copy, "niro", "grant"))
    assert "the rows that grant was trained on are not to be had" in result.stderr
    assert list(metrics_of(copy / "out")[0]["requests"]["interference"]) == ["niro"]


@pytest.mark.long
def test_two_processes_serve_what_one_does(copy):
    main, second = several.call(copy, 2, "inference_spul", "--requests=requests.json", "--add=niro=niro")
    assert "niro" in done(main).stdout and (second.code, second.stdout) == (0, "")
    done(by_ledger(copy, "--add=allen=allen"))
    flags = *FLAGS, "--eval_batch_size=4"
    _, one = predictions(copy, by_ledger(copy, *flags))
    main, _ = several.call(copy, 2, "inference_spul", "--requests=requests.json", *flags)
    _, two = predictions(copy, main)
    assert [row["request"] for row in one] == [row["request"] for row in two]
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in two], rel=1e-5)


# Refusals.


@pytest.mark.parametrize("script", ["spul", "baselines"])
def test_what_stands_in_front_of_a_model_is_no_model_to_unlearn(place, script):
    method = ["--unlearn_method=npo"] if script == "baselines" else []
    refused(place, "niro already is a prompt", script, "--model_checkpoints=niro", "--dataset=data", *method)


@pytest.fixture(scope="module")
def others(place):
    """Beside the requests one on another model, and a checkpoint without a gate."""
    tiny.save(place / "second", "gpt2")
    make(place, "niro", "refusal", model="second", name="on-second")
    flags = "--unlearn_method=prompting", "--instruction=Say unknown.", "--max_eval_samples=0", "--output_path=ungated"
    done(call(place, "baselines", "--model_checkpoints=model", "--dataset=data", *scripts.ROWS, *flags))
    return place


@pytest.mark.parametrize(
    ("paths", "sentence"),
    [
        (["niro", "on-second"], "was made for another frozen model than"),
        (["niro", "ungated"], "ungated has no gate; requests are checkpoints that carry one"),
        (["niro", "model"], "model has no gate"),
        (["niro", "grant", "niro/../niro"], "are both called"),
        (["niro", "niro", "--request_names", "a", "b"], "are the same checkpoint; name it once"),
        (["niro", "grant", "--request_names", "a", "a"], "are both called 'a'; give them other names"),
        (["niro", "grant", "--request_names", "a"], "--request_names needs one name for each"),
        (["niro", "grant", "--request_names", "a=", "b"], "'a=' is no name of a request"),
        (["niro", "--router=allen"], "leave out --router"),
        (["niro", "--requests=x"], "leave out --model_checkpoints"),
        (["none"], "none is no existing folder"),
    ],
)
def test_what_cannot_be_served_together(others, paths, sentence):
    refused(others, sentence, "inference_spul", "--together", "--model_checkpoints", *paths, *scripts.ROWS)


def test_requests_of_several_datasets_need_one_to_be_named(copy):
    shutil.copytree(copy / "data", copy / "more")
    make(copy, "niro", "refusal", "--dataset=more", name="other")
    sentence = "were trained on data and more; name one of them with --dataset"
    refused(copy, sentence, "inference_spul", "--together", "--model_checkpoints", "grant", "other", *scripts.ROWS)
    done(together(copy, "grant", "other", flags=["--dataset=data"]))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--add=niro=grant"], "'niro' is active in requests.json already"),
        (["--add=grant=niro"], "'grant' stands for another checkpoint in requests.json"),
        (["--add=other=niro"], "are the same checkpoint"),
        (["--add=other=on-second"], "on-second was made for another frozen model than requests.json"),
        (["--add=other=ungated"], "ungated has no gate"),
        (["--add=other=none"], "none is no existing folder"),
        (["--add=niro"], "'niro' is not NAME=PATH"),
        (["--add=a|b=niro"], "'a|b' is no name of a request"),
        (["--revoke=nobody"], "requests.json has no request 'nobody'; it has niro, grant"),
        (["--revoke=grant"], "'grant' was revoked on"),
        (["--revoke=niro", "--add=a=allen"], "not allowed with argument"),
        (["--revoke=niro", "--text=a"], "--revoke only edits the ledger; leave out --text"),
        (["--add=a=allen", "--dataset=data"], "--add only edits the ledger; leave out --dataset"),
        (["--together"], "leave out --together"),
        (["--request_names", "a"], "--request_names goes with --together"),
        (["--output_path=.", "--overwrite"], "would replace"),
    ],
)
def test_what_a_ledger_refuses(others, flags, sentence):
    if not (others / "requests.json").exists():
        for edit in ("--add=niro=niro", "--add=grant=grant", "--revoke=grant"):
            done(by_ledger(others, edit))
    refused(others, sentence, "inference_spul", "--requests=requests.json", *flags)


def test_a_ledger_whose_checkpoint_changed(copy):
    done(by_ledger(copy, "--add=niro=niro"))
    file = copy / "niro" / "gate" / "gate.json"
    file.write_text(file.read_text().replace("0.4", "0.3"))
    manifest = json.loads((copy / "niro" / "manifest.json").read_text())
    manifest["files"]["gate/gate.json"] = scripts.tree(copy)["niro/gate/gate.json"]
    (copy / "niro" / "manifest.json").write_text(json.dumps(manifest))
    sentence = "niro is not what requests.json records for 'niro' (SHA-256 differs)"
    refused(copy, sentence, "inference_spul", "--requests=requests.json", *scripts.ROWS)
    refused(copy, sentence, "inference_spul", "--requests=requests.json", "--add=grant=grant")
    shutil.rmtree(copy / "niro")
    refused(copy, "niro is no existing folder", "inference_spul", "--requests=requests.json", "--text=a")
    done(by_ledger(copy, "--revoke=niro"))
    refused(copy, "has no active request; add one with --add", "inference_spul", "--requests=requests.json")


DAMAGES = {
    "version": lambda found: found | {"version": 2},
    "a field": lambda found: found | {"more": 1},
    "no request": lambda found: found | {"requests": []},
    "a name twice": lambda found: found | {"requests": found["requests"] * 2},
    "a date": lambda found: found | {"requests": [found["requests"][0] | {"date": "2026-13-01T00:00:00+00:00"}]},
    "active and revoked": lambda found: found | {"requests": [found["requests"][0] | {"active": False}]},
    "a hash": lambda found: found | {"requests": [found["requests"][0] | {"sha256": "0"}]},
    "a list": lambda found: [found],
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("flags", [["--text=a"], ["--revoke=niro"]])
def test_a_damaged_ledger(damage, flags, tmp_path):
    entry = {"name": "niro", "checkpoint": "niro", "sha256": "0" * 64, "date": "2026-01-01T00:00:00+00:00"}
    entry |= {"forget_fingerprint": None, "active": True, "revoked": None}
    found = {"version": ledger.VERSION, "model_sha256": ["1" * 64], "requests": [entry]}
    (tmp_path / "requests.json").write_text(json.dumps(DAMAGES[damage](found)))
    refused(tmp_path, "requests.json is no ledger of requests or is damaged", "inference_spul",
            "--requests=requests.json", *flags)  # fmt: skip


def test_flags_of_a_ledger_that_is_missing(tmp_path):
    missing = ["--requests=none.json"]
    refused(tmp_path, "--add goes with --requests", "inference_spul", "--add=a=b")
    refused(tmp_path, "cannot read none.json", "inference_spul", *missing, "--text=a")
    refused(
        tmp_path, "none.json has no request 'a'; it has none", "inference_spul", "--requests=none.json", "--revoke=a"
    )
