"What cannot be done is refused at the door: status 2, a line that names it, and nothing is written or touched"
import os
import pytest
from badlines import bad_lines, make_world, snapshot, what_is_wrong
from leverplus.doors import DOORS

LINES = list(bad_lines())

def test_there_are_enough_lines_each_once_and_for_every_command():
    assert len({tuple(words) for words, _ in LINES}) == len(LINES) >= 300
    assert {words[0] for words, _ in LINES} >= set(DOORS)
    assert all(named for _, named in LINES)

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "A folder with runs of every kind"
    folder = tmp_path_factory.mktemp("refused")
    was = os.getcwd()
    os.chdir(folder)
    try: make_world()
    finally: os.chdir(was)
    return folder

@pytest.mark.parametrize("door", [*DOORS, "trian"])
def test_a_bad_line_is_refused_without_a_trace(world, monkeypatch, door):
    monkeypatch.chdir(world)
    before = snapshot()
    wrong = []
    for words, named in LINES:
        if words[0] != door: continue
        why = what_is_wrong(words, named, before)
        if why: wrong.append(f"{' '.join(words)}: {why}")
        assert snapshot() == before, wrong
    assert not wrong, "\n".join(wrong)

def test_the_instrument_sees_what_is_not_refused(world, monkeypatch):
    monkeypatch.chdir(world)
    before = snapshot()
    assert what_is_wrong("check runs/train".split(), "runs/train", before).startswith("status 0")
    assert "does not name elsewhere" in what_is_wrong("check nowhere".split(), "elsewhere", before)
    (world/"trace").touch()
    assert "left a trace: ./trace" in what_is_wrong("check nowhere".split(), "nowhere", before)
    (world/"trace").unlink()

def test_a_refused_command_does_not_stand_in_the_way_of_the_right_one(world, monkeypatch):
    "As `infer --shots 9` did: its settings file refused the corrected command"
    from leverplus import cli
    monkeypatch.chdir(world)
    line = "infer --lvlm mock --selector runs/rce --limit 4 --quiet --out runs/corrected"
    assert cli.main([*line.split(), "--shots", "9"]) == 2
    assert not (world/"runs"/"corrected").exists()
    assert cli.main([*line.split(), "--shots", "2"]) == 0
