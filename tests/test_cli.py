"The command line: words in, rows and an exit status out"
import json, os, re, subprocess, sys
from dataclasses import fields
from pathlib import Path
import pandas as pd, pytest
from leverplus import cli
from leverplus.groups import RLData
from leverplus.rldata_scale import Job

ROOT = Path(__file__).resolve().parent.parent
RUN = [sys.executable, "-c", "import sys; from leverplus.cli import main; sys.exit(main())"] # what the console script does

def leverplus(*words, **kw):
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    return subprocess.run([*RUN, *map(str, words)], capture_output=True, text=True, timeout=300, env=env, **kw)

def test_six_questions_end_to_end(tmp_path, monkeypatch, capsys):
    "From another working folder: the embedded world, the tiny model, verified, in two shards, one of them in a process of its own"
    words = ["generate", "--limit", "6", "--window", "2", "--test", "4", "--shots", "1", "2", "--counts", '{"beam": 2, "temperature": {"1.5": 1}}', "--device", "cpu", "--store", "store", "--out", "run", "--verify", "1"]
    r = leverplus(*words, "--shard", "0/2", cwd=tmp_path); assert r.returncode == 0, r.stderr
    monkeypatch.chdir(tmp_path); assert cli.main([*words, "--quiet", "--shard", "1/2"]) == 0
    for out in (r.stdout, capsys.readouterr().out):
        assert re.search(r"^run: rows \d+, queries \d, failed 0, fingerprint [0-9a-f]{16}, verified 1 of 1, log P within .* \(allowed 0.001\), 0 other texts$", out, re.M), out
    data = RLData.load(tmp_path/"run"); assert len(data) == 6*6 and data.shots == (1, 2) and data.manifest["shards"] == 2
    want = Job(limit=6, window=2, test=4, shots=(1, 2), counts=dict(beam=2, temperature={1.5: 1}), device="cpu", store=str(tmp_path/"store")).run(tmp_path/"want", progress=False)
    assert want.manifest["settings"] == data.manifest["settings"]; soft = ["vqa_gt_prob", "vqa_gt_logprobs"]
    pd.testing.assert_frame_equal(data.rows.drop(columns=soft), want.rows.drop(columns=soft)); assert (data.rows.vqa_gt_prob - want.rows.vqa_gt_prob).abs().max() < 1e-4

def test_help_is_good_to_read(capsys, monkeypatch):
    def said(*words):
        with pytest.raises(SystemExit) as e: cli.main([*words, "--help"])
        assert e.value.code == 0; return capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "100"); sub = said("generate"); assert "generate" in said()
    for flag in ("--out", "--shard I/N", "--verify K", "--ray WORKERS", "--prefix-cache {off,query,global}", "--dtype {float32,bfloat16,float16}", "--device", "--limit", "(default: data/islands)"):
        assert flag in sub, flag
    assert max(map(len, sub.splitlines())) <= 100 and "None" not in sub and "examples:" in sub

def status(words, capsys):
    try: code = cli.main(words)
    except SystemExit as e: code = e.code
    return code, capsys.readouterr().err.strip().splitlines()[-1]

BASE = "generate --lvlm mock --limit 3 --test 0 --quiet --out run".split()

@pytest.mark.parametrize("words, says", [
    (["--shard", "2/2"], "'2/2' is no shard"), (["--shard", "first"], "'first' is no shard"), (["--shard", "1/2/3"], "'1/2/3' is no shard"), (["--counts", "beam"], "is not JSON"), (["--counts", "[1]"], "wanted an object"),
    (["--counts", '{"beams": 1}'], "beams"), (["--shots", "16"], "shots < K"), (["--dtype", "int8"], "invalid choice"), (["--data", "nowhere"], "nowhere"), (["--split", "val"], "split 'val'"),
    (["--limit", "0"], "limit 0"), (["--verify", "-1"], "--verify wants"), (["--ray", "0"], "--ray one >= 1"), (["--nonsense"], "unrecognized"), (["--limit", "many"], "invalid int")])
def test_bad_arguments_exit_with_2_and_a_sentence(tmp_path, capsys, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path); code, last = status(BASE + words, capsys); assert code == 2 and says in last and last.startswith("leverplus"), last
    assert not list(tmp_path.iterdir()) # nothing was begun

def test_no_command_and_no_place(capsys):
    assert status([], capsys)[0] == 2; code, last = status(["generate"], capsys); assert code == 2 and "--out" in last

def test_what_cannot_go_on_exits_with_1(tmp_path, capsys, monkeypatch):
    from leverplus.rldata_generate import run_lock
    monkeypatch.chdir(tmp_path); store = ["--store", "store"]; assert cli.main(BASE + store) == 0
    with run_lock("run"): code, last = status(BASE + store, capsys); assert code == 1 and f"process {os.getpid()}" in last
    for words, says in [(["--seed", "1"], "seed: there 0, here 1"), (["--shard", "0/2"], "without shards lies here")]:
        code, last = status(BASE + store + words, capsys); assert code == 1 and says in last
    monkeypatch.setitem(sys.modules, "ray", None); code, last = status(BASE + store + ["--ray", "2"], capsys); assert code == 1 and "pip install -e '.[ray]'" in last
    class Off: # a scorer that its reference does not confirm
        from leverplus.lvlm import MockScorer
        fingerprint, tolerance, inner = "off", 0., MockScorer()
        def run(self, *a, **k): return self.inner.run(*a, **k)
        def reference(self): return self.MockScorer(1)
    monkeypatch.setattr(Job, "scorer", lambda self: Off()); code, last = status(BASE[:-1] + ["other", *store, "--verify", "1"], capsys); assert code == 1 and "the reference" in last

def test_every_flag_is_a_field_with_its_default():
    args = cli.parser().parse_args(["generate", "--out", "x"]); names = {f.name for f in fields(Job)}; assert set(cli.FIELDS) <= names and names - set(cli.FIELDS) == {"check", "kind"}
    assert Job(**{k: getattr(args, k) for k in cli.FIELDS}) == Job()

def test_the_console_script_is_declared():
    import configparser
    cfg = configparser.ConfigParser(delimiters=["="]); cfg.read(ROOT/"settings.ini", encoding="utf8"); cfg = cfg["DEFAULT"]
    assert "leverplus=leverplus.cli:main" in cfg["console_scripts"].split() and "leverplus-demo=leverplus.demo:main" in cfg["console_scripts"].split() and cfg["ray_requirements"].startswith("ray[data]>=")
