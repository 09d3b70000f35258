"""Bad files, ids and texts, each with the door that is to refuse it and what the refusal is to name

`bad_data(folder)` yields (name, call, names): `call()` must raise ValueError or FileNotFoundError (or one of their
kinds) whose message holds every text of `names`. The files are made anew below `folder`.
"""
import json, random, shutil
from dataclasses import dataclass
from pathlib import Path
import numpy as np, pandas as pd, torch
from leverplus.bank import DemoBank, asked_items, read_table, solved_items
from leverplus.core import read_json, repo_path, write_json
from leverplus.data import read_okvqa, read_soft_labels, read_vqav2
from leverplus.doors import read_config
from leverplus.earlier_json import read_beams
from leverplus.embed import EmbedStore, load_clip
from leverplus.evaluate import load_subsets
from leverplus.groups import RLData
from leverplus.infer import check_results
from leverplus.items import as_id, as_image_id, as_items
from leverplus.lmms import read_samples, read_task
from leverplus.lvlm import load_lvlm
from leverplus.picker import read_export
from leverplus.pools import Pool
from leverplus.recipes import RECIPES, load_recipe, save_recipe
from leverplus.runs import Run
from leverplus.selector import PointerSelector
from leverplus.sweep import read_grid, read_rows

# ---- files that are not what they should be ----------------------------------------------------------------

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
        question_id=queries, pointer=pointers, gen_method="beam", beam_rank=0., temperature=np.nan, logprob_score=-1.,
        similarity_score=.5, vqa_raw_generation="a cat", vqa_pred_answer="cat", vqa_acc_score=1., vqa_correct=1.,
        vqa_rel_token_f1=1., vqa_rel_edit_sim=1., vqa_rel_score=1., vqa_gt_prob=.8, vqa_gt_logprobs=[(-.2,)]*n,
        vqa_eval_mode="official", eval_failed=False, error=None, scorer="a1b2",
    ))

def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())

QUESTION = dict(question_id=11, image_id=1, question="what is it?")
ANSWERED = dict(question_id=11, image_id=1, answers=[dict(answer="a cat")]*10)

def make_okvqa(folder, prefix=""):
    write_json(folder/f"{prefix}OpenEnded_mscoco_train2014_questions.json", dict(questions=[QUESTION]))
    said = ANSWERED | dict(multiple_choice_answer="a cat")
    write_json(folder/f"{prefix}mscoco_train2014_annotations.json", dict(annotations=[said]))

def make_soft(folder):
    make_okvqa(folder)
    write_json(folder/"train_soft_labels.json", [dict(question_id=11, img_id="COCO_1", label=dict(cat=1))])

def make_groups(folder):
    _, pool, _ = world()
    RLData.from_frame(rows_of(pool), pool).save(folder)
    for part in folder.glob("part-*"): part.rename(folder/"part.parquet")
    head = read_json(folder/"manifest.json")
    head["parts"][0]["file"] = "part.parquet"
    kept = folder/head["pool"]["folder"]
    kept.rename(folder/"pool")
    head["pool"]["folder"] = "pool"
    write_json(folder/"manifest.json", head)

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
    write_json(folder/"train.json", table.to_dict("records"))
    write(folder/"train.jsonl", "\n".join(json.dumps(row) for row in table.to_dict("records")))

def alone(folder, name, read):
    "What a door reads of a table when no other lies beside it"
    return read(folder/name)

