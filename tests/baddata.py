"""Bad files, ids and texts, each with the door that is to refuse it and what the refusal is to name

`bad_data(folder)` yields (name, call, names): `call()` must raise ValueError or FileNotFoundError (or one of
their kinds) whose message holds every text of `names`. The files are made anew below `folder`.
"""
import json, random, shutil
from dataclasses import dataclass
from pathlib import Path
import numpy as np, pandas as pd, torch
from leverplus.bank import DemoBank, read_table, solved_items
from leverplus.checkpoints import read_state
from leverplus.core import read_json, repo_path, write_json
from leverplus.data import read_okvqa, read_soft_labels, read_vqav2
from leverplus.doors import read_config
from leverplus.earlier_json import read_beams
from leverplus.embed import EmbedStore, load_clip
from leverplus.evaluate import load_subsets
from leverplus.groups import RLData
from leverplus.infer import check_results
from leverplus.items import as_id, as_ids, as_image_id, as_items
from leverplus.lmms import read_samples, read_task
from leverplus.lvlm import load_lvlm
from leverplus.picker import read_export
from leverplus.pools import Pool
from leverplus.recipes import RECIPES, load_recipe, save_recipe
from leverplus.runs import Run
from leverplus.selector import PointerSelector
from leverplus.sweep import read_grid, read_rows

# ---- files that are not what they should be ----------------------------------------------------------------

def as_people_write(path, content):
    "A JSON file without a seal"
    return write_json(path, content, seal=False)

def deep(open_, close, n=100_000): return (open_*n + "1" + close*n).encode()

JSON_FAULTS = dict(
    deep_lists=deep("[", "]"),
    deep_objects=deep('{"a":', "}"),
    many_digits=b'{"settings": 1' + b"0"*5000 + b"}",
    key_twice=b'{"a": 1, "a": 2}',
    latin1='{"a": "caf\xe9"}'.encode("latin-1"),
    zeros=b"\0"*300,
    empty=b"",
    blank=b"\n \n",
    html=b"<!DOCTYPE html><html><body>404</body></html>",
    zip=b"PK\x03\x04" + bytes(range(200)),
    pointer=b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    packed=b"\x1f\x8b\x08\x00 cut short",
    number=b"3",
    text=b'"text"',
    null=b"null",
    nothing_in_a_list=b"[null]",
    control=b'{"a": "\x01"}',
)
TABLE_FAULTS = dict(
    empty=b"",
    zeros=b"\0"*300,
    latin1="question,answer\nwhat is caf\xe9?,cup\n".encode("latin-1"),
    html=JSON_FAULTS["html"],
    zip=JSON_FAULTS["zip"],
    ragged=b"question,answer\nwhat?,cup\nwhat, then?,cup,of,tea\n",
    semicolons=b"question;answer\nwhat?;cup\n",
    column_twice=b"question,answer,answer\nwhat?,cup,tea\n",
    other_columns=b"a,b\n1,2\n",
    no_rows=b"question,answer\n",
    nul=b"question,answer\nwhat\0?,cup\n",
    quote_left_open=b'question,answer\n"what?,cup\n',
)

def cut(path):
    "The first half of a file, and a byte more"
    raw = path.read_bytes()
    return raw[:len(raw)//2 + 1]

# ---- doors -------------------------------------------------------------------------------------------------

@dataclass
class Door:
    "Something that reads files"
    name:str # of the door
    make:object # function of a folder that writes good files into it
    open:object # function of the folder that reads them
    files:tuple # names of files in the folder that are spoilt one after the other
    faults:dict # name -> content
    harmless:tuple=() # faults that this door may take
    names:tuple=() # what an error names; nothing: the file

def world(n=6, D=4):
    "Items, pool and store of a few questions"
    ids = list(range(n))
    items = pd.DataFrame(dict(
        question_id=ids, image_id=ids, question=[f"what is {i}?" for i in ids],
        answers=[["a cat"]*10 for _ in ids], answer=["a cat" for _ in ids],
    ))
    pool = Pool({q: [i for i in ids if i != q] for q in ids[:3]}, dict(sampler="by hand"))
    return as_items(items), pool, EmbedStore(ids, text=torch.eye(n)[:, :D] + .1)

def rows_of(pool):
    "A record of facts"
    queries = [q for q in pool for _ in range(2)]
    pointers = [tuple(pool[q][i:i + 2]) for q in pool for i in range(2)]
    n = len(queries)
    return pd.DataFrame(dict(
        question_id=queries, pointer=pointers, gen_method="beam", beam_rank=0., temperature=np.nan,
        logprob_score=-1., similarity_score=.5, vqa_raw_generation="a cat", vqa_pred_answer="cat",
        vqa_acc_score=1., vqa_correct=1., vqa_rel_token_f1=1., vqa_rel_edit_sim=1., vqa_rel_score=1.,
        vqa_gt_prob=.8, vqa_gt_logprobs=[(-.2,)]*n, vqa_eval_mode="official", eval_failed=False, error=None,
        scorer="a1b2",
    ))

def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())

