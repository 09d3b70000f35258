"Fastai's verbs, row by row: what the table says is what happens, on stored groups and on synthetic ones"
import importlib, inspect, json, random, re, sys, types, warnings
from pathlib import Path
import matplotlib.pyplot as plt
import pandas as pd, pytest, torch
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback, FetchPredsCallback
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.preds import MCDropoutCallback
from fastai.callback.progress import CSVLogger, ShowGraphCallback
from fastai.callback.rnn import ModelResetter, RNNCallback, RNNRegularizer
from fastai.callback.schedule import LRFinder
from fastai.callback.tracker import (
    EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback, TerminateOnNaNCallback, TrackerCallback,
)
from fastai.callback.training import BnFreeze, GradientAccumulation, GradientClip, ShortEpochCallback
from fastai.interpret import ClassificationInterpretation, Interpretation
from fastai.learner import Learner, Recorder, load_learner
from leverplus.callback_core import SkipFlat, StageCallback
from leverplus.callback_grpo import GRPO, RLOO
from leverplus.callback_kl import AdaptiveKL, EntropyFloor, KLToRef
from leverplus.callback_listwise import SFT, Listwise
from leverplus.callback_rce import RCE
from leverplus.callback_schedule import Freeze, NoDropout, Phases, SplitShots, TempSchedule, TopKCurriculum
from leverplus.callback_track import Best, History, Resume, RLStats, regrets, valid_loss
from leverplus.core import rng
from leverplus.data import read_okvqa
from leverplus.diagnose import Watch
from leverplus.dls import group_dls
from leverplus.embed import EmbedStore
from leverplus.groups import RLData
from leverplus.learner import INSTEAD, selector_learner
from leverplus.losses import regret
from leverplus.pools import Pool
from leverplus.synth import quiet, synth_dls
from leverplus.verbs import VERBS, verbs

CALLBACKS = {
    cls.__name__: cls
    for cls in (
        BnFreeze, ChannelsLast, CutMix, EarlyStoppingCallback, FetchPredsCallback, GradientAccumulation,
        GradientClip, MixUp, ModelResetter, ReduceLROnPlateau, RNNCallback, RNNRegularizer,
        SaveModelCallback, ShortEpochCallback, ShowGraphCallback, TerminateOnNaNCallback,
    )
}
ROOT = Path(__file__).resolve().parent.parent
DEMOS = range(100)
TRAIN = range(1000, 1040)
VALID = range(2000, 2024)

# --- two kinds of groups -----------------------------------------------------------------------------------
def store():
    g = rng("test_verbs store")
    ids = [*DEMOS, *TRAIN, *VALID]
    def vectors(): return torch.tensor(g.normal(size=(len(ids), 4))).float()
    return EmbedStore(ids, vectors(), vectors())

def record(name, queries):
    "Ragged pools, groups and shots"
    g = rng("test_verbs", name)
    ids = {q: g.choice(DEMOS, g.integers(6, 9), replace=False) for q in queries}
    pool = Pool(ids, dict(sampler="random", K=8))
    tried = [
        (q, tuple(g.choice(pool[q], g.integers(1, 3), replace=False).tolist()))
        for q in queries
        for _ in range(g.integers(3, 7))
    ]
    rows = pd.DataFrame(tried, columns=["question_id", "pointer"]).drop_duplicates(ignore_index=True)
    rows["vqa_acc_score"] = g.choice([0., .3, .6, 1.], len(rows))
    rows["vqa_correct"] = (rows.vqa_acc_score > 0).astype(float)
    rows["eval_failed"] = False
    return RLData(rows, pool)

def real(items=None, bs=8):
    data = record("train", TRAIN), record("valid", VALID)
    return group_dls(*data, store(), "soft_only", bs=bs, device="cpu", items=items)

def synthetic(): return synth_dls(40, 24, 8, K=(5, 8), N=(3, 6), shots=(1, 2))

KINDS = dict(real=real, synthetic=synthetic)

@pytest.fixture(params=KINDS)
def learn(request, tmp_path): return learner(KINDS[request.param](), tmp_path)

def learner(dls, path, **kw): return selector_learner(dls, d_hidden=8, path=path, **kw)

