"Objectives that people know from elsewhere: by hand, against brute force, by identities; and their callbacks"
from itertools import combinations, product
import math, warnings
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, strategies as st
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation, GradientClip
from leverplus.callback_core import StageCallback, Stats
from leverplus.callback_grpo import GRPO
from leverplus.callback_kl import KLToRef
from leverplus.callback_objectives import (
    CISPO, GDPO, SAPO, BestOfK, CorrectedGRPO, PassK, of_batch, reward_part,
)
from leverplus.callback_schedule import NoDropout, SplitShots
from leverplus.callback_track import group_earnings, tracked
from leverplus.core import masked_softmax
from leverplus.dls import GroupDataset, GroupDL, group_dls
from leverplus.embed import EmbedStore
from leverplus.groups import RLData
from leverplus.learner import selector_learner
from leverplus.losses import (
    advantage, clipped_surrogate, group_mean, off_policy_value, policy_gradient, regret,
)
from leverplus.objectives import (
    behaviour_weights, best_of_k, best_of_k_regret, cispo_loss, max_at_k, parts_advantage, passk_advantage,
    recentred, sapo_loss,
)
from leverplus.offpolicy import found_logp, stored_logp
from leverplus.pools import Pool
from leverplus.rldata_propose import SimilarityPrior, propose
from leverplus.settings import Proposing
from leverplus.synth import quiet, toy_learner
from test_losses import groups

SOFT = dict(cispo=cispo_loss, sapo=sapo_loss)
# what each makes of (logp, rewards, mask): a number per sequence or per group
MADE = {
    "cispo": lambda l, r, m: cispo_loss(l, l.detach() - .3, advantage(r, m), m),
    "sapo": lambda l, r, m: sapo_loss(l, l.detach() - .3, advantage(r, m), m),
    "best of 3": lambda l, r, m: best_of_k_regret(l, r, m, 3)[m.any(-1)].mean(),
    "pass@2": lambda l, r, m: policy_gradient(l, passk_advantage(r, m, 2), m),
    "parts": lambda l, r, m: policy_gradient(l, parts_advantage(torch.stack([r, r**2], -1), m), m),
    "corrected": lambda l, r, m: corrected(l, r, m),
}

def corrected(logp, rewards, mask, found=None, cut=None):
    found = torch.zeros_like(logp) if found is None else found
    w = behaviour_weights(logp, found, mask, cut)
    adv = recentred(advantage(rewards, mask, "center"), w)
    return clipped_surrogate(logp, logp.detach(), adv, mask, weights=w)

def slope(f, logp):
    x = logp.clone().requires_grad_()
    f(x).backward()
    return x.grad

# ---- formulas ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", MADE)
def test_zero_signal_zero_gradient_and_no_nan(name):
    for seed in range(5):
        logp, rewards, mask = groups(seed)
        grad = slope(lambda x: MADE[name](x, rewards, mask), logp)
        assert grad.isfinite().all()
        assert (grad[~mask] == 0).all()
        assert grad[1:].abs().max() < 1e-9   # a flat group, one of a single sequence, an empty one
        assert grad[0].abs().max() > 1e-4

@pytest.mark.parametrize("name", MADE)
def test_padding_and_order_change_nothing(name):
    logp, rewards, mask = groups(3, flat=False)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    wide = torch.nn.functional.pad
    more = wide(logp, (0, 2), value=-torch.inf), wide(rewards, (0, 2), value=torch.nan), wide(mask, (0, 2))
    grad = slope(lambda x: MADE[name](x, rewards, mask), logp)
    mixed = slope(lambda x: MADE[name](x, rewards[:, order], mask[:, order]), logp[:, order])
    padded = slope(lambda x: MADE[name](x, more[1], more[2]), more[0])
    assert torch.allclose(mixed, grad[:, order])
    assert torch.allclose(padded[:, :6], grad) and (padded[:, 6:] == 0).all()

