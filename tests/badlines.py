"""Command lines that must be refused: every flag with values that are not of its kind, and what does not go together

`make_world` makes the runs, selectors and files that the lines name, in the working folder.
"""
import contextlib, io, os
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Annotated, Literal, get_args, get_origin, get_type_hints
from annotated_types import MinLen
from leverplus.core import repo_path
from leverplus.doors import DOORS
from leverplus.runs import is_lock

ISLANDS = str(repo_path("data", "islands"))

# ---- the world that the lines are about --------------------------------------------------------------------

WORLD = (
    "embed --quiet",
    "generate --lvlm mock --limit 12 --test 0 --quiet --out runs/train",
    "generate --lvlm mock --limit 12 --split dev --test 0 --quiet --out runs/dev",
    "train runs/train --dev runs/dev --objective rce --set {\"watch\":null} --epochs 1 --bs 4 --quiet --out runs/rce",
    "infer --lvlm mock --picker mmr --limit 6 --quiet --out runs/answers",
    "eval --lvlm mock --limit 6 --fixed 0 --draws 1 --quiet --out runs/eval",
    f"bank --source {ISLANDS} --quiet --out runs/bank",
    (
        "sweep runs/train --dev runs/dev --lvlm mock --grid objective=sft --base sft.n_epoch=1 bs=4 --seeds 0 --quiet"
        " --out runs/sweep"
    ),
)

def make_world(
    kinds=None, # commands whose lines are carried out; None: all
):
    "Runs, a selector, a bank and odd files, below the working folder"
    from leverplus import cli
    for line in WORLD:
        if kinds is not None and line.split()[0] not in kinds: continue
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said): status = cli.main(line.split())
        if status: raise RuntimeError(f"leverplus {line}: {said.getvalue()}")
    for folder in ("empty", "foreign", "runs/hollow/checkpoint"): Path(folder).mkdir(parents=True)
    Path("a-file").write_text("a file\n")
    Path("foreign/thesis.txt").write_text("a thesis\n")
    Path("dangling").symlink_to("nowhere")
    Path("loop").symlink_to("loop")

# ---- every flag of every command ---------------------------------------------------------------------------

# a line that would be carried out, but for what is added to it
GOOD = dict(
    embed="embed --store new --quiet",
    pools="pools --quiet",
    generate="generate --lvlm mock --limit 4 --test 0 --quiet --out new",
    check="check runs/train",
    mine="mine runs/train --lvlm mock --quiet --out new",
    merge="merge runs/train --quiet --out new",
    train="train runs/train --dev runs/dev --objective rce --epochs 1 --bs 4 --quiet --out new",
    infer="infer --lvlm mock --picker mmr --limit 4 --quiet --out new",
    eval="eval --lvlm mock --limit 4 --fixed 0 --draws 1 --quiet --out new",
    report="report runs/eval --out new.html",
    sweep="sweep runs/train --dev runs/dev --lvlm mock --grid objective=sft --seeds 0 --quiet --out new",
    demo="demo --train-queries 4 --dev-queries 4 --quiet --out new",
    bank=f"bank --source {ISLANDS} --quiet --out new",
    pick="pick --question What --bank runs/bank --selector runs/rce",
)
TWICE = {int: "2", float: "0.5", str: "dev"} # a good value, given two times

def flags_of(cls):
    "(name of a flag, its annotation) of a group and of the groups in it; what has no flag is left out"
    hints = get_type_hints(cls, include_extras=True)
    for f in fields(cls):
        hint = hints[f.name]
        if is_dataclass(hint): yield from flags_of(hint)
        elif not is_positional(hint) and f.name not in ("shard", "rate"): yield flag_name(f.name, hint), hint

def extras(hint):
    "What an annotation says beside the type"
    if get_origin(hint) is not Annotated: return []
    inner, *own = get_args(hint)
    return [*extras(inner), *own]

def flag_name(name, hint):
    named = [m.name for m in extras(hint) if getattr(m, "name", None)]
    return "--" + (named[-1] if named else name).replace("_", "-")

def is_positional(hint): return any("Positional" in str(m) for m in extras(hint))

