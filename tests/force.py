"""What `test_kills.py` and `bench/faults.py` share: commands that are killed, or find their disk full, and go on"""
import contextlib, ctypes, json, os, random, shutil, signal, sys, time, traceback
from dataclasses import dataclass, field
from pathlib import Path
import pandas as pd

ROOT = Path(__file__).resolve().parent.parent

# ---- jobs --------------------------------------------------------------------------------------------------

BASE = (   # what jobs find when they begin; the last three are for those that name `runs/all`, `runs/rce`, `runs/eval`
    "embed --split train dev --quiet",
    "generate --n 8 --test 0 --window 2 --quiet --out runs/train",
    "generate --n 6 --split dev --test 0 --window 2 --quiet --out runs/dev",
    "merge runs/train --out runs/all",
    "train runs/train --dev runs/dev --objective rce --out runs/rce --epochs 2 --bs 4",
    "eval --selector runs/rce --n 6 --draws 2 --fixed 2 --quiet --out runs/eval",
)

TRAIN = "train runs/train --dev runs/dev --bs 4 --out runs/new --objective"
SWEEP = "sweep runs/train --dev runs/dev --grid objective=rce,sft --base rce.n_epoch=1 sft.n_epoch=1 bs=4 --seeds 0"

JOBS = {   # name: commands, one after the other
    "generate": ("generate --n 8 --test 2 --window 2 --verify 2 --seed 5 --quiet --out runs/new",),
    "generate, two stages": (
        'generate --n 6 --test 0 --window 2 --seed 5 --second {"top":2,"low":1,"random":1} --quiet --out runs/new',
    ),
    "shards": tuple(
        f"generate --n 8 --test 0 --window 2 --seed 5 --shard {i}/2 --quiet --out runs/new" for i in range(2)
    ),
    "mine": ("mine runs/train --rounds 1 --tries 2 --quiet --out runs/new",),
    "merge": ("merge runs/train runs/all --out runs/new",),
    "train, rce": (f"{TRAIN} rce --epochs 3",),
    "train, grpo": (f"{TRAIN} grpo --start runs/rce --epochs 3",),
    "infer": ("infer --selector runs/rce --n 6 --quiet --out runs/new",),
    "eval": ("eval --selector runs/rce --n 6 --draws 2 --fixed 2 --split test --quiet --out runs/new",),
    "sweep": (f"{SWEEP} --quiet --out runs/new",),
    "embed": ("embed --split test --parts 3 --quiet",),
    "bank": ("bank --source bank-source --quiet --out runs/new",),
    "report": ("report runs/eval --cases 4 --groups runs/train --out runs/new/report.html",),
    "on-policy": ("on-policy",),
}

def do(words):
    "Do one command in the working directory: its exit status"
    from leverplus import cli
    if words == ["on-policy"]: return _on_policy_or_status()
    try: return cli.main(words)
    except SystemExit as e: return e.code

def on_policy():
    "Three rounds of groups that the policy draws itself, with a state after each and facts on disk"
    from leverplus.callback_onpolicy import Drawing, Feedback
    from leverplus.dls import group_dls
    from leverplus.groups import RLData
    from leverplus.learner import selector_learner
    from leverplus.lvlm import MockScorer
    from leverplus.rldata_ask import FactCache
    from leverplus.settings import Job as Generating
    from leverplus.synth import quiet
    items, store, pool = Generating(split="train").inputs()
    data = RLData.load("runs/train")
    parts = [data.rows.question_id.isin(some) for some in (data.queries[:6], data.queries[6:])]
    train, dev = (RLData(data.rows[part], data.pool) for part in parts)
    learn = selector_learner(group_dls(train, dev, store, bs=4), seed=0, d_hidden=16)
    judge = Feedback(MockScorer(0), items, FactCache("runs/facts"))
    drawing = Drawing(G=3, queries_per_round=4)
    with quiet(learn):
        learn.fit_onpolicy(judge, store, 3, 1e-2, "rloo", drawing, watch=None, resume="runs/new")
    learn.onpolicy.table.to_csv("runs/rounds.csv", index=False)
    return 0

