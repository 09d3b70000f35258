"Failures of real runs, replayed: each is named, with its remedy; a healthy run raises no alarm"
import math, warnings
import numpy as np, pandas as pd, pytest, torch
import matplotlib.pyplot as plt
from hypothesis import given, settings, strategies as st
from leverplus.callback_core import Objective, SkipFlat, Stats
from leverplus.callback_grpo import GRPO
from leverplus.callback_kl import AdaptiveKL, KLToRef
from leverplus.callback_rce import RCE
from leverplus.callback_schedule import NoDropout, TopKCurriculum
from leverplus.callback_track import Best, History, RLStats
from leverplus.diagnose import PANELS, RULES, CannotLearn, Diagnosis, Watch, data_facts, diagnose, plot_rl
from leverplus.losses import regret
from leverplus.synth import quiet, synth_dls, toy_learner

def run(*cbs, dls=None, n=2, lr=1e-2, start=None, **kw):
    learn = toy_learner(regret, dls or synth_dls(128, 64, N=8), cbs=[RLStats(every=2), History()], **kw)
    if start is not None: learn.model.load_state_dict(start.state_dict())
    with quiet(learn), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        learn.fit(n, lr, cbs=list(cbs))
    return learn

def starved(n=640, live=4, N=10):
    "Groups with one reward each, but for `live` of them, which have one positive"
    dls = synth_dls(n, 64, N=N)
    rows = dls.train_ds.rows
    dls.train_ds.rows = [
        (*row, torch.zeros(len(r)) + (torch.arange(len(r)) == 0) * (i < live))
        for i, (*row, r) in enumerate(rows)
    ]
    return dls

class TopKByReward(SkipFlat):
    "Keep the best 3 by reward, before the advantages"
    order, name = Objective.order-1, "top_k_by_reward"
    def before_batch(self):
        r, m = self.yb
        self.learn.yb = r, m & (r.masked_fill(~m, -1).argsort(-1, descending=True).argsort(-1) < 3)

@pytest.fixture(scope="module")
def good():
    learn = run(RCE(.3), SkipFlat(), Best(), dls=synth_dls(256, 128, N=8), n=6, lr=.1)
    with quiet(learn):
        near = AdaptiveKL(limits=(1e-3, 1.))
        cbs = [NoDropout(), SkipFlat(), GRPO(), KLToRef(), near, TopKCurriculum(5), Best(), Watch("raise")]
        learn.fit(4, 1e-2, cbs=cbs, reset_opt=True)
    return learn

def test_a_healthy_run_raises_no_alarm(good):
    for fit in (1, 2):
        d = diagnose(good, fit=fit)
        assert not d
        assert d.alarms == [] == d.sentences
        assert "0 alarms of" in repr(d)
        assert len(d.frame) >= 9
    checked = (
        "live filter kl k3 ratio clip dropout penalty beta pool uniform unchanged overfit collapse mass"
    )
    assert set(checked.split()) <= set(d.frame.index)

def test_four_live_groups_of_640():
    learn = run(
        GRPO(min_live=0, skip_flat=False), KLToRef(toy_learner(regret, seed=1).model, 0.15), dls=starved(), n=1
    )
    d = diagnose(learn)
    # the mean standard deviation of z-scored groups is the share of live ones
    assert learn.history.frame.adv_std_all.iloc[0] == pytest.approx(0.00625, rel=1e-6)
    assert {"live", "penalty"} <= set(d.alarms)
    assert "0.00625" in d.sentences[0]
    assert "below 5% do not start" in d.sentences[0]

def test_top_k_by_reward():
    d = diagnose(run(NoDropout(), TopKByReward(), GRPO()))
    assert "filter" in d.alarms
    assert "TopKCurriculum" in next(s for s in d.sentences if s.startswith("A filter"))
    assert not {"filter"} & set(diagnose(run(NoDropout(), GRPO(), TopKCurriculum(3))).alarms)

