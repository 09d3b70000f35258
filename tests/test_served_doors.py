"A served model at the doors: addresses, settings, plans, records, what runs hand on. Nothing here asks a server"
import json, sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
import pytest, torch
from leverplus.cli import check_door, main
from leverplus.core import fingerprint, repo_path
from leverplus.doors import read_door, remembered
from leverplus.learner import load_selector
from leverplus.lvlm import LVLM, MockScorer, load_lvlm, pixel_limits, with_pixels
from leverplus.plan import generate_plan, measure_speed, requests_of, weights_here
from leverplus.rldata_ask import engine_of, servers_apart
from leverplus.rldata_generate import answerer
from leverplus.settings import Job, Model, change, server_url, settings_of

URL = "http://127.0.0.1:9/v1" # the port of a service that throws away whatever comes
TINY = "models/tiny-qwen2.5-vl"

def unloaded(path=TINY, dtype=None, device=None, attn="sdpa", min_pixels=None, max_pixels=None, weights=True):
    "A model of which there are no weights"
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
    if weights: return load_lvlm(path, dtype, device, attn, min_pixels, max_pixels)
    folder = str(repo_path(*path.split("/")))
    with torch.device("meta"): model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    lvlm = LVLM(model.eval(), tokenizer, AutoImageProcessor.from_pretrained(folder), path)
    return with_pixels(lvlm, min_pixels, max_pixels)

class NoServer(RuntimeError):
    "Nobody answers"

class StandIn(MockScorer):
    "Says who it is as a scorer of a server does, and asks nobody"
    version = "0.11.0"
    away = False
    made = []
    def __init__(self, url, model=None, lvlm=None, **how):
        super().__init__()
        self.url, self.lvlm, self.how = url, lvlm, how
        self.model = model or "tiny"
        self.model_fingerprint = "0123456789abcdef"
        StandIn.made.append(self)

    @property
    def identity(self):
        known = dict(engine="vllm", version=self.version, model=self.model, root="/srv/models/tiny", dtype="float32")
        return known | dict(pixels=list(pixel_limits(self.lvlm.image_processor)), pictures=self.how["pictures"])

    @property
    def fingerprint(self): return fingerprint("served", self.identity)

    def around(self, lvlm): return StandIn(self.url, self.model, lvlm, **self.how)

    def run(self, prompts, targets=None, generate=True, progress=False):
        if StandIn.away: raise NoServer(f"{self.url}: nobody has answered for 600 s\n\nthe last one said: refused")
        return super().run(prompts, targets, generate)

@pytest.fixture
def served(monkeypatch):
    "Whatever would ask a server asks a stand-in"
    page = ModuleType("leverplus.served")
    page.ServedScorer, page.NoServer = StandIn, NoServer
    monkeypatch.setitem(sys.modules, "leverplus.served", page)
    monkeypatch.setattr("leverplus.rldata_scale.load_lvlm", unloaded)
    monkeypatch.setattr(StandIn, "made", [])
    return StandIn

@pytest.fixture
def go(capsys, tmp_path, monkeypatch, served):
    "A command, and its exit status: what it said on stdout and stderr"
    monkeypatch.chdir(tmp_path)
    def run(line, code=0):
        try: status = main(line.split())
        except SystemExit as e: status = e.code
        said = capsys.readouterr()
        assert status == code, said
        return said.out + said.err
    return run

# ---- an address --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, says", [
    (URL, URL), (URL + "/", URL), ("HTTPS://gpu-7.example.org:8443//", "https://gpu-7.example.org:8443"),
    ("http://[::1]:8000/v1", "http://[::1]:8000/v1"), ("http://gpu_1", "http://gpu_1"), (None, None),
])
def test_an_address(text, says):
    assert server_url(text) == says
    assert Model(lvlm_url=text).lvlm_url == says

