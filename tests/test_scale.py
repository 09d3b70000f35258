"Jobs: the same rows from paths, in one process, in shards, and on Ray actors; kills"
import json, os, pickle, shutil, signal, subprocess, sys, textwrap, time
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from leverplus.core import read_json, repo_path
from leverplus.data import BadItems
from leverplus.groups import RLData
from leverplus.runs import Busy
from leverplus.embed import EmbedStore
from leverplus.pools import encoder_of
from leverplus.rldata_ask import FactCache, ask
from leverplus.rldata_scale import RayWorker, Splits, embed_splits, generate_ray
from leverplus.plan import embed_plan, expected_speed, generate_plan
from leverplus.settings import Job, change, plain_settings, read_settings, settings_of

SOFT = ["vqa_gt_prob", "vqa_gt_logprobs"]

def same(a, b, atol=1e-4):
    "Equal rows; probabilities to `atol`"
    pd.testing.assert_frame_equal(a.rows.drop(columns=SOFT), b.rows.drop(columns=SOFT))
    np.testing.assert_allclose(a.rows.vqa_gt_prob, b.rows.vqa_gt_prob, rtol=0, atol=atol)

@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    "A store folder for all jobs of this file: the embedded world is embedded once"
    return str(tmp_path_factory.mktemp("store"))

@pytest.fixture(scope="module")
def mock(kept): return settings_of(Job, lvlm="mock", store=kept, limit=24, window=2, test=4)

@pytest.fixture(scope="module")
def tiny(kept):
    counts = dict(beam=2, random=2)
    return settings_of(Job, store=kept, limit=8, window=2, test=4, device="cpu", counts=counts)

# ---- jobs --------------------------------------------------------------------------------------------------

def test_a_job_is_small_and_survives_every_journey(mock):
    odd = change(mock, shots=[1, 2], counts={"temperature": {"1.3": 2}, "beam": 1}, limit=None)
    for j in (mock, odd):
        said = json.dumps(plain_settings(j))
        assert pickle.loads(pickle.dumps(j)) == j == read_settings(Job, json.loads(said))
        assert len(pickle.dumps(j)) < 2000
    assert odd.proposing.shots == (1, 2) and odd.proposing.counts["temperature"] == {1.3: 2}

@pytest.mark.parametrize(
    "bad, says",
    [
        (dict(reader="gqa"), "'okvqa', 'vqav2'"),
        (dict(sampler="best"), "'random', 'text'"),
        (dict(dtype="int8"), "bfloat16"),
        (dict(style="prose"), "interleaved"),
        (dict(K=2, shots=(2,)), "shots < K"),
        (dict(prefix_cache="on"), "'off', 'query', 'global'"),
        (dict(window=0), "window 0"),
        (dict(limit=0), "limit 0"),
        (dict(counts=dict(beams=3)), "beams"),
        (dict(shots=()), "shots"),
    ],
)
def test_bad_jobs_say_so_at_once(bad, says):
    with pytest.raises(ValueError, match=says): settings_of(Job, **bad)

def test_missing_data_are_named(tmp_path):
    nowhere = settings_of(Job, data=str(tmp_path/"nowhere"))
    with pytest.raises(FileNotFoundError, match="nowhere"): nowhere.items()
    with pytest.raises(FileNotFoundError, match="split 'val'"): settings_of(Job, split="val").items()
    with pytest.raises(FileNotFoundError, match="no such folder of images"):
        settings_of(Job, images=str(tmp_path / "none")).items()

def test_a_data_set_can_be_read_without_its_pictures(tmp_path):
    how = dict(lvlm="mock", store=str(tmp_path/"s"), split="dev", sampler="text", K=8, limit=5)
    job = settings_of(Job, images="none", **how)
    items, store, pool = job.inputs()
    assert items.image_path.isna().all() and store.kinds == ("text",)
    assert job.inputs()[1].fingerprint == store.fingerprint
    data = job.run(tmp_path/"run", progress=False)
    assert data.manifest["settings"]["proposing"]["kind"] == "text"
    assert data.manifest["job"]["data"]["images"] == "none"
    blind = expected_speed(items[:20])
    pictured = expected_speed(settings_of(Job, split="dev").items()[:20])
    assert blind.images is None and "images of 0 tokens" in blind.why and pictured.images > 0
    assert blind.prompts > pictured.prompts
    with pytest.raises(ValueError, match="kind 'mixed': these items have no pictures; choose 'text'"):
        change(job, kind="mixed").run(tmp_path/"mixed")

