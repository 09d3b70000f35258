"A picker: narrowing, picking, prompts, and what it refuses"
import base64, gc, io, json
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
import pyarrow.parquet as pq
from PIL import Image
from leverplus.bank import DemoBank
from leverplus.cli import main
from leverplus.core import repo_path, seal_file
from leverplus.data import read_okvqa
from leverplus.embed import EmbedStore, embed_items, load_clip
from leverplus.evidence import READS, BankStore, Evidence, NewQuestions, inputs, n_evidence
from leverplus.infer import pick_model
from leverplus.items import as_items
from leverplus.picker import PICK_COLUMNS, Picker, Picks, read_export
from leverplus.served import data_url, file_url, openai_messages
from leverplus.pictures import open_image
from leverplus.pools import Pool, make_pool
from leverplus.prompt import Demo, Prompt, make_prompt, messages
from leverplus.selector import PointerSelector

ISLANDS = repo_path("data", "islands")

@pytest.fixture(scope="module")
def train(): return read_okvqa(ISLANDS, "train", images=ISLANDS/"images").iloc[:120]

@pytest.fixture(scope="module")
def dev(): return read_okvqa(ISLANDS, "dev", images=ISLANDS/"images").iloc[:8]

@pytest.fixture(scope="module")
def questions(dev): return dev.drop(columns=["answer", "answers", "raw_answers"])

@pytest.fixture(scope="module")
def store(train, dev): return embed_items(pd.concat([train, dev]), progress=False)

@pytest.fixture(scope="module")
def bank(train): return DemoBank.build(train, progress=False)

def selector(kind="mixed+answers", seed=0, **kw):
    "A selector with weights of its own, which never asks for what it was not made for"
    torch.manual_seed(seed)
    F = n_evidence(kind)
    width = dict(mixed=128, text=64, image=64)[kind.removesuffix("+answers")]
    model = PointerSelector(width + F, d_hidden=32, n_evidence=F, reads=READS if F else None, **kw).eval()
    with torch.no_grad():
        for p in model.parameters(): p.add_(.3*torch.randn_like(p))
    model.info = dict(kind=kind, encoder=load_clip().fingerprint)
    return model

def rule(sampler, K): return dict(sampler=sampler, K=K, parts={}, clip=None, demos=None)

# ---- the same as the long way --------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["mixed+answers", "text", "mixed", "image"])
@pytest.mark.parametrize("shots", [0, 1, 3])
def test_picks_are_those_of_the_long_way(kind, shots, bank, store, train, dev, questions):
    "One store of all items, a pool, `pick_model`: what `Picker` spares one from"
    model = selector(kind)
    picks = Picker(model).batch(questions, bank, shots, K=20)
    pool = Pool({q: p.candidates for q, p in zip(dev.index, picks)})
    items = pd.concat([train, dev])
    all_in_one = BankStore(store, items, train.index) if model.n_evidence else store
    want = pick_model(model, pool, all_in_one, shots, kind.removesuffix("+answers"))
    assert [p.pointer for p in picks] == want.pointer.tolist()
    for q, picked in zip(dev.index, picks):
        query, cands = inputs(all_in_one, [q], [pool[q]], None, kind)
        local = torch.tensor(pool.local(q, picked.pointer)).long().view(1, 1, -1)
        with torch.no_grad(): logp = model.logp(model.encode(query, cands), local)
        assert picked.logp == pytest.approx(float(logp), abs=1e-3)

def test_evidence_of_new_questions_is_that_of_known_ones(bank, store, train, dev, questions):
    every = Evidence(pd.concat([train, dev]), store, train.index)
    new = NewQuestions(bank.with_answers.evidence, questions, bank.embed(questions), bank.same_picture(questions))
    cands = [train.index[i:i+9].tolist() for i in range(len(dev))]
    assert torch.allclose(every(dev.index.tolist(), cands), new(dev.index.tolist(), cands), atol=1e-4)
    with pytest.raises(KeyError): new([train.index[0]], cands[:1])

