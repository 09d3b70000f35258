"""A model that answers elsewhere: exact where the server can be; nothing lost, doubled or mislabelled in any case"""
import json, os, signal, subprocess, sys, threading, time
from dataclasses import replace
from functools import partial
from pathlib import Path
import numpy as np, pandas as pd, pytest
from hypothesis import given, strategies as st
from leverplus.chat_server import ChatServer, Fault
from leverplus.cli import main
from leverplus.core import printable, read_json
from leverplus.groups import RLData
from leverplus.lvlm import NaiveScorer, Targets, compare, load_lvlm, with_pixels
from leverplus.prompt import Prompt, prompter
from leverplus.rldata_ask import FactCache, ask
from leverplus.vqa import answer_targets
from leverplus.world import read_islands
import leverplus.served as served_page
from leverplus.served import (
    KEY_VARIABLE, AtOnce, Missing, NoServer, WrongServer, Retrying, Sender, ServedScorer, NoAnswer,
    read_input_logprobs, read_next_logprobs, read_prompt_logprobs, read_said_text, retry_after, server_words,
)

ROOT = Path(__file__).resolve().parent.parent
CHAT = "/v1/chat/completions"
SOON = Retrying(timeout=20, patience=20, tries=4, first=.01, longest=.05)

@pytest.fixture(scope="module")
def lvlm(): return load_lvlm(device="cpu")

@pytest.fixture(scope="module")
def outline(): return load_lvlm(weights=False)

@pytest.fixture(scope="module")
def items(): return read_islands()

@pytest.fixture(scope="module")
def work(items):
    "(prompts of 0 to 3 demonstrations, their true answers)"
    train = items.index[items.split == "train"].tolist()
    make = prompter(items)
    prompts = [make(train[k], train[40 + 3*k : 40 + 3*k + k%4]) for k in range(10)]
    return prompts, [Targets(*answer_targets(items.at[p.question_id, "answers"])) for p in prompts]

@pytest.fixture(scope="module")
def naive(lvlm, work): return NaiveScorer(lvlm).run(*work)

def scorer_of(server, outline, **kw):
    return ServedScorer(server.url, lvlm=outline, **(dict(dtype="float32", retrying=SOON, at_once=4) | kw))

class Troubled:
    "A server that answers well until it is told what is to go wrong with the next requests"
    def __init__(self, lvlm, **kw):
        self.faults = []
        self.server = ChatServer(lvlm, faults=self._next, **kw)
        self._lock = threading.Lock()

    def _next(self, n, path, body):
        with self._lock:
            if not self.faults: return None
            once = not callable(self.faults[0])
            if once and path != CHAT: return None   # whether it is there is asked in between
            fault = self.faults.pop(0) if once else self.faults[0]
        return fault(n, path, body) if callable(fault) else fault

    def __enter__(self):
        self.server.__enter__()
        return self

    def __exit__(self, *error): self.server.__exit__(*error)

    @property
    def url(self): return self.server.url

@pytest.fixture(scope="module")
def vllm(lvlm):
    with ChatServer(lvlm) as server: yield server

# ---- facts -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dialect, way", [("vllm", "steps"), ("vllm", "prompt"), ("sglang", "input")])
@pytest.mark.parametrize("pictures", ["exact", "files", "paths"])
def test_facts_are_those_of_the_reference(lvlm, outline, work, naive, dialect, way, pictures):
    with ChatServer(lvlm, dialect=dialect) as server:
        said = scorer_of(server, outline, way=way, pictures=pictures).run(*work)
    found = compare(said, naive)
    assert (found["failed"], found["text"]) == (0, 0) and found["logprob"] < 1e-3
    assert np.allclose([s.gt_prob for s in said], [s.gt_prob for s in naive], atol=1e-4)

def test_many_at_once_and_one_at_a_time_say_the_same_in_the_same_order(vllm, outline, work, naive):
    prompts, targets = [some*3 for some in work]
    order = np.random.default_rng(0).permutation(len(prompts))
    prompts, targets = [[some[k] for k in order] for some in (prompts, targets)]
    many = scorer_of(vllm, outline, at_once=16).run(prompts, targets)
    assert [(s.question_id, s.pointer) for s in many] == [(p.question_id, p.pointer) for p in prompts]
    assert compare(many, [(naive*3)[k] for k in order])["logprob"] < 1e-3
    assert vllm.most_at_once > 1

