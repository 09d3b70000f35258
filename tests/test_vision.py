"Images: each encoded once, whatever the batch, the budget or the process; grouped attention is the loop over windows"
import json, subprocess, sys, warnings
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from leverplus.pictures import picture_key
from leverplus.tiny import tiny_qwen
from leverplus.vision import (
    VisionCache, VisionEncoder, grouped_windows, image_features, open_resized, out_of_memory, patch_side,
)

@pytest.fixture(scope="module")
def lv(): return tiny_qwen(seed=1)

@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    "Pictures of many sizes and shapes, some with several windows of 56 x 56 pixels"
    d = tmp_path_factory.mktemp("pictures")
    g = np.random.default_rng(0)
    out = []
    sizes = [(56, 56), (56, 56), (84, 56), (56, 140), (112, 84), (200, 60), (30, 30), (224, 112), (57, 99)]
    for i, (w, h) in enumerate(sizes):
        out.append(str(d / f"{i}.png"))
        Image.fromarray(g.integers(256, size=(h, w, 3), dtype=np.uint8)).save(out[-1])
    return out

def encoder(lv, **kw):
    cache = {k: kw.pop(k) for k in ("max_bytes", "folder", "shard_bytes") if k in kw}
    return VisionEncoder(lv.model, lv.image_processor, VisionCache(lv.vision_fingerprint, **cache), **kw)

def by_hand(lv, path):
    x = lv.image_processor(images=[open_resized(path)], return_tensors="pt")
    features = image_features(lv.model, x["pixel_values"], x["image_grid_thw"])
    return features[0], tuple(x["image_grid_thw"][0].tolist())

def close(a, b): return float((a - b).abs().max()) < 1e-4

@pytest.mark.parametrize(
    "kw", [{}, dict(patches=1), dict(patches=40, threads=1), dict(group=False), dict(max_bytes=1)]
)
def test_features_are_those_of_the_tower_alone(lv, pictures, kw):
    enc = encoder(lv, **kw)
    for _ in range(2):
        out = enc(pictures)
        for p in pictures:
            f, (t, h, w) = by_hand(lv, p)
            assert close(out[p][0], f) and out[p][1] == (t, h // 2, w // 2) and len(f) == t * h * w // 4
    assert enc.counts["failed"] == 0

@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(2, 6), st.integers(2, 6)), min_size=1, max_size=4), st.integers(0, 99))
def test_grouped_windows_are_the_loop_over_windows(grids, seed):
    lv = _lv()
    grid = torch.tensor([[1, 2 * h, 2 * w] for h, w in grids])
    g = torch.Generator().manual_seed(seed)
    px = torch.randn(int(grid.prod(1).sum()), 3 * 2 * 14 * 14, generator=g)
    plain = image_features(lv.model, px, grid)
    with grouped_windows(lv.model.model.visual): grouped = image_features(lv.model, px, grid)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(plain, grouped))
    assert lv.model.model.visual.config._attn_implementation == "sdpa"

_cache = {}
def _lv(): return _cache.setdefault("lv", tiny_qwen(seed=1))

def test_grouping_that_does_not_hold_is_switched_off_with_a_warning(lv, pictures, monkeypatch):
    import leverplus.vision as mod
    monkeypatch.setattr(mod, "grouped_sdpa", lambda q, *a, **k: q.transpose(1, 2))
    enc = encoder(lv)
    with pytest.warns(UserWarning, match="switched off"): out = enc(pictures[:3])
    assert not enc.group and close(out[pictures[0]][0], by_hand(lv, pictures[0])[0])

def test_same_bytes_are_one_image_and_a_changed_file_is_a_new_one(lv, pictures, tmp_path):
    a, b = tmp_path / "a.png", tmp_path / "b.png"
    raw = open(pictures[3], "rb").read()
    a.write_bytes(raw)
    b.write_bytes(raw)
    enc = encoder(lv)
    out = enc([str(a), str(b), str(a)])
    assert out[str(a)][2] == out[str(b)][2] and enc.counts["encoded"] == 1
    a.write_bytes(open(pictures[4], "rb").read())
    new = enc([str(a)])
    assert close(new[str(a)][0], by_hand(lv, pictures[4])[0]) and enc.counts["encoded"] == 2

