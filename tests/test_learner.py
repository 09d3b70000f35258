"The learner of the real selector: stages, identities of the policy in training, checkpoints"
import json, warnings
import pytest, torch
from leverplus.callback_core import Stats
from leverplus.callback_schedule import Freeze
from leverplus.callback_track import Best, valid_loss
from leverplus.learner import load_selector, quiet, selector_learner
from leverplus.losses import kl_exact, regret
from leverplus.selector import PointerSelector
from leverplus.synth import ToySelector, synth_dls

def learner(n=64, **kw):
    kw = dict(d_hidden=16, n_heads=2) | kw
    return selector_learner(synth_dls(n, 32, 16, K=(5, 7), N=(2, 6), shots=(1, 2)), **kw)
def weights(learn): return {k: v.detach().clone() for k, v in learn.model.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

class Stop(Stats):
    "Ctrl-C in the middle of a backward pass"
    order, name = 7, "stop"
    def after_backward(self):
        if self.train_iter == 2: raise KeyboardInterrupt

def test_two_stages_reduce_regret_and_keep_one_history():
    learn = selector_learner(synth_dls(256, 128, 32, K=(5, 7), N=(2, 6), shots=(1, 2)), d_hidden=16); v0 = valid_loss(learn)
    with quiet(learn): assert learn.fit_rce(4, 2e-2, temp=(1., .2)) is learn; v1 = valid_loss(learn); learn.fit_grpo(4, 5e-3); v2 = valid_loss(learn)
    assert v2 < v1 < v0
    f = learn.history.frame
    assert f.stage.tolist() == ["rce"]*4 + ["grpo"]*4 and f.temp.iloc[0] > .85 and f.temp.iloc[3] < .35
    assert f.ratio_off.iloc[4:].max() <= 1e-5 and (f.kl.iloc[4:] >= 0).all() and f.kl.iloc[-1] > f.kl.iloc[4]
    assert {"train_loss", "valid_loss", "live", "mass", "entropy", "ess", "adv_std", "clip_pos", "clip_neg", "kl_1", "kl_2", "beta"} <= set(f)

@pytest.mark.parametrize("kw", [dict(), dict(state="none", prior=False), dict(n_layers=0), dict(dropout=.5)])
def test_ratio_and_kl_at_the_first_step_for_real_selectors(kw):
    learn = learner(**kw)
    with quiet(learn): learn.fit_grpo(1, 1e-3, beta=1.)
    assert learn.stats.mean("ratio_off") <= 1e-5 and abs(float(learn.stats.buf["kl"][0][0])) < 1e-6

def test_kl_of_the_selector_is_brute_force():
    torch.manual_seed(0)
    p, q = (PointerSelector(8, 16, prior=False).eval() for _ in range(2)); *xb, r, m = learner().dls.valid.one_batch(); cm = xb[2]; K = cm.shape[1]
    ep, eq = p.encode(*xb[:3]), q.encode(*xb[:3]); every, lp = p.enumerate(ep, 2); _, lq = q.enumerate(eq, 2); ok = lp > -torch.inf
    brute = (lp.exp()*(lp.masked_fill(~ok, 0) - lq.masked_fill(~ok, 0))).sum(-1)
    got = kl_exact(lambda x: p.step_logp(ep, x), lambda x: q.step_logp(eq, x), cm, 2)
    assert torch.allclose(got, brute, atol=1e-5) and (got > 0).all()

def test_zero_epochs_says_so():
    learn = learner(); w = weights(learn)
    with pytest.warns(UserWarning, match="0 epochs asked of the stage .*GRPO"): assert learn.fit_grpo() is learn
    assert same(w, weights(learn)) and learn.history.rows == []
    with pytest.raises(ValueError, match="-1 epochs"): learn.fit_rce(-1)

def test_nothing_stays_behind():
    learn = learner(); cbs, loss = list(learn.cbs), learn.loss_func
    with quiet(learn):
        learn.fit_rce(1); learn.fit_grpo(1)
        with pytest.raises(KeyboardInterrupt): learn.fit_grpo(1, cbs=Stop())
        assert all(p.requires_grad for p in learn.model.parameters())
        assert not {"rce", "grpo", "kl_to_ref", "best", "no_dropout"} & set(vars(learn))
        v = learn.validate()[0]; assert v == pytest.approx(valid_loss(learn), abs=1e-6)
        learn.fit_rce(1); assert learn.history.frame.fit.iloc[-1] == 4
    assert sorted(id(c) for c in learn.cbs) == sorted(id(c) for c in cbs) and learn.loss_func is loss is regret

def test_an_interrupted_fit_leaves_no_gradient_for_the_next():
    a, b = learner(dropout=0.), learner(dropout=0.)
    import random
    with quiet(a), quiet(b):
        with pytest.raises(KeyboardInterrupt): b.fit_rce(1, cbs=Stop())
        b.model.load_state_dict(a.model.state_dict()); a.dls.train.rng, b.dls.train.rng = random.Random(3), random.Random(3)
        a.fit_rce(1); b.fit_rce(1)
    assert same(weights(a), weights(b))

def test_same_seed_same_weights_and_other_seed_other():
    def run(seed):
        learn = learner(seed=seed)
        with quiet(learn): learn.fit_rce(1).fit_grpo(1)
        return weights(learn)
    assert same(run(3), run(3)) and not same(run(3), run(4))

def test_stage_options():
    learn = learner(); w = weights(learn)
    with quiet(learn): learn.fit_rce(1, temp=.5, norm="zscore", skip_flat=False, max_norm=None, best=False, cbs=Freeze("query_proj"))
    now = weights(learn); assert same({k: w[k] for k in w if k.startswith("query_proj")}, {k: now[k] for k in w if k.startswith("query_proj")})
    assert learn.history.frame.temp.iloc[0] == pytest.approx(.5) and "live" not in learn.history.frame or learn.history.frame.live.isna().all()
    with quiet(learn): learn.fit_grpo(1, beta=0., how="loo", scale="batch", refresh=2, best=(best := Best(min_delta=.5)))
    assert learn.history.frame.kl.isna().all() and best.best_epoch == -1

def test_get_preds_with_loss_is_regret_per_query():
    learn = learner()
    with quiet(learn): logp, (rewards, mask), each = learn.get_preds(with_loss=True)
    assert each.shape == (32,) and torch.isclose(each.mean(), torch.tensor(valid_loss(learn)), atol=1e-6)   # T9

def test_selector_learner_refuses():
    with pytest.raises(ValueError, match="pass either"): selector_learner(synth_dls(16, 16), ToySelector(8), d_hidden=4)
    class Plain: n_inp = 1
    with pytest.raises(ValueError, match="five inputs"): selector_learner(Plain())

def test_toy_policy_works_too():
    learn = selector_learner(synth_dls(32, 16), ToySelector(8, .1))
    with quiet(learn): learn.fit_rce(1).fit_grpo(1)
    assert len(learn.history.frame) == 2

def test_save_and_load(tmp_path):
    learn = learner(); info = dict(pool=dict(sampler="mixed", K=16), data="0123456789abcdef")
    with quiet(learn): learn.fit_rce(1)
    learn.save_selector(tmp_path/"a", info); model = load_selector(tmp_path/"a")
    assert model.info == info and not model.training and same(weights(learn), dict(model.state_dict()))
    assert valid_loss(selector_learner(learn.dls, model)) == pytest.approx(valid_loss(learn), abs=1e-6)
    assert len((tmp_path/"a"/"history.csv").read_text().splitlines()) == 2
    cfg = json.loads((tmp_path/"a"/"config.json").read_text()); (tmp_path/"a"/"config.json").write_text(json.dumps({**cfg, "d_hidden": 8}))
    with pytest.raises((ValueError, RuntimeError), match="query_proj"): load_selector(tmp_path/"a")
    with pytest.raises(FileNotFoundError): load_selector(tmp_path/"nowhere")
