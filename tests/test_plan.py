"Plans: how fast, how long, how large, before anything is begun"
import math, os, re
import pandas as pd, pytest, torch
from hypothesis import given, strategies as st
from leverplus.core import repo_path
from leverplus.cost import PEAKS, REACHED, kv_bytes, parameters, prompt_flops, qwen_config, reached, vision_flops
from leverplus.plan import (
    KEPT_FEATURES, ROW_BYTES, Speed, asking_costs, asking_time, batch_bytes, config_of, distinct_images,
    download_text, dtype_of, embed_plan, expected_speed, generate_plan, image_tokens, is_here, measure_embedding,
    measure_speed, measured_rate, memory_text, plan_run, questions_there, released_size, sequences_of, size_text,
    some_pairs, speed_of, time_text, visual_tokens,
)
from leverplus.rldata_scale import Splits, embed_splits
from leverplus.settings import Job, change, settings_of

BIG = "Qwen/Qwen2.5-VL-3B-Instruct"

@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    "A store folder for all jobs of this file"
    return str(tmp_path_factory.mktemp("store"))

@pytest.fixture(scope="module")
def mock(kept): return settings_of(Job, lvlm="mock", store=kept, limit=24, window=2, test=4)

@pytest.fixture(scope="module")
def islands(): return Job().items()

# ---- on paper ----------------------------------------------------------------------------------------------

def test_a_plan_by_hand():
    p = plan_run(100., 1000, 36, (1, 2), bytes_per_row=50, images=10, feature_bytes=1e8)
    assert p.hours[1] == 0.1
    assert 0.05 < p.hours[2] < 0.06
    assert (p.gpu_hours == 0.1).all()
    assert (p.rows_gb == 1000 * 36 * 50 / 1e9).all()
    assert (p.features_gb == 1.0).all()
    with pytest.raises(ValueError, match="prompts_per_second"): plan_run(0.)

@given(st.floats(1, 1e4), st.integers(1, 10**7), st.integers(1, 64))
def test_more_gpus_never_take_longer_and_never_less_than_their_share(rate, queries, sequences):
    h = plan_run(rate, queries, sequences, (1, 2, 8, 64)).hours
    assert (h.diff().dropna() <= 1e-9 * h[1]).all() and (h * h.index >= h[1] * (1 - 1e-9)).all()

def test_how_long_and_how_large_in_words():
    assert time_text(3600*62, 62.) == "1 h at 62 prompts/s (given)"
    assert time_text(90, 1., "images", "measured") == "1.5 min at 1 images/s (measured)"
    assert time_text(0, 5.) == time_text(0, None) == "none: everything is there"
    assert "not known" in time_text(1, None)
    assert [size_text(n) for n in (2e9, 3e6, 4e3)] == ["2 GB", "3 MB", "4 kB"]
    assert asking_time(0, 5, Speed()) == "none: everything is there"
    assert asking_time(3600, 0, Speed(1., None, "given")) == "1 h at 1 prompts/s (given)"
    fast = Speed(60., 50., "seen")
    assert asking_time(6000, 500, fast) == "1.8 min at 60 prompts/s and 50 new images/s (seen) for 500 images"

@given(st.floats(.01, 1e4), st.floats(.01, 1e4), st.integers(0, 10**7), st.integers(0, 10**6))
def test_seconds_add_up(prompts, images, n, new):
    assert Speed(prompts, images).seconds(n, new) == pytest.approx(n/prompts + new/images)
    assert Speed(prompts).seconds(n, new) == pytest.approx(n/prompts)
    assert Speed(None, images).seconds(n, new) is None

# ---- measured ----------------------------------------------------------------------------------------------

class Clock:
    "A model that takes one second for a prompt and three for a new image, and the clock that it moves"
    lvlm = None
    fingerprint = "clock"
    def __init__(self): self.now, self.seen, self.asked = 0., set(), 0
    def time(self): return self.now
    def run(self, prompts, targets=None, generate=True, progress=False):
        from leverplus.lvlm import MockScorer
        images = {item.image for p in prompts for item in p.items}
        self.now += len(prompts) + 3*len(images - self.seen)
        self.seen |= images
        self.asked += len(prompts)
        return MockScorer().run(prompts, targets, generate)

