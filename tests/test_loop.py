"The closed loop of nbs/tutorials/01_data: what is found stays found, is paid for once, and is true"
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from leverplus.groups import RLData
from leverplus.lvlm import MockScorer
from leverplus.rldata_check import health
from leverplus.rldata_generate import evaluated
from leverplus.settings import TWO_STAGE, Mining
from leverplus.rldata_ask import FactCache, ask
from leverplus.rldata_merge import balance, by_gap, drop_failed, merge, query_table, require_positive_query
from leverplus.rldata_mine import lacking, mine
from test_generate import ITEMS, POOL, QS, STORE, Scripted, made

MANY = dict(beam=6, temperature={1.0: 6}, random=6)

class Failing(Scripted):
    "Counts, and fails on some queries"
    def __init__(self, seed, fails=()):
        super().__init__(seed=seed)
        self.inner = MockScorer(seed, fails)

def loop(path, s, seed=0, cache=None):
    "(one stage, two stages, mined, merged, kept), with one memory for all, or without one for the first"
    first = cache
    cache = FactCache() if cache is None else cache
    kw = dict(seed=seed, test=0, progress=False, window=5, max_failed=1.0)
    one = made(path/"one", QS, ITEMS, POOL, s, STORE, counts=dict(beam=3, random=3), cache=first, **kw)
    two = made(
        path / "two", QS, ITEMS, POOL, s, STORE, counts=MANY, two_stage=dict(TWO_STAGE, top=2),
        cache=cache, **kw
    )
    mining = Mining(tries=3, top=2, rounds=2, seed=seed)
    mined, log = mine(two, ITEMS, s, STORE, mining=mining, cache=cache, progress=False)
    rich = drop_failed(evaluated(merge(one, mined)))
    return one, two, mined, log, rich, balance(by_gap(rich, lo=.1), positive_share=.4, max_contrast=4)

seeds = st.integers(0, 10_000)

@settings(max_examples=6, deadline=None)
@given(seeds, st.integers(0, 3))
def test_what_is_found_stays_found(tmp_path_factory, world_seed, seed):
    one, two, mined, log, rich, keep = loop(tmp_path_factory.mktemp("loop"), Scripted(seed=world_seed), seed)
    positive = lambda d: set(require_positive_query(evaluated(d)).queries)
    live = lambda d: set(by_gap(evaluated(d), lo=.1).queries)
    for part in (one, two, mined): assert positive(part) <= positive(rich) and live(part) <= live(rich)
    assert positive(two) <= positive(mined)
    assert live(two) <= live(mined)
    # balancing makes no group flat
    assert set(keep.queries) == live(rich)
    assert not len(keep) or set(by_gap(keep, lo=0.1).queries) == live(rich)
    pairs = lambda d: set(zip(d.rows.question_id, d.rows.pointer))
    assert pairs(keep) <= pairs(rich) == pairs(evaluated(one)) | pairs(evaluated(mined))
    assert {q for q, w in lacking(rich).items() if w == "positive"} == set(QS) - positive(rich)
    if len(keep): assert health(keep).frame.live_groups.iloc[0] == len(keep.queries)

@settings(max_examples=4, deadline=None)
@given(seeds)
def test_every_label_of_the_result_is_the_scorers_own(tmp_path_factory, world_seed):
    *_, rich, _ = loop(tmp_path_factory.mktemp("loop"), Scripted(seed=world_seed))
    facts = ask(rich.rows, MockScorer(world_seed), ITEMS)
    for c in ("vqa_raw_generation", "vqa_acc_score", "vqa_gt_prob", "vqa_gt_logprobs", "scorer"):
        pd.testing.assert_series_equal(rich.rows[c].reset_index(drop=True), facts[c], check_dtype=False)

@settings(max_examples=4, deadline=None)
@given(seeds)
def test_with_one_memory_nothing_is_paid_for_twice(tmp_path_factory, world_seed):
    s = Scripted(seed=world_seed)
    d = tmp_path_factory.mktemp("loop")
    cache = FactCache()
    one, two, mined, log, *_ = loop(d, s, cache=cache)
    assert len(set(s.asked)) == len(s.asked) # no prompt twice for the same thing ...
    known = {(q, p) for i, (q, p, g) in enumerate(s.asked) if g}
    order = {}
    for i, (q, p, g) in enumerate(s.asked): order.setdefault((q, p), []).append(g)
    # ... nor a probability after its text
    assert all(g in ([True], [False], [False, True]) for g in order.values())
    assert len(known) == len(
        set(
            map(
                tuple,
                pd.concat(
                    [evaluated(x).rows[["question_id", "pointer"]] for x in (one, mined)]
                ).values.tolist(),
            )
        )
    )
    s.asked.clear()
    loop(d / "again", s, cache=cache)
    assert not s.asked

@pytest.mark.parametrize("fails", [(3,), (0, 5, 11)])
def test_failures_are_counted_left_out_and_mended(tmp_path, fails):
    whole = loop(tmp_path / "whole", Scripted(seed=7))
    one, two, mined, log, rich, keep = loop(tmp_path / "run", Failing(7, fails))
    for d in (one, two): assert set(d.rows.question_id[d.rows.eval_failed]) == set(fails)
    assert set(rich.queries) == set(QS) - set(fails)
    assert not set(keep.queries) & set(fails)
    assert not rich.rows.eval_failed.any()
    assert int(health(one).frame.failed.iloc[0]) == one.rows.eval_failed.sum() > 0
    # the next run asks the failed ones again, and ends as if nothing had been
    for a, b in zip(loop(tmp_path / "run", Scripted(seed=7)), whole):
        if isinstance(a, RLData): pd.testing.assert_frame_equal(a.rows, b.rows)
        else: pd.testing.assert_frame_equal(a, b)

def test_asked_and_written_agree(tmp_path):
    s = Scripted(seed=1)
    two = made(
        tmp_path / "two", QS, ITEMS, POOL, s, STORE, counts=MANY, two_stage=TWO_STAGE, test=0, progress=False
    )
    assert (sum(not g for *_, g in s.asked), sum(g for *_, g in s.asked)) == (len(two), len(evaluated(two)))
    s.asked.clear()
    out, log = mine(two, ITEMS, s, STORE, progress=False)
    assert (
        (sum(not g for *_, g in s.asked), sum(g for *_, g in s.asked))
        == (log.asked.sum(), log.texts.sum())
        == (len(out) - len(two), len(evaluated(out)) - len(evaluated(two)))
    )
    t = query_table(evaluated(out))
    assert t.unknown.sum() == 0
    assert np.isclose(t.positive.sum(), (evaluated(out).rows.vqa_acc_score > 0).sum())
