"Picking, reranking, predicting: against brute force, with failures and interruptions, and in the official format"
import copy, json, math
from dataclasses import fields
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import get_args
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from leverplus.core import rng
from leverplus.embed import EmbedStore
from leverplus.evidence import READS, BankStore, n_evidence
from leverplus.infer import (
    GROUP_COLUMNS, PICKERS, PREDICTION_COLUMNS, TRUTH, OwnAnswer, Unanswered, adaptive_shots, candidates,
    check_picks, check_results, confidence, export_groups, kind_of, pick, pick_fixed, pick_mmr, pick_model,
    plan_prediction, predict, rerank, write_results,
)
from leverplus.items import as_id, as_items
from leverplus.picker import PICK_COLUMNS, export_rows, read_export
from leverplus.pools import check_pool, make_pool
from leverplus.runs import Busy, Run
from leverplus.settings import Asking, PickerName, Picking, change, read_settings
from leverplus.groups import OtherContents, RLData
from leverplus.rldata_generate import run_lock, shard_queries
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

TRIED = pd.DataFrame([
    dict(
        question_id=q, pointer=(d,), gen_method="random", vqa_acc_score=float(d % 2), vqa_gt_prob=.5,
        vqa_correct=d % 2, eval_failed=False,
    )
    for q in QS[:4] for d in POOL[q]
])
GROUPS = RLData(TRIED, POOL)

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

@pytest.mark.parametrize("search,S", [("beam", 1), ("beam", 2), ("samples", 2)])
def test_candidates_are_the_best_or_fair_draws_whatever_the_batch(search, S):
    prior = SimilarityPrior(4.0)
    got = candidates(prior, POOL, STORE, S, 200, search)
    for q, g in got.groupby("question_id"): # wide enough: everything, each once, with its probability
        assert set(g.pointer) == set(permutations(POOL[q], S))
        assert len(g) == math.perm(len(POOL[q]), S)
        assert g["rank"].tolist() == list(range(len(g)))
        assert np.exp(g.logp).sum() == pytest.approx(1)
        assert search == "samples" or (np.diff(g.logp) <= 1e-12).all()
    few = candidates(prior, POOL, STORE, S, 3, search)
    part = candidates(prior, POOL.only([7, 2]), STORE, S, 3, search, bs=1)
    assert len(few) == 30
    assert part[part.question_id == 2].pointer.tolist() == few[few.question_id == 2].pointer.tolist()
    if search == "samples": # first draws follow the policy
        one = Pool({0: (100, 101, 102)}, {})
        p = candidates(prior, one, STORE, 1, 3).set_index("pointer").logp.map(math.exp)
        n = pd.Series(
            [candidates(prior, one, STORE, 1, 1, search, seed=s).pointer[0] for s in range(400)]
        ).value_counts(normalize=True)
        assert all(abs(n.get(k, 0) - v) < 4*math.sqrt(v*(1 - v)/400) for k, v in p.items())

def test_selectors_with_stop_may_show_fewer():
    m = PointerSelector(STORE.dim("mixed"), d_hidden=8, max_shots=3, stop=True)
    with torch.no_grad(): m.stop.bias.copy_(torch.tensor([-20., -20., 20.]))
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
    every = candidates(m, Pool({0: (100, 101)}, {}), STORE, None, 9)   # nothing, one, and two in both orders
    assert set(every.pointer) == {(), (100,), (101,), (100, 101), (101, 100)}
    with torch.no_grad(): m.stop.bias.fill_(20.)   # nothing at all
    assert set(pick_model(m, POOL, STORE, None).pointer) == {()}
    with pytest.raises(ValueError, match="no STOP"): pick_model(MODEL, POOL, STORE, None)

def test_vectors_of_another_encoder_are_refused(tmp_path):
    "Two CLIPs may give vectors of one width: the checkpoint says whose it was trained on"
    def of_clip(name):
        store = copy.copy(STORE)
        store.meta = dict(STORE.meta, source=dict(clip=name))
        return store
    m = PointerSelector(STORE.dim("mixed"), d_hidden=8)
    m.info = dict(encoder="aaaa")
    mine, other = of_clip("aaaa"), of_clip("bbbb")
    want = pick_model(m, POOL, mine, 2)
    assert pick_model(m, POOL, STORE, 2).equals(want)   # nobody knows whose vectors these are
    for f in (
        lambda: pick_model(m, POOL, other, 2),
        lambda: candidates(m, POOL, other, 2),
        lambda: predict(tmp_path/"run", POOL, ITEMS, Says(), other, Picking(), model=m, progress=False),
    ):
        with pytest.raises(ValueError, match="vectors of CLIP aaaa, these are of CLIP bbbb: take the embedder"): f()
    assert not (tmp_path/"run").exists()
    m.save_pretrained(tmp_path/"ckpt")
    kept = PointerSelector.from_pretrained(tmp_path/"ckpt")
    with pytest.raises(ValueError, match="CLIP aaaa"): pick_model(kept, POOL, other, 2)
    kept.info.pop("encoder")                            # told
    assert pick_model(kept, POOL, other, 2).equals(want)

