"The command line: words in, files and an exit status out"
import contextlib, io, json, os, re, subprocess, sys, warnings
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
import pandas as pd, pytest
import own_warnings
from leverplus import cli
from leverplus.doors import DOORS, STATUS, command_settings, read_door, remembered, say
from leverplus.groups import RLData
from leverplus.plan import measure_speed, measured_rate
from leverplus.runs import Run
from leverplus.settings import Proposing, change, flat_names, plain_settings, settings_of
from leverplus.sweep import read_grid, read_rows
from leverplus.settings import Job

ROOT = Path(__file__).resolve().parent.parent
# what the console script does
RUN = [sys.executable, "-c", "import sys; from leverplus.cli import main; sys.exit(main())"]

def leverplus(*words, **kw):
    env = {k: v for k, v in os.environ.items() if k != "TQDM_DISABLE"} | dict(
        OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)
    )
    return subprocess.run(
        [*RUN, *map(str, words)], capture_output=True, text=True, timeout=300, env=env, **kw
    )

@pytest.fixture(scope="module", autouse=True)
def no_warning_of_ours():
    "Every door of this file: a warning that this package causes is an error"
    with pytest.MonkeyPatch.context() as patch:
        own_warnings.at_the_doors(patch.setattr)
        yield

def go(line, code=0):
    "What a command prints; its exit status must be `code`"
    out = io.StringIO()
    err = io.StringIO()
    words = line.split() if isinstance(line, str) else line
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try: got = cli.main(words)
        except SystemExit as e: got = e.code
    assert got == code, f"{words}: status {got}, wanted {code}\n{out.getvalue()}{err.getvalue()}"
    return out.getvalue() if code == 0 else err.getvalue().strip().splitlines()[-1]

def test_a_command_that_causes_a_warning_ends_with_a_status(monkeypatch):
    "The instrument itself"
    module = dict(__name__="leverplus.cli")
    exec("import warnings\ndef old(door): warnings.warn('old argument', FutureWarning)", module)
    monkeypatch.setattr(cli, "do_check", module["old"])
    with warnings.catch_warnings():
        warnings.simplefilter("always") # whatever pytest was told
        assert "old argument" in go("check runs/a", 1)

ROAD = (
    "embed --split train dev --shard 1/2 --quiet",
    "embed --split train dev --shard 0/2 --quiet",
    "pools --split train dev",
    "generate --n 12 --test 4 --quiet --out runs/train",
    "generate --n 12 --split dev --test 0 --quiet --out runs/dev",
    "check runs/train runs/dev --csv runs/health",
    "mine runs/train --out runs/mined --rounds 1 --tries 2 --quiet",
    "merge runs/train runs/mined --out runs/all",
    "train runs/all --dev runs/dev --objective rce --out runs/rce --epochs 2 --bs 4",
    "infer --selector runs/rce --n 12 --quiet --out runs/answers",
    (
        "eval --selector runs/rce --selector again=runs/rce --n 12 --shots 1 2 --draws 2 --fixed 2 --facts"
        " runs/dev --sizes 6 all --quiet --out runs/eval"
    ),
    "report runs/eval --cases 4 --groups runs/all",
    (
        "sweep runs/all --dev runs/dev --grid objective=rce,sft --base rce.n_epoch=1 sft.n_epoch=1 bs=4"
        " --seeds 0 --quiet --out runs/sweep"
    ),
)

@pytest.fixture(scope="module")
def road(tmp_path_factory):
    "All doors on twelve questions of the embedded world, with its own model: (folder, {line: what was said})"
    folder = tmp_path_factory.mktemp("road")
    was = os.getcwd()
    os.chdir(folder)
    try: yield folder, {line: go(line) for line in ROAD}
    finally: os.chdir(was)

@pytest.fixture
def there(road, monkeypatch):
    monkeypatch.chdir(road[0])
    return road[0]

def test_all_doors_on_the_embedded_world(there, road):
    from leverplus.infer import check_results
    from leverplus.learner import load_selector
    said = {
        k.split(" --out ")[-1].split()[0] if " --out " in k else k.split()[0]: v for k, v in road[1].items()
    }
    train, mined, every = (RLData.load(f"runs/{n}") for n in ("train", "mined", "all"))
    assert len(train.queries) == 12
    assert len(train) == 12 * 15
    assert len(every) == len(mined) >= len(train)
    assert "repeated sequences" in said["runs/all"]
    assert (Path("runs/health") / "verdict.csv").exists()
    info = load_selector("runs/rce/checkpoint").info
    assert info["objective"] == "rce"
    assert info["pool"]["K"] == 16
    assert len(pd.read_csv("runs/rce/history.csv")) == 2
    # of the split that was named, and of no other
    dev = Job(split="dev").items().query("split == 'dev'").question_id[:12].tolist()
    check_results("runs/answers/predictions.json", dev)
    assert RLData.load("runs/dev").queries == dev
    table = pd.read_csv("runs/eval/results.csv")
    scored = pd.read_parquet("runs/eval/predictions.parquet")
    assert set(scored.question_id) == set(dev)
    baselines = """random similar_image similar_text similar_mixed similar_mixed_first mmr vote majority_vote
        majority_vote_all fixed oracle""".split()
    picked = [*baselines, "rce", "again"]
    assert set(table.selector) == {*picked, "zero_shot"}
    with_shots = {(s, k) for s, k in zip(table.selector, table.shots) if k}
    assert with_shots == {(s, k) for s in picked for k in (1, 2)}
    text = said["runs/eval"]
    assert "looks at dev: 1" in text
    assert "lower bound" in text
    assert "its row flatters" in text
    assert "half_width" in text
    same = pd.read_csv("runs/eval/tests.csv")
    assert len(same) == 8
    assert ((same.p_holm <= 0.05) | (same.verdict == "no difference shown")).all()
    cells = pd.read_csv("runs/sweep/cells.csv")
    assert cells.status.tolist() == ["done"] * 2
    assert cells.objective.tolist() == ["rce", "sft"]
    assert "Development questions only" in said["runs/sweep"]
    assert "won" in Path("runs/eval/report.html").read_text()
    assert said["report"].strip().endswith("runs/eval/report.html")