def test_inputs_are_made_once_and_equal_when_made_again(tmp_path, monkeypatch):
    import leverplus.rldata_scale as s
    job = settings_of(Job, lvlm="mock", store=str(tmp_path/"s"), split="dev", sampler="mixed", K=8, limit=5)
    items, store, pool = job.inputs()
    # nobody may make them again
    monkeypatch.setattr(s, "embed_items", None)
    monkeypatch.setattr(s, "make_pool", None)
    _, again, pool2 = job.inputs()
    assert again.fingerprint == store.fingerprint
    assert pool2 == pool
    assert len(pool) == 250
    assert set(items.split) == {"train", "dev"}
    with pytest.raises(TypeError): change(job, K=9).inputs() # another pool has to be made
    for f in (tmp_path/"s").glob("*/done"): f.unlink() # killed before it was whole
    with pytest.raises(TypeError): job.inputs()
    monkeypatch.undo()
    fresh = change(job, store=None).inputs()
    assert fresh[1].fingerprint == store.fingerprint and fresh[2] == pool

def test_the_embedded_world_as_a_job_has_the_facts_of_the_demo(tmp_path, kept):
    from leverplus.demo import make_groups
    from leverplus.world import world
    groups = make_groups(world("islands"), tmp_path/"demo", train_queries=6, dev_queries=4, progress=False)
    for split, n in dict(train=6, dev=4).items():
        job = settings_of(Job, split=split, limit=n, store=kept)
        data = job.run(tmp_path / split, progress=False)
        want = groups[split]
        assert data.pool == want.pool and data.rows.scorer.equals(want.rows.scorer)
        near = ["logprob_score", "similarity_score", *SOFT] # embeddings come from other batches
        pd.testing.assert_frame_equal(data.rows.drop(columns=near), want.rows.drop(columns=near))
        np.testing.assert_allclose(data.rows[near[:3]], want.rows[near[:3]], atol=1e-4)
        # the demo embeds the test split too
        a, b = data.manifest["settings"], want.manifest["settings"]
        assert {k for k in a if a[k] != b[k]} <= {"store"}

def test_real_okvqa(tmp_path, okvqa):
    "The reader, pools and rows of real questions, with blank images and a model that is a hash"
    from PIL import Image
    raw = read_json(okvqa / "OpenEnded_mscoco_val2014_questions.json")
    raw["questions"] = qs = raw["questions"][:60]
    root = tmp_path / "okvqa"
    (root / "images").mkdir(parents=True)
    labels = [
        l
        for l in read_json(okvqa / "val_soft_labels.json")
        if l["question_id"] in {q["question_id"] for q in qs}
    ]
    for name, d in (("OpenEnded_mscoco_val2014_questions", raw), ("val_soft_labels", labels)):
        (root / f"{name}.json").write_text(json.dumps(d))
    for k, i in enumerate({q["image_id"] for q in qs}):
        Image.new("RGB", (32, 32), (k % 256, k * 7 % 256, 90)).save(
            root / "images" / f"COCO_val2014_{i:012d}.jpg"
        )
    job = settings_of(
        Job,
        data=str(root),
        reader="soft_labels",
        split="val",
        candidates="val",
        lvlm="mock",
        store=str(tmp_path / "s"),
        K=20,
        limit=10,
        window=4,
        test=4,
    )
    whole = job.run(tmp_path / "one", progress=False)
    for i in range(2): job.run(tmp_path/"two", shard=(i, 2), progress=False)
    pd.testing.assert_frame_equal(RLData.load(tmp_path / "two").rows, whole.rows)
    assert whole.queries == [q["question_id"] for q in qs[:10]] and whole.pool.K == 20
    next((root/"images").iterdir()).write_bytes(b"")
    with pytest.raises(BadItems, match="image file is empty"): job.items()

