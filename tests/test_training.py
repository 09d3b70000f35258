"Training runs: from groups to a checkpoint, and on from there"
import json, warnings
from types import SimpleNamespace
import pytest, torch
from fastcore.basics import noop
from leverplus.__main__ import main
from leverplus.callback_track import Resume
from leverplus.core import read_json
from leverplus.groups import RLData
from leverplus.learner import load_selector
from leverplus.recipes import RECIPES
from leverplus.runs import Run
from leverplus.settings import (
    Choosing, Job, Rewarding, Teaching, change, plain_settings, read_settings, settings_of,
)
import leverplus.rldata_scale
from leverplus.training import (
    TrainingData, accuracy_chooser, learner_of, looks_at_dev, train_run, training_data, training_settings,
)

SHORT = Teaching(objective="rce", epochs=2, bs=4, set=dict(watch=None))

@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with groups of 16 training and 8 development questions, answered by hash"
    path = tmp_path_factory.mktemp("training")
    for split, n in (("train", 16), ("dev", 8)):
        job_of(path, split=split, limit=n).run(path/split, progress=False)
    return path

def job_of(path, **flat): return settings_of(Job, lvlm="mock", store=str(path/"store"), test=0, **flat)

def data_of(place, teaching=SHORT, choosing=None, **kw):
    choosing = Choosing(dev=str(place/"dev")) if choosing is None else choosing
    return training_data([place/"train"], job_of(place, split="dev"), teaching, choosing, **kw)

def weights(run): return load_selector(run.checkpoint).state_dict()

def same(a, b): return all(torch.equal(x, b[k]) for k, x in a.items())

def test_a_run_is_known_by_its_settings_and_data(place, tmp_path):
    run = train_run(tmp_path/"a", data_of(place), SHORT, say=noop)
    assert read_settings(Teaching, run.settings["teaching"]) == SHORT
    assert read_settings(Rewarding, run.settings["rewarding"]) == Rewarding()
    assert run.fingerprints["train"] == RLData.load(place/"train").fingerprint
    assert run.metrics["epochs_done"] == len(run.history) == 2
    assert run.metrics["smallest_regret"] == run.history.valid_loss.min()
    before = weights(run)
    again = train_run(tmp_path/"a", data_of(place), SHORT, say=noop)
    assert same(before, weights(again))
    assert len(again.starts) == 2
    for other, says in (
        (change(SHORT, lr=.1), "teaching.lr: None there, 0.1 now"),
        (change(SHORT, seed=1), "seed: 0 there, 1 now"),
        (Teaching(), "teaching.recipe: None there, 'ours' now"),
    ):
        with pytest.raises(ValueError, match=says): train_run(tmp_path/"a", data_of(place), other, say=noop)
    share = data_of(place, choosing=Choosing(dev_share=.25))
    with pytest.raises(ValueError, match="fingerprint of train"): train_run(tmp_path/"a", share, SHORT, say=noop)
    assert same(before, weights(Run(tmp_path/"a")))
    other = train_run(tmp_path/"a", data_of(place), change(SHORT, lr=.1), say=noop, overwrite=True)
    assert not same(before, weights(other))

def test_a_run_that_a_function_made_says_where_its_data_lie(place, tmp_path):
    "A later door has the data, the models and the pools from it, as from one that a command made"
    from leverplus.doors import read_door, remembered
    run = train_run(tmp_path/"a", data_of(place), SHORT, say=noop)
    assert remembered(run.path)["data"]["store"] == str(place/"store")
    door = read_door(["eval", "--selector", str(run.path), "--out", "x", "--quiet"])
    assert (door.model.lvlm, door.data.store, door.pools.K) == ("mock", str(place/"store"), 16)
    assert read_door(["infer", "--selector", str(run.checkpoint), "--out", "x", "--quiet"]).model.lvlm == "mock"