FREE = (
    "generate --n 12 --shots 0 1 2 --counts {\"random\":2,\"retrieval\":2} --test 0 --quiet --out runs/counts",
    "train runs/counts --dev-share .25 --recipe free --set"
    " {\"warmup\":null,\"listwise\":{\"n_epoch\":2},\"data\":{\"bs\":4,\"weights\":{\"price\":0.02}}}"
    " --quiet --out runs/free",
    "infer --selector runs/free --shots stop --n 12 --quiet --out runs/free-answers",
    "infer --picker knn_facts --groups runs/counts --n 12 --quiet --out runs/knn-answers",
    "eval --selector runs/free --shots 1 2 --draws 1 --fixed 0 --groups runs/counts --price 0.05 --n 12"
    " --quiet --out runs/free-eval",
    "report runs/free-eval --cases 2",
)

def test_a_free_number_of_demonstrations_from_the_shell(there):
    "Nothing, one or two: tried, trained with a price, picked, and held against fixed numbers, rules among them"
    from leverplus.learner import load_selector
    said = [go(line) for line in FREE]
    data = RLData.load("runs/counts")
    assert data.shots == (0, 1, 2) and (data.rows.pointer.map(len) == 0).sum() == 12
    made = load_selector("runs/free/checkpoint")
    assert made.config["stop"] and made.config["min_shots"] == 0
    assert made.info["reward"]["price"] == .02
    shown = pd.read_parquet("runs/free-answers/predictions.parquet").pointer.map(len)
    assert len(shown) == 12 and shown.max() <= 2
    assert Run("runs/free-answers").settings["kind"] == "mixed"
    assert Run("runs/knn-answers").fingerprints["groups"] == data.fingerprint
    counts = pd.read_csv("runs/free-eval/counts.csv").set_index(["selector", "shots"])
    scored = pd.read_parquet("runs/free-eval/predictions.parquet")
    assert {"knn_facts", "logistic", "free", "free_free", "oracle_free"} <= set(scored.selector)
    two = counts.loc[("free", 2)]
    assert two.after_price == pytest.approx(two.acc - .1)
    free = scored[scored.selector == "free_free"]
    assert counts.loc[("free_free", 2)].after_price == pytest.approx(
        (free.vqa_acc_score - .05*free.pointer.map(len)).mean()
    )
    assert Run("runs/free-eval").settings["kinds"] == dict(free="mixed")
    assert "free_free" in said[4]
    assert "How many demonstrations" in Path("runs/free-eval/report.html").read_text()

def test_rules_that_learn_want_groups_of_candidates(there):
    assert "wanted --groups RUN" in go("infer --how logistic --n 4 --out runs/x", 2)
    said = go("infer --how knn_facts --groups runs/dev --split train --n 4 --quiet --out runs/x", 2)
    assert "--groups: 12 questions are of another split" in said

def test_what_others_asked_is_not_asked_again(there, monkeypatch):
    "The oracle of the table knows the sequences of `--facts`; a second run asks nothing, and is no second look"
    scored = pd.read_parquet("runs/eval/predictions.parquet")
    best = RLData.load("runs/dev").rows.groupby("question_id").vqa_acc_score.max()
    got = scored[(scored.selector == "oracle") & (scored.shots == 2)].set_index("question_id").vqa_acc_score
    assert (got >= best.loc[got.index]).all()
    from leverplus.scorer import SharedScorer
    monkeypatch.setattr(SharedScorer, "run", lambda *a, **k: pytest.fail("asked"))
    again, once_more = (go(ROAD[10] + " --resume") for _ in range(2))
    looks, same = (re.search(r"looks at dev: (\d+)", said).group(1) for said in (again, once_more))
    assert looks == same

def snapshot(): return {p: p.stat().st_mtime_ns for p in Path(".").rglob("*")}

def test_dry_runs_ask_nothing_and_write_nothing(there, monkeypatch):
    monkeypatch.setattr(Job, "scorer", lambda self: pytest.fail("loaded a model"))
    monkeypatch.setattr("leverplus.rldata_scale.embed_items", lambda *a, **k: pytest.fail("embedded"))
    before = snapshot()
    lines = [l for l in ROAD if l.split()[0] not in ("check", "report")] + [
        "demo",
        "infer --how mmr --out runs/x",
        "eval --out runs/x --fixed 0 --exact-oracle",
        "generate --data data/islands --out runs/x",
        "embed",
    ]
    said = {l: go(l + " --dry-run") for l in lines}
    assert snapshot() == before
    for l, text in said.items():
        assert f"plan of leverplus {l.split()[0]}; nothing was asked, nothing was written" in text, text
        assert "LVLM calls" in text, text
        assert "disk" in text, text
    calls = {
        l: int(re.search(r"LVLM calls +(?:at most )?([\d,]+)", t)[1].replace(",", ""))
        for l, t in said.items()
    }
    assert calls["generate --data data/islands --out runs/x"] == 900 * 15 + 32
    assert calls[ROAD[3]] == 0
    assert calls[ROAD[9]] == 12
    assert calls["eval --out runs/x --fixed 0 --exact-oracle"] == 250 * 240
    slow = go("generate --out runs/x --rate 0.5 --dry-run --shard 0/3")
    assert "h at 0.5 prompts/s (given)" in slow
    assert "part 0 of 3" in slow
    unknown = go("generate --out runs/x --lvlm somebody/else --dry-run")
    assert "not known: --rate measure asks for ten seconds, --rate X says it" in unknown
    assert "somebody/else, size not known" in unknown
    big = go("generate --out runs/x --lvlm Qwen/Qwen2.5-VL-7B-Instruct --dry-run")
    assert "(EXPECTED, not measured: one H100 at 19% of its peak for text and 8% for images" in big, big
    assert "images of 4 tokens" in big and "download     Qwen/Qwen2.5-VL-7B-Instruct, 17 GB" in big, big
    assert "memory       at most 19 GB: weights 17 GB" in big, big
    assert measured_rate("runs/x") is None
    assert measured_rate("runs/nowhere") is None

def test_a_rate_is_measured_on_the_spot(there, monkeypatch):
    monkeypatch.setattr("leverplus.plan.measure_speed", partial(measure_speed, seconds=1.))
    before = snapshot()
    measured = go("generate --out runs/x --rate measure --n 12 --dry-run")
    assert "the model was asked for some seconds, to measure, nothing was written" in measured, measured
    assert re.search(r"time +[\d.]+ (s|min) at [\d.e+]+ prompts/s.*\(measured just now: ", measured), measured
    assert snapshot() == before
    assert "--rate: 'fast': wanted a number or 'measure'" in go("generate --out runs/x --rate fast --dry-run", 2)

