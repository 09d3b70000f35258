"Packaging: everything that matters stands in `settings.ini`."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

cfg = ConfigParser(delimiters=["="])
cfg.read("settings.ini", encoding="utf8")
cfg = cfg["DEFAULT"]

setup(
    name=cfg["lib_name"], version=cfg["version"], license="Apache-2.0", description=cfg["description"],
    keywords=cfg["keywords"], author=cfg["author"], author_email=cfg["author_email"], url=cfg["git_url"],
    packages=find_packages(include=["leverplus", "leverplus.*"]), python_requires=">=" + cfg["min_python"],
    install_requires=cfg["requirements"].split(),
    extras_require={"dev": cfg["dev_requirements"].split(), "ray": cfg["ray_requirements"].split()},
    entry_points={"console_scripts": cfg["console_scripts"].split(), "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
    long_description=Path("README.md").read_text(encoding="utf8") if Path("README.md").exists() else "",
    long_description_content_type="text/markdown", zip_safe=False, include_package_data=True,
)
