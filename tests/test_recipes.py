"Recipes: every one runs, none is changed by it, and what cannot be meant is refused before anything trains"
import json, warnings
from copy import deepcopy
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from leverplus import recipes as R
from leverplus.earlier_recipes import EARLIER
from leverplus.callback_core import StageCallback
from leverplus.core import rng
from leverplus.embed import EmbedStore
from leverplus.evidence import BankStore
from leverplus.groups import RLData
from leverplus.synth import quiet
from leverplus.learner import MODEL, selector_learner
from leverplus.pools import Pool
from leverplus.recipes import (
    RECIPES, STAGES, check_recipe, load_recipe, recipe, recipe_learner, recipes_table, save_recipe,
)
from leverplus.rewards import REWARDS
from leverplus.selector import PointerSelector
from leverplus.synth import synth_dls

# the earlier ones first: an unknown name is told in this order
ALL = EARLIER | RECIPES
BEFORE = deepcopy(ALL)

def groups(split, n, first, N=6, live=1.):
    "Groups with every fact; only a share `live` of them has a reward difference"
    g = rng("test_recipes", split)
    qs = range(first, first + n)
    pool = Pool({q: g.choice(40, 7, replace=False).tolist() for q in qs}, dict(sampler="random", K=7))
    rows = [
        (q, p) for q in qs for p in sorted({tuple(g.permutation(pool[q])[:2].tolist()) for _ in range(N)})
    ]
    acc = np.array(
        [((q + p[0]) % 3 > 0) * (0.6 + 0.4 * (p[1] % 2)) if q - first < live * n else 0.0 for q, p in rows]
    )
    f = pd.DataFrame(rows, columns=["question_id", "pointer"]).assign(
        vqa_correct=(acc > 0) * 1.0,
        vqa_acc_score=acc,
        vqa_gt_prob=0.1 + 0.8 * acc,
        vqa_rel_score=acc / 2,
        logprob_score=-3.0,
        vqa_eval_mode=np.where(g.random(len(rows)) < 0.1, "fallback", "official"),
        vqa_pred_answer="a",
        vqa_raw_generation="a",
        vqa_rel_token_f1=0.0,
        vqa_rel_edit_sim=0.0,
    )
    return RLData(f, pool)

TRAIN = groups("train", 14, 1000)
DEV = groups("dev", 7, 5000)
IDS = [*range(40), *range(1000, 1100), *range(5000, 5008)]
ZERO = dict.fromkeys(IDS, 0.05)
STORE = EmbedStore(
    IDS, *(torch.tensor(rng("test_recipes", k).normal(size=(len(IDS), 8))).float() for k in ("image", "text"))
)

def small(name, **more):
    "The recipe, with one epoch per stage that has any, in few batches"
    r = recipe(name, ALL, data=dict(bs=8), model=dict(d_hidden=12), **more)
    for s in r["stages"]: s["n_epoch"] = min(1, s["n_epoch"])
    return r
ITEMS = pd.DataFrame(
    dict(question_id=range(40), image_id=range(40), answer=["red bus", "bus", "blue dog", "dog"] * 10)
)
def make(r, train=TRAIN, **kw):
    return recipe_learner(train, DEV, STORE, r, zero=ZERO, **{"items": ITEMS} | kw)
def fit(learn, r, **kw):
    with quiet(learn), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return learn.fit_recipe(r, **kw)
