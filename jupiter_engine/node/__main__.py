"""`PYTHON RUNNER.pyz VERB ...`: finds the module of a verb and runs it.

A verb is a function `main(arguments: list[str]) -> int`. It writes its answer as JSON lines to standard output; a
NodeError it raises becomes one line {"error": {"kind", "detail", "fix"}} and exit status 1. Modules are imported only
when their verb is asked for: a start costs as little as the verb needs.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from collections.abc import Callable

from .errors import NodeError

VERBS = {
    "hello": "hello:main",
    "keep": "keep:main",
    "keep-run": "keeper:main",
    "hold": "hold:main",
    "state": "state:main",
    "tell": "tell:main",
    "follow": "follow:main",
    "probe": "probe:main",
    "store-have": "store:have",
    "store-receive": "store:receive",
    "store-send": "store:send",
    "store-prune": "store:prune",
    "tree-manifest": "trees:manifest",
    "tree-take": "trees:take",
    "tree-place": "trees:place",
    "tree-send": "trees:send",
    "environment-state": "environment:state",
    "environment-build": "environment:build",
    "environment-download": "environment:download",
    "environment-prune": "environment:prune",
    "group": "group:main",
    "rank-prepare": "ranks:prepare",
    "rank-go": "ranks:go",
    "rank-stop": "ranks:stop",
    "rank-run": "rank_agent:main",
    "rank-ssh": "shim:ssh",
    "rank-shell": "shim:shell",
}
"""Verb -> module of this package and function in it."""


def find(verb: str) -> Callable[[list[str]], int]:
    """The function of a verb. NodeError for one that this runner does not have."""
    if verb not in VERBS:
        raise NodeError("usage", f"this node runner has no verb {verb!r}", f"one of: {', '.join(VERBS)}")
    module_name, _, function_name = VERBS[verb].partition(":")
    module = importlib.import_module("." + module_name, __package__)
    function: Callable[[list[str]], int] = getattr(module, function_name)
    return function


def run(arguments: list[str]) -> int:
    """Run one verb and return its exit status."""
    try:
        return find(arguments[0] if arguments else "")(arguments[1:])
    except NodeError as error:
        answer = error.record()
    except BrokenPipeError:
        # The reader has gone: there is nobody to tell.
        return 1
    except Exception as error:  # noqa: BLE001 - whatever went wrong here must reach the other side as an answer
        traceback.print_exc()
        detail = f"{type(error).__name__}: {error}"
        answer = NodeError("internal", detail, "the traceback is on the standard error of the node runner").record()
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
    return 1


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