def weights(learn): return {k: v.detach().clone() for k, v in learn.model.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def trains(learn, fit, *args, **kw):
    "Does this change the weights, and leave rows of history and no callback?"
    before = weights(learn)
    cbs = {id(cb) for cb in learn.cbs}
    fit(*args, **kw)
    assert not same(before, weights(learn))
    assert {id(cb) for cb in learn.cbs} == cbs
    return learn.history.frame

def refuses(says, f, *args, **kw):
    with pytest.raises((AttributeError, TypeError, ValueError)) as e: f(*args, **kw)
    assert says in str(e.value)

# --- each row of the table ---------------------------------------------------------------------------------
TRIED = {}   # verb -> what is tried with a Learner

def tries(*verbs):
    "Register a function for verbs; with several it gets the name of the one"
    def register(f):
        for verb in verbs: TRIED[verb] = f
        return f
    return register

@tries("fit", "fit_one_cycle", "fit_flat_cos", "fit_sgdr", "fine_tune")
def try_a_fit(learn, verb):
    args = (1, 2) if verb == "fit_sgdr" else (2,)
    rows = 3 if verb == "fine_tune" else 2
    assert len(trains(learn, getattr(learn, verb), *args)) == rows   # without an objective: regret itself
    f = trains(learn, getattr(learn, verb), *args, cbs=RCE(.5))
    assert f.stage.tolist() == ["fit"]*rows + ["rce"]*rows
    assert f.valid_loss.iloc[-1] == pytest.approx(valid_loss(learn), abs=1e-6)

@tries("lr_find")
def try_lr_find(learn, verb):
    before = weights(learn)
    for cbs in ((), RCE(), [RCE(), Best(), Resume(learn.path/"stage"), SkipFlat(), KLToRef()]):
        found = learn.lr_find(num_it=30, cbs=cbs, show_plot=False)
        assert 1e-7 <= found.valley <= 10
    assert same(before, weights(learn)) and len(learn.history.frame) == 0
    assert not (learn.path/"stage").exists()

@tries("show_batch")
def try_show_batch(learn, verb):
    for dl in learn.dls.loaders:
        table = dl.show_batch(max_n=3)
        assert len(table) == 3 and list(table) == ["query", "candidates", "rewards", "picks"]
        for row in table.itertuples():
            i = dl.dataset.items.index(row.query)
            _, cands, seqs, rewards = dl.dataset[i]
            assert row.candidates == len(cands)
            assert row.rewards[0] == pytest.approx(rewards.max().item(), abs=1e-3)
            assert row.picks == dl.dataset.name(i, seqs[int(rewards.argmax())])
    assert learn.dls.show_batch().shape == (4, 4)

@tries("show_results")
def try_show_results(learn, verb):
    table = learn.show_results(max_n=5)
    assert (table.best - table.expected).tolist() == pytest.approx(regrets(learn)[:5].tolist(), abs=1e-6)

@tries("predict")
def try_predict(learn, verb):
    ds = learn.dls.valid_ds
    for i in (0, 7):
        picks, places, p = learn.predict(ds.items[i])
        query, cands, seqs, _ = ds[i]
        assert len(picks) == max(map(len, seqs)) and picks == ds.name(i, places) and 0 < p <= 1
        again = learn.predict((query, cands), shots=len(picks))
        assert again[0] == places.tolist() and again[2] == p
    # a greedy pick of one is the likeliest of all
    logp = [learn.predict((query, cands), shots=1)[2]]
    with torch.no_grad():
        enc = learn.model.eval().encode(query[None], cands[None], torch.ones(1, len(cands), dtype=torch.bool))
        steps = learn.model.step_logp(enc, torch.zeros(1, 1, 0, dtype=torch.long))
    assert logp[0] == pytest.approx(steps.exp().max().item(), rel=1e-5)
    refuses("pass shots=", learn.predict, (query, cands))
    refuses("wanted 0 < S < K", learn.predict, (query, cands), len(cands))
    with pytest.raises(KeyError, match="in neither split"): learn.predict(31415)

@tries("get_preds")
def try_get_preds(learn, verb):
    for split in (0, 1):
        logp, (rewards, mask) = learn.get_preds(split)
        ds = learn.dls[split].dataset
        assert logp.shape == rewards.shape == mask.shape and len(logp) == len(ds)
        assert mask.sum(-1).tolist() == [len(ds[i][2]) for i in range(len(ds))]
        for i in range(len(ds)): assert torch.equal(rewards[i][mask[i]], ds[i][-1])
    assert regret(logp, rewards, mask).item() == pytest.approx(valid_loss(learn), abs=1e-6)
    inputs, _, _ = learn.get_preds(with_input=True)
    assert len(inputs) == 5 and len(inputs[3]) == len(ds)
    *_, losses = learn.get_preds(with_loss=True)
    assert losses.tolist() == pytest.approx(regrets(learn).tolist(), abs=1e-6)

@tries("validate")
def try_validate(learn, verb): assert learn.validate()[0] == pytest.approx(valid_loss(learn), abs=1e-6)

@tries("one_batch")
def try_one_batch(learn, verb):
    query, cands, cand_mask, seqs, seq_mask, rewards, mask = learn.dls.train.one_batch()
    assert rewards.shape == mask.shape == seqs.shape[:2]

@tries("test_dl")
def try_test_dl(learn, verb):
    ids = learn.dls.valid_ds.items[3:0:-1]
    dl = learn.dls.test_dl(ids)
    logp, (_, mask) = learn.get_preds(dl=dl)
    whole, _ = learn.get_preds()
    assert dl.dataset.items == ids
    for i, row in enumerate((3, 2, 1)):
        n = int(mask[i].sum())
        assert torch.allclose(logp[i, :n], whole[row, :n], atol=1e-5)

@tries("loss_func")
def try_loss_func(learn, verb): assert learn.loss_func is regret

@tries("summary")
def try_summary(learn, verb):
    said = learn.summary()
    n = sum(p.numel() for p in learn.model.parameters())
    assert "PointerSelector" in said and "regret" in said and f"{n:,} parameters" in said

@tries("show_training_loop")
def try_show_training_loop(learn, verb): learn.show_training_loop()

@tries("plot_loss", "plot_sched")
def try_plots(learn, verb):
    learn.fit_one_cycle(1)
    getattr(learn.recorder, verb)()
    assert plt.gcf().axes

@tries("save", "load")
def try_save(learn, verb):
    learn.fit(1)
    before = weights(learn)
    learn.save("here")
    learn.fit(1)
    learn.load("here")
    assert same(before, weights(learn))

@tries("export", "load_learner")
def try_export(learn, verb):
    learn.fit(1, cbs=RCE())
    assert learn.stats.probe is not None   # watching has kept a batch
    own = learn.dls
    opt = learn.opt
    file = learn.export()
    assert learn.dls is own and learn.opt is opt and learn.stats.probe is not None
    loaded = load_learner(file)
    assert same(weights(learn), weights(loaded)) and loaded.loss_func is regret
    assert [len(dl.dataset) for dl in loaded.dls.loaders] == [0, 0] and loaded.stats.probe is None
    assert loaded.history.frame.equals(learn.history.frame)
    query, cands, *_ = own.valid_ds[0]
    assert loaded.predict((query, cands), shots=2)[2] == learn.predict((query, cands), shots=2)[2]
    with pytest.raises(KeyError, match="from vectors"): loaded.predict(own.valid_ds.items[0])

@tries("to_fp16", "to_bf16", "to_fp32")
def try_half(learn, verb):
    if verb == "to_fp32": learn.to_bf16()
    assert getattr(learn, verb)() is learn
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")   # torch's word on a machine without a GPU
        trains(learn, learn.fit, 1, cbs=[NoDropout(), GRPO()])
    assert hasattr(learn, "mixed_precision") == (verb != "to_fp32")

@tries("SaveModelCallback", "EarlyStoppingCallback", "ReduceLROnPlateau")
def try_trackers(learn, verb):
    cls = CALLBACKS[verb]
    trains(learn, learn.fit, 2, cbs=[RCE(), cls()])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="You are shadowing")
        for kw in (dict(), dict(monitor="mass"), dict(monitor="live")):
            learn.fit(2, cbs=[RCE(), SkipFlat(), Best(), cls(**kw)])
    says = "no column 'regret' to monitor; there are train_loss, valid_loss, live"
    refuses(says, learn.fit, 1, cbs=cls("regret"))