def weights(learn): return {k: v.detach().clone() for k, v in learn.model.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def bank_of(items):
    "The store with a bank: these items, and all other demonstrations, which have the same answer"
    known = items.assign(question="?", split="train")
    dev = pd.DataFrame(dict(question_id=DEV.queries, image_id=DEV.queries, answer="dog", question="?", split="dev"))
    pools = [*TRAIN.pool.ids.values(), *DEV.pool.ids.values()]
    every = dict.fromkeys([*TRAIN.queries, *DEV.queries, *(d for pool in pools for d in pool)])
    rest = [q for q in every if q not in set(known.question_id) | set(dev.question_id)]
    more = pd.DataFrame(dict(question_id=rest, image_id=rest, answer="word", question="?", split="train"))
    table = pd.concat([known, dev, more]).drop_duplicates("question_id")
    return BankStore(STORE, table, demos=[*known.question_id, *rest])

# --- the data -----------------------------------------------------------------------------------------------
def content(name): return json.dumps([small(name)[k] for k in ("model", "data", "stages")])

# the same by another name runs once
@pytest.mark.parametrize("name", {content(n): n for n in reversed(ALL)}.values())
def test_every_recipe_runs_and_stays_as_it_is(name):
    r = small(name)
    was = deepcopy(r)
    learn = make(r)
    if name == "evidence":
        with pytest.raises(ValueError, match="EvidenceAlone: wanted a selector with evidence"): fit(learn, r)
        learn = recipe_learner(TRAIN, DEV, bank_of(ITEMS), r)
    fit(learn, r)
    kinds = dict(rce="rce", grpo="grpo", sft="sft", listwise="listwise", warmup="warmup")
    kinds |= dict(stage="grpo", regress="regress")
    other = [said.split(" not taken")[0] for said in learn.plan if " not taken" in said]
    ran = [s["fit"] for s in r["stages"] if s["n_epoch"] and s["fit"] not in other]
    assert learn.history.frame.stage.tolist() == [kinds[fit] for fit in ran]
    assert ("regress" in other) == (name == "ours") # one or the other
    assert learn.history.frame.train_loss.notna().all()
    assert learn.recipe == r == was
    assert ALL == BEFORE
    filtered = "fallback" not in set(learn.dls.train_ds.rows.vqa_eval_mode)
    kept = len(learn.history.frame) and learn.model.config["d_hidden"] == 12 and filtered
    assert kept or r["source"] == "ours"

def test_recipes_are_json_and_say_where_they_come_from(tmp_path):
    assert json.loads(json.dumps(ALL)) == ALL
    for name, r in ALL.items():
        check_recipe(r)
        assert r["title"]
        assert r["source"]
        assert r["text_vs_code"] and r["not_done"] or r["source"] == "ours"
        copy = recipe(name, ALL)
        assert load_recipe(save_recipe(copy, tmp_path/"r.json")) == copy
        if name.endswith("-as-run"):
            assert not any(s.get("best", True) or s.get("skip_flat", True) for s in r["stages"])
    t = recipes_table(ALL)
    assert t.index.tolist() == list(ALL)
    assert not t[["title", "source", "stages", "reward"]].eq("").any(axis=None)
    assert {f"plan{i}" for i in range(1, 11)} <= set(ALL)
    assert {f"advice{i}" for i in range(1, 6)} <= set(ALL)
    assert recipes_table().index.tolist() == list(RECIPES)

def test_a_warm_up_needs_items():
    with pytest.raises(ValueError, match="stage 1 .warmup.*pass items= to"):
        fit(make("ours", items=None), "ours")
    with pytest.raises(ValueError, match="leaves only 0"):
        fit(make("ours", items=ITEMS.assign(image_id=1)), "ours")

def test_plan_5_is_what_report_003_says():
    # section 1: '50 epochs GRPO, KL_BETA=0.1, USE_RANK_ADVANTAGE=false, GRPO_LR=5e-6'
    # section 3: z-score, std clamped at .1; section 2.2: RCE lr 1e-4
    rce, grpo = EARLIER["plan5"]["stages"]
    said = dict(n_epoch=50, beta=.1, baseline="zscore", lr=5e-6, min_std=.1)
    assert {k: grpo[k] for k in said} == said
    assert rce["lr"] == 1e-4
    # plan 6: ten times
    other = EARLIER["plan6"]["stages"][1]
    assert {k for k in grpo if other[k] != grpo[k]} == {"lr"}
    assert other["lr"] == 5e-5
    assert [EARLIER[f"plan{n}"]["stages"][1]["beta"] for n in ("7", "7.1", "7.2")] == [0., .01, .05]
    assert EARLIER["plan4"]["data"]["reward"] == "separated"
    assert EARLIER["plan8"]["data"]["weights"] == dict(hard_weight=1., soft_weight=.5, rel_weight=.3)
    longer = dict(fit="rce", n_epoch=10, lr=5e-5, temp=[1., .1], norm="raw")
    assert EARLIER["plan10"]["stages"][0] == longer
    assert EARLIER["plan10-as-run"]["stages"][0]["temp"] == [2., .5]
    assert [s["n_epoch"] for s in EARLIER["plan9"]["stages"][1:]] == [30, 20]

# --- changes ------------------------------------------------------------------------------------------------
@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(sorted(ALL)),
    st.integers(0, 9),
    st.floats(1e-6, 1.0),
    st.sampled_from(sorted(REWARDS)),
)
def test_changes_are_merged_and_noted(name, n, lr, mode):
    was = ALL[name]
    fit = min(s["fit"] for s in was["stages"])
    r = recipe(name, ALL, data=dict(reward=mode), model=dict(dropout=.25), **{fit: dict(n_epoch=n, lr=lr)})
    assert all((s["n_epoch"], s["lr"]) == (n, lr) for s in r["stages"] if s["fit"] == fit)
    assert r["model"] == was["model"] | dict(dropout=.25)
    rest = lambda stages: [{k: v for k, v in s.items() if k not in ("n_epoch", "lr")} for s in stages]
    assert rest(r["stages"]) == rest(was["stages"])
    assert r["data"]["weights"] == (was["data"]["weights"] if mode == was["data"]["reward"] else {})
    assert r["changes"][fit] == dict(n_epoch=n, lr=lr)
    twice = recipe(r, data=dict(bs=3))
    assert twice["changes"] == r["changes"] | dict(data=dict(bs=3)) or "data" in r["changes"]
    assert r["data"]["bs"] == was["data"]["bs"]
    assert ALL == BEFORE

