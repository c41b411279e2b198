"""storage/s3.py: times as stores spell them are read; tests/lanes compares with botocore."""

from __future__ import annotations

import datetime as dt

from hypothesis import given
from hypothesis import strategies as st

from boomerang_batch.storage.s3 import read_time

TIMES = st.datetimes(dt.datetime(1971, 1, 1), dt.datetime(2100, 1, 1), timezones=st.just(dt.UTC))


@given(time=TIMES)
def test_times_as_stores_spell_them_are_read(time: dt.datetime):
    milliseconds = time.replace(microsecond=time.microsecond // 1000 * 1000)
    assert read_time(f"{milliseconds:%Y-%m-%dT%H:%M:%S}.{time.microsecond // 1000:03d}Z") == milliseconds
    assert read_time(f"{time:%Y-%m-%dT%H:%M:%SZ}") == time.replace(microsecond=0)
