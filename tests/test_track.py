"Curricula, the best weights and what is watched: each does what it says; the traps of the loop stay shut"
import json, math, random, warnings
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from fastai.callback.schedule import LRFinder
from fastai.learner import Learner
from leverplus.callback_core import SCHEDULES, Objective, SkipFlat, StageCallback, Stats, as_schedule
from leverplus.callback_grpo import GRPO
from leverplus.callback_kl import EntropyFloor, KLToRef
from leverplus.callback_rce import RCE
from leverplus.callback_schedule import (
    Freeze, NoDropout, Phases, SplitShots, TempSchedule, TopKCurriculum, keep_k, part_of, phase_rows,
)
from leverplus.callback_track import (
    TRL_NAMES, Best, History, JSONLines, KeptFit, Resume, RLStats, StageName, Trackers, candidate_ids, greedy_picks,
    group_earnings, missed, promotion_p, regrets, stage_settings, stored_mass, sureness, tracked, valid_loss,
)
from leverplus.core import gini
from leverplus.dls import group_dls
from leverplus.embed import EmbedStore
from leverplus.groups import RLData
from leverplus.learner import selector_learner
from leverplus.pools import Pool
from leverplus.losses import advantage, group_mass, live_groups, regret
from leverplus.synth import ToySelector, quiet, synth_dls, toy_learner

RAGGED = dict(K=(4, 7), N=(2, 6), shots=(1, 2))

def learner(n=64, bs=16, seed=0, dls=None, **kw):
    return toy_learner(regret, dls or synth_dls(n, 32, bs, seed=seed, **RAGGED), seed=seed, **kw)
def fit(learn, n, cbs, **kw):
    with quiet(learn): learn.fit(n, cbs=cbs, **kw)
    return learn
