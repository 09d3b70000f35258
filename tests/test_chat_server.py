"""The small chat server: each dialect in its own words, the numbers of the reference, what goes wrong on demand,
and nothing left behind
"""
import base64, http.client, json, os, socket, threading, time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from urllib.parse import urlsplit
import pytest, torch
from leverplus.chat_server import ChatServer, Fault, Generated, greedy_tokens, ids_inputs, read_chat, render_request
from leverplus.core import repo_path
from leverplus.data import read_okvqa
from leverplus.lvlm import NaiveScorer, Targets, load_lvlm, official_inputs, prompt_images, with_pixels
from leverplus.prompt import prompter

ANSWERS = "kiv", "gorp okel", "mot"
FLAT = tuple(1/len(ANSWERS) for _ in ANSWERS)
GREEDY = dict(model="tiny", temperature=0, max_tokens=10)
HELLO = GREEDY | dict(messages=[dict(role="user", content="a")])
CHAT = "/v1/chat/completions"
CLOSE = 1e-4 # the reference differs from itself by 1.5e-5 between batches of 1 and of 16

@pytest.fixture(scope="module")
def lvlm(): return load_lvlm(device="cpu")

@pytest.fixture(scope="module")
def prompts():
    "Prompts with two demonstrations, with one, with none, and in chat style"
    folder = repo_path("data", "islands")
    items = read_okvqa(folder, "train", images=folder/"images")
    ids = items.question_id.tolist()
    make, in_turns = prompter(items), prompter(items, "chat")
    blind = replace(make(ids[5], ids[6:7]), image=None)
    return [make(ids[0], ids[1:3]), make(ids[3], ids[4:5]), make(ids[7]), in_turns(ids[8], ids[9:11]), blind]

@pytest.fixture(scope="module")
def facts(lvlm, prompts):
    "What the reference says"
    return NaiveScorer(lvlm).run(prompts, [Targets(ANSWERS, FLAT)]*len(prompts))

@pytest.fixture(scope="module")
def server(lvlm):
    with ChatServer(lvlm) as server: yield server

@pytest.fixture(scope="module")
def sglang(lvlm):
    with ChatServer(lvlm, dialect="sglang") as server: yield server

def picture(path):
    with open(path, "rb") as file: data = file.read()
    return "data:image/png;base64," + base64.b64encode(data).decode()

def image(url): return dict(type="image_url", image_url=dict(url=url))
def text(said): return dict(type="text", text=said)
def says(answer): return dict(role="assistant", content=answer)

def chat_of(prompt, address=picture):
    "Messages of a prompt, as a request has them"
    messages = []
    for item in prompt.items:
        shown = [] if item.image is None else [image(address(item.image))]
        is_demo = item is not prompt
        shown.append(text(f"Question: {item.question} Short answer:"))
        if is_demo and prompt.style == "interleaved": shown[-1]["text"] += f" {item.answer}\n"
        if prompt.style == "interleaved" and messages: messages[0]["content"] += shown
        else: messages.append(dict(role="user", content=shown))
        if is_demo and prompt.style == "chat": messages.append(says(item.answer))
    return messages

def send(url, body=None, headers=()):
    "(status, answer, headers); no redirect is followed"
    where = urlsplit(url)
    connection = http.client.HTTPConnection(where.hostname, where.port, timeout=30)
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    try:
        headers = {"Content-Type": "application/json"} | dict(headers)
        connection.request("GET" if data is None else "POST", where.path, data, headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read()), dict(answer.getheaders())
    finally: connection.close()

def chat(server, messages, **body): return good(server.address + CHAT, GREEDY | dict(messages=messages) | body)

def good(url, body=None):
    status, answer, _ = send(url, body)
    assert status == 200, answer
    return answer

def refused(server, **body):
    "(status, message) of a request that must be refused"
    status, answer, _ = send(server.address + CHAT, HELLO | body)
    error = answer["error"]
    assert status == error["code"] and error["type"].endswith("Error")
    return status, error["message"]

# ---- messages ----------------------------------------------------------------------------------------------

def test_messages_are_rendered_as_our_own_scorers_render_them(lvlm, prompts):
    for prompt in prompts:
        messages, images = read_chat(chat_of(prompt))
        assert render_request(lvlm, messages) == lvlm.render(prompt)
        own = prompt_images(lvlm, prompt)
        assert [one.tobytes() for one in images] == [one.tobytes() for one in own]

