"""Prompt classifiers: does a query ask about what is to be forgotten? (ECO, arXiv 2406.07933, section 3.1)"""

import json
import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from pydantic import ConfigDict, RootModel, model_validator
from safetensors.torch import save_file
from scipy.special import logit
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from utils import distributed
from utils.errors import UserError, first_line
from utils.models.base import FrozenModel
from utils.storage import schemas
from utils.storage.reading import Like, is_finite, read_tensors, refuse_special
from utils.storage.schemas import Schema, Text

ROUNDING = 1e-9  # a threshold taken from scores lies just above them, whatever the order of a later sum
PICKED_AT = 0.99  # the threshold at which the authors count an encoder's errors, whatever it is in use
WEIGHTS, VOCABULARY, ENCODER = "classifier.safetensors", "vocabulary.json", "classifier"
_STATES = weakref.WeakKeyDictionary()  # of a model: {(text, max_length): mean hidden state}, see _pooled


@dataclass(frozen=True, kw_only=True)
class ClassifierSettings:
    """eco_classifier: `tfidf`, `features`, or the hub id or folder of an encoder, which the next two are about.
    max_length: of the prompts whose hidden states `features` reads."""

    eco_classifier: str = "tfidf"
    eco_classifier_epochs: int = 30
    eco_classifier_lr: float = 2e-5
    max_length: int = 1024
    seed: int = 42
    trust_remote_code: bool = False

    @property
    def kind(self) -> str:
        return self.eco_classifier if self.eco_classifier in CLASSIFIERS else Encoder.kind


class Classifier:
    """What a gate asks; the base of every kind in CLASSIFIERS.

    A kind also has the class method `fit(texts, labels, served, settings)`, where label 1 is to forget. With
    `validates` it gets `validation`, (texts, labels), too.

    kind: its name in eco.json and as --eco_classifier. reads_states: it looks at hidden states of the language model,
    so that it belongs to one. validates: it picks an epoch by rows that are held out.
    """

    kind: str
    reads_states = False
    validates = False

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """(n,) in [0, 1]: that a text asks about what is to be forgotten."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Write it into the checkpoint `folder`; utils.storage.checkpoints names the files that are hashed."""
        raise NotImplementedError

    @classmethod
    def load(cls, folder: Path, served: FrozenModel, trust_remote_code: bool, max_length: int) -> "Classifier":
        """What `save` wrote. Raises UserError where files are missing or damaged."""
        raise NotImplementedError


class Vocabularies(RootModel[list[list[Text]]]):
    """vocabulary.json: the terms of the words and of the characters, each once, in the order of their columns."""

    model_config = ConfigDict(strict=True)
    what: ClassVar[str] = "vocabulary of a gate"
    remedy: ClassVar[str] = Schema.remedy

    @model_validator(mode="after")
    def _has_every_term_once(self) -> "Vocabularies":
        if len(self.root) != 2 or not all(terms and len(set(terms)) == len(terms) for terms in self.root):
            raise ValueError("it is not two lists of terms, each once")
        return self