def test_budget_holds_and_the_oldest_leave(lv, pictures):
    enc = encoder(lv, max_bytes=20 * 128 * 4)
    enc(pictures)
    assert enc.cache._bytes <= 20*128*4 and 0 < len(enc.cache) < len(pictures)
    # the youngest is there
    before = enc.counts["encoded"]
    enc(pictures[-1:])
    assert enc.counts["encoded"] == before
    # the oldest is not
    enc(pictures[:1])
    assert enc.counts["encoded"] == before + 1

@pytest.mark.parametrize("shard_bytes", [1, 5000, 1 << 28])
def test_disk_serves_the_next_process(lv, pictures, tmp_path, shard_bytes):
    first = encoder(lv, folder=tmp_path, shard_bytes=shard_bytes)(pictures)
    enc = encoder(lv, folder=tmp_path, max_bytes=1)
    out = enc(pictures)
    assert enc.counts == dict(memory=0, disk=len(pictures), encoded=0, failed=0)
    for p in pictures: assert torch.equal(first[p][0], out[p][0]) and first[p][1] == out[p][1]
    assert not list(tmp_path.rglob("*.tmp"))

def test_two_writers_share_a_folder(lv, pictures, tmp_path):
    a = encoder(lv, folder=tmp_path)
    b = encoder(lv, folder=tmp_path)
    a(pictures[:4])
    out = b(pictures)
    assert b.counts["disk"] == 4 and b.counts["encoded"] == len(pictures) - 4
    a(pictures)
    assert a.counts["encoded"] == 4 and a.counts["disk"] == len(pictures) - 4 and len(out) == len(pictures)

def test_folder_of_another_model_is_not_read(lv, pictures, tmp_path):
    encoder(lv, folder=tmp_path)(pictures[:2])
    other = encoder(tiny_qwen(seed=2), folder=tmp_path)
    other(pictures[:2])
    assert other.counts["encoded"] == 2 and len(list(tmp_path.iterdir())) == 2

def test_broken_shard_is_named(lv, pictures, tmp_path):
    encoder(lv, folder=tmp_path)(pictures[:2])
    f = next(tmp_path.rglob("*.safetensors"))
    f.write_bytes(f.read_bytes()[:64])
    with pytest.warns(UserWarning, match=rf"{f.name}: not a readable shard .* encoded again"):
        again = encoder(lv, folder=tmp_path)
    assert not f.exists()
    again(pictures[:2])
    assert again.counts["encoded"] == 2

def test_killed_writer_leaves_whole_shards_only(pictures, tmp_path):
    "A process that dies in the middle of writing a shard leaves nothing that a reader would take for one"
    code = (
        "import json, os, sys, safetensors.torch as s; from leverplus.tiny import tiny_qwen; from"
        " leverplus.vision import VisionCache, VisionEncoder\nlv = tiny_qwen(seed=1); pics ="
        " json.loads(sys.argv[1]); enc = lambda: VisionEncoder(lv.model, lv.image_processor, VisionCache('x',"
        " folder=sys.argv[2]))\nenc()(pics[:3]); real = s.save_file\ndef dies(d, path, meta): real(d, path,"
        " meta); open(path, 'r+b').truncate(50); os._exit(9)\ns.save_file = dies; enc()(pics)"
    )
    command = [sys.executable, "-c", code, json.dumps(pictures), str(tmp_path)]
    assert subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 9
    assert len(VisionCache("x", folder=tmp_path)) == 3