QUESTION = dict(question_id=11, image_id=1, question="what is it?")
ANSWERED = dict(question_id=11, image_id=1, answers=[dict(answer="a cat")]*10)

def make_okvqa(folder, prefix=""):
    as_people_write(folder/f"{prefix}OpenEnded_mscoco_train2014_questions.json", dict(questions=[QUESTION]))
    said = ANSWERED | dict(multiple_choice_answer="a cat")
    as_people_write(folder/f"{prefix}mscoco_train2014_annotations.json", dict(annotations=[said]))

def make_soft(folder):
    make_okvqa(folder)
    as_people_write(folder/"train_soft_labels.json", [dict(question_id=11, img_id="COCO_1", label=dict(cat=1))])

def make_groups(folder):
    _, pool, _ = world()
    RLData.from_frame(rows_of(pool), pool).save(folder)
    for part in folder.glob("part-*"): part.rename(folder/"part.parquet")
    head = read_json(folder/"manifest.json")
    head["parts"][0]["file"] = "part.parquet"
    kept = folder/head["pool"]["folder"]
    kept.rename(folder/"pool")
    head["pool"]["folder"] = "pool"
    as_people_write(folder/"manifest.json", head)

def make_bank(folder):
    items, _, store = world()
    bank = DemoBank(items, EmbedStore.from_vectors(items.index, text=store.get(items.index, "text"),
                                                   source=dict(encoder="none")))
    bank.save(folder)

def make_run(folder):
    run = Run.create(folder, dict(lr=1.))
    run.save_frame("t.csv", pd.DataFrame(dict(x=[1])))
    run.save_frame("t.parquet", pd.DataFrame(dict(x=[1])))

def make_exports(folder):
    rows = [dict(question_id=1, pointer=[1, 2])]*2
    write(folder/"picks.jsonl", "\n".join(json.dumps(row) for row in rows) + "\n")
    pd.DataFrame(rows).to_parquet(folder/"picks.parquet")

def make_tables(folder):
    table = pd.DataFrame(dict(question=["what?"], answer=["cup"], split=["train"]))
    table.to_csv(folder/"train.csv", index=False)
    table.to_parquet(folder/"train.parquet")
    as_people_write(folder/"train.json", table.to_dict("records"))
    write(folder/"train.jsonl", "\n".join(json.dumps(row) for row in table.to_dict("records")))

def alone(folder, name, read):
    "What a door reads of a table when no other lies beside it"
    return read(folder/name)

