"""Scores of questions, choices and continuations against numbers worked out by hand and the published formulas."""

import math

import numpy as np
import pytest
from scipy.stats import hmean, ks_2samp
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

from utils.errors import UserError
from utils.tasks import metrics
from utils.tasks.metrics import (
    aggregate_log,
    bleu,
    exact_memorisation,
    extraction_strength,
    forget_quality,
    model_utility,
    normalised_probability,
    perplexity,
    probability,
    probe_accuracy,
    rouge_l,
    similarity_gap,
    truth_ratio,
    truth_score,
    truth_score_forget,
    unique_token_share,
)

LOG = math.log
INF = math.inf


def test_probability_is_the_geometric_mean_of_the_tokens():
    tokens = [0.5, 0.125]
    assert probability(np.log(tokens).mean()) == pytest.approx(0.25)
    assert probability([LOG(0.5), 0.0, -INF]) == pytest.approx([0.5, 1, 0])
    assert probability(1e-7) == 1  # what float32 makes of a sure answer


def test_normalised_probability():
    assert normalised_probability(LOG(0.2), np.log([0.1, 0.05, 0.05])) == pytest.approx(0.5)
    two_rows = normalised_probability([LOG(0.3), LOG(0.1)], np.log([[0.1, 0.2], [0.1, 0.3]]))
    assert two_rows == pytest.approx([0.5, 0.2])
    assert normalised_probability(-1000, [-1000 + LOG(3)]) == pytest.approx(0.25)  # exp(-1000) is 0
    assert normalised_probability(-INF, [-2.0]) == 0


def test_the_two_truth_ratios():
    paraphrase, perturbed = LOG(0.2), np.log([0.1, 0.4])
    assert truth_ratio(paraphrase, perturbed) == pytest.approx(math.sqrt(0.1 * 0.4) / 0.2)
    assert truth_ratio(paraphrase, perturbed, mean="arithmetic") == pytest.approx(0.25 / 0.2)
    rows = truth_ratio([paraphrase, paraphrase], [perturbed, np.log([0.05, 0.05])])
    assert rows == pytest.approx([1, 0.25])


@pytest.mark.parametrize("mean", ["geometric", "arithmetic"])
def test_truth_ratios_of_improbable_answers(mean):
    assert truth_ratio(-900.0, [-901.0, -901.0], mean=mean) == pytest.approx(math.exp(-1))
    assert truth_ratio(-INF, [-3.0], mean=mean) == INF
    assert truth_ratio(-2000.0, [-1.0], mean=mean) == INF
    assert truth_ratio(-3.0, [-INF, -INF], mean=mean) == 0


def test_one_impossible_wrong_answer_is_all_of_a_geometric_mean_and_a_part_of_an_arithmetic_one():
    assert truth_ratio(LOG(0.5), [-INF, LOG(0.5)]) == 0
    assert truth_ratio(LOG(0.5), [-INF, LOG(0.5)], mean="arithmetic") == pytest.approx(0.5)


def test_truth_scores():
    ratios = [0.25, 2.0, 0.0, INF, 1.0]
    assert truth_score(ratios) == pytest.approx((0.75 + 0 + 1 + 0 + 0) / 5)
    assert truth_score_forget(ratios) == pytest.approx((0.25 + 0.5 + 0 + 0 + 1) / 5)


def test_forget_quality_is_an_exact_p_value():
    """Of the C(4, 2) = 6 ways to mix two pairs, two keep them apart: p = 1/3. Interleaved pairs: p = 1."""
    assert forget_quality([0.1, 0.2], [0.3, 0.4]) == pytest.approx(1 / 3)
    assert forget_quality([0.1, 0.3], [0.2, 0.4]) == pytest.approx(1)
    assert forget_quality([0.1, 0.2], [0.3, INF]) == pytest.approx(1 / 3)


def test_forget_quality_on_folded_ratios_does_not_tell_high_from_low():
    low = np.array([0.1, 0.2, 0.3, 0.4])
    assert forget_quality(low, 1 / low) == pytest.approx(2 / math.comb(8, 4))
    assert forget_quality(low, 1 / low, on="folded") == 1
    assert forget_quality([0.5, 0.6], [4.0, 5.0], on="folded") == pytest.approx(1 / 3)