@tries("GradientAccumulation", "GradientClip", "ShortEpochCallback", "TerminateOnNaNCallback", "BnFreeze")
def try_training_callbacks(learn, verb):
    args = dict(GradientAccumulation=(16,), ShortEpochCallback=(.5,)).get(verb, ())
    trains(learn, learn.fit, 1, cbs=[RCE(), CALLBACKS[verb](*args)])

@tries("CSVLogger")
def try_csv_logger(learn, verb):
    log = CSVLogger()
    learn.fit(2, cbs=log)
    f = pd.read_csv(learn.path/"history.csv")
    assert f.valid_loss.tolist() == pytest.approx(learn.history.frame.valid_loss.tolist())
    learn.add_cb(CSVLogger("stays.csv"))
    learn.fit(2)
    for looks in (learn.validate, learn.get_preds, learn.show_results): looks()
    assert len(pd.read_csv(learn.path/"stays.csv")) == 2

@tries("ProgressCallback", "ShowGraphCallback", "FetchPredsCallback")
def try_progress(learn, verb):
    if verb == "ProgressCallback": assert [type(cb).__name__ for cb in learn.cbs].count(verb) == 1
    else: trains(learn, learn.fit, 2, cbs=CALLBACKS[verb]())

@tries("MCDropoutCallback")
def try_mc_dropout(learn, verb):
    learn.fit(1, 1e-2)   # before it the selector is similarity, which drops nothing
    runs = [learn.get_preds(cbs=MCDropoutCallback())[0] for _ in range(2)]
    assert not torch.equal(*runs)
    assert not learn.model.training

@tries("Interpretation")
def try_interpretation(learn, verb):
    interp = Interpretation.from_learner(learn)
    losses, idx, items = interp.top_losses(3, items=True)
    most, which = regrets(learn).topk(3)
    assert losses.tolist() == pytest.approx(most.tolist(), abs=1e-6)
    assert list(items) == [learn.dls.valid_ds.items[i] for i in which]
    assert len(interp[[0, 2]][1]) == 2
    interp.show_results([0, 2])