class Gate:
    """A classifier with its threshold: a query is flagged if its probability is above `threshold`.

    The main process classifies, every text once, and the others take its word: they must agree on what is flagged.
    """

    def __init__(self, classifier: Classifier, threshold: float | None = None) -> None:
        self.classifier, self.threshold = classifier, threshold
        self._known: dict[str, float] = {}

    def decide(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(flags, probabilities), both (n,): bool, and in [0, 1]."""
        probabilities = self.probabilities(texts)
        return probabilities > self.threshold, probabilities

    def margins(self, probabilities: np.ndarray) -> np.ndarray:
        """(n,) float64: how far `probabilities` (n,) lie above the threshold, in log odds; below it less than 0.

        By this gates of different thresholds are compared. Every margin is finite: 0 and 1 count as the float64 next
        to them.
        """
        return _log_odds(probabilities) - _log_odds(self.threshold)

    def anew(self) -> "Gate":
        """The same gate, which classifies every text again."""
        return Gate(self.classifier, self.threshold)

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """(n,) in [0, 1]."""
        texts = list(texts)
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            values = self.classifier.probabilities(new) if distributed.is_main() else None
            self._known.update(zip(new, distributed.broadcast(values)))
        return np.array([self._known[text] for text in texts])


class Tfidf(Classifier):
    """`tfidf`: balanced logistic regression on TF-IDF of word 1- and 2-grams and character 2- to 5-grams."""

    kind = "tfidf"

    def __init__(self, vectorizers: list[TfidfVectorizer], coefficients: np.ndarray, intercept: float) -> None:
        self._vectorizers, self._coefficients, self._intercept = vectorizers, coefficients, intercept

    @classmethod
    def fit(cls, texts: Sequence[str], labels: np.ndarray, **_: object) -> "Tfidf":
        """texts: n strings; labels (n,): 1 = to forget."""
        vectorizers = _vectorizers()
        try:
            features = _stacked([v.fit_transform(texts) for v in vectorizers])
        except ValueError as error:  # nothing that counts as a term
            raise UserError(f"tfidf finds no terms in the train texts ({error}); use more rows or another classifier")
        model = LogisticRegression(C=10.0, class_weight="balanced", max_iter=2000).fit(features, labels)
        return cls(vectorizers, model.coef_[0], float(model.intercept_[0]))

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        features = _stacked([v.transform(texts) for v in self._vectorizers])
        return _logistic(features @ self._coefficients + self._intercept)

    def save(self, folder: Path) -> None:
        vocabularies = [sorted(v.vocabulary_, key=v.vocabulary_.get) for v in self._vectorizers]
        (folder / VOCABULARY).write_text(json.dumps(vocabularies, ensure_ascii=False), encoding="utf-8")
        tensors = {f"idf.{i}": torch.tensor(v.idf_) for i, v in enumerate(self._vectorizers)}
        tensors |= {
            "coefficients": torch.tensor(self._coefficients),
            "intercept": torch.tensor([self._intercept], dtype=torch.float64),
        }
        save_file(tensors, folder / WEIGHTS)

    @classmethod
    def load(cls, folder: Path, *_: object) -> "Tfidf":
        vocabularies = schemas.read(folder / VOCABULARY, Vocabularies)
        sizes = [len(terms) for terms in vocabularies]
        expected = {f"idf.{i}": _numbers(n) for i, n in enumerate(sizes)}
        tensors = _read_weights(folder, {**expected, "coefficients": _numbers(sum(sizes))})
        vectorizers = []
        for i, terms in enumerate(vocabularies):
            vectorizer = _vectorizers()[i].set_params(vocabulary={term: at for at, term in enumerate(terms)})
            vectorizer.idf_ = tensors[f"idf.{i}"]
            vectorizers.append(vectorizer)
        return cls(vectorizers, tensors["coefficients"], float(tensors["intercept"][0]))


class Features(Classifier):
    """`features`: balanced logistic regression on the frozen language model's own hidden states, mean over the prompt's
    tokens."""

    kind = "features"
    reads_states = True

    def __init__(
        self,
        served: FrozenModel,
        max_length: int,
        mean: np.ndarray,
        scale: np.ndarray,
        coefficients: np.ndarray,
        intercept: float,
    ) -> None:
        self._served, self._max_length = served, max_length
        self._mean, self._scale, self._coefficients, self._intercept = mean, scale, coefficients, intercept

    @classmethod
    def fit(
        cls, texts: Sequence[str], labels: np.ndarray, served: FrozenModel, settings: ClassifierSettings
    ) -> "Features":
        features = _pooled(served, texts, settings.max_length)
        mean, scale = features.mean(0), features.std(0) + 1e-6
        model = LogisticRegression(C=0.01, class_weight="balanced", max_iter=2000).fit(
            (features - mean) / scale, labels
        )
        return cls(served, settings.max_length, mean, scale, model.coef_[0], float(model.intercept_[0]))

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        features = (_pooled(self._served, texts, self._max_length) - self._mean) / self._scale
        return _logistic(features @ self._coefficients + self._intercept)

    def save(self, folder: Path) -> None:
        names = ("mean", "scale", "coefficients", "intercept")
        values = (self._mean, self._scale, self._coefficients, np.array([self._intercept]))
        save_file({name: torch.tensor(value) for name, value in zip(names, values)}, folder / WEIGHTS)

    @classmethod
    def load(cls, folder: Path, served: FrozenModel, trust_remote_code: bool, max_length: int) -> "Features":
        width = served.model.get_output_embeddings().weight.shape[-1]  # of some OPT models narrower than their layers
        names = "mean", "scale", "coefficients"
        tensors = _read_weights(folder, dict.fromkeys(names, _numbers(width)))
        return cls(served, max_length, *(tensors[name] for name in names), float(tensors["intercept"][0]))


class Encoder(Classifier):
    """A Hugging Face encoder with a classification head, fine-tuned by the authors' recipe: 30 epochs of batches of 16,
    class-weighted cross-entropy, AdamW (learning rate 2e-5, betas .9 and .98, epsilon 1e-6, weight decay .1 on
    matrices), cosine schedule with 10 % warm-up, no clipping. Kept is the epoch with the fewest forget rows of the
    validation rows at or below PICKED_AT; of several, which few rows make likely, the one with the least loss."""

    kind = "encoder"
    validates = True

    def __init__(self, model: torch.nn.Module, tokenizer: Any) -> None:
        self._model, self._tokenizer = model.eval(), tokenizer

    @classmethod
    def fit(
        cls,
        texts: Sequence[str],
        labels: np.ndarray,
        served: FrozenModel,
        settings: ClassifierSettings,
        validation: tuple[Sequence[str], np.ndarray],
    ) -> "Encoder":
        """validation: (texts, labels) that pick the epoch."""
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from utils.models.chain import resolve_chain

        name = settings.eco_classifier
        source = resolve_chain(name, settings.trust_remote_code)[0].path
        options = {"local_files_only": True, "trust_remote_code": settings.trust_remote_code}
        torch.manual_seed(settings.seed)
        try:
            model = AutoModelForSequenceClassification.from_pretrained(
                source, num_labels=2, ignore_mismatched_sizes=True, **options
            )
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
        except Exception as error:  # as in `load_classifier`
            raise UserError(f"{name} is no encoder to classify with ({first_line(error)}); use tfidf or another")
        if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= model.get_input_embeddings().weight.shape[0]:
            raise UserError(f"{name} is no encoder to classify with (it has no padding token); use tfidf or another")
        classifier = cls(model.float().to(served.model.device), tokenizer)
        classifier._train(texts, labels, settings, validation)
        return classifier

    def _train(
        self,
        texts: Sequence[str],
        labels: np.ndarray,
        settings: ClassifierSettings,
        validation: tuple[Sequence[str], np.ndarray],
    ) -> None:
        model, rng = self._model, np.random.default_rng(settings.seed)
        epochs, per_epoch = settings.eco_classifier_epochs, math.ceil(len(texts) / 16)
        optimizer, schedule = self._optimizer(settings.eco_classifier_lr, epochs * per_epoch)
        share = np.bincount(labels, minlength=2) / len(labels)
        weights = torch.tensor(1 / (2 * share), dtype=torch.float32, device=model.device)
        best, kept = (math.inf, math.inf), None
        for _ in tqdm(range(epochs), desc="classifier", unit="epoch", dynamic_ncols=True):
            model.train()
            order = rng.permutation(len(texts))
            for start in range(0, len(order), 16):
                rows = order[start : start + 16]
                targets = torch.tensor(labels[rows], device=model.device)
                logits = self._logits([texts[i] for i in rows])
                torch.nn.functional.cross_entropy(logits, targets, weights).backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            model.eval()
            errors = self._errors(validation, weights.cpu().double())
            if errors < best:
                best, kept = errors, {key: value.detach().clone() for key, value in model.state_dict().items()}
        if kept is None:
            raise UserError("the classifier's loss is not finite; use a smaller --eco_classifier_lr")
        model.load_state_dict(kept)

    def _optimizer(self, lr: float, steps: int) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
        from transformers import get_cosine_schedule_with_warmup

        from utils.training.optimizer import decay_groups

        groups = decay_groups(self._model.parameters(), 0.1)
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), eps=1e-6)
        return optimizer, get_cosine_schedule_with_warmup(optimizer, math.ceil(0.1 * steps), steps)

    def _errors(self, validation: tuple[list[str], np.ndarray], weights: torch.Tensor) -> tuple[float, float]:
        """(forget rows with a probability of at most PICKED_AT, weighted loss) on the validation (texts, labels);
        infinite where a probability is not finite."""
        p, truth = self.probabilities(validation[0], 32), torch.tensor(validation[1])
        if not np.isfinite(p).all():
            return math.inf, math.inf
        inside = torch.tensor(p).clamp(1e-7, 1 - 1e-7)
        loss = torch.nn.functional.binary_cross_entropy(inside, truth.to(inside), weights[truth])
        return int((p[validation[1] == 1] <= PICKED_AT).sum()), loss.item()

    def _logits(self, texts: Sequence[str]) -> torch.Tensor:
        positions = getattr(self._model.config, "max_position_embeddings", 514) - 2  # RoBERTa's begin at 2
        limit = min(512, positions, self._tokenizer.model_max_length)
        batch = self._tokenizer(texts, truncation=True, max_length=limit, padding=True, return_tensors="pt")
        if batch["input_ids"].max() >= self._model.get_input_embeddings().weight.shape[0]:
            raise UserError("the tokenizer of --eco_classifier gives tokens that its model does not know; use another")
        return self._model(**batch.to(self._model.device)).logits

    @torch.no_grad()
    def probabilities(self, texts: Sequence[str], batch_size: int = 1) -> np.ndarray:
        """(n,). One text a pass, so that no probability depends on the texts beside it."""
        starts = range(0, len(texts), batch_size)
        parts = [self._logits(texts[i : i + batch_size]).softmax(-1)[:, 1].cpu() for i in starts]
        return torch.cat(parts).double().numpy()

    def save(self, folder: Path) -> None:
        self._model.save_pretrained(folder / ENCODER)
        self._tokenizer.save_pretrained(folder / ENCODER)

    @classmethod
    def load(cls, folder: Path, served: FrozenModel, trust_remote_code: bool, max_length: int) -> "Encoder":
        from transformers import AutoModelForSequenceClassification

        model, tokenizer = load_classifier(AutoModelForSequenceClassification, folder / ENCODER, trust_remote_code)
        if model.config.num_labels != 2:
            raise UserError(f"{folder / ENCODER} has {model.config.num_labels} classes instead of 2; restore it")
        return cls(model.to(served.model.device), tokenizer)


def load_classifier(kind: type, folder: Path, trust_remote_code: bool) -> tuple[torch.nn.Module, Any]:
    """(model, tokenizer) of a Hugging Face classifier in `folder`; `kind` is the Auto class of such models.

    Nothing is fetched. Raises UserError where it is not there, not of that kind, or holds a number that is not finite.
    """
    from transformers import AutoTokenizer

    from utils.models.chain import refuse_fetching

    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no config.json; restore it or train the checkpoint again")
    refuse_special(folder)
    refuse_fetching(folder)
    options = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    try:
        model, info = kind.from_pretrained(folder, output_loading_info=True, **options)
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:  # of a damaged file, whatever the library that reads it raises
        raise UserError(f"{folder} is no classifier of texts ({first_line(error)}); restore it or use another")
    if info["missing_keys"]:  # transformers would give it a random head
        raise UserError(f"{folder} was not trained to classify texts; use a model that was, or --eco_names")
    if not all(map(is_finite, model.parameters())):
        raise UserError(f"{folder} holds weights that are not finite; restore it or train the checkpoint again")
    return model, tokenizer


def _numbers(n: int) -> Like:
    return Like((n,), ("float64",))


def _read_weights(folder: Path, expected: dict[str, Like]) -> dict[str, np.ndarray]:
    tensors = read_tensors(folder / WEIGHTS, {**expected, "intercept": _numbers(1)}, "classifier of this gate")
    return {name: tensor.numpy() for name, tensor in tensors.items()}


CLASSIFIERS = {kind.kind: kind for kind in (Tfidf, Features, Encoder)}


def threshold_rank(n: int, rate: float, flag: str) -> int:
    """ceil((n + 1)(1 - rate)), the rank of the calibration score that becomes the threshold (split conformal): a new
    score lies above it with probability at most `rate`. Raises UserError where `n` is too small for `rate`."""
    rank = max(1, math.ceil((n + 1) * (1 - rate) - 1e-9))
    if rank > n:
        raise UserError(
            f"--{flag}={rate} needs at least {math.ceil(1 / rate - 1e-9) - 1} retain rows for calibration, there are "
            f"{n}; use a larger value or more rows"
        )
    return rank


def threshold_for_rate(scores: np.ndarray, rate: float, flag: str) -> float:
    """The threshold under which a retain row is flagged with probability at most `rate`, by the `scores` (n,) of n
    retain rows. That holds for a row like them and the classifier that gave the scores; where another is used, trained
    on all rows, it is an estimate. Raises UserError where it is 1: a gate that flags nothing."""
    threshold = float(np.sort(scores)[threshold_rank(len(scores), rate, flag) - 1]) + ROUNDING
    if threshold < 1:
        return threshold
    raise UserError(
        f"the classifier gives retain rows the probability 1, so the threshold for --{flag}={rate} is 1 and nothing "
        "would be flagged; use a larger value or another --eco_classifier"
    )


def rates(gate: Gate, frames: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """{split: {"flagged", "wrong"}} shares, and {"auc_train", "auc_test"}: wrong = false positives on retain splits,
    false negatives on forget splits."""
    result, scored = {}, {}
    for split, frame in frames.items():
        flags, scored[split] = gate.decide(frame["text"])
        share = float(flags.mean())
        result[split] = {"flagged": share, "wrong": 1 - share if split.endswith("forget") else share}
        if "names_other" in frame and frame["names_other"].astype(bool).any():
            others = flags[frame["names_other"].astype(bool).to_numpy()]
            result[f"{split}:names_other"] = {"flagged": float(others.mean())}
    for phase in ("train", "test"):
        retain, forget = scored[f"{phase}_retain"], scored[f"{phase}_forget"]
        truth = np.r_[np.zeros(len(retain)), np.ones(len(forget))]
        result[f"auc_{phase}"] = float(roc_auc_score(truth, np.r_[retain, forget]))
    return result


def _vectorizers() -> list[TfidfVectorizer]:
    common = {"sublinear_tf": True, "dtype": np.float64}
    words = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b", **common)
    return [words, TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), min_df=2, **common)]


def _stacked(parts: list[Any]) -> Any:
    from scipy.sparse import hstack

    return hstack(parts).tocsr()


def _log_odds(probabilities: np.ndarray | float) -> np.ndarray:
    """logit(p), same shape, float64."""
    limits = np.finfo(np.float64)
    return logit(np.clip(np.asarray(probabilities, dtype=np.float64), limits.tiny, 1 - limits.epsneg))


def _logistic(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.asarray(x, dtype=np.float64)))


@contextmanager
def states_anew(model: torch.nn.Module) -> Iterator[None]:
    """While open, `features` reads the hidden states of `model` again, since its weights have changed. Afterwards those
    from before count."""
    from utils.models.layers import decoder_of

    kept = _STATES.pop(decoder_of(model), {})
    try:
        yield
    finally:
        _STATES[decoder_of(model)] = kept


@torch.inference_mode()
def _pooled(served: FrozenModel, texts: Sequence[str], max_length: int) -> np.ndarray:
    """Mean over the prompt's tokens of the hidden states that go into the head, (n, d) float64, without virtual tokens
    or corruption. One row a pass, so that no mean depends on the rows beside it; every text once a process."""
    from utils.data.batch import collate
    from utils.data.splits import UNLEARNING_LABELS
    from utils.models.forward import completion_hidden
    from utils.models.layers import decoder_of, record_activations
    from utils.tasks.encode import tokenize

    backbone = decoder_of(served.model)
    known = _STATES.setdefault(backbone, {})
    new = [text for text in dict.fromkeys(texts) if (text, max_length) not in known]
    examples = tokenize(served.tokenizer, new, [UNLEARNING_LABELS[0]] * len(new), max_length)
    for text, example in zip(new, examples):
        batch = collate([replace(example, completion=example.completion[:1])], served.pad_id, served.model.device)
        with record_activations(backbone) as seen:
            completion_hidden(served.model, batch)
        known[text, max_length] = seen["activations"][0].double().mean(0).cpu().numpy()
    result = np.array([known[text, max_length] for text in texts])
    if not np.isfinite(result).all():
        raise UserError("the model's hidden states are not finite; use --dtype=float32 or another --eco_classifier")
    return result
