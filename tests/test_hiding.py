"""--hide: how even the label words are held on forget rows, worked out by hand, and what a run makes of it."""

import json
import math
import shutil
import weakref

import pandas as pd
import pytest
import scripts
import tiny
import torch
from scripts import call, done, refused, tree

from utils.data.batch import Example
from utils.data.splits import SPLITS
from utils.errors import note_once
from utils.evaluation.scores import score_rows
from utils.interventions.prompt_encoders import VirtualTokens
from utils.interventions.served import load_served
from utils.models.base import load_tokenizer
from utils.models.chain import resolve_chain
from utils.tasks.classification import classification, label_words
from utils.tasks.rows import load_splits
from utils.unlearning import hiding, losses
from utils.unlearning.hiding import Hiding, HidingSettings, with_words, word_log_p
from utils.unlearning.losses import Shares, behind_gate, spul_loss, word_kl
from utils.unlearning.objectives import PromptTuning, prompt_rows

P, PAD, SEVERAL = 3, 1, {"positive": "rather good", "negative": "rather poor"}
# Rows as token ids: retain rows, then forget rows whose word y~ has one token or two.
ROWS = [
    Example((10, 11, 12, 13), (30,)),
    Example((14, 15), (31, 32)),
    Example((16, 17, 18, 19, 20), (40,), forget=True),
    Example((21, 22, 23), (41, 42), forget=True),
    Example((24, 25), (40,), forget=True),
]
WORDS = {
    "one token each": [(30,), (31,), (33,)],
    "several": [(30, 31), (30, 32), (33,), (41, 42, 43)],
    "one begins another, each ends": [(30, 1), (30, 31, 1)],
}
ONE_STEP = ("--max_eval_samples=0", "--max_steps=1", "--train_batch_size=24")  # at a rate of zero
ALONE = (
    "--max_eval_samples=0", "--beta=0", "--alpha=0", "--lr=2e-2", "--num_epochs=12", "--train_batch_size=24",
    "--ptuning_num_tokens=10", "--init_text=a film about the people",
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return tiny.build_model().requires_grad_(False)


@pytest.fixture
def encoder():
    torch.manual_seed(3)
    return VirtualTokens("embedding", P, 128, 16)


def log_p_by_hand(model, vectors, example, word):
    """log f(word | phi, x): one row, every position, no cache, no padding."""
    ids = torch.tensor([example.prompt + word[:-1]])
    embedded = torch.cat([vectors[None], model.get_input_embeddings()(ids)], dim=1)
    rows = model(inputs_embeds=embedded).logits[0, -len(word) :].log_softmax(-1)
    return rows.gather(1, torch.tensor(word)[:, None]).sum()


def l_hide_by_hand(model, vectors, words, references):
    """Mean over the forget rows of the sum over words of r (log r - log q)."""
    total = 0
    for example, r in references.items():
        p = torch.stack([log_p_by_hand(model, vectors, example, word) for word in words]).exp()
        q = p / p.sum()
        total = total + sum(a * (math.log(a) - b.log()) for a, b in zip(r, q) if a)
    return total / len(references)


@pytest.mark.parametrize("like", [False, True], ids=["uniform", "like another"])
@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
def test_loss_and_gradient_are_those_of_the_equation(model, encoder, words, like):
    """Of a step in one piece, and in micro-batches of which one has no forget row."""
    forget = [row for row in ROWS if row.forget]
    references = {row: [1 / len(words)] * len(words) for row in forget}
    if like:  # one of them certain
        references = {row: [0.7, 0.3, *[0.0] * (len(words) - 2)] for row in forget}
        references[forget[0]] = [1.0] + [0.0] * (len(words) - 1)
    answers = {row.prompt: r for row, r in references.items()} if like else None
    objective = PromptTuning(model, encoder, ROWS, PAD, None, 0.0, 0.0, hiding=Hiding(2.5, words, answers))

    vectors, parameters = encoder(), list(encoder.parameters())
    l_f = -sum(log_p_by_hand(model, vectors, row, row.completion) for row in forget) / len(forget)
    l_hide = l_hide_by_hand(model, vectors, words, references)
    (of_hide,) = torch.autograd.grad(l_hide, parameters, retain_graph=True)
    (expected,) = torch.autograd.grad(l_f + 2.5 * l_hide, parameters)
    for parts in ([[0, 1, 2, 3, 4]], [[3, 0], [1], [4, 2]]):
        found = [objective(rows, len(forget), 2) for rows in parts]
        assert sum(said["L_hide"] for _, said in found).item() == pytest.approx(l_hide.item(), rel=1e-3)
        assert sum(loss for loss, _ in found).item() == pytest.approx((l_f + 2.5 * l_hide).item(), rel=1e-5)
        (gradient,) = torch.autograd.grad(sum(loss for loss, _ in found), parameters)
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * of_hide.abs().max().item())


