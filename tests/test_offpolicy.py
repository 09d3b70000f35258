"What stored groups say about a policy: exact where everything was drawn, unbiased elsewhere"
import math
import numpy as np, pandas as pd, pytest, torch
from itertools import permutations
from leverplus.callback_core import Stats
from leverplus.callback_rce import RCE
from leverplus.callback_track import History
from leverplus.dls import GroupDataset, group_dls
from leverplus.embed import EmbedStore
from leverplus.groups import RLData
from leverplus.learner import selector_learner
from leverplus.offpolicy import (
    OffPolicyStats, off_policy, sequence_logp, stored_logp, summarise, value_by_count,
)
from leverplus.pools import Pool
from leverplus.rldata_propose import SimilarityPrior, propose
from leverplus.selector import PointerSelector
from leverplus.settings import Proposing
from leverplus.synth import quiet

N, K = 400, 5
G = torch.Generator().manual_seed(0)
# one question, N times
STORE = EmbedStore(
    [*range(N), *range(5000, 5000 + K)],
    *[torch.cat([torch.randn(1, 4, generator=G).expand(N, 4), torch.randn(K, 4, generator=G)])] * 2
)
POOL = Pool({q: tuple(range(5000, 5000+K)) for q in range(N)}, dict(sampler="all", K=K))
# depends on the order
def pays(pointer):
    return math.sin(sum((i + 1) * x for i, x in enumerate(pointer)) % 97) / 2 + 0.5
def groups(counts, S=2, queries=range(N), policy=None):
    return propose(POOL, STORE, queries, S, policy, Proposing(counts=counts, scale=3.))
def dataset(rows): return GroupDataset(rows, POOL, STORE, rows.pointer.map(pays).to_numpy())
def logps(policy, S):
    every = pd.DataFrame(dict(question_id=0, pointer=list(permutations(POOL[0], S))))
    return stored_logp(policy, dataset(every), False), every.pointer.map(pays).to_numpy()
def truth(policy, S=2):
    lp, r = logps(policy, S)
    assert np.exp(lp).sum() == pytest.approx(1.0, abs=1e-5)
    return float(np.exp(lp) @ r)

@pytest.mark.parametrize(
    "S, counts, scale",
    [
        (1, dict(temperature={1.0: 3}), 2.0),
        (2, dict(random=3), 2.0),
        (3, dict(beam=1, temperature={2.0: 3}), 2.0),
    ],
)
def test_weights_of_a_draw_sum_to_one(S, counts, scale):
    "With a root that is not drawn they sum to .88-.96 here, eight standard errors and more below"
    n = 4000
    g = torch.Generator().manual_seed(3)
    demos = range(5000, 5008)
    same = torch.randn(1, 4, generator=g).expand(n, 4)
    store = EmbedStore([*range(n), *demos], *[torch.cat([same, torch.randn(8, 4, generator=g)])] * 2)
    pool = Pool({q: tuple(demos) for q in range(n)})
    rows = propose(pool, store, range(n), S, None, Proposing(counts=counts, scale=scale))
    sums = off_policy(SimilarityPrior(scale), GroupDataset(rows, pool, store, np.ones(len(rows)))).unbiased
    assert abs(sums.mean() - 1) < 4*sums.std()/n**.5

@pytest.mark.parametrize("S, everything", [(1, 5), (2, 20)])
@pytest.mark.parametrize(
    "counts",
    [
        dict(random=99),
        dict(temperature={1.3: 99}),
        dict(beam=3, random=99),
        dict(beam=99, temperature={1.0: 0}, random=1, retrieval=0),
    ],
)
def test_nothing_is_left_to_estimate_where_everything_is_there(S, everything, counts):
    rows = groups(counts, S, range(3))
    assert len(rows) == 3 * everything
    if counts.get("beam") == 99:   # nothing was drawn
        with pytest.raises(ValueError, match=f"none of {len(rows)} rows has a `kappa`"):
            off_policy(SimilarityPrior(1.0), dataset(rows))
        return
    for policy in (SimilarityPrior(3.), SimilarityPrior(-2.)):
        f = off_policy(policy, dataset(rows))
        assert np.allclose(f.unbiased, truth(policy, S), atol=1e-6)
        assert np.allclose(f.value, f.unbiased, atol=1e-6)
        assert (f.n == everything - counts.get("beam", 0)).all()
        assert f.trust.all()