def _on_policy_or_status():
    "The same, with an exit status for a disk that is full"
    try: return on_policy()
    except OSError as e: print(f"OSError: {e}")
    return 1

def make_base(folder, names=tuple(JOBS)):
    "Do those commands of BASE that some jobs need in a new folder; an AssertionError shows what they said"
    folder = Path(folder)
    folder.mkdir(parents=True)
    _solved(folder/"bank-source")
    for line in _needed(names):
        ended = in_child(folder, [line])
        assert ended.status == 0, f"{line}: {ended}"
    return folder

def _needed(names):
    "Commands of BASE whose runs some jobs name, and what these need themselves"
    wanted = [line for name in names for line in JOBS[name]]
    wanted += ["runs/train"] if "on-policy" in names else []
    kept = []
    for line in reversed(BASE):
        made = line.split(" --out ")[-1].split()[0] if " --out " in line else ""
        if made and not any(made in other for other in wanted): continue
        kept.insert(0, line)
        wanted.append(line)
    return kept

def _solved(source):
    "Ten solved examples with pictures, for a bank"
    source.mkdir()
    from leverplus.settings import Job
    items = Job(split="train").items().iloc[:10]
    rows = []
    for i, row in enumerate(items.itertuples()):
        name = f"{i}.png"
        shutil.copy(row.image_path, source/name)
        rows.append(dict(question_id=i, question=row.question, answer=row.answer, image=name))
    pd.DataFrame(rows).to_csv(source/"solved.csv", index=False)

# ---- children ----------------------------------------------------------------------------------------------

INTERRUPTED = 130 # the exit status after Ctrl-C

@dataclass
class Ended:
    "How a child ended"
    status: int|None   # exit status; None where it was killed
    said: str = ""

def in_child(folder, lines, before=None, after=None):
    "Do commands in a fork of this process, whose working directory is `folder`; `before()` is called first in it"
    said = Path(folder).with_suffix(".said")
    pid = os.fork()
    if not pid: _live(folder, lines, said, before)
    if after is not None: after(pid)
    status = os.waitpid(pid, 0)[1]
    text = said.read_text(errors="replace") if said.exists() else ""
    said.unlink(missing_ok=True)
    return Ended(None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status), text)

def _live(folder, lines, said, before):
    "What the child does; it never returns"
    code = 70
    try:
        out = os.open(said, os.O_WRONLY|os.O_CREAT|os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.chdir(folder)
        if before is not None: before()
        code = _all(lines)
    except KeyboardInterrupt: code = INTERRUPTED   # before a door could say so
    except BaseException: traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)   # no farewell: libraries may wait for threads that a fork has lost

def _all(lines):
    "Commands one after the other, up to the first that fails: its exit status"
    for line in lines:
        code = do(line.split())
        if code: return code
    return 0

# ---- kills -------------------------------------------------------------------------------------------------

OPERATIONS = "open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"

def watch(folder, act):
    "Call `act(event, path)` at every operation on a file below `folder`, reading included, in this process"
    below = str(Path(folder).resolve())
    def hook(event, args):
        if event not in OPERATIONS or not isinstance(args[0], (str, bytes, os.PathLike)): return
        path = os.path.abspath(os.fsdecode(args[0]))
        if path.startswith(below): act(event, path)
    sys.addaudithook(hook)

def die_at(folder, n, lots):
    "Be killed at the n-th operation on a file; a file that is being written then is cut short"
    def act(event, path):
        nonlocal n
        n -= 1
        if n: return
        n = -1
        if event == "open" and path.endswith(".tmp") and os.path.exists(path):
            with open(path, "rb+") as f: f.truncate(lots.randrange(os.path.getsize(path) + 1))
        os.kill(os.getpid(), signal.SIGKILL)
    watch(folder, act)

def count_operations(folder, note):
    "Keep the number of operations in a file"
    n = 0
    def act(event, path):
        nonlocal n
        n += 1
        if not n % 5: os.pwrite(note, f"{n:9d}".encode(), 0)
    watch(folder, act)

