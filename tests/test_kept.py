"Everything that is kept is kept under all that it was computed from: each ingredient is changed in turn"
import json, shutil
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from safetensors.torch import load_file, save_file
from leverplus.core import read_json, repo_path, write_json
from leverplus.embed import embed_items
from leverplus.groups import RLData
from leverplus.infer import predict
from leverplus.rldata_ask import FactCache, ask
import leverplus.rldata_scale # gives `Job` its methods
from leverplus.settings import Choosing, Job, Picking, Rows, Teaching, change, settings_of
from leverplus.table import Asked, full_table
from leverplus.training import TrainingData, train_run
from leverplus.toy import make_islands

# ---- a small world on disk, whose every part can be changed --------------------------------------------------

class Kept:
    "A data set of 4 + 12 pictures, a language model and a CLIP, each in a folder of its own"
    def __init__(self, home):
        self.home = Path(home)
        self.data = make_islands(self.home/"data", dict(train=12, dev=4))
        self.lvlm = self.home/"lvlm"
        self.clip = self.home/"clip"
        shutil.copytree(repo_path("models", "tiny-qwen2.5-vl"), self.lvlm)
        shutil.copytree(repo_path("models", "tiny-clip"), self.clip)
        self.job = settings_of(
            Job, data=str(self.data), split="dev", K=4, shots=(1,), counts=dict(retrieval=2, random=1),
            store=str(self.home/"store"), lvlm=str(self.lvlm), clip=str(self.clip), device="cpu",
            vision_dir=str(self.home/"features"), window=2, test=0,
        )

    def items(self): return self.job.items()
    def picture(self, split, k): return sorted((self.data/"images").glob(f"COCO_{split}*"))[k]
    def ids_of(self, path): return self.items().query("image_path == @path").question_id.tolist()

@pytest.fixture
def kept(tmp_path): return Kept(tmp_path)

def turned(path):
    "Replace a picture by another one, upside down: same name, same size"
    from PIL import Image
    with Image.open(path) as im: turned = im.convert("RGB").rotate(180)
    turned.save(path)

def query_picture(w): turned(w.picture("dev", 0))
def demo_picture(w):
    for k in range(12): turned(w.picture("train", k))

def edited(file, change):
    content = read_json(file)
    change(content)
    write_json(file, content)

def question(w):
    def change(c): c["questions"][0]["question"] = "Which thing is that?"
    edited(w.data/"OpenEnded_mscoco_dev2014_questions.json", change)

def truth(w):
    def change(c):
        for person in c["annotations"][0]["answers"]: person["answer"] = "vex huba"
    edited(w.data/"mscoco_dev2014_annotations.json", change)

def shown_answers(w):
    def change(c):
        for a in c["annotations"]:
            for person in a["answers"]: person["answer"] = "vex huba"
    edited(w.data/"mscoco_train2014_annotations.json", change)

