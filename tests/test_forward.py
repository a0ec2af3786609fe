"""The economical forward pass gives what the plain one gives, for logits and for the prompt's gradient."""

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import tiny
import torch
from accelerate import dispatch_model
from transformers import AutoModelForCausalLM, MambaConfig, OpenAIGPTConfig, RwkvConfig, masking_utils

from utils.data.batch import Example, collate
from utils.errors import note_once
from utils.interventions.prompt_encoders import Prompt, VirtualTokens
from utils.interventions.served import Served
from utils.models import attention as attentions
from utils.models import forward
from utils.models.attention import CAUSAL, GROUPED, KEPT_UP_TO, QUERIES, grouped_attention, padded_behind
from utils.models.forward import (
    _run,
    completion_hidden,
    completion_logits,
    gather_before_head,
    prompt_prefix,
    shared_prefix,
)
from utils.models.layers import checkpoint_layers, compile_decoder
from utils.tasks.rows import load_splits
from utils.unlearning import losses, reference

ARCHITECTURES = list(tiny.CONFIGS)
TOKENS = 5  # virtual tokens
# Rows of different lengths (beyond the sliding window of 16 too), completions of one token and of several.
LENGTHS = [(30, 1), (7, 3), (18, 1), (3, 4)]
TWO_LAYERS = {"num_hidden_layers": 2, "vocab_size": tiny.VOCABULARY}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request):
    return tiny.build_model(request.param)


@pytest.fixture(scope="module")
def llama():
    return tiny.build_model("llama")