@dataclass
class Job:
    "What a job leaves when nothing happens to it, and what it takes"
    name: str
    lines: tuple
    folder: Path      # where it was done
    content: dict     # of that folder
    operations: int
    seconds: float

    @classmethod
    def measured(cls, name, base, folder):
        "Do a job twice, undisturbed; what differs between the two is not compared"
        lines = JOBS[name]
        contents = []
        took = []
        for i in range(2):
            here = Path(folder)/f"{slug(name)}-whole-{i}"
            shutil.copytree(base, here)
            note = os.open(here.with_suffix(".n"), os.O_RDWR|os.O_CREAT)
            start = time.time()
            ended = in_child(here, lines, lambda: count_operations(here, note))
            took.append(time.time() - start)
            assert ended.status == 0, f"{name}: {ended}"
            operations = int(os.pread(note, 9, 0) or 0)
            contents.append(content(here))
            os.close(note)
            if not i: time.sleep(1.1)   # so that times differ
        same = {key: value for key, value in contents[0].items() if contents[1].get(key, value) == value}
        lost = [key for key in contents[1] if key not in contents[0]]
        assert not lost, f"{name}: what two undisturbed runs leave differs: {lost[:5]}"
        return cls(name, lines, here, same, operations, min(took))

    def differences(self, there):
        "Names of what is not as in an undisturbed run"
        now = content(there)
        own = set(content(self.folder))
        other = [key for key, value in self.content.items() if now.get(key) != value]
        return sorted([*other, *(f"{key} (new)" for key in now if key not in own)])

def slug(name): return "".join(c if c.isalnum() else "-" for c in name)

@dataclass
class Trial:
    "What came of one trial"
    job: str
    blows: int = 0                             # kills, or full disks
    problems: list = field(default_factory=list)

def kill_trial(job, base, folder, seed, most=3):
    "Kill a job up to `most` times, start it again each time, and compare"
    lots = random.Random(f"{job.name} {seed}")
    here = Path(folder)/f"{slug(job.name)}-{seed}"
    shutil.copytree(base, here)
    trial = Trial(job.name)
    for _ in range(lots.randint(1, most)):
        ended = _killed_once(job, here, lots)
        if ended.status == 0: break
        trial.blows += 1
        if ended.status not in (None, INTERRUPTED): trial.problems.append(f"status {ended.status}: {ended.said[-300:]}")
    trial.problems += _problems(job, here, in_child(here, job.lines))
    if not trial.problems: shutil.rmtree(here)
    return trial

SIGNALS = signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT

def _killed_once(job, here, lots):
    "One start that is killed at some operation on a file, or gets a signal at some moment, if it is not through before"
    if lots.random() < .7:
        n = lots.randint(1, max(job.operations, 1))
        return in_child(here, job.lines, lambda: die_at(here, n, lots))
    def after(pid):
        time.sleep(lots.random()*job.seconds)
        with contextlib.suppress(ProcessLookupError): os.kill(pid, lots.choice(SIGNALS))
    return in_child(here, job.lines, after=after)

def _problems(job, here, last):
    "What is wrong after the last start"
    if last.status != 0: return [f"status {last.status}: {last.said.strip()[-1500:]}"]
    left = [str(p.relative_to(here)) for p in here.rglob(".*.tmp")]
    return job.differences(here) + [f"{p} left behind" for p in left]

# ---- full disks --------------------------------------------------------------------------------------------

CLONE_NEWNS, MS_REC, MS_PRIVATE, MS_REMOUNT = 0x20000, 0x4000, 1 << 18, 32

def small_disk(folder, size):
    "Mount a disk of `size` bytes at `folder`, for this process and its children; OSError where that is not allowed"
    libc = ctypes.CDLL(None, use_errno=True)
    def ask(what, code):
        if code: raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    ask("unshare", libc.unshare(CLONE_NEWNS))
    ask("mount", libc.mount(b"none", b"/", None, MS_REC|MS_PRIVATE, None))
    ask("mount", libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode()))

def larger_disk(folder, size):
    "Give that disk more room"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", MS_REMOUNT, f"size={size}".encode()):
        raise OSError(ctypes.get_errno(), "remount")

def disks_can_be_made(folder):
    "Is a small disk allowed here?"
    probe = Path(folder)/"probe"
    probe.mkdir(exist_ok=True)
    pid = os.fork()
    if not pid:
        try: small_disk(probe, 1 << 20)
        except OSError: os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1] == 0

