"The learner of the real selector: stages, identities of the policy in training, checkpoints"
import inspect, json, os, random, signal, subprocess, sys, warnings
from collections import Counter, defaultdict, deque
from dataclasses import fields
from functools import partial
import numpy as np, pandas as pd, pytest, torch
from fastai.callback.core import Callback
from fastai.callback.schedule import ParamScheduler, SchedCos, SchedLin, combine_scheds
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.optimizer import Adam, RAdam
from leverplus.callback_core import StageCallback, Stats
from leverplus.callback_grpo import GRPO
from leverplus.callback_kl import AdaptiveKL, EntropyFloor, KLToRef
from leverplus.callback_listwise import SFT, Listwise
from leverplus.callback_rce import RCE
from leverplus.callback_schedule import Freeze, Phases, TopKCurriculum
from leverplus.callback_schedule import TempSchedule
from leverplus.callback_track import (
    Best, KeptFit, Resume, _describe, _memory, _remember, data_prints, missed, regrets, valid_loss,
)
from leverplus.checkpoints import read_state
from leverplus.core import read_json, rng, write_json
from leverplus.diagnose import data_facts
from leverplus.dls import GroupDataset, group_dls
from leverplus.embed import EmbedStore
from leverplus.groups import RLData
from leverplus.learner import Distill, Stage, load_selector, mean_logp, selector_learner
from leverplus.synth import quiet
from leverplus.losses import kl_exact, regret
from leverplus.pools import Pool
from leverplus.curves import diagnoses
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
    learn = selector_learner(synth_dls(256, 128, 32, K=(5, 7), N=(2, 6), shots=(1, 2)), d_hidden=16)
    v0 = valid_loss(learn)
    with quiet(learn):
        assert learn.fit_rce(4, 2e-2, temp=(1.0, 0.2)) is learn
        v1 = valid_loss(learn)
        learn.fit_grpo(4, 5e-3)
        v2 = valid_loss(learn)
    assert v2 < v1 < v0
    f = learn.history.frame
    assert f.stage.tolist() == ["rce"]*4 + ["grpo"]*4 and f.temp.iloc[0] > .85 and f.temp.iloc[3] < .35
    assert f.ratio_off.iloc[4:].max() <= 1e-5 and (f.kl.iloc[4:] >= 0).all() and f.kl.iloc[-1] > f.kl.iloc[4]
    assert {
        "train_loss",
        "valid_loss",
        "live",
        "mass",
        "entropy",
        "ess",
        "adv_std",
        "clip_pos",
        "clip_neg",
        "kl_1",
        "kl_2",
        "beta",
    } <= set(f)

@pytest.mark.parametrize("kw", [dict(), dict(state="none", prior=False), dict(n_layers=0), dict(dropout=.5)])
def test_ratio_and_kl_at_the_first_step_for_real_selectors(kw):
    learn = learner(**kw)
    with quiet(learn): learn.fit_grpo(1, 1e-3, beta=1.)
    assert learn.stats.mean("ratio_off") <= 1e-5 and abs(float(learn.stats.buf["kl"][0][0])) < 1e-6

def test_kl_of_the_selector_is_brute_force():
    torch.manual_seed(0)
    p, q = (PointerSelector(8, 16, prior=False).eval() for _ in range(2))
    *xb, r, m = learner().dls.valid.one_batch()
    cm = xb[2]
    K = cm.shape[1]
    ep = p.encode(*xb[:3])
    eq = q.encode(*xb[:3])
    every, lp = p.enumerate(ep, 2)
    _, lq = q.enumerate(eq, 2)
    ok = lp > -torch.inf
    brute = (lp.exp()*(lp.masked_fill(~ok, 0) - lq.masked_fill(~ok, 0))).sum(-1)
    got = kl_exact(lambda x: p.step_logp(ep, x), lambda x: q.step_logp(eq, x), cm, 2)
    assert torch.allclose(got, brute, atol=1e-5) and (got > 0).all()

def test_zero_epochs_says_so():
    learn = learner()
    w = weights(learn)
    with pytest.warns(UserWarning, match="0 epochs asked of the stage .*GRPO"):
        assert learn.fit_grpo(0) is learn
    assert same(w, weights(learn)) and learn.history.rows == []
    with pytest.raises(ValueError, match="n_epoch -1: wanted a whole number >= 0"): learn.fit_rce(-1)
    with pytest.raises(TypeError, match="n_epoch"): learn.fit_grpo()

def test_nothing_stays_behind():
    learn = learner()
    cbs = list(learn.cbs)
    loss = learn.loss_func
    with quiet(learn):
        learn.fit_rce(1)
        learn.fit_grpo(1)
        with pytest.raises(KeyboardInterrupt): learn.fit_grpo(1, cbs=Stop())
        assert all(p.requires_grad for p in learn.model.parameters())
        assert not {"rce", "grpo", "kl_to_ref", "best", "no_dropout"} & set(vars(learn))
        v = learn.validate()[0]
        assert v == pytest.approx(valid_loss(learn), abs=1e-6)
        learn.fit_rce(1)
        assert learn.history.frame.fit.iloc[-1] == 4
    assert (
        sorted(id(c) for c in learn.cbs) == sorted(id(c) for c in cbs) and learn.loss_func is loss is regret
    )

def test_an_interrupted_fit_leaves_no_gradient_for_the_next():
    a = learner(dropout=0.)
    b = learner(dropout=0.)
    import random
    with quiet(a), quiet(b):
        with pytest.raises(KeyboardInterrupt): b.fit_rce(1, cbs=Stop())
        b.model.load_state_dict(a.model.state_dict())
        a.dls.train.rng, b.dls.train.rng = random.Random(3), random.Random(3)
        a.fit_rce(1)
        b.fit_rce(1)
    assert same(weights(a), weights(b))

def test_same_seed_same_weights_and_other_seed_other():
    def run(seed):
        learn = learner(seed=seed)
        with quiet(learn): learn.fit_rce(1).fit_grpo(1)
        return weights(learn)
    assert same(run(3), run(3)) and not same(run(3), run(4))

