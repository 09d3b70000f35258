"""Every kind of file that this package writes and reads again, each made small

`KINDS` is the table: a name, a function that makes the file in an empty folder, and a function that reads it
back as something that can be compared. No pytest here, so that `bench/faults.py` can use it, too.
"""
import json, warnings
from pathlib import Path
from typing import Callable, NamedTuple
import numpy as np, pandas as pd, torch
from leverplus.bank import DemoBank
from leverplus.core import read_json, repo_path, rng
from leverplus.data import read_okvqa
from leverplus.embed import EmbedStore
from leverplus.evaluate import count_look
from leverplus.groups import RLData, read_contents
from leverplus.infer import predict
from leverplus.learner import load_selector
from leverplus.lvlm import MockScorer
from leverplus.picker import Column, export_rows, read_export
from leverplus.pools import Pool
from leverplus.recipes import RECIPES, load_recipe, save_recipe
from leverplus.rldata_ask import FactCache, ask
from leverplus.rldata_generate import generate
import leverplus.rldata_scale # gives `Job` its methods
from leverplus.runs import Run
from leverplus.selector import PointerSelector
from leverplus.settings import Asking, Guarding, Job, Picking, Proposing, settings_of
from leverplus.sweep import append_row, read_rows
from leverplus.vision import FeatureShards


class Kind(NamedTuple):
    "A kind of file"
    name:str # what it is
    make:Callable # function of an empty folder -> the file
    read:Callable # function of the folder -> what stands in the file, to be compared by ==

# ---- a world of numbers ------------------------------------------------------------------------------------

N_QUERIES = 4
DEMOS = np.arange(1000, 1012)