def test_a_job_in_shards_and_verified(tmp_path, tiny):
    whole = change(tiny, verify=2).run(tmp_path/"one", progress=False)
    for i in range(2): change(tiny, verify=1).run(tmp_path/"two", shard=(i, 2), progress=False)
    union = RLData.load(tmp_path / "two")
    same(union, whole)
    v = whole.manifest["verify"]
    assert v["asked"] == 2 and 0 <= v["logprob"] < v["tolerance"] == 1e-3 and v["text"] == 0
    assert union.manifest["settings"] == whole.manifest["settings"] and union.manifest["verify"]["asked"] == 2

def test_settings_that_change_no_fact_may_change_on_the_way(tmp_path, tiny):
    "Batches, caches and the folder's place are not settings; type and style are"
    tiny.run(tmp_path / "r", progress=False)
    free = change(tiny, batch_tokens=512, prefix_cache="global", vision_dir=str(tmp_path / "v"), store=None)
    assert len(free.run(tmp_path/"r", progress=False)) == 8*4
    for bad in (dict(dtype="bfloat16"), dict(style="chat"), dict(limit=7), dict(pool_seed=1)):
        with pytest.raises(ValueError, match="belong to other settings"):
            change(tiny, **bad).run(tmp_path / "r", progress=False)

def test_a_run_keeps_the_job_that_repeats_it(tmp_path, mock):
    mock = change(mock, verify=1, two_stage=dict(top=2), style="chat", max_failed=.5)
    data = mock.run(tmp_path/"r", progress=False)
    again = read_settings(Job, read_json(tmp_path/"r"/"manifest.json")["job"])
    assert again == mock
    repeated = again.run(tmp_path/"again", progress=False)
    pd.testing.assert_frame_equal(repeated.rows, data.rows)
    assert repeated.manifest["settings"] == data.manifest["settings"]
    # what no row depends on may change on the way, and the manifest says what it is now
    more = change(mock, verify=3, batch_tokens=99)
    assert read_settings(Job, more.run(tmp_path/"r", progress=False).manifest["job"]) == more
    for i in range(2): mock.run(tmp_path/"shards", shard=(i, 2), progress=False)
    assert read_settings(Job, RLData.load(tmp_path/"shards").manifest["job"]) == mock

# ---- embeddings in parts -----------------------------------------------------------------------------------

@pytest.fixture
def dev(tmp_path): # a small data set: 250 questions about 125 pictures
    return settings_of(Job, split="dev", candidates="dev", lvlm="mock", store=str(tmp_path/"s"), device="cpu")

def test_parts_of_embeddings_make_the_whole(tmp_path, dev, monkeypatch):
    "The same fingerprint as in one go, where `Job.inputs` looks for it; nothing is embedded twice"
    import leverplus.rldata_scale as s
    whole = change(dev, store=str(tmp_path/"whole")).inputs()[1]
    splits = Splits(dev, ["dev", "dev"])
    assert splits.to_do() == ["dev"] and len(splits.every) == 250
    first = embed_splits(splits, (1, 3), progress=False)
    assert first.left == ["000of003", "002of003"]
    folder = splits.parts_folder()
    assert first.lines() == [f"{folder}: 1 of 3 parts are there; still to come: 000of003, 002of003"]
    assert not dev.embed_place().exists()
    real = s.embed_items
    asked = []
    def embed(items, *a, **k):
        asked.append(len(items))
        return real(items, *a, **k)
    monkeypatch.setattr(s, "embed_items", embed)
    assert embed_splits(splits, (0, 3), progress=False).left == ["002of003"]
    assert embed_splits(splits, (1, 3), progress=False).left == ["002of003"]        # it lies there
    assert len(asked) == 1
    done = embed_splits(splits, (2, 3), progress=False)
    assert done.left == done.before == [] and len(asked) == 2
    assert done.lines() == [f"dev: 250 items with their candidates, {dev.embed_place()}"]
    assert not list(folder.glob("*/[!.]*")) # parts are removed, locks stay
    again = embed_splits(splits, parts=5, progress=False)
    assert again.before == ["dev"] and len(asked) == 2
    assert again.lines()[0].endswith("(was there)")
    store = dev.inputs()[1]
    assert len(asked) == 2
    assert store.fingerprint == whole.fingerprint
    torch.testing.assert_close(store.get(store.ids), whole.get(store.ids), atol=1e-5, rtol=0)

