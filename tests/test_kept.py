"Everything that is kept is kept under all that it was computed from: each ingredient is changed in turn"
import json, os, shutil, warnings
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest, torch
from safetensors.torch import load_file, save_file
from leverplus.core import read_json, repo_path, write_json
from leverplus.embed import EmbedStore, embed_items, gather_stores
from leverplus.groups import RLData, read_part
from leverplus.infer import predict
from leverplus.learner import load_selector
from leverplus.loops import Loop
from leverplus.lvlm import MockScorer, compare, load_lvlm
from leverplus.pools import Pool
from leverplus.rldata_ask import FactCache, ask
from leverplus.rldata_generate import Generation
import leverplus.rldata_scale # gives `Job` its methods
from leverplus.settings import Asking, Choosing, Job, Picking, Rows, Teaching, change, settings_of
from leverplus.sweep import sweep
from leverplus.table import Asked, full_table
from leverplus.training import TrainingData, train_run
from leverplus.toy import make_islands

# ---- a small world on disk, whose every part can be changed --------------------------------------------------

class Kept:
    "A data set of 4 + 12 pictures, a language model and a CLIP, each in a folder of its own"
    def __init__(self, home):
        self.home = Path(home)
        self.data = self.home/"data"
        self.lvlm = self.home/"lvlm"
        self.clip = self.home/"clip"
        if not self.data.exists():
            make_islands(self.data, dict(train=12, dev=4))
            shutil.copytree(repo_path("models", "tiny-qwen2.5-vl"), self.lvlm)
            shutil.copytree(repo_path("models", "tiny-clip"), self.clip)
        self.job = settings_of(
            Job, data=str(self.data), split="dev", K=4, shots=(1,), counts=dict(retrieval=2, random=1), limit=4,
            store=str(self.home/"store"), lvlm=str(self.lvlm), clip=str(self.clip), device="cpu",
            vision_dir=str(self.home/"features"), window=2, test=0,
        )

    def items(self): return self.job.items()
    def picture(self, split, k): return sorted((self.data/"images").glob(f"COCO_{split}*"))[k]
    def ids_of(self, path): return self.items().query("image_path == @path").question_id.tolist()

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A world in which everything was made once, and what was asked there"
    w = Kept(tmp_path_factory.mktemp("made"))
    facts = ask(pairs_of(w.items()), w.job.scorer(), w.items(), FactCache(w.home/"facts"))
    train = change(w.job, split="train").run(w.home/"train", progress=False)
    dev = w.job.run(w.home/"dev", progress=False)
    run = w.job.generation(w.home/"begun")
    run.begin()
    run.window(0)
    predicted(w)
    tabled(w)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")         # two epochs on four questions teach nothing, and it says so
        trained(w, train, dev)
    return SimpleNamespace(home=w.home, facts=facts)

@pytest.fixture
def kept(made, tmp_path):
    "A copy of that world, elsewhere, to be changed"
    shutil.copytree(made.home, tmp_path/"kept")
    return Kept(tmp_path/"kept")

@pytest.fixture
def plain(tmp_path):
    "A world in which nothing was made, and whose language model is a hash"
    w = Kept(tmp_path/"plain")
    w.job = change(w.job, lvlm="mock")
    return w

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
    write_json(file, content, seal=False)

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
def test_facts_are_those_of_what_is_there_now(kept, made, change):
    def facts(cache):
        items = kept.items()
        scorer = kept.job.scorer()
        return ask(pairs_of(items), scorer, items, cache)
    change(kept)
    now = facts(FactCache(kept.home/"facts"))
    shutil.rmtree(kept.home/"features")
    fresh = facts(None)
    assert (fresh.vqa_gt_prob - made.facts.vqa_gt_prob).abs().max() > 1e-9, "the change changes nothing"
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
    path = kept.home/"begun"
    change(kept)
    with pytest.raises(ValueError) as refusal: kept.job.run(path, progress=False)
    if change is query_picture:
        for q in kept.ids_of(str(kept.picture("dev", 0))): assert str(q) in str(refusal.value)
        assert "picture" in str(refusal.value)

def test_a_world_that_was_copied_elsewhere_is_the_same(kept):
    class Silent:
        "Must not be asked"
        def __init__(self, scorer): self.fingerprint = scorer.fingerprint
        def run(self, *args, **kw): raise RuntimeError("everything is known")
    silent = Silent(kept.job.scorer())
    ask(pairs_of(kept.items()), silent, kept.items(), FactCache(kept.home/"facts"))
    predicted(kept, silent)
    tabled(kept, silent)
    begun = read_rows(kept.home/"begun")
    data = kept.job.run(kept.home/"begun", progress=False)
    pd.testing.assert_frame_equal(data.rows[:len(begun)], begun)
    pd.testing.assert_frame_equal(data.rows, RLData.load(kept.home/"dev").rows)
    trained(kept, *groups_of(kept))