def test_stage_options():
    learn = learner()
    w = weights(learn)
    with quiet(learn):
        learn.fit_rce(
            1, temp=0.5, norm="zscore", skip_flat=False, max_norm=None, best=False, cbs=Freeze("query_proj")
        )
    now = weights(learn)
    assert same(
        {k: w[k] for k in w if k.startswith("query_proj")},
        {k: now[k] for k in w if k.startswith("query_proj")},
    )
    assert (
        learn.history.frame.temp.iloc[0] == pytest.approx(0.5)
        and "live" not in learn.history.frame
        or learn.history.frame.live.isna().all()
    )
    with quiet(learn):
        learn.fit_grpo(1, beta=0.0, baseline="loo", scale="batch", refresh=2, best=(best := Best(min_delta=0.5)))
    assert learn.history.frame.kl.isna().all() and best.best_epoch == -1

def test_get_preds_with_loss_is_regret_per_query():
    learn = learner()
    with quiet(learn): logp, (rewards, mask), each = learn.get_preds(with_loss=True)
    # T9
    assert each.shape == (32,) and torch.isclose(each.mean(), torch.tensor(valid_loss(learn)), atol=1e-6)

def test_selector_learner_refuses():
    with pytest.raises(ValueError, match="pass either"):
        selector_learner(synth_dls(16, 16), ToySelector(8), d_hidden=4)
    class Plain: n_inp = 1
    with pytest.raises(ValueError, match="five inputs"): selector_learner(Plain())

def test_toy_policy_works_too():
    learn = selector_learner(synth_dls(32, 16), ToySelector(8, .1))
    with quiet(learn): learn.fit_rce(1).fit_grpo(1)
    assert len(learn.history.frame) == 2

def test_save_and_load(tmp_path):
    learn = learner()
    info = dict(pool=dict(sampler="mixed", K=16), data="0123456789abcdef")
    with quiet(learn): learn.fit_rce(1)
    learn.save_selector(tmp_path / "a", info)
    model = load_selector(tmp_path / "a")
    assert model.info == learn.about() | info and not model.training and same(weights(learn), dict(model.state_dict()))
    assert valid_loss(selector_learner(learn.dls, model)) == pytest.approx(valid_loss(learn), abs=1e-6)
    assert len((tmp_path/"a"/"history.csv").read_text().splitlines()) == 2
    cfg = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps({**cfg, "d_hidden": 8}))
    with pytest.raises((ValueError, RuntimeError), match="query_proj"): load_selector(tmp_path/"a")
    with pytest.raises(FileNotFoundError): load_selector(tmp_path/"nowhere")

# --- what a stage adds to a fit ----------------------------------------------------------------------------
class Look(StageCallback):
    "Norm of the gradient, and learning rate, of every step that is taken"
    order = 90
    def before_fit(self): self.norms, self.lrs = [], []
    def before_step(self):
        grads = [p.grad.norm() for p in self.model.parameters() if p.grad is not None]
        self.norms.append(float(torch.stack(grads).norm()))
    def after_step(self): self.lrs.append(self.opt.hypers[-1]["lr"])

STAGES = dict(
    fit_rce=lambda: [RCE(temp=(2., .5))],
    fit_listwise=lambda: [Listwise()],
    fit_sft=lambda: [SFT()],
    fit_grpo=lambda: [GRPO(), KLToRef()],
)
@pytest.mark.parametrize("name", STAGES)
def test_a_stage_is_a_fit_with_what_the_table_says(name):
    "Schedule, clipping, best weights, fresh optimiser: with them a plain fit ends at the same weights"
    cbs = STAGES[name]
    def plain(*more, **fit_kw):
        learn = learner(dropout=.3)
        with quiet(learn): learn.fit(3, 1e-2, cbs=[*cbs(), *more], **fit_kw)
        return weights(learn)
    def staged(**more):
        learn = learner(dropout=.3)
        with quiet(learn): getattr(learn, name)(3, 1e-2, **more)
        return weights(learn)
    def falling(): return ParamScheduler({"lr": SchedCos(1e-2, 0.)})
    assert same(staged(), plain(falling(), GradientClip(1.), Best()))
    assert same(staged(best=False), plain(falling(), GradientClip(1.)))
    assert same(staged(best=False, max_norm=None), plain(falling()))
    assert not same(staged(best=False, max_norm=None), plain())

def test_schedule_and_clipping_of_a_stage():
    def seen(verb, *args, **kw):
        learn = learner()
        look = Look()
        cbs = [*kw.pop("cbs", ()), look]
        with quiet(learn): getattr(learn, verb)(2, 1e-2, *args, cbs=cbs, **kw)
        return look
    staged = seen("fit_rce", max_norm=.5)
    plain = seen("fit", cbs=[RCE(temp=(2., .5))])
    assert staged.lrs[0] == pytest.approx(1e-2) and staged.lrs[-1] < 1e-3
    assert all(b < a for a, b in zip(staged.lrs, staged.lrs[1:]))
    assert set(plain.lrs) == {1e-2}
    assert max(staged.norms) <= .5 + 1e-4 < max(plain.norms)

def test_best_of_a_stage_and_its_watch():
    class Worse(RCE):
        def objective(self, *a): return -super().objective(*a)
    start = weights(learner())
    learn = learner()
    with quiet(learn): learn.fit_stage(2, 1e-2, Worse(.1))
    assert same(start, weights(learn))
    with quiet(learn): learn.fit(2, 1e-2, cbs=Worse(.1))
    assert not same(start, weights(learn))
    dead = learner()
    dead.dls.train_ds.rows = nearly_flat(dead)
    def said(verb, *args, **kw):
        with quiet(dead), warnings.catch_warnings(record=True) as ws:
            warnings.simplefilter("always")
            getattr(dead, verb)(1, 1e-2, *args, **kw)
        return [str(w.message) for w in ws]
    assert any("after one epoch: Few groups" in m for m in said("fit_stage", RCE()))
    assert not any("after one epoch" in m for m in said("fit", cbs=RCE()))

def test_a_stage_has_a_fresh_optimiser():
    def steps(learn): return {int(s["step"]) for s in learn.opt.state_dict()["state"] if "step" in s}
    learn = learner()
    with quiet(learn):
        learn.fit(1, 1e-2, cbs=RCE())
        learn.fit(1, 1e-2, cbs=RCE())
        assert max(steps(learn)) == 8
        learn.fit_rce(1, 1e-2)
    assert max(steps(learn)) == 4

