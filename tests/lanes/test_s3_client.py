"""What is taken for granted of S3's own client: its errors, and what it takes a time in an answer for."""

from __future__ import annotations

import datetime as dt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boomerang_batch import storage
from boomerang_batch.storage import remote
from boomerang_batch.storage.retries import may_pass
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


def test_a_lost_connection_may_pass_whatever_else_is_being_handled():
    """What is raised anew within an `except` has that error for its context, in place of its own cause."""
    from botocore.exceptions import EndpointConnectionError

    lost = EndpointConnectionError(endpoint_url="http://127.0.0.1:9")
    lost.__context__ = ConnectionRefusedError()

    def raise_anew() -> None:
        raise lost

    try:
        raise KeyError("what the caller is busy with")
    except KeyError:
        with pytest.raises(EndpointConnectionError):
            raise_anew()
    assert isinstance(lost.__context__, KeyError)
    assert may_pass(lost)


def test_stores_at_two_endpoints_are_two_places():
    urls = [storage.at_endpoint("s3://bucket/a", {"endpoint_url": f"http://host-{each}"}) for each in "ab"]
    assert len({remote.Remote(url)._place for url in urls}) == 2