@pytest.mark.parametrize("text", [
    "", " ", "127.0.0.1:8000/v1", "localhost", "ftp://gpu/v1", "file:///etc/passwd", "http://", "http:///v1",
    "http://gpu:port/v1", "http://gpu:99999", "http://gpu:0", "http://gpu:", "http://[::1", "http://gpu /v1",
    "http://gpu/v1\n", "http://gpu\\x", "http://gpu/\x1b[2J", 5, b"http://gpu/v1", ["http://gpu/v1"],
])
def test_no_address(text):
    with pytest.raises(ValueError, match="wanted the address of a server, such as http://127") as e: server_url(text)
    with pytest.raises(ValueError, match="wanted the address of a server"): Model(lvlm_url=text)
    assert "\x1b" not in str(e.value) and "\n" not in str(e.value)

SECRETS = [
    "http://me:hunter2@gpu/v1", "https://hunter2@gpu/v1", "http://me:hunter2@gpu:99999", "ftp://me:hunter2@gpu",
    "me:hunter2@gpu", "http://me:hunter2\uff20gpu/v1", "http://me:hunter2@[::1", "http://me:hunter?2@gpu",
    "http://gpu/v1?api_key=hunter2", "http://gpu/v1#hunter2", "http://gpu/v1/?hunter2@",
]

@pytest.mark.parametrize("text", SECRETS)
def test_a_secret_in_an_address_is_refused_and_not_repeated(text, go, tmp_path):
    with pytest.raises(ValueError, match="the address of the server holds") as e: server_url(text)
    with pytest.raises(ValueError) as of_group: Model(lvlm_url=text)
    Path("a.yaml").write_text(json.dumps(dict(model=dict(lvlm_url=text))))
    from_shell = go(f"generate --dry-run --out x --lvlm-url {text}", 2)
    from_file = go("generate --dry-run --out x --config a.yaml", 2)
    for said in (str(e.value), str(of_group.value), from_shell, from_file):
        assert "hunter" not in said and "the address of the server holds" in said
    assert from_shell.count("\n") == from_file.count("\n") == 1
    assert "LVLM_API_KEY" in str(e.value) or "?" in text or "#" in text

@pytest.mark.parametrize("flags, says", [
    ("--lvlm-name tiny", "lvlm_name 'tiny' without lvlm_url"),
    (f"--lvlm-url {URL} --lvlm mock", "lvlm 'mock' beside lvlm_url"),
    (f"--lvlm-url {URL} --attn eager --batch-tokens 9", "attn 'eager', batch_tokens 9 beside lvlm_url"),
    (f"--lvlm-url {URL} --lvlm-price -3", "lvlm_price -3.0: wanted a number >= 0"),
    (f"--lvlm-url {URL} --lvlm-at-once 0", "lvlm_at_once|--lvlm-at-once"),
    (f"--lvlm-url {URL} --lvlm nowhere/at/all", "no such folder"),
    (f"--lvlm-url {URL} --lvlm somebody/else --verify 2", "its weights are not on this machine"),
])
def test_the_door_refuses_before_anybody_is_asked(go, served, flags, says):
    import re
    said = go(f"generate --quiet --out x {flags}", 2)
    assert re.search(says, said) and said.count("\n") == 1
    assert not served.made and not Path("x").exists()

def test_weights_are_here_or_not(tmp_path):
    assert weights_here(TINY) and not weights_here("somebody/else")
    (tmp_path/"config.json").write_text("{}")
    assert not weights_here(str(tmp_path))
    check_door(read_door(["generate", "--out", str(tmp_path/"x"), "--lvlm-url", URL, "--verify", "2"]))

# ---- a job and its scorer ----------------------------------------------------------------------------------

def test_a_job_hands_its_settings_to_the_scorer(served):
    job = settings_of(
        Job, lvlm_url=URL + "/", lvlm_name="big", lvlm_at_once=3, lvlm_timeout=7, lvlm_patience=0,
        lvlm_pictures="files", lvlm_price=2, dtype="bfloat16", max_pixels=7840, device="cpu",
    )
    scorer = job.scorer()
    assert (scorer.url, scorer.model) == (URL, "big")
    assert scorer.how == dict(
        dtype="bfloat16", at_once=3, timeout=7., patience=0., pictures="files", prices=(2., 2.), way=None,
    )
    assert scorer.lvlm.device.type == "meta" and pixel_limits(scorer.lvlm.image_processor)[1] == 7840

