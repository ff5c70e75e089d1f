"""Access tokens are taken out of every text that is written down or shown.

Errors of the hub's client and of HTTP libraries may quote an address with a password, a signed address or a header.
"""

import functools
import os
import re
from pathlib import Path
from urllib.parse import quote

REMOVED = "[removed]"
LEAST = 8  # characters of a token; a shorter value of a variable is a switch
_VARIABLE = re.compile(r"(TOKEN|SECRET|SECRET_ACCESS_KEY|PASSWORD|API_KEY)$")
_SHAPES = [
    re.compile(r"\b()hf_[A-Za-z0-9]{16,}"),  # a token of the hub, whosever it is
    re.compile(r"(://)[^/\s@'\"]+(?=@)"),  # user and password of an address
    re.compile(
        r"([?&][\w.-]*(?:token|signature|credential|secret|password|api.?key|sig)[\w.-]*=)[^&\s'\"]+", re.IGNORECASE
    ),
    re.compile(r"\b((?:Bearer|Basic)\s+)[\w.~+/=-]{8,}(?:\\x[0-9a-f]{2}|\\[a-z]|[\w.~+/=-])*"),  # a header
]


def redacted(text: str) -> str:
    """The text without tokens: those of this environment and of the hub's login, and all that has the look of one."""
    for secret in _known():
        for written in {secret, quote(secret, safe="")}:
            text = text.replace(written, REMOVED)
            # a message may have been shortened within it
            text = re.sub(rf"{re.escape(written[:LEAST])}[^\s…]*…", f"{REMOVED}…", text)
    for shape in _SHAPES:
        text = shape.sub(rf"\1{REMOVED}", text)
    return text


def _known() -> list[str]:
    values = [value.strip() for name, value in os.environ.items() if _VARIABLE.search(name)]
    return [value for value in (*values, *_logged_in(_token_file())) if len(value) >= LEAST]


def _token_file() -> Path:
    """The file in which `hf auth login` keeps the token, by the rules of huggingface_hub."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    home = Path(os.environ.get("HF_HOME") or cache / "huggingface")
    return Path(os.environ.get("HF_TOKEN_PATH") or home / "token").expanduser()


@functools.cache
def _logged_in(file: Path) -> tuple[str, ...]:
    try:
        return (file.read_text(encoding="utf-8").strip(),)
    except (OSError, UnicodeDecodeError):
        return ()
