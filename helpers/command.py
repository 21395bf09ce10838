"""How every command of the course ends: in one sentence and an exit status, whatever it met."""

import os
import sys

from helpers.files import CourseError


def status(command, /, *arguments, left: str = "", **named) -> int:
    """Runs a command; the exit status: its own if it gives one, 1 after a CourseError's sentence, 130 after Ctrl-C (`left`: what to
    say then), 141 where whoever read its output wants no more (`| head -1`), in silence."""
    try:
        result = command(*arguments, **named)
        sys.stdout.flush()
        return int(result) if isinstance(result, int) else 0
    except CourseError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nStopped. {left}".rstrip(), file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python itself complains as it ends
        return 141
