"""Splits, template, tokenising and batches: the protocol of the paper, and every input that load_splits refuses."""

import os
from unittest import mock

import datasets
import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from utils.data.batch import Example, collate, epoch_batches, micro_batches
from utils.data.load import SNIPPETS_FOLDER, dataset_name, read_texts
from utils.data.select import fingerprint, learnt_by, sample_rows, select_rows
from utils.data.splits import SPLITS, TRAIN_SPLITS
from utils.errors import UserError, note_once
from utils.tasks.classification import TEMPLATE_HEAD, TEMPLATE_TAIL, draw_unlearning_labels, label_words
from utils.tasks.encode import completion_ids, tokenize
from utils.tasks.rows import load_rows, load_splits

LONG = "the film was far too long and its ending too short , " * 30


def with_special_tokens(template):
    tokenizer = tiny.build_tokenizer()
    tokens = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>") if token in template]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=tokens)
    return tokenizer


def llama_2_style():
    """Spaces are part of the normalised text as in Llama 2: no pre-tokenizer, a space in front, BOS."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False)
    rows = pd.read_csv(SNIPPETS_FOLDER / "train_retain.csv").head(200)
    words = (f"{TEMPLATE_HEAD}{t}{TEMPLATE_TAIL} {w}" for t, w in zip(rows["text"], rows["label_text"]))
    tokenizer.train_from_iterator((piece for text in words for piece in text.split(" ")), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {
    "plain": tiny.build_tokenizer,
    "bos": lambda: with_special_tokens("<s> $A"),
    "bos and eos": lambda: with_special_tokens("<s> $A </s>"),
    "llama 2": llama_2_style,
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


@pytest.fixture(scope="module")
def plain():
    return tiny.build_tokenizer()


def full_text(text):
    """The template, word for word as in the published code; the label follows after a space."""
    question = "### Question: What is the sentiment of the given text?"
    return f"### Text: {text}\n\n{question}\n\n### Sentiment:"


def encode(tokenizer, text, word="positive", max_length=1024):
    return tokenize(tokenizer, [text], [word], max_length)[0]


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True)


def test_the_template_is_the_published_one(tokenizer):
    example = encode(tokenizer, "a fine , warm film", "negative")
    assert decode(tokenizer, example.prompt) == full_text("a fine , warm film")
    assert decode(tokenizer, example.prompt + example.completion) == full_text("a fine , warm film") + " negative"


@pytest.mark.parametrize("word", ["positive", "neutral", "unknown", "not quite"])
def test_the_completion_joins_the_prompt_as_if_tokenised_together(tokenizer, word):
    example = encode(tokenizer, "a fine film", word)
    together = tokenizer(full_text("a fine film") + " " + word)["input_ids"]
    if together[-1] == tokenizer.eos_token_id:
        together = together[:-1]
    assert example.prompt + example.completion == tuple(together)
    assert example.completion == completion_ids(tokenizer, word)


def test_special_tokens():
    bos, eos = tiny.build_tokenizer().bos_token_id, tiny.build_tokenizer().eos_token_id
    examples = {name: encode(TOKENIZERS[name](), "a fine film") for name in ("plain", "bos", "bos and eos")}
    assert examples["bos"].prompt == (bos, *examples["plain"].prompt)
    assert examples["bos and eos"].prompt == examples["bos"].prompt  # an end of text must not precede the answer
    assert eos not in examples["bos and eos"].prompt
    assert len({example.completion for example in examples.values()}) == 1


def test_long_text_is_cut_and_nothing_else(tokenizer):
    whole = encode(tokenizer, LONG, "neutral")
    room = 80
    example = encode(tokenizer, LONG, "neutral", room)
    assert len(example.prompt) + len(example.completion) == room < len(whole.prompt)
    assert example.completion == whole.completion
    text = decode(tokenizer, example.prompt)
    head, tail = full_text("|").split("|")
    assert text.startswith(head) and text.endswith(tail)
    kept = text.removeprefix(head).removesuffix(tail)
    assert kept and LONG.startswith(kept)


def test_text_that_just_fits_is_whole(tokenizer):
    whole = encode(tokenizer, "a fine film with a fine cast")
    size = len(whole.prompt) + len(whole.completion)
    assert encode(tokenizer, "a fine film with a fine cast", max_length=size) == whole
    assert len(encode(tokenizer, "a fine film with a fine cast", max_length=size - 1).prompt) == len(whole.prompt) - 1


def test_a_text_is_tokenised_once():
    """By tokenizer, text and room for it; what the second call gives is what the first would have given."""
    first, again = tiny.build_tokenizer(), tiny.build_tokenizer()
    texts, words = ["a fine film", LONG, "a dull film"], ["positive", "negative", "neutral"]
    expected = tokenize(again, texts, words, 60, forget=True)
    tokenize(first, texts[:2], words[1:], 60)
    with mock.patch.object(type(first), "__call__", autospec=True, side_effect=type(first).__call__) as called:
        assert tokenize(first, texts, words, 60, forget=True) == expected
        asked = [call.args[1] for call in called.call_args_list if isinstance(call.args[1], list)]
        assert asked == [[full_text("a dull film")]]
        assert len(tokenize(first, texts, words, 70)[1]) == len(expected[1]) + 10


def test_too_small_a_max_length_is_refused_and_the_stated_one_works(tokenizer):
    with pytest.raises(UserError, match=r"--max_length=9 cannot hold template and label; use at least \d+") as error:
        encode(tokenizer, LONG, "unknown", 9)
    needed = int(str(error.value).split()[-1])
    example = encode(tokenizer, LONG, "unknown", needed)
    assert decode(tokenizer, example.prompt + example.completion).endswith(TEMPLATE_TAIL + " unknown")
    with pytest.raises(UserError):
        encode(tokenizer, LONG, "unknown", needed - 1)


def test_rows_are_tokenised_in_order_and_marked(plain):
    examples = tokenize(plain, ["one", "two"], ["positive", "neutral"], 100, forget=True)
    assert [plain.decode(e.prompt + e.completion) for e in examples] == [
        full_text("one") + " positive",
        full_text("two") + " neutral",
    ]
    assert all(example.forget for example in examples)


def test_only_label_tokens_are_predicted(plain):
    """Every target stands at the position before its own token, in its own row; nothing else is a target."""
    texts, words = ["a fine film", "bad", LONG[:200]], ["positive", "neutral", "unknown"]
    examples = tokenize(plain, texts, words, 1024)
    assert sorted(len(example.completion) for example in examples) == [1, 4, 4]
    batch = collate(examples, plain.eos_token_id, "cpu")
    targets = {word: [] for word in words}
    for row, position, target in zip(batch.rows.tolist(), batch.positions.tolist(), batch.targets.tolist()):
        sequence = examples[row].prompt + examples[row].completion
        assert sequence[position + 1] == target
        assert batch.input_ids[row, position] == sequence[position]
        assert batch.attention_mask[row, position] == 1
        targets[words[row]].append(target)
    assert {word: plain.decode(ids) for word, ids in targets.items()} == {word: f" {word}" for word in words}


def test_collate_pads_on_the_right_by_length(plain):
    examples = [Example((5, 6, 7), (8,)), Example((5,), (6, 7, 8, 9, 4), forget=True)]
    batch = collate(examples, 6, "cpu")  # the pad token occurs in both rows
    assert batch.input_ids.tolist() == [[5, 6, 7, 6, 6], [5, 6, 7, 8, 9]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch.rows.tolist() == [0, 1, 1, 1, 1, 1]
    assert batch.positions.tolist() == [2, 0, 1, 2, 3, 4]
    assert batch.targets.tolist() == [8, 6, 7, 8, 9, 4]
    assert (batch.forget_tokens.tolist(), batch.retain_tokens.tolist()) == ([1, 2, 3, 4, 5], [0])
    assert batch.targets.dtype == torch.int64


def mixed(n_retain, n_forget):
    """Examples of pairwise different lengths, forget rows last."""
    n = n_retain + n_forget
    return [Example(tuple(range(1 + (7 * i) % n)), (1,), i >= n_retain) for i in range(n)]


@pytest.mark.parametrize("length_pool", [0, 3])
def test_random_batches_hold_every_row_once(length_pool):
    batches = epoch_batches(mixed(40, 13), 8, seed=1, epoch=0, length_pool=length_pool)
    assert sorted(i for batch in batches for i in batch) == list(range(53))
    assert sorted(map(len, batches)) == [5, 8, 8, 8, 8, 8, 8]


@pytest.mark.parametrize("length_pool", [0, 3])
@pytest.mark.parametrize("n_forget", [13, 2])
def test_fixed_batches_hold_so_many_forget_rows_and_every_retain_row_once(length_pool, n_forget):
    examples = mixed(40, n_forget)
    batches = epoch_batches(examples, 8, seed=1, epoch=0, forget_per_batch=3, length_pool=length_pool)
    forget = [[i for i in batch if examples[i].forget] for batch in batches]
    retain = [[i for i in batch if not examples[i].forget] for batch in batches]
    assert [len(rows) for rows in forget] == [3] * 8
    assert sorted(i for rows in retain for i in rows) == list(range(40))
    assert all(len(rows) == 5 for rows in retain)
    counts = np.bincount([i - 40 for rows in forget for i in rows], minlength=n_forget)
    assert counts.max() - counts.min() <= 1  # drawn in passes, so none is favoured


def test_a_last_batch_that_is_not_full_still_has_its_forget_rows():
    examples = mixed(7, 4)
    batches = epoch_batches(examples, 8, seed=1, epoch=0, forget_per_batch=2)
    assert [sum(examples[i].forget for i in batch) for batch in batches] == [2, 2]
    assert sorted(map(len, batches)) == [3, 8]


@pytest.mark.parametrize("options", [{}, {"forget_per_batch": 2}, {"length_pool": 2}, {"retain_ratio": 1.5}])
def test_batches_depend_on_seed_and_epoch_alone(options):
    examples = mixed(30, 10)
    first = epoch_batches(examples, 8, 1, 0, **options)
    np.random.seed(5)
    torch.manual_seed(5)
    assert epoch_batches(examples, 8, 1, 0, **options) == first
    assert epoch_batches(examples, 8, 1, 1, **options) != first
    assert epoch_batches(examples, 8, 2, 0, **options) != first


def test_micro_batches_hold_rows_of_similar_length():
    """By hand: the lengths 300, 200, 200, 100, 50, 40 and 600; 512 tokens a part on a CPU, the padding counted."""
    rows, lengths = [3, 1, 4, 0, 6, 2, 5], [300, 200, 100, 200, 50, 40, 600]
    examples = [Example((7,) * n, (1,)) for n in lengths]
    assert [len(example) for example in examples] == lengths
    assert micro_batches(rows, examples, None, "cpu") == [[6], [0], [3, 1], [2, 4, 5]]
    assert micro_batches(rows, examples, 3, "cpu") == [[6, 0, 3], [1, 2, 4], [5]]
    assert micro_batches(rows, examples, 3, "cuda") == [[6, 0, 3], [1, 2, 4], [5]]
    assert micro_batches(rows, examples, None, "cuda") == [[6, 0, 3, 1, 2, 4, 5]]
    assert micro_batches([], examples, None, "cpu") == []


@pytest.mark.parametrize("ratio, kept", [(0.05, 1), (1, 10), (1.25, 12), (2.9, 29), (7, 40)])
@pytest.mark.parametrize("length_pool", [0, 2])
def test_retain_ratio_counts_retain_rows_by_forget_rows(ratio, kept, length_pool):
    batches = epoch_batches(mixed(40, 10), 8, 1, 0, length_pool=length_pool, retain_ratio=ratio)
    rows = sorted(i for batch in batches for i in batch)
    assert rows[-10:] == list(range(40, 50))  # every forget row
    assert len(set(rows[:-10])) == len(rows) - 10 == kept
    assert len(batches) == -(-(kept + 10) // 8)


def test_retain_ratio_draws_other_rows_every_epoch():
    """Over the epochs every retain row takes its turn."""
    drawn = [epoch_batches(mixed(40, 10), 8, 1, epoch, retain_ratio=1) for epoch in range(40)]
    seen = np.bincount([i for batches in drawn for batch in batches for i in batch if i < 40], minlength=40)
    assert seen.sum() == 400 and seen.min() > 0 and seen.max() < 25  # each 10 times on average


def test_retain_ratio_with_forget_rows_in_every_batch():
    """The epoch ends when each of the drawn retain rows was seen once."""
    batches = epoch_batches(mixed(40, 5), 8, 1, 0, forget_per_batch=3, retain_ratio=4)
    assert [sum(i >= 40 for i in batch) for batch in batches] == [3] * 4
    retain = [i for batch in batches for i in batch if i < 40]
    assert len(set(retain)) == len(retain) == 20


def test_a_length_pool_saves_padding_and_mixes_the_batches():
    examples = mixed(100, 28)

    def padding(batches):
        return sum(max(len(examples[i]) for i in batch) - len(examples[j]) for batch in batches for j in batch)

    pooled = epoch_batches(examples, 8, 1, 0, length_pool=8)
    assert padding(pooled) < padding(epoch_batches(examples, 8, 1, 0)) / 2
    longest = [max(len(examples[i]) for i in batch) for batch in pooled]
    assert longest != sorted(longest)


def frames_of(n_retain, n_forget):
    def frame(name, n):
        labels = [i % 2 for i in range(n)]
        words = ["negative", "positive"]
        texts = [f"{name} {i}" for i in range(n)]
        return pd.DataFrame({"text": texts, "label": labels, "label_text": [words[i] for i in labels]})

    sizes = {"train_retain": n_retain, "train_forget": n_forget, "test_retain": 6, "test_forget": 4}
    return {split: frame(split, n) for split, n in sizes.items()}


@pytest.mark.parametrize(("size", "kept"), [(0.25, 9), (0.5, 19), (1.0, 39)])
def test_forget_size_keeps_the_published_rows(size, kept):
    frames = frames_of(50, 39)
    selected = select_rows(frames, forget_size=size)
    drawn = np.random.default_rng(42).choice(39, kept, replace=False) if size < 1 else range(39)
    assert set(selected["train_forget"]["text"]) == {f"train_forget {i}" for i in drawn}
    assert len(selected["train_forget"]) == kept
    for split in ("train_retain", "test_retain", "test_forget"):
        assert selected[split].equals(frames[split])


def test_a_forget_size_that_leaves_nothing_is_refused():
    with pytest.raises(UserError, match="leaves no forget row"):
        select_rows(frames_of(50, 3), forget_size=0.3)


def test_max_train_samples_keeps_the_share_of_forget_rows():
    selected = select_rows(frames_of(300, 100), max_train_samples=40)
    assert (len(selected["train_retain"]), len(selected["train_forget"])) == (30, 10)
    assert len(selected["test_retain"]) == 6
    assert select_rows(frames_of(300, 100), max_train_samples=40)["train_forget"].equals(selected["train_forget"])


def test_max_train_samples_keeps_at_least_one_row_of_each():
    selected = select_rows(frames_of(300, 1), max_train_samples=2)
    assert (len(selected["train_retain"]), len(selected["train_forget"])) == (1, 1)
    with pytest.raises(UserError, match="leaves no retain row"):
        select_rows(frames_of(300, 100), max_train_samples=1)


def test_a_part_of_the_forget_set_is_unlearnt_from_rows_that_were_learnt():
    """Under the same --max_train_samples, spul.py --forget_size=0.5 sees forget rows that qlora.py had."""
    learnt = select_rows(frames_of(300, 100), max_train_samples=40)
    unlearnt = select_rows(frames_of(300, 100), forget_size=0.5, max_train_samples=40)
    assert len(unlearnt["train_forget"]) == 5
    assert set(unlearnt["train_forget"]["text"]) < set(learnt["train_forget"]["text"])
    assert unlearnt["train_retain"].equals(learnt["train_retain"])


def test_only_rows_that_name_certain_people_are_to_be_forgotten(tmp_path):
    (tmp_path / "people.txt").write_text("Jane Doe: Doe\nTwo\n")
    frames = frames_of(30, 6)
    frames["train_forget"]["text"] = ["by Doe", "a doe", "Doe 's film", "by Smith", "Two and Smith", "Twofold"]
    frames["test_forget"]["text"] = ["by Smith", "One", "Two", "three"]
    selected = select_rows(frames, forget_only=str(tmp_path / "people.txt"))
    assert list(selected["train_forget"]["text"]) == ["by Doe", "Doe 's film", "Two and Smith"]
    assert list(selected["test_forget"]["text"]) == ["Two"]
    assert selected["train_retain"].equals(frames["train_retain"])
    drawn = select_rows(frames, 1.0, 10, 0.2, str(tmp_path / "people.txt"))["train_forget"]
    assert len(drawn) == 2 and set(drawn["text"]) < set(selected["train_forget"]["text"])
    with pytest.raises(
        UserError, match="train_forget has 3 rows that name people of .*people.txt, .* ask for 5; change"
    ):
        select_rows(frames, 1.0, 10, 0.5, str(tmp_path / "people.txt"))
    (tmp_path / "people.txt").write_text("Smith\n")
    with pytest.raises(UserError, match="no row of test_forget names anybody of .*people.txt"):
        select_rows({**frames, "test_forget": frames["test_forget"][1:]}, forget_only=str(tmp_path / "people.txt"))


def test_a_share_that_cannot_be_had_is_refused():
    with pytest.raises(UserError, match="--forget_share is a share of --max_train_samples; give both"):
        select_rows(frames_of(300, 30), forget_share=0.5)
    with pytest.raises(
        UserError, match="train_forget has 30 rows, --max_train_samples=40 and --forget_share ask for 36"
    ):
        select_rows(frames_of(300, 30), max_train_samples=40, forget_share=0.9)
    with pytest.raises(UserError, match="train_retain has 20 rows, .* ask for 35"):
        select_rows(frames_of(20, 30), max_train_samples=50, forget_share=0.3)
    assert len(select_rows(frames_of(20, 30), max_train_samples=500)["train_retain"]) == 20


def told(frames, tmp_path, capsys, **arguments):
    """What load_rows says on stderr."""
    note_once.cache_clear()
    folder = write(frames, tmp_path / "splits")
    load_rows({"dataset": str(folder), **arguments})
    return capsys.readouterr().err


def test_texts_of_two_splits_are_said(tmp_path, capsys):
    frames = frames_of(8, 6)
    assert told(frames, tmp_path, capsys) == ""
    frames["train_retain"].loc[:3, "text"] = [f"Train_FORGET, {i}!" for i in range(4)]
    frames["test_forget"].loc[1, "text"] = "train_forget 5"
    frames["test_retain"].loc[:1, "text"] = ["train_retain 6", "train_forget 1"]
    retain, unseen = told(frames, tmp_path, capsys).splitlines()
    assert "4 of the 6 texts of train_forget are in train_retain, too" in retain
    assert "2 of 6 rows of test_retain and 1 of 4 rows of test_forget are train rows, too" in unseen


def test_the_overlap_is_that_of_the_rows_used(tmp_path, capsys):
    frames = frames_of(300, 6)
    frames["test_forget"].loc[1, "text"] = "train_retain 6"
    assert told(frames, tmp_path, capsys) and not told(frames, tmp_path, capsys, max_train_samples=8)


def test_rows_per_person_are_said(tmp_path, capsys):
    (tmp_path / "names.txt").write_text("Ann Lee\nBob Ray: Ray\nZoë\n", encoding="utf-8")
    frames = frames_of(8, 6)
    frames["train_forget"]["text"] = [f"by Ann Lee {i}" if i % 2 else f"Ray’s film {i}" for i in range(6)]
    frames["test_forget"]["text"] = ["Ray", "Ann\u00a0Lee", "Ann Lee and Ray", "nobody"]
    said = told(frames, tmp_path, capsys, forget_only=str(tmp_path / "names.txt"))
    assert "rows of train_forget + test_forget that name them: Ann Lee 3 + 2, Bob Ray 3 + 2, Zoë 0 + 0\n" in said
    assert "note: no row names Zoë; check how " in said


@pytest.mark.parametrize(("share", "forget"), [(0.5, 20), (0.001, 1), (0.75, 30)])
def test_the_share_of_forget_rows_can_be_chosen(share, forget):
    selected = select_rows(frames_of(300, 30), max_train_samples=40, forget_share=share)
    assert (len(selected["train_retain"]), len(selected["train_forget"])) == (40 - forget, forget)


def test_another_rows_seed_draws_other_rows():
    chosen = [select_rows(frames_of(300, 100), max_train_samples=40, rows_seed=seed) for seed in (42, 1)]
    assert chosen[0]["train_retain"].equals(select_rows(frames_of(300, 100), max_train_samples=40)["train_retain"])
    for split in TRAIN_SPLITS:
        assert len(chosen[0][split]) == len(chosen[1][split]) and not chosen[0][split].equals(chosen[1][split])
    published = select_rows(frames_of(50, 39), forget_size=0.5, rows_seed=1)  # whatever the seeds
    assert published["train_forget"].equals(select_rows(frames_of(50, 39), forget_size=0.5)["train_forget"])


@pytest.mark.parametrize("final", [False, True])
def test_validation_rows_are_cut_from_train_and_stand_in_for_test_rows(final):
    frames = frames_of(50, 20)
    chosen = select_rows(frames, validation_share=0.2, final=final)
    assert [len(chosen[split]) for split in SPLITS] == ([40, 16, 6, 4] if final else [40, 16, 10, 4])
    for kind in ("retain", "forget"):
        train, test, whole = (
            set(f["text"]) for f in (chosen[f"train_{kind}"], chosen[f"test_{kind}"], frames[f"train_{kind}"])
        )
        assert not train & test and train < whole
        assert (test == set(frames[f"test_{kind}"]["text"])) if final else (train | test == whole)
        assert chosen[f"test_{kind}"]["label"].mean() == 0.5
    part = select_rows(frames, validation_share=0.2, forget_size=0.5)  # of rows that were learnt
    assert set(part["train_forget"]["text"]) < set(chosen["train_forget"]["text"])
    other = select_rows(frames, validation_share=0.2, rows_seed=1)
    assert not other["train_retain"].equals(chosen["train_retain"])


def test_a_validation_share_that_cannot_be_had_is_refused():
    with pytest.raises(UserError, match="--validation_share=0.1 leaves no row for test_forget"):
        select_rows(frames_of(50, 2), validation_share=0.1)
    with pytest.raises(UserError, match="leaves no row for train_retain"):
        select_rows(frames_of(50, 20), validation_share=1.0)
    with pytest.raises(UserError, match="--final goes with --validation_share"):
        select_rows(frames_of(50, 20), final=True)


def test_what_a_manifest_recorded_selects_the_same_rows(small_data):
    arguments = {"dataset": str(small_data), "max_train_samples": 12, "forget_share": None, "rows_seed": 7, "lr": 1}
    rows = load_rows(arguments)
    assert sum(len(rows[split]) for split in TRAIN_SPLITS) == 12
    manifest = {"arguments": arguments, "data_fingerprint": fingerprint({s: rows[s] for s in TRAIN_SPLITS})}
    assert learnt_by(manifest, rows)
    assert not learnt_by(manifest, load_rows(arguments | {"rows_seed": 8}))
    retrained = manifest["arguments"] | {"exclude_forget": True}
    manifest = {"arguments": retrained, "data_fingerprint": fingerprint({"train_retain": rows["train_retain"]})}
    assert learnt_by(manifest, rows)


def test_sampled_rows_keep_the_file_order():
    sample = sample_rows(frames_of(50, 3)["train_retain"], 20)
    numbers = [int(text.split()[1]) for text in sample["text"]]
    assert numbers == sorted(numbers) and len(set(numbers)) == 20
    assert list(sample.index) == list(range(20))


def test_unlearning_labels_are_drawn_from_the_seed():
    labels = draw_unlearning_labels(1000, 3)
    assert labels == draw_unlearning_labels(1000, 3)
    assert labels != draw_unlearning_labels(1000, 4)
    assert 450 < labels.count("neutral") < 550
    assert set(labels) == {"neutral", "unknown"}


AWKWARD = [
    'comma, "quotes" and\na second line',
    "NA",
    "null",
    "1999",
    "true",
    "2020-01-01",
    " é — 漢字 ",
    "### Text: x",
]


@pytest.fixture
def frames():
    frames = frames_of(8, 8)
    frames["train_retain"]["text"] = AWKWARD
    frames["train_forget"]["text"] = [f"{text} again" for text in AWKWARD]
    return frames


def write_csv(frame, folder, split):
    frame.to_csv(folder / f"{split}.csv", index=False)


def write_jsonl(frame, folder, split):
    frame.to_json(folder / f"{split}.jsonl", orient="records", lines=True)


def write_parquet(frame, folder, split):
    frame.to_parquet(folder / f"{split}.parquet")


def write(frames, folder, writer=write_csv):
    folder.mkdir(exist_ok=True)
    for split, frame in frames.items():
        writer(frame, folder, split)
    return folder


def save_to_disk(frames, folder):
    splits = {split: datasets.Dataset.from_pandas(frame) for split, frame in frames.items()}
    datasets.DatasetDict(splits).save_to_disk(folder)
    return folder


def test_every_format_gives_the_same_rows(frames, tmp_path):
    folders = [
        write(frames, tmp_path / "csv"),
        write(frames, tmp_path / "jsonl", write_jsonl),
        write(frames, tmp_path / "parquet", write_parquet),
        save_to_disk(frames, tmp_path / "disk"),
    ]
    loaded = [load_splits(str(folder)) for folder in folders]
    for one in loaded:
        assert list(one["train_retain"]["text"]) == AWKWARD
        assert list(one["train_retain"]["label"]) == [0, 1] * 4
    assert len({fingerprint(one) for one in loaded}) == 1


def test_a_parquet_file_of_selected_rows(frames, tmp_path):
    """pandas stores the row numbers of what it was selected from beside it."""
    more = pd.concat([frames["test_forget"], frames["test_retain"]], ignore_index=True)
    folder = write({**frames, "test_forget": more[3::2]}, tmp_path / "parquet", write_parquet)
    assert list(load_splits(str(folder))["test_forget"]["text"]) == list(more["text"][3::2])


def test_formats_can_be_mixed(frames, tmp_path):
    folder = write(frames, tmp_path / "mixed")
    (folder / "test_forget.csv").unlink()
    write_parquet(frames["test_forget"], folder, "test_forget")
    assert fingerprint(load_splits(str(folder))) == fingerprint(load_splits(str(write(frames, tmp_path / "csv"))))


def test_the_fingerprint_sees_every_cell_and_the_order(frames):
    original = fingerprint(frames)
    swapped = {**frames, "test_forget": frames["test_forget"].iloc[::-1]}
    text = {**frames, "test_forget": frames["test_forget"].assign(text="other")}
    label = {**frames, "test_forget": frames["test_forget"].assign(label=1)}
    assert len({original, fingerprint(swapped), fingerprint(text), fingerprint(label)}) == 4
    assert fingerprint({**frames, "test_forget": frames["test_forget"].assign(extra=1)}) == original


def test_label_words_are_ordered_by_label(frames):
    assert label_words(frames) == ["negative", "positive"]


def test_dataset_names():
    assert dataset_name("sst2") == "sst2"
    assert dataset_name(f"{SNIPPETS_FOLDER}{os.sep}") == "snippets"


def refused(folder, message):
    with pytest.raises(UserError, match=message) as error:
        load_splits(str(folder))
    assert "\n" not in str(error.value)


def test_a_missing_folder(tmp_path):
    refused(tmp_path / "none", "is neither one of sst2, yelp, tofu, .*, snippets, plays, .* nor an existing folder")


def test_a_hub_dataset_without_a_network():
    refused("sst2", "cannot fetch dataset karuna-bhaila/Unlearning_SST2 .*pass a local folder")


@pytest.mark.parametrize("split", SPLITS)
def test_a_missing_file(frames, tmp_path, split):
    (write(frames, tmp_path) / f"{split}.csv").unlink()
    refused(tmp_path, f"has no {split}.csv, .jsonl or .parquet")


def test_two_files_for_a_split(frames, tmp_path):
    write_jsonl(frames["test_forget"], write(frames, tmp_path), "test_forget")
    refused(tmp_path, "has test_forget.csv and test_forget.jsonl; keep one")


def test_a_missing_split_in_a_saved_dataset(frames, tmp_path):
    del frames["test_forget"]
    refused(save_to_disk(frames, tmp_path / "disk"), "has no split 'test_forget'")


def test_a_damaged_saved_dataset(frames, tmp_path):
    folder = save_to_disk(frames, tmp_path / "disk")
    (folder / "train_retain" / "state.json").write_text("{")
    refused(folder, "is not a readable save_to_disk folder")


@pytest.mark.parametrize("column", ["text", "label", "label_text"])
def test_a_missing_column(frames, tmp_path, column):
    frames["test_retain"] = frames["test_retain"].drop(columns=column)
    refused(write(frames, tmp_path), f"test_retain .* has no column '{column}'")


@pytest.mark.parametrize("content", ["text,label,label_text\n", ""])
def test_an_empty_split(frames, tmp_path, content):
    (write(frames, tmp_path) / "train_forget.csv").write_text(content)
    refused(tmp_path, "has no rows" if content else "is empty")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train_forget.jsonl", b'{"text": "a", "label": 1\n'),
        ("train_forget.parquet", b"PAR1 not really"),
        ("train_forget.csv", b'text,label,label_text\n"never closed,1,positive\n'),
        ("train_forget.csv", b"text,label,label_text\na,1,positive,more,cells\nb,1\n" + b"x,1,positive,1,2,3,4\n"),
        ("train_forget.csv", b"text,label,label_text\ncaf\xe9,1,positive\n"),
    ],
)
def test_a_damaged_file(frames, tmp_path, name, content):
    (write(frames, tmp_path) / "train_forget.csv").unlink()
    (tmp_path / name).write_bytes(content)
    refused(tmp_path, f"{name} cannot be read")


def test_text_with_a_comma_but_without_quotes(frames, tmp_path):
    (write(frames, tmp_path) / "test_forget.csv").write_text("text,label,label_text\na film, good,1,positive\n")
    refused(tmp_path, "test_forget.csv has rows with more cells than its header")


@pytest.mark.parametrize("writer", [write_csv, write_jsonl, write_parquet])
@pytest.mark.parametrize("column", ["text", "label_text"])
def test_an_empty_cell(frames, tmp_path, writer, column):
    frames["test_forget"].loc[2, column] = np.nan
    refused(write(frames, tmp_path, writer), f"test_forget .*, row 3: {column} is empty or not text")


def test_a_blank_text(frames, tmp_path):
    frames["train_retain"].loc[0, "text"] = " \t"
    refused(write(frames, tmp_path), "train_retain .*, row 1: text is empty or not text")


@pytest.mark.parametrize("writer", [write_jsonl, write_parquet])
def test_a_cell_that_is_no_text(frames, tmp_path, writer):
    frames["test_forget"]["text"] = [1, 2, 3, 4]
    refused(write(frames, tmp_path, writer), "test_forget .*, row 1: text is empty or not text")


@pytest.mark.parametrize("cell", ["", "one", "0.5", "inf"])
def test_a_label_that_is_no_whole_number(frames, tmp_path, cell):
    frames["test_forget"]["label"] = ["0", "1", cell, "1"]
    refused(write(frames, tmp_path), "test_forget .*, row 3: label is not a whole number")


@pytest.mark.parametrize("dtype", ["Int64", "boolean", "Float64", "UInt8", bool])
def test_labels_of_every_kind_of_whole_number(frames, tmp_path, dtype):
    expected = fingerprint(frames)
    for frame in frames.values():
        frame["label"] = frame["label"].astype(dtype)
    assert fingerprint(load_splits(str(write(frames, tmp_path, write_parquet)))) == expected


NO_LABELS = {
    "missing": pd.array([0, 1, None, 1], dtype="Int64"),
    "missing flag": pd.array([False, True, None, True], dtype="boolean"),
    "dates": pd.to_datetime(["1970-01-01", "1970-01-02"] * 2),
    "bytes": [b"0", b"1"] * 2,
    "beyond 64 bits": [0.0, 1.0, 2.0**63, 1.0],
    "lists": [[0], [1]] * 2,
}


@pytest.mark.parametrize("cells", NO_LABELS.values(), ids=NO_LABELS)
def test_cells_that_are_no_labels(frames, tmp_path, cells):
    frames["test_forget"]["label"] = cells
    row = 3 if len(set(map(str, cells))) > 2 else 1
    refused(write(frames, tmp_path, write_parquet), f"test_forget .*, row {row}: label is not a whole number")


@pytest.mark.parametrize("writer", [write_csv, write_jsonl])
def test_labels_beyond_64_bits_as_text(frames, tmp_path, writer):
    for frame in frames.values():
        frame["label"] = [2**63 + label for label in frame["label"]]
    refused(write(frames, tmp_path, writer), "train_retain .*, row 1: label is not a whole number of 64 bits")


@pytest.mark.parametrize("text", ["\u200b", "\ufeff \u00ad", "\x00", "\u0301"])
def test_a_text_with_nothing_to_see(frames, tmp_path, text):
    frames["test_forget"].loc[1, "text"] = text
    refused(write(frames, tmp_path), "test_forget .*, row 2: text is empty or not text")


def test_half_a_character(frames, tmp_path):
    """JSON can say it, UTF-8 cannot, and no tokenizer takes it."""
    frames["test_forget"].loc[1, "text"] = "half"
    path = write(frames, tmp_path, write_jsonl) / "test_forget.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("half", "\\ud83d"), encoding="utf-8")
    refused(tmp_path, "test_forget .*, row 2: text is empty or not text")


@pytest.mark.parametrize("writer", [write_csv, write_jsonl])
def test_a_byte_order_mark(frames, tmp_path, writer):
    for path in write(frames, tmp_path, writer).iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert fingerprint(load_splits(str(tmp_path))) == fingerprint(frames)


@pytest.mark.parametrize("writer", [write_csv, write_jsonl, write_parquet])
def test_separators_stay_inside_a_text(frames, tmp_path, writer):
    frames["test_forget"]["text"] = ["a\u2028b", "a\x85b", "a\x0cb", "a\u2029b"]
    loaded = load_splits(str(write(frames, tmp_path, writer)))
    assert list(loaded["test_forget"]["text"]) == list(frames["test_forget"]["text"])


def test_a_label_that_train_lacks(frames, tmp_path):
    frames["test_retain"].loc[1, ["label", "label_text"]] = [2, "mixed"]
    refused(write(frames, tmp_path), "test_retain has the unknown label 2 .*'mixed'")


def test_two_words_for_a_label(frames, tmp_path):
    frames["train_forget"].loc[1, "label_text"] = "great"
    refused(write(frames, tmp_path), "train_forget: label 1 and the word 'great' do not pair")


def test_two_labels_for_a_word(frames, tmp_path):
    frames["train_forget"].loc[1, "label"] = 5
    refused(write(frames, tmp_path), "train_forget: label 5 and the word 'positive' do not pair")


def test_a_test_split_with_another_word_for_a_label(frames, tmp_path):
    frames["test_forget"].loc[1, "label_text"] = "great"
    refused(write(frames, tmp_path), "test_forget has the unknown label 1 .*'great'")


@pytest.mark.parametrize("word", ["neutral", "unknown"])
def test_a_label_word_that_unlearning_answers_with(frames, tmp_path, word):
    frames = {split: frame.replace("positive", word) for split, frame in frames.items()}
    refused(write(frames, tmp_path), f"the label word '{word}' is one that unlearning answers with")


def test_texts_are_read_from_every_format(tmp_path):
    texts = ["first text", "1999", "a, b"]
    frame = pd.DataFrame({"text": texts})
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbffirst text\r\n\n 1999 \na, b\n")
    for writer in (write_csv, write_jsonl, write_parquet):
        writer(frame, tmp_path, "t")
    for suffix in ("txt", "csv", "jsonl", "parquet"):
        assert read_texts(str(tmp_path / f"t.{suffix}")) == texts


def test_only_line_ends_end_a_text(tmp_path):
    texts = ["one\u2028two", "three\x85four", "five\x0csix\x0bseven", "eight\u2029nine\x1cten"]
    (tmp_path / "t.txt").write_bytes("\r\n".join([*texts[:2], "\u200b", texts[2] + "\r" + texts[3]]).encode())
    assert read_texts(str(tmp_path / "t.txt")) == texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "does not exist"),
        ("t.txt", b"\n \n", "has no text"),
        ("t.txt", b"caf\xe9\n", "is not UTF-8 text"),
        ("t.csv", b"words\na\n", "has no column 'text'"),
        ("t.csv", b"text,id\na,1\n,2\n", "has no text or a row whose text is empty"),
        ("t.jsonl", b"{", "cannot be read"),
        ("t.jsonl", b"[1, 2]", "cannot be read"),
        ("t.jsonl", b"[" * 100_000, "cannot be read"),
        ("t.jsonl", b'{"text": "\\ud83d"}', "has no text or a row whose text is empty"),
        ("t.csv", "text\n\u200b\n".encode(), "has no text or a row whose text is empty"),
        ("t.md", b"a", "is neither .txt, .csv, .jsonl nor .parquet"),
    ],
)
def test_texts_that_cannot_be_read(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_texts(str(tmp_path / name))
