"Two stages: what is chosen, what is asked, and that kills and failures change nothing"
import math
from dataclasses import replace
import numpy as np, pandas as pd, pytest
from hypothesis import assume, given, settings, strategies as st
from leverplus.baselines import Logistic, effects
from leverplus.dls import group_dls
from leverplus.groups import RLData
from leverplus.rldata_check import health
from leverplus.core import read_json
from leverplus.rldata_generate import TooManyFailures, choose, evaluated, tally, with_text
from leverplus.settings import TWO_STAGE, Proposing, check_two_stage
from leverplus.rldata_ask import FactCache
from leverplus.rewards import reward
from test_generate import ITEMS, POOL, QS, STORE, Scripted, made

MANY = dict(beam=4, random=12)
KW = dict(counts=MANY, test=0, progress=False, window=4)

def run(path, scorer, **kw):
    return made(path, QS, ITEMS, POOL, scorer, STORE, **{**KW, "two_stage": TWO_STAGE, **kw})

@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 3), st.integers(1, 2), st.sampled_from([0.0, 0.1, 0.2, 0.5, 0.9]), st.booleans()
        ),
        min_size=1,
        max_size=40,
    ),
    st.integers(0, 4),
    st.integers(0, 3),
    st.integers(0, 3),
    st.integers(0, 5),
)
def test_choose(rows, top, low, random, seed):
    f = pd.DataFrame(
        [
            dict(
                question_id=q,
                pointer=tuple(range(100 + i, 100 + i + S)),
                vqa_gt_prob=math.nan if bad else g,
                eval_failed=bad,
            )
            for i, (q, S, g, bad) in enumerate(rows)
        ]
    )
    assume(top + low + random)
    picked = choose(f, dict(top=top, low=low, random=random), seed)
    assert not picked[f.eval_failed].any()
    for _, g in f.assign(picked=picked)[~f.eval_failed].groupby(["question_id", f.pointer.map(len)]):
        n = len(g)
        ends = min(n, top + low)
        assert g.picked.sum() == ends + min(random, n - ends)
        best = np.sort(g.vqa_gt_prob)[::-1]
        got = np.sort(g.vqa_gt_prob[g.picked])[::-1]
        assert (got[: min(top, n)] == best[: min(top, n)]).all()
        assert low == 0 or (got[-min(low, n) :] == best[-min(low, n) :]).all()
    shuffled = f.sample(frac=1, random_state=seed)
    if top: assert choose(shuffled, dict(top=top), seed).sum() == choose(f, dict(top=top), seed).sum()

def test_rows_of_both_stages_are_kept(tmp_path):
    s = Scripted()
    data = run(tmp_path / "two", s)
    texts = evaluated(data)
    one = run(tmp_path / "one", Scripted(), two_stage=None)
    assert len(data) == len(one) == 16*len(QS) and (texts.rows.groupby("question_id").size() == 12).all()
    # the same facts as in one stage
    pd.testing.assert_series_equal(data.rows.vqa_gt_prob, one.rows.vqa_gt_prob)
    # the draws are not whole any more
    pd.testing.assert_frame_equal(
        texts.rows.reset_index(drop=True),
        one.rows[data.rows.vqa_acc_score.notna()].reset_index(drop=True).assign(kappa=np.nan),
    )
    assert sum(g for *_, g in s.asked) == len(texts) and sum(not g for *_, g in s.asked) == len(data)
    with pytest.raises(ValueError, match="evaluated"): reward(data.rows)
    assert np.isfinite(reward(texts.rows)).all() and np.isfinite(reward(data.rows, "gtprob")).all()

def test_a_reward_gets_the_rows_that_it_can_judge(tmp_path):
    data = run(tmp_path/"two", Scripted())
    assert len(with_text(data, "gtprob")) == len(data)
    texts = with_text(data)
    pd.testing.assert_frame_equal(texts.rows, evaluated(data).rows)
    assert np.isfinite(reward(texts.rows)).all()
    assert len(with_text(data, "hybrid", dict(alpha=0.))) == len(texts)
    with pytest.raises(TypeError, match="has no .'beta'."): with_text(data, "gtprob", dict(beta=1.))
    with pytest.raises(ValueError, match="reward mode 'none'"): with_text(data, "none")