def rows(seed=0, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: tuple(torch.randint(2, tiny.VOCABULARY, (n,), generator=generator).tolist())  # noqa: E731
    return [Example(draw(prompt), draw(completion)) for prompt, completion in lengths]


def virtual_tokens(model, p=TOKENS):
    torch.manual_seed(1)
    scale = model.get_input_embeddings().weight.std().item()
    return (torch.randn(p, tiny.SIZES["hidden_size"]) * scale).requires_grad_()


def plain_logits(model, examples, prompt=None):
    """Every example alone and unpadded, all logits computed, the completion's positions cut out by hand."""
    result = []
    for example in examples:
        ids = torch.tensor([example.prompt + example.completion])
        embedded = model.get_input_embeddings()(ids)
        if prompt is not None:
            embedded = torch.cat([prompt[None], embedded], dim=1)
        logits = model(inputs_embeds=embedded, use_cache=False).logits[0]
        offset = 0 if prompt is None else len(prompt)
        result += [logits[offset + len(example.prompt) - 1 + i] for i in range(len(example.completion))]
    return torch.stack(result)


def gradient(prompt, logits):
    """Of a function that weighs every logit differently."""
    weights = torch.sin(torch.arange(logits.numel(), dtype=torch.float32)).view_as(logits)
    prompt.grad = None
    (logits * weights).sum().backward()
    return prompt.grad.clone()


def test_logits_and_gradient_equal_the_plain_path(model):
    prompt, examples = virtual_tokens(model), rows()
    expected = plain_logits(model, examples, prompt)
    wanted = gradient(prompt, expected)
    batch = collate(examples, 1, "cpu")
    for given in (lambda: prompt_prefix(model, prompt), lambda: prompt):
        logits = completion_logits(model, batch, given())
        assert logits.shape == (sum(n for _, n in LENGTHS), tiny.VOCABULARY)
        assert torch.allclose(logits, expected, atol=2e-5)
        assert torch.allclose(gradient(prompt, logits), wanted, atol=2e-5 * wanted.abs().max().item())
    assert wanted.abs().max() > 1e-3


def with_attention(architecture, attention):
    """The tiny model and its copy that computes attention by `attention`."""
    eager = tiny.build_model(architecture)
    model = AutoModelForCausalLM.from_config(tiny.CONFIGS[architecture], attn_implementation=attention).float().eval()
    model.load_state_dict(eager.state_dict())
    return eager, model


@pytest.mark.parametrize("attention", ["sdpa", GROUPED, CAUSAL])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mistral", "opt", "gpt2"])
def test_other_attention_gives_the_same(architecture, attention):
    """What runs on a GPU and on a CPU; the plain path is computed with eager attention."""
    eager, model = with_attention(architecture, attention)
    prompt = virtual_tokens(model)
    expected = plain_logits(eager, rows(), prompt)
    wanted = gradient(prompt, expected)
    logits = completion_logits(model, collate(rows(), 1, "cpu"), prompt_prefix(model, prompt))
    assert torch.allclose(logits, expected, atol=2e-5)
    assert torch.allclose(gradient(prompt, logits), wanted, atol=2e-5 * wanted.abs().max().item())


def test_grouped_attention_drops_out_in_training_mode():
    """By SDPA: the same shares for the same random state, and none in evaluation."""
    model, sdpa = (with_attention("llama", attention)[1] for attention in (GROUPED, "sdpa"))
    ids, answers = torch.arange(2, 34)[None], []
    for each in (sdpa, model):
        for layer in each.model.layers:
            layer.self_attn.attention_dropout = 0.5
        torch.manual_seed(3)
        answers.append((each(ids).logits, each.train()(ids).logits))
    (still, dropped), (grouped_still, grouped_dropped) = answers
    assert torch.allclose(still, grouped_still, atol=2e-5) and torch.allclose(dropped, grouped_dropped, atol=2e-5)
    assert not torch.allclose(still, dropped, atol=1e-2)


def by_hand(query, key, value, scale, mask=None):
    """softmax(Q K^T scale + mask) V in float64, keys copied for each query head. No mask: what is later is hidden."""
    query, key, value = (t.double().repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (query, key, value))
    if mask is None:
        hidden = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(1 + key.shape[2] - query.shape[2])
        mask = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)
    return ((query @ key.mT * scale + mask).softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("in_front", [0, 7])
@pytest.mark.parametrize("length", [1, 5, QUERIES, QUERIES + 1, KEPT_UP_TO + 3, 3 * QUERIES])
def test_attention_in_blocks(length, in_front, masked, dtype, tolerance):
    """One block or several, shares kept or computed again: outputs and gradients are those of the formula."""
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, n, width).to(dtype).requires_grad_()
        for heads, n, width in ((6, length, 8), (3, length + in_front, 8), (3, length + in_front, 5))
    )
    mask = None
    if masked:  # what comes later, and some keys in front of the second row
        mask = torch.zeros(2, 1, length, length + in_front)
        mask.masked_fill_(torch.ones(mask.shape[2:], dtype=torch.bool).triu(1 + in_front), -torch.inf)
        mask[1, :, :, 1 : 1 + in_front // 2] = -torch.inf
    found, _ = grouped_attention(torch.nn.Module(), query, key, value, mask, scaling=0.3)
    expected = by_hand(query, key, value, 0.3, mask)
    assert found.shape == expected.shape == (2, length, 6, 5)
    assert (found - expected).norm() < tolerance * expected.norm()
    weights = torch.randn(found.shape)
    both = (torch.autograd.grad((out * weights).sum(), (query, key, value)) for out in (found, expected))
    for got, wanted in zip(*both):
        assert (got - wanted).norm() <= tolerance * (wanted.norm() + 1e-6)


def test_attention_in_blocks_keeps_only_short_shares():
    """What the backward pass needs of a long row grows with its length, not with its square."""
    kept = []
    for length in (KEPT_UP_TO, KEPT_UP_TO + 1):
        tensors = [torch.randn(1, 1, length, 4, requires_grad=True) for _ in range(3)]
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            grouped_attention(torch.nn.Module(), *tensors, None)
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 4


@pytest.mark.parametrize("architecture, masked", [("llama", "in front"), ("mistral", "behind")])
def test_a_query_that_sees_nothing_spoils_no_other(architecture, masked):
    """Padding in front for generation, or padding behind that is out of the sliding window; under autocast, too."""
    eager, model = with_attention(architecture, GROUPED)
    ids = torch.randint(2, tiny.VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, slice(0, 30) if masked == "in front" else slice(10, 40)] = 0
    for dtype, tolerance in ((None, 1e-5), (torch.bfloat16, 0.05)):
        with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled=dtype is not None), padded_behind():
            expected, found = (each(input_ids=ids, attention_mask=mask).logits[mask.bool()] for each in (eager, model))
        assert (found - expected).norm() < tolerance * expected.norm()


def test_attention_of_a_module_that_is_not_causal():
    """Without a mask every query sees every key, as SDPA has it."""
    module, tensors = torch.nn.Module(), [torch.randn(2, 4, n, 8) for n in (9, 12, 12)]
    module.is_causal = False
    for given, kwargs in ((module, {}), (torch.nn.Module(), {"is_causal": False})):
        found, _ = grouped_attention(given, *tensors, None, **kwargs)
        expected = by_hand(*tensors, 8**-0.5, torch.zeros(9, 12))
        assert torch.allclose(found.double(), expected, atol=1e-5)


