"Rewards: values by hand, ranges and order as properties, failures, missing facts, shaping on proof, normalisations"
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, strategies as st
from leverplus.core import pad_rows
from leverplus.losses import advantage
from leverplus.rewards import (
    REWARDS, Correlation, answer_cosines, group_stats, info_score, live_parts, parts_of, plot_rewards,
    rank_normalise, reward, reward_facts, reward_mode, reweigh, semantic, spearman, z_score, z_score_clamp,
)
from leverplus.vqa import answer_targets

def rows(
    acc=(1, 0.6, 0, np.nan),
    gt=(0.8, 0.3, 0.1, np.nan),
    rel=(1, 1, 0.4, np.nan),
    logp=(-1, -2, -3, -4),
    info=(0.05, 0.2, -0.3, np.nan),
):
    acc = np.array(acc, float)
    return pd.DataFrame(
        dict(
            question_id=[7, 7, 7, 8],
            vqa_acc_score=acc,
            vqa_correct=np.where(np.isnan(acc), np.nan, acc > 0),
            vqa_gt_prob=gt,
            vqa_rel_score=rel,
            logprob_score=logp,
            info_score=info,
            eval_failed=[False] * 3 + [True],
        )
    )

@pytest.mark.parametrize(
    "mode, weights, want",
    [
        ("hard_plus_soft", {}, [2, 1.6, 0]),
        ("hard_plus_soft", dict(hard_weight=2, soft_weight=0.5), [2.5, 2.3, 0]),
        ("hard_only", {}, [1, 1, 0]),
        ("hard_only", dict(hard_weight=3.0), [3, 3, 0]),
        ("soft_only", {}, [1, 0.6, 0]),
        ("gtprob", {}, [0.8, 0.3, 0.1]),
        ("gtprob", dict(soft_weight=0.5), [0.4, 0.15, 0.05]),
        ("expected_acc", {}, [0.8, 0.3, 0.1]),
        ("hard_plus_soft_v2", {}, [3, 2.6, 0]),
        ("hard_plus_soft_v2", dict(hard_weight=0.5, soft_weight=2.0), [3, 2.2, 0]),
        ("separated", {}, [3, 2.6, 0]),
        ("hard01_plus_gtprob", {}, [2.8, 2.3, 0.1]),
        ("hard01_plus_gtprob", dict(hard_weight=1.0), [1.8, 1.3, 0.1]),
        ("hard01_plus_gtprob_separated", {}, [2.8, 2.3, 0.1]),
        ("hard_plus_gtprob_plus_rel", {}, [1.4, 1.15, 0.05 + 0.12]),
        ("hard_plus_gtprob_plus_rel", dict(soft_weight=1.0, rel_weight=0.1), [1.8, 1.3, 0.1 + 0.04]),
        ("legacy", {}, [1, 1, 0]),
        ("legacy", dict(scale="pm1"), [1, 1, -1]),
        ("legacy", dict(alpha=0.5, beta=2.0), [1.5, 1, -1.5]),
        ("legacy", dict(alpha=1.0, beta=0.0), [-1, -2, -3]),
        ("hybrid", {}, [0.25 + 0.75, 0.5 + 0.65, 0]),
        ("hybrid", dict(alpha=0), [1.5, 1.3, 0]),
        ("hybrid", dict(alpha=1, info_scale=2.0), [0.1, 0.4, 0]),
    ],
)
def test_values_by_hand(mode, weights, want):
    r = reward(rows(), mode, **weights)
    np.testing.assert_allclose(r[:3], want, atol=1e-12)
    assert np.isnan(r[3])
    assert r.dtype == np.float64

def test_hard_plus_soft_is_the_default(): np.testing.assert_allclose(reward(rows())[:3], [2, 1.6, 0])

# mode -> (smallest and largest reward of a wrong answer, of a right one), default weights
BANDS = dict(
    hard_plus_soft=((0, 0), (1, 2)),
    gtprob=((0, 1), (0, 1)),
    hard_only=((0, 0), (1, 1)),
    soft_only=((0, 0), (0.3, 1)),
    hard_plus_soft_v2=((0, 0), (2, 3)),
    separated=((0, 0), (2, 3)),
    hard01_plus_gtprob=((0, 1), (2, 3)),
    hard01_plus_gtprob_separated=((0, 1), (2, 3)),
    hard_plus_gtprob_plus_rel=((0, 0.8), (1, 1.5)),
    legacy=((0, 0), (1, 1)),
    hybrid=((0, 0.5), (0.5, 1.25)),
    expected_acc=((0, 1), (0, 1)),
)
unit = st.floats(0, 1)
facts = st.lists(
    st.tuples(st.sampled_from([0, 0.3, 0.6, 0.9, 1.0]), unit, unit, st.floats(-1, 1), st.floats(-30, 0)),
    min_size=1,
    max_size=20,
)

