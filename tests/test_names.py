"""Names of systems and retrievers, and which of two are compared."""

from __future__ import annotations

import pytest

from alignkit.core.errors import UserError
from alignkit.core.names import check_names, read_comparisons

NAMES = ["base", "sft", "dpo"]


def test_names_are_what_a_file_and_a_url_can_hold() -> None:
    check_names("models", ["a", "7b", "sft-2", "v1.0_x"])
    for name in ("", "-a", ".a", "../x", "a b", "a/b", "ä", "a\n"):
        with pytest.raises(UserError, match=r"models: .* is no name; use letters"):
            check_names("models", [name])


def test_comparisons_default_to_neighbours() -> None:
    assert read_comparisons("models", NAMES, []) == [("sft", "base"), ("dpo", "sft")]
    assert read_comparisons("models", NAMES[:1], []) == []
    assert read_comparisons("models", NAMES, [" dpo > base "]) == [("dpo", "base")]


@pytest.mark.parametrize("comparison", ["dpo", "dpo>", "dpo>dpo", "dpo>sff", "dpo>sft>base"])
def test_a_comparison_is_of_two_of_the_names(comparison: str) -> None:
    with pytest.raises(UserError, match=r"must be 'new>old' with two of the retrievers base, sft, dpo"):
        read_comparisons("retrievers", NAMES, [comparison])