@pytest.mark.parametrize("architecture, masks", [("llama", 0), ("mistral", 1)])
def test_no_mask_where_padding_is_behind_the_rows(monkeypatch, architecture, masks):
    """Neither with nor without a prompt. A sliding window that hides some keys still needs one."""
    made = []
    monkeypatch.setattr(attentions, "sdpa_mask", lambda **given: made.append(given) or masking_utils.sdpa_mask(**given))
    _, model = with_attention(architecture, CAUSAL)
    batch = collate(rows(), 1, "cpu")
    for prompt in (None, prompt_prefix(model, virtual_tokens(model).detach())):
        made.clear()
        completion_logits(model, batch, prompt)
        assert len(made) == masks
    made.clear()
    padded = torch.zeros_like(batch.attention_mask)
    padded[:, 1:] = 1
    model(input_ids=batch.input_ids, attention_mask=padded)  # padded in front, as for generation
    assert len(made) == 1


def test_the_prompt_is_computed_once(model):
    prefix = prompt_prefix(model, virtual_tokens(model))
    assert len(prefix) == tiny.SIZES["num_hidden_layers"]
    assert all(keys.shape[2] == values.shape[2] == TOKENS for keys, values in prefix)
    prompt = Prompt(vectors=virtual_tokens(model))
    assert prompt.prefix(model) is prompt.prefix(model)  # in inference once for all splits


@pytest.mark.parametrize(
    "architecture, attention",
    [("mistral", "eager"), ("mistral", "sdpa"), ("mistral", GROUPED), ("mistral", CAUSAL), ("gemma2", "eager")],
)
def test_a_prompt_longer_than_the_sliding_window(architecture, attention):
    """Most virtual tokens are out of sight for the later tokens of a row, and some for every token."""
    (eager, model), p = with_attention(architecture, attention), tiny.CONFIGS[architecture].sliding_window + 4
    prompt = virtual_tokens(model, p)
    expected = plain_logits(eager, rows(), prompt)
    wanted = gradient(prompt, expected)
    logits = completion_logits(model, collate(rows(), 1, "cpu"), prompt_prefix(model, prompt))
    assert torch.allclose(logits, expected, atol=2e-5)
    assert torch.allclose(gradient(prompt, logits), wanted, atol=2e-5 * wanted.abs().max().item())


@pytest.mark.long
@pytest.mark.parametrize(("architecture", "checkpointed"), [("llama", True)])
def test_a_compiled_decoder_gives_the_same(architecture, checkpointed):
    """Dynamo's graphs, run as they are (the kernels are inductor's); rows of another length need no new one."""
    torch._dynamo.reset()
    eager, model = tiny.build_model(architecture), tiny.build_model(architecture)
    if checkpointed:
        checkpoint_layers(model)
    names = list(model.state_dict())
    compiled = []

    def count(graph, example):
        compiled.append(graph)
        return graph.forward

    compile_decoder(model, count)
    assert list(model.state_dict()) == names
    prompt = virtual_tokens(model)
    expected = plain_logits(eager, rows(), prompt)
    wanted = gradient(prompt, expected)
    logits = completion_logits(model, collate(rows(), 1, "cpu"), prompt_prefix(model, prompt))
    assert torch.allclose(logits, expected, atol=2e-5)
    assert torch.allclose(gradient(prompt, logits), wanted, atol=2e-5 * wanted.abs().max().item())
    graphs = len(compiled)
    assert graphs
    for length in (23, 31):
        others = rows(lengths=[(length, 2)] * 5)
        logits = completion_logits(model, collate(others, 1, "cpu"), prompt_prefix(model, prompt))
        assert torch.allclose(logits, plain_logits(eager, others, prompt), atol=2e-5)
    assert len(compiled) == graphs


