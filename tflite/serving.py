"""The other end of `tflite.process`: answers requests in a process of its own. It needs nothing but Python."""

import json
import os
import sys
from collections.abc import Callable
from typing import Any


def first_line_with_text(error: BaseException) -> str:
    """The first line of an error's text that is not empty, or what the error is."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))


def serve(session: object, reason: Callable[[Exception], str] = first_line_with_text) -> None:
    """Answers requests until standard input ends.

    A request is a line of JSON: "do" names a method of `session`, the rest are its arguments. The answer is a line with
    its "value", or with an "error".

    Args:
        session: what the requests are about.
        reason: the one line that is told of an error.
    """
    # Native code may write to file descriptor 1; the replies keep the original and everything else goes to stderr.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        request = json.loads(line)
        handler: Callable[..., Any] = getattr(session, request.pop("do"))
        try:
            reply = {"value": handler(**request)}
        except Exception as error:  # the parent turns whatever it was into one line
            reply = {"error": reason(error)}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