@pytest.mark.parametrize("after", [5, 60, 130, 230])
def test_broken_off_and_continued_is_uninterrupted(tmp_path, after):
    whole = run(tmp_path / "whole", Scripted())
    n = []
    def tired(s):
        n.append(1)
        if len(n) > after: raise KeyboardInterrupt
        return s
    with pytest.raises(KeyboardInterrupt): run(tmp_path/"run", Scripted(tired))
    pd.testing.assert_frame_equal(run(tmp_path/"run", Scripted()).rows, whole.rows)

def test_failures_are_mended_as_if_they_had_not_been(tmp_path):
    whole = run(tmp_path / "whole", Scripted())
    bad = lambda s: (
        replace(s, text=None, logprobs=(), gt_prob=math.nan, error="OSError: image truncated")
        if 1007 in s.pointer
        else s
    )
    first = run(tmp_path / "run", Scripted(bad))
    failed = first.rows[first.rows.eval_failed]
    assert len(failed)
    assert all(1007 in p for p in failed.pointer)
    assert set(evaluated(first).rows[lambda r: r.eval_failed].pointer) == set(failed.pointer)
    pd.testing.assert_frame_equal(run(tmp_path/"run", Scripted()).rows, whole.rows)

def test_nothing_is_asked_twice_through_a_cache(tmp_path):
    cache = FactCache()
    run(tmp_path / "a", Scripted(), cache=cache)
    s = Scripted()
    run(tmp_path / "b", s, cache=cache)
    assert not s.asked

def test_shards_choose_alike(tmp_path):
    for i in range(3): run(tmp_path/"s", Scripted(), shard=(i, 3))
    pd.testing.assert_frame_equal(RLData.load(tmp_path/"s").rows, run(tmp_path/"one", Scripted()).rows)

def test_one_stage_and_two_do_not_mix(tmp_path):
    run(tmp_path/"a", Scripted())
    for other in (None, dict(TWO_STAGE, top=3)):
        with pytest.raises(ValueError, match="proposing.two_stage.top: there 8"):
            run(tmp_path/"a", Scripted(), two_stage=other)

@pytest.mark.parametrize("counts", [dict(top=-1), dict(top=0), dict(best=3), dict(top=1.5), {}])
def test_bad_counts_of_two_stages(counts):
    for check in (check_two_stage, lambda x: Proposing(two_stage=x)):
        with pytest.raises(ValueError, match="two stages"): check(counts)
    with pytest.raises(ValueError, match="two stages"): choose(pd.DataFrame(), counts)

# ---- budget of failures ------------------------------------------------------------------------------------

@pytest.mark.parametrize("max_failed,stops", [(.0, True), (.2, True), (.9, False), (1., False)])
def test_budget_of_failures(tmp_path, max_failed, stops):
    "Half of the rows fail: the run stops or not, keeps what is done, and mended ends as if nothing had been"
    bad = lambda s: (
        replace(s, text=None, logprobs=(), gt_prob=math.nan, error="OSError: disk gone")
        if s.question_id % 2
        else s
    )
    go = lambda scorer, **kw: run(tmp_path/"run", scorer, two_stage=None, max_failed=max_failed, **kw)
    if stops:
        with pytest.raises(TooManyFailures, match="disk gone.*failed rows are asked again"): go(Scripted(bad))
        assert list((tmp_path / "run").glob("part-*"))
        assert not read_json(tmp_path / "run" / "manifest.json")["complete"]
    else: assert go(Scripted(bad)).rows.eval_failed.mean() == .5
    pd.testing.assert_frame_equal(go(Scripted()).rows, run(tmp_path/"whole", Scripted(), two_stage=None).rows)