def test_evidence_leaves_the_questions_own_picture_out(bank, train):
    "A question of the bank, asked as a new one"
    asked = train.iloc[:4].drop(columns=["answer", "answers"])
    new = NewQuestions(bank.with_answers.evidence, asked, bank.embed(asked), bank.same_picture(asked))
    known = bank.with_answers.evidence
    cands = [train.index[40:60].tolist()]*4
    assert torch.allclose(known(asked.index.tolist(), cands), new(asked.index.tolist(), cands), atol=1e-4)
    assert (new.opinion(asked.index.tolist()).weight[:, torch.tensor(bank.same_picture(asked))] == 0).all()

@pytest.mark.parametrize("sampler", ["text", "image", "mixed"])
def test_narrowing_is_the_pool_of_training(sampler, bank, store, train, dev, questions):
    model = selector()
    model.info["pool"] = rule(sampler, 8)
    picks = Picker(model).batch(questions, bank)
    pool = make_pool(dev, train, 8, sampler, store)
    same = [len(set(pool[q]) & set(p.candidates)) for q, p in zip(dev.index, picks)]
    assert np.mean(same) > 7.8 and all(len(p.candidates) == 8 for p in picks)   # but for cosines equal to six digits

def test_random_pools_become_the_most_similar(bank, questions):
    model = selector()
    model.info["pool"] = rule("random", 5)
    picks = Picker(model).batch(questions, bank)
    near, _ = bank.search(bank.embed(questions).get(questions.index), 5)
    assert np.mean([len(set(n) & set(p.candidates)) for n, p in zip(near.tolist(), picks)]) > 4.8

def test_one_is_as_many(bank, questions):
    pick = Picker(selector())
    many = pick.batch(questions, bank, K=24)
    for i in (0, 5):
        row = questions.iloc[i]
        one = pick.batch(questions.iloc[[i]], bank, K=24)[0]
        assert one.pointer == many[i].pointer and one.logp == pytest.approx(many[i].logp, abs=1e-4)
        by_hand = pick(row.image_path, row.question, bank, K=24)
        assert by_hand.pointer == many[i].pointer       # nothing of the narrowing is by chance here

def test_pictures_from_memory_are_the_same(bank, questions):
    pick = Picker(selector())
    path = questions.image_path.iloc[0]
    forms = [path, Path(path).read_bytes(), open_image(path)]
    assert len({pick(form, "What is it?", bank).pointer for form in forms}) == 1

def test_a_pick_outlives_its_picker(bank, questions):
    "The picture from memory lies on disk as long as somebody may want it"
    picked = Picker(selector())(open_image(questions.image_path.iloc[0]), "What is it?", bank)
    gc.collect()
    assert picked.openai()[0]["content"][-2]["image_url"]["url"].startswith("data:image/png")
    path = Path(picked.prompt.image)
    del picked
    gc.collect()
    assert not path.exists()

# ---- how many ------------------------------------------------------------------------------------------------

def test_the_whole_bank(bank, questions):
    picks = Picker(selector()).batch(questions, bank, K="all")
    assert {len(p.candidates) for p in picks} == {len(bank)}
    more = Picker(selector()).batch(questions, bank, K=10_000)
    assert [p.pointer for p in more] == [p.pointer for p in picks]

def test_a_small_bank_is_taken_whole(train, questions):
    small = DemoBank.build(train.iloc[:5], progress=False)
    picks = Picker(selector()).batch(questions, small, 2, K=16)
    assert {len(p.candidates) for p in picks} == {5}
    with pytest.raises(ValueError, match="5 examples of the bank may be shown, 6"):
        Picker(selector(max_shots=8)).batch(questions, small, 6)
    own = train.iloc[[0]].drop(columns=["answer", "answers"])
    with pytest.raises(ValueError, match="3 examples of the bank may be shown, 4"):
        Picker(selector()).batch(own, small, 4)

def test_pictures_of_the_question_are_never_shown(bank, train):
    asked = train.iloc[:30].drop(columns=["answer", "answers", "question_id"]).reset_index(drop=True)
    for K in (16, "all"):
        picks = Picker(selector()).batch(asked, bank, 4, K)
        shown = [set(bank.items.image_id.loc[p.candidates]) for p in picks]
        assert not any(image in images for image, images in zip(asked.image_id, shown))

