"""--settings: flags from a file, which the command line overrides; and the log that grows while a run trains."""

import importlib
import json
import re
from pathlib import Path

import pytest
import scripts
from scripts import ROOT, call, done, manifest_of, refused

from utils import cli
from utils.errors import UserError
from utils.training.loop import Training

DEMO = ROOT / "data" / "settings"


def test_flags_of_a_file_are_those_of_the_command_line(tmp_path, tiny_model, small_data):
    """Comments, several a line, quotation marks; what the command line says goes before, wherever it stands."""
    (tmp_path / "mine.txt").write_text(
        "# how\n--lr=0.5 --num_epochs=1  # one's\n--logits_path=a#b\n"
        "--ptuning_num_tokens=3\n--init_text='forget # it'\n",
        encoding="utf-8",
    )
    flags = "--lr=1e-2", "--settings=mine.txt", "--max_eval_samples=0", "--output_path=out"
    command = f"--model_checkpoints={tiny_model}", f"--dataset={small_data}", *scripts.ROWS, *flags
    done(call(tmp_path, "spul", *command, "--train_batch_size=8"))
    kept = manifest_of(tmp_path / "out")["arguments"]
    assert (kept["lr"], kept["num_epochs"], kept["ptuning_num_tokens"]) == (1e-2, 1, 3)
    assert kept["init_text"] == "forget # it" and kept["logits_path"] == "a#b" and "settings" not in kept


def test_files_that_give_no_flags_are_refused(tmp_path, tiny_model):
    (tmp_path / "typo.txt").write_text("--num_epoch=1\n")
    (tmp_path / "open.txt").write_text("--init_text='never closed\n")
    (tmp_path / "more.txt").write_text("--settings=typo.txt\n")
    command = "qlora", f"--model_name={tiny_model}"
    for file, sentence in {
        "typo.txt": "unknown argument --num_epoch, did you mean --num_epochs?",
        "open.txt": "cannot read flags from open.txt (No closing quotation)",
        "more.txt": "more.txt names another --settings file",
        "gone.txt": "--settings=gone.txt is no file",
    }.items():
        refused(tmp_path, sentence, *command, f"--settings={file}")
    refused(tmp_path, "--settings= is no file", *command, "--settings")


def test_a_comparison_sees_the_flags_in_a_file(tmp_path):
    (tmp_path / "rows.txt").write_text("--max_length=96\n")
    assert cli.flags(f"--a=1 --settings={tmp_path / 'rows.txt'} '--b=x y'") == ["--max_length=96", "--a=1", "--b=x y"]
    with pytest.raises(UserError, match="is no file"):
        cli.with_settings(["--settings=nowhere.txt"])


@pytest.mark.parametrize("file", sorted(DEMO.rglob("*.txt")), ids=lambda file: str(file.relative_to(DEMO)))
def test_the_embedded_settings_are_flags_of_a_script(file, monkeypatch):
    script = "spul" if file.stem in ("unlearn", "loss", "behind", "published") else "qlora"
    model = "--model_name=x" if script == "qlora" else "--model_checkpoints=x"
    monkeypatch.setattr("sys.argv", [f"{script}.py", model, f"--settings={file}"])
    importlib.import_module(script).parse_args()


def test_the_log_grows_while_a_run_trains(tmp_path, tiny_model, small_data, monkeypatch):
    """Line by line in the file that the run names; a resumed run begins it with the lines of its state."""
    update, seen = Training.update, []

    def watched(self, *inputs):
        seen.append(self.log_path.read_text(encoding="utf-8").splitlines() if self.log_path.exists() else [])
        if len(seen) == 3:
            raise KeyboardInterrupt
        return update(self, *inputs)

    flags = "--max_steps=4", "--save_steps=1", "--max_eval_samples=0", "--output_path=out"
    monkeypatch.setattr(Training, "update", watched)
    said = scripts.qlora(tmp_path, tiny_model, small_data, "--num_epochs=2", *flags)
    assert said.code == 130 and [len(lines) for lines in seen] == [0, 1, 2]
    path = Path(re.search(r"the log grows in (.*)", said.stdout)[1])
    assert path.name == "training.jsonl" and not (tmp_path / path).exists()  # it went with the run
    done(scripts.qlora(tmp_path, tiny_model, small_data, "--num_epochs=2", *flags, "--resume"))
    assert [len(lines) for lines in seen[3:]] == [2, 3] and seen[3][:2] == seen[2][:2]
    written = (tmp_path / "out" / "training.jsonl").read_text(encoding="utf-8").splitlines()
    assert written[:3] == seen[-1] and [json.loads(line)["step"] for line in written] == [1, 2, 3, 4]
