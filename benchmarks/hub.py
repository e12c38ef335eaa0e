"""Whether the Hugging Face hub can be reached, asked once and never for longer than a few seconds."""

from __future__ import annotations

import functools
import os
import sys
import threading
import urllib.error
import urllib.request

WAIT_SECONDS = 4.0


def prepare(needed: bool) -> bool:
    """Tell the hub's client to stay offline where a run needs nothing from it or cannot reach it; True if it is online.

    To be called before transformers or datasets are imported. A user's own HF_HUB_OFFLINE is left as it is.
    """
    if "HF_HUB_OFFLINE" in os.environ:
        return os.environ["HF_HUB_OFFLINE"].lower() in ("", "0", "false", "no", "off")
    if needed and reachable():
        return True
    os.environ["HF_HUB_OFFLINE"] = "1"
    constants = sys.modules.get("huggingface_hub.constants")
    if constants is not None:
        vars(constants)["HF_HUB_OFFLINE"] = True
    return False


@functools.cache
def reachable() -> bool:
    """One HEAD request in a thread of its own, since looking a name up has no time limit of its own."""
    answer: list[bool] = []
    thread = threading.Thread(target=lambda: answer.append(_ask()), daemon=True)
    thread.start()
    thread.join(WAIT_SECONDS)
    return bool(answer and answer[0])


def _ask() -> bool:
    request = urllib.request.Request(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=WAIT_SECONDS):
            return True
    except urllib.error.HTTPError as error:
        return error.code < 500
    except OSError:
        return False
