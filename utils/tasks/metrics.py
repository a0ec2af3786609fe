"""Scores of question answering, multiple choice and text continuation, out of numbers and texts alone.

l(y|x) is the mean log-probability per token of answer y after prompt x, in nats. Where publications disagree, each
variant has a name here. A score that needs a reference takes it as an argument: without one there is no number.

Sources, each read in its code: TOFU (arXiv 2401.06121; aggregate_eval_stat.py, utils.py) for question answering, ECO
(arXiv 2406.07933; eco/evaluator, scripts/linear_probe.py) for generated texts and the probe, open-unlearning
(src/evals/metrics) for memorised texts.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import sacrebleu
from numpy.typing import ArrayLike
from rouge_score.rouge_scorer import RougeScorer
from scipy.special import logsumexp
from scipy.stats import hmean, ks_2samp
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

from utils.errors import UserError

Floats = np.ndarray | float  # a number for one row, an array for several
Mean = Literal["geometric", "arithmetic"]
Compared = Literal["ratio", "folded"]

ROUNDING = 1e-3  # how far float32 may round a log-probability above 0
UTILITY_SETS = ("retain", "real_authors", "world_facts")
UTILITY_SCORES = ("probability", "rouge_l_recall", "truth_score")
PUBLISHED_LOGS = {  # the sets of TOFU's eval_log_aggregated.json
    "retain": "eval_log.json",
    "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
    "forget": "eval_log_forget.json",
}


def _floats(values: ArrayLike, what: str) -> np.ndarray:
    """`values` as float64. Raises UserError where they are no numbers or their rows differ in length."""
    try:
        array = np.asarray(values, dtype=float)
    except (TypeError, ValueError) as error:
        raise UserError(f"{what} are no table of numbers; give numbers, as many in every row") from error
    if np.isnan(array).any():
        raise UserError(f"{what} hold NaN; score those rows again, in float32 if the model ran in half precision")
    return array


def _check_choice(name: str, value: str, choices: Any) -> None:
    """Raises UserError unless `value` is one of a Literal's."""
    if value not in get_args(choices):
        raise UserError(f"{name}={value!r} is not known; choose one of {', '.join(get_args(choices))}")


def _log_probabilities(values: ArrayLike) -> np.ndarray:
    """Mean log-probabilities as float64; minus infinity is one. Raises UserError on what cannot be one."""
    array = _floats(values, "log-probabilities")
    if (array > ROUNDING).any():
        raise UserError("a log-probability is above 0; give log-probabilities, which are losses times -1")
    return array


def probability(mean_log_p: ArrayLike) -> Floats:
    """exp l(a|q), the probability of an answer with its length taken out, in [0, 1]. mean_log_p: any shape, kept.

    Raises UserError on a positive log-probability or NaN.
    """
    return np.exp(np.minimum(_log_probabilities(mean_log_p), 0))


def normalised_probability(answer_mean_log_p: ArrayLike, perturbed_mean_log_p: ArrayLike) -> Floats:
    """exp l(a) / (exp l(a) + sum_j exp l(perturbed_j)), in [0, 1]: the probability on real_authors and world_facts.

    answer_mean_log_p: (...); perturbed_mean_log_p: (..., k), the k wrong answers; returns (...). Raises UserError where
    shapes do not fit, and where all answers of a row have probability 0.
    """
    answer, perturbed = _rows(answer_mean_log_p, perturbed_mean_log_p)
    total = np.logaddexp(answer, logsumexp(perturbed, axis=-1))
    if np.isneginf(total).any():
        raise UserError(
            "all answers of a row have probability 0, so none can be normalised; score it again, in float32"
        )
    return np.exp(answer - total)


def truth_ratio(paraphrase_mean_log_p: ArrayLike, perturbed_mean_log_p: ArrayLike, mean: Mean = "geometric") -> Floats:
    """R = mean_j f(perturbed_j) / f(paraphrase): below 1 where the true answer is the likelier one. In [0, infinity].

    geometric: R = exp(mean_j l(perturbed_j) - l(paraphrase)). This is what TOFU's aggregate script, open-unlearning and
    ECO compute (open-unlearning adds 1e-10 to the denominator). arithmetic: R = mean_j exp l(perturbed_j) / exp
    l(paraphrase), as TOFU's paper and the older get_model_utility of its utils.py have it; never below the geometric
    one.

    paraphrase_mean_log_p: (...); where a set has no paraphrase, the answer itself. perturbed_mean_log_p: (..., k), the
    k wrong answers. Returns (...). Computed in logarithms: only beyond e^-700 and e^700 R is 0 and infinite. Raises
    UserError where shapes do not fit, and where both sides have probability 0.
    """
    _check_choice("mean", mean, Mean)
    paraphrase, perturbed = _rows(paraphrase_mean_log_p, perturbed_mean_log_p)
    if mean == "geometric":
        numerator = perturbed.mean(-1)
    else:
        numerator = logsumexp(perturbed, axis=-1) - np.log(perturbed.shape[-1])
    if (np.isneginf(numerator) & np.isneginf(paraphrase)).any():
        raise UserError(
            "true and wrong answers of a row have probability 0, so it has no truth ratio; score it again, in float32"
        )
    with np.errstate(over="ignore"):
        return np.exp(numerator - paraphrase)


