"Many at once, and media that cannot be written: nothing is lost, and what is whole can be read"
import errno, os, re, signal, subprocess, sys
from pathlib import Path
import pandas as pd, pytest
from leverplus import cli
from leverplus.bank import DemoBank
from leverplus.core import read_json
from leverplus.evaluate import count_look
from leverplus.runs import Busy, Run, check_place, hold_lock

ROOT = Path(__file__).resolve().parent.parent

def child(code, *words, **kw):
    "A process that runs some code; `sys.argv[1:]` are the words"
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore")
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-c", code, *map(str, words)], env=env, **pipes, **kw)


# ---- counters ----------------------------------------------------------------------------------------------

LOOK = """
import sys
import pandas as pd
from leverplus.evaluate import count_look
path, n = sys.argv[1:]
one = dict(selector=f"s{n}", shots=1, draw=0, question_id=int(n), pointer=(7,), vqa_acc_score=1., eval_failed=False)
print("ready", flush=True)
sys.stdin.readline()
count_look(path, pd.DataFrame([one]), "test")
"""

def test_six_looks_at_once_are_six(tmp_path):
    "They begin together, and each is counted"
    file = tmp_path/"looks.json"
    looking = [child(LOOK, file, n) for n in range(6)]
    for p in looking: assert p.stdout.readline() == "ready\n", p.stderr.read()
    for p in looking:
        p.stdin.write("go\n")
        p.stdin.flush()
    for p in looking:
        said = p.communicate()
        assert p.returncode == 0, said
    assert sorted(s for look in read_json(file) for s in look["selectors"]) == [f"s{n}" for n in range(6)]

def test_a_counter_that_is_none_is_refused(tmp_path):
    (tmp_path/"looks.json").write_text('{"looks": 3}')
    one = dict(selector="s", shots=1, draw=0, question_id=1, pointer=(7,), vqa_acc_score=1., eval_failed=False)
    with pytest.raises(ValueError, match="looks.json: not a list of looks"): count_look(tmp_path, pd.DataFrame([one]))

def test_two_who_add_to_a_bank_both_add(tmp_path):
    "The second one opened the bank before the first had added"
    rows = [dict(question=f"What is {i}?", answer="a cat", question_id=i, image_id=i) for i in range(3)]
    def table(i): return pd.DataFrame([rows[i]])
    DemoBank.build(table(0), folder=tmp_path/"bank", progress=False)
    first, second = (DemoBank.open(tmp_path/"bank") for _ in range(2))
    first.append(table(1), progress=False)
    second.append(table(2), progress=False)
    assert sorted(DemoBank.open(tmp_path/"bank").items.index) == sorted(second.items.index)
    assert len(second) == 3


# ---- waiting -----------------------------------------------------------------------------------------------

HOLD = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler) # a shell's background job is born deaf to it
from leverplus.runs import hold_lock
with hold_lock(sys.argv[1], "the pool"):
    print("held", flush=True)
    sys.stdin.readline()
"""

def test_who_waits_says_for_whom_and_since_when(tmp_path, capfd):
    lock = tmp_path/".pool.lock"
    p = child(HOLD, lock)
    assert p.stdout.readline() == "held\n"
    def let_go(*_): p.communicate("\n")
    signal.signal(signal.SIGALRM, let_go)
    signal.setitimer(signal.ITIMER_REAL, 1.)
    with hold_lock(lock, "the pool", patience=.2): assert (tmp_path/".pool.owner").exists()
    said = capfd.readouterr().err.strip()
    assert re.fullmatch(
        rf"waiting for process {p.pid} on \S+ to finish the pool \({re.escape(str(lock))}\); it began at 20\S+", said
    ), said
    assert sorted(os.listdir(tmp_path)) == [".pool.lock"]

def test_who_does_not_wait_says_nothing(tmp_path, capfd):
    with hold_lock(tmp_path/".pool.lock", "the pool"): pass
    assert capfd.readouterr().err == ""

def test_a_wait_ends_with_an_interrupt(tmp_path):
    lock = tmp_path/".pool.lock"
    with hold_lock(lock, "the pool"):
        waiting = child(HOLD, lock)
        assert "waiting for process" in waiting.stderr.readline()
        waiting.send_signal(signal.SIGINT)
        said = waiting.communicate(timeout=60)
        assert waiting.returncode and "KeyboardInterrupt" in said[1], said

def test_the_note_of_a_killed_process_misleads_nobody(tmp_path):
    lock = tmp_path/".pool.lock"
    killed = child(HOLD, lock)
    assert killed.stdout.readline() == "held\n"
    killed.kill()
    killed.wait()
    assert f"process {killed.pid}" in (tmp_path/".pool.owner").read_text()
    with hold_lock(lock, "the pool", wait=False):    # free at once
        (tmp_path/".pool.owner").write_text(f"process {killed.pid} on {os.uname().nodename}\n2020")
        with pytest.raises(Busy, match="another process is writing the pool"):
            with hold_lock(lock, "the pool", wait=False): pass


# ---- media that cannot be written --------------------------------------------------------------------------

READ_ONLY = """
import errno, os, sys
from pathlib import Path
top = os.path.realpath(sys.argv[1])
CHANGES = "os.mkdir os.rename os.remove os.rmdir os.truncate os.utime os.chmod os.link os.symlink".split()
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
def refuse(event, args):
    writes = event in CHANGES
    if event == "open" and isinstance(args[2], int): writes = args[2] & WRITES
    if not writes or not isinstance(args[0], (str, bytes, os.PathLike)): return
    path = os.path.abspath(os.fsdecode(args[0]))
    if path == top or path.startswith(top + os.sep): raise OSError(errno.EROFS, "Read-only file system", path)
