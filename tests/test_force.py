"What must never be destroyed: other people's files, and locks that somebody holds"
import subprocess, sys
from pathlib import Path
import pytest
from filelock import FileLock
from test_generate import ITEMS, POOL, QS, RUN, STORE, made
from leverplus import cli
from leverplus.core import atomic_path, leftovers
from leverplus.lvlm import MockScorer
from leverplus.rldata_generate import run_lock
from leverplus.runs import Busy, Run, empty_folder, is_lock

ROOT = Path(__file__).resolve().parent.parent


def make(path, *names):
    "Files below `path`, each with its own name in it"
    for name in names:
        file = Path(path)/name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)

def there(path): return sorted(p.relative_to(path).as_posix() for p in Path(path).rglob("*") if p.is_file())


# ---- temporary files ---------------------------------------------------------------------------------------

FOREIGN = (
    ".mine.tmp",
    ".part-0.tmp",
    "deep/.draft.tmp",
    "deep/.part-00000.parquet.77-0a1b2c3d.tmp",
    ".notes.txt.77-0a1b2c3d.tmp",
    "thesis.txt",
    "deep/manifest.json",
)

def run(path, **kw):
    return made(path, QS[:4], ITEMS, POOL, MockScorer(), STORE, **RUN | dict(test=0) | kw)

def test_generate_removes_nothing_of_others(tmp_path):
    "Not in a folder where it begins, not where it goes on, not where it refuses"
    make(tmp_path, *FOREIGN)
    run(tmp_path)
    assert set(FOREIGN) <= set(there(tmp_path))
    run(tmp_path)
    with pytest.raises(ValueError, match="belong to other settings"): run(tmp_path, seed=5)
    assert set(FOREIGN) <= set(there(tmp_path))
    assert (tmp_path / "deep" / "manifest.json").read_text() == "deep/manifest.json"

def test_what_a_kill_left_is_swept_up(tmp_path):
    "Parts, manifest and pool of this run, under the names that only it gives"
    run(tmp_path)
    pool = next(tmp_path.glob("pool-*"))
    left = [
        tmp_path / ".part-00001.parquet.77-0a1b2c3d.tmp",
        tmp_path / ".manifest.json.77-0a1b2c3d.tmp",
        pool / ".pool.parquet.77-0a1b2c3d.tmp",
    ]
    for file in left: file.touch()
    run(tmp_path)
    assert not [f for f in left if f.exists()]

def test_another_run_is_left_as_it_lies(tmp_path):
    "Refused, and not even its leftovers are touched"
    run(tmp_path)
    left = tmp_path/".part-00001.parquet.77-0a1b2c3d.tmp"
    left.touch()
    with pytest.raises(ValueError, match="belong to other settings"): run(tmp_path, seed=5)
    assert left.exists()

def test_leftovers_are_known_by_their_mark(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path/"part-00000.parquet") as tmp:
        tmp.touch()
        kept = tmp.with_name(tmp.name.replace("part-00000", "part-00001"))
        kept.touch() # as a kill would leave it
        raise KeyboardInterrupt
    assert leftovers(tmp_path, r"part-\d+\.parquet") == [kept]
    assert leftovers(tmp_path, "part") == leftovers(tmp_path / "none", ".*") == []

@pytest.mark.parametrize(
    "line",
    [
        "generate --lvlm mock --n 4 --test 0 --out",
        "train a --dev b --out",
        "infer --how mmr --out",
        "eval --out",
        "sweep a --dev b --grid lr=1 --out",
        "demo --out",
        "merge a --out",
        "mine a --out",
        "check a --csv",
        "embed --store",
        "generate --out x --store",
        "generate --out x --vision-dir",
    ],
)
def test_no_door_takes_an_empty_folder_for_the_working_directory(tmp_path, monkeypatch, capsys, line):
    monkeypatch.chdir(tmp_path)
    make(tmp_path, ".mine.tmp")
    with pytest.raises(SystemExit) as e: cli.main([*line.split(), ""])
    assert e.value.code == 2
    assert "working directory" in capsys.readouterr().err
    assert there(tmp_path) == [".mine.tmp"]

def test_no_function_does_either(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for act in (lambda: run(""), lambda: Run.create("", {}), lambda: Run.create(" ", {})):
        with pytest.raises(ValueError, match="working directory"): act()
    assert there(tmp_path) == []


# ---- locks -------------------------------------------------------------------------------------------------

def test_overwrite_keeps_the_lock_that_is_held(tmp_path):
    "So a second process stays outside while the first one works"
    folder = tmp_path/"run"
    with run_lock(folder):
        Run.create(folder, dict(lr=1)).save_frame("a.csv", __import__("pandas").DataFrame(dict(x=[1])))
        Run.create(folder, dict(lr=2), overwrite=True)
        assert there(folder) == [".lock", ".owner", "settings.json"]
        code = (
            "import sys; from leverplus.rldata_generate import run_lock\nwith run_lock(sys.argv[1]):"
            " print('inside')"
        )
        second = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code, str(folder)],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert second.returncode
        assert "is writing this run" in second.stderr
        assert "inside" not in second.stdout

def test_overwrite_refuses_where_a_part_is_being_written(tmp_path):
    "A shard that somebody writes lies in a folder of its own"
    folder = tmp_path/"union"
    Run.create(folder, dict(lr=1))
    make(folder, "shard-000of002/rows.csv")
    with run_lock(folder/"shard-000of002"):
        with pytest.raises(Busy, match="shard-000of002"): Run.create(folder, dict(lr=2), overwrite=True)
    assert Run(folder).settings == dict(lr=1)
    assert (folder/"shard-000of002"/"rows.csv").exists()
    Run.create(folder, dict(lr=2), overwrite=True)
    assert there(folder) == ["settings.json", "shard-000of002/.lock"]

def test_emptying_follows_no_link_and_ends_with_what_goes_last(tmp_path):
    outside, folder = tmp_path/"outside", tmp_path/"folder"
    make(outside, "mine.txt")
    make(folder, "a/b/c.txt", "settings.json", ".embed.lock", "x.txt")
    (folder/"link").symlink_to(outside, target_is_directory=True)
    (folder/"file-link").symlink_to(outside/"mine.txt")
    empty_folder(folder, last="settings.json")
    assert there(folder) == [".embed.lock"]
    assert there(outside) == ["mine.txt"]
    assert not (folder / "link").is_symlink()

@pytest.mark.parametrize(
    "name,lock",
    [
        (".lock", True),
        (".lock-001of003", True),
        (".union.lock", True),
        (".embed.lock", True),
        (".owner-001of003", True),
        ("lock", False),
        ("a.lock", False),
        (".clock", False),
        (".locker", False),
        (".notes.tmp", False),
    ],
)
def test_locks_are_known_by_name(name, lock): assert is_lock(name) == lock

def test_training_twice_into_one_folder(tmp_path, monkeypatch, capsys):
    "`--overwrite` while somebody else trains there: status 3, and his files stay"
    monkeypatch.chdir(tmp_path)
    for split in ("train", "dev"):
        assert (
            cli.main(
                f"generate --lvlm mock --n 6 --split {split} --test 0 --quiet --out runs/{split}".split()
            )
            == 0
        )
    line = "train runs/train --dev runs/dev --objective rce --out runs/rce --bs 4 --epochs 1".split()
    assert cli.main(line) == 0
    before = there("runs/rce")
    with run_lock("runs/rce"): assert cli.main([*line, "--lr", "0.5", "--overwrite"]) == 3
    assert there("runs/rce") == before
    assert cli.main([*line, "--lr", "0.5", "--overwrite"]) == 0
