"""What every command line of the project shares."""

import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from mobiatt_tf.errors import UserError


def run(main: Callable[[Sequence[str]], None], positional: Sequence[str] = (), *, repeated: str | None = None) -> None:
    """Runs an absl main; a `UserError` becomes one line on standard error and exit status 1, Ctrl-C exit status 130.

    Args:
        main: receives the program's name and the positional arguments.
        positional: names of the arguments that are not flags, exactly as many as must be given, in order; flags may
            stand before or after them.
        repeated: the name of what may be given any number of times after them, at least once; None: nothing.
    """

    def guarded(argv: Sequence[str]) -> None:
        if not positional and not repeated and len(argv) > 1:
            raise app.UsageError(f"Unexpected arguments {list(argv[1:])}: every option is a flag, as in --name=value.")
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # else TensorFlow reports every function that it saves
        try:
            given = " ".join(argv[1:]) or "nothing"
            if repeated and len(argv) < 2 + len(positional):
                wanted = " ".join([*positional, repeated])
                raise UserError(f"Give {wanted} ... beside the flags; given: {given}.")
            if not repeated and len(argv) != 1 + len(positional):
                raise UserError(f"Give exactly {' '.join(positional)} beside the flags; given: {given}.")
            main(argv)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    flags.FLAGS.set_gnu_getopt(True)  # else a flag after a positional argument counts as one more argument
    app.run(guarded)


def define_attention(description: str) -> "flags.FlagHolder[list[str] | None]":
    """--attention, read by `attention`."""
    return flags.DEFINE_list(
        "attention",
        ["mobile"],
        f"{description}: mobile, softmax or linear; or, separated by commas, one for each stage that has attention "
        "(DeiT: for each block).",
    )


def attention(kinds: list[str]) -> str | list[str]:
    """The value of --attention as the model builders take it."""
    return kinds[0] if len(kinds) == 1 else kinds


def image_size(text: str | None) -> tuple[int, int] | None:
    """(height, width) of a flag that says "224" or "192x256"; None of None."""
    if text is None:
        return None
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise UserError(f"--image_size={text} is not a size: give one side, as in 224, or HEIGHTxWIDTH, as in 192x256.")
    return int(sides[0]), int(sides[-1])