def test_a_few_failures_of_few_rows_stop_nothing(tmp_path):
    bad = lambda s: replace(s, text=None, logprobs=(), gt_prob=math.nan, error="OSError: disk gone")
    data = made(
        tmp_path / "r", QS[:3], ITEMS, POOL, Scripted(bad), STORE, counts=MANY, test=0, progress=False
    )
    assert data.rows.eval_failed.all() and len(data) == 48

def test_tally():
    f = pd.DataFrame(
        dict(
            question_id=[1, 1, 2, 2, 3],
            eval_failed=[False, False, False, True, True],
            vqa_acc_score=[0.0, 1.0, 1.0, math.nan, math.nan],
            error=[None, None, None, "a", "a"],
        )
    )
    assert tally(f) == dict(rows=5, failed=2, error="a", flat=1, positive=2)

# ---- rows of the first stage are normal --------------------------------------------------------------------

def test_health_knows_rows_that_were_never_to_have_a_text(tmp_path):
    data = run(tmp_path/"two", Scripted())
    texts = evaluated(data)
    h, only = health(data), health(texts)
    assert not any(alarm.cause == "labels" for alarm in h.verdict)
    assert [a.cause for a in h.verdict if a.cause != "soft reward"] == [
        a.cause for a in only.verdict if a.cause != "soft reward"]
    n = len(data) - len(texts)
    assert h.frame.untexted["two"] == n > 0 and h.frame.unrewarded["two"] == 0 and h.frame.failed["two"] == 0
    same = ["groups", "live_groups", "adv_std", "reward_mean", "positive_rate", "oracle_in_data", "mean_in_data"]
    np.testing.assert_allclose(h.frame[same].astype(float), only.frame[same].astype(float))
    note = f"{n} of {len(data)} rows have probabilities alone"
    for text in (repr(h), h._repr_markdown_(), h.block().html()): assert note in text and "untexted" in text
    for text in (repr(only), only._repr_markdown_()): assert "untexted" not in text and "alone" not in text
    assert h.plot().shape == (1, 3)
    h.to_csv(tmp_path/"csv")
    # a row that lacks more than a text is still told
    rows = data.rows.copy()
    rows.loc[rows.index[rows.vqa_acc_score.isna()][:3], "vqa_gt_prob"] = math.nan
    broken = health(RLData(rows, data.pool))
    assert broken.frame.unrewarded["data"] == 3 and broken.verdict[0].cause == "labels"

def test_the_report_words_of_such_data_speak_of_no_fault(tmp_path):
    from leverplus.report import health_block
    data = run(tmp_path/"two", Scripted())
    html = health_block(health(data)).html()
    assert "lack a fact" not in html.replace("rows that did not fail, but lack a fact that the reward needs", "")
    assert "have probabilities alone" in html

def test_loaders_and_rules_leave_them_out(tmp_path):
    data = run(tmp_path/"two", Scripted())
    texts = evaluated(data)
    half = len(data.queries) // 2
    def part(d, queries): return RLData(d.rows[d.rows.question_id.isin(queries)].reset_index(drop=True), d.pool)
    def loaders(d, **kw):
        train, dev = part(d, d.queries[:half]), part(d, d.queries[half:])
        return group_dls(train, dev, STORE, device="cpu", bs=2, **kw)
    whole, some = loaders(data), loaders(texts)
    assert whole.info == some.info
    for a, b in zip(whole.valid.one_batch(), some.valid.one_batch()): assert a.equal(b)
    assert len(loaders(data, reward="gtprob").train_ds.rows) == len(part(data, data.queries[:half]).rows)
    pd.testing.assert_frame_equal(effects(data), effects(texts))
    assert len(effects(data, "gtprob")) >= len(effects(texts, "gtprob"))
    pd.testing.assert_frame_equal(Logistic(data, STORE, ITEMS).table(), Logistic(texts, STORE, ITEMS).table())