@pytest.mark.parametrize("loss", SOFT.values(), ids=SOFT)
def test_soft_clips_are_the_policy_gradient_at_ratio_one(loss):
    logp, rewards, mask = groups(0)
    adv = advantage(rewards, mask)
    grad = slope(lambda x: loss(x, logp, adv, mask), logp)
    assert torch.allclose(grad, slope(lambda x: policy_gradient(x, adv, mask), logp))

@pytest.mark.parametrize("ratio", [.2, .7, 1., 1.5, 6.])
@pytest.mark.parametrize("A", [1., -2.])
def test_pull_of_soft_clips(ratio, A):
    old = torch.tensor([[-2.]], dtype=torch.float64)
    now = old + math.log(ratio)
    adv = torch.tensor([[A]], dtype=torch.float64)
    one = torch.tensor([[True]])
    assert slope(lambda x: cispo_loss(x, old, adv, one, 5.), now).item() == pytest.approx(-min(ratio, 5.)*A)
    temp = 1. if A > 0 else 1.05
    gate = 1/(1 + math.exp(-temp*(ratio - 1)))
    assert sapo_loss(now, old, adv, one).item() == pytest.approx(-4/temp*gate*A)
    pull = slope(lambda x: sapo_loss(x, old, adv, one), now).item()
    assert pull == pytest.approx(-4*gate*(1 - gate)*ratio*A)

def test_settings_that_cannot_be_are_refused():
    one = torch.zeros(1, 2)
    mask = one == 0
    for f, says in (
        (lambda: cispo_loss(one, one, one, mask, 0.), "cap"),
        (lambda: sapo_loss(one, one, one, mask, temp_bad=0.), "temp_bad 0.0: wanted a number > 0"),
        (lambda: passk_advantage(one, mask, 1), "k 1"),
        (lambda: max_at_k(one, mask, 0), "k 0: wanted a whole number >= 1"),
        (lambda: behaviour_weights(one, one, mask, .5), "cut"),
        (lambda: parts_advantage(one[..., None], mask, [1., 2.]), "2 weights for 1 parts"),
    ):
        with pytest.raises(ValueError, match=says): f()

def brute_max(r, k):
    k = min(k, len(r))
    return np.mean([max(s) for s in combinations(r, k)])

def brute_adds(r, k):
    "What each adds to the best of k, over all subsets"
    k = min(k, len(r))
    subsets = list(combinations(range(len(r)), k))
    def gain(s, i):
        others = [r[j] for j in s if j != i]
        return max(r[j] for j in s) - max(others) if others else 0.
    return [len(r) * sum(gain(s, i) for s in subsets if i in s) / len(subsets) for i in range(len(r))]

@given(seed=st.integers(0, 10_000), k=st.integers(2, 7))
def test_best_of_k_over_subsets(seed, k):
    _, rewards, mask = groups(seed)
    best = max_at_k(rewards, mask, k)
    adv = passk_advantage(rewards, mask, k)
    for b in range(len(mask)):
        r = rewards[b][mask[b]].tolist()
        if not r: continue
        assert best[b].item() == pytest.approx(brute_max(r, k))
        assert adv[b][mask[b]].tolist() == pytest.approx(brute_adds(r, k))
    assert (adv >= 0).all() and (adv[~mask] == 0).all()

@pytest.mark.parametrize("n, c, k", [(5, 2, 2), (10, 1, 4), (6, 6, 3), (4, 0, 2), (200, 30, 10)])
def test_max_at_k_is_pass_at_k(n, c, k):
    r = (torch.arange(n) < c).double()[None]
    assert max_at_k(r, r >= 0, k).item() == pytest.approx(1 - math.comb(n - c, k)/math.comb(n, k))

def test_the_whole_group_leaves_the_lead_of_the_best():
    r = torch.tensor([[.2, .9, .6, .1]])
    assert passk_advantage(r, r >= 0, 9)[0].tolist() == pytest.approx([0., 4*.3, 0., 0.])
    tie = torch.tensor([[.9, .9, .1]])
    assert (passk_advantage(tie, tie >= 0, 3) == 0).all()

