"Run folders: what is remembered, what is refused, and what a crash leaves behind"
import json, os, subprocess
from pathlib import Path
import numpy as np, pandas as pd, pytest
from hypothesis import given, strategies as st
from leverplus.runs import ABSENT, Run, environment, git_state, plain, runs_frame, settings_diff

S = {"lr": 1e-3, "shots": (1, 2), "pool": {"K": 16, "sampler": "mixed"}}
leaf = st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=True) | st.text(max_size=4)
nested = st.dictionaries(
    st.text(max_size=4),
    st.recursive(
        leaf,
        lambda s: st.lists(s, max_size=3) | st.dictionaries(st.text(max_size=3), s, max_size=3),
        max_leaves=6,
    ),
    max_size=4,
)

@given(nested)
def test_plain_is_what_json_reads_back(d):
    back = json.loads(json.dumps(plain(d)))
    assert settings_diff(d, back) == {} and json.dumps(back) == json.dumps(plain(d))

@given(nested, nested)
def test_diff_is_empty_only_for_equal_settings(a, b):
    same = json.dumps(plain(a), sort_keys=True) == json.dumps(plain(b), sort_keys=True)
    assert (settings_diff(a, b) == {}) == same and settings_diff(a, a) == {}
    assert {k: v[::-1] for k, v in settings_diff(a, b).items()}.keys() == settings_diff(b, a).keys()

def test_diff_names_nested_and_absent():
    assert settings_diff({"a": {"b": 1}, "c": 2}, {"a": {"b": 2}}) == {"a.b": (1, 2), "c": (2, ABSENT)}
    assert settings_diff({"a": {}}, {}) == {"a": ({}, ABSENT)}
    assert settings_diff({"a": {}}, {"a": {"b": 1}}) and settings_diff({"a": True}, {"a": 1})

@pytest.mark.parametrize(
    "value, place",
    [
        ({"w": np.zeros(2)}, "settings.w"),
        ({"a": [1, {"f": print}]}, r"settings.a\[1\].f"),
        ({("x",): 1}, "key"),
    ],
)
def test_plain_names_what_json_cannot_hold(value, place):
    with pytest.raises(TypeError, match=place): plain(value)

def test_plain_refuses_keys_that_json_would_merge():
    with pytest.raises(ValueError, match="same in JSON"): plain({1: "a", "1": "b"})

def test_round_trip(tmp_path):
    run = Run.create(tmp_path/"a"/"r", S, seed=np.int64(4), fingerprints={"pool": "ab"})
    for back in (Run(run.path), Run.load(str(run.path))):
        assert back.settings == {"lr": 1e-3, "shots": [1, 2], "pool": {"K": 16, "sampler": "mixed"}}
        assert (back.seed, back.fingerprints, back.metrics, back.finished) == (4, {"pool": "ab"}, {}, None)
    start, = back.starts
    assert start.keys() == {"time", *environment()}
    assert start["versions"]["torch"]
    assert start["time"].endswith("+00:00")

def test_same_settings_continue(tmp_path):
    run = Run.create(tmp_path/"r", S, seed=1, fingerprints={"pool": "ab"})
    run.save_history(pd.DataFrame({"epoch": [0]}))
    run.finish(acc=0.5)
    again = Run.create(tmp_path/"r", json.loads(json.dumps(S)), seed=1, fingerprints={"store": "cd"})
    assert len(again.starts) == 2
    assert again.finished is None
    assert again.fingerprints == {"pool": "ab", "store": "cd"}
    assert again.history.epoch.tolist() == [0]

@pytest.mark.parametrize("change, named", [
    (dict(settings={**S, "lr": 2e-3}), "lr: 0.001 there, 0.002 now"), (dict(seed=2), "seed: 1 there, 2 now"),
    (dict(settings={k: v for k, v in S.items() if k != "lr"}), "lr: 0.001 there, 'absent' now"),
    (dict(settings={**S, "pool": {"K": 32, "sampler": "mixed"}}), "pool.K: 16 there, 32 now"),
    (dict(fingerprints={"pool": "zz"}), "fingerprint of pool: 'ab' there, 'zz' now")])
def test_other_settings_are_refused_and_nothing_changes(tmp_path, change, named):
    args = dict(settings=S, seed=1, fingerprints={"pool": "ab"})
    Run.create(tmp_path / "r", **args)
    before = (tmp_path / "r" / "settings.json").read_bytes()
    with pytest.raises(ValueError) as e: Run.create(tmp_path/"r", **{**args, **change})
    assert named in str(e.value) and "overwrite=True" in str(e.value) and str(e.value).count(" there, ") == 1
    assert (tmp_path/"r"/"settings.json").read_bytes() == before

def test_overwrite_empties_an_earlier_run(tmp_path):
    old = Run.create(tmp_path / "r", S)
    old.save_frame("results.csv", pd.DataFrame({"a": [1]}))
    old.checkpoint.mkdir()
    (old.checkpoint/"model.safetensors").write_bytes(b"x")
    new = Run.create(tmp_path/"r", {"lr": 1}, overwrite=True)
    assert new.files() == ["settings.json"] and len(new.starts) == 1 and new.metrics == {}

