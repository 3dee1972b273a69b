"""HTML pages from the templates of this package; each page is one file that needs no other."""

from __future__ import annotations

from importlib import resources

from pbkd.errors import MissingExtraError


def fill(name: str, **values: object) -> str:
    """A page: the template of that name with its values; what they hold is shown, never run.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError:
        raise MissingExtraError("jinja2", "pipeline", "the report") from None
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_source), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(name).render(**values)


def _source(name: str) -> str:
    return resources.files("pbkd.report").joinpath(name).read_text()
