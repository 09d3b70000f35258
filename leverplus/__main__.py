"`leverplus ...` and `python -m leverplus ...`: the first page at once, a command when it is named"
import sys
from leverplus.doors import DOORS, answer


def main(
    argv=None, # words; None: those of the command line
)->int: # exit status, one of `leverplus.doors.STATUS`; SystemExit after help, a version, or words that are no command
    "The command line"
    words = sys.argv[1:] if argv is None else list(argv)
    if not words or words[0] not in DOORS: answer(words)
    from leverplus.cli import main as command
    return command(words)


if __name__ == "__main__": sys.exit(main())
