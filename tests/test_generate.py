"""Generation in batches gives what one row at a time gives without any cache."""

import contextlib
import logging
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import tiny
import torch
from marks import mostly_long
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    MambaConfig,
    OpenAIGPTConfig,
    RwkvConfig,
)

from utils.data.batch import Example, collate
from utils.errors import UserError
from utils.interventions.corruption import Corruption
from utils.models.attention import CAUSAL, GROUPED, QUERIES
from utils.models.forward import completion_logits, prompt_prefix
from utils.models.generate import generate

TOKENS, NEW = 5, 8  # virtual tokens, new tokens
PAD = 1
LENGTHS = [30, 7, 18, 3]  # of the prompts; the sliding windows are 16 tokens wide
OTHERS = {
    "gemma3": Gemma3TextConfig(
        **tiny.SIZES,
        num_key_value_heads=2,
        head_dim=32,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"] * 2,
        **tiny.COMMON,
    ),
    "mamba": MambaConfig(hidden_size=128, num_hidden_layers=2, vocab_size=tiny.VOCABULARY),
    "rwkv": RwkvConfig(hidden_size=128, num_hidden_layers=2, vocab_size=tiny.VOCABULARY),
    "openai-gpt": OpenAIGPTConfig(n_embd=128, n_head=4, n_layer=2, vocab_size=tiny.VOCABULARY),
}
ARCHITECTURES = [*tiny.CONFIGS, *OTHERS]


def build(architecture, attention="eager"):
    """A tiny model whose answers depend on all that it reads: its layers are larger than freshly drawn ones."""
    torch.manual_seed(0)
    config = (tiny.CONFIGS | OTHERS)[architecture]
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).float().eval()
    for name, weight in model.base_model.named_parameters():
        if weight.ndim == 2 and "embed" not in name and "wte" not in name and "wpe" not in name:
            weight.data *= 4
    return model.requires_grad_(False)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request):
    return build(request.param)


@pytest.fixture(scope="module")
def llama():
    return build("llama")