def test_settings_of_a_stage():
    "One place: every method takes them, refuses others, and hands them on"
    learn = learner()
    with pytest.raises(Exception, match="frozen|cannot assign"): Stage().max_norm = 2.
    with pytest.raises(TypeError): Stage(1.)
    for call in (
        lambda: learn.fit_rce(0, max_nrm=1.),
        lambda: learn.fit_stage(0, 1e-3, RCE(), colour="red"),
        lambda: learn.fit_grpo(0, colour="red"),
        lambda: learn.fit_listwise(0, tau=.1),
    ):
        with pytest.raises(TypeError, match="max_nrm|colour|tau"): call()
    names = {f.name for f in fields(Stage)}
    for verb in ("fit_stage", "fit_rce", "fit_listwise", "fit_sft", "fit_warmup"):
        assert names <= set(inspect.signature(getattr(type(learn), verb)).parameters)

class Nothing(StageCallback):
    "Does nothing"

@pytest.mark.parametrize("make", [lambda: RCE((2., .5)), lambda: Listwise(temp="sharp"), SFT, GRPO])
def test_an_objective_that_was_used_before_resumes(tmp_path, make):
    "What is left on it from another fit is no setting"
    def go(*cbs):
        learn = learner(32)
        with quiet(learn), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            learn.fit_stage(2, 1e-2, cbs, resume=tmp_path/"run")
        return weights(learn)
    new = go(make(), KLToRef())
    used = make()
    kl = KLToRef()
    other = learner(48)
    with quiet(other): other.fit(1, cbs=[used, kl])
    assert same(new, go(used, kl))

@pytest.mark.parametrize("said", [None, True, False])
def test_who_says_whether_flat_groups_leave(said):
    def live(objective):
        learn = learner()
        with quiet(learn): learn.fit_stage(1, 1e-2, objective, skip_flat=said, watch=None)
        return learn.stats.mean("live") == learn.stats.mean("live")
    assert live(RCE()) == (said is not False)
    assert live(RCE(skip_flat=False)) == (said is True)
    assert live(Nothing()) == (said is not False)   # no objective: the Learner's own loss

# --- the other stages, shots, results ----------------------------------------------------------------------
@pytest.mark.parametrize(
    "stage,kw",
    [
        ("fit_listwise", {}),
        ("fit_listwise", dict(temp=(0.5, 0.1), beta=0.1)),
        ("fit_listwise", dict(ref="none", ess=0.5)),
        ("fit_sft", {}),
        ("fit_sft", dict(top=None, temp=0.2, min_score=0.1)),
        ("fit_rce", dict(temp="sharp", weights="rank")),
    ],
)
def test_first_stages_reduce_regret(stage, kw):
    learn = selector_learner(synth_dls(128, 64, 32, K=6, N=6), d_hidden=16, prior=False)
    v0 = valid_loss(learn)
    with quiet(learn): getattr(learn, stage)(3, 2e-2, **kw)
    f = learn.history.frame
    assert (
        valid_loss(learn) < v0 - 0.01
        and set(f.stage) == {stage.removeprefix("fit_")}
        and f.same_as_start.iloc[-1] < 1
    )
    if "temp" in kw and stage == "fit_listwise": assert f.temp.iloc[0] > .3 > f.temp.iloc[-1] and f.kl.notna().all()

@pytest.mark.parametrize("split", [False, True])
def test_one_model_for_one_to_four_shots(split):
    joint = selector_learner(synth_dls(160, 32, 32, K=7, N=12, shots=(1, 2, 3, 4)), d_hidden=16, prior=False)
    start = {k: v.clone() for k, v in joint.model.state_dict().items()}
    each = {s: selector_learner(synth_dls(8, 128, K=7, N=6, shots=(s,)), joint.model) for s in (1, 2, 3, 4)}
    v0 = {s: valid_loss(l) for s, l in each.items()}
    with quiet(joint): joint.fit_rce(5, 2e-2, temp=.3, split_shots=split).fit_grpo(1, 1e-3, split_shots=split)
    assert all(valid_loss(l) < v0[s] for s, l in each.items()) and not same(start, weights(joint))
    assert all(
        joint.model.greedy(joint.model.encode(*l.dls.valid.one_batch()[:3]), s).shape[1] == s
        for s, l in each.items()
    )

def test_new_parts_of_the_selector_pass_through():
    learn = learner(scorer="bilinear", state="gru")
    assert learn.model.config["scorer"] == "bilinear" and learn.model.config["state"] == "gru"
    with quiet(learn): learn.fit_rce(1)
    with pytest.raises(TypeError, match="colour"): learner(colour=3)

def test_show_results_is_what_the_policy_does():
    learn = learner()
    w = weights(learn)
    state = (torch.get_rng_state(), random.getstate(), learn.dls.valid.rng.getstate())
    f = learn.show_results(max_n=5)
    *xb, r, m = learn.dls.valid.one_batch()
    lp = learn.model.eval()(*xb)
    assert len(f) == 5 and list(f) == ["query", "picks", "expected", "best", "likeliest"]
    assert (f.best - f.expected).tolist() == pytest.approx(regrets(learn)[:5].tolist(), abs=1e-6) and (
        f.best - f.likeliest
    ).tolist() == pytest.approx(missed(learn)[:5].tolist(), abs=1e-6)
    assert f.picks.tolist() == learn.model.greedy(learn.model.encode(*xb[:3]), 2)[:5].tolist() and same(
        w, weights(learn)
    )
    assert len(learn.show_results(0, max_n=3, shots=1).picks[0]) == 1

# --- going on after a kill ---------------------------------------------------------------------------------
def stages(name): # every callback that remembers something, in the stage where it belongs
    if name == "rce":
        return "fit_rce", dict(
            n_epoch=4,
            lr=1e-2,
            cbs=[
                KLToRef(beta=0.05),
                AdaptiveKL(0.001, 0.01),
                Phases(dict(few=(range(20), 2), all=(None, 2))),
            ],
        )
    if name == "grpo":
        return "fit_grpo", dict(
            n_epoch=4,
            lr=5e-3,
            refresh=3,
            cbs=[EntropyFloor(0.99), TopKCurriculum((3, 4))],
            best=Best(promote="paired", patience=3),
        )
    if name == "never": return "fit_grpo", dict(n_epoch=4, lr=5e-3, refresh="never", best=False, strict=False)
    return "fit_listwise", dict(n_epoch=4, lr=1e-2, best=Best(missed, patience=2))