@pytest.mark.parametrize("k", [2, 3])
def test_passk_is_the_gradient_of_the_best_of_k(k):
    theta = torch.tensor([.3, -.2, .5], dtype=torch.float64, requires_grad=True)
    worth = torch.tensor([.1, .4, 1.], dtype=torch.float64)
    p = theta.softmax(-1)
    goal = sum(p[list(i)].prod() * worth[list(i)].max() for i in product(range(3), repeat=k))
    exact, = torch.autograd.grad(goal, theta)
    mean = torch.zeros(3, dtype=torch.float64)
    for draw in product(range(3), repeat=4):
        i = torch.tensor(draw)
        lp = theta.log_softmax(-1)[i]
        m = torch.ones(1, 4, dtype=torch.bool)
        step, = torch.autograd.grad(-policy_gradient(lp[None], passk_advantage(worth[i][None], m, k), m), theta)
        mean += lp.sum().exp().detach() * step
    assert torch.allclose(mean, exact)

@pytest.mark.parametrize("k", [1, 2, 3])
def test_best_of_k_is_the_sum_over_draws(k):
    logp, rewards, mask = groups(1)
    p = masked_softmax(logp.masked_fill(~mask, 0.), mask)
    value = best_of_k(logp, rewards, mask, k)
    for b in range(3):
        real = mask[b].nonzero()[:, 0].tolist()
        by_hand = sum(p[b][list(i)].prod() * rewards[b][list(i)].max() for i in product(real, repeat=k))
        assert value[b].item() == pytest.approx(by_hand.item())
    assert value[3] == 0
    i = mask.nonzero(as_tuple=True)
    def of_real(x): return best_of_k_regret(logp.index_put(i, x), rewards, mask, k)
    assert torch.autograd.gradcheck(of_real, logp[mask].clone().requires_grad_())

def test_tries_make_regret_smaller():
    logp, rewards, mask = groups(2)
    once = best_of_k_regret(logp, rewards, mask, 1)
    assert torch.allclose(once, regret(logp, rewards, mask, reduction="none"))
    left = [best_of_k_regret(logp, rewards, mask, k) for k in (1, 2, 4, 4000)]
    assert all((a >= b - 1e-12).all() for a, b in zip(left, left[1:]))
    assert left[-1].max() < 1e-6

def test_parts_are_standardised_one_by_one():
    _, rewards, mask = groups(4)
    other = (rewards - .3)**2
    both = torch.stack([rewards, other], -1)
    units = torch.tensor([1., 1e-2], dtype=torch.float64)
    a = parts_advantage(both, mask, min_std=0.)
    assert torch.allclose(a, parts_advantage(both * units, mask, min_std=0.))
    z = [advantage(x, mask, min_std=0.) for x in (rewards, other)]
    weighted = parts_advantage(both, mask, [2., 1.], min_std=0., clip=None)
    total = 2*z[0] + z[1]
    scale = (weighted / total)[total != 0]
    assert torch.allclose(scale, scale[:1].expand_as(scale))
    real = mask & (total != 0).any(-1, keepdim=True)
    assert weighted[real].square().mean().item() == pytest.approx(1.)
    assert (a.sum(-1).abs() < 1e-9).all()

def test_a_part_that_differs_alone_teaches():
    flat = torch.full((1, 3), .5)
    small = torch.tensor([[.01, .02, .03]])
    mask = flat > 0
    assert (advantage(flat + 0*small, mask) == 0).all()
    assert parts_advantage(torch.stack([flat, small], -1), mask)[0].argmax() == 2

