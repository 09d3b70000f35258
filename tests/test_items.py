"Tables of items: one door, and every function that takes items goes through it"
import importlib, inspect, pkgutil
from decimal import Decimal
from itertools import islice
from types import SimpleNamespace
from uuid import UUID
import numpy as np, pandas as pd, pyarrow as pa, pytest, torch
from fastai.learner import Learner
from PIL import Image
import leverplus
from leverplus.callback_onpolicy import Feedback
from leverplus.core import read_json, write_json
from leverplus.data import check_splits, items_fingerprint, plot_people, read_okvqa, show_items
from leverplus.baselines import Vote
from leverplus.controls import ask_controls, copy_table, whole_bank
from leverplus.demo import seeds_report
from leverplus.dls import group_dls, show_group, show_prompts
from leverplus.earlier_infoscore import infoscore_beams
from leverplus.earlier_json import row_map
from leverplus.embed import EmbedStore, embed_items, gather_stores, show_neighbours
from leverplus.evaluate import (
    behaviour, compare_runs, compare_seeds, gap_table, majority_vote, mode_table, paired_table,
    paired_tests, pick_baselines, pick_oracle, result_table, score_picks, seeds_table, size_table, subsets,
    type_table, vote_of_all,
)
from leverplus.infer import check_picks, confidence, pick, pick_fixed, pick_rule, predict
from leverplus.items import answered, as_asked, as_id, as_ids, as_image_id, as_items, check_answered, given_ids
from leverplus.lvlm import MockScorer
from leverplus.loops import Questions, loop_queries
from leverplus.pools import Pool, image_groups, make_pool
from leverplus.prompt import make_prompt, prompter
from leverplus.recipes import recipe_learner
from leverplus.cases import item_picture, pick_cases, plot_examples
from leverplus.report import Findings, browser_block
from leverplus.rewards import reweigh
from leverplus.rldata_ask import FactCache, ask, ask_around, content_keys, item_hashes, score_pairs, self_test
from leverplus.rldata_generate import generate, run_settings, shard_queries
from leverplus.rldata_merge import split
from leverplus.rldata_mine import mine, reask
from leverplus.rldata_propose import propose
from leverplus.plan import (
    asking_costs, distinct_images, expected_speed, image_tokens, measure_speed, some_pairs, speed_of,
)
from leverplus.settings import Guarding, Job, Mining, Picking, Proposing, settings_of
from leverplus.statistics import Bootstrap
from leverplus.table import Asked
from leverplus.warmup import AnswerGroups, warmup_dls
from leverplus.world import World

# ---- the door alone ----------------------------------------------------------------------------------------

