"Killed anywhere, or on a full disk, and started again: nothing is lost. Few of the trials of `bench/faults.py`"
import os, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

def faults(*words):
    "What the bench says, with its exit status"
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    command = [sys.executable, "-W", "ignore", str(ROOT/"bench"/"faults.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, env=env)

def test_what_a_killed_command_leaves_in_the_end_is_what_it_leaves_undisturbed():
    jobs = "generate", "train, rce", "on-policy"
    out = faults("--only", "force", "--jobs", *jobs, "--kills", 6, "--disks", 3, "--workers", 1)
    assert out.returncode == 0, out.stdout[-3000:] + out.stderr[-3000:]
    kills = next(line for line in out.stdout.splitlines() if line.startswith("kill: all"))
    assert int(kills.removeprefix("kill: all").split()[1]) >= 4, out.stdout

def test_a_row_that_is_lost_is_seen(tmp_path):
    "The instrument itself: another number, a file too many, a table that is shorter"
    import pandas as pd
    from force import Job, content
    whole, other = tmp_path/"whole", tmp_path/"other"
    for folder in (whole, other):
        folder.mkdir()
        pd.DataFrame(dict(x=[1, 2])).to_parquet(folder/"a.parquet")
        (folder/"b.json").write_text('{"finished": "now", "acc": 0.5}')
    job = Job("none", (), whole, content(whole), 0, 0.)
    assert job.differences(other) == []
    (other/"b.json").write_text('{"finished": "later", "acc": 0.25}')
    (other/"c.csv").write_text("x\n1\n")
    pd.DataFrame(dict(x=[1])).to_parquet(other/"a.parquet")
    assert job.differences(other) == ["a.parquet: x[1]", "b.json: .acc", "c.csv: x[0] (new)"]
