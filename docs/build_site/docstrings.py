"""What mkdocstrings does not read of our docstrings by itself: ``Example:``, formulas, tables of reStructuredText."""

import re
from typing import Any

import griffe
from latex2mathml.converter import convert

BLOCK = re.compile(r"^( *)\.\. math:: (.*(?:\n\1 +\S.*)*)", re.MULTILINE)
INLINE = re.compile(r":math:`([^`]+)`")
EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)
RULE = r" *=+(?: +=+)+\n"
TABLE = re.compile(rf"^{RULE}.*\n{RULE}(?:.*\n)+?{RULE}", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites docstrings before they are parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of an object.

        Args:
            obj: A module, class, function or attribute.
        """
        if obj.docstring:
            obj.docstring.value = in_markdown(obj.docstring.value)


def in_markdown(text: str) -> str:
    """Return a docstring with formulas as MathML, tables as code, and examples under the title that is looked for.

    Args:
        text: As it stands in the source.
    """
    text = BLOCK.sub(lambda found: found[1] + mathml(found[2], display="block"), text)
    text = INLINE.sub(lambda found: mathml(found[1], display="inline"), text)
    text = TABLE.sub(lambda found: f"```text\n{found[0]}```\n", text)
    return EXAMPLE.sub(r"\1Examples:", text)


def mathml(formula: str, display: str) -> str:
    """Return MathML, which browsers draw themselves, of a formula in LaTeX.

    Args:
        formula: As in ``:math:``; may be broken over lines.
        display: ``inline`` or ``block``.
    """
    return convert(" ".join(formula.split()), display=display)