def frame(ids=(3, 0, 2, 1), **columns):
    "A few items whose ids are row numbers, of other rows"
    texts = dict(question=[f"q{i}?" for i in ids], answer=[f"a{i}" for i in ids])
    keys = dict(question_id=list(ids), image_id=[10 + i // 2 for i in ids])
    made = pd.DataFrame(keys | dict(answers=[[f"a{i}"]*8 + ["no"]*2 for i in ids]) | texts)
    return made.assign(**columns).set_axis(pd.Index(list(ids)))

TEXTS = ["question", "answer"]

def annotated(answers): return [dict(answer=a, answer_confidence="yes") for a in answers]

def of_numpy(column): return pd.Series(list(map(np.str_, column)), column.index, dtype=object)

def frozen(column):
    values = column.to_numpy(copy=True)
    values.flags.writeable = False
    return values

WAYS = {
    "index lost": lambda f: f.reset_index(drop=True),
    "index beside the column": lambda f: f.set_index("question_id", drop=False),
    "index alone": lambda f: f.set_index("question_id"),
    "Int64 column": lambda f: f.reset_index(drop=True).astype({"question_id": "Int64"}),
    "Int64 index": lambda f: f.astype({"question_id": "Int64"}).set_index("question_id", drop=False),
    "floats": lambda f: f.reset_index(drop=True).astype({"question_id": float, "image_id": float}),
    "tuples": lambda f: f.assign(answers=f.answers.map(tuple)),
    "arrays": lambda f: f.assign(answers=f.answers.map(np.array)),
    "a level of the index": lambda f: f.set_index(["question_id", f.index + 7]),
    "categories": lambda f: f.reset_index(drop=True).astype(dict.fromkeys(["question_id", *TEXTS], "category")),
    "Arrow": lambda f: pa.Table.from_pandas(f, preserve_index=False).to_pandas(types_mapper=pd.ArrowDtype),
    "decimals": lambda f: f.assign(question_id=f.question_id.map(Decimal)),
    "rows of an annotation file": lambda f: f.assign(answers=f.answers.map(annotated)),
    "columns of an annotation file": lambda f: f.assign(answers=[dict(answer=a, n=[1]) for a in f.answers]),
    "texts of numpy": lambda f: f.assign(question=of_numpy(f.question), answer=of_numpy(f.answer)),
    "blanks around texts": lambda f: f.assign(question="\n" + f.question + " ", answer=f.answer + "\u00a0"),
    "read-only": lambda f: pd.DataFrame({c: frozen(f[c]) for c in f}, copy=False),
}

@pytest.mark.parametrize("way", WAYS)
def test_what_means_the_same_comes_out_the_same(way):
    right = frame()
    assert as_items(right) is right
    pd.testing.assert_frame_equal(as_items(WAYS[way](right)), right)

def test_files_and_merges_keep_the_key(tmp_path):
    right = frame()
    right.reset_index(drop=True).to_parquet(tmp_path/"f.parquet")
    pd.testing.assert_frame_equal(as_items(pd.read_parquet(tmp_path/"f.parquet")), right)
    merged = right.merge(pd.DataFrame(dict(question_id=[0, 1, 2, 3], kind="x")), on="question_id")
    assert as_items(merged).index.tolist() == [3, 0, 2, 1]
    path = tmp_path/"a.png"
    assert as_items(right.assign(image_path=[path]*4)).image_path.tolist() == [str(path)]*4

@pytest.mark.parametrize(
    "change, words",
    [
        (lambda f: pd.concat([f, f]), "items: question_id 3 occurs more than once, in rows 0 and 4"),
        (lambda f: f.drop(columns="question_id"), "has no column question_id"),
        (lambda f: f.assign(question_id=[3, None, 2, 1]), "row 1: question_id nan is missing"),
        (lambda f: f.assign(question_id=[3, -1, 2, 1]), "row 1: question_id -1 is negative"),
        (lambda f: f.assign(question_id=[True, False, 2, 3]), "row 0: question_id True is a truth value"),
        (lambda f: f.assign(question_id=[3, .5, 2, 1]), "question_id 0.5 is a float"),
        (lambda f: f.set_index(f.question_id + 1), "index and column .* hold different ids"),
        (lambda f: f.assign(answers="['a']"), "question_id 3: answers is one text"),
        (lambda f: f.assign(answers=[["a"], [2], ["a"], ["a"]]), "question_id 0: answers holds 2, wanted"),
        (lambda f: f.assign(image_id=[1, None, 2, 3]), "question_id 0: image_id nan is missing"),
        (lambda f: f.assign(image_path=[1, 2, 3, 4]), "question_id 3: image_path is a int"),
        (lambda f: f.drop(columns="question"), "has no column question; it has"),
        (lambda f: f.assign(question=["q", None, "q", "q"]), "question_id 0: question is "),
        (lambda f: f.assign(question=["q", "q", " \u00a0", "q"]), "question_id 2: question is .*wanted a text"),
        (lambda f: f.assign(question=["q", "q", "q", "<|im_end|>"]), "question_id 1: question holds the control"),
        (lambda f: f.assign(answers=[["a"], ["\ud83d"], ["a"], ["a"]]), "question_id 0: an answer holds half"),
        (lambda f: f.assign(answers=[["a"], ["<|x|>"], ["a"], ["a"]]), "question_id 0: an answer holds the control"),
        (lambda f: f.assign(answers=[["a"], ["a"], [], ["a"]]), "question_id 2: answers is empty"),
        (lambda f: f.assign(answers=[["a"], ["a"], ["", " "], ["a"]]), "question_id 2: all 2 answers are blank"),
        (lambda f: f.assign(answers=[["a"], ["a", None], ["a"], ["a"]]), "question_id 0: answers holds None"),
        (lambda f: f.assign(answers=[[dict(raw="a")]]*4), "question_id 3: answers holds None"),
        (lambda f: f.assign(question_id=list("abcd"), question=["q", " ", "q", "q"]), "question_id 'b': question is"),
        (lambda f: f.assign(question_id=list("abcd"), image_id=[1, None, 2, 3]), "question_id 'b': image_id nan"),
        (lambda f: pd.concat([f, f[["answers"]]], axis=1), "has 2 columns answers: rename or drop"),
        (lambda f: pd.concat([f, f[["image_id"]]], axis=1), "has 2 columns image_id: rename or drop"),
        (lambda f: pd.concat(dict(a=f), axis=1), "columns of 2 levels, like .'a', 'question_id'.: give each"),
        (lambda f: f.merge(f, on="image_id"), "has no column question_id .columns .'question_id_x'"),
        (lambda f: f.rename(columns=dict(answers="direct_answers")), "direct_answers.*under another name"),
        (lambda f: f.assign(question_id=[17, "17", 1, 2]), "question_id 17 .given as '17' and '17'. occurs more"),
        (lambda f: f.assign(question_id=np.float32([1, 2, 3, 2**24])), "row 3: question_id 16777216.0 is"),
        (lambda f: f.assign(image_id=np.float32([1, 2, 3, 2**24])), "question_id 1: image_id 16777216.0 is"),
    ],
)
def test_what_has_no_one_meaning_is_refused(change, words):
    with pytest.raises(ValueError, match=words): as_items(change(frame()), need=("question", "answers"))

def test_an_id_is_the_same_number_everywhere():
    assert as_id("22MexNk") == 3475311758490312                # what another process found
    assert as_id(("coco", np.int64(3))) == as_id(("coco", 3))
    assert as_id(np.str_("x")) == as_id("x") != as_image_id("x")
    assert as_ids({"7"}).tolist() == as_ids(iter([7])).tolist() == [7]
    for lost in (None, float("nan"), pd.NA, pd.NaT, "", " "):
        with pytest.raises(ValueError, match="is missing"): as_id(lost)
    for strange in (object(), ["a"], b"a", np.datetime64("2020-01-01"), ("a", object())):
        with pytest.raises(ValueError, match="wanted a number, a text, or a tuple"): as_id(strange)
    for far in (2**63, np.uint64(2**63)):
        with pytest.raises(ValueError, match="does not fit into 64 bits"): as_id(far)
    assert as_id(2**63 - 1) == 2**63 - 1
    for lost in ((), ("a", None), ("a", float("nan")), ("a", ("b", " "))):
        with pytest.raises(ValueError, match="is missing"): as_id(lost)
    with pytest.raises(ValueError, match="holds a truth value"): as_id(("a", True))
    for narrow in (np.float32(2**24 + 1), np.float16(2**11 + 1)):
        with pytest.raises(ValueError, match="float that may have lost digits"): as_id(narrow)
    assert as_id(str(2**63 - 1)) == 2**63 - 1 and as_id("1" + "0"*18) == 10**18
    assert as_id(str(2**63)) < 2**52                            # no number of 64 bits, so a text
    assert as_id("cafe\u0301") == as_id("caf\u00e9") and as_id("\uff11\uff17") != 17 == as_id(Decimal("17.0"))
    assert as_id(UUID(int=17)) == as_id(str(UUID(int=17)))
    assert as_id(("coco", 3.)) == as_id(("coco", np.float32(3))) == as_id(("coco", 3)) != as_id(("coco", "3"))
    assert as_id(float(as_id("x"))) == as_id("x")              # a merge that leaves gaps makes floats

def test_a_table_made_by_hand_is_the_one_that_is_read(tmp_path):
    "Decomposed texts and blanks around them, in files and in a table: one table, one fingerprint"
    texts = {3: "Cafe\u0301?", 0: " Na\u00efve? ", 2: "Plain?"}
    told = {q: ["cafe\u0301"]*6 + ["tea"]*4 for q in texts}
    questions = [dict(question_id=q, image_id=q, question=text) for q, text in texts.items()]
    answers = [dict(question_id=q, image_id=q, answers=annotated(a)) for q, a in told.items()]
    write_json(tmp_path/"OpenEnded_mscoco_dev2014_questions.json", dict(questions=questions))
    write_json(tmp_path/"mscoco_dev2014_annotations.json", dict(annotations=answers))
    read = read_okvqa(tmp_path, "dev")
    by_hand = pd.DataFrame(questions).assign(answers=list(told.values()), answer="cafe\u0301")
    made = as_items(by_hand, need=("question", "answer", "answers"))
    assert made.question.tolist() == ["Caf\u00e9?", "Na\u00efve?", "Plain?"] == read.question.tolist()
    pd.testing.assert_frame_equal(made[TEXTS + ["answers"]], read[TEXTS + ["answers"]])
    assert items_fingerprint(by_hand) == items_fingerprint(read)
    assert item_hashes(by_hand, [3, 0]).tolist() == item_hashes(read, [3, 0]).tolist()
    assert by_hand.question[0] == "Cafe\u0301?"                 # what was given is left as it was

def test_what_nobody_needs_may_be_missing():
    items = frame().assign(answer=["a", None, " ", "a"], question=[None, "q", "q", "q"])
    assert as_items(items).answer.tolist()[2] == "" and pd.isna(as_items(items).question[3])
    assert as_items(items, columns=("question", "answer")).index.tolist() == [3, 0, 2, 1]
    with pytest.raises(ValueError, match="has no column split"): as_items(items, columns=("split",))
    unknown = frame().assign(answers=[[], ["", ""], ["a"], ["a"]])
    assert as_items(unknown) is unknown
    assert items_fingerprint(frame()[["question_id", "image_id", "question"]]) != items_fingerprint(frame())

@pytest.mark.parametrize("missing", [None, np.nan, pd.NA, "absent"])
def test_questions_that_nobody_has_answered(missing):
    "A table of both: missing answers are an empty list, however they are missing, and are never made up"
    known = frame()
    new = known.assign(question_id=known.question_id + 10).drop(columns=["answers", "answer"])
    if not isinstance(missing, str): new = new.assign(answers=pd.Series([missing]*4, dtype=object), answer=missing)
    both = as_asked(pd.concat([known, new]))
    assert answered(both).tolist() == [True]*4 + [False]*4
    assert both.answers.tolist()[4:] == [[]]*4 and both.answer.tolist()[4:] == [None]*4
    assert as_asked(both) is both and as_asked(known).answers.tolist() == known.answers.tolist()
    assert not answered(as_asked(new)).any() and len(as_asked(new.iloc[:0]))  == 0
    check_answered(both, known.question_id, "accuracy")
    says = "accuracy needs people's answers, and 3 of 4 questions have none, first 1[0-3]"
    with pytest.raises(ValueError, match=says):
        check_answered(both, [0, *new.question_id[:3]], "accuracy")
    with pytest.raises(ValueError, match="answers is empty, wanted at least one. 4 of 8 items have no answers"):
        as_items(both, need=("question", "answer", "answers"))
    assert items_fingerprint(both) == items_fingerprint(both.drop(columns="answer"))

def test_no_items_and_one_are_tables():
    for none in (frame()[:0], pd.DataFrame(columns=frame().columns)):
        ready = as_items(none, need=("question", "answers", "image_id"))
        assert len(ready) == 0 and ready.index.dtype == np.int64
    one = frame()[:1]
    assert as_items(one) is one
    with pytest.raises(ValueError, match="queries is empty"): make_pool(frame()[:0], frame(), 1)
    with pytest.raises(ValueError, match="query 3: 0 candidates are available"): make_pool(one, one, 1)

def test_texts_lead_back_from_pool_answers_and_files(tmp_path):
    "Text ids: the pool, what is asked, the predictions and the results file speak of the same questions"
    names = ["a", "b", "c", "d", "e", "f"]
    f = frame(range(6), image_id=range(6), image_path=None).assign(question_id=names)
    items = as_items(f)
    pool = make_pool(f, f, 3)
    assert set(given_ids(items, pool["a"])) <= set(names) - {"a"}
    assert pool.only(["b"]).ids == {as_id("b"): pool["b"]} and "a" in pool and "z" not in pool
    assert make_prompt(f, "a", ("b", "c")).question == "q0?"
    f.to_parquet(tmp_path/"f.parquet")
    pd.testing.assert_frame_equal(as_items(pd.read_parquet(tmp_path/"f.parquet")), items)
    picking = Picking(picker="random", shots=(2,))
    run = predict(tmp_path/"run", pool, f, MockScorer(), picking=picking, progress=False)
    told = run.frame("predictions.parquet")
    assert told.given_id.tolist() == given_ids(items, told.question_id) and set(told.given_id) == set(names)
    assert {r["question_id"] for r in read_json(run.path/"predictions.json")} == set(names)
    assert item_picture(f, "b") is None                        # known, without a picture
    scored = score_picks(told.assign(selector="random"), told)
    assert pick_cases(scored, ids=["f", "a"]).question_id.tolist() == [as_id("f"), as_id("a")]
    with pytest.raises(ValueError, match="query a: 5 candidates are available"): make_pool(f[:1], f, 6)
    with pytest.raises(ValueError, match="question_id 'b' has question 'q1.' among the queries, 'other.'"):
        make_pool(f[1:2], f.assign(question="other?"), 3)

@pytest.mark.parametrize("ids", [["a", "b"], ["3", "0"]])
def test_tables_of_pairs_hold_numbers(ids):
    asked = pd.DataFrame(dict(question_id=ids, pointer=[(2,), (1,)]))
    with pytest.raises(ValueError, match="column 'question_id' holds texts, wanted whole numbers"):
        ask(asked, MockScorer(), frame(image_path=None))
    asked = asked.assign(question_id=as_ids(["3", "0"]))
    assert ask(asked, MockScorer(), frame(image_path=None)).question_id.tolist() == [3, 0]

def test_functions_that_take_ids_take_texts():
    f = frame(range(8), image_id=range(8)).assign(question_id=list("abcdefgh"))
    items = as_items(f)
    x = torch.eye(8)
    store = EmbedStore(items.index, x, x)
    pool = make_pool(f, f, 4)
    assert torch.equal(store.get(["b", "c"], "text"), x[1:3])
    assert propose(pool, store, ["a", "b"], 1).equals(propose(pool, store, as_ids(["a", "b"]), 1))
    assert shard_queries(["a", "7"]) == [as_id("a"), 7]
    assert list(subsets(["a", "b"], ("all",)).values()) == [tuple(sorted(as_ids(["a", "b"])))]
    assert pool.local("a", given_ids(items, pool["a"])) == (0, 1, 2, 3)
    for wrong in ("a", [1.5], [None], [-1]):
        with pytest.raises(ValueError, match="question_id"): shard_queries(wrong)

# ---- every function that takes items -----------------------------------------------------------------------

# items by another name are looked for, too
NAMES = {"items", "about"}
FRAMES = {"queries", "demos", "candidates"}

def takers():
    "Names of public functions and methods that take items, each with its function"
    out = {}
    def look(name, f):
        for p in inspect.signature(f).parameters.values():
            is_frame = "DataFrame" in str(p.annotation)
            if p.name in NAMES or p.name in FRAMES and is_frame: out[name] = f
    for m in pkgutil.iter_modules(leverplus.__path__):
        if m.name in ("__main__", "all", "_modidx"): continue
        module = importlib.import_module(f"leverplus.{m.name}")
        for name, thing in vars(module).items():
            if getattr(thing, "__module__", None) != module.__name__ or name.startswith("_"): continue
            if inspect.isfunction(thing): look(f"{m.name}.{name}", thing)
            if not inspect.isclass(thing): continue
            for key, f in vars(thing).items():
                f = getattr(f, "__func__", f)
                public = not key.startswith("_") or key == "__init__"
                if public and inspect.isfunction(f): look(f"{m.name}.{name}.{key}", f)
    for key, f in vars(Learner).items():              # what pages add to fastai's class
        if inspect.isfunction(f) and (f.__module__ or "").startswith("leverplus"): look(f"Learner.{key}", f)
    return out

# they hand the items on, as they are, to one that opens the door
HAND_ON = {
    "evaluate.result_table": "_with_pictures",
    "evaluate.gap_table": "_with_pictures",
    "evaluate.paired_table": "_with_pictures",
    "evaluate.paired_tests": "_with_pictures",
    "evaluate.compare_seeds": "_with_pictures",
    "evaluate.seeds_table": "_with_pictures",
    "evaluate.size_table": "_with_pictures",
    "evaluate.compare_runs": "_with_pictures",
    "evaluate.counts_table": "_with_pictures",
    "evaluate.vote_of_all": "majority_vote",
    "infer.rule_of": "Vote",
    "evidence.BankStore.asking": "NewQuestions",
    "controls.copy_table": "copied",
    "table.prompt_tokens": "prompter",
    "groups.RLData.group": "Group",
    "infer.check_results": "_ids_of_results",
    "infer.write_results": "_ids_of_results",
    "rldata_generate.generate": "Generation",
    "plan.questions_there": "job.questions",
    "report.report": "Findings",
    "runs.Run.show_results": "plot_examples",
    "rldata_ask.check_contents": "content_keys",
    "rldata_generate.Contents.compare": "item_contents",
    "rldata_generate.Contents.hold": "item_contents",
    "rldata_generate.begin_run": "contents.hold",
    "settings.Job.embed_place": "_embed_name",
    # dataclasses: see `__post_init__`
    "rldata_mine.Search.__init__": "",
    "report.Findings.__init__": "",
    "baselines.Answers.__init__": "",
    "baselines.Vote.__init__": "",
    "baselines.Logistic.__init__": "",
    "table.Asked.__init__": "",
    "world.World.__init__": "",
}
# their items are something else, or come from a reader
OTHERS = {
    "blocks.MatchNet.__init__", "dls.GroupDataset.select", "synth.SynthGroups.select", "synth.pad_groups",
    "tiny.pair_lesson",
    "rldata_check.Health.__init__", "rldata_check.count_metrics", "rldata_check.file_metrics",
    "rldata_check.headroom_metrics", "rldata_check.positive_metrics", "rldata_check.teaching_metrics",
    "warmup.AnswerGroups.set_items", "warmup.AnswerGroups.check_pools", "training.TrainingData.__init__",
    "picker.Picked.__init__",
}

def test_every_function_that_takes_items_opens_the_door():
    found = takers()
    assert len(found) > 80
    assert set(HAND_ON) | OTHERS <= set(found), (set(HAND_ON) | OTHERS) - set(found)
    for name, f in found.items():
        if name in OTHERS: continue
        code = inspect.getsource(dataclass_of(name).__post_init__ if HAND_ON.get(name) == "" else f)
        wanted = [HAND_ON[name]] if HAND_ON.get(name) else ["as_items(", "as_asked("]
        assert any(door in code for door in wanted), (
            f"{name} takes items: begin with `items = as_items(items)`, or say who does")

def dataclass_of(name):
    module, cls, _ = name.split(".")
    return getattr(importlib.import_module(f"leverplus.{module}"), cls)

# ---- and does the same with a table in disorder ------------------------------------------------------------

N = 24
FEW = Bootstrap(20)
PICKING = Picking(picker="similar_text", shots=(1,))

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "Items whose ids are the row numbers of other items, and everything that is made of them"
    d = tmp_path_factory.mktemp("items")
    ids = np.random.default_rng(0).permutation(N).tolist()
    for i in range(N // 2): Image.new("RGB", (32, 32), (20*i, 255 - 20*i, 40)).save(d/f"{i}.png")
    items = frame(
        ids,
        image_path=[str(d/f"{i // 2}.png") for i in ids],
        question_type=[f"type {i % 2}" for i in ids],
        split=["dev" if i < 16 else "train" for i in ids],
    )
    store = embed_items(items, progress=False)
    pool = make_pool(items[items.split == "dev"], items, 6)
    scorer = MockScorer()
    data = generate(
        d/"groups", list(pool), items, pool, scorer, store, proposing=Proposing(shots=(1, 2)),
        guarding=Guarding(test=0, verify=0), progress=False,
    )
    picks = pick_baselines(pool, store, (2,), draws=2)
    facts = ask(pd.concat([picks, data.rows]), scorer, items)
    scored = pd.concat([score_picks(picks, facts), score_picks(pick_oracle(data.rows, 2), facts)])
    run = predict(d/"run", pool, items, scorer, store, PICKING, progress=False)
    train, valid = split(data, (.6, .4))
    dls = group_dls(train, valid, store)
    return SimpleNamespace(**{k: v for k, v in locals().items() if k != "d"}, path=d)

def titles(axes):
    return [(ax.get_title(), ax.get_xlabel(), [t.get_text() for t in ax.texts]) for ax in np.ravel(axes)]

def pairs(w): return w.data.rows[["question_id", "pointer"]].head(20)

class Heard(MockScorer):
    "Remembers what it was asked"
    def run(self, prompts, targets=None, **kwargs):
        shown = [(p.question, p.images, tuple(d.answer for d in p.demos)) for p in prompts]
        self.heard = shown, list(targets)
        return super().run(prompts, targets, **kwargs)

def heard(w, items):
    scorer = Heard()
    score_pairs(pairs(w), scorer, items)
    return scorer.heard

def warmed(w, items):
    ds = AnswerGroups(items, w.store, 4)
    return ds.question_ids, ds.image, ds.batch(range(4), torch.Generator().manual_seed(0))

CALLS = {
    "items_fingerprint": lambda w, f: items_fingerprint(f),
    "check_splits": lambda w, f: check_splits(a=f),
    "show_items": lambda w, f: titles(show_items(f)),
    "plot_people": lambda w, f: [bar.get_height() for bar in plot_people(f).patches],
    "embed_items": lambda w, f: embed_items(f, progress=False).fingerprint,
    "gather_stores": lambda w, f: gather_stores(f, [w.store]).fingerprint,
    "show_neighbours": lambda w, f: titles(show_neighbours(w.store, f, 3)),
    "make_pool": lambda w, f: make_pool(f, f, 6).fingerprint,
    "Pool.validate": lambda w, f: w.pool.validate(f).fingerprint,
    "image_groups": lambda w, f: image_groups(f),
    "prompter": lambda w, f: prompter(f)(0, (3, 5)),
    "make_prompt": lambda w, f: make_prompt(f, 0, (3, 5)),
    "RLData.group": lambda w, f: repr(w.data.group(3, f)),
    "RLData.validate": lambda w, f: w.data.validate(f).fingerprint,
    "RLData.to_json": lambda w, f: (w.data.to_json(w.path/"a.json", items=f), (w.path/"a.json").read_text()),
    "row_map": lambda w, f: row_map(f),
    "reweigh": lambda w, f: reweigh(w.facts, f, "official", "count3"),
    "score_pairs": heard,
    "item_hashes": lambda w, f: item_hashes(f, [0, 3, 5]),
    "content_keys": lambda w, f: content_keys(f, [0, 3], [(5,), (2, 1)]),
    "ask": lambda w, f: ask(pairs(w), w.scorer, f),
    "ask_around": lambda w, f: ask_around(pairs(w).drop_duplicates(), w.scorer, f, FactCache(), FactCache()),
    "self_test": lambda w, f: self_test(w.scorer, f, w.pool, 6),
    "run_settings": lambda w, f: run_settings(list(w.pool), f, w.pool, w.store, w.scorer, None),
    "generate": lambda w, f: generate(
        w.path/"groups", list(w.pool), f, w.pool, w.scorer, w.store, proposing=Proposing(shots=(1, 2)),
        guarding=Guarding(test=0, verify=0), progress=False,
    ).rows,
    "mine": lambda w, f: mine(
        w.data, f, w.scorer, w.store, mining=Mining(tries=2, top=1, rounds=1), positive=.9, progress=False
    )[0].rows,
    "reask": lambda w, f: reask(w.data, f, w.scorer, progress=False).rows,
    "split": lambda w, f: [part.queries for part in split(w.data, (.5, .5), items=f)],
    "expected_speed": lambda w, f: expected_speed(f, n=4),
    "image_tokens": lambda w, f: image_tokens(f, n=4),
    "distinct_images": lambda w, f: distinct_images(f, 10**6, (2,)),
    "asking_costs": lambda w, f: asking_costs(settings_of(Job, lvlm="Qwen/Qwen2.5-VL-3B-Instruct"), 9, items=f),
    "some_pairs": lambda w, f: list(islice(some_pairs(f, settings_of(Job, K=4), (2,)), 20)),
    "measure_speed": lambda w, f: measure_speed(settings_of(Job, lvlm="mock", K=4), seconds=0, items=f).why,
    "speed_of": lambda w, f: speed_of(settings_of(Job, lvlm="Qwen/Qwen2.5-VL-3B-Instruct"), items=f),
    "show_group": lambda w, f: show_group(w.dls.valid_ds, w.dls.valid_ds.question_ids[0], f),
    "show_prompts": lambda w, f: titles(show_prompts(pd.DataFrame(dict(query=[0], picks=[(3, 5)])), f)),
    "group_dls": lambda w, f: group_dls(w.train, w.valid, w.store, items=f).valid_ds.about,
    "Feedback": lambda w, f: Feedback(w.scorer, f)(pairs(w)),
    "AnswerGroups": warmed,
    "warmup_dls": lambda w, f: warmup_dls(w.dls, only_train(f), w.store, 4, bs=4).train_ds.words,
    "recipe_learner": lambda w, f: recipe_learner(w.train, w.valid, w.store, "ours", items=f).warmup_from[0],
    "infoscore_beams": lambda w, f: infoscore_beams([3, 5], f, w.pool, w.scorer, 2, 2, progress=False).rows,
    "pick_fixed": lambda w, f: pick_fixed(w.pool, (20, 22), f),
    "check_picks": lambda w, f: check_picks(w.picks, f),
    "confidence": lambda w, f: confidence(pairs(w), w.scorer, f),
    "pick": lambda w, f: pick(w.pool, Picking(picker="fixed", fixed=(20, 22), shots=(2,)), items=f),
    "predict": lambda w, f: predict(
        w.path/"run", w.pool, f, w.scorer, w.store, PICKING, progress=False
    ).frame("predictions.parquet"),
    "pick_baselines": lambda w, f: pick_baselines(w.pool, w.store, (2,), 1, {2: (20, 22)}, f),
    "majority_vote": lambda w, f: majority_vote(w.picks[w.picks.shots > 0], f),
    "vote_of_all": lambda w, f: vote_of_all(w.pool, w.store, f),
    "Vote": lambda w, f: pick_rule(Vote(w.store, f), w.pool, 2, "vote"),
    "ask_controls": lambda w, f: ask_controls(w.picks[w.picks.selector == "mmr"], w.scorer, f, w.pool, w.store),
    "copy_table": lambda w, f: copy_table(w.scored, f),
    "whole_bank": lambda w, f: whole_bank(f, f).ids,
    "behaviour": lambda w, f: behaviour(w.scored, f),
    "result_table": lambda w, f: result_table(w.scored, f, bootstrap=FEW),
    "gap_table": lambda w, f: gap_table(w.scored, f, FEW),
    "paired_table": lambda w, f: paired_table(w.scored, f, bootstrap=FEW),
    "paired_tests": lambda w, f: paired_tests(w.scored, f, [("mmr", "random")], bootstrap=FEW),
    "compare_seeds": lambda w, f: compare_seeds(w.scored, "mmr", "random", 2, items=f, bootstrap=FEW),
    "seeds_table": lambda w, f: seeds_table(w.scored, 2, f, bootstrap=FEW),
    "seeds_report": lambda w, f: seeds_report(w.scored, f, against=()),
    "size_table": lambda w, f: size_table(w.scored, subsets(list(w.pool), (8, "all")), 2, f),
    "mode_table": lambda w, f: mode_table(w.scored, f),
    "type_table": lambda w, f: type_table(w.scored, f),
    "compare_runs": lambda w, f: compare_runs(w.run, w.run, items=f, bootstrap=FEW),
    "loop_queries": lambda w, f: loop_queries(f, Questions(n=4, dev=4, valid=4)),
    "Asked": lambda w, f: Asked(f, w.store, w.pool).items,
    "World": lambda w, f: World(f, w.store, {}, w.scorer, None).items,
    "item_picture": lambda w, f: np.asarray(item_picture(f, 3)),
    "plot_examples": lambda w, f: titles(plot_examples(f, w.scored, 2, "mmr")),
    "browser_block": lambda w, f: browser_block(f, w.scored).html(),
    "Findings": lambda w, f: Findings(items=f).items,
    "Run.show_results": lambda w, f: titles(w.run.show_results(f, 2)),
}

def only_train(f): return f[np.asarray(f["split"] == "train")]

def assert_same(a, b, name):
    if isinstance(a, pd.DataFrame): pd.testing.assert_frame_equal(a, b)
    elif isinstance(a, (np.ndarray, torch.Tensor)): np.testing.assert_array_equal(a, b, name)
    elif isinstance(a, (list, tuple)) and type(a) in (list, tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b): assert_same(x, y, name)
    elif isinstance(a, pd.Series): pd.testing.assert_series_equal(a, b)
    else: assert repr(a) == repr(b), name

@pytest.mark.parametrize("name", CALLS)
def test_the_result_does_not_depend_on_where_the_key_stands(world, name):
    import matplotlib.pyplot as plt
    call = CALLS[name]
    want = call(world, world.items)
    for way in ("index lost", "index beside the column", "index alone", "Int64 index"):
        assert_same(call(world, WAYS[way](world.items)), want, f"{name}, {way}")
        plt.close("all")
    twice = pd.concat([world.items, world.items])
    with pytest.raises(ValueError, match="occurs more than once"): call(world, twice)

# ---- pictures ----------------------------------------------------------------------------------------------

def same_picture_twice(folder):
    "Items 0 and 1 show one picture under two ids and two file names; 2 has its own, 3 a file that is lost"
    for name, colour in dict(a=9, b=9, c=200).items():
        Image.new("RGB", (32, 32), (colour,)*3).save(folder/f"{name}.png")
    paths = [folder/f"{name}.png" for name in "abcd"]
    return frame(range(4), image_id=["VizWiz_1.jpg", "VizWiz_2.jpg", "VizWiz_3.jpg", 7], image_path=paths)

def picks_of(*pairs): return pd.DataFrame(pairs, columns=["question_id", "pointer"])

def test_a_picture_under_two_names_is_one_picture(tmp_path):
    items = same_picture_twice(tmp_path)
    assert image_groups(items, strict=False).tolist() == [0, 0, 2, 3]
    with pytest.raises(FileNotFoundError, match="d.png: image of question_id 3 does not exist"): image_groups(items)
    known = items[:3]
    pool = make_pool(known, known, 1)
    assert pool.ids[0] == pool.ids[1] == (2,)
    with pytest.raises(ValueError, match="query 0: 1 candidates are available"): make_pool(known, known, 2)
    with pytest.raises(ValueError, match="candidate 1 shows the same picture"): Pool({0: (1,)}).validate(known)
    check_picks(picks_of((0, (2, 3))), items)
    with pytest.raises(ValueError, match="question 0 is shown itself or its own picture .demonstration 1"):
        check_picks(picks_of((2, (3,)), (0, (2, 1))), items)
    with pytest.raises(ValueError, match="question 0 shares its picture with the fixed demonstrations"):
        pick_fixed(Pool({0: (2, 3), 2: (3,)}), (1,), items)
    assert len(pick_fixed(Pool({0: (2, 3)}), (2,), items)) == 1

def test_embeddings_remember_pictures_whose_files_are_gone(tmp_path):
    known = same_picture_twice(tmp_path)[:3]
    store = embed_items(known, progress=False)
    bare = known.drop(columns="image_path")
    assert image_groups(bare).tolist() == [0, 1, 2] and image_groups(bare, store).tolist() == [0, 0, 2]
    assert make_pool(bare, bare, 1, "image", store).ids[0] == (2,)
    half = known.assign(image_path=[None, *known.image_path[1:]])        # one file is left, the other is remembered
    assert image_groups(half, store).tolist() == [0, 0, 2]

def test_a_loop_chooses_epochs_by_other_pictures(tmp_path):
    "Development questions that judge and those that choose share no picture, whatever its name"
    more = frame(range(4, 14), image_id=range(100, 110), image_path=None, split=["dev"]*3 + ["train"]*7)
    every = pd.concat([same_picture_twice(tmp_path)[:3].assign(split="dev"), more])
    judged = set()
    for seed in range(12):
        found = loop_queries(every, Questions(n=2, dev=2, valid=3), seed)
        judged |= {0, 1} & set(found["dev"])
        assert not ({0, 1} & set(found["dev"]) and {0, 1} & set(found["valid"])), seed
    assert judged == {0, 1}

def test_names_and_numbers_of_coco_are_one_id():
    queries = frame([0], image_id=["COCO_train2014_000000000042"])
    demos = frame([1, 2], image_id=[42, 43])
    assert make_pool(queries, demos, 1).ids == {0: (2,)}
    with pytest.raises(ValueError, match="queries, question_id 0: image_id None is missing"):
        make_pool(queries.assign(image_id=None), demos, 1)