# --- refusals -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "change,said",
    [
        (lambda: recipe("plan55", ALL), "no recipe 'plan55'; did you mean plan5"),
        (lambda: recipe("xyz", ALL), "there are rce-only"),
        (lambda: recipe("plan5", ALL, sft=dict(lr=1.0)), "one of model, data, rce, grpo"),
        (lambda: recipe("plan5", ALL, grpo=3), "change grpo=3"),
        (lambda: recipe("plan5", ALL, grpo=dict(baseline=torch.relu)), "is a builtin"),
        (lambda: recipe("plan5", ALL, model=dict(width=3)), "no setting of the model is called width"),
        (lambda: recipe("plan5", ALL, data=dict(reward="best")), "reward mode 'best'"),
        (lambda: recipe("plan5", ALL, data=dict(weights=dict(w=1.0))), "has no .'w'."),
        (lambda: recipe("plan5", ALL, data=dict(filters=["none"])), "filter 'none'"),
        (lambda: recipe("plan5", ALL, rce=dict(cbs=["Nothing"])), "callback 'Nothing'"),
        (lambda: recipe("plan5", ALL, rce=dict(cbs=[["KLToRef", 0.1]])), "callback .*wanted a name or"),
        (lambda: recipe("plan5", ALL, rce=dict(fit="ppo")), "fit 'ppo', wanted one of rce, grpo"),
        (lambda: check_recipe(dict(stages=[])), "has no stages"),
        (lambda: check_recipe(dict(stages=[dict(fit="rce")])), "has no n_epoch"),
        (lambda: check_recipe(dict(stage=[])), "no part is called stage"),
    ],
)
def test_what_cannot_be_meant(change, said):
    with pytest.raises((ValueError, TypeError), match=said): change()

@pytest.mark.parametrize(
    "stage,more,said",
    [
        ("grpo", dict(epochs=3), "stage 2 .grpo.*epochs"),
        ("grpo", dict(baseline="best"), "stage 2.*baseline 'best'"),
        ("grpo", dict(freeze=["body"]), "freeze body: this PointerSelector has .*encoder, attention, head"),
        ("grpo", dict(queries=["top"]), "queries .'top'."),
        (
            "grpo",
            dict(ref="sft", beta=0.1, cbs=[["KLToRef", dict(ref="sft")]]),
            "stage 2: no policy is called 'sft'",
        ),
        ("grpo", dict(old="sft"), "no policy is called 'sft'"),
        ("grpo", dict(cbs=[["EntropyFloor", dict(floor=7.0)]]), "floor 7"),
        ("grpo", dict(best=dict(promote="luck")), "promote 'luck'"),
        ("rce", dict(norm="log"), "stage 1 .rce.*norm 'log'"),
    ],
)
def test_settings_are_tried_before_anything_trains(stage, more, said):
    learn = make(small("plan5"))
    w = weights(learn)
    with pytest.raises(ValueError, match=said): fit(learn, small("plan5", **{stage: more}))
    assert same(w, weights(learn))
    assert not learn.history.rows
    assert learn.recipe == small("plan5")

