"""Claims: each verdict comes out when it should, and a null effect is called one as seldom as promised."""

import numpy as np
import pytest
from scipy import stats

from reproductions.harness import recording
from reproductions.harness.claims import (
    ALPHA,
    greater_verdict,
    judge,
    load_claims,
    not_worse_verdict,
    order_verdict,
    value_verdict,
    verdicts,
)
from reproductions.harness.claims_file import Claim, ClaimError
from reproductions.harness.ledger import Ledger
from reproductions.harness.profiles import load_column
from reproductions.harness.recording import merged
from reproductions.harness.statistics import Sample, holm_alphas, mean_interval
from tests.harness.fakes import make_result

CODE = "read in the authors' code or result files"
TRIALS = 2000


def sample(mean, spread=0.0, n=5):
    """A sample with exactly this mean and standard deviation."""
    values = np.linspace(-1, 1, n) if n > 1 else np.zeros(1)
    return Sample.of(mean + (spread * values / values.std(ddof=1) if n > 1 else values))


def draws(mean, seeds, spread=1.0, trials=TRIALS):
    """`trials` samples of `seeds` normal differences, summarised at once."""
    values = np.random.default_rng(20180304).normal(mean, spread, (trials, seeds))
    errors = values.std(axis=1, ddof=1) / np.sqrt(seeds)
    return [Sample(seeds, m, e) for m, e in zip(values.mean(axis=1), errors, strict=True)]


def at_most(count, rate, trials=TRIALS):
    """Whether a count of `trials` is compatible with a chance of at most `rate` (one in 10,000 fails)."""
    return stats.binom.sf(count - 1, trials, rate) > 1e-4


def near(count, rate, trials=TRIALS):
    """Whether a count of `trials` is compatible with a chance of exactly `rate`."""
    return stats.binomtest(int(count), trials, rate).pvalue > 1e-4


class TestWords:
    """The rules themselves, at samples whose interval is known: half width 2.78 · s/√5 for 95 %, n = 5."""

    @pytest.mark.parametrize(
        ("mean", "spread", "expected"),
        [
            (0.0, 0.1, "reproduced"),
            (0.8, 0.1, "reproduced"),
            (-0.8, 0.1, "reproduced"),
            (1.0, 0.1, "cannot tell"),
            (0.0, 2.0, "cannot tell"),
            (1.2, 0.1, "value differs"),
            (-1.2, 0.1, "value differs"),
            (3.0, 9.0, "cannot tell"),
        ],
    )
    def test_value(self, mean, spread, expected):
        assert value_verdict(sample(mean, spread), delta=1.0) == expected

    @pytest.mark.parametrize(
        ("mean", "spread", "expected"),
        [
            (3.0, 1.0, "direction holds"),
            (-3.0, 1.0, "contradicted"),
            (0.0, 0.1, "no effect beyond δ"),
            (0.5, 0.1, "no effect beyond δ"),
            (0.0, 2.0, "underpowered"),
            (2.0, 2.0, "underpowered"),
            (1.1, 0.1, "direction holds"),
            (-1.1, 0.1, "contradicted"),
        ],
    )
    def test_greater(self, mean, spread, expected):
        assert greater_verdict(sample(mean, spread), delta=1.0) == expected

    @pytest.mark.parametrize(
        ("means", "expected"),
        [
            ((3.0, 3.0), "direction holds"),
            ((3.0, -3.0), "contradicted"),
            ((3.0, 0.0), "underpowered"),
            ((-3.0, 0.0), "contradicted"),
        ],
    )
    def test_order(self, means, expected):
        assert order_verdict([sample(mean, 1.0) for mean in means], delta=0.5) == expected

    def test_order_with_a_step_that_does_not_matter(self):
        assert order_verdict([sample(3, 1), sample(0.1, 0.05)], delta=0.5) == "no effect beyond δ"

    @pytest.mark.parametrize(
        ("mean", "spread", "expected"),
        [
            (0.0, 0.5, "not worse"),
            (-0.5, 0.1, "not worse"),
            (-3.0, 0.5, "worse"),
            (0.0, 2.0, "underpowered"),
            (-1.0, 0.1, "underpowered"),
            (5.0, 1.0, "not worse"),
        ],
    )
    def test_not_worse(self, mean, spread, expected):
        assert not_worse_verdict(sample(mean, spread), delta=1.0) == expected

    def test_a_single_seed_decides_nothing(self):
        one = sample(5.0, n=1)
        assert value_verdict(one, 1.0) == "cannot tell"
        assert greater_verdict(one, 1.0) == "underpowered"
        assert not_worse_verdict(one, 1.0) == "underpowered"

    def test_without_chance_the_value_decides(self):
        assert greater_verdict(Sample.exact(5.0), 1.0) == "direction holds"
        assert greater_verdict(Sample.exact(-5.0), 1.0) == "contradicted"
        assert greater_verdict(Sample.exact(0.5), 1.0) == "no effect beyond δ"