def test_who_answers(served):
    scorer = settings_of(Job, lvlm_url=URL, lvlm_name="/srv/models/tiny").scorer()
    said = answerer(scorer)
    assert said["name"] == "tiny" and said["fingerprint"] == "0123456789abcdef" and said["dtype"] == "float32"
    assert said["server"] == scorer.identity and json.loads(json.dumps(said)) == said
    assert (said["min_pixels"], said["max_pixels"]) == pixel_limits(scorer.lvlm.image_processor)
    assert "server" not in answerer(MockScorer())

def test_servers_in_words():
    one = dict(engine="vllm", version="0.10.2", model="tiny", pixels=[1, 2])
    assert engine_of(one) == "vllm 0.10.2" and engine_of(dict(model="tiny")) == "an engine that does not say its name"
    assert servers_apart(None, None) == servers_apart(one, dict(one)) == ""
    assert servers_apart(one, one | dict(version="0.11")) == "version: there 0.10.2, here 0.11"
    assert servers_apart(one, None) == "there vllm 0.10.2 serving tiny, here no server"

# ---- the road ----------------------------------------------------------------------------------------------

ASK = f"--lvlm-url {URL} --lvlm-name tiny --lvlm-at-once 5 --lvlm-price 1 --lvlm-price-said 2 --lvlm-pictures files"
SMALL = "--test 0 --window 4 --quiet --store store"
COUNTS = '--counts {"beam":4}'

def groups(go, split, more=""):
    return go(f"generate {ASK} --split {split} --n 8 {SMALL} {COUNTS} --out runs/{split} {more}")

def test_the_whole_road_with_a_served_model(go, served):
    said = groups(go, "train")
    assert "runs/train" in said
    groups(go, "dev")
    manifest = json.loads(Path("runs/train/manifest.json").read_text())
    assert manifest["lvlm"]["server"]["version"] == "0.11.0" and manifest["lvlm"]["name"] == "tiny"
    model = remembered("runs/train")["model"]
    assert (model["lvlm_url"], model["lvlm_name"], model["lvlm_pictures"]) == (URL, "tiny", "files")
    assert not {"lvlm_at_once", "lvlm_timeout", "lvlm_patience", "lvlm_price", "lvlm_price_said"} & set(model)

    def asks(line, *flags):
        "A command that goes on with the same server, and says so even with --quiet"
        served.made.clear()
        said = go(line)
        assert f"--lvlm-url {URL}" in said and "(as in " in said
        assert [(s.url, s.model, s.how["at_once"]) for s in served.made] == [(URL, "tiny", None)]*len(served.made)
        return said

    asks("mine runs/train --out runs/mined --rounds 1 --tries 2 --quiet")
    asks("train runs/train --dev runs/dev --objective rce --epochs 1 --bs 4 --choose accuracy --out runs/rce --quiet")
    assert served.made
    asks("infer --selector runs/rce --n 4 --out runs/answers --quiet")
    assert served.made
    asks("eval --selector runs/rce --n 4 --draws 1 --fixed 0 --out runs/eval --quiet")
    assert served.made
    go("report runs/eval --cases 2 --groups runs/train")
    go("report runs/eval runs/answers --out runs/both.html")

    info = load_selector("runs/rce/checkpoint").info
    assert info["lvlm"]["server"] == "vllm 0.11.0" and info["lvlm"]["name"] == TINY
    assert load_selector("runs/rce/checkpoint").passport["server"] == "vllm 0.11.0"
    for file in [*Path("runs/rce/checkpoint").rglob("*"), Path("runs/eval/report.html"), Path("runs/both.html")]:
        content = file.read_bytes() if file.is_file() else b""
        assert b"127.0.0.1" not in content and b"/srv/models" not in content, file