def test_the_rate_of_a_run_is_measured(tmp_path):
    part = RLData.load(go_mock(tmp_path, "--window 2 --n 8"))
    parts = sorted(tmp_path.glob("run/part-*.parquet"))
    assert len(parts) == 4
    for i, p in enumerate(parts): os.utime(p, (1000 + 10*i, 1000 + 10*i))
    assert measured_rate(tmp_path / "run") == 2 * 15 / 10
    plan = go(f"generate --lvlm mock --n 20 --window 2 --dry-run --out {tmp_path/'run'}")
    assert "3 prompts/s (measured in" in plan

def go_mock(folder, more, code=0, name="run"):
    go(f"generate --lvlm mock --test 0 --quiet --store {ROAD_STORE} --out {folder/name} {more}", code)
    return folder / name

@pytest.fixture(autouse=True)
def one_store(road):
    global ROAD_STORE
    ROAD_STORE = road[0]/"runs"/"store"

def test_parts_of_embeddings_make_the_whole(there, monkeypatch):
    "The same fingerprint as in one go, where `Job.inputs` looks for it"
    import torch
    from leverplus.embed import EmbedStore, embed_items, gather_stores
    job = settings_of(Job, split="dev", store="runs/store")
    items = job.items()
    some = items.iloc[::60]
    whole = embed_items(some, ROOT / "models" / "tiny-clip", progress=False)
    kept = EmbedStore.load(job.embed_place(items))
    monkeypatch.setattr("leverplus.rldata_scale.embed_items", lambda *a, **k: pytest.fail("embedded again"))
    store = job.inputs()[1]
    assert store.fingerprint == kept.fingerprint
    assert torch.allclose(kept.get(some.question_id), whole.get(some.question_id), atol=1e-5)
    # locks stay
    assert gather_stores(some, [kept]).fingerprint == whole.fingerprint
    assert not list(Path("runs/store").glob("embed-parts-*/*/[!.]*"))
    assert "(was there)" in go(ROAD[0])

def test_shards_of_predictions_make_the_whole(there):
    line = "infer --lvlm mock --selector runs/rce --n 12 --how beam --width 3 --by vote --quiet --out runs/"
    go(line + "whole")
    assert "still to come: 0/3, 2/3" in go(line + "union --shard 1/3")
    go(line + "union --shard 0/3")
    last = go(line + "union --shard 2/3")
    assert "questions 12, failed 0" in last
    for name in ("predictions.json", "predictions.parquet", "candidates.parquet"):
        if name.endswith("json"):
            assert json.loads(Path("runs/union", name).read_text()) == json.loads(
                Path("runs/whole", name).read_text()
            )
        else:
            a, b = (
                pd.read_parquet(f"runs/{n}/{name}").drop(columns=["shots"], errors="ignore")
                for n in ("whole", "union")
            )
            pd.testing.assert_frame_equal(a, b)
    from leverplus.evaluate import compare_runs
    assert (compare_runs("runs/union", "runs/whole").delta == 0).all()
    assert "still to come" not in go(line + "union --shard 2/3")
    assert "shards: 3 there, 2 now" in go(line + "union --shard 0/2", 2)

def test_a_selector_proposes(there):
    """Beams of a selector, in one process or in shards; not mixed with those of similarity, and only from
    pools that it knows
    """
    import torch
    from leverplus.learner import load_selector
    from leverplus.rldata_generate import policy_fingerprint
    from leverplus.rldata_propose import propose
    model = load_selector("runs/rce/checkpoint")
    torch.manual_seed(0)
    with torch.no_grad():
        [p.add_(torch.randn_like(p) * p.std().nan_to_num(0.0).clamp(min=0.1)) for p in model.parameters()]
    model.save_pretrained("runs/wild", info=model.info)
    line = 'generate --lvlm mock --limit 12 --test 0 --quiet --window 2 --counts {"beam":4} --out runs/'
    go(line + "second --selector runs/wild")
    rows = RLData.load("runs/second")
    go(line + "similar")
    assert RLData.load("runs/similar").rows.pointer.tolist() != rows.rows.pointer.tolist()
    job = settings_of(Job, store="runs/store")
    _, store, pool = job.inputs()
    want = propose(pool, store, rows.queries, 2, model, Proposing(counts=dict(beam=4)))
    assert rows.rows.pointer.tolist() == want.pointer.tolist()
    assert rows.manifest["settings"]["policy"] == policy_fingerprint(model)
    for i in (0, 1): go(line + f"shards --selector runs/wild --shard {i}/2")
    pd.testing.assert_frame_equal(RLData.load("runs/shards").rows, rows.rows)
    assert "policy" in go(line + "second", 2)
    assert "K: 16 in the checkpoint, 8 here" in go(line + "few --selector runs/wild --K 8", 2)
    assert not Path("runs/few").exists()
    go(line + "few --selector runs/wild --K 8 --other-pool")
    assert "at most 4" in go(line + "long --selector runs/wild --shots 5", 2)
    assert "runs/nobody" in go(line + "long --selector runs/nobody", 2)
    assert "4 per question" in go(line + "long --selector runs/wild --dry-run")

def test_generation_goes_on_after_an_interrupt(tmp_path, monkeypatch):
    from leverplus.rldata_generate import Generation
    window = Generation.window
    stop = lambda self, i: window(self, i) if i < 1 else (_ for _ in ()).throw(KeyboardInterrupt())
    assert "wanted manifest.json" in go(f"generate --lvlm mock --out {tmp_path/'run'} --resume", 2)
    with monkeypatch.context() as m:
        m.setattr(Generation, "window", stop)
        run = go_mock(tmp_path, "--n 6 --window 2", 130)
    assert len(list(run.glob("part-*"))) == 1
    go_mock(tmp_path, "--n 6 --window 2 --resume")
    whole = go_mock(tmp_path, "--n 6 --window 2", name="whole")
    pd.testing.assert_frame_equal(RLData.load(run).rows, RLData.load(whole).rows)

def test_training_goes_on_after_an_interrupt(there, monkeypatch):
    line = "train runs/all --dev runs/dev --epochs 3 --bs 4 --objective sft --out runs/"
    seen = []
    def line_or_interrupt(*lines, **kw):
        if kw: return say(*lines, **kw)   # an error
        seen.append(lines)
        if len(seen) == 2: raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(cli, "say", line_or_interrupt)
        assert go(line + "cut", 130).endswith("the same command goes on from here")
    assert (Path("runs/cut") / "state/sft/state.pt").exists()
    assert "no selector lies there" in go("infer --selector runs/cut --out runs/x", 2)
    go(line + "cut --resume")
    go(line + "uncut")
    weights = [Path(f"runs/{n}/checkpoint/model.safetensors").read_bytes() for n in ("cut", "uncut")]
    assert weights[0] == weights[1]
    assert "lr: None there, 0.1 now" in go(line + "cut --lr 0.1", 2)
    go(line + "cut --lr 0.1 --overwrite --quiet")