@pytest.mark.parametrize("seconds, most", [(1., 2), (100., 60), (3000., 1400)])
def test_a_speed_is_that_of_the_model(monkeypatch, islands, seconds, most):
    "Images once, prompts each time, whatever was paid for at the beginning"
    clock = Clock()
    made = []
    def scorer(self):
        made.append(self)
        clock.now += 50. # loading does not count
        return clock
    monkeypatch.setattr(Job, "scorer", scorer)
    monkeypatch.setattr("leverplus.plan.time.perf_counter", clock.time)
    got = measure_speed(settings_of(Job, vision_dir="runs/features"), seconds=seconds, items=islands)
    assert got.prompts == pytest.approx(1.) and got.images == pytest.approx(1/3)
    assert re.match(r"measured just now: \d+ prompts and \d+ new images, ", got.why)
    assert clock.asked <= most
    assert made[0].model.vision_dir is None # nothing is written

def test_text_alone_has_no_images_to_measure(monkeypatch, islands):
    clock = Clock()
    clock.seen.add(None)
    monkeypatch.setattr(Job, "scorer", lambda self: clock)
    monkeypatch.setattr("leverplus.plan.time.perf_counter", clock.time)
    blind = islands.assign(image_path=None)
    assert measure_speed(Job(), seconds=100., items=blind) == Speed(
        1., None, measure_speed(Job(), seconds=100., items=blind).why,
    )

