"Checkpoints of selectors: old ones load, changed ones do not, and all say what they are"
import json, re, shutil
from pathlib import Path
import pandas as pd, pytest, torch
from fastcore.basics import noop
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor
import leverplus.rldata_scale, leverplus.selector # the first teaches `Job` to run
from leverplus.callback_core import find_reference
from leverplus.checkpoints import SELECTOR_SCHEMA, STAMP, find_checkpoint, model_card, passport, write_card
from leverplus.core import read_json, repo_path, world_path, write_json
from leverplus.dls import who_was_asked
from leverplus.groups import RLData
from leverplus.learner import group_rewards, load_selector, mean_interval, note_metrics, selector_learner
from leverplus.pools import Pool
from leverplus.rldata_generate import answerer
from leverplus.selector import PointerSelector
from leverplus.settings import Choosing, Job, Teaching, settings_of
from leverplus.synth import quiet, synth_dls
from leverplus.training import train_run, training_data

STORED = Path(__file__).parent/"checkpoints"
SHORT = Teaching(objective="rce", epochs=2, bs=4, set=dict(watch=None))

@pytest.fixture
def ckpt(tmp_path):
    "A copy of the stored checkpoint of the present schema"
    return Path(shutil.copytree(STORED/f"schema-{SELECTOR_SCHEMA}", tmp_path/"ckpt"))

def edit(folder, **changes):
    "Change keys of config.json; the content of before is returned"
    before = read_json(folder/"config.json")
    write_json(folder/"config.json", before | changes, seal=False)
    return before

def same(a, b): return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())

def not_asked(*args, **kwargs): pytest.fail("the hub was asked")

# ---- old ones load

def pools(width):
    "Two queries and their pools of six, without a random number"
    x = torch.arange(2*7*width, dtype=torch.float32).reshape(2, 7, width)
    x = torch.sin(x*x)
    return x[:, 0], x[:, 1:]

@pytest.mark.parametrize("schema, picks, logp", [
    (1, [[2, 1], [2, 0]], [-.4337250, -.4078380]),
    (2, [[4, 3], [5, 4]], [-.2131136, -.4937392]),
])
def test_a_stored_checkpoint_loads_and_picks_what_it_picked(schema, picks, logp):
    model = load_selector(STORED/f"schema-{schema}")
    assert model.passport["schema"] == schema and model.passport["recipe"] == "ours"
    enc = model.encode(*pools(model.config["d_in"]))
    found = model.greedy(enc, 2)
    assert found.tolist() == picks
    torch.testing.assert_close(model.logp(enc, found[:, None], stop=False)[:, 0], torch.tensor(logp), atol=1e-4, rtol=0)

def test_a_stored_checkpoint_for_every_schema():
    assert sorted(p.name for p in STORED.iterdir()) == [f"schema-{n}" for n in range(1, SELECTOR_SCHEMA + 1)]
    assert sum(p.stat().st_size for p in STORED.rglob("*") if p.is_file()) < 50_000

def test_one_of_the_first_schema_says_what_it_knows_and_is_written_as_the_present_one(tmp_path):
    model = load_selector(shutil.copytree(STORED/"schema-1", tmp_path/"old"))
    says = model.passport
    assert (says["encoder_fingerprint"], says["kind"], says["K"], says["most"]) == ("aaaa", "text+answers", 6, 3)
    assert says["encoder"] is says["lvlm"] is says["shots"] is says["changes"] is says["leverplus"] is None
    card = model_card(says)
    assert "| changed in it | not known |" in card and "Not known: no number was noted." in card
    model.save_pretrained(tmp_path/"old")
    assert "[More Information Needed]" not in (tmp_path/"old"/"README.md").read_text()
    assert list(read_json(tmp_path/"old"/"config.json"))[:3] == list(STAMP)
    again = load_selector(tmp_path/"old")
    assert again.passport == says | dict(schema=SELECTOR_SCHEMA, leverplus=leverplus.__version__)
    assert same(model.state_dict(), again.state_dict())

# ---- nobody has changed it

def settings_and_info():
    "Names of everything in a config.json, those of `info` as pairs"
    about = read_json(STORED/f"schema-{SELECTOR_SCHEMA}"/"config.json")
    return [*about, *(("info", name) for name in about["info"])]

@pytest.mark.parametrize("name", settings_and_info(), ids=str)
def test_a_changed_entry_of_config_json_is_an_error_that_names_a_file(ckpt, name):
    about = read_json(ckpt/"config.json")
    table, key = (about, name) if isinstance(name, str) else (about["info"], name[1])
    for value in [v for v in ("other", None, 3, []) if v != table[key]]:
        table[key] = value
        write_json(ckpt/"config.json", about, seal=False)
        with pytest.raises(ValueError) as e: load_selector(ckpt)
        assert str(e.value).startswith((f"{ckpt/'config.json'}: ", f"{ckpt/'model.safetensors'}: ")), e.value

