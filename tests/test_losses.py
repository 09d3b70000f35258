"Objectives as pure functions: values by hand, gradients by finite differences, and what must change nothing"
import math
from itertools import permutations
import pytest, torch
from hypothesis import given, settings, strategies as st
from leverplus.core import masked_log_softmax
from leverplus.losses import *
from leverplus.synth import ToySelector, SynthGroups, pad_groups

LEVELS = torch.tensor([0., .3, .6, 1.], dtype=torch.float64)

def groups(seed, B=4, N=6, flat=True):
    "Ragged random groups in float64: one flat, one of a single sequence, one empty"
    g = torch.Generator().manual_seed(seed)
    logp = -5*torch.rand(B, N, generator=g, dtype=torch.float64) - .1
    rewards = LEVELS[torch.randint(4, (B, N), generator=g)]
    mask = torch.rand(B, N, generator=g) < .8; mask[0, :3] = True; rewards[0, 0], rewards[0, 1] = 0., 1.
    if flat: rewards[1], mask[2], mask[3] = .6, torch.arange(N) == 2, False
    return logp.masked_fill(~mask, -torch.inf), rewards.masked_fill(~mask, float("nan")), mask

LOSSES = {"regret": regret, "rce": lambda l, r, m: rce_loss(l, r, m, .4), "rce_zscore": lambda l, r, m: rce_loss(l, r, m, .4, "zscore"),
          "k3": lambda l, r, m: kl_k3(l, l.detach()*.9, m)}
POLICY = {"regret": regret, "rce_live": lambda l, r, m: rce_loss(l, r, m & live_groups(r, m)[:, None], .4),
          **{f"{how}_{sc}": (lambda l, r, m, how=how, sc=sc: clipped_surrogate(l, l.detach(), advantage(r, m, how, sc), m)) for how in SCALES for sc in SCALES[how]}}

@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("seed", range(3))
def test_gradient_is_the_finite_difference(name, seed):
    logp, rewards, mask = groups(seed); i = mask.nonzero(as_tuple=True)
    def f(x): return LOSSES[name](logp.index_put(i, x), rewards, mask) if name != "k3" else kl_k3(logp.index_put(i, x), logp*.9, mask)
    assert torch.autograd.gradcheck(f, logp[mask].clone().requires_grad_())

@pytest.mark.parametrize("kw", [{}, dict(dual=None), dict(clip_low=.05, clip_high=.05)])
def test_gradient_of_clipped_surrogate(kw):
    logp, rewards, mask = groups(1); old = logp.nan_to_num(neginf=0.) + .4*torch.randn(logp.shape, generator=torch.Generator().manual_seed(0)).double()
    adv, i = advantage(rewards, mask), mask.nonzero(as_tuple=True)
    f = lambda x: clipped_surrogate(logp.index_put(i, x), old, adv, mask, **kw)
    assert torch.autograd.gradcheck(f, logp[mask].clone().requires_grad_())

@pytest.mark.parametrize("name", POLICY)
def test_zero_signal_zero_gradient_and_no_nan(name):
    logp, rewards, mask = groups(3); x = logp.clone().requires_grad_()
    POLICY[name](x, rewards, mask).backward()
    assert x.grad.isfinite().all() and (x.grad[1:].abs() < 1e-15).all() and (x.grad[~mask] == 0).all() and (x.grad[0] != 0).any()
    x = logp.clone().requires_grad_(); POLICY[name](x, torch.where(mask, .3, rewards), mask).backward()
    assert (x.grad.abs() < 1e-15).all()

@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), pad=st.integers(1, 4), perm=st.permutations(range(6)))
def test_padding_permutation_and_company(seed, pad, perm):
    logp, rewards, mask = groups(seed, flat=False); perm = torch.tensor(perm)
    more = lambda t, v: torch.cat([t, torch.full((len(t), pad), v, dtype=t.dtype)], 1)
    for name, f in {**LOSSES, **POLICY, "surrogate": lambda l, r, m: clipped_surrogate(l, l.detach().nan_to_num(neginf=0.)-.3, advantage(r, m, "loo"), m)}.items():
        v = f(logp, rewards, mask)
        assert torch.isclose(f(more(logp, 0.), more(rewards, 9.), more(mask, False)), v), name
        assert torch.isclose(f(logp[:, perm], rewards[:, perm], mask[:, perm]), v), name
        if "batch" in name: continue   # depends on company by definition
        counts = live_groups(rewards, mask) if name == "rce_live" else mask.any(-1)
        one_by_one = torch.stack([f(logp[b:b+1], rewards[b:b+1], mask[b:b+1]) for b in counts.nonzero()[:, 0].tolist()]).mean()
        assert torch.isclose(one_by_one, v), name