def test_the_real_model_is_measured(islands, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    speed = measure_speed(Job(), seconds=1., items=islands)
    assert math.isfinite(speed.prompts) and speed.prompts > 0
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize("how", [dict(), dict(shots=(0, 2)), dict(K=5), dict(split="dev"), dict(limit=2)])
def test_pairs_to_measure_with_are_like_those_of_the_job(islands, how):
    job = settings_of(Job, **how)
    made = some_pairs(islands if job.split == "train" else job.items(), job, job.proposing.shots, seed=1)
    some = [next(made) for _ in range(200)]
    items = job.items()
    for query, pointer, other in some:
        assert items.split[query] == job.split
        assert set(pointer) == set(other) and len(set(pointer)) == len(pointer)
        assert query not in pointer
        assert items.image_id[query] not in items.image_id[list(pointer)].tolist()
        assert all(items.split[p] == job.data.candidates for p in pointer)
    assert {len(p) for _, p, _ in some} == set(job.proposing.shots)
    pools = pd.Series([p for _, p, _ in some]).groupby([q for q, _, _ in some]).agg(lambda ps: len(set().union(*ps)))
    assert pools.max() <= job.pools.K
    again = some_pairs(items, job, job.proposing.shots, seed=1)
    assert [next(again) for _ in range(200)] == some

def test_the_rate_of_a_run_is_measured(tmp_path, mock):
    job = change(mock, limit=8)
    job.run(tmp_path/"run", progress=False)
    parts = sorted(tmp_path.glob("run/part-*.parquet"))
    assert len(parts) == 4
    for i, p in enumerate(parts): os.utime(p, (1000 + 10*i, 1000 + 10*i))
    assert measured_rate(tmp_path/"run") == 2*15/10
    assert speed_of(job, tmp_path/"run") == Speed(3., None, f"measured in {tmp_path/'run'}")
    for p in parts[:2]: p.unlink()
    assert measured_rate(tmp_path/"run") is measured_rate(tmp_path/"nowhere") is None

def test_a_speed_is_given_measured_expected_or_not_known(tmp_path, mock):
    assert speed_of(mock, tmp_path, 7.) == Speed(7., None, "given")
    assert speed_of(Job()) == speed_of(mock) == Speed()
    assert speed_of(change(mock, lvlm="somebody/else"), tmp_path) == Speed()
    big = change(mock, lvlm="Qwen/Qwen2.5-VL-7B-Instruct", batch_tokens=65_536)
    seven = speed_of(big)
    assert "EXPECTED, not measured: one H100 at 30% of its peak for text and 8% for images" in seven.why
    assert "images of 4 tokens, 1." in seven.why
    eight = speed_of(big, shots=(8,))
    three = speed_of(change(big, lvlm=BIG))
    small = speed_of(change(big, batch_tokens=100))
    assert eight.prompts < seven.prompts < three.prompts and small.prompts < seven.prompts
    assert three.images == pytest.approx(seven.images, rel=.01) # the same tower, but for its last layer
    assert speed_of(change(mock, limit=1), rate="measure").why.startswith("measured just now")

# ---- expected ----------------------------------------------------------------------------------------------

def test_a_speed_from_sizes_and_answers(tmp_path):
    from PIL import Image
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    def tokens(size, **budget):
        made = Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, size=budget)
        return int(made(Image.new("RGB", size), return_tensors="pt")["image_grid_thw"].prod()) // 4
    for size in ((640, 480), (37, 200), (56, 56), (1200, 801)): # as the processor has it
        assert visual_tokens(*size) == tokens(size, shortest_edge=3136, longest_edge=12_845_056)
        small = visual_tokens(*size, min_pixels=784, max_pixels=50*784)
        assert small == tokens(size, shortest_edge=784, longest_edge=50*784) <= 50
    for q, size in enumerate(((640, 480), (480, 640))): Image.new("RGB", size).save(tmp_path/f"{q}.png")
    items = pd.DataFrame(dict(
        question_id=[0, 1], image_path=[str(tmp_path/f"{q}.png") for q in (0, 1)],
        answers=[["a", "a", "b"], ["a", "b", "c", "d"]],
    ))
    assert image_tokens(items) == 391 and image_tokens(items, max_pixels=100*784) <= 100
    got = expected_speed(items, (1, 3), "7b", "A100")
    def cost(S):
        return prompt_flops(qwen_config("7b"), [391]*(S + 1), 20*(S + 1), answers=3, known_images=1.).total
    share = reached(65_536)
    assert got.prompts == pytest.approx(share["language"] * PEAKS["A100"] * 2/(cost(1) + cost(3)))
    assert got.images == pytest.approx(share["vision"] * PEAKS["A100"]/vision_flops(qwen_config("7b"), 4*391))
    (tmp_path/"1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="question_id 1: image .*1.png cannot be opened"): expected_speed(items)
    with pytest.raises(ValueError, match="no items"): expected_speed(items[:0])

def test_a_card_reaches_what_it_was_seen_to_reach():
    assert reached(65_536)["language"] == reached(10**6)["language"] == REACHED[65_536]
    assert reached(1)["language"] == reached(8_192)["language"] == reached(32_767)["language"] == REACHED[8_192]
    assert list(REACHED) == sorted(REACHED) and list(REACHED.values()) == sorted(REACHED.values())

# ---- memory, download, disk --------------------------------------------------------------------------------

def weights_of(config):
    from transformers import AutoModelForImageTextToText
    with torch.device("meta"): model = AutoModelForImageTextToText.from_config(config)
    return sum(p.numel() for p in model.parameters())

@pytest.mark.parametrize("size", ["3b", "7b"])
def test_parameters_are_those_of_the_model(size):
    config = qwen_config(size)
    assert parameters(config) == pytest.approx(weights_of(config), rel=2e-3)

def test_parameters_of_another_family_and_of_the_tiny_model():
    from transformers import AutoConfig, Qwen2VLConfig
    tiny = AutoConfig.from_pretrained(repo_path("models", "tiny-qwen2.5-vl"))
    assert parameters(tiny) == pytest.approx(weights_of(tiny), rel=2e-2)
    other = Qwen2VLConfig()
    assert parameters(other) == pytest.approx(weights_of(other), rel=2e-3)

def test_memory_is_near_what_a_card_was_seen_to_take():
    "Page 19: 3B in bfloat16, 8.3 GiB with batches of 8,192 tokens, up to 14.9 with 65,536"
    config = qwen_config("3b")
    for tokens, seen in {8_192: 8.3, 65_536: 14.9}.items():
        told = 2*parameters(config) + batch_bytes(config, tokens) + KEPT_FEATURES
        assert seen*2**30 <= told <= 1.4*seen*2**30
    assert batch_bytes(config, 8192, torch.float32) == 2*batch_bytes(config, 8192)
    assert batch_bytes(config, 8192) > 8192*kv_bytes(config)

def test_memory_in_words(mock):
    assert memory_text(mock) == "none for a mock"
    assert memory_text(change(mock, lvlm="somebody/else")) == "not known"
    text = memory_text(change(mock, lvlm=BIG, batch_tokens=8192))
    assert text.startswith("at most 10 GB: weights 7.5 GB, batches of 8,192 tokens "), text
    whole = memory_text(change(mock, lvlm=BIG, dtype="float32"))
    assert "weights 15 GB" in whole
    assert memory_text(Job()) == (
        "at most 1.2 GB: weights 4.3 MB, batches of 8,192 tokens 140 MB, image features 1.1 GB"
    )

def test_number_format_of_a_job(mock):
    tiny = config_of(Job())
    assert dtype_of(Job(), tiny) == torch.float32
    assert dtype_of(settings_of(Job, dtype="float16"), tiny) == torch.float16
    assert dtype_of(mock, qwen_config("3b")) == torch.bfloat16

def test_what_has_to_be_downloaded(mock):
    assert download_text(Job()) == download_text(mock) == "none"
    big = change(mock, lvlm=BIG, clip="openai/clip-vit-large-patch14")
    assert download_text(big) == f"{BIG}, 7.5 GB; openai/clip-vit-large-patch14, 1.7 GB"
    assert download_text(big, asks=False) == "openai/clip-vit-large-patch14, 1.7 GB"
    assert download_text(change(mock, clip="somebody/clip")) == "somebody/clip, size not known"

def test_models_that_are_here(tmp_path):
    assert is_here("models/tiny-clip") and is_here(str(tmp_path)) and not is_here("somebody/else")
    assert released_size(BIG) == "3b" and released_size("my-qwen2.5") is None

def test_features_on_disk(mock, islands):
    big = change(mock, lvlm=BIG)
    kept = asking_costs(change(big, vision_dir="runs/f"), 1000, "runs/x", items=islands)["disk"]
    assert "; features of 450 images 7.4 MB in runs/f" in kept, kept
    not_kept = asking_costs(big, 1000, "runs/x", items=islands)["disk"]
    assert "image features in memory only (--vision-dir would keep 7.4 MB)" in not_kept
    assert "features" not in asking_costs(big, 1000, "runs/x", items=islands.assign(image_path=None))["disk"]

def test_images_at_most(islands):
    there = islands.image_path.nunique()
    assert distinct_images(islands, 10**6, (2,)) == there
    assert distinct_images(islands, 10, (1, 2)) == 30 and distinct_images(islands, 10, (0,)) == 10
    assert distinct_images(islands.assign(image_path=None), 10, (2,)) == 0

# ---- of a job ----------------------------------------------------------------------------------------------

def test_sequences_of_a_question():
    assert sequences_of(Job()) == 5 + 1 + 5 + 2 + 2
    assert sequences_of(settings_of(Job, shots=(1, 2))) == 30
    assert sequences_of(settings_of(Job, K=3)) == 3*2
    assert sequences_of(settings_of(Job, counts=dict(random=9), K=4, shots=(1, 2))) == 4 + 9

def test_the_plan_of_a_job_is_what_it_then_asks(tmp_path, mock):
    job = change(mock, limit=9, window=2, test=4, verify=0, max_failed=1.)
    path = tmp_path/"r"
    def calls(**kw): return generate_plan(job, path, **kw)["LVLM calls"]
    assert calls() == f"at most {9*15 + 4}"
    assert not path.exists()
    assert generate_plan(job, path, rate=.5)["time"].endswith("at 0.5 prompts/s (given)")
    job.run(path, progress=False)
    assert calls() == "0" and generate_plan(job, path)["time"] == "none: everything is there"
    assert generate_plan(job, path)["questions"] == "9 of data/islands, split train; 9 are there already"
    (path/"part-00004.parquet").unlink() # one question
    (path/"part-00001.parquet").unlink() # two
    assert questions_there(job, path) == 6 and calls() == f"at most {3*15 + 4}"
    own = change(job, limit=None)
    plan = generate_plan(own, path, shard=(0, 3))
    assert "900 of data/islands, split train, part 0 of 3: " in plan["questions"]
    assert "; 0 are there already" in plan["questions"]
    two = generate_plan(change(job, two_stage=dict(top=2, random=1)), path)
    assert two["sequences"] == "15 per question (shots 2; pools of 16); of each shot count at most 3 get a text"

def test_costs_of_asking(mock, islands):
    costs = asking_costs(mock, 1000, "runs/x", 10., 500, items=islands)
    assert list(costs) == ["LVLM calls", "time", "memory", "download", "disk"]
    assert costs["LVLM calls"] == "at most 1,000"
    assert costs["time"] == "1.7 min at 10 prompts/s (given)"
    assert costs["disk"] == f"about {size_text(500*ROW_BYTES)} in runs/x"
    assert asking_costs(mock, 1000, items=islands)["disk"] == f"about {size_text(1000*ROW_BYTES)} in "
    nothing = asking_costs(mock, 0, "runs/x", "measure", items=islands)
    assert nothing["LVLM calls"] == "0" and nothing["time"] == "none: everything is there"

def test_the_plan_of_embedding(tmp_path):
    dev = settings_of(Job, split="dev", candidates="dev", store=str(tmp_path/"store")) # 250 questions, 125 pictures
    splits = Splits(dev, ["dev"])
    plan = embed_plan(splits, rate=50.)
    assert plan["to do"] == "dev" and plan["download"] == "none"
    assert plan["images"] == "125 to encode"
    assert plan["time"] == "2.5 s at 50 images/s (given)"
    assert embed_plan(splits, (0, 5))["images"] == "25 to encode"
    assert plan["disk"] == f"about {size_text(2*250*64*4)} in {dev.data.store}"
    embed_splits(splits, (0, 2), progress=False)
    assert embed_plan(splits)["images"].endswith("some of them in 1 parts that are there")
    embed_splits(splits, (1, 2), progress=False)
    assert embed_plan(splits)["to do"] == "nothing, all is there"
    assert "768 numbers" in embed_plan(Splits(change(dev, clip="somebody/clip"), ["dev"]))["disk"]

def test_embedding_is_measured(tmp_path, monkeypatch):
    "A CLIP that takes a second for a picture; nothing is kept, and nothing is measured where nothing is to be done"
    dev = settings_of(Job, split="dev", candidates="dev", store=str(tmp_path/"store"))
    now = [0.]
    def embed(items, clip, progress): now[0] += items.image_path.nunique()
    monkeypatch.setattr("leverplus.plan.embed_items", embed)
    monkeypatch.setattr("leverplus.plan.time.perf_counter", lambda: now[0])
    assert measure_embedding(Splits(dev, ["dev"]), 100.) == 1. and now[0] <= 100
    assert measure_embedding(Splits(dev, ["dev"]), 0.) == 1.
    assert measure_embedding(Splits(dev, ["dev"]), 1e9) == 1. # all items are the most that can be measured
    plan = embed_plan(Splits(dev, ["dev"]), rate="measure")
    assert plan["time"] == "2.1 min at 1 images/s (measured just now)"
    assert not (tmp_path/"store").exists()
    monkeypatch.undo()
    embed_splits(Splits(dev, ["dev"]), progress=False)
    assert embed_plan(Splits(dev, ["dev"]), rate="measure")["time"] == "none: everything is there"
