"""What a second worker brings: 1 and 2 processes with `--shard`, 1 and 2 Ray actors, one thread each, on the
embedded world; equal rows asserted.

`python bench/ray_workers.py [questions] [repeats]` prints a table of medians. The four ways take turns, so
ratios compare neighbours in time, and each run waits for an idle machine, some minutes at most. Start-up is
reported apart: until Ray is there, then until the last worker asks its first prompt. The steady rate is
taken while all workers are at it. Ray's workers run at the niceness of everything else here (its own
default is 15).
"""
import json, os, statistics, subprocess, sys, tempfile, time
from pathlib import Path
import pandas as pd
from leverplus.groups import RLData
from leverplus.rldata_scale import generate_ray
from leverplus.settings import Job, plain_settings, settings_of

WORKER = """
import json, sys, time, torch
torch.set_num_threads(1)
import leverplus.rldata_scale # what a job can do
from leverplus.settings import Job, read_settings
run = read_settings(Job, json.loads(sys.argv[1])).generation(sys.argv[2], json.loads(sys.argv[3]))
with run.lock():
    run.begin()
    for i in range(len(run.windows)):
        start = time.time()
        rows, _ = run.window(i)
        said = dict(worker=sys.argv[3], start=start, end=time.time(), rows=len(rows))
        print(json.dumps(said), flush=True)
    run.finish()
"""
# Ray would run its workers at niceness 15
ENV = dict(os.environ, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", RAY_worker_niceness="0")

def processes(job, path, n):
    "n processes, a shard each: (seconds until Ray is there: none, log of windows)"
    said = json.dumps(plain_settings(job))
    words = lambda i: [sys.executable, "-c", WORKER, said, str(path), json.dumps([i, n])]
    ps = [
        subprocess.Popen(words(i), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=ENV)
        for i in range(n)
    ]
    log = [json.loads(line) for p in ps for line in p.communicate()[0].splitlines()]
    assert all(p.returncode == 0 for p in ps), "a process failed"
    return 0., log

def actors(job, path, n):
    "n Ray actors on a fresh local cluster"
    import ray
    t = time.time()
    log = []
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    init = time.time() - t
    try: generate_ray(job, path, workers=n, progress=False, each=log.append)
    finally: ray.shutdown()
    return init, log

def idle(seconds=2.):
    "Share of the machine's CPU time that nobody uses, over some seconds (Linux)"
    look = lambda: list(map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]))
    a = look()
    time.sleep(seconds)
    b = look()
    d = [y - x for x, y in zip(a, b)]
    return (d[3] + d[4])/max(1, sum(d))

def quiet(limit=180):
    "Wait until the machine is idle, at most `limit` seconds; True if it is"
    end = time.time() + limit
    while Path("/proc/stat").exists() and idle() < .9:
        if time.time() > end: return False
    return True

def measure(way, job, path, n):
    "One run: seconds of Ray's start, until all workers ask, and in all; prompts per second while all are at it"
    calm = quiet()
    t = time.time()
    init, log = way(job, path, n)
    wall = time.time() - t
    log = pd.DataFrame(log)
    assert log.worker.nunique() == n, f"{log.worker.nunique()} workers at work, wanted {n}"
    a = log.groupby("worker").start.min().max()
    b = log.groupby("worker").end.max().min()
    share = (log.end.clip(upper=b) - log.start.clip(lower=a)).clip(lower=0)/(log.end - log.start)
    return dict(
        calm=calm,
        ray_start=init,
        workers_start=a - t - init,
        wall=wall,
        rate=(log.rows * share).sum() / (b - a),
    )

def main(questions=256, repeats=3):
    os.environ.update(ENV)
    ways = {
        f"{name} {n}": (way, n) for n in (1, 2) for name, way in (("shards,", processes), ("Ray,", actors))
    }
    runs = {k: [] for k in ways}
    with tempfile.TemporaryDirectory() as d:
        job = settings_of(Job, limit=questions, window=8, test=0, device="cpu", store=f"{d}/store")
        job.inputs()
        ref = None
        for r in range(repeats):
            for k, (way, n) in ways.items():
                runs[k].append(measure(way, job, f"{d}/{r}-{k}", n))
                data = RLData.load(f"{d}/{r}-{k}")
                ref = data if ref is None else ref
                assert data.rows.pointer.equals(ref.rows.pointer) and data.rows.vqa_raw_generation.equals(
                    ref.rows.vqa_raw_generation
                ), k
                assert (data.rows.vqa_gt_prob - ref.rows.vqa_gt_prob).abs().max() < 1e-4, k
    med = lambda k, c: statistics.median(r[c] for r in runs[k])
    def times(k, c, up): # against one worker of the same way in the same round: median, from - to
        x = [r[c]/one[c] if up else one[c]/r[c] for r, one in zip(runs[k], runs[k[:-1] + "1"])]
        return f"{statistics.median(x):.2f} ({min(x):.2f}-{max(x):.2f})"
    rows = {
        k: {
            "Ray starts, s": med(k, "ray_start"),
            "workers start, s": med(k, "workers_start"),
            "in all, s": med(k, "wall"),
            "steady, prompts/s": med(k, "rate"),
            "steady, x": times(k, "rate", True),
            "in all, x": times(k, "wall", False),
        }
        for k in runs
    }
    print(
        f"{questions} questions, {len(ref)} prompts, windows of 8; one thread per worker, {os.cpu_count()}"
        f" cores; median of {repeats}; {sum(r['calm'] for v in runs.values() for r in v)} of"
        f" {repeats*len(runs)} runs began on an idle machine"
    )
    print(pd.DataFrame(rows).T.map(lambda v: v if isinstance(v, str) else f"{v:.1f}").to_string())
    print("x: against one worker of the same way in the same round (smallest-largest)")

if __name__ == "__main__": main(*map(int, sys.argv[1:]))