def test_regret_bounds_and_reductions():
    logp, rewards, mask = groups(5)
    each = regret(logp, rewards, mask, reduction="none")
    assert each.shape == (4,) and (each >= 0).all() and each[3] == 0
    assert torch.isclose(regret(logp, rewards, mask), each[:3].mean())
    sure = torch.where(rewards == 1., 0., -50.).masked_fill(~mask, -torch.inf).double()
    assert regret(sure, rewards, mask, reduction="none")[0] < 1e-12
    with pytest.raises(ValueError, match="reduction"): regret(logp, rewards, mask, reduction="sum")

@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), how=st.sampled_from(list(SCALES)))
def test_advantages(seed, how):
    _, r, m = groups(seed)
    a = advantage(r, m, how)
    assert (a[~m] == 0).all() and (a[1:] == 0).all() and torch.allclose(a.sum(-1), torch.zeros(4).double(), atol=1e-9)
    i, j = m[0].nonzero()[:, 0].tolist()[:2]
    assert (a[0, i] - a[0, j]).sign() == (r[0, i] - r[0, j]).sign()
    assert torch.allclose(a, advantage(r + 5, m, how), atol=1e-6)
    if how == "rank": assert a.abs().max() <= 1
    assert advantage(r, m, how, clip=.2).abs().max() <= .2

def test_advantage_by_hand():
    r, m = torch.tensor([[1., 0, 0, 0, 7]]), torch.tensor([[True]*4 + [False]])
    assert torch.allclose(advantage(r, m, "center"), torch.tensor([[.75, -.25, -.25, -.25, 0]]))
    assert torch.allclose(advantage(r, m, "loo"), torch.tensor([[1., -1/3, -1/3, -1/3, 0]]))
    assert torch.allclose(advantage(r, m, "rank"), torch.tensor([[1., -1/3, -1/3, -1/3, 0]]))
    assert torch.allclose(advantage(r, m), torch.tensor([[1.5, -.5, -.5, -.5, 0]]))
    small = torch.tensor([[.01, 0, 0, 0, 0]])
    assert torch.allclose(advantage(small, m), advantage(small, m, "center") / .1)
    assert torch.allclose(advantage(r, m, "center", "batch", min_std=0.), advantage(r, m, "center") / (3/16)**.5)
    assert math.isclose(advantage(torch.tensor([[1., 0, 0]]), torch.ones(1, 3).bool(), min_std=0.).max(), 1.1547, rel_tol=1e-4)   # the reports' top-3
    for how, scale in (("zscore", "none"), ("rank", "group"), ("zscore", "batch")):
        with pytest.raises(ValueError, match="normalised already"): advantage(r, m, how, scale)
    with pytest.raises(ValueError, match="zscore, center, loo, rank"): advantage(r, m, "z")

def test_ratio_one_is_policy_gradient():
    logp, rewards, mask = groups(7); adv = advantage(rewards, mask)
    x, y = logp.clone().requires_grad_(), logp.clone().requires_grad_()
    clipped_surrogate(x, logp, adv, mask).backward(); (-group_mean(adv*y.masked_fill(~mask, 0), mask)).backward()
    assert torch.allclose(x.grad, y.grad)

def test_clip_and_dual_clip():
    m, z = torch.ones(1, 1).bool(), torch.zeros(1, 1)
    f = lambda ratio, A, **kw: float(clipped_surrogate(torch.tensor([[math.log(ratio)]]), z, torch.tensor([[A]]), m, **kw))
    assert f(2., 1.) == pytest.approx(-1.28) and f(.5, 1.) == pytest.approx(-.5)
    assert f(.5, -1.) == pytest.approx(.8) and f(10., -1.) == pytest.approx(3.) and f(10., -1., dual=None) == pytest.approx(10.)
    assert math.isfinite(f(1e8, 1.)) and clipped_surrogate(torch.tensor([[500.]]), z, torch.tensor([[-1.]]), m).isfinite()
    with pytest.raises(ValueError, match="dual"): f(1., 1., dual=.5)
    lp, adv = torch.tensor([[2., 1., .5, .5]]).log(), torch.tensor([[1., 1., -1., 1.]])
    assert [float(s) for s in clip_shares(lp, torch.zeros(1, 4), adv, torch.ones(1, 4).bool())] == pytest.approx([1/3, 1.])

# --- exact divergence -------------------------------------------------------------------------------------------------
def table_policy(seed, B, K, S, cand_mask, scale=2.):
    "A random policy given by a table of logits for every prefix"
    g = torch.Generator().manual_seed(seed)
    logits = {p: scale*torch.randn(B, K, generator=g, dtype=torch.float64) for t in range(S) for p in permutations(range(K), t)}
    def step(prefix):
        out = torch.stack([logits[tuple(p)] for p in prefix[0].tolist()], 1)
        taken = torch.zeros(out.shape, dtype=torch.bool).scatter(2, prefix, True)
        return masked_log_softmax(out, cand_mask[:, None] & ~taken)
    return step, logits

