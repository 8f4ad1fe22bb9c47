"""HTML as a tree of elements, so that no text can become markup: the standard library's serialiser escapes it."""

from __future__ import annotations

from importlib.resources import files
from xml.etree import ElementTree

from ..untrusted import printable

Element = ElementTree.Element
Content = Element | str | None

_MAX_NAME_LENGTH = 120


def element(tag: str, *content: Content, **attributes: object) -> Element:
    """Return an element with these children and texts; None is left out.

    Args:
        tag: the element's name.
        content: elements, and texts of any origin: control characters and those that change the direction of
            writing are shown as escapes.
        attributes: by name; a trailing underscore (``class_``) is dropped, other underscores become hyphens.
    """
    names = {name.rstrip("_").replace("_", "-"): printable(value) for name, value in attributes.items()}
    made = Element(tag, names)
    for item in content:
        if isinstance(item, str):
            _append_text(made, printable(item))
        elif item is not None:
            made.append(item)
    return made


def name_of(text: str) -> Element:
    """Return a name from a checkpoint, cut short, whose direction of writing does not leak into what is around it."""
    return element("bdi", shortened(text), class_="name")


def shortened(text: str) -> str:
    """Return a name without its middle if it is too long to be one."""
    shown = printable(text) or "(no name)"
    half = _MAX_NAME_LENGTH // 2
    return shown if len(shown) <= _MAX_NAME_LENGTH else f"{shown[:half]} … {shown[-half:]}"


def document(title: str, *body: Element) -> str:
    """Return a whole page: no scripts, and nothing that a browser would fetch."""
    # White space in a line, as texts have no line breaks.
    style = " ".join(files(__package__).joinpath("style.css").read_text(encoding="utf-8").split())
    root = element(
        "html",
        element(
            "head",
            element("meta", charset="utf-8"),
            element("meta", name="generator", content=GENERATOR),
            element(
                "meta", http_equiv="Content-Security-Policy", content="default-src 'none'; style-src 'unsafe-inline'"
            ),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("meta", name="color-scheme", content="light dark"),
            element("meta", name="referrer", content="no-referrer"),
            element("title", title),
            element("style", style),
        ),
        element("body", element("main", *body)),
        lang="en",
    )
    return f"<!DOCTYPE html>\n{ElementTree.tostring(root, encoding='unicode', method='html')}\n"


GENERATOR = "metagpt_fast.page"


def _append_text(parent: Element, text: str) -> None:
    if len(parent):
        parent[-1].tail = (parent[-1].tail or "") + text
    else:
        parent.text = (parent.text or "") + text
