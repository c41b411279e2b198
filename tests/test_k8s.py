"""The overlays of k8s/ build, fit Kubernetes' own schemas, and hold what no schema can say.

RayJobs are checked against the operator's schemas by `make test-k8s`, and by a real API server in
`make test-k8s-api`; the pods inside them are checked here, as what they are to Kubernetes.
"""

from __future__ import annotations

import copy
import fnmatch
import re
import tomllib

import kubernetes_validate
import pytest
import yaml

from boomerang_batch import errors
from boomerang_batch.cli.run import run as run_command
from boomerang_batch.config.pipeline import parse_recipe
from boomerang_batch.data.manifest import load_manifest
from tests.kustomized import K8S, OVERLAYS, ROOT, built, by_role, environment, only, pods, text

KUBERNETES = "1.37"
overlay = pytest.mark.parametrize("overlay", OVERLAYS)
with_gpus = pytest.mark.parametrize("overlay", [name for name in OVERLAYS if name != "cpu-smoke"])

PINS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
)


def parts(overlay):
    """Everything of an overlay that Kubernetes itself has a schema for."""
    kinds = [each for each in built(overlay) if each["kind"] != "RayJob"]
    inside = [
        {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": each.role}, "template": each.template}
        for each in pods(overlay)
    ]
    return kinds + inside


def refusals(part):
    try:
        kubernetes_validate.validate(part, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return str(error.message)
    return ""


def words(overlay):
    return only(overlay, "RayJob")["spec"]["entrypoint"].split(" ")


def asked(overlay):
    """What the entrypoint asks of `run`, read by the command itself."""
    return run_command.make_context("run", words(overlay)[2:]).params


def quantity(text):
    """A Kubernetes quantity as a number."""
    units = {"m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    number, unit = re.fullmatch(r"([\d.]+)(m|[KMGT]i)?", text).groups()
    return float(number) * units.get(unit, 1)


# --- schemas ---


def test_all_overlays_of_the_readme_are_here():
    assert OVERLAYS == ["cpu-smoke", "gpu-spot", "kueue", "scheduled"]
    readme = (K8S / "README.md").read_text()
    assert [name for name in OVERLAYS if f"`{name}`" not in readme] == []


@pytest.mark.slow
@overlay
def test_every_part_fits_kubernetes_schema(overlay):
    assert {part["metadata"]["name"]: refusals(part) for part in parts(overlay) if refusals(part)} == {}


def test_a_misspelt_field_would_be_found():
    broken = copy.deepcopy(next(part for part in parts("gpu-spot") if part["metadata"]["name"] == "worker"))
    broken["template"]["spec"]["tolerationss"] = broken["template"]["spec"].pop("tolerations")
    assert "tolerationss" in refusals(broken)


def test_the_cronjob_says_only_what_kubernetes_knows():
    # Its schema takes any text where Kubernetes takes one of a few.
    spec = only("scheduled", "CronJob")["spec"]
    assert spec["concurrencyPolicy"] == "Forbid"
    assert re.fullmatch(r"(\S+ ){4}\S+", spec["schedule"])
    assert by_role("scheduled", "launcher").spec["restartPolicy"] == "Never", "podFailurePolicy asks for it"


@overlay
def test_names_leave_room_for_what_the_operator_adds(overlay):
    assert len(only(overlay, "RayJob")["metadata"]["name"]) <= 47
    if overlay == "scheduled":
        tick = "-29384756-999"
        assert len(only(overlay, "CronJob")["metadata"]["name"] + tick) <= 47


NAMESPACE = yaml.safe_load((K8S / "namespace.yaml").read_text())


@overlay
def test_everything_lies_in_the_namespace_that_enforces_the_strictest_profile(overlay):
    assert refusals(NAMESPACE) == ""
    assert NAMESPACE["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    # The namespace itself is no part of an overlay: deleting one would delete secrets and private dir.
    assert {each["metadata"].get("namespace") for each in built(overlay)} == {NAMESPACE["metadata"]["name"]}


# --- pods ---


@overlay
def test_no_pod_has_a_right_it_does_not_need(overlay):
    for each in pods(overlay):
        pod = each.spec["securityContext"]
        assert pod["runAsNonRoot"] is True
        assert pod["runAsUser"] >= 1000
        assert pod["runAsGroup"] >= 1000
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"} & set(each.spec)
        assert {kind for volume in each.spec["volumes"] for kind in volume} <= {
            "name",
            "emptyDir",
            "configMap",
            "persistentVolumeClaim",
        }
        for container in each.containers:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }


@overlay
def test_only_launcher_and_autoscaler_may_talk_to_the_api_server(overlay):
    for each in pods(overlay):
        wanted = each.role == "launcher" or bool(each.added)
        assert each.spec["automountServiceAccountToken"] is wanted


@overlay
def test_whatever_is_written_has_a_place_on_a_read_only_root(overlay):
    for each in pods(overlay):
        volumes = {volume["name"]: volume for volume in each.spec["volumes"]}
        for container in each.containers:
            mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
            assert {mount["name"] for mount in mounts.values()} <= set(volumes)
            places = environment(container)
            wanted = {places[name] for name in ("HOME", "TMPDIR", "RAY_TMPDIR") if name in places}
            wanted |= {"/tmp"} if each.role != "launcher" else set()
            if container["name"] == "fetch-model":
                wanted.add(places["HF_HOME"])
            for place in wanted:
                assert not mounts[place].get("readOnly")
                assert "emptyDir" in volumes[mounts[place]["name"]]


@overlay
def test_ray_and_the_spool_do_not_share_a_disk_limit(overlay):
    for role in ("head", "worker"):
        places = environment(by_role(overlay, role).main)
        # Ray would put its sessions into TMPDIR, and a full spool would take them with it.
        assert places["RAY_TMPDIR"] == "/tmp"
        assert places["TMPDIR"] == "/spool"


@overlay
def test_every_container_says_what_it_needs(overlay):
    for each in pods(overlay):
        for container in each.containers:
            needs, limits = (container["resources"][kind] for kind in ("requests", "limits"))
            assert set(needs) == set(limits) >= {"cpu", "memory", "ephemeral-storage"}
            assert all(quantity(needs[what]) <= quantity(limits[what]) for what in needs)
            if each.role in ("head", "worker"):
                assert needs["memory"] == limits["memory"], "or the node takes it back in the middle of a run"
        sizes = [
            quantity(volume["emptyDir"]["sizeLimit"]) for volume in each.spec["volumes"] if "emptyDir" in volume
        ]
        assert sum(sizes) <= quantity(each.main["resources"]["limits"]["ephemeral-storage"])


@overlay
def test_the_grace_period_outlives_the_drain(overlay):
    for role in ("head", "worker"):
        each = by_role(overlay, role)
        drain_s = int(environment(each.main)["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert 30 < drain_s <= each.spec["terminationGracePeriodSeconds"] - 10
    job = yaml.safe_load(only(overlay, "RayJob")["spec"]["runtimeEnvYAML"])
    stop_s = int(job["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"])
    assert 30 < stop_s <= by_role(overlay, "head").spec["terminationGracePeriodSeconds"] - 10


@overlay
def test_one_image_everywhere(overlay):
    (image,) = {container["image"] for each in pods(overlay) for container in each.containers}
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert image == f"boomerang-batch:{version}"


# --- secrets and the network ---

SECRETIVE = re.compile("SECRET|TOKEN|PASSWORD|CREDENTIAL|_KEY")


@overlay
def test_secrets_are_named_never_written(overlay):
    assert [each["metadata"]["name"] for each in built(overlay) if each["kind"] == "Secret"] == []
    for each in pods(overlay):
        for container in each.containers:
            for name, value in environment(container).items():
                if SECRETIVE.search(name):
                    assert set(value) == {"secretKeyRef"}, name
    # What looks like one: 128 bits in hex or more. A model's pinned commit is public.
    found = set(re.findall(r"\b[0-9a-fA-F]{32,}\b", text(overlay)))
    assert found - set(re.findall(r"revision: ([0-9a-f]{40})$", text(overlay), re.MULTILINE)) == set()
    assert "PRIVATE KEY" not in text(overlay)


@overlay
def test_ray_asks_for_a_token(overlay):
    cluster = only(overlay, "RayJob")["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "boomerang-ray-token"}
    assert cluster["rayVersion"] == PINS["ray"]


@overlay
def test_driver_and_workers_get_the_secret_that_keys_the_noise(overlay):
    keys = {str(environment(by_role(overlay, role).main)["BOOMERANG_SECRET"]) for role in ("head", "worker")}
    assert keys == {"{'secretKeyRef': {'key': 'secret', 'name': 'boomerang-noise'}}"}
    for each in pods(overlay):
        if each.role in ("submitter", "launcher"):
            assert "BOOMERANG_SECRET" not in environment(each.main)


def selects(selector, labels):
    """Whether a label selector means a pod with these labels."""
    rules = selector.get("matchExpressions", [])
    assert all(rule["operator"] == "In" for rule in rules)
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        labels.get(rule["key"]) in rule["values"] for rule in rules
    )


@overlay
def test_every_pod_is_behind_a_network_policy(overlay):
    policies = [each["spec"] for each in built(overlay) if each["kind"] == "NetworkPolicy"]
    for each in pods(overlay):
        labels = each.template["metadata"]["labels"]
        mine = [policy for policy in policies if selects(policy["podSelector"], labels)]
        assert {tuple(sorted(policy["policyTypes"])) for policy in mine} == {("Egress", "Ingress")}
        peers = [peer for policy in mine for rule in policy.get("ingress", []) for peer in rule["from"]]
        assert all(peer["podSelector"] for peer in peers)
        reached = [peer for peer in peers if selects(peer["podSelector"], labels)]
        assert bool(reached) == (each.role != "launcher"), "Ray's pods reach each other, nobody the launcher"
        leaving = [rule for policy in mine for rule in policy["egress"] if not rule.get("to")]
        ports = {port["port"] for rule in leaving for port in rule["ports"]}
        assert ports == {53, 443} | ({6443} if each.spec["automountServiceAccountToken"] else set())


# --- the run ---


@overlay
def test_the_entrypoint_survives_the_shell_it_passes(overlay):
    # The submitter's shell reads it, then Ray's on the head: nothing in it may mean something to either.
    assert [word for word in words(overlay) if not re.fullmatch(r"[\w./:=-]+", word)] == []
    assert words(overlay)[:2] == ["boomerang-batch", "run"]


@overlay
def test_the_run_joins_its_own_cluster_with_as_many_threads_as_a_worker_has_cores(overlay):
    request, worker = asked(overlay), by_role(overlay, "worker").main
    assert request["address"] == "auto"
    assert str(request["threads"]) == worker["resources"]["requests"]["cpu"]
    gpus = worker["resources"]["limits"].get("nvidia.com/gpu")
    assert (request["device"], gpus) == (("cpu", None) if overlay == "cpu-smoke" else ("cuda", "1"))


@overlay
def test_private_dir_and_out_lie_on_disks_of_their_own(overlay):
    request = asked(overlay)
    claims = {}
    for role in ("head", "worker"):
        each = by_role(overlay, role)
        volumes = {volume["name"]: volume for volume in each.spec["volumes"]}
        for mount in each.main["volumeMounts"]:
            claim = volumes[mount["name"]].get("persistentVolumeClaim", {}).get("claimName")
            if claim:
                claims.setdefault(mount["mountPath"], set()).add(claim)
        # With Always every start gives the group rights on all files; a run refuses an open private dir.
        assert each.spec["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"
    assert len(claims["/private"]) == 1, "head and workers share one"
    assert request["private_dir"] == "/private/run", "below the disk's root, whose mode is not ours to set"
    if "://" not in request["out"]:
        assert claims["/data"].isdisjoint(claims["/private"])
        assert request["out"].startswith("/data/")


@overlay
def test_a_private_dir_is_not_deleted_with_a_run(overlay):
    claims = {each["metadata"]["name"] for each in built(overlay) if each["kind"] == "PersistentVolumeClaim"}
    assert claims == ({"boomerang-smoke-out", "boomerang-smoke-private"} if overlay == "cpu-smoke" else set())


@with_gpus
def test_the_files_that_the_run_reads_are_there_and_good(overlay, tmp_path):
    files = next(
        each for each in built(overlay) if each["kind"] == "ConfigMap" and "fetch_model.py" in each["data"]
    )
    for role in ("head", "worker"):
        (mounted,) = [
            volume["configMap"] for volume in by_role(overlay, role).spec["volumes"] if "configMap" in volume
        ]
        assert mounted["name"] == files["metadata"]["name"]
    request = asked(overlay)
    assert (request["pipeline"], request["manifest"]) == (
        "/etc/boomerang/recipe.yaml",
        "/etc/boomerang/manifest.yaml",
    )
    recipe = parse_recipe(files["data"]["recipe.yaml"], source="recipe.yaml")
    assert re.fullmatch("[0-9a-f]{40}", recipe.model.revision)
    assert recipe.purpose == "anonymize", "or the private dir is for nothing"
    (tmp_path / "manifest.yaml").write_text(files["data"]["manifest.yaml"])
    assert load_manifest(str(tmp_path / "manifest.yaml")).shards


def test_what_a_running_job_reads_can_not_change():
    name = next(
        each["metadata"]["name"] for each in built("gpu-spot") if "fetch_model.py" in each.get("data", {})
    )
    assert re.fullmatch(r"boomerang-files-\w{10}", name), "a ConfigMap named by its content"


@with_gpus
def test_workers_fetch_the_pinned_model_before_they_start_and_are_offline_then(overlay):
    worker = by_role(overlay, "worker")
    (fetch,) = worker.spec["initContainers"]
    assert fetch["command"] == ["python", "/etc/boomerang/fetch_model.py", asked(overlay)["pipeline"]]
    before, after = environment(fetch), environment(worker.main)
    assert "HF_HUB_OFFLINE" not in before
    assert after["HF_HUB_OFFLINE"] == "1"
    for variable in ("HF_HOME", "BOOMERANG_MODELS"):
        assert before[variable] == after[variable]
        assert before[variable].startswith("/models")
    assert "HF_TOKEN" not in after


# --- where it runs ---


@overlay
def test_the_head_takes_no_work_and_nobody_else_its_driver(overlay):
    job = only(overlay, "RayJob")["spec"]
    assert job["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert "nvidia.com/gpu" not in by_role(overlay, "head").main["resources"]["limits"]
    # Ray keeps the driver on the head only as long as the job asks for nothing.
    assert not {"entrypointNumCpus", "entrypointNumGpus", "entrypointResources"} & set(job)


@with_gpus
def test_the_head_is_kept_off_spot_nodes_and_workers_go_there(overlay):
    def required(role):
        affinity = by_role(overlay, role).spec["affinity"]["nodeAffinity"]
        return affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]

    (head,) = required("head")  # terms are alternatives: of several, one would do
    avoided = {
        (rule["key"], *rule["values"]) for rule in head["matchExpressions"] if rule["operator"] == "NotIn"
    }
    sought = set()
    for term in required("worker"):
        (rule,) = term["matchExpressions"]  # the rules of a term hold together: no node is in two clouds
        assert rule["operator"] == "In"
        sought.add((rule["key"], *rule["values"]))
    assert avoided == sought
    tolerated = {each["key"] for each in by_role(overlay, "worker").spec["tolerations"]}
    assert tolerated >= {"nvidia.com/gpu", "cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority"}
    assert "tolerations" not in by_role(overlay, "head").spec


@overlay
def test_the_run_asks_for_as_many_workers_as_there_may_be_and_begins_with_what_is_sure(overlay):
    cluster, worker = only(overlay, "RayJob")["spec"]["rayClusterSpec"], by_role(overlay, "worker")
    (group,) = cluster["workerGroupSpecs"]
    assert asked(overlay)["workers"] == group["maxReplicas"]
    # With none there, the driver would not know that there will be GPUs.
    assert 1 <= group["replicas"] == group["minReplicas"] <= group["maxReplicas"]
    if cluster.get("enableInTreeAutoscaling"):
        assert cluster["autoscalerOptions"]["version"] == "v2"
        assert worker.spec["restartPolicy"] == "Never", "its second version asks for it"
    else:
        assert group["replicas"] == group["maxReplicas"]
    assert bool(cluster.get("enableInTreeAutoscaling")) == (overlay in ("gpu-spot", "scheduled"))


def test_kueue_can_hold_the_job_back():
    job = only("kueue", "RayJob")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "boomerang"
    assert job["spec"]["suspend"] is True
    assert job["spec"]["shutdownAfterJobFinishes"] is True, "the operator suspends no other"


# --- how it ends ---


@overlay
def test_the_operator_retries_nothing_and_takes_the_cluster_away(overlay):
    job = only(overlay, "RayJob")["spec"]
    assert job["backoffLimit"] == 0
    assert job["shutdownAfterJobFinishes"] is True
    assert job["submissionMode"] == "K8sJobMode"


def decision(code, *, disrupted):
    """What Kubernetes does about a launcher pod that ended so: the first rule that fits decides."""
    policy = only("scheduled", "CronJob")["spec"]["jobTemplate"]["spec"]["podFailurePolicy"]
    for rule in policy["rules"]:
        conditions, codes = rule.get("onPodConditions"), rule.get("onExitCodes")
        if conditions and disrupted and {"type": "DisruptionTarget"} in conditions:
            return rule["action"]
        if codes:
            assert codes["operator"] == "In"
            assert codes["containerName"] == by_role("scheduled", "launcher").main["name"]
            if code in codes["values"]:
                return rule["action"]
    return "Count"


KNOWN = {kind.exit_code for kind in vars(errors).values() if isinstance(kind, type)} | {4}


@pytest.mark.parametrize("code", sorted(KNOWN))
def test_only_a_failure_that_may_pass_is_tried_again(code):
    assert decision(code, disrupted=False) == ("Count" if code == 1 else "FailJob")
    assert decision(code, disrupted=True) == "Ignore"


def test_the_readme_says_what_becomes_of_each_exit_code():
    rows = re.findall(r"^\| (\d+) .*? \| (.*?) \| (.*?) \|$", (K8S / "README.md").read_text(), re.MULTILINE)
    assert {int(code) for code, *_ in rows} == KNOWN | {0}
    told = {"Count": "tried again", "FailJob": "fails at once"}
    for code, rayjob, tick in rows:
        assert ("SUCCEEDED" in rayjob) == (code == "0")
        assert tick.startswith("succeeds" if code == "0" else told[decision(int(code), disrupted=False)])


def test_signals_and_crashes_are_tried_again():
    assert {decision(code, disrupted=False) for code in (134, 137, 139, 143, 255)} == {"Count"}
    assert only("scheduled", "CronJob")["spec"]["jobTemplate"]["spec"]["backoffLimit"] > 0


def test_the_template_never_runs_itself_and_the_launcher_knows_it():
    template = only("scheduled", "RayJob")
    assert template["spec"]["suspend"] is True
    assert environment(by_role("scheduled", "launcher").main)["TEMPLATE"] == template["metadata"]["name"]
    assert asked("scheduled")["extend"] is True


def test_the_launcher_may_look_at_rayjobs_and_make_one_no_more():
    (rule,) = only("scheduled", "Role")["rules"]
    assert rule == {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["get", "list", "create"]}
    binding = only("scheduled", "RoleBinding")
    assert binding["roleRef"]["kind"] == "Role"
    (subject,) = binding["subjects"]
    assert subject["name"] == by_role("scheduled", "launcher").spec["serviceAccountName"]
    assert subject["namespace"] == NAMESPACE["metadata"]["name"]
    others = {each.spec["serviceAccountName"] for each in pods("scheduled") if each.role != "launcher"}
    assert subject["name"] not in others


# --- the image ---

DOCKERFILE = (K8S / "image" / "Dockerfile").read_text()


def test_the_image_runs_as_the_user_of_the_pods():
    (user,) = re.findall(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE)
    for name in OVERLAYS:
        for each in pods(name):
            context = each.spec["securityContext"]
            assert (str(context["runAsUser"]), str(context["runAsGroup"])) == user
    assert not re.search(r"(?m)^ENTRYPOINT", DOCKERFILE), "the operator starts Ray by a shell of its own"


def test_the_image_has_the_extras_and_the_pinned_versions():
    extras = re.search(r"'/src\[([\w,]+)\]'", DOCKERFILE)[1].split(",")
    assert set(extras) == {"s3", "gcs", "azure", "text"}
    assert DOCKERFILE.count("-c /src/constraints.txt") == 2


def test_no_file_of_the_image_names_an_index_or_a_secret():
    assert not re.search(r"--(extra-)?index-url|--find-links", DOCKERFILE)
    assert not re.search(r"(?m)^(ARG|ENV) .*(SECRET|TOKEN|PASSWORD)", DOCKERFILE)


def test_the_build_sees_what_the_wheel_is_made_of_and_no_more():
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert rules[0] == "*"
    kept = {rule[1:] for rule in rules if rule.startswith("!")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {"pyproject.toml", "constraints.txt", project["project"]["readme"]}
    needed |= {*wheel["packages"], *wheel["force-include"], *project["project"]["license-files"]}
    assert {
        path for path in needed if not any(path == top or path.startswith(f"{top}/") for top in kept)
    } == set()
    assert not [
        rule for rule in rules[1:] if not rule.startswith("!") and fnmatch.fnmatch("pyproject.toml", rule)
    ]
    assert all((ROOT / top).exists() for top in kept)
    assert kept <= {path.partition("/")[0] for path in needed}
