"""What travels beside the image: which field is the image, what its label is, what is kept, dropped or masked.

With `purpose: anonymize` nothing travels that the recipe doesn't list: captions, file names, digests and json
keys of the source are how outputs are linked back. For other purposes everything travels byte for byte.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from boomerang_batch.config.pipeline import FieldAction, FieldPolicy, ImagePolicy
from boomerang_batch.data.formats import EXTENSIONS, looks_like_image
from boomerang_batch.data.shards import Sample
from boomerang_batch.errors import SampleError

JSON_FIELD = "json"

_LABEL = re.compile(rb"\s*([0-9]{1,18})\s*")


def image_field(sample: Sample, policy: ImagePolicy) -> str:
    """The field that holds the image. Raises SampleError `missing-image` or `ambiguous-image`, with the fix."""
    wanted = [name.strip() for name in policy.field.lower().split(";") if name.strip()]
    found = [name for name in wanted if name in sample.fields]
    if len(found) == 1:
        return found[0]
    if found:
        raise SampleError(
            "ambiguous-image",
            f"sample {sample.key} has {' and '.join(found)}; say which is the image: images.field: {found[0]}",
        )
    there = ", ".join(sample.fields)
    near = next((name for name in sample.fields if name.rpartition(".")[2] in EXTENSIONS), None)
    hint = f"; there is {near}: set images.field to it, or take the dots out of the keys" if near else ""
    detail = f"sample {sample.key} has no field {' or '.join(wanted)}, only {there}{hint}"
    raise SampleError("missing-image", detail)


def read_label(sample: Sample, field: str) -> int:
    """The integer label in `field`, decimal digits. Raises SampleError `missing-label` or `bad-label`."""
    data = sample.fields.get(field)
    if data is None:
        there = ", ".join(sample.fields)
        raise SampleError("missing-label", f"sample {sample.key} has no field {field}, only {there}")
    digits = _LABEL.fullmatch(data)
    if digits is None:
        shown = data[:20].decode("utf-8", "backslashreplace")
        detail = f"sample {sample.key}: field {field} holds {shown!r}, not a class number such as 3"
        raise SampleError("bad-label", detail)
    return int(digits[1])


def read_text(sample: Sample, field: str) -> str:
    """The text in `field`, UTF-8, stripped. Raises SampleError `missing-text` or `bad-text`."""
    data = sample.fields.get(field)
    if data is None:
        there = ", ".join(sample.fields)
        raise SampleError("missing-text", f"sample {sample.key} has no field {field}, only {there}")
    try:
        return data.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise SampleError(
            "bad-text", f"sample {sample.key}: field {field} is not UTF-8 text: {error}"
        ) from error


def travelling(
    sample: Sample,
    *,
    image_field: str,
    policy: FieldPolicy,
    purpose: str,
    pseudonymize: Callable[[bytes], str],
) -> dict[str, bytes]:
    """The fields that travel beside the output image, in the sample's order, treated as the policy says.

    The policy's `default`, or else drop under anonymize and keep otherwise, goes for every field not listed.
    Kept fields are byte-identical, but `json`: where the policy lets only some of its keys travel it is parsed,
    filtered and written anew, compact and sorted. Listing `json_keys` is enough to let json travel.
    Two things never travel under anonymize whatever the default: json keys and images that aren't listed, told
    by their extension or by their bytes.
    Pseudonyms are made of a field's bytes, or of a json value in compact sorted form.

    Raises SampleError `bad-json` for json that must be filtered and can't be.
    """
    default: FieldAction = policy.default or ("drop" if purpose == "anonymize" else "keep")
    # The reader gives fields in lower case; `TXT: drop` must not miss them.
    listed = {name.lower(): action for name, action in policy.fields.items()}
    result: dict[str, bytes] = {}
    for field, data in sample.fields.items():
        if field == image_field:
            continue
        fallback = default
        if field == JSON_FIELD and policy.json_keys:
            fallback = "keep"
        elif purpose == "anonymize" and default == "keep" and _is_image(field, data):
            fallback = "drop"
        action = listed.get(field, fallback)
        if action == "pseudonymize":
            result[field] = pseudonymize(data).encode()
        elif action == "keep" and field == JSON_FIELD:
            result[field] = _filtered_json(sample.key, data, policy.json_keys, default, purpose, pseudonymize)
        elif action == "keep":
            result[field] = data
    return result


def with_image(field: str, data: bytes, travelling: Mapping[str, bytes]) -> dict[str, bytes]:
    """An output sample's fields, the image first. Raises SampleError `field-collision`.

    A change of format renames the image's field, and one that travels may have that name already.
    """
    if field in travelling:
        detail = (
            f"the output image would replace the travelling field {field}; drop it or set images.format: input"
        )
        raise SampleError("field-collision", detail)
    return {field: data, **travelling}


def _is_image(field: str, data: bytes) -> bool:
    return field.rpartition(".")[2] in EXTENSIONS or looks_like_image(data)


def _filtered_json(
    key: str,
    data: bytes,
    json_keys: Mapping[str, FieldAction],
    default: FieldAction,
    purpose: str,
    pseudonymize: Callable[[bytes], str],
) -> bytes:
    fallback: FieldAction = "drop" if purpose == "anonymize" else default
    if fallback == "keep" and all(action == "keep" for action in json_keys.values()):
        return data
    try:
        values = json.loads(data, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
        if not isinstance(values, dict):
            raise ValueError("the top level is no object")
        result: dict[str, Any] = {}
        for name, value in values.items():
            action = json_keys.get(name, fallback)
            if action == "keep":
                result[name] = value
            elif action == "pseudonymize":
                result[name] = pseudonymize(_compact(value))
        return _compact(result)
    except (ValueError, RecursionError) as error:
        detail = f"sample {key}: field {JSON_FIELD} can't be filtered: {error}"
        raise SampleError("bad-json", detail) from error


def _compact(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Readers differ in which of two equal keys they take, so neither is passed on."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key is given twice")
    return values