def test_a_learner_knows_its_recipe():
    "What `recipe_learner` was told need not be told again; a name, or a change, may be"
    told = small("plan5", rce=dict(lr=3e-3))
    a = fit(make(told), None)
    b = fit(make(told), told)
    assert same(weights(a), weights(b)) and a.recipe == told
    fit(a, None, rce=dict(n_epoch=0), grpo=dict(n_epoch=0))
    assert [s["n_epoch"] for s in a.recipe["stages"]] == [0, 0]
    with pytest.raises(ValueError, match="recipe listwise does not fit.*batch size 8"): fit(b, "listwise")

def test_ours_is_what_one_gets_without_a_word():
    assert recipe() == recipe("ours") and recipe()["model"] == MODEL
    learn = recipe_learner(TRAIN, DEV, STORE, items=ITEMS)
    assert learn.recipe == recipe()
    plain = selector_learner(learn.dls)
    assert plain.model.config == learn.model.config == PointerSelector(16, **MODEL).config
    assert recipe_learner(TRAIN, DEV, STORE, "listwise").model.config == PointerSelector(16).config
    with pytest.raises(ValueError, match="recipe ours, stage 1 .warmup.: a warm-up needs the training items"):
        plain.fit_recipe()

@pytest.mark.filterwarnings("ignore")
def test_a_learner_that_is_something_else_is_refused_or_named():
    r = small("plan5")
    learn = make(r)
    for change, said in (
        (dict(data=dict(reward="separated")), "reward .*hard_plus_soft.*wanted .*separated"),
        (dict(data=dict(weights=dict(soft_weight=0.5))), "'soft_weight': 0.5"),
        (dict(data=dict(kind="text")), "embedding 'mixed', wanted 'text'"),
        (dict(data=dict(bs=4)), "batch size 8, wanted 4"),
        (dict(model=dict(dropout=0.1)), "dropout 0.5, wanted 0.1"),
    ):
        with pytest.raises(ValueError, match=said): fit(learn, recipe(r, **change))
    fit(learn, recipe(r, data=dict(weights=dict(hard_weight=1.))))   # the default, said aloud
    with quiet(learn), pytest.warns(UserWarning, match="dropout 0.5, wanted 0.1"):
        learn.fit_recipe(r, check="warn", model=dict(dropout=0.1))
    with pytest.raises(ValueError, match="rows would not pass skip_fallback"):
        fit(make(recipe(r, data=dict(filters=[]))), r)
    synth = selector_learner(synth_dls(16, 8, 8), d_hidden=16)
    with pytest.raises(ValueError, match="do not say what reward they hold"): fit(synth, r)
    assert len(fit(synth, r, check=None).history.rows) == 2
    with pytest.raises(ValueError, match="without rows"): fit(synth, small("plan9"), check=None)
    with pytest.raises(ValueError, match="check 'no'"): fit(learn, r, check="no")
    with pytest.raises(ValueError, match="needs InfoScore: pass zero"):
        recipe_learner(TRAIN, DEV, STORE, recipe("advice2", ALL))

def test_a_broken_file_names_itself(tmp_path):
    f = tmp_path/"r.json"
    for text, said in (
        ("{", "not valid JSON"),
        ("[]", "r.json: a list"),
        ('{"stages": [{"fit": "ppo", "n_epoch": 1}]}', "r.json: recipe.*'ppo'"),
    ):
        f.write_text(text)
        with pytest.raises(ValueError, match=said): load_recipe(f)

# --- what stages do -----------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore")
def test_no_epochs_of_grpo_say_so_and_stop():
    r = recipe(small("rce-only"), rce=dict(n_epoch=0))
    learn = make(r)
    w = weights(learn)
    with quiet(learn), pytest.warns(
        UserWarning, match="0 epochs asked of the stage .*GRPO.*stays as it is"
    ) as said:
        assert learn.fit_recipe(r) is learn
    assert len(said) == 2
    assert same(w, weights(learn))
    assert not learn.history.rows

