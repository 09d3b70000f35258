"""Which warnings are ours: raised in this package, or raised elsewhere about a call that this package made

A deprecated argument is complained about inside the library that was called, so the place of the warning
does not tell. The caller does: the first frame above the library that complains. What one library says
about another is not ours, and nobody here could act on it.

`install()` makes ours errors, in a process of its own: `python -c "import own_warnings;
own_warnings.install(); ..."`; `at_the_doors()` does so on the command line, which shows warnings in its own
way.
"""
import sys, warnings

OURS = {"leverplus", "__main__"}
SHOWING = {"warnings", "_py_warnings", "own_warnings"} # frames between the complaint and here
# what training says to a person of what it was asked to do
SPOKEN = ("after one epoch: ", "0 epochs asked of the stage")


def package(frame):
    "Top-level package of the code that a frame runs"
    return (frame.f_globals.get("__name__") or "").split(".")[0]

def is_ours(frame):
    "Is the warning that `frame` gives, the innermost frame, raised in this package or about its call?"
    who = package(frame)
    while frame is not None and package(frame) == who: frame = frame.f_back
    return who in OURS or (frame is not None and package(frame) in OURS)

def show(message, category, filename, lineno, *_, **__):
    "Stands for `warnings.showwarning`: ours is an error, unless it is meant for people"
    frame = sys._getframe(1)
    while package(frame) in SHOWING: frame = frame.f_back
    if is_ours(frame) and not str(message).startswith(SPOKEN):
        raise category(f"{message} ({filename}:{lineno})")

def install():
    "From here on a warning of ours is an error; others are dropped"
    warnings.simplefilter("always")
    warnings.showwarning = show

def at_the_doors(replace=setattr):
    "The same for `leverplus ...`, which goes on printing what is no error; `replace` may be a monkeypatch's `setattr`"
    from leverplus import cli
    shown = cli._warn
    def strict(args):
        say = shown(args)
        def both(*words, **kw):
            show(*words, **kw)
            say(*words, **kw)
        return both
    replace(cli, "_warn", strict)