def test_probabilities_without_a_text_and_texts_without_answers(vllm, outline, work, naive):
    scorer = scorer_of(vllm, outline)
    alone = scorer.run(*work, generate=False)
    assert all(s.text is None for s in alone)
    assert np.allclose([s.gt_prob for s in alone], [s.gt_prob for s in naive], atol=1e-4)
    texts = scorer.run(work[0])
    assert [s.text for s in texts] == [s.text for s in naive] and all(s.logprobs == () for s in texts)
    assert scorer.run([]) == []

def test_answers_within_a_character_are_asked_for_whole(vllm, outline, lvlm, work):
    "The tiny tokenizer writes what it has no word for byte by byte"
    words = ("é", "é à", "日本", "red")
    target = Targets(words, (1.,)*len(words))
    scorer = scorer_of(vllm, outline, way="steps")
    said = scorer.run(work[0][:2], [target]*2)
    want = NaiveScorer(lvlm).run(work[0][:2], [target]*2)
    assert compare(said, want)["failed"] == 0 and compare(said, want)["logprob"] < 1e-3
    sent = scorer.sender(work[0][0], target)
    assert not scorer._can_be_written(sent, sent.paths[0]) and scorer._can_be_written(sent, sent.paths[3])

def test_every_token_of_a_tree_is_one_request(vllm, outline, work):
    scorer = scorer_of(vllm, outline, way="steps")
    nodes = [len(scorer.sender(*asked).tree.tokens) for asked in zip(*work)]
    before = scorer.stats.requests
    scorer.run(*work)
    assert scorer.stats.requests - before == len(nodes) + sum(nodes)

def test_more_answers_than_one_request_asks_for(vllm, outline, lvlm, work, items, monkeypatch):
    monkeypatch.setattr(served_page, "MOST_TOKENS", 2)
    words = tuple(dict.fromkeys(items.answer))[:9]
    target = Targets(words, (1.,)*len(words))
    said = scorer_of(vllm, outline, way="steps").run(work[0][:1], [target])
    assert compare(said, NaiveScorer(lvlm).run(work[0][:1], [target]))["logprob"] < 1e-3

def test_the_same_words_with_another_picture_give_other_numbers(vllm, outline, lvlm, items, work):
    prompt = work[0][1]
    others = [path for path in dict.fromkeys(items.image_path) if path not in prompt.images][:4]
    prompts = [replace(prompt, image=path) for path in others]
    targets = [Targets(("red",), (1.,))]*len(prompts)
    said = scorer_of(vllm, outline).run(prompts, targets)
    assert compare(said, NaiveScorer(lvlm).run(prompts, targets))["logprob"] < 1e-3
    assert len({round(s.logprobs[0], 4) for s in said}) > 1

def test_a_picture_is_packed_once_and_its_content_counts(outline, tmp_path):
    from PIL import Image
    sender = Sender(outline)
    path = tmp_path/"a.png"
    Image.new("RGB", (60, 60), "red").save(path)
    prompt = Prompt(1, str(path), "What?")
    first = sender(prompt).messages
    assert sender(prompt).messages == first and len(sender.urls.kept) == 1
    Image.new("RGB", (60, 60), "blue").save(path)
    assert sender(prompt).messages != first
    sender.urls.max_bytes = 1
    sender(prompt)
    assert len(sender.urls.kept) == 1

# ---- servers that give less --------------------------------------------------------------------------------

def test_texts_alone(lvlm, outline, work, naive, items):
    with ChatServer(lvlm, dialect="plain") as server:
        scorer = scorer_of(server, outline)
        assert not scorer.probabilities and scorer.abilities.ways == ()
        said = scorer.run(*work)
        assert [s.text for s in said] == [s.text for s in naive]
        assert all(s.error is None and s.logprobs == () and np.isnan(s.gt_prob) for s in said)
        with pytest.raises(ValueError, match="gives no log-probabilities"): scorer.run(*work, generate=False)
        with pytest.raises(ValueError, match="gives no log-probabilities by way='prompt'"):
            scorer_of(server, outline, way="prompt")

