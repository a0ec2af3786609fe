"""A model's own chat template, as what it writes around a user's turn and behind an answer."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from utils.errors import UserError, first_line
from utils.tasks.base import Query

USER, ASSISTANT = "UserTurn", "AssistantTurn"  # a template that changes words, or their case, does not find them


@dataclass(frozen=True)
class ChatTemplate:
    """before, after: what stands around the user's turn, the call for an answer included. lead: what the template puts
    in front of an answer. end: the token that ends an answer."""

    before: str
    after: str
    lead: str
    end: int

    def around(self, query: Query) -> Query:
        """`query` as a user's turn."""
        return replace(query, head=self.before + query.head.lstrip(), tail=query.tail.rstrip() + self.after)


@lru_cache(maxsize=4)
def chat_template(tokenizer: Any) -> ChatTemplate:
    """The template of `tokenizer`. Raises UserError where it has none, or one that rewrites what was said before."""
    turns = [{"role": "user", "content": USER}, {"role": "assistant", "content": ASSISTANT}]
    if not tokenizer.chat_template:
        raise UserError("the model has no chat template; leave out --prompt_format=chat")
    try:
        asked = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
        answered = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception as error:  # jinja2 and the template itself raise whatever they like
        raise UserError(
            f"the model's chat template cannot be used ({first_line(error)}); leave out --prompt_format=chat"
        )
    before, said, after = asked.partition(USER)
    lead, answer, rest = answered[len(asked) :].partition(ASSISTANT)
    if not said or not answer or not answered.startswith(asked) or USER in after:
        raise UserError("the model's chat template does not keep turns as they are; leave out --prompt_format=chat")
    ids = tokenizer(rest, add_special_tokens=False)["input_ids"] if rest.strip() else []
    marks = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}  # not all have a name
    special = [token for token in ids if token in marks or token in tokenizer.all_special_ids]
    end = special[0] if special else tokenizer.eos_token_id
    if end is None:
        raise UserError("the model's chat template ends an answer with no token; leave out --prompt_format=chat")
    return ChatTemplate(before, after, lead, end)
