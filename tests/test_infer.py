"Picking, reranking, predicting: against brute force, with failures and interruptions, and in the official format"
import json, math
from itertools import permutations
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from leverplus.core import rng
from leverplus.embed import EmbedStore
from leverplus.infer import (
    PICKERS, TRUTH, OwnAnswer, adaptive_shots, candidates, check_picks, check_results, confidence, pick,
    pick_fixed, pick_mmr, pick_model, pick_similar, predict, rerank, write_results,
)
from leverplus.pools import check_pool
from leverplus.lvlm import MockScorer, Scored, Targets
from leverplus.pools import Pool
from leverplus.rldata_ask import FactCache, ask
from leverplus.rldata_propose import SimilarityPrior
from leverplus.selector import PointerSelector
from leverplus.vqa import normalise

QS = range(10)
DEMOS = range(100, 130)
IDS = [*QS, *DEMOS]
G = rng("test infer")
ITEMS = pd.DataFrame(
    dict(
        question_id=IDS, image_id=IDS, image_path=[f"{i}.jpg" for i in IDS],
        question=[f"what is {i}?" for i in IDS], answer=[f"word{i % 3}" for i in IDS],
        answers=[[f"word{i % 3}"] * 7 + ["other"] * 3 for i in IDS]
    ),
    index=IDS,
)
POOL = Pool(
    {q: tuple(int(d) for d in 100 + G.choice(30, 4 + q % 3, replace=False)) for q in QS},
    {"sampler": "random", "K": 6},
)
STORE = EmbedStore(
    IDS, *(torch.randn(len(IDS), n, generator=torch.Generator().manual_seed(n)) for n in (5, 6)), {}
)
MODEL = PointerSelector(STORE.dim("mixed"), d_hidden=8)

class Says:
    "A scorer that answers by rule, remembers what it was asked, and breaks off after `stop` prompts"
    fingerprint, tolerance = "says", 0.
    def __init__(self, fails=(), stop=math.inf): self.fails, self.stop, self.asked = set(fails), stop, []
    def reference(self): return self
    def run(self, prompts, targets=None, generate=True, progress=False):
        out = []
        for p, t in zip(prompts, targets or [Targets()]*len(prompts)):
            if len(self.asked) >= self.stop: raise KeyboardInterrupt
            self.asked.append((p.question_id, tuple(p.pointer), generate))
            h = rng("says", p.question_id, p.pointer)
            if p.question_id in self.fails:
                out.append(Scored(p.question_id, tuple(p.pointer), error="told to fail"))
                continue
            text = ["word0", "word1", "word2", "zebra", "A zebra"][h.integers(5)]
            lp = {
                a: -1 - 0.1 * (rng("lp", p.question_id, p.pointer, a).integers(30)) for a in (*t.texts, text)
            }
            out.append(
                Scored(
                    p.question_id, tuple(p.pointer), text if generate else None,
                    tuple(lp[a] for a in t.texts),
                    sum(w * math.exp(lp[a]) for a, w in zip(t.texts, t.weights))
                )
            )
        return out

# ---- picks -------------------------------------------------------------------------------------------------

@given(st.integers(0, 3000), st.floats(0, 1))
@settings(max_examples=25)
def test_mmr_is_brute_force_and_blind_to_the_pool_order(seed, w):
    store = EmbedStore(
        IDS, *(torch.randn(len(IDS), 4, generator=torch.Generator().manual_seed(seed + i)) for i in (0, 1)),
        {}
    )
    got = pick_mmr(POOL, store, 3, "image", w).set_index("question_id").pointer
    cos = lambda a, b: round(
        float(store.get([a], "image")[0].double() @ store.get([b], "image")[0].double()), 6
    )
    for q, c in POOL.ids.items():
        out = []
        for _ in range(3):
            out.append(
                min(
                    (i for i in c if i not in out),
                    key=lambda i: (
                        -round(w * cos(q, i) - (1 - w) * max((cos(i, p) for p in out), default=0), 6), i,
                    ),
                )
            )
        assert got[q] == tuple(out[::-1])
    assert (
        pick_mmr(Pool({q: c[::-1] for q, c in POOL.ids.items()}, {}), store, 3, "image", w)
        .set_index("question_id")
        .pointer.equals(got)
    )

