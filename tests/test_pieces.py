"""Losses in pieces are those of all logits at once: numbers, gradients, and how many logits there are at a time."""

import copy
import random
from types import SimpleNamespace

import pytest
import tiny
import torch
from marks import mostly_long
from transformers import AutoModelForCausalLM, CohereConfig, GraniteConfig

from utils.data.batch import Example, collate
from utils.errors import note_once
from utils.interventions.prompt_encoders import VirtualTokens
from utils.interventions.served import Served
from utils.models import pieces
from utils.models.adapters import LoraSettings, add_lora
from utils.models.forward import completion_hidden, completion_logits
from utils.models.pieces import completion_values
from utils.unlearning import losses
from utils.unlearning.hiding import Hiding
from utils.unlearning.methods import METHODS, MethodSettings
from utils.unlearning.objectives import FineTuning, PromptTuning, objective_of
from utils.unlearning.reference import HIDDEN_STATES, Reference
from utils.unlearning.tuning import trainable

CHUNK, PAD = 3, 1
# Tokens of the answers of four retain rows and four forget rows, and of the preferred answers of the latter.
ANSWERS, PREFERRED = [1, 4, 2, 3, 5, 1, 2, 3], [2, 1, 2, 1]
ORDER = [5, 0, 1, 4, 7, 3, 6, 2]
WORDS = [(30, 31), (30, 32), (33,), (41, 42, 43)]


def drawn(generator, n):
    return tuple(generator.randrange(2, tiny.VOCABULARY) for _ in range(n))


def examples():
    """(retain rows, then forget rows; the forget rows with preferred answers)."""
    generator = random.Random(0)
    rows = [Example(drawn(generator, 5 + 3 * i), drawn(generator, n), i > 3) for i, n in enumerate(ANSWERS)]
    return rows, [Example(row.prompt, drawn(generator, n), True) for row, n in zip(rows[4:], PREFERRED)]


def load(served, rows, numbers, frames, measure=HIDDEN_STATES, depends_on=None):
    """In place of load_reference: every row alone, no file."""
    values = [measure.compute(served, collate([rows[i]], PAD, "cpu")) for i in numbers]
    return Reference(torch.cat(values), measure.counts(rows, numbers))


def large_logits(model):
    """So that a soft cap of 5 matters and no distribution is flat."""
    with torch.no_grad():
        model.get_output_embeddings().weight *= 30
    return model


def built(kind):
    """Kinds of models by what matters here: llama has a head of its own, gemma2 a tied one and a soft cap."""
    model = large_logits(tiny.build_model(kind.split()[0])).requires_grad_(False)
    return model.bfloat16() if "half" in kind else model


@pytest.fixture(scope="module", params=["llama", "gemma2", "gpt2", "llama in half precision"])
def frozen(request):
    return built(request.param)


def result(objective, parameters, rows=ORDER):
    """(loss, parts, the gradient as one vector)."""
    parameters = list(parameters)
    for parameter in parameters:
        parameter.grad = None
    loss, parts = objective(rows, 4, 4)
    loss.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])
    return loss.item(), {name: value.item() for name, value in parts.items()}, gradient


def assert_same(objective, parameters, tolerance=1e-5):
    """With CHUNK tokens at a time, as with all at once; and it was CHUNK at a time."""
    parameters = list(parameters)
    loss, parts, gradient = result(objective, parameters)
    objective.chunk = CHUNK
    widths, head = [], pieces._logits

    def noted(model, states, *more):
        widths.append(len(states))
        return head(model, states, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "_logits", noted)
        found, found_parts, found_gradient = result(objective, parameters)
    assert found == pytest.approx(loss, rel=1e-5) and found_parts == pytest.approx(parts, rel=1e-5, abs=1e-7)
    assert (found_gradient - gradient).norm() <= tolerance * gradient.norm()
    assert gradient.norm() > 1e-4
    assert widths.count(CHUNK) > 6 and set(widths) <= {*range(CHUNK + 1), 5}  # 5: the tokens of a trial


@pytest.mark.parametrize("hide", [0, 1])
@pytest.mark.parametrize("beta", [0, 0.5])
def test_spul(frozen, beta, hide):
    rows, _ = examples()
    torch.manual_seed(1)
    encoder = VirtualTokens("mlp", 4, 128, 16)
    served = Served(frozen, SimpleNamespace(pad_token_id=PAD), [])
    reference = load(served, rows, range(4), {}) if beta else None
    hiding = Hiding(2.0, WORDS) if hide else None
    objective = PromptTuning(frozen, encoder, rows, PAD, reference, 0.3, beta, hiding=hiding)
    # Half precision: the gradient of the states is rounded to it, in another order of additions.
    assert_same(objective, encoder.parameters(), 1e-5 if frozen.dtype == torch.float32 else 0.02)


