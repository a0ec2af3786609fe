"""Output folders: one writer, nothing of the user's removed, nothing left behind, whatever kills a run."""

import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
from argparse import Namespace

import pytest
import scripts
from scripts import call, done, refused, tree

from utils.errors import UserError, note_once
from utils.evaluation import figures, tables
from utils.evaluation.record import method_names
from utils.storage import checkpoints, files, outputs

pytestmark = pytest.mark.slow

FORK = multiprocessing.get_context("fork")
RESULT = '[{"method": "SPUL", "checkpoint": "a", "splits": {}}]'


def write(path, content="new", overwrite=True):
    """What a script does with its output folder."""
    with outputs.claim([path], Namespace(overwrite=overwrite, resume=True)) as output, output.new_folder() as folder:
        (folder / "metrics.json").write_text(RESULT)
        (folder / "predictions.jsonl").write_text(content)


def killed(function, *arguments):
    """Run the function in a process that kills itself, without any clean-up, where it calls `die`."""
    process = FORK.Process(target=function, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def content(path):
    return (path / "predictions.jsonl").read_text()


def test_a_new_folder_replaces_the_old_one_whole(tmp_path):
    write(tmp_path / "a" / "out", "one")
    write(tmp_path / "a" / "out", "two")
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"out"}
    assert content(tmp_path / "a" / "out") == "two"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_write_leaves_what_was_there(tmp_path, error):
    write(tmp_path / "out", "one")
    before = tree(tmp_path)
    for path in (tmp_path / "out", tmp_path / "new" / "below"):
        with pytest.raises(error), outputs.claim([path], Namespace(overwrite=True)) as out, out.new_folder() as folder:
            (folder / "file").write_text("half")
            raise error
    assert tree(tmp_path) == before


def test_an_output_has_one_writer(tmp_path):
    """By whatever name, and again once the first is done."""
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with outputs.claim([tmp_path / "out"], Namespace()):
        for name in ("out", "link", "a/../out"):
            with pytest.raises(UserError, match=rf"another run \(process {os.getpid()} on .*\) is writing .*{name}"):
                write(tmp_path / name)
    write(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "link"}


def hold_and_die(path):
    with outputs.claim([path], Namespace()) as output, output.new_folder() as folder:
        (folder / ".tmpKjh3").write_text("a library's own temporary file")
        die()


