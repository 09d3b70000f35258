"""A real server on the loopback gives the facts of the reference: `make served`. Skipped where it is not set up"""
import json, os, random, subprocess, sys, threading, time
from dataclasses import replace
import numpy as np, pytest
from engine import ROOT, Engine, engine_python
from leverplus.groups import RLData
from leverplus.lvlm import NaiveScorer, Targets, compare, load_lvlm
from leverplus.prompt import prompter
from leverplus.served import WrongServer, ServedScorer
from leverplus.vqa import answer_targets
from leverplus.world import read_islands

pytestmark = pytest.mark.skipif(engine_python() is None, reason="no environment that serves: run `make served`")

@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    with Engine(tmp_path_factory.mktemp("engine")/"log") as running: yield running

@pytest.fixture(scope="module")
def items(): return read_islands()

@pytest.fixture(scope="module")
def asked(items):
    "(prompts of 0 to 3 demonstrations, their true answers)"
    g = np.random.default_rng(0)
    ids = items.index[items.split == "train"].to_numpy()
    make = prompter(items)
    prompts = []
    for _ in range(120):
        query, *demos = g.choice(ids, 1 + int(g.integers(0, 4)), replace=False)
        prompts.append(make(query, tuple(demos)))
    return prompts, [Targets(*answer_targets(items.at[p.question_id, "answers"])) for p in prompts]

@pytest.fixture(scope="module")
def reference(asked): return NaiveScorer(load_lvlm(device="cpu")).run(*asked)

def served(engine, **kw):
    return ServedScorer(engine.url, lvlm=load_lvlm(weights=False), dtype="float32", **kw)

@pytest.mark.parametrize("pictures", ["exact", "files", "paths"])
@pytest.mark.parametrize("way", ["steps", "prompt"])
def test_facts_are_those_of_the_reference(engine, asked, reference, way, pictures):
    found = compare(served(engine, way=way, pictures=pictures).run(*asked), reference)
    assert (found["n"], found["failed"], found["text"]) == (120, 0, 0)
    assert found["logprob"] < 1e-2

def test_it_says_what_it_is(engine):
    scorer = served(engine)
    assert scorer.abilities.ways == ("steps", "prompt") and scorer.abilities.pictures == "yes"
    assert scorer.identity["engine"] == "vllm" and scorer.identity["version"]
    assert scorer.fingerprint == served(engine).fingerprint != served(engine, pictures="files").fingerprint

@pytest.mark.parametrize("way", ["steps", "prompt"])
def test_the_order_of_requests_changes_nothing(engine, asked, reference, way):
    order = list(range(len(asked[0])))
    random.Random(0).shuffle(order)
    shuffled = [[some[k] for k in order] for some in asked]
    once = served(engine, way=way, at_once=16).run(*shuffled)
    again = served(engine, way=way, at_once=1).run(*[some[:20] for some in shuffled])
    assert compare(once, [reference[k] for k in order])["logprob"] < 1e-2
    assert compare(once[:20], again)["logprob"] < 1e-4

@pytest.mark.parametrize("way", ["steps", "prompt"])
def test_the_same_words_with_another_picture_give_other_numbers(engine, items, way):
    make = prompter(items)
    ids = items.index[items.split == "train"]
    prompt = make(ids[0], (ids[5],))
    others = [p for p in dict.fromkeys(items.image_path) if p not in prompt.images][:8]
    prompts = [prompt, *(replace(prompt, image=path) for path in others), prompt]
    targets = [Targets(("red",), (1.,))]*len(prompts)
    said = served(engine, way=way, at_once=8).run(prompts, targets)
    want = NaiveScorer(load_lvlm(device="cpu")).run(prompts, targets)
    assert compare(said, want)["logprob"] < 1e-2
    assert len({round(s.logprobs[0], 3) for s in said}) == len({round(s.logprobs[0], 3) for s in want}) > 1

def test_another_model_is_refused(engine):
    with pytest.raises(WrongServer, match="sees other tokens|sees .* tokens where"):
        lvlm = load_lvlm(weights=False)
        template = lvlm.tokenizer.chat_template
        lvlm.tokenizer.chat_template = template.replace("helpful assistant", "parrot")
        ServedScorer(engine.url, lvlm=lvlm)
    with pytest.raises(WrongServer, match="tokens where"):
        ServedScorer(engine.url, lvlm=load_lvlm(weights=False, max_pixels=56*56))
    with pytest.raises(WrongServer, match="serves no 'nobody', but tiny"): ServedScorer(engine.url, "nobody")

def test_it_proves_to_be_the_model_that_lies_here(engine, asked):
    scorer = served(engine)
    own = scorer.fingerprint
    found = scorer.prove_same(*[some[:8] for some in asked])
    assert found["failed"] == 0 and scorer.fingerprint == NaiveScorer(load_lvlm(device="cpu")).fingerprint != own

def leverplus(*words, **kw):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "leverplus", *map(str, words)]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, **kw)

def same_facts(a, b):
    a, b = (x.rows.set_index(["question_id", x.rows.pointer.map(tuple)]).sort_index() for x in (a, b))
    assert (a.index == b.index).all() and a.index.is_unique
    assert not a.eval_failed.any() and not b.eval_failed.any()
    assert (a.vqa_raw_generation == b.vqa_raw_generation).all()
    assert np.allclose(a.vqa_gt_prob, b.vqa_gt_prob, atol=1e-4)

def test_the_command_line_makes_a_run_that_passes_the_health_check(engine, tmp_path):
    more = ("--limit", 60, "--store", tmp_path/"store")
    at = ("--lvlm-url", engine.url, "--dtype", "float32", "--verify", 4)
    made = leverplus("generate", "--out", tmp_path/"there", *at, *more)
    assert made.returncode == 0, made.stderr
    assert "verified 4 of 4" in made.stdout
    assert leverplus("generate", "--out", tmp_path/"here", *more).returncode == 0
    same_facts(RLData.load(tmp_path/"there"), RLData.load(tmp_path/"here"))
    checks = [leverplus("check", tmp_path/run, "--strict") for run in ("there", "here")]
    assert checks[0].returncode == checks[1].returncode == 0, checks[0].stdout + checks[0].stderr
    manifest = json.loads((tmp_path/"there/manifest.json").read_text())
    assert manifest["lvlm"]["name"] == "tiny" and engine.url not in json.dumps(manifest["lvlm"])

def test_a_server_that_is_killed_and_started_again_loses_nothing(engine, tmp_path):
    at = ("--lvlm-url", engine.url, "--dtype", "float32")
    more = ("--limit", 40, "--window", 4, "--test", 0, "--store", tmp_path/"store", *at)
    def disturb():
        while not list((tmp_path/"killed").glob("part-*.parquet")): time.sleep(.05)
        engine.stop()
        engine.start()
    thread = threading.Thread(target=disturb)
    thread.start()
    made = leverplus("generate", "--out", tmp_path/"killed", *more, "--lvlm-patience", 120)
    thread.join()
    assert made.returncode == 0, made.stderr
    assert leverplus("generate", "--out", tmp_path/"calm", *more).returncode == 0
    same_facts(RLData.load(tmp_path/"killed"), RLData.load(tmp_path/"calm"))
