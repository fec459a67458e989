"""Tables in docs/ are those that the docstrings make."""

from scripts.docs_tables import tables


def test_pages_are_not_stale():
    for page, text in tables.pages().items():
        assert page.read_text() == text, f"{page.name}: run python -m scripts.docs_tables"
