"""How fast all bits of a model are hashed: `python bench/hashing.py`"""
import hashlib, sys, time
from pathlib import Path
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from leverplus.core import tensor_hash

def seconds(fn, device, repeats=5):
    "Median seconds of a call, after one that warms up"
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        fn()
        if device == "cuda": torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats//2]

def main(megabytes=500):
    x = torch.randn(megabytes*250_000)
    of_bytes = seconds(lambda: hashlib.sha256(x.numpy()).digest(), "cpu", repeats=1)
    print(f"sha256 on the CPU: {megabytes/1e3/of_bytes:.1f} GB/s")
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        here = x.to(device)
        took = seconds(lambda: tensor_hash(here), device)
        print(f"tensor_hash on {device}: {megabytes/1e3/took:.1f} GB/s, {took*1e3:.0f} ms for {megabytes} MB")

if __name__ == "__main__": main()