def test_bad_images_are_errors_that_name_them(lv, pictures, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    cut = tmp_path / "cut.png"
    cut.write_bytes(open(pictures[8], "rb").read()[:300])
    enc = encoder(lv)
    out = enc([pictures[0], str(bad), str(cut), "gone.png"])
    for p in (str(bad), str(cut), "gone.png"): assert isinstance(out[p], OSError) and p in str(out[p])
    assert close(out[pictures[0]][0], by_hand(lv, pictures[0])[0])
    assert enc.counts["failed"] == 3 and len(enc.cache) == 1
    # mended, and not remembered as bad
    bad.write_bytes(open(pictures[1], "rb").read())
    assert not isinstance(enc([str(bad)])[str(bad)], Exception)

def test_memory_runs_out_and_comes_back(lv, pictures, monkeypatch):
    enc = encoder(lv, group=False)
    real = enc._run
    def run(px, grids):
        if len(px) > 60: raise torch.OutOfMemoryError("CUDA out of memory")
        return real(px, grids)
    monkeypatch.setattr(enc, "_run", run)
    out = enc(pictures)
    for p in pictures:
        f, grid = by_hand(lv, p)
        if grid[1]*grid[2] > 60: assert isinstance(out[p], MemoryError) and p in str(out[p])
        else: assert close(out[p][0], f)
    assert enc.patches <= 60 and any(isinstance(o, MemoryError) for o in out.values())

def test_a_budget_that_shrank_grows_again(lv, pictures):
    enc = encoder(lv, max_bytes=1)
    enc.patches = 20
    for _ in range(12): enc(pictures)
    assert enc.patches > 40 and enc.counts["failed"] == 0

def test_other_errors_cost_one_image_and_name_it(lv, pictures, monkeypatch):
    enc = encoder(lv, group=False)
    real = enc._run
    def run(px, grids):
        if (grids == torch.tensor([1, 10, 4])).all(1).any(): raise RuntimeError("shape mismatch")
        return real(px, grids)
    monkeypatch.setattr(enc, "_run", run)
    out = enc(pictures)
    bad = [p for p in pictures if isinstance(out[p], Exception)]
    assert bad == [pictures[3]]
    error = out[bad[0]]
    assert "shape mismatch" in str(error) and bad[0] in str(error) and not isinstance(error, MemoryError)

def test_a_lost_device_stops_the_run(lv, pictures, monkeypatch):
    enc = encoder(lv, group=False)
    def lost(*args): raise RuntimeError("CUDA error: device-side assert triggered")
    monkeypatch.setattr(enc, "_run", lost)
    with pytest.raises(RuntimeError, match="device-side assert"): enc(pictures[:3])

@pytest.mark.parametrize(
    "e,memory",
    [
        (torch.OutOfMemoryError("x"), True),
        (MemoryError(), True),
        (RuntimeError("x"), False),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True),
        (RuntimeError("CUDA driver error: out of memory"), True),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_memory(e, memory): assert out_of_memory(e) is memory

def test_grouping_wrong_only_between_windows_is_found_out(lv, pictures, monkeypatch):
    "Attention over everything is right for images of one window, and these come first here"
    import leverplus.vision as mod
    def everywhere(q, k, v, *args, **kw):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    monkeypatch.setattr(mod, "grouped_sdpa", everywhere)
    enc = encoder(lv)
    with pytest.warns(UserWarning, match="switched off"): out = enc([pictures[0], pictures[3]])
    assert close(out[pictures[3]][0], by_hand(lv, pictures[3])[0])

def test_features_beyond_the_budget_do_not_pile_up_on_the_device(lv, pictures):
    enc = encoder(lv)
    out = enc(pictures)
    kept = {f.data_ptr() for f, _ in enc.cache._memory.values()}
    assert {out[p][0].data_ptr() for p in pictures} <= kept # the cache's own tensors, not a second copy

def test_a_shard_that_is_deleted_meanwhile_is_made_again(lv, pictures, tmp_path):
    encoder(lv, folder=tmp_path)(pictures[:3])
    enc = encoder(lv, folder=tmp_path)
    next(tmp_path.rglob("*.safetensors")).unlink()
    assert close(enc(pictures[:3])[pictures[0]][0], by_hand(lv, pictures[0])[0])
    assert enc.counts["encoded"] == 3

def test_a_file_that_changes_under_way_is_not_stored_under_the_wrong_key(lv, pictures, tmp_path, monkeypatch):
    import leverplus.vision as mod
    f = tmp_path / "a.png"
    f.write_bytes(open(pictures[3], "rb").read())
    enc = encoder(lv)
    def key(path):
        k = picture_key(path)
        f.write_bytes(open(pictures[4], "rb").read())
        return k
    monkeypatch.setattr(mod, "picture_key", key)
    out = enc([str(f)])
    assert "changed while" in str(out[str(f)]) and len(enc.cache) == 0

def test_threads_take_turns(lv, pictures):
    from concurrent.futures import ThreadPoolExecutor
    enc = encoder(lv, max_bytes=1)
    with ThreadPoolExecutor(4) as pool: outs = list(pool.map(enc, [pictures]*8))
    assert all(close(o[p][0], outs[0][p][0]) for o in outs for p in pictures)
    assert lv.model.model.visual.config._attn_implementation == "sdpa"

def test_patch_side_reads_both_spellings(lv):
    class P: patch_size = (16, 16)
    assert patch_side(lv.image_processor) == 14 and patch_side(P()) == 16
