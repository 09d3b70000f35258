"Callbacks on the tensor world: each does its thing, composes, and leaves nothing behind"
import copy, warnings
from functools import partial
import pandas as pd, pytest, torch
from torch import nn
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastai.callback.schedule import SchedCos, SchedLin
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.learner import Learner
from leverplus.core import frozen
from leverplus.losses import (
    advantage, entropy_steps, kl_exact, kl_k3, listwise_loss, live_groups, merge_orders, policy_gradient,
    rce_loss, regret,
)
from leverplus.selector import PointerSelector
from leverplus.synth import ToySelector, quiet, synth_dls, toy_learner
from leverplus.callback_core import (
    Objective, SkipFlat, StageCallback, Stats, active_dropout, as_schedule, check_name, find_reference,
    set_anchor, survey_groups, too_few,
)
from leverplus.callback_rce import RCE
from leverplus.callback_grpo import GRPO, RLOO
from leverplus.callback_kl import AdaptiveKL, EntropyFloor, KLToRef
from leverplus.callback_listwise import SFT, Listwise
from leverplus.callback_schedule import Freeze, NoDropout, Phases, SplitShots, TempSchedule, TopKCurriculum
from leverplus.callback_track import Best, History, RLStats, plot_history, valid_loss

RAGGED = dict(K=(4, 7), N=(2, 6), shots=(1, 2))

def learner(n=64, bs=16, seed=0, **kw):
    return toy_learner(regret, synth_dls(n, 32, bs, seed=seed, **RAGGED), seed=seed, **kw)
def fit(learn, n, cbs, **kw):
    with quiet(learn): learn.fit(n, cbs=cbs, **kw)
    return learn
def weights(learn): return {k: v.detach().clone() for k, v in learn.model.state_dict().items()}
def same(a, b): return all(torch.equal(a[k], b[k]) for k in a)

class Spy(StageCallback):
    "Calls `f(self)` at an event"
    order = 5
    def __init__(self, **at): self.at, self.seen = at, []
    def note(self, event):
        if event in self.at: self.seen.append(self.at[event](self))
    def after_loss(self): self.note("after_loss")
    def before_step(self): self.note("before_step")

class Interrupt(StageCallback):
    "Ctrl-C in the third batch"
    order = 7
    def after_backward(self):
        if self.train_iter == 2: raise KeyboardInterrupt

def rce_stage():
    falling = TempSchedule("rce", temp=SchedLin(2., .5))
    return [RCE(.5), falling, SkipFlat(), Freeze("after"), KLToRef(), Best(), GradientClip(1.)]
def grpo_stage(): return [NoDropout(), GRPO(), SkipFlat(), KLToRef(beta=.1), Best(), GradientClip(.5)]
def listwise_stage():
    band = AdaptiveKL(0., .01, limits=(.01, 1.))
    return [Listwise(), SkipFlat(), KLToRef(beta=.1), band, EntropyFloor(.9), Best(), GradientClip(1.)]
def sft_stage(): return [SFT(top=2), KLToRef(estimator="k3"), Best(), GradientClip(1.)]
def rloo_stage():
    rloo = RLOO(min_positive=.2, positive=.5)
    return [NoDropout(), rloo, KLToRef(on="live"), EntropyFloor(.9), Best(), GradientClip(.5)]

# --- names (T3), order (T12) -------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["Freeze", "Loss", "FreezeToCallback", "Model", "Opt", "Pred", "Fit"])
def test_names_that_would_replace_something(name):
    with pytest.raises(ValueError, match="would replace"): type(name, (StageCallback,), {})
    assert type(name, (StageCallback,), dict(name="my_" + name.lower())).name.startswith("my_")

def test_names_are_free_and_freeze_survives():
    for cb in (
        RCE,
        GRPO,
        RLOO,
        Listwise,
        SFT,
        KLToRef,
        AdaptiveKL,
        EntropyFloor,
        TempSchedule,
        NoDropout,
        Freeze,
        SkipFlat,
        History,
        Best,
        Stats,
        RLStats,
    ):
        assert check_name(
            cb.name if isinstance(cb.name, str) else cb().name if cb is not TempSchedule else "temp_schedule"
        )
    learn = fit(learner(), 1, [RCE(), Freeze("match")])
    assert learn.freeze.__func__ is Learner.freeze

def test_order(capsys):
    learn = learner()
    with learn.added_cbs(
        [GradientClip(1.0), KLToRef(), GRPO(), SkipFlat(), NoDropout(), TempSchedule("grpo")]
    ):
        learn.show_training_loop()
    lines = {l.split(":")[0].strip(" -"): l for l in capsys.readouterr().out.splitlines() if ":" in l}
    def before(line, a, b): assert lines[line].index(a) < lines[line].index(b)
    before("before_batch", "TempSchedule", "SkipFlat")
    before("before_batch", "SkipFlat", "GRPO")
    before("after_loss", "GRPO", "KLToRef")
    before("before_train", "TrainEvalCallback", "NoDropout")
    before("before_train", "NoDropout", "GRPO")

# --- objectives --------------------------------------------------------------------------------------------
def test_objective_changes_train_only():
    class Zero(Objective):
        def objective(self, logp, r, m): return 0*logp.masked_fill(~m, 0).sum() + 7.
    learn = learner(wd=0.0)
    w = weights(learn)
    fit(learn, 1, Zero())
    train, valid = learn.recorder.values[-1][:2]
    assert (
        train == pytest.approx(7.0)
        and same(w, weights(learn))
        and valid == pytest.approx(valid_loss(learn), abs=1e-6)
    )
    assert learn.loss_func is regret

def test_one_objective_per_fit():
    with pytest.raises(ValueError, match="2 objectives"): fit(learner(), 1, [RCE(), GRPO()])

def test_rce_is_its_formula():
    learn = learner()
    spy = Spy(after_loss=lambda s: (s.loss_grad.item(), rce_loss(s.pred, *s.yb, .7).item(), s.loss.item()))
    fit(learn, 1, [RCE(.7), spy])
    for a, b, c in spy.seen: assert a == b == c

@pytest.mark.parametrize(
    "cbs",
    [
        lambda: [RCE(0.3), SkipFlat()],
        lambda: [NoDropout(), GRPO(), SkipFlat()],
        lambda: [RCE(0.3, "zscore")],
        lambda: [RCE(0.3, weights="rank")],
        lambda: [Listwise(), SkipFlat()],
        lambda: [Listwise("none", temp=0.2)],
        lambda: [SFT()],
        lambda: [SFT(top=None, temp=0.2, min_score=0.3)],
        lambda: [NoDropout(), RLOO()],
        lambda: [NoDropout(), GRPO("loo", "batch"), SkipFlat()],
        lambda: [NoDropout(), GRPO("rank", refresh=3)],
    ],
)
def test_objectives_reduce_regret(cbs):
    learn = learner(128)
    v0 = valid_loss(learn)
    fit(learn, 5, cbs())
    assert valid_loss(learn) < v0 - .01

def test_skip_flat_leaves_loss_and_denominator():
    learn = learner()
    def look(s): return s.mask.any(-1).sum().item(), s.loss_grad.item(), rce_loss(s.pred, *s.yb, .5).item()
    spy = Spy(after_loss=look)
    skip = SkipFlat()
    fit(learn, 1, [RCE(.5), skip, spy])
    n_live = sum(int(r.max() - r.min() > 1e-6) for *_, r in learn.dls.train_ds.rows)
    assert skip.n == 64 and skip.n_live == n_live == sum(s[0] for s in spy.seen) and 0 < n_live < 64
    assert all(a == b for _, a, b in spy.seen)

def test_all_flat_batch_moves_nothing_even_with_momentum():
    learn = learner(wd=0.1)
    fit(learn, 1, RCE())
    rows = learn.dls.train_ds.rows
    learn.dls.train_ds.rows = [(*row, torch.ones_like(r)) for *row, r in rows]
    w = weights(learn)
    none = pytest.raises(ValueError, match="none of 64 groups has any reward difference")
    with none: fit(learn, 1, [RCE(), SkipFlat(), KLToRef()])
    assert same(w, weights(learn))
    with none: fit(learn, 1, [NoDropout(), GRPO(min_live=0.0), SkipFlat()], reset_opt=True)
    assert same(w, weights(learn))

def test_zero_variance_gives_zero_grpo_gradient_without_skipping():
    learn = learner()
    learn.dls.train_ds.rows = [(*row, torch.full_like(r, 0.6)) for *row, r in learn.dls.train_ds.rows]
    spy = Spy(before_step=lambda s: max(float(p.grad.abs().max()) for p in s.model.parameters()))
    fit(learn, 1, [NoDropout(), GRPO(min_live=0.0, skip_flat=False), spy])
    assert spy.seen and max(spy.seen) == 0

# --- what an objective does by itself ----------------------------------------------------------------------
IMITATE = dict(
    rce=partial(RCE, .3),
    listwise=partial(Listwise, "none", .2),
    sft=SFT,
)
PUSH = dict(
    grpo=GRPO,
    rloo=RLOO,
    positive=partial(GRPO, min_positive=.3),
)

