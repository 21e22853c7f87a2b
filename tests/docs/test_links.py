"""No page leads to where nothing is."""

from __future__ import annotations

import pytest
from pages import PAGES, ROOT, anchors, links


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    assert not [link for link in links(page) if not link.startswith(("https://", "http://")) and not leads(page, link)]


def leads(page: str, link: str) -> bool:
    """Whether there is such a file in the repository, and such a heading in it."""
    place, _, anchor = link.partition("#")
    target = ((ROOT / page).parent / place).resolve() if place else ROOT / page
    if not target.exists() or ROOT not in (target, *target.parents):
        return False
    return not anchor or anchor in anchors(target.relative_to(ROOT).as_posix())


def test_a_broken_link_is_found() -> None:
    assert leads("README.md", "runtime/README.md#promises")
    for link in ("nowhere.md", "../outside.md", "runtime/README.md#promise", "#nothing"):
        assert not leads("README.md", link)


def test_every_page_is_reached_from_the_readme() -> None:
    reached, new = set[str](), {"README.md"}
    while new:
        reached |= new
        places = {((ROOT / page).parent / link.partition("#")[0]).resolve() for page in new for link in links(page)}
        found = {place.relative_to(ROOT).as_posix() for place in places if ROOT in place.parents}
        new = {page for page in found if page.endswith(".md")} - reached
    assert reached >= set(PAGES)