def test_a_picture_comes_by_data_or_by_file(lvlm, server, prompts):
    by_data = chat(server, chat_of(prompts[0]), prompt_logprobs=0)
    by_file = chat(server, chat_of(prompts[0], lambda path: "file://" + os.path.abspath(path)), prompt_logprobs=0)
    assert by_data["prompt_logprobs"] == by_file["prompt_logprobs"]

def test_files_of_the_machine_may_be_closed(lvlm, prompts):
    messages = chat_of(prompts[0], lambda path: "file://" + os.path.abspath(path))
    with ChatServer(lvlm, local_files=False) as closed:
        status, message = refused(closed, messages=messages)
    assert status == 400 and "allowed-local-media-path" in message

def test_a_message_is_closed_left_open_or_followed_by_a_new_one(lvlm, prompts):
    messages, _ = read_chat(chat_of(prompts[2]))
    whole = [*messages, says("kiv")]
    prompt = render_request(lvlm, messages)
    assert render_request(lvlm, whole, add=False) == f"{prompt}kiv<|im_end|>\n"
    assert render_request(lvlm, whole, add=False, go_on=True) == f"{prompt}kiv"
    assert render_request(lvlm, whole) == f"{prompt}kiv<|im_end|>\n<|im_start|>assistant\n"

def test_tokens_become_the_inputs_that_their_text_becomes(lvlm, prompts):
    for prompt in prompts:
        rendered = lvlm.render(prompt)
        images = prompt_images(lvlm, prompt)
        of_text = official_inputs(lvlm, [rendered], [images])
        of_ids = ids_inputs(lvlm, lvlm.tokenizer(rendered)["input_ids"], images)
        assert of_text.keys() == of_ids.keys()
        assert all(torch.equal(of_text[name], of_ids[name]) for name in of_text)

# ---- vLLM --------------------------------------------------------------------------------------------------

def test_texts_are_those_of_the_reference(server, prompts, facts):
    said = [chat(server, chat_of(prompt))["choices"][0] for prompt in prompts]
    assert [one["message"]["content"] for one in said] == [fact.text for fact in facts]
    assert all(one["finish_reason"] == "stop" and one["stop_reason"] is None for one in said)

def closed_logprob(lvlm, server, prompt, answer):
    "By `prompt_logprobs` of a closed answer"
    n = len(lvlm.tokenizer(answer)["input_ids"]) + 1
    got = chat(server, [*chat_of(prompt), says(answer)], add_generation_prompt=False, prompt_logprobs=0, max_tokens=1)
    assert got["prompt_logprobs"][0] is None
    assert len(got["prompt_logprobs"]) == got["usage"]["prompt_tokens"]
    return sum(entry["logprob"] for each in got["prompt_logprobs"][-n - 1:-1] for entry in each.values())

def test_closed_answers_have_the_probability_of_the_reference(lvlm, server, prompts, facts):
    for prompt, fact in zip(prompts, facts):
        ours = [closed_logprob(lvlm, server, prompt, answer) for answer in ANSWERS]
        assert ours == pytest.approx(fact.logprobs, abs=CLOSE)

def listed(answer):
    "[{token: log-probability}] of the tokens listed at each generated one"
    content = answer["choices"][0]["logprobs"]["content"]
    return [{one["token"]: one["logprob"] for one in entry["top_logprobs"]} for entry in content]

def test_a_tree_of_steps_has_the_probability_of_the_reference(lvlm, server, prompts, facts):
    how = dict(logprobs=True, return_tokens_as_token_ids=True, max_tokens=1)
    opened = dict(add_generation_prompt=False, continue_final_message=True)
    for prompt, fact in zip(prompts, facts):
        for answer, reference in zip(ANSWERS, fact.logprobs):
            tokens = [*lvlm.tokenizer(answer)["input_ids"], lvlm.end_id]
            total = 0.
            for k, token in enumerate(tokens):
                so_far = [says(lvlm.tokenizer.decode(tokens[:k]))] if k else []
                body = how | (opened if k else {}) | dict(logprob_token_ids=[token])
                total += listed(chat(server, chat_of(prompt) + so_far, **body))[0][f"token_id:{token}"]
            assert total == pytest.approx(reference, abs=CLOSE)