def test_the_gradient_at_the_words_is_q_minus_r():
    log_p = torch.tensor([[-1.0, -2.0, -5.0]], requires_grad=True)
    r = torch.tensor([[0.5, 0.5, 0.0]])
    word_kl(r, log_p).sum().backward()
    p = [math.exp(-1), math.exp(-2), math.exp(-5)]
    q = [value / sum(p) for value in p]
    assert log_p.grad[0].tolist() == pytest.approx([q[0] - 0.5, q[1] - 0.5, q[2]], abs=1e-6)


def test_word_kl_by_hand():
    log_p = torch.tensor([[0.2, 0.1], [0.3, 0.3], [0.09, 0.01]]).log()
    r = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.0, 1.0]])
    skewed = 0.5 * math.log(0.5 / (2 / 3)) + 0.5 * math.log(0.5 / (1 / 3))
    assert word_kl(r, log_p).tolist() == pytest.approx([skewed, 0, math.log(10)], abs=1e-6)
    assert word_kl(log_p.exp() / log_p.exp().sum(-1, keepdim=True), log_p - 7).abs().max() < 1e-6


def test_what_is_read_beside_the_rows():
    """Nothing for words of one token; one example for words that differ in their last token only."""
    assert with_words(ROWS, WORDS["one token each"]) == ROWS
    more = with_words(ROWS, [(30, 31), (30, 32), (33,)])[len(ROWS) :]
    assert [(row.prompt, row.completion[:-1]) for row in more] == [(row.prompt, (30,)) for row in ROWS[2:]]
    assert {row.forget for row in more} == {None}
    assert with_words(ROWS[3:4], [(41, 43), (40,)]) == ROWS[3:4]  # y~ is read up to there
    assert with_words(ROWS[:2], WORDS["several"]) == ROWS[:2]


def test_a_step_without_forget_rows_has_nothing_to_hide(model, encoder):
    objective = PromptTuning(model, encoder, ROWS, PAD, None, 0.5, 0.0, hiding=Hiding(1.0, WORDS["several"]))
    loss, parts = objective([0, 1], 0, 2)
    assert parts["L_hide"] == 0 and loss == 0.5 * parts["L_r"]
    assert word_log_p(torch.zeros(3, 50), ROWS[:2], WORDS["several"]).shape == (0, 4)


def test_spul_loss_adds_the_term_over_the_rows_of_l_f():
    nll, kl = torch.tensor([1.0, 3.0]), torch.tensor([0.5, 1.5])
    loss, parts = spul_loss(nll, nll, kl, 4, 2, 0.5, 2.0, 3.0, torch.tensor([0.25, 0.75]))
    assert {key: value.item() for key, value in parts.items()} == {"L_f": 1, "L_r": 2, "L_kl": 1, "L_hide": 0.25}
    assert loss.item() == 1 + 0.5 * 2 + 2 * 1 + 3 * 0.25
    gated, scaled = behind_gate(parts, Shares(forget=0.5, retain=0.25, forget_constant=8.0), 0.5, 0.5, 2.0, 3.0)
    assert scaled["L_f"].item() == 0.5 * 1 + 0.5 * 8 and scaled["L_hide"].item() == 0.5 * 0.25
    assert gated.item() == 4.5 + 0.5 * 0.5 + 2 * 0.25 + 3 * 0.125


def spul(cwd, parent, dataset, *flags):
    """The log of a short run into `cwd`/out, and what it said."""
    said = done(scripts.spul(cwd, parent, dataset, "--output_path=out", "--overwrite", *flags))
    return [json.loads(line) for line in (cwd / "out" / "training.jsonl").read_text().splitlines()], said


def scored(checkpoint, dataset):
    """Shares of the label words on the forget rows, (rows, words), as evaluation finds them."""
    frames = load_splits(str(dataset))
    words = label_words(frames)
    rows = score_rows(load_served(str(checkpoint), tiny.ON_CPU), frames["train_forget"], classification(words), 200, 8)
    return torch.tensor([[row[word] for word in words] for row in rows["label_probabilities"]])


def uneven(shares):
    """Mean KL( uniform || q ), in nats."""
    return word_kl(torch.full_like(shares, 0.5), shares.log()).mean().item()


@pytest.fixture(scope="module")
def retain_model(tiny_model, small_data):
    flags = (
        "--exclude_forget",
        "--lr=2e-3",
        "--num_epochs=6",
        "--lora_target_modules=all-linear",
        "--max_eval_samples=0",
    )
    done(scripts.qlora(tiny_model.parent, tiny_model, small_data, *flags, "--output_path=retain"))
    return tiny_model.parent / "retain"


