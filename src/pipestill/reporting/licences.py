"""Licences in the form of the Hugging Face Hub's model cards: identifiers it knows, or `other` with a name and a file.

Pure functions of text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

FILE = "LICENSE.md"
# https://huggingface.co/docs/hub/repositories-licenses, without licences of single models
_LIST = """
    afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0 bigscience-openrail-m bsd
    bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0
    cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0
    cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0
    creativeml-openrail-m ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 gfdl gpl gpl-2.0 gpl-3.0 isc lgpl
    lgpl-2.1 lgpl-3.0 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openrail openrail++ osl-3.0 pddl postgresql
    unlicense wtfpl zlib
"""
KNOWN = frozenset(_LIST.split())


@dataclass(frozen=True)
class Terms:
    """The licence fields of a model card's head; `name` and `text`, the content of FILE, where `id` is `other`."""

    id: str
    name: str = ""
    text: str = ""

    @property
    def file(self) -> str:
        return FILE


def terms(licence: str, imposed: Sequence[str]) -> Terms:
    """The fields for a stated licence and those that outside files impose on the model.

    Only a licence that the Hub knows and that nothing adds to is named by its identifier.
    """
    own = identifier(licence)
    if own in KNOWN and all(identifier(other) == own for other in imposed):
        return Terms(own)
    others = "".join(f"- {line}\n" for line in imposed)
    text = f"# Licence\n{licence}\n"
    if others:
        text += f"\nThe model is made from outside files, whose licences hold for it as well:\n{others}"
    return Terms("other", re.sub(r"[^a-z0-9.+]+", "-", own).strip("-") or "other", text)


def identifier(licence: str) -> str:
    """An SPDX identifier, or its text, as the Hub writes it: lower case, `-only` and `-or-later` left out."""
    plain = "-".join(licence.lower().split())
    return re.sub(r"-(only|or-later)$", "", plain)