def test_frozen_groups_stay_and_queries_are_those_of_the_tiers():
    r = small("plan1", grpo=dict(lr=1e-2, best=False), rce=dict(n_epoch=0))
    learn = make(r)
    w = weights(learn)
    fit(learn, r)
    now = weights(learn)
    n = set(learn.model.groups()["encoder"])
    assert {k for k in w if not torch.equal(w[k], now[k])}
    assert not {k for k in w if not torch.equal(w[k], now[k])} & n
    r = small("plan9")
    learn = fit(make(r), r)
    q = learn.history.frame.queries
    parts = R.tiers(RLData(learn.dls.train_ds.rows, learn.dls.train_ds.pool))
    assert q.iloc[1] == len(parts["high"].queries) + len(parts["medium"].queries) < len(learn.dls.train_ds)
    assert np.isnan(q.iloc[2])

def test_tiers_are_those_of_the_queries_that_are_there():
    "A training split of some queries shares the rows of all; the others have no tier and no phase"
    r = small("plan9")
    learn = make(r)
    parts = R.tiers(RLData(learn.dls.train_ds.rows, learn.dls.train_ds.pool))
    chosen = [*parts["high"].queries, *parts["medium"].queries]
    some = [q for q in learn.dls.train_ds.items if q not in chosen[1:]]
    learn.dls.loaders[0] = learn.dls.train.new(learn.dls.train_ds.select(some))
    fit(learn, r)
    assert learn.history.frame.queries.iloc[1] == 1

def test_as_run_begins_where_plan_5_refuses_and_shows_why():
    few = groups("few", 40, 1000, live=1 / 40)
    r = small("plan5")
    learn = make(r, few)
    with pytest.raises(ValueError, match="1 of 40 groups have any reward difference"): fit(learn, r)
    r = small("plan5-as-run", rce=dict(lr=1e-2))
    f = fit(make(r, few), r).history.frame.iloc[-1]
    assert f.adv_live == pytest.approx(1 / 40)
    assert f.ratio_off > 1e-3
    assert f.dropout > 0
    assert f.beta == pytest.approx(0.1)
    r = small("plan7-as-run")
    f = fit(make(r), r).history.frame.iloc[-1]
    assert f.live_after < f.live_before
    assert f.beta == 0
    assert f.adv_live < 1

class Kill(StageCallback):
    at = None
    def after_backward(self):
        if self.train_iter == Kill.at:
            Kill.at = None
            raise KeyboardInterrupt

def test_resumed_is_uninterrupted(tmp_path, monkeypatch):
    monkeypatch.setitem(R.CALLBACKS, "Kill", Kill)
    r = small("plan9-as-run")
    last = r["stages"][-1]
    last["n_epoch"] = 3
    last["cbs"] = [*last.get("cbs", []), "Kill"]
    whole = fit(make(r), r, resume=tmp_path / "whole")
    Kill.at = 5
    with pytest.raises(KeyboardInterrupt): fit(make(r), r, resume=tmp_path/"run")
    again = fit(make(r), r, resume=tmp_path / "run")
    assert same(weights(whole), weights(again))
    assert Kill.at is None
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        f"{i}-{s['fit']}" for i, s in enumerate(r["stages"], 1)
    ]
    a, b = (x.history.frame.drop(columns="seconds") for x in (whole, again))
    pd.testing.assert_frame_equal(
        a[a.fit == a.fit.max()].reset_index(drop=True),
        b[b.fit == b.fit.max()].reset_index(drop=True),
        check_like=True,
    )

def test_stages_of_a_recipe_choose_their_epoch_by_what_the_learner_is_told():
    "Also where a stage has settings of its own for the choice; here the latest weights always score better"
    for best in (None, dict(min_delta=.5), False):
        asked = []
        r = small("rce-only")
        r["stages"] = [r["stages"][0] | dict(n_epoch=3) | ({} if best is None else dict(best=best))]
        learn = make(r, choose_by=lambda l: asked.append(1) or -float(len(asked)))
        assert learn.choose_by is not None
        with quiet(learn), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            learn.fit_recipe(r)
        assert len(asked) == (0 if best is False else 4)
        assert any("chooses nothing" in str(w.message) for w in said) == (best is False)