def test_overwrite_with_the_same_settings_keeps_the_run(tmp_path):
    Run.create(tmp_path/"r", S).save_frame("results.csv", pd.DataFrame({"a": [1]}))
    assert "results.csv" in Run.create(tmp_path/"r", S, overwrite=True).files()

@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_run_is_never_touched(tmp_path, overwrite):
    (tmp_path/"thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds files but no run"):
        Run.create(tmp_path, S, overwrite=overwrite)
    (tmp_path/"settings.json").write_text('{"lr": 1}')
    with pytest.raises(ValueError, match="another program"): Run.create(tmp_path, S, overwrite=overwrite)
    with pytest.raises(NotADirectoryError): Run.create(tmp_path/"thesis.txt", S, overwrite=overwrite)
    assert sorted(os.listdir(tmp_path)) == ["settings.json", "thesis.txt"]

def test_leftovers_of_a_kill_do_not_block(tmp_path):
    (tmp_path/".settings.json.77.tmp").write_text("{")
    assert Run.create(tmp_path, S).files() == ["settings.json"]

def test_bad_arguments(tmp_path):
    for bad in (-1, 1.5, True, None):
        with pytest.raises(ValueError, match="seed"): Run.create(tmp_path/"r", S, seed=bad)
    with pytest.raises(ValueError, match="seed="): Run.create(tmp_path/"r", {"seed": 1})
    with pytest.raises(TypeError, match="dict"): Run.create(tmp_path/"r", [1])
    with pytest.raises(FileNotFoundError, match="Run.create"): Run(tmp_path/"r")
    assert not (tmp_path/"r").exists()

def test_frames(tmp_path):
    run = Run.create(tmp_path/"r", S)
    df = pd.DataFrame({"question_id": [7, 8], "acc": [.1, 1/3], "pointer": [[1, 2], [3, 4]]}, index=[7, 8])
    run.save_frame("picks.parquet", df)
    back = run.frame("picks.parquet")
    assert back.acc.tolist() == df.acc.tolist()
    assert [list(p) for p in back.pointer] == [[1, 2], [3, 4]]
    assert back.index.tolist() == [0, 1]
    run.save_frame("t.csv", pd.DataFrame({"acc": [1/3]}, index=pd.Index(["rce"], name="selector")))
    assert run.frame("t.csv").to_dict("list") == {"selector": ["rce"], "acc": [1/3]}
    for bad in ("x.txt", "../x.csv", "a/b.csv", ".csv", "results"):
        with pytest.raises(ValueError, match="frame name"): run.save_frame(bad, df)
    with pytest.raises(FileNotFoundError, match="picks.parquet"): run.frame("no.csv")

def test_a_failed_write_leaves_the_old_table(tmp_path):
    run = Run.create(tmp_path / "r", S)
    run.save_frame("p.parquet", pd.DataFrame({"a": [1]}))
    with pytest.raises(Exception): run.save_frame("p.parquet", pd.DataFrame({"a": [object()]}))
    assert run.frame("p.parquet").a.tolist() == [1] and run.files() == ["p.parquet", "settings.json"]

def test_repr_and_table(tmp_path):
    for seed in (0, 1):
        Run.create(tmp_path / f"s{seed}", {**S, "note": "a|b"}, seed=seed).finish(acc=np.float32(0.5))
    run = Run(tmp_path/"s1")
    assert repr(run) == "Run('s1', seed 1, 1 start, finished, 1 files)"
    assert str(tmp_path) not in run._repr_markdown_()
    assert all(line.count("|") - line.count("\\|") == 3 for line in run._repr_markdown_().splitlines())
    (tmp_path / "other").mkdir()
    t = runs_frame(tmp_path)
    assert t.run.tolist() == ["s0", "s1"]
    assert t["pool.K"].tolist() == [16, 16]
    assert t.acc.tolist() == [0.5, 0.5]
    assert t.finished.notna().all()
    assert runs_frame(tmp_path/"other").columns.tolist() == ["run", "seed", "finished"]
    with pytest.raises(ValueError, match="metrics named"): run.finish(lr=1)

def test_git_state(tmp_path):
    git = lambda *a: subprocess.run(
        ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@x", *a],
        check=True,
        capture_output=True,
    )
    assert git_state(tmp_path) is None
    git("init", "-q")
    assert git_state(tmp_path) == {"commit": None, "dirty": False}
    (tmp_path / "a").write_text("1")
    git("add", ".")
    git("commit", "-qm", "a")
    state = git_state(tmp_path)
    assert len(state["commit"]) == 40 and not state["dirty"]
    (tmp_path / "a").write_text("2")
    assert git_state(tmp_path) == {"commit": state["commit"], "dirty": True}
    (tmp_path / "sub").mkdir()
    assert git_state(tmp_path / "sub") is None