def _rows(one: ArrayLike, several: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of one answer a row (...) and of k others (..., k)."""
    single, others = _log_probabilities(one), _log_probabilities(several)
    if others.ndim == 0 or others.shape[-1] == 0 or others.shape[:-1] != single.shape:
        raise UserError(
            f"wrong answers of shape {others.shape} do not fit true ones of shape {single.shape}; give every row one "
            "true and at least one wrong answer"
        )
    return single, others


def _ratios(values: ArrayLike) -> np.ndarray:
    """Truth ratios (n,), n at least 1, each in [0, infinity]."""
    ratios = _floats(values, "truth ratios")
    if ratios.ndim != 1 or not len(ratios) or (ratios < 0).any():
        raise UserError("truth ratios are a list of at least one number, none below 0; give exp of log ratios")
    return ratios


def _folded(ratios: np.ndarray) -> np.ndarray:
    """min(R, 1/R) of each: how near R is to 1, from whichever side."""
    with np.errstate(divide="ignore"):
        return np.minimum(ratios, 1 / ratios)


def truth_score(ratios: ArrayLike) -> float:
    """Mean of max(0, 1 - R) over truth ratios R (n,): 1 where only the true answer is likely. For what is kept."""
    return float(np.maximum(0, 1 - _ratios(ratios)).mean())


def truth_score_forget(ratios: ArrayLike) -> float:
    """Mean of min(R, 1/R) over truth ratios R (n,), for the forget set: 1 where the true answer does not stand out."""
    return float(_folded(_ratios(ratios)).mean())


def forget_quality(ratios: ArrayLike, retain_ratios: ArrayLike, on: Compared = "ratio") -> float:
    """p-value of the two-sample Kolmogorov-Smirnov test between the truth ratios of two models on the forget set.

    High where the unlearnt model cannot be told from one that never saw the rows. ratio: the test on R, as TOFU and
    open-unlearning do (R and 1/R give the same). folded: on min(R, 1/R), as ECO does. ratios: (n,) of the unlearnt
    model; retain_ratios: (m,) of the retain model. The value depends on n: never compare sets of different sizes.
    """
    _check_choice("on", on, Compared)
    samples = _ratios(ratios), _ratios(retain_ratios)
    if on == "folded":
        samples = tuple(_folded(sample) for sample in samples)
    return float(ks_2samp(*samples).pvalue)


def model_utility(scores: Mapping[str, Mapping[str, float]]) -> float:
    """Harmonic mean of nine numbers in [0, 1] (TOFU); 0 where any of them is.

    scores: {set: {score: value}} with the UTILITY_SETS and, in each, the UTILITY_SCORES; further ones have no part.
    Raises UserError where one of the nine is missing, NaN or outside [0, 1].
    """
    nine = {f"{name}/{score}": scores.get(name, {}).get(score) for name in UTILITY_SETS for score in UTILITY_SCORES}
    for name, value in nine.items():
        if value is None:
            raise UserError(f"model utility needs {name}; score that set too, or report no utility")
        if not 0 <= value <= 1:
            raise UserError(f"model utility needs {name} between 0 and 1, not {value}; score that set again")
    return float(hmean(list(nine.values())))


def aggregate_log(
    log: Mapping[str, Any],
    retain_log: Mapping[str, Any] | None = None,
    mean: Mean = "geometric",
    on: Compared = "ratio",
) -> dict[str, Any]:
    """Scores of an evaluation that TOFU's code wrote: its eval_log_aggregated.json, read with json.load.

    Returns {set: {n, probability, rouge_l_recall, truth_score}} for those of PUBLISHED_LOGS that the log has; the
    forget set has truth_score_forget instead. Besides model_utility where the log has all UTILITY_SETS, and
    forget_quality where `retain_log`, the retain model's, is given. With the defaults these are the numbers of TOFU's
    aggregate_eval_stat.py. mean="arithmetic" gives the utility of its utils.py, whose forget quality stays geometric.

    mean: see truth_ratio. on: see forget_quality. Rows are matched by their index. Raises UserError on a log of another
    form, and where the two logs differ in their number of forget rows.
    """
    tables = {name: _published_rows(log, name) for name in PUBLISHED_LOGS if PUBLISHED_LOGS[name] in log}
    if not tables:
        raise UserError(
            f"this is no evaluation log of TOFU; it needs at least one of {', '.join(PUBLISHED_LOGS.values())}"
        )
    result: dict[str, Any] = {name: _set_scores(name, rows, mean) for name, rows in tables.items()}
    if set(UTILITY_SETS) <= set(tables):
        result["model_utility"] = model_utility(result)
    if retain_log is not None:
        both = [_published_rows(each, "forget") for each in (log, retain_log)]
        sizes = [len(rows["avg_gt_loss"]) for rows in both]
        if sizes[0] != sizes[1]:
            raise UserError(
                f"the logs have {sizes[0]} and {sizes[1]} forget rows; give a retain model's log on the same forget set"
            )
        result["forget_quality"] = forget_quality(*(_published_ratios(rows, mean) for rows in both), on)
    return result


def _set_scores(name: str, rows: Mapping[str, np.ndarray], mean: Mean) -> dict[str, int | float]:
    """The scores of one set of a published log."""
    answer, wrong = -rows["avg_gt_loss"], -rows["average_perturb_loss"]
    likely = probability(answer) if name in ("retain", "forget") else normalised_probability(answer, wrong)
    scores = {
        "n": len(answer),
        "probability": float(np.mean(likely)),
        "rouge_l_recall": float(rows["rougeL_recall"].mean()),
    }
    ratios = _published_ratios(rows, mean)
    if name == "forget":
        return {**scores, "truth_score_forget": truth_score_forget(ratios)}
    return {**scores, "truth_score": truth_score(ratios)}


def _published_ratios(rows: Mapping[str, np.ndarray], mean: Mean) -> Floats:
    return truth_ratio(-rows["avg_paraphrased_loss"], -rows["average_perturb_loss"], mean)


def _published_rows(log: Mapping[str, Any], name: str) -> dict[str, np.ndarray]:
    """The four fields {index of a row: value} of one set as arrays (n,), wrong answers (n, k), in one order."""
    file = PUBLISHED_LOGS[name]
    fields = ("avg_gt_loss", "average_perturb_loss", "avg_paraphrased_loss", "rougeL_recall")
    table = log.get(file, {})
    absent = [field for field in fields if not isinstance(table.get(field), Mapping) or not table[field]]
    if absent:
        raise UserError(f"{file} has no {absent[0]} by row in this log; write it with TOFU's evaluate_util.py")
    rows = list(table[fields[0]])
    if any(set(table[field]) != set(rows) for field in fields):
        raise UserError(f"the fields of {file} are about different rows; evaluate that set again")
    return {field: _floats([table[field][row] for row in rows], f"{field} of {file}") for field in fields}


class RougeL(NamedTuple):
    """Shares in [0, 1] of the longest common subsequence of words. recall: of the reference; f1: harmonic mean of
    recall and precision."""

    recall: float
    f1: float


@functools.cache
def _rouge_scorer(stemming: bool) -> RougeScorer:
    return RougeScorer(["rougeL"], use_stemmer=stemming)


def rouge_l(generated: str, reference: str, stemming: bool = True) -> RougeL:
    """ROUGE-L of a generated text against the true one, by the rouge-score package; 0 where either has no word.

    stemming: whether words count by their stem, as TOFU, ECO's recall and open-unlearning do. MUSE, and ECO's F1 of
    continuations, do without. A word is a run of a-z and 0-9, so a text in another script has none.
    """
    score = _rouge_scorer(stemming).score(reference, generated)["rougeL"]
    return RougeL(recall=float(score.recall), f1=float(score.fmeasure))


def bleu(generated: str, reference: str, effective_order: bool = False) -> float:
    """BLEU of one text in [0, 1], by sacrebleu (tokens 13a, exponential smoothing).

    effective_order False: corpus BLEU of a corpus of one text, which is what ECO reports (its mode `token`): 0 where
    the generated text has fewer than four tokens. True: sacrebleu's sentence BLEU, n-grams only as long as the text.
    """
    score = sacrebleu.corpus_bleu([generated], [[reference]], use_effective_order=effective_order).score
    return min(1.0, score / 100)


def unique_token_share(tokens: Sequence[int]) -> float:
    """Different tokens over all tokens of a generated text; 0 for none, as in ECO's code."""
    return len(set(tokens)) / len(tokens) if len(tokens) else 0.0


def perplexity(log_p_sum: float, n_tokens: int) -> float:
    """exp(- log_p_sum / n_tokens) of a text of n_tokens predicted tokens, whose log-probabilities sum up to log_p_sum.

    Infinite beyond e^700. Raises UserError where there is no token. ECO's code divides by the padded length of the
    batch instead, so its values depend on the other texts.
    """
    if n_tokens < 1:
        raise UserError("a text without a predicted token has no perplexity; leave it out")
    with np.errstate(over="ignore"):
        return float(np.exp(-_log_probabilities(log_p_sum) / n_tokens))


def similarity_gap(scores: Mapping[str, float], retain_scores: Mapping[str, float]) -> float:
    """Average similarity gap (ECO): mean |score - retain score| over similarity scores {name: value}.

    scores: of the unlearnt model's texts. retain_scores: of those of the model that never saw the original. 0 where
    both write texts that are as near to it. Raises UserError where they do not name the same scores, or none.
    """
    if not scores or set(scores) != set(retain_scores):
        raise UserError("both models need the same similarity scores, and at least one; compute those that one lacks")
    return float(np.mean([abs(scores[name] - retain_scores[name]) for name in scores]))


def _hits(values: ArrayLike) -> np.ndarray:
    """Hits (n,) as booleans, n at least 1."""
    hits = np.asarray(values)
    if hits.dtype != bool or hits.ndim != 1:
        raise UserError("hits are true or false, one a completion token; give arg max == token")
    return hits


def extraction_strength(hits: ArrayLike) -> float:
    """1 - k/n, k the shortest prefix after which greedy decoding gives the rest exactly, in [0, 1].

    hits: (n,), whether the arg max under teacher forcing is the true token, at every completion position. Where all
    hits from position k on are true, the greedy answer to the first k tokens is the rest. 1: without a prefix; 0: the
    last token is missed. (open-unlearning gives 1/n there, and leaves the end-of-sequence token out.) Raises UserError
    where `hits` are not booleans, or none.
    """
    missed = np.flatnonzero(~_hits(hits))
    prefix = missed[-1] + 1 if len(missed) else 0
    return float(1 - prefix / len(hits))


def exact_memorisation(hits: ArrayLike) -> float:
    """Share of completion positions whose arg max under teacher forcing is the true token. hits: (n,) booleans."""
    return float(_hits(hits).mean())


class Probe(NamedTuple):
    """accuracy: of the probe on the half that it was not fitted to. shuffled: the same after fits to shuffled labels,
    mean of several: what is reached without knowing anything."""

    accuracy: float
    shuffled: float


def probe_accuracy(features: ArrayLike, labels: ArrayLike, seed: int, shuffles: int = 5) -> Probe:
    """The means of `probe_hits`: whether answers can still be read off the logits."""
    return Probe(*(float(hits.mean()) for hits in probe_hits(features, labels, seed, shuffles)))


def probe_hits(
    features: ArrayLike, labels: ArrayLike, seed: int, shuffles: int = 5, standardised: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Whether a logistic regression on half of the rows tells the label of each other row, and how often it does when
    fitted to shuffled labels, both (m,) in [0, 1].

    features: (n, V), logits of the last position, say; labels: (n,), the right choices. standardised: whether each
    feature is brought to mean 0 and deviation 1 on the fitted rows. The other half is scored. Halves are
    drawn by `seed` and have the same shares of every label; ECO takes the first and the last half. Regression:
    scikit-learn's with its default C = 1, as there, but fitted until it no longer changes (an early stop gives
    accuracies that depend on the scale of the logits). shuffles: how many fits to shuffled labels the control averages.

    Fast for large V: weights under an L2 penalty are combinations of the fitted rows. So rows are rotated into those
    rows' span, n/2 numbers each, by a QR decomposition, which changes no prediction. Nor does centring, for the
    intercept has no penalty. Raises UserError on fewer than two labels, a label of one row, or NaN and infinite logits.
    """
    rows, truth = _floats(features, "features"), np.asarray(labels)
    if rows.ndim != 2 or truth.shape != rows.shape[:1] or not np.isfinite(rows).all():
        raise UserError(
            "the probe needs a finite vector and a label for every row; give features (n, V) and labels (n,)"
        )
    counts = np.unique(truth, return_counts=True)[1]
    if len(counts) < 2 or counts.min() < 2:
        raise UserError("the probe needs two labels or more, each of two rows or more; give it more rows")
    fitted, scored = train_test_split(np.arange(len(rows)), test_size=0.5, stratify=truth, random_state=seed)
    rows = StandardScaler(with_std=standardised).fit(rows[fitted]).transform(rows)
    rows = rows @ np.linalg.qr(rows[fitted].T)[0]

    def hits(fitted_labels: np.ndarray) -> np.ndarray:
        probe = LogisticRegression(tol=1e-8, max_iter=10_000).fit(rows[fitted], fitted_labels)
        return (probe.predict(rows[scored]) == truth[scored]).astype(float)

    rng = np.random.default_rng(seed)
    shuffled = [hits(rng.permutation(truth[fitted])) for _ in range(shuffles)]
    return hits(truth[fitted]), np.mean(shuffled, axis=0)
