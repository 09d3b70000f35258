"""The long notebooks run from top to bottom, as in `test_nbs.py`; a file of their own, so that another process
may take them
"""
import pytest
from test_nbs import LONG, clean_process, page, walk

@pytest.mark.parametrize("path", LONG, ids=page)
def test_notebook(path, clean_process, capsys): walk(path, capsys)
