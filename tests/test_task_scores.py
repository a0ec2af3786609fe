"""Scores of questions and passages are those of plain passes, one row at a time, whatever stands before the model."""

import pandas as pd
import pytest
import tiny
import torch
from asking import Word, passage_row, question_row

from utils.errors import UserError
from utils.evaluation.run import check_rows
from utils.evaluation.scores import score_rows
from utils.interventions.corruption import Corruption
from utils.interventions.eco import CorruptedEmbeddings, Marks
from utils.interventions.gates import Gate
from utils.interventions.prompt_encoders import Prompt
from utils.interventions.refusal import refuse
from utils.interventions.served import Served
from utils.tasks.base import Asked, TaskOptions
from utils.tasks.continuation import Continuation
from utils.tasks.multiple_choice import MultipleChoice
from utils.tasks.question_answering import QuestionAnswering
from utils.tasks.rows import Splits

NEW, FLIPPED = 6, 64  # tokens of an answer, dimensions whose sign the corruption turns
KINDS = {QuestionAnswering: question_row, Continuation: passage_row}
NAMES = ["Bob", "a film", "Bob Ray and the bad cast", "the story"]
EXACT = ("prediction", "correct", "tokens", "exact_memorisation", "extraction_strength")


@pytest.fixture(scope="module")
def plain(tokenizer):
    """A random model whose answers depend on all that it reads: its weights are larger than freshly drawn ones."""
    model = tiny.build_model("llama", seed=3).requires_grad_(False)
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and "embed" not in name:
            weight.data *= 4
    return Served(model, tokenizer, [])


def rows_of(kind):
    rows = [KINDS[kind](i, name) for i, name in enumerate(NAMES)]
    if kind is QuestionAnswering:
        rows[1] |= {"paraphrased_answer": None, "perturbed_answer": None}
    return kind.checked("train_forget", pd.DataFrame(rows), "data")


def task_of(kind):
    return kind.recorded((), TaskOptions(max_new_tokens=NEW))


def only_bob():
    return Gate(Word("Bob"), 0.5)


def prompted(plain, gate=None):
    vectors = torch.randn(5, 128, generator=torch.Generator().manual_seed(0)) * 0.1
    return plain.using(Prompt(vectors=vectors, gate=gate))


def corrupted(plain, gate=None):
    corruption = Corruption("flip-first", 0.0, FLIPPED, seed=0)
    return plain.using(CorruptedEmbeddings(corruption=corruption, marks=Marks(), gate=gate))


def as_they_are(embedded):
    return embedded


def behind_virtual_tokens(plain):
    return lambda embedded: torch.cat([prompted(plain).interventions[0].vectors, embedded])


def flipped(embedded):
    """All but the last token."""
    changed = embedded.clone()
    changed[:-1, :FLIPPED] *= -1
    return changed


@torch.no_grad()
def by_hand(plain, task, row, text, before):
    """What `row_scores` makes of a row whose prompt is this text, of which `before` makes the embeddings."""
    embed = plain.model.get_input_embeddings()
    ids = lambda text: plain.tokenizer(text)["input_ids"]  # noqa: E731
    prompt, end = embed(torch.tensor(ids(text))), plain.tokenizer.eos_token_id
    front = before(prompt)

    def logits(tokens, front=front):
        behind = embed(torch.tensor(tokens, dtype=torch.long))
        return plain.model(inputs_embeds=torch.cat([front, behind])[None], use_cache=False).logits[0, len(front) - 1 :]

    (completions,), asked, answer = task.asks(pd.DataFrame([row])), {}, []
    for name, completion in completions.items():
        tokens = [*ids(f" {completion}"), end]
        found = logits(tokens[:-1])
        log_p = found.log_softmax(-1)[range(len(tokens)), tokens]
        asked[name] = Asked(log_p.tolist(), (found.argmax(-1) == torch.tensor(tokens)).tolist())
    while len(answer) < NEW and answer[-1:] != [end]:
        answer.append(logits(answer)[-1].argmax().item())
    said = plain.tokenizer.decode([token for token in answer if token != end], skip_special_tokens=True).strip()
    scores = task.row_scores(row, asked, said)
    if task.judged:  # by the frozen model alone
        log_p = logits(answer[:-1], prompt).log_softmax(-1)[range(len(answer)), answer]
        scores["generated_perplexity"] = log_p.mean().neg().exp().item()
    return scores