@tries("unfreeze")
def try_unfreeze(learn, verb):
    learn.unfreeze()
    trains(learn, learn.fit, 1)

@tries("freeze")
def try_freeze(learn, verb):
    refuses("Freeze(*parts)", learn.freeze)
    two = selector_learner(learn.dls, d_hidden=8)
    parts = list(two.model.parameters())
    two.splitter = lambda model: [list(model.parameters())[:3], list(model.parameters())[3:]]
    two.freeze()
    assert [p.requires_grad for p in parts[:3]] == [False]*3 and two.opt.frozen_idx == 1
    trains(two, two.fine_tune, 1)
    assert two.opt.frozen_idx == 0

@tries("tta")
def try_tta(learn, verb): refuses("MCDropoutCallback()", learn.tta)

@tries("ClassificationInterpretation")
def try_classes(learn, verb): refuses("show_results", ClassificationInterpretation.from_learner, learn)

@tries("plot_top_losses")
def try_plot_top_losses(learn, verb):
    interp = Interpretation.from_learner(learn)
    refuses("show_batch", interp.plot_top_losses, 2)

@tries("MixUp", "CutMix", "ChannelsLast", "ModelResetter", "RNNCallback", "RNNRegularizer")
def try_callbacks_of_others(learn, verb):
    cls = CALLBACKS[verb]
    instead = dict(MixUp="fit_warmup", CutMix="fit_warmup", RNNRegularizer="`wd=` and `dropout=`")
    before = weights(learn)
    for cb in (cls, cls()): refuses(instead.get(verb, "leave it out"), learn.fit, 1, cbs=cb)
    refuses(verb, selector_learner, learn.dls, d_hidden=8, cbs=cls())
    assert same(before, weights(learn)) and not any(isinstance(cb, cls) for cb in learn.cbs)

@tries("to_non_native_fp16")
def try_old_half(learn, verb): refuses("to_bf16", learn.to_non_native_fp16)

# --- loggers: with small stand-ins, and with the real ones where they are ----------------------------------
class Writer:
    "What fastai asks of a `SummaryWriter`"
    def __init__(self, log_dir=None): self.seen = {}
    def note(self, kind, tag, what): self.seen.setdefault(f"{kind} {tag}", []).append(what)
    def add_scalar(self, tag, value, step): self.note("scalar", tag, float(value))
    def add_text(self, tag, text, step=None): self.note("text", tag, text)
    def add_figure(self, tag, figure, step=None): self.note("figure", tag, figure)
    def add_graph(self, model, input_to_model=None, verbose=False): raise NotImplementedError
    def close(self): self.note("closed", "", True)

class Run(types.SimpleNamespace): pass

def fake_wandb():
    "What fastai asks of `wandb`"
    fake = types.ModuleType("wandb")
    fake.logged, fake.settings = [], {}
    fake.run = Run(step=0, summary={}, id="1")
    fake.config = Run(update=lambda values, **kw: fake.settings.update(json.loads(json.dumps(values))))
    fake.log = lambda values, step=None, commit=None: fake.logged.append(values)
    fake.Table = lambda dataframe=None, **kw: dataframe
    fake.Image = lambda figure, **kw: figure
    fake.watch = lambda *args, **kw: None
    return fake

def page_of(logger):
    "fastai's page of a logger, imported anew; it is forgotten with the stand-in that it has imported"
    name = f"fastai.callback.{logger}"
    had = sys.modules.pop(name, None)
    yield importlib.import_module(name)
    del sys.modules[name]
    delattr(sys.modules["fastai.callback"], logger)
    if had is not None: sys.modules[name] = had

