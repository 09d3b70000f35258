"""A real server, vLLM on the CPU, with the embedded model, on the loopback: where `make served` has set it up"""
import os, signal, socket, subprocess, time, urllib.error, urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT/"models/tiny-qwen2.5-vl"

def engine_python():
    "The Python of the environment that serves; None: there is none"
    path = os.environ.get("LEVERPLUS_SERVED")
    python = ROOT/path/"bin/python" if path else None
    return python if python is not None and python.exists() else None

def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

class Engine:
    "vLLM with the embedded model, float32, started and stopped with the block"
    def __init__(self, log, name="tiny", port=None, threads=1, more=()):
        self.log = Path(log)
        self.threads = threads
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.words = [
            str(engine_python()), "-m", "vllm.entrypoints.openai.api_server", "--model", str(MODEL),
            "--served-model-name", name, "--dtype", "float32", "--max-model-len", "512", "--enforce-eager",
            "--host", "127.0.0.1", "--port", str(self.port), "--enable-prompt-tokens-details",
            "--allowed-local-media-path", str(ROOT), *more,
        ]

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_): self.stop()

    def start(self, seconds=300):
        "Start it, and wait until it answers"
        own = dict(
            HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1", VLLM_CPU_KVCACHE_SPACE="1",
            OMP_NUM_THREADS=str(self.threads),
        )
        env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CUDA_VISIBLE_DEVICES")} | own
        with open(self.log, "ab") as log:
            quiet = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            self.process = subprocess.Popen(
                self.words, cwd=self.log.parent, env=env, start_new_session=True, **quiet,
            )
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None: break
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).close()
                return
            except (urllib.error.URLError, OSError): time.sleep(.5)
        self.stop()
        raise RuntimeError(f"the engine did not start: {self.log.read_text()[-3000:]}")

    def stop(self):
        "End it and all that it started"
        try: os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError: pass
        self.process.wait()