def test_a_server_that_knows_no_field_of_others_is_asked_plainly(lvlm, outline, work, naive):
    "As `transformers serve`: 422 for what it does not know, and no list of models"
    known = {"model", "messages", "temperature", "max_tokens"}
    def strict(n, path, body):
        if path == "/v1/models": return Fault(status=500)
        if isinstance(body, dict) and set(body) - known: return Fault(status=422)
    with ChatServer(lvlm, dialect="plain", faults=strict) as server:
        scorer = scorer_of(server, outline, model="tiny")
        assert not scorer.abilities.neutral and scorer.identity["penalties"] == "as the server has them"
        assert [s.text for s in scorer.run(work[0])] == [s.text for s in naive]

def test_one_that_does_not_look_at_pictures_is_found_out(lvlm, outline, work):
    "A cache that forgets the picture: every picture is taken for the first that was seen"
    seen = []
    def blind(n, path, body):
        for turn in body["messages"] if isinstance(body, dict) and "messages" in body else []:
            for part in turn["content"] if isinstance(turn["content"], list) else []:
                if part["type"] != "image_url": continue
                seen.append(part["image_url"]["url"])
                part["image_url"]["url"] = seen[0]
    with ChatServer(lvlm, faults=blind) as server:
        scorer = scorer_of(server, outline)
        assert scorer.abilities.pictures == "alike"
        with pytest.raises(ValueError, match="says the same of two pictures"): scorer.run(*work)
        assert scorer.run([Prompt(1, None, "What?")])[0].error is None

def test_trouble_at_the_start_is_not_taken_for_what_a_server_cannot(lvlm, outline):
    "Else facts would have no probabilities because a connection was cut"
    def cut(n, path, body): return Fault(cut="reset") if isinstance(body, dict) and body.get("logprobs") else None
    with ChatServer(lvlm, faults=cut) as server:
        with pytest.raises(NoAnswer, match="the connection was cut"): scorer_of(server, outline)
    once = []
    def cut_once(n, path, body):
        if isinstance(body, dict) and body.get("logprobs") and not once:
            once.append(n)
            return Fault(cut="reset")
    with ChatServer(lvlm, faults=cut_once) as server:
        assert scorer_of(server, outline).abilities.ways == ("steps", "prompt")

def test_ways_that_disagree_are_found_out(lvlm, outline):
    def shifted(reply):
        for entry in reply.get("prompt_logprobs") or []:
            for told in (entry or {}).values(): told["logprob"] -= .02
        return reply
    with ChatServer(lvlm, faults=lambda n, path, body: Fault(change=shifted) if path == CHAT else None) as server:
        with pytest.raises(WrongServer, match="depends on how it is asked for"): scorer_of(server, outline)
        assert ServedScorer(server.url, lvlm=outline).tolerance == .5

# ---- what goes wrong ---------------------------------------------------------------------------------------

def without(*names):
    def change(reply):
        for choice in reply.get("choices", []):
            for name in names: choice.pop(name, None)
        return {k: v for k, v in reply.items() if k not in names}
    return change