def test_changed_weights_are_named(ckpt):
    file = ckpt/"model.safetensors"
    weights = load_file(file)
    save_file(weights | dict(gains=weights["gains"] + 1e-6), file)
    with pytest.raises(ValueError, match="model.safetensors: not the weights that config.json"): load_selector(ckpt)
    save_file({name: x.double() for name, x in weights.items()}, file)   # the same numbers, as other types
    with pytest.raises(ValueError, match="model.safetensors: not the weights that config.json"): load_selector(ckpt)
    save_file(weights, file)
    load_selector(ckpt)

def test_half_of_one_checkpoint_and_half_of_another(ckpt, tmp_path):
    other = load_selector(ckpt)
    with torch.no_grad(): other.gains.add_(1)
    other.save_pretrained(tmp_path/"other")
    shutil.copy(tmp_path/"other"/"config.json", ckpt/"config.json")
    with pytest.raises(ValueError, match="ckpt/model.safetensors: not the weights"): load_selector(ckpt)

def test_a_later_schema_and_a_stamp_that_was_taken_off(ckpt):
    before = edit(ckpt, schema=SELECTOR_SCHEMA + 1, leverplus="9.9")
    with pytest.raises(ValueError, match="config.json: schema 3, of leverplus 9.9; .* update leverplus"):
        load_selector(ckpt)
    rest = {name: value for name, value in before.items() if name != "digests"}
    write_json(ckpt/"config.json", rest, seal=False)
    with pytest.raises(ValueError, match="config.json: schema 2 without digests"): load_selector(ckpt)

def test_files_of_others_are_named(tmp_path):
    clip = shutil.copytree(world_path("models", "tiny-clip"), tmp_path/"clip")
    with pytest.raises(ValueError, match="clip/config.json: a checkpoint of None, not of PointerSelector"):
        load_selector(clip)
    shutil.copy(STORED/"schema-1"/"config.json", clip/"config.json")
    with pytest.raises(ValueError, match="clip/model.safetensors: not the weights of this PointerSelector"):
        load_selector(clip)

def test_odd_settings_of_an_old_checkpoint_name_its_file(tmp_path):
    folder = Path(shutil.copytree(STORED/"schema-1", tmp_path/"old"))
    for odd in (dict(temp=-1), dict(temp="warm"), dict(d_hidden=-8), dict(state="gone"), dict(n_heads=3)):
        before = edit(folder, **odd)
        with pytest.raises(ValueError, match="old/config.json: no PointerSelector can be made of its settings"):
            load_selector(folder)
        write_json(folder/"config.json", before, seal=False)
    edit(folder, info="nothing")
    with pytest.raises(ValueError, match="config.json: info is a str"): load_selector(folder)

# ---- where it lies

def test_a_run_a_checkpoint_or_a_path_without_one(ckpt, tmp_path, monkeypatch):
    monkeypatch.setattr(leverplus.selector, "hf_hub_download", not_asked)
    run = tmp_path/"runs"/"ours"
    shutil.copytree(ckpt, run/"checkpoint")
    monkeypatch.chdir(tmp_path)
    for path in (run, run/"checkpoint", str(run), "runs/ours", "runs/ours/checkpoint", "./runs/ours"):
        assert load_selector(path).passport["seed"] == 3
    lost = "runs/our", "./runs/our", "runs/ours/checkpoin", "ours", ""
    for path in (*lost, str(tmp_path/"our"), tmp_path/"our", Path("me/ours")):
        with pytest.raises(FileNotFoundError, match=re.escape(f"{path}" or "config.json")): load_selector(path)
    with pytest.raises(NotADirectoryError, match="config.json: a file"): load_selector(ckpt/"config.json")
    shutil.rmtree(run/"checkpoint")
    (run/"settings.json").touch()
    with pytest.raises(FileNotFoundError, match="runs/ours: a run without checkpoint/config.json"): load_selector(run)