def test_a_kill_costs_one_part(tmp_path, dev, monkeypatch):
    import leverplus.rldata_scale as s
    real = s.embed_items
    asked = []
    def embed(items, *a, **k):
        asked.append(len(items))
        if len(asked) == 2: raise KeyboardInterrupt
        return real(items, *a, **k)
    monkeypatch.setattr(s, "embed_items", embed)
    splits = Splits(dev, ["dev"])
    with pytest.raises(KeyboardInterrupt): embed_splits(splits, parts=3, progress=False)
    assert [f.parent.name for f in splits.parts_folder().glob("*/done")] == ["000of003"]
    assert embed_splits(splits, parts=3, progress=False).left == []
    assert len(asked) == 4 and splits.to_do() == []
    assert EmbedStore.load(dev.embed_place()).fingerprint == dev.inputs()[1].fingerprint

def test_parts_that_a_kill_left_beside_the_whole_are_removed_by_the_next_start(dev, monkeypatch):
    "Not while somebody is at one of them, and not where nothing can be written"
    from leverplus.rldata_generate import run_lock
    splits = Splits(dev, ["dev"])
    embed_splits(splits, progress=False)
    def left(): return [p.name for p in splits.parts_folder().rglob("*") if p.is_file() and p.name[0] != "."]
    def put(): (splits.parts_folder()/"000of001"/"embed.json").write_text("{}")
    assert left() == []
    put()
    with run_lock(splits.parts_folder()/"000of001"): embed_splits(splits, progress=False)
    assert left() == ["embed.json"]
    with monkeypatch.context() as m:
        m.setattr("leverplus.rldata_scale.os.access", lambda *_: False)
        embed_splits(splits, progress=False)
    assert left() == ["embed.json"]
    embed_splits(splits, progress=False)
    assert left() == []

def test_a_part_that_somebody_makes_is_left_to_them(dev):
    from leverplus.rldata_generate import run_lock
    splits = Splits(dev, ["dev"])
    with run_lock(splits.parts_folder()/"000of002"):
        with pytest.raises(Busy, match="is writing this run"): embed_splits(splits, (0, 2), progress=False)
        assert embed_splits(splits, (1, 2), progress=False).left == ["000of002"]

def test_somebody_else_may_be_the_last(dev, monkeypatch):
    "They put all together, and remove the parts, before this process has looked which are there"
    import leverplus.rldata_scale as s
    splits = Splits(dev, ["dev"])
    real = s._embed_part
    def embed(splits, shard, folder, progress):
        real(splits, shard, folder, progress)
        if shard == (0, 2): assert embed_splits(splits, (1, 2), progress=False).left == []
    monkeypatch.setattr(s, "_embed_part", embed)
    assert embed_splits(splits, (0, 2), progress=False).left == []
    assert splits.to_do() == []

@pytest.fixture
def own(tmp_path, dev):
    "(the small data set with pictures of its own, a function that exchanges the pictures of two items)"
    pictures = tmp_path/"images"
    pictures.mkdir()
    for path in dev.items().image_path.unique(): shutil.copy(path, pictures)
    job = change(dev, images=str(pictures))
    def exchange(a, b):
        paths = job.items().image_path
        one, other = (Path(paths[i]).read_bytes() for i in (a, b))
        Path(paths[a]).write_bytes(other)
        Path(paths[b]).write_bytes(one)
    return job, exchange

