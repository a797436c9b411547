"""Where AVP keeps what it made or downloaded."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Return the folder of all caches: `$AVP_CACHE`, else `$XDG_CACHE_HOME/avp`, else `~/.cache/avp`."""
    own = os.environ.get("AVP_CACHE", "")
    if own:
        return Path(own).expanduser().absolute()
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (shared if shared.is_absolute() else Path.home() / ".cache") / "avp"
