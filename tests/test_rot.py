"A damaged file, of each kind that we write, is named or made again, and never believed"
import random, re, subprocess, sys, textwrap, warnings
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from kinds import KINDS, TABLE, Written, generated, of_data, store
from leverplus.checkpoints import read_state, read_weights, write_state, write_weights
from leverplus.core import (
    BLANK_SEAL, SEAL, Damaged, checked_bytes, look_at_seal, put_seal, read_json, read_parquet, seal_file,
    sealed_json, sealed_path, write_json, write_parquet,
)
from leverplus.groups import RLData
from leverplus.runs import read_frame, write_frame

FLIPS = 40
ROOT = Path(__file__).resolve().parent.parent
each_kind = pytest.mark.parametrize("kind", KINDS, ids=[kind.name for kind in KINDS])

class Made(Written):
    "A file of a kind, what it held when it was whole, and what comes of it when it is not"
    def with_content(self, raw):
        "named | equal; whatever else comes of it is an error"
        came = self.verdict(raw)
        assert came != "believed", "read, though it is damaged"
        assert came != "unnamed", f"{self.error!r} does not name {self.file.name}"
        return came

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Each kind is made once"
    known = {}
    def of(kind):
        if kind.name not in known: known[kind.name] = Made(kind, tmp_path_factory.mktemp("kind"))
        return known[kind.name]
    return of

# ---- every kind --------------------------------------------------------------------------------------------

@each_kind
def test_a_whole_file_is_read_as_often_as_one_likes(made, kind):
    assert made(kind).with_content(made(kind).whole) == "equal"

