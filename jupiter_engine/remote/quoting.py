"""How an argument vector travels through a login shell that may be any shell.

sshd hands a command to the user's login shell as one text, so the text must mean the same in sh, bash,
dash, zsh, fish and csh. What is written here uses only what they agree on:

* single quotes keep everything but `'`, `\\` (fish) and `!` (csh) as it is, and those three go outside
  the quotes with a backslash before them;
* line ends (csh), control characters and everything beyond ASCII (shells that decode text) never appear:
  a vector with any of them is sent as octal escapes and decoded on the other side by `/bin/sh`.

The command runs under a small `/bin/sh` script that first writes a mark to both outputs. What start-up
files print comes before the mark and is cut off by the reader; the mark also tells the process id.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from typing import Final

from jupiter_engine.errors import UsageError
from jupiter_engine.units import bytes_text

MARK_PREFIX: Final = "jupiter-begin-"
# Linux refuses a single argument above 128 KiB (MAX_ARG_STRLEN), and the login shell gets the text as one.
LIMIT_BYTES: Final = 128 * 1024 - 1024

_PLAIN_SCRIPT: Final = 'echo "$0 $$"; echo "$0 $$" >&2; exec "$@"'
# The dot keeps line ends at an argument's end, which command substitution would drop. It is no second byte
# of a character in any encoding, so taking it off again never cuts one.
_CODED_SCRIPT: Final = (
    'for _j do _k=$(printf %b. "$_j"); set -- "$@" "${_k%.}"; shift; done; echo "$0 $$"; echo "$0 $$" >&2; exec "$@"'
)
_TAME = re.compile(r"[A-Za-z0-9_./:=@%+,-]+")
_PIECES = re.compile(r"[\\'!]|[^\\'!]+")
_PRINTABLE = re.compile(r"[\x20-\x7e]*")
_AS_IS = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_./:=@+,-")


def new_mark() -> str:
    """A text that no start-up file prints by chance."""
    return MARK_PREFIX + secrets.token_hex(8)


def quote(text: str) -> str:
    """Printable ASCII as one word of any shell."""
    if _TAME.fullmatch(text) and not text.startswith(("=", "~", "%")):
        return text
    if not text:
        return "''"
    return "".join("\\" + piece if piece in "\\'!" else f"'{piece}'" for piece in _PIECES.findall(text))


def coded(text: str) -> str:
    """Any text as printable ASCII without quotes, for `printf %b`."""
    try:
        data = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise UsageError(f"an argument holds half a character, which has no bytes: {text!r}") from None
    return "".join(chr(byte) if byte in _AS_IS else f"\\0{byte:03o}" for byte in data)


def command_line(argv: Sequence[str], mark: str) -> str:
    """The text to hand to a login shell so that exactly `argv` runs after both outputs got `mark` and the pid.

    Raises UsageError for a vector that no system can run: empty, with NUL, or too long.
    """
    if not argv or not argv[0]:
        raise UsageError("there is no program to run")
    if any("\0" in argument for argument in argv):
        raise UsageError(f"an argument of {argv[0]!r} contains a NUL, which no program can be given")
    # `exec -x` would be an option of exec.
    vector = [f"./{argv[0]}" if argv[0].startswith("-") else argv[0], *argv[1:]]
    if all(_PRINTABLE.fullmatch(argument) for argument in vector):
        script, words = _PLAIN_SCRIPT, vector
    else:
        script, words = _CODED_SCRIPT, [coded(argument) for argument in vector]
    line = " ".join(quote(word) for word in ("exec", "/bin/sh", "-c", script, mark, *words))
    if len(line) > LIMIT_BYTES:
        raise UsageError(
            f"the arguments of {argv[0]!r} take {bytes_text(len(line))}, a shell takes {bytes_text(LIMIT_BYTES)}",
            fix="send them through standard input",
        )
    return line