class TestErrorRates:
    """Simulated seeds: how often a verdict is wrong is at most, or just, what its level says."""

    @pytest.mark.parametrize("seeds", [3, 5, 10])
    def test_a_null_effect_is_called_an_effect_at_the_nominal_rate(self, seeds):
        words = [greater_verdict(s, delta=1e-9) for s in draws(0.0, seeds)]
        assert near(words.count("direction holds"), ALPHA / 2)
        assert near(words.count("contradicted"), ALPHA / 2)

    @pytest.mark.parametrize("seeds", [3, 5, 10])
    def test_an_effect_that_matters_is_called_none_at_most_at_the_nominal_rate(self, seeds):
        words = [greater_verdict(s, delta=4.0) for s in draws(4.0, seeds)]
        assert at_most(words.count("no effect beyond δ"), ALPHA / 2)
        assert near([s.interval(0.95)[1] < 4.0 for s in draws(4.0, seeds)].count(True), ALPHA / 2)

    def test_a_value_at_the_margin_is_called_reproduced_at_the_nominal_rate(self):
        words = [value_verdict(s, delta=10.0) for s in draws(10.0, 5)]
        assert near(words.count("reproduced"), 0.05)
        assert near(words.count("value differs"), 0.05)

    def test_a_value_that_is_right_is_called_so(self):
        words = [value_verdict(s, delta=3.0) for s in draws(0.0, 5)]
        assert words.count("reproduced") > 0.9 * TRIALS
        assert words.count("value differs") == 0

    def test_worse_by_the_margin_is_called_not_worse_at_the_nominal_rate(self):
        words = [not_worse_verdict(s, delta=1.0) for s in draws(-1.0, 5)]
        assert near(words.count("not worse"), ALPHA / 2)
        assert near(words.count("worse"), ALPHA / 2)

    def test_an_order_with_one_equal_step_seldom_holds(self):
        equal, clear = draws(0.0, 5), sample(20, 1)
        words = [order_verdict([clear, step], delta=1e-9) for step in equal]
        assert near(words.count("direction holds"), ALPHA / 2)
        assert at_most(words.count("contradicted"), ALPHA / 2)

    def test_an_order_of_equals_is_seldom_contradicted(self):
        steps = draws(0.0, 5, trials=4 * TRIALS)
        words = [order_verdict(steps[i : i + 4], delta=1e-9) for i in range(0, len(steps), 4)]
        assert at_most(words.count("contradicted"), ALPHA / 2)
        assert words.count("contradicted") > 0.01 * TRIALS

    def test_a_large_effect_is_found(self):
        words = [greater_verdict(s, delta=0.5) for s in draws(3.0, 5)]
        assert words.count("direction holds") > 0.95 * TRIALS

    def test_the_detectable_difference_is_found_with_80_per_cent_power(self):
        # With the true spread in place of each sample's own; the formula is slightly off for few seeds.
        for seeds in (10, 30):
            visible = Sample(seeds, 0.0, 1 / np.sqrt(seeds)).detectable(ALPHA)
            found = [s.interval(0.95)[0] > 0 for s in draws(visible, seeds)]
            assert np.mean(found) == pytest.approx(0.8, abs=0.03)

    def test_holm_keeps_the_chance_of_any_false_call(self):
        three = np.random.default_rng(7).normal(0, 1, (TRIALS, 3, 5))
        any_false = 0
        for trial in three:
            samples = [Sample.of(row) for row in trial]
            p = [2 * min(s.p_above(0), s.p_below(0)) for s in samples]
            levels = holm_alphas(p, ALPHA)
            words = [greater_verdict(s, 1e-9, 1 - a) for s, a in zip(samples, levels, strict=True)]
            any_false += bool({"direction holds", "contradicted"} & set(words))
        assert at_most(any_false, ALPHA)
        assert any_false > 0.02 * TRIALS