def test_weights_make_the_gradient_of_the_estimate():
    logp, rewards, mask = groups(5)
    found = torch.randn(logp.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    live = mask & (mask.sum(-1, keepdim=True) > 1)
    def value(x): return off_policy_sum(x, rewards, live, found)
    grad = slope(lambda x: corrected(x, rewards, live, found), logp)
    want = slope(lambda x: -value(x) / live.any(-1).sum(), logp)
    assert torch.allclose(grad, want, atol=1e-9)
    known = off_policy_value(logp, rewards, live, found, cut=None)
    assert value(logp).item() == pytest.approx(known.value[live.any(-1)].sum().item())

def off_policy_sum(x, rewards, mask, found):
    w = masked_softmax((x - found).masked_fill(~mask, 0.), mask)
    return (w * rewards.masked_fill(~mask, 0.)).sum()

def test_enumerated_groups_are_regret():
    logp, rewards, mask = groups(6)
    live = mask.any(-1)
    grad = slope(lambda x: corrected(x, rewards, mask), logp)
    assert torch.allclose(grad[live], slope(lambda x: regret(x, rewards, mask), logp)[live], atol=1e-9)

def test_weights_are_cut_and_have_mean_one():
    logp, _, mask = groups(7)
    w = behaviour_weights(logp, torch.zeros_like(logp), mask, None)
    assert torch.allclose(w.sum(-1), mask.sum(-1).double())
    assert (behaviour_weights(logp, torch.zeros_like(logp), mask, 1.5) <= 1.5).all()
    assert (w[~mask] == 0).all()

# ---- how rows were found -----------------------------------------------------------------------------------

N, K = 600, 5
G = torch.Generator().manual_seed(0)
SAME = torch.randn(1, 4, generator=G).expand(N, 4)
STORE = EmbedStore([*range(N), *range(5000, 5000 + K)], *[torch.cat([SAME, torch.randn(K, 4, generator=G)])]*2)
POOL = Pool({q: tuple(range(5000, 5000 + K)) for q in range(N)}, dict(sampler="all", K=K))

def pays(pointer): return math.sin(sum((i + 1)*x for i, x in enumerate(pointer)) % 97) / 2 + .5
def proposed(counts, n=N): return propose(POOL, STORE, range(n), 2, None, Proposing(counts=counts, scale=3.))
def dataset(rows): return GroupDataset(rows, POOL, STORE, rows.pointer.map(pays).to_numpy())

def estimates(rows, policy):
    "Per query: sums of weight times probability, and of that times reward"
    ds = dataset(rows)
    share = np.exp(stored_logp(policy, ds) - found_logp(ds.rows))
    sums = pd.DataFrame(dict(one=share, value=share * ds.rewards.numpy())).groupby(ds.rows.question_id.to_numpy())
    return sums.sum()

@pytest.mark.parametrize(
    "counts",
    [
        dict(random=4),
        dict(temperature={1.5: 4}),
        dict(beam=2, random=4),
        dict(temperature={1.5: 3}, random=3),
        dict(beam=1, temperature={1.: 3, 3.: 3}, random=3),
    ],
    ids=str,
)
def test_found_rows_add_up_to_the_policy(counts):
    policy = SimilarityPrior(2.)
    everything = proposed(dict(random=99), 1)
    truth = estimates(everything, policy).iloc[0]
    assert truth.one == pytest.approx(1., abs=1e-5)
    got = estimates(proposed(counts), policy)
    for column in ("one", "value"):
        error = got[column] - truth[column]
        assert abs(error.mean()) < 4*error.std()/N**.5, column

def test_enumerated_rows_and_draws_that_took_all():
    rows = proposed(dict(beam=3, random=99), 2)
    assert (found_logp(rows) == 0).all()   # the draw left nothing over
    beams = proposed(dict(beam=3), 2)
    assert (found_logp(beams) == 0).all()
    assert (found_logp(beams.drop(columns="kappa")) == 0).all()
    mixed = proposed(dict(beam=2, random=3), 4)
    by_method = pd.Series(found_logp(mixed)).groupby(mixed.gen_method.to_numpy())
    assert (by_method.get_group("beam") == 0).all() and (by_method.get_group("random") < 0).all()

def test_retrieved_rows_count_as_enumerated_wherever_they_stand():
    rows = proposed(dict(random=3, retrieval=2), 6)
    assert (found_logp(rows)[(rows.gen_method == "retrieval").to_numpy()] == 0).all()

# ---- callbacks ---------------------------------------------------------------------------------------------

def record(queries, counts=None):
    rows = proposed(counts or dict(beam=1, temperature={1.: 3}, random=3))
    rows = rows[rows.question_id.isin(queries)].reset_index(drop=True)
    worth = rows.pointer.map(pays).to_numpy()
    rows["vqa_acc_score"] = np.round(worth) * (rows.question_id % 2)   # every other group is flat
    rows["vqa_gt_prob"] = worth / 10
    rows["vqa_correct"] = rows.vqa_acc_score
    return RLData(rows, POOL)

def learner(bs=8, n=40, counts=None, **kw):
    dls = group_dls(record(range(n), counts), record(range(100, 116), counts), STORE, "soft_only", bs=bs)
    return selector_learner(dls, **kw)

class Grads(Callback):
    "The gradient of the first batch"
    order = 100
    def before_fit(self): self.grad = None
    def before_step(self):
        if self.grad is None: self.grad = [p.grad.clone() for p in self.model.parameters() if p.grad is not None]

def first_grad(*cbs, **kw):
    learn = learner(**kw)
    look = Grads()
    with quiet(learn): learn.fit(1, 1e-3, cbs=[*cbs, look])
    return torch.cat([g.flatten() for g in look.grad])

PLAIN = dict(baseline="center", scale="none", adv_clip=None, dual=None)

def test_soft_clips_begin_as_grpo():
    ours = first_grad(GRPO(**PLAIN))
    for cb in (CISPO(**PLAIN), SAPO(**PLAIN)): assert torch.allclose(first_grad(cb), ours, atol=1e-6)

def test_a_corrected_stage_begins_as_regret_where_all_is_enumerated():
    counts = dict(beam=6)
    same = first_grad(CorrectedGRPO(cut=None, **PLAIN), counts=counts)
    theirs = first_grad(NoDropout(), counts=counts)
    rows = record(range(40), counts).rows.groupby("question_id").vqa_acc_score.nunique()
    ratio = same.norm() / theirs.norm()
    assert torch.allclose(same, ratio * theirs, atol=1e-5)   # flat groups leave the denominator
    assert ratio > 1 - 1e-4 and (rows > 1).any()

def test_a_corrected_stage_is_its_formula():
    learn = learner(n=8)
    ds = learn.dls.train_ds
    seen = []
    class Keep(StageCallback):
        order = 50
        def after_loss(self):
            if seen: return
            order = self.learn.dls.train.batch_rows(0)
            seen.append((self.learn.loss.item(), self.pred.detach(), self.rewards, self.mask, order))
    with quiet(learn): learn.fit(1, 1e-3, cbs=[CorrectedGRPO(cut=2., **PLAIN), Keep()])
    loss, logp, rewards, mask, order = seen[0]
    found = torch.from_numpy(found_logp(ds.rows)).float()
    by_group = torch.nn.utils.rnn.pad_sequence([found[ds.rows_of(i)] for i in order], batch_first=True)
    w = behaviour_weights(logp, by_group, mask, 2.)
    adv = recentred(advantage(rewards, mask, "center"), w)
    assert loss == pytest.approx(-group_mean(w * adv, mask).item(), abs=1e-6)

def test_columns_lie_as_the_batch_does():
    seen = []
    class Look(StageCallback):
        order = 1
        def before_batch(self):
            seen.append((of_batch(self, self.dl.dataset.rewards), self.rewards, self.mask))
            self.learn.dls.train.peek()   # walks the loader once more
    for extra in ([], [SplitShots()]):
        for kw in (dict(bs=8), dict(bs=7)):
            seen.clear()
            learn = learner(**kw)
            with quiet(learn): learn.fit(2, 1e-3, cbs=[Look(), *extra])
            assert len(seen) == 2 * len(learn.dls.train)
            for got, want, mask in seen: assert torch.equal(got.masked_fill(~mask, 0.), want.masked_fill(~mask, 0.))

def test_columns_follow_groups_of_two_lengths():
    proposing = Proposing(counts=dict(random=4), scale=3.)
    rows = pd.concat([propose(POOL, STORE, range(24), S, None, proposing) for S in (1, 2)], ignore_index=True)
    rows["vqa_acc_score"] = [round(pays((*p, q))) for p, q in zip(rows.pointer, rows.question_id)]
    first = rows.question_id < 16
    train, valid = [RLData(rows[own].reset_index(drop=True), POOL) for own in (first, ~first)]
    learn = selector_learner(group_dls(train, valid, STORE, "soft_only", bs=4))
    number = torch.arange(len(learn.dls.train_ds.rows))
    seen = []
    class Look(StageCallback):
        order = 1
        def before_batch(self):
            n = of_batch(self, number)
            length = torch.tensor([len(p) for p in self.dl.dataset.rows.pointer])[n]
            seen.append(torch.equal(length[self.mask], self.seq_mask.sum(-1)[self.mask]))
    with quiet(learn): learn.fit(1, 1e-3, cbs=[Look(), SplitShots()])
    assert seen and all(seen)

def test_columns_are_refused_where_groups_are_drawn_or_changed():
    class Draws(StageCallback):
        draws = True
    class Turned(StageCallback):
        order = -5
        def before_batch(self): self.learn.xb = *self.xb[:3], self.seqs.flip(1), self.seq_mask.flip(1)
    learn = learner()
    one_part = GDPO(dict(soft_only=1.))
    with quiet(learn):
        with pytest.raises(ValueError, match="another callback draws"): learn.fit(1, cbs=[one_part, Draws()])
        with pytest.raises(ValueError, match="not what the training loader made"):
            learn.fit(1, cbs=[one_part, Turned()])
        with pytest.raises(ValueError, match="no vqa_rel_score"):
            learn.dls.train_ds.rows = learn.dls.train_ds.rows.drop(columns="vqa_rel_score")
            learn.fit(1, cbs=GDPO(dict(hard_plus_gtprob_plus_rel=1.)))

def test_gdpo_with_one_part_is_grpo_over_the_spread_of_the_batch():
    learn = learner(bs=40)
    seen = []
    class Keep(StageCallback):
        order = 50
        def after_loss(self): seen.append(next(cb.adv for cb in self.learn.cbs if isinstance(cb, GRPO)))
    for cb in (GDPO(dict(soft_only=3.), adv_clip=None), GRPO(min_std=1e-4, adv_clip=None)):
        with quiet(learn): learn.fit(1, 0., cbs=[cb, Keep()])
    gdpo, grpo = [a.sort(0).values.flatten().sort().values for a in seen]
    scale = gdpo[-1] / grpo[-1]
    assert torch.allclose(gdpo, scale*grpo, atol=1e-5) and (gdpo != 0).any()

def test_gdpo_keeps_groups_that_differ_in_any_part():
    stats = Stats()
    learn = learner(cbs=stats)
    with quiet(learn): learn.fit(1, 1e-3, cbs=GDPO(dict(soft_only=1., gtprob=1.)))
    m = stats.means()
    assert m["live_soft_only"] < m["live_gtprob"] == m["live"] == 1.
    with quiet(learn): learn.fit(1, 1e-3, cbs=GRPO())
    assert stats.mean("live") == pytest.approx(m["live_soft_only"])
    price = reward_part("price", pd.DataFrame(dict(pointer=[(), (1,), (1, 2)])))
    assert price.tolist() == [0., -1., -2.]
    for wrong in ({}, dict(softly=1.)):
        with pytest.raises(ValueError, match="no parts|softly"): GDPO(wrong)

def test_passk_uses_its_advantages_and_bestofk_is_regret():
    logp, rewards, mask = groups(8)
    cb = PassK(3, adv_clip=None)
    assert torch.equal(cb.advantages(rewards, mask), passk_advantage(rewards, mask, 3))
    assert PassK(3, adv_clip=.5).advantages(rewards, mask).max() <= .5
    ours = first_grad(BestOfK(1, skip_flat=False))
    assert torch.allclose(ours, first_grad(), atol=1e-6)

def test_a_small_effective_share_is_told_once():
    stats = Stats()
    learn = learner(cbs=stats)
    for floor, times in ((1., 1), (0., 0)):
        with quiet(learn), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            learn.fit(3, 1e-3, cbs=CorrectedGRPO(floor=floor))
        assert sum("effective share" in str(w.message) for w in said) == times
    assert 1/7 <= stats.mean("is_ess") <= 1

def test_known_names_are_what_they_are_elsewhere():
    r = torch.tensor([[0., 1., .5], [1., 1., torch.nan]])
    mask = torch.tensor([[True]*3, [True, True, False]])
    mean, std = group_earnings(torch.zeros(2, 3), r, mask)
    assert mean.tolist() == pytest.approx([.5, 1.]) and std.tolist() == pytest.approx([.5, 0.])
    learn = learner()
    with quiet(learn): learn.fit(2, 5e-2, cbs=CorrectedGRPO(floor=0.))
    m = tracked(learn.history.rows[-1])
    assert m["frac_reward_zero_std"] == pytest.approx(1 - learn.history.rows[-1]["live"])
    rows = learn.dls.train_ds.rows
    by_query = rows.groupby("question_id").vqa_acc_score
    # what the policy earns in its groups: the best less the regret
    assert m["reward"] == pytest.approx(by_query.max().mean() - learn.history.rows[-1]["regret_train"], abs=1e-5)
    assert m["reward_std"] == pytest.approx(by_query.std().mean(), abs=1e-5)
    clips = [m[f"clip_ratio/{name}"] for name in ("low_mean", "high_mean", "region_mean")]
    assert clips[0] + clips[1] == pytest.approx(clips[2]) and clips[2] > 0
    ratio = "sampling/importance_sampling_ratio/"
    assert m[ratio + "min"] <= m[ratio + "mean"] <= m[ratio + "max"] <= 5.

STAGES = dict(cispo=CISPO, sapo=SAPO, passk=PassK, best=BestOfK)

@pytest.mark.parametrize("name", STAGES)
def test_they_train_and_leave_no_trace(name):
    learn = toy_learner(regret)
    before = learn.validate()[0]
    cbs = list(learn.cbs)
    with quiet(learn): learn.fit(6, cbs=[STAGES[name](), KLToRef(beta=.01), GradientClip(1.)])
    assert list(learn.cbs) == cbs and learn.loss_func is regret
    assert learn.validate()[0] < .95*before

def both_parts(): return GDPO(dict(soft_only=1., gtprob=1.))

@pytest.mark.parametrize("make", [both_parts, CorrectedGRPO], ids=["gdpo", "corrected"])
def test_stages_with_columns_train_and_look_for_rates(make, tmp_path):
    learn = learner(n=80, path=tmp_path)
    before = learn.validate()[0]
    with quiet(learn), warnings.catch_warnings():
        warnings.simplefilter("ignore")   # of a small effective share
        learn.lr_find(num_it=8, show_plot=False, cbs=make())
        learn.fit(8, 1e-2, cbs=[make(), KLToRef(beta=.01)])
    assert learn.validate()[0] < before
    with quiet(learn), warnings.catch_warnings():
        warnings.simplefilter("ignore")   # of a small effective share
        learn.fit(1, 1e-3, cbs=[make(), GradientAccumulation(16)])

def test_batch_rows_are_those_of_the_walk():
    ds = dataset(proposed(dict(random=2), 10))
    dl = GroupDL(ds, bs=4, shuffle=True, seed=3)
    for _ in range(2):
        for k, b in enumerate(dl): assert torch.equal(b[3], ds.batch(dl.batch_rows(k))[3])
        assert sorted(dl.walk) == list(range(10))
    assert dl.batch_rows(2) == dl.walk[8:]
