"""What the pods run: the same containers in both Ray modes, in sizes that follow from the values."""

import ctypes
import json
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helm.render import (
    CI_FILES,
    FULLNAME,
    NAMESPACE,
    Document,
    containers,
    flags,
    named,
    of_kind,
    pod_templates,
    refusal,
    render,
)

FEW = settings(max_examples=6, deadline=None)  # each example is a run of Helm
MIB = 1 << 20


def ray(documents: list[Document], component: str) -> Document:
    (container,) = pod_templates(documents)[component]["spec"]["containers"]
    return container


def mebibytes(quantity: str) -> int:
    assert quantity.endswith("Mi")
    return int(quantity.removesuffix("Mi")) * MIB


def volume(template: Document, name: str) -> Document:
    (found,) = (v for v in template["spec"]["volumes"] if v["name"] == name)
    return found


@pytest.mark.parametrize("file", ["cpu.yaml", "gpu.yaml", "kuberay.yaml", "secure.yaml", "cache-image.yaml"])
def test_static_and_kuberay_mode_render_the_same_pods(file):
    static, kuberay = (pod_templates(render(file, f"ray.mode={mode}")) for mode in ("static", "kuberay"))
    for component in ("head", "worker", "router", "deployer"):
        assert static[component] == kuberay[component]