def test_the_chosen_token_stands_first_then_those_that_were_named(server, prompts):
    how = dict(logprobs=True, return_tokens_as_token_ids=True, max_tokens=1, return_token_ids=True)
    got = chat(server, chat_of(prompts[0]), logprob_token_ids=[5, 336], **how)
    chosen = got["choices"][0]["token_ids"][0]
    assert list(listed(got)[0]) == [f"token_id:{chosen}", "token_id:5", "token_id:336"]
    got = chat(server, chat_of(prompts[0]), top_logprobs=3, **how)
    values = list(listed(got)[0].values())
    assert len(values) == 3 and values == sorted(values, reverse=True)
    got = chat(server, chat_of(prompts[0]), **how)
    assert listed(got) == [{}]

def test_the_end_is_among_the_tokens_and_not_in_the_text(lvlm, server, prompts):
    got = chat(server, chat_of(prompts[0]), logprobs=True, return_token_ids=True)
    choice = got["choices"][0]
    assert choice["token_ids"][-1] == lvlm.end_id
    assert choice["logprobs"]["content"][-1]["token"] == lvlm.end_token
    assert lvlm.end_token not in choice["message"]["content"]
    assert got["usage"]["completion_tokens"] == len(choice["token_ids"]) == len(choice["logprobs"]["content"])
    assert got["usage"]["total_tokens"] == len(got["prompt_token_ids"]) + len(choice["token_ids"])

def test_an_answer_ends_where_it_is_told_to(server, prompts):
    first = chat(server, chat_of(prompts[0]), return_token_ids=True)["choices"][0]["token_ids"][0]
    cut = chat(server, chat_of(prompts[0]), max_tokens=1)["choices"][0]
    assert cut["finish_reason"] == "length" and cut["message"]["content"]
    stopped = chat(server, chat_of(prompts[0]), stop_token_ids=[first], return_token_ids=True)["choices"][0]
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", first)
    assert stopped["message"]["content"] == "" and stopped["token_ids"] == [first]

def test_ranks_count_from_one_and_the_likeliest_is_listed(server, prompts):
    entries = chat(server, chat_of(prompts[2]), prompt_logprobs=1)["prompt_logprobs"][1:]
    for entry in entries:
        assert 1 <= len(entry) <= 2 and min(one["rank"] for one in entry.values()) == 1
        best = max(entry.values(), key=lambda one: one["logprob"])
        assert best["rank"] == 1

def test_another_picture_gives_other_numbers(lvlm, server, prompts):
    prompt, other = prompts[0], replace(prompts[0], image=prompts[1].image)
    here, there = (closed_logprob(lvlm, server, one, "kiv") for one in (prompt, other))
    assert abs(here - there) > 1e-3
    assert closed_logprob(lvlm, server, prompt, "kiv") == here # and it is not remembered

def test_the_image_budget_of_a_request(lvlm, server, prompts):
    budget = dict(max_pixels=28*28*4, min_pixels=28*28)
    assert "--trust-request-mm-kwargs" in refused(server, messages=chat_of(prompts[0]), mm_processor_kwargs=budget)[1]
    small = NaiveScorer(with_pixels(lvlm, **budget)).run([prompts[2]])[0]
    with ChatServer(lvlm, own_pixels=True) as trusting:
        got = chat(trusting, chat_of(prompts[2]), mm_processor_kwargs=dict(min_pixels=28*28, max_pixels=28*28))
        whole = chat(trusting, chat_of(prompts[2]), mm_processor_kwargs=budget)
        wrong = refused(trusting, messages=chat_of(prompts[2]), mm_processor_kwargs=dict(max_pixels=1))
    assert whole["choices"][0]["message"]["content"] == small.text
    assert got["usage"]["prompt_tokens"] < whole["usage"]["prompt_tokens"]
    assert wrong[0] == 400 and "one visual token" in wrong[1]