@pytest.mark.parametrize(
    "config, obstacle",
    [
        (MambaConfig(hidden_size=128, **TWO_LAYERS), "mamba has layers of the kind linear_attention"),
        (RwkvConfig(hidden_size=128, **TWO_LAYERS), "rwkv keeps another state than keys and values per layer"),
        (OpenAIGPTConfig(n_embd=128, n_head=4, **TWO_LAYERS), "openai-gpt keeps no keys and values"),
    ],
)
def test_a_model_without_keys_and_values_takes_the_plain_path_and_says_so_once(config, obstacle, capsys):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    prompt = virtual_tokens(model).detach()
    note_once.cache_clear()
    for _ in range(2):
        prefix = prompt_prefix(model, prompt)
    assert prefix is prompt
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert said == [f"note: the prompt is computed once a row instead of once a batch: {obstacle}"]
    logits = completion_logits(model, collate(rows(), 1, "cpu"), prefix)
    assert torch.allclose(logits, plain_logits(model, rows(), prompt), atol=2e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_losses_and_encoder_gradients_equal_the_plain_path(architecture):
    """Of SPUL's whole loss: padding or none, completions of one token and of several, checkpointing or none."""
    model = tiny.build_model(architecture).requires_grad_(False)
    torch.manual_seed(3)
    encoder = VirtualTokens("mlp", TOKENS, tiny.SIZES["hidden_size"], 16)
    batches = [rows(lengths=lengths) for lengths in (LENGTHS, [(19, 1)] * 4, [(12, 2)] * 4)]
    batches = [[replace(row, forget=i % 2 == 0) for i, row in enumerate(batch)] for batch in batches]
    plain = [encoder_gradient(encoder, batch, *plain_loss(model, encoder, batch)) for batch in batches]
    for kind in (None, "layers", "selective"):
        other = copy.deepcopy(model)
        if kind:
            checkpoint_layers(other, kind)
        for batch, wanted in zip(batches, plain):
            ours = encoder_gradient(encoder, batch, *economical_loss(other, encoder, batch))
            assert ours.keys() == wanted.keys()
            for name, value in wanted.items():
                assert torch.allclose(ours[name], value, rtol=0, atol=2e-5 * value.abs().max().item()), name


def plain_loss(model, encoder, examples):
    """(logits, reference logits) as the equations have them: one row at a time, no cache, no padding."""
    return plain_logits(model, examples, encoder()), plain_logits(model, examples).detach()


def economical_loss(model, encoder, examples):
    batch = collate(examples, 1, "cpu")
    hidden = completion_hidden(model, batch)
    return completion_logits(model, batch, prompt_prefix(model, encoder()), hidden)


def encoder_gradient(encoder, examples, logits, reference):
    """The loss, its parts and the gradient of every parameter of the encoder, by name."""
    batch = collate(examples, 1, "cpu")
    nll, kept = losses.token_nll(logits, batch.targets), batch.retain_tokens
    kl = losses.token_kl(reference[kept], logits[kept])
    loss, parts = losses.spul_loss(nll[batch.forget_tokens], nll[kept], kl, 2, 2, 0.5, 0.5)
    encoder.zero_grad()
    loss.backward()
    assert all(value > 0 for value in parts.values())
    gradients = {name: parameter.grad.clone() for name, parameter in encoder.named_parameters()}
    assert all(value.abs().max() > 0 for value in gradients.values())
    return {"loss": loss.detach(), **{key: value.detach() for key, value in parts.items()}, **gradients}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_checkpointing_keeps_less_for_the_backward_pass(architecture):
    """Nothing of a decoder layer but its inputs: less than half. Selective: also the results of products."""
    kept = []
    for kind in (None, "selective", "layers"):
        model = tiny.build_model(architecture).requires_grad_(False)
        if kind:
            checkpoint_layers(model, kind)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            completion_logits(model, collate(rows(), 1, "cpu"), prompt_prefix(model, virtual_tokens(model)))
        kept.append(sum(sizes))
    assert kept[2] < kept[0] / 2
    assert kept[1] == kept[2]  # results that are kept lie elsewhere: see test_planning.py


def test_parts_of_a_step_share_the_pass_over_the_prompt(monkeypatch, model):
    """Gradients are those of parts that compute it each for itself, and it is computed once."""
    batches, prompt, passes = [collate(rows(seed), 1, "cpu") for seed in (3, 4)], virtual_tokens(model), []
    wanted = sum(gradient(prompt, completion_logits(model, b, prompt_prefix(model, prompt))) for b in batches)
    prompt.grad, kept = None, forward._kept
    monkeypatch.setattr(forward, "_kept", lambda *given: passes.append(given) or kept(*given))
    prefix = prompt_prefix(model, prompt)
    with shared_prefix(prefix) as copied:
        for batch in batches:
            logits = completion_logits(model, batch, copied())
            (logits * torch.sin(torch.arange(logits.numel(), dtype=torch.float32)).view_as(logits)).sum().backward()
        assert prompt.grad is None
    assert len(passes) == (not isinstance(prefix, torch.Tensor))
    assert torch.allclose(prompt.grad, wanted, atol=2e-5 * wanted.abs().max().item())


def test_a_prefix_serves_several_batches(llama):
    prompt = virtual_tokens(llama).detach()
    prefix = prompt_prefix(llama, prompt)
    for seed in (3, 4, 3):
        logits = completion_logits(llama, collate(rows(seed), 1, "cpu"), prefix)
        assert torch.allclose(logits, plain_logits(llama, rows(seed), prompt), atol=2e-5)


def test_without_a_prompt(model):
    logits = completion_logits(model, collate(rows(), 1, "cpu"))
    assert torch.allclose(logits, plain_logits(model, rows()), atol=2e-5)


def test_the_prompt_changes_the_logits(model):
    batch = collate(rows(), 1, "cpu")
    assert (completion_logits(model, batch) - completion_logits(model, batch, virtual_tokens(model))).abs().max() > 1e-3


def test_padding_changes_nothing(model):
    """A row alone equals the same row beside longer ones, with and without virtual tokens."""
    prompt = virtual_tokens(model).detach()
    for given in (None, prompt_prefix(model, prompt)):
        together = completion_logits(model, collate(rows(), 1, "cpu"), given)
        alone = torch.cat([completion_logits(model, collate([row], 1, "cpu"), given) for row in rows()])
        assert torch.allclose(together, alone, atol=2e-5)


@pytest.mark.parametrize("pad_id", [0, 1, 17, rows()[0].prompt[0]])
def test_any_pad_token_gives_the_same(llama, pad_id):
    """Also one that occurs in the text: masks come from lengths."""
    prefix = prompt_prefix(llama, virtual_tokens(llama).detach())
    expected = completion_logits(llama, collate(rows(), 5, "cpu"), prefix)
    assert torch.equal(completion_logits(llama, collate(rows(), pad_id, "cpu"), prefix), expected)


def test_the_reference_is_what_the_model_says_without_the_prompt(model):
    """Mapped by the same call of the head as the prompted states; here of other rows than the batch's."""
    batch, others = collate(rows(), 1, "cpu"), collate(rows(seed=9)[:2], 1, "cpu")
    hidden = completion_hidden(model, others)
    assert hidden.shape == (4, tiny.SIZES["hidden_size"])
    assert not hidden.requires_grad
    prompt = virtual_tokens(model).detach()
    logits, reference = completion_logits(model, batch, prompt_prefix(model, prompt), hidden)
    assert torch.allclose(reference, plain_logits(model, rows(seed=9)[:2]), atol=2e-5)
    assert torch.allclose(logits, plain_logits(model, rows(), prompt), atol=2e-5)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_the_reference_file_is_mapped_and_small(tmp_path, small_data):
    model, path = tiny.build_model("llama"), tmp_path / "reference.safetensors"
    frames, examples = load_splits(small_data), rows()
    link = SimpleNamespace(sha256="0", path=tmp_path)
    served = Served(model, SimpleNamespace(pad_token_id=1), [link])
    settings = reference.ReferenceSettings(logits_path=path, dataset="none", max_length=64, eval_batch_size=2)
    found = reference.load_reference(served, examples, range(len(examples)), frames, settings=settings)
    assert str(path) in Path("/proc/self/maps").read_text(encoding="utf-8")
    expected = completion_hidden(model, collate(examples, 1, "cpu"))
    assert torch.allclose(found.of(range(len(examples))), expected, atol=1e-5)
    numbers = sum(len(e.completion) for e in examples) * model.config.hidden_size
    assert 4 * numbers < path.stat().st_size < 4 * numbers + 1024


def test_an_empty_reference(llama):
    """A batch of forget rows only."""
    batch = collate(rows(), 1, "cpu")
    logits, reference = completion_logits(llama, batch, None, completion_hidden(llama, batch)[:0])
    assert reference.shape == (0, tiny.VOCABULARY)
    assert torch.allclose(logits, completion_logits(llama, batch), atol=1e-6)


def test_the_soft_cap_is_honoured():
    """Gemma 2 squashes its logits after the head; the head is scaled up so that it matters."""
    model = tiny.build_model("gemma2")
    cap = model.config.final_logit_softcapping
    weight = model.get_output_embeddings().weight
    model.get_output_embeddings().weight = torch.nn.Parameter(weight.detach() * 100, requires_grad=False)
    batch, prompt = collate(rows(), 1, "cpu"), virtual_tokens(model).detach()
    hidden = completion_hidden(model, batch)
    uncapped = hidden @ model.get_output_embeddings().weight.T
    logits, reference = completion_logits(model, batch, prompt, hidden)
    assert uncapped.abs().max() > 2 * cap
    assert torch.allclose(reference, cap * torch.tanh(uncapped / cap), atol=1e-4)
    assert logits.abs().max() <= cap
    assert torch.allclose(logits, plain_logits(model, rows(), prompt), atol=1e-4)


def test_logits_are_float32_for_a_bfloat16_model():
    model = tiny.build_model("llama").bfloat16()
    batch, prompt = collate(rows(), 1, "cpu"), virtual_tokens(model)
    logits = completion_logits(model, batch, prompt_prefix(model, prompt))
    assert logits.dtype == torch.float32
    assert gradient(prompt, logits).dtype == torch.float32
    assert completion_hidden(model, batch).dtype == torch.bfloat16


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_the_head_of_a_bfloat16_model_multiplies_in_float32(architecture):
    """Logits in bfloat16 have eight bits, so that the best two tie: ranking the label words and the arg max over the
    vocabulary would disagree. The product of several pieces of the head, its gradient, and the reference's."""
    model = tiny.build_model(architecture).bfloat16().requires_grad_(False)
    head, cap = model.get_output_embeddings(), model.config.get_text_config().to_dict().get("final_logit_softcapping")
    batch, prompt = collate(rows(), 1, "cpu"), virtual_tokens(model)

    def expected(hidden):
        logits = hidden.float() @ head.weight.float().T
        return cap * torch.tanh(logits / cap) if cap else logits

    with mock.patch.object(forward, "HEAD_ROWS", 300):
        logits, before = completion_logits(model, batch, prompt, completion_hidden(model, batch))
        with gather_before_head(model, batch) as seen:
            _run(model, batch, prompt, seen)
        torch.testing.assert_close(logits, expected(seen["hidden"]), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(before, expected(completion_hidden(model, batch)), rtol=1e-5, atol=1e-5)
        got = gradient(prompt, logits)
        wanted = gradient(prompt, expected(seen["hidden"]))  # passes through bfloat16 layers, which round
        torch.testing.assert_close(got, wanted, rtol=2e-2, atol=0.02 * wanted.abs().max().item())
    assert len(set(logits[0].tolist())) > 0.99 * len(logits[0])  # in bfloat16 hundreds of words share a value


def test_a_trained_head_under_autocast_multiplies_in_float32_too():
    model, batch = tiny.build_model("llama").requires_grad_(True), collate(rows(), 1, "cpu")
    before = copy.deepcopy(model.get_output_embeddings()).requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = completion_hidden(model, batch)
        logits, reference_logits = completion_logits(model, batch, None, hidden, before)
    assert logits.dtype == reference_logits.dtype == torch.float32
    torch.testing.assert_close(logits, reference_logits)
    torch.testing.assert_close(logits, hidden.float() @ before.weight.T, rtol=1e-5, atol=1e-5)
    logits.sum().backward()
    assert model.get_output_embeddings().weight.grad.abs().sum() > 0


def test_no_hook_stays_on_the_head(model):
    head = model.get_output_embeddings()
    batch = collate(rows(), 1, "cpu")
    completion_logits(model, batch, virtual_tokens(model))
    completion_hidden(model, batch)
    assert not head._forward_pre_hooks
    unknown_token = collate([Example((tiny.VOCABULARY,), (3,))], 1, "cpu")
    for fails in (completion_logits, completion_hidden):
        with pytest.raises(IndexError):
            fails(model, unknown_token)
        assert not head._forward_pre_hooks
    assert model(input_ids=batch.input_ids).logits.shape[:2] == batch.input_ids.shape


def test_a_model_whose_layers_lie_in_several_places_gives_the_same(llama, tmp_path):
    """As with --device=balanced, where accelerate moves what passes between layers; here CPU and disk."""
    elsewhere = ["model.layers.1", "model.layers.3", "lm_head"]
    here = ["model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.2", "model.norm"]
    spread = dispatch_model(
        copy.deepcopy(llama), dict.fromkeys(here, "cpu") | dict.fromkeys(elsewhere, "disk"), offload_dir=tmp_path
    )
    assert spread.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    batch, prompt = collate(rows(), 1, "cpu"), virtual_tokens(llama)
    hidden = completion_hidden(llama, batch)
    assert torch.equal(completion_hidden(spread, batch), hidden)
    results = []
    for model in (llama, spread):
        logits = torch.cat(completion_logits(model, batch, prompt_prefix(model, prompt), hidden))
        results.append((logits, gradient(prompt, logits)))
    torch.testing.assert_close(results[1], results[0])