def framed(facts):
    acc, p, rel, info, logp = np.array(facts, dtype=float).T
    return pd.DataFrame(
        dict(
            question_id=0,
            vqa_acc_score=acc,
            vqa_correct=(acc > 0) * 1.0,
            vqa_gt_prob=p,
            vqa_rel_score=rel,
            info_score=info,
            logprob_score=logp,
            eval_failed=False,
        )
    )

def test_every_mode_has_a_stated_range(): assert set(BANDS) == set(REWARDS)

@given(facts)
def test_ranges(facts):
    f = framed(facts)
    right = (f.vqa_correct > 0).to_numpy()
    for m, bands in BANDS.items():
        r = reward(f, m)
        assert np.isfinite(r).all()
        for which, (low, high) in zip((~right, right), bands):
            assert (r[which] >= low - 1e-9).all() and (r[which] <= high + 1e-9).all(), m

@given(facts, st.permutations([0, .3, .6, .9, 1.]))
def test_more_accuracy_never_earns_less(facts, accs):
    one = framed(facts[:1]*5).assign(vqa_acc_score=sorted(accs), vqa_correct=[0., 1, 1, 1, 1])
    for m in REWARDS: assert (np.diff(reward(one, m)) >= -1e-12).all(), m
    for m in ("soft_only", "hard_plus_soft", "hard_plus_soft_v2", "separated", "hybrid"):
        assert (np.diff(reward(one, m)) > 0).all(), m

@given(facts, unit, unit)
def test_more_probability_earns_more_where_it_counts(facts, p, q):
    f = framed(facts)
    low, high = (reward_all(f.assign(vqa_gt_prob=x)) for x in sorted((p, q)))
    for m in REWARDS:
        assert (high[m] >= low[m] - 1e-12).all(), m
        if "vqa_gt_prob" not in reward_facts(m)[0]: np.testing.assert_array_equal(high[m], low[m])

def reward_all(f): return {m: reward(f, m) for m in REWARDS}

@given(facts, unit, unit)
def test_names_of_one_function(facts, hw, sw):
    f = framed(facts)
    def same(a, b): return np.testing.assert_allclose(a, b, atol=1e-12)
    same(
        reward(f, "separated", hard_weight=hw, soft_weight=sw),
        reward(f, "hard_plus_soft_v2", hard_weight=hw, soft_weight=sw),
    )
    same(
        reward(f, "hard01_plus_gtprob_separated", hard_weight=hw, soft_weight=sw),
        reward(f, "hard01_plus_gtprob", hard_weight=2 * hw, soft_weight=sw),
    )
    same(
        reward(f, "hard_plus_gtprob_plus_rel", hard_weight=hw, soft_weight=sw, rel_weight=0),
        reward(f, "hard01_plus_gtprob", hard_weight=hw, soft_weight=sw),
    )
    same(reward(f, "hybrid", alpha=0), reward(f, "hard_plus_soft", soft_weight=.5))

@pytest.mark.parametrize("mode", REWARDS)
def test_failed_rows_are_never_a_number_even_with_facts(mode):
    r = reward(rows(acc=(1, 0.6, 0, 0), gt=(0.8, 0.3, 0.1, 0), rel=(1, 1, 1, 1), info=(0, 0, 0, 0)), mode)
    assert np.isnan(r[3])
    assert np.isfinite(r[:3]).all()

@pytest.mark.parametrize("mode, weights", [(m, {}) for m in REWARDS] + [("legacy", dict(alpha=.1))])
def test_missing_facts_are_errors(mode, weights):
    for c in reward_facts(mode, **weights)[0]:
        with pytest.raises(ValueError, match=f"needs column '{c}'"):
            reward(rows().drop(columns=c), mode, **weights)
        with pytest.raises(ValueError, match=f"'{c}' is missing for question_id 7"):
            reward(rows().assign(**{c: [1, np.nan, 1, np.nan]}), mode, **weights)

