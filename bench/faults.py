"""What this package is put through, and what comes of it: kills, full disks, damaged bits, bad numbers, lines and data.

    python bench/faults.py                          the whole table: half an hour on two cores
    python bench/faults.py --kills 20 --disks 0     fewer trials of a kind
    python bench/faults.py --only kills --jobs sweep --seed 7

Each kill ends a command with SIGKILL at some operation on a file (a file that is being written is cut short), or with
SIGKILL, SIGTERM or SIGINT at some moment; the command is started again until it is through, and every number that it
leaves is compared with those of a run that nobody disturbed. A full disk is a real one, too small for what the command
writes; room is made, and the same command goes on. A flip changes one bit of a file that was written here; the file is
read again, and must be named, or give what it gave before. Bad numbers, lines and data come from the ranges that
arguments and flags state, and from a list of what people hand in; each must be refused in words.
"""
import argparse, contextlib, io, multiprocessing, os, random, sys, tempfile, time, warnings
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tqdm import tqdm

os.environ |= dict(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT/"tests")]
import force

ROW = "{:34s} {:>6s} {:>6s} {:>8s} {:>6s}  {}"

def show(name, tried, blows, well, lost, note=""):
    print(ROW.format(name, str(tried), str(blows), str(well), str(lost), note), flush=True)

# ---- kills and full disks ----------------------------------------------------------------------------------

def _trial(args):
    "One trial, in a process of its own"
    trial, *rest = args
    return trial(*rest)

def trials_of(trial, jobs, base, folder, n, seed, workers):
    "n trials, over all jobs in turn: list of `force.Trial`; of those that are done, if it is interrupted"
    given = [(trial, jobs[i % len(jobs)], base, folder, seed*100_000 + i) for i in range(n)]
    done = []
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork")) as pool:
        bar = tqdm(pool.map(_trial, given), total=n, unit="trial", disable=False)
        try:
            for one in bar:
                done.append(one)
                bar.set_postfix(blows=sum(t.blows for t in done), lost=sum(bool(t.problems) for t in done))
        except KeyboardInterrupt: pool.shutdown(wait=False, cancel_futures=True)
    return done

def show_trials(what, trials):
    "A line per job and one for all; then what went wrong"
    by_job = defaultdict(list)
    for t in trials: by_job[t.job].append(t)
    lines = [*by_job.items(), ("all", trials)]
    for job, some in lines:
        lost = [t for t in some if t.problems]
        show(f"{what}: {job}", len(some), sum(t.blows for t in some), len(some) - len(lost), len(lost))
    wrong = [f"   {t.job}: {'; '.join(t.problems[:3])}" for t in trials if t.problems]
    for line in wrong: print(line)
    return len(wrong)

def under_force(args, folder):
    "Kills and full disks: how many trials went wrong"
    import leverplus.callback_onpolicy, leverplus.cli, leverplus.learner   # once, before the forks
    import torch
    torch.set_num_threads(1)
    names = args.jobs or list(force.JOBS)
    base = force.make_base(folder/"base", names)
    jobs = [force.Job.measured(name, base, folder) for name in names]
    kinds = [("kill", force.kill_trial, args.kills), ("full disk", force.disk_trial, args.disks)]
    if not force.disks_can_be_made(folder):
        print("full disk: not tried, small disks cannot be mounted here (needs the right to, on Linux)")
        kinds.pop()
    wrong = 0
    for what, trial, n in kinds:
        if n: wrong += show_trials(what, trials_of(trial, jobs, base, folder, n, args.seed, args.workers))
    return wrong

# ---- damaged bits ------------------------------------------------------------------------------------------

