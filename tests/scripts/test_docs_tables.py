"""Tables on pages are those that the docstrings make."""

import re

from scripts.docs_tables import tables


def test_pages_are_not_stale():
    for page, text in tables.pages().items():
        assert page.read_text() == text, f"{page.name}: run python -m scripts.docs_tables"


def test_no_page_has_another_table_of_the_same_things():
    """What a docstring says is written once."""
    for page, text in tables.pages().items():
        listed = {}
        for part in re.findall(r"<!-- table: .*? -->(.*?)<!-- end of table", text, re.DOTALL):
            listed |= dict.fromkeys(re.findall(r"^\|.*?`(\w+)` \|", part, re.MULTILINE))
        assert len(listed) >= 4 or page.name == "README.md"  # which counts
        by_hand = re.sub(r"<!-- table: .*? -->.*?<!-- end of table", "", text, flags=re.DOTALL)
        for name in listed:
            assert f"| `{name}` |" not in by_hand, f"{page.name} has a row of {name} by hand"