def test_a_later_page_can_add_a_stage_and_a_recipe(monkeypatch):
    seen = []
    def warmup(learn, n_epoch, cbs=(), resume=None, size=1):
        seen.append((n_epoch, size, resume))
        return learn
    monkeypatch.setitem(STAGES, "warmup", warmup)
    monkeypatch.setitem(
        RECIPES,
        "new",
        dict(
            data=dict(bs=8, reward="gtprob"),
            stages=[dict(fit="warmup", n_epoch=2, size=5), dict(fit="listwise", n_epoch=1, lr=1e-3)],
        ),
    )
    learn = fit(make("new"), "new", warmup=dict(size=7))
    assert seen == [(0, 7, None), (2, 7, None)]
    assert learn.history.frame.stage.tolist() == ["listwise"]
    assert learn.dls.info["reward"]["mode"] == "gtprob"
    assert same(weights(make("new", start=learn.model)), weights(learn))

# --- stages left out, added, in another order ---------------------------------------------------------------
def fits(r): return [stage["fit"] for stage in r["stages"]]

def test_stages_are_left_out_and_reordered_by_data(tmp_path):
    r = recipe("ours", warmup=None)
    assert fits(r) == ["regress", "listwise"] and r["changes"] == dict(warmup=None)
    assert r["stages"] == RECIPES["ours"]["stages"][1:]
    assert load_recipe(save_recipe(r, tmp_path/"r.json")) == r
    assert recipes_table({"mine": r}).stages["mine"].startswith("regress 20")
    two = dict(RECIPES["corrected"], stages=[dict(fit="rce", n_epoch=1), dict(fit="rce", n_epoch=2)])
    assert [s["n_epoch"] for s in recipe(two, stages=["rce", "rce"])["stages"]] == [1, 2]
    assert [s["n_epoch"] for s in recipe(two, stages=["rce", dict(fit="sft", n_epoch=9), "rce", "rce"])["stages"]] == [
        1, 9, 2, 2
    ]
    changed = recipe("corrected", grpo=dict(lr=.5), stages=["grpo"])
    assert fits(changed) == ["grpo"] and changed["stages"][0]["lr"] == .5
    assert fits(RECIPES["corrected"]) == ["rce", "grpo"] and ALL == BEFORE
    learn = fit(make(small("corrected"), items=None), small("corrected"), rce=None)
    assert learn.history.frame.stage.tolist() == ["grpo"]

@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(warmup=None, regress=None, listwise=None), "recipe ours has no stages"),
        (dict(sft=None), "change sft=None; wanted a dict for one of model, data, warmup, regress, listwise"),
        (dict(model=None), "change model=None"),
        (dict(stages=["warmup", "sft"]), "stage 'sft'; wanted one of warmup, regress, listwise, or a dict"),
        (dict(stages="warmup"), "stages 'warmup', wanted a list"),
        (dict(stages=[dict(fit="rce")]), "stage 1 .rce. has no n_epoch"),
        (dict(stages=["warmup"], listwise=dict(n_epoch=1)), "change listwise="),
        (dict(warmup=dict(needs=dict(luck=1))), "needs .*luck.*wanted a dict with live"),
        (dict(warmup=dict(needs=dict(live=7))), "needs live 7, wanted 0..1"),
        (dict(stages=[dict(fit="ensemble", n_epoch=1, stages=[dict(fit="ppo")])]), "its stage 1: fit 'ppo'"),
    ],
)
def test_stages_that_cannot_be_meant(changes, said):
    with pytest.raises(ValueError, match=said): recipe("ours", **changes)

# --- what can teach -----------------------------------------------------------------------------------------
def ours(**more):
    "The two stages of `ours` for a selector that reads no evidence"
    stages = {} if "stages" in more else {"regress": None}
    return small("ours", **{"warmup": dict(steps=2, bs=8), **stages, **more})

UNLIKE = ITEMS.assign(answer=[f"word{i}" for i in range(40)])
FLAT = groups("train", 14, 1000, live=0.)

