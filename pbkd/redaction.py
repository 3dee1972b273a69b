"""Texts for people, logs and files without the passwords that URIs hold."""

from __future__ import annotations

import re

_LOGIN = re.compile(r"(?<=://)\S*@")
_PARAMETER = re.compile(
    r"([?&;][\w.-]*(?:passw(?:or)?d|passphrase|secret|token|key|signature|credential)[\w.-]*=)"
    r"[^&;#\s'\"`<>()]+",
    re.IGNORECASE,
)


def without_secrets(text: str) -> str:
    """A text in which no URI holds a name, a password or a token.

    ``scheme://name:password@host`` becomes ``scheme://host``, and the value of a parameter such as
    ``?password=`` becomes ``***``. A password may hold slashes, as SQLAlchemy allows; what stands
    between ``://`` and the last ``@`` of a word is therefore left out.
    """
    return _PARAMETER.sub(r"\1***", _LOGIN.sub("", text))