def bare(hint):
    "The type itself, without annotations and without None"
    if get_origin(hint) is Annotated: return bare(get_args(hint)[0])
    others = [kind for kind in get_args(hint) if kind is not NoneType]
    if NoneType in get_args(hint) and len(others) == 1: return bare(others[0])
    return hint

def bad_values(hint):
    "Words that this annotation cannot take"
    kind = bare(hint)
    if kind is bool: return [["=maybe"]]
    if kind is int: return [["abc"], *bounds(hint), ["nan"], ["2.5"], ["1e30"], [""]]
    if kind is float: return [["abc"], *bounds(hint), ["nan"], ["inf"], [""]]
    if kind is dict: return [["{"], ["[1]"], ['{"a":NaN}'], ["abc"]]
    if get_origin(kind) is Literal: return [["nonsense"], [""]]
    if get_origin(kind) is tuple: return bad_tuples(hint, get_args(kind)[0])
    return []

def bounds(hint):
    "Numbers beyond the bounds of an annotation"
    for bound in extras(hint):
        least, above, most = (getattr(bound, name, None) for name in ("ge", "gt", "le"))
        if least is not None: yield [str(least - 1)]
        if above is not None: yield [str(above)]
        if most is not None: yield [str(most + 1)]

def bad_tuples(hint, inner):
    "A bad value among good ones, a good one twice, none where one is wanted"
    kind = bare(inner)
    if kind is str: return [[]] if any(isinstance(m, MinLen) for m in extras(hint)) else []
    if kind not in TWICE: kind = int # numbers, or a word
    good = TWICE[kind]
    bad = [["abc"], ["nan"], ["-1"], [""], ["2.5"]]
    return [[], [good, good], *bad, *([good, *value] for value in bad[:3])]

def flag_lines():
    "Two bad values for every flag, others for each command"
    for i, (name, door) in enumerate(DOORS.items()):
        for flag, hint in flags_of(door):
            for value in some(bad_values(hint), 2, i):
                words = [flag + value[0]] if value[:1] == ["=maybe"] else [flag, *value]
                yield [*GOOD[name].split(), *words], "seed" if flag == "--pool-seed" else flag.removeprefix("--")