def test_kuberay_keeps_our_command_and_updates_the_pods_and_never_scales():
    (cluster,) = of_kind(render("cpu.yaml", "ray.mode=kuberay"), "RayCluster")
    spec = cluster["spec"]
    assert cluster["metadata"]["annotations"]["ray.io/overwrite-container-cmd"] == "true"
    assert spec["authOptions"] == {"mode": "token", "secretName": f"{FULLNAME}-auth"}
    assert spec["upgradeStrategy"] == {"type": "Recreate"}
    assert spec["enableInTreeAutoscaling"] is False
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    (group,) = spec["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == 2


def test_workers_are_replaced_one_at_a_time_each_once_its_experts_are_loaded_and_drained_first():
    documents = render("cpu.yaml")
    workers = named(documents, "StatefulSet", "worker")["spec"]
    assert workers["updateStrategy"] == {"type": "RollingUpdate"}  # without maxUnavailable: one
    pod = workers["template"]["spec"]
    assert pod["readinessGates"] == [{"conditionType": "barista.dev/experts-loaded"}]
    assert named(documents, "PodDisruptionBudget", "worker")["spec"]["maxUnavailable"] == 1
    router = named(documents, "Deployment", "router")["spec"]["strategy"]["rollingUpdate"]
    assert router == {"maxUnavailable": 0, "maxSurge": 1}
    assert named(documents, "Deployment", "deployer")["spec"]["strategy"] == {"type": "Recreate"}


def test_a_pod_that_never_gets_ready_blocks_neither_its_correction_nor_a_nodes_drain():
    documents = render("cpu.yaml")
    # In order, a StatefulSet waits for a broken pod before it replaces it.
    assert [s["spec"]["podManagementPolicy"] for s in of_kind(documents, "StatefulSet")] == ["Parallel"] * 2
    budgets = list(of_kind(documents, "PodDisruptionBudget"))
    assert [budget["spec"]["unhealthyPodEvictionPolicy"] for budget in budgets] == ["AlwaysAllow"] * 2


def test_workers_are_spread_over_nodes_where_that_is_possible():
    (spread,) = pod_templates(render("cpu.yaml"))["worker"]["spec"]["topologySpreadConstraints"]
    assert (spread["topologyKey"], spread["whenUnsatisfiable"]) == ("kubernetes.io/hostname", "ScheduleAnyway")
    labels = pod_templates(render("cpu.yaml"))["worker"]["metadata"]["labels"]
    assert spread["labelSelector"]["matchLabels"].items() <= labels.items()


def test_a_pod_ends_within_what_a_cluster_autoscaler_waits():
    for file in CI_FILES:
        for template in pod_templates(render(file)).values():
            assert template["spec"]["terminationGracePeriodSeconds"] <= 600


@pytest.mark.parametrize("component", ["head", "worker"])
def test_a_drain_ends_before_the_grace_period_does(component):
    key = {"head": "head", "worker": "workers"}[component]
    template = pod_templates(render("cpu.yaml", f"{key}.terminationGracePeriodSeconds=90"))[component]
    (container,) = template["spec"]["containers"]
    command = container["lifecycle"]["preStop"]["exec"]["command"]
    assert command == ["barista", "drain", "--node", "--timeout", "60"]
    assert template["spec"]["terminationGracePeriodSeconds"] == 90


def test_a_router_may_end_its_streams():
    template = pod_templates(render("cpu.yaml", "engine.drainTimeout=100"))["router"]
    (container,) = template["spec"]["containers"]
    assert flags(container)["--drain-timeout"] == "100"
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert template["spec"]["terminationGracePeriodSeconds"] >= 100 + pause + 5


def test_without_the_api_nothing_waits_for_a_readiness_gate_that_nobody_sets():
    for setting in ("kubernetes.enabled=false", "kubernetes.readinessGates=false"):
        assert "readinessGates" not in pod_templates(render("cpu.yaml", setting))["worker"]["spec"]


def test_the_router_finds_engines_by_slices_by_name_or_through_ray():
    def source(file, *settings):
        return flags(ray(render(file, *settings), "router"))["--engines"]

    assert source("cpu.yaml") == f"kubernetes:{NAMESPACE}/{FULLNAME}-ray"
    assert source("cpu.yaml", "kubernetes.enabled=false") == f"{FULLNAME}-ray:50051"
    assert source("external.yaml") == "ray:http://ray-head.ray:8265"


def test_the_services_that_commands_name_exist_and_select_the_pods_that_listen():
    documents = render("cpu.yaml")
    labels = {name: template["metadata"]["labels"] for name, template in pod_templates(documents).items()}
    expected = {"head": {"head"}, "ray": {"head", "worker"}, "": {"router"}}
    for name, pods in expected.items():
        service = named(documents, "Service", name)["spec"]
        assert {pod for pod, own in labels.items() if service["selector"].items() <= own.items()} == pods
        for port in service["ports"]:
            listening = [
                p for pod in pods for c in containers(pod_templates(documents)[pod]) for p in c.get("ports", [])
            ]
            assert any(port["targetPort"] in (p["name"], p["containerPort"]) for p in listening), port
    for name in ("head", "ray"):
        service = named(documents, "Service", name)["spec"]
        assert service["clusterIP"] == "None"
        assert service["publishNotReadyAddresses"] is True


@pytest.mark.parametrize("file", CI_FILES)
def test_every_mount_has_its_volume_and_every_volume_its_mount(file):
    for name, template in pod_templates(render(file)).items():
        mounts = {mount["name"] for c in containers(template) for mount in c.get("volumeMounts", [])}
        volumes = [v["name"] for v in template["spec"].get("volumes", [])]
        assert len(set(volumes)) == len(volumes)
        assert mounts == set(volumes), name


@pytest.mark.parametrize("file", CI_FILES)
def test_what_a_pod_refers_to_is_rendered_or_named_by_the_values(file):
    documents = render(file)
    made = {d["metadata"]["name"] for d in documents} | {
        d["spec"]["secretName"] for d in of_kind(documents, "Certificate")
    }
    given = {"hub-token", "ray-token", "ray-tls", "barista-keys", "registry"}
    for template in pod_templates(documents).values():
        names = {v["secret"]["secretName"] for v in template["spec"].get("volumes", []) if "secret" in v}
        for container in containers(template):
            sources = [e["valueFrom"] for e in container.get("env", []) if "valueFrom" in e]
            names |= {s["secretKeyRef"]["name"] for s in sources if "secretKeyRef" in s}
        assert names - made - given == set()


def first_commands(component: str, *settings: str) -> list[list[str]]:
    template = pod_templates(render("cpu.yaml", *settings))[component]
    return [c["command"] + c["args"] for c in template["spec"].get("initContainers", [])]


def test_the_model_is_made_ready_in_every_pod_that_reads_it():
    built_in = [["barista", "models", "--prepare", "house-blend"]]
    for component in ("head", "worker", "router"):
        assert first_commands(component) == built_in
        assert first_commands(component, "model.name=/var/cache/barista/x") == []
    assert first_commands("deployer") == []
    hub = "model.name=deepseek-ai/DeepSeek-V3", "model.inspect=null"
    assert first_commands("worker", *hub) == [["barista", "pull", "deepseek-ai/DeepSeek-V3"]]
    assert first_commands("router", *hub) == [["barista", "pull", "deepseek-ai/DeepSeek-V3", "--tokenizer-only"]]
    assert first_commands("worker", *hub, "modelCache.type=pvc", "model.pull=never") == []


def test_labels_of_nodes_are_written_before_ray_starts():
    template = pod_templates(render("cpu.yaml", "kubernetes.nodeLabels=true"))["worker"]
    *_, last = template["spec"]["initContainers"]
    assert last["command"] + last["args"] == ["barista", "node-labels", "--output", "/run/barista/labels.yaml"]
    (container,) = template["spec"]["containers"]
    assert flags(container)["--labels-file"] == "/run/barista/labels.yaml"


@FEW
@given(st.integers(0, 100), st.integers(0, 16))
def test_places_match_workers_and_engines(replicas, gpus):
    """Ray has a place for each worker that the deployer starts, and for one engine in each pod that may hold it."""
    engines = min(1, gpus and replicas) or 1
    if gpus and not replicas:
        return
    device = "cuda" if gpus else "cpu"
    documents = render(
        None, f"workers.replicas={replicas}", f"workers.gpus={gpus}", f"device={device}", f"engine.replicas={engines}"
    )
    head, worker = ray(documents, "head"), ray(documents, "worker")
    places = json.loads(flags(worker)["--resources"])
    at_head = json.loads(flags(head)["--resources"])
    assert int(flags(ray(documents, "deployer"))["--workers"]) == replicas * places["barista_worker"]
    assert places["barista_worker"] == max(1, gpus)
    assert at_head.get("barista_engine", 0) + places.get("barista_engine", 0) == 1
    assert ("barista_engine" in places) == bool(gpus)
    assert pod_templates(documents)["worker"]["metadata"]["annotations"]["barista.dev/workers"] == str(max(1, gpus))
    assert worker["resources"]["limits"].get("nvidia.com/gpu", 0) == gpus
    assert worker["resources"]["requests"].get("nvidia.com/gpu", 0) == gpus


def window_bytes(max_rows: int, top_k: int, hidden_size: int) -> int:
    """As the engine makes it, of float32."""
    from experts.transport import window

    shape = window.Shape(ctypes.sizeof(window.Shape), 1, max_rows, top_k, hidden_size * 4, 0)
    return window._size_of(window._functions(), shape)


@FEW
@given(st.integers(1, 4096), st.integers(1, 32), st.integers(1, 8192), st.integers(1, 16))
def test_shared_memory_holds_the_object_store_and_every_window_twice(max_rows, top_k, hidden_size, gpus):
    inspect = json.dumps({"held_bytes": 1, "top_k": top_k, "hidden_size": hidden_size})
    documents = render(
        None,
        f"model.inspect={inspect}",
        f"engine.maxNumBatchedTokens={max_rows}",
        f"workers.gpus={gpus}",
        "device=cuda",
    )
    shm = volume(pod_templates(documents)["worker"], "shm")["emptyDir"]
    assert shm["medium"] == "Memory"
    needed = 83886080 + 2 * gpus * window_bytes(max_rows, top_k, hidden_size)
    assert needed <= mebibytes(shm["sizeLimit"]) <= needed + 65 * MIB + gpus * 2 * 8192


def test_without_gpus_no_engine_shares_a_pod_with_workers_and_there_are_no_windows():
    for component in ("head", "worker"):
        shm = volume(pod_templates(render("cpu.yaml"))[component], "shm")["emptyDir"]
        assert mebibytes(shm["sizeLimit"]) == 83886080 + 64 * MIB


UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


@FEW
@given(st.integers(1, 1 << 12), st.sampled_from(sorted(UNITS)), st.integers(1, 64), st.booleans())
def test_a_model_fits_as_long_as_the_workers_hold_every_expert_once(amount, unit, replicas, fits):
    room = int(amount * UNITS[unit] * 0.5) * replicas
    inspect = json.dumps({"held_bytes": room + 10, "expert_bytes": room + (0 if fits else 1)})
    values = (
        f"model.inspect={inspect}",
        f"workers.replicas={replicas}",
        "workers.memoryPercent=50",
        f'workers.resources={{"limits": {{"memory": "{amount}{unit}"}}}}',
    )
    if amount * UNITS[unit] % 2:
        return  # half a byte: either answer is right
    if fits:
        render(None, *values)
    else:
        assert "raise workers.replicas or workers.resources.limits.memory" in refusal(None, *values)


@pytest.mark.parametrize(
    ("kind", "settings", "source"),
    [
        ("emptyDir", (), {"emptyDir": {"sizeLimit": "2Gi"}}),
        ("pvc", (), {"persistentVolumeClaim": {"claimName": f"{FULLNAME}-model"}}),
        ("pvc", ("modelCache.pvc.existingClaim=mine",), {"persistentVolumeClaim": {"claimName": "mine"}}),
        ("hostPath", ("modelCache.hostPath.path=/mnt/x",), {"hostPath": {"path": "/mnt/x", "type": "Directory"}}),
    ],
)
def test_the_model_cache_is_the_volume_asked_for_in_every_pod_that_reads_it(kind, settings, source):
    documents = render("cpu.yaml", f"modelCache.type={kind}", *settings)
    for component in ("head", "worker", "router"):
        assert volume(pod_templates(documents)[component], "model-cache") == {"name": "model-cache"} | source
    claims = [claim["metadata"]["name"] for claim in of_kind(documents, "PersistentVolumeClaim")]
    assert claims == ([f"{FULLNAME}-model"] if kind == "pvc" and not settings else [])


def test_a_router_that_pulls_needs_no_folder_of_a_node():
    templates = pod_templates(render("gpu.yaml"))
    for component in ("head", "worker"):
        spec = templates[component]["spec"]
        assert "hostPath" in volume(templates[component], "model-cache")
        assert spec["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}  # where the folder is
        assert spec["tolerations"]
    assert "emptyDir" in volume(templates["router"], "model-cache")
    there = pod_templates(render("gpu.yaml", "model.pull=never"))["router"]
    assert "hostPath" in volume(there, "model-cache")


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        ("cpu.yaml", ("model.name=/var/cache/barista/x",)),
        ("cpu.yaml", ("model.name=/models/x", "model.pull=never")),
        ("cache-image.yaml", ()),
        ("external.yaml", ()),
        (
            "cpu.yaml",
            ("model.name=/models/x",)
            + tuple(
                f'{part}={{"volumes": [{{"name": "m", "emptyDir": {{}}}}],'
                ' "volumeMounts": [{"name": "m", "mountPath": "/models/"}]}'
                for part in ("head", "workers", "router")
            ),
        ),
    ],
)
def test_a_model_at_a_path_is_taken_where_something_is_mounted(file, settings):
    assert render(file, *settings)