sys.addaudithook(refuse)
from leverplus import cli
for line in sys.argv[2:]:
    try: status = cli.main(line.split())
    except SystemExit as e: status = e.code
    print("STATUS", status, line, flush=True)
"""

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A folder whose embeddings, pools, runs and bank are whole"
    from badlines import make_world
    folder = tmp_path_factory.mktemp("media")
    was = os.getcwd()
    os.chdir(folder)
    try: make_world(("embed", "generate", "train", "bank"))
    finally: os.chdir(was)
    return folder

def tried(finished, *lines):
    "[(exit status, line)] and what was said, while nothing below `runs` can be written"
    p = child(READ_ONLY, finished/"runs", *lines, cwd=finished)
    out, err = p.communicate()
    return re.findall(r"^STATUS (\d+) (.*)$", out, re.M), out + err

def test_what_is_whole_is_read_where_nothing_can_be_written(finished, tmp_path):
    lines = (
        "embed --quiet",
        "pools --split train dev",
        f"generate --lvlm mock --limit 4 --test 0 --quiet --out {tmp_path}/groups",
        "check runs/train runs/dev",
        "train runs/train --dev runs/dev --objective rce --set {\"watch\":null} --epochs 1 --bs 4 --quiet"
        f" --out {tmp_path}/rce",
        f"infer --lvlm mock --selector runs/rce --limit 4 --quiet --out {tmp_path}/answers",
        "pick --question What is it? --bank runs/bank --selector runs/rce",
    )
    status, said = tried(finished, *lines)
    assert [int(code) for code, _ in status] == [0]*len(lines), said

def test_what_must_be_written_says_that_it_cannot(finished, tmp_path):
    lines = (
        "generate --lvlm mock --limit 4 --test 0 --quiet --out runs/more",
        f"eval --lvlm mock --limit 5 --fixed 0 --draws 1 --quiet --out {tmp_path}/eval",
    )
    status, said = tried(finished, *lines)
    assert [int(code) for code, _ in status] == [2, 2], said
    assert "Traceback" not in said
    assert re.search(r"leverplus generate: \S*runs/more: read-only file system", said), said
    assert re.search(r"leverplus eval: \S*looks.json: read-only file system: this look cannot be counted", said), said


# ---- what the operating system refuses ---------------------------------------------------------------------

ROOM = "what is done is kept: make room, and the same command goes on"

@pytest.mark.parametrize(
    "number,status,says",
    [
        (errno.ENOSPC, 1, f"runs/x: no space left on device; {ROOM}"),
        (errno.EACCES, 2, "runs/x: permission denied"),
        (errno.EROFS, 2, "runs/x: read-only file system"),
        (errno.ENAMETOOLONG, 2, "runs/x: file name too long"),
        (errno.ELOOP, 2, "runs/x: too many levels of symbolic links"),
        (errno.EIO, 1, "runs/x: input/output error"),
    ],
)
def test_the_operating_system_is_quoted_in_one_line(monkeypatch, capsys, number, status, says):
    def refuse(door): raise OSError(number, os.strerror(number), "runs/x")
    monkeypatch.setattr(cli, "do_check", refuse)
    assert cli.main(["check", "runs/a"]) == status
    assert capsys.readouterr().err == f"leverplus check: {says}\n"


# ---- links -------------------------------------------------------------------------------------------------

def test_a_link_to_a_folder_is_a_folder_and_one_to_nowhere_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("disk").mkdir()
    Path("out").symlink_to("disk")
    Path("astray").symlink_to("nowhere")
    line = "generate --lvlm mock --limit 2 --test 0 --quiet --out".split()
    assert cli.main([*line, "out"]) == 0
    assert (tmp_path/"disk"/"manifest.json").exists() and Path("out").is_symlink()
    assert cli.main([*line, "out"]) == 0
    capsys.readouterr()
    assert cli.main([*line, "astray"]) == 2
    assert "astray: a link to nowhere, which is not there" in capsys.readouterr().err
    assert not Path("nowhere").exists()

def test_places_are_looked_at_without_a_trace(tmp_path):
    Run.create(tmp_path/"run", dict(lr=1))
    before = sorted(tmp_path.rglob("*"))
    assert check_place(tmp_path/"run", "a run") == tmp_path/"run"
    with pytest.raises(FileExistsError, match="holds a run, no place for groups"): check_place(tmp_path/"run", "groups")
    below = tmp_path/"run"/"settings.json"/"x"
    with pytest.raises(NotADirectoryError, match="settings.json is a file"): check_place(below)
    with pytest.raises(OSError, match="more than 200 letters"): check_place(tmp_path/("n"*300))
    with pytest.raises(ValueError, match="other settings"): Run.check(tmp_path/"run", dict(lr=2))
    Run.check(tmp_path/"run", dict(lr=2), overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before
