"""S3's client, made so that long listings are read fast.

botocore hands every time in an answer to dateutil, which takes any spelling and three quarters of the time that
a listing takes; of three hundred thousand objects that is most of a minute. Stores spell times as ISO 8601 has
them, which Python itself reads; whatever it can't read is left to botocore.
"""

from __future__ import annotations

import contextlib
import datetime as dt
from typing import Any


def read_times_fast(filesystem: Any) -> None:
    """Have an S3 client that has not asked anything yet, or is ours already, read times by `read_time`."""
    if filesystem.session is None:
        import aiobotocore.session

        session = aiobotocore.session.AioSession(**filesystem.kwargs)
        session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=read_time)
        filesystem.session = session


def read_time(value: str | float) -> dt.datetime:
    """A time as a store's answer has it. Raises ValueError for none."""
    if isinstance(value, str) and "T" in value:  # digits alone may be seconds since 1970
        with contextlib.suppress(ValueError):
            return dt.datetime.fromisoformat(value)
    from botocore.utils import parse_timestamp

    parsed: dt.datetime = parse_timestamp(value)
    return parsed