def test_off_is_bit_for_bit_what_it_was(fine_tuned, small_data, tmp_path, monkeypatch):
    """Nothing of it runs without the flag, and --hide=0 is as if it were not given."""
    log, _ = spul(tmp_path, fine_tuned, small_data, "--max_eval_samples=0", "--hide=0")
    prompt = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    assert all("L_hide" not in line for line in log)
    for name in ("with_words", "word_log_p", "Hiding", "load_served", "load_tokenizer"):
        monkeypatch.setattr(hiding, name, None)
    monkeypatch.setattr(losses, "word_kl", None)
    again, _ = spul(tmp_path, fine_tuned, small_data, "--max_eval_samples=0")
    assert again == log and (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == prompt


@pytest.mark.long
@pytest.mark.slow
def test_hiding_levels_the_label_words(fine_tuned, small_data, tmp_path):
    """The labels are memorised before. Refusing alone leaves one word far ahead; with --hide it loses its lead."""
    flags = *ALONE, "--lr=3e-3", "--num_epochs=16"
    without, _ = spul(tmp_path, fine_tuned, small_data, *flags)
    left = uneven(scored(tmp_path / "out", small_data))
    log, _ = spul(tmp_path, fine_tuned, small_data, *flags, "--hide=20")
    assert uneven(scored(tmp_path / "out", small_data)) < left / 2
    assert log[-1]["L_hide"] < log[0]["L_hide"] / 2
    for line in log:
        assert line["loss"] == pytest.approx(line["L_f"] + 20 * line["L_hide"], rel=1e-5)
    assert log[0]["L_f"] == without[0]["L_f"]
    assert (tmp_path / "out" / "training.png").exists()


def test_words_of_several_tokens_through_the_command(fine_tuned, small_data, tmp_path):
    """The first step has a rate of zero, so that what it logs is what evaluation says of the saved prompt."""
    (tmp_path / "words").mkdir()
    for split in SPLITS:
        frame = pd.read_csv(small_data / f"{split}.csv")
        frame["label_text"] = frame["label_text"].map(SEVERAL)
        frame.to_csv(tmp_path / "words" / f"{split}.csv", index=False)
    flags = *ONE_STEP, "--micro_batch_size=5", "--max_length=200", "--hide=1"
    (line,), _ = spul(tmp_path, fine_tuned, tmp_path / "words", *flags)
    assert line["L_hide"] == pytest.approx(uneven(scored(tmp_path / "out", tmp_path / "words")), rel=1e-4)
    parts = line["L_f"] + 0.5 * line["L_r"] + 0.5 * line["L_kl"] + line["L_hide"]
    assert line["loss"] == pytest.approx(parts, rel=1e-5)


@pytest.mark.long
@pytest.mark.slow
def test_hide_like_follows_the_other_model(tiny_model, retain_model, small_data, tmp_path):
    flags = *ALONE, "--lr=1e-2", "--num_epochs=14", "--hide=20"
    log, said = spul(tmp_path, tiny_model, small_data, *flags, f"--hide_like={retain_model}")
    r, q = (scored(checkpoint, small_data) for checkpoint in (retain_model, tmp_path / "out"))
    assert word_kl(r, q.log()).mean() < log[0]["L_hide"] / 3
    assert uneven(r) > 0.1  # else it would have followed a uniform r
    assert "--hide_like" not in said.stderr


def asked(other, fine_tuned, frames):
    settings = HidingSettings(
        model_checkpoints=str(fine_tuned), hide=1.0, hide_like=str(other), max_length=200, eval_batch_size=3
    )
    return hiding.find(settings, frames, tiny.ON_CPU, prompt_rows)


def test_the_other_model_is_asked_as_evaluation_asks_it(fine_tuned, retain_model, small_data, monkeypatch):
    """And is let go before the model that is trained is loaded."""
    frames, seen = load_splits(str(small_data)), []

    def watched(*arguments):
        served = load_served(*arguments)
        seen.append(weakref.ref(served.model))
        return served

    monkeypatch.setattr(hiding, "load_served", watched)
    source = asked(retain_model, fine_tuned, frames)
    assert [model() for model in seen] == [None]
    _, rows = prompt_rows(load_tokenizer(resolve_chain(str(fine_tuned)), False), frames, 200, 42)
    found = torch.tensor([source.like[row.prompt] for row in rows])
    torch.testing.assert_close(found, scored(retain_model, small_data), rtol=1e-4, atol=1e-6)
    assert source.link.sha256 == resolve_chain(str(retain_model))[-1].sha256


def test_a_model_that_learnt_other_rows_than_it_should_is_named(fine_tuned, retain_model, small_data, capsys):
    frames = load_splits(str(small_data))
    fewer = frames | {"train_retain": frames["train_retain"].head(9)}
    for other, rows, sentence in (
        (fine_tuned, frames, "was fine-tuned on the forget rows, so --hide_like teaches their labels"),
        (retain_model, fewer, "retain, which --hide_like follows, was fine-tuned on other rows"),
        (retain_model, frames, None),
        (fine_tuned.parent / "tiny-llama", frames, None),
    ):
        note_once.cache_clear()
        asked(other, fine_tuned, rows)
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
        assert sentence in said[0] if sentence else not said


def test_behind_a_gate_the_term_is_part_of_the_loss(fine_tuned, retain_model, small_data, tmp_path):
    flags = *ONE_STEP, "--gate=tfidf", "--eco_threshold=0.32", "--hide=3", f"--hide_like={retain_model}"
    (line,), said = spul(tmp_path, fine_tuned, small_data, *flags)
    assert "keep and 8 of 8 to forget" in said.stdout  # the gate was fitted to all of them
    parts = line["L_f"] + 0.5 * line["L_r"] + 0.5 * line["L_kl"] + 3 * line["L_hide"]
    assert line["loss"] == pytest.approx(parts, rel=1e-5) and line["L_hide"] > 0


@pytest.mark.slow
def test_a_resumed_run_follows_the_same_model(fine_tuned, retain_model, small_data, tmp_path):
    """Its name is an argument; what lies there is known by its hash."""
    for source in (retain_model, retain_model.parent / "tiny-llama"):
        shutil.copytree(source, tmp_path / source.name)
    flags = "--max_eval_samples=0", "--beta=0", "--max_steps=3", "--hide=1", "--output_path=out", "--save_steps=1"
    command = "spul", f"--model_checkpoints={fine_tuned}", f"--dataset={small_data}", *scripts.SPUL, *flags
    scripts.stop_at(tmp_path, 3, *command, "--hide_like=retain")
    refused(tmp_path, "was saved with hide_like='retain'", *command, "--resume")
    shutil.move(tmp_path / "retain", tmp_path / "kept")
    shutil.copytree(tmp_path / "tiny-llama", tmp_path / "retain")
    refused(tmp_path, "was saved with model=", *command, "--hide_like=retain", "--resume")
    shutil.rmtree(tmp_path / "retain")
    shutil.move(tmp_path / "kept", tmp_path / "retain")
    prompts = []
    for flag in ("--resume", "--overwrite"):
        done(call(tmp_path, *command, "--hide_like=retain", flag))
        prompts.append((tmp_path / "out" / "adapter_model.safetensors").read_bytes())
    assert prompts[0] == prompts[1]


def test_a_dry_run_loads_no_second_model(fine_tuned, retain_model, small_data, tmp_path, monkeypatch):
    monkeypatch.setattr(hiding, "load_served", None)
    flags = "--hide=1", f"--hide_like={retain_model}", "--dry_run=probe"
    said = done(scripts.spul(tmp_path, fine_tuned, small_data, *flags)).stdout
    assert "at its peak" in said and "not known" not in said and tree(tmp_path) == {}


@pytest.fixture(scope="module")
def place(fine_tuned, prompt, tmp_path_factory):
    """A folder with what --hide_like may name: a prompt with what it stands on, and a model with another tokenizer."""
    folder = tmp_path_factory.mktemp("place")
    plain = fine_tuned.parent / "tiny-llama"
    for source, name in ((fine_tuned, "fine-tuned"), (prompt, "prompt"), (plain, plain.name), (plain, "other")):
        shutil.copytree(source, folder / name)
    file = folder / "other" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    words = tokenizer["model"]["vocab"]
    a, b = (token for token in words if token in ("Ġpositive", "Ġnegative"))
    words[a], words[b] = words[b], words[a]
    file.write_text(json.dumps(tokenizer))
    return folder


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--hide=-1"], "argument --hide: '-1' is not a number of at least 0"),
        (["--hide=nan"], "argument --hide: 'nan' is not a number of at least 0"),
        (["--hide_like=fine-tuned"], "--hide_like says what --hide aims at; give --hide a weight above 0"),
        (["--hide=1", "--hide_like="], "argument --hide_like: it is empty"),
        (["--hide=1", "--hide_like=./none"], "./none does not exist"),
        (["--hide=1", "--hide_like=prompt"], "prompt already is a prompt; --hide_like takes what it was made on"),
        (["--hide=1", "--hide_like=other"], "other has another tokenizer than fine-tuned; --hide_like takes one with"),
        (["--hide=1", "--hide_like=other", "--dry_run"], "other has another tokenizer than fine-tuned;"),
        (["--hide=1", "--hide_like=other", "--output_path=other", "--overwrite"], "would replace "),
    ],
)
def test_what_cannot_be(place, small_data, flags, sentence):
    command = "--model_checkpoints=fine-tuned", f"--dataset={small_data}", *scripts.SPUL, "--max_eval_samples=0"
    refused(place, sentence, "spul", *command, *flags)