def test_what_it_says_of_itself(lvlm, server):
    assert good(server.address + "/version") == dict(version="0.32.0")
    assert send(server.address + "/health")[0] == 200
    card, = good(server.url + "/models")["data"]
    assert (card["id"], card["owned_by"], card["root"], card["max_model_len"]) == ("tiny", "vllm", lvlm.name, 512)
    with ChatServer(lvlm, "other", version="0.1", max_model_len=64) as odd:
        assert good(odd.address + "/version") == dict(version="0.1")
        card, = good(odd.url + "/models")["data"]
        assert (card["id"], card["max_model_len"]) == ("other", 64)
        said = good(odd.address + CHAT, HELLO | dict(model="other"))
        assert said["model"] == "other" and said["system_fingerprint"].startswith("vllm-0.1-")

@pytest.mark.parametrize("body, status, says", [
    (dict(model="large"), 404, "The model `large` does not exist"),
    (dict(temperature=.5), 400, "greedy only"),
    (dict(temperature=None), 400, "greedy only"),
    (dict(repetition_penalty=1.05), 400, "repetition_penalty 1.05"),
    (dict(n=2), 400, "n 2"),
    (dict(stream=True), 400, "stream True"),
    (dict(max_tokens=0), 400, "max_tokens must be at least 1"),
    (dict(max_tokens="four"), 400, "must be an integer"),
    (dict(max_tokens=513), 400, "max_tokens=513 cannot be greater than max_model_len=512"),
    (dict(prompt_logprobs=-1), 400, "prompt_logprobs"),
    (dict(prompt_logprobs=21), 400, "greater than max allowed: 20"),
    (dict(logprobs=True, top_logprobs=21), 400, "greater than max allowed: 20"),
    (dict(top_logprobs=2), 400, "`logprobs` must be set to true"),
    (dict(logprob_token_ids=[2]), 400, "`logprobs` must be set to true"),
    (dict(logprobs=True, logprob_token_ids=[99999]), 400, "Vocabulary size: 512"),
    (dict(logprobs=True, logprob_token_ids=["a"]), 400, "flat list of integers"),
    (dict(continue_final_message=True), 400, "are not compatible"),
    (dict(messages=[]), 400, "at least one message"),
    (dict(messages="hello"), 400, "wanted a list"),
    (dict(messages=[dict(role="user", content=[dict(type="video")])]), 400, "wanted a text, or an image_url"),
    (dict(messages=[dict(role="user", content=[image("data:image/png;base64,AAAA")])]), 400, "Failed to load image"),
    (dict(messages=[dict(role="user", content=[image("a.png")])]), 400, "must be either a HTTP, data or file URL"),
    (dict(messages=[dict(role="user", content=[image("http://127.0.0.1/a.png")])]), 400, "from the network"),
    (dict(messages=[dict(role="user", content=[image("file:///nowhere.png")])]), 500, "No such file"),
    (dict(messages=[dict(role="user", content="a b "*300)]), 400, "maximum context length is 512 tokens"),
])
def test_errors(server, body, status, says):
    got, message = refused(server, **body)
    assert got == status and says in message

def test_a_long_prompt_is_refused_with_both_lengths(server):
    _, message = refused(server, messages=[dict(role="user", content="a b "*300)])
    assert "512" in message and "contains" in message
    n = int(message.split("contains ")[1].split()[0])
    assert n > 512

def test_neutral_settings_and_unknown_ones_are_passed_over(server):
    neutral = dict(n=1, repetition_penalty=1., frequency_penalty=0, stream=False, stop=None)
    assert good(server.address + CHAT, HELLO | neutral | dict(seed=3, top_p=.5, nonsense=1))

def test_what_is_no_json_no_path_or_no_method(server):
    assert send(server.address + CHAT, b"{broken")[0] == 400
    assert send(server.address + CHAT, [1])[0] == 400
    _, answer, _ = send(server.address + CHAT, HELLO, {"Content-Type": "text/plain"})
    assert "Only 'application/json' is allowed" in answer["error"]["message"]
    assert send(server.address + CHAT, HELLO, {"Content-Type": "application/json; charset=utf-8"})[0] == 200
    assert send(server.address + CHAT)[:2] == (405, dict(detail="Method Not Allowed"))
    assert send(server.url + "/nothing", {})[:2] == (404, dict(detail="Not Found"))