def test_replaced_pictures_are_embedded_again(own, monkeypatch):
    "The same ids, the same store folder: the vectors are those of the pictures that are there"
    import leverplus.rldata_scale as s
    job, exchange = own
    items, before, _ = job.inputs()
    twins = items.groupby("image_id").question_id.apply(list)
    a, b = twins.iloc[0][0], twins.iloc[7][0]
    changed = [*twins.iloc[0], *twins.iloc[7]]
    exchange(a, b)
    _, store, _ = job.inputs()
    true = s.embed_items(items, progress=False, device="cpu")
    assert torch.equal(store.image, true.image) and torch.equal(store.text, true.text)
    assert store.fingerprint == true.fingerprint != before.fingerprint
    cosine = (store.get(items.index, "image") * before.get(items.index, "image")).sum(-1)
    assert ((cosine < .999).numpy() == items.index.isin(changed)).all()
    assert torch.equal(store.get(a, "image"), before.get(b, "image"))
    exchange(a, b)                                                   # back: the old ones are there still
    monkeypatch.setattr(s, "embed_items", None)
    assert job.inputs()[1].fingerprint == before.fingerprint

def test_facts_of_the_real_model_follow_the_pictures(tmp_path, own):
    "The same ids and the same cache after pictures were exchanged: the facts of a cache that never saw the others"
    job, exchange = own
    items = job.items()
    scorer = change(job, lvlm="models/tiny-qwen2.5-vl").scorer()
    twins = items.groupby("image_id").question_id.apply(list)
    a, b, c, d = (twins.iloc[i][0] for i in (0, 7, 12, 20))
    pairs = pd.DataFrame(dict(question_id=[a, b, c, a], pointer=[(c,), (d,), (d,), ()]))
    cache = FactCache(tmp_path/"facts")
    before = ask(pairs, scorer, items, cache)
    exchange(a, b)
    with pytest.warns(UserWarning, match="3 of 4 facts"): after = ask(pairs, scorer, items, cache)
    fresh = ask(pairs, change(job, lvlm="models/tiny-qwen2.5-vl").scorer(), items, FactCache())
    np.testing.assert_allclose(after.vqa_gt_prob, fresh.vqa_gt_prob, rtol=1e-4)
    assert after.vqa_pred_answer.tolist() == fresh.vqa_pred_answer.tolist()
    gap = (np.log(after.vqa_gt_prob) - np.log(before.vqa_gt_prob)).abs()
    assert (gap > 1e-3).tolist() == [True, True, False, True]

def test_two_clips_of_one_name_have_two_stores(tmp_path, dev):
    from safetensors.torch import load_file, save_file
    for name in "xy": shutil.copytree(repo_path("models", "tiny-clip"), tmp_path/name/"tiny-clip")
    file = tmp_path/"y"/"tiny-clip"/"model.safetensors"
    weights = load_file(file)
    weights["visual_projection.weight"] += .1
    save_file(weights, file, metadata=dict(format="pt"))
    x, y = (change(dev, clip=str(tmp_path/name/"tiny-clip")) for name in "xy")
    same, other = x.inputs()[1], y.inputs()[1]
    assert dev.embed_place() == x.embed_place() != y.embed_place()       # a folder's name and place do not count
    assert not torch.allclose(same.image, other.image)
    shutil.rmtree(y.embed_place())
    shutil.copytree(x.embed_place(), y.embed_place())                    # somebody mixed them up
    with pytest.raises(ValueError, match="embeddings of another CLIP than asked for: remove the folder"): y.inputs()

def test_parts_of_other_pictures_are_never_put_together(own):
    job, exchange = own
    before = Splits(job, ["dev"])
    assert embed_splits(before, (0, 2), progress=False).left == ["001of002"]
    ids = job.items().index
    exchange(ids[0], ids[-1])
    after = Splits(job, ["dev"])
    assert after.parts_folder() != before.parts_folder()                # each as it was when it was opened
    assert embed_splits(after, (1, 2), progress=False).left == ["000of002"]
    assert embed_splits(after, (0, 2), progress=False).left == []
    from leverplus.embed import embed_items
    true = embed_items(job.items(), progress=False, device="cpu")
    assert job.inputs()[1].meta["image_hash"] == true.meta["image_hash"]