def weights(learn): return {k: v.detach().clone() for k, v in learn.model.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

class Spy(StageCallback):
    "Calls `f(self)` in every batch, after the loss"
    order = 5
    def __init__(self, f): self.f, self.seen = f, []
    def after_loss(self): self.seen.append(self.f(self))

groups = st.integers(0, 10_000).map(
    lambda s: (
        lambda g: (torch.randint(0, 3, (6, 9), generator=g) / 2.0, torch.rand(6, 9, generator=g) > 0.3)
    )(torch.Generator().manual_seed(s))
)

# --- schedules ---------------------------------------------------------------------------------------------
def test_schedules_by_any_name():
    for s, (a, b) in (
        ("wide", (2.0, 0.5)),
        ("sharp", (1.0, 0.1)),
        ((3.0, 1.0), (3.0, 1.0)),
        (0.7, (0.7, 0.7)),
        (lambda p: 5 + p, (5.0, 6.0)),
    ):
        f = as_schedule(s)
        assert (f(0.0), f(1.0)) == pytest.approx((a, b))
    with pytest.raises(ValueError, match="wide, sharp"): as_schedule("wild")
    spy = Spy(lambda s: (s.rce.temp, SCHEDULES["sharp"](s.pct_train)))
    fit(learner(), 2, [RCE(), TempSchedule("rce", temp="sharp"), spy])
    assert all(a == b for a, b in spy.seen) and len(spy.seen) == 8

# --- fewer sequences in the loss ---------------------------------------------------------------------------
@given(groups, st.integers(1, 10), st.integers(0, 99))
def test_keep_k(rm, k, seed):
    r, m = rm
    torch.manual_seed(seed)
    kept = {which: keep_k(r, m, k, which) for which in ("best", "worst", "stratified")}
    for x in kept.values(): assert not (x & ~m).any() and (x.sum(-1) == m.sum(-1).clamp(max=k)).all()
    for b in range(len(r)):
        if not m[b].any(): continue
        inside, outside = r[b][kept["best"][b]], r[b][m[b] & ~kept["best"][b]]
        assert not len(outside) or inside.min() >= outside.max()
        inside, outside = r[b][kept["worst"][b]], r[b][m[b] & ~kept["worst"][b]]
        assert not len(outside) or inside.max() <= outside.min()
        if k >= 2:
            assert (
                r[b][kept["stratified"][b]].max() == r[b][m[b]].max()
                and r[b][kept["stratified"][b]].min() == r[b][m[b]].min()
            )
    if k >= 2: assert torch.equal(live_groups(r, kept["stratified"]), live_groups(r, m))

def test_top_k_comes_after_the_advantages_and_by_epoch():
    def look(s): return s.grpo.adv.clone(), s.yb[0], s.yb[1], s.stats.raw[1], s.epoch
    spy = Spy(look)
    learn = fit(
        learner(dls=synth_dls(64, 32, 16, N=8), cbs=[RLStats()]),
        3,
        [NoDropout(), SkipFlat(), GRPO(), TopKCurriculum((3, 5), "best"), spy],
    )
    for adv, r, m, raw, epoch in spy.seen:
        # advantages of all, loss of k
        assert torch.equal(adv, advantage(r, raw, clip=5.0)) and m.sum(-1).max() == (3, 5, 5)[epoch]
        assert ((adv < 0) & raw & ~m).any()
    assert learn.stats.mean("top_k") == 5 and learn.stats.mean("top_after") == learn.stats.mean(
        "live_after"
    ) < learn.stats.mean("live_before")

def test_top_k_is_refused_elsewhere():
    class First(TopKCurriculum): order = Objective.order-1
    class Late(GRPO):
        def before_batch(self): self.adv = None
    with pytest.raises(ValueError, match="before the advantages"):
        fit(learner(), 1, [NoDropout(), GRPO(), First()])
    with pytest.raises(ValueError, match="RCE has no advantages"):
        fit(learner(), 1, [RCE(), TopKCurriculum()])
    with pytest.raises(ValueError, match="not those of this batch"):
        fit(learner(), 1, [NoDropout(), Late(), TopKCurriculum()])
    for bad, says in ((dict(k=0), "TopKCurriculum: k 0: wanted"), (dict(which="top"), "keep_k")):
        with pytest.raises(ValueError, match=says):
            fit(learner(), 1, [NoDropout(), GRPO(), TopKCurriculum(**bad)])

def test_top_k_before_the_advantages_when_it_is_asked_for():
    def look(s): return s.grpo.adv.clone(), s.rewards, s.mask, s.stats.raw[1]
    spy = Spy(look)
    cut = TopKCurriculum([3, 5], "best", before=True)
    learn = learner(dls=synth_dls(64, 32, 16, N=8), cbs=[RLStats()])
    fit(learn, 1, [NoDropout(), SkipFlat(), GRPO(), cut, spy])
    for adv, r, kept, whole in spy.seen:
        # advantages and loss of k
        assert kept.sum(-1).max() == 3 and torch.equal(adv, advantage(r, kept, clip=5.))
        assert (adv[whole & ~kept] == 0).all()
    # an objective without advantages is cut too
    spy = Spy(lambda s: int(s.mask.sum(-1).max()))
    fit(learner(dls=synth_dls(64, 32, 16, N=8)), 2, [RCE(), TopKCurriculum([3, 5], "best", before=True), spy])
    assert spy.seen == [3]*4 + [5]*4

def test_k_as_function_and_as_number():
    spy = Spy(lambda s: int(s.yb[1].sum(-1).max()))
    fit(
        learner(dls=synth_dls(64, 32, 16, N=8)),
        2,
        [NoDropout(), GRPO(), TopKCurriculum(lambda p: 2 + 6 * p), spy],
    )
    assert spy.seen[0] == 2 and spy.seen == sorted(spy.seen) and spy.seen[-1] >= 6
    spy.seen.clear()
    fit(learner(), 1, [NoDropout(), GRPO(), TopKCurriculum(2), spy])
    assert set(spy.seen) == {2}

# --- phases ------------------------------------------------------------------------------------------------
class Seen(StageCallback):
    "First coordinates of the queries of each epoch, in order, and the batches per epoch"
    def before_fit(self): self.q, self.n = [], []
    def before_train(self):
        self.q.append([])
        self.n.append(0)
    def before_batch(self):
        self.q[-1] += self.xb[0][:, 0].tolist()
        self.n[-1] += 1

def test_phases_train_on_their_part_and_leave_no_trace():
    learn = learner()
    dl = learn.dls.train
    get = learn.dls.train.get_idxs
    n = learn.dls.train.n
    seen = Seen()
    plan = Phases(dict(easy=(range(0, 20), 2), hard=([40, 3, 3, 50], 1), all=(None, 1)))
    fit(learn, 4, [RCE(), plan, seen, Best()])
    first = [row[0][0].item() for row in learn.dls.train_ds.rows]
    want = [first[:20], first[:20], [first[i] for i in (3, 40, 50)], first]
    # shuffled anew
    assert (
        [sorted(q) for q in seen.q] == [sorted(w) for w in want]
        and seen.n == [2, 2, 1, 4]
        and seen.q[0] != seen.q[1]
    )
    assert learn.dls.train is dl and dl.get_idxs == get and dl.n == n and plan.now == "all"
    with quiet(learn): assert learn.validate(cbs=[plan])[0] == pytest.approx(valid_loss(learn), abs=1e-6)

def test_one_phase_of_everything_is_no_phase():
    a = fit(learner(), 2, [RCE()])
    b = fit(learner(), 2, [RCE(), Phases(dict(all=(None, 2)))])
    assert same(weights(a), weights(b))

def test_a_phase_that_breaks_off_leaves_the_loader_whole():
    class Stop(StageCallback):
        order = 7
        def after_backward(self): raise KeyboardInterrupt
    learn = learner()
    with pytest.raises(KeyboardInterrupt): fit(learn, 1, [RCE(), Phases(dict(few=(range(5), 1))), Stop()])
    seen = Seen()
    fit(learn, 1, [RCE(), seen])
    assert len(seen.q[0]) == 64

def test_phases_by_question_id_and_record():
    class Data:
        question_ids = pd.Index([70, 5, 9, 11])
        lost = [33]
        __len__ = lambda s: 4
    class Record: queries = [9, 70, 33]
    assert (
        phase_rows(Data(), [9, 70]) == phase_rows(Data(), Record()) == [0, 2]
        and phase_rows(Data(), None) is None
    )
    with pytest.raises(ValueError, match="question_ids 8 .1 in all"): phase_rows(Data(), [9, 8])

@pytest.mark.parametrize(
    "plan,epochs,match",
    [
        (dict(a=([1], 2)), 3, "pass n_epoch=2"),
        (dict(a=([64], 1)), 1, "row numbers 64"),
        (dict(a=([], 1)), 1, "no queries in a"),
    ],
)
def test_phases_refuse(plan, epochs, match):
    with pytest.raises(ValueError, match=match): fit(learner(), epochs, [RCE(), Phases(plan)])
def test_phases_refuse_early():
    for bad in ({}, dict(a=([1], 0)), dict(a=([1],))):
        with pytest.raises(ValueError, match="epochs >= 1"): Phases(bad)

# --- lengths -----------------------------------------------------------------------------------------------
def test_split_shots_loses_nothing_and_separates():
    spy = Spy(lambda s: (s.xb, s.yb, s.pred))
    dls = synth_dls(32, 16, 32, K=6, N=8, shots=(1, 2, 3))
    learn = fit(learner(dls=dls), 1, [RCE(skip_flat=False), SplitShots(), spy])
    ((xb, (r, m), pred),) = spy.seen
    n = xb[4].sum(-1)
    rows = learn.dls.train_ds.rows
    assert (
        all(len(set(x[y].tolist())) == 1 for x, y in zip(n, m))
        and m.any(-1).all()
        and m.sum() == sum(len(s) for _, _, s, _ in rows)
    )
    assert (
        sorted(zip(xb[3].masked_fill(~xb[4], -1)[m].tolist(), r[m].tolist()))
        == sorted(
            ([*map(int, y), *[-1] * (3 - len(y))], float(x)) for _, _, s, rr in rows for y, x in zip(s, rr)
        )
        and xb[3].shape[1] == m.sum(-1).max()
    )
    a, b = (fit(learner(dls=synth_dls(32, 16, 16)), 2, [RCE(), *x]) for x in ((), (SplitShots(),)))
    # one length: nothing to split
    assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(a.model.parameters(), b.model.parameters()))