@pytest.mark.parametrize(
    "mode, column, says",
    [
        ("soft_only", "vqa_acc_score", "generate=True"),
        ("hard_plus_gtprob_plus_rel", "vqa_rel_score", "generate=True"),
        ("gtprob", "vqa_gt_prob", "Targets"),
        ("hybrid", "info_score", "info_score\\(frame, zero\\)"),
    ],
)
def test_the_error_says_where_the_fact_comes_from(mode, column, says):
    with pytest.raises(ValueError, match=says): reward(rows().drop(columns=column), mode)

def test_a_fact_of_weight_zero_is_not_asked_for():
    np.testing.assert_allclose(reward(rows().drop(columns="logprob_score"), "legacy")[:3], [1, 1, 0])
    np.testing.assert_allclose(
        reward(rows().drop(columns="info_score"), "hybrid", alpha=0)[:3], [1.5, 1.3, 0]
    )
    assert "logprob_score" in reward_facts("legacy", alpha=0.1)[0]
    assert "logprob_score" not in reward_facts("legacy")[0]

def test_unknown_mode_and_weight():
    with pytest.raises(ValueError, match="hard_plus_soft"): reward(rows(), "nothing")
    with pytest.raises(TypeError, match="soft_weight"): reward(rows(), "hard_only", soft_weight=1)
    with pytest.raises(ValueError, match="wanted '01' or 'pm1'"): reward(rows(), "legacy", scale="-1")
    with pytest.raises(ValueError, match="both 0"): reward(rows(), "legacy", beta=0.)

@given(facts, st.floats(0, 2), st.lists(st.integers(0, 4), min_size=5, max_size=5))
def test_a_price_takes_so_much_for_each_demonstration(facts, price, shots):
    f = framed(facts)
    f = f.assign(pointer=[tuple(range(shots[i % 5])) for i in range(len(f))])
    for m in REWARDS:
        want = reward(f, m) - price*f.pointer.map(len).to_numpy()
        np.testing.assert_allclose(reward(f, m, price=price), want)
    assert parts_of("hard_plus_soft", price=price) == parts_of("hard_plus_soft")

def test_a_price_is_asked_for_what_it_needs():
    shown = rows().assign(pointer=[(1, 2), (), (3,), (4,)])
    assert np.isnan(reward(shown, price=.1)[3])
    assert reward_facts("hard_only", price=0.) == reward_facts("hard_only")
    assert reward_facts("hard_only", price=.1)[0] == ("vqa_correct", "pointer")
    with pytest.raises(ValueError, match="needs column 'pointer'"): reward(rows(), price=.1)
    for price in (-.1, np.inf, np.nan):
        with pytest.raises(ValueError, match="price .*: wanted a number >= 0"): reward(shown, price=price)
    def priced(vqa_correct, price=1.): return vqa_correct
    with pytest.raises(ValueError, match="argument 'price'"): reward_mode(priced)

def test_a_price_makes_a_tie_a_lesson():
    tied = pd.DataFrame(dict(question_id=7, pointer=[(), (1,)], vqa_correct=1., vqa_acc_score=1.))
    assert live_parts(tied)["reward"] == 0
    assert live_parts(tied, price=.1) == dict(reward=1, vqa_correct=0, vqa_acc_score=0, cancelled=0)

def test_frame_is_left_alone():
    a = rows()
    b = a.copy()
    reward_all(a)
    pd.testing.assert_frame_equal(a, b)

def test_info_score():
    np.testing.assert_allclose(info_score(rows(), {7: 0.3, 8: 0.2})[:3], [0.5, 0, -0.2])
    assert np.isnan(info_score(rows(), {7: 0.3, 8: 0.2})[3])
    with pytest.raises(KeyError, match="question_id 8 has no zero-shot fact"): info_score(rows(), {7: .3})

# ---- weights of answers ------------------------------------------------------------------------------------