def flips(args, folder):
    "Bits of every kind of file: how many were believed, or not named"
    from kinds import KINDS, Written
    wrong = 0
    every = Counter()
    for i, kind in enumerate(KINDS):
        if args.jobs and kind.name not in args.jobs: continue
        one = Written(kind, folder/"flips"/str(i))
        lots = random.Random(f"{kind.name} {args.seed}")
        came = Counter()
        for _ in range(args.flips):
            raw = bytearray(one.whole)
            place = lots.randrange(8*len(raw))
            raw[place//8] ^= 1 << place%8
            came[one.verdict(raw)] += 1
        lost = came["believed"] + came["unnamed"]
        show(f"bit: {kind.name}", args.flips, "", came["named"] + came["equal"], lost, f"{came['equal']} harmless")
        every += came
        wrong += lost
    show("bit: all", every.total(), "", every["named"] + every["equal"], wrong, f"{every['equal']} harmless")
    return wrong

# ---- bad input ---------------------------------------------------------------------------------------------

REFUSALS = ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError

def refusal(call, names):
    "named | unnamed | accepted: what comes of a call that should be refused"
    try: call()
    except REFUSALS as e: return "named" if all(name in str(e) for name in names) else "unnamed"
    except Exception: return "unnamed"
    return "accepted"

def numbers(folder):
    "What comes of each bad number"
    from bad_numbers import bad_numbers
    for name, argument, value, call in bad_numbers():
        yield refusal(call, [argument]), f"{name}({argument}={value!r})"

def data(folder):
    "What comes of each bad file, id and text"
    from baddata import bad_data
    for name, call, names in bad_data(folder/"data"): yield refusal(call, names), name

def lines(folder):
    "What comes of each bad command line"
    from badlines import bad_lines, make_world, snapshot, what_is_wrong
    (folder/"lines").mkdir()
    os.chdir(folder/"lines")
    try:
        make_world()
        before = snapshot()
        for words, named in bad_lines():
            wrong = what_is_wrong(words, named, before)
            if wrong: before = snapshot()
            yield _verdict(wrong), f"{' '.join(words)}: {wrong}"
    finally: os.chdir(ROOT)

def _verdict(wrong):
    "named | unnamed | accepted, by what is wrong with a refusal"
    if not wrong: return "named"
    return "accepted" if wrong.startswith("status 0") else "unnamed"

def inputs(args, folder):
    "Bad numbers, data and lines: how many were accepted, or refused without a name"
    wrong = 0
    every = Counter()
    for what, source in dict(number=numbers, data=data, line=lines).items():
        came = Counter()
        odd = []
        with contextlib.redirect_stderr(io.StringIO()):
            for verdict, about in source(folder):
                came[verdict] += 1
                if verdict != "named": odd.append(f"   {verdict}: {about}"[:200])
        show(f"bad {what}", came.total(), "", came["named"], len(odd), f"{came['accepted']} accepted")
        for line in odd[:20]: print(line)
        every += came
        wrong += len(odd)
    named = f"{every['named']/max(every.total(), 1):.1%} named"
    show("bad input: all", every.total(), "", every["named"], wrong, named)
    return wrong

# ---- the table ---------------------------------------------------------------------------------------------

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--kills", type=int, default=200, help="trials, each with one to three kills")
    p.add_argument("--disks", type=int, default=30, help="trials, each on a disk that becomes full")
    p.add_argument("--flips", type=int, default=300, help="bits per kind of file")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--workers", type=int, default=os.cpu_count())
    p.add_argument("--only", nargs="+", choices=["force", "flips", "inputs"], default=["force", "flips", "inputs"])
    p.add_argument("--jobs", nargs="+", help="names of jobs, or of kinds of files; default all")
    args = p.parse_args()
    warnings.simplefilter("ignore")
    print(f"seed {args.seed}, {time.strftime('%Y-%m-%d')}\n")
    print(ROW.format("fault", "tried", "blows", "survived", "lost", ""))
    parts = dict(force=under_force, flips=flips, inputs=inputs)
    with tempfile.TemporaryDirectory() as folder:
        wrong = sum(parts[part](args, Path(folder)) for part in args.only)
    print(f"\n{wrong} lost, believed, accepted or refused without a name")
    return 1 if wrong else 0

if __name__ == "__main__": sys.exit(main())