def test_lines_or_a_table(place, tmp_path, capsys):
    said = []
    train_run(tmp_path/"a", data_of(place), SHORT, say=said.append)
    assert [line.split("  ")[0] for line in said] == ["epoch 0", "epoch 1"]
    assert capsys.readouterr().out == ""
    train_run(tmp_path/"b", data_of(place), SHORT)
    assert "valid_loss" in capsys.readouterr().out

def test_a_recipe_is_the_default_and_brings_its_reward(place, tmp_path):
    short = Teaching(set=dict(warmup=dict(n_epoch=1, steps=2), listwise=dict(n_epoch=1)))
    run = train_run(tmp_path/"ours", data_of(place, short), short, say=noop)
    assert run.settings["teaching"]["recipe"] == "ours"
    assert load_selector(run.checkpoint).info["recipe"] == "ours"
    assert run.history.fit.tolist() == [1, 2] # a warm-up and a stage
    data = data_of(place, short).open()
    pictures = set(data.items.image_id.loc[data.dev.queries])
    assert not set(data.warmup_items().image_id) & pictures
    assert len(data.warmup_items()) > 0

def test_runs_share_what_they_begin_with(place, tmp_path):
    "One warm-up for two runs; what the data decided is in each; where states lie is no setting of a run"
    def go(name, epochs, kept=str(tmp_path/"kept")):
        stages = dict(warmup=dict(n_epoch=1, steps=2), listwise=dict(n_epoch=epochs, watch=None))
        short = Teaching(set=stages, kept=kept)
        return train_run(tmp_path/name, data_of(place, short), short, say=noop)
    first = go("a", 1)
    assert len(list((tmp_path/"kept").iterdir())) == 2
    second = go("b", 2)
    assert len(list((tmp_path/"kept").iterdir())) == 3
    assert second.history.seconds.iloc[0] == first.history.seconds.iloc[0]
    plan = read_json(first.path/"plan.json")
    assert len(plan) == 3 and load_selector(first.checkpoint).info["plan"] == plan
    assert "kept" not in first.settings["teaching"]
    alone = go("c", 1, None)
    assert (alone.path/"state").is_dir() and not (first.path/"state").exists()
    a, c = (load_selector(run.checkpoint).state_dict() for run in (first, alone))
    assert all(torch.equal(a[name], c[name]) for name in a)

def test_a_selector_to_start_from_is_known_by_its_weights(place, tmp_path):
    moving = change(SHORT, lr=.05, set=dict(watch=None, best=False))
    first = train_run(tmp_path/"first", data_of(place), moving, say=noop)
    go_on = change(moving, start=str(first.checkpoint))
    second = train_run(tmp_path/"second", data_of(place), go_on, say=noop)
    assert "start" in second.fingerprints
    assert second.settings["teaching"] == training_settings(moving, Choosing(), Rewarding())["teaching"]
    with pytest.raises(ValueError, match="fingerprint of start"):
        train_run(tmp_path/"second", data_of(place), go_on, say=noop, start=load_selector(second.checkpoint))

def test_a_recipe_is_known_by_its_content_and_a_warmup_by_its_items(place, tmp_path):
    short = dict(RECIPES["ours"], stages=[
        dict(fit="warmup", n_epoch=1, lr=1e-2, steps=2, bs=8, best=False, watch=None),
        dict(fit="listwise", n_epoch=1, lr=1e-3, watch=None),
    ])
    mine = Teaching(recipe="mine")
    def go(recipe=short, change=lambda data: None):
        data = data_of(place, mine, among=dict(mine=recipe))
        change(data)
        return train_run(tmp_path/"a", data, mine, say=noop, among=dict(mine=recipe))
    run = go()
    assert {"recipe", "warmup items", "start"} <= set(run.fingerprints)
    longer = dict(short, stages=[short["stages"][0], dict(fit="listwise", n_epoch=1, lr=2e-3, watch=None)])
    with pytest.raises(ValueError, match="fingerprint of recipe"): go(longer)
    go(dict(short, title="another title"))
    def other_answer(data):
        inputs = data.job.inputs
        def changed(bank):
            items, *rest = inputs(bank)
            last = items.index[items.split == "train"][-1]
            return items.assign(answer=items.answer.where(items.index != last, "another")), *rest
        data.open = lambda bank: TrainingData.open(data, bank)
        data.job = SimpleNamespace(inputs=changed, data=data.job.data, model=data.job.model, guarding=data.job.guarding)
    with pytest.raises(ValueError, match="fingerprint of warmup items"): go(change=other_answer)
    go()