def rows(seed=0, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: tuple(torch.randint(2, tiny.VOCABULARY, (n,), generator=generator).tolist())  # noqa: E731
    return [Example(draw(n), (), marked=tuple(range(n // 2, n - 1))) for n in lengths]


def virtual_tokens(model, p=TOKENS):
    torch.manual_seed(1)
    return torch.randn(p, 128) * model.get_input_embeddings().weight.std().item()


def corruption(model):
    return partial(Corruption("noise-first", 0.1, 128, 0).applied, model)


@torch.no_grad()
def one_by_one(model, examples, prompt=None, applied=None, new=NEW, ends=()):
    """Greedy: each row alone, unpadded, all of it computed again for every token."""
    answers = []
    for example in examples:
        with applied([example]) if applied else contextlib.nullcontext():
            embedded = model.get_input_embeddings()(torch.tensor([example.prompt]))
        if prompt is not None:
            embedded = torch.cat([prompt[None], embedded], dim=1)
        tokens, total = [], 0.0
        while len(tokens) < new and not (tokens and tokens[-1] in ends):
            behind = model.get_input_embeddings()(torch.tensor([tokens], dtype=torch.long))
            inputs = torch.cat([embedded, behind], dim=1)
            log_p = model(inputs_embeds=inputs, use_cache=False).logits[0, -1].log_softmax(-1)
            tokens.append(log_p.argmax().item())
            total += log_p[tokens[-1]].item()
        answers.append((tuple(tokens), total))
    return answers


def assert_same(found, wanted):
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in wanted]
    assert [log_p for _, log_p in found] == pytest.approx([log_p for _, log_p in wanted], abs=1e-3)


def ours(model, examples, **kwargs):
    return generate(model, examples, PAD, (), NEW, **kwargs)


def test_plain(model):
    wanted = one_by_one(model, rows())
    assert len({tokens for tokens, _ in wanted}) == len(LENGTHS)  # the answers depend on the prompts
    assert_same(ours(model, rows()), wanted)


@pytest.mark.parametrize("p", [TOKENS, 20])
def test_virtual_tokens(model, p):
    """Shared, and once a row; more of them than a sliding window holds, too."""
    prompt = virtual_tokens(model, p)
    wanted = one_by_one(model, rows(), prompt)
    assert wanted != one_by_one(model, rows())
    for given in (prompt_prefix(model, prompt), prompt):
        assert_same(ours(model, rows(), prompt=given), wanted)


def test_corruption(model):
    applied = corruption(model)
    wanted = one_by_one(model, rows(), applied=applied)
    assert [tokens for tokens, _ in wanted] != [tokens for tokens, _ in one_by_one(model, rows())]
    assert_same(ours(model, rows(), applied=applied), wanted)


@pytest.mark.long
def test_corruption_behind_virtual_tokens(model):
    prompt, applied = virtual_tokens(model), corruption(model)
    wanted = one_by_one(model, rows(), prompt, applied)
    for given in (prompt_prefix(model, prompt), prompt):
        assert_same(ours(model, rows(), prompt=given, applied=applied), wanted)


@pytest.mark.parametrize("lengths", mostly_long([LENGTHS, [9] * 4, [1] * 4], LENGTHS))
@pytest.mark.parametrize("attention", ["sdpa", GROUPED, CAUSAL])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "opt", "gpt2"])
def test_other_attention_and_lengths(architecture, attention, lengths):
    """What runs on a GPU and on a CPU; without any padding there is no mask."""
    eager, model = build(architecture), build(architecture, attention)
    prompt, applied = virtual_tokens(eager), corruption(model)
    for given, vectors in ((None, None), (prompt_prefix(model, prompt), prompt)):
        wanted = one_by_one(eager, rows(lengths=lengths), vectors, corruption(eager))
        assert_same(ours(model, rows(lengths=lengths), prompt=given, applied=applied), wanted)


def test_rows_of_several_blocks():
    """Prompts of more queries than attention takes at once, and of fewer."""
    eager, model = build("llama"), build("llama", GROUPED)
    examples, prompt = rows(lengths=[2 * QUERIES - 8, 40]), virtual_tokens(eager)
    assert_same(ours(model, examples, prompt=prompt_prefix(model, prompt)), one_by_one(eager, examples, prompt))


def test_only_prompts_are_embedded_under_an_intervention(llama):
    """Once, before anything is generated; then neither its hook nor one of ours is left."""
    embeddings, seen = llama.get_input_embeddings(), []

    @contextlib.contextmanager
    def applied(examples):
        handle = embeddings.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
        yield
        handle.remove()

    ours(llama, rows(), applied=applied)
    assert [ids.shape for ids in seen] == [(len(LENGTHS), max(LENGTHS))]
    assert [tuple(ids[: len(row.prompt)].tolist()) for ids, row in zip(seen[0], rows())] == [r.prompt for r in rows()]
    assert not embeddings._forward_hooks


def test_an_end_token_ends_its_row_alone(llama):
    """Each row at its own first end token, which counts; what would follow does not."""
    plain = one_by_one(llama, rows())
    ends = {plain[0][0][2], plain[1][0][3]}
    wanted = one_by_one(llama, rows(), ends=ends)
    assert [len(tokens) for tokens, _ in wanted] == [3, 4, NEW, NEW]
    assert_same(generate(llama, rows(), PAD, ends, NEW), wanted)
    assert_same(generate(llama, rows()[:2], PAD, ends, NEW), wanted[:2])
    assert_same(generate(llama, rows(), PAD, ends, 2), one_by_one(llama, rows(), new=2))


@pytest.mark.parametrize("pad_id", [0, 17, rows()[0].prompt[-1]])
def test_any_pad_token_gives_the_same_without_a_warning(llama, pad_id, caplog):
    """Also one with which a prompt ends."""
    prompt = prompt_prefix(llama, virtual_tokens(llama))
    logger = logging.getLogger("transformers")
    with mock.patch.object(logger, "propagate", True), caplog.at_level(logging.WARNING, "transformers"):
        found = [generate(llama, rows(), pad_id, (), NEW, given) for given in (None, prompt)]
    assert not caplog.records
    for answers, given in zip(found, (None, prompt)):
        assert_same(answers, ours(llama, rows(), prompt=given))


def test_the_models_own_settings_of_generation_change_nothing():
    model = build("llama")
    wanted = ours(model, rows())
    own = GenerationConfig(
        do_sample=True, temperature=2.0, repetition_penalty=5.0, no_repeat_ngram_size=1, max_length=3, num_beams=2,
        eos_token_id=[wanted[0][0][0]], suppress_tokens=[wanted[1][0][0]], min_new_tokens=4, use_cache=False,
    )  # fmt: skip
    model.generation_config = own
    assert_same(ours(model, rows()), wanted)
    assert model.generation_config is own


def test_sampling_follows_the_models_distribution():
    """The first tokens of 4,000 rows: the shares of the likeliest tokens are their probabilities at that temperature.
    The log-probabilities are those of temperature 1."""
    model = build("llama")
    model.get_output_embeddings().weight.data *= 20
    row, temperature, n = rows()[1], 1.5, 4000
    log_p = one_step(model, row).log_softmax(-1)
    shares = (one_step(model, row) / temperature).softmax(-1)
    found = generate(model, [row] * n, PAD, (), 1, temperature=temperature)
    counts = torch.bincount(torch.tensor([tokens[0] for tokens, _ in found]), minlength=tiny.VOCABULARY)
    best = shares.topk(5).indices  # of 3 % and more each
    deviations = (counts[best] - n * shares[best]) / (n * shares[best] * (1 - shares[best])).sqrt()
    assert deviations.abs().max() < 4
    for tokens, value in found[:20]:
        assert value == pytest.approx(log_p[tokens[0]].item(), abs=1e-4)


@torch.no_grad()
def one_step(model, example):
    return model(torch.tensor([example.prompt])).logits[0, -1]


def test_sampling_is_reproduced_by_its_seed_alone(llama):
    draw = lambda seed: ours(llama, rows(), temperature=2.0, seed=seed)  # noqa: E731
    state = torch.get_rng_state()
    first = draw(3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(9)
    assert draw(3) == first != draw(4)
    assert len({tokens for tokens, _ in ours(llama, rows()[:1] * 3, temperature=2.0)}) == 3


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_a_bfloat16_model_answers_as_it_is_scored(architecture):
    """Each token is the arg max of `completion_logits`, and log-probabilities are theirs: with a head in bfloat16 the
    best two tokens often tie."""
    model = build(architecture).bfloat16()
    for prompt in (None, prompt_prefix(model, virtual_tokens(model))):
        for example in rows():
            [(tokens, log_p)] = ours(model, [example], prompt=prompt)
            logits = completion_logits(model, collate([replace(example, completion=tokens)], PAD, "cpu"), prompt)
            scores = logits.log_softmax(-1)
            chosen = scores[range(NEW), list(tokens)]
            assert (chosen > scores.max(-1).values - 0.01).all()
            assert log_p == pytest.approx(chosen.sum().item(), abs=0.05)


def test_the_head_of_a_bfloat16_model_multiplies_in_float32():
    """The first token of every row has exactly the log-probability of the float32 product."""
    model = build("llama").bfloat16()
    head, seen = model.get_output_embeddings(), []
    handle = model.model.norm.register_forward_hook(lambda _, inputs, output: seen.append(output[:, -1]))
    found = generate(model, rows(), PAD, (), 1)
    handle.remove()
    log_p = (seen[0].float() @ head.weight.float().T).log_softmax(-1)
    assert [tokens for tokens, _ in found] == [(token,) for token in log_p.argmax(-1).tolist()]
    assert [value for _, value in found] == pytest.approx(log_p.max(-1).values.tolist(), abs=1e-5)
    assert not head._forward_hooks and not head._forward_pre_hooks


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_that_is_not_finite_is_refused(temperature):
    model = build("llama")
    model.get_output_embeddings().weight.data[7] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        ours(model, rows(), temperature=temperature)
    assert not model.get_output_embeddings()._forward_hooks


def test_nothing_to_answer(llama):
    assert ours(llama, []) == []