def doors():
    "Every door that reads a file that people bring"
    beam = {"0": dict(id_list=[[2, 3, 0]], score_list=[.1], few_shot_num=2)}
    old = {"0": dict(pointer_candidates=[dict(pointer=[2, 3], pred_answer="cat", vqa_acc_score=1.)])}
    numbers = {i: i + 100 for i in range(6)}
    jsons = JSON_FAULTS | dict(list_of_numbers=b"[1, 2]", empty_object=b"{}", empty_list=b"[]")
    out = [
        Door("read_json", lambda f: write_json(f/"a.json", {}), lambda f: read_json(f/"a.json"), ("a.json",), jsons,
             ("number", "text", "null", "nothing_in_a_list", "list_of_numbers", "empty_object", "empty_list", "cut")),
        Door("read_okvqa", make_okvqa, lambda f: read_okvqa(f, "train"),
             ("OpenEnded_mscoco_train2014_questions.json", "mscoco_train2014_annotations.json"), jsons),
        Door("read_vqav2", lambda f: make_okvqa(f, "v2_"), lambda f: read_vqav2(f, "train"),
             ("v2_mscoco_train2014_annotations.json",), jsons),
        Door("read_soft_labels", make_soft, lambda f: read_soft_labels(f, "train"), ("train_soft_labels.json",), jsons),
        Door("RLData.load", make_groups, RLData.load, ("manifest.json", "pool/pool.json"), jsons),
        Door("RLData.load", make_groups, RLData.load, ("part.parquet", "pool/pool.parquet"), TABLE_FAULTS),
        Door("RLData.from_json", lambda f: write_json(f/"old.json", old),
             lambda f: RLData.from_json(f/"old.json", "used", numbers), ("old.json",), jsons),
        Door("read_beams", lambda f: write_json(f/"beams.json", beam), lambda f: read_beams(f/"beams.json", numbers),
             ("beams.json",), jsons),
        Door("EmbedStore.load", lambda f: world()[2].save(f), EmbedStore.load, ("embed.json", "embed.safetensors"), jsons),
        Door("DemoBank.open", make_bank, DemoBank.open, ("bank.json",), jsons),
        Door("load_selector", lambda f: PointerSelector(4).save_pretrained(f), PointerSelector.from_pretrained,
             ("config.json", "model.safetensors"), jsons),
        Door("load_recipe", lambda f: save_recipe(RECIPES["ours"], f/"r.json"), lambda f: load_recipe(f/"r.json"),
             ("r.json",), jsons),
        Door("read_grid", lambda f: write_json(f/"g.json", {"lr": [1]}), lambda f: read_grid([str(f/"g.json")]),
             ("g.json",), jsons, ("empty_object",)),
        Door("read_rows", lambda f: write(f/"cells.jsonl", "{}\n"), lambda f: read_rows(f/"cells.jsonl"),
             ("cells.jsonl",), {k: v + b"\n" for k, v in jsons.items()}, ("empty_object", "empty", "blank", "cut", "gone")),
        Door("load_subsets", lambda f: write_json(f/"s.json", dict(seed=0, subsets={"1": [1]})),
             lambda f: load_subsets(f/"s.json"), ("s.json",), jsons),
        Door("check_results", lambda f: write_json(f/"p.json", [dict(question_id=1, answer="a")]),
             lambda f: check_results(f/"p.json", [1]), ("p.json",), jsons),
        Door("Run", make_run, Run, ("settings.json",), jsons),
        Door("Run.frame", make_run, lambda f: Run(f).frame("t.csv"), ("t.csv",),
             {k: TABLE_FAULTS[k] for k in ("zeros", "latin1", "html", "zip", "ragged", "quote_left_open", "column_twice")}, ("cut",)),
        Door("Run.frame", make_run, lambda f: Run(f).frame("t.parquet"), ("t.parquet",), TABLE_FAULTS),
        Door("read_export", make_exports, lambda f: read_export(f/"picks.jsonl"), ("picks.jsonl",), jsons,
             ("empty", "blank", "empty_object")),
        Door("read_export", make_exports, lambda f: read_export(f/"picks.parquet"), ("picks.parquet",), TABLE_FAULTS),
        Door("read_config", lambda f: write(f/"c.yaml", "lr: 1\n"), lambda f: read_config(f/"c.yaml", "train"),
             ("c.yaml",), jsons, ("empty_object", "cut")),
        Door("read_samples", lambda f: write(f/"s.jsonl", "{}\n"), lambda f: read_samples(f/"s.jsonl"), ("s.jsonl",),
             jsons),
        Door("read_task", lambda f: write(f/"t.yaml", "task: a\n"), lambda f: read_task(f/"t.yaml"), ("t.yaml",), jsons),
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

def bad_data(
    folder, # where files may be made
    seed=0, # of what is generated
):
    "(name, call, what the error must name) of each case"
    folder = Path(folder)
    yield from spoilt_files(folder/"files")

if __name__ == "__main__":
    import sys, tempfile, time, warnings
    warnings.simplefilter("ignore")
    only = sys.argv[1] if len(sys.argv) > 1 else ""
    n = bad = 0
    for name, call, names in bad_data(tempfile.mkdtemp()):
        if only not in name: continue
        n += 1
        try: call()
        except Exception as e: error = e
        else: error = None
        kind = isinstance(error, (ValueError, FileNotFoundError)) and not isinstance(error, (json.JSONDecodeError, UnicodeError))
        ok = kind and all(text in str(error) for text in names)
        if not ok:
            bad += 1
            print(f"{name}: {type(error).__name__}: {str(error)[:230]!r}")
    print(n, "cases", bad, "bad")