@pytest.mark.parametrize("how,S", [("beam", 1), ("beam", 2), ("samples", 2)])
def test_candidates_are_the_best_or_fair_draws_whatever_the_batch(how, S):
    prior = SimilarityPrior(4.0)
    got = candidates(prior, POOL, STORE, S, 200, how)
    for q, g in got.groupby("question_id"): # wide enough: everything, each once, with its probability
        assert set(g.pointer) == set(permutations(POOL[q], S))
        assert len(g) == math.perm(len(POOL[q]), S)
        assert g["rank"].tolist() == list(range(len(g)))
        assert np.exp(g.logp).sum() == pytest.approx(1)
        assert how == "samples" or (np.diff(g.logp) <= 1e-12).all()
    few = candidates(prior, POOL, STORE, S, 3, how)
    part = candidates(prior, POOL.only([7, 2]), STORE, S, 3, how, bs=1)
    assert len(few) == 30
    assert part[part.question_id == 2].pointer.tolist() == few[few.question_id == 2].pointer.tolist()
    if how == "samples": # first draws follow the policy
        one = Pool({0: (100, 101, 102)}, {})
        p = candidates(prior, one, STORE, 1, 3).set_index("pointer").logp.map(math.exp)
        n = pd.Series(
            [candidates(prior, one, STORE, 1, 1, how, seed=s).pointer[0] for s in range(400)]
        ).value_counts(normalize=True)
        assert all(abs(n.get(k, 0) - v) < 4*math.sqrt(v*(1 - v)/400) for k, v in p.items())

def test_selectors_with_stop_may_show_fewer():
    m = PointerSelector(STORE.dim("mixed"), d_hidden=8, max_shots=3, stop=True)
    with torch.no_grad(): m.stop.bias.copy_(torch.tensor([-20., 20.]))
    got = pick_model(m, POOL, STORE, None)
    beam = candidates(m, POOL, STORE, None, 4)
    drawn = candidates(m, POOL, STORE, None, 4, "samples")
    assert set(got.pointer.map(len)) == {2}
    assert set(got.shots) == {3}
    assert set(pick_model(m, POOL, STORE, 3).pointer.map(len)) == {3}
    assert beam[beam["rank"] == 0].pointer.tolist() == got.pointer.tolist()
    assert set(candidates(m, POOL, STORE, 3, 2).pointer.map(len)) == {3}
    assert drawn.groupby("question_id").pointer.nunique().eq(4).all()
    assert drawn.equals(candidates(m, POOL, STORE, None, 4, "samples"))
    with pytest.raises(ValueError, match="no STOP"): pick_model(MODEL, POOL, STORE, None)

def test_foreign_pools_and_self_shown_queries_are_refused(tmp_path):
    m = PointerSelector(STORE.dim("mixed"), d_hidden=8)
    m.info = {"pool": dict(POOL.rule, sampler="text")}
    for f in (
        lambda **kw: pick_model(m, POOL, STORE, 2, **kw),
        lambda **kw: candidates(m, POOL, STORE, 2, **kw),
        lambda **kw: predict(
            tmp_path / "run", POOL, ITEMS, Says(), STORE, "greedy", 2, m, progress=False, **kw
        ),
    ):
        with pytest.raises(ValueError, match="sampler: 'text' in the checkpoint, 'random' here"): f()
        f(other_pool=True)
    m.save_pretrained(tmp_path / "ckpt", info={"pool": POOL.rule})
    check_pool(PointerSelector.from_pretrained(tmp_path / "ckpt"), POOL)
    twin = ITEMS.assign(image_id=ITEMS.image_id.where(ITEMS.question_id != POOL[3][0], 3))
    row = pd.DataFrame(dict(question_id=[3], pointer=[POOL[3][:2]]))
    check_picks(row, ITEMS)
    with pytest.raises(ValueError, match="question 3 is shown itself or its own picture"):
        check_picks(row, twin)
    with pytest.raises(ValueError, match="question 5 is shown"):
        check_picks(pd.DataFrame(dict(question_id=[5], pointer=[(100, 5)])), ITEMS)
    with pytest.raises(ValueError, match="shares its picture"): pick_fixed(POOL, POOL[3][:2], twin)
    with pytest.raises(ValueError, match="is its own candidate"): Pool({3: (3, 100)})

# ---- reranking ---------------------------------------------------------------------------------------------

rows = st.lists(
    st.tuples(
        st.integers(0, 3), st.sampled_from(["cat", "A cat", "dog", ""]),
        st.sampled_from([0.0, 0.2, 0.5, math.nan]), st.booleans()
    ),
    min_size=1,
    max_size=14,
)