# --- the best ----------------------------------------------------------------------------------------------
class Holds(StageCallback):
    "A callback with one setting of any kind"
    def __init__(self, setting): self.setting = setting

def table(changed=0.): return pd.DataFrame(dict(vector=[np.where(np.arange(2000) == 1000, changed, 0.)]))

@pytest.mark.parametrize("one, other", [
    (np.int64(3), np.int64(4)), (np.float32(.3), np.float32(.4)), (np.bool_(True), np.bool_(False)),
    (table(), table(1.)), (table().vector, table(1.).vector),
    (table().assign(vector=[[table().vector[0]]]), table().assign(vector=[[table(1.).vector[0]]])),
    (torch.float16, torch.bfloat16), (1 + 2j, 1 + 3j), (frozenset([1, 2]), frozenset([1, 3])),
])
def test_settings_of_a_stage_know_every_number(one, other):
    "A fit is resumed only with the settings of its start"
    def described(setting):
        learn = learner()
        learn.create_opt()
        learn.n_epoch = 1
        learn.add_cb(Holds(setting))
        return stage_settings(learn)["callbacks"]["holds"]
    assert described(one) == described(one)
    assert described(one) != described(other)

def test_scores_per_query():
    learn = learner()
    assert regrets(learn).mean().item() == pytest.approx(valid_loss(learn), abs=1e-6)
    assert (missed(learn) >= 0).all() and len(missed(learn)) == len(regrets(learn)) == 32
    *xb, r, m = learn.dls.valid.one_batch()
    lp = learn.model.eval()(*xb)
    for i in range(32): assert missed(learn)[i] == r[i][m[i]].max() - r[i][m[i]][lp[i][m[i]].argmax()]

@given(st.integers(0, 500))
@settings(max_examples=20)
def test_paired_p(seed):
    g = np.random.default_rng(seed)
    a = g.normal(size=40)
    d = g.normal(size=40)
    assert (
        promotion_p(a, a) == 1
        and promotion_p(a, a - 1) < 1e-3
        and promotion_p(a, a + 1) == 1
        and promotion_p(a, a - d, seed=seed) == promotion_p(a, a - d, seed=seed)
    )
    z = d.mean() / (d.std() / 40**0.5)
    p = 0.5 * math.erfc(z / 2**0.5)
    assert abs(promotion_p(a, a - d) - p) < 0.06

def test_paired_promotion_needs_more_than_luck():
    values = iter(
        [
            torch.zeros(20),
            torch.tensor([-1.0, 0.99]).repeat(10),
            -torch.ones(20),
            -torch.ones(20) - 0.001 * torch.tensor([5.0, -4.0]).repeat(10),
        ]
    )
    learn = fit(learner(), 3, [RCE(), best := Best(lambda l: next(values), promote="paired")])
    assert (
        best.table.kept.tolist() == [True, False, True, False] and best.best_epoch == 1 and best.value == -1
    )
    # a better mean alone was not enough
    assert best.table.p.iloc[1] > 0.05 > best.table.p.iloc[2] and best.table.value.iloc[1] < 0