@pytest.mark.parametrize("name", [*IMITATE, *PUSH])
def test_an_objective_alone_is_what_it_was_with_company(name):
    "Eval mode where probabilities are compared, flat groups out: as with `NoDropout` and `SkipFlat`"
    make = (IMITATE | PUSH)[name]
    alone = fit(learner(dropout=.3, cbs=Stats()), 2, make())
    company = [NoDropout()] if name in PUSH else []
    both = fit(learner(dropout=.3, cbs=Stats()), 2, [*company, SkipFlat(), make(skip_flat=False)])
    more = fit(learner(dropout=.3, cbs=Stats()), 2, [*company, SkipFlat(), make()])
    assert same(weights(alone), weights(both)) and same(weights(alone), weights(more))
    assert 0 < alone.stats.mean("live") < 1
    assert alone.stats.means() == pytest.approx(both.stats.means(), nan_ok=True)
    assert [float(n) for _, n in alone.stats.buf["live"]] == [float(n) for _, n in more.stats.buf["live"]]
    kept = fit(learner(dropout=.3, cbs=Stats()), 2, make(skip_flat=False))
    assert not same(weights(alone), weights(kept)) and "live" not in kept.stats.buf

def test_a_skip_flat_with_settings_of_its_own_wins():
    learn = learner(cbs=Stats())
    rce = RCE(.3)
    wide = SkipFlat(eps=.5)
    fit(learn, 1, [wide, rce])
    assert 0 < wide.n_live < 64 and rce.n == 0
    alone = RCE(.3)
    fit(learner(), 1, alone)
    assert alone.n == 64 and alone.n_live > wide.n_live

def test_dead_groups_are_told_without_skip_flat():
    "A few live groups are worth a warning; where there is none a fit ends with an error, and nothing has moved"
    few = relabel(learner(), lambda r, i: torch.arange(len(r)).float() if i < 2 else 0*r)
    with pytest.warns(UserWarning, match="RCE: 2 of 64 groups have any reward difference"): fit(few, 1, RCE())
    learn = relabel(learner(), lambda r, i: 0*r)
    w = weights(learn)
    history = History()
    learn.add_cb(history)
    with pytest.raises(ValueError, match="RCE: none of 64 groups has any reward difference.*skip_flat=False"):
        fit(learn, 3, RCE())
    assert same(w, weights(learn)) and not history.rows
    with pytest.raises(ValueError, match="SkipFlat: none of 64"): fit(learn, 1, SkipFlat())   # the Learner's own loss
    fit(learn, 1, RCE(skip_flat=False))
    fit(learn, 1, KLToRef())   # nobody asks for differences

def test_a_phase_of_flat_groups_may_come_before_live_ones():
    def phased(n_live):
        learn = relabel(learner(), lambda r, i: r if i >= 64 - n_live else 0*r)
        plan = {"first": (list(range(32)), 1), "then": (list(range(32, 64)), 1)}
        return fit(learn, 2, [RCE(), Phases(plan)])
    with pytest.warns(UserWarning, match="RCE: 0 of 32"): phased(32)
    with pytest.warns(UserWarning, match="RCE: 0 of 32"), pytest.raises(ValueError, match="none of 32"): phased(0)

def test_flat_are_the_groups_of_the_data_not_those_of_a_cut():
    "A cut before the advantages makes groups flat; they stay in the mean over groups, as with `SkipFlat`"
    def run(*more, **kw):
        learn = toy_learner(regret, synth_dls(64, 32, 16, N=8), cbs=Stats())
        fit(learn, 2, [TopKCurriculum(2, "best", before=True), GRPO(**kw), *more])
        return weights(learn), learn.stats.mean("live"), learn.stats.mean("adv_live")
    w, live, adv_live = run()
    again, _, _ = run(SkipFlat(), skip_flat=False)
    assert same(w, again) and adv_live < live

@pytest.mark.parametrize("stage", [partial(RCE, .3), Listwise, GRPO, SFT, RLOO])
def test_one_objective_in_two_fits_and_two_learners(stage):
    "Nothing is left over from a fit: what comes second is what a new objective would have done"
    def second(cb, again):
        a, b = learner(dropout=.2), learner(seed=1, dropout=.2)
        fit(a, 1, cb)
        torch.manual_seed(0)
        fit(b, 2, again)
        return weights(b)
    cb = stage()
    assert same(second(cb, cb), second(stage(), stage()))

@pytest.mark.parametrize("verb", ["fit", "fit_one_cycle", "fit_flat_cos", "fine_tune"])
@pytest.mark.parametrize("make", [GRPO, partial(RCE, (1., .1)), Listwise, SFT])
def test_the_fits_of_fastai_train(verb, make):
    learn = learner(128, dropout=.1, cbs=[Stats(), History()])
    v0 = valid_loss(learn)
    with quiet(learn): getattr(learn, verb)(2, 5e-2, cbs=make())
    assert valid_loss(learn) < v0 - .005
    assert len(learn.history.frame) == 2 + (verb == "fine_tune")
    assert not set(vars(learn)) & {"grpo", "rce", "listwise", "sft"}

# --- accumulated gradients ---------------------------------------------------------------------------------
class Steps(StageCallback):
    order = 90
    def before_fit(self): self.at = []
    def after_step(self): self.at.append(self.train_iter)