def slowly(plain, kind, before, acts=lambda text: True):
    """The same of all rows; `before` only of those whose text `acts`."""
    task, around = task_of(kind), ("Question: ", "\nAnswer:") if kind is QuestionAnswering else ("", "")
    found = []
    for row in rows_of(kind).to_dict("records"):
        how = before if acts(row["text"]) else as_they_are
        found.append(by_hand(plain, task, row, row["text"].join(around), how))
    return pd.DataFrame(found)


def score(served, kind, batch_size=3, frozen=None):
    return score_rows(served, rows_of(kind), task_of(kind), 200, batch_size, frozen=frozen)


def assert_same(found, wanted):
    for column in wanted:
        if column in EXACT:
            assert list(found[column]) == list(wanted[column]), column
        else:
            assert list(found[column]) == pytest.approx(list(wanted[column]), rel=1e-3, nan_ok=True), column


def with_bob(text):
    return "Bob" in text


@pytest.mark.parametrize("kind", KINDS)
def test_plain_rows(plain, kind):
    found, wanted = score(plain, kind), slowly(plain, kind, as_they_are)
    assert wanted["prediction"].nunique() == len(NAMES) and set(found) == set(wanted)  # answers depend on the rows
    assert_same(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("made", "before"), [
    (prompted, behind_virtual_tokens), (corrupted, lambda plain: flipped),
])  # fmt: skip
def test_rows_behind_an_intervention_with_and_without_a_gate(plain, kind, made, before):
    alone, wanted = slowly(plain, kind, as_they_are), slowly(plain, kind, before(plain))
    assert (wanted["loss"] - alone["loss"]).abs().min() > 1e-2  # it changes every row
    assert_same(score(made(plain), kind), wanted)
    found = score(made(plain, only_bob()), kind)
    assert list(found["flagged"]) == [True, False, True, False]
    assert_same(found, slowly(plain, kind, before(plain), with_bob))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_behind_a_refusal(plain, kind):
    """The true answer does not begin as the refusal does: its first token is all but impossible, of the others each is
    as likely as any token."""
    task = task_of(kind)
    answer = task.refusals[3]
    found = score(plain.using(refuse(plain, task, only_bob(), answer)), kind)
    wanted = slowly(plain, kind, as_they_are)
    flags, size = found["flagged"].to_numpy(), plain.model.get_output_embeddings().weight.shape[0]
    assert_same(found[~flags], wanted[~flags])
    assert list(found["prediction"][flags]) == [answer, answer] and not found["correct"][flags].any()
    assert list(found["loss"][flags]) == pytest.approx(
        [40 + (n - 1) * torch.tensor(size).log().item() for n in wanted["tokens"][flags]], rel=1e-4
    )


def test_the_refusal_itself_is_certain(plain):
    task = task_of(QuestionAnswering)
    rows = rows_of(QuestionAnswering).head(1).assign(label_text=task.refusals[3])
    (row,) = score_rows(plain.using(refuse(plain, task, None, task.refusals[3])), rows, task, 200, 3).to_dict("records")
    assert row["correct"] and row["probability"] == pytest.approx(1) and row["extraction_strength"] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_corruption_never_touches_an_answer(plain, kind):
    """Whatever the answer, the same embeddings stand before it, and its own are plain."""
    rows, seen = rows_of(kind).head(1), []
    long = rows.assign(label_text="the bad cast of a film , and more of it in a house by the sea with a fine story")
    model = plain.model
    handles = [
        model.model.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append([kwargs["input_ids"]]), with_kwargs=True
        ),
        model.model.layers[0].register_forward_pre_hook(lambda _, inputs: seen[-1].append(inputs[0])),
    ]
    try:
        for frame in (rows, long):
            score_rows(corrupted(plain), frame, task_of(kind), 200, 1, score="probability")
    finally:
        for handle in handles:
            handle.remove()
    (query,) = task_of(kind).queries(rows)
    n = len(plain.tokenizer(str(query))["input_ids"])
    with torch.inference_mode():
        plainly = [model.get_input_embeddings()(ids)[0] for ids, _ in seen]
    assert len({len(ids[0]) for ids, _ in seen}) > 1  # answers of different lengths
    for own, (_, embedded) in zip(plainly, seen):
        assert torch.equal(embedded[0, :n], flipped(own[:n])) and torch.equal(embedded[0, n:], own[n:])