def test_an_epoch_chosen_by_accuracy(there, monkeypatch):
    "What is kept has the dev accuracy that `infer` finds; what is stored, or was asked before, is not asked again"
    from leverplus.scorer import SharedScorer
    from leverplus.runs import Run

    asked, run = [], SharedScorer.run
    monkeypatch.setattr(
        SharedScorer,
        "run",
        lambda self, prompts, *a, **k: asked.extend((p.question_id, tuple(p.pointer)) for p in prompts)
        or run(self, prompts, *a, **k),
    )
    line = (
        "train runs/all --dev runs/dev --choose accuracy --objective sft --epochs 2 --bs 4 --lr 0.05 --quiet"
        " --out runs/"
    )
    said = go(line + "chosen")
    acc = Run("runs/chosen").metrics["dev_accuracy"]
    stored = RLData.load("runs/dev").rows
    assert f"dev accuracy {acc:.4f}" in said
    assert len(asked) == len(set(asked))
    assert not set(asked) & set(zip(stored.question_id, stored.pointer))
    assert f"accuracy {acc:.4f} (dev)" in go(
        "infer --selector runs/chosen --split dev --n 12 --quiet --out runs/chosen-dev"
    )
    asked.clear()
    go(line + "chosen --resume")
    assert not asked
    assert "choose" in go(line.replace("accuracy", "regret") + "chosen", 2)
    assert "at most 36, one per question" in go(line + "x --dry-run")
    assert not Path("runs/x").exists()
    # another judge than the one that made the data
    assert "its facts are of scorer" in go(line + "other --lvlm mock", 2)
    assert "its facts are of scorer" in go(line + "chosen --style chat", 2)
    keeps_the_last = "--recipe plan5-as-run --quiet --out runs/other"
    said = go(f"train runs/all --dev runs/dev --choose accuracy {keeps_the_last}", 2)
    assert "no stage chooses" in said
    assert not Path("runs/other").exists()
    # the warm-up keeps its last epoch
    assert "at most 60" in go(
        "train runs/all --dev runs/dev --choose accuracy --recipe ours --set {\"listwise\":{\"n_epoch\":4}}"
        " --dry-run --out runs/x"
    )

def test_recipes_and_shares(there):
    said = go(
        "train runs/all --dev-share 0.5 --recipe rce-only --set {\"rce\":{\"n_epoch\":1}} --quiet --out"
        " runs/recipe"
    )
    assert "epochs 1" in said
    assert "epochs 2" in go(
        "train runs/all --dev-share 0.5 --recipe ours --set"
        " {\"warmup\":{\"n_epoch\":1,\"steps\":2},\"listwise\":{\"n_epoch\":1}} --quiet --out runs/ours"
    )
    assert "did you mean" in go("train runs/all --recipe rce-onlyy --out runs/x", 2)
    assert "lr beside recipe" in go("train runs/all --recipe rce-only --lr 1 --out runs/x", 2)
    for more in (["--set", '{"speed": 9}'], ["--model", '{"speed": 9}'], ["--weights", '{"speed": 9}']):
        line = "train runs/all --dev runs/dev --objective rce --out runs/x".split()
        assert "speed" in go([*line, *more], 2)
    go("train runs/all --dev runs/dev --objective grpo --epochs 1 --start runs/rce --quiet --out runs/grpo")
    assert not Path("runs/x").exists()

def test_sweeps_in_shards(there, monkeypatch):
    line = (
        "sweep runs/all --dev runs/dev --lvlm mock --base sft.n_epoch=1 objective=sft --seeds 0 --quiet --out"
        " runs/shards "
    )
    Path("grid.json").write_text('{"bs": [4]}')
    cells = line + "--grid grid.json sft.lr=0.001,0.01 "
    first = go(cells + "--shard 0/2")
    done = [row for file in Path("runs/shards").glob("cells*.jsonl") for row in read_rows(file)]
    assert ("still to come" in first) == (len(done) < 2)   # which cell is whose depends on the data's last digits
    assert "default" in go(cells + "--shard 1/2")
    assert len(pd.read_csv("runs/shards/table.csv")) == 2
    assert "2 lie in runs/shards" in go(line + "--grid grid.json sft.lr=0.001,0.01 --dry-run")
    assert read_grid(["a=x,1", "b=[1,2],[3]", "c=true"]) == dict(a=["x", 1], b=[[1, 2], [3]], c=[True])
    assert "speed" in go(line + "--grid speed=1,2", 2)
    assert "nowhere.json" in go(line + "--grid nowhere.json", 2)
    assert "d_hidden 0: wanted a whole number >= 1" in go(line + "--grid model.d_hidden=0", 2)
    with monkeypatch.context() as m:
        m.setattr("leverplus.sweep.train_cell", fails)
        assert "1 of 1 cells failed" in go(line + "--grid model.d_hidden=8", 1)

def fails(*args, **kw): raise RuntimeError("this cell fails")

def test_the_demo_gets_its_words(monkeypatch, tmp_path):
    got = []
    monkeypatch.setattr(
        "leverplus.demo.run_demo", lambda *a, **k: got.append((a, k)) or pd.DataFrame(dict(acc=[0.5]))
    )
    said = go(
        [
            "demo",
            "--path",
            str(tmp_path),
            "--seed",
            "3",
            "--train-queries",
            "24",
            "--set",
            '{"dev_queries": 9}',
            "--quiet",
        ]
    )
    assert "report.html" in said
    assert got == [((str(tmp_path), 3, False, False), dict(train_queries=24, dev_queries=9))]
    assert "the demo knows" in go(["demo", "--set", '{"speed": 9}'], 2)

REPEATED = {
    "runs/train": "manifest.json",
    "runs/mined": "manifest.json",
    "runs/all": "manifest.json",
    "runs/rce": "settings.json",
    "runs/answers": "settings.json",
    "runs/eval": "settings.json",
    "runs/sweep": "command.json",
}

