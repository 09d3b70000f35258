"`leverplus ...` and `python -m leverplus ...`: help at once, what is heavy when a command is carried out"
import sys
from leverplus.doors import DOORS, answer, read_door


def main(
    argv=None, # words; None: those of the command line
)->int: # exit status, one of `leverplus.doors.STATUS`; SystemExit after help, a version, or words that are no command
    "The command line"
    words = sys.argv[1:] if argv is None else list(argv)
    if not words or words[0] not in DOORS: answer(words)
    door = read_door(words)
    from leverplus.cli import enter
    return enter(door)


if __name__ == "__main__": sys.exit(main())