def test_foreign_pools_and_self_shown_queries_are_refused(tmp_path):
    m = PointerSelector(STORE.dim("mixed"), d_hidden=8)
    m.info = {"pool": dict(POOL.rule, sampler="text")}
    for f in (
        lambda **kw: pick_model(m, POOL, STORE, 2, **kw),
        lambda **kw: candidates(m, POOL, STORE, 2, **kw),
        lambda **kw: predict(
            tmp_path / "run", POOL, ITEMS, Says(), STORE, Picking(**kw), model=m, progress=False
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
    "picker,kw",
    [(p, {}) for p in PICKERS if p not in ("beam", "samples", "fixed", "knn_facts", "logistic")]
    + [
        ("beam", dict(by="vote")), ("samples", dict(by="confidence")), ("beam", dict(by="vqa_gt_prob")),
        ("greedy", dict(shots=(0, 1, 2), threshold=0.2))
    ],
)
def test_predictions_are_official_and_complete(tmp_path, picker, kw):
    picking = Picking(picker=picker, **kw)
    run = predict(tmp_path/"run", POOL, ITEMS, Says(), STORE, picking, model=MODEL, progress=False)
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
    sure = Picking(picker="beam", by="confidence")
    go = lambda path, s, picking=sure: predict(
        tmp_path/path, POOL, ITEMS, s, STORE, picking, model=MODEL, window=4, progress=False
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
    with pytest.raises(ValueError, match="width: 5 there, 7 now"): go("cut", rest, change(sure, width=7))

def test_failures_are_named_then_asked_again(tmp_path):
    two = Picking(picker="random")
    go = lambda s, **kw: predict(tmp_path/"run", POOL, ITEMS, s, picking=two, progress=False, **kw)
    with pytest.raises(ValueError, match=r"2 questions have no answer, first \[3, 8\]"):
        go(Says(fails=[3, 8]))
    s = Says()
    run = go(s)
    assert {q for q, *_ in s.asked} == {3, 8} and run.metrics["failed"] == 0
    run = predict(tmp_path/"blank", POOL, ITEMS, Says(fails=[3]), picking=two, progress=False, blank=True)
    out = {r["question_id"]: r["answer"] for r in check_results(run.path / "predictions.json", QS)}
    assert out[3] == ""
    assert run.metrics["failed"] == 1
    assert (
        run.metrics["acc"]
        == pytest.approx(run.frame("predictions.parquet").query("question_id != 3").vqa_acc_score.mean())
    )

# ---- settings ----------------------------------------------------------------------------------------------

OTHERS = dict(
    picker="beam", shots=(1, 2), width=3, temp=2., by="vote", weight="confidence", threshold=.5, fixed=(100,),
    name="mine", kind="mixed", other_pool=True, seed=4,
)

def test_settings_lie_in_the_run_as_they_are_and_come_back(tmp_path):
    assert set(OTHERS) == {f.name for f in fields(Picking)}
    picking = Picking(**OTHERS)
    asking = Asking(style="chat", evaluator="lmms", answer_weight="count3")
    run = predict(
        tmp_path/"run", POOL, ITEMS, Says(), STORE, picking, asking, model=MODEL, split="dev", progress=False
    )
    kept = Run(tmp_path/"run")
    assert read_settings(Picking, kept.settings["picking"]) == picking
    assert read_settings(Asking, kept.settings["asking"]) == asking
    assert (kept.settings["split"], kept.settings["label"], kept.seed) == ("dev", "mine", 4)
    again = predict(
        tmp_path/"run", POOL, ITEMS, Says(stop=0), STORE, read_settings(Picking, kept.settings["picking"]),
        read_settings(Asking, kept.settings["asking"]), model=MODEL, split="dev", progress=False,
    )
    assert again.metrics == run.metrics

@pytest.mark.parametrize("name", sorted(OTHERS))
def test_every_setting_tells_runs_apart(tmp_path, name):
    def go(picking):
        return predict(tmp_path/"run", POOL, ITEMS, Says(), STORE, picking, model=MODEL, progress=False)
    go(Picking())
    with pytest.raises(ValueError, match=name): go(Picking(**{name: OTHERS[name]}))

def test_the_names_of_pickers_are_those_of_the_settings():
    assert PICKERS == get_args(PickerName)
    for picker in PICKERS:
        picks = pick(POOL, Picking(picker=picker, fixed=(129,)), MODEL, STORE, ITEMS, groups=GROUPS)
        assert set(picks.question_id) == set(QS)

def test_rules_that_learn_ask_for_groups_and_record_them(tmp_path):
    for picker in ("knn_facts", "logistic"):
        picking = Picking(picker=picker)
        with pytest.raises(ValueError, match="pass groups="): pick(POOL, picking, None, STORE, ITEMS)
        def go(name, groups): return predict(
            tmp_path/name, POOL, ITEMS, Says(), STORE, picking, groups=groups, progress=False)
        with pytest.raises(ValueError, match="pass groups="): go(picker, None)
        run = go(picker, GROUPS)
        assert run.fingerprints["groups"] == GROUPS.fingerprint
        other = RLData(GROUPS.rows.iloc[1:], GROUPS.pool)
        with pytest.raises(ValueError, match="groups"): go(picker, other)
    with pytest.raises(ValueError, match="looks at answers"): pick(POOL, Picking(picker="vote"), None, STORE)

def test_the_nearest_comes_first_or_last():
    for kind in ("image", "text", "mixed"):
        last = pick(POOL, Picking(picker=f"similar_{kind}", shots=(3,)), None, STORE).pointer
        first = pick(POOL, Picking(picker=f"similar_{kind}_first", shots=(3,)), None, STORE).pointer
        assert [p[::-1] for p in last] == list(first)

def test_a_selector_may_show_nothing(tmp_path):
    "shots 'stop': a row per question, with zero to max_shots demonstrations, asked and written like any other"
    free = PointerSelector(STORE.dim("mixed"), d_hidden=8, max_shots=2, stop=True)
    torch.manual_seed(3)
    with torch.no_grad(): free.stop.weight.normal_()
    run = predict(tmp_path/"run", POOL, ITEMS, Says(), STORE, Picking(shots="stop"), model=free, progress=False)
    f = run.frame("predictions.parquet")
    lengths = set(f.pointer.map(len))
    assert {0} < lengths <= {0, 1, 2} and (f.shots == 2).all()
    assert f.pointer.map(tuple).tolist() == pick_model(free, POOL, STORE, None).pointer.tolist()
    assert [len(d) for d in f.demo_answers] == [len(p) for p in f.pointer]
    several = candidates(free, POOL, STORE, None, width=500)
    for q, found in several.groupby("question_id"):
        k = len(POOL[q])
        assert len(found) == 1 + k + k*(k - 1) and len(set(found.pointer)) == len(found)
        assert np.exp(found.logp).sum() == pytest.approx(1, abs=1e-5)

def test_a_given_name_wins(tmp_path):
    def label(**kw):
        picking = Picking(**kw)
        path = tmp_path/str(hash(picking))
        run = predict(path, POOL, ITEMS, Says(), STORE, picking, model=MODEL, progress=False)
        assert set(run.frame("predictions.parquet").selector) == {run.settings["label"]}
        return run.settings["label"]
    assert label() == "greedy"
    assert label(picker="beam", by="vote") == "beam+vote"
    assert label(shots=(1, 2)) == "greedy+adaptive"
    assert label(picker="beam", by="vote", name="mine") == "mine"

def test_a_judge_has_a_name_and_sees_no_truth(tmp_path):
    seen = []
    def last(rows):
        seen.extend(rows)
        return rows["rank"]
    def go(path, picking=Picking(picker="beam"), **kw):
        return predict(tmp_path/path, POOL, ITEMS, Says(), STORE, picking, model=MODEL, progress=False, **kw)
    run = go("run", judge=last)
    every = run.frame("candidates.parquet")
    kept = run.frame("predictions.parquet")
    assert (run.settings["judge"], run.settings["label"]) == ("last", "beam+last")
    assert not set(TRUTH) & set(seen)
    assert kept["rank"].tolist() == every.groupby("question_id")["rank"].max().loc[kept.question_id].tolist()
    with pytest.raises(ValueError, match="judge: 'last' there, None now"): go("run")
    for judge in (lambda rows: rows.logp, "vote", object()):
        with pytest.raises(ValueError, match="a function with a name"): go("x", judge=judge)
    with pytest.raises(ValueError, match="one of them decides"): go("x", VOTE, judge=last)
    assert not (tmp_path/"x").exists()

def test_shots_are_one_number_several_or_the_selectors_own(tmp_path):
    stopper = PointerSelector(STORE.dim("mixed"), d_hidden=8, max_shots=3, stop=True)
    with torch.no_grad(): stopper.stop.bias.copy_(torch.tensor([-20., -20., 20.]))
    def shown(model, picking, path):
        run = predict(tmp_path/path, POOL, ITEMS, Says(), STORE, picking, model=model, progress=False)
        frame = run.frame("predictions.parquet")
        return set(frame.pointer.map(len)), set(frame.shots)
    assert shown(stopper, Picking(shots="stop"), "stop") == ({2}, {3})
    assert shown(stopper, Picking(shots=3), "three") == ({3}, {3})
    assert shown(None, Picking(picker="zero_shot"), "none") == ({0}, {0})
    assert shown(None, Picking(shots=0), "greedy none") == ({0}, {0})
    assert shown(None, Picking(picker="fixed", fixed=(120, 121, 122), seed=1), "fixed")[1] == {3}
    for picking, wanted in (
        (Picking(shots="stop"), "no STOP"),
        (Picking(picker="mmr", shots="stop"), "wants a number"),
        (Picking(picker="fixed"), "needs question_ids"),
    ):
        with pytest.raises(ValueError, match=wanted): shown(MODEL, picking, "x")
    assert not (tmp_path/"x").exists()
    with pytest.raises(ValueError, match="needs a model and a store"): shown(None, Picking(), "x")
    several = Picking(shots=(1, 2))
    with pytest.raises(ValueError, match="chooses among several"): pick(POOL, several, MODEL, STORE)

def test_embeddings_are_read_as_the_selector_was_trained():
    m = PointerSelector(STORE.dim("text"), d_hidden=8)
    m.info = dict(kind="text")
    assert [kind_of(m), kind_of(m, "image"), kind_of(None), kind_of(MODEL)] == ["text", "image", "mixed", "mixed"]
    told = pick_model(m, POOL, STORE, 2, "text")
    assert pick(POOL, Picking(), m, STORE).pointer.tolist() == told.pointer.tolist()
    near = pick(POOL, Picking(picker="mmr", kind="image"), None, STORE)
    assert near.pointer.tolist() == pick_mmr(POOL, STORE, 2, "image").pointer.tolist()

# ---- shards ------------------------------------------------------------------------------------------------

VOTE = Picking(picker="beam", width=3, by="vote")

def part(path, shard, scorer=None, picking=VOTE, **kw):
    return predict(
        path, POOL, ITEMS, scorer or Says(), STORE, picking, model=MODEL, shard=shard, progress=False, **kw
    )

SURE = Picking(shots=(0, 1, 2), threshold=.2)

@pytest.mark.parametrize("picking,n", [(VOTE, 2), (VOTE, 4), (VOTE, 20), (SURE, 2), (SURE, 20), (Picking(), 4)])
def test_shards_make_the_whole(tmp_path, picking, n):
    go = partial(part, picking=picking)
    whole = go(tmp_path/"whole", None)
    assert whole.left == ()
    assert whole.sentence() == f"questions 10, failed 0, accuracy {whole.metrics['acc']:.4f} (test)"
    runs = [go(tmp_path/"union", (i, n)) for i in range(n)]
    real = [f"{i}/{n}" for i in range(n) if (tmp_path/"union"/f"shard-{i:03d}of{n:03d}").exists()]
    assert runs[0].left == tuple(name for name in real if name != f"0/{n}")
    assert runs[0].sentence() == f"shard 0/{n} is done; still to come: {', '.join(runs[0].left)}"
    union = runs[-1]
    assert union.path == tmp_path/"union"
    assert union.metrics == whole.metrics
    assert union.settings == whole.settings | dict(shards=n)
    assert union.fingerprints == whole.fingerprints
    tables = [name for name in whole.files() if name.endswith(".parquet")]
    assert ("candidates.parquet" in tables) == (picking != Picking())
    for name in tables: pd.testing.assert_frame_equal(union.frame(name), whole.frame(name))
    written = [(run.path/"predictions.json").read_bytes() for run in (union, whole)]
    assert written[0] == written[1]
    # again: nothing is asked
    assert go(tmp_path/"union", (1, n), Says(stop=0)).metrics == whole.metrics

def album(folder):
    "Items whose pictures are files"
    folder.mkdir()
    for i in ITEMS.index: (folder/f"{i}.jpg").write_bytes(f"picture {i}".encode())
    return ITEMS.assign(image_path=[str(folder/f"{i}.jpg") for i in ITEMS.index])

@pytest.mark.parametrize("shard", [None, (0, 2)])
def test_a_prediction_is_not_continued_with_other_pictures(tmp_path, shard):
    items = album(tmp_path/"a")
    def go(scorer, items=items, **kw):
        return predict(tmp_path/"run", POOL, items, scorer, STORE, VOTE, model=MODEL, shard=shard, window=4,
                       progress=False, **kw)
    with pytest.raises(KeyboardInterrupt): go(Says(stop=9))
    shown = sorted({d for q in shard_queries(POOL, shard) for d in POOL[q]})
    one = shown[0]
    (tmp_path/"a"/f"{one}.jpg").write_bytes(b"another picture")
    with pytest.raises(OtherContents, match=f"the pictures of question_id {one} .1 of "): go(Says())
    (tmp_path/"a"/f"{one}.jpg").write_bytes(f"picture {one}".encode())
    first = shard_queries(POOL, shard)[0]
    reworded = items.assign(answer=items.answer.where(items.index != first, "hat"))
    with pytest.raises(OtherContents, match=f"question or answers of question_id {first} "): go(Says(), reworded)
    done = go(Says())
    (tmp_path/"a"/f"{one}.jpg").write_bytes(b"another picture")
    with pytest.raises(OtherContents): go(Says())
    again = go(Says(), overwrite=True)                                     # begun anew: all is asked
    assert again.sentence() == done.sentence()
    (tmp_path/"run"/"contents.parquet").unlink()
    with pytest.raises(OtherContents, match="no contents.parquet"): go(Says())

def test_a_finished_shard_is_joined_with_its_own_pictures_only(tmp_path):
    items = album(tmp_path/"a")
    def go(i):
        return predict(tmp_path/"run", POOL, items, Says(), STORE, VOTE, model=MODEL, shard=(i, 2), progress=False)
    first, second = (shard_queries(POOL, (i, 2)) for i in range(2))
    go(0)
    own = first[0]                                                         # a question of the finished shard alone
    (tmp_path/"a"/f"{own}.jpg").write_bytes(b"another picture")
    with pytest.raises(OtherContents, match=f"the pictures of question_id {own} "): go(1)
    (tmp_path/"a"/f"{own}.jpg").write_bytes(f"picture {own}".encode())
    assert go(1).left == ()

def test_other_shards_other_settings_and_other_models_are_refused(tmp_path):
    part(tmp_path/"run", (0, 2))
    with pytest.raises(ValueError, match="shards: 2 there, 3 now"): part(tmp_path/"run", (0, 3))
    wider = change(VOTE, width=5)
    with pytest.raises(ValueError, match="width: 3 there, 5 now"): part(tmp_path/"run", (1, 2), None, wider)
    with pytest.raises(ValueError, match="fingerprint of scorer"): part(tmp_path/"run", (1, 2), MockScorer())
    for shard in ((2, 2), (0, 0), "1/2"):
        with pytest.raises(ValueError, match="shard"): part(tmp_path/"x", shard)
    assert not (tmp_path/"x").exists()
    assert part(tmp_path/"run", (0, 3), overwrite=True).left == ("1/3", "2/3")
    assert not (tmp_path/"run"/"shard-000of002"/"settings.json").exists()

def test_a_shard_that_fails_is_still_to_come(tmp_path):
    part(tmp_path/"run", (0, 2))
    done = Run(tmp_path/"run"/"shard-000of002").frame("predictions.parquet").question_id.tolist()
    q = next(q for q in QS if q not in done)
    with pytest.raises(Unanswered, match=rf"1 questions have no answer, first \[{q}\]"):
        part(tmp_path/"run", (1, 2), Says(fails=[q]))
    assert part(tmp_path/"run", (0, 2), Says(stop=0)).left == ("1/2",)
    assert not (tmp_path/"run"/"predictions.json").exists()
    blank = part(tmp_path/"run", (1, 2), Says(fails=[q]), blank=True)
    out = {r["question_id"]: r["answer"] for r in check_results(blank.path/"predictions.json", QS)}
    assert (out[q], blank.metrics["failed"]) == ("", 1)

def test_nobody_else_writes_the_same_prediction(tmp_path):
    with run_lock(tmp_path/"run"):
        with pytest.raises(Busy): part(tmp_path/"run", None)
    part(tmp_path/"union", (0, 2))
    with run_lock(tmp_path/"union"/"shard-001of002"):
        with pytest.raises(Busy): part(tmp_path/"union", (1, 2))

# ---- costs -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("picking", [VOTE, SURE, Picking(), Picking(picker="samples", weight="confidence", by="vote")])
def test_the_plan_is_kept(tmp_path, picking):
    plan = plan_prediction(picking, len(QS))
    scorer = Says()
    run = part(tmp_path/"run", None, scorer, picking)
    texts = [generate for *_, generate in scorer.asked]
    assert run.metrics["prompts"] <= plan["answers"] == len(QS)*plan["sequences"]
    assert sum(texts) == run.metrics["prompts"]
    assert len(texts) - sum(texts) <= plan["scorings"] <= plan["prompts"] - plan["answers"]
    assert (plan["scorings"] > 0) == (len(texts) > sum(texts))

# ---- results -----------------------------------------------------------------------------------------------

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

def test_results_have_the_ids_that_came_in(tmp_path):
    "A server looks for the ids of its questions file: texts where they were texts, '17' too"
    items = pd.DataFrame(dict(question_id=["22MexNk", "17", ("coco", 3), "e\u0301"]))
    ids = as_items(items).index
    wanted = {"22MexNk": "cat", "17": "dog", "('coco', 3)": "", "e\u0301": "é"}
    said = dict(zip(ids, wanted.values()))
    file = write_results(tmp_path/"r.json", said, ids, items=items)
    assert {r["question_id"]: r["answer"] for r in json.loads(file.read_text(encoding="utf8"))} == wanted
    assert check_results(file, items.question_id, items) == json.loads(file.read_text(encoding="utf8"))
    with pytest.raises(ValueError, match="wanted an integer question_id"): check_results(file, ids)
    with pytest.raises(Unanswered, match=r"1 questions have no answer, first \['17'\]"):
        write_results(tmp_path/"x.json", {q: a for q, a in said.items() if q != 17}, ids, items=items)
    odd = [dict(question_id="other", answer=""), *json.loads(file.read_text(encoding="utf8"))]
    with pytest.raises(ValueError, match=r"1 answers to questions that were not asked, first \['other'\]"):
        check_results(odd, ids, items)
    numbers = as_items(pd.DataFrame(dict(question_id=[2, 1])))
    file = write_results(tmp_path/"n.json", {1: "a", "2": "b"}, [1, 2], items=numbers)
    assert check_results(file, [1, 2]) == [dict(question_id=1, answer="a"), dict(question_id=2, answer="b")]

def test_shards_have_the_ids_that_came_in(tmp_path):
    names = list("abcdef")
    texts = dict(question="what?", answer="dax", answers=[["dax"]*10]*6)
    items = pd.DataFrame(dict(question_id=names, image_id=range(6), image_path=None) | texts)
    pool = make_pool(items, items, 3)
    how = dict(picking=Picking(picker="random", shots=(2,)), progress=False)
    whole = predict(tmp_path/"whole", pool, items, MockScorer(), **how)
    for i in range(2): union = predict(tmp_path/"union", pool, items, MockScorer(), shard=(i, 2), **how)
    told = check_results(union.path/"predictions.json", names, items)
    assert told == check_results(whole.path/"predictions.json", names, items)
    assert {r["question_id"] for r in told} == set(names)

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

# ---- questions that nobody has answered ----------------------------------------------------------------------

SECRET = ITEMS.assign(answers=[[] if q in QS else said for q, said in zip(IDS, ITEMS.answers)],
                      answer=[None if q in QS else said for q, said in zip(IDS, ITEMS.answer)])

@pytest.mark.parametrize("picking", [
    Picking(picker="random"), Picking(picker="zero_shot"), Picking(picker="vote"), Picking(picker="beam", by="vote"),
    Picking(picker="beam", by="confidence"), Picking(shots=(0, 1, 2), threshold=.6),
    Picking(picker="logistic", shots=(1,)), Picking(picker="knn_facts", shots=(1,)),
], ids=lambda p: f"{p.picker}-{p.by}-{p.shots}")
def test_they_are_answered_like_others_and_not_judged(picking, tmp_path):
    how = dict(picking=picking, model=MODEL, groups=GROUPS, progress=False)
    known = predict(tmp_path/"known", POOL, ITEMS, Says(), STORE, **how)
    open_one = predict(tmp_path/"open", POOL, SECRET, Says(), STORE, **how)
    said = json.loads((open_one.path/"predictions.json").read_text())
    assert said == json.loads((known.path/"predictions.json").read_text()) and len(said) == len(QS)
    rows = open_one.frame("predictions.parquet")
    for column in ("vqa_acc_score", "vqa_correct", "vqa_gt_prob", "vqa_rel_score", "vqa_eval_mode"):
        assert rows[column].isna().all(), column
    assert not rows.eval_failed.any() and all(len(said) == 0 for said in rows.answers)
    assert open_one.metrics == dict(n=10, failed=0, prompts=known.metrics["prompts"], unlabelled=10)
    assert "no accuracy, as nobody has answered them" in open_one.sentence()
    again = Says()
    assert predict(tmp_path/"open", POOL, SECRET, again, STORE, **how).metrics == open_one.metrics
    assert again.asked == []   # the facts are found, though nobody judged them

def test_who_reads_evidence_picks_for_them_alike():
    "What the bank says is what its own people say; the answers of questions are not looked at"
    banks = [BankStore(STORE, items, list(DEMOS)) for items in (ITEMS, SECRET)]
    F = n_evidence("mixed+answers")
    model = PointerSelector(STORE.dim("mixed") + F, d_hidden=8, n_evidence=F, reads=READS)
    known, open_ones = (pick_model(model, POOL, bank, 2) for bank in banks)
    pd.testing.assert_frame_equal(known, open_ones)
    assert banks[0].evidence.fingerprint == banks[1].evidence.fingerprint
    with pytest.raises(ValueError, match="Evidence, items, question_id 0: answer is n"):
        BankStore(STORE, SECRET.assign(answer=SECRET.answer.where(SECRET.answer.notna(), np.nan)), IDS)

def test_accuracy_is_of_those_that_have_answers(tmp_path):
    some = ITEMS.assign(answers=[[] if q < 4 else said for q, said in zip(IDS, ITEMS.answers)])
    how = dict(picking=Picking(picker="random"), progress=False)
    run = predict(tmp_path/"some", POOL, some, Says(), **how)
    whole = predict(tmp_path/"whole", POOL, ITEMS, Says(), **how).frame("predictions.parquet")
    assert run.metrics["acc"] == whole.vqa_acc_score[whole.question_id >= 4].mean() and run.metrics["unlabelled"] == 4
    assert "of the 6 that people have answered" in run.sentence()
    for i in range(2): union = predict(tmp_path/"union", POOL, some, Says(), shard=(i, 2), **how)
    assert union.metrics == run.metrics

def test_what_judges_says_that_nobody_has_answered():
    "Rewards, groups, comparisons; and who wants a probability alone is not asked"
    from leverplus.evaluate import check_facts
    from leverplus.rewards import reward
    pairs = pd.DataFrame([dict(question_id=q, pointer=(d,)) for q in QS for d in POOL[q]])
    facts = ask(pairs, Says(), SECRET).assign(gen_method="random")
    says = "needs people's answers, and 10 of 10 questions have none, first 0"
    for mode in ("hard_plus_soft", "gtprob", "hard_only"):
        with pytest.raises(ValueError, match=f"reward '{mode}' {says}"): reward(facts, mode)
    with pytest.raises(ValueError, match=says): RLData.from_frame(facts, POOL)
    with pytest.raises(ValueError, match=says): check_facts(facts)
    scorer = Says()
    with pytest.raises(ValueError, match=f"a probability {says}"): ask(pairs, scorer, SECRET, generate=False)
    assert scorer.asked == []
    mixed = pd.concat([ask(pairs, Says(), ITEMS)[5:], facts[:5]])
    with pytest.raises(ValueError, match="and [12] of 10 questions have none, first 0"): reward(mixed)

def test_no_table_is_made_over_questions_without_answers(tmp_path):
    "Not of all of them, and not silently of those that have some"
    from leverplus.evaluate import compare_runs, paired_tests, result_table
    some = ITEMS.assign(answers=[[] if q < 4 else said for q, said in zip(IDS, ITEMS.answers)])
    for n, items in dict(secret=SECRET, some=some).items():
        runs = [predict(tmp_path/n/picker, POOL, items, Says(), STORE, Picking(picker=picker), progress=False)
                for picker in ("random", "similar_mixed")]
        rows = pd.concat([run.frame("predictions.parquet") for run in runs])
        says = f"a table needs people's answers, and {10 if n == 'secret' else 4} of 10 questions have none"
        with pytest.raises(ValueError, match=says): compare_runs(*runs)
        with pytest.raises(ValueError, match=says): paired_tests(rows, None, [("random", "similar_mixed")])
        with pytest.raises(ValueError, match=says): result_table(rows, None, None, None, None)
    judged = rows[rows.question_id >= 4]
    assert paired_tests(judged, None, [("random", "similar_mixed")]).n.tolist() == [6]

def test_nothing_that_needs_the_truth_may_choose(tmp_path):
    oracle = Picking(picker="beam", by="vqa_gt_prob")
    with pytest.raises(ValueError, match="choosing by vqa_gt_prob needs people's answers, and 10 of 10 questions"):
        predict(tmp_path/"x", POOL, SECRET, Says(), STORE, oracle, model=MODEL)
    assert not (tmp_path/"x").exists()

@pytest.mark.parametrize("scorer", ["naive", "shared"])
def test_the_model_says_the_same_to_a_question_without_answers(scorer, tmp_path):
    from leverplus.core import repo_path
    from leverplus.data import read_okvqa
    from leverplus.lvlm import NaiveScorer, load_lvlm
    from leverplus.scorer import SharedScorer
    lvlm = load_lvlm("models/tiny-qwen2.5-vl")
    ask_it = NaiveScorer(lvlm) if scorer == "naive" else SharedScorer(lvlm)
    folder = repo_path("data", "islands")
    dev, train = (read_okvqa(folder, s, images=folder/"images").iloc[:8] for s in ("dev", "train"))
    pairs = pd.DataFrame(dict(question_id=dev.index, pointer=[tuple(train.index[:i % 3]) for i in range(8)]))
    known = ask(pairs, ask_it, pd.concat([dev, train]))
    open_ones = ask(pairs, ask_it, pd.concat([dev.drop(columns=["answers", "answer"]), train]))
    assert open_ones.vqa_raw_generation.tolist() == known.vqa_raw_generation.tolist()
    assert open_ones.vqa_gt_prob.isna().all() and not open_ones.eval_failed.any()
    mixed = ask(pairs, ask_it, pd.concat([dev.assign(answers=[*dev.answers[:4], [], [], [], []]), train]))
    pd.testing.assert_frame_equal(mixed[:4].drop(columns="content"), known[:4].drop(columns="content"))
    assert mixed.vqa_acc_score[4:].isna().all() and mixed.vqa_pred_answer.tolist() == known.vqa_pred_answer.tolist()

# ---- files for others ----------------------------------------------------------------------------------------

TABLES = Path(__file__).parent/"tables"
FILES = dict(picks=PICK_COLUMNS, predictions=PREDICTION_COLUMNS, groups=GROUP_COLUMNS)

@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", FILES)
def test_files_of_this_version_are_read_for_ever(name, ending):
    "Names, order and kinds: who reads them is not asked"
    told = read_export(TABLES/f"{name}.{ending}")
    assert list(told.columns) == list(FILES[name]) and len(told) == 2
    kinds = dict(
        id=(int, str), int=int, number=float, text=str, flag=bool, ids=list, ints=list, numbers=list, texts=list)
    for column, what in FILES[name].items():
        for value in told[column]:
            missing = value is None or (isinstance(value, float) and math.isnan(value))
            assert missing or isinstance(value, kinds[what.kind]), (column, value)
    assert told.question_id.tolist() == ["q 0", "q 1"] and told.ids.map(list).tolist()[0][0] == "demo 1"
    assert as_items(told[["question_id"]]).index.tolist() == [as_id("q 0"), as_id("q 1")]

def test_what_is_written_now_is_what_was_written(tmp_path):
    for name, columns in FILES.items():
        for ending in ("jsonl", "parquet"):
            told = read_export(TABLES/f"{name}.{ending}")
            again = export_rows(tmp_path/f"{name}.{ending}", told, columns)
            pd.testing.assert_frame_equal(read_export(again), told)
            if ending == "jsonl": assert again.read_text() == (TABLES/f"{name}.jsonl").read_text()

def exported(folder):
    "A prediction and groups about items whose ids are texts, one question of which has no answers"
    names = ["q 0", "q 1", *(f"demo {i}" for i in range(1, 5))]
    items = as_items(pd.DataFrame(dict(
        question_id=names, image_id=range(6), question=[f"what is {n}?" for n in names],
        answer=["dax", None, "a", "b", "c", "d"], answers=[["dax"]*10, [], *([x]*10 for x in "abcd")])))
    pool = Pool({items.index[i]: tuple(items.index[2:].tolist()) for i in (0, 1)}, {"sampler": "random", "K": 4})
    same = Picking(picker="fixed", fixed=tuple(items.index[2:4].tolist()))
    run = predict(folder/"run", pool, items, Says(), picking=same, progress=False)
    rows = [dict(question_id=q, pointer=p[:2], gen_method="random") for q, p in pool.ids.items()]
    return run, RLData(ask(pd.DataFrame(rows), Says(), items).assign(gen_method="random"), pool), items

@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_predictions_and_groups_go_out_with_the_ids_that_came_in(ending, tmp_path):
    run, data, items = exported(tmp_path)
    told = read_export(run.export(tmp_path/f"p.{ending}"))
    assert told.question_id.tolist() == ["q 0", "q 1"] and told.ids.tolist() == [["demo 1", "demo 2"]]*2
    assert told.demo_answers.tolist() == [["a", "b"]]*2 and told.answers.tolist() == [["dax"]*10, None]
    assert told.vqa_acc_score.isna().tolist() == [False, True] and told.vqa_pred_answer.notna().all()
    told = read_export(export_groups(tmp_path/f"g.{ending}", data, items))
    assert told.question_id.tolist() == ["q 0", "q 1"] and told.ids.tolist() == [["demo 1", "demo 2"]]*2
    assert told.pointer.map(tuple).tolist() == data.rows.pointer.tolist()
    numbers = read_export(export_groups(tmp_path/f"n.{ending}", data))
    assert numbers.question_id.tolist() == data.rows.question_id.tolist()
    assert numbers.ids.tolist() == numbers.pointer.tolist()
    for write in (run.export, lambda path: export_groups(path, data)):
        with pytest.raises(FileExistsError, match="overwrite=True"): write(tmp_path/f"p.{ending}")

def test_the_official_file_goes_out_whole(tmp_path):
    run, _, items = exported(tmp_path)
    assert check_results(run.export(tmp_path/"r.json"), ["q 0", "q 1"], items)
    with pytest.raises(FileExistsError, match="overwrite=True"): run.export(tmp_path/"r.json")
    assert run.export(tmp_path/"r.json", overwrite=True).read_bytes() == (run.path/"predictions.json").read_bytes()
    with pytest.raises(ValueError, match="ends in .jsonl or .parquet or .json"): run.export(tmp_path/"r.csv")
