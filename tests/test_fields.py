"""Which field is the image, what a label is, and above all what does not travel."""

import hashlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from boomerang_batch.config.pipeline import FieldPolicy, ImagePolicy
from boomerang_batch.data import fields
from boomerang_batch.data.shards import Sample
from boomerang_batch.errors import SampleError
from tests import broken

ABOUT = {
    "url": "http://MARK-URL/",
    "sha256": "MARK-SHA",
    "age": 3,
    "name": "MARK-NAME",
    "nested": {"a": [1, "é"]},
}
FIELDS = {
    "jpg": b"MARK-IMAGE",
    "cls": b"7\n",
    "txt": b"MARK-CAPTION",
    "json": json.dumps(ABOUT, indent=1).encode(),
    "seg.png": b"MARK-MASK",
    "npy": b"MARK-BYTES",
}


def sample(**more):
    return Sample(key="k", fields={**FIELDS, **more}, offset=0)


def pseudonymize(data):
    return "p" + hashlib.sha256(b"secret" + data).hexdigest()[:15]


def travelling(source=None, purpose="anonymize", **policy):
    return fields.travelling(
        source or sample(),
        image_field="jpg",
        policy=FieldPolicy(**policy),
        purpose=purpose,
        pseudonymize=pseudonymize,
    )


# The image and its label


def test_the_image_is_the_one_of_the_alternatives_that_is_there():
    assert fields.image_field(sample(), ImagePolicy()) == "jpg"
    assert fields.image_field(sample(), ImagePolicy(field="seg.png")) == "seg.png"
    assert fields.image_field(sample(), ImagePolicy(field="webp; JPG")) == "jpg"


def test_several_images_are_not_chosen_from():
    with pytest.raises(SampleError, match=r"images\.field: jpg") as refused:
        fields.image_field(sample(png=b""), ImagePolicy())
    assert refused.value.reason == "ambiguous-image"


def test_a_missing_image_names_what_is_there_and_the_fix():
    with pytest.raises(SampleError, match=r"missing-image.*only cls$"):
        fields.image_field(Sample(key="k", fields={"cls": b"1"}, offset=0), ImagePolicy())
    with pytest.raises(SampleError, match=r"there is 001\.png: set images\.field"):
        fields.image_field(Sample(key="img", fields={"001.png": b"1"}, offset=0), ImagePolicy())


@pytest.mark.parametrize(("data", "label"), [(b"0", 0), (b"007", 7), (b" 12\r\n", 12), (b"9" * 18, 10**18 - 1)])
def test_labels(data, label):
    assert fields.read_label(sample(cls=data), "cls") == label


@pytest.mark.parametrize(
    "data", [b"", b"cat", b"-1", b"+1", b"1.0", b"1_0", b"1 2", "١".encode(), b"1" * 19, b"\xff"]
)
def test_bad_labels(data):
    with pytest.raises(SampleError, match="bad-label"):
        fields.read_label(sample(cls=data), "cls")


def test_missing_label():
    with pytest.raises(SampleError, match=r"missing-label.*no field y"):
        fields.read_label(sample(), "y")


# What travels


def test_under_anonymize_nothing_travels_by_default():
    assert travelling() == {}


@given(st.dictionaries(st.text(min_size=1), st.binary()))
def test_under_anonymize_nothing_travels_whatever_there_is(more):
    assert travelling(Sample(key="k", fields=more, offset=0)) == {}


@pytest.mark.parametrize("purpose", ["augment", "enhance"])
def test_else_everything_but_the_image_travels_byte_for_byte_and_in_order(purpose):
    expected = {name: data for name, data in FIELDS.items() if name != "jpg"}
    assert list(travelling(purpose=purpose).items()) == list(expected.items())


def test_the_source_image_never_travels_even_when_listed():
    assert "jpg" not in travelling(fields={"jpg": "keep"})
    assert "jpg" not in travelling(purpose="augment", fields={"jpg": "keep"})


def test_listed_fields_travel_and_only_they():
    assert travelling(fields={"cls": "keep", "npy": "keep"}) == {"cls": b"7\n", "npy": b"MARK-BYTES"}
    assert travelling(purpose="augment", fields={"txt": "drop", "json": "drop", "npy": "drop"}).keys() == {
        "cls",
        "seg.png",
    }


def test_fields_are_listed_in_any_case():
    assert travelling(purpose="augment", fields={"TXT": "drop"}).keys() == FIELDS.keys() - {"jpg", "txt"}