def test_a_new_start_is_not_continued_from_another_selector(place, tmp_path):
    moving = change(SHORT, lr=.05, set=dict(watch=None, best=False))
    first = train_run(tmp_path/"first", data_of(place), moving, say=noop)
    with pytest.raises(ValueError, match="fingerprint of start"):
        train_run(tmp_path/"first", data_of(place), moving, say=noop, start=load_selector(first.checkpoint))

def test_an_epoch_chosen_by_accuracy_knows_what_is_stored(place, tmp_path):
    by_accuracy = Choosing(dev=str(place/"dev"), choose="accuracy")
    sft = change(SHORT, objective="sft", lr=.05)
    run = train_run(tmp_path/"a", data_of(place, sft, by_accuracy), sft, by_accuracy, say=noop)
    data = data_of(place, sft, by_accuracy).open()
    learn, _ = learner_of(data, sft)
    learn.model.load_state_dict(weights(run))
    class Silent:
        "Nobody is asked: all is in the run"
        inner = job_of(place).scorer()
        fingerprint = inner.fingerprint
        tolerance = inner.tolerance
        def run(self, *a, **k): pytest.fail("asked")
    loss = accuracy_chooser(tmp_path/"a", data, Silent(), learn)(learn)
    assert 1 - loss.mean() == pytest.approx(run.metrics["dev_accuracy"])
    assert looks_at_dev(sft, by_accuracy) == 3
    assert looks_at_dev(change(sft, set=dict(best=False)), by_accuracy) == 0
    with pytest.raises(ValueError, match="no stage chooses one"):
        train_run(tmp_path/"b", data, change(sft, set=dict(best=False)), by_accuracy, say=noop)
    assert not (tmp_path/"b").exists()

@pytest.mark.parametrize("kw, says", [
    (dict(set=dict(speed=9)), "speed"),
    (dict(new=dict(speed=9)), "speed"),
    (dict(objective=None, epochs=None, bs=None, set=dict(speed=9)), "speed"),
])
def test_settings_are_tried_before_anything_is_written(place, tmp_path, kw, says):
    with pytest.raises((TypeError, ValueError), match=says):
        train_run(tmp_path/"a", data_of(place), change(SHORT, **kw), say=noop)
    assert not (tmp_path/"a").exists()

def test_groups_of_other_items_are_refused(place, tmp_path):
    data = data_of(place)
    data.job = change(data.job, candidates="test")
    with pytest.raises(ValueError): train_run(tmp_path/"a", data, SHORT, say=noop)
    assert not (tmp_path/"a").exists()
    assert plain_settings(SHORT)["objective"] == "rce"

def test_a_recipe_trains_where_it_is_told(place, monkeypatch):
    got = {}
    monkeypatch.setattr("leverplus.training.recipe_learner", lambda *a, **kw: got.update(kw))
    data = data_of(place, Teaching())
    data.job = change(data.job, device="cpu")
    learner_of(data.open(), Teaching())
    assert got["device"] == "cpu"

def test_a_reward_beside_a_recipe_is_refused_before_anything_is_written(place, tmp_path):
    other = Rewarding(reward="gtprob")
    with pytest.raises(ValueError, match="reward, weights beside recipe ours"):
        train_run(tmp_path/"a", data_of(place, Teaching()), Teaching(), rewarding=other, say=noop)
    with pytest.raises(ValueError, match="reward, weights beside recipe ours"):
        data_of(place, Teaching(), rewarding=other)
    assert not (tmp_path/"a").exists()