def test_a_selector_that_stops(bank, questions):
    model = selector("text", stop=True, max_shots=3, min_shots=0)
    picks = Picker(model).batch(questions, bank, None)
    assert {len(p.pointer) for p in picks} <= {0, 1, 2, 3}
    with pytest.raises(ValueError, match="no STOP"): Picker(selector()).batch(questions, bank, None)

@pytest.mark.parametrize("K", [0, -1, 2.5, "some"])
def test_odd_numbers_are_refused(K, bank, questions):
    with pytest.raises(ValueError, match="wanted a whole number >= 1, 'all' or None"):
        Picker(selector()).batch(questions, bank, K=K)

# ---- texts without pictures ----------------------------------------------------------------------------------

def test_a_bank_of_texts():
    rows = [dict(uid=f"t-{i}", question=f"What is number {i}?", answer=str(i)) for i in range(30)]
    frame = pd.DataFrame(rows)
    texts = DemoBank.build(frame, None, dict(question_id="uid"), progress=False)
    picked = Picker(selector("text+answers"))(None, "What is number 7, my friend?", texts)
    assert all(uid in frame.uid.tolist() for uid in picked.ids) and picked.images == [None, None]
    assert all(part["type"] == "text" for part in picked.openai()[0]["content"])
    assert len(picked.show()) == 3
    with pytest.raises(ValueError, match="kind 'mixed' is not in this store"): Picker(selector())(None, "?", texts)

def test_a_question_without_a_picture_and_a_bank_with(bank):
    picked = Picker(selector())(None, "What is it?", bank)
    assert picked.prompt.image is None and len(picked.prompt.images) == 2

# ---- whose vectors -------------------------------------------------------------------------------------------

def test_vectors_of_another_encoder_are_refused(bank, train):
    model = selector()
    other = load_clip()
    with torch.no_grad(): other.model.text_projection.weight.mul_(1.5)
    with pytest.raises(ValueError, match="trained on vectors of CLIP"): Picker(model, other)
    elsewhere = DemoBank.build(train.iloc[:8], other, progress=False)
    with pytest.raises(ValueError, match="trained on vectors of CLIP"): Picker(model)(None, "What?", elsewhere)
    made_up = DemoBank(bank.items, EmbedStore(bank.items.index, torch.randn(120, 64), torch.randn(120, 64)))
    with pytest.raises(ValueError, match="does not say what made its vectors"): Picker(model)(None, "What?", made_up)

def test_a_checkpoint_that_does_not_say_its_encoder_is_asked_for(bank):
    model = selector()
    del model.info["encoder"]
    with pytest.raises(ValueError, match="does not say which encoder"): Picker(model)(None, "What?", bank)
    assert Picker(model, load_clip())(None, "What?", bank).pointer == Picker(selector())(None, "What?", bank).pointer

def test_a_picker_of_a_folder(bank, questions, tmp_path):
    model = selector()
    model.info["asking"] = dict(style="chat")
    model.save_pretrained(tmp_path/"selector")
    bank.save(tmp_path/"bank")
    pick = Picker.from_pretrained(tmp_path/"selector")
    assert pick.about["encoder"] == load_clip().fingerprint and pick.about["kind"] == "mixed+answers"
    picks = pick.batch(questions, DemoBank.open(tmp_path/"bank"))
    assert [p.pointer for p in picks] == [p.pointer for p in Picker(model).batch(questions, bank)]
    assert {p.prompt.style for p in picks} == {"chat"} and len(picks[0].messages()) == 5
    with pytest.raises(ValueError, match="style 'poem'"): Picker.from_pretrained(tmp_path/"selector", style="poem")

# ---- prompts -------------------------------------------------------------------------------------------------

def test_messages_are_those_of_the_prompt_page(bank, train, dev, questions):
    picked = Picker(selector()).batch(questions, bank)[3]
    want = make_prompt(pd.concat([train, dev]), questions.index[3], picked.pointer)
    assert picked.prompt == want and picked.messages() == messages(want)

