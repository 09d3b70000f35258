"""Packaging stands in `pyproject.toml`; this file adds one step: a wheel brings the embedded world along.

`data/` and `models/` lie at the top of a checkout, where people look for them. A wheel has no such place, so
they are copied below the package, and `leverplus.core.repo_path` finds them there.
"""
import shutil
from pathlib import Path
from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
WORLD = (
    "data/islands", "data/spoilt",
    "models/tiny-clip", "models/tiny-qwen2.5-vl", "models/tiny-qwen2.5-vl-credulous",
)


class BuildWithWorld(build_py):
    "`build_py`, then copy the embedded world into the package"

    def run(self):
        super().run()
        if self.editable_mode:  # an editable install reads the checkout itself
            return
        for name in WORLD:
            to = Path(self.build_lib)/"leverplus"/"embedded"/name
            shutil.copytree(HERE/name, to, dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithWorld})