def test_unbiased_for_policies_that_nobody_drew_from():
    rows = groups(dict(beam=2, temperature={1.0: 3, 2.0: 3}, random=4))
    ds = dataset(rows)
    for scale in (3., 1., -1., 6.):
        policy = SimilarityPrior(scale)
        f = off_policy(policy, ds)
        want = truth(policy)
        t = summarise(f).loc[2]
        assert list(t.index) == ["sample, T = 1", "sample, T = 2", "random", "all"]
        assert (t.queries == N).all()
        for s in t.index: assert abs(t.unbiased[s] - want) < 4.5*t["unbiased se"][s] + 1e-6, (scale, s)
        assert abs(t.value["all"] - want) < .05
    flat = float(np.mean(ds.rewards.numpy()))
    far = truth(SimilarityPrior(-6.0))
    t = summarise(off_policy(SimilarityPrior(-6.0), ds)).loc[2]
    # the plain mean does not know which policy is judged
    assert abs(t.unbiased["all"] - far) < abs(flat - far)

def test_what_stands_before_a_draw_is_its_stratum():
    rows = groups(dict(beam=2, temperature={1.0: 3}, retrieval=1, random=4), queries=range(6))
    policy = SimilarityPrior(2.0)
    f = off_policy(policy, dataset(rows))
    for q, source, methods in (
        (0, "sample, T = 1", ["beam", "retrieval"]),
        (5, "random", ["beam", "retrieval", "sample"]),
    ):
        before = rows[(rows.question_id == q) & rows.gen_method.isin(methods)]
        one = f[(f.question_id == q) & (f.source == source)].iloc[0]
        assert one.mass == pytest.approx(float(np.exp(stored_logp(policy, dataset(before))).sum()), abs=1e-9)
        assert one.n == (3 if source[0] == "s" else 4)
    assert (f.ess[f.source == "random"] <= 1 + 1e-9).all()
    assert (f.ess > 0).all()

def test_shot_counts_queries_and_batches_do_not_meet():
    a, b = groups(dict(temperature={1.0: 3}), 1, range(8)), groups(
        dict(temperature={1.0: 3}, random=2), 2, range(8)
    )
    policy = SimilarityPrior(1.0)
    # rows of a draw need not lie side by side
    both = pd.concat([a, b]).sort_values("question_id", kind="stable").sample(frac=1.0, random_state=0)
    both = (
        both.assign(at=both.gen_method.map(dict(sample=0, random=1)))
        .sort_values("at", kind="stable")
        .drop(columns="at")
        .reset_index(drop=True)
    )
    f = off_policy(policy, dataset(both), bs=3).set_index(["question_id", "shots", "source"]).sort_index()
    for S, rows in ((1, a), (2, b)):
        alone = off_policy(policy, dataset(rows)).set_index(["question_id", "shots", "source"]).sort_index()
        pd.testing.assert_frame_equal(f.xs(S, level="shots", drop_level=False), alone, check_exact=False)

def test_a_selector_with_stop_is_judged_among_sequences_of_one_length():
    torch.manual_seed(0)
    model = PointerSelector(8, d_hidden=8, max_shots=3, stop=True).train()
    torch.nn.init.normal_(model.stop.bias)
    want = truth(model)
    rows = groups(dict(random=20), queries=range(2))
    f = off_policy(model, dataset(rows))
    assert np.allclose(f.unbiased, want, atol=1e-5)
    assert model.training
    drawn = groups(dict(temperature={1.0: 6}), policy=model.eval())
    t = summarise(off_policy(model, dataset(drawn))).loc[2]
    assert abs(t.unbiased["all"] - want) < 4.5 * t["unbiased se"]["all"]