@given(rows, st.sampled_from(["vote", "weighted", "confidence", "value"]))
@settings(max_examples=80)
def test_rerank_is_brute_force(rows, by):
    c = pd.DataFrame(
        [
            dict(
                question_id=q, pointer=(i,), vqa_pred_answer=None if bad else a, confidence=x,
                vqa_acc_score=0.5, eval_failed=bad
            )
            for i, (q, a, x, bad) in enumerate(rows)
        ]
    )
    c["rank"] = c.groupby("question_id").cumcount()
    value = lambda f: [len(str(a)) for a in f.vqa_pred_answer]
    got = (
        rerank(
            c, {"weighted": "vote", "value": value}.get(by, by), "confidence" if by == "weighted" else None
        )
        .set_index("question_id")
        .pointer
    )
    assert list(got.index) == list(dict.fromkeys(c.question_id))
    for q, g in c.groupby("question_id"):
        good = g[~g.eval_failed]
        w = lambda r: 1 if by == "vote" else 0 if math.isnan(r.confidence) else r.confidence
        score = dict(
            vote=lambda r: sum(
                w(o)
                for o in good.itertuples()
                if normalise(o.vqa_pred_answer) == normalise(r.vqa_pred_answer)
            ),
            value=lambda r: len(r.vqa_pred_answer),
            confidence=lambda r: -1 if math.isnan(r.confidence) else r.confidence,
        )
        f = score["vote" if by == "weighted" else by]
        best = min(
            good.itertuples() if len(good) else g.itertuples(),
            key=lambda r: (-round(f(r), 9) if len(good) else 0, r.rank),
        )
        assert got[q] == best.pointer

def test_only_oracles_see_the_truth():
    c = pd.DataFrame(
        dict(
            question_id=1, pointer=[(1,), (2,)], rank=[0, 1], vqa_pred_answer=["a", "b"], eval_failed=False,
            logp=[-1.0, -2.0], **{t: [0.0, 1.0] for t in TRUTH}
        )
    )
    seen = []
    rerank(c, lambda f: seen.append(list(f)) or f.logp)
    assert not set(TRUTH) & set(seen[0])
    assert {
        b: rerank(c, b).oracle[0] for b in ("logp", "vqa_gt_prob", "vqa_acc_score")
    } == dict(logp=False, vqa_gt_prob=True, vqa_acc_score=True)
    with pytest.raises(ValueError, match="no column"): rerank(c, "confidnce")
    with pytest.raises(ValueError, match="3 scores for 2"): rerank(c, lambda f: [1, 2, 3])
    with pytest.raises(ValueError, match="is NaN"): rerank(c, lambda f: [1, math.nan])

@given(
    st.lists(
        st.lists(st.sampled_from([0.1, 0.4, 0.6, 0.9, math.nan]), min_size=1, max_size=4), min_size=1,
        max_size=5
    ),
    st.sampled_from([None, 0.0, 0.5, 2.0]),
)
def test_adaptive_shots(conf, threshold):
    r = pd.DataFrame(
        [
            dict(question_id=q, pointer=tuple(range(100, 100 + s)), confidence=x)
            for q, xs in enumerate(conf)
            for s, x in enumerate(xs)
        ]
    ).sample(frac=1, random_state=0)
    got = adaptive_shots(r, threshold).set_index("question_id")
    for q, xs in enumerate(conf):
        hit = next((s for s, x in enumerate(xs) if threshold is not None and x >= threshold), None)
        y = [-1 if math.isnan(x) else x for x in xs]
        assert (len(got.pointer[q]), got.asked[q]) == (
            (hit, hit + 1) if hit is not None else (y.index(max(y)), len(xs))
        )

def test_confidence_is_the_probability_of_the_own_text_and_costs_what_it_says():
    p = candidates(MODEL, POOL, STORE, 2, 3)
    s = Says(fails=[4])
    facts = ask(p, s, ITEMS)
    before = len(s.asked)
    own = OwnAnswer(s, facts)
    c = confidence(p, own, ITEMS)
    want = [
        math.nan if q == 4 else math.exp(-1 - 0.1 * rng("lp", q, x, t).integers(30))
        for q, x, t in zip(p.question_id, p.pointer, facts.vqa_raw_generation)
    ]
    assert np.allclose(c, want, equal_nan=True) and np.isnan(c).sum() == 3
    # the text is a true answer: known already
    free = sum(
        t in ("word0", "word1", "word2") and t == f"word{q % 3}"
        for q, t in zip(p.question_id, facts.vqa_raw_generation)
        if q != 4
    )
    # and the failed rows once more
    assert own.prompts == 30 and own.extra == 27 - free and len(s.asked) - before == own.extra + 3
    # without facts: both passes
    again = Says(fails=[4])
    alone = confidence(p, again, ITEMS)
    assert np.allclose(alone, c, equal_nan=True) and len(again.asked) == 30 + own.extra
    class Mute(MockScorer):
        def _one(self, p, t, generate): return Scored(p.question_id, p.pointer, " ", (-1.,)*len(t.texts), .1)
    assert np.isnan(confidence(p, Mute(), ITEMS)).all()

# ---- predictions -------------------------------------------------------------------------------------------