@pytest.mark.parametrize(
    "items, train, run, said",
    [
        (ITEMS, TRAIN, ["warmup", "listwise"], ["warmup runs", "listwise runs"]),
        (UNLIKE, TRAIN, ["listwise"], ["warmup left out: 0 % of 40 fresh groups", "listwise runs"]),
        (ITEMS, FLAT, ["warmup"], ["warmup runs", "listwise left out: 0 % of 14 stored groups"]),
        (UNLIKE, FLAT, [], ["warmup left out", "listwise left out"]),
    ],
)
def test_stages_that_cannot_teach_are_left_out(tmp_path, items, train, run, said):
    r = ours()
    learn = make(r, train, items=items)
    w = weights(learn)
    with quiet(learn), warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter("always")
        if run: learn.fit_recipe(r, resume=tmp_path)
        else:
            with pytest.raises(ValueError, match="no stage can teach.*warmup left out.*listwise left out.*needs=None"):
                learn.fit_recipe(r, resume=tmp_path)
    assert len(learn.plan) == 2
    for has, want in zip(learn.plan, said): assert want in has
    assert learn.recipe == r   # as it was asked for
    assert learn.dls.info["plan"] == json.loads((tmp_path/"plan.json").read_text()) == learn.plan
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == [f"{i}-{f}" for i, f in enumerate(run, 1)]
    told = [str(x.message) for x in ws if "left out" in str(x.message)]
    assert len(told) == (len(run) < 2)
    assert learn.history.frame.get("stage", pd.Series(dtype=str)).tolist() == run
    if not run: assert same(w, weights(learn))

def test_a_start_is_shown_what_it_reads():
    "A plain selector goes on in a store with a bank, and one that reads evidence needs such a store"
    bank = bank_of(ITEMS)
    plain = recipe_learner(TRAIN, DEV, STORE, small("listwise")).model
    learn = fit(recipe_learner(TRAIN, DEV, bank, small("listwise"), start=plain), small("listwise"))
    assert learn.model is plain and learn.dls.info["kind"] == "mixed"
    reader = recipe_learner(TRAIN, DEV, bank, small("listwise")).model
    assert recipe_learner(TRAIN, DEV, bank, small("listwise"), start=reader).dls.info["kind"] == "mixed+answers"
    with pytest.raises(ValueError, match=r"pass store = BankStore\(store, items\)"):
        recipe_learner(TRAIN, DEV, STORE, small("listwise"), start=reader)

@pytest.mark.parametrize("items, run", [(ITEMS, ["warmup", "listwise"]), (UNLIKE, ["regress"])])
def test_a_selector_that_reads_evidence_learns_from_it_where_no_warm_up_can_teach(items, run):
    "Where answers repeat nothing changes, and evidence is not touched"
    bank = bank_of(items)
    r = small("ours", warmup=dict(steps=2, bs=8))
    learn = recipe_learner(TRAIN, DEV, bank, r, items=items)
    before = weights(learn)
    fit(learn, r)
    after = weights(learn)
    moved = {name.split(".")[0] for name in after if not torch.equal(before[name], after[name])}
    assert [said.split()[0] for said in learn.plan if " runs:" in said] == run
    assert ("evidence" in moved) == (run == ["regress"])
    assert ("match" in moved) == ("warmup" in run)
    assert moved == {"evidence", "gains"} or "warmup" in run
    assert (learn.model.gains == 0).all() == (run == ["regress"])   # nobody else is heard
    assert learn.model.n_evidence == 14 and learn.dls.info["kind"].endswith("+answers")

def test_what_a_stage_needs_is_measured_on_what_it_trains_on():
    r = ours(listwise=dict(needs=dict(groups=99)))
    plan, said = R.plan_recipe(r, make(r))
    assert fits(plan) == ["warmup"] and "wanted 99 groups with one" in said[1]
    # pools that were asked for stay, and are judged
    asked = ours(warmup=dict(sampler="text", needs=dict(live=1.)))
    plan, said = R.plan_recipe(asked, make(asked))
    assert "text pools, as asked" in said[0]
    plain = small("corrected")
    assert R.plan_recipe(plain, make(plain)) == (plain, [])
    # of the tiers that a stage trains on
    some = small("corrected", rce=dict(queries="positive", needs=dict(groups=1)))
    learn = make(some)
    _, said = R.plan_recipe(some, learn)
    assert f"of {len(R._chosen(learn, 'positive'))} stored groups" in said[0]