def test_fine_tuning(frozen):
    adapted = add_lora(copy.deepcopy(frozen), LoraSettings(lora_dropout=0.0, lora_target_modules="all-linear"))
    objective = FineTuning(adapted, examples()[0], PAD)
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    assert_same(objective, parameters, 1e-5 if frozen.dtype == torch.float32 else 0.02)


def of_method(name, retain_loss, kind="llama", chunk=0):
    method, (rows, preferred) = METHODS[name], examples()
    asked = MethodSettings(unlearn_method=name, retain_loss=retain_loss, logit_chunk=chunk)
    served = Served(trainable(built(kind), None, method, asked), SimpleNamespace(pad_token_id=PAD), [])
    source = tiny.rows_of(method, rows, preferred)
    objective = objective_of(method)(method, served, source, {"train_retain": None}, asked, "", load)
    tiny.perturb(served.model, 0.02)
    return objective


@pytest.mark.parametrize("kind", mostly_long(["llama", "gemma2"], "gemma2"))
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.activations])
def test_methods(name, kind):
    """All weights are trained, so that the gradient of the head, and that of a tied one, is compared, too."""
    for retain_loss in ("ce", "kl"):
        objective = of_method(name, retain_loss, kind)
        assert_same(objective, objective.served.model.parameters())


def test_a_trained_head_under_autocast():
    """The float32 product and the computing type must be the same when logits are made again."""
    objective = of_method("npo", "ce")
    losses_of = []
    for chunk in (0, CHUNK):
        objective.chunk = chunk
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = objective(ORDER, 4, 4)
        loss.backward()
        losses_of.append(loss.item())
        assert objective.served.model.get_output_embeddings().weight.grad.isfinite().all()
        objective.served.model.zero_grad()
    assert losses_of[0] == pytest.approx(losses_of[1], rel=1e-5)


# What stands behind the head


SMALL = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
SMALL |= {"num_key_value_heads": 2, "vocab_size": tiny.VOCABULARY, "bos_token_id": 0, "eos_token_id": 1}


def nll_of(model, chunk):
    batch = collate(examples()[0], PAD, "cpu")

    def values(logits, before, piece):
        return {"nll": losses.token_nll(logits, piece.cut(batch.targets)), "many": torch.tensor([len(logits)])}

    return completion_values(model, batch, values, chunk=chunk)


@pytest.mark.parametrize(
    "config", [CohereConfig(**SMALL, logit_scale=0.3, pad_token_id=0), GraniteConfig(**SMALL, logits_scaling=4.0)]
)
def test_scales_behind_the_head_are_kept(config):
    torch.manual_seed(0)
    model = large_logits(AutoModelForCausalLM.from_config(config).float().eval())
    whole, parts = nll_of(model, 0), nll_of(model, 4)
    torch.testing.assert_close(parts["nll"], whole["nll"])
    assert whole["many"].tolist() == [21] and parts["many"].tolist() == [4, 4, 4, 4, 4, 1]
    batch = collate(examples()[0], PAD, "cpu")
    unscaled = losses.token_nll(model.lm_head(completion_hidden(model, batch)), batch.targets)
    assert (unscaled - whole["nll"]).abs().max() > 0.1


def test_what_is_not_known_is_not_done_in_pieces(capsys):
    """A squash that the configuration does not tell of, which small logits hardly show."""
    model = tiny.build_model("llama")
    forward = model.forward

    def squashed(*inputs, **named):
        output = forward(*inputs, **named)
        output.logits = 50 * torch.tanh(output.logits / 50)
        return output

    model.forward = squashed
    note_once.cache_clear()
    for _ in range(2):
        assert nll_of(model, 4)["many"].tolist() == [21]
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert said == ["note: what llama does behind its head is not known, so --logit_chunk is not used"]
    assert model.forward is squashed


def test_the_trial_draws_no_random_number_and_leaves_the_model_as_it_was():
    model = tiny.build_model("gpt2").train()
    model.transformer.h[1].eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    assert pieces._tail(model, collate(examples()[0], PAD, "cpu")) is not None
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes


def test_few_tokens_take_the_path_of_all_at_once(monkeypatch):
    model = tiny.build_model("llama")
    monkeypatch.setattr(pieces, "_tail", None)  # nothing is tried
    assert nll_of(model, 21)["many"].tolist() == [21]
    assert nll_of(model, 22)["many"].tolist() == [21]


def test_states_are_the_inputs_of_the_head():
    model, batch = tiny.build_model("llama"), collate(examples()[0], PAD, "cpu")
    hidden = completion_hidden(model, batch)
    assert not hidden.requires_grad and hidden.shape == (21, 128)
    torch.testing.assert_close(hidden @ model.lm_head.weight.T, completion_logits(model, batch))
    assert not model.lm_head._forward_pre_hooks and not model.lm_head._forward_hooks