def brute(step_p, step_q, B, K, S):
    "KL and entropy by summing over all sequences"
    kl = h = total = 0.
    for y in permutations(range(K), S):
        lp, lq = (sum(s(torch.tensor(y[:t], dtype=torch.long).view(1, 1, t).expand(B, 1, t))[:, 0, y[t]] for t in range(S)) for s in (step_p, step_q))
        ok = lp > -torch.inf; p = lp.exp(); total = total + p
        kl, h = kl + (p*(lp - lq)).masked_fill(~ok, 0.), h - (p*lp).masked_fill(~ok, 0.)
    return kl, h, total

@pytest.mark.parametrize("S", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_exact_kl_and_entropy_are_brute_force(S, seed):
    B, K = 2, 5; cm = torch.ones(B, K, dtype=torch.bool); cm[1, 4] = False
    (p, _), (q, _) = table_policy(seed, B, K, S, cm), table_policy(seed+100, B, K, S, cm)
    kl, h, total = brute(p, q, B, K, S)
    assert torch.allclose(total, torch.ones(B).double())
    assert torch.allclose(kl_exact(p, q, cm, S), kl) and torch.allclose(entropy_exact(p, cm, S), h)
    per = kl_steps(p, q, cm, S); assert per.shape == (B, S) and (per >= 0).all()
    assert (kl_exact(p, p, cm, S).abs() < 1e-12).all()
    norm = entropy_steps(p, cm, S, normed=True); assert ((norm >= 0) & (norm <= 1 + 1e-9)).all()

def test_uniform_policy_has_all_the_entropy():
    cm = torch.ones(2, 6, dtype=torch.bool); cm[1, 4:] = False; flat, _ = table_policy(0, 2, 6, 2, cm, scale=0.)
    assert torch.allclose(entropy_exact(flat, cm, 2), torch.tensor([30., 12.]).double().log())
    assert torch.allclose(entropy_steps(flat, cm, 2, normed=True), torch.ones(2, 2).double())

def test_gradient_of_exact_kl():
    B, K, S = 1, 4, 3; cm = torch.ones(B, K, dtype=torch.bool); cm[0, 3] = False; cm4 = torch.ones(B, K, dtype=torch.bool)
    for mask in (cm, cm4):
        _, logits = table_policy(0, B, K, S, mask); q, _ = table_policy(9, B, K, S, mask); keys = list(logits)
        def f(*ls):
            tab = dict(zip(keys, ls))
            def step(prefix):
                out = torch.stack([tab[tuple(p)] for p in prefix[0].tolist()], 1)
                return masked_log_softmax(out, mask[:, None] & ~torch.zeros(out.shape, dtype=torch.bool).scatter(2, prefix, True))
            return kl_exact(step, q, mask, S).sum(), entropy_exact(step, mask, S).sum()
        assert torch.autograd.gradcheck(f, tuple(logits[k].clone().requires_grad_() for k in keys))

def test_kl_refuses_what_it_cannot_do():
    cm = torch.ones(2, 5, dtype=torch.bool); (p, _) = table_policy(0, 2, 5, 2, cm)
    less = cm.clone(); less[0, 2] = False; q, _ = table_policy(1, 2, 5, 2, less)
    with pytest.raises(ValueError, match="probability 0"): kl_exact(p, q, cm, 2)
    with pytest.raises(ValueError, match="at most 5"): kl_exact(p, p, cm, 6)
    with pytest.raises(ValueError, match="249,984 prefixes"): kl_exact(p, p, torch.ones(1, 64).bool(), 4)

def test_k3_is_unbiased_only_on_policy():
    cm = torch.ones(1, 5, dtype=torch.bool); (p, _), (q, _) = table_policy(0, 1, 5, 2, cm, 1.), table_policy(1, 1, 5, 2, cm, 1.)
    first = lambda s: s(torch.zeros(1, 1, 0, dtype=torch.long))[0, 0]
    lp, lq = first(p), first(q); i = torch.multinomial(lp.exp(), 200_000, True, generator=torch.Generator().manual_seed(0))[None]
    assert float(kl_k3(lp[i], lq[i], torch.ones_like(i, dtype=torch.bool))) == pytest.approx(float(kl_exact(p, q, cm, 1)), abs=.02)

def test_toy_selector_sums_to_one_and_ignores_padding():
    items = [SynthGroups(20, K=(4, 6), N=(3, 6), shots=(1, 2, 3), seed=1)[i] for i in range(20)]
    model, (*xb, r, m) = ToySelector(8), pad_groups(items)
    whole = model(*xb)
    for b in range(20):
        *one, r1, m1 = pad_groups(items[b:b+1])
        assert torch.allclose(model(*one)[m1], whole[b][m[b]], atol=1e-5)
    assert {int(k) for k in xb[4].sum(-1).unique()} == {0, 1, 2, 3}
