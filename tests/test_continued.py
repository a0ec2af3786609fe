"""Completions behind one pass over their prompt get the numbers of a pass for each, whatever stands before them."""

import contextlib
from dataclasses import replace

import pandas as pd
import pytest
import tiny
import torch
from asking import Word, choice_row, question_row
from transformers import AutoModelForCausalLM, BloomConfig, MambaConfig

from utils.data.batch import Example, collate
from utils.evaluation.scores import score_rows
from utils.interventions import served as serving
from utils.interventions.corruption import Corruption
from utils.interventions.eco import CorruptedEmbeddings, Marks
from utils.interventions.gates import Gate
from utils.interventions.prompt_encoders import Prompt
from utils.interventions.served import Served
from utils.models.adapters import LoraSettings, add_lora
from utils.models.attention import GROUPED
from utils.models.continued import logits_behind, read_prompts, shares_prompts
from utils.models.forward import completion_logits, prompt_prefix
from utils.tasks.base import TaskOptions
from utils.tasks.classification import classification
from utils.tasks.multiple_choice import MultipleChoice
from utils.tasks.question_answering import QuestionAnswering

LENGTHS = 30, 7, 18, 3  # of prompts, beyond the sliding window of 16 too
COMPLETIONS = 1, 4, 9, 2  # tokens
BLOOM = BloomConfig(vocab_size=tiny.VOCABULARY, hidden_size=128, n_layer=2, n_head=4)
ALL = {**tiny.CONFIGS, "bloom": BLOOM}


def drawn(n, generator=torch.Generator().manual_seed(0)):
    return tuple(torch.randint(2, tiny.VOCABULARY, (n,), generator=generator).tolist())


def model_of(architecture, attention="eager"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(ALL[architecture], attn_implementation=attention).float().eval()


EXAMPLES = [Example(drawn(n), (), marked=tuple(range(n - 1))) for n in LENGTHS]
PAIRS = [(row, drawn(n)) for n in COMPLETIONS for row in range(len(LENGTHS))]


@torch.no_grad()
def compare(model, prefix=None, applied=lambda _: contextlib.nullcontext()):
    asked = [replace(EXAMPLES[row], completion=tokens) for row, tokens in PAIRS]
    with applied(asked):
        expected = completion_logits(model, collate(asked, 1, "cpu"), prefix)
    read = read_prompts(model, EXAMPLES, 1, prefix, applied)
    found = logits_behind(model, read, *zip(*PAIRS), 1)
    assert [len(rows) for rows in found] == [len(tokens) for _, tokens in PAIRS]
    assert torch.allclose(torch.cat(found), expected, atol=1e-5)
    return expected


@pytest.mark.parametrize("attention", ["eager", "sdpa", GROUPED])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "opt", "gpt2"])
def test_every_attention(architecture, attention):
    compare(model_of(architecture, attention))


@pytest.mark.parametrize("architecture", ALL)
def test_behind_virtual_tokens_and_without(architecture):
    model = model_of(architecture)
    prefix = prompt_prefix(model, model.get_input_embeddings()(torch.arange(20, 25)).detach() * 1.5)
    assert shares_prompts(model, None) and shares_prompts(model, prefix)
    assert (compare(model) - compare(model, prefix)).abs().max() > 1e-3


def test_a_corruption_changes_the_prompt_and_no_completion():
    model, flip = model_of("llama"), Corruption("flip-first", 0.0, 64, seed=0)
    assert (compare(model, applied=lambda asked: flip.applied(model, asked)) - compare(model)).abs().max() > 1e-3


def test_what_is_not_shared(capsys):
    """A recurrent state, virtual tokens that no layer keeps, and numbers that are others in a trial."""
    mamba = MambaConfig(hidden_size=128, num_hidden_layers=2, vocab_size=tiny.VOCABULARY)
    assert not shares_prompts(AutoModelForCausalLM.from_config(mamba).eval(), None)
    assert "computed once for each of its completions: mamba has layers" in capsys.readouterr().err
    assert not shares_prompts(model_of("llama"), torch.zeros(3, 128))
    model = model_of("llama")
    model.model.layers[0].register_forward_hook(lambda _, args, output: output + output.shape[1])
    assert not shares_prompts(model, None)
    assert "llama does not continue its keys and values exactly" in capsys.readouterr().err


# The same through `score_rows`, which puts letters and choices, or all answers to a question, behind one prompt.


def choices():
    """The third is cut for its choices, which leaves another prompt than for its letter."""
    rows = [choice_row(i, who) for i, who in enumerate(["Bob", "a film", "Bob Ray and the cast " * 9])]
    return MultipleChoice.checked("train_forget", pd.DataFrame(rows), "data"), MultipleChoice.recorded(
        (), TaskOptions()
    )


def questions():
    rows = [question_row(i, who) for i, who in enumerate(["Bob", "a film", "Bob Ray and the bad cast"])]
    rows[1] |= {"paraphrased_answer": None, "perturbed_answer": None}
    task = QuestionAnswering.recorded((), TaskOptions(max_new_tokens=3))
    return QuestionAnswering.checked("train_forget", pd.DataFrame(rows), "data"), task


def sentences():
    """` neutral` and ` astonished` have several tokens."""
    texts = ["Bob was fine", "a film", "Bob Ray and the bad cast"]
    labels = ["neutral", "astonished", "positive"]
    return pd.DataFrame({"text": texts, "label_text": labels}), classification(labels)


def prompted(plain):
    vectors = torch.randn(5, 128, generator=torch.Generator().manual_seed(0)) * 0.1
    return plain.using(Prompt(vectors=vectors))


def corrupted(plain):
    return plain.using(CorruptedEmbeddings(corruption=Corruption("noise-first", 2.0, 64, seed=0), marks=Marks()))


def gated(plain):
    return prompted(plain).behind(Gate(Word("Bob"), 0.5))


def adapted(plain):
    model = add_lora(model_of("llama"), LoraSettings(lora_target_modules=["all-linear"])).eval()
    tiny.perturb(model)
    return replace(plain, model=model)


@pytest.mark.parametrize("made", [lambda plain: plain, prompted, corrupted, gated, adapted])
@pytest.mark.parametrize("rows", [choices, questions, sentences])
def test_scores_are_those_of_the_plain_path(rows, made, tokenizer, monkeypatch):
    served, (frame, task), passes = made(Served(model_of("llama"), tokenizer, [])), rows(), []
    count = lambda _, args, output: passes.append(output[..., 0].numel())  # noqa: E731
    served.model.get_input_embeddings().register_forward_hook(count)
    monkeypatch.setattr(type(task), "generated", ("nothing",))

    def scored():
        passes.clear()
        return score_rows(served, frame, task, 66, 2, score=None if task.words else "truth_score"), sum(passes)

    scored()  # which tries whether prompts can be shared
    found, tokens = scored()
    monkeypatch.setattr(serving, "shares_prompts", lambda *_: False)
    expected, plainly = scored()
    assert tokens < 0.8 * plainly
    assert list(found) == list(expected)
    for column in expected:
        for one, other in zip(found[column], expected[column]):
            assert one == (pytest.approx(other, abs=1e-5, nan_ok=True) if isinstance(other, float | dict) else other)