def disk_trial(job, base, folder, seed):
    "Do a job on a disk that becomes full, make room, start it again, and compare"
    lots = random.Random(f"{job.name} disk {seed}")
    here = Path(folder)/f"{slug(job.name)}-disk-{seed}"
    here.mkdir()
    answer = here.with_suffix(".json")
    pid = os.fork()
    if not pid: _on_a_disk(job, base, here, lots, answer)
    os.waitpid(pid, 0)
    told = json.loads(answer.read_text())
    return Trial(job.name, told["blows"], told["problems"])

def _on_a_disk(job, base, here, lots, answer):
    "The part of `disk_trial` that sees the disk; it never returns"
    trial = Trial(job.name)
    try:
        small_disk(here, 1 << 30)
        shutil.copytree(base, here, dirs_exist_ok=True)
        used = _used(here)
        wanted = max(_used_by(job.folder) - _used_by(base), 1)
        larger_disk(here, used + 4096 + int(lots.random()*.9*wanted))
        ended = in_child(here, job.lines)
        if ended.status:
            trial.blows = 1
            if "Traceback" in ended.said: trial.problems.append(f"a traceback: {ended.said.strip()[-300:]}")
            named = "no space left" in ended.said.lower()
            if not named: trial.problems.append(f"not named: {ended.said.strip()[-200:]}")
        larger_disk(here, 1 << 30)
        trial.problems += _problems(job, here, in_child(here, job.lines))
    except BaseException: trial.problems.append(traceback.format_exc()[-500:])
    answer.write_text(json.dumps(dict(blows=trial.blows, problems=trial.problems)))
    os._exit(0)

def _used(folder):
    "Bytes that are taken on the disk of a folder"
    disk = os.statvfs(folder)
    return (disk.f_blocks - disk.f_bfree)*disk.f_frsize

def _used_by(folder):
    "Bytes that the files of a folder take, in whole pages"
    return sum(-(-p.lstat().st_size//4096)*4096 for p in Path(folder).rglob("*") if p.is_file())

# ---- content -----------------------------------------------------------------------------------------------

PASSING = {"starts", "seal", "time", "finished", "seconds", "git"}   # when, how often, how long, by which code

def content(folder):
    "{name of a value: value} of all files that are not hidden; a table is taken apart, so that one cell is one value"
    out = {}
    for path in sorted(Path(folder).rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or any(part.startswith(".") for part in name.split("/")): continue
        out |= {f"{name}: {key}": value for key, value in _content(path).items()}
    return out

def _content(path):
    "{name of a value: value} of one file"
    kind = path.suffix
    if kind == ".json": return dict(_leaves(json.loads(path.read_text())))
    if kind == ".jsonl": return dict(_leaves([json.loads(line) for line in path.read_text().splitlines()]))
    if kind == ".csv": return _cells(_table(path))
    if kind == ".parquet": return _cells(pd.read_parquet(path))
    if kind == ".safetensors": return _tensors(path)
    if kind == ".pt": return _state(path)
    if kind == ".html": return {"": "there"}
    return {"": path.read_bytes()}

def _leaves(value, above=""):
    if isinstance(value, dict): pairs = [(k, v) for k, v in value.items() if k not in PASSING]
    elif isinstance(value, list): pairs = enumerate(value)
    else: return [(above, repr(value))]
    return [leaf for key, below in pairs for leaf in _leaves(below, f"{above}.{key}")]

def _table(path):
    "A table as it stands there; one without columns where it is empty, such as the history of no stage"
    if path.stat().st_size < 2: return pd.DataFrame()
    return pd.read_csv(path, dtype=str, keep_default_na=False)

def _cells(frame):
    rows = frame.map(repr)
    return {f"{name}[{i}]": value for name in rows for i, value in enumerate(rows[name]) if name not in PASSING}

def _tensors(path):
    from safetensors.torch import load_file
    return {name: (str(x.dtype), x.numpy().tobytes()) for name, x in load_file(path).items()}

def _state(path):
    import torch
    state = torch.load(path, weights_only=True)
    return {name: x.numpy().tobytes() for name, x in state["model"].items()} | dict(done=state["done"])