def dead_batches(dead, bs=16, n=64):
    "A learner whose batches in `dead` have no live group; not shuffled"
    learn = toy_learner(regret, synth_dls(n, 32, bs))
    relabel(learn, lambda r, i: 0*r if i // bs in dead else torch.arange(len(r)).float())
    learn.dls.loaders[0] = learn.dls.train.new(shuffle=False)
    return learn

ACCUMULATED = dict(
    rce=partial(RCE, .3),
    zscore=partial(RCE, .3, norm="zscore"),
    listwise=Listwise,
    sets=partial(Listwise, "none", .3, skip_flat=False),
    sft=partial(SFT, top=2),
    good=partial(SFT, min_score=.6),
    grpo=GRPO,
    positive=partial(GRPO, min_positive=.3),
    rloo=partial(RLOO, scale="none"),
    own=lambda: SkipFlat(),
    all_groups=partial(RCE, .3, skip_flat=False),
)
COMPANY = dict(
    alone=lambda: [],
    kl=lambda: [KLToRef(ToySelector(8), beta=3.)],
    live=lambda: [KLToRef(ToySelector(8), beta=3., on="live"), GradientClip(.05)],
    k3=lambda: [KLToRef(ToySelector(8), beta=.1, estimator="k3")],
    floor=lambda: [EntropyFloor(.987, 2., adaptive=False), GradientClip(.05)],
    amp=lambda: [KLToRef(ToySelector(8), beta=.5), MixedPrecision(AMPMode.BF16), GradientClip(.05)],
    both=lambda: [KLToRef(ToySelector(8), beta=.5), AdaptiveKL(0., .01), EntropyFloor(.987, 2.), Freeze("after")],
)

def two_ways(make, company, dead, n_acc, n=72, bs=16):
    "Weights and steps of two epochs: batches of `bs` accumulated, and batches of `n_acc`; those in `dead` are flat"
    def run(bs, *more):
        dls = synth_dls(n, 32, bs, seed=1, **RAGGED)
        learn = toy_learner(regret, dls, wd=.1)
        relabel(learn, lambda r, i: 0*r if i // 16 in dead else r)
        learn.dls.loaders[0] = learn.dls.train.new(shuffle=False)
        torch.manual_seed(5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit(learn, 2, [make(), *company(), *more, steps := Steps()])
        return weights(learn), len(steps.at)
    return run(bs, GradientAccumulation(n_acc)), run(n_acc)

def nearly(a, b): return all(torch.allclose(a[k], b[k], atol=2e-5) for k in a)

@pytest.mark.parametrize("company", COMPANY)
@pytest.mark.parametrize("name", ACCUMULATED)
def test_accumulated_batches_are_one_large_batch(name, company):
    "The same weights, whatever is flat, where a batch is emptied, and in the last, smaller step of an epoch"
    (a, n), (b, want) = two_ways(ACCUMULATED[name], COMPANY[company], (1,), 32)
    assert n == want > 0
    assert nearly(a, b)

MORE_COMPANY = dict(
    split=(partial(RCE, .3), lambda: [SplitShots(), GradientClip(.05)]),
    split_grpo=(GRPO, lambda: [SplitShots(), KLToRef(ToySelector(8), beta=.5)]),
    best_of=(GRPO, lambda: [TopKCurriculum(3, which="best")]),
    cut_before=(GRPO, lambda: [TopKCurriculum(3, which="worst", before=True)]),
    phases=(partial(RCE, .3), lambda: [Phases(dict(a=(range(40), 1), b=(range(30, 72), 1)))]),
    fp16=(partial(RCE, .3), lambda: [MixedPrecision(), GradientClip(.05)]),
    band=(GRPO, lambda: [NoDropout(), KLToRef(beta=1.), AdaptiveKL(0., .001), Best()]),
)
@pytest.mark.parametrize("dead,n_acc", [((1,), 32), ((0, 3), 48)])
@pytest.mark.parametrize("name", MORE_COMPANY)
def test_accumulated_batches_are_one_large_batch_in_any_company(name, dead, n_acc, monkeypatch):
    "Queries are counted, not the groups that they are divided into; equals are cut in one order here, not by lot"
    monkeypatch.setattr(torch, "rand_like", torch.zeros_like)
    make, company = MORE_COMPANY[name]
    (a, n), (b, want) = two_ways(make, company, dead, n_acc)
    assert n == want > 0
    assert nearly(a, b)

@pytest.mark.parametrize("dead", [(1,), (0,), (0, 3), (2,), (3,), (4,), (2, 3), (0, 1, 4)])
@pytest.mark.parametrize("n_acc", [32, 48, 64])
@pytest.mark.parametrize("where", ["objective", "callback"])
def test_an_empty_batch_takes_its_turn_in_accumulation(dead, n_acc, where):
    "Steps come when they are due, with the weights of large batches"
    make = partial(RCE, .3) if where == "objective" else SkipFlat
    (a, at), (b, when) = two_ways(make, COMPANY["both"], dead, n_acc)
    assert at == when > 0
    assert nearly(a, b)

def test_a_floor_between_two_batches_of_a_step_is_that_of_their_mean():
    "One batch is above the floor and one below it: the mean of both decides, as in a large batch"
    seen = []
    class Each(StageCallback):
        order = 8
        def after_loss(self):
            if self.entropy_floor.share is not None: seen.append(self.entropy_floor.share[0].item())
    def floor(): return [EntropyFloor(.987, 2., adaptive=False)]
    two_ways(partial(RCE, .3), lambda: [*floor(), Each()], (1,), 32)
    assert min(seen[:2]) < .987 < max(seen[:2])
    (a, _), (b, _) = two_ways(partial(RCE, .3), floor, (1,), 32)
    (free, _), _ = two_ways(partial(RCE, .3), COMPANY["alone"], (1,), 32)
    assert nearly(a, b) and not nearly(a, free)

def test_accumulation_is_not_the_mean_of_means():
    "What fastai alone does differs where flat groups leave unevenly; the test above would see it"
    (a, _), (b, _) = two_ways(partial(RCE, .3), COMPANY["alone"], (1,), 32)
    learn = toy_learner(regret, synth_dls(72, 32, 16, seed=1, **RAGGED), wd=.1)
    relabel(learn, lambda r, i: 0*r if i // 16 == 1 else r)
    learn.dls.loaders[0] = learn.dls.train.new(shuffle=False)
    class ByHand(StageCallback):
        "RCE over live groups, without a word about how many they are"
        def before_batch(self): self.learn.yb = self.rewards, self.mask & live_groups(*self.learn.yb)[:, None]
        def after_loss(self): self.learn.loss_grad = rce_loss(self.pred, *self.learn.yb, .3)
    fit(learn, 2, [ByHand(), GradientAccumulation(32)])
    assert nearly(a, b) and not nearly(weights(learn), b)

def test_a_scale_of_the_batch_is_refused_where_batches_are_one():
    with pytest.raises(ValueError, match="RLOO: scale='batch' divides advantages by the spread of a batch"):
        fit(learner(), 1, [RLOO(), GradientAccumulation(32)])
    fit(learner(), 1, [RLOO(scale="group"), GradientAccumulation(32)])

def test_a_step_of_empty_batches_alone_moves_nothing():
    "Not by momentum and weight decay either; the steps of the others stay where they are"
    def run(dead):
        learn = dead_batches(dead, n=96)
        seen = Spy(before_step=weights_of)
        fit(learn, 1, [RCE(.3), KLToRef(beta=1.), GradientAccumulation(32), steps := Steps(), seen])
        return learn, steps.at, seen.seen
    def weights_of(s): return {k: v.clone() for k, v in s.model.state_dict().items()}
    learn, at, seen = run((2, 3))
    assert at == [1, 5]                       # batches 2 and 3 take no step
    assert same(seen[-1], seen[-2]) and not same(seen[-1], weights(learn))
    assert run(())[1] == [1, 3, 5]
    learn = dead_batches(range(6), n=96)
    before = weights(learn)
    with pytest.raises(ValueError, match="none of 96 groups"):
        fit(learn, 1, [RCE(.3), KLToRef(beta=1.), GradientAccumulation(32), steps := Steps()])
    assert steps.at == [] and same(before, weights(learn))

@pytest.mark.parametrize("n_acc", [0, 32])
def test_an_empty_batch_in_mixed_precision(n_acc):
    learn = dead_batches((1, 2))
    gather = [GradientAccumulation(n_acc)] if n_acc else []
    fit(learn, 2, [RCE(), KLToRef(), *gather, Autocast(), GradientClip(1.)])
    assert not torch.is_autocast_enabled("cpu")
    fit(learn, 1, [GRPO(), *gather, MixedPrecision(AMPMode.BF16)], reset_opt=True)
    assert all(v.isfinite().all() for v in weights(learn).values())

# --- schedules of their own --------------------------------------------------------------------------------
@pytest.mark.parametrize("temp", ["wide", (2., .5), SchedCos(1., .1), lambda p: 2 - p])
def test_a_temperature_that_moves(temp):
    "As with `TempSchedule`, batch by batch; a second fit begins anew"
    for make, name in ((RCE, "rce"), (lambda temp: Listwise("none", temp), "listwise")):
        spy = Spy(after_loss=lambda s: (getattr(s, name).temp, s.pct_train))
        cb = make(temp)
        a = fit(learner(), 2, [cb, spy])
        b = fit(learner(), 2, [make(9.), TempSchedule(name, temp=temp)])
        assert same(weights(a), weights(b))
        schedule = as_schedule(temp)
        assert [t for t, _ in spy.seen] == pytest.approx([float(schedule(p)) for _, p in spy.seen])
        assert spy.seen[0][0] == schedule(0.) != spy.seen[-1][0]
        fit(a, 1, [cb, spy])
        assert spy.seen[8][0] == schedule(0.)
        with pytest.raises(ValueError, match="moves its temp itself"):
            fit(a, 1, [cb, TempSchedule(name, temp=.1)])
    with pytest.raises(ValueError, match="temp 0"): RCE(temp=(0., 1.))
    with pytest.raises(ValueError, match="wide, sharp"): RCE(temp="narrow")

# --- GRPO --------------------------------------------------------------------------------------------------
def test_ratio_is_one_and_kl_zero_at_the_first_step():
    learn = learner(dropout=.3, cbs=Stats())
    spy = Spy(after_loss=lambda s: s.learn.loss_grad.item())
    fit(learn, 1, [NoDropout(), SkipFlat(), GRPO(), KLToRef(beta=5.), spy])
    assert learn.stats.mean("ratio_off") <= 1e-5
    assert learn.stats.buf["kl"][0][0] == pytest.approx(0., abs=1e-7)
    assert spy.seen[0] == pytest.approx(0., abs=1e-6)   # centred advantages at ratio 1, and no KL

def test_first_grpo_gradient_is_policy_gradient():
    learn = learner()
    grabbed = {}
    def grab(s):
        if not grabbed:
            grabbed.update(
                g=[p.grad.clone() for p in s.model.parameters()], xb=s.xb, yb=s.yb, m=copy.deepcopy(s.model)
            )
    fit(learn, 1, [NoDropout(), GRPO(), Spy(before_step=grab)])
    r, m = grabbed["yb"]
    model = grabbed["m"]
    model.zero_grad()
    from leverplus.losses import group_mean
    (-group_mean(advantage(r, m, clip=5.) * model(*grabbed["xb"]), m)).backward()
    for p, g in zip(model.parameters(), grabbed["g"]): assert torch.allclose(p.grad, g, atol=1e-6)

def test_grpo_refuses_dropout():
    with pytest.raises(ValueError, match="dropout is active in drop"):
        fit(learner(dropout=.1), 1, GRPO(dropout=True))
    with pytest.warns(UserWarning) as ws: fit(learner(dropout=.1), 1, GRPO(dropout=True, strict=False))
    said = [str(w.message) for w in ws]
    assert any("dropout is active" in m for m in said) and any("off 1 by up to" in m for m in said)

def test_grpo_notices_other_randomness():
    class Noisy(ToySelector):
        def encode(self, q, c, m): return super().encode(q + .1*torch.randn_like(q), c, m)
    learn = learner()
    learn.model = Noisy(8)
    with pytest.raises(ValueError, match="off 1 by up to"): fit(learn, 1, [NoDropout(), GRPO()])

def test_grpo_names_a_foreign_old_policy():
    with pytest.raises(ValueError, match="old policy given is not this policy"):
        fit(learner(), 1, [NoDropout(), GRPO(old=ToySelector(8), refresh="never")])
    with pytest.warns(UserWarning, match="off 1"):
        fit(learner(), 1, [NoDropout(), GRPO(old=ToySelector(8), refresh="never", strict=False)])

def test_advantages_see_the_whole_group():
    class TopOne(StageCallback):
        order = Objective.order+1
        def before_batch(self):
            r, m = self.yb
            top = r.masked_fill(~m, -1) >= r.masked_fill(~m, -1).amax(-1, keepdim=True)
            self.learn.yb = r, m & top
    spy = Spy(after_loss=lambda s: (s.grpo.adv, s.yb[0], s.yb[1]))
    fit(learner(), 1, [NoDropout(), SkipFlat(), TopOne(), GRPO(), spy])
    assert all((a.masked_fill(m, 0) < 0).any() and (a[m] > 0).all() for a, r, m in spy.seen)

def test_spread_of_advantages_is_that_of_whole_groups():
    "Standardised advantages spread by 1 in every live group, whatever a cut takes out of the loss afterwards"
    def spread(*more):
        learn = toy_learner(regret, synth_dls(64, 32, 16, N=8), cbs=Stats())
        fit(learn, 1, [NoDropout(), GRPO(min_std=0., adv_clip=None), *more])
        return learn.stats.mean("adv_std")
    assert spread() == pytest.approx(1., abs=1e-5)
    assert spread(TopKCurriculum(2)) == pytest.approx(1., abs=1e-5)

def test_refresh_every_k_batches():
    class Count(GRPO):
        def renew(self):
            super().renew()
            Count.n += 1
    for refresh, want in (("epoch", 2), ("never", 1), (1, 8), (3, 3)):
        Count.n = 0
        fit(learner(), 2, [NoDropout(), Count(refresh=refresh)])
        assert Count.n == want, refresh
    with pytest.raises(ValueError, match="refresh"): GRPO(refresh="always")

@pytest.mark.parametrize("seed", [0, 1])
def test_grpo_beats_its_start_and_a_stale_old_policy(seed):
    def run(**kw):
        learn = toy_learner(regret, synth_dls(128, 64, 32, seed=seed), seed=seed)
        before = frozen(learn.model)
        fit(learn, 3, [RCE(0.3), SkipFlat()])
        start = valid_loss(learn)
        if "old" in kw: kw["old"] = before
        fit(learn, 10, [NoDropout(), SkipFlat(), GRPO(**kw)], reset_opt=True, lr=2e-2)
        return start, valid_loss(learn)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start, fresh = run()
        _, stale = run(refresh="never")
        _, older = run(refresh="never", old=True, strict=False)
    assert fresh < start - .02 and fresh < stale - .01 and fresh < older - .01

def relabel(learn, f):
    "Replace the training rewards of group i by `f(rewards, i)`"
    learn.dls.train_ds.rows = [(*row, f(r, i)) for i, (*row, r) in enumerate(learn.dls.train_ds.rows)]
    return learn

def test_survey_reads_all_groups_and_leaves_the_order_alone():
    import random
    a = learner()
    b = learner()
    found = survey_groups(a.dls.train, 0.5)
    rows = [r for *_, r in a.dls.train_ds.rows]
    assert (
        found["live"].tolist() == [bool(r.max() - r.min() > 1e-6) for r in rows]
        and not found["centred"].any()
    )
    assert found["positive"].tolist() == pytest.approx([float((r > .5).double().mean()) for r in rows])
    # the shuffled batches come as they would have
    assert all(torch.equal(x[5], y[5]) for x, y in zip(a.dls.train, b.dls.train))
    random.seed(1)
    survey_groups(a.dls.train)
    x = random.random()
    random.seed(1)
    assert x == random.random()

@pytest.mark.parametrize("RL", [GRPO, RLOO])
def test_rl_refuses_groups_that_cannot_teach(RL):
    dead = lambda: relabel(
        learner(), lambda r, i: r if live_groups(r[None], torch.ones(1, len(r)).bool()) and i < 4 else 0 * r
    )
    with pytest.raises(ValueError, match=f"{RL.__name__}: [1-4] of 64 groups .* wanted 5% .*min_live=0"):
        fit(dead(), 1, [NoDropout(), RL()])
    learn = dead()
    w = weights(learn)
    with pytest.warns(UserWarning, match="the stage is skipped"):
        fit(learn, 3, [RL(too_few="skip"), NoDropout(), SkipFlat(), Best(), KLToRef()])
    assert same(w, weights(learn)) and not set(vars(learn)) & {"grpo", "rloo", "best"}
    # told so, it goes on
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(learn, 1, [NoDropout(), RL(min_live=0.0), SkipFlat()])
    assert not same(w, weights(learn))
    with pytest.raises(ValueError, match="'raise' or 'skip'"): RL(too_few="none")

def test_conditional_rl_trains_on_groups_with_enough_positives():
    spy = Spy(after_loss=lambda s: (s.yb, s.grpo.adv))
    learn = learner(cbs=Stats())
    fit(learn, 1, [NoDropout(), GRPO(min_positive=0.4, positive=0.5, skip_flat=False), spy])
    used = 0
    for (r, m), adv in spy.seen:
        real = torch.stack([(r > 0.5) & m], 0)[0].sum(-1) / m.sum(-1).clamp(min=1)
        assert (real[m.any(-1)] >= 0.4).all()
        used += int(m.any(-1).sum())
    want = [float((r > .5).double().mean()) >= .4 for *_, r in learn.dls.train_ds.rows]
    assert used == sum(want) < 64 and learn.stats.mean("conditional") == pytest.approx(sum(want)/64)
    with pytest.raises(ValueError, match="at least 90% positive"):
        fit(learner(), 1, [NoDropout(), GRPO(min_positive=0.9, positive=0.9)])

def test_rewards_are_normalised_once():
    one = lambda r: torch.ones(1, len(r)).bool()
    for norm in ("zscore", "rank"):
        z = lambda: relabel(learner(), lambda r, i: advantage(r[None], one(r), norm)[0])
        for cb in (lambda: GRPO(), lambda: GRPO("rank"), lambda: RLOO()):
            with pytest.raises(ValueError, match="would do it twice"): fit(z(), 1, [NoDropout(), cb()])
        fit(z(), 1, [NoDropout(), GRPO("center")])
    # an offset alone is no normalisation
    fit(relabel(learner(), lambda r, i: r - 0.4), 1, [NoDropout(), GRPO()])

def test_rloo_is_the_policy_gradient():
    spy = Spy(
        after_loss=lambda s: (
            s.loss_grad.item(),
            policy_gradient(s.pred, advantage(*s.yb, "loo", "batch", clip=5.0), s.yb[1]).item(),
        )
    )
    fit(learner(), 1, [NoDropout(), SkipFlat(), RLOO(), spy])
    assert all(a == pytest.approx(b, abs=1e-7) for a, b in spy.seen)
    with pytest.raises(ValueError, match="RLOO: dropout"): fit(learner(dropout=.1), 1, RLOO(dropout=True))

# --- listwise, SFT -----------------------------------------------------------------------------------------
def test_listwise_is_its_formula_and_starts_at_its_start():
    learn = learner(cbs=Stats())
    start = frozen(learn.model)
    spy = Spy(
        after_loss=lambda s: (
            s.loss_grad.item(),
            listwise_loss(s.pred, *s.yb, start(*s.xb)).item(),
            s.listwise.ref is start,
        )
    )
    fit(learn, 2, [Listwise(), SkipFlat(), spy])
    assert all(a == pytest.approx(b, rel=1e-5) and not c for a, b, c in spy.seen)
    first = {k: float(learn.stats.buf[k][0][0]) for k in ("temp", "kl_target")}
    assert 0.02 <= first["temp"] <= 1 and first["kl_target"] > 0
    assert learn.stats.mean("ess") < 1 and all(
        not p.requires_grad for p in Listwise(learn.model).given_ref.parameters()
    )

def test_listwise_references():
    learn = learner()
    set_anchor(learn, "sft")
    fit(learn, 1, RCE(0.3))
    kept = learn.anchors["sft"]
    for ref, want in (("sft", kept), ("none", None), (kept, kept)):
        spy = Spy(
            after_loss=lambda s: (
                s.loss_grad.item(),
                listwise_loss(s.pred, *s.yb, None if want is None else want(*s.xb), 0.3).item(),
            )
        )
        fit(learn, 1, [Listwise(ref, temp=0.3), spy])
        assert all(a == pytest.approx(b, rel=1e-4) for a, b in spy.seen), ref
    with pytest.raises(ValueError, match="Listwise: ref 'rce' is neither .*there are: sft"):
        fit(learn, 1, Listwise("rce"))
    with pytest.raises(ValueError, match="means something else"): set_anchor(learn, "start")
    with pytest.raises(ValueError, match="over='set' needs a model with `logp_set`"):
        fit(learn, 1, Listwise(over="set"))
    for kw in (dict(temp=-1.), dict(ess=2.), dict(over="pair")):
        with pytest.raises(ValueError): Listwise(**kw)

class Sets(ToySelector):
    "Probability of pairs and singles in any order"
    def logp_set(self, enc, seqs, seq_mask):
        two = seq_mask[..., 1:2] if seqs.shape[-1] > 1 else seq_mask & False
        a = self.logp(enc, seqs, seq_mask)
        b = self.logp(enc, torch.where(two, seqs.flip(-1), seqs), seq_mask)
        return torch.where(two[..., 0], torch.logaddexp(a, b), a)

def test_listwise_over_sets_does_not_see_the_order():
    def run(flip):
        learn = learner()
        learn.model = Sets(8)
        learn.model.load_state_dict(learner().model.state_dict())
        if flip:
            learn.dls.train_ds.rows = [
                (q, c, [tuple(reversed(s)) for s in seqs], r) for q, c, seqs, r in learn.dls.train_ds.rows
            ]
        fit(learn, 2, [Listwise(over="set"), SkipFlat()])
        return weights(learn)
    a = run(False)
    b = run(True)
    assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)
    learn = learner()
    learn.model = Sets(8)
    learn.dls.train_ds.rows = [
        (q, c, [(0, 1), (1, 0), (0, 2)], torch.tensor([1.0, 0.2, 0.3]))
        for q, c, *_ in learn.dls.train_ds.rows
    ]
    # two sets, the first worth .6
    lp = lambda s: s.model.logp_set(s.model.encode(*s.xb[:3]), *s.xb[3:])[:, ::2]
    spy = Spy(
        after_loss=lambda s: (
            s.loss_grad.item(),
            listwise_loss(
                lp(s),
                torch.tensor([[0.6, 0.3]]).expand(len(s.pred), 2),
                torch.ones(len(s.pred), 2).bool(),
                temp=0.2,
            ).item(),
        )
    )
    fit(learn, 1, [Listwise("none", temp=0.2, over="set"), spy])
    assert all(x == pytest.approx(y, rel=1e-4) for x, y in spy.seen)

def test_sft_imitates_what_it_is_told():
    seen = {}
    for name, kw in dict(
        best=dict(), two=dict(top=2), lever_lm=dict(top=None, min_score=0.3), soft=dict(top=2, temp=0.2)
    ).items():
        spy = Spy(after_loss=lambda s: (s.yb, s.loss_grad, s.pred))
        fit(learner(), 1, [SFT(skip_flat=False, **kw), spy])
        seen[name] = spy.seen[0]
    def by_hand(name, pick):
        (r, m), loss, lp = seen[name]
        each = []
        for b in range(len(r)):
            w = pick(r[b][m[b]])
            each += [-(w / w.sum() * lp[b][m[b]]).sum()] if w.sum() > 0 else []
        assert torch.stack(each).mean().item() == pytest.approx(loss.item(), rel=1e-4), name
    by_hand("best", lambda r: (r == r.max()).float())
    by_hand("lever_lm", lambda r: (r >= 0.3).float())
    def two(r):
        last = r.sort(descending=True).values[:2][-1]
        above, tied = r > last, r == last
        return above + tied * (min(2, len(r)) - above.sum()) / tied.sum()
    by_hand("two", two)
    by_hand("soft", lambda r: two(r) * (r / 0.2).exp())

# --- KL ----------------------------------------------------------------------------------------------------
def test_kl_is_exact_and_only_loss_grad_changes():
    learn = learner(cbs=Stats())
    ref = ToySelector(8)
    learn.model.train()
    def look(s):
        m, q = s.model, s.kl_to_ref.ref
        S = s.xb[3].shape[-1]
        n = s.xb[4].sum(-1).amax(-1)
        ep = m.encode(*s.xb[:3])
        eq = q.encode(*s.xb[:3])
        kl = [
            kl_exact(lambda p: m.step_logp(ep, p), lambda p: q.step_logp(eq, p), s.xb[2], t + 1)
            for t in range(S)
        ]
        # each query as long as its longest sequence
        kl = torch.stack(kl, -1).gather(1, (n - 1)[:, None]).mean()
        return s.loss_grad.item(), s.loss.item(), kl.item()
    spy = Spy(after_loss=look)
    fit(learn, 1, [RCE(), KLToRef(ref, beta=3.0), spy])
    for g, l, kl in spy.seen: assert g == pytest.approx(l + 3*kl, rel=1e-4)
    assert learn.stats.mean("kl") == pytest.approx(sum(s[2] for s in spy.seen)/4, rel=1e-4)

def test_kl_of_live_groups_stands_beside_that_of_all():
    "By hand, group by group; with `on='live'` the two are one number"
    def run(on):
        learn = relabel(learner(cbs=Stats()), lambda r, i: r if i % 3 else 0*r)
        ref = ToySelector(8)
        each, live = [], []
        def look(s):
            m, q = s.model, s.kl_to_ref.ref
            ep, eq = m.encode(*s.xb[:3]), q.encode(*s.xb[:3])
            n = s.xb[4].sum(-1).amax(-1)
            for b, steps in enumerate(n.tolist()):
                one = slice(b, b + 1)
                kl = kl_exact(lambda p: m.step_logp(tuple(x[one] for x in ep), p),
                              lambda p: q.step_logp(tuple(x[one] for x in eq), p), s.xb[2][one], steps)
                each.append(kl.item())
            live.extend(s.mask.any(-1).tolist())
        fit(learn, 1, [RCE(), KLToRef(ref, beta=1., on=on), Spy(after_loss=look)])
        return learn.stats.mean("kl"), learn.stats.mean("kl_live"), torch.tensor(each), torch.tensor(live)
    kl, kl_live, each, live = run("all")
    assert 0 < live.sum() < len(live) == 64
    assert kl == pytest.approx(each.mean().item(), rel=1e-4)
    assert kl_live == pytest.approx(each[live].mean().item(), rel=1e-4) != pytest.approx(kl, rel=1e-3)
    kl, kl_live, each, live = run("live")
    assert kl == pytest.approx(kl_live) == pytest.approx(each[live].mean().item(), rel=1e-4)

@pytest.mark.parametrize("S", [1, 2])
def test_kl_counts_the_step_at_which_a_policy_may_stop(S):
    "Stored sequences of S < max_shots picks end with STOP, so that step is in the KL"
    torch.manual_seed(0)
    dls = synth_dls(8, 8, 8, K=5, N=3, shots=(S,))
    make = lambda: PointerSelector(8, d_hidden=8, max_shots=S + 1, stop=True, dropout=0.0)
    p = make()
    q = make()
    for m, b in ((p, 1.), (q, -1.)):
        torch.nn.init.constant_(m.stop.bias, -4.)   # few end before
        with torch.no_grad(): m.stop.bias[-1] = b
    learn = Learner(dls, p, regret, lr=0.0, cbs=Stats())
    xb = dls.train.one_batch()[:3]
    ep = p.encode(*xb)
    eq = q.encode(*xb)
    with torch.no_grad():
        seqs, lp, mask = p.enumerate(ep, None)
        lq = q.logp(eq, seqs, mask)
    fit(learn, 1, [KLToRef(q, beta=0.1), EntropyFloor(0.9)])
    assert abs(learn.stats.mean("kl") - float((lp.exp() * (lp - lq)).sum(-1).mean())) < 1e-4
    assert learn.stats.mean(f"kl_{S+1}") > .1

# --- the empty sequence --------------------------------------------------------------------------------------
def chooser(seed=0, **kw):
    torch.manual_seed(seed)
    m = PointerSelector(8, **dict(d_hidden=8, stop=True, max_shots=3, dropout=0.) | kw)
    with torch.no_grad():
        for p in m.parameters(): p.add_(.1 * torch.randn_like(p))
    return m
def with_empties(n=32, bs=8, shots=(0, 1, 2)): return synth_dls(n, 16, bs, K=(4, 6), N=(2, 6), shots=shots)

@pytest.mark.parametrize("estimator", ["exact", "k3"])
def test_groups_with_nothing_in_them_start_at_ratio_one_and_kl_zero(estimator):
    learn = Learner(with_empties(bs=32), chooser(), regret, cbs=Stats())   # one batch
    fit(learn, 1, [GRPO(), KLToRef(estimator=estimator), EntropyFloor(.9)])
    assert learn.stats.mean("ratio_off") < 1e-5
    for name in ("kl", "kl_1", "kl_2", "k3"): assert abs(learn.stats.mean(name)) < 1e-6

@pytest.mark.parametrize("shots, steps", [((0,), 1), ((0, 2), 3)])
def test_kl_asks_for_stop_where_nothing_is_stored(shots, steps):
    p, q = chooser(0), chooser(1)
    dls = with_empties(8, 8, shots) if len(shots) > 1 else synth_dls(8, 8, 8, K=5, N=1, shots=shots)
    learn = Learner(dls, p, regret, lr=0., cbs=Stats())
    def look(s): return s.kl_to_ref.counted(s.kl_to_ref.steps).sum(-1), s.seq_mask.sum(-1).amax(-1)
    spy = Spy(after_loss=look)
    xb = dls.train.one_batch()[:3]
    fit(learn, 1, [KLToRef(q, beta=.1), spy])
    counts, longest = spy.seen[0]
    assert torch.equal(counts, longest + 1) and counts.max() == steps
    ep, eq = p.encode(*xb), q.encode(*xb)
    if steps == 1:
        want = kl_exact(lambda x: p.step_logp(ep, x), lambda x: q.step_logp(eq, x), xb[2], 1).mean()
        assert learn.stats.mean("kl") == pytest.approx(want.item(), rel=1e-4)
        assert (p.step_logp(ep, torch.zeros(8, 1, 0, dtype=torch.long))[..., -1].exp() > .1).all()

STAGES = {
    "regret": lambda: [],
    "rce": lambda: [RCE(.3)],
    "sft": lambda: [SFT()],
    "listwise": lambda: [Listwise()],
    "listwise of sets": lambda: [Listwise(over="set")],
    "grpo": lambda: [GRPO(), KLToRef(beta=.01), EntropyFloor(.2)],
    "rloo": lambda: [RLOO()],
    "top": lambda: [GRPO(), TopKCurriculum()],
    "split": lambda: [RCE(.3), SplitShots()],
    "flat stay": lambda: [RCE(.3, skip_flat=False), KLToRef(estimator="k3")],
}
@pytest.mark.parametrize("name", STAGES)
def test_every_objective_learns_from_groups_with_the_empty_sequence(name):
    "Nothing pays best for half of the queries, for the others it pays nothing: weights stay finite, regret falls"
    learn = Learner(with_empties(96), chooser(), regret, lr=3e-2, cbs=Stats())
    for dl in learn.dls.loaders:
        rows = dl.dataset.rows
        for i, (query, cands, seqs, rewards) in enumerate(rows):
            pays = torch.tensor([float(query[0] > 0) if not s else .5 for s in seqs])
            rows[i] = (query, cands, seqs, pays)
    with learn.no_bar(): before = learn.validate()[0]
    if name == "split":   # an empty sequence is alone in its group there, so nothing compares it
        none = pytest.raises(ValueError, match="none of .* groups has any reward difference")
        with none: fit(learn, 15, STAGES[name]())
        return
    fit(learn, 15, STAGES[name]())
    assert all(p.isfinite().all() for p in learn.model.parameters())
    with learn.no_bar(): after = learn.validate()[0]
    assert after < .85 * before, (before, after)
    q, c, mask = learn.dls.valid.one_batch()[:3]
    real = learn.model.eval().greedy(learn.model.encode(q, c, mask), None)[1]
    assert ((~real.any(-1)) == (q[:, 0] > 0)).float().mean() > .7

def test_a_batch_with_empties_is_its_groups_one_by_one_and_padding_changes_nothing():
    m = chooser()
    *xb, rewards, mask = with_empties(12, 12).train.one_batch()
    empty = mask & ~xb[4].any(-1)
    assert empty.any() and (~mask & ~xb[4].any(-1)).any()   # both kinds of row without a pick
    losses = [regret, lambda *x: rce_loss(*x, .3), listwise_loss,
              lambda lp, r, k: policy_gradient(lp, advantage(r, k), k)]
    more = lambda x: torch.cat([x, torch.zeros_like(x[:, :2])], 1)
    wider = [*xb[:3], *(torch.nn.functional.pad(more(x), (0, 1)) for x in xb[3:])]
    for loss in losses:
        m.zero_grad()
        whole = loss(m(*xb), rewards, mask)
        whole.backward()
        grads = [p.grad.clone() for p in m.parameters()]
        one_by_one = []
        for b in range(12):
            n = int(mask[b].sum())
            own = [x[b:b+1] for x in xb[:3]] + [x[b:b+1, :n] for x in xb[3:]]
            one_by_one.append(loss(m(*own), rewards[b:b+1, :n], mask[b:b+1, :n]))
        torch.testing.assert_close(torch.stack(one_by_one).mean(), whole, atol=1e-5, rtol=1e-4)
        m.zero_grad()
        padded = loss(m(*wider), more(rewards), more(mask))
        torch.testing.assert_close(padded, whole, atol=1e-5, rtol=1e-4)
        padded.backward()
        for p, g in zip(m.parameters(), grads): torch.testing.assert_close(p.grad, g, atol=1e-5, rtol=1e-3)
        assert m.stop.bias.grad[0] != 0   # STOP at once is taught

def test_kl_holds_the_policy_and_the_reference_stands_still():
    def moved(beta):
        learn = learner(cbs=Stats())
        ref = KLToRef(learn.model, beta)
        w = weights(learn)
        fit(learn, 3, [RCE(0.2), ref])
        assert same(w, ref.ref.state_dict()) and not same(w, weights(learn))
        return learn.stats.mean("kl")
    assert moved(20.) < .5*moved(0.)

def test_no_query_walks_further_than_its_own_sequences_and_draws_leave_the_training_alone(monkeypatch):
    "Several shot counts in a batch: each is asked for its steps; drawing prefixes leaves the generator alone"
    import leverplus.callback_kl as page

    inner, walked = page.kl_steps, []
    monkeypatch.setattr(
        page,
        "kl_steps",
        lambda p, q, mask, S, *args: (walked.append((len(mask), S)), inner(p, q, mask, S, *args))[1],
    )
    def run(*cbs):
        learn = learner()
        torch.manual_seed(3)
        fit(learn, 2, [RCE(0.2), SplitShots(), *cbs])
        return weights(learn), torch.rand(2)
    spy = Spy(
        after_loss=lambda s: [
            (int((n == k).sum()), k) for n in (s.xb[4].sum(-1).amax(-1),) for k in n.unique().tolist()
        ]
    )
    free, u = run()
    seen, v = run(KLToRef(beta=0.0, limit=2), spy)
    assert same(free, seen) and torch.equal(u, v)
    assert walked == sum(spy.seen, []) and {S for _, S in walked} == {1, 2}
    for cb in (lambda: KLToRef(beta=3.0, limit=2), lambda: EntropyFloor(0.99, limit=2)):
        assert same(run(cb())[0], run(cb())[0]) and not same(run(cb())[0], free)
    for cb in (KLToRef, EntropyFloor):
        with pytest.raises(ValueError, match="limit 1 prefixes"): cb(limit=1)

def test_k3_of_the_reports_stands_beside_it_and_can_be_trained_with():
    learn = learner(cbs=Stats())
    ref = ToySelector(8)
    spy = Spy(
        after_loss=lambda s: (
            s.loss_grad.item(),
            s.loss.item(),
            kl_k3(ref(*s.xb), s.pred, s.xb[4].any(-1)).item(),
        )
    )
    fit(learn, 1, [RCE(), SkipFlat(), KLToRef(ref, 2., estimator="k3"), spy])
    for g, l, k3 in spy.seen: assert g == pytest.approx(l + 2*k3, rel=1e-4)
    assert [float(v) for v, _ in learn.stats.buf["k3"]] == pytest.approx(
        [k for *_, k in spy.seen], rel=1e-5
    ) and learn.stats.mean("kl") > 0

def test_kl_references_by_name_and_by_folder(tmp_path):
    from leverplus.selector import PointerSelector
    learn = learner(cbs=Stats())
    learn.model = PointerSelector(8, d_hidden=8, dropout=0.0)
    set_anchor(learn, "sft")
    learn.model.save_pretrained(tmp_path / "ck")
    w = weights(learn)
    fit(learn, 1, RCE(0.3))
    found = {}
    for ref in ("sft", str(tmp_path/"ck"), tmp_path/"ck"):
        fit(learn, 1, [RCE(0.3), cb := KLToRef(ref)])
        assert same(w, cb.ref.state_dict()) and learn.stats.mean("kl") > 0
    with pytest.raises(ValueError, match="neither 'start' nor a module.*sft.*nor the folder"):
        fit(learn, 1, [RCE(), KLToRef("stf")])
    for kw in (dict(ref=3), dict(estimator="k2"), dict(beta=-1.)):
        with pytest.raises(ValueError, match="KLToRef"): KLToRef(**kw)

def test_adaptive_kl_looks_once_per_epoch_at_the_mean():
    learn = learner(cbs=Stats(), lr=5e-2)
    spy = Spy(after_loss=lambda s: (s.epoch, s.kl_to_ref.beta))
    fit(learn, 4, [RCE(.1), kl := KLToRef(beta=.01), ad := AdaptiveKL(.0, 1e-4, 2., (1e-3, .05)), spy])
    betas = {}
    [betas.setdefault(e, set()).add(b) for e, b in spy.seen]
    # never inside an epoch, never over the limit
    assert [sorted(b) for b in betas.values()] == [[0.01], [0.02], [0.04], [0.05]]
    assert ad.trace[-1][0] == pytest.approx(learn.stats.mean("kl"), rel=1e-5) and [
        b for _, b in ad.trace
    ] == [0.01, 0.02, 0.04, 0.05]
    fit(learner(), 2, [RCE(), kl := KLToRef(beta=0.1), AdaptiveKL(5.0, 6.0)])
    assert kl.beta == pytest.approx(0.1 / 1.5**2)
    with pytest.warns(UserWarning, match="beta is at its limit"):
        fit(learner(), 2, [RCE(), KLToRef(beta=1.0), AdaptiveKL(0.0, 1e-9)])
    with pytest.raises(ValueError, match="this fit has none"): fit(learner(), 1, [RCE(), AdaptiveKL()])
    with pytest.raises(ValueError, match="outside the limits"):
        fit(learner(), 1, [RCE(), KLToRef(beta=0.0), AdaptiveKL()])
    for kw in (dict(low=2.), dict(factor=1.), dict(limits=(0., 1.))):
        with pytest.raises(ValueError, match="AdaptiveKL"): AdaptiveKL(**kw)

def test_entropy_floor_is_exact_and_silent_above_it():
    def h(s):
        enc = s.model.encode(*s.xb[:3])
        S = s.xb[3].shape[-1]
        n = s.xb[4].sum(-1).amax(-1)
        e = entropy_steps(lambda p: s.model.step_logp(enc, p), s.xb[2], S, normed=True)
        c = torch.arange(S) < n[:, None]
        return s.loss_grad.item() - s.loss.item(), ((e*c).sum(-1)/c.sum(-1)).mean().item()
    for floor in (.05, .999):
        spy = Spy(after_loss=h)
        fit(learner(), 1, [RCE(0.1), EntropyFloor(floor, 0.5), spy])
        for d, e in spy.seen: assert d == pytest.approx(.5*max(floor - e, 0.), abs=1e-6)
    fit(learner(), 3, [RCE(), up := EntropyFloor(0.999, 0.5)])
    fit(learner(), 3, [RCE(), down := EntropyFloor(0.05, 0.5)])
    fit(learner(), 3, [RCE(), still := EntropyFloor(0.999, 0.5, adaptive=False)])
    assert (
        up.alpha == pytest.approx(0.5 * 1.5**3)
        and down.alpha == pytest.approx(0.5 / 1.5**3)
        and still.alpha == 0.5
    )
    free = learner(lr=0.1, cbs=Stats())
    held = learner(lr=0.1, cbs=Stats())
    fit(free, 5, [RCE(0.02), EntropyFloor(0.9, 1e-3, False)])
    fit(held, 5, [RCE(0.02), EntropyFloor(0.9, 5.0), KLToRef()])
    assert held.stats.mean("entropy_exact") > free.stats.mean("entropy_exact") + .01
    for kw in (dict(floor=0.), dict(alpha=99.), dict(factor=.5)):
        with pytest.raises(ValueError, match="EntropyFloor"): EntropyFloor(**kw)

def test_kl_start_is_taken_anew_each_fit():
    learn = learner(cbs=Stats())
    cb = KLToRef("start")
    fit(learn, 2, [RCE(0.3), cb])
    w = weights(learn)
    spy = Spy(after_loss=lambda s: {k: v.clone() for k, v in s.kl_to_ref.ref.state_dict().items()})
    fit(learn, 1, [RCE(0.3), cb, spy])
    assert same(spy.seen[0], w)

def test_kl_says_what_it_needs():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Linear(8, 1)
        def forward(self, q, c, cm, s, sm): return self.w(q).expand(s.shape[:2])
    learn = learner()
    learn.model = Plain()
    with pytest.raises(ValueError, match="encode and step_logp"): fit(learn, 1, [RCE(), KLToRef()])
    with pytest.raises(ValueError, match="'all' or 'live'"): KLToRef(on="some")
    with pytest.warns(UserWarning, match="KL is not 0"): fit(learner(dropout=.2), 1, [RCE(), KLToRef()])

# --- schedules, dropout, freezing (T1, T2, T4) -------------------------------------------------------------
def test_temp_schedule_acts_before_the_objective():
    spy = Spy(after_loss=lambda s: (s.rce.temp, s.pct_train))
    fit(learner(), 3, [RCE(9.0), TempSchedule("rce", temp=SchedCos(2.0, 0.5)), spy])
    assert [t for t, _ in spy.seen] == pytest.approx(
        [SchedCos(2.0, 0.5)(p) for _, p in spy.seen]
    ) and spy.seen[0][0] == 2.0

def test_temp_schedule_moves_beta_and_refuses_unknown():
    spy = Spy(after_loss=lambda s: s.kl_to_ref.beta)
    fit(learner(), 2, [RCE(), KLToRef(), TempSchedule("kl_to_ref", beta=SchedLin(1.0, 0.0)), spy])
    assert spy.seen == pytest.approx([1 - i/8 for i in range(8)])
    with pytest.raises(ValueError, match="no callback 'grpo'"):
        fit(learner(), 1, [RCE(), TempSchedule("grpo", x=SchedLin(0, 1))])
    with pytest.raises(ValueError, match="has no tau"):
        fit(learner(), 1, [RCE(), TempSchedule("rce", tau=SchedLin(0, 1))])

def test_no_dropout_every_epoch():
    spy = Spy(after_loss=lambda s: (active_dropout(s.model), s.learn.training))
    fit(learner(dropout=0.5), 2, [RCE(), NoDropout(), spy])
    assert spy.seen == [([], True)]*8

class Normed(ToySelector):
    def __init__(self):
        super().__init__(8)
        self.norm = nn.LayerNorm(8)
    def encode(self, q, c, m): return self.norm(super().encode(q, c, m)[0]), c, m

@pytest.mark.parametrize("part", ["norm", "match", "after", "match.weight"])
def test_freeze_really_freezes(part):
    learn = learner(wd=0.1)
    learn.model = Normed()
    fit(learn, 1, RCE())
    w = weights(learn)
    spy = Spy(before_step=lambda s: [n for n, p in s.model.named_parameters() if p.grad is not None])
    fit(learn, 2, [RCE(), Freeze(part), spy, GradientClip(1.0)])
    now = weights(learn)
    held = [k for k in w if k == part or k.startswith(part + ".")]
    assert (
        held
        and all(torch.equal(w[k], now[k]) for k in held)
        and all(not torch.equal(w[k], now[k]) for k in w if k not in held)
    )
    assert all(not set(held) & set(s) for s in spy.seen)
    fit(learn, 1, RCE())
    assert all(not torch.equal(now[k], v) for k, v in weights(learn).items())

def test_freeze_refuses():
    with pytest.raises(ValueError, match="there are match, after"): fit(learner(), 1, [RCE(), Freeze("mat")])
    with pytest.raises(ValueError, match="every parameter"):
        fit(learner(), 1, [RCE(), Freeze("match", "after")])

# --- tracking (T7) -----------------------------------------------------------------------------------------
def test_history_survives_everything():
    learn = learner(cbs=[Stats(), History()])
    fit(learn, 2, [RCE(), SkipFlat()])
    with quiet(learn):
        learn.validate()
        learn.get_preds()
        learn.get_preds(with_loss=True)
    with pytest.raises(KeyboardInterrupt): fit(learn, 2, [RCE(), SkipFlat(), Interrupt()])
    fit(learn, 1, [NoDropout(), GRPO(skip_flat=False), KLToRef()])
    f = learn.history.frame
    assert (
        f.stage.tolist() == ["rce", "rce", "grpo"]
        and f.epoch.tolist() == [0, 1, 0]
        and f.fit.tolist() == [1, 1, 3]
    )
    assert f.kl.notna().tolist() == [False, False, True] and f.live.notna().tolist() == [True, True, False]
    assert f.valid_loss.iloc[-1] == pytest.approx(valid_loss(learn), abs=1e-6)
    with pytest.raises(ValueError, match="no column nothing"): plot_history(f, "nothing")

def test_best_counts_the_start_and_restores():
    class Worst(RCE):
        def objective(self, *a): return -super().objective(*a)
    learn = learner()
    w = weights(learn)
    best = Best()
    fit(learn, 2, [Worst(), best])
    assert same(w, weights(learn)) and best.best_epoch == -1
    learn = learner()
    fit(learn, 3, [RCE(0.3), best := Best()])
    assert (
        best.value == pytest.approx(valid_loss(learn), abs=1e-6)
        and best.value <= min(r[1] for r in learn.recorder.values) + 1e-7
    )
    calls = []
    # the first epoch is best
    def score(l):
        calls.append(1)
        return float(len(calls) != 2)
    learn = learner()
    fit(learn, 3, [RCE(0.3), best := Best(score)])
    assert len(calls) == 4 and best.best_epoch == 0

def test_best_attached_to_the_learner_is_harmless():
    learn = learner(cbs=Best())
    fit(learn, 2, RCE(0.3))
    w = weights(learn)
    with quiet(learn):
        learn.validate()
        learn.get_preds()
    assert same(w, weights(learn))

def test_best_after_an_interrupt():
    learn = learner()
    best = Best()
    w = weights(learn)
    with pytest.raises(KeyboardInterrupt): fit(learn, 2, [RCE(), best, Interrupt()])
    assert not same(w, weights(learn))
    best.restore(learn.model)
    assert same(w, weights(learn))

def test_stats_weighted_and_reset():
    st = Stats()
    st.add(1, dict(a=1.0))
    st.add(3, dict(a=torch.tensor(2.0)))
    st.add(5, dict(a=float("nan")))
    assert st.mean("a") == 1.75 and st.mean("b") != st.mean("b")
    st.before_train()
    assert st.means() == {}

def test_rl_stats_columns():
    learn = learner()
    learn.add_cb(st := RLStats())
    learn.metrics = st.metrics()
    fit(learn, 1, grpo_stage())
    row = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    assert (
        set(RLStats.columns) <= set(row)
        and 0 < row["mass"] < 2
        and 0 < row["entropy"] <= 1
        and row["kl"] >= 0
        and 0 < row["live"] < 1
    )

# --- residue, composition ----------------------------------------------------------------------------------
class Cancel(StageCallback):
    "Another callback ends the fit in the third batch"
    order = 7
    def after_backward(self):
        if self.train_iter == 2: raise CancelFitException("enough")

@pytest.mark.parametrize("stage", [rce_stage, grpo_stage, listwise_stage, sft_stage, rloo_stage])
@pytest.mark.parametrize("how", ["fit", "validate", "get_preds", "interrupt", "cancel"])
def test_no_residue(stage, how):
    learn = learner(dropout=0.2, cbs=[Stats(), History()])
    ids = [id(c) for c in learn.cbs]
    names = set(vars(learn))
    loss = learn.loss_func
    logger = learn.logger
    with warnings.catch_warnings(), quiet(learn):
        warnings.simplefilter("ignore")
        if how == "fit": learn.fit(1, cbs=stage())
        elif how == "cancel": learn.fit(1, cbs=stage() + [Cancel()])
        elif how == "interrupt":
            with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=stage() + [Interrupt()])
        elif how == "validate":
            v = learn.validate(cbs=stage())[0]
            assert v == pytest.approx(valid_loss(learn), abs=1e-6)
        else: learn.get_preds(cbs=stage())
    assert (
        sorted(id(c) for c in learn.cbs) == sorted(ids) and learn.loss_func is loss and learn.logger == logger
    )
    assert all(p.requires_grad for p in learn.model.parameters()) and learn.freeze.__func__ is Learner.freeze
    left = set(vars(learn)) - names
    assert not left & {
        "rce",
        "grpo",
        "kl_to_ref",
        "best",
        "skip_flat",
        "freeze_stage",
        "no_dropout",
        "temp_schedule",
        "objective",
        "listwise",
        "sft",
        "rloo",
        "adaptive_kl",
        "entropy_floor",
        "anchors",
    }
    with quiet(learn): fit(learn, 1, RCE(), reset_opt=True)   # and the next fit works as if nothing had been
    assert learn.recorder.values

def test_a_fit_after_another_is_the_same_as_alone():
    "Two learners with the same weights and batches: what ran before on one of them does not matter"
    a = learner()
    b = learner()
    fit(a, 1, grpo_stage())
    b.model.load_state_dict(a.model.state_dict())
    with pytest.raises(KeyboardInterrupt): fit(b, 1, rce_stage() + [Interrupt()])
    b.model.load_state_dict(a.model.state_dict())
    [setattr(p, "grad", None) for p in b.model.parameters()]
    import random

    a.dls.train.rng, b.dls.train.rng = random.Random(1), random.Random(1)
    fit(a, 1, grpo_stage(), reset_opt=True)
    fit(b, 1, grpo_stage(), reset_opt=True)
    assert same(weights(a), weights(b))

def test_same_seed_same_weights():
    a, b = (fit(learner(dropout=0.3), 2, [RCE(0.3), SkipFlat()]) for _ in range(2))
    assert same(weights(a), weights(b))

@pytest.mark.parametrize("extra", [lambda: GradientClip(.1), lambda: GradientAccumulation(32)])
def test_composes(extra):
    learn = learner(cbs=Stats())
    fit(learn, 2, [*grpo_stage()[:-1], extra()])
    assert all(v.isfinite().all() for v in weights(learn).values()) and learn.stats.mean("kl") >= 0

class Autocast(StageCallback):
    "What fastai's MixedPrecision does on a GPU, on the CPU, in bfloat16"
    order = 10
    def before_batch(self):
        self.autocast = torch.autocast("cpu", torch.bfloat16)
        self.autocast.__enter__()
    def after_pred(self): self.learn.pred = self.pred.float()
    def after_loss(self): self.autocast.__exit__(None, None, None)

@pytest.mark.parametrize("stage", [rce_stage, grpo_stage, listwise_stage, sft_stage, rloo_stage])
def test_composes_with_mixed_precision(stage):
    "bfloat16 changes the weights and nothing else: ratio 1 and KL 0 at the first step hold in it, too"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        learn = learner(cbs=Stats())
        w = weights(learn)
        fit(learn, 1, [*stage(), Autocast(), Spy(after_loss=lambda s: torch.is_autocast_enabled("cpu"))])
        assert not torch.is_autocast_enabled("cpu")
        if "kl" in learn.stats.buf: assert float(learn.stats.buf["kl"][0][0]) == pytest.approx(0., abs=1e-6)
        if "ratio_off" in learn.stats.buf: assert learn.stats.mean("ratio_off") < 1e-4
        assert not same(w, weights(learn)) and all(
            v.isfinite().all() and v.dtype == torch.float32 for v in weights(learn).values()
        )
        # without a GPU fastai's own does nothing, and breaks nothing
        fit(learn, 1, [*stage(), MixedPrecision(AMPMode.BF16)], reset_opt=True)

def test_stats_are_optional(): fit(learner(), 1, grpo_stage())

def test_bare_exceptions_have_words():
    "T5: an exception without arguments in a callback surfaces as IndexError; ours all carry a message"
    import inspect
    import leverplus.callback_core as c
    import leverplus.callback_grpo as g
    import leverplus.callback_kl as k
    import leverplus.callback_schedule as s
    import leverplus.callback_track as t
    import leverplus.callback_listwise as l, leverplus.callback_rce as r
    for mod in (c, g, k, l, r, s, t): assert "assert " not in inspect.getsource(mod)

# --- looking for a learning rate, with fastai's own Learner ------------------------------------------------
LOOKED_FOR = dict(
    rce=lambda: [RCE((2., .5))], listwise=lambda: [Listwise()], sft=lambda: [SFT()], rloo=lambda: [RLOO()],
    grpo=lambda: [GRPO(), KLToRef(), AdaptiveKL(), TopKCurriculum()], floor=lambda: [RCE(), EntropyFloor(.99), Best()],
)

@pytest.mark.parametrize("name", LOOKED_FOR)
def test_lr_find_of_a_plain_learner(name, tmp_path):
    "It comes to its last rate where the loss may be below 0, moves no weight of a penalty, and logs nothing"
    cbs = LOOKED_FOR[name]()
    learn = learner(cbs=[Stats(), *cbs], path=tmp_path)
    before = weights(learn)
    with quiet(learn), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = learn.lr_find(1e-5, .1, 30, show_plot=False)
    assert len(learn.recorder.losses) == 30 and 1e-5 < found.valley < .1
    assert same(before, weights(learn)) and learn.stats.means() == {}
    for cb in cbs:
        if isinstance(cb, KLToRef): assert cb.beta == .02
        if isinstance(cb, EntropyFloor): assert cb.alpha == .1
        if isinstance(cb, RCE): assert cb.temp in (1., 2.)
        if isinstance(cb, AdaptiveKL): assert cb.trace == []

def test_a_loss_that_is_never_below_zero_may_still_diverge(tmp_path):
    learn = learner(cbs=RCE(), path=tmp_path)
    with quiet(learn): learn.lr_find(1e-3, 1e3, 60, show_plot=False)
    assert len(learn.recorder.losses) < 60   # fastai stops where it has got four times as bad

# --- thresholds and spreads ---------------------------------------------------------------------------------
def test_exactly_the_wanted_share_is_enough():
    ".07 * 100 is a little more than 7 in floating point; 7 of 100 are 7 % all the same"
    assert not too_few(7, .07, 100) and too_few(6, .07, 100) and .07 * 100 > 7
    learn = learner(100)
    relabel(learn, lambda r, i: torch.arange(len(r)).float() if i < 7 else 0*r)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(learn, 1, [GRPO(min_live=.07)])
    relabel(learn, lambda r, i: torch.arange(len(r)).float() if i < 6 else 0*r)
    with pytest.raises(ValueError, match="6 of 100 groups"): fit(learn, 1, [GRPO(min_live=.07)])

@pytest.mark.parametrize("before", [False, True])
def test_spread_of_all_advantages_counts_the_sequences_they_are_of(before):
    "A cut before the advantages makes groups of k; the divisor is k - 1 then, not that of the data"
    stds = []
    class Std(StageCallback):
        order = 5
        def before_backward(self):
            for a, n in zip(self.grpo.adv, self.grpo.adv_size):
                stds.append(a.square().sum().item() / max(n.item() - 1, 1))
    learn = toy_learner(regret, synth_dls(32, 16, 32, N=6), cbs=[RLStats(), History()])
    grpo = GRPO("center", adv_clip=None)
    fit(learn, 1, [grpo, TopKCurriculum(3, before=before), Std()])
    want = torch.tensor(stds[:32]).double().sqrt().mean().item()
    assert learn.history.frame.adv_std_all.iloc[0] == pytest.approx(want, rel=1e-5)

@pytest.mark.parametrize("bs", [1, 2, 7, 64])
def test_spread_of_regret_is_that_of_the_epoch(bs):
    "Batches of two have a smaller spread than their epoch, of one none; the weights stand still here"
    learn = toy_learner(regret, synth_dls(64, 16, bs, seed=3, **RAGGED), cbs=[RLStats(), History()])
    fit(learn, 1, [RCE()], lr=0.)
    xy = learn.dls.train.new(shuffle=False, bs=64).one_batch()
    with torch.no_grad(): each = regret(learn.model.eval()(*xy[:5]), *xy[5:], "none")
    row = learn.history.frame.iloc[0]
    assert row.regret_sd == pytest.approx(each.std().item(), rel=1e-4)
    assert row.regret_train == pytest.approx(each.mean().item(), rel=1e-4)

def test_rce_counts_each_number_of_demonstrations_alike_for_a_policy_with_stop():
    "By hand: softmax(r/temp - ln n), n = how many of the group are as long; without STOP, or of one length, as it was"
    from leverplus.callback_rce import numbers_alike
    from leverplus.losses import rce_weights
    torch.manual_seed(0)
    rewards = torch.rand(2, 6)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    lengths = torch.tensor([[0, 1, 1, 2, 2, 2], [0, 2, 2, 2, 2, 2]])
    seq_mask = torch.arange(2) < lengths[..., None]
    n = torch.tensor([[1, 2, 2, 3, 3, 3], [1, 3, 3, 3, 1, 1]])
    want = (rewards/.3 - n.log()).masked_fill(~mask, -torch.inf).softmax(-1)
    got = numbers_alike(rce_weights(rewards, mask, .3), seq_mask, mask)
    torch.testing.assert_close(got, want)
    pairs = torch.ones(2, 6, 2, dtype=torch.bool)
    torch.testing.assert_close(numbers_alike(want, pairs, mask), want)
