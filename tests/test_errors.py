"""errors.py: the tree its docstring draws is the one in the code, and every error survives pickling."""

from __future__ import annotations

import pickle
import re

import pytest

from boomerang_batch import errors


def tree(kind=errors.BoomerangError):
    return [kind, *(below for child in kind.__subclasses__() for below in tree(child))]


def drawn():
    """(name, depth, exit code given or None) of every line of the docstring's drawing, in order."""
    found = []
    for line in errors.__doc__.splitlines():
        match = re.match(r" {4}([│├└─ ]*)(\w+Error)\b(?: +exit (\d+))?", line)
        if match:
            found.append((match[2], len(match[1]) // 4, int(match[3]) if match[3] else None))
    return found


def test_the_docstring_draws_every_error_below_its_parent():
    parents, lines = {}, {}
    for name, depth, _ in drawn():
        lines[depth] = name
        parents[name] = lines.get(depth - 1)
    expected = {
        kind.__name__: kind.__base__.__name__ for kind in tree()[1:] if kind.__module__ == errors.__name__
    }
    assert parents == {"BoomerangError": None} | expected


@pytest.mark.parametrize(("name", "code"), [(name, code) for name, _, code in drawn() if code is not None])
def test_the_docstring_tells_the_exit_code(name, code):
    assert getattr(errors, name).exit_code == code


def test_exit_codes_are_those_of_the_readme_and_none_means_success():
    assert {kind.exit_code for kind in tree()} == {1, 2, 3, 4, 75}


@pytest.mark.parametrize("kind", [kind for kind in tree() if not issubclass(kind, errors.SampleError)])
def test_an_error_comes_through_pickle(kind):
    error = pickle.loads(pickle.dumps(kind("shard a.tar: what to do")))
    assert type(error) is kind
    assert str(error) == "shard a.tar: what to do"


def test_a_sample_error_keeps_its_reason_and_detail():
    error = pickle.loads(pickle.dumps(errors.SampleError("undecodable", "a.png is no PNG")))
    assert (error.reason, error.detail) == ("undecodable", "a.png is no PNG")
    assert str(error) == "undecodable: a.png is no PNG"