def test_a_careless_default_lets_no_image_and_no_json_key_through():
    found = travelling(default="keep")
    assert found == {"cls": b"7\n", "txt": b"MARK-CAPTION", "json": b"{}", "npy": b"MARK-BYTES"}
    assert travelling(default="keep", fields={"seg.png": "keep"})["seg.png"] == b"MARK-MASK"


@pytest.mark.parametrize(
    "picture",
    [
        broken.saved(broken.grey(), "gif"),
        broken.saved(broken.grey(), "tiff"),
        broken.saved(broken.grey(), "bmp"),
        broken.saved(broken.grey(), "jpeg"),
        b"\0\0\0\x1cftypheic",
        b"\0\0\0\x20ftypisom",
        b"%PDF-1.7",
    ],
)
@pytest.mark.parametrize("field", ["gif", "thumbnail", "preview.bin"])
def test_a_careless_default_lets_no_picture_through_whatever_it_is_called(field, picture):
    assert field not in travelling(sample(**{field: picture}), default="keep")
    assert travelling(sample(**{field: picture}), fields={field: "keep"}) == {field: picture}
    assert travelling(sample(**{field: picture}), purpose="augment")[field] == picture


@pytest.mark.parametrize("text", [b"BMW, parked", b"II", b"MM", b"", b"PDF", b"7"])
def test_texts_that_begin_like_pictures_are_texts(text):
    assert travelling(sample(txt=text), default="keep")["txt"] == text


def test_pseudonyms_of_fields_and_json_values():
    found = travelling(
        fields={"txt": "pseudonymize"}, json_keys={"name": "pseudonymize", "nested": "pseudonymize"}
    )
    assert found["txt"] == pseudonymize(b"MARK-CAPTION").encode()
    assert json.loads(found["json"]) == {
        "name": pseudonymize(b'"MARK-NAME"'),
        "nested": pseudonymize(b'{"a":[1,"\\u00e9"]}'),
    }
    assert not any(b"MARK" in data for data in found.values())
    assert travelling(default="pseudonymize")["json"] == pseudonymize(FIELDS["json"]).encode()


def test_json_travels_with_its_listed_keys_alone():
    assert travelling(json_keys={"age": "keep"})["json"] == b'{"age":3}'
    assert travelling(fields={"json": "keep"})["json"] == b"{}"
    assert "json" not in travelling(fields={"json": "drop"}, json_keys={"age": "keep"})
    assert travelling(json_keys={"age": "keep"}, default="keep")["json"] == b'{"age":3}'


def test_elsewhere_unlisted_json_keys_follow_the_default():
    found = json.loads(travelling(purpose="augment", json_keys={"url": "drop", "name": "pseudonymize"})["json"])
    assert found.keys() == ABOUT.keys() - {"url"}
    assert found["nested"] == ABOUT["nested"]
    kept = travelling(purpose="augment", json_keys={"age": "keep"})
    assert kept["json"] == FIELDS["json"]
    only = travelling(purpose="augment", default="drop", json_keys={"age": "keep"})
    assert only == {"json": b'{"age":3}'}


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[1]", b'"x"', b'{"age": NaN}', b'{"a":1,"a":2}', b"\xff\xfe{", b'{"a":' + b"[" * 100_000],
)
def test_json_that_must_be_filtered_and_cannot_be(data):
    with pytest.raises(SampleError) as refused:
        travelling(sample(json=data), json_keys={"age": "keep"})
    assert refused.value.reason == "bad-json"
    assert travelling(sample(json=data), purpose="augment")["json"] == data
    assert travelling(sample(json=data)) == {}


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    st.dictionaries(
        st.text(),
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats(allow_nan=False, allow_infinity=False)
            | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=8,
        ),
    )
)
def test_kept_json_values_are_unchanged(values):
    source = sample(json=json.dumps({"dropped": 1, **values}).encode())
    found = travelling(source, purpose="augment", json_keys={"dropped": "drop"})["json"]
    assert json.loads(found) == {name: value for name, value in values.items() if name != "dropped"}


def test_the_output_image_comes_first_and_replaces_nothing():
    assert list(fields.with_image("png", b"new", {"cls": b"1"}).items()) == [("png", b"new"), ("cls", b"1")]
    with pytest.raises(SampleError, match="field-collision"):
        fields.with_image("png", b"new", {"png": b"mask"})
