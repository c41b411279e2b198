"""storage/s3.py: a time in an answer of S3 is what botocore takes it for."""

from __future__ import annotations

import datetime as dt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boomerang_batch.storage.s3 import read_time

pytestmark = pytest.mark.lane
TIMES = st.datetimes(dt.datetime(1971, 1, 1), dt.datetime(2100, 1, 1), timezones=st.just(dt.UTC))


@given(time=TIMES)
@pytest.mark.parametrize("spelling", ["%Y-%m-%dT%H:%M:%S.%fZ", "%Y%m%dT%H%M%SZ", "%a, %d %b %Y %H:%M:%S GMT"])
def test_botocore_agrees(time: dt.datetime, spelling: str):
    from botocore.utils import parse_timestamp

    assert read_time(time.strftime(spelling)) == parse_timestamp(time.strftime(spelling))


def test_digits_alone_are_left_to_botocore():
    from botocore.utils import parse_timestamp

    for digits in ("1700000000", "20261122", 1700000000):
        assert read_time(digits) == parse_timestamp(digits)