def test_stale_old_policy_clips_what_is_good():
    dls = synth_dls(128, 64, K=24, N=6)
    before = toy_learner(regret).model
    trained = run(RCE(0.05), SkipFlat(), dls=dls, n=10, lr=0.2).model
    learn = run(
        NoDropout(), GRPO(old=before, refresh="never", dual=None, strict=False), dls=dls, start=trained
    )
    d = diagnose(learn)
    assert "ratio" in d.alarms
    assert d.frame.value["ratio"] > 5
    assert "dropout" not in d.alarms
    fresh = diagnose(run(NoDropout(), GRPO(), dls=dls, start=trained))
    assert not {"ratio", "clip"} & set(fresh.alarms)
    assert learn.history.frame.clip_pos.iloc[0] > .2

def test_dropout_in_ratios():
    d = diagnose(run(GRPO(dropout=True, strict=False), dropout=0.5))
    assert {"ratio", "dropout"} <= set(d.alarms)
    assert not {"ratio", "dropout"} & set(diagnose(run(NoDropout(), GRPO(), dropout=0.5)).alarms)
    assert "dropout" not in diagnose(run(RCE(), dropout=0.5)).alarms

def test_k3_is_no_kl_and_beta_hits_its_bound():
    d = diagnose(
        run(
            RCE(0.1), KLToRef(toy_learner(regret).model, 0.0), dls=synth_dls(8, 64, 8, K=40, N=2), lr=0.1, n=8
        )
    )
    assert "k3" in d.alarms
    # the numbers of a real run
    d = diagnose(pd.DataFrame(dict(kl=[0.05, 0.078], k3=[3.0, 17.3], kl_bound=8.3)))
    assert d.alarms == ["k3"]
    assert "17.3" in d.sentences[0]
    d = diagnose(run(NoDropout(), GRPO(), KLToRef(beta=0.5), AdaptiveKL(0.9, 1.0, limits=(0.3, 1.0)), n=4))
    assert "beta" in d.alarms
    assert diagnose(pd.DataFrame(dict(beta=[10., .1, .001])), beta=(.001, 10.)).alarms == ["beta"]

# what each rule must say of a history that has just this: (columns, facts, alarms)
CASES = dict(
    live=(dict(live_before=[0.2]), {}),
    cancel=(dict(cancelled=[0.2]), {}),
    filter=(dict(live_before=[0.54], live_after=[0.26]), {}),
    kl=(dict(kl=[0.1, 0.6]), {}),
    k3=(dict(kl=[0.1], k3=[17.0]), {}),
    ratio=(dict(ratio_off=[20.0]), {}),
    clip=(dict(clip_pos=[0.9]), {}),
    dropout=(dict(ratio_off=[0.0], dropout=[2.0]), {}),
    penalty=(dict(grad_policy=[0.08], grad_kl_to_ref=[0.92]), {}),
    beta=(dict(beta=[1.0, 10.0], beta_least=1e-3, beta_most=10.0), {}),
    ess=(dict(ess=[0.99], temp=[2.0]), {}),
    soft=(dict(), dict(spearman=0.1)),
    pool=(dict(), dict(pool_train=16.0, pool_valid=64.0)),
    uniform=(dict(above_uniform=[0.01]), {}),
    unchanged=(dict(same_as_start=[0.5, 1.0]), {}),
    overfit=(
        dict(regret_train=[0.1], valid_loss=[0.4], regret_sd=[0.2]),
        dict(queries=100, queries_valid=100),
    ),
    collapse=(dict(entropy=[0.05], unique=[0.5]), {}),
    mass=(dict(mass=[0.2, 0.05]), {}),
)