def test_pictures_replaced_while_they_are_embedded(own, monkeypatch):
    import leverplus.rldata_scale as s
    job, exchange = own
    ids = job.items().index
    real = s.embed_items
    def late(items, *a, **k):
        exchange(ids[0], ids[-1])
        return real(items, *a, **k)
    monkeypatch.setattr(s, "embed_items", late)
    with pytest.raises(ValueError, match=f"of other pictures .* first that of question_id {ids[0]}"): job.inputs()
    with pytest.raises(ValueError, match="of other pictures"): embed_splits(Splits(job, ["dev"]), progress=False)
    monkeypatch.setattr(s, "embed_items", real)
    assert len(job.inputs()[1]) == 250

def test_a_plan_loads_the_clip_once(own, monkeypatch):
    import leverplus.rldata_scale as s
    job, _ = own
    loaded = []
    def load(*a, **k):
        loaded.append(a)
        return real(*a, **k)
    real = s.load_clip
    monkeypatch.setattr(s, "load_clip", load)
    splits = Splits(job, ["dev"])
    embed_plan(splits)
    embed_splits(splits, parts=2, progress=False).lines()
    assert len(loaded) == 1
    generate_plan(job, job.data.store)
    assert len(loaded) == 1

def test_workers_look_at_the_items_of_their_windows(tmp_path, own):
    "A worker compares what it is about to make; whoever goes on compares all"
    job, exchange = own
    job = change(job, limit=6, window=2, test=0)
    w = RayWorker(job, tmp_path/"r")
    assert w.window(0)["error"] == ""
    ids = w.run.windows[1]
    exchange(ids[0], w.run.windows[2][0])
    assert f"the pictures of question_id {min(w.run.windows[0] + ids)}" not in w.window(0)["error"]
    fresh = RayWorker(job, tmp_path/"r")
    assert "belong to other settings (store: there" in fresh.window(1)["error"]       # it embeds the new ones

def test_splits_share_what_is_embedded(tmp_path, kept):
    "Each split has its candidates beside it; every item is embedded once, and lies in each store that wants it"
    job = settings_of(Job, store=str(tmp_path/"s"), candidates="dev", device="cpu")
    splits = Splits(job, ["dev", "test"])
    assert len(splits.every) < sum(map(len, splits.items.values()))
    with pytest.raises(FileNotFoundError, match="split 'val'"): Splits(job, ["val"])
    with pytest.raises(ValueError, match="no split"): Splits(job, [])
    with pytest.raises(ValueError, match="store None"): Splits(change(job, store=None), ["dev"])

# ---- workers -----------------------------------------------------------------------------------------------

def test_a_worker_makes_windows_and_reports_errors_as_rows(tmp_path, mock):
    w = RayWorker(change(mock, verify=3), tmp_path / "r")
    out = w(dict(window=np.array([0, 5])))
    assert [json.loads(t)["rows"] for t in out["tally"]] == [30, 30]
    assert out["error"] == ["", ""]
    assert len(list((tmp_path / "r").glob("part-*"))) == 2
    assert out["end"][0] >= out["start"][0]
    assert sum(len(json.loads(s)) for s in out["seen"]) <= 3
    assert len(set(map(len, out.values()))) == 1
    assert out["left"] == [False, False]
    no_time = RayWorker(mock, tmp_path/"r", until=time.time())(dict(window=[1]))
    assert no_time["left"] == [True] and no_time["tally"] == ["{}"] and no_time["error"] == [""]
    bad = RayWorker(change(mock, seed=1), tmp_path / "r")(dict(window=[1]))
    assert "proposing.seed: there 0, here 1" in bad["error"][0]
    assert bad["tally"] == ["{}"]
    assert len(list((tmp_path / "r").glob("part-*"))) == 2
    gone = RayWorker(change(mock, lvlm=str(tmp_path / "no-model")), tmp_path / "x")(dict(window=[0]))
    assert "no-model" in gone["error"][0]
    late = RayWorker(mock, tmp_path / "r")
    late.run.items = late.run.items.drop(late.run.windows[3][0])
    assert "KeyError" in late(dict(window=[3]))["error"][0]

