"""Where codes are kept, and how they are read back: shards of their own, each with rows and a marker."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO, cast

from boomerang_batch import storage
from boomerang_batch.config.pipeline import Recipe
from boomerang_batch.data.codes import FIELD
from boomerang_batch.data.provenance import Marker
from boomerang_batch.data.scan import Measured
from boomerang_batch.data.shards import Sample, read_samples
from boomerang_batch.errors import ObjectMissingError, PrivateDirError, SampleError, VerificationError
from boomerang_batch.run.commit import PROVENANCE_SUFFIX, TAR_SUFFIX, digest_stream

FOLDER = "codes"
MAX_CODE_BYTES = 4 << 30


def codes_home(recipe: Recipe, out: str, private_dir: str | None) -> str:
    """Where a run keeps its codes: in OUT, or where nothing may be told of the sources, in the private dir."""
    if recipe.purpose != "anonymize":
        return storage.join(out, FOLDER)
    if private_dir is None:
        raise PrivateDirError(
            f"method {recipe.method} keeps codes, which give the sources back: give --private-dir DIR"
        )
    return storage.join(private_dir, FOLDER)


class Codes:
    """The codes of one shard, unpacked into a local folder by the names that they have there."""

    def __init__(self, home: str, marker: Marker, folder: Path) -> None:
        """Read them. Raises VerificationError where shard or rows are gone, or not what the marker says."""
        folder.mkdir()
        self._places: dict[str, Path] = {}
        rows = storage.join(home, marker.stem + PROVENANCE_SUFFIX)
        url = storage.join(home, marker.stem + TAR_SUFFIX)
        try:
            with storage.open_read(rows) as stream:
                if digest_stream(stream).sha256 != marker.parquet_sha256:
                    raise VerificationError(f"{rows} does not have the digest its marker says")
            with storage.open_read(url) as stream:
                measured = Measured(stream)
                samples = read_samples(cast("BinaryIO", measured), shard=url, max_member_bytes=MAX_CODE_BYTES)
                for item in samples:
                    if isinstance(item, Sample) and FIELD in item.fields:
                        place = folder / f"{len(self._places)}.safetensors"
                        place.write_bytes(item.fields[FIELD])
                        self._places[item.key] = place
                measured.finish()
        except ObjectMissingError as error:
            raise VerificationError(f"{error}, though the marker beside it is there") from error
        if measured.digest != marker.tar_sha256:
            raise VerificationError(f"{url} does not have the digest its marker says")

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def read(self, name: str) -> bytes:
        """The code of this name, as it is kept. Raises SampleError where there is none."""
        return self.place(name).read_bytes()

    def place(self, name: str) -> Path:
        """The file that holds the code of this name. Raises SampleError where there is none."""
        if name not in self._places:
            raise SampleError("no-code", "no code could be drawn of it; the rows of the codes say why")
        return self._places[name]
