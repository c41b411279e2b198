"""The overlays of k8s/ as kubectl builds them, and their parts by name: what several lanes of tests look at."""

from __future__ import annotations

import copy
import functools
import importlib.util
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
K8S = ROOT / "k8s"
OVERLAYS = sorted(path.parent.name for path in K8S.glob("overlays/*/kustomization.yaml"))
KUBECTL = Path(sys.executable).with_name("kubectl")


@functools.cache
def text(overlay: str) -> str:
    """What `kubectl kustomize` makes of an overlay."""
    command = [KUBECTL, "kustomize", K8S / "overlays" / overlay]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def built(overlay: str) -> list[dict[str, Any]]:
    """The objects of an overlay, fresh ones at each call."""
    return copy.deepcopy(_parsed(overlay))


@functools.cache
def _parsed(overlay: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(text(overlay)))


def only(overlay: str, kind: str, name: str | None = None) -> dict[str, Any]:
    """The one object of a kind, and of a name if more have the kind."""
    (found,) = [
        each for each in built(overlay) if each["kind"] == kind and name in (None, each["metadata"]["name"])
    ]
    return found


@dataclass(frozen=True, kw_only=True)
class Pods:
    """A pod template: all pods of one role are alike."""

    role: str
    template: dict[str, Any]
    added: tuple[dict[str, Any], ...] = ()
    """Containers that the operator puts beside, of which a RayJob only says how."""

    @property
    def spec(self) -> dict[str, Any]:
        return self.template["spec"]

    @property
    def main(self) -> dict[str, Any]:
        """The container that Ray, the submitter or the launcher runs in."""
        return self.spec["containers"][0]

    @property
    def containers(self) -> list[dict[str, Any]]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"], *self.added]


def pods(overlay: str) -> list[Pods]:
    """Every pod template of an overlay, also those inside a RayJob, where no schema of Kubernetes looks."""
    found = []
    for each in built(overlay):
        spec = each.get("spec", {})
        if each["kind"] == "RayJob":
            cluster = spec["rayClusterSpec"]
            head = cluster["headGroupSpec"]["template"]
            image = head["spec"]["containers"][0]["image"]
            added = (
                [{"name": "autoscaler", "image": image, **cluster.get("autoscalerOptions", {})}]
                if cluster.get("enableInTreeAutoscaling")
                else []
            )
            found.append(Pods(role="head", template=head, added=tuple(added)))
            found += [Pods(role="worker", template=group["template"]) for group in cluster["workerGroupSpecs"]]
            found.append(Pods(role="submitter", template=spec["submitterPodTemplate"]))
        elif each["kind"] == "CronJob":
            found.append(Pods(role="launcher", template=spec["jobTemplate"]["spec"]["template"]))
    return found


def by_role(overlay: str, role: str) -> Pods:
    """The one pod template of a role."""
    (found,) = [each for each in pods(overlay) if each.role == role]
    return found


@functools.cache
def launcher() -> ModuleType:
    """The scheduled overlay's launch.py, a script that no package holds."""
    spec = importlib.util.spec_from_file_location(
        "boomerang_launch", K8S / "overlays" / "scheduled" / "launch.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def environment(container: dict[str, Any]) -> dict[str, Any]:
    """A container's environment: values, or what is said instead of one."""
    return {each["name"]: each.get("value", each.get("valueFrom")) for each in container.get("env", [])}
