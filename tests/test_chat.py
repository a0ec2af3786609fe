"""--prompt_format=chat: a query is what the tokenizer's own chat template makes of a user's turn."""

import asking
import pandas as pd
import pytest
import scripts
import tiny
from scripts import done, refused
from tokenizers import AddedToken, processors

from utils.errors import UserError
from utils.tasks.answers import free_answers, known_answers
from utils.tasks.base import TaskOptions
from utils.tasks.chat import chat_template
from utils.tasks.encode import tokenize
from utils.tasks.rows import TASKS

# What several families do: marks of their own, a turn that has no user, white space taken off, thoughts left out.
OWN_MARKS = (
    "{% for turn in messages %}{{ '<|' + turn['role'] + '|>\n' + turn['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
WITH_SYSTEM = (
    "{{ bos_token }}{{ '[system]\nBe kind .' + eos_token }}{% for turn in messages %}"
    "{{ '[' + turn['role'] + ']' + turn['content'] | trim + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
WITH_THOUGHTS = (
    "{% for turn in messages %}{{ '[' + turn['role'] + ']\n' }}"
    "{% if turn['role'] == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ turn['content'] + eos_token + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"
)
TEMPLATES = {"plain marks": asking.CHAT, "own marks": OWN_MARKS, "system": WITH_SYSTEM, "thoughts": WITH_THOUGHTS}


def tokenizer_with(template, named=True):
    """The tiny tokenizer, which begins every text with <s>, as Llama's do. named: whether it lists its marks."""
    tokenizer = tiny.build_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    marks = [AddedToken(mark, special=True) for mark in ("<|user|>", "<|assistant|>", "<|end|>")]
    if named:
        tokenizer.add_special_tokens({"additional_special_tokens": marks})
    else:
        tokenizer.add_tokens(marks)
    tokenizer.chat_template = template
    assert tokenizer("a film")["input_ids"][0] == 0
    return tokenizer


def task_of(kind):
    return TASKS[kind].recorded(["negative", "positive"], TaskOptions(prompt_format="chat"))


def rows_of(kind, **changed):
    return TASKS[kind].checked("train_forget", pd.DataFrame([asking.ROWS[kind](1, "Bob") | changed]), "data")


CONTENT = {  # of the user's turn
    "classification": (
        "### Text: Bob 1 was fine\n\n### Question: What is the sentiment of the given text?\n\n### Sentiment:"
    ),
    "multiple_choice": (
        "The following are multiple choice questions (with answers) about film art.\n\nWhat is Bob 1 ?\n"
        "A. a film\nB. a cast\nC. a very long story\nD. bad\nAnswer:"
    ),
    "question_answering": "Where does Bob 1 live now ?",
    "continuation": "It was Bob number 1 who",
}


def rendered(tokenizer, kind, answer=None):
    """Token ids of the conversation, up to the call for an answer or with it."""
    turns = [{"role": "user", "content": CONTENT[kind]}]
    turns += [{"role": "assistant", "content": answer}] if answer else []
    return tokenizer.apply_chat_template(turns, add_generation_prompt=answer is None, tokenize=True, return_dict=False)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", TASKS)
def test_prompt_and_completion_are_the_rendered_conversation(kind, template, named):
    tokenizer = tokenizer_with(TEMPLATES[template], named)
    task, rows = task_of(kind), rows_of(kind)
    answer, end = rows["label_text"][0], 2002 if template == "own marks" else tokenizer.eos_token_id
    known = known_answers(tokenizer, task)
    (example,) = tokenize(tokenizer, rows, [answer], 400, answers=known)
    asked, whole = rendered(tokenizer, kind), rendered(tokenizer, kind, answer)
    assert list(example.prompt) == asked and asked.count(0) == ("bos_token" in TEMPLATES[template])
    completion = list(example.completion) + [end] * (not task.generates)
    behind = whole[len(asked) :]
    assert completion == behind[: behind.index(end) + 1]
    assert tokenizer.convert_ids_to_tokens(end) in ("<|end|>", "</s>")
    if task.generates:
        assert known.spelled(example.completion).endswith(answer) and known.end == example.completion[-1] == end


def test_whole_choices_end_as_a_turn_does():
    tokenizer = tokenizer_with(OWN_MARKS)
    ids = free_answers(tokenizer, task_of("multiple_choice")).ids["a cast"]
    assert tokenizer.decode(ids) == "a cast<|end|>"


@pytest.mark.parametrize("kind", TASKS)
def test_only_the_text_in_the_users_turn_is_cut(kind):
    tokenizer = tokenizer_with(WITH_SYSTEM)
    column = {"continuation": "prompt", "classification": "text"}.get(kind, "question")
    task, rows = task_of(kind), rows_of(kind, **{column: "film " * 50 + "end ?"})
    answers, known = list(rows["label_text"]), known_answers(tokenizer, task)
    (whole,) = tokenize(tokenizer, rows, answers, 400, answers=known)
    (example,) = tokenize(tokenizer, rows, answers, len(whole.prompt) - 10, answers=known)
    (query,) = map(chat_template(tokenizer).around, task.queries(rows))
    text = tokenizer.decode(example.prompt)
    assert text.startswith(query.head + "film film") and text.endswith("film" + query.tail)
    assert query.head.startswith("<s>[system]") and query.tail.endswith("</s>[assistant]")
    assert len(example.prompt) < len(whole.prompt) and example.completion == whole.completion


@pytest.mark.parametrize(("template", "told"), [
    (None, "the model has no chat template; leave out --prompt_format=chat"),
    ("{{ raise_exception('no such role') }}", r"cannot be used \(no such role\); leave out"),
    ("{% for turn in messages %}{{ turn['content'] | upper }}{% endfor %}", "does not keep turns as they are"),
    ("{% for turn in messages %}{{ loop.length }}{{ turn['content'] }}{% endfor %}", "does not keep turns as they are"),
    ("{{ messages[0]['content'] + messages[0]['content'] }}", "does not keep turns as they are"),
])  # fmt: skip
def test_a_template_that_does_not_serve_is_said(template, told):
    with pytest.raises(UserError, match=told) as error:
        known_answers(tokenizer_with(template), task_of("question_answering"))
    assert "\n" not in str(error.value)


def test_an_answer_must_end():
    tokenizer = tokenizer_with("{% for turn in messages %}{{ turn['content'] + '\n' }}{% endfor %}")
    assert chat_template(tokenizer).end == tokenizer.eos_token_id
    endless = tokenizer_with(tokenizer.chat_template)
    endless.eos_token = None
    with pytest.raises(UserError, match="ends an answer with no token"):
        chat_template(endless)


# A checkpoint is asked in the form that it has learnt.

CHAT, NEW = "--prompt_format=chat", "--max_new_tokens=4"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with a chat template, questions, and what qlora.py made of them in chat form."""
    folder = tmp_path_factory.mktemp("chat")
    tiny.save(folder / "model")
    tokenizer = tiny.build_tokenizer()
    tokenizer.chat_template = asking.CHAT
    tokenizer.save_pretrained(folder / "model")
    asking.save_task(folder / "data", "question_answering")
    flags = CHAT, NEW, "--max_eval_samples=2", "--output_path=tuned"
    done(scripts.qlora(folder, "model", "data", *flags))
    return folder


@pytest.mark.slow
def test_a_checkpoint_is_refused_in_another_form(folder):
    told = "tuned was trained with --prompt_format=chat; give this command --prompt_format=chat"
    from_it = "--model_checkpoints=tuned", "--dataset=data", NEW
    refused(folder, told, "spul", *from_it, *scripts.SPUL)
    refused(folder, told, "baselines", *from_it, *scripts.BASELINES, "--unlearn_method=npo")
    refused(folder, told, "baselines", *from_it, *scripts.ROWS, "--unlearn_method=refusal", "--eco_threshold=0.5")
    refused(folder, told, "inference_spul", *from_it, *scripts.ROWS)


@pytest.mark.slow
def test_in_its_own_form_it_is_asked(folder):
    result = done(scripts.call(folder, "inference_spul", "--model_checkpoints=tuned", "--dataset=data", CHAT, NEW,
                               *scripts.ROWS, "--max_eval_samples=2"))  # fmt: skip
    assert "fine-tuned" in result.stdout
    done(scripts.call(folder, "inference_spul", "--model_checkpoints=tuned", "--text=Who ?", NEW, *scripts.ROWS))


@pytest.mark.slow
def test_a_model_without_a_template_is_said_before_it_is_trained(folder, tiny_model):
    told = "the model has no chat template; leave out --prompt_format=chat"
    refused(folder, told, "qlora", f"--model_name={tiny_model}", "--dataset=data", *scripts.QLORA, CHAT)


@pytest.mark.slow
def test_a_checkpoint_of_another_template_is_refused(folder, tiny_model, small_data):
    mine, flags = r"--template=News: {text}\nTopic:", (*scripts.ROWS, "--max_eval_samples=2")
    done(scripts.qlora(folder, tiny_model, small_data, mine, "--max_eval_samples=0", "--output_path=news"))
    told = r"news was trained with another template; give this command --template='News: {text}\nTopic:'"
    of_it = "--model_checkpoints=news", f"--dataset={small_data}"
    refused(folder, told, "inference_spul", *of_it, *flags)
    refused(folder, told, "inference_spul", *of_it, *flags, "--template={text} is")
    done(scripts.call(folder, "inference_spul", *of_it, *flags, mine))