class Die(StageCallback):
    "Breaks the fit off in the backward pass of batch `Die.at`, once"
    order, at = 7, None
    def after_backward(self):
        if self.train_iter == Die.at:
            Die.at = None
            raise SystemExit("killed")

def train(name, folder=None, at=None, **more):
    Die.at = at
    learn = learner(48, dropout=0.3)
    stage, kw = stages(name)
    kw["cbs"] = [*kw.get("cbs", ()), Die()]
    with quiet(learn), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        getattr(learn, stage)(**kw | more, resume=folder)
    return learn

def equal(a, b):
    "Same weights, optimiser, history and random state"
    fa, fb = (l.history.frame.drop(columns="seconds") for l in (a, b))
    assert same(weights(a), weights(b)) and fa.equals(fb) and torch.equal(torch.get_rng_state(), equal.rng)
    assert [list(map(str, r)) for r in a.recorder.values] == [
        list(map(str, r)) for r in b.recorder.values
    ] and a.dls.train.rng.getstate() == b.dls.train.rng.getstate()
    for x, y in zip(*(l.opt.state_dict()["state"] for l in (a, b))):
        assert x.keys() == y.keys() and all(
            torch.equal(torch.as_tensor(x[k]), torch.as_tensor(y[k])) for k in x
        )

@pytest.mark.parametrize("name,at", [("rce", (1, 6)), ("grpo", (4, 7)), ("never", (8,)), ("listwise", (4,))])
def test_resumed_is_uninterrupted(tmp_path, name, at):
    whole = train(name, tmp_path / "whole")
    equal.rng = torch.get_rng_state()
    plain = train(name)
    assert same(weights(whole), weights(plain))   # writing the state changes nothing
    for i in at:
        with pytest.raises(SystemExit): train(name, tmp_path/"run", at=i)
    equal(whole, train(name, tmp_path/"run"))
    # finished: nothing is trained, all is restored
    again = train(name, tmp_path / "run", at=0)
    equal(whole, again)
    assert Die.at == 0
    assert not again.model.training and sorted(
        p.name for p in (tmp_path / "run").iterdir() if p.name[0] != "."
    ) == ["history.csv", "settings.json", "state.pt"]

KILL = """
import os, signal, sys, torch
sys.path[:0] = [{tests!r}]
import test_learner as t
class Kill(t.Die):
    name = "die"
    def after_backward(self):
        if self.train_iter == {at}: os.kill(os.getpid(), signal.SIGKILL)
t.Die = Kill; torch.set_num_threads({threads}); t.train("rce", {folder!r})
"""
def test_kill_minus_nine(tmp_path):
    at = random.Random(0).randrange(3, 8)
    code = KILL.format(
        tests=os.path.dirname(__file__), at=at, threads=torch.get_num_threads(), folder=str(tmp_path / "run")
    )
    r = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert r.returncode == -signal.SIGKILL, r.stderr[-2000:]
    assert (tmp_path/"run"/"state.pt").exists() and not list((tmp_path/"run").glob(".*.tmp"))
    assert same(weights(train("rce", tmp_path/"run")), weights(train("rce")))

def test_a_state_that_was_cut_short_is_never_the_state(tmp_path):
    "A kill while the file is written leaves the one before"
    import leverplus.learner as l
    def half(state, path):
        path.write_bytes(b"PK")
        raise SystemExit("killed while writing")
    keep, n = torch.save, []
    def save(*a, **k):
        n.append(1)
        return half(*a) if len(n) == 2 else keep(*a, **k)
    l.torch.save = save
    try:
        with pytest.raises(SystemExit): train("rce", tmp_path/"run")
    finally: l.torch.save = keep
    assert same(weights(train("rce", tmp_path/"run")), weights(train("rce")))

@pytest.mark.parametrize(
    "more,said",
    [
        (dict(lr=2e-2), "optimiser.lr"),
        (dict(n_epoch=5, cbs=[Die()]), "n_epoch"),
        (dict(max_norm=2.0), "max_norm"),
        (dict(temp=0.3), "rce.temp"),
        (dict(cbs=[Die()]), "kl_to_ref"),
    ],
)
def test_another_run_is_refused(tmp_path, more, said):
    with pytest.raises(SystemExit): train("rce", tmp_path/"run", at=4)
    before = (tmp_path/"run"/"state.pt").read_bytes()
    with pytest.raises(ValueError, match=f"holds a run with other settings(.|\n)*{said}"):
        train("rce", tmp_path / "run", **more)
    assert (tmp_path/"run"/"state.pt").read_bytes() == before

def test_other_data_and_weights_are_refused(tmp_path):
    def go(seed=0, n=32):
        learn = selector_learner(synth_dls(n, 16, 16), seed=seed, d_hidden=16)
        with quiet(learn): learn.fit_rce(1, resume=tmp_path/"run")
    go()
    with pytest.raises(ValueError, match="seed: 0 there, 1 now(.|\n)*fingerprint of start"): go(seed=1)
    with pytest.raises(ValueError, match="fingerprint of train items"): go(n=33)

# --- data that changed between a kill and the next start ----------------------------------------------------
STORE_IDS = [*range(40), *range(1000, 1060), *range(2000, 2020)]

def a_store(seed=0):
    g = torch.Generator().manual_seed(seed)
    return EmbedStore(STORE_IDS, *(torch.randn(len(STORE_IDS), 4, generator=g) for _ in range(2)))

def a_record(first, n, seed=0):
    "Groups of four sequences of two out of pools of six"
    g = rng("resume data", first)
    ids = range(first, first + n)
    pool = Pool({q: g.choice(40, 6, replace=False) for q in ids}, dict(sampler="random", K=6))
    tried = [(q, tuple(pool[q][i] for i in pair)) for q in ids for pair in ((0, 1), (2, 3), (4, 5), (1, 0))]
    rows = pd.DataFrame(tried, columns=["question_id", "pointer"])
    rows["vqa_acc_score"] = rng("resume rewards", first, seed).choice([0., .3, .6, 1.], len(rows))
    rows["vqa_correct"] = (rows.vqa_acc_score > 0)*1.
    return RLData(rows, pool)

def with_rows(data, rows): return RLData(rows, data.pool)

def other_reward(data, which):
    rows = data.rows.copy()
    rows.loc[rows.index[which], "vqa_acc_score"] = 1 - rows.vqa_acc_score.iloc[which]
    return with_rows(data, rows)