@pytest.mark.parametrize("run", REPEATED)
def test_a_runs_own_settings_file_repeats_it(there, run):
    "`--config` with the file, or with the folder, and another --out"
    line = next(l for l in ROAD if f" --out {run}" in l)
    door = line.split()[0]
    again = f"{run}-again"
    go(f"{door} --config {run}/{REPEATED[run]} --out {again}")
    for name in ("predictions.json", "tests.csv", "checkpoint/model.safetensors"):
        if (Path(run)/name).exists():
            assert (Path(again)/name).read_bytes() == (Path(run)/name).read_bytes(), name
    if door == "eval":
        scored = [pd.read_parquet(f"{r}/predictions.parquet") for r in (run, again)]
        pd.testing.assert_frame_equal(*scored)
    if REPEATED[run] == "manifest.json":
        pd.testing.assert_frame_equal(RLData.load(again).rows, RLData.load(run).rows)
    if door == "sweep":
        judged = ["cell", "status", "accuracy"]
        cells = [pd.read_csv(f"{r}/cells.csv") for r in (run, again)]
        same = [c for c in judged if c in cells[0]]
        pd.testing.assert_frame_equal(*[c[same] for c in cells])
    assert command_settings(read_door([door, "--config", again, "--out", run])) == command_settings(
        read_door([*line.split()]))
    assert "wanted leverplus report" in go(f"report x --config {run}", 2)

def test_a_config_file_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("split: val\npools: {K: 64}\nmodel: {lvlm: mock}\nshard: 1/4\nblank: true\n")
    door = read_door("infer --config a.yaml --K 32 --out x".split())
    assert (door.split, door.pools.K, door.model.lvlm, door.shard) == ("val", 32, "mock", (1, 4))
    assert door.blank and read_door("infer --config=a.yaml --blank --shard none --out x".split()).shard is None
    Path("a.yaml").write_text("selector: [a]\nsplit: val\n")
    assert read_door("eval --config a.yaml --selector b --out x".split()).selector == ("b",)
    assert read_door("eval --config a.yaml --out x".split()).selector == ("a",)
    Path("a.yaml").write_text("teaching: {epochs: 3}\nruns: a\nout: ~/x\n")
    door = read_door("train --config a.yaml --objective rce".split())
    assert (door.teaching.epochs, door.runs, door.out) == (3, ("a",), str(Path("~/x").expanduser()))
    for text, says in [
        ("pools: {J: 64}", "a.yaml: pools.J: no such setting"),
        ("pool: {K: 64}", "a.yaml: pool: no such setting; did you mean pools?"),
        ("mining: {rounds: 2}", "a.yaml: mining: no such setting"),
        ("K: 64", "a.yaml: K: no such setting; it lives in pools: Infer(pools=Pools(K=...))"),
        ("pools: {pool_seed: 3}", "a.yaml: pools.pool_seed: no such setting; it is called seed in its group"),
        ("pools: {pool-seed: 3}", "a.yaml: pools.pool-seed: no such setting"),
        ("pools: 5", "a.yaml: pools 5: wanted settings by name"),
        ("pools: {K: true}", "a.yaml: pools.K True: wanted a number"),
        ("shard: 5", "a.yaml: 5 is no shard"),
        ("picking: {shots: [1, stop]}", "several, or 'stop' alone"),
        ("around: {debug: true}", "a.yaml: around: --config and --debug are words"),
        ("pools: {K: 0}", "a.yaml: pools.K 0: wanted a number >= 1"),
        ("pools: [", "a.yaml: no YAML"),
        ("- 1", "a.yaml: holds a list, wanted settings by name"),
    ]:
        Path("a.yaml").write_text(text)
        said = go("infer --config a.yaml --out x", 2)
        assert says in said, said
    assert "--config wants a file" in go("infer --out x --config", 2)
    assert "--config wants a file" in go(["infer", "--out", "x", "--config", ""], 2)
    assert "--config twice" in go("infer --out x --config a.yaml --config b.yaml", 2)
    Path("a.yaml").write_bytes(b"\xff\xfe\x00")
    assert "a.yaml: no YAML" in go("infer --config a.yaml --out x", 2)
    Run.create("by-function", dict(a=1))
    assert "a function made this run" in go("infer --config by-function --out x", 2)
    Path("a").mkdir()
    assert "none of settings.json" in go("infer --config a --out x", 2)