def test_a_key(lvlm):
    with ChatServer(lvlm, key="sesame") as locked:
        assert send(locked.url + "/models")[:2] == (401, dict(error="Unauthorized"))
        assert send(locked.url + "/models", headers=dict(Authorization="Bearer other"))[0] == 401
        assert send(locked.url + "/models", headers=dict(Authorization="Bearer sesame"))[0] == 200
        assert send(locked.address + "/health")[0] == 200
        assert locked.requests[2].headers["authorization"] == "Bearer sesame"

# ---- SGLang ------------------------------------------------------------------------------------------------

def generate(server, **body):
    sampling = dict(temperature=0, max_new_tokens=body.pop("max_new_tokens", 1))
    return good(server.address + "/generate", dict(sampling_params=sampling) | body)

def test_sglang_gives_the_probability_of_the_reference(lvlm, sglang, prompts, facts):
    for prompt, fact in zip(prompts, facts):
        rendered = lvlm.render(prompt)
        pictures = [picture(path) for path in prompt.images]
        n = official_inputs(lvlm, [rendered], [prompt_images(lvlm, prompt)])["input_ids"].shape[1]
        for answer, reference in zip(ANSWERS, fact.logprobs):
            own = [*lvlm.tokenizer(answer)["input_ids"], lvlm.end_id]
            how = dict(image_data=pictures, return_logprob=True, logprob_start_len=n - 1)
            by_text = generate(sglang, text=rendered + answer + lvlm.end_token, **how)
            ids = [*lvlm.tokenizer(rendered)["input_ids"], *own]
            by_ids = generate(sglang, input_ids=ids, **how)
            values = by_text["meta_info"]["input_token_logprobs"]
            assert values == by_ids["meta_info"]["input_token_logprobs"]
            assert values[0][0] is None and [token for _, token, _ in values[1:]] == own
            assert sum(value for value, _, _ in values[1:]) == pytest.approx(reference, abs=CLOSE)
            assert by_text["meta_info"]["prompt_tokens"] == n + len(own)

def test_sglang_speaks_and_names_tokens(lvlm, sglang, prompts, facts):
    rendered = lvlm.render(prompts[0])
    pictures = [picture(path) for path in prompts[0].images]
    named = [lvlm.tokenizer(answer)["input_ids"][0] for answer in ANSWERS]
    how = dict(text=rendered, image_data=pictures, return_logprob=True, token_ids_logprob=named)
    got = generate(sglang, max_new_tokens=10, logprob_start_len=0, **how)
    meta = got["meta_info"]
    assert got["text"] == facts[0].text and got["output_ids"][-1] == lvlm.end_id
    assert meta["finish_reason"] == dict(type="stop", matched=lvlm.end_id)
    assert meta["completion_tokens"] == len(got["output_ids"]) == len(meta["output_token_logprobs"])
    assert len(meta["input_token_logprobs"]) == meta["prompt_tokens"] == len(meta["input_token_ids_logprobs"])
    assert meta["input_token_ids_logprobs"][0] is None
    first = {token: value for value, token, _ in meta["output_token_ids_logprobs"][0]}
    assert list(first) == named
    image_places = [token for _, token, _ in meta["input_token_logprobs"]].count(0)
    assert image_places >= 4*len(pictures) # pictures' tokens have the number 0
    spoken = generate(sglang, max_new_tokens=10, **how)["meta_info"]
    assert spoken["input_token_logprobs"] == [] and spoken["input_token_ids_logprobs"] == []
    assert "input_token_logprobs" not in generate(sglang, text=rendered, image_data=pictures)["meta_info"]
    nothing = generate(sglang, max_new_tokens=0, text=rendered, image_data=pictures)
    assert nothing["output_ids"] == [] and nothing["meta_info"]["finish_reason"] == dict(type="length", length=0)

def test_sglang_takes_tokens_without_a_picture(lvlm, sglang):
    ids = lvlm.tokenizer("Question: Name the colour. Short answer:")["input_ids"]
    how = dict(return_logprob=True, logprob_start_len=0)
    by_ids = generate(sglang, input_ids=ids, **how)["meta_info"]["input_token_logprobs"]
    by_text = generate(sglang, text=lvlm.tokenizer.decode(ids), **how)["meta_info"]["input_token_logprobs"]
    assert by_ids == by_text and [token for _, token, _ in by_ids] == ids