def doors():
    "Every door that reads a file that people bring"
    beam = {"0": dict(id_list=[[2, 3, 0]], score_list=[.1], few_shot_num=2)}
    tried = [dict(pointer=[2, i], pred_answer="cat", vqa_acc_score=1.) for i in (3, 4)]
    old = {"0": dict(pointer_candidates=tried)}
    numbers = {i: i + 100 for i in range(6)}
    jsons = JSON_FAULTS | dict(list_of_numbers=b"[1, 2]", empty_object=b"{}", empty_list=b"[]")
    some_json = ("number", "text", "null", "nothing_in_a_list", "list_of_numbers", "empty_object", "empty_list")
    of_csv = ("zeros", "latin1", "html", "zip", "ragged", "quote_left_open", "column_twice")
    of_states = ("empty", "zeros", "html", "zip", "pointer", "number")
    lines = {fault: content + b"\n" for fault, content in jsons.items()}
    out = [
        Door("read_json", lambda f: as_people_write(f/"a.json", {}), lambda f: read_json(f/"a.json"),
             ("a.json",), jsons, (*some_json, "cut")),
        Door("read_okvqa", make_okvqa, lambda f: read_okvqa(f, "train"),
             ("OpenEnded_mscoco_train2014_questions.json", "mscoco_train2014_annotations.json"), jsons),
        Door("read_vqav2", lambda f: make_okvqa(f, "v2_"), lambda f: read_vqav2(f, "train"),
             ("v2_mscoco_train2014_annotations.json",), jsons),
        Door("read_soft_labels", make_soft, lambda f: read_soft_labels(f, "train"),
             ("train_soft_labels.json",), jsons),
        Door("RLData.load", make_groups, RLData.load, ("manifest.json", "pool/pool.json"), jsons),
        Door("RLData.load", make_groups, RLData.load, ("part.parquet", "pool/pool.parquet"), TABLE_FAULTS),
        Door("RLData.from_json", lambda f: as_people_write(f/"old.json", old),
             lambda f: RLData.from_json(f/"old.json", "used", numbers), ("old.json",), jsons),
        Door("read_beams", lambda f: as_people_write(f/"beams.json", beam),
             lambda f: read_beams(f/"beams.json", numbers), ("beams.json",), jsons),
        Door("EmbedStore.load", lambda f: world()[2].save(f), EmbedStore.load,
             ("embed.json", "embed.safetensors"), jsons),
        Door("DemoBank.open", make_bank, DemoBank.open, ("bank.json",), jsons),
        Door("load_selector", lambda f: PointerSelector(4).save_pretrained(f), PointerSelector.from_pretrained,
             ("config.json", "model.safetensors"), jsons),
        Door("read_state", lambda f: torch.save(dict(x=torch.ones(9)), f/"state.pt"),
             lambda f: read_state(f/"state.pt"), ("state.pt",), {fault: jsons[fault] for fault in of_states}),
        Door("load_recipe", lambda f: save_recipe(RECIPES["ours"], f/"r.json"),
             lambda f: load_recipe(f/"r.json"), ("r.json",), jsons),
        Door("read_grid", lambda f: as_people_write(f/"g.json", {"lr": [1]}),
             lambda f: read_grid([str(f/"g.json")]), ("g.json",), jsons, ("empty_object",)),
        Door("read_rows", lambda f: write(f/"cells.jsonl", "{}\n"), lambda f: read_rows(f/"cells.jsonl"),
             ("cells.jsonl",), lines, ("empty_object", "empty", "blank", "cut", "gone")),
        Door("load_subsets", lambda f: as_people_write(f/"s.json", dict(seed=0, subsets={"1": [1]})),
             lambda f: load_subsets(f/"s.json"), ("s.json",), jsons),
        Door("check_results", lambda f: as_people_write(f/"p.json", [dict(question_id=1, answer="a")]),
             lambda f: check_results(f/"p.json", [1]), ("p.json",), jsons),
        Door("Run", make_run, Run, ("settings.json",), jsons),
        Door("Run.frame", make_run, lambda f: Run(f).frame("t.csv"), ("t.csv",),
             {fault: TABLE_FAULTS[fault] for fault in of_csv}, ("cut",)),
        Door("Run.frame", make_run, lambda f: Run(f).frame("t.parquet"), ("t.parquet",), TABLE_FAULTS),
        Door("read_export", make_exports, lambda f: read_export(f/"picks.jsonl"), ("picks.jsonl",), jsons,
             ("empty", "blank", "empty_object")),
        Door("read_export", make_exports, lambda f: read_export(f/"picks.parquet"), ("picks.parquet",),
             TABLE_FAULTS),
        Door("read_config", lambda f: write(f/"c.yaml", "lr: 1\n"),
             lambda f: read_config(f/"c.yaml", "train"), ("c.yaml",), jsons, ("empty_object", "cut")),
        Door("read_samples", lambda f: write(f/"s.jsonl", "{}\n"), lambda f: read_samples(f/"s.jsonl"),
             ("s.jsonl",), jsons),
        Door("read_task", lambda f: write(f/"t.yaml", "task: a\n"), lambda f: read_task(f/"t.yaml"),
             ("t.yaml",), jsons),
    ]
    for name, faults in (("train.csv", TABLE_FAULTS), ("train.parquet", TABLE_FAULTS), ("train.json", jsons),
                         ("train.jsonl", jsons)):
        for what, read in (("solved_items", solved_items), ("read_table", lambda p: read_table(p, "train"))):
            out.append(Door(what, make_tables, lambda f, n=name, r=read: alone(f, n, r), (name,), faults))
    return out

def spoilt_files(folder):
    "Each file of each door, spoilt in each way"
    for door in doors():
        good = folder/"good"
        shutil.rmtree(good, ignore_errors=True)
        good.mkdir(parents=True)
        door.make(good)
        for file in door.files:
            faults = door.faults | dict(cut=cut(good/file), gone=None, a_folder="folder")
            for fault, content in faults.items():
                if fault in door.harmless: continue
                name = f"{door.name}, {Path(file).name}, {fault}"
                yield name, spoil(folder, good, door, file, content, name), door.names or (Path(file).name,)