# --- what a tracker reads, and what cannot teach --------------------------------------------------------------------
def lines_of(folder): return [json.loads(line) for line in (folder/"metrics.jsonl").read_text().splitlines()]

OURS = Teaching(set=dict(warmup=dict(n_epoch=2, steps=2), listwise=dict(n_epoch=2, watch=None)))

def test_a_run_has_a_line_per_epoch_under_the_names_of_its_stages(place, tmp_path):
    said = []
    run = train_run(tmp_path/"a", data_of(place, OURS), OURS, say=said.append)
    stages = ["warmup"]*2 + ["listwise"]*2
    assert [line["stage"] for line in lines_of(tmp_path/"a")] == stages == run.history.stage.tolist()
    assert [line.split("  ")[1] for line in said] == [f"stage {name}" for name in stages]
    assert [line["reward"] for line in lines_of(tmp_path/"a")] == pytest.approx(run.history.reward.tolist())
    assert "metrics.jsonl" in run.files()
    parts = {name for name in lines_of(tmp_path/"a")[-1] if name.startswith("rewards/")}
    assert parts == {"rewards/vqa_acc_score/mean", "rewards/vqa_acc_score/std"}
    rows = data_of(place, OURS).train.rows
    assert lines_of(tmp_path/"a")[-1]["rewards/vqa_acc_score/mean"] == pytest.approx(rows.vqa_acc_score.mean())
    was = lines_of(tmp_path/"a")
    train_run(tmp_path/"a", data_of(place, OURS), OURS, say=noop)
    assert lines_of(tmp_path/"a") == was
    card = load_selector(run.checkpoint).passport["stages"]
    assert card == ["warmup, 2 epochs", "listwise, 2 epochs"]

@pytest.mark.parametrize("after, kept", [(1, False), (3, False), (3, True)])
def test_a_killed_run_has_no_line_twice(place, tmp_path, monkeypatch, after, kept):
    teaching = change(OURS, kept=str(tmp_path/"kept")) if kept else OURS
    saved = []
    save = Resume.save
    def tired(self, *args, **kw):
        saved.append(self)
        if len(saved) == after: raise KeyboardInterrupt   # the line is written, its state is not
        save(self, *args, **kw)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(Resume, "save", tired)
        train_run(tmp_path/"a", data_of(place, teaching), teaching, say=noop)
    assert len(lines_of(tmp_path/"a")) == after
    run = train_run(tmp_path/"a", data_of(place, teaching), teaching, say=noop)
    stages = ["warmup"]*2 + ["listwise"]*2
    assert [line["stage"] for line in lines_of(tmp_path/"a")] == stages == run.history.stage.tolist()
    assert [line["eval_loss"] for line in lines_of(tmp_path/"a")] == pytest.approx(run.history.valid_loss.tolist())
    other = train_run(tmp_path/"b", data_of(place, teaching), teaching, say=noop)   # with `kept`, nothing is trained
    assert lines_of(tmp_path/"b") == lines_of(tmp_path/"a") and same(weights(run), weights(other))

def flat(data, acc=0.):
    "The same groups, where every answer is right, or wrong"
    return RLData(data.rows.assign(vqa_correct=float(acc > 0), vqa_acc_score=acc), data.pool, data.manifest)

def alone(data):
    "The first sequence of every group"
    return RLData(data.rows.drop_duplicates("question_id").reset_index(drop=True), data.pool, data.manifest)