def other_pools(data):
    "The same sequences in pools with one more candidate"
    more = {q: (*pool, next(d for d in range(40) if d not in pool)) for q, pool in data.pool.ids.items()}
    return RLData(data.rows, Pool(more, data.pool.recipe))

def without(data, row): return with_rows(data, data.rows.drop(index=row).reset_index(drop=True))

def reordered(data):
    "The first query's sequences the other way round; all else as it was"
    rows = data.rows
    return with_rows(data, rows.iloc[[3, 2, 1, 0, *range(4, len(rows))]].reset_index(drop=True))

TRAIN, DEV = a_record(1000, 60), a_record(2000, 20)
CHANGES = dict(
    many_rewards=(dict(train=other_reward(TRAIN, slice(4, 236))), "train rewards"),
    one_reward=(dict(train=other_reward(TRAIN, 117)), "train rewards"),
    a_dev_reward=(dict(valid=other_reward(DEV, 40)), "dev rewards"),
    a_row_less=(dict(train=without(TRAIN, 117)), "train rows"),
    reordered=(dict(train=reordered(TRAIN)), "train rows"),
    queries=(dict(train=with_rows(TRAIN, TRAIN.rows.iloc[:-4])), "train queries"),
    pools=(dict(train=other_pools(TRAIN), any_pool=True), "train pools"),
    embeddings=(dict(store=a_store(1)), "train embeddings"),
    another_dev=(dict(valid=a_record(2000, 19)), "dev queries"),
    another_mode=(dict(reward="hard_plus_soft"), "reward"),
    weights=(dict(soft_weight=2.), "reward"),
    batches=(dict(bs=10), "train batches"),
)

def train_groups(folder, at=None, **kw):
    Die.at = at
    how = dict(train=TRAIN, valid=DEV, store=a_store(), reward="soft_only", bs=12, device="cpu") | kw
    learn = selector_learner(group_dls(**how), d_hidden=8)
    with quiet(learn), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        learn.fit_rce(3, 1e-2, cbs=Die(), resume=folder)
    return learn

@pytest.mark.parametrize("name", CHANGES)
def test_changed_data_are_refused_by_name(tmp_path, name):
    kw, says = CHANGES[name]
    with pytest.raises(SystemExit): train_groups(tmp_path/"run", at=7)
    before = (tmp_path/"run"/"state.pt").read_bytes()
    with pytest.raises(ValueError, match=f"fingerprint of {says}"): train_groups(tmp_path/"run", **kw)
    assert (tmp_path/"run"/"state.pt").read_bytes() == before
    again = train_groups(tmp_path/"run")
    assert same(weights(again), weights(train_groups(None)))

def test_one_other_reward_is_the_only_thing_that_is_named(tmp_path):
    with pytest.raises(SystemExit): train_groups(tmp_path/"run", at=7)
    with pytest.raises(ValueError) as e: train_groups(tmp_path/"run", train=other_reward(TRAIN, 117))
    assert str(e.value).count("fingerprint of") == 1

def test_a_state_that_knows_a_sample_of_its_data_is_refused(tmp_path):
    with pytest.raises(SystemExit): train_groups(tmp_path/"run", at=7)
    settings = read_json(tmp_path/"run"/"settings.json")
    settings["fingerprints"] = dict(data="0123456789abcdef", start=settings["fingerprints"]["start"])
    write_json(tmp_path/"run"/"settings.json", settings)
    with pytest.raises(ValueError, match="an earlier version, which knew its data by a sample"):
        train_groups(tmp_path/"run")

class Extra(GroupDataset):
    "A dataset of one's own, which adds something to its rewards"
    bonus = 0.
    def batch(self, i):
        *xb, rewards, mask = super().batch(i)
        return *xb, rewards + self.bonus * mask, mask

def test_datasets_of_ones_own_are_compared_whole_or_refused(tmp_path):
    def prints(change=lambda ds: None, kind=Extra):
        dls = group_dls(TRAIN, DEV, a_store(), "soft_only", device="cpu")
        dls.train_ds.__class__ = kind
        change(dls.train_ds)
        return data_prints(dls)
    def differ(a, b): return [name for name in {**a, **b} if a.get(name) != b.get(name)]
    assert prints() == prints()
    def more(bonus): return prints(lambda ds: setattr(ds, "bonus", bonus))
    assert differ(more(1.), more(2.)) == ["train more"]
    assert differ(prints(), more(1.)) == ["parts", "train more"]   # the first alone is seen by a run that has no second
    assert differ(prints(), prints(kind=GroupDataset)) == ["train batches"]
    def odd(ds): ds.helper = object()
    with pytest.raises(ValueError, match="whether a Extra is the one that .*more: .*object.*`content"):
        prints(odd)

def test_data_without_content_are_read_item_by_item():
    dls = synth_dls(64, 32)
    before = data_prints(dls)
    rows = dls.train_ds.rows
    rows[40], rows[41] = rows[41], rows[40]
    after = data_prints(dls)
    assert [name for name in before if before[name] != after[name]] == ["train items"]
    state = torch.get_rng_state(), random.getstate(), dls.train.rng.getstate()
    data_prints(dls)
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1:] == (random.getstate(), dls.train.rng.getstate())

def test_a_warmup_knows_its_answers(tmp_path):
    ids = range(1000, 1060)
    items = pd.DataFrame(dict(question_id=ids, image_id=ids, answer=[f"word{i % 7} of{i % 3}" for i in ids]))
    def go(items, at=None):
        Die.at = at
        learn = selector_learner(group_dls(TRAIN, DEV, a_store(), "soft_only", device="cpu"), d_hidden=8)
        with quiet(learn), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            learn.fit_warmup(items, a_store(), 3, steps=4, bs=15, cbs=Die(), resume=tmp_path/"run")
    with pytest.raises(SystemExit): go(items, at=5)
    other = items.assign(answer=items.answer.where(items.question_id != 1030, "word0 of1"))
    with pytest.raises(ValueError, match="fingerprint of train rewards"): go(other)
    go(items)

def test_a_fit_that_accumulates_goes_on_as_well(tmp_path):
    "The last step of an epoch is taken before its state is written"
    def go(folder, at=None):
        Die.at = at
        learn = learner(56, dropout=.3)
        cbs = [KLToRef(beta=.5), GradientAccumulation(32), Die()]
        with quiet(learn), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            learn.fit_rce(3, 1e-2, cbs=cbs, resume=folder)
        return learn
    whole = go(None)
    for at in (5, 9):
        with pytest.raises(SystemExit): go(tmp_path/"run", at)
    assert same(weights(whole), weights(go(tmp_path/"run")))

