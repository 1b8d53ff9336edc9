"""Files of the repository that pages link, such as recipes and results: copied into the site, and the links with them.

In the repository a page of `docs` links a recipe as ``../configs/ddp.yaml``. The site is made of `docs` alone, so there
the file stands as ``repository/configs/ddp.yaml``.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

LINK = re.compile(r"(\]\()(?!\w+:|#|/)([^)#\s]+)")
COPIES = "repository"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what pages link outside of `docs`, and what that links in turn.

    Args:
        files: Of `docs`.
        config: Says where that is.
    """
    docs = Path(config.docs_dir)
    pending = [file.src_uri for file in files.documentation_pages()]
    while pending:
        page = pending.pop()
        source = in_repository(page, docs.name)
        for link in LINK.findall((docs.parent / source).read_text()):
            target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[1]))
            place = in_site(target, docs.name)
            if (docs.parent / target).is_file() and files.get_file_from_path(place) is None:
                files.append(File.generated(config, place, abs_src_path=str(docs.parent / target)))
                pending += [place] if place.endswith(".md") else []
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let the links of a page point to where the files are in the site.

    Args:
        markdown: The page.
        page: Says where it is.
        config: Says where `docs` is.
        files: Not needed.
    """
    docs = Path(config.docs_dir).name
    source = in_repository(page.file.src_uri, docs)

    def moved(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[2]))
        return link[1] + posixpath.relpath(in_site(target, docs), posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(moved, markdown)


def in_repository(path: str, docs: str) -> str:
    """Return where a file of the site is in the repository."""
    copied = f"{COPIES}/"
    return path.removeprefix(copied) if path.startswith(copied) else f"{docs}/{path}"


def in_site(path: str, docs: str) -> str:
    """Return where a file of the repository is in the site."""
    return path.removeprefix(f"{docs}/") if path.startswith(f"{docs}/") else f"{COPIES}/{path}"
