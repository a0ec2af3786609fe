"""Which cases of a test `make test` leaves to `make test-all`."""

import pytest


def mostly_long(cases, *kept):
    """`cases` for parametrize; all but those `kept` are marked `long`."""
    assert all(case in cases for case in kept)
    return [case if case in kept else pytest.param(case, marks=pytest.mark.long) for case in cases]