@pytest.mark.parametrize("style", ["interleaved", "chat"])
def test_openai_messages_show_the_same(style, tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path/"a b.png")
    path = str(tmp_path/"a b.png")
    prompt = Prompt(1, path, "Who?", (Demo(2, path, "What?", "x"), Demo(3, None, "Y?", "y")), style)
    said = json.loads(json.dumps(openai_messages(prompt)))
    parts = [part for turn in said for part in turn["content"]]
    assert [t["role"] for t in said] == [t["role"] for t in messages(prompt)]
    assert [p["text"] for p in parts if p["type"] == "text"] == [
        p["text"] for t in messages(prompt) for p in t["content"] if p["type"] == "text"]
    urls = [p["image_url"]["url"] for p in parts if p["type"] == "image_url"]
    assert len(urls) == 2 and base64.b64decode(urls[0].split(",")[1]) == (tmp_path/"a b.png").read_bytes()
    files = [p for turn in openai_messages(prompt, file_url) for p in turn["content"] if p["type"] == "image_url"]
    assert [p["image_url"]["url"] for p in files] == [(tmp_path/"a b.png").as_uri()]*2

def test_pictures_that_others_read_otherwise_are_sent_as_we_read_them(tmp_path):
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    clear.save(tmp_path/"clear.png")
    turned = Image.new("RGB", (8, 4), "blue")
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path/"turned.jpg", exif=exif)
    Image.new("RGB", (4, 4), "green").save(tmp_path/"x.bmp")
    for name in ("clear.png", "turned.jpg", "x.bmp"):
        head, body = data_url(tmp_path/name).split(",")
        sent = Image.open(io.BytesIO(base64.b64decode(body))).convert("RGB")
        assert head == "data:image/png;base64" and np.array_equal(sent, open_image(tmp_path/name))
    turned.save(tmp_path/"plain.jpg")
    assert base64.b64decode(data_url(tmp_path/"plain.jpg").split(",")[1]) == (tmp_path/"plain.jpg").read_bytes()

def test_picks_as_a_table_and_as_lines(bank, questions, tmp_path):
    picks = Picker(selector()).batch(questions, bank)
    assert picks.frame().question_id.tolist() == questions.index.tolist()
    for form in (None, "qwen", "openai"):
        file = picks.write(tmp_path/"p.jsonl", form, overwrite=True)
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert [line["ids"] for line in lines] == [p.ids for p in picks]
        assert ("messages" in lines[0]) == (form is not None)
        if form: assert [line["messages"] for line in lines] == [
            p.messages() if form == "qwen" else p.openai() for p in picks]
        kept = read_export(picks.write(tmp_path/"p.parquet", form, overwrite=True))
        pd.testing.assert_frame_equal(kept, read_export(file))
        assert kept.drop(columns="messages", errors="ignore").to_dict("list") == picks.frame().to_dict("list")
    with pytest.raises(ValueError, match="wanted 'qwen', 'openai' or None"): picks.write(tmp_path/"q.jsonl", "other")
    assert len(picks[0].show()) == 3 and "🖼" in picks[0]._repr_markdown_()

@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_file_is_not_replaced_unasked_nor_half_written(ending, bank, questions, tmp_path, monkeypatch):
    picks = Picker(selector()).batch(questions, bank)
    file = picks.write(tmp_path/f"p.{ending}")
    before = file.read_bytes()
    with pytest.raises(FileExistsError, match="overwrite=True"): picks.write(file)
    def breaks(*args, **kwargs): raise OSError("disk full")
    monkeypatch.setattr(pq.ParquetWriter, "write_table", breaks)
    monkeypatch.setattr(Path, "write_text", breaks)
    with pytest.raises(OSError, match="disk full"): picks.write(file, overwrite=True)
    assert file.read_bytes() == before and {p.name for p in tmp_path.iterdir()} <= {file.name, seal_file(file).name}
    with pytest.raises(ValueError, match="ends in .jsonl or .parquet"): picks.write(tmp_path/"p.csv")

IDS = dict(numbers=[7, 8], texts=["007", "a b"], mixed=[7, "b 8"])