def read_rows(folder): return read_part(folder/"part-00000.parquet")

# ---- predictions and tables --------------------------------------------------------------------------------

def predicted(w, scorer=None):
    items, store, pool = w.job.inputs()
    picking = Picking(picker="similar_mixed", shots=(1,))
    scorer = scorer or w.job.scorer()
    return predict(w.home/"prediction", pool, items, scorer, store, picking, split="dev", progress=False)

def tabled(w, scorer=None):
    items, store, pool = w.job.inputs()
    asked = Asked(items, store, pool, scorer or w.job.scorer())
    return full_table(w.home/"table", asked, rows=Rows(shots=(1,), draws=1, fixed=0), progress=False)

@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", [*FACTS, clip_weights], ids=name_of)
def test_predictions_and_tables_are_not_continued_with_something_else(kept, change):
    change(kept)
    for again in (predicted, tabled):
        with pytest.raises(ValueError) as refusal: again(kept)
        if change is query_picture:
            for q in kept.ids_of(str(kept.picture("dev", 0))): assert str(q) in str(refusal.value)

def test_a_prediction_by_another_evaluator_is_another(kept):
    items, store, pool = kept.job.inputs()
    picking = Picking(picker="similar_mixed", shots=(1,))
    def again(asking):
        return predict(kept.home/"prediction", pool, items, kept.job.scorer(), store, picking, asking, split="dev",
                       progress=False)
    for other in (Asking(evaluator="lmms"), Asking(answer_weight="count3"), Asking(style="chat")):
        with pytest.raises(ValueError, match="asking"): again(other)

# ---- training ----------------------------------------------------------------------------------------------

def groups_of(w):
    "Groups of both splits"
    return RLData.load(w.home/"train"), RLData.load(w.home/"dev")

def trained(w, train, dev, epochs=2):
    teaching = Teaching(objective="listwise", epochs=epochs, bs=8)
    return train_run(w.home/"trained", TrainingData(w.job, train, dev), teaching, say=lambda line: None)

@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", [demo_picture, clip_weights, question, shown_answers], ids=name_of)
def test_groups_are_trained_on_with_the_items_that_they_are_of(kept, change):
    groups = groups_of(kept)
    change(kept)
    with pytest.raises(ValueError): trained(kept, *groups)
    shutil.rmtree(kept.home/"trained")
    if change is clip_weights: trained(kept, *groups)           # facts do not depend on the CLIP
    else:
        with pytest.raises(ValueError, match="question_id"): trained(kept, *groups)

@pytest.mark.parametrize("what", ["a reward", "a row", "the dev groups"])
def test_a_training_is_not_continued_with_other_groups(kept, what):
    train, dev = groups_of(kept)
    rows = (dev if what == "the dev groups" else train).rows.copy()
    if what == "a row": rows = rows.drop(rows.index[7]).reset_index(drop=True)
    else: rows.loc[7 % len(rows), "vqa_acc_score"] = 1 - rows.vqa_acc_score[7 % len(rows)]
    other = RLData(rows, (dev if what == "the dev groups" else train).pool)
    pair = (train, other) if what == "the dev groups" else (other, dev)
    with pytest.raises(ValueError): trained(kept, *pair)

# ---- a model is more than its weights ------------------------------------------------------------------------

@pytest.fixture(scope="module")
def asked_before(made):
    "A scorer, pairs, and what it says about them"
    w = Kept(made.home)
    return SimpleNamespace(scorer=w.job.scorer(), pairs=pairs_of(w.items()), items=w.items(), facts=made.facts)

def forbids_what_was_said(lvlm, texts):
    said = sorted({i for text in texts for i in lvlm.tokenizer(text, add_special_tokens=False)["input_ids"]})
    return dict(
        suppress_tokens=said, begin_suppress_tokens=said, bad_words_ids=[[i] for i in said],
        exponential_decay_length_penalty=(1, 5.), repetition_penalty=5., no_repeat_ngram_size=1, eos_token_id=said[0],
    )