def test_every_component_takes_the_same_pod_values():
    extra = {
        "labels": {"a": "b"},
        "annotations": {"c": "d"},
        "env": [{"name": "E", "value": "f"}],
        "volumes": [{"name": "g", "emptyDir": {}}],
        "volumeMounts": [{"name": "g", "mountPath": "/g"}],
        "nodeSelector": {"h": "i"},
        "tolerations": [{"key": "j", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "priorityClassName": "k",
        "schedulerName": "l",
    }
    keys = {"head": "head", "worker": "workers", "deployer": "deployer", "router": "router"}
    values = [f"{key}.{name}={json.dumps(value)}" for key, (name, value) in product(keys.values(), extra.items())]
    templates = pod_templates(render(None, *values))
    for component in keys:
        template, spec = templates[component], templates[component]["spec"]
        (container,) = spec["containers"]
        assert template["metadata"]["labels"]["a"] == "b"
        assert template["metadata"]["annotations"]["c"] == "d"
        assert extra["env"][0] in container["env"]
        assert extra["volumes"][0] in spec["volumes"]
        assert extra["volumeMounts"][0] in container["volumeMounts"]
        for name in ("nodeSelector", "tolerations", "affinity", "priorityClassName", "schedulerName"):
            assert spec[name] == extra[name]


def test_routers_are_scaled_by_what_waits_and_then_have_no_fixed_number():
    for file, scaler in (("gpu.yaml", "HorizontalPodAutoscaler"), ("secure.yaml", "ScaledObject")):
        documents = render(file)
        spec = named(documents, scaler, "router")["spec"]
        assert spec["scaleTargetRef"]["name"] == f"{FULLNAME}-router"
        assert "barista:num_requests_waiting" in json.dumps(spec)
        assert "selector" not in json.dumps(spec)
        assert "replicas" not in named(documents, "Deployment", "router")["spec"]
    assert named(render("cpu.yaml", "router.replicas=3"), "Deployment", "router")["spec"]["replicas"] == 3


@pytest.mark.parametrize(
    ("settings", "labels"), [((), {"service": FULLNAME}), (("router.autoscaling.metricLabels.job=x",), {"job": "x"})]
)
def test_an_external_metric_is_of_this_releases_routers(settings, labels):
    (metric,) = named(render("kuberay.yaml", *settings), "HorizontalPodAutoscaler", "router")["spec"]["metrics"]
    assert metric["external"]["metric"]["selector"] == {"matchLabels": labels}


def test_whole_numbers_stay_whole():
    """Helm reads numbers as floats: 80000000000 must not become 8e+10 on a command line."""
    values = "workers.memoryBytes=80000000000", "engine.kvCacheTokens=4000000", "ray.objectStoreMemory=100000000"
    documents = render(None, *values)
    arguments = flags(ray(documents, "deployer"))
    assert (arguments["--worker-memory"], arguments["--kv-cache-tokens"]) == ("80000000000", "4000000")
    assert flags(ray(documents, "worker"))["--object-store-memory"] == "100000000"
    for file in CI_FILES:
        for template in pod_templates(render(file)).values():
            for container in containers(template):
                assert all(isinstance(argument, str) for argument in container.get("args", []))
                assert not any("e+" in argument for argument in container.get("args", []))