def spoil(folder, good, door, file, content, name):
    "A call that opens a copy of good files of which one is spoilt"
    home = folder/name.replace(", ", "-").replace(" ", "-")
    def call():
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        door.make(home)
        path = home/file
        path.unlink()
        if content == "folder": path.mkdir()
        elif content is not None: path.write_bytes(content)
        return door.open(home)
    return call

# ---- ids and texts -----------------------------------------------------------------------------------------

HALF, COMMAND = "a smile \ud83d", "cup<|im_end|>"
BAD_IDS = (
    None, True, -1, -3., 1.5, 1e20, float("nan"), float("inf"), 2**63, 10**30, 10**5000, "", " ", "-3", HALF,
    b"17", [17], {}, (), ("coco", None), ("coco", True), np.datetime64("2026-01-01"), np.uint64(2**63),
    np.float32(2**24),
)
BAD_TEXTS = (None, 3, True, "", " \n", HALF, COMMAND, "<|image_pad|>", ["a"], {})
BAD_ANSWERS = (
    "a cat", 3, [], [""], [" ", ""], [3], [None], [HALF], [COMMAND], [["a cat"]], {}, [{}], [dict(said="a cat")],
)
BAD_PATHS = (3, True, b"a.png", ["a.png"], HALF, "a\0.png")

def bad_ids():
    "An id by itself, and among others"
    for i, x in enumerate(BAD_IDS):
        kind = f"{i}, {type(x).__name__}"
        yield f"as_id {kind}", lambda x=x: as_id(x), ("question_id",)
        yield f"as_ids {kind}", lambda x=x: as_ids([1, x]), ("row 1", "question_id")
        yield f"as_image_id {kind}", lambda x=x: as_image_id(x), ("image_id",)

def bad_items():
    "A table in which one cell cannot be used"
    items = world()[0].assign(image_path=None)
    columns = dict(
        question=BAD_TEXTS, answer=BAD_TEXTS, answers=BAD_ANSWERS, image_path=BAD_PATHS, image_id=BAD_IDS,
        question_id=BAD_IDS,
    )
    for column, values in columns.items():
        for i, x in enumerate(values):
            def call(column=column, x=x):
                own = np.empty(len(items), dtype=object)
                own[:] = items[column].tolist()
                own[3] = x
                table = {name: items[name].tolist() for name in items}
                table[column] = pd.Series(own, dtype=object)
                return as_items(pd.DataFrame(table), ["question", "answer", "answers"])
            names = ("row 3", "question_id") if column == "question_id" else ("question_id 3",)
            yield f"as_items, {column} {i}, {type(x).__name__}", call, names

def bad_tables(folder):
    "A file of solved examples in which one cell cannot be used"
    good = [dict(question_id=f"q{i}", question=f"what is {i}?", answer="a cat") for i in range(4)]
    bad_ids = (None, True, -1, 1.5, 1e20, 2**63, HALF)
    for column, values in dict(question=BAD_TEXTS, answer=BAD_TEXTS, question_id=bad_ids).items():
        for i, x in enumerate(values):
            rows = [dict(row) for row in good]
            rows[2][column] = x
            file = folder/f"{column}-{i}.jsonl"
            def call(file=file, rows=rows):
                write(file, "\n".join(map(json.dumps, rows)))
                return solved_items(file)
            names = (file.name, "row 2") if column == "question_id" else (file.name, "q2")
            if x == HALF: names = (file.name, "line 3")
            yield f"solved_items, {column} {i}, {type(x).__name__}", call, names
    nested = dict(question=[["what?"], ["why?"]], answer=["a", "b"])
    numbers = dict(question=[1., 2.], answer=["a", "b"])
    for name, columns in dict(nested=nested, numbers=numbers, no_question=dict(answer=["a"])).items():
        file = folder/f"{name}.parquet"
        def call(file=file, columns=columns):
            file.parent.mkdir(parents=True, exist_ok=True)
            pd.DataFrame(columns).to_parquet(file)
            return solved_items(file)
        yield f"solved_items, {name}", call, (file.name,)
    for name, columns in dict(other=dict(a=[1]), texts=dict(question_id=["a"], candidates=["b"]),
                              numbers=dict(question_id=[1], candidates=[2])).items():
        home = folder/f"pool-{name}"
        def call(home=home, columns=columns):
            world()[1].save(home)
            pd.DataFrame(columns).to_parquet(home/"pool.parquet")
            return Pool.load(home)
        yield f"Pool.load, {name}", call, ("pool.parquet",)

