"InfoScore beams: against brute force, through the cache, with failures, and through files"
import itertools, json
from dataclasses import replace
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from leverplus.core import repo_path, rng
from leverplus.dls import GroupDataset, GroupDL
from leverplus.embed import EmbedStore
from leverplus.groups import RLData
from leverplus.lvlm import MockScorer
from leverplus.pools import Pool
from leverplus.rldata_ask import FactCache, ask
from leverplus.earlier_infoscore import infoscore_beams, infoscores, truth_prob, write_beams
from leverplus.earlier_json import read_beams

WORDS = "cat dog car".split()
IDS = [*range(9), *range(100, 120)]
ITEMS = pd.DataFrame(
    [
        dict(
            question_id=i,
            image_id=i,
            image_path=f"{i}.png",
            question=f"What is {i}?",
            answers=[WORDS[i % 3]] * 7 + [WORDS[i // 3 % 3]] * 3,
            answer=WORDS[i % 3],
        )
        for i in IDS
    ],
    index=IDS,
)
POOL = Pool({q: rng("pool", q).choice(np.arange(100, 120), 4 + q % 3, replace=False) for q in range(9)})

class Counting:
    "MockScorer that counts prompts, spoils some, and breaks off after `stop`"
    def __init__(self, spoil=lambda s: s, stop=10**9):
        self.inner = MockScorer(0)
        self.spoil = spoil
        self.stop = stop
        self.asked = []
    @property
    def fingerprint(self): return self.inner.fingerprint
    def run(self, prompts, targets, generate=True, progress=False):
        if len(self.asked) >= self.stop: raise KeyboardInterrupt
        self.asked += [(p.question_id, tuple(p.pointer)) for p in prompts]
        return [self.spoil(s) for s in self.inner.run(prompts, targets, generate, progress)]

def search(scorer, **kw): return infoscore_beams(range(9), ITEMS, POOL, scorer, **dict(progress=False) | kw)
ALL = FactCache()
EVERY = ask(
    pd.DataFrame(
        [(q, p) for q in POOL for s in range(4) for p in itertools.permutations(POOL[q], s)],
        columns=["question_id", "pointer"],
    ),
    MockScorer(0),
    ITEMS,
    ALL,
)
PROB = dict(zip(zip(EVERY.question_id, EVERY.pointer), EVERY.vqa_gt_prob))

def by_hand(q, S, b, grow, order):
    "The same beam, one query at a time"
    beams = [()]
    for _ in range(S):
        new = {}
        for p in beams:
            for c in POOL[q]:
                if c in p: continue
                n = (c, *p) if grow == "left" else (*p, c)
                v = PROB[q, n] - PROB[q, () if order == "total" else p]
                new[n] = max(v, new.get(n, -9)) if order == "total" else v
        beams = sorted(new, key=new.get, reverse=True)[:b]
    return beams

@settings(max_examples=8)
@given(
    st.integers(1, 3),
    st.integers(1, 7),
    st.sampled_from(["left", "right"]),
    st.sampled_from(["total", "last"]),
)
def test_the_search_is_the_search_by_hand(S, b, grow, order):
    d = search(None, shots=S, beam=b, grow=grow, order=order, cache=ALL)
    assert d.queries == list(range(9))
    for q, g in d.groups():
        if S < 3 or order == "total": assert g.pointer.tolist() == by_hand(q, S, b, grow, order)
        assert g.beam_rank.tolist() == list(range(len(g)))
        assert len(g) == min(b, len(by_hand(q, S, b, grow, order)))
    total = [PROB[q, p] - PROB[q, ()] for q, p in zip(d.rows.question_id, d.rows.pointer)]
    steps = infoscores(d, ITEMS, None, ALL)
    # increments add up to what all add
    np.testing.assert_allclose([sum(s) if order == "last" else s[-1] for s in steps], total, atol=1e-12)
    assert all(len(s) == S for s in steps)

def test_a_beam_as_wide_as_the_pool_is_brute_force():
    d = search(None, beam=6, cache=ALL)
    for q, g in d.groups():
        best = sorted((PROB[q, p] for p in itertools.permutations(POOL[q], 2)), reverse=True)[:6]
        np.testing.assert_allclose(g.vqa_gt_prob, best)

@pytest.mark.parametrize("after", [1, 90])
def test_a_killed_search_goes_on(tmp_path, after):
    whole = Counting()
    want = search(whole, window=16, beam=2, text=True)
    n = len(whole.asked)
    first = Counting(stop=after)
    rest = Counting()
    with pytest.raises(KeyboardInterrupt):
        search(first, window=16, beam=2, text=True, cache=FactCache(tmp_path / "facts"))
    got = search(rest, window=16, beam=2, text=True, cache=FactCache(tmp_path/"facts"))
    assert got.rows.equals(want.rows)
    assert len(first.asked) + len(rest.asked) == n
    assert got.validate(ITEMS).rows.vqa_acc_score.notna().all()
    assert len(set(whole.asked)) == want.manifest["infoscore"]["prompts"]

def test_failures_are_not_negatives():
    bad = lambda s: replace(s, error="OSError", text=None, logprobs=(), gt_prob=float("nan"))
    spoil = lambda s: (
        bad(s)
        if (s.question_id == 3 and not s.pointer)
        or s.question_id == 5
        and len(s.pointer) == 2
        or s.question_id == 6
        and s.pointer[-1:] == (POOL[6][0],)
        else s
    )
    d = search(Counting(spoil), beam=3)
    assert d.manifest["infoscore"]["lost"] == [3, 5]
    assert set(d.queries) == set(range(9)) - {3, 5}
    assert set(d.pool) == set(d.queries)
    assert not d.rows.eval_failed.any()
    assert all(p[-1] != POOL[6][0] for p in d.rows.pointer[d.rows.question_id == 6])
    d.validate(ITEMS)

def test_round_trip_with_read_beams(tmp_path):
    for order in ("total", "last"):
        d = search(None, order=order, cache=ALL)
        s = infoscores(d, ITEMS, None, ALL)
        write_beams(tmp_path / "b.json", d, s)
        back = read_beams(tmp_path / "b.json", "question_id")
        assert back[["question_id", "pointer"]].equals(d.rows[["question_id", "pointer"]])
        assert back.shot_scores.tolist() == s
        assert back.beam_rank.tolist() == d.rows.beam_rank.tolist()
    with pytest.raises(ValueError, match="1 scores for"): write_beams(tmp_path/"c.json", d, s[:1])
    d.save(tmp_path / "d")
    again = RLData.load(tmp_path / "d")
    assert infoscores(again, ITEMS, None, ALL) == s

def test_which_truth():
    p = truth_prob(EVERY, "answer")
    assert np.allclose(p, [np.exp(l[0]) for l in EVERY.vqa_gt_logprobs])
    assert np.allclose(truth_prob(EVERY), EVERY.vqa_gt_prob)
    d = search(None, beam=6, prob="answer", cache=ALL)
    top = d.rows[d.rows.beam_rank == 0]
    best = pd.Series(p)[EVERY.pointer.map(len) == 2].groupby(EVERY.question_id).max()
    assert np.allclose(truth_prob(top, "answer"), best)
    slim = EVERY.drop(columns="vqa_gt_logprobs").assign(vqa_gt_logprobs=None)
    with pytest.raises(ValueError, match="stored without"): search(None, prob="answer", cache=slim)
    assert np.isnan(truth_prob(EVERY.assign(vqa_gt_prob=np.nan, eval_failed=True))).all()

def test_supervised_training_takes_them():
    from leverplus.synth import quiet
    from leverplus.learner import selector_learner
    from fastai.data.core import DataLoaders
    g = torch.Generator().manual_seed(0)
    store = EmbedStore(IDS, torch.randn(len(IDS), 6, generator=g), torch.randn(len(IDS), 6, generator=g))
    d = search(None, cache=ALL)
    ds = GroupDataset(d.rows, d.pool, store, [s[-1] for s in infoscores(d, ITEMS, None, ALL)])
    torch.manual_seed(0)
    learn = selector_learner(DataLoaders(GroupDL(ds, 9), GroupDL(ds, 9)), d_hidden=16, dropout=0.)
    with quiet(learn):
        before = learn.validate()[0]
        learn.fit_sft(12, 5e-2, watch=None)
        after = learn.validate()[0]
    assert after < .8*before

@pytest.mark.parametrize(
    "kw, says",
    [
        (dict(shots=4), "question_id 0: its pool has 4"),
        (dict(candidates=2), "2 candidates for 2 shots"),
        (dict(beam=0), "wanted a whole number >= 1"),
        (dict(grow="up"), "'left' or 'right'"),
        (dict(prob="p"), "'credit' or 'answer'"),
        (dict(cache=None), "pass a scorer"),
    ],
)
def test_refusals(kw, says):
    with pytest.raises(ValueError, match=says): search(None, **dict(cache=ALL) | kw)
    with pytest.raises(ValueError, match="2 queries, 1 of them"):
        infoscore_beams([1, 1], ITEMS, POOL, None, cache=ALL)

def test_the_embedded_world_needs_no_model():
    facts = FactCache(repo_path("data/islands", "facts.parquet"))
    f = facts.to_frame()
    ids = f.question_id.drop_duplicates()[:20].tolist()
    f = f[f.question_id.isin(ids)]
    pool = Pool(
        {
            q: g.pointer[g.pointer.map(len) == 1].map(lambda p: p[0]).tolist()
            for q, g in f.groupby("question_id")
        }
    )
    d = infoscore_beams(ids, None, pool, None, beam=16, cache=f, progress=False)
    best = f[f.pointer.map(len) == 2].groupby("question_id").vqa_gt_prob.max()
    assert np.allclose(d.rows[d.rows.beam_rank == 0].set_index("question_id").vqa_gt_prob, best.loc[ids])
    few = infoscore_beams(ids, None, pool, None, beam=2, candidates=5, cache=f, progress=False)
    assert few.manifest["infoscore"]["prompts"] <= 20 * (1 + 5 + 2 * 4)
    assert json.dumps(few.manifest)