def test_groups_that_cannot_teach_are_refused_before_anything_trains(place, tmp_path):
    data = data_of(place)
    grpo = Teaching(objective="grpo", set=dict(min_live=0.))
    skipping = Teaching(objective="grpo", set=dict(too_few="skip"))
    for teaching in (SHORT, Teaching(objective="sft"), grpo, skipping, Teaching()):
        for train, why in ((flat(data.train), "16 all wrong"), (flat(data.train, 1.), "16 all right"),
                           (alone(data.train), "16 one sequence")):
            bad = TrainingData(data.job, train, data.dev)
            with pytest.raises(ValueError, match=f"training data: none of 16 groups has any difference.*{why}.*mine"):
                train_run(tmp_path/"a", bad, teaching, say=noop)
            assert not (tmp_path/"a").exists()
    with pytest.raises(ValueError, match=r"warm-up alone, with ..stages.: .*warmup"):
        train_run(tmp_path/"a", TrainingData(data.job, flat(data.train), data.dev), Teaching(), say=noop)
    # half of them may be flat, and 0 epochs ask for nothing
    rows = data.train.rows
    half = rows.question_id.isin(data.train.queries[:8])
    some = rows.assign(vqa_correct=rows.vqa_correct.where(half, 0.), vqa_acc_score=rows.vqa_acc_score.where(half, 0.))
    enough = TrainingData(data.job, RLData(some, data.train.pool, {}), data.dev)
    run = train_run(tmp_path/"some", enough, SHORT, say=noop)
    assert run.metrics["epochs_done"] == 2
    nothing = TrainingData(data.job, flat(data.train), data.dev)
    with pytest.warns(UserWarning, match="0 epochs asked"):
        train_run(tmp_path/"none", nothing, change(SHORT, epochs=0), say=noop)

def test_development_groups_that_cannot_choose_are_told(place, tmp_path):
    data = data_of(place)
    undecided = TrainingData(data.job, data.train, flat(data.dev))
    with pytest.warns(UserWarning, match="development data: none of 8 groups .*8 all wrong: no epoch can be chosen"):
        train_run(tmp_path/"a", undecided, SHORT, say=noop)
    last = change(SHORT, set=dict(watch=None, best=False))   # nobody chooses
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert train_run(tmp_path/"b", undecided, last, say=noop).metrics["smallest_regret"] == 0

def test_a_warm_up_alone_trains_whatever_the_groups_are(place, tmp_path):
    data = data_of(place)
    flat_ones = TrainingData(data.job, flat(data.train), flat(data.dev))
    warm = Teaching(set=dict(stages=["warmup"], warmup=dict(n_epoch=1, steps=2)))
    run = train_run(tmp_path/"a", flat_ones, warm, say=noop)
    assert run.history.stage.tolist() == ["warmup"] and run.checkpoint.exists()

def test_a_run_in_which_every_stage_was_skipped_keeps_nothing(place, tmp_path):
    data = data_of(place)
    rows = data.train.rows
    one = rows.question_id == data.train.queries[0]
    few = rows.assign(vqa_correct=rows.vqa_correct.where(one, 0.), vqa_acc_score=rows.vqa_acc_score.where(one, 0.))
    bad = TrainingData(data.job, RLData(few, data.train.pool, {}), data.dev)
    skipping = Teaching(objective="grpo", set=dict(too_few="skip", min_live=.5))
    refused = pytest.raises(ValueError, match="no stage has trained")
    with pytest.warns(UserWarning, match="the stage is skipped"), refused:
        train_run(tmp_path/"a", bad, skipping, say=noop)
    assert not (tmp_path/"a"/"checkpoint").exists()

def test_the_door_refuses_them_with_status_2(place, tmp_path, capsys):
    flat(RLData.load(place/"train")).save(tmp_path/"flat")
    common = ["--lvlm", "mock", "--store", str(place/"store"), "--quiet"]
    for out in ("a", "b"):
        words = ["train", str(tmp_path/"flat"), "--dev", str(place/"dev"), "--out", str(tmp_path/out), *common]
        assert main(words if out == "a" else [*words, "--objective", "rce"]) == 2
        said = capsys.readouterr().err
        assert "none of 16 groups has any difference of reward" in said and "16 all wrong" in said
        assert said.count("\n") == 1 and not (tmp_path/out).exists()
    assert main(["check", str(tmp_path/"flat"), str(place/"train")]) == 0
    said = capsys.readouterr().out
    assert f"{place/'train'}: fit to train on" in said or f"{place/'train'}: not fit to train on: " in said
    assert f"{tmp_path/'flat'}: not fit to train on: " in said
