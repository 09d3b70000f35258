"One's own table as a data set: splits of a CSV file with names of one's own, from the shell to a picked prompt"
import contextlib, io, json
from pathlib import Path
import pandas as pd, pytest
from PIL import Image
from leverplus import cli
from leverplus.bank import PEOPLE, read_table
from leverplus.data import BadItems
from leverplus.doors import read_door
from leverplus.settings import Data, Job, change, columns_of, plain_settings, read_settings, settings_of
from leverplus.vqa import vqa_accuracy

OWN = dict(question="q", answer="said", image="photo")
WORDS = [f"{field}={name}" for field, name in OWN.items()]

@pytest.fixture
def folder(tmp_path):
    "40 rows about 20 pictures, two splits, a column that nobody asks for"
    (tmp_path/"photos").mkdir()
    rows = []
    for i in range(40):
        photo = f"photos/{i//2}.jpg"
        Image.new("RGB", (56, 56), (12*(i//2), 200, 40)).save(tmp_path/photo)
        split = "dev" if i >= 30 else "train"
        rows.append(dict(q=f"What is number {i}?", said=f"thing {i % 7}", photo=photo, split=split, source="camera"))
    pd.DataFrame(rows).to_csv(tmp_path/"mine.csv", index=False)
    return tmp_path

def test_a_split_of_one_file(folder):
    train = read_table(folder/"mine.csv", "train", columns=OWN)
    again = read_table(folder, "train", columns=OWN)
    pd.testing.assert_frame_equal(train, again)
    assert len(train) == 30 and (train.split == "train").all() and (train.source == "camera").all()
    assert train.image_id.nunique() == 15 and train.image_path.map(Path).map(Path.is_file).all()
    assert train.question.tolist() == [f"What is number {i}?" for i in range(30)]
    dev = read_table(folder, "dev", columns=OWN)
    assert len(dev) == 10 and not set(dev.index) & set(train.index)

def test_one_answer_counts_as_ten_people_who_agree(folder):
    row = read_table(folder, "dev", columns=OWN).iloc[0]
    assert row.answers == [row.answer]*PEOPLE
    assert vqa_accuracy(row.answer, row.answers) == 1 and vqa_accuracy("no", row.answers) == 0

def test_answers_of_several_people_stay_as_they_are(tmp_path):
    rows = [dict(question="Who?", answers=["a", "b", "a"], split="dev")]
    (tmp_path/"mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    got = read_table(tmp_path, "dev").iloc[0]
    assert got.answers == ["a", "b", "a"] and got.answer == "a" and got.image_path is None

@pytest.mark.parametrize("ending", ["csv", "jsonl", "json", "parquet"])
def test_a_file_per_split_in_each_format(folder, ending):
    table = pd.read_csv(folder/"mine.csv")
    (folder/"mine.csv").unlink()
    for split, rows in table.groupby("split"):
        file, rows = folder/f"{split}.{ending}", rows.drop(columns="split")
        if ending == "csv": rows.to_csv(file, index=False)
        elif ending == "parquet": rows.to_parquet(file)
        else: rows.to_json(file, orient="records", lines=ending == "jsonl")
    train, dev = (read_table(folder, split, columns=OWN) for split in ("train", "dev"))
    assert (len(train), len(dev)) == (30, 10) and (dev.split == "dev").all()

def test_pictures_elsewhere_or_none(folder):
    (folder/"photos").rename(folder/"elsewhere")
    table = pd.read_csv(folder/"mine.csv")
    table.assign(photo=table.photo.map(lambda p: Path(p).name)).to_csv(folder/"mine.csv", index=False)
    train = read_table(folder, "train", images=folder/"elsewhere", columns=OWN)
    assert train.image_path.iloc[0] == str(folder/"elsewhere"/"0.jpg")
    blind = read_table(folder, "train", images=False, columns=OWN)
    assert blind.image_path.isna().all() and blind.image_id.nunique() == 30

def test_what_is_wrong_with_a_table_is_said(folder):
    (folder/"photos"/"3.jpg").unlink()
    (folder/"photos"/"4.jpg").write_bytes(b"no picture")
    with pytest.raises(BadItems, match=r"mine.csv: 4 bad item\(s\) in split 'train'\n  3.jpg: row 6: "):
        read_table(folder, "train", columns=OWN)
    kept = read_table(folder, "train", columns=OWN, on_bad="skip")
    assert len(kept) == 26 and len(kept.attrs["left_out"]) == 4
    with pytest.raises(ValueError, match="no split 'val'; there are dev, train"): read_table(folder, "val", columns=OWN)
    with pytest.raises(ValueError, match="no column question"): read_table(folder, "dev")
    with pytest.raises(FileNotFoundError, match="nowhere"): read_table(folder/"nowhere", "dev")
    with pytest.raises(ValueError, match="on_bad"): read_table(folder, "dev", columns=OWN, on_bad="ignore")
    pd.read_csv(folder/"mine.csv").drop(columns="split").to_csv(folder/"mine.csv", index=False)
    with pytest.raises(ValueError, match="no column split: wanted one that says 'dev', or a file dev.csv"):
        read_table(folder, "dev", columns=OWN)

@pytest.mark.parametrize("how", ["blank", "absent", "own file"])
def test_a_split_that_nobody_has_answered(folder, how):
    "A test split beside the others: its questions are read, and whoever needs answers says so"
    table = pd.read_csv(folder/"mine.csv").fillna("")
    secret = table[table.split == "dev"].drop(columns="said").assign(split="test")
    if how == "own file": secret.drop(columns="split").to_csv(folder/"test.csv", index=False)
    elif how == "blank": pd.concat([table, secret.assign(said="")]).to_csv(folder/"mine.csv", index=False)
    else: secret.to_csv(folder/"mine.csv", index=False)
    if how == "own file": (folder/"mine.csv").unlink()
    test = read_table(folder, "test", columns=OWN, answers=None)
    assert len(test) == 10 and not {"answer", "answers"} & set(test)
    assert test.image_id.nunique() == 5 and test.question.tolist() == secret.q.tolist()
    alone = read_table(folder, "test", columns=OWN, answers=False)
    pd.testing.assert_frame_equal(alone, test)
    with pytest.raises(ValueError): read_table(folder, "test", columns=OWN)

def test_questions_alone_of_a_split_with_answers(folder):
    dev = read_table(folder, "dev", columns=OWN, answers=False)
    assert not {"answer", "answers"} & set(dev) and len(dev) == 10
    both = read_table(folder, "dev", columns=OWN, answers=None)
    assert both.answers.map(len).tolist() == [PEOPLE]*10

# ---- as a job ----------------------------------------------------------------------------------------------

def test_columns_are_settings(folder):
    data = Data(folder=str(folder), reader="table", columns=OWN)
    assert data.columns == tuple(WORDS) and columns_of(data.columns) == OWN
    assert read_settings(Data, json.loads(json.dumps(plain_settings(data)))) == data
    with pytest.raises(ValueError, match="beside reader 'okvqa'"): settings_of(Job, columns=OWN).items()
    with pytest.raises(ValueError, match="'question': wanted FIELD=NAME"): Data(reader="table", columns=["question"])
    door = read_door(["embed", "--data", str(folder), "--reader", "table", "--columns", *WORDS])
    assert columns_of(door.data.columns) == OWN

def test_a_job_reads_a_table(folder):
    job = settings_of(Job, data=str(folder/"mine.csv"), reader="table", columns=OWN, split="dev", lvlm="mock", K=4)
    items = job.items()
    assert items.split.value_counts().to_dict() == dict(train=30, dev=10)
    assert job.questions(items) == items.index[items.split == "dev"].tolist()
    assert change(job, images="none").items().image_path.isna().all()

def go(line, code=0):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        got = cli.main(line.split() if isinstance(line, str) else line)
    assert got == code, err.getvalue()
    return out.getvalue()

def test_from_a_csv_file_to_a_picked_prompt_in_the_shell(folder, monkeypatch):
    "What the data are is said once; every later door has it from the run"
    monkeypatch.chdir(folder)
    own = ["--data", "mine.csv", "--reader", "table", "--columns", *WORDS, "--K", "6", "--quiet"]
    counts = ["--counts", '{"beam": 2, "random": 4}', "--test", "0"]
    go(["generate", *own, *counts, "--out", "groups/train", "--lvlm", "mock"])
    go(["generate", *own, *counts, "--split", "dev", "--out", "groups/dev", "--lvlm", "mock"])
    go("check groups/train groups/dev")
    go("train groups/train --dev groups/dev --objective rce --epochs 1 --out ours --quiet")
    go("eval --selector ours --fixed 0 --draws 1 --out table --quiet")
    assert "ours" in set(pd.read_csv("table/results.csv").selector)
    go(["bank", "--source", "mine.csv", "--columns", *WORDS, "--out", "bank", "--quiet"])
    said = go("pick --question What is this? --image photos/1.jpg --bank bank --selector ours --openai")
    content = json.loads(said)[-1]["content"]
    assert [part["type"] for part in content].count("image_url") == 3
    assert "What is this?" in content[-1]["text"]