def test_a_checkpoint_trained_on_served_facts_says_so_and_names_no_address(go, served):
    groups(go, "train")
    groups(go, "dev")
    go("train runs/train --dev runs/dev --objective rce --epochs 1 --bs 4 --out runs/rce --quiet")
    assert not [s for s in served.made if s.how["at_once"] is None] # nobody was asked again
    selector = load_selector("runs/rce/checkpoint")
    lvlm = dict(name=TINY, dtype="float32", fingerprint="0123456789abcdef", server="vllm 0.11.0")
    assert selector.info["lvlm"] == lvlm
    config = Path("runs/rce/checkpoint/config.json").read_text()
    assert URL not in config
    bare = Path("elsewhere")
    bare.mkdir()
    for file in Path("runs/rce/checkpoint").iterdir(): (bare/file.name).write_bytes(file.read_bytes())
    assert "lvlm_url" not in remembered(bare)["model"]

def test_another_version_of_the_server_is_another_scorer(go, served, monkeypatch):
    groups(go, "train")
    monkeypatch.setattr(served, "version", "0.12.0")
    said = go(f"generate {ASK} --split train --n 8 {SMALL} {COUNTS} --out runs/train", 2)
    assert "belong to other settings (scorer: there" in said
    assert "; the server: version: there 0.11.0, here 0.12.0). Generate elsewhere" in said
    said = go("mine runs/train --out runs/mined --quiet", 2)
    assert "its facts are of scorer" in said and "lvlm_url" in said
    assert "(version: there 0.11.0, here 0.12.0)" in said
    said = go(f"mine runs/train --lvlm {TINY} --out runs/mined --quiet", 2)
    assert "there vllm 0.11.0 serving tiny, here no server" in said
    line = f"infer --picker random --n 2 {ASK} --quiet --store store --out runs/answers"
    go(line)
    monkeypatch.setattr(served, "version", "0.11.0")
    assert "fingerprint of server: 'vllm 0.12.0' there, 'vllm 0.11.0' now" in go(line, 2)
    groups(go, "train") # and goes on with the one that was there

def test_a_server_that_is_gone_is_one_clean_line(go, served, monkeypatch):
    monkeypatch.setattr(served, "away", True)
    said = go(f"generate {ASK} --n 8 {SMALL} --out runs/train", 1)
    assert said == f"leverplus generate: {URL}: nobody has answered for 600 s\n"
    monkeypatch.setattr(served, "run", lambda *a, **kw: (_ for _ in ()).throw(RuntimeError("a fault of ours")))
    assert "RuntimeError: a fault of ours (--debug shows where)" in go(f"generate {ASK} --n 8 {SMALL} --out runs/b", 1)

# ---- what runs hand on -------------------------------------------------------------------------------------

def run_of(folder, **model):
    "A folder of groups that remembers a model"
    folder.mkdir(parents=True)
    (folder/"manifest.json").write_text(json.dumps(dict(command=dict(door="generate", model=model))))
    return str(folder)

@pytest.fixture
def families(tmp_path):
    served = dict(lvlm=TINY, lvlm_url=URL, lvlm_name="tiny", lvlm_pictures="paths", dtype="bfloat16", max_pixels=7840,
                  lvlm_at_once=9, lvlm_timeout=3., lvlm_price=1.)
    ours = dict(lvlm=TINY, dtype="bfloat16", attn="eager", batch_tokens=99, prefix_cache="query", max_pixels=7840)
    return SimpleNamespace(served=run_of(tmp_path/"served", **served), ours=run_of(tmp_path/"ours", **ours))

def model_of(*words): return read_door(["mine", *words, "--out", "x"]).model

def test_the_same_server_is_asked_again(families, capsys):
    model = model_of(families.served, "--quiet")
    assert model == Model(
        lvlm=TINY, lvlm_url=URL, lvlm_name="tiny", lvlm_pictures="paths", dtype="bfloat16", max_pixels=7840,
    )
    assert f"--lvlm-url {URL} --lvlm-name tiny" in capsys.readouterr().err

