"""Which warnings are ours: raised in this package, or raised elsewhere about a call that this package made

A deprecated argument is complained about inside the library that was called, so the place of the warning does not tell. The caller does: the
first frame above the library that complains. What one library says about another is not ours, and nobody here could act on it.

`install()` makes ours errors, in a process of its own: `python -c "import own_warnings; own_warnings.install(); ..."`.
"""
import sys, warnings

OURS = {"leverplus", "__main__"}


def package(frame):
    "Top-level package of the code that a frame runs"
    return (frame.f_globals.get("__name__") or "").split(".")[0]

def is_ours(frame):
    "Is the warning that `frame` gives, the innermost frame, raised in this package or about its call?"
    who = package(frame)
    while frame is not None and package(frame) == who: frame = frame.f_back
    return who in OURS or (frame is not None and package(frame) in OURS)

def install():
    "From here on a warning of ours is an error; others are dropped"
    def show(message, category, filename, lineno, file=None, line=None):
        frame = sys._getframe(1)
        while package(frame) == "warnings" or package(frame) == "_py_warnings": frame = frame.f_back
        if is_ours(frame): raise category(f"{message} ({filename}:{lineno})")
    warnings.simplefilter("always")
    warnings.showwarning = show