@pytest.mark.parametrize(
    ("p_values", "expected"),
    [
        ([], []),
        ([0.04], [0.05]),
        ([0.01, 0.02, 0.04], [0.05 / 3, 0.025, 0.05]),
        ([0.04, 0.01, 0.02], [0.05, 0.05 / 3, 0.025]),
        ([0.03, 0.03, 0.03], [0.05 / 3] * 3),
        ([0.001, 0.03, 0.04], [0.05 / 3, 0.025, 0.025]),
    ],
)
def test_holm_steps_down_and_stops(p_values, expected):
    assert holm_alphas(p_values, 0.05) == pytest.approx(expected)


def test_holm_decides_as_the_textbook_says():
    generator = np.random.default_rng(3)
    for _ in range(200):
        p = generator.uniform(0, 0.08, 4)
        order = np.argsort(p)
        rejected = np.zeros(4, bool)
        for rank, index in enumerate(order):
            if p[index] > 0.05 / (4 - rank):
                break
            rejected[index] = True
        assert (p <= np.array(holm_alphas(list(p), 0.05))).tolist() == rejected.tolist()


def test_intervals_and_p_values_are_those_of_the_t_test():
    values = [0.3, 1.1, -0.2, 0.9, 0.4]
    found, expected = Sample.of(values), stats.ttest_1samp(values, 0)
    assert found.interval(0.95) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert 2 * min(found.p_above(0), found.p_below(0)) == pytest.approx(expected.pvalue)
    assert mean_interval([3.0]) == (3.0, None, None)
    assert mean_interval([3.0, 3.0]) == (3.0, 3.0, 3.0)
    with pytest.raises(ValueError, match="values"):
        Sample.of([])


@pytest.fixture
def ledger_of(column, columns, monkeypatch):
    """Return a ledger with these values by profile and arm."""
    known = load_column(column, columns)
    monkeypatch.setattr(recording, "source_digest", lambda module: "a" * 64)

    def make(profile="quick", **arms):
        found = [
            make_result(column, arm, seed, value, profile=profile)
            for arm, values in arms.items()
            for seed, value in enumerate(values)
        ]
        return merged(Ledger.empty(column, "a" * 64), found, known)

    return make


@pytest.fixture
def claim(column):
    def make(kind, *arms, profile="quick", **fields):
        keys = {profile: [f"{column}/{profile}/synthetic/map/{arm}" for arm in arms]} if arms else {}
        fields = {"id": "one", "title": "One", "source": "a table", "known": CODE, "delta": 1.0} | fields
        return Claim.model_validate({"kind": kind, "keys": keys, "column": column, **fields})

    return make


def only(claims, profile, ledger):
    (verdict,) = judge([claims], profile, ledger)
    return verdict