def test_six_questions_end_to_end(tmp_path, monkeypatch, capsys, road):
    """From another working folder: the embedded world, the tiny model, verified, in two shards, one of them in
    a process of its own
    """
    words = [
        "generate",
        "--limit",
        "6",
        "--window",
        "2",
        "--test",
        "4",
        "--shots",
        "1",
        "2",
        "--counts",
        '{"beam": 2, "temperature": {"1.5": 1}}',
        "--device",
        "cpu",
        "--store",
        str(road[0] / "runs/store"),
        "--out",
        "run",
        "--verify",
        "1",
    ]
    # no bar of anybody
    r = leverplus(*words, "--quiet", "--shard", "0/2", cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    assert "%|" not in r.stderr, r.stderr
    monkeypatch.chdir(tmp_path)
    assert cli.main([*words, "--shard", "1/2"]) == 0
    for out in (r.stdout, capsys.readouterr().out):
        assert re.search(
            r"^run: rows \d+, queries \d, failed 0, fingerprint [0-9a-f]{16}, verified 1 of 1, log P within"
            r" .* \(allowed 0.001\), 0 other texts$",
            out,
            re.M,
        ), out
    data = RLData.load(tmp_path / "run")
    assert len(data) == 6 * 6
    assert data.shots == (1, 2)
    assert data.manifest["shards"] == 2
    want = settings_of(
        Job,
        limit=6,
        window=2,
        test=4,
        shots=(1, 2),
        counts=dict(beam=2, temperature={1.5: 1}),
        device="cpu",
        store=str(road[0] / "runs/store"),
    ).run(tmp_path / "want", progress=False)
    assert want.manifest["settings"] == data.manifest["settings"]
    soft = ["vqa_gt_prob", "vqa_gt_logprobs"]
    pd.testing.assert_frame_equal(data.rows.drop(columns=soft), want.rows.drop(columns=soft))
    assert (data.rows.vqa_gt_prob - want.rows.vqa_gt_prob).abs().max() < 1e-4

def test_help_is_good_to_read(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    top = go("--help")
    commands = list(DOORS)
    for code in STATUS: assert f"{code}  {STATUS[code]}" in top
    for c in commands:
        sub = go(f"{c} --help")
        assert c in top, sub
        assert max(map(len, sub.splitlines())) <= 100, sub
        assert "examples:\n  leverplus" in sub, sub
        assert re.search("^in: ", sub, re.M), sub
        assert re.search("^out: ", sub, re.M), sub
    for flag in (
        "--out",
        "--shard I/N",
        "--verify N",
        "--ray WORKERS",
        "--prefix-cache {off,query,global}",
        "--dtype {float32,bfloat16,float16}",
        "--device",
        "--limit",
        "(default: data/islands)",
        "--dry-run",
        "--resume",
    ):
        assert flag in go("generate --help"), flag

def test_examples_of_the_help_are_words_that_the_parser_knows(monkeypatch):
    for c in DOORS:
        examples = go(f"{c} --help").split("examples:")[1].split("\n\n")[0]
        lines = re.split("\n  leverplus ", examples.replace("\\\n", " "))
        assert len(lines) > 1
        for l in lines[1:]: assert command_settings(read_door(l.split()))["door"] == c

def status(words, capsys):
    try: code = cli.main(words)
    except SystemExit as e: code = e.code
    return code, capsys.readouterr().err.strip().splitlines()[-1]

BASE = "generate --lvlm mock --limit 3 --test 0 --quiet --out run".split()

@pytest.mark.parametrize(
    "words, says",
    [
        (["--shard", "2/2"], "'2/2' is no shard"),
        (["--shard", "first"], "'first' is no shard"),
        (["--shard", "1/2/3"], "'1/2/3' is no shard"),
        (["--counts", "beam"], "is not JSON"),
        (["--counts", "[1]"], "wanted an object"),
        (["--counts", '{"beams": 1}'], "beams"),
        (["--shots", "16"], "shots < K"),
        (["--dtype", "int8"], "choose one of float32, bfloat16, float16"),
        (["--data", "nowhere"], "nowhere"),
        (["--split", "val"], "split 'val'"),
        (["--limit", "0"], "limit 0"),
        (["--verify", "-1"], "verify -1: wanted a number >= 0"),
        (["--ray", "0"], "ray 0: wanted a number >= 1"),
        (["--nonsense"], "Unrecognized options: --nonsense"),
        (["--limit", "many"], "'many': wanted an integer"),
        (["--rate", "0"], "rate 0.0: wanted a number > 0"),
        (["--rate", "nan"], "rate nan: wanted a finite number"),
        (["--max-failed", "nan"], "max_failed nan: wanted a finite number"),
        (["--second", '{"most": 1}'], "wanted integers >= 0 for top, low, random"),
        (["--out", ""], "would be the working directory"),
        (["--images", "."], "question 10010: no such image"),
    ],
)
def test_bad_arguments_exit_with_2_and_a_sentence(tmp_path, capsys, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    code, last = status(BASE + words, capsys)
    assert code == 2, last
    assert says in last, last
    assert last.startswith("leverplus"), last
    assert "Traceback" not in last, last
    assert not list(tmp_path.iterdir()) # nothing was begun

@pytest.mark.parametrize(
    "line, says",
    [
        ("", "wanted a COMMAND"),
        ("trian", "is no command"),
        ("generate", "--out"),
        ("check nowhere", "nowhere/manifest.json"),
        ("mine nowhere --out x", "nowhere/manifest.json"),
        ("merge nowhere --out x", "nowhere/manifest.json"),
        ("merge x --out x", "folder of its own"),
        ("train nowhere --out x", "nowhere/manifest.json"),
        ("infer --out x", "--picker greedy wants --selector"),
        ("infer --selector ./none --out x", "./none"),
        ("eval --out x --shots 0", "at least one above 0"),
        ("eval --out x --selector random=y", "y: no such"),
        ("report nowhere", "nowhere is not a run folder"),
        ("embed --data nowhere", "nowhere"),
        ("pools --K 0", "K 0"),
        ("infer --shots two --out x", "--shots: Could not find valid parse"),
        ("train x --out y --epochs 2", "epochs beside recipe ours: name an objective"),
        ("train x --out y --reward gtprob", "reward, weights beside recipe ours"),
        ("train x --out y --bs 4", "bs beside recipe ours"),
        ("train x --out y --objective rce --set {\"lr\":1}", "lr in `set`: say it by its own name"),
        ("generate --out y --threads 2", "threads 2, gpus 0: of Ray actors"),
        ("generate --out y --counts {\"beam\":null}", "proposal counts {'beam': None}"),
        ("train x --out y --set {\"a\":NaN}", "wanted finite numbers"),
        ("embed --split", "split"),
        ("train x --out y --objective sft --recipe ours", "objective sft beside recipe ours"),
        ("train --out y", "runs: wanted at least one"),
        ("infer --config nowhere.yaml --out x", "nowhere.yaml"),
    ],
)
def test_every_door_says_what_is_wrong(tmp_path, monkeypatch, line, says):
    monkeypatch.chdir(tmp_path)
    assert says in go(line, 2)
    assert not list(tmp_path.iterdir())

def test_errors_of_data_name_the_run(there):
    assert "its facts are of scorer" in go("mine runs/train --out runs/x --lvlm mock", 2)
    assert "twice" in go("eval --selector runs/rce --selector runs/rce --out runs/x", 2)
    assert "mixed" in go("infer --lvlm mock --selector runs/rce --sampler mixed --out runs/x --n 4", 2)
    # no right answers
    few = RLData.load("runs/dev")
    rows = few.rows[few.rows.vqa_acc_score < 0.5]
    RLData.from_frame(rows, few.pool.only(rows.question_id.unique())).save("runs/poor")
    assert "alarms: runs/poor: " in go("check runs/poor --strict", 1)
    assert "has no ['speed']" in go("check runs/dev --weights {\"speed\":9}", 2)
    err = io.StringIO()
    with contextlib.redirect_stderr(err): assert cli.main(["train", "nowhere", "--out", "x", "--debug"]) == 2
    assert "Traceback" in err.getvalue()
    assert err.getvalue().strip().splitlines()[-1].startswith("leverplus train: ")

def test_what_cannot_go_on(tmp_path, capsys, monkeypatch, road):
    from leverplus.rldata_generate import run_lock
    monkeypatch.chdir(tmp_path)
    store = ["--store", str(road[0] / "runs/store")]
    assert cli.main(BASE + store) == 0
    with run_lock("run"):
        code, last = status(BASE + store, capsys)
        assert code == 3
        assert f"process {os.getpid()}" in last
    for words, says in [
        (["--seed", "1"], "seed: there 0, here 1"),
        (["--shard", "0/2"], "without shards lies here"),
    ]:
        code, last = status(BASE + store + words, capsys)
        assert code == 2
        assert says in last
    monkeypatch.setitem(sys.modules, "ray", None)
    code, last = status(BASE + store + ["--ray", "2"], capsys)
    assert code == 2
    assert "pip install -e '.[ray]'" in last
    class Off: # a scorer that its reference does not confirm
        from leverplus.lvlm import MockScorer
        fingerprint = "off"
        tolerance = 0.
        inner = MockScorer()
        def run(self, *a, **k): return self.inner.run(*a, **k)
        def reference(self): return self.MockScorer(1)
    monkeypatch.setattr(Job, "scorer", lambda self: Off())
    code, last = status(BASE[:-1] + ["other", *store, "--verify", "1"], capsys)
    assert code == 1
    assert "the reference" in last
    from leverplus.lvlm import MockScorer # questions without an answer are failed work, and asked again
    q = Job(split="dev").items().query("split == 'dev'").question_id.iloc[1]
    monkeypatch.setattr(Job, "scorer", lambda self: MockScorer(fails=[q]))
    line = f"infer --how mmr --n 4 --quiet --store {store[1]} --out p"
    assert f"first [{q}]" in go(line, 1)
    assert "failed 1" in go(line + " --blank")
    assert json.loads(Path("p/predictions.json").read_text())[1] == dict(question_id=int(q), answer="")
    monkeypatch.setattr(Job, "scorer", lambda self: 1 / 0)
    assert "ZeroDivisionError" in go(BASE[:-1] + ["third", *store], 1)

def test_a_door_says_its_job_in_full():
    "Every setting of a generation has a flag, and the door's defaults are those of `Job`, but for the store"
    door = read_door("generate --out x".split())
    assert set(flat_names(Job)) <= set(flat_names(type(door)))
    assert change(cli.job_of(door), store=None) == Job()
    assert door.data.store == "runs/store"

def test_the_console_script_is_declared():
    import configparser
    cfg = configparser.ConfigParser(delimiters=["="])
    cfg.read(ROOT / "settings.ini", encoding="utf8")
    cfg = cfg["DEFAULT"]
    assert "leverplus=leverplus.__main__:main" in cfg["console_scripts"].split()
    assert "leverplus-demo=leverplus.demo:main" in cfg["console_scripts"].split()
    assert cfg["ray_requirements"].startswith("ray[data]>=")

def test_a_selector_is_judged_by_stored_rows(there):
    said = go("check runs/dev --selector runs/rce --selector again=runs/rce --split dev")
    assert said.count("runs/dev, judging ") == 2
    assert "judging again\n" in said
    table = said[said.index("judging again") :]
    assert re.search(r"^2 +sample, T = 1 +12 ", table, re.M)
    assert re.search(r"^ +all +12 ", table, re.M)
    assert "unbiased se" in table
    go("train runs/train --dev runs/dev --objective rce --out runs/own --epochs 1 --bs 4")
    assert "judging own, WHICH WAS TRAINED ON THESE ROWS" in go("check runs/train --selector own=runs/own")
    assert "WHICH WAS" not in said
    # a merged run: its draws are not whole
    assert "forgets its threshold" in go("check runs/all --selector runs/rce", 2)
    assert "judging" not in go("check runs/dev")
    assert go("check runs/dev --selector runs/none --split dev", 2).startswith("leverplus check: runs/none")

# ---- what runs remember ------------------------------------------------------------------------------------

def record(folder, name="manifest.json", **content):
    folder.mkdir(parents=True)
    (folder/name).write_text(json.dumps(content))
    return str(folder)

DATA = dict(folder="~/mine", reader="vqav2", candidates="val", images="none", clip="some/clip", store="runs/mine")
MODEL = dict(lvlm="some/lvlm", dtype="bfloat16", device="cuda", attn="eager", max_pixels=10**5)

@pytest.fixture
def family(tmp_path):
    "Groups, mined groups, a training on them, and a second training on top"
    groups = record(tmp_path/"groups", command=dict(
        door="generate", data=DATA, model=MODEL, pools=dict(K=64, sampler="text", seed=3), asking=dict(style="chat"),
    ))
    mined = record(tmp_path/"mined", command=dict(door="mine", run=groups, data=DATA))
    ours = record(tmp_path/"ours", "settings.json", starts=[
        {}, dict(command=dict(door="train", runs=[mined], data=DATA, model=dict(lvlm="some/lvlm"))),
    ])
    again = record(tmp_path/"again", "settings.json", starts=[
        dict(command=dict(door="train", runs=["nowhere"], teaching=dict(start=ours))),
    ])
    return SimpleNamespace(groups=groups, mined=mined, ours=ours, again=again)

def doors_of(family):
    "Every door that takes a run, with words that name one"
    return {
        "check": ["check", family.groups],
        "mine": ["mine", family.groups, "--out", "x"],
        "train": ["train", family.groups, "--out", "x"],
        "train --dev": ["train", "nowhere", "--dev", family.groups, "--out", "x"],
        "train --start": ["train", "nowhere", "--start", family.ours, "--objective", "rce", "--out", "x"],
        "infer": ["infer", "--selector", family.ours, "--out", "x"],
        "infer by name": ["infer", "--selector", f"us={family.ours}", "--out", "x"],
        "infer --groups": ["infer", "--picker", "knn_facts", "--groups", family.groups, "--out", "x"],
        "eval": ["eval", "--selector", family.again, "--out", "x"],
        "report": ["report", family.ours],
        "sweep": ["sweep", family.mined, "--dev", "nowhere", "--grid", "bs=4", "--out", "x"],
        "generate": ["generate", "--selector", family.again, "--out", "x"],
    }

def test_later_doors_know_data_and_models(family, capsys):
    for name, words in doors_of(family).items():
        door = read_door(words)
        err = capsys.readouterr().err
        data = plain_settings(door.data)
        assert {k: data[k] for k in DATA} == DATA | dict(folder=str(Path("~/mine").expanduser())), name
        assert "--data" in err and "--clip some/clip" in err and "(as in " in err, (name, err)
        if hasattr(door, "model"):
            assert (door.model.lvlm, door.model.device) == ("some/lvlm", None), name
        if hasattr(door, "pools"): assert (door.pools.K, door.pools.sampler, door.pools.seed) == (64, "text", 0), name
        if hasattr(door, "asking"): assert door.asking.style == "chat", name

def test_no_door_that_takes_runs_is_forgotten(family):
    "Every door with a data set and a field for runs is in the table above"
    takes = {
        name for name, cls in DOORS.items()
        if {"data"} <= {f.name for f in fields(cls)} and {"run", "runs", "selector"} & {f.name for f in fields(cls)}
    }
    assert takes == {name.split()[0] for name in doors_of(family)}

def test_flags_and_files_win_over_what_runs_remember(family, tmp_path, capsys):
    door = read_door(["eval", "--selector", family.ours, "--K", "8", "--clip", "other/clip", "--out", "x"])
    assert (door.pools.K, door.pools.sampler, door.data.clip) == (8, "text", "other/clip")
    assert "--K" not in capsys.readouterr().err
    file = tmp_path/"a.yaml"
    file.write_text("pools: {K: 32}\nmodel: {lvlm: mock}\n")
    door = read_door(["eval", "--selector", family.ours, "--config", str(file), "--sampler", "image", "--out", "x"])
    assert (door.pools.K, door.pools.sampler, door.model.lvlm) == (32, "image", "mock")
    assert door.data.clip == "some/clip"

def test_another_data_set_brings_its_own_reader_and_pictures(family):
    door = read_door(["infer", "--selector", family.ours, "--data", "~/other", "--out", "x"])
    usual = read_door(["infer", "--out", "x"])
    assert door.data.clip == "some/clip" and door.data.store == "runs/mine"
    for name in ("reader", "candidates", "images", "check"):
        assert getattr(door.data, name) == getattr(usual.data, name), name
    door = read_door(["mine", family.groups, "--lvlm=mock", "--out", "x"])
    assert (door.model.max_pixels, door.model.dtype, door.model.attn) == (None, None, "eager")

def test_runs_that_python_made_and_checkpoints_remember_too(tmp_path):
    job = settings_of(Job, lvlm="some/lvlm", K=8, clip="some/clip", sampler="image")
    made = record(tmp_path/"made", job=plain_settings(job))
    door = read_door(["mine", made, "--out", "x"])
    assert (door.model.lvlm, door.data.clip) == ("some/lvlm", "some/clip")
    lvlm = dict(name="a/lvlm", min_pixels=784, max_pixels=7840)
    info = dict(encoder_name="a/clip", pool=dict(K=64, sampler="mixed"), lvlm=lvlm,
                asking=dict(style="chat", evaluator="lmms"))
    bare = record(tmp_path/"copied", "config.json", info=info)
    door = read_door(["eval", "--selector", bare, "--out", "x"])
    assert (door.data.clip, door.pools.K, door.pools.sampler) == ("a/clip", 64, "mixed")
    assert (door.model.lvlm, door.asking.style, door.asking.evaluator) == ("a/lvlm", "chat", "lmms")
    assert (door.model.min_pixels, door.model.max_pixels) == (784, 7840)

@pytest.mark.parametrize("content", ["", "[1]", "{", '{"command": 3, "starts": 4}', '{"command": {"data": [1]}}'])
def test_other_files_remember_nothing(tmp_path, content):
    (tmp_path/"manifest.json").write_text(content)
    assert remembered(tmp_path) == remembered(tmp_path/"nowhere") == {}
    assert read_door(["check", str(tmp_path)]).data == read_door(["check", "nowhere"]).data

def test_a_setting_of_another_version_is_left_out_and_a_wrong_one_is_named(tmp_path, capsys):
    old = record(tmp_path/"old", command=dict(data=dict(clip="some/clip", speed=3)))
    assert read_door(["check", old]).data.clip == "some/clip"
    wrong = record(tmp_path/"wrong", command=dict(data=dict(reader="nobody")))
    with pytest.raises(SystemExit): read_door(["check", wrong])
    assert "reader 'nobody': choose one of" in capsys.readouterr().err

def test_runs_that_name_each_other_end(tmp_path):
    a, b = tmp_path/"a", tmp_path/"b"
    record(a, command=dict(runs=[str(b)], data=dict(clip="some/clip")))
    record(b, command=dict(runs=[str(a)], pools=dict(K=8)))
    assert remembered(a) == remembered(b) == dict(data=dict(clip="some/clip"), pools=dict(K=8))

def test_doors_say_what_they_took_from_a_run_unless_they_are_to_be_quiet(family, capsys):
    read_door(["infer", "--selector", family.ours, "--out", "x", "--quiet"])
    assert capsys.readouterr().err == ""
    read_door(["infer", "--out", "x", "--picker", "mmr"])
    assert capsys.readouterr().err == ""

# ---- a split whose answers are kept secret -------------------------------------------------------------------

@pytest.fixture
def secret(tmp_path, monkeypatch):
    "The embedded world without the answers of its development split"
    monkeypatch.chdir(tmp_path)
    world = ROOT/"data"/"islands"
    (tmp_path/"data").mkdir()
    kept = ("images", "OpenEnded_mscoco_train2014_questions.json", "mscoco_train2014_annotations.json",
            "OpenEnded_mscoco_dev2014_questions.json")
    for name in kept:
        there = world/name if (world/name).exists() else world/f"{name}.gz"
        (tmp_path/"data"/there.name).symlink_to(there)
    return tmp_path

def test_a_split_without_answers_is_answered_from_the_shell(secret):
    from leverplus.infer import Prediction, check_results
    line = "infer --data data --split dev --picker similar_mixed --shots 1 --limit 6 --quiet --out runs/secret"
    assert "6 of" in go(f"{line} --dry-run") and not (secret/"runs").exists()
    assert "questions 6, failed 0, no accuracy, as nobody has answered them (dev)" in go(line)
    asked = Job(split="dev").items().query("split == 'dev'").question_id[:6].tolist()
    said = check_results("runs/secret/predictions.json", asked)
    assert go(line) and check_results("runs/secret/predictions.json", asked) == said
    known = "infer --split dev --picker similar_mixed --shots 1 --limit 6 --quiet --out runs/known --store runs/other"
    assert "accuracy" in go(known) and check_results("runs/known/predictions.json", asked) == said
    told = pd.read_json(Prediction("runs/secret").export("told.jsonl"), lines=True)
    assert told.vqa_acc_score.isna().all() and told.answers.isna().all() and told.vqa_pred_answer.notna().all()
    page = Path(go("report runs/secret").strip()).read_text()
    assert "6 questions, predicted and not judged: nobody has answered them." in page
    both = Path(go("report runs/secret runs/known --out runs/both.html").strip()).read_text()
    assert "not judged" in both

@pytest.mark.parametrize("line", [
    "generate --data data --split dev --limit 3 --test 0 --quiet --out runs/groups",
    "generate --data data --split dev --limit 3 --dry-run --out runs/groups",
    "eval --data data --split dev --limit 3 --dry-run --out runs/eval",
    "generate --data data --split dev --limit 3 --test 0 --shard 0/2 --quiet --out runs/groups",
    "eval --data data --split dev --limit 3 --quiet --out runs/eval",
])
def test_where_an_accuracy_is_wanted_it_says_that_there_is_none(line, secret):
    said = go(line, 2)
    assert re.search("needs people's answers, and [0-9]+ of [0-9]+ questions have none, first [0-9]+", said), said
    assert not (secret/"runs").exists(), list((secret/"runs").rglob("*"))
