"""Execute notebooks from a fresh kernel and store their outputs.

`python .ci/notebooks.py [NAME ...] [--flags "slow net"]`. NAME is a path, or a stem such as `00_core` or
`tutorials/01_walk`; without names: nbs/*.ipynb and nbs/tutorials/*.ipynb. Cells flagged slow, gpu or net
(`tst_flags` in settings.ini) and `#| eval: false` are skipped and KEEP their stored outputs; `--flags slow`
runs those flagged slow. A notebook that fails is left as it was, and the exit status is 1. Nothing that
changes between two runs is stored: no counts, times, ids of objects, or split-up streams. Cells flagged smol
run where the packages are that they want (directives.py).
"""
import argparse, os, re, sys, tempfile, time
from pathlib import Path
from directives import flags_off, is_skipped

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
SKIP = "skip-execution"  # nbclient's tag
ENV = {
    "PYTHONHASHSEED": "0",
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
    "JUPYTER_PREFER_ENV_PATH": "1",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    # where ipywidgets are absent `tqdm.auto` says so, with a path of this machine
    "PYTHONWARNINGS": "ignore:IProgress not found",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
}

def find(names):
    "Paths of the named notebooks, or of all"
    if not names:
        every = [*sorted(NBS.glob("*.ipynb")), *sorted((NBS/"tutorials").glob("*.ipynb"))]
        return [p for p in every if p.name[0] not in "_."]
    paths = [next((p for p in (Path(n), NBS/n, NBS/f"{n}.ipynb") if p.is_file()), n) for n in names]
    absent = [p for p in paths if isinstance(p, str)]
    if absent: sys.exit(f"no such notebook: {', '.join(absent)}; give a path or a stem such as 00_core")
    return [p.resolve() for p in paths]

def without_times(outputs):
    "The tables of `fit` as they are in every run: no column `time`, no style sheet, no bar, each once"
    kept = []
    for o in outputs:
        html = o.get("data", {}).get("text/html")
        if html is not None and html.strip() in ("", "<div></div>"): continue   # a bar that has ended
        if "table.fastprogress" in (html or ""): continue
        if 'class="fastprogress"' in (html or ""):
            o.data = {"text/html": re.sub(r"<t([hd])>(time|[\d:]+)</t\1></tr>", "</tr>", html)}
        kept.append(o)
    return kept

def execute(path, flags, timeout):
    "Run notebook `path` in its folder and store the outputs"
    import nbformat
    from nbclient import NotebookClient
    from nbdev.clean import nbdev_clean
    from traitlets.config import Config
    nb = nbformat.read(path, 4)
    for c in nb.cells:
        c.metadata = {"tags": [SKIP]} if c.cell_type == "code" and is_skipped(c.source, flags) else {}
    with tempfile.TemporaryDirectory() as sockets:
        # ipc: no ports, and no kernel warning about open ones
        ipc = {"KernelManager": {"transport": "ipc", "ip": f"{sockets}/kernel"}}
        NotebookClient(
            nb,
            config=Config(ipc if os.name == "posix" else {}),
            timeout=timeout,
            kernel_name="python3",
            coalesce_streams=True,
            record_timing=False,
            store_widget_state=False,
            skip_cells_with_tag=SKIP,
            resources={"metadata": {"path": str(path.parent)}},
        ).execute()
    for c in nb.cells:
        c.metadata = {}
        if c.cell_type == "code": c.outputs = without_times(c.outputs)
    nb.metadata = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    nbformat.write(nb, path)
    nbdev_clean(str(path))
    return nb

def complaints(nb):
    "What a reader would stumble over: text that went to stderr"
    return [
        o.text.strip()[:300]
        for c in nb.cells
        for o in c.get("outputs", [])
        if o.output_type == "stream" and o.name == "stderr"
    ]

def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("names", nargs="*")
    ap.add_argument("--flags", default="", help="flagged cells that run all the same, e.g. 'slow'")
    ap.add_argument("--timeout", type=int, default=7200, help="seconds per cell")
    args = ap.parse_args()
    paths = find(args.names)
    os.chdir(ROOT)
    os.environ.update(ENV)
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
    from nbdev.config import get_config
    flags = flags_off(get_config().tst_flags.split()) - set(args.flags.split())
    failed = []
    for p in paths:
        t = time.time()
        name = p.relative_to(NBS).as_posix() if p.is_relative_to(NBS) else p.name
        try: nb = execute(p, flags, args.timeout)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as e:
            failed.append(name)
            print(f"{name}: FAILED, left as it was\n{e}", flush=True)
            continue
        print(
            f"{name}: {time.time() - t:.1f} s, {p.stat().st_size/1e3:.0f} kB",
            *(f"  stderr: {s}" for s in complaints(nb)),
            sep="\n",
            flush=True,
        )
    if failed: sys.exit(f"{len(failed)} of {len(paths)} notebooks failed: {', '.join(failed)}")

if __name__ == "__main__": main()
