"The reports' numbers: what they add up to, and what our statistics say about them"
import math
from statistics import NormalDist
import numpy as np, pytest
from leverplus.core import rng
from leverplus.statistics import Bootstrap, holm, mde, paired_bootstrap
from leverplus.earlier_replays import (
    BY_SIZE, BY_SIZE_BEFORE, REPORTED_BASELINE, REPORTED_LOG, REPORTED_PLANS, SCORE_SD, best_of,
    homogeneous_p, least_changed, least_wins, logged_advantages, plot_prefixes, plot_replays,
    prefix_blocks, replay_plans, replay_verdicts, reported_difference, twins,
)

def test_the_tables_add_up():
    for name, (acc, _, gain) in REPORTED_PLANS.items():
        assert np.mean(acc) - np.mean(REPORTED_BASELINE) == pytest.approx(gain, abs=0.011), name
    p = np.array([0.4501, 0.1032, 0.4467])
    x = np.array([0, 0.6, 1])
    assert SCORE_SD == pytest.approx(math.sqrt((p * x * x).sum() - (p * x).sum() ** 2), abs=5e-5)
    assert max(abs(np.subtract(BY_SIZE[800], BY_SIZE_BEFORE[800]))) == pytest.approx(0.6)
    assert twins({k: v[0] for k, v in REPORTED_PLANS.items()}) == [["plan 5, epoch 50", "plan 5+8, epoch 50"]]

def test_no_reported_gain_is_shown_at_any_likely_share_of_changes():
    for f in (.10, .20, None): assert (replay_plans(f).verdict == "no difference shown").all()
    # where only 5 % of the scores changed, six intervals of one shot leave out 0, below what could be detected;
    # of 45 comparisons none is left after Holm
    few = replay_plans(.05)
    alone = few[few.verdict != "no difference shown"]
    assert len(alone) == 6 and set(alone.shots) == {1} and (alone.delta < alone.mde).all()
    p = [2*NormalDist().cdf(-1.96*abs(r.delta)/((r.hi - r.lo)/2)) for r in few.itertuples()]
    assert holm(p).min() > .05
    # the verdict is able to say something else
    bold = replay_plans(0.01)
    assert (bold.verdict == "better").any()
    assert (bold[bold.shots == "mean"].verdict == "no difference shown").all()
    t = replay_plans(0.10).set_index(["plan", "shots"]).loc["plan 5, epoch 2"]
    assert t.z[1] == pytest.approx(1.7, abs=0.05)
    assert t.z["mean"] == pytest.approx(0.40, abs=0.01)
    assert t.mde[1] == pytest.approx(2.66, abs=0.01)

def test_assumed_intervals_are_those_of_data_made_that_way():
    g = rng("replay data")
    n = 800
    f = 0.10
    d = np.zeros(n)
    k = round(n * f / 2)
    d[:k], d[k : 2 * k] = 0.72**0.5, -(0.72**0.5)
    est, least = reported_difference(0.0, n, f)
    got = paired_bootstrap(g.permutation(d), np.zeros(n), bootstrap=Bootstrap(2000))
    assert least == pytest.approx(mde(d, 0 * d), rel=0.01)
    assert (got.hi - got.lo) == pytest.approx(est.hi - est.lo, rel=0.06)
    assert 800*least_changed(.38) < 2
    assert least_wins() == 6

def test_selection_among_equals_explains_the_best():
    g = rng("best of")
    sim = g.normal(size=(4000, 9)).max(1).mean() * 100 * math.sqrt(0.72 * 0.1 / 800)
    assert best_of(9) == pytest.approx(sim, abs=0.05)
    assert best_of(9) > max(x[2] for x in REPORTED_PLANS.values())

def test_blocks_and_their_test():
    assert [round(a, 1) for a in prefix_blocks(BY_SIZE, [a[0] for a in BY_SIZE.values()]).acc] == [
        64.2,
        50.2,
        48.0,
        44.5,
    ]
    g = rng("blocks test")
    p = []
    for _ in range(300): # rows in random order: prefixes of one sample
        x = 100 * g.choice([0, 0.6, 1], 800, p=[0.4501, 0.1032, 0.4467])
        p.append(homogeneous_p(prefix_blocks(BY_SIZE, [x[:n].mean() for n in BY_SIZE])))
    assert np.mean(np.array(p) < 0.05) == pytest.approx(0.05, abs=0.04)
    assert np.mean(p) == pytest.approx(0.5, abs=0.06)
    assert all(
        homogeneous_p(prefix_blocks(BY_SIZE, [a[i] for a in BY_SIZE.values()])) < 0.02 for i in range(4)
    )

def test_four_live_groups_make_every_logged_digit():
    n = REPORTED_LOG["train_groups"]
    a = logged_advantages([[1, 0, 0]] * 4, n)
    b = logged_advantages([[1, 0, 0, 0, 0]] * 2 + [[1, 1, 0, 0, 0]] * 2, n)
    assert [f"{x:.4f}" for x in (a[1], b[1])] == ["0.0072", "0.0090"]
    assert (a[0], b[0]) == pytest.approx((4 / 640, 4 / 640))
    assert abs(b[0] - REPORTED_LOG["adv_std"][1]) < 6e-5

def test_verdicts_and_figures():
    assert replay_verdicts().verdict[:2].tolist() == ["no difference shown"]*2
    assert len(plot_replays().get_yticks()) == 9
    assert plot_prefixes().get_xlabel()
