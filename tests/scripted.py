"""A language model that says what a test wants, token by token."""

import pandas as pd
import tiny
import torch
from transformers.modeling_outputs import CausalLMOutput

from utils.evaluation.scores import score_rows
from utils.interventions.served import Served
from utils.tasks.classification import classification

FILM, BAD, WELL = " film", " bad", " well"  # one token each


class Scripted(torch.nn.Module):
    """Next-token logits = `after[current token]` + the sum of `seen[token]` over the tokens so far; else zero."""

    device, config = torch.device("cpu"), tiny.CONFIGS["llama"]

    def __init__(self, tokenizer, after, seen):
        super().__init__()
        size = len(tokenizer)
        self.after, self.seen = torch.nn.Embedding(size, size), torch.nn.Embedding(size, size)
        self.head = torch.nn.Linear(size, size, bias=False)
        self.head.weight.data = torch.eye(size)
        for table, script in ((self.after, after), (self.seen, seen)):
            table.weight.data.zero_()
            for token, logits in script.items():
                for following, value in logits.items():
                    table.weight.data[one(tokenizer, token), one(tokenizer, following)] = value

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask, use_cache=False):
        return CausalLMOutput(logits=self.head(self.after(input_ids) + self.seen(input_ids).cumsum(1)))


def one(tokenizer, piece):
    """The id of a piece that must be one token."""
    if isinstance(piece, int):
        return piece
    ids = tokenizer(piece)["input_ids"]
    assert len(ids) == 1, (piece, ids)
    return ids[0]


def scripted(tokenizer, after, seen):
    return Served(Scripted(tokenizer, after, seen), tokenizer, [])


def score(loaded, texts, labels, words, batch_size=32):
    return score_rows(
        loaded, pd.DataFrame({"text": texts, "label_text": labels}), classification(words), 200, batch_size
    )
