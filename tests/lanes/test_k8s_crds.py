"""The lane `make test-k8s`: the RayJobs of every overlay against the operator's own schemas, made strict.

KubeRay's custom resource definitions are not part of this project and no package ships them. KUBERAY_CRDS names
a folder with `ray.io_rayjobs.yaml`, plain or as .xz, as it lies in KubeRay's repository under
ray-operator/config/crd/bases at the operator's tag. Without it the lane fails, unless BOOMERANG_SKIP_CRDS=1.
"""

from __future__ import annotations

import copy
import functools
import lzma
import os
from pathlib import Path

import jsonschema
import pytest
import yaml

from tests.kustomized import OVERLAYS, only

pytestmark = pytest.mark.lane
overlay = pytest.mark.parametrize("overlay", OVERLAYS)


@functools.cache
def definition(name="ray.io_rayjobs.yaml"):
    """A custom resource definition. Fails with the way to get it, or skips where that is asked for."""
    folder = os.environ.get("KUBERAY_CRDS")
    found = [
        path for path in (Path(folder or ".") / name, Path(folder or ".") / f"{name}.xz") if path.is_file()
    ]
    if folder and found:
        data = found[0].read_bytes()
        return yaml.safe_load(lzma.decompress(data) if found[0].suffix == ".xz" else data)
    if os.environ.get("BOOMERANG_SKIP_CRDS") == "1":
        pytest.skip("BOOMERANG_SKIP_CRDS=1: RayJobs stay unchecked")
    pytest.fail(
        f"KUBERAY_CRDS is {folder!r}: it must name a folder with {name}, from ray-operator/config/crd/bases of "
        "github.com/ray-project/kuberay at the operator's tag (v1.7.0); BOOMERANG_SKIP_CRDS=1 skips these tests"
    )


def strict(schema):
    """An OpenAPI v3 schema as a JSON schema that refuses what it does not know."""
    kept = {key: value for key, value in schema.items() if not key.startswith("x-") and key != "format"}
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    if "properties" in schema:
        kept["properties"] = {name: strict(value) for name, value in schema["properties"].items()}
        if "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            kept["additionalProperties"] = False
    if isinstance(schema.get("additionalProperties"), dict):
        kept["additionalProperties"] = strict(schema["additionalProperties"])
    if "items" in schema:
        kept["items"] = strict(schema["items"])
    return kept


@functools.cache
def rayjob():
    """The schema of the RayJobs that this project writes."""
    (version,) = [each for each in definition()["spec"]["versions"] if each["name"] == "v1"]
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft202012Validator(schema)


def refusals(job):
    return [f"{error.json_path}: {error.message}" for error in rayjob().iter_errors(job)]


@overlay
def test_every_rayjob_fits_the_operators_schema(overlay):
    assert refusals(only(overlay, "RayJob")) == []


def mutants():
    """RayJobs with one mistake each, by what the refusal must name."""
    job = only("gpu-spot", "RayJob")

    def changed(change):
        mutant = copy.deepcopy(job)
        change(mutant["spec"])
        return mutant

    def group(spec):
        return spec["rayClusterSpec"]["workerGroupSpecs"][0]

    return {
        "minReplica'": changed(lambda spec: group(spec).update(minReplica=group(spec).pop("minReplicas"))),
        "'eight'": changed(lambda spec: group(spec).update(maxReplicas="eight")),
        "secretname": changed(lambda spec: spec["rayClusterSpec"]["authOptions"].update(secretname="x")),
        "'basic'": changed(lambda spec: spec["rayClusterSpec"]["authOptions"].update(mode="basic")),
        "volumeMount'": changed(
            lambda spec: spec["submitterPodTemplate"]["spec"]["containers"][0].update(volumeMount=[])
        ),
    }


@pytest.mark.parametrize("named", list(mutants()))
def test_a_mistake_is_refused(named):
    assert any(named in refusal for refusal in refusals(mutants()[named]))