def test_the_home_folder(ckpt, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_checkpoint("~/ckpt") == ckpt

def test_a_name_on_the_hub(ckpt, tmp_path, monkeypatch):
    asked = []
    def download(name, file, **how):
        asked.append((name, file, how))
        return str(ckpt/file)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(leverplus.selector, "hf_hub_download", download)
    assert load_selector("me/selector").passport["seed"] == 3
    assert [a[:2] for a in asked] == [("me/selector", "config.json"), ("me/selector", "model.safetensors")]
    (tmp_path/"me").mkdir()
    with pytest.raises(FileNotFoundError, match="me/selector: no such folder"): load_selector("me/selector")
    assert PointerSelector.from_pretrained("hf://me/selector", revision="v1", temp=.5).pointer_temp == .5
    assert asked[-1] == ("me/selector", "model.safetensors", dict(revision="v1"))
    with pytest.raises(TypeError, match="colour"): PointerSelector.from_pretrained("hf://me/selector", colour=1)

def test_a_name_that_the_hub_does_not_have(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="me/selector: no such folder, and no such selector on the hub"):
        PointerSelector.from_pretrained("me/selector", local_files_only=True, cache_dir=tmp_path)

class Hub:
    "Stands for the hub: keeps what is uploaded"
    up = {}
    def __init__(self, token=None): pass
    def whoami(self): return dict(name="me")
    def create_repo(self, repo_id, **kwargs): return type("Repo", (), dict(repo_id=repo_id))
    def upload_folder(self, *, repo_id, folder_path, **kwargs):
        self.up[repo_id] = {p.name: p.read_bytes() for p in Path(folder_path).iterdir()}
        return f"address of {repo_id}"

@pytest.mark.parametrize("push", [
    lambda model, folder: model.push_to_hub("selector"),
    lambda model, folder: model.push_to_hub("me/selector"),
    lambda model, folder: model.save_pretrained(folder, push_to_hub=True, repo_id="me/selector"),
], ids=["own", "named", "saved"])
def test_what_is_pushed_says_its_name_on_the_hub(ckpt, tmp_path, monkeypatch, push):
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Hub)
    monkeypatch.setattr(leverplus.selector, "HfApi", Hub)
    monkeypatch.setattr(Hub, "up", {})
    assert push(load_selector(ckpt), tmp_path/"local") == "address of me/selector"
    files = Hub.up["me/selector"]
    assert files.keys() == {"README.md", "config.json", "model.safetensors"}
    assert b'load_selector("me/selector")' in files["README.md"]
    assert json.loads(files["config.json"]) == read_json(ckpt/"config.json")

# ---- the card

def test_the_front_matter_is_what_the_hub_reads(ckpt):
    data = ModelCard((ckpt/"README.md").read_text()).data
    assert data.library_name == "leverplus" and data.license == "mit"
    assert data.pipeline_tag == "visual-question-answering" and "in-context-learning" in data.tags
    assert ModelCard(model_card(passport({}))).data.license == "unknown"
    assert load_selector(ckpt).generate_model_card(name="me/it").text.count("me/it") == 2

def test_everything_that_is_known_stands_in_the_card(ckpt):
    card = (ckpt/"README.md").read_text()
    needed = "openai/clip-vit-base-patch32", "`aaaa`", "Qwen/Qwen2.5-VL-3B-Instruct", "`bbbb`", "interleaved"
    many = "trained with 2", "6 candidates, random", "0.081", "0.07 to 0.093", "| 400 |", "100 % of 400 stored groups"
    made = "| ours |", "listwise, 10 epochs", "hard_plus_soft", "`ab`", "`cd`", "`ef`", "`cccc`", "\nmit\n"
    for said in (*needed, *many, *made): assert said in card, said

def test_nothing_known_is_said_and_nothing_made_up():
    says = passport({})
    assert {name for name, value in says.items() if value is not None} == {"schema", "reads_evidence"}
    card = model_card(says)
    assert card.count("not known") > 15 and "None" not in card and "Not stated." in card

@pytest.mark.parametrize("info", [
    dict(data="3f2a", metrics=dict(regret=.21)),
    dict(pool=[1], lvlm="qwen", asking=None, shots=2, plan="it ran", stages=3, metrics="good", license="my own"),
    dict(metrics=dict(a=None, b=dict(), c=dict(value=1, low=.1), d=dict(value="x|y\nz"))),
], ids=["short", "odd", "metrics"])
def test_info_of_any_form_is_kept_and_does_not_break_the_card(tmp_path, info):
    model = PointerSelector(4, d_hidden=4)
    model.save_pretrained(tmp_path/"a", info=info)
    assert load_selector(tmp_path/"a").info == info
    rows = [line for line in (tmp_path/"a"/"README.md").read_text().splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} <= {3, 6}

