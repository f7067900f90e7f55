"""The tables in the docs are those of the committed measurements."""

import docs_tables
import pytest


@pytest.mark.parametrize("page", docs_tables.PAGES)
def test_page_is_up_to_date(page):
    """Else run scripts/docs_tables.py."""
    assert docs_tables.page(page) == (docs_tables.DOCS / page).read_text()


def test_page_without_a_place_for_a_table_is_named():
    with pytest.raises(ValueError, match="there are 0 places for mine"):
        docs_tables.filled("<!-- other -->\n<!-- end -->", {"mine": "| |"})