def test_a_claim_dies_with_its_process_and_the_next_start_removes_what_it_left(tmp_path):
    killed(hold_and_die, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [files.workplace_of(tmp_path / "out")]
    killed(hold_and_die, tmp_path / "other")  # and another output's start too
    assert list(tmp_path.iterdir()) == [files.workplace_of(tmp_path / "other")]
    write(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def replace_and_die(path, renames):
    """Killed before the last of so many renames."""
    rename, left = os.rename, iter(range(renames - 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rename", lambda *names: die() if next(left, None) is None else rename(*names))
        write(path, "two")


CALLS = "mkdir", "open", "pwrite", "truncate", "chmod", "rename", "replace", "unlink", "rmdir"


def replace_and_count(path, last=None):
    """How many calls of the system a replacement makes; killed before the call number `last`."""
    count = 0

    def counted(call):
        def counting(*arguments, **options):
            nonlocal count
            if count == last:
                die()
            count += 1
            return call(*arguments, **options)

        return counting

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, counted(getattr(os, name)))
        write(path, "two")
    return count


def prepared(folder):
    """An output in `folder`, with the state of a later run."""
    write(folder / "out", "one")
    outputs.state_path(folder / "out").write_text("state")
    return folder / "out"


def test_a_kill_at_any_moment_leaves_the_old_output_with_its_state_or_the_new_one(tmp_path):
    """After the next start, that is, and nothing else."""
    outcomes = []
    for last in range(replace_and_count(prepared(tmp_path / "counted"))):
        path = prepared(tmp_path / str(last))
        process = FORK.Process(target=replace_and_count, args=(path, last))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        with pytest.raises(UserError, match="out exists"):  # the next start, which is refused
            write(path, overwrite=False)
        names = {file.name for file in path.parent.iterdir()}
        assert {file.name for file in path.iterdir()} == {"metrics.json", "predictions.jsonl"}
        outcomes.append((content(path), names))
    old, new = ("one", {"out", "out.training.safetensors"}), ("two", {"out"})
    first = outcomes.index(new)
    assert outcomes == [old] * first + [new] * (len(outcomes) - first) and first > 5


def test_what_a_kill_moved_aside_is_never_deleted_for_something_new_there(tmp_path):
    write(tmp_path / "out", "one")
    killed(replace_and_die, tmp_path / "out", 2)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="now that exists again; move one away"):
        write(tmp_path / "out")
    files.sweep(tmp_path / "out")
    (tmp_path / "out").rmdir()
    files.recover(tmp_path / "out")
    assert content(tmp_path / "out") == "one"


def test_live_workplaces_and_those_of_others_are_left_alone(tmp_path):
    (tmp_path / f"{files.PREFIX}notes").mkdir()
    (tmp_path / f"{files.PREFIX}notes" / files.MARK).write_text('{"target": "out"}')
    with files.workplace(tmp_path / "out") as place:
        before = tree(tmp_path)
        files.sweep(tmp_path / "out")
        assert tree(tmp_path) == before and place.is_dir()


def test_a_users_folder_of_that_name_is_no_workplace(tmp_path):
    place = files.workplace_of(tmp_path / "out")
    place.mkdir()
    (place / "mine").write_text("mine")
    with pytest.raises(UserError, match="is in the way and not of this project; move it"):
        write(tmp_path / "out")
    assert tree(tmp_path) == {place.name: None, f"{place.name}/mine": tree(place)["mine"]}


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    note_once.cache_clear()
    monkeypatch.setattr(fcntl, "flock", refuse)
    write(tmp_path / "out")
    assert "knows no locks" in capsys.readouterr().err


@pytest.fixture
def place(tiny_model, fine_tuned, small_data, tmp_path):
    """A folder to stand in, with links to model, adapter and data."""
    for source in (tiny_model, fine_tuned, small_data):
        (tmp_path / source.name).symlink_to(source)
    return tmp_path


SPUL = "--model_checkpoints=fine-tuned", "--dataset=data", *scripts.SPUL, "--max_steps=1", "--max_eval_samples=0"
QLORA = "--model_name=tiny-llama", "--dataset=data", *scripts.QLORA, "--max_steps=1", "--max_eval_samples=0"
INFERENCE = "--model_checkpoints=fine-tuned", "--dataset=data", *scripts.ROWS, "--max_eval_samples=2"
COMMANDS = {"spul": SPUL, "qlora": QLORA, "inference_spul": INFERENCE}


@pytest.mark.parametrize("script", COMMANDS)
def test_the_loser_of_two_runs_says_so(place, script):
    with outputs.claim([place / "out"], Namespace()):
        refused(place, " is writing out; wait for it or", script, *COMMANDS[script], "--output_path=out")


def test_nothing_of_the_users_beside_an_output_is_touched(place):
    """Under any name that one might give to something temporary or old."""
    for name in ("out.old", "out.tmp", "out.training.tmp"):
        (place / name).mkdir()
        (place / name / "mine").write_text("mine")
    (place / "out.bak").write_text("mine")
    before = tree(place)
    for _ in range(2):
        done(call(place, "spul", *SPUL, "--beta=0", "--output_path=out", "--overwrite"))
    after = tree(place)
    assert {name: after.get(name) for name in before} == before


@pytest.mark.parametrize("script", COMMANDS)
@pytest.mark.parametrize(
    ("files_there", "sentence"),
    [
        ({"metrics.json": "[]"}, "is no folder that this project wrote"),
        ({"metrics.json": RESULT}, "is no folder that this project wrote"),
        ({"manifest.json": '{"name": "app"}', "app.js": ""}, "is no folder that this project wrote"),
        ({"source.json": "{}"}, "is no folder that this project wrote"),
        ({"metrics.json": RESULT, "predictions.jsonl": "", "notes.txt": "mine"}, "notes.txt is not of this project"),
        ({"metrics.json": RESULT, "predictions.jsonl": "", "a/b.txt": "mine"}, "a/b.txt is not of this project"),
    ],
)
def test_overwrite_deletes_nothing_of_the_users(place, script, files_there, sentence):
    for name, text in files_there.items():
        (place / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "out" / name).write_text(text)
    refused(place, sentence, script, *COMMANDS[script], "--output_path=out", "--overwrite")


def test_what_a_user_puts_into_a_checkpoint_survives_overwrite(place):
    done(call(place, "spul", *SPUL, "--beta=0", "--output_path=out"))
    (place / "out" / "notes.md").write_text("mine")
    refused(place, "notes.md is not of this project", "spul", *SPUL, "--output_path=out", "--overwrite")


def test_a_link_does_not_hide_what_the_run_reads(place, fine_tuned):
    before = tree(fine_tuned)
    (place / "link").symlink_to(fine_tuned)
    refused(place, "--output_path=link would replace ", "spul", *SPUL, "--output_path=link", "--overwrite")
    assert tree(fine_tuned) == before


def test_an_output_behind_a_link_is_written_there_and_the_link_stays(place):
    (place / "disk").mkdir()
    (place / "out").symlink_to(place / "disk" / "prompt")
    for _ in range(2):
        done(call(place, "spul", *SPUL, "--beta=0", "--output_path=out", "--overwrite"))
    assert (place / "out").is_symlink() and (place / "disk" / "prompt" / "manifest.json").is_file()
    assert {path.name for path in (place / "disk").iterdir()} == {"prompt"}


def test_the_folder_one_stands_in_is_no_output(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    with pytest.raises(UserError, match="is a mount point or where you are"):
        write(".")


def test_an_empty_folder_of_the_users_can_be_the_output_and_keeps_its_rights(tmp_path):
    (tmp_path / "out").mkdir(mode=0o700)
    write(tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("name", ["out", "link"])
def test_a_file_is_never_replaced(tmp_path, name):
    (tmp_path / "out").write_text("mine")
    (tmp_path / "link").symlink_to("out")
    with pytest.raises(UserError, match=f"{name} is a file; choose another --output_path"):
        write(tmp_path / name)


@pytest.mark.parametrize("flags", [[], ["--dry_run"]])
@pytest.mark.parametrize(
    ("script", "more"),
    [
        ("spul", ["--output_path=/proc/out"]),
        ("qlora", ["--output_path=/proc/out"]),
        ("spul", ["--output_path=out", "--logits_path=/proc/reference"]),
        ("spul", ["--output_path=out", "--logits_path=file/reference"]),
    ],
)
def test_every_place_is_tried_before_any_work(place, script, more, flags):
    (place / "file").write_text("mine")
    result = refused(place, "cannot write to ", script, *COMMANDS[script], *more, *flags)
    assert "reference:" not in result.stderr and result.stdout == ""


def test_the_default_place_of_a_reference_is_tried_too(place):
    (place / "saved_logits").symlink_to("/proc")
    result = refused(place, "cannot write to ", "spul", *SPUL, "--output_path=out")
    assert "reference:" not in result.stderr


def test_results_that_cannot_be_written_are_not_computed(place):
    result = refused(place, "cannot write to ", "inference_spul", *INFERENCE, "--output_path=/proc/out")
    assert "fine-tuned:" not in result.stderr


def test_a_dry_run_leaves_nothing_behind(place):
    before = tree(place)
    done(call(place, "spul", *SPUL, "--dry_run"))
    assert tree(place) == before


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_every_file_has_the_rights_of_umask(place, mask):
    before = os.umask(mask)
    try:
        done(call(place, "spul", *SPUL, "--output_path=out", "--save_steps=1"))
    finally:
        os.umask(before)
    written = [*(place / "out").iterdir(), *(place / "saved_logits").iterdir()]
    assert {oct(path.stat().st_mode & 0o777) for path in written} == {oct(0o666 & ~mask)}


def test_runs_of_one_second_and_of_other_seeds_have_folders_of_their_own(place, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda *_: "now")
    done(call(place, "spul", *SPUL, "--beta=0"))
    done(call(place, "spul", *SPUL, "--beta=0", "--lr=1"))
    with outputs.claim([place / "unlearn_checkpoints" / "spul_tiny-llama_data-1.0-seed7_now"], Namespace()):
        done(call(place, "spul", *SPUL, "--beta=0", "--seed=7"))
    stem = "spul_tiny-llama_data-1.0"
    expected = {f"{stem}_now", f"{stem}_now_2", f"{stem}-seed7_now_2"}
    assert {path.name for path in (place / "unlearn_checkpoints").iterdir()} == expected
    done(call(place, "qlora", *QLORA))
    done(call(place, "qlora", *QLORA, "--seed=7"))
    expected = {"tiny-llama-qlora-data", "tiny-llama-qlora-data-seed7"}
    assert {path.name for path in (place / "qlora_checkpoints").iterdir()} == expected


NAME = "a$x^'b\"_{ $ %d [1]"


def test_a_picture_draws_any_name_and_the_chain_takes_it(place, fine_tuned):
    shutil.copytree(fine_tuned, place / NAME)
    shutil.copytree(fine_tuned, place / f"{NAME}2")
    result = done(call(place, "inference_spul", "--model_checkpoints", NAME, f"{NAME}2", *INFERENCE[1:]))
    (folder,) = (place / "saved_results").iterdir()
    assert {path.name for path in folder.iterdir()} == {"metrics.json", "predictions.jsonl", "comparison.png"}
    assert f"({NAME})" in result.stdout


def test_a_picture_that_fails_is_a_note_and_costs_no_result(place, monkeypatch):
    def fail(*_, **__):
        raise ValueError("no such font\nat all")

    note_once.cache_clear()
    monkeypatch.setattr(figures.pyplot, "subplots", fail)
    for script, command in COMMANDS.items():
        note_once.cache_clear()
        said = done(call(place, script, *command, "--output_path=out", "--overwrite")).stderr
        assert "note: there is no picture" in said and "(no such font)" in said
        kept = {"inference_spul": "predictions.jsonl"}.get(script, "training.jsonl")
        assert (place / "out" / kept).is_file() and not list((place / "out").glob("*.png"))


def test_what_is_said_about_results_is_said_when_they_are_written(place, monkeypatch):
    def fail(*_):
        raise UnicodeEncodeError("latin-1", "a", 0, 1, "no such letter")

    monkeypatch.setattr(tables, "table", fail)
    with pytest.raises(UnicodeEncodeError):
        call(place, "inference_spul", *INFERENCE, "--output_path=out")
    assert json.loads((place / "out" / "metrics.json").read_text())
    with pytest.raises(UnicodeEncodeError):
        call(place, "qlora", *QLORA, "--max_eval_samples=2", "--output_path=tuned")
    assert (place / "tuned" / "manifest.json").is_file()


def test_a_clock_that_goes_back_gives_no_negative_seconds(place, monkeypatch):
    times = iter(range(10**9, 0, -1000))
    monkeypatch.setattr("time.time", lambda: float(next(times)))
    done(call(place, "qlora", *QLORA, "--max_eval_samples=2", "--output_path=tuned"))
    done(call(place, "inference_spul", *INFERENCE, "--output_path=out"))
    for folder in ("tuned", "out"):
        (record,) = json.loads((place / folder / "metrics.json").read_text())
        assert 0 <= record["seconds"] < 1000


def test_rows_of_one_name_carry_what_tells_them_apart(place, fine_tuned):
    for folder in ("a", "b"):
        shutil.copytree(fine_tuned, place / folder / "final")
        (place / folder / "tiny-llama").symlink_to(place / "tiny-llama")
    paths = "--model_checkpoints", "a/final", "b/final", "fine-tuned"
    done(call(place, "inference_spul", *paths, *INFERENCE[1:], "--output_path=out"))
    records = json.loads((place / "out" / "metrics.json").read_text())
    methods = ["fine-tuned (a/final)", "fine-tuned (b/final)", "fine-tuned (fine-tuned)"]
    assert [record["method"] for record in records] == methods
    refused(place, "names", "inference_spul", *paths, "a/final", *INFERENCE[1:], "--output_path=twice")


def test_the_whole_path_tells_the_last_apart(tmp_path):
    links = [[checkpoints.Link(tmp_path, name)] for name in ("x/final", "final")]
    assert method_names(links) == ["base (x/final)", f"base ({os.path.basename(os.getcwd())}/final)"]
