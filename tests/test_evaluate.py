"Statistics and baselines: against brute force, a plain loop, and planted effects"
import math
from itertools import permutations
from statistics import NormalDist
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from leverplus.core import rng
from leverplus.embed import EmbedStore
from leverplus.evaluate import (
    TABLE, agreement, behaviour, best_fixed, changed, check_facts, compare_runs, compare_seeds,
    count_look, seeds_table, expected_best, failures, fixed_pairs, gap_closed, gap_table, load_subsets,
    majority_vote, mode_table, oracle_note, over_shots, paired_table, paired_tests, pick_baselines,
    pick_oracle, plot_results, result_table, save_subsets, score_picks, seed_matrix, shots_table,
    size_table, subsets, table_text, type_table, unasked, _gaps_closed,
)
from leverplus.core import gini
from leverplus.infer import pick_model, pick_random, pick_similar, pick_zero, picks_frame
from leverplus.statistics import (
    NO_DIFFERENCE, Bootstrap, Interval, alike_columns, boot_means, bootstrap_mean, claim, detectable, differs, holm,
    mcnemar, mde, paired_bootstrap, paired_bootstraps, paired_p, plan_mde, plan_power, seeds_bootstrap, tail, verdict,
)
from leverplus.pools import Pool
from leverplus.runs import Run
from leverplus.vqa import normalise, vqa_accuracy

def make_pool(n=12, K=4, seed=0):
    g = rng("test pool", seed)
    return Pool(
        {q: tuple(int(i) for i in 1000 + g.choice(40, K, replace=False)) for q in range(n)},
        {"sampler": "random", "K": K, "seed": seed},
    )

def make_store(n=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = [*range(n), *range(1000, 1040)]
    return EmbedStore(ids, torch.randn(len(ids), 5, generator=g), torch.randn(len(ids), 6, generator=g), {})

def make_facts(pool, shots=(0, 1, 2), seed=0):
    g = rng("test facts", seed)
    rows = [(q, p) for q in pool.ids for s in shots for p in permutations(pool[q], s)]
    acc = g.choice([0, 0.3, 0.6, 1], len(rows))
    ans = g.choice(list("abc"), len(rows))
    return pd.DataFrame(
        dict(
            question_id=[q for q, _ in rows], pointer=[p for _, p in rows], vqa_acc_score=acc,
            vqa_gt_prob=g.random(len(rows)).round(1), vqa_pred_answer=ans
        )
    )

Z = NormalDist()
POOL = make_pool()
STORE = make_store()
DATA = make_facts(POOL)

# ---- picks -------------------------------------------------------------------------------------------------

def test_random_is_uniform_seeded_and_stable_under_subsets():
    a = pick_random(POOL, 2, draws=3)
    assert a.equals(pick_random(POOL, 2, draws=3)) and not a.equals(pick_random(POOL, 2, draws=3, seed=1))
    part = pick_random(Pool({q: POOL[q] for q in (3, 5)}, POOL.recipe), 2, draws=3)
    whole = a.set_index(["draw", "question_id"]).pointer
    assert all(whole[d, q] == p for d, q, p in zip(part.draw, part.question_id, part.pointer))
    assert all(set(p) <= set(POOL[q]) and len(set(p)) == 2 for q, p in zip(a.question_id, a.pointer))
    one = Pool({0: (1, 2, 3)}, {})
    n = pick_random(one, 2, draws=600).pointer.value_counts()
    assert len(n) == 6 and n.between(60, 140).all()

@pytest.mark.parametrize("kind", ["image", "text", "mixed"])
def test_similar_is_brute_force_and_blind_to_the_pool_order(kind):
    got = pick_similar(POOL, STORE, 3, kind).set_index("question_id").pointer
    for q, c in POOL.ids.items():
        cos = {i: round(float(STORE.get([i], kind)[0] @ STORE.get([q], kind)[0]), 6) for i in c}
        assert got[q] == tuple(sorted(c, key=lambda i: (-cos[i], i))[:3][::-1])
    turned = Pool({q: c[::-1] for q, c in POOL.ids.items()}, POOL.recipe)
    assert pick_similar(turned, STORE, 3, kind).set_index("question_id").pointer.equals(got)

class LastK(torch.nn.Module):
    "Picks the last real candidates, and remembers in which mode it was asked"
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(1))
        self.modes = []
    def encode(self, query, cands, cand_mask):
        self.modes.append(self.training)
        self.d = query.shape[-1], cands.shape[-1]
        return cand_mask.sum(1)
    def greedy(self, enc, S): return enc[:, None] - 1 - torch.arange(S)

@pytest.mark.parametrize("bs", [1, 5, 256])
def test_model_picks_on_ragged_pools_in_eval_mode(bs):
    ragged = Pool({q: c[: 2 + q % 3] for q, c in POOL.ids.items()}, {})
    m = LastK().train()
    got = pick_model(m, ragged, STORE, 2, "text", name="last", draw=7, bs=bs)
    assert [p == ragged[q][::-1][:2] for q, p in zip(got.question_id, got.pointer)] == [True]*12
    assert m.training and not any(m.modes) and m.d == (6, 6) and set(got.draw) == {7}

def test_the_untrained_selector_picks_what_similarity_picks():
    from leverplus.selector import PointerSelector
    m = PointerSelector(STORE.dim("mixed"), d_hidden=8)
    got = pick_model(m, POOL, STORE, 2, bs=5)
    near = pick_similar(POOL, STORE, 2)
    assert [set(p) for p in got.pointer] == [set(p) for p in near.pointer]
    assert list(got.question_id) == list(near.question_id)

def test_bad_picks_are_named():
    with pytest.raises(ValueError, match="question 5"): picks_frame("x", {4: (1, 2), 5: (1, 1)}, 2)
    with pytest.raises(ValueError, match="pool of 4"): pick_random(POOL, 5)
    assert pick_zero(POOL).pointer.map(len).max() == 0

@given(st.integers(0, 10_000), st.sampled_from(["vqa_acc_score", "vqa_gt_prob"]), st.sampled_from([1, 2]))
@settings(max_examples=25, deadline=None)
def test_oracle_is_brute_force(seed, by, S):
    f = make_facts(POOL, seed=seed).sample(frac=1, random_state=seed)
    other = {"vqa_acc_score": "vqa_gt_prob", "vqa_gt_prob": "vqa_acc_score"}[by]
    got = pick_oracle(f, S, POOL, by)
    for q, p, exact in zip(got.question_id, got.pointer, got.exact):
        rows = f[(f.question_id == q) & (f.pointer.map(len) == S)].to_dict("records")
        assert p == min(rows, key=lambda r: (-r[by], -r[other], r["pointer"]))["pointer"] and exact
    drop = f[(f.question_id == 3) & (f.pointer.map(len) == S)].index[0]
    few = pick_oracle(f.drop(index=drop), S, POOL, by).set_index("question_id").exact
    assert not few[3] and few.drop(3).all() and not pick_oracle(f, S).exact.any()