def test_patience():
    learn = learner(cbs=[Stats(), History()])
    values = iter([5.0, 4.0, 6.0, 6.0, 1.0])
    w = {}
    class Keep(StageCallback):
        def after_train(self): w[self.epoch] = weights(self.learn)
    fit(learn, 9, [RCE(), Keep(), best := Best(lambda l: next(values), patience=2)])
    assert (
        len(learn.history.frame) == 3
        and best.best_epoch == 0
        and same(w[0], weights(learn))
        and not learn.model.training
        and not learn.training
    )
    # and the next fit runs
    fit(learn, 1, [RCE(), Best(patience=1)])
    assert len(learn.history.frame) == 4
    for bad in (dict(patience=0), dict(promote="maybe")):
        with pytest.raises(ValueError, match="Best"): Best(**bad)

# --- what is watched ---------------------------------------------------------------------------------------
def test_gradient_shares_are_those_of_the_terms():
    ref = ToySelector(8)
    seen = []
    def look(s):
        ps = list(s.model.parameters())
        norm = (
            lambda t: torch.cat([g.flatten() for g in torch.autograd.grad(t, ps, retain_graph=True)])
            .norm()
            .item()
        )
        parts = [norm(s.stats.by_term[k]) for k in ("policy", "kl_to_ref", "entropy_floor")]
        total = sum(s.stats.by_term.values())
        assert torch.allclose(total, s.learn.loss_grad, atol=1e-6)
        return [p / sum(parts) for p in parts]
    spy = Spy(look)
    spy.order = 9
    learn = fit(learner(cbs=[RLStats(every=2)]), 1, [RCE(), KLToRef(ref, 2.0), EntropyFloor(1.0, 3.0), spy])
    want = np.mean(spy.seen[::2], 0)
    got = [learn.stats.mean(f"grad_{k}") for k in ("policy", "kl_to_ref", "entropy_floor")]
    assert got == pytest.approx(want, rel=1e-5) and sum(got) == pytest.approx(1) and min(got) > 0
    learn = fit(learner(cbs=[RLStats(every=0)]), 1, [RCE(), KLToRef(ref, 2.0)])
    assert math.isnan(learn.stats.mean("grad_policy"))

