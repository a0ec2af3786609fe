"""RMU (arXiv 2403.03218, section 4): activations of one layer, steered on forget rows and held on retain rows."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch

from utils.data.batch import collate, index_on
from utils.errors import UserError
from utils.interventions.served import Served
from utils.models.forward import completion_logits
from utils.models.layers import decoder_layers, record_activations
from utils.unlearning import losses
from utils.unlearning.losses import Parts
from utils.unlearning.methods import Method, MethodSettings
from utils.unlearning.reference import Loader, activations_of


class SteeringObjective:
    """The squared distance of activations to a fixed random direction on forget rows, and to those before unlearning on
    retain rows: for each row the mean over its tokens, then the mean over rows."""

    def __init__(
        self,
        method: Method,
        served: Served,
        rows: Any,
        frames: Mapping[str, pd.DataFrame],
        settings: MethodSettings,
        numerics: str,
        load: Loader,
    ) -> None:
        self.method, self.served, self.rows, self.settings = method, served, rows, settings
        model, (_, steering) = served.model, settings.constants(method)
        self.layers, number = steered_layers(model, settings.rmu_layer)
        generator = torch.Generator().manual_seed(settings.seed)
        direction = torch.rand(model.config.get_text_config().hidden_size, generator=generator)
        self.target = (steering * direction / direction.norm()).to(model.device)
        retain = [i for i, example in enumerate(rows.trained) if not example.forget]
        known, measure = {"train_retain": frames["train_retain"]}, activations_of(*self.layers)
        self.reference = load(served, rows.trained, retain, known, measure, [number, numerics])

    def __call__(self, rows: list[int], n_forget: int, n_retain: int, step: Sequence[int] | None = None) -> Parts:
        chosen = [self.rows.trained[i] for i in rows]
        batch = collate(chosen, self.served.pad_id, self.served.model.device)
        with record_activations(*self.layers) as seen:
            completion_logits(self.served.model, batch)
        real = batch.attention_mask.bool()
        activations = seen["activations"].to(real.device)  # the layer may be on another one
        weights = (1 / real.sum(1, keepdim=True)).expand(real.shape)
        forget, retain = (_tokens(chosen, kind, real.device) for kind in (True, False))
        steered = self.method.forget(activations[forget], self.target) * weights[forget]
        held = self.method.forget(activations[retain], self.reference.of(rows, activations.device)) * weights[retain]
        parts = {"L_f": losses.mean_over_rows(steered, n_forget), "L_r": losses.mean_over_rows(held, n_retain)}
        return losses.with_retain_weight(parts, self.settings.retain_weight)


def _tokens(examples: list, forget: bool, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, positions) of every real token of the examples to forget, or of the others."""
    places = [(row, at) for row, e in enumerate(examples) if e.forget == forget for at in range(len(e))]
    rows, positions = zip(*places) if places else ((), ())
    return index_on(device, rows), index_on(device, positions)


def train_three_layers(model: torch.nn.Module, layer: int | None) -> None:
    """Freeze all but the layers l - 2, l - 1 and l = `layer`. Raises UserError if no adapter is on any of them."""
    layers = decoder_layers(model)
    last = layer_number(layer, len(layers))
    trained = {p for layer in layers[max(0, last - 2) : last + 1] for p in layer.parameters() if p.requires_grad}
    if not trained:
        raise UserError(f"LoRA has nothing on layer {last} or the two before it; choose other --lora_target_modules")
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in trained)


def steered_layers(
    model: torch.nn.Module, layer: int | None
) -> tuple[tuple[torch.nn.Module, torch.nn.Module | None], int]:
    """((layer l, the layer after it or None), l); nothing behind l has a share in the loss."""
    layers = decoder_layers(model)
    number = layer_number(layer, len(layers))
    return (layers[number], layers[number + 1] if number + 1 < len(layers) else None), number


def layer_number(layer: int | None, n_layers: int) -> int:
    """l: `layer`, else the depth of the authors' layer 7 of 32. Raises UserError beyond the last layer."""
    layer = round(7 / 32 * n_layers) if layer is None else layer
    if layer >= n_layers:
        raise UserError(f"--rmu_layer={layer} is beyond the model's last layer; use at most {n_layers - 1}")
    return layer