def test_oracle_stays_in_the_pool_and_skips_failures():
    alien = pd.DataFrame(
        [dict(question_id=0, pointer=(1, 2), vqa_acc_score=1.0, vqa_gt_prob=2.0, vqa_pred_answer="a")]
    )
    assert pick_oracle(pd.concat([DATA, alien]), 2, POOL).equals(pick_oracle(DATA, 2, POOL))
    best = pick_oracle(DATA, 2, POOL).pointer[0]
    f = DATA.assign(eval_failed=(DATA.question_id == 0) & (DATA.pointer == best))
    got = pick_oracle(f, 2, POOL).iloc[0]
    assert got.pointer != best and not got.exact
    with pytest.raises(ValueError, match=r"1 queries.*\[4\]"):
        pick_oracle(DATA[DATA.question_id != 4], 2, POOL)

# ---- scoring -----------------------------------------------------------------------------------------------

PICKS = pd.concat(
    [pick_zero(POOL), pick_random(POOL, 2), pick_similar(POOL, STORE, 2), pick_oracle(DATA, 2, POOL)]
)

def test_missing_facts_are_counted_and_named():
    gone = DATA[DATA.question_id != 5]
    todo = unasked(PICKS, gone)
    assert set(todo.question_id) == {5} and not todo.duplicated().any() and len(unasked(PICKS, DATA)) == 0
    with pytest.raises(LookupError, match=r"8 of 96 picks have no fact, first: zero_shot, question 5"):
        score_picks(PICKS, gone)
    # what parquet gives back
    as_stored = DATA.assign(pointer=[np.array(p, dtype=np.int64) for p in DATA.pointer])
    assert score_picks(PICKS, as_stored).equals(score_picks(PICKS, DATA))

def test_failures_are_excluded_and_counted():
    f = DATA.assign(eval_failed=(DATA.question_id == 2) & (DATA.pointer.map(len) == 0))
    f.loc[f.eval_failed, "vqa_acc_score"] = 0.0
    s = score_picks(PICKS, f)
    n = failures(s).set_index("selector")
    assert n.failed["zero_shot"] == 1
    assert n.failed.sum() == 1
    assert n.of["random"] == 60
    assert s.vqa_acc_score.isna().sum() == 1
    t = result_table(s, bootstrap=Bootstrap(200))
    row = t.set_index("selector").loc["zero_shot"]
    good = f[(f.pointer.map(len) == 0) & ~f.eval_failed]
    assert row.n == 11 and row.acc == pytest.approx(good.vqa_acc_score.mean()) and t.attrs["failed"] == 1