def test_an_edited_card_is_kept_with_a_warning(ckpt):
    model = load_selector(ckpt)
    file = ckpt/"README.md"
    model.save_pretrained(ckpt, info=model.info | dict(license="apache-2.0"))   # as it was written: a new one
    assert "\napache-2.0\n" in file.read_text()
    edited = file.read_text().replace("## Limits", "## My limits")
    file.write_text(edited)
    with pytest.warns(UserWarning, match="README.md: somebody has edited this card"): model.save_pretrained(ckpt)
    assert file.read_text() == edited
    file.write_text("# All mine\n")
    assert not write_card(file, "text") and file.read_text() == "# All mine\n"
    file.unlink()
    assert write_card(file, "text")
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))   # as some programs copy text
    assert write_card(file, "other text")

# ---- who knows what

def asked_by(name, **settings):
    job = dict(model=dict(lvlm=name))
    return dict(job=job, lvlm=dict(name="x", dtype="float32", fingerprint=f"of {name}"), settings=dict(asking=settings))

def test_a_record_says_who_was_asked():
    rows = pd.DataFrame([dict(question_id=1, pointer=(2,))])
    def known(manifest): return who_was_asked(RLData(rows, Pool({1: (2, 3)}), manifest))
    one = known(asked_by("a", style="chat", evaluator="lmms"))
    assert one["lvlm"] == dict(name="a", dtype="float32", fingerprint="of a")
    assert one["asking"] == dict(style="chat", evaluator="lmms", answer_weight=None)
    two = known(dict(sources=[asked_by("a", style="chat"), asked_by("b", style="chat")]))
    assert two["lvlm"]["name"] == "a and b" and two["asking"]["style"] == "chat"
    assert known(dict(sources=[asked_by("a"), {}]))["lvlm"]["name"] is None
    assert known({}) == dict(lvlm=dict(name=None, dtype=None, fingerprint=None), facts=None,
                             asking=dict(style=None, evaluator=None, answer_weight=None))

def test_who_answers_is_no_path_of_this_machine(tmp_path):
    class Lvlm:
        name = str(tmp_path/"tiny")
        model = torch.nn.Linear(1, 1)
        model.dtype = torch.bfloat16
        fingerprint = "ab"
        image_processor = AutoImageProcessor.from_pretrained(repo_path("models", "tiny-qwen2.5-vl"))
    class Scorer: lvlm = Lvlm
    assert answerer(Scorer) == dict(
        name="tiny", dtype="bfloat16", min_pixels=3136, max_pixels=50176, fingerprint="ab",
    )
    Lvlm.name = "Qwen/Qwen2.5-VL-3B-Instruct"
    assert answerer(Scorer)["name"] == Lvlm.name

def test_rewards_of_groups_by_hand():
    "A policy that is sure of its first sequence"
    class Sure(torch.nn.Linear):
        def forward(self, query, cands, cand_mask, seqs, seq_mask=None):
            return torch.where(torch.arange(seqs.shape[1]) == 0, 0., -1e9).expand(seqs.shape[:2])
    learn = selector_learner(synth_dls(8, 16), Sure(1, 1))
    earned = group_rewards(learn)
    *_, rewards, mask = next(iter(learn.dls.valid))
    assert earned.reward.tolist() == pytest.approx(rewards[:, 0].tolist())
    assert earned.reward_of_best.tolist() == pytest.approx(rewards.masked_fill(~mask, -torch.inf).amax(1).tolist())
    alike = (rewards*mask).sum(1) / mask.sum(1)
    assert len(earned) == 16
    assert earned.reward_of_any.tolist() == pytest.approx(alike.tolist(), abs=1e-6)
    assert (earned.regret - (earned.reward_of_best - earned.reward)).abs().max() < 1e-6

def test_an_interval_holds_the_mean_about_as_often_as_it_says():
    g = torch.Generator().manual_seed(0)
    x = torch.rand(100, 50, generator=g)
    found = [mean_interval(row) for row in x]
    assert all(f["low"] < f["value"] < f["high"] and f["n"] == 50 and f["split"] == "dev" for f in found)
    assert 85 <= sum(f["low"] < .5 < f["high"] for f in found) <= 100
    assert mean_interval([.5])["low"] is None
    same = mean_interval([.25]*4)
    assert (same["low"], same["value"], same["high"]) == (.25, .25, .25)

def test_saving_draws_nothing_and_info_that_is_given_wins(tmp_path):
    learn = selector_learner(synth_dls(16, 16), d_hidden=8, seed=5)
    with quiet(learn): learn.fit_rce(1)
    before = torch.get_rng_state()
    learn.save_selector(tmp_path/"a", info=dict(seed=7, metrics=dict(accuracy=.5)))
    assert torch.equal(before, torch.get_rng_state())
    says = load_selector(tmp_path/"a").passport
    assert says["seed"] == 7 and says["stages"] == ["rce, 1 epoch"]
    assert says["metrics"].keys() == {"reward", "reward_of_any", "reward_of_best", "regret", "accuracy"}
    assert says["metrics"]["regret"]["value"] == pytest.approx(group_rewards(learn).regret.mean())