PASSING = {
    "429": Fault(status=429),
    "429, with a time": Fault(status=429, headers={"Retry-After": "0.02"}),
    "429, with a date": Fault(status=429, headers={"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}),
    "500": Fault(status=500),
    "502": Fault(status=502),
    "503": Fault(status=503),
    "408": Fault(status=408),
    "cut before": Fault(cut="before"),
    "cut in the middle": Fault(cut="middle"),
    "reset": Fault(cut="reset"),
    "broken": Fault(raw=b'{"choices": [{"message": '),
    "no JSON": Fault(raw=b"<html>502 Bad Gateway</html>"),
    "no text": Fault(raw=b"\xff\xfe\x00"),
    "a list": Fault(raw=b"[]"),
    "nothing": Fault(raw=b""),
    "cut short": Fault(promised=1000),
    "no choices": Fault(change=without("choices", "prompt_logprobs")),
    "no log-probabilities": Fault(change=without("logprobs", "prompt_logprobs", "token_ids", "message")),
}

@pytest.mark.parametrize("way", ["steps", "prompt"])
@pytest.mark.parametrize("name", PASSING)
def test_what_passes_costs_nothing(lvlm, outline, work, naive, name, way):
    with Troubled(lvlm) as server:
        scorer = scorer_of(server, outline, way=way)
        server.faults = [PASSING[name]]*3
        said = scorer.run(*[some[:4] for some in work])
    assert compare(said, naive[:4])["failed"] == 0 and compare(said, naive[:4])["text"] == 0
    assert compare(said, naive[:4])["logprob"] < 1e-3
    assert [s.question_id for s in said] == [p.question_id for p in work[0][:4]]
    assert scorer.stats.retries == 3

def test_a_prompt_that_never_passes_is_a_failed_row_and_no_other(lvlm, outline, work, naive):
    bad = work[0][2]
    def poisoned(n, path, body):
        return Fault(status=500) if _asks_about(body, bad) else None
    with Troubled(lvlm) as server:
        scorer = scorer_of(server, outline)
        server.faults = [poisoned]
        said = scorer.run(*work)
    failed = [k for k, s in enumerate(said) if s.error]
    same = [k for k, p in enumerate(work[0]) if len(p.images) == len(bad.images) and p.question == bad.question]
    assert failed and set(failed) <= set(same) and 2 in failed
    assert said[2].error.startswith("500: ") and "4 tries" in said[2].error
    good = [k for k in range(len(said)) if k not in failed]
    assert compare([said[k] for k in good], [naive[k] for k in good])["logprob"] < 1e-3

def _asks_about(body, prompt):
    "Is a request about a prompt? Its pictures are as many, its last question is the same"
    if not isinstance(body, dict) or "messages" not in body: return False
    parts = [p for turn in body["messages"] if isinstance(turn["content"], list) for p in turn["content"]]
    texts = [p["text"] for p in parts if p["type"] == "text"]
    pictures = [p for p in parts if p["type"] == "image_url"]
    return bool(texts) and prompt.question in texts[-1] and len(pictures) == len(prompt.images)

def test_what_is_ours_is_not_tried_again(lvlm, outline, work, items):
    "A prompt that is too long and a picture that is not there are failed rows with the reason"
    with ChatServer(lvlm, max_model_len=120) as server:
        scorer = scorer_of(server, outline)
        make = prompter(items)
        train = items.index[items.split == "train"].tolist()
        long = make(train[0], train[1:9])
        gone = replace(work[0][0], image="/nowhere.png")
        said = scorer.run([long, gone, work[0][0]], [work[1][0]]*3)
        assert "400: " in said[0].error and "120" in said[0].error
        assert "BadPicture" in said[1].error or "NoPicture" in said[1].error
        assert said[2].error is None and scorer.stats.retries == 0

ENDING = {
    "no key": (Fault(status=401), "wants a key, in the environment variable LVLM_API_KEY"),
    "another key": (Fault(status=403), "LVLM_API_KEY"),
    "no such path": (Fault(status=404), "refuses"),
    "redirect": (Fault(status=302, headers={"Location": "http://127.0.0.1:9/"}), "sends on to another address"),
    "for good": (Fault(status=308, headers={"Location": "http://example.org/"}), "none is followed"),
    "another model": (Fault(change=lambda reply: reply | dict(model="other")), "something else is served there now"),
    "another engine": (Fault(change=lambda reply: reply | dict(system_fingerprint="vllm-0.33")), "something else"),
}

@pytest.mark.parametrize("name", ENDING)
def test_what_would_befall_every_prompt_ends_the_run(lvlm, outline, work, name, monkeypatch):
    fault, words = ENDING[name]
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    with Troubled(lvlm) as server:
        scorer = scorer_of(server, outline)
        before = len(server.server.requests)
        server.faults = [lambda n, path, body: fault]
        with pytest.raises(WrongServer, match=words): scorer.run(*work)
        assert len(server.server.requests) - before <= 8

def test_a_forwarder_in_front_of_nobody_is_away(lvlm, outline, work, naive):
    "It takes connections and cuts them: the server behind restarts, and no row is lost"
    with Troubled(lvlm) as server:
        scorer = scorer_of(server, outline)
        until = time.monotonic() + 1
        server.faults = [lambda n, path, body: Fault(cut="reset") if time.monotonic() < until else None]
        said = scorer.run(*work)
        assert compare(said, naive)["failed"] == 0 and scorer.stats.retries > SOON.tries
        server.faults = [lambda n, path, body: Fault(cut="before")]
        scorer.connection.retrying = replace(SOON, patience=.3)
        with pytest.raises(NoServer, match="the connection was cut"): scorer.run(*work)

@pytest.mark.parametrize("status", [502, 504])
def test_a_prompt_that_a_proxy_never_passes_on_is_a_failed_row(lvlm, outline, work, status):
    bad = work[0][2]
    with Troubled(lvlm) as server:
        scorer = scorer_of(server, outline)
        server.faults = [lambda n, path, body: Fault(status=status) if _asks_about(body, bad) else None]
        said = scorer.run(*work)
    assert said[2].error.startswith(f"{status}: ") and any(s.error is None for s in said)

def test_two_runs_of_one_scorer_wait_for_each_other(vllm, outline, work, naive):
    scorer = scorer_of(vllm, outline)
    out = [None, None]
    def run(k): out[k] = scorer.run(*work)
    threads = [threading.Thread(target=run, args=(k,)) for k in (0, 1)]
    for thread in threads: thread.start()
    for thread in threads: thread.join(60)
    for said in out: assert compare(said, naive)["failed"] == 0 and compare(said, naive)["logprob"] < 1e-3

def test_other_tokens_of_the_same_number_are_noticed(lvlm, outline, work):
    "In every reply, not only when the scorer is made"
    def swapped(reply):
        ids = reply.get("prompt_token_ids")
        if ids: ids[-3], ids[-4] = ids[-4], ids[-3]
        return reply
    with Troubled(lvlm) as server:
        scorer = scorer_of(server, outline)
        server.faults = [lambda n, path, body: Fault(change=swapped)]
        said = scorer.run(*[some[:2] for some in work])
    assert all("sees other tokens" in s.error for s in said)

def test_an_answer_that_ends_at_once_is_an_empty_text():
    message = dict(role="assistant", content=None)
    assert read_said_text(dict(choices=[dict(message=message, finish_reason="stop")])) == ""
    with pytest.raises(Missing): read_said_text(dict(choices=[dict(message=message, finish_reason="length")]))

def test_nothing_that_was_not_compared_shows_that_models_are_the_same(lvlm, outline, work):
    with ChatServer(lvlm, dialect="plain") as plain:
        with pytest.raises(ValueError, match="gives texts alone"): scorer_of(plain, outline).prove_same(*work)
    def nonsense(reply):
        for choice in reply.get("choices", []): choice |= dict(message=dict(content="nonsense"), token_ids=[336])
        return reply
    with Troubled(lvlm) as server:
        scorer = scorer_of(server, outline, dtype=None)
        own = scorer.fingerprint
        with pytest.raises(ValueError, match="do not agree"): scorer.prove_same(work[0], None)
        with pytest.raises(ValueError, match="do not agree"): scorer.prove_same([], [])
        server.faults = [lambda n, path, body: Fault(change=nonsense)]
        with pytest.raises(ValueError, match="do not agree"): scorer.prove_same(*work)
    assert scorer.fingerprint == own

def test_a_server_that_stays_away_ends_the_run(lvlm, outline, work):
    with ChatServer(lvlm) as server:
        scorer = scorer_of(server, outline, retrying=replace(SOON, patience=.3))
        url = server.url
    began = time.monotonic()
    with pytest.raises(NoServer, match="no connection, for .* s. Is it running"): scorer.run(*work)
    assert url in str(pytest.raises(NoServer, scorer.run, *work).value)
    assert time.monotonic() - began < 20
    with pytest.raises(NoServer): ServedScorer(url, lvlm=outline, retrying=replace(SOON, patience=.2))

def test_a_server_that_restarts_is_waited_for(lvlm, outline, work, naive):
    server = ChatServer(lvlm)
    server.__enter__()
    port = int(server.url.split(":")[2].split("/")[0])
    scorer = scorer_of(server, outline, at_once=2)
    again = ChatServer(lvlm, port=port)
    def restart():
        while len(server.requests) < 30: time.sleep(.005)
        server.__exit__(None, None, None)
        time.sleep(.3)
        again.__enter__()
    thread = threading.Thread(target=restart)
    thread.start()
    try: said = scorer.run(*work)
    finally:
        thread.join()
        again.__exit__(None, None, None)
    assert compare(said, naive)["failed"] == 0 and compare(said, naive)["logprob"] < 1e-3
    assert scorer.stats.retries > 0 and again.requests

def test_a_restart_does_not_slow_down_what_follows(lvlm, outline, work):
    "A server that is not there says nothing about how much it can do"
    server = ChatServer(lvlm)
    server.__enter__()
    port = int(server.url.split(":")[2].split("/")[0])
    scorer = scorer_of(server, outline, at_once=None)
    server.__exit__(None, None, None)
    thread = threading.Timer(.3, server.__enter__)
    server.port = port
    thread.start()
    try: said = scorer.run(*work)
    finally:
        thread.join()
        server.__exit__(None, None, None)
    assert not any(s.error for s in said) and scorer.connection.at_once.now >= 4

def test_a_slow_answer_is_given_up_and_asked_for_again(lvlm, outline, work, naive):
    with Troubled(lvlm) as server:
        scorer = scorer_of(server, outline, retrying=replace(SOON, timeout=1.))
        server.faults = [Fault(delay=3.)]
        said = scorer.run(*[some[:2] for some in work])
    assert compare(said, naive[:2])["failed"] == 0 and scorer.stats.retries >= 1

def test_numbers_that_are_none_are_no_facts(lvlm, outline, work):
    def floored(reply):
        for choice in reply["choices"]:
            for told in (choice.get("logprobs") or {}).get("content", []):
                told["logprob"] = -9999.
                for other in told["top_logprobs"]: other["logprob"] = -9999.
        return reply
    with Troubled(lvlm) as server:
        scorer = scorer_of(server, outline, way="steps")
        server.faults = [lambda n, path, body: Fault(change=floored) if path == CHAT else None]
        said = scorer.run(*[some[:2] for some in work])
    assert all("not finite numbers" in s.error for s in said)

def test_a_stop_leaves_no_thread_and_no_connection(lvlm, outline, work):
    with Troubled(lvlm) as server:
        scorer = scorer_of(server, outline, at_once=8)
        before = threading.active_count()
        server.faults = [Fault(status=401)]
        with pytest.raises(WrongServer): scorer.run(*work)
        deadline = time.monotonic() + 10
        while server.server._at_once and time.monotonic() < deadline: time.sleep(.01)
        mine = [t for t in threading.enumerate() if "portal" in t.name.lower()]
        assert not mine

def test_an_interrupt_ends_a_run_at_once(lvlm, outline, work, tmp_path):
    "Ctrl-C in a process that waits for a server which takes its time"
    is_ready = threading.Event()
    def slow(n, path, body): return Fault(delay=30.) if is_ready.is_set() else None
    code = (
        "import signal, sys, leverplus.served as s\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from leverplus.lvlm import load_lvlm\n"
        "from leverplus.prompt import Prompt\n"
        "scorer = s.ServedScorer(sys.argv[1], lvlm=load_lvlm(weights=False))\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "try: scorer.run([Prompt(k, None, f'What {k}?') for k in range(50)])\n"
        "except KeyboardInterrupt: print('interrupted', flush=True)\n"
    )
    with ChatServer(lvlm, faults=slow) as server:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        words = [sys.executable, "-W", "ignore", "-c", code, server.url]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        process = subprocess.Popen(words, env=env, cwd=ROOT, **pipes)
        assert process.stdout.readline() == "ready\n"
        is_ready.set()
        before = len(server.requests)
        process.stdin.write("go\n")
        process.stdin.flush()
        while len(server.requests) < before + 3 and process.poll() is None: time.sleep(.02)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=20)
    assert said == "interrupted\n" and process.returncode == 0

# ---- the door ----------------------------------------------------------------------------------------------

ECHOES = {
    "refused": Fault(status=400, raw=b'{"error": {"message": "no room for sk-very-secret"}}'),
    "text": Fault(raw=b"headers: Bearer sk-very-secret"),
    "object": Fault(raw=b'{"echo": "Bearer sk-very-secret"}'),
}

@pytest.mark.parametrize("name", ECHOES)
def test_a_key_that_a_server_repeats_is_not_written(lvlm, outline, work, monkeypatch, name):
    monkeypatch.setenv(KEY_VARIABLE, "sk-very-secret")
    with Troubled(lvlm) as server:
        scorer = scorer_of(server, outline)
        server.faults = [lambda n, path, body: ECHOES[name]]
        said = scorer.run(*[some[:2] for some in work])
    assert all("***" in s.error and "secret" not in s.error for s in said)
    assert not hasattr(scorer.connection, "_client")

def test_a_key_goes_to_the_server_and_nowhere_else(lvlm, outline, work, monkeypatch, tmp_path):
    monkeypatch.setenv(KEY_VARIABLE, "sk-very-secret")
    def leaks(n, path, body):
        return Fault(status=400, raw=b'{"error": {"message": "no room for sk-very-secret"}}') if n > 20 else None
    with ChatServer(lvlm, key="sk-very-secret", faults=leaks) as server:
        scorer = scorer_of(server, outline)
        said = scorer.run(*work)
        assert all(r.headers["authorization"] == "Bearer sk-very-secret" for r in server.requests)
    told = repr(said) + repr(scorer) + json.dumps(scorer.identity) + scorer.fingerprint
    assert any(s.error and "***" in s.error for s in said) and "secret" not in told
    monkeypatch.delenv(KEY_VARIABLE)
    with ChatServer(lvlm, key="sk-very-secret") as server:
        with pytest.raises(WrongServer, match="wants a key"): scorer_of(server, outline, model="tiny")

def test_proxies_of_the_environment_are_not_asked(vllm, outline, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"): monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert scorer_of(vllm, outline).probabilities

def test_who_answers_is_in_the_fingerprint(lvlm, outline):
    def of(outline=outline, kw={}, **server):
        with ChatServer(lvlm, **server) as s: return scorer_of(s, outline, **kw).fingerprint
    one = of()
    assert one == of() and len(one) == 16
    others = [
        of(version="0.33.0"), of(name="other"), of(kw=dict(dtype="bfloat16")), of(kw=dict(pictures="files")),
        of(kw=dict(max_new_tokens=5)), of(dialect="sglang"), NaiveScorer(lvlm).fingerprint,
    ]
    assert len({one, *others}) == len(others) + 1

def test_another_model_is_refused_before_anything_is_asked(vllm, outline):
    with pytest.raises(WrongServer, match="serves no 'nobody', but tiny"): scorer_of(vllm, outline, model="nobody")
    parrot = load_lvlm(weights=False)
    parrot.tokenizer.chat_template = parrot.tokenizer.chat_template.replace("helpful assistant", "parrot")
    with pytest.raises(WrongServer, match="another chat template"): scorer_of(vllm, parrot)
    small = with_pixels(outline, max_pixels=56*56)
    with pytest.raises(WrongServer, match="image budget. vLLM is told"): scorer_of(vllm, small)
    for address in ("ftp://127.0.0.1/v1", "http://user:s3cret@127.0.0.1/v1", "127.0.0.1:8000", ""):
        with pytest.raises(ValueError) as e: ServedScorer(address, lvlm=outline)
        assert "s3cret" not in str(e.value)

def test_facts_do_not_mix_unless_the_models_are_shown_to_be_one(vllm, lvlm, outline, work, items):
    pairs = pd.DataFrame(dict(question_id=[p.question_id for p in work[0]], pointer=[p.pointer for p in work[0]]))
    cache = FactCache()
    ask(pairs, NaiveScorer(lvlm), items, cache)
    scorer = scorer_of(vllm, outline)
    before = scorer.stats.prompts
    facts = ask(pairs, scorer, items, cache)
    assert scorer.stats.prompts - before == len(pairs) and len(cache.scorers) == 2
    assert not facts.eval_failed.any()
    found = scorer.prove_same(*[some[:3] for some in work])
    assert found["failed"] == 0
    asked = scorer.stats.prompts
    again = ask(pairs, scorer, items, cache)
    assert scorer.stats.prompts == asked and np.allclose(again.vqa_gt_prob, facts.vqa_gt_prob, atol=1e-4)
    louder = load_lvlm(device="cpu")
    louder.model.lm_head.weight.mul_(1.5)
    other = scorer_of(vllm, louder)
    with pytest.raises(ValueError, match="do not agree"): other.prove_same(*[some[:3] for some in work])
    assert other.fingerprint != NaiveScorer(louder).fingerprint

# ---- parts -------------------------------------------------------------------------------------------------

def test_waits_are_neither_nothing_nor_endless():
    retrying = Retrying(patience=5.)
    assert retrying.wait(3, 0.) > 0 and retrying.wait(1, 1e9) == 5 and 0 < retrying.wait(10_000) <= retrying.longest

@given(st.one_of(st.none(), st.text(), st.floats().map(str), st.integers().map(str)))
def test_any_retry_after_is_a_time_or_nothing(text):
    wait = retry_after(text)
    assert wait is None or wait >= 0
    assert 0 <= Retrying(patience=5.).wait(1, wait if wait is None else min(wait, 1e300)) <= 30

@given(st.integers(400, 599), st.one_of(st.text(), st.binary().map(repr), st.just('{"error": {"message": ["x"]}}')))
def test_words_of_a_server_are_one_line_that_can_be_printed(status, text):
    with pytest.MonkeyPatch.context() as m:
        m.setenv(KEY_VARIABLE, "key-1")
        words = server_words(status, text + " key-1")
    assert printable(words) == words and "key-1" not in words and len(words) <= 410

NAMES = (
    "choices", "message", "content", "logprobs", "token", "logprob", "top_logprobs", "prompt_logprobs", "meta_info",
    "input_token_logprobs", "token_ids", "7",
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(
        st.sampled_from(NAMES), inner, max_size=4)),
    max_leaves=12)

@given(st.dictionaries(st.sampled_from(["choices", "prompt_logprobs", "meta_info", "usage"]), JSON, max_size=4))
def test_any_reply_is_read_or_lacks_something(reply):
    reads = (
        read_said_text, read_next_logprobs,
        partial(read_prompt_logprobs, at=1, ids=[7]), partial(read_input_logprobs, ids=[7]),
    )
    for read in reads:
        try: read(reply)
        except Missing: pass

def test_throughput_decides_how_many_are_asked_at_once():
    for most_that_helps in (1, 2, 8, 64):
        now = [0.]
        at_once = AtOnce(first=2, clock=lambda: now[0])
        for _ in range(20_000):
            if at_once.settled: break
            now[0] += 1/min(at_once.now, most_that_helps)
            at_once.answered()
        assert at_once.settled and at_once.now == max(2, most_that_helps)
    for _ in range(20): at_once.too_many()   # all that were under way say so: it counts once
    assert (at_once.now, at_once.most, at_once.settled) == (32, 48, False)
    for _ in range(1000):
        now[0] += 1/min(at_once.now, 64)
        at_once.answered()
    assert (at_once.now, at_once.settled) == (48, True)
    fixed = AtOnce(7)
    fixed.too_many()
    assert fixed.now == 7 and fixed.settled

# ---- kills -------------------------------------------------------------------------------------------------

def leverplus(*words, **kw):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "leverplus", *map(str, words)]
    return subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw)

