"""What cannot work stops at the rendering, with a sentence that names the value and the remedy."""

import json
import re

import pytest

from tests.helm.render import APIS, CHART, refusal, render

FITS_NOT = json.dumps({"held_bytes": 700_000_000_000})
LARGE = json.dumps({"held_bytes": 1, "file_bytes": 2_500_000_000})
NO_ENGINE_ROOM = json.dumps({"held_bytes": 2, "expert_bytes": 1, "memory_bytes": 90_000_000_000})

# (values file, settings, what of APIS the cluster lacks, the sentence)
REFUSALS: list[tuple[str | None, tuple[str, ...], str, str]] = [
    (
        "cpu.yaml",
        ("workers.gpus=8",),
        "",
        "workers.gpus is 8, but device is cpu: set device to cuda, or workers.gpus to 0.",
    ),
    (
        None,
        ("device=cuda",),
        "",
        "device is cuda, but workers.gpus is 0: set workers.gpus to the GPUs of each worker pod, or device to cpu.",
    ),
    (
        None,
        ("tls.mode=secret",),
        "",
        "tls.mode is secret, but tls.secretName is empty: name a Secret with ca.crt, tls.crt and tls.key for "
        "barista.internal, or set tls.mode to generated.",
    ),
    (
        None,
        ("tls.mode=cert-manager",),
        "cert-manager.io/v1",
        "tls.mode is cert-manager, but the cluster has no cert-manager.io/v1: install cert-manager, or set tls.mode to "
        "generated.",
    ),
    (
        None,
        ("ray.mode=kuberay",),
        "ray.io/v1/RayCluster",
        "ray.mode is kuberay, but the cluster has no ray.io/v1 RayCluster: install the KubeRay operator, or set "
        "ray.mode to static.",
    ),
    (
        "external.yaml",
        ("ray.external.dashboardUrl=",),
        "",
        "ray.mode is external, but ray.external.dashboardUrl is empty: set it to the cluster's dashboard, such as "
        "http://ray-head.ray:8265.",
    ),
    (
        "external.yaml",
        ("ray.external.tokenSecret=",),
        "",
        "ray.mode is external, but ray.external.tokenSecret is empty: name the Secret that holds the cluster's token "
        "under auth_token.",
    ),
    (
        "external.yaml",
        ("ray.external.tlsDir=",),
        "",
        "ray.mode is external, but ray.external.tlsDir is empty: set it to the folder of ca.pem, cert.pem and key.pem "
        "on the cluster's nodes.",
    ),
    (
        "external.yaml",
        ("tls.mode=generated",),
        "",
        "ray.mode is external, but tls.mode is not secret: the router needs a certificate of the authority that the "
        "cluster's nodes trust, in tls.secretName.",
    ),
    (
        None,
        ("model.name=/models/x", "model.pull=always"),
        "",
        "model.pull is always, but model.name is the path /models/x: set model.pull to auto, or give a hub name.",
    ),
    (
        None,
        ("model.name=Qwen/Qwen3-30B-A3B", "model.pull=never"),
        "",
        "model.pull is never, but the cache of Qwen/Qwen3-30B-A3B starts empty: set modelCache.type to pvc or "
        "hostPath, or model.pull to auto.",
    ),
    (
        None,
        ("modelCache.type=hostPath",),
        "",
        "modelCache.type is hostPath, but modelCache.hostPath.path is empty: set it to a folder of the nodes that "
        "user 1000 owns.",
    ),
    (
        "cache-image.yaml",
        ("modelCache.image.reference=",),
        "",
        "modelCache.type is image, but modelCache.image.reference is empty: set it to the image that holds the model's "
        "files.",
    ),
    (
        "cache-image.yaml",
        ("model.name=/elsewhere/x",),
        "",
        "modelCache.type is image, but model.name is /elsewhere/x: set it to a path in /models, where the image is "
        "mounted.",
    ),
    (
        "cache-image.yaml",
        ("--kube-version=1.30.2",),
        "",
        "modelCache.type is image, but Kubernetes v1.30.2 has no image volumes: use Kubernetes 1.35, or 1.31 with the "
        "feature gate ImageVolume, or set modelCache.type to pvc.",
    ),
    (
        "cpu.yaml",
        ("model.name=/models/x", 'head.volumeMounts=[{"name": "home", "mountPath": "/models"}]'),
        "",
        "model.name is /models/x, but nothing is mounted there in the pods of workers, router: set volumes and "
        "volumeMounts of each, or model.pull to never if the pods' image holds the model.",
    ),
    (
        "external.yaml",
        ("router.volumeMounts=[]",),
        "",
        "model.name is /models/house-blend, but nothing is mounted there in the pods of router: set volumes",
    ),
    (
        "cpu.yaml",
        (f"model.inspect={LARGE}",),
        "",
        "house-blend has 2.3 GiB of files, but modelCache.size is 2Gi: raise modelCache.size.",
    ),
    (
        "kuberay.yaml",
        (f"model.inspect={LARGE}", "modelCache.size=1Gi"),
        "",
        "Qwen/Qwen3-30B-A3B has 2.3 GiB of files, but modelCache.size is 1Gi: raise modelCache.size.",
    ),
    (
        "cpu.yaml",
        (f"model.inspect={FITS_NOT}",),
        "",
        "house-blend needs 651.9 GiB for its experts, but the workers have room for 2.8 GiB: raise workers.replicas or "
        "workers.resources.limits.memory (or workers.memoryBytes), or set model.format to fewer bits and model.inspect "
        "to match.",
    ),
    (
        "gpu.yaml",
        ("workers.memoryBytes=30000000000",),
        "",
        "deepseek-ai/DeepSeek-V3 needs 609.0 GiB for its experts, but the workers have room for 447.0 GiB: raise "
        "workers.replicas or workers.resources.limits.memory (or workers.memoryBytes), or set model.format to fewer "
        "bits and model.inspect to match.",
    ),
    (
        None,
        (f"model.inspect={NO_ENGINE_ROOM}",),
        "",
        "house-blend needs 83.8 GiB beside its experts, but the head, where the engine runs, has 4Gi: raise "
        "head.resources.limits.memory.",
    ),
    (
        "cpu.yaml",
        ("engine.replicas=2",),
        "",
        "engine.replicas is 2, but there is room for 1: without GPUs the head holds the only one, so set "
        "engine.replicas to 1.",
    ),
    (
        "gpu.yaml",
        ("engine.replicas=3",),
        "",
        "engine.replicas is 3, but there is room for 2: each worker pod holds one engine, so raise workers.replicas.",
    ),
    (
        "kuberay.yaml",
        ("workers.autoscaling.minReplicas=8", "workers.autoscaling.maxReplicas=2"),
        "",
        "workers.autoscaling.maxReplicas is 2, less than minReplicas, 8: raise it.",
    ),
    (
        "kuberay.yaml",
        ("workers.autoscaling.maxReplicas=7",),
        "",
        "workers.autoscaling.maxReplicas is 7, which is not a whole number of groups: set it to a multiple of "
        "workers.groupSize, 2.",
    ),
    (
        "kuberay.yaml",
        ("workers.autoscaling.minReplicas=3",),
        "",
        "workers.autoscaling.minReplicas is 3, which is not a whole number of groups: set it to a multiple of "
        "workers.groupSize, 2.",
    ),
    (
        "cpu.yaml",
        ("workers.replicas=3", "workers.groupSize=2"),
        "",
        "workers.replicas is 3, which is not a whole number of groups: set it to a multiple of workers.groupSize, 2.",
    ),
    (
        "kuberay.yaml",
        ("kubernetes.enabled=false",),
        "",
        "workers.autoscaling.enabled is true, but the deployer may not scale anything: set kubernetes.enabled to true "
        "and ray.mode to static or kuberay.",
    ),
    (
        "secure.yaml",
        ("router.autoscaling.maxReplicas=1",),
        "",
        "router.autoscaling.maxReplicas is 1, less than minReplicas, 2: raise it.",
    ),
    (
        "secure.yaml",
        (),
        "keda.sh/v1alpha1",
        "router.autoscaling.type is keda, but the cluster has no keda.sh/v1alpha1: install KEDA, or set "
        "router.autoscaling.type to pods.",
    ),
    (
        None,
        ("router.maxUnavailable=0",),
        "",
        "router.maxUnavailable is 0, which blocks every eviction and so every node's drain: set it to 1 or more.",
    ),
    (
        None,
        ("router.maxUnavailable=0%",),
        "",
        "router.maxUnavailable is 0, which blocks every eviction and so every node's drain: set it to 1 or more.",
    ),
    (
        None,
        ("workers.maxUnavailable=0",),
        "",
        "workers.maxUnavailable is 0, which blocks every eviction and so every node's drain: set it to 1 or more.",
    ),
    (
        "cpu.yaml",
        ("monitoring.rules.enabled=true",),
        "monitoring.coreos.com/v1",
        "monitoring asks for objects of monitoring.coreos.com/v1, which the cluster has not: install the Prometheus "
        "operator, or set serviceMonitor.enabled, podMonitor.enabled and rules.enabled of monitoring to false.",
    ),
]