def test_a_warmup_and_what_follows_are_judged_by_what_they_are():
    "The warm-up of the usual recipe has a reward of its own: its regret is not held against validation"
    ids = range(1000, 1060)
    items = pd.DataFrame(dict(question_id=ids, image_id=ids, answer=[f"word{i % 7} of{i % 3}" for i in ids]))
    learn = selector_learner(group_dls(TRAIN, DEV, a_store(), "soft_only", device="cpu"), d_hidden=8)
    with quiet(learn), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        learn.fit_warmup(items, a_store(), 2, steps=4, bs=15)
        learn.fit_listwise(2, 1e-3)
    warm, then = diagnoses(learn.history.frame, data_facts(learn.dls))
    assert warm.stage.endswith("2 epochs with a reward of its own") and then.stage == "listwise, 2 epochs"
    assert "overfit" in then.frame.index and "overfit" not in warm.frame.index
    assert "pool" in then.frame.index and "pool" not in warm.frame.index
    f = learn.history.frame
    assert f.regret_own.notna().tolist() == [True, True, False, False] == f.regret_train.isna().tolist()

def test_what_callbacks_hold_is_described_by_content():
    def lam(x): return lambda p: x + p
    frame = pd.DataFrame(dict(a=[1, 2], b=["x", "y"]))
    pairs = [
        (frame, frame.assign(b=["x", "z"])),
        (TRAIN, other_reward(TRAIN, 117)),
        (a_store(), a_store(1)),
        (lam(1), lam(2)),
        (lambda p: p + 1, lambda p: p + 2),
        (partial(max, 1), partial(max, 2)),
        (b"1", b"2"),
        (pd.Series([1., 2.]), pd.Series([1., 3.])),
    ]
    for a, b in pairs: assert _describe(a) != _describe(b)
    for make in (lambda: frame.copy(), lambda: lam(1), lambda: partial(max, 1), lambda: a_store()):
        assert _describe(make()) == _describe(make())

def test_resume_leaves_validation_alone(tmp_path):
    learn = train("rce", tmp_path / "run")
    w = {k: torch.zeros_like(v) for k, v in weights(learn).items()}
    learn.model.load_state_dict(w)
    with quiet(learn):
        learn.validate(cbs=Resume(tmp_path / "run"))
        learn.get_preds(cbs=Resume(tmp_path / "run"))
    assert same(w, weights(learn))

def test_two_stages_go_on(tmp_path):
    def go(die=False):
        learn = learner(48, dropout=.2)
        with quiet(learn):
            learn.fit_rce(2, 1e-2, resume=tmp_path/"rce" if go.folder else None)
            Die.at = 4 if die else None
            learn.fit_grpo(2, 1e-3, cbs=Die(), resume=tmp_path / "grpo" if go.folder else None)
        return learn
    go.folder = False
    whole = go()
    go.folder = True
    with pytest.raises(SystemExit): go(die=True)
    again = go()
    assert (
        same(weights(whole), weights(again))
        and again.history.frame.stage.tolist() == ["rce", "rce", "grpo", "grpo"]
        and again.history.frame.fit.tolist() == [1, 1, 2, 2]
    )

def nearly_flat(learn):
    "Training rows of which one alone has a difference of reward"
    rows = [(*row, torch.zeros_like(r)) for *row, r in learn.dls.train_ds.rows]
    *row, r = rows[0]
    return [(*row, torch.arange(len(r)).float()), *rows[1:]]

def test_a_stage_without_a_live_group_is_refused():
    learn = learner(64)
    learn.dls.train_ds.rows = [(*row, torch.zeros_like(r)) for *row, r in learn.dls.train_ds.rows]
    w = weights(learn)
    for stage in ("fit_rce", "fit_listwise", "fit_sft"):
        with quiet(learn), pytest.raises(ValueError, match="none of 64 groups has any reward difference"):
            getattr(learn, stage)(2)
    with quiet(learn), pytest.raises(ValueError, match="0 of 64 groups have any reward difference"): learn.fit_grpo(2)
    with quiet(learn), pytest.raises(ValueError, match="none of 64 groups"): learn.fit_grpo(2, min_live=0.)
    assert same(w, weights(learn)) and not learn.history.rows

def test_a_stage_is_watched():
    learn = learner(64)
    learn.dls.train_ds.rows = nearly_flat(learn)
    with quiet(learn), pytest.warns(UserWarning, match="after one epoch: Few groups can teach"):
        learn.fit_rce(1)
    with quiet(learn), pytest.raises(ValueError, match="Few groups"): learn.fit_rce(3, watch="raise")
    with quiet(learn), warnings.catch_warnings():
        warnings.simplefilter("error")
        learn.fit_rce(1, watch=None, skip_flat=False)

# --- killed anywhere ----------------------------------------------------------------------------------------
class Killed(Callback):
    "Killed the second time that an event comes while training, or the sixth time if it comes batch by batch"
    name, order = "killed", 99
    event, left = None, 0
    def __call__(self, event):
        in_a_batch = not event.endswith(("epoch", "train", "validate", "fit"))
        if event != Killed.event or (in_a_batch and not self.learn.training): return
        Killed.left -= 5 if not in_a_batch else 1
        if Killed.left < 0: raise KeyboardInterrupt

def kept(resume): return [Resume(resume)] if resume else []
TO_KILL = dict(
    accumulated=lambda l, cbs, resume: l.fit_stage(
        3, 1e-2, [GradientAccumulation(36), *cbs], skip_flat=False, best=False, resume=resume),
    tracked=lambda l, cbs, resume: l.fit_rce(
        4, 1e-1, best=False, cbs=[EarlyStoppingCallback(min_delta=.01, patience=2), *cbs], resume=resume),
    saved=lambda l, cbs, resume: l.fit_rce(3, 1e-1, best=False, cbs=[SaveModelCallback(), *cbs], resume=resume),
    plateau=lambda l, cbs, resume: l.fit(
        4, 1e-1, cbs=[RCE(), ReduceLROnPlateau(patience=1, min_delta=1.), *cbs, *kept(resume)]),
    one_cycle=lambda l, cbs, resume: l.fit_one_cycle(3, 1e-2, cbs=[RCE(), *cbs, *kept(resume)]),
    two_kls=lambda l, cbs, resume: l.fit_listwise(
        3, 1e-2, beta=.5, best=False, cbs=[KLToRef(PointerSelector(8, d_hidden=16), .1), *cbs], resume=resume),
    grpo=lambda l, cbs, resume: l.fit_grpo(
        3, 1e-2, refresh=3, cbs=[AdaptiveKL(0., .001), TopKCurriculum((2, 3)), *cbs], resume=resume),
)
EVENTS = (
    "before_epoch before_train before_batch after_pred after_loss before_backward after_backward before_step"
    " after_step after_batch after_train before_validate after_validate after_epoch after_fit"
).split()