def test_watching_changes_nothing():
    def run(stats):
        return weights(
            fit(learner(dropout=0.3, cbs=stats), 2, [RCE(), SkipFlat(), KLToRef(ToySelector(8), 0.1), Best()])
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert same(run(Stats()), run(RLStats(every=1)))

def test_wrapped_callbacks_are_given_back():
    class Stop(StageCallback):
        order = 7
        def after_backward(self): raise KeyboardInterrupt
    learn = learner(cbs=RLStats())
    rce = RCE()
    kl = KLToRef(beta=1.0)
    fit(learn, 1, [rce, kl])
    assert "after_loss" not in vars(rce) and "after_loss" not in vars(kl)
    with pytest.raises(KeyboardInterrupt): fit(learn, 1, [rce, kl, Stop()])
    # used again, elsewhere
    other = fit(learner(cbs=RLStats()), 1, [rce, kl])
    assert other.stats.mean("grad_policy") < 1 and "after_loss" not in vars(rce)

def test_live_shares_and_mass_by_length():
    learn = fit(
        learner(128, cbs=RLStats()),
        1,
        [RCE(), SkipFlat(), spy := Spy(lambda s: (s.pred.detach(), s.xb[4].sum(-1), s.yb[1]))],
    )
    rows = learn.dls.train_ds.rows
    live = sum(int(r.max() - r.min() > 1e-6) for *_, r in rows) / len(rows)
    assert (
        learn.stats.mean("live_before") == learn.stats.mean("live_after") == pytest.approx(live)
        and 0 < learn.stats.mean("mass") <= 1
    )
    want = [
        np.mean([group_mass(lp[i : i + 1], (m & (n == s))[i : i + 1]).item() for s in n[i][m[i]].unique()])
        for lp, n, m in spy.seen
        for i in range(len(lp))
        if m[i].any()
    ]
    assert learn.stats.mean("mass") == pytest.approx(np.mean(want), rel=1e-4)

def test_regret_of_groups_of_its_own_has_a_name_of_its_own():
    "A warm-up, split lengths and drawn groups are not what validation is made of"
    def columns(cbs, info=None):
        learn = learner(cbs=[RLStats()])
        if info is not None: learn.dls.info = info
        fit(learn, 1, [NoDropout(), GRPO(), *cbs])
        return learn.stats.means()
    class Draws(StageCallback): draws = True
    plain = columns([])
    assert "regret_train" in plain and not {"regret_own", "own_reward"} & plain.keys()
    for cbs in ([SplitShots()], [Draws()]):
        own = columns(cbs)
        assert "regret_own" in own and not {"regret_train", "own_reward"} & own.keys()
    warm = columns([], dict(warmup=dict(K=4)))
    assert warm["own_reward"] == 1 and "regret_train" not in warm
    assert warm["regret_own"] == pytest.approx(plain["regret_train"])

def test_live_shares_of_the_parts_of_a_reward():
    "Credit against accuracy: what cancels is seen, part by part; rewards of one part say nothing new"
    rows = pd.DataFrame([(q, p) for q in range(100, 120) for p in ((0, 1), (1, 2), (2, 3))],
                        columns=["question_id", "pointer"])
    first = rows.pointer == (0, 1)
    opposed = rows.question_id < 105
    rows["vqa_acc_score"] = np.where(first, .6, 0.)
    rows["vqa_correct"] = np.where(first, 1., 0.)
    rows.loc[opposed & ~first, "vqa_acc_score"] = .3
    rows.loc[opposed & ~first, "vqa_correct"] = 1.
    store = EmbedStore(range(140), *(torch.randn(140, 4, generator=torch.Generator().manual_seed(i)) for i in (0, 1)))
    def shares(train, **reward):
        pool = Pool({q: range(5) for q in train.question_id.unique()}, dict(sampler="given", K=5))
        dev = train.assign(question_id=train.question_id + 20)
        dev_pool = Pool({q: range(5) for q in dev.question_id.unique()}, dict(sampler="given", K=5))
        dls = group_dls(RLData(train, pool), RLData(dev, dev_pool), store, bs=5, device="cpu", **reward)
        learn = fit(selector_learner(dls, d_hidden=8), 1, [RCE()])
        names = [name for name in learn.history.frame if name.startswith("live_vqa") or name == "cancelled"]
        return learn.history.frame[names].iloc[0].to_dict()
    half = dict(reward="hard_plus_soft", hard_weight=-.6, soft_weight=1.)
    assert shares(rows, **half) == dict(live_vqa_correct=.75, live_vqa_acc_score=1., cancelled=.75)
    assert shares(rows) == dict(live_vqa_correct=.75, live_vqa_acc_score=1., cancelled=0.)
    assert shares(rows, reward="soft_only") == {}

def test_picks_agreement_and_hubs():
    learn = learner(dls=synth_dls(64, 40, 16))
    b = learn.dls.valid.one_batch()
    picks = greedy_picks(learn.model.train(), b[:5], 2)
    assert learn.model.training and (picks[:, 0] != picks[:, 1]).all()
    enc = learn.model.encode(*b[:3])
    assert torch.equal(
        picks[:, 0], learn.model.step_logp(enc, b[2].new_zeros(40, 1, 0, dtype=torch.long))[:, 0].argmax(-1)
    )
    class Still(Objective):
        def objective(self, lp, r, m): return 0*lp.masked_fill(~m, 0).sum()
    learn = fit(learner(wd=0.0, cbs=RLStats()), 1, Still())
    assert learn.stats.mean("agreement") == learn.stats.mean("same_as_start") == 1
    learn = fit(learner(wd=0.0, cbs=RLStats()), 2, RCE(0.1), lr=0.3)
    assert learn.stats.mean("same_as_start") < 1
    hub = torch.randn(5, 8)
    cands = hub.expand(30, -1, -1).clone()
    ids = candidate_ids(cands, torch.ones(30, 5, dtype=torch.bool))
    assert (
        ids.unique().numel() == 5
        and (ids == ids[0]).all()
        and candidate_ids(cands, torch.zeros(30, 5, dtype=torch.bool)).max() == -1
    )
    assert (
        gini(torch.tensor([0, 0, 0, 0, 30])) == pytest.approx(0.8)
        and gini(torch.ones(7)) == 0
        and math.isnan(gini(torch.zeros(3)))
    )

def test_distance_from_uniform_and_bound():
    class Uniform(ToySelector):
        def encode(self, q, c, m): return 0*self.match(q), 0*c, m
    learn = learner(dls=synth_dls(32, 16, 16, K=6), cbs=RLStats())
    learn.model = Uniform(8)
    fit(learn, 1, RCE())
    assert (
        abs(learn.stats.mean("above_uniform")) < 1e-6
        and learn.stats.mean("entropy") == pytest.approx(1)
        and learn.stats.mean("kl_bound") == pytest.approx(math.log(30))
    )

# --- traps of the loop that no other test holds (T4, T5, T6, T8, T13) --------------------------------------
def test_t4_a_stage_begins_with_a_fresh_optimiser_and_all_parameters():
    learn = fit(learner(), 1, [RCE(), Freeze("match")])
    n = len(learn.opt.param_lists[0])
    # a frozen part is still in the optimiser
    assert n == len(list(learn.model.parameters())) and learn.opt.state
    spy = Spy(lambda s: sum("grad_avg" in x for x in s.opt.state.values()))
    fit(learn, 1, [RCE(), spy], reset_opt=True)
    assert spy.seen[0] == 0 < spy.seen[-1]

def test_t5_errors_of_callbacks_keep_their_words():
    class Says(StageCallback):
        def after_loss(self): raise ValueError("rewards [4,7] but mask [4,5]: pad both")
    with pytest.raises(ValueError, match="pad both"): fit(learner(cbs=RLStats()), 1, [RCE(), Says()])

def test_t6_no_attribute_falls_through_or_shadows():
    learn = learner(cbs=[RLStats(), History()])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*shadowing.*")
        fit(learn, 1, [NoDropout(), SkipFlat(), GRPO(), KLToRef(), TopKCurriculum(), Best(), SplitShots()])

def test_t8_run_false_lasts_one_fit():
    # fastai's habit: switch a callback off by leaving it out
    learn = learner()
    rce = RCE()
    rce.run = False
    fit(learn, 1, rce)
    assert rce.run

def test_t13_a_quiet_fit_writes_nothing(capsys):
    learn = fit(learner(cbs=[RLStats(), History()]), 1, [RCE(), Best(), Phases(dict(a=(range(9), 1)))])
    out = capsys.readouterr()
    assert out.out == out.err == ""

def test_a_policy_with_stop_shares_one_mass_and_counts_stop_among_its_options():
    "Brute force: all sequences of 0, 1 and 2 of four candidates, one of them padding in the second row"
    from itertools import permutations
    from leverplus.selector import PointerSelector
    torch.manual_seed(0)
    model = PointerSelector(6, 6, max_shots=2, stop=True).eval()
    for p in model.parameters(): nn.init.normal_(p, std=.3)
    mask = torch.tensor([[True]*4, [True, True, True, False]])
    xb = torch.randn(2, 6), torch.randn(2, 4, 6), mask
    seqs = [[*s, *[-1]*(2 - len(s))] for n in range(3) for s in permutations(range(4), n)]
    seqs = torch.tensor(seqs).expand(2, -1, -1)
    there = seqs >= 0
    real = (~there | mask[:, None].expand(-1, len(seqs[0]), -1).gather(2, seqs.clamp(min=0))).all(-1)
    with torch.no_grad():
        logp = model(*xb, seqs.clamp(min=0), there)
        seen = sureness(model, xb, 2)
    assert stored_mass(logp, seqs.clamp(min=0), there, real, together=True).tolist() == pytest.approx([1, 1], abs=1e-5)
    apart = stored_mass(logp, seqs.clamp(min=0), there, real)
    assert apart.tolist() == pytest.approx([1/3, 1/3], abs=1e-5)
    picks = there.sum(-1)
    uniform = torch.zeros_like(logp)
    for b, n in enumerate((4, 3)): # n candidates and STOP, then one fewer; after two picks nobody chooses
        uniform[b] = -math.log(n + 1) - (picks[b] > 0)*math.log(n)
    kl = (logp.exp() * (logp - uniform)).masked_fill(~real, 0.).sum(-1)
    assert seen["above_uniform"].item() == pytest.approx(kl.mean().item(), abs=1e-5)
    assert seen["kl_bound"].item() == pytest.approx((math.log(20) + math.log(12))/2, abs=1e-5)

# --- names of stages, and of trackers -----------------------------------------------------------------------
class Stop(StageCallback):
    "Killed in batch `at` of the fit"
    order, decides, transient = 99, False, ("at",)
    def __init__(self, at): self.at = at
    def after_backward(self):
        if self.train_iter == self.at: raise KeyboardInterrupt

def noted(folder, *fits, at=None, every=0, resume=Resume, seed=0):
    "Fits of (name or None, epochs, lr), each with a state, in one file; killed in batch `at` of the last"
    learn = learner(seed=seed, cbs=[RLStats(), History(), JSONLines(folder/"metrics.jsonl", every)])
    for i, (name, n_epoch, lr) in enumerate(fits):
        named = [] if name is None else [StageName(name)]
        stop = [Stop(at)] if at is not None and i == len(fits) - 1 else []
        with quiet(learn): learn.fit(n_epoch, lr, cbs=[RCE(.5), *named, *stop, resume(folder/f"{i}")], reset_opt=True)
    return learn

def lines_of(folder): return [json.loads(line) for line in (folder/"metrics.jsonl").read_text().splitlines()]

FITS = ("warmup", 2, 1e-2), (None, 3, 3e-3)

def test_a_stage_has_the_name_it_was_given(tmp_path):
    whole = noted(tmp_path/"a", *FITS)
    assert whole.history.frame.stage.tolist() == ["warmup"]*2 + ["rce"]*3
    for at in (1, 6, 9):
        with pytest.raises(KeyboardInterrupt): noted(tmp_path/f"{at}", *FITS, at=at)
        again = noted(tmp_path/f"{at}", *FITS)
        assert again.history.frame.stage.tolist() == ["warmup"]*2 + ["rce"]*3
    # a name decides nothing: with another one the same fit is found, and has that name
    renamed = noted(tmp_path/"b", ("first", 2, 1e-2))
    (tmp_path/"b"/"metrics.jsonl").unlink()
    assert same(weights(noted(tmp_path/"b", ("second", 2, 1e-2))), weights(renamed))
    kept = [noted(tmp_path/name, (name, 2, 1e-2), resume=lambda _: KeptFit(tmp_path/"kept")) for name in "cd"]
    assert [k.history.frame.stage.tolist() for k in kept] == [["c"]*2, ["d"]*2]
    assert len(list((tmp_path/"kept").iterdir())) == 1

@pytest.mark.parametrize("every", [0, 3])
@pytest.mark.parametrize("at", [0, 3, 4, 11])
def test_no_line_is_there_twice_after_a_kill(tmp_path, every, at):
    noted(tmp_path/"whole", *FITS, every=every)
    with pytest.raises(KeyboardInterrupt): noted(tmp_path/"killed", *FITS, every=every, at=at)
    before = (tmp_path/"killed"/"metrics.jsonl").read_text()
    with open(tmp_path/"killed"/"metrics.jsonl", "a") as f: f.write('{"step": 9')   # half a line: a power cut
    noted(tmp_path/"killed", *FITS, every=every)
    assert lines_of(tmp_path/"killed") == lines_of(tmp_path/"whole")
    assert before.count("\n") <= len(lines_of(tmp_path/"killed"))
    noted(tmp_path/"killed", *FITS, every=every)   # all is done: nothing changes
    assert lines_of(tmp_path/"killed") == lines_of(tmp_path/"whole")

def test_lines_say_where_they_stand_and_what_was_measured(tmp_path):
    learn = noted(tmp_path, *FITS, every=2)
    lines = lines_of(tmp_path)
    epochs = [line for line in lines if line["per"] == "epoch"]
    assert [line["step"] for line in epochs] == [4, 8, 12, 16, 20]
    assert [line["epoch"] for line in epochs] == [0, 1, 0, 1, 2] and [line["fit"] for line in epochs] == [1, 1, 2, 2, 2]
    assert [line["step"] for line in lines if line["per"] == "batches"] == list(range(2, 21, 2))
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    rows = learn.history.frame
    for line, (_, row) in zip(epochs, rows.iterrows(), strict=True):
        assert line["stage"] == row.stage and line["loss"] == row.train_loss and line["eval_loss"] == row.valid_loss
        assert line["frac_reward_zero_std"] == 1 - row.live_before and line["reward"] == row.reward
        assert line["entropy"] == row.entropy_nats and line["own/entropy"] == row.entropy
        assert not {name for name in line if "clip" in name or name.startswith("kl")}   # RCE has none: absent, not 0
    # the batches of an epoch together are the epoch
    first = [line["reward"] for line in lines if line["per"] == "batches" and line["epoch"] == 0 and line["fit"] == 1]
    assert sum(first) / 2 == pytest.approx(rows.reward[0])

def test_fits_that_are_found_leave_their_lines_too(tmp_path):
    def go(name): noted(tmp_path/name, *FITS, resume=lambda _: KeptFit(tmp_path/"kept"))
    go("first")
    go("second")   # trains nothing
    assert lines_of(tmp_path/"first") == lines_of(tmp_path/"second") and len(lines_of(tmp_path/"second")) == 5

def test_a_file_of_others_is_refused_before_anything_trains(tmp_path):
    def go(file, **kw):
        learn = learner(cbs=[RLStats(), History()], **kw)
        with quiet(learn): learn.fit(1, cbs=[RCE(.5), JSONLines(file)])
    for i, text in enumerate(("my notes\n", "my notes", '{"step": 3}\n', '{"epoch": 1}\n[]\n')):
        file = tmp_path/f"{i}"
        file.write_text(text)
        with pytest.raises(ValueError, match=f"{i}: . lines of another training, or of another program"): go(file)
        assert file.read_text() == text
    go(tmp_path/"a.jsonl")
    was = (tmp_path/"a.jsonl").read_text()
    for seed in (0, 1):   # another fit, though it may be an equal one: nobody says that it goes on
        with pytest.raises(ValueError, match="1 lines of another training"): go(tmp_path/"a.jsonl", seed=seed)
    assert (tmp_path/"a.jsonl").read_text() == was
    with pytest.raises(ValueError, match="every -1"): JSONLines(tmp_path/"b", -1)
    # lines of another fit are not those of this one, though a `Resume` is there
    noted(tmp_path/"run", ("warmup", 1, 1e-2))
    for state in (tmp_path/"run"/"0").iterdir(): state.unlink()
    with pytest.raises(ValueError, match="1 lines of another training"): noted(tmp_path/"run", ("warmup", 1, 2e-2))

def test_mock_fits_and_validation_leave_no_line(tmp_path):
    told = []
    learn = learner(cbs=[JSONLines(tmp_path/"a"), Trackers(lambda values, step: told.append(step))], path=tmp_path)
    with quiet(learn):
        learn.fit(1, cbs=LRFinder(num_it=3))
        learn.validate()
        assert not (tmp_path/"a").exists() and not told
        learn.fit(1)   # without `Stats`, `History` or an objective, too
        learn.validate()
        learn.get_preds()
    line = json.loads((tmp_path/"a").read_text())
    assert line["stage"] == "fit" and line["eval_loss"] > 0 and told == [4]
    learn.dls.train_ds.rows = [(*row, r * math.nan) for *row, r in learn.dls.train_ds.rows]
    with quiet(learn): learn.fit(1)
    last = json.loads((tmp_path/"a").read_text().splitlines()[-1])
    assert last["loss"] is None and last["fit"] == 2 and last["step"] == 8   # measured, and no number

def test_numbers_are_those_of_trl():
    "Against a plain reading of what `GRPOTrainer` logs of groups that the policy has drawn"
    g = torch.Generator().manual_seed(0)
    rewards = torch.randint(0, 3, (32, 6), generator=g) / 2.
    rewards[:5] = 1.
    mask = torch.ones(32, 6, dtype=torch.bool)
    mean, std = group_earnings(torch.zeros(32, 6), rewards, mask, drawn=True)
    torch.testing.assert_close(mean, rewards.mean(1))
    torch.testing.assert_close(std, rewards.std(1))
    flat = torch.isclose(rewards.std(1), torch.zeros(32)).float().mean().item()
    live = live_groups(rewards, mask).double().mean().item()
    assert tracked(dict(live_before=live))["frac_reward_zero_std"] == pytest.approx(flat)
    # padding and groups without a sequence change nothing; stored groups count by the policy
    wide = torch.cat([rewards, torch.full((32, 2), 9.)], 1)
    some = torch.cat([mask, torch.zeros(32, 2, dtype=torch.bool)], 1)
    some[-1] = False
    for drawn in (True, False):
        logp = torch.randn(32, 8, generator=g)
        got = group_earnings(logp, wide, some, drawn)
        want = group_earnings(logp[:-1, :6], rewards[:-1], mask[:-1], drawn)
        for a, b in zip(got, want): torch.testing.assert_close(a, b)
    torch.testing.assert_close(
        group_earnings(logp, wide, some)[0], rewards[:-1].amax(1) - regret(logp, wide, some, "none")[:-1]
    )
    assert group_earnings(torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1).bool()) == (1, 0)   # not nan