@pytest.fixture
def tensorboard(monkeypatch):
    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "tensorboard", types.ModuleType("tensorboard"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    yield from page_of("tensorboard")

@pytest.fixture
def wandb(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb())
    yield from page_of("wandb")

def islands():
    "Items with pictures, under the ids of the groups here"
    folder = ROOT/"data"/"islands"
    items = read_okvqa(folder, "dev", images=folder/"images")
    ids = [*DEMOS, *TRAIN, *VALID]
    return items.iloc[:len(ids)].assign(question_id=ids).set_axis(ids)

LOGGED = "TensorBoardCallback", "WandbCallback", "TensorBoardProjectorCallback"

def test_tensorboard_with_its_defaults(learn, tensorboard):
    log = tensorboard.TensorBoardCallback()
    trains(learn, learn.fit, 2, cbs=[RCE(), log])
    seen = log.writer.seen
    assert len(seen["scalar train_loss"]) >= 2 * len(learn.dls.train)   # fastai notes it in validation too
    assert seen["scalar valid_loss"] == pytest.approx(learn.history.frame.valid_loss.tolist())
    assert "PointerSelector" in seen["text model"][0]
    assert len(seen["text picks"]) == 2 and "likeliest" in seen["text picks"][1]
    assert "figure prompts" not in seen and "closed " in seen
    rows = learn.history.frame
    assert seen["scalar eval_loss"] == pytest.approx(rows.valid_loss.tolist())
    assert seen["scalar reward"] == pytest.approx(rows.reward.tolist())
    assert seen["scalar frac_reward_zero_std"] == pytest.approx((1 - rows.live_before).tolist())
    assert seen["scalar own/mass"] == pytest.approx(rows.mass.tolist())
    assert not any("kl" == name.split()[-1] or "clip_ratio" in name for name in seen)   # RCE has none
    learn.add_cb(tensorboard.TensorBoardCallback())
    learn.validate()   # opens no writer
    refuses("leave it out", learn.fit, 1, cbs=tensorboard.TensorBoardProjectorCallback())
    refuses("leave it out", learn.fit, 1, cbs=tensorboard.TensorBoardCallback(projector=True))

def test_wandb_with_its_defaults(learn, wandb, capsys):
    trains(learn, learn.fit, 2, cbs=[RCE(.5), wandb.WandbCallback()])
    fake = wandb.wandb
    assert "not able" not in capsys.readouterr().out
    assert fake.settings["callbacks"]["rce"]["temp"] == .5 and fake.settings["n_epoch"] == 2
    keys = {key for values in fake.logged for key in values}
    assert {"train_loss", "valid_loss", "mass", "lr_0", "picks"} <= keys and "prompts" not in keys
    table = next(values["picks"] for values in fake.logged if "picks" in values)
    assert len(table) == len(learn.dls.valid_ds) and set(table["query"]) == set(learn.dls.valid_ds.items)
    assert {"reward", "reward_std", "frac_reward_zero_std", "entropy", "eval_loss", "own/mass", "stage"} <= keys
    assert "kl" not in {key for values in fake.logged if "stage" in values for key in values}   # RCE has none

def test_loggers_are_given_pictures(tensorboard, wandb, tmp_path):
    learn = learner(real(islands()), tmp_path)
    log = tensorboard.TensorBoardCallback(n_preds=2)
    learn.fit(1, cbs=[log, wandb.WandbCallback()])
    assert len(log.writer.seen["figure prompts"]) == 1
    figures = [values["prompts"] for values in wandb.wandb.logged if "prompts" in values]
    assert len(figures) == 1
    assert len(figures[0].axes) == 9 * 3   # at most nine queries; two picks and the question

def test_a_logger_does_not_change_what_a_stage_is(tensorboard, tmp_path):
    def stage(cbs):
        learn = learner(synthetic(), tmp_path)
        with quiet(learn): learn.fit(1, cbs=[RCE(), Resume(tmp_path/"stage"), *cbs])
        return weights(learn)
    first = stage([])
    logged = stage([tensorboard.TensorBoardCallback(), CSVLogger()])   # not refused: the same stage
    assert same(first, logged)

def test_the_real_tensorboard(learn, tmp_path):
    pytest.importorskip("tensorboard")
    from fastai.callback.tensorboard import TensorBoardCallback
    learn.fit(1, cbs=[RCE(), TensorBoardCallback(tmp_path/"tb")])
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    seen = EventAccumulator(str(tmp_path/"tb")).Reload()
    assert {"reward", "reward_std", "frac_reward_zero_std", "entropy"} <= set(seen.Tags()["scalars"])
    last = seen.Scalars("reward")[-1]
    assert last.value == pytest.approx(learn.history.frame.reward.iloc[-1]) and last.step == len(learn.dls.train)

def test_the_real_wandb(learn, tmp_path, monkeypatch, capsys):
    wandb = pytest.importorskip("wandb")
    from fastai.callback.wandb import WandbCallback
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = wandb.init(project="leverplus", dir=tmp_path)
    learn.fit(1, cbs=[RCE(.5), WandbCallback()])
    assert "not able" not in capsys.readouterr().out
    assert dict(run.config)["callbacks"]["rce"]["temp"] == .5
    assert run.summary["picks"]["nrows"] == len(learn.dls.valid_ds)
    assert run.summary["reward"] == pytest.approx(learn.history.frame.reward.iloc[-1])
    assert run.summary["stage"] == "rce"
    wandb.finish()

# --- the table and what is tried ---------------------------------------------------------------------------
NAMES = {verb: here for names, here in VERBS.items() for verb in names.split()}

@pytest.mark.parametrize("verb", [verb for verb in NAMES if verb not in LOGGED])
def test_the_table_is_true(learn, verb):
    with quiet(learn) if verb not in ("ProgressCallback", "ShowGraphCallback") else learn.no_logging():
        TRIED[verb](learn, verb)

def test_every_row_is_tried():
    assert set(NAMES) == set(TRIED) | set(LOGGED)
    assert len(NAMES) == sum(len(names.split()) for names in VERBS)   # no verb twice
    assert all(here.startswith(("work", "use ")) for here in VERBS.values())
    assert verbs().here.to_dict() == NAMES and list(verbs("GET_p").index) == ["get_preds"]

def test_the_index_has_the_same_table():
    nb = json.loads((ROOT/"nbs"/"index.ipynb").read_text(encoding="utf8"))
    text = "\n".join("".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "markdown")
    rows = {
        " ".join(re.findall(r"`(\w+)`", names)): here.strip()
        for names, here in re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| ((?:works?|use )[^|]*)\|$", text, re.M)
    }
    assert rows == VERBS

def test_a_refused_callback_is_one_of_fastai(learn):
    class MixHandler(StageCallback): name = "mine_alone"
    with quiet(learn): learn.fit(1, cbs=MixHandler())   # the same name in another place is another callback
    assert all(INSTEAD.values())

# --- looking for a learning rate ---------------------------------------------------------------------------
OBJECTIVES = dict(
    rce=lambda: [RCE()],
    listwise=lambda: [Listwise()],
    grpo=lambda: [GRPO(), KLToRef()],
)

@pytest.mark.parametrize("name", OBJECTIVES)
def test_lr_find_of_any_stage(learn, name, tmp_path):
    "Objective in `cbs` of the Learner, of `lr_find`, and beside fastai's callback: the same rates, no trace"
    rates = []
    with quiet(learn):
        before = weights(learn)
        learn.lr_find(1e-4, 1, 24, cbs=[*OBJECTIVES[name](), Best()], show_plot=False)
        rates.append(list(map(float, learn.recorder.losses)))
        with learn.added_cbs(OBJECTIVES[name]()): learn.lr_find(1e-4, 1, 24, show_plot=False)
        rates.append(list(map(float, learn.recorder.losses)))
        assert rates[0] == rates[1] and len(rates[0]) > 10
        learn.fit(9, cbs=[*OBJECTIVES[name](), Best(), Resume(tmp_path/"stage"), LRFinder(1e-4, 1, 24)])
        assert same(before, weights(learn)) and len(learn.history.frame) == 0
        assert not (tmp_path/"stage").exists() and learn.stats.means() == {}

STAGES = dict(   # callbacks that stay on the Learner
    regret=lambda items: [Best()],
    rce=lambda items: [RCE(temp=(2., .5)), Best(promote="paired", patience=1)],
    listwise=lambda items: [Listwise(), Best()],
    sft=lambda items: [SFT(), Watch()],
    rloo=lambda items: [RLOO(), Best(patience=1)],
    grpo=lambda items: [GRPO(), KLToRef(), AdaptiveKL(limits=(1e-4, 4.)), EntropyFloor(.99), Best(), Watch()],
    grpo_by_steps=lambda items: [GRPO(refresh=2), TopKCurriculum((2, 3))],
    moved=lambda items: [NoDropout(), RCE(), KLToRef(), TempSchedule("kl_to_ref", beta=(1., .5))],
    frozen=lambda items: [RCE(), Freeze("query_proj")],
    phases=lambda items: [RCE(), Phases(dict(some=(items[:9], 1), all=(None, 2)))],
    lengths=lambda items: [RCE(), SplitShots()],
)

def footprint(learn):
    "Whatever `lr_find` might leave behind"
    ours = [cb for cb in learn.cbs if isinstance(cb, StageCallback)]
    remembered = {cb.name: repr({k: v for k, v in vars(cb).items() if k != "learn"}) for cb in ours}
    loaders = [dl.rng.getstate() for dl in learn.dls.loaders]
    draws = repr((random.getstate(), torch.get_rng_state().tolist(), loaders))
    optimiser = repr(learn.opt.state_dict()) if learn.opt else ""
    return dict(
        weights=repr(weights(learn)), optimiser=optimiser, draws=draws, files=sorted(learn.path.rglob("*")),
        callbacks=[cb.name for cb in learn.cbs], rows=len(learn.history.frame), remembered=remembered)

@pytest.mark.parametrize("name", STAGES)
def test_lr_find_with_whatever_is_on_the_learner(name, learn):
    "It works with its defaults, says nothing that belongs to training, and leaves nothing behind"
    trained = hasattr(learn.dls.train_ds, "pool")   # stored groups: behind a fit; synthetic ones: before any
    cbs = STAGES[name](learn.dls.train_ds.items)
    with quiet(learn), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if trained: learn.fit(3, 1e-2)
        learn.add_cbs(cbs)
        before = footprint(learn)
        warnings.filterwarnings("error", message="AdaptiveKL|after one epoch|RCE: |GRPO: ")
        found = learn.lr_find(show_plot=False)
        assert 1e-7 < found.valley < 10 and len(learn.recorder.losses) > 20
        assert footprint(learn) == before
        warnings.simplefilter("ignore")
        learn.fit(3, 1e-3)   # and the stage itself begins as ever

def test_what_moves_with_progress_stays_where_it_begins_in_lr_find(tmp_path):
    class Spy(Callback):
        def after_loss(self):
            if self.training: seen.append((self.grpo.temp, self.kl_to_ref.beta, int(self.yb[1].sum(-1).max())))
    class Warm(GRPO):
        name, schedule = "grpo", staticmethod(lambda progress: 2 - progress)
    seen = []
    learn = learner(synth_dls(40, 24, 8, N=6), tmp_path)
    cbs = [Warm(), KLToRef(), TempSchedule("kl_to_ref", beta=(1., .5)), TopKCurriculum((2, 3)), Spy()]
    with quiet(learn): learn.lr_find(num_it=20, cbs=cbs, show_plot=False)
    assert len(seen) == 20 and set(seen) == {(2., 1., 2)}

def test_lr_find_begins_with_the_loss_of_the_stage(tmp_path):
    "What acts in training acts there: the first loss is that of the fit, the penalty in the gradient included"
    class First(Callback):
        order = 40
        def before_backward(self): seen.append((float(self.loss), float(self.loss_grad)))
    def first(look):
        seen.clear()
        learn = learner(synthetic(), tmp_path)
        cbs = [GRPO(), KLToRef(selector_learner(synthetic(), d_hidden=8, seed=3).model, beta=2.), First()]
        with quiet(learn): learn.lr_find(num_it=20, cbs=cbs, show_plot=False) if look else learn.fit(1, cbs=cbs)
        return seen[0]
    seen = []
    assert first(True) == first(False)

def test_lr_find_of_a_stage_that_would_be_skipped_says_so(tmp_path):
    learn = learner(synthetic(), tmp_path)
    ds = learn.dls.train_ds
    ds.rows = [(*row, 0*rewards) for *row, rewards in ds.rows]
    with quiet(learn): refuses("wanted 5% (min_live)", learn.lr_find, cbs=GRPO(too_few="skip"), show_plot=False)

def test_a_fit_behind_lr_find_is_the_fit_without(tmp_path):
    def run(look):
        learn = learner(synthetic(), tmp_path)
        with quiet(learn):
            learn.fit(1, cbs=RCE())
            if look: learn.lr_find(num_it=20, cbs=RCE(), show_plot=False)
            learn.fit(2, cbs=RCE())
        return weights(learn), learn.history.frame.drop(columns=["seconds", "fit"])
    (a, f), (b, g) = run(False), run(True)
    assert same(a, b)
    pd.testing.assert_frame_equal(f, g)

def test_ctrl_c_in_lr_find_leaves_history_awake(learn):
    class Stop(Callback):
        def after_loss(self): raise KeyboardInterrupt
    with quiet(learn):
        with pytest.raises(KeyboardInterrupt): learn.lr_find(num_it=10, cbs=Stop(), show_plot=False)
        learn.fit(1)
    assert len(learn.history.frame) == 1

# --- names -------------------------------------------------------------------------------------------------
def written_by(cls):
    "Attributes that a callback writes on itself"
    source = inspect.getsource(cls)
    names = set()
    for left in re.findall(r"((?:self\.\w+\s*,\s*)*self\.\w+)\s*=[^=]", source):
        names |= set(re.findall(r"self\.(\w+)", left))
    return names

def test_no_name_of_ours_is_an_attribute_of_fastais_trackers():
    trackers = TrackerCallback, SaveModelCallback, EarlyStoppingCallback, ReduceLROnPlateau
    others = GradientAccumulation, CSVLogger, ShowGraphCallback, Recorder, LRFinder
    theirs = set.union(*(written_by(cls) for cls in (*trackers, *others)))
    assert {"best", "new_best", "wait", "patience", "file"} <= theirs
    objectives = [RCE(), GRPO(), Listwise()]
    ours = [*objectives, KLToRef(), SkipFlat(), NoDropout(), Best(), History(), RLStats(), Resume("x")]
    assert not {cb.name for cb in ours} & theirs

# --- looking without touching ------------------------------------------------------------------------------
def test_looking_changes_no_draw(learn):
    def states():
        loaders = [dl.rng.getstate() for dl in learn.dls.loaders]
        return torch.get_rng_state().tolist(), random.getstate(), loaders
    before = states()
    first = learn.dls.show_batch()
    learn.show_results()
    learn.dls.show_batch()
    learn.predict(learn.dls.valid_ds.items[0])
    assert states() == before
    assert learn.dls.show_batch().equals(first)
    next(iter(learn.dls.train))
    assert not learn.dls.show_batch().equals(first)   # it shows what comes next

def test_a_batch_is_found_by_what_it_holds(learn):
    dl = learn.dls.train
    b = dl.one_batch()
    rows = dl.rows_of_batch(b, 8)
    ds = dl.dataset
    for j, i in enumerate(rows): assert torch.equal(b[0][j], ds[i][0])
    assert dl.show_batch(b, max_n=3)["query"].tolist() == [ds.items[i] for i in rows[:3]]
    refuses("not among the groups of this loader", learn.dls.valid.show_batch, b)

def test_pictures_are_drawn_where_items_are_known(tmp_path):
    items = islands()
    learn = learner(real(items), tmp_path)
    plain = learner(real(), tmp_path)
    for verb in ("show_batch", "show_results"):
        plt.close("all")
        def look(learn): return getattr(learn.dls if verb == "show_batch" else learn, verb)(max_n=3)
        bare = look(plain)
        assert not plt.get_fignums()
        t = look(learn)
        assert bare.equals(t)
        assert len(plt.get_fignums()) == 1
        axes = plt.gcf().axes
        assert len(axes) == 3 * (1 + max(map(len, t.picks)))
        drawn = [ax for ax in axes if ax.images]
        assert len(drawn) == 3 + sum(map(len, t.picks))
        shots = t.picks.map(len).max()
        asked = [" ".join(ax.get_title().split()) for ax in axes[shots::shots + 1]]
        assert asked == [" ".join(items.question[q].split()) for q in t["query"]]
    plt.close("all")
    learn.show_results(max_n=2, show=False)
    assert not plt.get_fignums()
    blind = learner(real(items.assign(image_path=None)), tmp_path)
    blind.show_results(max_n=2)
    assert not any(ax.images for ax in plt.gcf().axes)

def test_export_carries_no_data(tmp_path):
    secret = islands().assign(answer="a secret answer")
    def exported(n, name):
        queries = range(3000, 3000 + n)
        g = rng("test_verbs export")
        ids = [*DEMOS, *queries, *VALID]
        def vectors(): return torch.tensor(g.normal(size=(len(ids), 4))).float()
        data = record("train", queries), record("valid", VALID)
        more = EmbedStore(ids, vectors(), vectors())
        dls = group_dls(*data, more, "soft_only", bs=8, device="cpu", items=secret)
        learn = learner(dls, tmp_path)
        with quiet(learn): learn.fit(1, cbs=[RCE(), Best()])
        learn.onpolicy = dls   # what a stage on-policy leaves behind holds data
        file = learn.export(name)
        assert learn.onpolicy is dls
        return file
    few, many = exported(16, "few.pkl"), exported(640, "many.pkl")
    assert abs(few.stat().st_size - many.stat().st_size) < 1000
    assert b"a secret answer" not in few.read_bytes()
    loaded = load_learner(many)
    assert not hasattr(loaded, "onpolicy") and loaded.dls.info["reward"]["mode"] == "soft_only"
    loaded.dls = real()
    with quiet(loaded): loaded.fit(1, cbs=RCE())   # and it goes on with other data
    assert loaded.history.frame.epoch.tolist() == [0, 0]

def test_a_failed_export_keeps_the_data(learn):
    own = learn.dls
    with pytest.raises((FileNotFoundError, RuntimeError)): learn.export("no/such/folder/x.pkl")
    assert learn.dls is own

def nothing(logp, rewards, mask):
    "A metric that looks better than any regret"
    return torch.tensor(-1.)

def test_trackers_that_stay_on_the_learner_are_kept_out_of_validate(tmp_path):
    "fastai's tracker would take a metric for `valid_loss` there, and save over the best"
    learn = learner(synthetic(), tmp_path, metrics=nothing)
    with quiet(learn):
        learn.add_cb(SaveModelCallback(fname="kept"))
        learn.fit(2, cbs=RCE())
        file = learn.path/"models"/"kept.pth"
        kept = file.stat().st_mtime_ns
        for look in (learn.validate, learn.show_results, learn.get_preds): look()
        assert file.stat().st_mtime_ns == kept and isinstance(learn.save_model, SaveModelCallback)
        Learner.validate(learn)
        assert file.stat().st_mtime_ns > kept   # so this is what it is for

def test_stored_tables_of_fit_have_no_times(monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.syspath_prepend(str(ROOT/".ci"))
    from notebooks import without_times
    def shown(html): return nbformat.v4.new_output("display_data", {"text/html": html, "text/plain": html})
    def table(*rows):
        cells = ("".join(f"<td>{cell}</td>" for cell in row) for row in rows)
        return f'<div><table class="fastprogress">{"".join(f"<tr>{row}</tr>" for row in cells)}</table></div>'
    frame = shown("<table class=\"dataframe\"><tr><td>00:01</td></tr></table>")
    said = nbformat.v4.new_output("stream", text="00:01")
    timed = shown(table(("epoch", "loss", "time"), (0, .5, "00:01"), (1, .4, "1:00:01")))
    style = shown("<style> table.fastprogress { margin: 1em } </style>")
    kept = without_times([style, shown(""), shown("<div></div>"), timed, frame, said])
    assert kept == [timed, frame, said]
    assert timed.data == {"text/html": table(("epoch", "loss"), (0, .5), (1, .4))}
    assert "00:01" in frame.data["text/html"]