def test_contradictions_and_mixtures_are_refused():
    with pytest.raises(ValueError, match="contradict"):
        check_facts(pd.concat([DATA, DATA.head(1).assign(vqa_gt_prob=9.0)]))
    with pytest.raises(ValueError, match="2 scorers"):
        check_facts(DATA.assign(scorer=["a", "b"] * (len(DATA) // 2)))
    with pytest.raises(ValueError, match="lack a number on 1 of"):
        check_facts(DATA.assign(vqa_acc_score=DATA.vqa_acc_score.where(DATA.index > 0)))
    with pytest.raises(ValueError, match="vqa_gt_prob"): check_facts(DATA.drop(columns="vqa_gt_prob"))
    with pytest.raises(ValueError, match="picks twice"): score_picks(pd.concat([PICKS, PICKS.head(1)]), DATA)
    assert len(check_facts(pd.concat([DATA, DATA]))) == len(DATA)

# ---- bootstrap ---------------------------------------------------------------------------------------------

def loop_means(x, cluster, n_boot, seed):
    "The same resamples, one query at a time"
    groups = pd.Series(range(len(x))).groupby(pd.factorize(np.asarray(cluster))[0]).apply(list).tolist()
    g = rng("bootstrap", seed)
    draws = g.integers(len(groups), size=(n_boot, len(groups)))
    out = []
    for d in draws:
        v = [x[i] for c in d for i in groups[c] if not np.isnan(x[i])]
        out.append(sum(v)/len(v))
    return np.array(out)

@given(st.integers(0, 10_000), st.integers(12, 40), st.booleans(), st.booleans())
@settings(max_examples=25, deadline=None)
def test_bootstrap_is_a_plain_loop(seed, n, clustered, holes):
    g = np.random.default_rng(seed)
    x = g.random((n, 3))
    cluster = g.integers(8, size=n) if clustered else np.arange(n)
    if holes: x[:2, 1] = np.nan
    got = boot_means(x, cluster if clustered else None, bootstrap=Bootstrap(20, seed=seed))
    for k in range(3): assert np.allclose(got[:, k], loop_means(x[:, k], cluster, 20, seed))

def test_blocks_cover_all_resamples():
    x = rng("blocks").random(7000) # 2e6/7000 = 285 resamples a block
    m = boot_means(x, bootstrap=Bootstrap(1000))[:, 0]
    assert len(m) == 1000 and len(set(m)) == 1000 and m.std() == pytest.approx(x.std()/7000**.5, rel=.15)

def test_interval_has_the_textbook_width_and_is_reproducible():
    x = rng("width").choice([0, 0.6, 1], 5046, p=[0.45, 0.10, 0.45])
    est = bootstrap_mean(x, bootstrap=Bootstrap(3000))
    assert est == bootstrap_mean(x, bootstrap=Bootstrap(3000))
    # +-1.3 points
    assert (est.hi - est.lo) / 2 == pytest.approx(1.96 * x.std() / 5046**0.5, rel=0.06)
    delta, lo, hi = paired_bootstrap(x, x[::-1], bootstrap=Bootstrap(500))
    assert lo <= delta <= hi and paired_bootstrap(x, x, bootstrap=Bootstrap(100)) == Interval(0, 0, 0)

def test_a_level_goes_through_everything():
    "A wider coverage gives wider intervals, a larger detectable effect and a stricter family, in every table"
    s = score_picks(PICKS, DATA)
    usual, strict = Bootstrap(300), Bootstrap(300, level=.999)
    x = np.random.default_rng(0).random(60)
    assert np.diff(bootstrap_mean(x, bootstrap=strict)[1:]) > np.diff(bootstrap_mean(x, bootstrap=usual)[1:])
    tables = [(result_table, {}), (paired_table, {}), (paired_tests, dict(pairs=[("oracle", "random")]))]
    for make, kw in tables:
        a, b = (make(s, ITEMS, bootstrap=boot, **kw) for boot in (usual, strict))
        assert ((b.hi - b.lo) >= (a.hi - a.lo)).all() and (b.hi - b.lo).sum() > (a.hi - a.lo).sum()
        if "mde" in a: assert (b.mde >= a.mde).all() and b.mde.sum() > a.mde.sum()
    assert "99.9 %" in plot_results(result_table(s, bootstrap=strict)).get_xlabel()
    est = Interval(.1, 0., .2)
    assert detectable(est, level=.99) < detectable(est) # the same width says less where it had to hold more
    s, items = two_names(.13, np.random.default_rng(1))
    one = paired_tests(s, items, [("new", "old")], bootstrap=usual).iloc[0]
    assert one.verdict == "better" and 1e-12 < one.p_holm < .05
    stricter = Bootstrap(300, level=1 - one.p_holm/2)
    assert paired_tests(s, items, [("new", "old")], bootstrap=stricter).verdict[0] == "no difference shown"

def test_settings_of_a_bootstrap_are_checked():
    with pytest.raises(ValueError, match="n -1: wanted a whole number >= 0"): Bootstrap(-1)
    for level in (0, 1, 95):
        with pytest.raises(ValueError, match="between 0 and 1"): Bootstrap(level=level)

def test_clustering_matters():
    g = rng("cluster")
    x = np.repeat(g.random(100), 9)
    image = np.repeat(np.arange(100), 9)
    zero = np.zeros(900)
    wide, narrow = (np.diff(paired_bootstrap(x, zero, c, Bootstrap(2000))[1:])[0] for c in (image, None))
    assert wide / narrow == pytest.approx(3, rel=0.15)
    assert mde(x, zero, image) / mde(x, zero) == pytest.approx(3, rel=0.02)
    assert mde(x, zero, np.arange(900)) == pytest.approx(mde(x, zero))

@pytest.mark.parametrize(
    "n,f,points",
    [
        (800, 0.02, 1.19), (800, 0.05, 1.88), (800, 0.10, 2.66), (800, 0.20, 3.76), (5000, 0.05, 0.75),
        (5000, 0.10, 1.06)
    ],
)
def test_mde_matches_the_planning_table(n, f, points):
    d = np.zeros(n)
    k = round(n * f / 2)
    d[:k], d[k : 2 * k] = 0.72**0.5, -(0.72**0.5)
    assert 100*mde(d, 0*d) == pytest.approx(points, abs=.01)

def test_mde_is_the_effect_found_four_times_in_five():
    g = rng("power")
    n = 400
    reps = 600
    base = g.normal(size=(n, reps))
    a = base + g.normal(size=(n, reps))
    least = np.mean([mde(a[:, i], base[:, i]) for i in range(50)])
    a += least
    found = [(lambda d: d.mean() > 1.96*d.std(ddof=1)/n**.5)(a[:, i] - base[:, i]) for i in range(reps)]
    assert np.mean(found) == pytest.approx(.8, abs=.05)

def two_names(effect, g, n=500):
    "Two evaluations, answers drawn independently: the second is `effect` better; two queries an image are alike"
    # chance of a right answer
    easy = np.repeat(g.beta(0.35, 0.35, n // 2), 2)
    p = [np.clip(easy + shift, 0, 1) for shift in (0, effect)]
    rows = [
        pd.DataFrame(
            dict(
                selector=s, shots=2, draw=0, question_id=range(n), pointer=[(1, 2)] * n,
                vqa_acc_score=np.where(g.random(n) < q, g.choice([0.6, 1], n, p=[0.2, 0.8]), 0.0),
                vqa_gt_prob=0.5, vqa_pred_answer=g.choice(list("ab"), n), eval_failed=False
            )
        )
        for s, q in zip(("old", "new"), p)
    ]
    return pd.concat(rows, ignore_index=True), pd.DataFrame(dict(question_id=range(n), image_id=np.arange(n)//2))

def test_planted_effects_are_judged_right():
    g = rng("planted")
    said = []
    for i in range(200): # the same policy under two names
        s, items = two_names(0.0, g)
        t = paired_table(s, items, ["old"], bootstrap=Bootstrap(200, seed=i)).iloc[0]
        said.append((t.verdict == "no difference shown", t.lo <= 0 <= t.hi, t.mde))
    quiet, covered, least = np.mean(said, axis=0)
    assert quiet >= 0.94 and covered >= 0.90
    # +10 points
    true = np.mean(
        [
            (lambda x: x[1] - x[0])(
                two_names(0.13, g)[0].groupby("selector", sort=False).vqa_acc_score.mean().to_numpy()
            )
            for _ in range(40)
        ]
    )
    assert true == pytest.approx(0.10, abs=0.01)
    # it has to reach `mde`
    few = Bootstrap(200)
    pairs = [("new", "old")]
    found = [paired_tests(*two_names(0.13, g), pairs, bootstrap=few).iloc[0] for _ in range(40)]
    power = Z.cdf((true - least) / (least / 2.8016))
    assert power > 0.9
    assert np.mean([f.verdict == "better" for f in found]) >= power - 0.1
    assert not any(f.verdict == "worse" for f in found)

def test_a_verdict_says_what_its_interval_says():
    "Below the detectable effect too: then with a warning; a handful of clusters claims nothing"
    assert differs(Interval(0.1, 0.01, 0.2), 0.1) and differs(Interval(0.1, 0.01, 0.2), 0.11)
    assert not differs(Interval(0.1, -0.01, 0.2), 0.05)
    assert not differs(Interval(0.1, 0., 0.2), 0.05) and not differs(Interval(.1, math.nan, math.nan), .01)
    assert claim(Interval(1., 1., 1.), math.inf) == NO_DIFFERENCE
    said = verdict(Interval(-.044, -.080, -.012), .049, "random", "similar")
    assert said == (
        "random - similar: -4.4 points, worse [-8.0, -1.2], detectable 4.9 (small study: differences under 4.9"
        " are found less than 80 % of the time)"
    )
    assert verdict(Interval(.06, .012, .08), .049).endswith("better [+1.2, +8.0], detectable 4.9")
    assert "no difference shown [-1.2, +8.0]" in verdict(Interval(.03, -.012, .08), .049)
    assert verdict(Interval(1., 1., 1.), math.inf).endswith("(too few questions to show anything)")

    x = rng("detect").normal(size=2000)
    z = 0 * x
    assert detectable(paired_bootstrap(x, z)) == pytest.approx(mde(x, z), rel=.06)

@pytest.mark.parametrize("clusters", [12, 30, 130])
@pytest.mark.parametrize("each", [1, 3])
def test_intervals_cover_the_truth(clusters, each):
    "Soft scores of few and of many clusters, with a true difference: 95 % of the intervals hold it, 1,500 studies"
    g = rng("coverage", clusters, each)
    cluster = np.repeat(np.arange(clusters), each)
    covered, loose = [], []
    for _ in range(1500):
        b = g.beta(.5, .5, len(cluster))
        a = b + .05 + .3*(g.beta(2, 2, clusters)[cluster] - .5) + .2*(g.beta(1, 1, len(cluster)) - .5)
        est = paired_bootstrap(a, b, cluster, Bootstrap(400))
        covered.append(est.lo <= .05 <= est.hi)
        below = np.quantile(boot_means(a - b, cluster, Bootstrap(400)), [.025, .975])
        loose.append(below[0] <= .05 <= below[1])
    assert .93 <= np.mean(covered) <= .985
    assert np.mean(covered) >= np.mean(loose)
    if clusters == 12: assert np.mean(loose) < .93   # what plain percentiles would give

def test_few_clusters_widen_an_interval():
    "As Student's t does, in every interval over questions; of a single cluster nothing is known but its resamples"
    from scipy.stats import t as student
    for n in (6, 20, 200):
        reach = -Z.inv_cdf(tail(.95, n))
        assert reach == pytest.approx(student.ppf(.975, n - 1)*(n/(n - 1))**.5)
    assert tail(.95) == pytest.approx(.025) and tail(.9, 10**6) == pytest.approx(.05, abs=1e-6)
    assert tail(.95, 1) == 0.
    g = rng("widen")
    x = g.random((10, 1))
    wide = seeds_bootstrap(x, 0*x)
    plain = np.quantile(boot_means(x[:, 0]), [.025, .975])
    assert wide.lo < plain[0] and wide.hi > plain[1]
    assert wide == paired_bootstrap(x[:, 0], 0*x[:, 0])

# ---- gap, table, seeds -------------------------------------------------------------------------------------

@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_gap_closed_runs_from_random_to_oracle(seed):
    g = np.random.default_rng(seed)
    r = g.random(40)
    o = r + g.random(40)
    for w in (0, .25, 1):
        assert gap_closed(r + w*(o - r), r, o, bootstrap=Bootstrap(50)) == pytest.approx((w, w, w))
    est = gap_closed(g.random(40), r, o, bootstrap=Bootstrap(300))
    assert est.lo <= est.value <= est.hi

def test_gap_is_a_ratio_of_means_and_knows_when_it_is_not_defined():
    # most queries have no gap of their own
    r = np.array([0., 0, 1, .5])
    o = np.array([1., 0, 1, .5])
    assert gap_closed([1., 0, .5, .5], r, o, bootstrap=Bootstrap(0)).value == pytest.approx(.5)
    # the gap rests on one query
    assert math.isnan(gap_closed(r, o, r).value)
    assert math.isnan(gap_closed(o, r, o, bootstrap=Bootstrap(200)).lo)
    assert gap_closed([1, np.nan, .5, .5], r, o, bootstrap=Bootstrap(0)).value == pytest.approx(.5)

def test_table_is_what_the_parts_say():
    items = pd.DataFrame(dict(question_id=range(12), image_id=np.arange(12) // 2))
    s = score_picks(PICKS, DATA)
    t = result_table(s, items, bootstrap=Bootstrap(500))
    assert list(t) == TABLE
    assert list(t.selector) == ["zero_shot", "random", "similar_mixed", "oracle"]
    assert t.attrs["failed"] == 0
    row = t.set_index("selector")
    rand = s[s.selector == "random"].groupby("question_id").vqa_acc_score.mean()
    assert row.acc["random"] == pytest.approx(rand.mean())
    assert row.gap_closed[["random", "oracle"]].tolist() == [0, 1]
    assert row.changed["similar_mixed"] == 0
    assert math.isnan(row.gap_closed["zero_shot"])
    assert math.isnan(row.changed["zero_shot"])
    assert row.shots.tolist() == [0, 2, 2, 2]
    est = bootstrap_mean(rand, items.image_id, Bootstrap(500))
    assert (row.lo["random"], row.hi["random"]) == pytest.approx(est[1:])
    assert ((t.lo <= t.acc) & (t.acc <= t.hi)).all()
    asked = result_table(s, items, bootstrap=Bootstrap(100), zero_at=2).set_index("selector")
    m = row.acc
    assert (
        asked.gap_closed["zero_shot"]
        == pytest.approx((m["zero_shot"] - m["random"]) / (m["oracle"] - m["random"]))
    )
    assert asked.changed["zero_shot"] > 0
    with pytest.raises(ValueError, match="similar_text"): result_table(s, changed_from="similar_text")
    without = result_table(s[s.selector != "oracle"], oracle=None, bootstrap=Bootstrap(50))
    assert without.gap_closed.isna().all()

def test_table_over_several_shots():
    picks = pd.concat([PICKS, pick_random(POOL, 1), pick_similar(POOL, STORE, 1), pick_oracle(DATA, 1, POOL)])
    t = result_table(score_picks(picks, DATA), bootstrap=Bootstrap(50))
    assert t.shots.tolist() == [0, 1, 1, 1, 2, 2, 2]
    assert t[t.selector == "oracle"].gap_closed.tolist() == [1, 1]

def test_changed_counts_answers_not_picks():
    def f(name, answers, draw=0):
        return pd.DataFrame(
            dict(
                selector=name, shots=2, draw=draw, question_id=range(4), pointer=[(1, 2)] * 4,
                vqa_acc_score=1.0, vqa_gt_prob=1.0, vqa_pred_answer=list(answers), eval_failed=False
            )
        )
    s = pd.concat([f("ref", "aaaa"), f("x", "aaab"), f("y", "aabb"), f("y", "aaaa", 1)])
    assert changed(s, "x", 2, "ref") == 0.25
    assert changed(s, "y", 2, "ref") == 0.25
    assert changed(s, "ref", 2, "ref") == 0
    s.loc[(s.selector == "x") & (s.question_id == 3), "eval_failed"] = True
    assert changed(s, "x", 2, "ref") == 0 and changed(s, "ref", 2, "x") == 0

def test_paired_table_says_the_verdict():
    t = paired_table(score_picks(PICKS, DATA), against=["random", "similar_mixed"], bootstrap=Bootstrap(500))
    assert len(t) == 4
    assert set(t.verdict) <= {"better", "worse", "no difference shown"}
    assert (t.selector != t.against).all()
    o = t[(t.selector == "oracle") & (t.against == "random")].iloc[0]
    s = score_picks(PICKS, DATA)
    d = (
        s[s.selector == "oracle"].set_index("question_id").vqa_acc_score
        - s[s.selector == "random"].groupby("question_id").vqa_acc_score.mean()
    )
    assert o.delta == pytest.approx(d.mean())
    assert o.mde == pytest.approx(mde(d, 0 * d))
    assert o.verdict == "better"

def seeded(name, effect, k, noise, g, n=400):
    "`k` training seeds whose true quality varies by `noise`"
    return pd.concat(
        [
            pd.DataFrame(
                dict(
                    selector=name, shots=2, draw=i, question_id=range(n), pointer=[(1, 2)] * n,
                    vqa_acc_score=0.5 + effect + e + 0.1 * g.normal(size=n), vqa_gt_prob=0.5,
                    vqa_pred_answer="a", eval_failed=False
                )
            )
            for i, e in enumerate(g.normal(0, noise, k))
        ]
    )

def test_seeds_widen_the_interval():
    g = rng("seeds test")
    s = pd.concat([seeded("a", 0.02, 5, 0.05, g), seeded("b", 0, 5, 0.05, g), seeded("fixed", 0, 1, 0, g)])
    both = compare_seeds(s, "a", "b", 2, bootstrap=Bootstrap(4000))
    mean = seed_matrix(s, "a", 2).mean(axis=1) - seed_matrix(s, "b", 2).mean(axis=1)
    only_queries = bootstrap_mean(mean, bootstrap=Bootstrap(4000))
    assert both.value == pytest.approx(only_queries.value)
    assert both.hi - both.lo > 4 * (only_queries.hi - only_queries.lo)
    sd = [seed_matrix(s, x, 2).mean().std(ddof=1)/5**.5 for x in "ab"] # what seeds alone contribute
    assert (both.hi - both.lo)/3.92 == pytest.approx(math.hypot(*sd), rel=.1)
    one = compare_seeds(s, "fixed", "fixed", 2, bootstrap=Bootstrap(200))
    assert one == Interval(0, 0, 0)

def test_paired_seeds_cancel_what_they_share():
    g = rng("paired seeds")
    a = seeded("a", 0, 6, 0.05, g)
    b = a.assign(selector="b", vqa_acc_score=a.vqa_acc_score - 0.03)
    s = pd.concat([a, b])
    est = compare_seeds(s, "a", "b", 2, paired=True, bootstrap=Bootstrap(500))
    loose = compare_seeds(s, "a", "b", 2, bootstrap=Bootstrap(500))
    assert est == pytest.approx((.03, .03, .03)) and loose.lo < 0 < loose.hi
    with pytest.raises(ValueError, match="paired=False"):
        compare_seeds(s[(s.selector == "a") | (s.draw < 3)], "a", "b", 2, paired=True)

@given(st.sets(st.integers(0, 10**9), min_size=10, max_size=60), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_subsets_are_nested_and_blind_to_order(ids, seed):
    a = subsets(list(ids), (2, 5, "all"), seed)
    b = subsets(sorted(ids, reverse=True), ("all", 5, 2), seed)
    assert set(a[2]) < set(a[5]) < set(a["all"]) == ids and a == b and len(a[5]) == 5
    with pytest.raises(ValueError, match="1000"): subsets(ids, (1000,))

def test_plot_takes_and_returns_axes():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    s = score_picks(PICKS, DATA)
    ax = plt.subplots()[1]
    assert plot_results(result_table(s, bootstrap=Bootstrap(50)), ax) is ax
    assert [t.get_text() for t in ax.get_yticklabels()] == ["zero_shot", "random", "similar_mixed", "oracle"]
    plt.close("all")

# ---- exact tests, families, planning -----------------------------------------------------------------------

@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 5))
@settings(max_examples=40)
def test_mcnemar_is_the_exact_binomial(up, down, same):
    from scipy.stats import binomtest
    if up + down + same == 0: return
    got = mcnemar([1.]*up + [0.]*down + [.6]*same, [.6]*up + [.6]*down + [.6]*same)
    assert got[:3] == (up, down, same)
    assert got.p == pytest.approx(binomtest(up, up + down).pvalue if up + down else 1.0, rel=1e-9)

@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=8), st.floats(.01, .3))
@settings(max_examples=60)
def test_holm_rejects_as_the_textbook_does(p, level):
    order = sorted(range(len(p)), key=lambda i: p[i])
    rejected = set()
    for k, i in enumerate(order):
        if p[i]*(len(p) - k) > level: break
        rejected.add(i)
    adj = holm(p)
    assert {i for i in range(len(p)) if adj[i] <= level} == rejected
    assert (adj >= np.array(p) - 1e-15).all()
    assert (adj <= 1).all()

def test_a_family_of_equals_is_left_alone_and_each_test_alone_is_not_enough():
    g = rng("family")
    any_alone = 0
    any_holm = 0
    for _ in range(150): # ten tests of nothing: alone they cry wolf
        p = [2 * Z.cdf(-abs(z)) for z in g.normal(size=10)]
        any_alone += min(p) < 0.05
        any_holm += holm(p).min() < 0.05
    assert any_alone/150 > .3 and any_holm/150 < .10
    x = g.choice([0, 0.6, 1], 400)
    y = g.choice([0, 0.6, 1], 400)
    d = x - y
    assert paired_p(x, y) == pytest.approx(2*Z.cdf(-abs(d.mean())/(d.std(ddof=1)/20))) and paired_p(x, x) == 1

@pytest.mark.parametrize(
    "n,f,points",
    [
        (800, 0.02, 1.19), (800, 0.05, 1.88), (800, 0.10, 2.66), (800, 0.20, 3.76), (5046, 0.05, 0.75),
        (5046, 0.10, 1.06)
    ],
)
def test_planning_matches_the_planning_table(n, f, points):
    assert 100 * plan_mde(n, f) == pytest.approx(points, abs=0.006)
    assert abs(plan_power(plan_mde(n, f), f) - n) <= 1
    assert plan_power(0.01, f, design=2.0) == pytest.approx(2 * plan_power(0.01, f), abs=1)
    assert plan_power(0.0038, 0.05) == pytest.approx(19_500, rel=0.01)
    assert plan_power(0.0038, 0.10) == pytest.approx(39_000, rel=0.01)
    with pytest.raises(ValueError, match="delta 0: wanted a number > 0"): plan_power(0, f)

# ---- rows and behaviour ------------------------------------------------------------------------------------

IDS = [*range(12), *range(1000, 1040)]
ITEMS = pd.DataFrame(
    dict(
        question_id=IDS, image_id=[i if i > 99 else i // 2 for i in IDS], answer=["abc"[i % 3] for i in IDS],
        answers=[["abc"[i % 3]] * 8 + ["The b", "b."] for i in IDS],
        question_type=[f"type {i % 2}" for i in IDS], answer_type="other"
    ),
    index=IDS,
)

def test_majority_vote_is_brute_force():
    picks = pd.concat([pick_similar(POOL, STORE, s) for s in (1, 2, 3, 4)])
    got = majority_vote(picks, ITEMS)
    for r in got.itertuples():
        said = [ITEMS.answer[d] for d in r.pointer]
        n = {a: said.count(a) for a in said}
        best = [a for a in said if n[a] == max(n.values())][-1]
        assert r.vqa_pred_answer == best
        assert r.vqa_acc_score == vqa_accuracy(best, ITEMS.answers[r.question_id])
    with pytest.raises(ValueError, match="no demonstration to vote"): majority_vote(pick_zero(POOL), ITEMS)
    one = score_picks(PICKS, DATA)
    t = result_table(pd.concat([one, got[got.shots == 2]]), metric="vqa_gt_prob", bootstrap=Bootstrap(50))
    assert "majority_vote" not in set(t.selector)

def test_the_best_fixed_sequence_is_brute_force():
    pairs = fixed_pairs(POOL, 2, 9)
    g = rng("fixed test")
    f = pairs.assign(vqa_acc_score=g.choice([0, 0.6, 1], len(pairs)), vqa_gt_prob=0.5, vqa_pred_answer="a")
    best, acc, n = best_fixed(f, 2)
    mean = f.groupby("pointer").vqa_acc_score.mean()
    assert acc == mean.max()
    assert mean[best] == acc
    assert n == 12
    assert pairs.groupby("pointer").size().eq(12).all()
    # not asked of everybody: not a candidate
    assert best_fixed(f[(f.pointer != best) | (f.question_id != 3)], 2)[0] != best
    with pytest.raises(ValueError, match="fixed_pairs"): best_fixed(DATA, 2)

def test_all_baselines_are_there_and_the_oracle_says_what_it_is():
    p = pick_baselines(POOL, STORE, (1, 2), fixed={2: (1000, 1001)}, items=ITEMS)
    n = p.groupby(["selector", "shots"]).draw.nunique()
    assert (
        set(p.selector)
        == {"zero_shot", "random", "similar_image", "similar_text", "similar_mixed", "similar_mixed_first", "mmr",
            "vote", "fixed"}
    )
    assert n["random", 1] == n["random", 2] == 5
    assert not p.duplicated(["selector", "shots", "draw", "question_id"]).any()
    part = DATA.drop(index=DATA[(DATA.question_id == 3) & (DATA.pointer.map(len) == 2)].index[0])
    s = score_picks(pd.concat([PICKS[PICKS.selector != "oracle"], pick_oracle(part, 2, POOL)]), part)
    assert "exact for 11 of 12" in table_text(result_table(s, bootstrap=Bootstrap(50)))
    assert "exact: every" in table_text(result_table(score_picks(PICKS, DATA), bootstrap=Bootstrap(50)))
    assert oracle_note(pick_zero(POOL)) == {}

def test_behaviour_and_agreement_are_brute_force():
    s = score_picks(PICKS, DATA)
    b = behaviour(s, ITEMS, POOL).set_index("selector")
    every = {d for c in POOL.ids.values() for d in c}
    for sel, g in s[s.shots == 2].groupby("selector"):
        used = [d for p in g.pointer for d in p]
        copy = [normalise(a) == normalise(ITEMS.answer[p[-1]]) for a, p in zip(g.vqa_pred_answer, g.pointer)]
        assert b.unique[sel] == len(set(used))
        assert b["copy"][sel] == pytest.approx(np.mean(copy))
        assert b.gini[sel] == pytest.approx(gini([used.count(d) for d in every]))
    a, o = (s[s.selector == x].set_index("question_id").pointer for x in ("similar_mixed", "oracle"))
    assert (
        agreement(s, "similar_mixed", "oracle", 2)
        == np.mean([a[q] == o[q] for q in POOL])
        <= agreement(s, "oracle", "similar_mixed", 2, order=False)
        == np.mean([set(a[q]) == set(o[q]) for q in POOL])
    )
    assert agreement(s, "oracle", "oracle", 2) == 1 and math.isnan(agreement(s, "oracle", "nobody", 2))

# ---- families, sizes, modes, looks, runs -------------------------------------------------------------------

def test_paired_tests_agree_with_their_parts():
    s = score_picks(PICKS, DATA)
    pairs = [("oracle", "random"), ("similar_mixed", "random"), ("oracle", "similar_mixed")]
    t = paired_tests(s, ITEMS, pairs, bootstrap=Bootstrap(300))
    alone = paired_table(s, ITEMS, bootstrap=Bootstrap(300))
    for r in t.itertuples():
        m = s[(s.shots == 2)].groupby(["question_id", "selector"]).vqa_acc_score.mean().unstack()
        up = (m[r.selector] - m[r.against]).round(9)
        assert (r.better, r.worse) == ((up > 0).sum(), (up < 0).sum())
        assert r.changed == pytest.approx(changed(s, r.selector, 2, r.against))
        assert r.p_holm >= r.p
        one = alone[(alone.selector == r.selector) & (alone.against == r.against)].iloc[0]
        assert (r.delta, r.lo, r.hi, r.mde) == pytest.approx((one.delta, one.lo, one.hi, one.mde))
        assert r.verdict == one.verdict or (r.verdict == "no difference shown" and r.p_holm > .05)
    with pytest.raises(ValueError, match="no rows of .*'sft'"): paired_tests(s, None, [("sft", "random")])

def test_the_mean_over_shots_is_per_query():
    picks = pd.concat([PICKS, pick_random(POOL, 1), pick_oracle(DATA, 1, POOL), pick_similar(POOL, STORE, 1)])
    s = score_picks(picks, DATA)
    t = paired_tests(over_shots(s), ITEMS, [("oracle", "random")], bootstrap=Bootstrap(50)).iloc[0]
    acc = s[s.shots > 0].groupby(["selector", "shots", "draw"]).vqa_acc_score.mean()
    assert t.shots == "mean"
    assert t.n == 12
    assert t.delta == pytest.approx(acc["oracle"].mean() - acc["random"].mean())
    wide = shots_table(result_table(s, bootstrap=Bootstrap(20)))
    assert wide.loc["oracle", "mean"] == pytest.approx(wide.loc["oracle", [1, 2]].mean())
    assert math.isnan(wide.loc["zero_shot", "mean"])
    with pytest.raises(ValueError, match=r"similar_mixed has no rows with \[1\]"):
        over_shots(s[(s.selector != "similar_mixed") | (s.shots == 2)])

def test_tables_by_gap_size_type_and_mode(tmp_path):
    s = score_picks(PICKS, DATA)
    sub = subsets(POOL, (4, 8, "all"))
    t = size_table(s, sub, 2, ITEMS)
    save_subsets(tmp_path / "s.json", sub)
    assert load_subsets(tmp_path / "s.json") == sub
    assert (
        t.loc["all", "oracle"]
        == pytest.approx(result_table(s, bootstrap=Bootstrap(20)).set_index("selector").acc["oracle"])
    )
    assert list(t.index) == [4, 8, "all"]
    with pytest.raises(ValueError, match="other subsets lie there"):
        save_subsets(tmp_path / "s.json", subsets(POOL, (4,), seed=1))
    with pytest.raises(ValueError, match="1 of its 12 queries were not scored"):
        size_table(s[s.question_id != 5], sub, 2)
    gap = gap_table(s, ITEMS, bootstrap=Bootstrap(100)).set_index("selector")
    assert gap.gap["similar_mixed"] == pytest.approx(
        result_table(s, bootstrap=Bootstrap(20)).set_index("selector").gap_closed["similar_mixed"]
    )
    by = type_table(s, ITEMS)
    odd = s[(s.selector == "oracle") & (s.question_id % 2 == 1)]
    assert by.loc[("oracle", 2), "type 1"] == pytest.approx(odd.vqa_acc_score.mean())
    assert by.loc[("queries", 0)].tolist() == [6, 6]
    m = (
        mode_table(s.assign(vqa_pred_answer="The b"), ITEMS)
        .set_index(["selector", "shots"])
        .loc[("oracle", 2)]
    )
    for mode in ("official", "lmms", "openflamingo"):
        assert m[mode] == pytest.approx(
            np.mean([vqa_accuracy("The b", ITEMS.answers[q], mode) for q in POOL])
        )
    with pytest.raises(ValueError, match="no column 'colour'"): type_table(s, ITEMS, "colour")

def test_looks_are_counted_once_each(tmp_path):
    s = score_picks(PICKS, DATA)
    n = [
        count_look(tmp_path, s),
        count_look(tmp_path, s.sample(frac=1, random_state=1)),
        count_look(tmp_path, s, "dev"),
        count_look(tmp_path, s.assign(vqa_acc_score=0.0)),
        count_look(tmp_path, s),
    ]
    assert n == [1, 1, 1, 2, 2]
    assert "looks at test: 2; the best of 2" in table_text(result_table(s, bootstrap=Bootstrap(20)), 2)
    assert "looks at test: not counted" in table_text(result_table(s, bootstrap=Bootstrap(20)))
    assert [expected_best(m) for m in (5, 20)] == pytest.approx([1.163, 1.867], abs=.001)

def test_runs_are_compared_only_if_they_are_alike(tmp_path):
    s = score_picks(PICKS, DATA)
    def made(name, sel, drop=(), **kw):
        run = Run.create(
            tmp_path / name, dict(split=kw.pop("split", "test")), 0,
            dict(dict(pool="p", scorer="s", selector=name), **kw)
        )
        f = s[s.selector.isin(sel) & ~s.question_id.isin(drop)].drop(columns="exact")
        run.save_frame(
            "predictions.parquet", f.assign(pointer=f.pointer.map(list), image_id=f.question_id // 2)
        )
        return run.path
    a = made("a", ["oracle"])
    b = made("b", ["random"])
    got = compare_runs(a, b, bootstrap=Bootstrap(300)).iloc[0]
    want = paired_tests(s, ITEMS, [("oracle", "random")], bootstrap=Bootstrap(300)).iloc[0]
    assert (got.delta, got.lo, got.hi, got.mde, got.better, got.changed) == pytest.approx(
        (want.delta, want.lo, want.hi, want.mde, want.better, want.changed)
    )
    assert (got.selector, got.against) == ("a: oracle", "b: random")
    assert compare_runs(a, a).iloc[0].verdict == "no difference shown"
    for name, kw, words in [
        ("c", dict(pool="q"), "pool: p and q"), ("d", dict(scorer="t"), "scorer: s and t"),
        ("e", dict(split="dev"), "split: test and dev"),
        ("f", dict(drop=[3, 4]), "queries: 12 questions and 10")
    ]:
        c = made(name, ["random"], **kw)
        key = words.split(":")[0]
        with pytest.raises(ValueError, match=words): compare_runs(a, c)
        compared = compare_runs(a, c, other=(key,), bootstrap=Bootstrap(50))
        assert compared.n.iloc[0] == (10 if key == "queries" else 12)
    both = made("both", ["random", "oracle"])
    with pytest.raises(ValueError, match="name one"): compare_runs(a, both)
    assert compare_runs(a, both, selector_b="oracle", bootstrap=Bootstrap(50)).iloc[0].agree == 1

def test_seeds_table_agrees_with_the_plain_numbers():
    g = np.random.default_rng(0)
    n = 120
    ids = np.arange(120)
    rows = lambda name, a, d: pd.DataFrame(
        dict(
            question_id=ids, selector=name, shots=2, draw=d, pointer=[(1, 2)] * n,
            vqa_acc_score=a.astype(float), vqa_gt_prob=0.5, vqa_pred_answer="x", eval_failed=False
        )
    )
    oracle = g.random(n) < 0.8
    low = g.random(n) < 0.2
    good = [np.where(g.random(n) < 0.6, oracle, low) for _ in range(4)]
    s = pd.concat(
        [
            rows("oracle", oracle, 0), rows("random", low, 0), rows("weak", low, 0),
            *(rows(m, a, d) for m in ("a", "twin") for d, a in enumerate(good))
        ],
        ignore_index=True,
    )
    t = seeds_table(s, 2, against=("random", "a"), bootstrap=Bootstrap(2000))
    gap = lambda v: (v.mean() - low.mean()) / (oracle.mean() - low.mean())
    assert t.gap["oracle"] == 1
    assert t.gap["random"] == 0 == t["over random"]["weak"]
    assert t.draws["a"] == 4
    assert list(t.index)[-1] == "oracle"
    assert t.gap["a"] == pytest.approx(np.mean([gap(a) for a in good]))
    assert t.sd["a"] == pytest.approx(np.std([gap(a) for a in good], ddof=1))
    assert t.lo["a"] < t.gap["a"] < t.hi["a"]
    assert t["over random"]["a"] == pytest.approx(t.gap["a"])
    assert t["random lo"]["a"] > 0
    assert t["over a"]["twin"] == t["a lo"]["twin"] == t["a hi"]["twin"] == 0
    with pytest.raises(ValueError, match="no rows of .'sft'."): seeds_table(s, 2, against=["sft"])
    with pytest.raises(ValueError, match="no gap to close"): seeds_table(s, 2, oracle="random")

# ---- what is no gap, no picture, and no evidence --------------------------------------------------------
def test_no_gap_has_no_share_however_it_is_rounded():
    "The same scores in another order have the same mean; their sums differ in the last place"
    low, high = np.array([.1, .2, .3]), np.array([.3, .2, .1])
    assert high.mean() != low.mean() or low.mean() != np.mean([.2, .3, .1])
    for a, b in ((low, high), (high, low), (np.array([.2, .3, .1]), low)):
        assert np.isnan(gap_closed([1., 0., 1.], a, b)).all()
        assert np.isnan(gap_closed([1., 0., 1.], a, b, bootstrap=Bootstrap(0))).all()

def seeds_with_gap(gap, n=60, seed=0):
    "Scores of a policy with three seeds, random, and an oracle that is better by `gap` on average, but not always"
    g = rng("uncertain gap", seed)
    r = g.choice([0., .3, .6, 1.], n)
    more = g.normal(0, .3, n)
    o = r + gap + more - more.mean()
    rows = [("random", 0, r), ("oracle", 0, o)] + [("mine", s, g.choice([0., .6, 1.], n)) for s in range(3)]
    parts = [
        pd.DataFrame(dict(
            question_id=range(n), selector=name, shots=1, draw=draw, pointer=[(1000,)]*n, vqa_acc_score=x,
            eval_failed=False))
        for name, draw, x in rows
    ]
    return pd.concat(parts, ignore_index=True)

def test_a_gap_that_may_be_none_has_no_interval_over_seeds():
    "Resamples without a gap would turn the share around or blow it up"
    t = seeds_table(seeds_with_gap(.02), 1, bootstrap=Bootstrap(500))
    assert np.isfinite(t.gap["mine"]) and t[["lo", "hi"]].isna().all(axis=None)
    sure = seeds_table(seeds_with_gap(.3), 1, bootstrap=Bootstrap(500))
    assert sure.lo["mine"] < sure.gap["mine"] < sure.hi["mine"]

def test_a_missing_cluster_is_like_no_other():
    x = np.array([1., 0, 1, 0, 1, 1])
    missing = np.array([7, 7, None, None, np.nan, None], dtype=object)
    alone = [7, 7, 1, 2, 3, 4]
    assert bootstrap_mean(x, missing) == bootstrap_mean(x, alone)
    assert mde(x, 0*x, missing) == mde(x, 0*x, alone) and paired_p(x, 0*x, missing) == paired_p(x, 0*x, alone)

@pytest.mark.parametrize("n,says", [(2, "no difference shown"), (5, "no difference shown"), (6, "better")])
def test_a_handful_of_questions_shows_nothing(n, says):
    "Five coins all fall alike once in sixteen times; an interval without width does not know that"
    s = pd.concat([
        pd.DataFrame(dict(
            question_id=range(n), selector=name, shots=1, draw=0, pointer=[(1000,)]*n, vqa_acc_score=x,
            vqa_pred_answer="a", eval_failed=False))
        for name, x in (("mine", 1.), ("random", 0.))
    ])
    t = paired_table(s, against=["random"], bootstrap=Bootstrap(200))
    assert t.verdict.tolist() == [says] and t.delta.tolist() == [1.]
    assert math.isinf(t.mde[0]) == (n < 6)
    assert paired_tests(s, against=["random"], bootstrap=Bootstrap(200)).p.tolist() == [2.**(1 - n)]
    twice = np.repeat(range(n), 2)   # two questions about each picture are no more evidence
    assert paired_p(np.ones(2*n), np.zeros(2*n), twice) == 2.**(1 - n)

def test_one_picture_under_two_ids_is_one(tmp_path):
    "Copies of a file are drawn together: the interval is that of as many pictures as there are"
    n = 24
    for i in range(n): (tmp_path/f"{i}.png").write_bytes(b"picture %d" % (i % 12))
    g = rng("copied pictures", 0)
    of_picture = g.choice([0., 1.], 12)
    s = pd.DataFrame(dict(
        question_id=range(n), selector="random", shots=1, draw=0, pointer=[(1000,)]*n,
        vqa_acc_score=of_picture[np.arange(n) % 12], vqa_pred_answer="a", eval_failed=False))
    def table(image_id, path):
        items = pd.DataFrame(dict(question_id=range(n), image_id=image_id, image_path=path))
        t = result_table(s, items, oracle=None, changed_from=None, bootstrap=Bootstrap(400))
        return t.lo[0], t.hi[0]
    files = [str(tmp_path/f"{i}.png") for i in range(n)]
    assert table(range(n), files) == table(np.arange(n) % 12, None) != table(range(n), None)

# ---- many at once ------------------------------------------------------------------------------------------

def some_scores(n=60, k=6):
    "[n, k] scores with holes: columns 0 and 1 know all queries, 2 and 3 miss the same, the others their own"
    g = rng("many at once")
    x = g.choice([0, .3, .6, 1.], (n, k))
    x[:7, [2, 3]] = np.nan
    for j in (4, 5): x[g.permutation(n)[:9], j] = np.nan
    return x

@pytest.mark.parametrize("cluster", [None, np.arange(60)//3], ids=["alone", "pictures"])
def test_many_pairs_are_what_each_is_alone(cluster):
    x = some_scores()
    pairs = [(0, 1), (2, 3), (0, 4), (4, 5), (2, 1)]
    few = Bootstrap(300, seed=4, level=.9)
    together = paired_bootstraps(np.stack([x[:, a] - x[:, b] for a, b in pairs], 1), cluster, few)
    for (a, b), got in zip(pairs, together):
        assert got == pytest.approx(paired_bootstrap(x[:, a], x[:, b], cluster, few), abs=1e-12)
    nothing = np.full((60, 1), np.nan)
    with pytest.raises(ValueError, match="no query in common"): paired_bootstraps(nothing, cluster, few)

@pytest.mark.parametrize("cluster", [None, np.arange(60)//3], ids=["alone", "pictures"])
def test_many_gaps_are_what_each_is_alone(cluster):
    x = some_scores()
    low, high = x[:, 0]*.3, np.fmax(x[:, 1], .9)
    few = Bootstrap(300)
    together = _gaps_closed(x, low, high, cluster, few)
    for j, got in enumerate(together):
        assert got == pytest.approx(gap_closed(x[:, j], low, high, cluster, few), abs=1e-12, nan_ok=True)

def test_columns_that_know_the_same_queries_stand_together():
    groups = alike_columns(~np.isnan(some_scores()))
    assert [columns for columns, _ in groups] == [[0, 1], [2, 3], [4], [5]]
    assert [int(rows.sum()) for _, rows in groups] == [60, 53, 51, 51]

def test_a_table_draws_its_resamples_once(monkeypatch):
    "However many pairs there are, and in each of the tables"
    import leverplus.statistics
    drawn = []
    def draw(*args):
        drawn.append(args)
        return as_before(*args)
    as_before = leverplus.statistics.resamples
    monkeypatch.setattr(leverplus.statistics, "resamples", draw)
    g = rng("tables")
    parts = [pd.DataFrame(dict(
        selector=name, shots=2, question_id=range(50), draw=0, pointer=[(1, 2)]*50, vqa_gt_prob=.5,
        vqa_acc_score=np.where(name == "oracle", 1., g.choice([0., 1.], 50)), vqa_pred_answer="so", eval_failed=False,
    )) for name in ("random", "similar_text", "oracle", *(f"ours_{i}" for i in range(7)))]
    scored = pd.concat(parts, ignore_index=True)
    for table in (paired_table, paired_tests, gap_table):
        drawn.clear()
        assert len(table(scored, bootstrap=Bootstrap(50))) >= 8 and len(drawn) == 1, table.__name__

def test_evaluators_judge_each_answer_once(monkeypatch):
    import leverplus.evaluate
    asked = []
    def judge(said, truth, mode):
        asked.append(len(said))
        return as_before(said, truth, mode)
    as_before = leverplus.evaluate.vqa_accuracies
    monkeypatch.setattr(leverplus.evaluate, "vqa_accuracies", judge)
    items = pd.DataFrame(dict(question_id=[1, 2], answers=[["a"]*10, ["b"]*10])).set_index("question_id")
    rows = pd.DataFrame(dict(
        selector=["x", "x", "y", "y", "z", "z"], shots=1, question_id=[1, 2]*3, draw=0, pointer=[(5,)]*6,
        vqa_acc_score=0., vqa_gt_prob=0., vqa_pred_answer=["a", "c", "a", "b", "a", "c"], eval_failed=False,
    ))
    table = mode_table(rows, items)
    assert asked == [3, 3, 3] and table.official.tolist() == [.5, 1., .5] and table.n.tolist() == [2, 2, 2]