@pytest.mark.parametrize("flag", ["--lvlm", "--lvlm=", "config"])
def test_another_model_brings_its_own_server_or_none(families, flag, tmp_path):
    file = tmp_path/"a.yaml"
    file.write_text(f"model: {{lvlm: {TINY}}}\n")
    words = {"--lvlm": ["--lvlm", TINY], "--lvlm=": [f"--lvlm={TINY}"], "config": ["--config", str(file)]}[flag]
    assert model_of(families.served, *words) == Model(lvlm=TINY)
    assert model_of(families.served, "--lvlm", "mock") == Model(lvlm="mock")

@pytest.mark.parametrize("flag", ["--lvlm-url", "--lvlm_url"])
def test_another_server_has_other_names(families, flag):
    other = "http://127.0.0.1:10/v1"
    want = Model(lvlm=TINY, lvlm_url=other, max_pixels=7840)
    assert model_of(families.served, flag, other) == want
    assert model_of(families.ours, flag, other) == want # nothing about our own engine is handed to a server
    assert model_of(families.served, "--lvlm-url", "none") == Model(lvlm=TINY, max_pixels=7840)
    both = model_of(families.served, "--lvlm-url", other, "--lvlm", TINY, "--lvlm-name", "b")
    assert both == Model(lvlm=TINY, lvlm_url=other, lvlm_name="b")

# ---- plans -------------------------------------------------------------------------------------------------

def test_a_plan_asks_nobody(go, served):
    said = go(f"generate {ASK} --n 8 --test 4 --dry-run --out runs/train")
    assert not served.made and not Path("runs").exists()
    assert "at most 124 prompts, about 3" in said and "requests: one for the text, one for each true answer" in said
    assert "of prompts, at most" in said and "at the prices given" in said
    assert f"memory       none here: the model is served at {URL}" in said
    assert "download     none" in said and "image features" not in said and "time         not known" in said
    assert "at 40 prompts/s (given)" in go(f"generate {ASK} --n 8 --dry-run --rate 40 --out runs/train")
    assert "price" not in go(f"generate --lvlm-url {URL} --n 8 --dry-run --out runs/train")

def test_a_rate_that_is_measured_asks_the_server(go, served, monkeypatch):
    monkeypatch.setattr("leverplus.plan.measure_speed", partial(measure_speed, seconds=.5))
    said = go(f"generate {ASK} --n 8 --dry-run --rate measure --out runs/train")
    assert len(served.made) == 1 and "tiny, served by vllm 0.11.0" in said and "the model was asked" in said

def test_a_plan_by_hand():
    job = settings_of(Job, limit=10, lvlm_url=URL, lvlm_price=3., lvlm_price_said=10.)
    items = job.items()
    whole = requests_of(job, 1000, items=items)
    assert whole.requests == 1000 + 1000*whole.answers and whole.written == 10*1000 + 1000*whole.answers
    assert whole.price == pytest.approx((3*whole.read + 10*whole.written)/1e6)
    assert whole.steps > whole.requests and f"as vLLM is asked: {whole.steps:,.0f}" in whole.lines()["LVLM calls"]
    staged = requests_of(job, 1000, items=items, texts=100)
    assert staged.requests == 100 + 1100*whole.answers and staged.read < whole.read
    same = requests_of(change(job, lvlm_price_said=None), 1000, items=items)
    assert same.price == pytest.approx(3*(whole.read + whole.written)/1e6)
    free = requests_of(change(job, lvlm_price=None, lvlm_price_said=None), 1000, items=items)
    assert "price" not in free.lines() and free.read == whole.read
    zero, two = (requests_of(job, 1000, shots, items).read for shots in ((0,), (2,)))
    assert 2*zero < two == whole.read
    unknown = requests_of(change(job, lvlm="somebody/else"), 1000, items=items)
    assert unknown.read is unknown.price is unknown.steps is None and "not known" in unknown.lines()["price"]
    unasked = items.assign(answers=[None]*len(items))
    assert requests_of(job, 1000, items=unasked).requests == 1000