def test_numbers_that_come_later_are_added(ckpt):
    later = dict(accuracy=dict(value=.5, low=.4, high=.6, n=100, split="test"))
    model = note_metrics(ckpt, later)
    again = load_selector(ckpt)
    assert again.passport == model.passport and again.passport["metrics"].keys() == {"regret", "accuracy"}
    assert "| test | 0.5 | 0.4 to 0.6 | 100 |" in (ckpt/"README.md").read_text()
    with pytest.raises(ValueError, match="on the hub"): note_metrics("hf://me/selector", later)

def test_a_run_is_a_reference_too(ckpt, tmp_path):
    shutil.copytree(ckpt, tmp_path/"run"/"checkpoint")
    learn = selector_learner(synth_dls(8, 8), d_hidden=8)
    for ref in (tmp_path/"run", str(tmp_path/"run"/"checkpoint"), ckpt):
        found = find_reference(learn, ref, "KLToRef")
        assert same(found.state_dict(), load_selector(ckpt).state_dict())
    with pytest.raises(ValueError, match="nor the folder of a checkpoint"):
        find_reference(learn, str(tmp_path/"runs"), "KLToRef")

# ---- a run fills it in

@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with groups of 12 training and 6 development questions, answered by hash"
    path = tmp_path_factory.mktemp("runs")
    for split, n in (("train", 12), ("dev", 6)): job_of(path, split, limit=n).run(path/split, progress=False)
    return path

def job_of(path, split, **flat):
    return settings_of(Job, lvlm="mock", store=str(path/"store"), test=0, style="chat", split=split, **flat)

def trained(place, folder, teaching, choosing=None):
    choosing = choosing or Choosing(dev=str(place/"dev"))
    data = training_data([place/"train"], job_of(place, "dev"), teaching, choosing)
    asking = job_of(place, "dev").asking
    train_run(folder, data, teaching, choosing, asking=asking, say=noop)
    return data, load_selector(folder)

def test_a_run_says_everything_that_somebody_needs(place, tmp_path):
    stages = dict(warmup=dict(n_epoch=1, steps=2), listwise=dict(n_epoch=1, watch=None))
    data, model = trained(place, tmp_path/"ours", Teaching(set=stages, seed=2))
    says = model.passport
    assert says["encoder"] == "models/tiny-clip" and says["encoder_fingerprint"] == data.job.clip().fingerprint
    assert says["kind"] == "mixed+answers" and says["reads_evidence"]
    assert says["lvlm"] == "mock" and says["style"] == "chat" and says["evaluator"] == "official"
    assert says["facts"] == data.train.rows.scorer.iloc[0]
    assert says["shots"] == [2] and (says["sampler"], says["K"]) == ("random", 16)
    assert says["recipe"] == "ours" and says["changes"] == stages and says["seed"] == 2
    assert says["stages"] == ["warmup, 1 epoch", "listwise, 1 epoch"] and len(says["plan"]) == 3
    assert model.info["recipe_parts"]["stages"][0]["fit"] == "warmup"
    assert (says["train"], says["dev"]) == (data.train.fingerprint, data.dev.fingerprint)
    assert says["metrics"]["regret"]["n"] == 6 and says["metrics"]["regret"]["split"] == "dev"
    # a mock has no weights, and nobody has stated a licence: all else is known
    unknown = {name for name, value in says.items() if value is None}
    assert unknown == {"lvlm_fingerprint", "server", "dtype", "min_pixels", "max_pixels", "license"}

def test_a_run_of_one_objective_chosen_by_accuracy(place, tmp_path):
    by_accuracy = Choosing(dev=str(place/"dev"), choose="accuracy")
    first, model = trained(place, tmp_path/"first", SHORT, by_accuracy)
    says = model.passport
    assert says["recipe"] == "rce" and says["changes"] == dict(watch=None) and says["stages"] == ["rce, 2 epochs"]
    accuracy = says["metrics"]["accuracy"]
    assert 0 <= accuracy["low"] <= accuracy["value"] <= accuracy["high"] <= 1 and accuracy["n"] == 6
    assert model.info["choose"] == "accuracy" and "start" not in model.info
    on = Teaching(objective="rce", epochs=1, bs=4, set=dict(watch=None), start=str(tmp_path/"first"))
    _, second = trained(place, tmp_path/"second", on)
    assert "start" in second.info and "choose" not in second.info and "accuracy" not in second.info["metrics"]
