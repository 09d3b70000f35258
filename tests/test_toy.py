"The embedded world: dictionaries, annotators, episodes, files"
from collections import Counter
import numpy as np, pytest
from hypothesis import given, strategies as st
from PIL import Image
from leverplus.core import read_json, repo_path, rng
from leverplus.data import check_splits, read_okvqa
from leverplus.toy import (
    ASKS, COLOURS, DATASET, ISLANDS, NONCE, SHAPES, SIZE, Scene, annotators, dataset_dictionary, episode,
    helps, make_islands, random_dictionary, render, say,
)
from leverplus.vqa import vqa_accuracy

seeds = st.integers(0, 10**6)
scenes = st.builds(Scene, st.sampled_from(ISLANDS), st.sampled_from(SHAPES), st.sampled_from(COLOURS))

@given(seeds)
def test_dictionary_has_a_word_per_meaning(seed):
    words = random_dictionary(rng(seed))
    foreign = [w for i in ISLANDS[1:] for w in words[i].values()]
    assert sorted(foreign) == sorted(NONCE) and all(words[ISLANDS[0]][m] == m for m in SHAPES + COLOURS)

@given(seeds, scenes, st.sampled_from(ASKS))
def test_nothing_is_said_more_often_than_the_truth_which_scores_at_least_nine_tenths(seed, scene, ask):
    words = random_dictionary(rng(seed))
    answers = annotators(rng(seed, "a"), scene, ask, words)
    true = say(scene, ask, words)
    assert len(answers) == 10
    assert Counter(answers)[true] == max(Counter(answers).values()) >= 3
    assert vqa_accuracy(true, answers) >= 0.9 - 1e-9

def test_all_official_accuracies_occur():
    seen = {
        round(vqa_accuracy(a, answers), 1)
        for k in range(400)
        for answers in [annotators(rng(k), Scene("Koro", "circle", "red"), "both", dataset_dictionary())]
        for a in set(answers)
    }
    assert seen == {.3, .6, .9, 1.}

@given(seeds, st.integers(2, 4))
def test_helpful_episodes_give_the_answer_away(seed, n):
    demos, q = episode(rng(seed), n, p_help=1.)
    need = {"shape", "colour"} if q.ask == "both" else {q.ask}
    assert len(demos) == n and need <= set().union(*(helps(d, q) for d in demos))
    words = {w for d in demos if d.scene.island == q.scene.island for w in d.answer.split()}
    assert set(q.answer.split()) <= words

@given(seeds, scenes)
def test_pictures_have_size_and_vary(seed, scene):
    a, b = (np.array(render(scene, rng(seed, k))) for k in range(2))
    assert a.shape == (SIZE, SIZE, 3) and a.dtype == np.uint8 and (a != b).any()

def test_the_committed_world_is_the_generated_one(tmp_path):
    make_islands(tmp_path, dict(train=4, dev=2, test=2))
    here = repo_path(DATASET)
    for name in ("OpenEnded_mscoco_train2014_questions.json", "mscoco_train2014_annotations.json"):
        key = "questions" if "questions" in name else "annotations"
        assert read_json(tmp_path/name)[key] == read_json(here/name)[key][:8]
    for p in (tmp_path / "images").glob("*train*"):
        assert np.array_equal(np.array(Image.open(p)), np.array(Image.open(here / "images" / p.name)))

def test_splits_are_large_enough_and_disjoint():
    frames = {
        s: read_okvqa(repo_path(DATASET), s, images=repo_path(DATASET, "images"))
        for s in ("train", "dev", "test")
    }
    check_splits(**frames)
    assert len(frames["train"]) >= 800 and len(frames["test"]) >= 1000
    for f in frames.values(): assert set(f.question_type) == set(ASKS) and (f.answers.map(len) == 10).all()

def test_questions_do_not_tell_the_island():
    f = read_okvqa(repo_path(DATASET), "test")
    assert not f.question.str.contains("|".join(ISLANDS)).any()