@pytest.mark.parametrize(
    "how,kw",
    [(h, {}) for h in PICKERS if h not in ("beam", "samples", "fixed")]
    + [
        ("beam", dict(by="vote")), ("samples", dict(by="confidence")), ("beam", dict(by="vqa_gt_prob")),
        ("greedy", dict(S=(0, 1, 2), threshold=0.2))
    ],
)
def test_predictions_are_official_and_complete(tmp_path, how, kw):
    run = predict(
        tmp_path / "run", POOL, ITEMS, Says(), STORE, how, model=MODEL, progress=False, **{"S": 2, **kw}
    )
    f = run.frame("predictions.parquet")
    out = check_results(run.path / "predictions.json", QS)
    assert {r["question_id"]: r["answer"] for r in out} == dict(zip(f.question_id, f.vqa_pred_answer))
    assert f.question_id.is_unique
    assert f.question.tolist() == [ITEMS.question[q] for q in f.question_id]
    assert [len(p) for p in f.pointer] == [len(a) for a in f.demo_answers]
    assert f.get("oracle", pd.Series([False])).any() == (kw.get("by") == "vqa_gt_prob")
    assert run.metrics["acc"] == pytest.approx(f.vqa_acc_score.mean())
    if "threshold" in kw:
        assert run.metrics["prompts"] == f.asked.sum() < 30
        assert (f.asked == f.pointer.map(len) + 1)[f.confidence >= 0.2].all()

@pytest.mark.parametrize("after", [1, 17, 40])
def test_broken_off_and_continued_is_uninterrupted(tmp_path, after):
    go = lambda path, s: predict(
        tmp_path / path, POOL, ITEMS, s, STORE, "beam", 2, MODEL, by="confidence", window=4, progress=False
    )
    s = Says()
    whole = go("whole", s).frame("predictions.parquet")
    total = len(s.asked)
    first = Says(stop=after)
    rest = Says()
    with pytest.raises(KeyboardInterrupt): go("cut", first)
    assert not (tmp_path/"cut"/"predictions.json").exists()
    pd.testing.assert_frame_equal(go("cut", rest).frame("predictions.parquet"), whole)
    written = [(tmp_path/name/"predictions.json").read_bytes() for name in ("cut", "whole")]
    assert written[0] == written[1]
    # at most a window twice
    assert total <= len(first.asked) + len(rest.asked) <= total + 8
    with pytest.raises(ValueError, match="width: 5 there, 7 now"):
        predict(
            tmp_path / "cut", POOL, ITEMS, rest, STORE, "beam", 2, MODEL, by="confidence", window=4, width=7,
            progress=False
        )

def test_failures_are_named_then_asked_again(tmp_path):
    go = lambda s, **kw: predict(tmp_path/"run", POOL, ITEMS, s, how="random", S=2, progress=False, **kw)
    with pytest.raises(ValueError, match=r"2 questions have no answer, first \[3, 8\]"):
        go(Says(fails=[3, 8]))
    s = Says()
    run = go(s)
    assert {q for q, *_ in s.asked} == {3, 8} and run.metrics["failed"] == 0
    run = predict(
        tmp_path / "blank", POOL, ITEMS, Says(fails=[3]), how="random", S=2, progress=False, blank=True
    )
    out = {r["question_id"]: r["answer"] for r in check_results(run.path / "predictions.json", QS)}
    assert out[3] == ""
    assert run.metrics["failed"] == 1
    assert (
        run.metrics["acc"]
        == pytest.approx(run.frame("predictions.parquet").query("question_id != 3").vqa_acc_score.mean())
    )

@given(
    st.lists(st.integers(0, 10**9), min_size=1, max_size=8, unique=True), st.integers(0, 7), st.integers(0, 5)
)
@settings(max_examples=60)
def test_the_format_checker_finds_every_fault(ids, at, fault):
    good = [dict(question_id=q, answer=f"a{q}") for q in ids]
    i = at % len(ids)
    assert check_results(good, ids[::-1]) == good
    bad = [dict(r) for r in good]
    if fault == 0: bad.pop(i)
    elif fault == 1: bad.append(dict(bad[i]))
    elif fault == 2: bad[i]["question_id"] = str(ids[i])
    elif fault == 3: bad[i]["answer"] = None
    elif fault == 4: bad[i]["score"] = 1
    else: bad.append(dict(question_id=max(ids) + 1, answer=""))
    with pytest.raises(ValueError): check_results(bad, ids)

def test_results_survive_the_file(tmp_path):
    f = write_results(tmp_path / "r.json", {np.int64(2): "naïve “quote”", 1: ""}, [1, 2])
    assert (
        check_results(f, [1, 2])
        == json.loads(f.read_text(encoding="utf8"))
        == [dict(question_id=1, answer=""), dict(question_id=2, answer="naïve “quote”")]
    )
    with pytest.raises(ValueError, match=r"1 questions have no answer, first \[3\]"):
        write_results(tmp_path / "x.json", {1: "a"}, [1, 3])
    assert not (tmp_path/"x.json").exists()