def test_forget_quality_is_the_same_with_the_ratios_the_other_way_up():
    one, other = np.random.default_rng(0).lognormal(size=(2, 30)) + [[0], [0.4]]
    assert forget_quality(one, other) == pytest.approx(forget_quality(1 / one, 1 / other))
    assert 0 < forget_quality(one, other) < 0.5


def nine(**changed):
    values = {name: dict.fromkeys(metrics.UTILITY_SCORES, 0.5) for name in metrics.UTILITY_SETS}
    values["world_facts"] |= changed
    return values


def test_model_utility_is_the_harmonic_mean_of_nine():
    assert model_utility(nine()) == pytest.approx(0.5)
    assert model_utility(nine(probability=1.0)) == pytest.approx(9 / (8 / 0.5 + 1))
    assert model_utility(nine(truth_score=0.0)) == 0
    assert model_utility(nine() | {"forget": {"probability": 0.0}}) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ({"retain": {}}, "needs retain/probability; score that set too"),
        (nine(truth_score=None), "needs world_facts/truth_score; score that set too"),
        (nine(rouge_l_recall=-0.1), "world_facts/rouge_l_recall between 0 and 1, not -0.1"),
        (nine(rouge_l_recall=37.0), "between 0 and 1, not 37.0"),
        (nine(probability=math.nan), "between 0 and 1, not nan"),
    ],
)
def test_model_utility_without_all_nine_is_no_number(scores, said):
    with pytest.raises(UserError, match=said):
        model_utility(scores)


def test_rouge_l():
    """`the cat is here`: the longest common subsequence with `the black cat sat here` has three words."""
    score = rouge_l("the cat is here", "the black cat sat here")
    assert score.recall == pytest.approx(3 / 5)
    assert score.f1 == pytest.approx(2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5))
    assert rouge_l("", "the cat") == rouge_l("the cat", "") == (0, 0)


def test_rouge_l_with_and_without_stems():
    assert rouge_l("he writes novels", "he is writing novel").recall == pytest.approx(3 / 4)
    assert rouge_l("he writes novels", "he is writing novel", stemming=False).recall == pytest.approx(1 / 4)