def test_the_generation_config_of_a_checkpoint_is_no_part_of_an_answer(asked_before):
    at = asked_before
    model = at.scorer.lvlm.model
    for name, value in forbids_what_was_said(at.scorer.lvlm, at.facts.vqa_raw_generation).items():
        was = getattr(model.generation_config, name, None)
        setattr(model.generation_config, name, value)
        reference = ask(at.pairs, at.scorer.reference(), at.items)
        setattr(model.generation_config, name, was)
        assert reference.vqa_raw_generation.tolist() == at.facts.vqa_raw_generation.tolist(), name

class Adapter(torch.nn.Module):
    "Adds to what a layer computes, unless it is switched off, as LoRA does"
    def __init__(self, base):
        super().__init__()
        self.base = base
        self.more = torch.nn.Parameter(torch.full((base.out_features, base.in_features), .01))
        self.scaling = {"default": 1.}
        self._disabled = False

    def forward(self, x):
        if self._disabled: return self.base(x)
        return self.base(x) + self.scaling["default"]*(x @ self.more.T)

class Hook:
    "Holds its weights in an object of its own"
    def __init__(self, strength): self.weight = torch.full((1,), strength)
    def __call__(self, layer, inputs, output): return output*(1 + self.weight)
    def method(self, layer, inputs, output): return output*(1 + self.weight)

def hook(strength): return lambda layer, inputs, output: output*(1 + strength)
def halved(layer, inputs): return (inputs[0]/2,)

def test_what_is_hung_into_a_model_makes_another_model(asked_before):
    at = asked_before
    mlp = at.scorer.lvlm.model.model.language_model.layers[0].mlp
    layer = mlp.up_proj
    original = at.scorer.fingerprint
    seen = {original}
    def seen_once(what):
        assert at.scorer.fingerprint not in seen, what
        seen.add(at.scorer.fingerprint)
    hooks = [hook(1.), hook(2.), Hook(1.), Hook(2.), Hook(1.).method, Hook(2.).method]
    for f in hooks:
        handle = layer.register_forward_hook(f)
        seen_once(f)
        handle.remove()
    handle = layer.register_forward_pre_hook(halved)
    seen_once("hook before")
    handle.remove()
    for factor in (2, 3):
        layer.forward = lambda x, factor=factor: factor*torch.nn.functional.linear(x, layer.weight)
        seen_once("forward")
        del layer.forward
    mlp.up_proj = Adapter(layer)
    seen_once("adapter")
    mlp.up_proj._disabled = True
    seen_once("switched off")
    mlp.up_proj._disabled = False
    mlp.up_proj.scaling["default"] = 9.
    seen_once("scaled")
    mlp.up_proj = layer
    assert at.scorer.fingerprint == original

def test_a_hook_is_asked_about_anew(asked_before):
    at = asked_before
    cache = FactCache()
    ask(at.pairs, at.scorer, at.items, cache)
    handle = at.scorer.lvlm.model.model.language_model.layers[0].mlp.register_forward_hook(hook(5.))
    now = ask(at.pairs, at.scorer, at.items, cache)
    reference = ask(at.pairs, at.scorer.reference(), at.items)
    handle.remove()
    assert (now.vqa_gt_prob - at.facts.vqa_gt_prob).abs().max() > 1e-6
    assert np.allclose(now.vqa_gt_prob, reference.vqa_gt_prob, rtol=1e-3)
    assert now.vqa_raw_generation.tolist() == reference.vqa_raw_generation.tolist()

def test_where_an_answer_ends_is_part_of_a_model(asked_before):
    tokenizer = asked_before.scorer.lvlm.tokenizer
    original = asked_before.scorer.fingerprint
    end = tokenizer.eos_token
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(tokenizer("dax")["input_ids"][-1])
    assert asked_before.scorer.fingerprint != original
    tokenizer.eos_token = end
    assert asked_before.scorer.fingerprint == original

# ---- vectors and items go together ---------------------------------------------------------------------------

def test_a_picture_is_replaced_while_a_run_is_at_it(plain):
    run = plain.job.generation(plain.home/"run")
    query_picture(plain)
    ids = plain.ids_of(str(plain.picture("dev", 0)))
    says = f"the embeddings of question_id {ids[0]} are of another picture"
    with pytest.raises(ValueError, match=says): run.run(False)
    assert not list((plain.home/"run").glob("part*"))
    assert len(plain.job.run(plain.home/"run", progress=False))             # with new embeddings it goes on

def test_a_picture_is_replaced_between_two_windows(plain):
    run = plain.job.generation(plain.home/"run")
    run.begin(whole=False)                                                  # as workers begin
    run.window(0)
    demo_picture(plain)
    with pytest.raises(ValueError, match="the pictures of question_id"): run.window(1)