def here(*words):
    "The same in this process: its exit status"
    return main([*map(str, words), "--quiet"])

def parts_of(path): return list(path.glob("part-*.parquet"))

def rows_of(path):
    rows = RLData.load(path).rows
    return rows.set_index(["question_id", rows.pointer.map(tuple)]).sort_index().drop(columns="pointer")

def test_a_client_that_is_killed_goes_on_where_it_was(lvlm, outline, tmp_path):
    "Kill -9, an interrupt, a server with troubles, two shards: the same rows as of a calm run, each once"
    some = ("--limit", 6, "--window", 1, "--test", 0, "--K", 8, "--counts", '{"beam": 3}', "--store", tmp_path/"store")
    def trouble(n, path, body):
        if path != CHAT or n%29 or not is_troubled.is_set(): return None
        return [Fault(status=429), Fault(cut="middle"), Fault(status=500), Fault(raw=b"{")][n//29%4]
    is_troubled = threading.Event()
    with ChatServer(lvlm, faults=trouble) as server:
        at = ("generate", "--lvlm-url", server.url, "--dtype", "float32", *some)
        assert here(*at, "--out", tmp_path/"calm") == 0
        is_troubled.set()
        for number in (signal.SIGKILL, signal.SIGINT):
            running = leverplus(*at, "--out", tmp_path/"killed")
            before = len(parts_of(tmp_path/"killed"))
            while running.poll() is None and len(parts_of(tmp_path/"killed")) <= before: time.sleep(.01)
            running.send_signal(number)
            running.communicate(timeout=60)
        assert here(*at, "--out", tmp_path/"killed") == 0
        for i in (0, 1): assert here(*at, "--out", tmp_path/"shards", "--shard", f"{i}/2") == 0
    found = read_json(tmp_path/"calm/manifest.json")["lvlm"]
    assert found["can"]["ways"] == ["steps", "prompt"] and found["server"]["engine"] == "vllm"
    assert len(found["probe"]) == 3
    want = rows_of(tmp_path/"calm")
    assert len(want) and want.index.is_unique and not want.eval_failed.any()
    for name in ("killed", "shards"):
        got = rows_of(tmp_path/name)
        assert got.index.equals(want.index), name
        assert (got.vqa_raw_generation == want.vqa_raw_generation).all() and (got.scorer == want.scorer).all()
        assert np.allclose(got.vqa_gt_prob, want.vqa_gt_prob, atol=1e-6)