def test_a_policy_that_chooses_its_count_earns_the_sum_over_counts():
    "All sequences of 0, 1 and 2 picks were drawn: the sum is the expected reward under the enumeration, as STOP is"
    torch.manual_seed(0)
    model = PointerSelector(8, d_hidden=8, max_shots=2, stop=True)
    with torch.no_grad():
        for p in model.parameters(): p.add_(.1 * torch.randn_like(p))
    nothing = pd.DataFrame(dict(question_id=[0, 1], pointer=[(), ()]))
    rows = pd.concat([groups(dict(random=20), S, range(2)) for S in (1, 2)] + [nothing], ignore_index=True)
    ds = dataset(rows)
    assert set(off_policy(model, ds).shots) == {1, 2}   # nobody drew the empty ones
    t = value_by_count(model, ds, bs=1)
    assert t.shots.tolist() == [0, 1, 2] * 2
    model.eval()
    with torch.no_grad():
        query, cands, cand_mask = ds.batch([0])[:3]
        seqs, lp, real = model.enumerate(model.encode(query, cands, cand_mask), None)
    r = [pays([POOL[0][i] for i, here in zip(s, m) if here]) for s, m in zip(seqs[0].tolist(), real[0].tolist())]
    want = float(lp[0].double().exp() @ torch.tensor(r, dtype=torch.float64))
    got = (t.chance * t.value).groupby(t.question_id).sum()
    assert np.allclose(got, want, atol=1e-5) and np.allclose(t.chance.groupby(t.question_id).sum(), 1)
    told = off_policy(model, ds)   # how it would choose if it could not stop is another policy
    one = told[(told.question_id == 0) & (told.shots == 1)].value.iloc[0]
    assert abs(one - t.value[(t.question_id == 0) & (t.shots == 1)].iloc[0]) > 1e-4
    p_nothing = lp[0][real[0].sum(-1) == 0].exp()
    assert t.chance[t.shots == 0].tolist() == pytest.approx([float(p_nothing)] * 2, abs=1e-5)
    alone = value_by_count(model, dataset(nothing))
    assert alone.value.notna().tolist() == [True, False, False] * 2
    # the log-probabilities of stored sequences know the empty one, too
    assert np.exp(stored_logp(model, ds)).reshape(2, -1).sum(1) == pytest.approx([1., 1.], abs=1e-5)

def test_an_empty_sequence_that_was_drawn_is_its_whole_stratum():
    rows = groups(dict(random=3), 1, range(2))
    nothing = rows.groupby("question_id").head(1).assign(
        pointer=[(), ()], logprob_score=0., kappa=-np.inf
    )
    f = off_policy(SimilarityPrior(2.), dataset(pd.concat([rows, nothing], ignore_index=True)))
    zero = f[f.shots == 0]
    assert zero.mass.tolist() == [1., 1.] and zero.value.tolist() == [pays(())] * 2 and zero.trust.all()

def test_failed_rows_are_no_rows():
    rows = groups(dict(temperature={1.0: 4}, random=2), queries=range(3))
    rows["eval_failed"] = False
    rows.loc[rows.question_id == 1, "eval_failed"] = [True] * 5 + [False]
    f = off_policy(
        SimilarityPrior(1.0), GroupDataset(rows, POOL, STORE, rows.pointer.map(pays).where(~rows.eval_failed))
    )
    assert f[f.question_id == 1][["source", "n"]].to_numpy().tolist() == [["random", 1]]
    assert len(f) == 5
    # the share of one row is 1 whatever its weight
    assert f.trust[f.n == 1].tolist() == [False]
    assert f.ess[f.n == 1].tolist() == [1.0]

def learner(seed=0):
    record = lambda ids: RLData(
        (r := groups(dict(beam=1, temperature={1.0: 3}, random=3), queries=ids)).assign(
            vqa_gt_prob=r.pointer.map(pays), vqa_acc_score=r.pointer.map(pays), scorer="x"
        ),
        POOL.only(list(ids)),
    )
    return selector_learner(
        group_dls(record(range(40)), record(range(40, 60)), STORE, "soft_only", bs=16),
        seed=seed,
        d_hidden=8,
        n_layers=0,
    )

def test_the_callback_watches_and_changes_nothing():
    def trained(*cbs):
        l = learner()
        with quiet(l): l.fit_rce(4, 3e-3, cbs=cbs, best=False)
        return l
    plain = trained()
    watched = trained(OffPolicyStats(every=2))
    start = learner().model.state_dict()
    ends = [l.model.state_dict() for l in (plain, watched)]
    assert all(torch.equal(a, b) for a, b in zip(*(e.values() for e in ends)))
    assert not all(torch.equal(a, b) for a, b in zip(start.values(), ends[0].values()))
    h = watched.history.frame
    assert h.off_value.notna().tolist() == [False, True] * 2
    assert (set(h) - set(plain.history.frame)
        == {"off_value", "off_unbiased", "off_ess", "off_trusted", "off_covered"})
    assert h.off_covered.iloc[-1] == 1
    f = off_policy(watched.model, watched.dls.valid_ds)
    assert h.off_unbiased.iloc[-1] == pytest.approx(summarise(f).loc[(2, "all"), "unbiased"])
    assert not any(isinstance(cb, OffPolicyStats) for cb in watched.cbs)

def test_policies_without_modules_and_batches():
    ds = dataset(groups(dict(random=4), queries=range(5)))
    b = ds.batch(range(5))
    assert np.allclose(sequence_logp(SimilarityPrior(0.0), b)[b[-1]], -math.log(K * (K - 1)))
    assert np.allclose(stored_logp(SimilarityPrior(0.0), ds, bs=2), -math.log(K * (K - 1)))

