"""Addresses without the secrets that they may hold, for logs, messages and files."""

from __future__ import annotations

from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

_SECRET = ("password", "passwd", "token", "secret", "key", "auth", "credential")
_HIDDEN = "***"


def without_secrets(uri: str) -> str:
    """An address without user, password, and parameters whose name tells a secret."""
    scheme, found, rest = uri.partition("://")
    if not found:
        return uri
    place, slash, path = rest.partition("/")
    shown = f"{scheme}://{place.rpartition('@')[2]}{slash}{path}"
    address, question, query = shown.partition("?")
    if not question:
        return shown
    pairs = [
        (name, _HIDDEN if any(part in name.lower() for part in _SECRET) else value)
        for name, value in parse_qsl(query, keep_blank_values=True)
    ]
    return f"{address}?{urlencode(pairs, safe='*/:')}"


def redacted(text: str, uri: str) -> str:
    """A text, such as another program's error, in which an address may stand."""
    text = text.replace(uri, without_secrets(uri))
    for secret in _secrets(uri):
        text = text.replace(secret, _HIDDEN)
    return text


def _secrets(uri: str) -> list[str]:
    """Passwords and tokens of an address, as they stand there and decoded; the longest first."""
    try:
        parts = urlsplit(uri)
        found = [parts.password or ""]
    except ValueError:
        return []
    found += [
        value
        for name, value in parse_qsl(parts.query)
        if any(part in name.lower() for part in _SECRET)
    ]
    forms = {form for value in found for form in (value, unquote(value), quote(value, safe=""))}
    return sorted(filter(None, forms), key=len, reverse=True)