@each_kind
def test_no_flipped_bit_is_believed(made, kind):
    "Named, or in a place that nothing is read from: the mark of the seal, a comment"
    one = made(kind)
    draws = random.Random(kind.name)
    came = []
    for place in draws.sample(range(8*len(one.whole)), FLIPS):
        raw = bytearray(one.whole)
        raw[place//8] ^= 1 << place%8
        came.append(one.with_content(raw))
    assert came.count("named") >= .9*FLIPS, came

@each_kind
def test_no_file_that_was_cut_short_is_believed(made, kind):
    one = made(kind)
    n = len(one.whole)
    if kind.name == "rows of a sweep":                 # as a kill leaves it; its last line is made again
        with pytest.raises(AssertionError, match="though it is damaged"): one.with_content(one.whole[:-9])
        return
    for size in (0, 1, n//3, n//2, n - 9):
        came = one.with_content(one.whole[:size])
        may_be_empty = kind.name == "note of what is kept"      # as earlier versions wrote it
        assert came == "named" or (size == 0 and may_be_empty), size

@each_kind
def test_no_block_of_zeros_is_believed(made, kind):
    one = made(kind)
    n = len(one.whole)
    size = max(n//8, 4)
    came = []
    for start in range(0, n - size, size):
        raw = bytearray(one.whole)
        raw[start:start+size] = bytes(size)
        came.append(one.with_content(raw))
    assert came.count("equal") <= 1, came              # where the seal stood, and nothing that is read

# ---- files of earlier versions, and of other programs ------------------------------------------------------

def test_files_without_a_seal_are_read(tmp_path):
    from safetensors.torch import save_file
    TABLE.to_parquet(tmp_path/"a.parquet")
    TABLE.to_csv(tmp_path/"a.csv", index=False)
    (tmp_path/"a.json").write_text('{"seal": "a seal of wax"}')
    save_file({"w": torch.ones(2)}, tmp_path/"a.safetensors")
    torch.save({"epoch": 3}, tmp_path/"a.pt")
    pd.testing.assert_frame_equal(read_parquet(tmp_path/"a.parquet"), pd.read_parquet(tmp_path/"a.parquet"))
    assert read_frame(tmp_path/"a.csv").acc.tolist() == [.5, .25]
    assert read_json(tmp_path/"a.json") == {"seal": "a seal of wax"}
    assert read_weights(tmp_path/"a.safetensors")["w"].tolist() == [1, 1]
    assert read_state(tmp_path/"a.pt") == {"epoch": 3}

def test_other_programs_read_files_with_a_seal(tmp_path):
    import json, pyarrow.parquet as pq, zipfile
    from safetensors.torch import load_file
    write_parquet(tmp_path/"a.parquet", TABLE)
    write_weights(tmp_path/"a.safetensors", {"w": torch.ones(2)})
    write_state(tmp_path/"a.pt", {"epoch": 3, "w": torch.ones(2)})
    write_frame(tmp_path/"a.csv", TABLE)
    write_json(tmp_path/"a.json", {"x": 1})
    assert pd.read_parquet(tmp_path/"a.parquet").to_dict("list") == TABLE.to_dict("list")
    checked = pq.ParquetFile(tmp_path/"a.parquet", page_checksum_verification=True).read()
    assert checked.to_pydict() == TABLE.to_dict("list")
    assert load_file(tmp_path/"a.safetensors")["w"].tolist() == [1, 1]
    assert torch.load(tmp_path/"a.pt", weights_only=True)["epoch"] == 3
    assert torch.load(tmp_path/"a.pt", weights_only=True, mmap=True)["w"].tolist() == [1, 1]
    assert zipfile.ZipFile(tmp_path/"a.pt").testzip() is None
    assert (tmp_path/"a.csv").read_text() == TABLE.to_csv(index=False)
    assert json.loads((tmp_path/"a.json").read_text())["x"] == 1

def test_pages_of_parquet_have_checksums(tmp_path):
    "A reader that knows no seal, but looks at the checksums, finds a flipped bit in a page"
    import pyarrow as pa, pyarrow.parquet as pq
    frame = pd.DataFrame(dict(reward=np.arange(3000)*np.pi))
    raw = bytearray(write_parquet(tmp_path/"a.parquet", frame).read_bytes())
    raw[9000] ^= 1
    (tmp_path/"a.parquet").write_bytes(raw)
    with pytest.raises((OSError, pa.ArrowException)):
        pq.ParquetFile(tmp_path/"a.parquet", page_checksum_verification=True).read()

def test_the_data_do_not_know_of_seals(tmp_path):
    "Content and fingerprint are what they were, and an object has no entry more"
    data = generated(tmp_path)
    assert of_data(RLData.load(tmp_path)) == of_data(data)
    assert "seal" not in data.manifest and SEAL in (tmp_path/"manifest.json").read_text()
    folder = store().save(tmp_path/"store")
    assert read_json(folder/"embed.json")["fingerprint"] == store().fingerprint

# ---- seals in a file ---------------------------------------------------------------------------------------

def test_a_seal_needs_room():
    with pytest.raises(ValueError, match="no room for a seal"): put_seal(bytearray(b"no room"))

def test_the_last_room_is_the_seal():
    "A text that quotes a blank seal stays as it is"
    obj = {"note": BLANK_SEAL, "x": 1}
    raw = sealed_json(obj)
    assert raw.count(BLANK_SEAL.encode()) == 1 and raw.rindex(SEAL.encode()) > raw.index(BLANK_SEAL.encode())
    look_at_seal(raw, "here")

def test_the_name_of_the_entry_is_taken(tmp_path):
    with pytest.raises(ValueError, match="the key 'seal' is taken"): write_json(tmp_path/"a.json", {"seal": 1})
    assert not list(tmp_path.iterdir())
    assert read_json(write_json(tmp_path/"a.json", {"seal": 1}, seal=False)) == {"seal": 1}

def test_a_packed_file_has_its_seal_inside(tmp_path):
    import gzip
    raw = write_json(tmp_path/"a.json", {"x": 1}).read_bytes()
    (tmp_path/"b.json").write_bytes(gzip.compress(raw))
    assert read_json(tmp_path/"b.json") == {"x": 1}
    (tmp_path/"b.json").write_bytes(gzip.compress(raw.replace(b'"x": 1', b'"x": 2')))
    with pytest.raises(Damaged, match="b.json: damaged"): read_json(tmp_path/"b.json")

def test_the_remedy_helps(tmp_path):
    "Somebody edits by hand, reads what to do, and does it"
    file = write_json(tmp_path/"a.json", {"x": 1})
    file.write_text(file.read_text().replace('"x": 1', '"x": 2'))
    with pytest.raises(Damaged, match="on purpose, take out its seal"): read_json(file)
    file.write_text(re.sub(r',\s*"seal": "[^"]*"', "", file.read_text()))
    assert read_json(file) == {"x": 2}
    table = write_frame(tmp_path/"a.csv", TABLE)
    table.write_text("acc\n1\n")
    remedy = f"on purpose, remove {re.escape(str(seal_file(table)))}"
    with pytest.raises(Damaged, match=remedy): read_frame(table)
    seal_file(table).unlink()
    assert read_frame(table).acc.tolist() == [1]

# ---- seals beside a file -----------------------------------------------------------------------------------

def test_a_kill_between_the_steps_leaves_a_good_file(tmp_path):
    "The seal of what comes is there, the file is still the old one; the next version is as good"
    file = write_frame(tmp_path/"a.csv", TABLE)
    child = f"""
        import os
        from leverplus import core
        from leverplus.runs import write_frame
        import pandas as pd
        def die(*_): os._exit(9)
        core.os.replace = die
        write_frame({str(file)!r}, pd.DataFrame(dict(acc=[1.])))
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(child)], cwd=ROOT).returncode == 9
    assert len(seal_file(file).read_text().split()) == 2
    assert read_frame(file).acc.tolist() == [.5, .25]
    assert read_frame(write_frame(file, pd.DataFrame(dict(acc=[1.])))).acc.tolist() == [1]

def test_a_file_that_was_there_without_a_seal_stays_good(tmp_path):
    "Until the new version is in place"
    file = tmp_path/"a.csv"
    file.write_text("acc\n.5\n")
    with pytest.raises(RuntimeError, match="in between"):
        with sealed_path(file, beside=True) as tmp:
            tmp.write_text("acc\n1.\n")
            raise RuntimeError("in between")
    assert not seal_file(file).exists()
    write_frame(file, TABLE)
    file.write_text("acc\n.5\n")                      # an earlier version passes
    assert read_frame(file).acc.tolist() == [.5]

def test_the_file_may_be_replaced_while_it_is_read(tmp_path, monkeypatch):
    "Between its bytes and its seal; the new bytes are taken then"
    file = write_frame(tmp_path/"a.csv", TABLE)
    read = Path.read_bytes
    old = read(file)
    seal_file(file).unlink()
    write_frame(file, pd.DataFrame(dict(acc=[1.])))
    seal_file(file).write_text(seal_file(file).read_text().split()[-1] + "\n")
    answers = iter([old])
    monkeypatch.setattr(Path, "read_bytes", lambda self: next(answers, None) or read(self))
    assert checked_bytes(file) == read(file)

def test_hidden_seals_are_no_tables_of_a_run(tmp_path):
    from leverplus.runs import Run
    run = Run.create(tmp_path/"run", dict(lr=1))
    run.save_frame("a.csv", TABLE)
    assert run.files() == ["a.csv", "settings.json"]

@pytest.mark.parametrize("what", ["file", "seal"])
def test_nothing_is_written_through_a_link(tmp_path, what):
    foreign = tmp_path/"foreign.txt"
    foreign.write_text("mine")
    file = tmp_path/"a.csv"
    link = file if what == "file" else seal_file(file)
    link.symlink_to(foreign)
    write_frame(file, TABLE)
    assert foreign.read_text() == "mine" and not link.is_symlink()
    assert read_frame(file).acc.tolist() == [.5, .25]

# ---- what can be made again is made again ------------------------------------------------------------------

def flip(file):
    raw = bytearray(file.read_bytes())
    raw[len(raw)//3] ^= 16
    file.write_bytes(raw)

def test_a_damaged_part_is_asked_again(tmp_path):
    want = generated(tmp_path)
    part = sorted(tmp_path.glob("part-*"))[1]
    flip(part)
    with pytest.raises(Damaged, match=part.name): RLData.load(tmp_path)
    with pytest.warns(UserWarning, match=f"{part.name}: damaged.* 2 questions are asked again"):
        again = generated(tmp_path, quiet=False)
    assert again.fingerprint == want.fingerprint

def test_kept_embeddings_are_made_again(tmp_path):
    from kinds import kept_job
    from leverplus.embed import EmbedStore
    made = []
    def make():
        made.append(1)
        return store()
    def kept(): return kept_job(tmp_path).kept("embed-x", EmbedStore.load, make)
    want = kept().fingerprint
    assert kept().fingerprint == want and len(made) == 1
    flip(tmp_path/"kept"/"embed-x"/"embed.safetensors")
    with pytest.warns(UserWarning, match="embed.safetensors: damaged.* made again"):
        assert kept().fingerprint == want
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kept().fingerprint == want and len(made) == 2

def test_a_damaged_shard_of_features_is_made_again(tmp_path):
    from leverplus.vision import FeatureShards
    def put():
        shards = FeatureShards(tmp_path)
        shards.put("a", torch.ones(2, 4), (1, 1, 2))
        shards.put("b", torch.zeros(2, 4), (1, 1, 2))
        shards.flush()
        return shards
    put()
    shard = next(tmp_path.iterdir())
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1                                       # of image b
    shard.write_bytes(raw)
    shards = FeatureShards(tmp_path)
    assert shards.get("a")[0].tolist() == torch.ones(2, 4).tolist()
    with pytest.warns(UserWarning, match=f"{shard.name}: damaged.* encoded again"):
        assert shards.get("b") is None
    assert not shard.exists() and shards.get("a") is None
    assert put().get("b")[0].tolist() == torch.zeros(2, 4).tolist()

# ---- full disks --------------------------------------------------------------------------------------------

FULL = """
    import resource, signal, sys, torch, pandas as pd
    from pathlib import Path
    from leverplus.checkpoints import write_state, write_weights
    from leverplus.core import write_json, write_parquet
    from leverplus.runs import write_frame
    folder = Path(sys.argv[1])
    x = torch.randn(100_000)
    frame = pd.DataFrame(dict(x=x.numpy()))
    writers = {
        "a.parquet": lambda file: write_parquet(file, frame),
        "a.safetensors": lambda file: write_weights(file, dict(x=x)),
        "a.pt": lambda file: write_state(file, dict(x=x)),
        "a.csv": lambda file: write_frame(file, frame),
        "a.json": lambda file: write_json(file, dict(x=x.tolist())),
    }
    for name in writers: (folder/name).write_text("old")
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    for name, write in writers.items():
        try: write(folder/name)
        except OSError as e: print(e)
"""

@pytest.mark.skipif(sys.platform == "win32", reason="there are no such limits")
def test_all_writers_speak_alike_of_a_full_disk(tmp_path):
    "Whatever the library says, which is sometimes no more than 'unexpected pos'"
    command = [sys.executable, "-c", textwrap.dedent(FULL), tmp_path]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    names = ["a.parquet", "a.safetensors", "a.pt", "a.csv", "a.json"]
    said = out.stdout.splitlines()
    assert len(said) == len(names), out.stdout + out.stderr
    for line, name in zip(said, names):
        says = rf"^\[Errno 27\] larger than a file may be here: .*/{name} \([\d,]+ bytes free"
        assert re.search(says, line), line
        assert line.endswith("or write to another disk; what was there is as it was")
        assert (tmp_path/name).read_text() == "old"
    assert not list(tmp_path.glob(".*.tmp"))

class NoMore:
    "A file to which nothing can be added"
    def __enter__(self): return self
    def __exit__(self, *_): pass
    def write(self, _): raise OSError(28, "No space left on device")

ERRORS = [RuntimeError("unexpected pos 64 vs 0"), OSError("no number"), OSError(28, "full")]

@pytest.mark.parametrize("error", ERRORS)
def test_a_full_disk_is_found_behind_any_error(tmp_path, monkeypatch, error):
    import leverplus.core
    def full(*_): return NoMore()
    with pytest.raises(OSError, match="no space left for .*/a.json .*make room and start again") as e:
        with leverplus.core.atomic_path(tmp_path/"a.json") as tmp:
            tmp.touch()
            monkeypatch.setattr(leverplus.core, "open", full, raising=False)
            raise error
    assert e.value.errno == 28 and e.value.__cause__ is error

def test_other_errors_are_left_as_they_are(tmp_path):
    from leverplus.core import atomic_path, room_for
    for error in (RuntimeError("unexpected pos"), PermissionError(13, "no"), KeyError("x")):
        with pytest.raises(type(error)) as e:
            with atomic_path(tmp_path/"a.json") as tmp:
                tmp.touch()
                raise error
        assert e.value is error
    with pytest.raises(RuntimeError, match="odd"):
        with room_for(tmp_path/"lines.jsonl"): raise RuntimeError("odd")
    assert not list(tmp_path.iterdir())