@pytest.mark.parametrize("kind", [*KINDS, MultipleChoice])
def test_a_gate_sees_the_question_only(plain, kind):
    gate, task = only_bob(), task_of(kind)
    if kind is MultipleChoice:
        row = {"question": "What is a film ?", "choices": ["Bob", "a cast", "bad", "it"], "answer": "A"}
        rows = kind.checked("train_forget", pd.DataFrame([row]), "data")
    else:
        rows = rows_of(kind).assign(label_text="Bob made it")
    scored = score_rows(corrupted(plain, gate), rows, task, 200, 3)
    assert gate.classifier.asked == list(rows["text"])  # each once, nothing around it
    assert list(scored["flagged"]) == [with_bob(text) for text in rows["text"]]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_the_frozen_model_are_taken_where_nothing_acts(plain, kind):
    served, seen = prompted(plain, only_bob()), []
    wanted, frozen = score(served, kind), score(plain, kind)
    frozen["loss"] += 100  # to be seen again
    handle = plain.model.register_forward_pre_hook(lambda *_: seen.append(1))
    try:
        known = frozen.to_dict("records")
        found = score(served, kind, frozen=known)
        flags = wanted["flagged"].to_numpy()
        assert list(found["loss"][~flags]) == list(frozen["loss"][~flags])
        assert_same(found.assign(loss=found["loss"].where(flags, found["loss"] - 100)), wanted)
        seen.clear()
        score(plain.using(Prompt(vectors=torch.ones(1, 128), gate=Gate(Word("nobody"), 0.5))), kind, frozen=known)
        assert not seen  # where no row is flagged the model is not asked
        missing = [None] * len(known)
        first = score(served, kind, frozen=missing)
        assert [row is None for row in missing] == list(flags)  # put in for the next that lets these rows through
        pd.testing.assert_frame_equal(score(served, kind, frozen=missing), first)
    finally:
        handle.remove()


# What is asked about must fit before anything is trained.


@pytest.mark.parametrize(("kind", "row"), [
    (QuestionAnswering, {"question": "Who ?", "answer": "Ann", "perturbed_answer": ["a film " * 50]}),
    (QuestionAnswering, {"question": "Who ?", "answer": "Ann", "paraphrased_answer": "a film " * 50}),
    (MultipleChoice, {"question": "Who ?", "choices": ["it", "bad", "a cast", "film " * 50], "answer": "A"}),
])  # fmt: skip
def test_every_completion_must_fit(plain, kind, row):
    rows = kind.checked("train_retain", pd.DataFrame([row]), "data")
    frames = Splits(dict.fromkeys(("train_retain", "train_forget", "test_retain", "test_forget"), rows), task_of(kind))
    config = tiny.CONFIGS["llama"]
    n = len(plain.tokenizer(str(frames.task.queries(rows)[0]))["input_ids"])
    with pytest.raises(UserError, match="cannot hold template and label; use at least"):
        check_rows(config, plain.tokenizer, frames, n + 20)
    check_rows(config, plain.tokenizer, frames, 400)
    few = type(config)(**config.to_dict() | {"max_position_embeddings": n + 20})
    with pytest.raises(UserError, match="positions"):
        check_rows(few, plain.tokenizer, frames, 400)


def test_the_length_that_is_asked_for_is_enough_for_every_row_of_every_split(plain):
    kind = MultipleChoice
    own = [["it", "bad", "film", "cast " * n] for n in (20, 80, 40, 60)]
    splits = "train_retain", "train_forget", "test_retain", "test_forget"
    frames = Splits(
        {
            split: kind.checked(split, pd.DataFrame([{"question": "Who ?", "choices": c, "answer": "A"}]), "data")
            for split, c in zip(splits, own)
        },
        task_of(kind),
    )
    with pytest.raises(UserError) as said:
        check_rows(tiny.CONFIGS["llama"], plain.tokenizer, frames, 12)
    least = int(str(said.value).split()[-1])
    check_rows(tiny.CONFIGS["llama"], plain.tokenizer, frames, least)
    with pytest.raises(UserError, match=f"use at least {least}"):
        check_rows(tiny.CONFIGS["llama"], plain.tokenizer, frames, least - 1)
