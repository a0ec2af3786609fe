"""L_hide (ours): the label words are held level on forget rows, so that ranking them does not give a refused label.

    L_hide = mean over forget rows of KL( r || q ),    q = softmax over the label words w of log f(w | phi, x)

All tokens of a word count. r is uniform, or what another model says of the row without a prompt (`--hide_like`). That
is the retain model, as a rule: a label that follows from the text alone then stays as likely as it would be had the row
never been seen.
"""

import dataclasses
import gc
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from utils import distributed
from utils.data.batch import Example, collate, index_on, to_device
from utils.data.select import learnt_by
from utils.errors import UserError, note_once
from utils.interventions.served import Served, load_served
from utils.models.base import ModelSettings, load_tokenizer
from utils.models.chain import refuse_prompted, resolve_chain
from utils.models.forward import completion_logits
from utils.models.lengths import check_length, check_tokens
from utils.storage.checkpoints import Link
from utils.tasks.answers import known_answers
from utils.tasks.encode import Tokens
from utils.tasks.rows import Splits
from utils.unlearning import losses

FLAG = "--hide_like"
Like = Mapping[Tokens, Sequence[float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HidingSettings:
    """How much is hidden, and behind what: the flags of those names. hide: W, the weight of L_hide."""

    model_checkpoints: str
    parent_path: str | None = None
    hide: float = 0.0
    hide_like: str | None = None
    dry_run: str | None = None
    max_length: int = 1024
    seed: int = 42
    eval_batch_size: int = 32


class Hiding:
    """The values of L_hide for the rows of a micro-batch. words: token ids of the label words. like: {prompt token ids:
    r, a share for each word, the sum 1}; None for a uniform r."""

    def __init__(self, weight: float, words: Sequence[Tokens], like: Like | None = None) -> None:
        self.weight, self.words, self.like = weight, words, like

    def read(self, examples: Sequence[Example]) -> list[Example]:
        """What the model has to read for `examples`: see `with_words`."""
        return with_words(examples, self.words)

    def scored(self, examples: Sequence[Example]) -> "Scored":
        """Which logits, of the completion tokens of `read(examples)`, L_hide of `examples` is about."""
        return Scored.of(examples, self.words)

    def __call__(self, examples: Sequence[Example], log_p: torch.Tensor) -> torch.Tensor:
        """KL( r || q ) of the F forget rows among `examples`, (F,) nats. log_p: as `Scored.sums` gives it."""
        if self.like is None:
            reference = torch.full_like(log_p, 1 / len(self.words))
        else:
            shares = [self.like[example.prompt] for example in examples if example.forget]
            reference = to_device(torch.tensor(shares, dtype=log_p.dtype), log_p.device).reshape(log_p.shape)
        return losses.word_kl(reference, log_p)


def with_words(examples: Sequence[Example], words: Sequence[Tokens]) -> list[Example]:
    """`examples`, and behind them what else must be read to score every word for those of them that are forget rows.

    A word's last token is predicted, never read. So words of one token need nothing more, and words that differ only in
    their last token share one example. words: token ids.
    """
    every = list(examples)
    known = {begun for example in examples if example.forget for begun in _begun(example)}
    longest_first = sorted(words, key=len, reverse=True)
    for example in examples:
        for word in longest_first if example.forget else ():
            if (example.prompt, word[:-1]) not in known:
                every.append(Example(example.prompt, word, forget=None))
                known.update(_begun(every[-1]))
    return every


@dataclasses.dataclass(frozen=True)
class Scored:
    """Where the words of F forget rows are read off. entries: (completion token, cell, token id) for every token of
    every word of every row, where the cell is row x n_words + word."""

    entries: Sequence[tuple[int, int, int]]
    n_rows: int
    n_words: int

    @classmethod
    def of(cls, examples: Sequence[Example], words: Sequence[Tokens]) -> "Scored":
        """For the forget rows among `examples`, by the completion tokens of `with_words(examples, words)`."""
        every = with_words(examples, words)
        starts = itertools.accumulate((len(example.completion) for example in every), initial=0)
        readers = ((example, start) for example, start in zip(every, starts) if example.forget is not False)
        places = {begun: start + k for example, start in readers for k, begun in enumerate(_begun(example))}
        rows = [example.prompt for example in examples if example.forget]
        entries = [
            (places[prompt, word[:k]], row * len(words) + number, token)
            for row, prompt in enumerate(rows)
            for number, word in enumerate(words)
            for k, token in enumerate(word)
        ]
        return cls(entries, len(rows), len(words))

    def read(self, logits: torch.Tensor, tokens: range) -> dict[str, torch.Tensor]:
        """{"word_log_p": log f of every entry among the completion tokens `tokens`, in nats, "word_cells": its cell}.

        logits (n, |V|): at these tokens.
        """
        chosen = [entry for entry in self.entries if entry[0] in tokens]
        used = {place: at for at, place in enumerate(dict.fromkeys(place for place, _, _ in chosen))}
        numbers = [(used[place], cell, token) for place, cell, token in chosen]
        at, cell, token = index_on(logits.device, numbers).reshape(-1, 3).unbind(1)
        places = index_on(logits.device, [place - tokens.start for place in used])
        return {"word_log_p": logits[places].log_softmax(-1)[at, token], "word_cells": cell}

    def sums(self, read: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """log f(word | x) in nats, summed over a word's tokens, (F, n_words). read: what `read` gave for all tokens."""
        cells = losses.row_sums(read["word_log_p"], read["word_cells"], self.n_rows * self.n_words)
        return cells.view(self.n_rows, self.n_words)


def word_log_p(logits: torch.Tensor, examples: Sequence[Example], words: Sequence[Tokens]) -> torch.Tensor:
    """log f(word | x) in nats, summed over a word's tokens, for the F forget rows among `examples`: (F, n_words).

    logits (N, |V|): at the completion tokens of `with_words(examples, words)`, in that order.
    """
    scored = Scored.of(examples, words)
    return scored.sums(scored.read(logits, range(len(logits))))


def _begun(example: Example) -> list[tuple[Tokens, Tokens]]:
    """What has been read where each completion token of `example` is predicted: (prompt, the tokens before it)."""
    return [(example.prompt, example.completion[:k]) for k in range(len(example.completion))]


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """What L_hide of a run is made of. like: as Hiding has it. link: the last one of the model that gave it."""

    settings: HidingSettings
    frames: Splits
    like: Like | None = None
    link: Link | None = None

    def term(self, served: Served, examples: Sequence[Example], p: int) -> Hiding | None:
        """The Hiding of the rows `examples` for the model `served`; None without L_hide.

        p: virtual tokens. Raises UserError where a row with a label word does not fit the model.
        """
        if not self.settings.hide:
            return None
        words = _word_ids(served.tokenizer, self.frames)
        longest = max(map(len, with_words(examples, words)))
        check_length(served.model.config, longest, p, max(map(len, words)) - 1)
        return Hiding(self.settings.hide, words, self.like)


def find(
    settings: HidingSettings,
    frames: Splits,
    model: ModelSettings,
    rows: Callable[..., tuple[list[Example], list[Example]]],
) -> Source:
    """The Source of a run, for which the model settings.hide_like is asked, where there is one.

    It is loaded for this and let go, before anything else is loaded, so that two models need not fit into memory
    together. A dry run only checks it. rows: as utils.unlearning.objectives.prompt_rows. Raises UserError where
    settings.hide_like is a prompt or has another tokenizer.
    """
    if settings.hide and not frames.task.words:
        raise UserError("--hide holds label words level and these rows have free answers; leave it out")
    if not settings.hide_like:
        return Source(settings, frames)
    own = resolve_chain(settings.model_checkpoints, model.trust_remote_code, settings.parent_path, not settings.dry_run)
    other = resolve_chain(settings.hide_like, model.trust_remote_code, weights=not settings.dry_run)
    refuse_prompted(own)
    refuse_prompted(other, FLAG)
    tokenizer, others = (load_tokenizer(chain, model.set_pad_id, model.trust_remote_code) for chain in (own, other))
    words = _word_ids(tokenizer, frames)
    if words != _word_ids(others, frames) or tokenizer.get_vocab() != others.get_vocab():
        raise UserError(f"{other[-1].name} has another tokenizer than {own[-1].name}; {FLAG} takes one with the same")
    _note_learnt(other[-1], frames)
    if settings.dry_run:
        return Source(settings, frames)
    _, forget = rows(tokenizer, frames, settings.max_length, settings.seed, frames["train_retain"].head(0))
    served = load_served(settings.hide_like, dataclasses.replace(model, gradient_checkpointing=None, compile=False))
    like = _shares(served, forget, words, settings.eval_batch_size)
    del served
    gc.collect()  # hooks tie a model to itself
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return Source(settings, frames, like, other[-1])


@torch.inference_mode()
def _shares(
    served: Served, examples: Sequence[Example], words: Sequence[Tokens], batch_size: int
) -> dict[Tokens, list[float]]:
    """{prompt: softmax over the words of log f(word | x)} of forget rows, computed by all processes together."""
    config = served.model.config
    every = with_words(examples, words)
    check_length(config, max(map(len, every)), 0, max(map(len, words)) - 1)
    check_tokens(config, served.tokenizer, every)
    ordered, own = sorted(examples, key=len), {}
    batches = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    with tqdm(total=len(ordered), desc="hide like", unit="row", dynamic_ncols=True, mininterval=1) as progress:
        for part, n_rows in distributed.deal(batches):
            if part:
                batch = collate(with_words(part, words), served.pad_id, served.model.device)
                log_p = word_log_p(completion_logits(served.model, batch), part, words)
                own |= zip((example.prompt for example in part), log_p.softmax(-1).tolist())
            progress.update(n_rows)
    return {prompt: shares for part in distributed.all_gather(own) for prompt, shares in part.items()}


def _word_ids(tokenizer: Any, frames: Splits) -> list[Tokens]:
    known = known_answers(tokenizer, frames.task)
    return [known.ids[word] for word in frames.task.words]


def _note_learnt(link: Link, frames: Mapping[str, pd.DataFrame]) -> None:
    """Say where the model of `link` was, or may have been, fine-tuned on the rows whose labels are to be hidden."""
    arguments = link.manifest["arguments"] if link.manifest else {}
    if not arguments or "unlearn_method" in arguments:
        return
    if not learnt_by(link.manifest, frames):
        note_once(f"{link.name}, which {FLAG} follows, was fine-tuned on other rows than the ones selected here")
    elif not arguments.get("exclude_forget"):
        note_once(
            f"{link.name} was fine-tuned on the forget rows, so {FLAG} teaches their labels instead of hiding them; "
            "pass what qlora.py --exclude_forget wrote"
        )