def test_clip_ratios_are_shares_of_all_sequences(tmp_path):
    learn = learner(cbs=[RLStats(), History()])
    seen = []
    def look(s):
        a, m = s.grpo.adv, s.seq_mask.any(-1)   # of all sequences, those of flat groups too
        ratio = (s.pred - s.grpo.old_logp).exp()
        seen.append((int((m & (a < 0) & (ratio < .98)).sum()), int((m & (a > 0) & (ratio > 1.02)).sum()), int(m.sum())))
    fit(learn, 2, [GRPO(clip_low=.02, clip_high=.02, dual=None), Spy(look)], lr=3e-2)
    row = tracked(learn.history.rows[-1])
    low, high, n = map(sum, zip(*seen[4:]))   # of the second epoch
    assert low and high
    assert row["clip_ratio/low_mean"] == pytest.approx(low/n) and row["clip_ratio/high_mean"] == pytest.approx(high/n)
    assert row["clip_ratio/region_mean"] == pytest.approx((low + high)/n)

def test_every_name_of_trl_has_a_column_that_somebody_logs(tmp_path):
    learn = learner(cbs=[RLStats(), History()])
    fit(learn, 1, [GRPO(), KLToRef()])
    row = learn.history.rows[-1]
    here = [known for known in TRL_NAMES if not known.name.startswith("sampling/")]   # those of `CorrectedGRPO`
    for known in here: assert all(math.isfinite(row[column]) for column in known.columns), known.name
    names = tracked(row)
    assert list(names)[:len(here)] == [known.name for known in here]
    assert not {c for known in TRL_NAMES for c in known.columns} & {n.removeprefix("own/") for n in names if "/" in n}
    some = dict(accuracy=.5, train_loss=math.nan, mass=math.nan, note="a", yes=True)
    assert tracked(some).keys() == {"loss", "own/accuracy"}
    others = dict(a=np.float32(.5), b=np.int64(3), c=torch.tensor(.25), train_loss=torch.tensor(2.))
    assert json.loads(json.dumps(tracked(others))) == {"loss": 2., "own/a": .5, "own/b": 3, "own/c": .25}