def test_a_selector_that_does_not_fit_is_refused_before_anything_is_written(tmp_path, mock):
    from leverplus.rldata_generate import policy_fingerprint
    from leverplus.runs import plain
    from leverplus.selector import PointerSelector
    _, store, pool = mock.inputs()
    make = lambda width=store.dim("mixed"), info=None, **kw: (
        m := PointerSelector(width, d_hidden=8, **kw),
        setattr(m, "info", info),
    )[0]
    rule = plain(pool.rule)
    for m, says in [
        (make(info=dict(kind="image")), "kind 'image', this job has 'mixed'"),
        (make(7), "vectors of 7 numbers"),
        (make(max_shots=1), "picks at most 1"),
        (make(info=dict(pool=rule | dict(K=64))), "K: 64 in the checkpoint"),
        (make(info=dict(encoder="0123")), f"of CLIP 0123, these are of CLIP {encoder_of(store)}"),
    ]:
        with pytest.raises(ValueError, match=says): mock.run(tmp_path/"r", policy=m, progress=False)
        assert says in RayWorker(mock, tmp_path / "r", policy=m)(dict(window=[0]))["error"][0]
        assert not (tmp_path / "r").exists()
    good = make(info=dict(kind="mixed", pool=rule))
    mock.run(tmp_path / "r", policy=good, progress=False)
    other = make(info=dict(pool=rule | dict(K=64)))
    mock.run(tmp_path/"o", policy=other, other_pool=True, progress=False)
    # the same weights, another temperature
    hot = make(temp=1.0)
    hot.load_state_dict(good.state_dict())
    assert policy_fingerprint(hot) != policy_fingerprint(good)
    with pytest.raises(ValueError, match="policy: there"): mock.run(tmp_path/"r", policy=hot, progress=False)

def test_without_ray_it_says_what_to_install(tmp_path, mock, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[ray\]'.*shard=\(i, n\)"):
        generate_ray(mock, tmp_path / "r")
    assert not (tmp_path/"r").exists()

@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("RAY_worker_niceness", "0")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100_000_000)
        yield ray
        ray.shutdown()

def test_two_ray_actors_make_what_one_process_makes(tmp_path, mock, ray):
    "Here what a selector proposes, which goes along to the actors"
    from leverplus.selector import PointerSelector

    _, store, _ = mock.inputs()
    torch.manual_seed(0)
    policy = PointerSelector(store.dim("mixed"), d_hidden=16, prior=False).eval()
    mock = change(mock, verify=4)
    whole = mock.run(tmp_path / "one", progress=False, policy=policy)
    seen = []
    data = generate_ray(
        mock, tmp_path / "ray", workers=2, progress=False, each=seen.append, policy=policy
    )
    pd.testing.assert_frame_equal(data.rows, whole.rows)
    assert data.fingerprint == whole.fingerprint and data.manifest["settings"] == whole.manifest["settings"]
    assert (
        sorted(p.name for p in (tmp_path / "ray").glob("part-*"))
        == sorted(p.name for p in (tmp_path / "one").glob("part-*"))
        and data.manifest["parts"] == whole.manifest["parts"]
    )
    a, b = (sorted(d.manifest["verify"]["rows"], key=lambda r: r["question_id"]) for d in (data, whole))
    assert a == b and len(a) == 4 and data.manifest["self_test"] == whole.manifest["self_test"]
    assert sorted(s["window"] for s in seen) == list(range(12))
    assert len({s["worker"] for s in seen}) == 2
    assert ray.is_initialized()
    # continued: two windows are lost, and only they are made again; too many workers are refused
    for i in (3, 7): (tmp_path/"ray"/f"part-{i:05d}.parquet").unlink()
    again = generate_ray(
        mock, tmp_path / "ray", workers=1, progress=False, each=(more := []).append, policy=policy
    )
    pd.testing.assert_frame_equal(again.rows, whole.rows)
    assert sorted(s["window"] for s in more) == [3, 7] and again.manifest["verify"]["asked"] == 4
    with pytest.raises(ValueError, match="ask for 3 CPUs"):
        generate_ray(mock, tmp_path / "ray", workers=3, progress=False)
    # similarity does not go on where a selector began
    with pytest.raises(RuntimeError, match="policy: there"):
        generate_ray(mock, tmp_path / "ray", workers=1, progress=False)

