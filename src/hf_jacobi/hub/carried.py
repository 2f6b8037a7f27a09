"""The decoder in the folder `custom_generate` of a published checkpoint: copied from this package's source."""

from __future__ import annotations

import ast
import re
from importlib import resources
from pathlib import Path
from typing import Any

from ..decoding.compat import requirement
from ..decoding.files import write_whole
from ..decoding.ngram_table import TABLE


CARRIED = "custom_generate"
ENTRY = "generate"
SETTINGS = "settings"
# Identifies the file, in checkpoints that are published already too: keep the wording.
ABOUT = '"""How this checkpoint decodes, where neither the call nor the generation config says so."""'
REPOSITORY = re.compile(r"^ADAPTER = (.*)$", re.MULTILINE)
RELATIVE_IMPORT = re.compile(r"^\s*from\s+\.(\w+)\s+import", re.MULTILINE)


def write_decoder(folder: Path, settings: dict[str, Any], adapter: str | None) -> None:
    """
    Writes the decoder: the entry point and every module that it imports, directly or indirectly.

    Args:
        folder: `custom_generate` in the checkpoint; must not exist yet.
        settings: the checkpoint's `decoding` and `jacobi`.
        adapter: the repository of an adapter, whose `settings` override the base's generation config, and which holds
            its table of n-grams; `None` for a model.
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
    Updates the settings of the decoder in a published checkpoint; the decoder of an adapter reads no other file.

    Args:
        folder: a checkpoint, published or not. If the settings file is a link, it is replaced, not followed.
        settings: what `write_settings` returned.

    Returns:
        Whether the checkpoint contains such a decoder.
    """
    file = folder / CARRIED / f"{SETTINGS}.py"
    if not file.exists() or not file.read_text(encoding="utf-8").startswith(ABOUT):
        return False
    found = REPOSITORY.search(file.read_text(encoding="utf-8"))
    write_whole(file, _settings_source(settings, ast.literal_eval(found[1]) if found else None))
    return True


def is_carried(name: str) -> bool:
    """Whether a name in a repository is that of a file of the decoder."""
    folder, _, name = name.partition("/")
    return folder == CARRIED and "/" not in name and (name.endswith(".py") or name == "requirements.txt")


def _settings_source(settings: dict[str, Any], adapter: str | None) -> str:
    jacobi = settings["jacobi"]
    if adapter and jacobi.get("ngram_table") == TABLE:  # the model that decodes is the base, which lacks this file
        jacobi = jacobi | {"ngram_table": adapter}
    return f"{ABOUT}\n\nADAPTER = {adapter!r}\nDECODING = {settings['decoding']!r}\nJACOBI = {jacobi!r}\n"