@pytest.mark.parametrize("rule", RULES)
def test_every_rule_alone(rule):
    cols, facts = CASES[rule]
    f = pd.DataFrame({"epoch": [0], **cols} if not cols else cols)
    d = diagnose(f, facts)
    assert d.alarms == [rule]
    assert len(d.sentences) == 1
    said = d.sentences[0]
    assert RULES[rule].symptom.lower() in said.lower()
    assert "Do: " in said
    assert "{" not in said
    assert "nan" not in said
    assert rule in d._repr_markdown_() or RULES[rule].symptom in d._repr_markdown_()
    loose = dict(
        live=0.0,
        cancel=1.0,
        filter=1.0,
        kl=99.0,
        k3=1e9,
        ratio=1e9,
        clip=1.0,
        penalty=1.0,
        beta=(0.0, 1e9),
        ess=(0.0, 1.0),
        soft=-1.0,
        uniform=-1.0,
        unchanged=2.0,
        overfit=1e9,
        entropy=-1.0,
        unique=-1.0,
        mass=-1.0,
    )
    # every threshold is an argument
    if rule not in ("dropout", "pool"):
        assert diagnose(f, facts, **loose).alarms == []

@given(
    st.dictionaries(
        st.sampled_from(sorted({c for cols, _ in CASES.values() for c in cols})),
        st.floats(0, 3) | st.just(math.nan),
        min_size=1,
    )
)
@settings(max_examples=25)
def test_any_history_can_be_judged(row):
    d = diagnose(pd.DataFrame([row, row]), {})
    assert set(d.frame.index) <= set(RULES)
    assert d.frame.value.notna().all()
    assert len(d.sentences) == len(d.alarms)

def test_a_warmup_is_not_held_against_validation():
    "Its reward is another one: neither its regret nor the facts of the LVLM's groups say anything about it"
    facts = dict(queries=100, queries_valid=100, spearman=-.9, pool_train=16., pool_valid=64., live=.01)
    numbers = dict(fit=1, stage="listwise", valid_loss=[.9, .8], regret_sd=[.1, .1], live_before=[.9, .9])
    warm = pd.DataFrame(dict(numbers, regret_own=[.2, .1], own_reward=1.))
    d = diagnose(warm, facts)
    assert d.alarms == []
    assert "overfit" not in d.frame.index and "soft" not in d.frame.index
    assert d.stage == "listwise, 2 epochs with a reward of its own"
    stored = pd.DataFrame(dict(numbers, regret_train=[.2, .1]))
    assert {"overfit", "soft", "pool"} <= set(diagnose(stored, facts).alarms)
    drawn = pd.DataFrame(dict(numbers, regret_own=[.2, .1]))
    d = diagnose(drawn, facts)
    assert d.stage == "listwise, 2 epochs on groups of its own"
    assert set(d.alarms) == {"soft", "pool"}

def test_what_cannot_be_judged(good):
    with pytest.raises(ValueError, match="no epochs"): diagnose(History())
    with pytest.raises(ValueError, match="no fit 9"): diagnose(good, fit=9)
    with pytest.raises(ValueError, match="a Learner with"): diagnose(toy_learner(regret))

def test_facts_come_without_a_draw(good):
    import random

    a = torch.get_rng_state()
    b = random.getstate()
    f = data_facts(good.dls)
    assert torch.equal(a, torch.get_rng_state())
    assert b == random.getstate()
    assert f["queries"] == 256
    assert f["queries_valid"] == 128
    assert f["shots"] == [2]
    assert f["live"] == pytest.approx(np.mean([float(r.max() > r.min()) for *_, r in good.dls.train_ds.rows]))
    assert math.isnan(f["spearman"])
    class Soft: rows = pd.DataFrame(dict(vqa_gt_prob=[.1, .2, .9, None], vqa_acc_score=[1., .6, 0., 1.]))
    good.dls.train_ds.rows, keep = good.dls.train_ds.rows, good.dls.train_ds.rows
    assert diagnose(good, data_facts(good.dls) | dict(spearman=-.9)).alarms == ["soft"]