@given(
    st.lists(
        st.lists(st.sampled_from(["cat", "dog", "red bus", "2"]), min_size=10, max_size=10),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from(["official", "count3"]),
    st.sampled_from(["official", "count3"]),
    st.integers(0, 99),
)
def test_reweigh_is_the_sum_over_answers(answers, asked, weight, seed):
    g = np.random.default_rng(seed)
    ids = np.arange(10, 10 + len(answers))
    items = pd.DataFrame(dict(question_id=ids, answers=answers), index=ids)
    q = g.integers(0, len(answers), 6) + 10
    def texts(i): return answer_targets(items.at[i, "answers"], asked)[0]
    logs = [tuple(np.log(g.dirichlet(np.ones(len(texts(i)) + 1))[:-1])) for i in q]
    logs[0] = None
    def by_sum(i, logp):
        if logp is None: return np.nan
        worth = dict(zip(*answer_targets(items.at[i, "answers"], weight)))
        return sum(np.exp(x) * worth[t] for x, t in zip(logp, texts(i)))
    frame = pd.DataFrame(dict(question_id=q, vqa_gt_logprobs=logs))
    want = [by_sum(i, logp) for i, logp in zip(q, logs)]
    np.testing.assert_allclose(reweigh(frame, items, asked, weight), want)

def test_reweigh_refuses_other_items():
    with pytest.raises(ValueError, match="question_id 7: 2 log-probabilities for 1 answers"):
        reweigh(
            pd.DataFrame(dict(question_id=[7], vqa_gt_logprobs=[(-1.0, -2.0)])),
            pd.DataFrame(dict(question_id=[7], answers=[["cat"] * 10])),
            "official",
        )

# ---- correlation and shaping -------------------------------------------------------------------------------

@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=30))
def test_spearman_is_scipys(xy):
    from scipy.stats import spearmanr
    x, y = np.array(xy, float).T
    s = spearman(x, y)
    if len(set(x)) == 1 or len(set(y)) == 1: assert np.isnan(s.rho) and (s.low, s.high) == (-1, 1)
    else: assert s.rho == pytest.approx(spearmanr(x, y).statistic, abs=1e-9) and s.low <= s.rho <= s.high