@pytest.mark.parametrize("change", [query_picture, question], ids=name_of)
def test_vectors_of_other_items_are_refused(plain, change):
    _, store, pool = plain.job.inputs()
    change(plain)
    items = plain.items()
    picking = Picking(picker="similar_mixed", shots=(1,))
    with pytest.raises(ValueError, match="embeddings of question_id"):
        predict(plain.home/"prediction", pool, items, MockScorer(), store, picking, progress=False)
    with pytest.raises(ValueError, match="embeddings of question_id"):
        rows = Rows(shots=(1,), draws=1, fixed=0)
        full_table(plain.home/"table", Asked(items, store, pool, MockScorer()), rows=rows, progress=False)

@pytest.mark.parametrize("change", [query_picture, question], ids=name_of)
def test_stores_of_other_items_are_not_gathered(plain, change):
    items, store, _ = plain.job.inputs()
    change(plain)
    now = plain.items()
    if change is question:
        other = items.index[items.question != now.question][0]
        with pytest.raises(ValueError, match=f"question_id {other}: .* another question"): gather_stores(now, [store])
    else:
        other = embed_items(now, str(plain.clip), device="cpu", progress=False)
        with pytest.raises(ValueError, match="with another picture"): gather_stores(now, [store, other])
        whole = gather_stores(now, [other])
        assert whole.fingerprint == other.fingerprint
        assert torch.allclose(whole.image, other.image, atol=1e-6)

def test_a_store_of_an_earlier_version_knows_its_pictures_by_16_digits(plain):
    items, store, _ = plain.job.inputs()
    keys = store.meta["image_hash"]
    old = EmbedStore(store.ids, store.image, store.text, dict(image_hash=[key[:16] for key in keys]))
    assert old.unlike(items.index, keys, items.question) == []
    assert old.unlike(items.index[:2], [keys[0], "0"*32], ["other words"]*2) == [items.index[1]]
    two = items.question.iloc[:2].tolist()
    assert store.unlike(items.index[:2], [None, "unreadable"], two) == []
    assert store.unlike(items.index[:2], [None, "unreadable"], ["other words", two[1]]) == [items.index[0]]

@pytest.mark.parametrize("kind", ["pool", "embed"])
def test_a_kept_thing_that_was_copied_over_another_is_refused(plain, kind):
    larger = change(plain.job, K=6, split="train")
    plain.job.inputs()
    here, = (plain.home/"store").glob(f"{kind}-*")
    larger.inputs()
    there, = set((plain.home/"store").glob(f"{kind}-*")) - {here}
    for file in here.iterdir():
        if file.name != "done": shutil.copy(file, there)
    with pytest.raises(ValueError, match=there.name): larger.inputs()
    shutil.rmtree(there)
    assert larger.inputs()[2].K == 6

# ---- files that were copied from elsewhere -------------------------------------------------------------------

def test_a_part_of_another_run_is_refused(plain):
    items, store, pool = plain.job.inputs()
    def begun(name, scorer):
        run = Generation(plain.home/name, plain.job.questions(items), items, pool, scorer, store,
                         proposing=plain.job.proposing, guarding=plain.job.guarding)
        run.begin()
        run.window(0)
        return run
    run = begun("one", MockScorer(0))
    begun("other", MockScorer(1))
    part = plain.home/"one"/"part-00000.parquet"
    kept_part = part.read_bytes()
    shutil.copy(plain.home/"other"/part.name, part)
    with pytest.raises(ValueError, match="part-00000.parquet: holds facts of scorer"): run.run(False)
    part.write_bytes(kept_part)
    run.window(1)
    shutil.copy(plain.home/"one"/"part-00001.parquet", part)
    with pytest.raises(ValueError, match="part-00000.parquet: holds question_id"): run.run(False)
    part.write_bytes(kept_part)
    assert run.run(False).rows.scorer.nunique() == 1

def test_a_shard_of_another_prediction_is_refused(plain):
    items, store, pool = plain.job.inputs()
    def shard(name, i, scorer=None, picker="similar_mixed"):
        picking = Picking(picker=picker, shots=(1,), name="same")
        scorer = scorer or MockScorer()
        return predict(plain.home/name, pool, items, scorer, store, picking, shard=(i, 2), progress=False)
    shard("other", 1, MockScorer(1))
    shard("whole", 0)
    shutil.copytree(plain.home/"other"/"shard-001of002", plain.home/"whole"/"shard-001of002")
    says = "shard-001of002: not a shard of this prediction, other scorer"
    with pytest.raises(ValueError, match=says): shard("whole", 0)
    shutil.rmtree(plain.home/"whole"/"shard-001of002")
    assert not shard("whole", 1).left

