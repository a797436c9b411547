"""Where AVP keeps what it made or downloaded."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile


def cache_dir() -> Path:
    """Return the folder of all caches: `$AVP_CACHE`, else `$XDG_CACHE_HOME/avp`, else `~/.cache/avp`."""
    own = os.environ.get("AVP_CACHE", "")
    if own:
        return Path(own).expanduser().absolute()
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (shared if shared.is_absolute() else Path.home() / ".cache") / "avp"


def machine_secret() -> bytes:
    """32 random bytes, made at the first call on this machine and kept in the cache folder, mode 0600.

    Raises:
        OSError: the folder cannot be written.
    """
    path = cache_dir() / "secret"
    path.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=path.parent, prefix=".secret-") as fresh:  # mode 0600
        fresh.write(secrets.token_bytes(32))
        fresh.flush()
        with suppress(FileExistsError):  # of two processes the first one's is taken
            os.link(fresh.name, path)
    return path.read_bytes()