# --- in the first epoch -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "cbs,kw,said",
    [
        (lambda: [NoDropout(), GRPO(min_live=0)], dict(dls=starved(160, 1)), "Few groups can teach"),
        (lambda: [GRPO(dropout=True, strict=False)], dict(dropout=0.5), "Ratio is not 1"),
        (lambda: [NoDropout(), TopKByReward(), GRPO()], {}, "A filter makes"),
        (lambda: [NoDropout(), GRPO()], dict(lr=1e-9), "Picks are those of the start"),
        (lambda: [RCE(9.0), KLToRef(toy_learner(regret, seed=1).model, 9.0)], {}, "A penalty steers"),
    ],
)
def test_told_after_one_epoch(cbs, kw, said):
    learn = toy_learner(
        regret,
        kw.pop("dls", None) or synth_dls(96, 32, N=8),
        dropout=kw.pop("dropout", 0.0),
        cbs=[RLStats(every=2), History()],
        wd=0.0,
    )
    with quiet(learn), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(CannotLearn, match=said): learn.fit(9, kw.get("lr"), cbs=[*cbs(), Watch("raise")])
    assert len(learn.history.frame) == 1

def test_watch_warns_once_and_needs_stats():
    learn = toy_learner(regret, starved(96, 1), cbs=[RLStats()])
    with quiet(learn), pytest.warns(UserWarning, match="after one epoch: Few groups") as ws:
        learn.fit(3, cbs=[NoDropout(), GRPO(min_live=0), Watch()])
    assert sum("after one epoch" in str(w.message) for w in ws) == 1
    with quiet(learn), pytest.raises(ValueError, match="RLStats"):
        toy_learner(regret).fit(1, cbs=[RCE(), Watch()])
    with pytest.raises(ValueError, match="'warn' or 'raise'"): Watch("shout")
    with quiet(learn): learn.validate(cbs=Watch("raise"))   # validation says nothing

# --- curves -------------------------------------------------------------------------------------------------
def test_plot_rl_draws_what_was_recorded(good):
    f = good.history.frame
    axs = plot_rl(good)
    assert [a.get_title() for a in axs] == [title for title in PANELS if title != "regret, groups of its own"]
    assert all(a.get_xlabel() == "epoch" for a in axs)
    kl = next(a for a in axs if a.get_title().startswith("KL"))
    got = {l.get_label(): l.get_ydata() for l in kl.lines}
    assert np.array_equal(got["KL"], f.kl, equal_nan=True)
    assert np.array_equal(got["ln K!/(K-S)!"], f.kl_bound)
    own = plt.subplots(1, 2)[1]
    assert list(plot_rl(f[["fit", "valid_loss", "entropy"]], own)) == list(own)
    with pytest.raises(ValueError, match="2 axes for 9 panels"): plot_rl(good.history, own)
    with pytest.raises(ValueError, match="nothing to draw"): plot_rl(f[["fit", "epoch", "kl_bound"]])

def test_a_threshold_that_is_met_is_no_alarm_by_rounding():
    "Means over batches are off in the last place"
    below = np.nextafter(.3, 0)
    assert below < .3
    assert not diagnose(pd.DataFrame(dict(live_before=[below])), {}).alarms
    assert diagnose(pd.DataFrame(dict(live_before=[.29])), {}).alarms == ["live"]
    assert not diagnose(pd.DataFrame(dict(same_as_start=[np.nextafter(.98, 1)])), {}).alarms

def test_the_gap_counts_the_queries_of_the_phase():
    "Twenty queries have a larger standard error than the hundred that the split has"
    facts = dict(queries=100, queries_valid=100)
    f = pd.DataFrame(dict(regret_train=[.1], valid_loss=[.14], regret_sd=[.12]))
    assert diagnose(f, facts).alarms == ["overfit"]
    assert diagnose(f.assign(queries=20), facts).alarms == []