def killed(name, path, event=None, folder=None):
    Killed.event, Killed.left = event, 5
    learn = learner(56, dropout=.2, path=path)
    torch.manual_seed(3)
    with quiet(learn), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        TO_KILL[name](learn, [Killed()], folder)
    return learn

AT = {name: EVENTS if name == "grpo" else ("before_train", "before_batch", "after_epoch") for name in TO_KILL}
@pytest.mark.parametrize("name,event", [(name, event) for name, events in AT.items() for event in events])
def test_killed_anywhere_goes_on(tmp_path, name, event):
    "Steps across an epoch's border, trackers of fastai, schedules of fastai, two callbacks of one name"
    whole = killed(name, tmp_path)
    if event == "after_fit": Killed.left = 0
    with pytest.raises(KeyboardInterrupt):
        killed(name, tmp_path, event, tmp_path/"run")
        if event == "after_fit": raise KeyboardInterrupt   # it comes once, so nobody was killed
    again = killed(name, tmp_path, None, tmp_path/"run")
    assert same(weights(whole), weights(again))
    fa, fb = (l.history.frame.drop(columns="seconds") for l in (whole, again))
    pd.testing.assert_frame_equal(fa, fb, check_exact=True)

class Judge:
    "A score with a setting"
    def __init__(self, penalty): self.penalty = penalty
    def loss(self, learn): return valid_loss(learn) + self.penalty

def own_score(factor):
    "A function of one's own, under a name that says nothing"
    code = f"def score(learn): return {factor} * valid_loss(learn)"
    space = dict(valid_loss=valid_loss, __name__="mine")
    exec(code, space)
    return space["score"]

def bent(p): return combine_scheds([p, 1 - p], [SchedLin(2., 1.), SchedLin(1., .5)])
def half_regret(*args, **kw): return regret(*args, **kw) / 2

def two_schedules(last):
    first = TempSchedule("kl_to_ref", beta=(0., last))
    return [first, KLToRef(), TempSchedule("gradient_clip", max_norm=(1., 2.))]

@pytest.mark.parametrize("make,a,b,says", [
    (lambda factor: dict(best=Best(own_score(factor))), 1, 2, "best_weights.score"),
    (lambda penalty: dict(best=Best(Judge(penalty).loss)), 0., 1., "best_weights.score"),
    (lambda bend: dict(temp=bent(bend)), .3, .6, "rce.schedule"),
    (lambda last: dict(cbs=two_schedules(last)), 1., 2., "temp_schedule.scheds.beta.end"),
])
def test_what_a_stage_is_made_of_is_compared_by_content(tmp_path, make, a, b, says):
    "Functions by what they do, methods by their object, schedules by what they are made of, two of one name as two"
    def go(value):
        learn = learner(32)
        with quiet(learn), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            learn.fit_rce(2, **make(value), resume=tmp_path/"run")
    go(a)
    with pytest.raises(ValueError, match=f"holds a run with other settings(.|\n)*{says}"): go(b)
    go(a)

def with_dropout(p):
    "A model with other dropout, and the same weights"
    torch.manual_seed(0)
    return PointerSelector(8, d_hidden=16, dropout=p)

def still(model, name):
    model.get_parameter(name).requires_grad_(False)
    return model

NAME = next(name for name, _ in with_dropout(0.).named_parameters())
@pytest.mark.parametrize("a,b,says", [
    (lambda l: setattr(l, "opt_func", Adam), lambda l: setattr(l, "opt_func", RAdam), "optimiser.steps"),
    (lambda l: None, lambda l: setattr(l, "loss_func", half_regret), "loss"),
    (lambda l: setattr(l, "model", with_dropout(.1)), lambda l: setattr(l, "model", with_dropout(.5)), "model.built"),
    (lambda l: setattr(l, "model", with_dropout(0.)), lambda l: setattr(l, "model", still(with_dropout(0.), NAME)),
     "model.still"),
])
def test_optimiser_loss_and_model_are_compared(tmp_path, a, b, says):
    def go(change):
        learn = learner(32)
        change(learn)
        with quiet(learn): learn.fit_rce(1, watch=None, resume=tmp_path/"run")
    go(a)
    with pytest.raises(ValueError, match=f"holds a run with other settings(.|\n)*{says}"): go(b)
    go(a)

def test_what_callbacks_count_and_draw_is_kept(tmp_path):
    class Counts(StageCallback):
        name = "counts"
        def __init__(self, seed=0):
            self.seen = Counter()
            self.lists = defaultdict(list)
            self.some = set()
            self.last = deque(maxlen=2)
            self.draws = np.random.default_rng(seed)
            self.lots = random.Random(seed)
            self.arrays = []
            self.number = np.float64(seed)
    a = Counts()
    a.seen.update("aab")
    a.lists["x"].append(1)
    a.some |= {1, 2}
    a.last.extend([1, 2, 3])
    a.draws.random(3)
    a.lots.random()
    a.arrays = [np.arange(3.), dict(x=np.ones(2))]
    torch.save(_memory(a), tmp_path/"state.pt")
    b = Counts(5)
    _remember(b, read_state(tmp_path/"state.pt", "cpu"), None)
    assert b.seen == a.seen and type(b.seen) is Counter and b.lists == a.lists and b.lists["new"] == []
    assert b.some == {1, 2} and list(b.last) == [2, 3] and b.last.maxlen == 2 and b.number == 0
    assert b.draws.random() == a.draws.random() and b.lots.random() == a.lots.random()
    assert b.arrays[0].tolist() == [0, 1, 2] and b.arrays[1]["x"].tolist() == [1, 1]

