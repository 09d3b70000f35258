"Records made of records: every row accounted for, nothing invented, the stated rule kept"
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from leverplus.core import stable_hash
from leverplus.groups import FACT_COLUMNS, RECORD, RLData
from leverplus.lvlm import MockScorer
from leverplus.pools import Pool
from leverplus.settings import Guarding, Proposing
from leverplus.rldata_merge import (
    PHASES, TIERS, balance, by_counts, by_gap, by_shots, dedupe, derive, drop_failed, label_rows, merge,
    phases, plot_balance, query_table, require_positive_query, row_lots, row_reward, sample_queries, scorer_ranks,
    skip_fallback, sources, split, tiers,
)

DEMOS = tuple(range(10, 16))
RECIPE = dict(sampler="by hand", K=6)
ACC = (None, 0., 0., .3, 1.)

def facts(scorer, q, ptr, acc=None):
    "Facts as a function of scorer, query and pointer: what a deterministic scorer gives"
    h = stable_hash(scorer, q, ptr)
    a = ACC[h % len(ACC)] if acc is None else acc
    ok = a is not None
    mode = "fallback" if h % 3 == 0 else "official"
    return dict(
        question_id=q,
        pointer=ptr,
        vqa_pred_answer="cat" if ok else None,
        vqa_raw_generation="a cat" if ok else None,
        vqa_correct=float(a > 0) if ok else None,
        vqa_acc_score=a,
        vqa_rel_token_f1=a,
        vqa_rel_edit_sim=a,
        vqa_rel_score=a,
        vqa_gt_prob=(h // 7 % 1000 + 1) / 1001 if ok else None,
        vqa_gt_logprobs=(-1.0,) if ok else None,
        vqa_eval_mode=mode if ok else None,
        eval_failed=not ok,
        error=None if ok else "image truncated",
        scorer=scorer,
    )

def data(tried, pool=None):
    "RLData of (scorer, query, pointer) tuples"
    rows = pd.DataFrame([facts(*t) | dict(gen_method="sample") for t in tried])
    return RLData.from_frame(rows, pool or Pool({t[1]: DEMOS for t in tried}, RECIPE))

# few, so that records share some
pointers = st.sampled_from(
    [()] + [(a,) for a in DEMOS[:3]] + [(a, b) for a in DEMOS[:3] for b in DEMOS[:3] if a != b]
)
def records(scorers=("s1", "s2")):
    return st.dictionaries(
        st.tuples(st.integers(0, 4), pointers), st.sampled_from(scorers), min_size=1, max_size=25
    ).map(lambda d: data([(s, q, p) for (q, p), s in d.items()]))

def keyed(d, columns=RECORD):
    return (
        d.rows[list(columns)]
        .astype(object)
        .where(d.rows[list(columns)].notna(), None)
        .sort_values(["question_id", "pointer"], ignore_index=True)
    )
def tuples(d):
    "The rows of `keyed(d)` as tuples, without the frame"
    columns = [d.rows[c].tolist() for c in RECORD]
    rows = [tuple(None if v is None or v != v else v for v in row) for row in zip(*columns)]
    by = [list(RECORD).index(c) for c in ("question_id", "pointer")]
    return sorted(rows, key=lambda row: [row[i] for i in by])

def accounted(out, *parents):
    "The last step accounts for every row, and every row kept is one that came in"
    h = out.manifest["history"][-1]
    came = [t for p in parents for t in tuples(p)]
    assert h["rows"] == [len(came), len(out)]
    assert sum(h["dropped"].values()) == len(came) - len(out)
    assert all(h["dropped"].values())
    assert h["queries"][1] == len(out.queries) == len(out.pool)
    assert not set(tuples(out)) - set(came)
    assert out.manifest["sources"]
    assert out.log[-1].startswith(h["step"])
    out.validate()
    return out

# ---- filters -----------------------------------------------------------------------------------------------

@settings(max_examples=20)
@given(records(), st.sampled_from([0., .5, 1., 1.3]), st.integers(0, 3), st.integers(0, 3))
def test_filters_account_for_rows_and_do_what_they_say(d, gap, p, c):
    for S in d.shots: assert accounted(by_shots(d, S), d).shots == (S,)
    with pytest.raises(ValueError, match="no row has"): by_shots(d, 5)
    for f in (drop_failed, skip_fallback, require_positive_query): accounted(f(d), d)
    low = accounted(by_gap(d, hi=gap), d)
    high = accounted(by_gap(d, lo=gap), d)
    t = query_table(d)
    assert sorted(low.queries + high.queries) == sorted(t.index[t.gap.notna()])
    assert (query_table(high).gap >= gap - 1e-9).all()
    assert (query_table(low).gap < gap).all()
    n = accounted(by_counts(d, min_positive=p, max_contrast=c), d)
    assert set(n.queries) == set(t.index[(t.positive >= p) & (t.contrast <= c)])
    for q, g in n.groups(): assert len(g) == t.rows[q]
    assert not drop_failed(d).rows.eval_failed.any()
    assert not skip_fallback(d).rows.vqa_eval_mode.eq("fallback").any()
    assert set(require_positive_query(d).queries) == {q for q, g in d.groups() if (g.vqa_acc_score > 0).any()}

@given(records())
def test_query_table_is_a_loop(d):
    for (q, g), row in zip(d.groups(), query_table(d).itertuples()):
        a = g.vqa_acc_score
        r = (a > 0) + a
        assert (row.Index, row.rows) == (q, len(g))
        assert (row.positive, row.contrast, row.unknown) == ((a > 0).sum(), (a == 0).sum(), a.isna().sum())
        known = r[a.notna()]
        if len(known): assert abs(row.gap - (known.max() - known.min())) < 1e-9
        else: assert np.isnan(row.gap)

def test_rows_scored_by_probability_only_are_unknown():
    d = data([("s1", 0, (a,)) for a in DEMOS[:5]])
    rows = d.rows.copy()
    ok = ~rows.eval_failed
    i = rows.index[ok][0]
    from leverplus.groups import TEXT_FACTS
    rows.loc[i, list(TEXT_FACTS)] = np.nan
    d = RLData.from_frame(rows, d.pool)
    assert np.isnan(label_rows(d.rows)[i])
    assert np.isnan(row_reward(d.rows, "hard_plus_soft")[i])
    assert not np.isnan(row_reward(d.rows, "gtprob")[i])
    with pytest.raises(ValueError, match="vqa_gt_prob"): row_reward(rows.assign(vqa_gt_prob=np.nan), "gtprob")
    with pytest.raises(ValueError, match="wanted one of"): row_reward(rows, "gtprop")

@settings(max_examples=20)
@given(records())
def test_tiers_divide_the_queries(d):
    levels = dict(high=(1.0, 2, 2), medium=(0.5, 1, 1))
    parts = tiers(d, levels)
    t = query_table(d)
    for x in parts.values(): accounted(x, d)
    assert sorted(q for x in parts.values() for q in x.queries) == sorted(d.queries)
    high = {q for q, r in t.iterrows() if r.gap >= 1 and r.positive >= 2 and r.contrast >= 2}
    medium = {q for q, r in t.iterrows() if r.gap >= .5 and r.positive >= 1 and r.contrast >= 1}
    assert set(parts["high"].queries) == high
    assert set(parts["medium"].queries) == medium - high
    ((name, everything),) = phases(d, (("all", ("high", "medium", "low")),), levels=levels)
    assert name == "all"
    assert tuples(everything) == tuples(d)

def test_the_levels_are_those_of_the_report():
    assert TIERS == dict(high=(1.5, 3, 3), medium=(1.0, 2, 2))
    assert PHASES == (("clear", ("high", "medium")), ("all", ("high", "medium", "low")))
    three = [dict(facts("s", 1, (a,), acc=1.0 if i < 3 else 0.0)) for i, a in enumerate(DEMOS)]
    two = [facts("s", 2, (a,), acc=0.3 if i < 2 else 0.0) for i, a in enumerate(DEMOS)]
    one = [facts("s", 3, (a,), acc=1. if i < 1 else 0.) for i, a in enumerate(DEMOS)]
    d = RLData.from_frame(
        pd.DataFrame(three + two + one).assign(gen_method="sample"),
        Pool({q: (*DEMOS, 99) for q in (1, 2, 3)}, {}),
    )
    assert {n: x.queries for n, x in tiers(d).items()} == dict(high=[1], medium=[2], low=[3])
    assert [x.queries for _, x in phases(d)] == [[1, 2], [1, 2, 3]]
    with pytest.raises(ValueError, match="phase 'a' wants tiers \\['hihg'\\]"): phases(d, (("a", ("hihg",)),))
    with pytest.raises(ValueError, match="phase 'clear' has no queries"):
        phases(d, levels=dict(high=(9.0, 1, 1), medium=(9.0, 1, 1)))

# ---- balance -----------------------------------------------------------------------------------------------

bounds = st.tuples(st.integers(0, 2), st.none() | st.integers(0, 3)).map(
    lambda b: (b[0], None if b[1] is None else max(b[0], 1) + b[1])
)

@given(
    records(),
    bounds,
    bounds,
    st.none() | st.floats(0.05, 0.95),
    st.sampled_from([None, "vqa_gt_prob"]),
    st.integers(0, 3),
)
def test_balance_holds_its_bounds(d, p, c, share, prefer, seed):
    b = accounted(balance(d, share, *p, *c, seed=seed, prefer=prefer), d)
    old = query_table(d)
    new = query_table(b)
    enough = (old.positive >= p[0]) & (old.contrast >= c[0])
    some = old.positive + old.contrast + old.unknown > 0
    assert set(new.index) == set(old.index[enough & some])
    assert (new.positive >= p[0]).all()
    assert (new.contrast >= c[0]).all()
    assert (new.unknown == old.unknown[new.index]).all()
    cap = [old.loc[new.index, k].clip(upper=m) for k, m in (("positive", p[1]), ("contrast", c[1]))]
    assert (new.positive <= cap[0]).all()
    assert (new.contrast <= cap[1]).all()
    both = (cap[0] > 0) & (cap[1] > 0)
    if share is None: assert (new.positive == cap[0]).all() and (new.contrast == cap[1]).all()
    else:
        def s(a, b): return (a / (a + b))[both]
        before = s(*cap)
        after = s(new.positive, new.contrast)
        assert ((after - share).abs() <= (before - share).abs() + 1e-12).all()
        assert (new.positive[both] > 0).all()
        assert (new.contrast[both] > 0).all()
        assert (new.positive[~both] == cap[0][~both]).all()
        assert (new.contrast[~both] == cap[1][~both]).all()

@given(records(), st.integers(1, 3), st.integers(0, 3), st.randoms())
def test_lots_do_not_depend_on_other_rows(d, k, seed, r):
    small = balance(d, max_positive=k, seed=seed)
    big = balance(d, max_positive=k + 1, seed=seed)
    assert set(tuples(small)) <= set(tuples(big))
    order = list(range(len(d)))
    r.shuffle(order)
    again = RLData(d.rows.iloc[order], d.pool)
    assert tuples(balance(again, max_positive=k, seed=seed)) == tuples(small)

@given(records(), st.integers(1, 2))
def test_prefer_keeps_the_largest(d, k):
    b = balance(d, max_positive=k, max_contrast=k, prefer="vqa_gt_prob")
    def kind(x): return pd.Series(label_rows(x.rows), index=x.rows.index)
    for q, g in b.groups():
        for v in (0, 1):
            all_ = d.rows.vqa_gt_prob[(kind(d) == v) & (d.rows.question_id == q)]
            kept = g.vqa_gt_prob[kind(b)[g.index] == v]
            assert sorted(kept) == sorted(all_.nlargest(k))

def test_balance_refuses():
    d = data([("s1", 0, (a,)) for a in DEMOS[:4]])
    for kw, says in (
        (dict(positive_share=0.0), "between 0 and 1"),
        (dict(min_positive=2, max_positive=1), "min_positive=2, max_positive=1"),
        (dict(max_contrast=0), "max_contrast=0"),
        (dict(min_contrast=-1), "min_contrast -1: wanted a whole number >= 0"),
    ):
        with pytest.raises(ValueError) as e: balance(d, **kw)
        assert says in str(e.value)
    with pytest.raises(ValueError, match="numeric column"): balance(d, positive="error")

def test_lots_are_uniform_and_the_same_everywhere():
    u = row_lots(np.arange(100_000), key=("t", 0))
    assert 0 <= u.min()
    assert u.max() < 1
    assert len(np.unique(u)) == len(u)
    assert abs(np.histogram(u, 20)[0] - 5000).max() < 350
    assert abs(np.corrcoef(u, row_lots(np.arange(100_000), key=("t", 1)))[0, 1]) < 0.01
    lots = row_lots(np.array([3, -1]), np.array([4, 5]), key=("a", 1))
    assert (lots * 2**53).astype(np.int64).tolist() == LOTS

LOTS = [4173627396580715, 504262981279633]

# ---- parts and samples -------------------------------------------------------------------------------------

@given(records(), st.integers(0, 5), st.sampled_from([(.5, .5), (.8, .1, .1), (1.,)]))
def test_split_partitions_the_queries(d, seed, fractions):
    parts = split(d, fractions, seed)
    assert len(parts) == len(fractions)
    for x in parts: accounted(x, d)
    assert sorted(q for x in parts for q in x.queries) == sorted(d.queries)
    assert sum((tuples(x) for x in parts), []).__len__() == len(d)
    less = sample_queries(d, 1, seed)
    home = next(i for i, x in enumerate(parts) if less.queries[0] in x.queries)
    # its part does not depend on the other queries
    assert split(less, fractions, seed)[home].queries == less.queries

@given(records(), st.integers(0, 5))
def test_split_keeps_pictures_together(d, seed):
    items = pd.DataFrame(dict(question_id=range(5), image_id=[7, 8, 7, 9, 8]))
    image = dict(zip(items.question_id, items.image_id))
    a, b = ({image[q] for q in x.queries} for x in split(d, (0.5, 0.5), seed, items))
    assert not a & b

def test_split_knows_equal_files(tmp_path):
    d = data([("s1", q, (a,)) for q in range(20, 32) for a in DEMOS[:2]])
    items = pd.DataFrame(
        dict(
            question_id=range(20, 32),
            image_id=range(12),
            image_path=[str(tmp_path / f"{q}.png") for q in range(12)],
        )
    )
    for q in range(12): (tmp_path/f"{q}.png").write_bytes(b"%d" % (q % 3))
    homes = [
        {q - 20: i for i, x in enumerate(split(d, (0.5, 0.5), seed, items)) for q in x.queries}
        for seed in range(8)
    ]
    assert all(h[q] == h[q % 3] for h in homes for q in range(12))
    assert {0, 1} in [set(h.values()) for h in homes]
    with pytest.raises(ValueError, match="question_id 31 is not among the 11 items"):
        split(d, items=items[:11])
    with pytest.raises(ValueError, match="sum to 1"): split(d, (.5, .6))

def test_split_meets_its_fractions_on_average():
    d = data([("s1", q, (10,)) for q in range(100, 2100)])
    sizes = [len(x.queries) for x in split(d, (0.7, 0.2, 0.1))]
    assert np.allclose(sizes, (1400, 400, 200), atol=60)

@given(records(), st.integers(0, 3))
def test_samples_are_nested(d, seed):
    n = len(d.queries)
    got = [set(accounted(sample_queries(d, k, seed), d).queries) for k in range(1, n + 1)]
    assert all(a < b for a, b in zip(got, got[1:]))
    assert list(map(len, got)) == list(range(1, n + 1))
    assert sample_queries(d, 1.0).queries == d.queries
    for bad in (0, n + 1, 0., 1.5):
        with pytest.raises(ValueError, match="sample_queries"): sample_queries(d, bad)

# ---- merge -------------------------------------------------------------------------------------------------

@given(records(), records())
def test_merge_accounts_for_rows_and_does_not_mix(a, b):
    m = accounted(merge(a, b), a, b)
    scorers = pd.concat([a.rows.scorer, b.rows.scorer])
    rank = dict(zip(scorers, scorer_ranks(scorers)))
    for q, g in m.groups():
        came = pd.concat([x.rows[x.rows.question_id == q] for x in (a, b)])
        labelled = came[~came.eval_failed]
        best = max((labelled if len(labelled) else came).scorer, key=rank.get)
        assert set(g.scorer) == {best}
        want = came[came.scorer == best]
        assert set(g.pointer) == set(want.pointer)
        assert set(g.pointer[~g.eval_failed]) == set(want.pointer[~want.eval_failed])
    assert set(m.queries) == set(a.queries) | set(b.queries)
    assert m.queries == list(dict.fromkeys(a.queries + b.queries))

@settings(max_examples=20)
@given(records(), records())
def test_merge_is_idempotent(a, b):
    for kw in ({}, dict(mix=True)):
        m = merge(a, b, **kw)
        for again in (merge(m, **kw), merge(m, m, **kw)):
            pd.testing.assert_frame_equal(again.rows, m.rows)
            assert again.pool == m.pool
        assert tuples(merge(m, b, **kw)) == tuples(m)

@settings(max_examples=20)
@given(records(), records(), records(), st.booleans())
def test_order_does_not_matter_when_scorers_are_ranked(a, b, c, mix):
    kw = dict(prefer=["s2", "s1"], mix=mix)
    want = keyed(merge(a, b, c, **kw), RECORD)
    for other in (merge(c, b, a, **kw), merge(b, a, c, **kw)):
        pd.testing.assert_frame_equal(keyed(other), want)

@settings(max_examples=20)
@given(records(), records())
def test_a_mixture_keeps_every_sequence(a, b):
    m = accounted(merge(a, b, mix=True), a, b)
    came = {(q, p) for x in (a, b) for q, p in zip(x.rows.question_id, x.rows.pointer)}
    assert set(zip(m.rows.question_id, m.rows.pointer)) == came
    assert len(m) == len(came)
    failed = {(r.question_id, r.pointer) for r in m.rows.itertuples() if r.eval_failed}
    # a label beats a failure
    assert not failed & {
        (r.question_id, r.pointer) for x in (a, b) for r in x.rows.itertuples() if not r.eval_failed
    }

@given(records(), st.data())
def test_dedupe_mends_repeats(d, draw):
    again = draw.draw(st.lists(st.integers(0, len(d) - 1), max_size=8))
    broken = RLData(pd.concat([d.rows, d.rows.iloc[again]]), d.pool)
    mended = dedupe(broken)
    assert tuples(mended) == tuples(d)
    assert sum(mended.manifest["history"][-1]["dropped"].values()) == len(again)

def test_newest_is_what_comes_last():
    def some(scorer, *at):
        rows = pd.DataFrame([facts(scorer, q, (x,), acc=.6) for q, x in at]).assign(gen_method="sample")
        return RLData.from_frame(rows, Pool({0: DEMOS, 1: DEMOS}, RECIPE))
    a = some("old", (0, 10), (0, 11), (1, 10))
    b = some("new", (0, 10))
    m = merge(a, b).rows
    assert set(m.scorer[m.question_id == 0]) == {"new"}
    assert len(merge(a, b)) == 2
    assert set(merge(b, a).rows.scorer) == {"old"}
    assert "labelled by another scorer" in merge(b, a).log[-1]
    assert len(merge(a, b, mix=True)) == 3

def test_a_scorer_that_contradicts_itself_is_counted():
    a = data([("s1", 0, (10, 11))])
    def judged(acc):
        rows = pd.DataFrame([facts("s1", 0, (10, 11), acc=acc)]).assign(gen_method="sample")
        return RLData.from_frame(rows, a.pool)
    a, b = judged(0.), judged(.6)
    assert "1 of the repeated sequences had another accuracy from the same scorer" in merge(a, b).log[-1]
    assert merge(a, b).rows.vqa_acc_score.tolist() == [0.6]

def test_two_facts_of_one_scorer_about_other_pictures_are_refused():
    pool = data([("s1", 0, (10,))]).pool
    def run(contents, scorer="s1"):
        rows = pd.DataFrame([facts(scorer, 0, p, acc=1.) for p in ((10,), (11,))])
        return RLData.from_frame(rows.assign(gen_method="sample", content=contents), pool)
    old, new = run([5, 6]), run([7, 6])
    says = r"question_id 0, pointer \(10,\): two facts of scorer s1 are about other questions, .* \(\d such rows\)"
    for pair in ((old, new), (new, old), (old, old, new)):
        with pytest.raises(ValueError, match=says): merge(*pair)
    with pytest.raises(ValueError, match=says): dedupe(RLData(pd.concat([old.rows, new.rows]), pool))
    assert merge(new, new).rows.content.tolist() == [7, 6]
    assert merge(run([0, 6]), new).rows.content.tolist() == [7, 6]         # what the first was about nobody knows
    assert merge(old, run([7, 8], "s2")).rows.content.tolist() == [7, 8]   # asked again: no label of the old is left
    lost = pd.DataFrame([facts("s1", 0, (10,)) | dict.fromkeys(FACT_COLUMNS)]).assign(
        eval_failed=True, error="gone", gen_method="sample", scorer="s1", content=9
    )
    assert merge(old, RLData.from_frame(lost, pool)).rows.content.tolist() == [5, 6]      # a failure is about nothing

def test_failures_without_a_scorer_stay_and_are_not_labels():
    a = data([("s1", 0, (10,)), ("s1", 0, (12,))])
    lost = pd.DataFrame([facts("s1", 0, (11,)) | dict.fromkeys(FACT_COLUMNS)]).assign(
        eval_failed=True, error="no answer", gen_method="mined", content=0
    )
    m = merge(a, RLData.from_frame(lost, a.pool))
    assert len(m) == 3
    assert m.rows.scorer.isna().sum() == 1

def test_pools_must_agree_or_be_united():
    a = data([("s1", 0, (10,))])
    b = data([("s1", 0, (11,)), ("s1", 1, (16,))], Pool({0: (*DEMOS[1:], 16), 1: (*DEMOS[1:], 16)}, RECIPE))
    says = "question_id 0 has different candidates in the sources, e.g. 10 is not in all"
    with pytest.raises(ValueError, match=says): merge(a, b)
    m = merge(a, b, pools="unite")
    assert m.pool[0] == (*DEMOS, 16)
    assert m.pool[1] == (*DEMOS[1:], 16)
    assert m.pool.rule["sampler"] == "united"
    assert m.pool.rule["K"] == 7
    both = merge(m, b, pools="unite").pool
    assert both.recipe["merged"] == sorted({a.pool.fingerprint, b.pool.fingerprint})
    c = data([("s1", 2, (10,))], Pool({2: DEMOS}, dict(RECIPE, sampler="text")))
    with pytest.raises(ValueError, match="sampler 'by hand' / 'text'"): merge(a, c)
    d = data([("s1", 2, (10,))], Pool({2: DEMOS}, dict(RECIPE, seed=3)))
    kept = merge(a, d).pool
    assert kept.rule == a.pool.rule
    assert kept.recipe["merged"] == sorted([a.pool.fingerprint, d.pool.fingerprint])
    with pytest.raises(ValueError, match="pools='some'"): merge(a, pools="some")

def test_facts_come_for_all_or_for_none():
    a = data([("s1", 0, (10,)), ("s1", 0, (12,))])
    b = data([("s1", 1, (a_,)) for a_ in DEMOS])
    b = RLData.from_frame(b.rows.assign(vqa_gt_prob=np.nan, vqa_gt_logprobs=None), b.pool)
    with pytest.raises(ValueError, match="vqa_gt_prob, vqa_gt_logprobs is there in 1 of 2 sources"):
        merge(a, b)
    m = merge(a, b, facts="common")
    assert m.rows.vqa_gt_prob.isna().all()
    assert "left out of all rows: vqa_gt_prob, vqa_gt_logprobs" in m.log[-1]
    assert not a.rows.vqa_gt_prob.isna().all()

def test_merge_refuses():
    a = data([("s1", 0, (10,))])
    with pytest.raises(ValueError, match="no data"): merge()
    with pytest.raises(ValueError, match="prefer lacks the scorers \\['s1'\\]"): merge(a, prefer=["s2"])
    with pytest.raises(ValueError, match="prefer='oldest'"): merge(a, prefer="oldest")
    with pytest.raises(RuntimeError, match="not accounted for"): derive([a], a.rows[:0], a.pool, "lose()", {})

# ---- what stays with the data ------------------------------------------------------------------------------

def test_history_and_sources_travel(tmp_path):
    a = data([("s1", q, (x,)) for q in range(4) for x in DEMOS])
    b = data([("s1", q, (10, x)) for q in range(2, 6) for x in DEMOS[1:]])
    a.manifest["settings"] = dict(seed=3)
    d = drop_failed(balance(merge(a, b), max_contrast=2))
    d.save(tmp_path / "d")
    back = RLData.load(tmp_path / "d")
    assert back.log == d.log
    assert len(d.log) == 3
    assert [s["fingerprint"] for s in sources(back)] == [a.fingerprint, b.fingerprint]
    assert sources(back)[0]["settings"] == dict(seed=3)
    assert all(l in repr(back) for l in d.log)
    assert "balance(max_contrast=2)" in back._repr_html_()
    assert "RLData" in repr(a)
    assert a.log == []
    # so that no generation takes these rows for its own
    assert len(merge(back, back).manifest["sources"]) == 2
    assert "settings" not in d.manifest
    train, dev = split(d, (0.5, 0.5))
    both = merge(train, dev)
    assert tuples(both) == tuples(d)
    steps = [h["step"].split("(")[0] for h in both.manifest["history"]]
    assert steps == ["merge", "balance", "drop_failed", "split", "split", "merge"]

def test_nothing_left_is_still_a_record(tmp_path):
    d = by_counts(data([("s1", 0, (10,))]), min_positive=9)
    assert len(d) == 0
    assert d.queries == []
    for f in (drop_failed, balance, by_gap, dedupe): assert len(f(d)) == 0
    assert [len(x) for x in split(d)] == [0, 0]
    assert len(merge(d, d)) == 0
    assert set(map(len, tiers(d).values())) == {0}

def test_sources_are_not_changed():
    a = data([("s1", q, (x,)) for q in range(4) for x in DEMOS])
    b = data([("s2", q, (x,)) for q in range(4) for x in DEMOS])
    before = [(tuples(x), dict(x.manifest), x.pool.fingerprint) for x in (a, b)]
    merge(a, b, mix=True)
    merge(a, b, facts="common")
    balance(a, .3)
    split(a)
    tiers(a)
    assert before == [(tuples(x), dict(x.manifest), x.pool.fingerprint) for x in (a, b)]

def test_the_figure_counts():
    d = data([("s1", q, (x,)) for q in range(4) for x in DEMOS])
    ax = plot_balance(dict(all=d, less=balance(d, 0.5)), 0.5)
    assert len(ax.lines) == 3
    assert len(ax.lines[0].get_xdata()) == 4
    assert ax.get_legend().get_texts()[0].get_text() == "all: 4 queries"

@settings(max_examples=5)
@given(st.integers(0, 50))
def test_chain_over_generated_data(seed):
    "generate -> merge -> filter -> balance -> split -> batches, on a scorer without a model"
    import tempfile, torch
    from leverplus.dls import GroupDataset
    from leverplus.embed import EmbedStore
    from leverplus.rewards import reward
    from leverplus.rldata_generate import generate
    ids = [*range(8), *range(100, 120)]
    g = torch.Generator().manual_seed(seed)
    items = pd.DataFrame(
        [
            dict(
                question_id=i,
                image_id=i // 2,
                image_path=f"{i}.png",
                question=f"What is {i}?",
                answers=["cat"] * 6 + ["dog"] * 4,
                answer="cat",
            )
            for i in ids
        ],
        index=ids,
    )
    store = EmbedStore(ids, torch.randn(28, 4, generator=g), torch.randn(28, 4, generator=g))
    pool = Pool({q: range(100, 108) for q in range(8)}, RECIPE)
    with tempfile.TemporaryDirectory() as d:
        a, b = (
            generate(
                f"{d}/{s}",
                range(8),
                items,
                pool,
                MockScorer(s, fails=(s,)),
                store,
                proposing=Proposing(seed=seed),
                guarding=Guarding(test=0),
                progress=False,
            )
            for s in (0, 1)
        )
    # query 1 failed in b
    m = merge(a, b)
    assert m.rows.groupby("question_id").scorer.nunique().max() == 1
    assert m.rows.scorer[m.rows.question_id == 1].eq(a.rows.scorer[0]).all()
    out = balance(by_gap(drop_failed(m), lo=0.1), 0.5)
    parts = [x for x in split(out, (0.5, 0.5), items=items.drop(columns="image_path")) if len(x)]
    for x in parts:
        ds = GroupDataset(x.rows, x.pool, store, reward(x.rows))
        assert len(ds.rows) == len(x)
        assert ds.n_failed == 0
    assert sum(map(len, parts)) == len(out)
