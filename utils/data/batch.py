"""Rows as token ids, and the batches that training and evaluation make of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

PINNED = ("cuda",)  # devices that read pinned memory while the CPU goes on
CPU_TOKENS = 512  # of a micro-batch on a CPU, padding included: more of them take memory, and no less time a token


@dataclass(frozen=True)
class Example:
    """One row as token ids: `prompt` (template with the text) and `completion` (the answer's tokens).

    forget: whether it is a row to forget; None: neither kind, it is read for its logits alone. marked: the prompt
    positions that a corruption changes, if one is applied. Its length is the number of tokens that the model reads: all
    but the last of the completion.
    """

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    forget: bool | None = False
    marked: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion) - 1  # the last completion token is predicted, never read


@dataclass(frozen=True)
class Batch:
    """B rows, right-padded to T tokens, with the N completion tokens of all rows listed flat.

    input_ids, attention_mask: (B, T). Completion token n stands in row `rows[n]`, is predicted at position
    `positions[n]` and is `targets[n]`; all (N,). forget_tokens, retain_tokens: which of the N belong to rows to forget,
    and which to rows to keep.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    rows: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    forget_tokens: torch.Tensor
    retain_tokens: torch.Tensor


def collate(examples: Sequence[Example], pad_id: int, device: torch.device | str) -> Batch:
    """A Batch of `examples` on `device`. Masks come from lengths, so the pad token may be any token."""
    length = max(map(len, examples))
    input_ids = torch.full((len(examples), length), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    rows, positions, targets = [], [], []
    for row, example in enumerate(examples):
        ids = example.prompt + example.completion[:-1]
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = 1
        rows += [row] * len(example.completion)
        positions += range(len(example.prompt) - 1, len(ids))
        targets += example.completion
    kinds = [examples[row].forget for row in rows]
    places = ([n for n, forget in enumerate(kinds) if forget == wanted] for wanted in (True, False))
    flat = (torch.tensor(values, dtype=torch.long) for values in (rows, positions, targets, *places))
    return Batch(*(to_device(tensor, device) for tensor in (input_ids, attention_mask, *flat)))


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """`tensor`, which lies on the CPU, on `device`. To CUDA it goes from pinned memory, and the CPU does not wait for
    it: what runs there later in the same stream reads it after the copy."""
    if torch.device(device).type in PINNED:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def index_on(device: torch.device | str, numbers: Sequence) -> torch.Tensor:
    """The whole numbers `numbers`, which may be nested, as an int64 tensor on `device`, sent as `to_device` does."""
    return to_device(torch.tensor(numbers, dtype=torch.long), device)


def in_groups(n: int, fits: Callable[[list[int]], bool]) -> Iterator[list[int]]:
    """The numbers below `n` in order, in groups that grow as long as `fits(group)`; one alone may not fit."""
    group: list[int] = []
    for i in range(n):
        if group and not fits([*group, i]):
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def micro_batches(rows: Sequence[int], examples: Sequence[Example], size: int | None, device: str) -> list[list[int]]:
    """The row numbers of a step in the parts that are computed at once: rows of similar length, longest first.

    The order changes a step's sums by rounding only. size: rows of a part. None: all at once on a GPU, which is faster
    there; on a CPU, where it is not, CPU_TOKENS a part, which saves padding and memory.
    """
    ordered = sorted(rows, key=lambda i: -len(examples[i]))

    def fits(group: list[int]) -> bool:
        if size:
            return len(group) <= size
        return device != "cpu" or len(group) * len(examples[ordered[group[0]]]) <= CPU_TOKENS

    return [[ordered[n] for n in group] for group in in_groups(len(ordered), fits)]


def epoch_batches(
    examples: list[Example],
    batch_size: int,
    seed: int,
    epoch: int,
    forget_per_batch: int = 0,
    length_pool: int | None = 0,
    retain_ratio: float | None = None,
) -> list[list[int]]:
    """The row numbers of every batch of one epoch: a pure function of its arguments, so a resumed run sees the same.

    batch_size: rows. seed: of the order. epoch: its number from 0.
    forget_per_batch = 0: all rows shuffled together, each once, as published. n > 0: every batch has n forget rows
    (drawn in shuffled passes) and the epoch ends when each retain row was seen once. length_pool = k > 0: rows are
    sorted by length within pools of k batches, which saves padding; each row still counts once. None: pools of the
    size that the published code has, 50 batches or a quarter of the epoch (Trainer's `group_by_length`). There the
    batches of a pool come longest first; here all are shuffled, so that a short run meets every length.
    retain_ratio = r: the epoch's retain rows are r per forget row, drawn anew every epoch (all if there are fewer).
    """
    rng = np.random.default_rng([seed, epoch])
    forget = [i for i, e in enumerate(examples) if e.forget]
    retain = [i for i, e in enumerate(examples) if not e.forget]
    if retain_ratio:
        kept = min(len(retain), max(1, round(retain_ratio * len(forget))))
        retain = sorted(rng.choice(retain, kept, replace=False))
    if length_pool is None:
        length_pool = min(50, (len(retain) + len(forget)) // (4 * batch_size))
    if forget_per_batch and retain:  # a strict gate may leave none
        retain = rng.permutation(retain)
        n_batches = -(-len(retain) // (batch_size - forget_per_batch))
        passes = -(-n_batches * forget_per_batch // len(forget))
        forget = np.concatenate([rng.permutation(forget) for _ in range(passes)])[: n_batches * forget_per_batch]
        parts = [(retain, batch_size - forget_per_batch), (forget, forget_per_batch)]
    else:
        parts = [(rng.permutation(sorted([*retain, *forget])), batch_size)]
    chunked = [_chunks(_sorted_in_pools(rows, size * length_pool, examples), size) for rows, size in parts]
    batches = [[int(i) for part in batch for i in part] for batch in zip(*chunked)]
    return [batches[i] for i in rng.permutation(len(batches))] if length_pool else batches


def _sorted_in_pools(rows: Sequence[int], pool: int, examples: Sequence[Example]) -> Sequence[int]:
    if not pool:
        return rows
    return [i for part in _chunks(rows, pool) for i in sorted(part, key=lambda i: len(examples[i]))]


def _chunks(rows: Sequence[int], size: int) -> list[Sequence[int]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]