@pytest.mark.parametrize(("file", "settings", "lacking", "sentence"), REFUSALS)
def test_refuses_and_says_what_to_set(file, settings, lacking, sentence):
    apis = tuple(api for api in APIS if api != lacking)
    assert sentence in refusal(file, *settings, apis=apis)


def test_every_sentence_of_the_chart_is_tested():
    checks = (CHART / "templates/_checks.tpl").read_text()
    tested = " ".join(sentence for *_, sentence in REFUSALS)
    beginnings = re.findall(r'^    (?:\(printf )?"([^"%]{8,}?)(?:%|")', checks, re.MULTILINE)
    untested = [beginning for beginning in beginnings if beginning.strip() not in tested]
    assert len(beginnings) > 20
    assert untested == []


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("workers.replicsa=2", "replicsa"),
        ("worker.replicas=2", "worker"),
        ("workers.replicas=-1", "minimum"),
        ("router.replicas=-1", "minimum"),
        ("workers.gpus=-8", "minimum"),
        ("workers.replicas=two", "integer"),
        ("ray.mode=kubernetes", "ray"),
        ("device=gpu", "device"),
        ("model.name=", "name"),
        ("model.name=--help", "name"),
        ("model.inspect={}x", "inspect"),
        ("head.resources.limits.memory=4 GB", "memory"),
        ("head.terminationGracePeriodSeconds=10", "terminationGracePeriodSeconds"),
        ("image.digest=sha256:1", "digest"),
        ("ray.external.dashboardUrl=ray-head:8265", "dashboardUrl"),
        ("workers.memoryPercent=101", "memoryPercent"),
        ("modelCache.hostPath.type=DirectoryOrCreate", "type"),
        ("networkPolicy.apiServerPorts=[0]", "apiServerPorts"),
    ],
)
def test_a_misspelt_or_impossible_value_is_refused_by_name(setting, said):
    told = refusal("cpu.yaml", setting)
    assert "specifications of the schema" in told or "parsing" in told
    assert said in told


def test_an_inspection_of_the_command_is_taken_whole():
    """What `barista inspect --json` prints can be pasted as it is."""
    from dataclasses import fields

    from router.inspect import Inspection

    schema = json.loads((CHART / "values.schema.json").read_text())
    accepted = schema["properties"]["model"]["properties"]["inspect"]["properties"]
    assert {entry.name for entry in fields(Inspection)} | {"model", "path"} == accepted.keys()


def test_the_sentences_are_not_said_when_all_is_well():
    assert render("cpu.yaml")
    assert render(None, "workers.replicas=0", "router.replicas=0")
    for cache in ("pvc.existingClaim=mine", "hostPath.path=/mnt/x"):
        kind = cache.partition(".")[0]
        assert render(
            None, f"model.inspect={LARGE}", "modelCache.size=1Gi", f"modelCache.type={kind}", f"modelCache.{cache}"
        )