def test_what_a_worker_cannot_do_stops_the_driver(tmp_path, mock, ray, monkeypatch):
    "Workers in this process, behind the driver's own door"
    import leverplus.rldata_scale as s
    local = lambda data, todo, workers, threads, gpus, args, kw: (
        {k: v[0] for k, v in RayWorker(*args, **kw)(dict(window=[i])).items()} for i in todo
    )
    monkeypatch.setattr(s, "_stream", local)
    run = lambda job, **kw: generate_ray(job, tmp_path / "r", workers=1, progress=False, **kw)
    with pytest.raises(RuntimeError, match="window 0: .*no-model"):
        run(change(mock, lvlm=str(tmp_path / "no-model")))
    whole = run(mock)
    assert whole.manifest["complete"] and len(whole) == 24 * 15
    # though all its windows lie there
    other_seed = "window 0: ValueError: .*proposing.seed: there 0, here 1(.|\\n)*Traceback"
    with pytest.raises(RuntimeError, match=other_seed):
        run(change(mock, seed=1))
    # windows on disk, opened again to verify them
    assert run(change(mock, verify=3)).manifest["verify"]["asked"] == 3
    part = generate_ray(mock, tmp_path / "s", workers=1, shard=(0, 2), progress=False)
    assert part.manifest["shard"] == [0, 2] and 0 < len(part.queries) < 24

DRIVER = """
    import sys; sys.path.insert(0, {root!r})
    from leverplus.rldata_scale import generate_ray
    from leverplus.settings import Job, read_settings
    import ray, time
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100_000_000)
    def hang(out):
        print(out["window"], flush=True)
        time.sleep(600)
    generate_ray(read_settings(Job, {job!r}), {path!r}, workers=1, progress=False, each=hang)
"""

def test_kill_9_of_the_ray_driver(tmp_path, mock):
    "Its actor dies with it; the directory is free, and what lies there is not asked again"
    pytest.importorskip("ray")
    job = change(mock, limit=160)
    code = textwrap.dedent(DRIVER).format(
        root=str(Path(__file__).parent.parent), job=plain_settings(job), path=str(tmp_path / "r")
    )
    p = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env=dict(os.environ, OMP_NUM_THREADS="1", RAY_worker_niceness="0"),
    )
    assert p.stdout.readline().strip().isdigit() # a window is done, the driver hangs, the actor goes on
    with pytest.raises(Busy, match=f"process {p.pid} on"): job.run(tmp_path/"r", progress=False)
    p.send_signal(signal.SIGKILL)
    p.wait()
    p.stdout.close()
    count = lambda: len(list((tmp_path / "r").glob("part-*")))
    for _ in range(100): # until nobody writes any more
        n = count()
        time.sleep(0.3)
        if n == count(): break
    stamps = {f: f.stat().st_mtime_ns for f in (tmp_path / "r").glob("part-*")}
    assert stamps and not read_json(tmp_path / "r" / "manifest.json")["complete"]
    data = job.run(tmp_path/"r", progress=False) # one process finishes what the actor began
    pd.testing.assert_frame_equal(data.rows, job.run(tmp_path / "one", progress=False).rows)
    assert all(f.stat().st_mtime_ns == t for f, t in stamps.items())
    assert not list((tmp_path / "r").rglob(".*.tmp"))