# ---- questions and answers, at random ----------------------------------------------------------------------

FIELDS = dict( # of an entry: what cannot stand there
    question_id=(None, True, -1, 1.5, 1e20, 2**63, 10**30, "", HALF, [11], {}, float("nan")),
    image_id=(None, True, -1, 1.5, 1e20, 2**63, "", HALF, [1], {}, float("inf")),
    question=(None, 3, "", "  ", HALF, COMMAND, ["what?"], {}),
    answers=(None, "a cat", {}, [], ["a cat"]*10, [{}]*10, [dict(answer=3)]*10, [dict(answer=HALF)]*10,
             [dict(answer=COMMAND)]*10, [dict(answer=" ")]*10, [dict(answer="a")]*9),
    multiple_choice_answer=(None, 3, "", HALF, COMMAND),
    label=(None, {}, {"a": 2}, {"a": float("nan")}, {HALF: 1}, {COMMAND: 1}, "a", [1], dict(a=1, b=1, c=1)),
)

def bad_entries(folder, seed=0, n=120):
    "Files of questions and answers in which one field of one entry was replaced"
    draw = random.Random(seed)
    readers = dict(okvqa=(read_okvqa, ""), vqav2=(read_vqav2, "v2_"), soft_labels=(read_soft_labels, ""))
    for i in range(n):
        reader = draw.choice(sorted(readers))
        own = dict(okvqa="answers", vqav2="multiple_choice_answer", soft_labels="label")[reader]
        field = draw.choice(["question_id", "image_id", "question", own])
        value = draw.choice(FIELDS[field])
        yield bad_entry(folder/f"entry{i}", reader, *readers[reader], field, value)

def bad_entry(folder, reader, read, prefix, field, value):
    "One of them"
    files = dict(answers="annotations", multiple_choice_answer="annotations", label="labels")
    where = files.get(field, "questions")
    def call():
        if reader == "soft_labels": make_soft(folder)
        else: make_okvqa(folder, prefix)
        file = next(folder.glob(f"*{where}.json"))
        content = read_json(file)
        entries = content if isinstance(content, list) else content[where]
        entries[0][field] = value
        write(file, json.dumps(content))
        return read(folder, "train")
    names = ("json",) if field == "question_id" else ("json", "11")
    return f"{folder.name}, read_{reader}, {field} {type(value).__name__}", call, names

# ---- models ------------------------------------------------------------------------------------------------

def bad_models(folder):
    "A model of which a file is broken, missing, or another model's"
    loads = {"tiny-clip": load_clip, "tiny-qwen2.5-vl": load_lvlm}
    for model, load in loads.items():
        source = repo_path("models", model)
        other = repo_path("models", next(name for name in loads if name != model))
        files = sorted(p.name for p in source.iterdir() if p.name not in ("training.csv", "README.md"))
        for file in files:
            faults = dict(empty=b"", cut=cut(source/file), a_list=b"[]")
            if file in _PARTS: faults |= dict(gone=None, swapped=(other/file).read_bytes())
            if file in ("config.json", "tokenizer.json", "preprocessor_config.json"): faults["an_object"] = b"{}"
            for fault, content in faults.items():
                place = folder/f"{model}-{file}-{fault}"
                call = bad_model(source, place, file, content, load)
                yield f"{model}, {file}, {fault}", call, (place.name,)
        place = folder/f"{model}-own-code"
        own = dict(model_type="theirs", auto_map=dict(AutoConfig="code.Theirs", AutoModel="code.Theirs"))
        call = bad_model(source, place, "config.json", json.dumps(own).encode(), load)
        yield f"{model}, config.json, own code", call, (place.name,)

_PARTS = ("config.json", "tokenizer.json", "model.safetensors")

def bad_model(source, place, file, content, load):
    "A call that loads a copy of a model in which one file was replaced"
    def call():
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(source, place)
        write(place/"code.py", "raise SystemExit('code of a model was run')")
        if content is None: (place/file).unlink()
        else: (place/file).write_bytes(content)
        return load(place)
    return call

# ---- all ---------------------------------------------------------------------------------------------------

def bad_data(
    folder, # where files may be made
    seed=0, # of what is generated
):
    "(name, call, what the error must name) of each case"
    folder = Path(folder)
    yield from spoilt_files(folder/"files")
    yield from bad_ids()
    yield from bad_items()
    yield from bad_tables(folder/"tables")
    yield from bad_entries(folder/"entries", seed)
    yield from bad_models(folder/"models")