class TestJudging:
    NOISE = (0.0, 3.0, -2.0, 1.0, 4.0)

    def test_pairing_by_seed_removes_what_seeds_share(self, ledger_of, claim):
        student = [50 + noise for noise in self.NOISE]
        method = [53 + noise + 0.1 * seed for seed, noise in enumerate(self.NOISE)]
        verdict = only(
            claim("greater", "method", "student"), "quick", ledger_of(student=student, method=method)
        )
        assert (verdict.verdict, verdict.n, verdict.level) == ("direction holds", 5, 0.95)
        assert verdict.estimate == pytest.approx(3.2)
        assert verdict.interval == pytest.approx((3.2 - 0.1963, 3.2 + 0.1963), abs=1e-3)
        assert verdict.text == (
            "Difference +3.2 points (95 % interval +3 to +3.4, n = 5), δ = 1 points: direction holds."
        )
        # The same values without pairing: the seeds' spread hides the difference.
        assert greater_verdict(Sample.of(np.subtract(method, student[::-1])), 1.0) == "underpowered"

    def test_what_rounding_leaves_of_equal_means_is_printed_as_zero(self, ledger_of, claim):
        student, method = [53.0, 54.2, 53.4], [50.8, 50.9, 58.9]
        assert 0 < abs(np.subtract(method, student).mean()) < 1e-14
        verdict = only(
            claim("greater", "method", "student"), "quick", ledger_of(student=student, method=method)
        )
        assert verdict.text.startswith("Difference +0 points (95 % interval -")

    def test_only_common_seeds_are_paired(self, ledger_of, claim):
        ledger = ledger_of(student=[50, 50, 50, 50, 50], method=[53, 53.1, 53.2])
        assert only(claim("greater", "method", "student"), "quick", ledger).n == 3

    def test_a_fixed_arm_is_a_constant(self, ledger_of, claim):
        ledger = ledger_of(teacher=[60.0], student=[50, 50.1, 50.2, 50.3, 50.4])
        verdict = only(claim("greater", "teacher", "student"), "quick", ledger)
        assert (verdict.verdict, verdict.n) == ("direction holds", 5)
        assert verdict.estimate == pytest.approx(9.8)

    def test_contrast_is_a_difference_of_differences(self, ledger_of, claim):
        flat = [50.0, 50.1, 50.2, 50.1, 50.0]
        ledger = ledger_of(student=flat, method=[v + 5 for v in flat], twin=[v + 1.2 for v in flat])
        better = only(claim("contrast", "method", "student", "twin", "student"), "quick", ledger)
        worse = only(claim("contrast", "twin", "student", "method", "student"), "quick", ledger)
        assert (better.verdict, worse.verdict) == ("direction holds", "contradicted")
        assert better.estimate == pytest.approx(3.8)

    def test_underpowered_says_what_would_have_been_seen(self, ledger_of, claim):
        ledger = ledger_of(student=[50, 52, 48, 51, 49], method=[51, 49, 53, 52, 46])
        verdict = only(claim("greater", "method", "student"), "quick", ledger)
        assert verdict.verdict == "underpowered"
        spread = np.std(np.subtract([51, 49, 53, 52, 46], [50, 52, 48, 51, 49]), ddof=1)
        visible = (stats.t.ppf(0.975, 4) + stats.t.ppf(0.8, 4)) * spread / np.sqrt(5)
        assert (
            "the interval reaches across −δ"
            in only(claim("not_worse", "method", "student"), "quick", ledger).text
        )
        assert f"a difference of {visible:.2g} points would have been seen with 80 % power" in verdict.text

    def test_a_value_is_judged_on_the_papers_protocol_only(self, ledger_of, claim):
        values = [51.0, 51.2, 51.1, 50.9, 51.3]
        for profile, expected in (("paper", "reproduced"), ("standard", "other protocol")):
            claims = claim("value", "method", profile=profile, printed=51.19)
            verdict = only(claims, profile, ledger_of(profile, method=values))
            assert verdict.verdict == expected
            assert verdict.estimate == pytest.approx(51.1 - 51.19)
            assert verdict.level == pytest.approx(0.9)

    def test_not_run(self, ledger_of, claim):
        for kind, arms in (("greater", ("method", "student")), ("identity", ("method",))):
            verdict = only(claim(kind, *arms), "quick", ledger_of(student=[50, 51]))
            assert (verdict.verdict, verdict.interval) == ("not run", None)

    def test_identities(self, ledger_of, claim):
        ledger = ledger_of(method=[1e-7, -2e-7], student=[0.1, 0.0])
        assert only(claim("identity", "method", delta=1e-6), "quick", ledger).verdict == "verified"
        assert only(claim("identity", "student", delta=1e-6), "quick", ledger).verdict == "refuted"
        here = "tests.harness.test_claims"
        for name, expected in (("_true", "verified"), ("_false", "refuted")):
            checked = claim("identity", check=f"{here}:{name}", delta=None)
            assert only(checked, "quick", ledger).verdict == expected
        with pytest.raises(ClaimError, match="no check"):
            only(claim("identity", check=f"{here}:_missing", delta=None), "quick", ledger)

    def test_primary_claims_share_the_level(self, ledger_of, claim):
        flat = [50.0, 50.4, 50.2, 50.1, 50.3]
        wobble = [0.0, 2.5, 0.5, 1.5, 1.0]  # p = 0.06 alone at n = 5 would be 0.066
        ledger = ledger_of(
            student=flat,
            method=[v + 5 + 0.1 * w for v, w in zip(flat, wobble, strict=True)],
            twin=[v + w + 0.25 for v, w in zip(flat, wobble, strict=True)],
        )
        strong = claim("greater", "method", "student", id="strong", primary=True, delta=0.1)
        weak = claim("greater", "twin", "student", id="weak", primary=True, delta=0.1)
        third = claim("greater", "twin", "method", id="third", primary=True, delta=0.1)
        found = {v.claim.id: v for v in judge([strong, weak, third], "quick", ledger)}
        assert found["third"].level == pytest.approx(1 - 0.05 / 2)
        assert found["strong"].level == pytest.approx(1 - 0.05 / 3)
        assert found["weak"].level == pytest.approx(0.95)
        alone = judge([weak.model_copy(update={"primary": False})], "quick", ledger)[0]
        assert alone.level == 0.95

    def test_claims_that_were_not_run_count(self, ledger_of, claim):
        ledger = ledger_of(student=[50, 50.1, 50.2], method=[53, 53.1, 53.3])
        run = claim("greater", "method", "student", primary=True)
        missing = [claim("greater", "twin", "student", id=name, primary=True) for name in ("two", "three")]
        assert judge([run, *missing], "quick", ledger)[0].level == pytest.approx(1 - 0.05 / 3)

    def test_a_stale_number_marks_its_verdict(self, ledger_of, claim):
        ledger = ledger_of(student=[50, 51], method=[53, 54])
        later = Ledger(ledger.file, "b" * 64)
        assert not only(claim("greater", "method", "student"), "quick", ledger).stale
        assert only(claim("greater", "method", "student"), "quick", later).stale