def test_sglang_chats_without_the_prompts_own_logprobs(lvlm, sglang, prompts, facts):
    got = chat(sglang, chat_of(prompts[0]), logprobs=True, top_logprobs=2, prompt_logprobs=0)
    choice = got["choices"][0]
    assert choice["message"]["content"] == facts[0].text and choice["matched_stop"] == lvlm.end_id
    assert len(listed(got)[0]) == 2 and "prompt_logprobs" not in got
    first = lvlm.tokenizer.decode(lvlm.tokenizer(facts[0].text)["input_ids"][:1])
    more = chat(sglang, [*chat_of(prompts[0]), says(first)], continue_final_message=True)
    assert first + more["choices"][0]["message"]["content"] == facts[0].text

def test_what_sglang_says_of_itself(lvlm, sglang):
    info = good(sglang.address + "/get_server_info")
    assert (info["version"], info["dtype"], info["model_path"]) == ("0.5.23", "float32", lvlm.name)
    assert info == good(sglang.address + "/server_info")
    assert good(sglang.address + "/get_model_info")["served_model_name"] == "tiny"
    assert good(sglang.url + "/models")["data"][0]["owned_by"] == "sglang"
    assert send(sglang.address + "/version")[0] == 404

@pytest.mark.parametrize("body, says", [
    (dict(), "Either text or input_ids"),
    (dict(text="a", input_ids=[1]), "Either text or input_ids"),
    (dict(text="a", image_data=["data:image/png;base64,AAAA"]), "Failed to load image"),
    (dict(text="<|vision_start|><|image_pad|><|vision_end|>"), "0 images for 1 image marks"),
    (dict(input_ids=[99999]), "out-of-vocab"),
    (dict(text="a", return_logprob=True, logprob_start_len=9), "higher than the number of input tokens"),
    (dict(text="a b "*300), "longer than the model's context length (512 tokens)"),
    (dict(text="a", sampling_params=dict(temperature=1)), "greedy only"),
    (dict(text="a", sampling_params=dict(temperature=0, max_new_tokens=512)), "exceeds the model's maximum context"),
])
def test_errors_of_sglang(sglang, body, says):
    sampling = dict(sampling_params=dict(temperature=0, max_new_tokens=1))
    status, answer, _ = send(sglang.address + "/generate", sampling | body)
    assert status == 400 and says in answer["error"]["message"]

def test_errors_of_sglangs_chat_are_flat(sglang):
    status, answer, _ = send(sglang.address + CHAT, GREEDY | dict(messages=[]))
    assert status == 400 and (answer["object"], answer["code"]) == ("error", 400)

# ---- plain -------------------------------------------------------------------------------------------------

def test_a_plain_server_says_texts_and_counts_only(lvlm, prompts, facts):
    with ChatServer(lvlm, dialect="plain") as plain:
        more = dict(logprobs=True, prompt_logprobs=0, return_token_ids=True, continue_final_message=True)
        got = chat(plain, chat_of(prompts[0]), **more)
        models = good(plain.url + "/models")
        assert send(plain.address + "/version")[0] == send(plain.address + "/get_server_info")[0] == 404
    assert got["choices"] == [dict(index=0, message=says(facts[0].text), finish_reason="stop")]
    assert set(got) == {"id", "object", "created", "model", "choices", "usage"}
    assert "root" not in models["data"][0] and "max_model_len" not in models["data"][0]

# ---- faults ------------------------------------------------------------------------------------------------

def with_fault(lvlm, fault, body=HELLO, **kw):
    "What a client gets from a server with this fault, and then without: the error's type if there is one"
    def faults(n, path, body): return fault if n == 0 else None
    with ChatServer(lvlm, faults=faults, **kw) as server:
        try: first = send(server.address + CHAT, body)
        except (http.client.HTTPException, OSError, ValueError) as e: first = type(e)
        assert send(server.address + CHAT, body)[0] == 200
        assert [received.path for received in server.requests] == [CHAT, CHAT]
    return first

@pytest.mark.parametrize("status", [401, 404, 429, 500, 503])
def test_a_status(lvlm, status):
    got, answer, _ = with_fault(lvlm, Fault(status))
    assert got == status and answer["error"]["code"] == status

