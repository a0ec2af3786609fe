"""Answers of many tokens, greedy or sampled, through transformers' `generate`.

Rows are padded on the left, so that all of them end where the new tokens begin. Positions come from the mask.

Virtual tokens whose keys and values are shared stand directly in front of each row's own tokens, behind its padding. So
every distance between positions is what it is without padding, which sliding windows depend on.

Corrupted embeddings are computed once, for the prompts as they stand in scoring. They take the place of the prompt's
embeddings. No hook of the corruption is there while tokens are generated.
"""

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer

from utils.data.batch import Example
from utils.errors import UserError
from utils.models.attention import GROUPED, SOFTMAX_LANES
from utils.models.forward import Prefix, cache_argument, float32_product, other_state, rounds
from utils.models.layers import decoder_of

Applied = Callable[[Sequence[Example]], AbstractContextManager]
Answer = tuple[tuple[int, ...], float]  # new tokens, and the sum of their log-probabilities in nats


@torch.no_grad()
def generate(
    model: torch.nn.Module,
    examples: Sequence[Example],
    pad_id: int,
    end_ids: Collection[int],
    max_new_tokens: int,
    prompt: Prefix | None = None,
    applied: Applied | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[Answer]:
    """For each example the tokens that follow its `prompt`, and the sum of their log-probabilities in nats.

    One batch. An answer ends with its first token of `end_ids`, which counts, or after `max_new_tokens` tokens. What is
    in the `completion` of an example is not read. The caller sees to it that the model has enough positions.

    pad_id: any token that the model knows. prompt: None, virtual tokens (p, d), or what `prompt_prefix` made of them.
    applied: a context in which the model embeds these examples' prompts as an intervention wants it; None for no
    change. Only the prompts are embedded in it.

    temperature: 0 is greedy: the arg max of the model's own logits. Above it tokens are drawn from
    softmax(logits / temperature) over the whole vocabulary. The same seed and batch give the same tokens; the same row
    in another batch may get others. Log-probabilities are the model's own, those of temperature 1, in both cases.

    No other setting of generation has an effect, in particular none that comes with the model. Logits are those of
    `completion_logits`: a plain head in half precision multiplies in float32. Raises UserError where the
    log-probability of an answer is not finite.
    """
    choice = _Choice(temperature, torch.Generator(model.device).manual_seed(seed))
    answers: dict[int, Answer] = {}
    for rows in _batches(model, examples):
        part = [examples[i] for i in rows]
        answers |= zip(rows, _continue(model, part, pad_id, end_ids, max_new_tokens, prompt, applied, choice))
    return [answers[i] for i in range(len(examples))]


def _batches(model: torch.nn.Module, examples: Sequence[Example]) -> list[list[int]]:
    """All row numbers together; those of each length apart where a layer has a state, into which padding would go."""
    apart = other_state(model) is not None
    batches: dict[int, list[int]] = {}
    for i, example in enumerate(examples):
        batches.setdefault(len(example.prompt) if apart else 0, []).append(i)
    return list(batches.values())


def _continue(
    model: torch.nn.Module,
    examples: Sequence[Example],
    pad_id: int,
    end_ids: Collection[int],
    max_new_tokens: int,
    prompt: Prefix | None,
    applied: Applied | None,
    choice: "_Choice",
) -> list[Answer]:
    """What `generate` returns, of rows that may be padded."""
    shared = isinstance(prompt, list)
    p = prompt[0][0].shape[2] if shared else 0 if prompt is None else len(prompt)
    ids = [torch.tensor((pad_id,) * p + example.prompt) for example in examples]  # virtual tokens count as tokens
    input_ids = _left_padded(ids, pad_id).to(model.device)
    mask = _left_padded([torch.ones_like(row) for row in ids], 0).to(model.device)
    width, kept, embedding = input_ids.shape[1], {}, contextlib.nullcontext()
    if shared:
        pads, room, config = width - mask.sum(1), width + max_new_tokens, decoder_of(model).config
        layers = [_GrowingLayer(*pair, pads, room, config) for pair in prompt]
        kept = {cache_argument(model): Cache(layers=layers)}
    if applied is not None or (p and not shared):
        rows = _embedded(model, examples, pad_id, applied)
        if p and not shared:
            rows = [torch.cat([prompt.to(row), row]) for row in rows]
        embedding = _embedding_replaced(model, _left_padded(rows, 0))
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,  # `choice` adds the noise that makes the arg max a sample
        eos_token_id=sorted(end_ids) or None,
        pad_token_id=pad_id,
    )
    choice.log_p = []
    with embedding, _last_in_float32(model), _without_its_settings(model):
        found = model.generate(
            input_ids,
            attention_mask=mask,
            generation_config=settings,
            logits_processor=LogitsProcessorList([choice]),
            synced_gpus=False,  # processes answer rows of their own, also where weights are in shards
            **kept,
        )
    log_p = torch.stack(choice.log_p, dim=1).double().cpu()
    answers = []
    for tokens, values in zip(found[:, width:].tolist(), log_p):
        n = next((i for i, token in enumerate(tokens, start=1) if token in end_ids), len(tokens))
        answers.append((tuple(tokens[:n]), values[:n].sum().item()))
    if not torch.tensor([total for _, total in answers]).isfinite().all():
        raise UserError("the model's answer is not finite; use --dtype=float32 or another checkpoint")
    return answers