def _true():
    from reproductions.harness.errata import Evidence

    return Evidence(True, "It holds.")


def _false():
    from reproductions.harness.errata import Evidence

    return Evidence(False, "It does not.")


CLAIM = """
[[claim]]
id = "method-over-student"
title = "The method helps"
kind = "greater"
keys.quick = ["COLUMN/quick/synthetic/map/method", "COLUMN/quick/synthetic/map/student"]
source = "table 1"
known = "read in the paper"
delta = 1
primary = true
"""
VALUE = CLAIM.replace('"greater"', '"value"').replace(', "COLUMN/quick/synthetic/map/student"', "")
UNREAD = VALUE.replace("delta", "printed = 51.2\ndelta").replace("read in the paper", "unverified")


class TestFile:
    @pytest.fixture
    def load(self, column, columns):
        def call(text):
            (columns / column / "claims.toml").write_text(text.replace("COLUMN", column))
            return load_claims(column, columns)

        return call

    def test_claims_are_read(self, load, column, columns, ledger_of):
        (found,) = load(CLAIM)
        assert (found.id, found.kind, found.primary, found.delta_of("quick")) == (
            "method-over-student",
            "greater",
            True,
            1,
        )
        ledger = ledger_of(student=[50, 50.1, 50.2], method=[53, 53.1, 53.3])
        (verdict,) = verdicts(column, "quick", ledger, columns)
        assert (verdict.verdict, verdict.primary) == ("direction holds", True)
        assert verdicts(column, "standard", ledger, columns) == []

    def test_no_file_no_claims(self, column, columns):
        assert load_claims(column, columns) == ()

    def test_delta_may_differ_between_profiles(self, load):
        (found,) = load(CLAIM.replace("delta = 1", "delta.quick = 2"))
        assert found.delta_of("quick") == 2

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (
                VALUE.replace("delta", "printed = 51.2\ndelta").replace("read in the paper", "unverified"),
                "cannot be a target",
            ),
            (VALUE, "needs the number `printed`"),
            (CLAIM.replace("delta = 1", ""), "delta: expected a number above 0"),
            (CLAIM.replace("delta = 1", "delta = 0"), "delta: expected a number above 0"),
            (CLAIM.replace("delta = 1", "delta.standard = 1"), "no delta for 'quick'"),
            (CLAIM.replace("delta = 1", "delta = nan"), "finite"),
            (CLAIM + "printed = [1.0, 2.0, 3.0]", "3 printed numbers for 2 keys"),
            (CLAIM.replace('"greater"', '"bigger"'), "kind"),
            (CLAIM.replace('"greater"', '"contrast"'), "2 keys for 'quick', expected 4"),
            (CLAIM.replace("read in the paper", "heard"), "known"),
            (CLAIM.replace('source = "table 1"\n', ""), "source"),
            (CLAIM.replace("primary", "important"), "important"),
            (CLAIM.replace("keys.quick", "keys.standard"), "does not belong to"),
            (CLAIM.replace("COLUMN/quick/synthetic/map/method", "method"), "column/profile/data/metric/arm"),
            (CLAIM.replace("method-over-student", "Method over student"), "id"),
            (CLAIM.replace('"greater"', '"identity"') + 'check = "a.b:c"\n', "either `check` or `keys`"),
            (CLAIM + 'check = "a.b:c"\n', "needs `keys` and no `check`"),
            (CLAIM + CLAIM, "'method-over-student' stands twice"),
            ("".join(CLAIM.replace("-over", f"-{i}") for i in range(4)), "4 primary claims, at most 3"),
            ("[[claims]]\n", "unknown table 'claims'"),
            ("[[claim]\n", "claims.toml"),
        ],
    )
    def test_what_breaks_the_rules_is_refused(self, load, text, message):
        with pytest.raises(ClaimError, match=message):
            load(text)