@pytest.mark.parametrize("kind", IDS)
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_ids_come_back_as_they_were_given(kind, ending, train, questions, tmp_path):
    "Of questions and of demonstrations, in pandas and, where it is there, in `datasets`"
    given = IDS[kind]
    named = train.assign(question_id=[f"demo {i}" for i in range(len(train))]).reset_index(drop=True)
    asked = questions.iloc[:2].reset_index(drop=True).assign(question_id=pd.Series(given, dtype=object))
    picks = Picker(selector()).batch(asked, DemoBank.build(named, progress=False))
    file = picks.write(tmp_path/f"p.{ending}", "qwen")
    want = given if kind != "mixed" else ["7", "b 8"]
    whole = read_export(file)
    plain = pd.read_parquet(file) if ending == "parquet" else pd.read_json(file, lines=True, dtype=False)
    for table in (whole, plain):
        assert table.question_id.tolist() == want
        assert [list(ids) for ids in table.ids] == [p.ids for p in picks] and str(table.ids[0][0]).startswith("demo ")
        assert as_items(table).index.tolist() == [p.prompt.question_id for p in picks]
    datasets = pytest.importorskip("datasets")
    loaded = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path/"cache")) if ending == "parquet" else (
        datasets.Dataset.from_json(str(file), cache_dir=str(tmp_path/"cache")))
    assert loaded["question_id"][:] == want and loaded["ids"][:] == [p.ids for p in picks]
    assert loaded.column_names == list(whole.columns)

def test_questions_numbered_from_zero(bank):
    picks = Picker(selector()).batch(pd.DataFrame(dict(question_id=[0, 1], question=["What is it?", "Who?"])), bank)
    assert picks.frame().question_id.tolist() == [0, 1] and [p.prompt.question_id for p in picks] == [0, 1]

def test_no_picks_are_a_table_too(tmp_path):
    assert list(Picks().frame().columns) == list(PICK_COLUMNS)
    for ending in ("parquet", "jsonl"): assert len(read_export(Picks().write(tmp_path/f"p.{ending}"))) == 0

# ---- the second world ----------------------------------------------------------------------------------------

def test_real_questions(okvqa):
    from leverplus.data import read_soft_labels
    items = read_soft_labels(okvqa, "train").iloc[:400]
    real = DemoBank.build(items, progress=False)
    asked = read_soft_labels(okvqa, "val").iloc[:20]
    picks = Picker(selector("text+answers")).batch(asked.drop(columns=["answer", "answers"]), real, 3, K=64)
    assert all(len(set(p.pointer)) == 3 and set(p.pointer) <= set(p.candidates) for p in picks)

# ---- from a shell --------------------------------------------------------------------------------------------

def shell(words, capsys, status=0):
    try: got = main(words.split())
    except SystemExit as e: got = e.code # words that make no door
    assert got == status
    said = capsys.readouterr()
    return said.out if status == 0 else said.err

def test_a_bank_and_a_pick_from_a_shell(tmp_path, capsys, monkeypatch):
    "Two files of examples, one after the other; then a question about a picture"
    monkeypatch.chdir(tmp_path)
    for name, colour in dict(a="red", b="blue").items():
        Image.new("RGB", (32, 32), colour).save(f"{name}.png")
        pd.DataFrame(dict(q=["What colour?", f"Which {name}?"], said=[colour, name], photo=[f"{name}.png", ""])).to_csv(
            f"{name}.csv", index=False)
    make = "bank --columns question=q answer=said image=photo --quiet --out bank --source"
    assert "examples" in shell(f"{make} a.csv --dry-run", capsys) and not (tmp_path/"bank").exists()
    assert "DemoBank(2 examples" in shell(f"{make} a.csv", capsys)
    assert "DemoBank(4 examples" in shell(f"{make} b.csv", capsys)
    assert "DemoBank(4 examples" in shell(f"{make} a.csv", capsys)
    selector().save_pretrained(tmp_path/"selector")
    ask = "pick --question What colour is it? --image a.png --bank bank --selector selector --candidates all"
    want = Picker.from_pretrained(tmp_path/"selector")("a.png", "What colour is it?", DemoBank.open("bank"), K="all")
    assert json.loads(shell(ask, capsys)) == want.messages()
    assert json.loads(shell(f"{ask} --openai", capsys)) == want.openai()
    assert "the whole bank" in shell(f"{ask} --dry-run", capsys)
    assert "wanted FIELD=NAME" in shell("bank --columns question --out bank --source a.csv", capsys, 2)
    assert "bank.json: no such file" in shell("pick --question x --bank nowhere --selector selector", capsys, 2)