def test_a_policy_of_a_stage_that_is_left_out_is_missed():
    r = ours(stages=["warmup", "listwise"])
    r["stages"][0]["anchor"] = "start of all"
    r["stages"][1]["ref"] = "start of all"
    with pytest.raises(ValueError, match="without the stages that cannot teach, stage 1: no policy is called"):
        fit(make(r, items=UNLIKE), r)

# --- equal stages train once --------------------------------------------------------------------------------
def test_one_warm_up_serves_several_rows(tmp_path):
    trained = []
    class Count(StageCallback):
        def after_backward(self): trained.append(type(self).__name__)
    def run(seed=0, **more):
        r = ours(**more)
        learn = make(r, seed=seed)
        learn.add_cb(Count())
        n = len(trained)
        fit(learn, r, kept=tmp_path)
        return len(trained) - n, weights(learn)
    both, first = run()
    assert both > 0
    none, found = run()
    assert none == 0 and same(found, first)
    again, other = run(listwise=dict(lr=.1))
    assert 0 < again < both and not same(first, other)
    alone, _ = run(warmup=dict(steps=2, bs=8, temp=.3))
    assert alone == both
    seeds, _ = run(seed=1)
    assert seeds == both
    with pytest.raises(ValueError, match="resume beside kept"):
        fit(make(ours()), ours(), kept=tmp_path, resume=tmp_path)
    r = ours()
    plain = fit(make(r), r)
    assert same(weights(plain), first)

# --- members and their mean ---------------------------------------------------------------------------------
def ensemble(**kw):
    stages = [dict(fit="warmup", n_epoch=1, lr=1e-2, steps=2, bs=8, best=False), dict(fit="rce", n_epoch=1, lr=1e-2)]
    return recipe(small("ours"), stages=[dict(fit="ensemble", n_epoch=2, lr=1e-2, stages=stages, **kw)])

@pytest.mark.parametrize("folds", [False, True])
def test_an_ensemble_goes_on_and_ends_alike(tmp_path, folds):
    r = ensemble(folds=folds, members=2)
    items = pd.concat([ITEMS, pd.DataFrame(dict(question_id=TRAIN.queries, image_id=range(900, 914), answer="bus"))])
    a = fit(make(r, items=items), r, resume=tmp_path/"a")
    assert a.history.frame.stage.tolist() == ["ensemble"] * 2
    names = sorted(str(p.parent.relative_to(tmp_path/"a")) for p in (tmp_path/"a").rglob("state.pt"))
    inside = ["mean", *(f"member-{i}/{s}" for i in (1, 2) for s in ("1-warmup", "2-rce"))]
    assert names == [f"1-ensemble/{name}" for name in inside]
    states = [torch.load(tmp_path/"a"/"1-ensemble"/f"member-{i}"/"2-rce"/"state.pt")["model"] for i in (1, 2)]
    assert not same(*states)
    assert same(weights(fit(make(r, items=items), r, resume=tmp_path/"a")), weights(a))
    assert same(weights(fit(make(r, items=items), r)), weights(a))
    for bad, said in (
        (dict(members=0), "members 0: wanted a whole number >= 1"),
        (dict(folds=True, members=1), "one member with folds"),
    ):
        with pytest.raises(ValueError, match=said): fit(make(ensemble(**bad)), ensemble(**bad))

def test_folds_keep_pictures_together_and_members_do_not_see_theirs():
    r = ensemble(folds=True, members=3)
    items = pd.DataFrame(dict(question_id=TRAIN.queries, image_id=np.arange(14) // 2, answer="bus"))
    learn = make(r, items=items)
    parts = R._folds(learn, 3)
    assert sorted(q for part in parts for q in part) == sorted(learn.dls.train_ds.items)
    image = dict(zip(items.question_id, items.image_id))
    images = [{image[q] for q in part} for part in parts]
    assert not images[0] & images[1] and not images[0] & images[2] and not images[1] & images[2]
    member = R._member(learn, 1, parts[0])
    assert set(member.dls.valid_ds.items) == parts[0]
    assert not set(member.dls.train_ds.items) & parts[0]
    assert not set(member.warmup_from[0].image_id) & images[0]
    assert len(learn.dls.train_ds.items) == len(member.dls.train_ds.items) + len(parts[0])
    with pytest.raises(ValueError, match="9 folds, but the training questions have 7 pictures"): R._folds(learn, 9)