def test_tokens_of_a_plan_are_those_of_the_official_processor():
    from itertools import islice
    from leverplus.lvlm import official_inputs, prompt_images
    from leverplus.plan import some_pairs
    from leverplus.prompt import prompter
    job = settings_of(Job, lvlm_url=URL, min_pixels=784, max_pixels=1568)
    items = job.items()
    lvlm = load_lvlm(TINY, device="cpu", min_pixels=784, max_pixels=1568)
    make = prompter(items)
    prompts = [make(query, pointer) for query, pointer, _ in islice(some_pairs(items, job, (2,)), 400)]
    inputs = official_inputs(lvlm, [lvlm.render(p) for p in prompts], [prompt_images(lvlm, p) for p in prompts])
    size = float(inputs["attention_mask"].sum(1).float().mean())
    sent = requests_of(job, 1, items=items)
    assert 0 < sent.read - (1 + sent.answers)*size < 5*sent.answers # the answers themselves

# ---- pages that look at the model --------------------------------------------------------------------------

def test_tokens_are_counted_without_weights(served):
    import pandas as pd
    from leverplus.table import prompt_tokens
    items = Job().items()
    *ids, a, b = items.index[items.split == "train"][:6].tolist()
    pairs = pd.DataFrame(dict(question_id=ids*2, pointer=[(a, b)]*4 + [()]*4))
    tokens = prompt_tokens(pairs, items, settings_of(Job, lvlm_url=URL).scorer().lvlm)
    assert tokens == prompt_tokens(pairs, items, load_lvlm(TINY, device="cpu")) and len(tokens) == 8
    blind = prompt_tokens(pairs, items.assign(image_path=None), unloaded(weights=False))
    assert all(blind[pair] < tokens[pair] for pair in tokens)

def test_a_sweep_over_image_budgets_asks_the_server_with_each(served):
    import pandas as pd
    from leverplus.rldata_ask import FactCache
    from leverplus.sweep import SweepData
    job = settings_of(Job, lvlm_url=URL)
    items = job.items()
    world = SimpleNamespace(items=items, scorer=job.scorer())
    data = SweepData({}, world, 2, FactCache(), {})
    pairs = pd.DataFrame(dict(question_id=items.index[:2], pointer=[()]*2))
    for most in (784, 7840): data.ask(pairs, {"lvlm.min_pixels": 784, "lvlm.max_pixels": most})
    assert [pixel_limits(s.lvlm.image_processor)[1] for s in served.made[1:]] == [784, 7840]
    assert len({s.fingerprint for s in served.made}) == 3

def test_a_speed_says_who_was_asked(served):
    speed = measure_speed(settings_of(Job, lvlm_url=URL, limit=2), seconds=.01)
    assert speed.why.endswith("tiny, served by vllm 0.11.0")

def test_a_world_names_the_server_whose_facts_are_not_its_own(served):
    from dataclasses import replace
    from leverplus.world import world
    islands = world("islands")
    rows = islands.facts("test").head(3)
    with pytest.raises(ValueError, match=r"\(tiny, served by vllm 0.11.0\)"):
        replace(islands, scorer=settings_of(Job, lvlm_url=URL).scorer()).check_whose(rows)

def test_an_address_elsewhere_that_a_run_names_is_not_asked_until_it_is_named(tmp_path, capsys):
    "A run may have come from anywhere, and with the address it would get pictures and the key"
    elsewhere = "http://127.0.0.1.example.org/v1"
    run = run_of(tmp_path/"received", lvlm=TINY, lvlm_url=elsewhere)
    with pytest.raises(SystemExit) as e: model_of(run)
    said = capsys.readouterr().err
    assert e.value.code == 2 and f"--lvlm-url {elsewhere}, or --lvlm-url none" in said
    assert model_of(run, "--lvlm-url", elsewhere) == Model(lvlm=TINY, lvlm_url=elsewhere)
    assert model_of(run, "--lvlm-url", "none") == model_of(run, "--lvlm", TINY) == Model(lvlm=TINY)