def some(values, n, turn):
    "So many of some values, each turn others"
    return [values[(turn + k*len(values)//n) % len(values)] for k in range(min(n, len(values)))]

# ---- shards, rates, folders, names -------------------------------------------------------------------------

def one_by_one(text):
    "Lines with what they must name, one a line: the words, then the name behind ` | `"
    for line in text.strip().splitlines():
        words, _, named = line.rpartition(" | ")
        yield words.replace("ISLANDS", ISLANDS).split(), named.strip()

def shard_lines():
    for i, name in enumerate(("embed", "generate", "infer", "sweep")):
        for shard in some(("2/2", "-1/2", "0/0", "a", "1", "1/2/3", "nan/2", "0.5/2"), 2, i):
            yield [*GOOD[name].split(), "--shard", shard], "shard"

def rate_lines():
    for i, name in enumerate(("embed", "generate", "mine", "infer", "eval", "sweep", "demo")):
        for rate in some(("0", "-1", "nan", "inf", "fast"), 2, i): yield [*GOOD[name].split(), "--rate", rate], "rate"

OUT_OF_PLACE = {"": "working directory", "a-file": "a-file", "dangling": "dangling", "loop": "loop",
                "a-file/below": "a-file", "n" * 300: "n" * 300}

def out_lines():
    "Folders that results cannot go to"
    for name in ("generate", "mine", "merge", "train", "infer", "eval", "sweep", "demo", "bank"):
        for out, named in OUT_OF_PLACE.items(): yield [*GOOD[name].split(), "--out", out], named
    for i, name in enumerate(("generate", "infer", "eval", "train", "mine")):
        for store in some(("", "a-file", "dangling", "loop"), 2, i):
            yield [*GOOD[name].split(), "--store", store], OUT_OF_PLACE[store]
    for out in ("", "a-file", "dangling", "loop"):
        yield [*GOOD["check"].split(), "--csv", out], OUT_OF_PLACE[out]

def run_lines():
    "Runs that are none, or of another kind"
    no_groups = ("nowhere", "a-file", "empty", "foreign", "dangling", "loop", "runs/trian", "runs/rce", "runs/eval",
                 "runs/bank")
    places = (
        "check RUN", "check runs/train RUN", "mine RUN --lvlm mock --quiet --out new", "merge runs/train RUN --out new",
        "train RUN --objective rce --epochs 1 --quiet --out new", f"{GOOD['train']} --dev RUN",
        f"{GOOD['sweep']} --dev RUN", f"{GOOD['sweep']} --valid RUN",
        f"{GOOD['infer']} --picker knn_facts --groups RUN", f"{GOOD['eval']} --groups RUN",
    )
    for i, line in enumerate(places):
        for run in some(no_groups, 4, i): yield line.replace("RUN", run).split(), run
    for run in ("nowhere", "a-file", "empty", "foreign", "dangling", "loop", "runs/evil", "runs/bank"):
        yield ["report", run], run
        yield ["report", "runs/eval", run, "--out", "new.html"], run

def selector_lines():
    "Selectors that are none"
    none = ("./nowhere", "nowhere", "a-file", "empty", "foreign", "dangling", "loop", "runs/rcee", "runs/train",
            "runs/hollow", "a/b/c", "~/none/x", "runs\\rce", "/none", "runs/rce/checkpont")
    fronts = (
        f"{GOOD['generate']} --selector", f"{GOOD['infer']} --picker greedy --selector", f"{GOOD['eval']} --selector",
        f"{GOOD['check']} --selector", f"{GOOD['train']} --start", f"{GOOD['pick']} --selector",
    )
    for i, front in enumerate(fronts):
        for path in some(none, 5, i): yield [*front.split(), path], path

def model_lines():
    "Models that are none: nothing is asked of the hub for what looks like a path"
    none = ("./nowhere", "runs/x", "a/b/c", "~/none", "/none", "runs\\x", "empty", "a-file", "dangling", "loop")
    for i, name in enumerate(("generate", "mine", "infer", "eval", "sweep")):
        for path in some(none, 4, i): yield [*GOOD[name].split(), "--lvlm", path], path
    for i, name in enumerate(("embed", "pools", "generate", "infer", "eval", "bank")):
        for path in some(none, 4, i): yield [*GOOD[name].split(), "--clip", path], path

def data_lines():
    "Data sets and pictures that are none"
    for i, name in enumerate(("embed", "pools", "generate", "infer", "eval", "train", "mine", "sweep")):
        for data in some(("nowhere", "a-file", "empty", "foreign", "dangling", "loop"), 3, i):
            yield [*GOOD[name].split(), "--data", data], data
    for path in ("nowhere", "a-file", "empty", "dangling", "loop"):
        yield ["bank", "--source", path, "--out", "new"], path
        yield [*GOOD["pick"].split(), "--bank", path], path
    for path in ("nowhere.jpg", "a-file", "empty", "dangling", "loop"):
        yield [*GOOD["pick"].split(), "--image", path], path

# ---- what does not go together -----------------------------------------------------------------------------

TOGETHER = """
generate --lvlm mock --test 0 --quiet --out new --shots 16 | shots
generate --lvlm mock --test 0 --quiet --out new --shots 2 2 | shots
generate --lvlm mock --test 0 --quiet --out new --K 100000 | K
generate --lvlm mock --test 0 --quiet --out new --split nowhere | nowhere
generate --lvlm mock --test 0 --quiet --out new --candidates nowhere | nowhere
generate --lvlm mock --test 0 --quiet --out new --images none --sampler image | image
generate --lvlm mock --test 0 --quiet --out new --images none --kind mixed --sampler text | mixed
generate --lvlm mock --test 0 --quiet --out new --selector runs/rce --shots 9 | max_shots
generate --lvlm mock --test 0 --quiet --out new --selector runs/rce --K 8 | K
generate --lvlm mock --test 0 --quiet --out new --selector runs/rce --kind image | kind
generate --lvlm mock --test 0 --quiet --out runs/train --limit 12 --shots 1 | shots
generate --lvlm mock --test 0 --quiet --out runs/train --limit 12 --shard 0/2 | shard
generate --lvlm mock --test 0 --quiet --out runs/rce | runs/rce
generate --lvlm mock --test 0 --quiet --out runs/eval | runs/eval
generate --lvlm mock --test 0 --quiet --out runs/bank | runs/bank
generate --lvlm mock --test 0 --quiet --out new --resume | resume
generate --lvlm mock --test 0 --quiet --out new --counts {"beam":-1} | counts
generate --lvlm mock --test 0 --quiet --out new --counts {"temperature":{"0":1}} | temperatures
generate --lvlm mock --test 0 --quiet --out new --counts {"temperature":{"1":1,"1.0":2}} | temperatures
generate --lvlm mock --test 0 --quiet --out new --counts {} | counts
generate --lvlm mock --test 0 --quiet --out new --second {"top":0} | top
generate --lvlm mock --test 0 --quiet --out new --min-pixels 9 --max-pixels 3 | max_pixels
generate --lvlm mock --test 0 --quiet --out new --threads 2 | threads
generate --lvlm mock --test 0 --quiet --out new --columns question=q | columns
generate --lvlm mock --test 0 --quiet --out new --reader table | data/islands
generate --lvlm mock --test 0 --quiet --out new --device tpu:9 | tpu:9
generate --lvlm mock --test 0 --quiet --out new --config nowhere.yaml | nowhere.yaml
generate --lvlm mock --test 0 --quiet --out new --config a-file | a-file
generate --lvlm mock --test 0 --quiet --out new --config runs/eval | leverplus eval
generate --lvlm mock --test 0 --quiet --out new --config dangling | dangling
embed --split dev dev --store new | split
embed --split nowhere --store new | nowhere
embed --split dev --shard 0/2 --parts 3 --store new | parts
embed --store none | store
pools --split dev dev | split
pools --K 100000 | K
pools --split nowhere | nowhere
pools --images none --sampler mixed | mixed
check runs/train runs/train | runs/train
check runs/train --weights {"speed":9} | weights
check runs/train --weights {"price":1} | price
check runs/train --selector runs/rce --selector runs/rce | twice
check runs/train --selector runs/rce --split nowhere | nowhere
mine runs/train --lvlm mock --quiet --out runs/train | runs/train
mine runs/train --lvlm mock --quiet --out new --split nowhere | nowhere
mine runs/train --lvlm mock --quiet --out new --style chat | scorer
mine runs/train --lvlm mock --quiet --out runs/rce | runs/rce
mine runs/train --lvlm mock --quiet --out runs/dev | runs/dev
merge runs/train runs/train --out new | runs/train
merge runs/train --out runs/train | runs/train
merge runs/train --out runs/rce | runs/rce
merge runs/train --out runs/eval | runs/eval
merge runs/train --out new --weights {"speed":9} --min-gap 0.1 | weights
merge runs/train --out new --reward gtprob | min-gap
merge runs/train --out new --sample 100 | sample
merge runs/train --out new --min-gap 1000 | min-gap
train runs/train --dev runs/dev --quiet --out new --objective rce --set {"speed":9} | speed
train runs/train --dev runs/dev --quiet --out new --objective rce --set {"temp":-1} | temp
train runs/train --dev runs/dev --quiet --out new --objective rce --set {"norm":"x"} | norm
train runs/train --dev runs/dev --quiet --out new --objective grpo --set {"clip":-1} | clip
train runs/train --dev runs/dev --quiet --out new --objective rce --model {"speed":9} | speed
train runs/train --dev runs/dev --quiet --out new --objective rce --kind audio | kind
train runs/train --dev runs/dev --quiet --out new --recipe nowhere | nowhere
train runs/train --dev runs/dev --quiet --out new --set {"nowhere":{"n_epoch":2}} | nowhere
train runs/train --dev runs/dev --quiet --out new --reward gtprob | reward
train runs/train --dev runs/dev --quiet --out new --objective rce --reward gtprob --weights {"speed":9} | weights
train runs/train --dev runs/train --quiet --out new --objective rce | question_id
train runs/train runs/train --dev runs/dev --quiet --out new --objective rce | runs/train
train runs/train --quiet --out new --objective rce --dev-share 0 | dev_share
train runs/train --quiet --out new --objective rce --dev-share 1 | dev_share
train runs/train --dev runs/dev --quiet --out new --objective rce --start runs/rce --model {"d_hidden":8} | model
train runs/train --dev runs/dev --quiet --out new --objective rce --start runs/rce --kind image | kind
train runs/train --dev runs/dev --quiet --out new --objective rce --choose accuracy --epochs 0 | accuracy
train runs/train --dev runs/dev --quiet --out runs/train --objective rce | runs/train
train runs/train --dev runs/dev --quiet --out runs/rce --objective rce --epochs 2 | epochs
train runs/train --dev runs/dev --quiet --out runs/eval --objective rce | runs/eval
train runs/train --dev runs/dev --quiet --out new --objective rce --kept a-file | a-file
train runs/train --dev runs/dev --quiet --out new --objective rce --kept dangling | dangling
infer --lvlm mock --quiet --out new | selector
infer --lvlm mock --quiet --out new --selector runs/rce --shots 9 | max_shots
infer --lvlm mock --quiet --out new --selector runs/rce --shots 16 | shots
infer --lvlm mock --quiet --out new --selector runs/rce --shots stop | stop
infer --lvlm mock --quiet --out new --selector runs/rce --shots stop 2 | stop
infer --lvlm mock --quiet --out new --selector runs/rce --shots 2 2 | shots
infer --lvlm mock --quiet --out new --selector runs/rce --K 8 | K
infer --lvlm mock --quiet --out new --selector runs/rce --kind image | kind
infer --lvlm mock --quiet --out new --selector runs/rce --sampler mixed | mixed
infer --lvlm mock --quiet --out new --selector runs/rce --by vote | by
infer --lvlm mock --quiet --out new --selector runs/rce --weight confidence | weight
infer --lvlm mock --quiet --out new --selector runs/rce --threshold 0.5 | threshold
infer --lvlm mock --quiet --out new --selector runs/rce --split nowhere | nowhere
infer --lvlm mock --quiet --out new --picker mmr --shots 99 | shots
infer --lvlm mock --quiet --out new --picker mmr --shots stop | stop
infer --lvlm mock --quiet --out new --picker fixed | fixed
infer --lvlm mock --quiet --out new --picker fixed --fixed 1 2 | fixed
infer --lvlm mock --quiet --out new --picker fixed --fixed 10 10 | fixed
infer --lvlm mock --quiet --out new --picker mmr --fixed 10 | fixed
infer --lvlm mock --quiet --out new --picker knn_facts | groups
infer --lvlm mock --quiet --out new --picker knn_facts --groups runs/dev | groups
infer --lvlm mock --quiet --out new --picker similar_image --images none --sampler text | image
infer --lvlm mock --quiet --out runs/answers --picker mmr --limit 6 --shots 1 | shots
infer --lvlm mock --quiet --out runs/answers --picker mmr --limit 6 --shard 0/2 | runs/answers
infer --lvlm mock --quiet --out runs/train --picker mmr | runs/train
infer --lvlm mock --quiet --out runs/rce --picker mmr | runs/rce
infer --lvlm mock --quiet --out new --picker mmr --resume | resume
eval --lvlm mock --quiet --out new --fixed 0 --sizes abc | sizes
eval --lvlm mock --quiet --out new --fixed 0 --sizes 4 4 | sizes
eval --lvlm mock --quiet --out new --fixed 0 --sizes all all | sizes
eval --lvlm mock --quiet --out new --fixed 0 --sizes 0 | sizes
eval --lvlm mock --quiet --out new --fixed 0 --limit 4 --sizes 5 | 5
eval --lvlm mock --quiet --out new --fixed 0 --shots 1 1 | shots
eval --lvlm mock --quiet --out new --fixed 0 --shots 0 | shots
eval --lvlm mock --quiet --out new --fixed 0 --shots 16 | shots
eval --lvlm mock --quiet --out new --fixed 0 --selector runs/rce --shots 9 | max_shots
eval --lvlm mock --quiet --out new --fixed 0 --selector runs/rce --selector runs/rce | twice
eval --lvlm mock --quiet --out new --fixed 0 --selector a=runs/rce --selector a=runs/train | twice
eval --lvlm mock --quiet --out new --fixed 0 --selector random=runs/rce | random
eval --lvlm mock --quiet --out new --fixed 0 --selector x_free=runs/rce | x_free
eval --lvlm mock --quiet --out new --fixed 0 --selector =runs/rce | =runs/rce
eval --lvlm mock --quiet --out new --fixed 0 --selector runs/rce --K 8 | K
eval --lvlm mock --quiet --out new --fixed 0 --selector runs/rce --kind image | kind
eval --lvlm mock --quiet --out new --fixed 4 --fixed-from nowhere | nowhere
eval --lvlm mock --quiet --out new --fixed 0 --facts nowhere | nowhere
eval --lvlm mock --quiet --out new --fixed 0 --facts a-file | a-file
eval --lvlm mock --quiet --out new --fixed 0 --facts empty | empty
eval --lvlm mock --quiet --out new --fixed 0 --groups runs/dev | groups
eval --lvlm mock --quiet --out new --fixed 0 --split nowhere | nowhere
eval --lvlm mock --quiet --out runs/eval --fixed 0 --limit 6 --draws 2 | draws
eval --lvlm mock --quiet --out runs/rce --fixed 0 | runs/rce
eval --lvlm mock --quiet --out new --fixed 0 --resume | resume
report runs/eval runs/answers --groups runs/train | groups
report runs/eval --groups runs/rce | runs/rce
report runs/eval --groups runs/train runs/train | runs/train
report runs/eval --split nowhere | nowhere
report runs/eval --split dev dev | split
report runs/eval runs/eval | runs/eval
report runs/eval --out empty | empty
report runs/eval --out a-file/x.html | a-file
report runs/eval --out dangling | dangling
report runs/eval --out foreign | foreign
sweep runs/train --dev runs/dev --lvlm mock --quiet --out new --grid nowhere | nowhere
sweep runs/train --dev runs/dev --lvlm mock --quiet --out new --grid a-file | a-file
sweep runs/train --dev runs/dev --lvlm mock --quiet --out new --grid objective=dance | dance
sweep runs/train --dev runs/dev --lvlm mock --quiet --out new --grid objective=rce,rce | objective
sweep runs/train --dev runs/dev --lvlm mock --quiet --out new --grid objective=rce bs=4,4 | bs
sweep runs/train --dev runs/dev --lvlm mock --quiet --out new --grid objective= | objective
sweep runs/train --dev runs/dev --lvlm mock --quiet --out new --grid rce.speed=1,2 | speed
sweep runs/train --dev runs/dev --lvlm mock --quiet --out new --grid reward=nonsense | nonsense
sweep runs/train --dev runs/dev --lvlm mock --quiet --out new --grid kind=audio | kind
sweep runs/train --dev runs/dev --lvlm mock --quiet --out new --grid bs=-1 | bs
sweep runs/train --dev runs/dev --lvlm mock --quiet --out new --grid bs=abc | bs
sweep runs/train --dev runs/dev --lvlm mock --quiet --out new --grid rce.lr=1e-3,NaN | lr
sweep runs/train --dev runs/dev --lvlm mock --quiet --out new --grid objective=rce --base objective=sft | objective
sweep runs/train --dev runs/dev --lvlm mock --quiet --out new --grid objective=rce --base nonsense=1 | nonsense
sweep runs/train --dev runs/dev --lvlm mock --quiet --out new --grid objective=rce --base bs=4,8 | bs
sweep runs/train --dev runs/dev --lvlm mock --quiet --out new --grid objective=rce --base bs | bs
sweep runs/train --dev runs/dev --lvlm mock --quiet --out new --grid objective=rce --seeds 0 0 | seeds
sweep runs/train --dev runs/dev --lvlm mock --quiet --out new --grid objective=rce --shots 9 | shots
sweep runs/train --dev runs/dev --lvlm mock --quiet --out new --grid objective=rce --split nowhere | nowhere
sweep runs/train --dev runs/train --lvlm mock --quiet --out new --grid objective=rce | question_id
sweep runs/train --dev runs/dev --lvlm mock --quiet --out runs/train --grid objective=rce | runs/train
sweep runs/train --dev runs/dev --lvlm mock --quiet --out runs/rce --grid objective=rce | runs/rce
sweep runs/train --dev runs/dev --lvlm mock --quiet --out new --grid objective=rce --resume | resume
sweep runs/train --dev runs/dev --lvlm mock --quiet --out new --grid objective=rce lvlm.min_pixels=9 | lvlm
demo --out new --set {"speed":9} | speed
demo --out new --set {"shots":[2,2]} | shots
demo --out new --set {"shots":-1} | shots
demo --out new --set {"counts":{"beams":1}} | counts
demo --out new --set {"train_queries":"x"} | train_queries
demo --out runs/train | runs/train
bank --source ISLANDS --out runs/train | runs/train
bank --source ISLANDS --out new --columns colour=q | colour
bank --source ISLANDS --out new --columns question | question
bank --source ISLANDS --out new --columns question=nowhere | nowhere
bank --source ISLANDS --out new --images nowhere | nowhere
bank --source ISLANDS --out runs/bank --clip runs/x | runs/x
pick --question What --bank runs/bank --selector runs/rce --shots 9 | max_shots
pick --question What --bank runs/bank --selector runs/rce --shots 100 --candidates 5 | shots
pick --question What --bank runs/bank --selector runs/rce --candidates 0 | candidates
pick --question What --bank runs/bank --selector runs/rce --candidates some | candidates
pick --question What --bank runs/train --selector runs/rce | runs/train
trian runs/train --out new | trian
train runs/train --nonsense 3 --out new | nonsense
"""

def bad_lines():
    "(words of a command line, what its refusal must name), some hundreds"
    yield from flag_lines()
    yield from shard_lines()
    yield from rate_lines()
    yield from out_lines()
    yield from run_lines()
    yield from selector_lines()
    yield from model_lines()
    yield from data_lines()
    yield from one_by_one(TOGETHER)

# ---- trying one --------------------------------------------------------------------------------------------

def snapshot(folder="."):
    "{path: size and time of a file, nothing of a folder}; what a store keeps for whoever comes next is left out"
    out = {}
    for here, folders, files in os.walk(folder):
        for name in folders: out[os.path.join(here, name)] = None
        for name in files:
            seen = os.lstat(os.path.join(here, name))
            # a lock is taken to look at what it guards; older libraries touch its file then
            touched = None if is_lock(name) else seen.st_mtime_ns
            out[os.path.join(here, name)] = seen.st_size, touched
    kept = "embed-", "pool-", ".embed-", ".pool-"
    return {path: seen for path, seen in out.items() if not is_kept(path, kept)}

def is_kept(path, begins):
    "Does a path lie in the store, below one of its entries that begin so?"
    return any(path.startswith(os.path.join(".", "runs", "store", begin)) for begin in begins)

def attempt(words):
    "(exit status, what was said on stderr) of a command line, in this process"
    from leverplus import cli
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try: status = cli.main(words)
        except SystemExit as e: status = e.code
    return status, said.getvalue()

def same_word(text): return text.replace("-", "_")

def what_is_wrong(words, named, before):
    "Why a refusal is not as it should be; empty if it is. `before`: the `snapshot` of the working folder"
    try: status, said = attempt(words)
    except Exception as e: return f"raised {type(e).__name__}: {e}"
    last = said.strip().splitlines()[-1] if said.strip() else ""
    if status != 2: return f"status {status}: {last}"
    if "Traceback" in said: return "a traceback"
    if same_word(named) not in same_word(last): return f"does not name {named}: {last}"
    now = snapshot()
    changed = sorted(path for path in before.keys() | now.keys() if before.get(path) != now.get(path))
    if changed: return f"left a trace: {', '.join(changed[:4])}: {last}"
    return ""