def test_bleu():
    """Six words against seven: precisions 6/6, 4/5, 3/4, 2/3 and a brevity penalty of e^(1 - 7/6)."""
    generated, reference = "the cat sat on the mat", "the cat sat on the red mat"
    expected = math.exp(1 - 7 / 6) * (6 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** (1 / 4)
    assert bleu(generated, reference) == pytest.approx(expected)
    assert bleu(reference, reference) == 1
    assert bleu("", reference) == 0


def test_bleu_of_a_short_text():
    assert bleu("the cat", "the cat") == 0
    assert bleu("the cat", "the cat", effective_order=True) == pytest.approx(1)
    assert bleu("cat", "the cat", effective_order=True) == pytest.approx(math.exp(-1))


def test_unique_token_share():
    assert unique_token_share([7, 7, 7, 8]) == 0.5
    assert unique_token_share([]) == 0


def test_perplexity():
    assert perplexity(3 * LOG(0.25), 3) == pytest.approx(4)
    assert perplexity(-2000.0, 2) == INF


def test_similarity_gap():
    retain = {"rouge_l_f1": 0.4, "bleu": 0.1}
    assert similarity_gap({"bleu": 0.3, "rouge_l_f1": 0.3}, retain) == pytest.approx((0.2 + 0.1) / 2)
    assert similarity_gap(retain, retain) == 0


@pytest.mark.parametrize(
    ("hits", "strength", "share"),
    [
        ("1111", 1, 1),
        ("0111", 3 / 4, 3 / 4),
        ("1011", 1 / 2, 3 / 4),
        ("1110", 0, 3 / 4),
        ("0000", 0, 0),
        ("1", 1, 1),
    ],
)
def test_extraction_strength_and_exact_memorisation(hits, strength, share):
    hits = [hit == "1" for hit in hits]
    assert extraction_strength(hits) == strength
    assert exact_memorisation(hits) == share


def test_extraction_strength_is_what_greedy_decoding_says():
    """A model that knows the next token by the last one: from every prefix the answer is decoded for real."""
    after = {1: 2, 2: 3, 3: 4, 4: 5, 5: 1}
    answer = [1, 2, 4, 5, 1, 3, 4, 5]
    hits = [after.get(before) == token for before, token in zip([5, *answer], answer)]

    def decoded(prefix):
        tokens = [5, *prefix]
        while len(tokens) <= len(answer):
            tokens.append(after[tokens[-1]])
        return tokens[1:]

    shortest = min(k for k in range(len(answer) + 1) if decoded(answer[:k]) == answer)
    assert shortest == 6
    assert extraction_strength(hits) == 1 - shortest / len(answer)


def choices(n=80, columns=300, signal=0.3):
    """Rows with a label of four in their features, around a mean far from 0."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 4, n)
    means = rng.normal(size=(4, columns)) * signal
    return rng.normal(size=(n, columns)) + means[labels] + 10 * rng.normal(size=columns), labels


def test_the_probe_reads_off_what_is_there():
    features, labels = choices(n=200, signal=1.0)
    probe = probe_accuracy(features, labels, seed=0)
    assert probe.accuracy == 1
    assert probe.shuffled < 0.4
    assert probe_accuracy(features, labels, seed=0) == probe


def test_the_probe_finds_nothing_in_noise():
    features, _ = choices(n=300, signal=0)
    labels = np.random.default_rng(2).permutation(np.arange(300) % 4)
    probe = probe_accuracy(features, labels, seed=0)
    assert 0.12 < probe.accuracy < 0.38  # four standard errors of 150 rows around a quarter
    assert 0.15 < probe.shuffled < 0.35


@pytest.mark.parametrize(("columns", "signal"), [(300, 0.2), (20, 0.7)])
def test_rotated_features_give_the_plain_regression(columns, signal):
    """With more columns than rows and with fewer."""
    features, labels = choices(columns=columns, signal=signal)
    for seed in range(2):
        fitted, scored = train_test_split(np.arange(80), test_size=0.5, stratify=labels, random_state=seed)
        plain = LogisticRegression(tol=1e-8, max_iter=100_000).fit(features[fitted], labels[fitted])
        expected = plain.score(features[scored], labels[scored])
        assert 0.4 < expected < 1
        assert probe_accuracy(features, labels, seed=seed).accuracy == pytest.approx(expected)


def test_the_probe_is_fast_on_a_whole_vocabulary(monkeypatch):
    """No regression sees more than as many columns as it has rows."""
    seen, fit = [], LogisticRegression.fit

    def watched(self, rows, labels):
        seen.append(rows.shape)
        return fit(self, rows, labels)

    monkeypatch.setattr(LogisticRegression, "fit", watched)
    features, labels = choices(n=40, columns=49_152)
    assert probe_accuracy(features.astype(np.float32), labels, seed=0, shuffles=2).accuracy == 1
    assert seen == [(20, 20)] * 3


def test_the_probe_of_a_model_that_says_one_thing():
    """Where all rows have the same logits, the commonest label is all that is left."""
    labels = np.array([0] * 12 + [1] * 4)
    assert probe_accuracy(np.full((16, 50), 3.0), labels, seed=0) == (0.75, 0.75)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: probability(2.5), "a log-probability is above 0; give log-probabilities"),
        (lambda: probability(math.nan), "log-probabilities hold NaN; score those rows again"),
        (lambda: truth_ratio([-1.0, -2.0], [[-1.0], [-1.0, -2.0]]), "no table of numbers"),
        (lambda: truth_ratio([-1.0, -2.0], [-1.0, -2.0]), r"shape \(2,\) do not fit true ones of shape \(2,\)"),
        (lambda: truth_ratio(-1.0, []), "do not fit"),
        (lambda: truth_ratio(-INF, [-INF]), "no truth ratio"),
        (lambda: truth_ratio(-1.0, [-1.0], mean="median"), "mean='median' is not known; choose one of geometric, arit"),
        (lambda: normalised_probability(-INF, [-INF, -INF]), "none can be normalised"),
        (lambda: truth_score([]), "at least one number"),
        (lambda: truth_score_forget([0.5, -0.5]), "none below 0"),
        (lambda: truth_score([math.nan]), "truth ratios hold NaN"),
        (lambda: forget_quality([0.5], []), "at least one number"),
        (lambda: forget_quality([0.5], [0.5], on="log"), "choose one of ratio, folded"),
        (lambda: similarity_gap({"bleu": 0.1}, {"meteor": 0.1}), "the same similarity scores"),
        (lambda: similarity_gap({}, {}), "at least one"),
        (lambda: perplexity(-1.0, 0), "without a predicted token"),
        (lambda: extraction_strength([]), "hits are true or false"),
        (lambda: exact_memorisation([17, 254]), "hits are true or false"),
        (lambda: probe_accuracy(np.zeros((4, 2)), [0, 1, 0], seed=0), "a finite vector and a label for every row"),
        (lambda: probe_accuracy([[INF], [0], [0], [0]], [0, 1, 0, 1], seed=0), "a finite vector"),
        (lambda: probe_accuracy(np.zeros((4, 2)), [1, 1, 1, 1], seed=0), "two labels or more"),
        (lambda: probe_accuracy(np.zeros((5, 2)), [0, 0, 1, 1, 2], seed=0), "each of two rows or more"),
    ],
)
def test_what_cannot_be_scored_is_said(call, said):
    with pytest.raises(UserError, match=said):
        call()


def published_log(seed, forget_loss=0.1):
    """An evaluation in the form that TOFU's evaluate_util.py writes, with fields that no score needs."""
    rng = np.random.default_rng(seed)
    log = {}
    for file, n, k in (
        ("eval_log.json", 7, 5),
        ("eval_real_author_wo_options.json", 4, 3),
        ("eval_real_world_wo_options.json", 5, 3),
        ("eval_log_forget.json", 6, 5),
    ):
        loss = forget_loss if "forget" in file else 0.1
        gt, paraphrased = rng.gamma(2, loss, n), rng.gamma(4, 0.5, n)
        perturbed, tokens = rng.gamma(4, 0.6, (n, k)), rng.integers(5, 40, n)
        if "wo_options" in file:
            paraphrased = gt
        by_row = {
            "avg_gt_loss": gt,
            "gt_loss": gt * tokens,
            "num_token_gt": tokens,
            "generated_text": [["Question: who?", "Ann", "Ann Lee"]] * n,
            "rouge1_recall": rng.uniform(0.5, 1, n),
            "rougeL_recall": rng.uniform(0.5, 1, n),
            "average_perturb_loss": perturbed,
            "avg_paraphrased_loss": paraphrased,
            "truth_ratio": np.exp(paraphrased - perturbed.mean(-1)),
        }
        log[file] = {
            field: {str(row): np.asarray(values)[row].tolist() for row in range(n)} for field, values in by_row.items()
        }
    return log


def column(log, file, field):
    return np.array([log[file][field][row] for row in sorted(log[file][field])])


def by_the_script(log, retain_log, arithmetic):
    """The formulas of TOFU's aggregate_eval_stat.py, on losses: model utility, scores by set, forget quality."""
    nine, scores, stats = [], {}, []
    for name, file in metrics.PUBLISHED_LOGS.items():
        wrong, paraphrased = (column(log, file, field) for field in ("average_perturb_loss", "avg_paraphrased_loss"))
        prob = np.exp(-column(log, file, "avg_gt_loss"))
        if "wo_options" in file:
            prob = prob / (prob + np.exp(-wrong).sum(-1))
        true_over_false = np.exp(wrong.mean(-1) - paraphrased)
        if arithmetic:
            true_over_false = np.exp(-paraphrased) / np.exp(-wrong).mean(-1)
        score = np.maximum(0, 1 - 1 / true_over_false).mean()
        if name == "forget":
            score = np.minimum(true_over_false, 1 / true_over_false).mean()
        scores[name] = [prob.mean(), column(log, file, "rougeL_recall").mean(), score]
        nine += scores[name] if name != "forget" else []
    for each in (log, retain_log):
        wrong = column(each, "eval_log_forget.json", "average_perturb_loss")
        paraphrased = column(each, "eval_log_forget.json", "avg_paraphrased_loss")
        stats.append(np.exp(wrong.mean(-1) - paraphrased))
    return hmean(nine), scores, ks_2samp(*stats).pvalue


@pytest.mark.parametrize("mean", ["geometric", "arithmetic"])
def test_a_published_log_gives_the_published_numbers(mean):
    log, retain_log = published_log(0), published_log(1, forget_loss=1.0)
    utility, scores, quality = by_the_script(log, retain_log, mean == "arithmetic")
    result = aggregate_log(log, retain_log, mean=mean)
    assert result["model_utility"] == pytest.approx(utility)
    for name, expected in scores.items():
        n, *found = result[name].values()
        assert n == len(log[metrics.PUBLISHED_LOGS[name]]["avg_gt_loss"])
        assert found == pytest.approx(expected)
    if mean == "geometric":
        assert result["forget_quality"] == pytest.approx(quality)
        assert quality < 1


def test_the_log_has_the_truth_ratio_itself():
    log = published_log(0)
    for file in metrics.PUBLISHED_LOGS.values():
        ratios = truth_ratio(-column(log, file, "avg_paraphrased_loss"), -column(log, file, "average_perturb_loss"))
        assert ratios == pytest.approx(column(log, file, "truth_ratio"))


def test_forget_quality_of_logs_on_folded_ratios():
    log, retain_log = published_log(0), published_log(1)
    ratios = [column(each, "eval_log_forget.json", "truth_ratio") for each in (log, retain_log)]
    folded = ks_2samp(*[np.minimum(r, 1 / r) for r in ratios]).pvalue
    assert aggregate_log(log, retain_log, on="folded")["forget_quality"] == pytest.approx(folded)
    assert folded != pytest.approx(aggregate_log(log, retain_log)["forget_quality"])


def test_rows_of_a_log_are_matched_by_their_index():
    """Its fields may come in different orders, for instance where several processes wrote them."""
    log = published_log(0)
    mixed = {file: {**fields} for file, fields in log.items()}
    for fields in mixed.values():
        fields["avg_gt_loss"] = dict(reversed(fields["avg_gt_loss"].items()))
    result, expected = aggregate_log(mixed), aggregate_log(log)
    for name in metrics.PUBLISHED_LOGS:
        assert result[name] == pytest.approx(expected[name])


def test_what_a_log_lacks_is_no_number():
    whole = published_log(0)
    log = {file: whole[file] for file in ("eval_log.json", "eval_log_forget.json")}
    assert list(aggregate_log(log)) == ["retain", "forget"]
    assert "forget_quality" not in aggregate_log(whole)
    with pytest.raises(UserError, match=r"eval_log_forget.json has no avg_gt_loss"):
        aggregate_log(log, {"eval_log.json": whole["eval_log.json"]})
    with pytest.raises(UserError, match="no evaluation log of TOFU"):
        aggregate_log({"TOFU_EVAL": {}})
    del whole["eval_log_forget.json"]["rougeL_recall"]
    with pytest.raises(UserError, match=r"eval_log_forget.json has no rougeL_recall by row"):
        aggregate_log(whole)


def test_logs_that_do_not_fit():
    log, retain_log = published_log(0), published_log(1)
    for field in retain_log["eval_log_forget.json"].values():
        del field["0"]
    with pytest.raises(UserError, match="6 and 5 forget rows"):
        aggregate_log(log, retain_log)
    del log["eval_log.json"]["avg_paraphrased_loss"]["3"]
    with pytest.raises(UserError, match=r"fields of eval_log.json are about different rows"):
        aggregate_log(log)