@pytest.mark.filterwarnings("ignore")
def test_a_state_of_another_fit_is_refused(kept):
    state = kept.home/"trained"/"state"/"listwise"/"state.pt"
    own = state.read_bytes()
    before = load_selector(kept.home/"trained"/"checkpoint").state_dict()
    train, dev = groups_of(kept)
    teaching = Teaching(objective="listwise", epochs=2, bs=8, seed=1)
    train_run(kept.home/"second", TrainingData(kept.job, train, dev), teaching, say=lambda line: None)
    shutil.copy(kept.home/"second"/"state"/"listwise"/"state.pt", state)
    with pytest.raises(ValueError, match="state.pt: was copied here from another fit"): trained(kept, train, dev)
    state.write_bytes(own)
    trained(kept, train, dev)
    after = load_selector(kept.home/"trained"/"checkpoint").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)

def test_a_sweep_over_groups_of_other_pictures_is_refused(plain):
    train = change(plain.job, split="train").run(plain.home/"train", progress=False)
    dev = plain.job.run(plain.home/"dev", progress=False)
    demo_picture(plain)
    items, store, _ = plain.job.inputs()
    world = SimpleNamespace(items=items, store=store, scorer=MockScorer())
    base = {"objective": "listwise", "listwise.n_epoch": 1}
    with pytest.raises(ValueError, match="sweep: the groups of train: .* question_id"):
        sweep(plain.home/"sweep", {"reward": ["soft_only"]}, dict(train=train, dev=dev), world, [0], base)
    assert not (plain.home/"sweep"/"cells.jsonl").exists()

# ---- a folder that leads elsewhere ---------------------------------------------------------------------------

def test_another_folder_of_pictures_with_the_same_names(plain):
    images = plain.data/"images"
    shutil.move(images, plain.home/"upright")
    shutil.copytree(plain.home/"upright", plain.home/"turned")
    one = sorted((plain.home/"turned").glob("COCO_dev*"))[0]
    turned(one)
    images.symlink_to(plain.home/"upright")
    items, store, pool = plain.job.inputs()
    query = plain.ids_of(str(images/one.name))[0]
    pairs = pd.DataFrame(dict(question_id=[query], pointer=[(pool[query][0],)]))
    cache = FactCache()
    before = ask(pairs, MockScorer(), items, cache)
    run = plain.job.generation(plain.home/"run")
    run.begin()
    run.window(0)
    images.unlink()
    images.symlink_to(plain.home/"turned")
    assert plain.job.inputs()[1].fingerprint != store.fingerprint
    with pytest.warns(UserWarning, match=f"question_id {query}"): after = ask(pairs, MockScorer(), items, cache)
    assert after.content[0] != before.content[0]
    with pytest.raises(ValueError, match=f"the pictures of question_id {query}"):
        plain.job.run(plain.home/"run", progress=False)

def test_the_same_words_in_another_working_folder(plain, monkeypatch):
    other = Kept(plain.home/"elsewhere")
    turned(other.picture("dev", 0))
    relative = change(plain.job, data="data", store=str(plain.home/"store"))
    stores = []
    for home in (plain.home, other.home):
        monkeypatch.chdir(home)
        items, store, _ = relative.inputs()
        fresh = embed_items(items, str(plain.clip), device="cpu", progress=False)
        assert torch.allclose(store.image, fresh.image, atol=1e-6)
        stores.append(store.fingerprint)
    assert stores[0] != stores[1]

@pytest.mark.parametrize("column", ["answer", "answers"])
def test_an_answer_alone_is_another_item(plain, column):
    items, _, pool = plain.job.inputs()
    query = next(iter(pool))
    pairs = pd.DataFrame(dict(question_id=[query], pointer=[(pool[query][0],)]))
    cache = FactCache()
    ask(pairs, MockScorer(), items, cache)
    other = items.copy()
    place = pool[query][0] if column == "answer" else query
    other.at[place, column] = "vex huba" if column == "answer" else ["vex huba"]*10
    with pytest.warns(UserWarning, match=f"question_id {query}"): now = ask(pairs, MockScorer(), other, cache)
    pd.testing.assert_frame_equal(now, ask(pairs, MockScorer(), other))
