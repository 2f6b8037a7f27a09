"""The decoder that a published checkpoint carries in its folder `custom_generate`: this package's own source."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Any

from ..decoding.compat import requirement
from ..decoding.files import write_whole


CARRIED = "custom_generate"
ENTRY = "generate"
SETTINGS = "settings"
ABOUT = '"""How this checkpoint decodes, where neither the call nor the generation config says so."""'
RELATIVE_IMPORT = re.compile(r"^\s*from\s+\.(\w+)\s+import", re.MULTILINE)


def write_decoder(folder: Path, settings: dict[str, Any], adapter: bool) -> None:
    """
    Writes the decoder: the entry, and the modules it needs, directly or not.

    Args:
        folder: new, `custom_generate` of the checkpoint.
        settings: its `decoding` and `jacobi`.
        adapter: whether it is one, so that `settings` count for more than the generation config of its base.
    """
    package = resources.files("hf_jacobi")
    sources = {ENTRY: (package / "hub" / "custom_generate.py").read_text(encoding="utf-8")}
    sources[SETTINGS] = _settings_source(settings, adapter)
    missing = set(RELATIVE_IMPORT.findall(sources[ENTRY])) - sources.keys()
    while missing:
        name = missing.pop()
        sources[name] = (package / "decoding" / f"{name}.py").read_text(encoding="utf-8")
        missing |= set(RELATIVE_IMPORT.findall(sources[name])) - sources.keys()
    folder.mkdir()
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source, encoding="utf-8")
    (folder / "requirements.txt").write_text(requirement() + "\n", encoding="utf-8")


def rewrite_settings(folder: Path, settings: dict[str, Any]) -> bool:
    """
    Tells the decoder that a published checkpoint carries how it decodes by now: an adapter's reads no other file.

    Args:
        folder: of a checkpoint, published or not. A link in the place of the file is replaced, not followed.
        settings: what `write_settings` returned.

    Returns:
        Whether there was such a decoder.
    """
    file = folder / CARRIED / f"{SETTINGS}.py"
    if not file.exists() or not file.read_text(encoding="utf-8").startswith(ABOUT):
        return False
    source = _settings_source(settings, adapter=(folder / "adapter_config.json").exists())
    write_whole(file, source)
    return True


def is_carried(name: str) -> bool:
    """Whether a name in a repository is one of a decoder that was carried there."""
    folder, _, name = name.partition("/")
    return folder == CARRIED and "/" not in name and (name.endswith(".py") or name == "requirements.txt")


def _settings_source(settings: dict[str, Any], adapter: bool) -> str:
    return f"{ABOUT}\n\nADAPTER = {adapter}\nDECODING = {settings['decoding']!r}\nJACOBI = {settings['jacobi']!r}\n"