def test_spearman_leaves_out_what_is_missing_and_counts_queries():
    s = spearman([1, 2, 3, np.nan, 5], [1, 2, np.nan, 4, 5], [7, 7, 7, 8, 9])
    assert (s.rows, s.queries, s.rho) == (3, 2, pytest.approx(1.0))
    x = np.arange(100.0)
    y = x + 40 * np.sin(x)
    wide = spearman(x, y, np.arange(100) // 10)
    narrow = spearman(x, y)
    assert wide.rho == narrow.rho
    assert wide.low < narrow.low
    assert wide.high > narrow.high
    assert wide.queries == 10

def test_answer_cosines():
    v = dict(a=(1.0, 0), b=(3, 4), c=(0, 2))
    seen = []
    def embed(texts):
        seen.extend(texts)
        return np.array([v[t] for t in texts])
    c = answer_cosines(["b", "a", None, "c"], [["a", "c"], ["a"], ["b"], ["a", "a"]], embed)
    np.testing.assert_allclose(c[[0, 1, 3]], [0.8, 1, 0])
    assert np.isnan(c[2])
    assert sorted(seen) == ["a", "b", "c"]

def test_shaping_acts_on_wrong_answers_only():
    c = [1.0, 0.5, 0.5, np.nan]
    good = Correlation(0.5, 0.3, 0.7, 100, 20)
    r = semantic(rows(), c, good)
    np.testing.assert_allclose(r[:3], [2.8, 2.3, 0.1 + 0.05])
    assert np.isnan(r[3])
    np.testing.assert_allclose(
        semantic(rows(), c, good, "hard_plus_soft", 0.2, hard_weight=3.0)[:3], [4, 3.6, 0.1]
    )

@pytest.mark.parametrize(
    "shown",
    [
        Correlation(-0.3, -0.5, -0.1, 100, 20),
        Correlation(0.3, -0.1, 0.6, 100, 20),
        Correlation(np.nan, -1.0, 1.0, 100, 20),
        Correlation(0.2, 0.0, 0.4, 100, 20),
    ],
)
def test_shaping_is_refused_without_proof(shown):
    with pytest.raises(ValueError, match="does not go along with accuracy"):
        semantic(rows(), [0, 0, 0, np.nan], shown)

def test_shaping_wants_a_measurement_and_cosines():
    with pytest.raises(TypeError, match="wanted the Correlation"): semantic(rows(), [0, 0, 0, 0], .9)
    good = Correlation(.5, .3, .7, 100, 20)
    with pytest.raises(ValueError, match="question_id 7"): semantic(rows(), [0, np.nan, 0, 0], good)
    with pytest.raises(ValueError, match="wanted -1..1"): semantic(rows(), [0, 0, 1.5, 0], good)

# ---- normalisations ----------------------------------------------------------------------------------------

groups = st.lists(
    st.lists(
        st.one_of(st.sampled_from([0.0, 0.3, 0.6, 1.0, 2.0]), st.floats(-2, 2).map(lambda x: round(x, 3))),
        min_size=1,
        max_size=6,
    ),
    min_size=1,
    max_size=5,
)

@given(groups, st.integers(0, 9))
def test_normalisations_are_the_advantages_of_the_objectives(gs, seed):
    r, mask = pad_rows([torch.tensor(g, dtype=torch.float64) for g in gs], 0.0)
    q = np.repeat(np.arange(len(gs)), [len(g) for g in gs])
    flat = np.concatenate(gs)
    order = np.random.default_rng(seed).permutation(len(q))
    def back(x): return np.asarray(x)[np.argsort(order)]
    np.testing.assert_allclose(
        back(z_score(flat[order], q[order])), advantage(r, mask, "zscore")[mask], atol=1e-9
    )
    np.testing.assert_allclose(
        back(z_score_clamp(flat[order], q[order], 1.0)),
        advantage(r, mask, "zscore", clip=1.0)[mask],
        atol=1e-9,
    )
    np.testing.assert_allclose(
        back(rank_normalise(flat[order], q[order])), advantage(r, mask, "rank", eps=0.0)[mask], atol=1e-9
    )

@given(groups, st.integers(0, 99))
def test_failed_rows_change_nothing_for_the_others(gs, seed):
    r = np.concatenate(gs)
    q = np.repeat(np.arange(len(gs)), [len(g) for g in gs])
    g = np.random.default_rng(seed)
    at = np.sort(g.integers(0, len(r) + 1, 3))
    r2 = np.insert(r, at, np.nan)
    q2 = np.insert(q, at, g.integers(0, len(gs) + 1, 3))
    for f in (z_score, z_score_clamp, rank_normalise):
        out = f(r2, q2)
        np.testing.assert_array_equal(np.isnan(out), np.isnan(r2))
        np.testing.assert_allclose(out[~np.isnan(r2)], f(r, q), atol=1e-9)

@given(groups)
def test_group_stats(gs):
    code = np.repeat(np.arange(len(gs)), [len(g) for g in gs])
    s = group_stats(np.append(np.concatenate(gs), np.nan), np.append(code, len(gs)), len(gs) + 1)
    want = [(len(g), np.mean(g), np.std(g, ddof=1) if len(g) > 1 else 0.0, min(g), max(g)) for g in gs] + [
        (0, *[np.nan] * 4)
    ]
    np.testing.assert_allclose(s.to_numpy(float), want, atol=1e-9)

def test_plot():
    assert len(plot_rewards()) == len(REWARDS)
    axs = plot_rewards(("hard_only", "gtprob"), cols=2)
    assert [ax.get_title() for ax in axs] == ["hard_only", "gtprob"]

# --- parts that cancel ---------------------------------------------------------------------------------------
CANCEL = pd.DataFrame(dict(
    question_id=[1, 1, 2, 2, 3, 3, 4, 4],
    vqa_correct=[1., 0., 1., 1., 0., 0., 1., np.nan],
    vqa_acc_score=[1., 0., .3, 1., 0., 0., .6, np.nan],
    vqa_gt_prob=[0., 1., .5, .5, .2, .2, .1, np.nan],
    eval_failed=[False]*7 + [True],
))

def test_parts_of_a_reward_are_those_that_it_depends_on():
    assert parts_of("hard_plus_soft") == ("vqa_correct", "vqa_acc_score")
    assert parts_of("hard_plus_soft", hard_weight=0.) == ("vqa_acc_score",)
    assert parts_of("gtprob") == ("vqa_gt_prob",)
    assert parts_of("gtprob", soft_weight=0.) == ()
    assert parts_of("legacy") == ("vqa_correct",)
    assert parts_of("hard_plus_gtprob_plus_rel", rel_weight=0.) == ("vqa_correct", "vqa_gt_prob")
    for mode in REWARDS: assert set(parts_of(mode)) <= set(reward_facts(mode)[0])

def test_what_cancels_is_counted_apart():
    assert live_parts(CANCEL, "hard_plus_soft") == dict(
        reward=.5, vqa_correct=.25, vqa_acc_score=.5, cancelled=0.)
    # credit 1 against probability 1: the group that differs most is flat
    assert live_parts(CANCEL, "hard01_plus_gtprob", hard_weight=1., soft_weight=1.) == dict(
        reward=0., vqa_correct=.25, vqa_gt_prob=.25, cancelled=.25)
    assert live_parts(CANCEL, "hard01_plus_gtprob") == dict(
        reward=.25, vqa_correct=.25, vqa_gt_prob=.25, cancelled=0.)
    assert live_parts(CANCEL.iloc[::-1], "hard_plus_soft") == live_parts(CANCEL, "hard_plus_soft")