def test_a_policy_that_would_pick_none_of_the_rows():
    class Never(SimilarityPrior):
        # always the first candidate
        def step_logp(self, enc, prefix):
            lp = super().step_logp(enc, prefix).clone()
            lp[..., 0], lp[..., 1:] = 0.0, -torch.inf
            return lp
    rows = groups(dict(random=3), 1, range(4))
    rows = rows[[p != (POOL[0][0],) for p in rows.pointer]].reset_index(drop=True)
    f = off_policy(Never(0.0), dataset(rows))
    assert (f.unbiased == 0).all()
    assert f.value.isna().all()
    assert not f.trust.any()
    assert (f.ess == 0).all()
    t = summarise(f).loc[1]
    assert t.unbiased["all"] == 0
    assert np.isnan(t.value["all"])

# --- draws that are no longer whole -------------------------------------------------------------------------
def record(rows, pool=POOL):
    return RLData(
        rows.assign(
            vqa_acc_score=rows.pointer.map(pays),
            vqa_correct=1.0,
            vqa_gt_prob=0.5,
            scorer="x",
            vqa_pred_answer="a",
            vqa_raw_generation="a",
            vqa_rel_token_f1=1.0,
            vqa_rel_edit_sim=1.0,
            vqa_rel_score=1.0,
            vqa_eval_mode="official",
        ),
        pool.only(rows.question_id.unique().tolist()),
    )

def test_thresholds_are_forgotten_where_rows_are_missing_or_came_from_elsewhere():
    from leverplus.groups import whole_draws
    from leverplus.rldata_generate import evaluated
    from leverplus.rldata_merge import merge, sample_queries
    a, b = (
        record(groups(c, queries=q))
        for c, q in (
            (dict(temperature={1.0: 3}), range(6)),
            (dict(beam=2, temperature={1.0: 4}), range(3, 9)),
        )
    )
    # two parents: nobody knows the order of their draws
    both = merge(a, b).rows
    n = both.groupby("question_id").kappa.agg(lambda k: k.notna().sum())
    assert n.tolist() == [3] * 3 + [0] * 3 + [4] * 3
    assert sample_queries(a, 2).rows.kappa.notna().all()   # whole groups stay what they are
    half = RLData(a.rows.assign(vqa_acc_score=a.rows.vqa_acc_score.where(a.rows.index != 1)), a.pool)
    k = evaluated(half).rows
    assert len(k) == 17
    assert k.kappa[k.question_id == 0].isna().all()
    assert k.kappa[k.question_id != 0].notna().all()
    wide = Pool({q: (*POOL[q], 9999) for q in range(6)})
    assert whole_draws(a.rows, wide, a).kappa.isna().all()
    assert whole_draws(a.rows, a.pool, a).equals(a.rows)
    some = record(
        pd.concat(
            [groups(dict(random=2), 1, range(2)), groups(dict(random=2), 2, range(2))], ignore_index=True
        )
    )
    rest = whole_draws(some.rows.drop(index=0).reset_index(drop=True), some.pool, some)
    assert rest.kappa.isna().tolist() == [
        q == 0 and len(p) == 1 for q, p in zip(rest.question_id, rest.pointer)
    ]

def test_no_thresholds_no_callback():
    with pytest.raises(ValueError, match="forgets its threshold"):
        learn = learner()
        learn.dls.valid_ds.rows["kappa"] = np.nan
        learn.fit_rce(1, cbs=OffPolicyStats())

@pytest.mark.parametrize("some", [[*range(20)][::-1], [3, 7, 5], [11]])
def test_some_of_the_queries_are_judged_by_their_own_rows(some):
    "A data set of some queries, or of all in another order, shares the rows of the whole one"
    g = torch.Generator().manual_seed(1)
    demos = range(5000, 5000 + K)
    store = EmbedStore([*range(20), *demos], *(torch.randn(20 + K, 4, generator=g) for _ in range(2)))
    pool = Pool({q: tuple(demos) for q in range(20)}, dict(sampler="all", K=K))
    rows = propose(pool, store, range(20), 2, None, Proposing(counts=dict(temperature={1.: 4}, beam=1), scale=3.))
    ds = GroupDataset(rows, pool, store, rows.pointer.map(pays).to_numpy())
    whole = off_policy(SimilarityPrior(3.), ds)
    part = off_policy(SimilarityPrior(3.), ds.select(some))
    want = whole[whole.question_id.isin(some)]
    by = ["question_id", "shots", "source"]
    pd.testing.assert_frame_equal(part.sort_values(by, ignore_index=True), want.sort_values(by, ignore_index=True))
