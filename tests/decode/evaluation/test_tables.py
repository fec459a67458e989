"""Tables as text, and back."""

from decode.evaluation.tables import markdown, read_markdown

ROWS = [{"rule": "quota", "tokens/s": "12"}, {"rule": "threshold", "tokens/s": "7"}]


def test_what_is_written_is_read():
    others = [{"a": ""}]
    page = f"Text.\n\n{markdown(ROWS)}\n\nMore.\n\n{markdown(others)}\nEnd.\n"
    assert read_markdown(page) == [ROWS, others]


def test_pages_without_tables():
    assert read_markdown("Text | with a bar.\n") == []