def test_a_status_with_headers(lvlm):
    status, _, headers = with_fault(lvlm, Fault(429, headers={"Retry-After": "2"}))
    assert (status, headers["Retry-After"]) == (429, "2")
    status, _, headers = with_fault(lvlm, Fault(302, headers=dict(Location="http://127.0.0.1:9/v1")))
    assert (status, headers["Location"]) == (302, "http://127.0.0.1:9/v1")
    assert "Retry-After" not in with_fault(lvlm, Fault(429))[2]

def test_a_connection_that_is_cut(lvlm):
    assert with_fault(lvlm, Fault(cut="before")) is http.client.RemoteDisconnected
    assert with_fault(lvlm, Fault(cut="middle")) is http.client.IncompleteRead
    assert with_fault(lvlm, Fault(cut="reset")) in (ConnectionResetError, http.client.IncompleteRead)

def test_a_body_that_is_broken_or_too_short(lvlm):
    assert with_fault(lvlm, Fault(raw=b'{"choices": [')) is json.JSONDecodeError
    assert with_fault(lvlm, Fault(promised=10)) is http.client.IncompleteRead

def test_an_answer_that_is_changed(lvlm):
    def without_choices(answer): return {name: value for name, value in answer.items() if name != "choices"}
    assert "choices" not in with_fault(lvlm, Fault(change=without_choices))[1]
    assert with_fault(lvlm, Fault(change=lambda answer: answer | dict(model="b")))[1]["model"] == "b"

def test_models_can_be_changed_too(lvlm):
    def other(answer): return dict(object="list", data=[answer["data"][0] | dict(id="other")])
    with ChatServer(lvlm, faults=lambda n, path, body: Fault(change=other)) as server:
        assert good(server.url + "/models")["data"][0]["id"] == "other"

def test_a_delay_holds_up_its_own_request_only(lvlm):
    done = []
    def faults(n, path, body): return Fault(delay=.5) if body["user"] == "slow" else None
    with ChatServer(lvlm, faults=faults) as server:
        def ask(user):
            good(server.address + CHAT, HELLO | dict(user=user))
            done.append(user)
        with ThreadPoolExecutor(2) as pool:
            slow = pool.submit(ask, "slow")
            while not server.requests: time.sleep(.005)
            pool.submit(ask, "fast").result()
            slow.result()
        assert server.most_at_once == 2
    assert done == ["fast", "slow"]

def test_faults_know_number_path_and_body(lvlm):
    seen = []
    with ChatServer(lvlm, faults=lambda *asked: seen.append(asked)) as server:
        send(server.url + "/models")
        send(server.address + CHAT, HELLO)
    assert seen == [(0, "/v1/models", None), (1, CHAT, HELLO)]
    assert [(received.method, received.body) for received in server.requests] == [("GET", None), ("POST", HELLO)]

@pytest.mark.parametrize("wrong", [dict(cut="after"), dict(delay=-1), dict(promised=-1), dict(status=.5)])
def test_faults_that_are_none(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))): Fault(**wrong)

def test_somebody_else_may_answer(lvlm):
    def answers(path, body): return dict(path=path, asked=body["messages"])
    with ChatServer(lvlm, answers=answers) as server:
        assert good(server.address + CHAT, HELLO) == dict(path=CHAT, asked=HELLO["messages"])
        assert good(server.url + "/models")["data"]

def test_an_exception_is_told(lvlm):
    def answers(path, body): raise KeyError("no such thing")
    with ChatServer(lvlm, answers=answers) as server: status, answer, _ = send(server.address + CHAT, HELLO)
    assert status == 500 and "no such thing" in answer["error"]["message"]

# ---- the server --------------------------------------------------------------------------------------------

def test_many_requests_at_once_get_their_own_answers(lvlm, server, prompts, facts):
    rounds = [*range(len(prompts))]*4
    def ask(k): return closed_logprob(lvlm, server, prompts[k], "kiv")
    with ThreadPoolExecutor(8) as pool: got = list(pool.map(ask, rounds))
    assert got == pytest.approx([facts[k].logprobs[0] for k in rounds], abs=CLOSE)

def test_one_connection_serves_several_requests(server):
    connection = http.client.HTTPConnection("127.0.0.1", int(server.address.rpartition(":")[2]), timeout=30)
    for _ in range(3):
        connection.request("GET", "/version")
        assert json.loads(connection.getresponse().read()) == dict(version="0.32.0")
    connection.close()

