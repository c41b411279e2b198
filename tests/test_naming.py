"""What a name may tell: nothing under a secret, everything needed without one."""

from __future__ import annotations

from pathlib import Path

import pytest

from boomerang_batch.errors import SampleError
from boomerang_batch.run.naming import ORIGINAL, Naming, member_key, refuse_reserved_key
from tests import worlds

SECRET = bytes(range(32))
MODEL = Path("model")


def private(*overrides: str, secret: bytes = SECRET) -> Naming:
    return Naming(worlds.recipe(MODEL, *overrides), secret)


def public(*overrides: str) -> Naming:
    return Naming(worlds.recipe(MODEL, *overrides, purpose="augment"), None)


def row_key(naming: Naming, shard: str, key: str, variant: int = 0) -> str:
    return naming.row_key(shard=shard, key=key, variant=variant)


def test_without_a_secret_names_stay_and_noise_goes_by_the_seed():
    naming = public()
    assert (naming.stem("s"), row_key(naming, "s", "k"), naming.noise_key_id) == ("s", "k", "seed:7")
    identity = naming.identity(shard="s", key="k", image=b"")
    assert naming.noise_key(identity, 0) != public("seed=8").noise_key(identity, 0)


def test_under_a_secret_every_name_is_another_one_and_hangs_on_the_secret():
    naming, other = private(), private(secret=SECRET[::-1])
    for name in (
        lambda n: n.stem("s"),
        lambda n: row_key(n, "s", "k"),
        lambda n: n.digest(b"k"),
        lambda n: n.pseudonym(b"k"),
        lambda n: n.noise_key_id,
        lambda n: n.noise_key(b"k", 0),
    ):
        assert name(naming) == name(private())
        assert name(naming) != name(other)
    # Each purpose has its own function of the secret.
    made = {naming.pseudonym(b"k"), naming.digest(b"k")[:32], row_key(naming, "s", "k")}
    assert len({made_of[:16] for made_of in made} | {naming.stem("k")}) == 4


def test_variants_have_pseudonyms_and_digests_that_do_not_meet():
    """Whoever knew which outputs come from one image could average the noise away."""
    naming = private()
    keys = [row_key(naming, "s", "k", variant) for variant in range(3)]
    assert len(set(keys)) == 3
    assert len({naming.source_digest(b"image", row_key=key) for key in keys}) == 3
    assert naming.source_digest(b"image", row_key="a") != naming.source_digest(b"other", row_key="a")


def test_without_a_secret_the_source_digest_is_that_of_the_file():
    sha256 = "6105d6cc76af400325e94d588ce511be5bfdbb73b437dc51eca43917d7a43e3d"
    assert public().source_digest(b"image", row_key="whatever") == sha256


@pytest.mark.parametrize(
    ("identity", "same_key", "same_image"),
    [("key", True, False), ("shard+key", False, False), ("content", False, True)],
)
def test_identity_names_the_noise(identity: str, same_key: bool, same_image: bool):
    naming = private(f"identity={identity}")

    def of(shard: str, key: str, image: bytes) -> bytes:
        return naming.identity(shard=shard, key=key, image=image)

    assert (of("a", "k", b"1") == of("b", "k", b"2")) is same_key
    assert (of("a", "k", b"1") == of("b", "l", b"1")) is same_image
    # Only keys that name alone share a pseudonym, which is how doubled ones are found.
    assert (row_key(naming, "a", "k") == row_key(naming, "b", "k")) is (identity == "key")


def test_shard_and_key_can_t_be_cut_in_two_ways():
    naming = private("identity=shard+key")
    assert row_key(naming, "a", "b/c") != row_key(naming, "a/b", "c")


@pytest.mark.parametrize(
    ("overrides", "variant", "expected"),
    [
        ((), 0, "k"),
        (("variants=2",), 1, "k-v1"),
        (("keep_originals=true",), 0, "k-v0"),
        (("keep_originals=true",), ORIGINAL, "k"),
    ],
)
def test_member_keys(overrides: tuple[str, ...], variant: int, expected: str):
    assert member_key(worlds.recipe(MODEL, *overrides, purpose="augment"), "k", variant) == expected


def test_a_key_that_could_be_a_variant_s_is_refused_beside_originals_only():
    keeping = worlds.recipe(MODEL, "keep_originals=true", purpose="augment")
    with pytest.raises(SampleError) as refusal:
        refuse_reserved_key(keeping, "k-v0")
    assert refusal.value.reason == "reserved-key"
    refuse_reserved_key(keeping, "k-v")
    refuse_reserved_key(worlds.recipe(MODEL, purpose="augment"), "k-v0")


def test_two_recipes_share_noise_under_a_seed_and_never_under_a_secret():
    """Equal noise at two t would cancel, and show the image that both releases were made of."""
    near, far = ("t.fraction=0.4", "t.fraction=0.8")
    assert private(near).noise_key(b"k", 0) != private(far).noise_key(b"k", 0)
    assert private(near).noise_key(b"k", 0) == private(near).noise_key(b"k", 0)
    assert private(near).row_key(shard="a", key="k", variant=0) == private(far).row_key(
        shard="a", key="k", variant=0
    )
    seeded = [Naming(worlds.recipe(MODEL, t, purpose="augment"), None) for t in (near, far)]
    assert seeded[0].noise_key(b"k", 0) == seeded[1].noise_key(b"k", 0)