def items():
    words = "cat dog car bus".split()
    ids = [*range(N_QUERIES), *DEMOS.tolist()]
    rows = [
        dict(question_id=i, image_id=i, image_path=f"{i}.png", question=f"What is {i}?", answer=words[i % 4],
             answers=[words[i % 4]]*7 + [words[i//4 % 4]]*3)
        for i in ids
    ]
    return pd.DataFrame(rows, index=ids)

def pool(): return Pool({q: rng("kinds", q).choice(DEMOS, 6, replace=False) for q in range(N_QUERIES)})

def store():
    ids = [*range(N_QUERIES), *DEMOS.tolist()]
    draws = torch.Generator().manual_seed(0)
    image, text = torch.randn(2, len(ids), 6, generator=draws)
    return EmbedStore(ids, image, text)

def generated(folder, quiet=True):
    how = dict(
        proposing=Proposing(shots=(2,), counts=dict(beam=4, random=2), seed=0),
        guarding=Guarding(window=2, test=0),
    )
    with warnings.catch_warnings():
        if quiet: warnings.simplefilter("ignore")      # the pictures of this world are names alone
        world = items(), pool(), MockScorer(), store()
        return generate(folder, range(N_QUERIES), *world, progress=False, **how)

def of_frame(frame): return frame.to_json(orient="split", default_handler=str, double_precision=15)

def of_data(data):
    manifest = json.dumps(data.manifest, sort_keys=True)
    return data.fingerprint, data.pool.fingerprint, of_frame(data.rows), manifest

# ---- how each is made --------------------------------------------------------------------------------------

def generated_file(pattern):
    def make(folder):
        generated(folder)
        return next(folder.glob(pattern))
    return make

def saved_file(pattern):
    def make(folder):
        data = generated(folder/"first")
        data.save(folder/"saved")
        return next((folder/"saved").glob(pattern))
    return make

def known_facts(folder):
    ask(generated(folder/"first").rows, MockScorer(), items(), FactCache(folder/"facts"), Asking())
    return next((folder/"facts").glob("*.parquet"))

def store_file(name):
    def make(folder): return store().save(folder)/name
    return make

def read_store(folder):
    read = EmbedStore.load(folder)
    vectors = {name: x.tolist() for name, x in read.vectors.items()}
    return read.fingerprint, read.ids.tolist(), vectors, read.meta

def vision_shard(folder):
    shards = FeatureShards(folder)
    draws = torch.Generator().manual_seed(0)
    for key in "abc": shards.put(key, torch.randn(4, 8, generator=draws), (1, 2, 2))
    shards.flush()
    return next(folder.glob("*.safetensors"))

def read_vision(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")                 # what is damaged is told, and made again
        shards = FeatureShards(folder)
        found = [shards.get(key) for key in "abc"]
    return [None if one is None else (one[0].tolist(), one[1]) for one in found]

def selector_file(name):
    def make(folder):
        torch.manual_seed(0)
        PointerSelector(6, d_hidden=8).save_pretrained(folder/"selector", info=dict(shots=[1, 2]))
        return folder/"selector"/name
    return make

def read_selector(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load_selector(folder/"selector")
    return {name: x.tolist() for name, x in model.state_dict().items()}, json.dumps(model.passport)

def resume(folder):
    from leverplus.callback_track import History, Resume
    from leverplus.losses import regret
    from leverplus.synth import quiet, synth_dls, toy_learner
    learn = toy_learner(regret, synth_dls(8, 4, bs=4), cbs=[History(), Resume(folder/"stage")])
    with quiet(learn): learn.fit(1)
    return learn

def state(folder):
    resume(folder)
    return folder/"stage"/"state.pt"

def read_state(folder):
    learn = resume(folder)                             # nothing is left to do: everything comes from the file
    weights = {name: x.tolist() for name, x in learn.model.state_dict().items()}
    return weights, of_frame(learn.history.frame), learn.resume.done

def run_of(folder):
    return Run.create(folder/"run", dict(lr=1e-3, K=8), seed=3, fingerprints=dict(pool="77aa"))

TABLE = pd.DataFrame(dict(selector=["greedy", "random"], acc=[.5, .25], n=[100, 100]))

def table_file(name):
    def make(folder): return run_of(folder).save_frame(name, TABLE)
    return make

def read_table(name):
    def read(folder): return of_frame(Run(folder/"run").frame(name))
    return read

def settings_file(folder):
    run_of(folder).finish(accuracy=.5)
    return folder/"run"/"settings.json"

def read_run(folder):
    run = Run(folder/"run")
    return {key: getattr(run, key) for key in Run.keys}

def prediction_file(name):
    def make(folder):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picking = Picking(picker="random", shots=1)
            predict(folder/"run", pool(), items(), MockScorer(), store(), picking, progress=False)
        return folder/"run"/name
    return make

def read_results(folder): return read_json(folder/"run"/"predictions.json")

def bank_file(pattern):
    def make(folder):
        islands = repo_path("data", "islands")
        train = read_okvqa(islands, "train", images=islands/"images").iloc[:6]
        DemoBank.build(train, folder=folder/"bank", progress=False)
        return next((folder/"bank").glob(pattern))
    return make

def read_bank(folder):
    bank = DemoBank.open(folder/"bank")
    vectors = read_store(folder/"bank"/bank.fingerprint)
    return bank.fingerprint, of_frame(bank.items), json.dumps(bank.info), vectors

def recipe_file(folder): return save_recipe(next(iter(RECIPES.values())), folder/"recipe.json")

def looks_file(folder):
    scored = pd.DataFrame(dict(selector="greedy", shots=1, draw=0, question_id=[1, 2], pointer=[(5,), (6,)],
                               vqa_acc_score=[.5, 1.]))
    count_look(folder, scored)
    return folder/"looks.json"

def lines_file(folder):
    for cell in "ab": append_row(folder/"cells.jsonl", dict(cell=cell, status="done", scored=[.5, 1., 0.]))
    return folder/"cells.jsonl"

COLUMNS = dict(
    question_id=Column("id", "an id"), ids=Column("ids", "other ids"), score=Column("number", "0..1"),
)

def export_file(name):
    def make(folder):
        rows = pd.DataFrame(dict(question_id=[7, 8], ids=[[1, 2], [3]], score=[.5, .25]))
        return export_rows(folder/name, rows, COLUMNS)
    return make

def read_exported(name):
    def read(folder): return of_frame(read_export(folder/name))
    return read

def kept_job(folder): return settings_of(Job, data=str(folder), store=str(folder/"kept"))

def kept_note(folder):
    kept_job(folder).kept("embed-x", EmbedStore.load, store)
    return folder/"kept"/"embed-x"/"done"

def read_kept(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")                 # what is damaged is told, and made again
        return kept_job(folder).kept("embed-x", EmbedStore.load, store).fingerprint

KINDS = [
    Kind("part of a generation", generated_file("part-*.parquet"), lambda d: of_data(RLData.load(d))),
    Kind("manifest of a generation", generated_file("manifest.json"), lambda d: of_data(RLData.load(d))),
    Kind("contents of a generation", generated_file("contents.parquet"), lambda d: of_frame(read_contents(d))),
    Kind("part of saved groups", saved_file("part-*.parquet"), lambda d: of_data(RLData.load(d/"saved"))),
    Kind("manifest of saved groups", saved_file("manifest.json"), lambda d: of_data(RLData.load(d/"saved"))),
    Kind("pool", saved_file("pool-*/pool.parquet"), lambda d: of_data(RLData.load(d/"saved"))),
    Kind("head of a pool", saved_file("pool-*/pool.json"), lambda d: of_data(RLData.load(d/"saved"))),
    Kind("facts", known_facts, lambda d: of_frame(FactCache(d/"facts").to_frame())),
    Kind("embeddings", store_file("embed.safetensors"), read_store),
    Kind("head of embeddings", store_file("embed.json"), read_store),
    Kind("vision shard", vision_shard, read_vision),
    Kind("weights of a selector", selector_file("model.safetensors"), read_selector),
    Kind("settings of a selector", selector_file("config.json"), read_selector),
    Kind("state of a fit", state, read_state),
    Kind("table as CSV", table_file("table.csv"), read_table("table.csv")),
    Kind("table as Parquet", table_file("table.parquet"), read_table("table.parquet")),
    Kind("history", table_file("history.csv"), lambda d: of_frame(Run(d/"run").history)),
    Kind("settings of a run", settings_file, read_run),
    Kind("predictions", prediction_file("predictions.parquet"), read_table("predictions.parquet")),
    Kind("official results", prediction_file("predictions.json"), read_results),
    Kind("items of a bank", bank_file("*/items.parquet"), read_bank),
    Kind("head of a bank", bank_file("bank.json"), read_bank),
    Kind("vectors of a bank", bank_file("*/embed.safetensors"), read_bank),
    Kind("recipe", recipe_file, lambda d: load_recipe(d/"recipe.json")),
    Kind("looks at a split", looks_file, lambda d: read_json(d/"looks.json")),
    Kind("rows of a sweep", lines_file, lambda d: read_rows(d/"cells.jsonl")),
    Kind("table for others, lines", export_file("some.jsonl"), read_exported("some.jsonl")),
    Kind("table for others, Parquet", export_file("some.parquet"), read_exported("some.parquet")),
    Kind("note of what is kept", kept_note, read_kept),
]

# ---- and what comes of damage --------------------------------------------------------------------------------

class Written:
    "A file of a kind, and what was read from it when it was whole"
    def __init__(self, kind, folder):
        self.kind = kind
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = Path(kind.make(self.folder))
        self.whole = self.file.read_bytes()
        self.truth = kind.read(self.folder)
        self.error = None # the last one

    def verdict(self, raw):
        "What comes of reading other bytes: named | equal | believed | unnamed"
        self.error = None
        self.file.write_bytes(raw)
        try: found = self.kind.read(self.folder)
        except Exception as e: self.error = e
        finally: self.file.write_bytes(self.whole)
        if self.error is None: return "equal" if found == self.truth else "believed"
        named = isinstance(self.error, (ValueError, UserWarning)) and self.file.name in str(self.error)
        return "named" if named else "unnamed"