def test_closing_leaves_neither_threads_nor_the_port(lvlm):
    before = set(threading.enumerate())
    with ChatServer(lvlm, faults=lambda n, path, body: Fault(delay=60) if body else None) as server:
        port = int(server.address.rpartition(":")[2])
        idle = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        idle.request("GET", "/version")
        idle.getresponse().read() # it stays open
        waiting = socket.create_connection(("127.0.0.1", port), timeout=30)
        body = json.dumps(HELLO).encode()
        waiting.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        while len(server.requests) < 2: time.sleep(.005)
    assert set(threading.enumerate()) <= before
    with pytest.raises(OSError): socket.create_connection(("127.0.0.1", port), timeout=5)
    idle.close()
    waiting.close()
    with pytest.raises(RuntimeError, match="not running"): server.url

def test_a_server_can_be_started_again_on_its_port(lvlm):
    with ChatServer(lvlm) as first: port = int(first.address.rpartition(":")[2])
    with ChatServer(lvlm, port=port) as second: assert second.address == f"http://127.0.0.1:{port}"
    with first: assert good(first.url + "/models")

def test_a_server_that_runs_is_not_started_twice(server):
    with pytest.raises(RuntimeError, match="runs already"): server.__enter__()

def test_an_error_in_the_block_closes_it_too(lvlm):
    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        with ChatServer(lvlm): raise KeyboardInterrupt
    assert set(threading.enumerate()) <= before

def test_wrong_settings_are_refused(lvlm):
    with pytest.raises(ValueError, match="wanted one of vllm, sglang, plain"): ChatServer(lvlm, dialect="tgi")
    with pytest.raises(ValueError, match="max_model_len 0"): ChatServer(lvlm, max_model_len=0)

def test_speaking_ends_at_most_where_it_must(lvlm, prompts):
    x = official_inputs(lvlm, [lvlm.render(prompts[0])], [prompt_images(lvlm, prompts[0])])
    assert greedy_tokens(lvlm, x, 0, {lvlm.end_id}) == Generated([], [], None)
    said = greedy_tokens(lvlm, x, 3, set())
    assert len(said.ids) == len(said.logprobs) == 3 and said.end is None

# ---- the real one ------------------------------------------------------------------------------------------

REAL = os.environ.get("LEVERPLUS_VLLM") # http://127.0.0.1:PORT of a vLLM that serves the tiny model as "tiny"

def unlike(ours, theirs, path=""):
    "Yield where two answers differ, but for what theirs has besides, times and names of answers, and rounding"
    if isinstance(ours, dict):
        for name, value in ours.items():
            if name in ("id", "created", "rank", "root"): continue
            if name in theirs: yield from unlike(value, theirs[name], f"{path}.{name}")
            else: yield f"{path}.{name} is missing"
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for one, other in zip(ours, theirs): yield from unlike(one, other, f"{path}[]")
    elif isinstance(ours, float) and isinstance(theirs, float):
        if abs(ours - theirs) > 1e-2: yield f"{path}: {ours} {theirs}"
    elif ours != theirs: yield f"{path}: {ours!r} {theirs!r}"

@pytest.mark.skipif(not REAL, reason="LEVERPLUS_VLLM names no server")
def test_as_a_real_vllm_says_it(server, prompts):
    closed = dict(add_generation_prompt=False, prompt_logprobs=0, max_tokens=1, return_token_ids=True)
    opened = dict(add_generation_prompt=False, continue_final_message=True, prompt_logprobs=2)
    named = dict(logprobs=True, logprob_token_ids=[5, 336], return_tokens_as_token_ids=True)
    for prompt in prompts:
        messages = chat_of(prompt)
        answered = [*messages, says("gorp okel")]
        bodies = [dict(messages=messages) | more for more in (dict(), named, dict(logprobs=True, top_logprobs=3))]
        bodies += [dict(messages=answered) | more for more in (closed, opened, dict(continue_final_message=True))]
        for body in bodies:
            ours, theirs = (send(where + CHAT, GREEDY | body) for where in (server.address, REAL))
            assert ours[0] == theirs[0] and not list(unlike(ours[1], theirs[1]))