def ends_soon(likely):
    "A selector that may stop, and does so after its first pick (or never) where it is greedy"
    torch.manual_seed(0)
    model = PointerSelector(8, d_hidden=16, stop=True, max_shots=3)
    with torch.no_grad(): model.stop.bias.copy_(torch.tensor([-20., 20., 20.] if likely else [-20.] * 3))
    return model

@pytest.mark.parametrize("likely", [True, False])
def test_a_policy_that_stops_is_watched_and_shown(likely):
    "STOP is no demonstration: it is in no pick that is named or counted"
    learn = selector_learner(synth_dls(64, 32, 16, K=(5, 7), N=(2, 6), shots=(1, 2)), ends_soon(likely))
    with quiet(learn), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        learn.fit_rce(2, 0.)
    f = learn.history.frame
    n = 1 if likely else 2
    picks = learn.show_results(show=False, shots=2).picks
    assert [len(p) for p in picks] == [n] * len(picks)
    assert 0 < f.unique.iloc[-1] <= 1 and f.agreement.iloc[-1] == 1
    named, places, p = learn.predict(learn.dls.valid_ds.items[0], shots=2)
    assert len(named) == len(places) == n and 0 < p <= 1

# --- equal fits, kept by content ----------------------------------------------------------------------------
class KillOnce(StageCallback):
    at = None
    def after_backward(self):
        if self.train_iter == KillOnce.at: raise KeyboardInterrupt

def test_a_kept_fit_goes_on_after_a_kill_and_is_found_again(tmp_path):
    def run(kept=None, **kw):
        learn = learner(dropout=.3)
        learn.add_cb(KillOnce())
        with quiet(learn): learn.fit_rce(3, 1e-2, kept=kept, **kw)
        return learn
    KillOnce.at = 5
    with pytest.raises(KeyboardInterrupt): run(tmp_path)
    KillOnce.at = None
    assert len(list(tmp_path.iterdir())) == 1
    whole = run()
    again = run(tmp_path)
    found = run(tmp_path)
    assert same(weights(whole), weights(again)) and same(weights(whole), weights(found))
    assert len(list(tmp_path.iterdir())) == 1
    assert found.history.frame.seconds.tolist() == again.history.frame.seconds.tolist()
    run(tmp_path, temp=.3)
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(ValueError, match="resume beside kept"): run(tmp_path, resume=tmp_path/"x")
    assert isinstance(KeptFit(tmp_path), Resume)

@pytest.mark.parametrize("change", ["seed", "chance", "reward", "weight"])
def test_what_a_kept_fit_is_known_by(tmp_path, change):
    "Seed, sources of chance, data and weights: any difference is another fit"
    def run(change=None):
        learn = learner(seed=1 if change == "seed" else 0)
        if change == "chance": torch.rand(1)
        if change == "reward": learn.dls.train_ds.rows[0][3].add_(.01)
        if change == "weight": next(learn.model.parameters()).data.view(-1)[0] += 1
        with quiet(learn): learn.fit_rce(1, 1e-2, kept=tmp_path)
        return len(list(tmp_path.iterdir()))
    assert run() == run() == 1
    assert run(change) == 2

# --- several selectors, one after them ----------------------------------------------------------------------
def test_the_distance_to_a_mean_is_brute_force():
    learn = selector_learner(synth_dls(24, 8, 8, K=(4, 6), N=(2, 4), shots=(1, 2)), d_hidden=12)
    d = learn.dls.train.one_batch()[0].shape[-1]
    teachers = []
    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        teachers.append(PointerSelector(d, d_hidden=12).eval())
    learn.model.eval()
    b = learn.dls.train.one_batch()
    for over in ("probability", "logp"):
        cb = Distill(teachers, over)
        with learn.added_cbs([cb]):
            learn.xb, learn.yb = tuple(b[:5]), tuple(b[5:])
            cb.policies = teachers
            for S in (1, 2):
                got = cb.kl(S).detach()
                for i in range(len(got)):
                    K = int(b[2][i].sum())
                    one = [x[i:i+1, :K] if x.dim() > 1 and j else x[i:i+1] for j, x in enumerate(b[:3])]
                    def probs(model):
                        enc = model.encode(*one)
                        return model.enumerate(enc, S)[1][0].exp().detach()
                    each = torch.stack([probs(t) for t in teachers])
                    mean = each.mean(0) if over == "probability" else each.log().mean(0).softmax(-1)
                    want = (mean * (mean / probs(learn.model)).log()).sum()
                    assert float(got[i]) == pytest.approx(float(want), rel=1e-3, abs=1e-5)

def test_one_teacher_is_copied_and_the_same_policy_is_at_rest():
    learn = learner(n=128)
    teacher = learner(n=128, seed=5)
    with quiet(learn):
        learn.fit_distill([learn.model], 1, 1e-2, watch=None, best=False)
    assert learn.history.frame.distance.iloc[-1] < 1e-4
    with quiet(learn): learn.fit_distill([teacher.model], 12, 2e-2, watch=None, best=False)
    f = learn.history.frame.iloc[1:]
    assert f.distance.iloc[-1] < .2*f.distance.iloc[0]
    assert [type(cb).__name__ for cb in learn.cbs if isinstance(cb, Distill)] == []

def test_distill_refuses_what_it_cannot_do(tmp_path):
    with pytest.raises(ValueError, match="no teachers"): Distill([])
    with pytest.raises(ValueError, match="mean over 'rank'"): Distill(["start"], "rank")
    learn = learner()
    with quiet(learn), pytest.raises(ValueError, match="Distill: ref 'sft' is neither"): learn.fit_distill("sft", 1)
    cb = Distill([learn.model], limit=3)
    with quiet(learn), pytest.raises(ValueError, match="more than the limit of 3"): learn.fit(1, 1e-3, cbs=cb)
    x = torch.randn(3, 2, 5).log_softmax(-1)
    for over in ("probability", "logp"):
        assert torch.allclose(mean_logp(x, over).exp().sum(-1), torch.ones(2))
        assert torch.allclose(mean_logp(x[:1], over), x[0], atol=1e-6)
    # a teacher of another size, kept and found again
    big = learner(d_hidden=32)
    def run():
        student = learner()
        with quiet(student): student.fit_distill([big.model], 2, 1e-2, resume=tmp_path, watch=None)
        return weights(student)
    assert same(run(), run())
