"""The ledger: order, withdrawal, and bytes given back as they came."""

from __future__ import annotations

import time
import tracemalloc
from pathlib import Path

import pytest

from boomerang_batch.data.provenance import Row
from boomerang_batch.run.ledger import Ledger, Source


def row(key: str | None, variant: int = 0, status: str = "ok") -> Row:
    bad = status != "ok"
    return Row(
        key=key,
        variant=variant,
        status=status,
        reason="undecodable" if bad else None,
        output_digest=None if bad else "0",
        model_digest="m",
        recipe_digest="r",
        versions="v",
    )


def fill(ledger: Ledger) -> None:
    """Two samples of two variants, finished in another order than read, and a gap between them."""
    for key, offset, variant in (("b", 0, 1), ("a", 2048, 0), ("b", 0, 0), ("a", 2048, 1)):
        fields = {"png": f"{key}{variant}".encode(), "cls": b"3"}
        ledger.add(Source(key=key, offset=offset), row(key, variant), f"{key}-v{variant}", fields)
    ledger.withdraw(Source(key=None, offset=1024), row(None, 0, "unreadable"))


@pytest.mark.parametrize(
    ("by_pseudonym", "expected"),
    [
        (False, [("b", 0), ("b", 1), (None, 0), ("a", 0), ("a", 1)]),
        (True, [("a", 0), ("a", 1), ("b", 0), ("b", 1), (None, 0)]),
    ],
)
def test_rows_and_samples_have_one_order(tmp_path: Path, by_pseudonym: bool, expected: list):
    with Ledger(tmp_path / "spool", by_pseudonym=by_pseudonym) as ledger:
        fill(ledger)
        assert [(found.key, found.variant) for _, found in ledger.rows()] == expected
        samples = list(ledger.samples())
    assert [key for key, _ in samples] == [f"{key}-v{variant}" for key, variant in expected if key]
    assert all(fields == {"png": key.replace("-v", "").encode(), "cls": b"3"} for key, fields in samples)


def test_a_withdrawn_key_takes_all_it_had_and_all_that_is_still_to_come(tmp_path: Path):
    with Ledger(tmp_path / "spool", by_pseudonym=False) as ledger:
        fill(ledger)
        ledger.withdraw(Source(key="a", offset=4096), row("a", 0, "unreadable"))
        ledger.add(Source(key="a", offset=2048), row("a", 2), "a-v2", {"png": b"late"})
        ledger.refuse(Source(key="a", offset=2048), row("a", 3, "failed"))
        assert [(found.key, found.variant, found.status) for _, found in ledger.rows()] == [
            ("b", 0, "ok"),
            ("b", 1, "ok"),
            (None, 0, "unreadable"),
            ("a", 0, "unreadable"),
        ]
        ledger.withdraw(Source(key="a", offset=8192), row("a", 0, "unreadable"))
        assert [source.offset for source, found in ledger.rows() if found.key == "a"] == [8192]


def test_a_refusal_replaces_nothing_but_its_own_variant(tmp_path: Path):
    with Ledger(tmp_path / "spool", by_pseudonym=False) as ledger:
        fill(ledger)
        ledger.refuse(Source(key="b", offset=0), row("b", 2, "failed"))
        assert [found.variant for _, found in ledger.rows() if found.key == "b"] == [0, 1, 2]


@pytest.mark.slow
def test_withdrawals_cost_the_same_however_long_the_shard_is(tmp_path: Path):
    with Ledger(tmp_path / "spool", by_pseudonym=False) as ledger:
        for number in range(20_000):
            ledger.refuse(Source(key=f"{number}", offset=number), row(f"{number}", 0, "failed"))
        started = time.process_time()
        for number in range(20_000):
            ledger.withdraw(Source(key=f"x{number}", offset=number), row(f"x{number}", 0, "unreadable"))
        assert time.process_time() - started < 5  # it once took minutes


@pytest.mark.slow
@pytest.mark.parametrize("by_pseudonym", [False, True])
def test_an_output_costs_memory_next_to_nothing(tmp_path: Path, by_pseudonym: bool):
    """Its bytes and its row are on disk: a shard of a million must not fill a worker."""
    count, data = 1_000, {"png": bytes(2_000), "cls": b"3"}
    tracemalloc.start()
    try:
        with Ledger(tmp_path / "spool", by_pseudonym=by_pseudonym) as ledger:
            for number in range(count):
                source = Source(key=f"sample{number:07d}", offset=number)
                ledger.add(source, row(f"{number:064d}"), f"{number:064d}", data)
            assert tracemalloc.get_traced_memory()[0] < 1_000 * count
            tracemalloc.reset_peak()
            assert sum(1 for _ in ledger.rows()) == sum(1 for _ in ledger.samples()) == count
            assert tracemalloc.get_traced_memory()[1] < 1_100 * count
    finally:
        tracemalloc.stop()