@pytest.mark.parametrize("every", [0, 3])
@pytest.mark.parametrize("at", [2, 6, 9])
def test_an_interrupted_fit_goes_on_in_the_same_process(tmp_path, every, at):
    "The callback stays on the Learner, which gets its weights back before the same call is made again"
    noted(tmp_path/"whole", *FITS, every=every)
    learn = learner(cbs=[RLStats(), History(), JSONLines(tmp_path/"metrics.jsonl", every)])
    stop = Stop(None)
    def go(i):
        name, n_epoch, lr = FITS[i]
        named = [] if name is None else [StageName(name)]
        with quiet(learn): learn.fit(n_epoch, lr, cbs=[RCE(.5), *named, stop, Resume(tmp_path/f"{i}")], reset_opt=True)
    go(0)
    start = weights(learn)
    stop.at = at
    with pytest.raises(KeyboardInterrupt): go(1)
    stop.at = None
    learn.model.load_state_dict(start)   # or the state would be refused
    go(1)
    def where(folder): return [[line[k] for k in ("step", "per", "epoch", "stage")] for line in lines_of(folder)]
    assert where(tmp_path) == where(tmp_path/"whole")
    fits = [line["fit"] for line in lines_of(tmp_path) if line["per"] == "epoch"]
    assert fits == learn.history.frame.fit.tolist()

def test_without_a_resume_lines_of_an_interrupted_fit_stay(tmp_path):
    learn = learner(cbs=[RLStats(), JSONLines(tmp_path/"metrics.jsonl")])
    with quiet(learn):
        with pytest.raises(KeyboardInterrupt): learn.fit(3, cbs=[RCE(.5), Stop(6)])
        learn.validate()
        learn.fit(1, cbs=RCE(.5))
    got = [(line["fit"], line["epoch"], line["step"]) for line in lines_of(tmp_path)]
    assert got == [(1, 0, 4), (2, 0, 8)]