def _left_padded(rows: list[torch.Tensor], value: float) -> torch.Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=value, padding_side="left")


def _embedded(
    model: torch.nn.Module, examples: Sequence[Example], pad_id: int, applied: Applied | None
) -> list[torch.Tensor]:
    """The embeddings (T_i, d) of each example's prompt, padded on the right while they are computed, as in scoring."""
    ids = [torch.tensor(example.prompt, device=model.device) for example in examples]
    padded = pad_sequence(ids, batch_first=True, padding_value=pad_id)
    with applied(examples) if applied else contextlib.nullcontext():
        embedded = model.get_input_embeddings()(padded)
    return [row[: len(example.prompt)] for row, example in zip(embedded, examples)]


@contextmanager
def _embedding_replaced(model: torch.nn.Module, embedded: torch.Tensor) -> Iterator[None]:
    """While open, the first W positions of what is generated from have the embeddings `embedded` (B, W, d).

    These are the whole first pass. Later passes hold only new tokens, unless the architecture keeps nothing; then they
    are longer and begin with the same W positions.
    """
    width, passes = embedded.shape[1], itertools.count()

    def replace(_: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        if next(passes) and output.shape[1] <= width:
            return output
        return torch.cat([embedded.to(output), output[:, width:]], dim=1)

    handle = model.get_input_embeddings().register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _last_in_float32(model: torch.nn.Module) -> Iterator[None]:
    """While open, the head sees the last position only. A plain one in half precision multiplies in float32, as in
    `completion_logits`: its own logits would be rounded, and the best two often equal.

    The last position is copied out. For a view of it torch would copy the head once a row.
    """
    head = model.get_output_embeddings()
    in_float32, last = rounds(head), []

    def cut(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        last[:] = [inputs[0][:, -1:].contiguous()]
        return (last[0][:, :0] if in_float32 else last[0],)

    def multiply(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return float32_product(head, last[0][:, 0])[:, None] if in_float32 else output

    handles = [head.register_forward_pre_hook(cut), head.register_forward_hook(multiply)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _without_its_settings(model: torch.nn.Module) -> Iterator[None]:
    """While open, the model has none of its settings of generation, which fill in what a call leaves out."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


class _Choice(LogitsProcessor):
    """Turns logits (B, |V|) into scores whose arg max is the next token, and notes that token's log-probability.

    At a temperature T > 0 it adds Gumbel noise to logits / T: the arg max is then a sample of softmax(logits / T). So
    neither torch's own random state nor a library's default (the best 50 tokens) has a share in it.
    """

    def __init__(self, temperature: float, rng: torch.Generator) -> None:
        self.temperature, self.rng = temperature, rng
        self.log_p: list[torch.Tensor] = []  # of every step, (B,)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        wanted = scores
        if self.temperature:
            wanted = scores / self.temperature - torch.empty_like(scores).exponential_(generator=self.rng).log()
        tokens = wanted.argmax(-1, keepdim=True)
        self.log_p.append(scores.gather(-1, tokens)[:, 0] - scores.logsumexp(-1))
        return wanted


class _GrowingLayer(DynamicLayer):
    """One layer's keys and values of the virtual tokens, (1, heads, p, width), and behind them those of B rows.

    pads: (B,) how many positions of each row are padding. room: for how many positions memory is reserved, so that a
    new token costs no copy of those before it. Row i keeps its virtual tokens at pads[i] to pads[i] + p, next to its
    own. For `grouped_attention` it returns the masked keys behind them, too, that it needs.
    """

    is_croppable = False

    def __init__(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        pads: torch.Tensor,
        room: int,
        config: PreTrainedConfig,
    ) -> None:
        super().__init__()
        self.virtual, self.length = (keys, values), keys.shape[2]
        self.pads, self.room, self.config = pads.to(keys.device), room, config
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        end = self.length + keys.shape[2]
        if self.keys is None:
            self.keys, self.values = (self._begun(*pair) for pair in zip(self.virtual, (keys, values)))
        else:
            self.keys[:, :, self.length : end], self.values[:, :, self.length : end] = keys, values
        self.length = end
        spare = -end % SOFTMAX_LANES if self.config._attn_implementation == GROUPED else 0
        return self.keys[:, :, : end + spare], self.values[:, :, : end + spare]

    def _begun(self, virtual: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        size, heads, length, width = new.shape
        kept = new.new_zeros(size, heads, self.room + -self.room % SOFTMAX_LANES, width)
        p = virtual.shape[2]
        kept[:, :, p : p + length] = new
        places = self.pads[:, None] + torch.arange(p, device=new.device)
        kept[torch.arange(size, device=new.device)[:, None], :, places] = virtual.transpose(1, 2)
        return kept

    def get_seq_length(self) -> int:
        return self.length