def in_the_middle(folder, part, by):
    "Change one number in the middle of the largest tensor whose name holds `part`"
    file = folder/"model.safetensors"
    weights = load_file(file)
    name = max((k for k in weights if part in k), key=lambda k: weights[k].numel())
    flat = weights[name].flatten()
    flat[len(flat)//2:len(flat)//2 + 64] += by
    weights[name] = flat.view(weights[name].shape)
    save_file(weights, file, {"format": "pt"})

def language_weights(w): in_the_middle(w.lvlm, "mlp", 3.)
def vision_weights(w): in_the_middle(w.lvlm, "visual", 3.)
def clip_weights(w): in_the_middle(w.clip, "vision_model.encoder", 3.)

def picture_size(w):
    def change(c): c["image_processor"]["size"]["shortest_edge"] = 112*112
    edited(w.lvlm/"processor_config.json", change)

def clip_pixels(w):
    def change(c): c["image_mean"] = [.1, .2, .3]
    edited(w.clip/"preprocessor_config.json", change)

def template(w):
    file = w.lvlm/"chat_template.jinja"
    file.write_text(file.read_text().replace("<|im_start|>user", "<|im_start|>system").replace(
        "'<|im_start|>' + message['role']", "'<|im_start|>' + 'system'"))

FACTS = [query_picture, demo_picture, question, truth, shown_answers, language_weights, vision_weights, picture_size]
VECTORS = [query_picture, demo_picture, question, clip_weights, clip_pixels]

def name_of(change): return change.__name__

# ---- facts -------------------------------------------------------------------------------------------------

def pairs_of(items):
    dev = items.question_id[items.split == "dev"].tolist()
    train = items.question_id[items.split == "train"].tolist()
    return pd.DataFrame([dict(question_id=q, pointer=p) for q in dev[:2] for p in [(), (train[0],), (train[7],)]])

@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", FACTS, ids=name_of)
def test_facts_are_those_of_what_is_there_now(kept, change):
    def facts(cache):
        items = kept.items()
        scorer = kept.job.scorer()
        return ask(pairs_of(items), scorer, items, cache)
    before = facts(FactCache(kept.home/"facts"))
    change(kept)
    now = facts(FactCache(kept.home/"facts"))
    shutil.rmtree(kept.home/"features")
    fresh = facts(None)
    assert (fresh.vqa_gt_prob - before.vqa_gt_prob).abs().max() > 1e-9, "the change changes nothing"
    pd.testing.assert_frame_equal(now, fresh, rtol=1e-5, atol=1e-9)

# ---- vectors -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change", VECTORS, ids=name_of)
def test_vectors_are_those_of_what_is_there_now(kept, change):
    _, before, _ = kept.job.inputs()
    change(kept)
    items, now, pool = kept.job.inputs()
    fresh = embed_items(items, str(kept.clip), device="cpu", progress=False)
    moved = 1 - (before.get(items.question_id) * fresh.get(items.question_id)).sum(-1)
    assert moved.max() > 1e-4, "the change changes nothing"
    assert torch.allclose(now.get(items.question_id), fresh.get(items.question_id), atol=1e-6)
    assert now.fingerprint == fresh.fingerprint

# ---- rows of a generation ----------------------------------------------------------------------------------

@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", [*FACTS, clip_weights], ids=name_of)
def test_a_generation_does_not_go_on_with_something_else(kept, change):
    path = kept.home/"run"
    run = kept.job.generation(path)
    run.begin()
    run.window(0)
    change(kept)
    with pytest.raises(ValueError) as refusal: kept.job.run(path, progress=False)
    if change is query_picture:
        for q in kept.ids_of(str(kept.picture("dev", 0))): assert str(q) in str(refusal.value)
        assert "picture" in str(refusal.value)

def test_a_generation_of_which_nothing_changed_goes_on(kept):
    path = kept.home/"run"
    run = kept.job.generation(path)
    run.begin()
    first, _ = run.window(0)
    data = kept.job.run(path, progress=False)
    pd.testing.assert_frame_equal(data.rows[:len(first)], first)
    whole = kept.job.run(kept.home/"other", progress=False)
    pd.testing.assert_frame_equal(data.rows, whole.rows)

# ---- predictions and tables --------------------------------------------------------------------------------

def predicted(w):
    items, store, pool = w.job.inputs()
    picking = Picking(picker="similar_mixed", shots=(1,))
    return predict(w.home/"prediction", pool, items, w.job.scorer(), store, picking, split="dev", progress=False)

def tabled(w):
    items, store, pool = w.job.inputs()
    asked = Asked(items, store, pool, w.job.scorer())
    return full_table(w.home/"table", asked, rows=Rows(shots=(1,), draws=1, fixed=0), progress=False)

@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("made", [predicted, tabled], ids=name_of)
@pytest.mark.parametrize("change", [*FACTS, clip_weights], ids=name_of)
def test_a_run_is_not_continued_with_something_else(kept, made, change):
    made(kept)
    made(kept)                                  # the same once more is fine
    change(kept)
    with pytest.raises(ValueError) as refusal: made(kept)
    if change is query_picture:
        for q in kept.ids_of(str(kept.picture("dev", 0))): assert str(q) in str(refusal.value)

# ---- training ----------------------------------------------------------------------------------------------

@pytest.fixture
def groups(kept):
    "Groups of both splits"
    train = change(kept.job, split="train").run(kept.home/"train", progress=False)
    dev = kept.job.run(kept.home/"dev", progress=False)
    return train, dev

def trained(w, train, dev, epochs=2):
    teaching = Teaching(objective="listwise", epochs=epochs, bs=8)
    return train_run(w.home/"trained", TrainingData(w.job, train, dev), teaching, say=lambda line: None)

@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", [demo_picture, clip_weights, question, shown_answers], ids=name_of)
def test_groups_are_trained_on_with_the_items_that_they_are_of(kept, groups, change):
    trained(kept, *groups)
    change(kept)
    with pytest.raises(ValueError): trained(kept, *groups)
    shutil.rmtree(kept.home/"trained")
    if change is clip_weights: trained(kept, *groups)           # facts do not depend on the CLIP
    else:
        with pytest.raises(ValueError, match="question_id"): trained(kept, *groups)

@pytest.mark.parametrize("what", ["a reward", "a row", "the dev groups"])
def test_a_training_is_not_continued_with_other_groups(kept, groups, what):
    train, dev = groups
    trained(kept, train, dev)
    rows = (dev if what == "the dev groups" else train).rows.copy()
    if what == "a row": rows = rows.drop(rows.index[7]).reset_index(drop=True)
    else: rows.loc[7 % len(rows), "vqa_acc_score"] = 1 - rows.vqa_acc_score[7 % len(rows)]
    other = RLData(rows, (dev if what == "the dev groups" else train).pool)
    pair = (train, other) if what == "the dev groups" else (other, dev)
    with pytest.raises(ValueError): trained(kept, *pair)
