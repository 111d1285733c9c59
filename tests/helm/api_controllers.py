"""What a cluster does with objects, as far as Helm and our client can see it: pods come up at once, and stay."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

from tests.helm.api_store import RESOURCES, Change, Object, Resource, Store

BY_KIND = {(resource.group, resource.kind): resource for resource in RESOURCES}
POD = BY_KIND["", "Pod"]
SERVICE = BY_KIND["", "Service"]
SLICE = BY_KIND["discovery.k8s.io", "EndpointSlice"]
CLAIM = BY_KIND["", "PersistentVolumeClaim"]
REPLICA_SET = BY_KIND["apps", "ReplicaSet"]


def admit(resource: Resource, item: Object) -> Object:
    """The object with what an API server fills in, and without nulls, before it stores it."""
    item = _without_nulls(item)
    if resource.kind == "Secret" and "stringData" in item:
        plain = {key: base64.b64encode(text.encode()).decode() for key, text in item["stringData"].items()}
        item = {name: part for name, part in item.items() if name != "stringData"}
        item |= {"data": item.get("data", {}) | plain}
    if resource.kind == "Service":
        spec: dict[str, Any] = {"type": "ClusterIP", "clusterIP": "10.96.0.10"} | item.get("spec", {})
        item = item | {"spec": spec}
    if resource.kind in ("Deployment", "StatefulSet"):
        item = item | {"spec": {"replicas": 1} | item["spec"]}
    return item


class Controllers:
    """React to one change at a time. pod_phase: what becomes of a pod that nobody restarts, such as Helm's tests."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._addresses = 0
        self.pod_phase = "Succeeded"
        self.pods_ready = True

    def react(self, change: Change) -> None:
        """Bring the rest of the cluster into line with this object."""
        item = change.after
        if change.resource.kind in ("Pod", "Service"):
            about = item or change.before
            self._point_services(about["metadata"]["namespace"])
        if item is None:
            return
        match change.resource.kind:
            case "Pod" if "status" not in item:
                self._run(item)
            case "Deployment":
                self._roll_out(item)
            case "StatefulSet":
                self._stateful(item)
            case "ReplicaSet":
                self._all_ready(REPLICA_SET, item)
            case "PersistentVolumeClaim" if change.before is None:
                self._status(change.resource, item, {"phase": "Bound"})
            case "Job" if change.before is None:
                done = {"type": "Complete", "status": "True"}
                self._status(change.resource, item, {"succeeded": 1, "conditions": [done]})

    def _run(self, pod: Object) -> None:
        self._addresses += 1
        forever = pod["spec"].get("restartPolicy", "Always") == "Always"
        ready = forever and self.pods_ready
        gates = [gate["conditionType"] for gate in pod["spec"].get("readinessGates", [])]
        conditions = [
            {"type": "ContainersReady", "status": str(ready)},
            {"type": "Ready", "status": str(ready and not gates)},
        ]
        address = f"10.0.{self._addresses // 250}.{self._addresses % 250 + 1}"
        phase = "Running" if forever else self.pod_phase
        self._status(POD, pod, {"phase": phase, "podIP": address, "conditions": conditions})

    def _point_services(self, namespace: str) -> None:
        """An EndpointSlice of each Service's pods that have an address."""
        for service in self._store.list(SERVICE, namespace, lambda item: bool(item["spec"].get("selector"))):
            chosen = service["spec"]["selector"].items()
            pods = self._store.list(
                POD,
                namespace,
                lambda pod, chosen=chosen: (
                    chosen <= (pod["metadata"].get("labels") or {}).items()
                    and pod.get("status", {}).get("phase") == "Running"
                    and bool(pod["status"].get("podIP"))
                ),
            )
            self._write_slice(service, pods)

    def _write_slice(self, service: Object, pods: list[Object]) -> None:
        metadata = service["metadata"]
        key = SLICE, metadata["namespace"], f"{metadata['name']}-slice"
        item = {
            "metadata": {
                "name": key[2],
                "labels": {"kubernetes.io/service-name": metadata["name"]},
                "ownerReferences": [_reference(service)],
            },
            "addressType": "IPv4",
            "endpoints": [_endpoint(pod) for pod in pods],
            "ports": [
                {"name": port.get("name", ""), "port": _target(port, pods), "protocol": "TCP"}
                for port in service["spec"].get("ports", [])
            ],
        }
        current = self._store.objects.get(key)
        if current is None:
            self._store.create(*key[:2], item)
        elif any(current[part] != item[part] for part in ("endpoints", "ports")):
            self._store.replace(key, current | {part: item[part] for part in ("endpoints", "ports")})

    def _roll_out(self, item: Object) -> None:
        spec = item["spec"]
        digest = hashlib.sha256(json.dumps(spec["template"], sort_keys=True).encode()).hexdigest()[:10]
        name, namespace = f"{item['metadata']['name']}-{digest}", item["metadata"]["namespace"]
        replicas = {"replicas": spec["replicas"], "selector": spec["selector"], "template": spec["template"]}
        current = self._store.objects.get((REPLICA_SET, namespace, name))
        if current is None:
            self._store.create(REPLICA_SET, namespace, {"metadata": _child(item, name, spec), "spec": replicas})
        elif current["spec"] != replicas:
            self._store.replace((REPLICA_SET, namespace, name), current | {"spec": replicas}, "controller")
        self._all_ready(BY_KIND["apps", "Deployment"], item)

    def _stateful(self, item: Object) -> None:
        spec, namespace = item["spec"], item["metadata"]["namespace"]
        names = [f"{item['metadata']['name']}-{number}" for number in range(spec["replicas"])]
        for name in names:
            if (POD, namespace, name) in self._store.objects:
                continue
            for claim in spec.get("volumeClaimTemplates", []):
                claimed = f"{claim['metadata']['name']}-{name}"
                if (CLAIM, namespace, claimed) not in self._store.objects:
                    self._store.create(CLAIM, namespace, {"metadata": {"name": claimed}, "spec": claim["spec"]})
            pod = {"metadata": _child(item, name, spec), "spec": spec["template"]["spec"]}
            self._store.create(POD, namespace, pod)
        uid = item["metadata"]["uid"]
        for of, where, name in list(self._store.objects):
            if of == POD and where == namespace and name not in names:
                owners = self._store.get(of, where, name)["metadata"].get("ownerReferences", [])
                if any(owner["uid"] == uid for owner in owners):
                    self._store.delete((of, where, name))
        self._all_ready(BY_KIND["apps", "StatefulSet"], item)

    def _all_ready(self, resource: Resource, item: Object) -> None:
        count = item["spec"]["replicas"]
        names = ("replicas", "readyReplicas", "updatedReplicas", "availableReplicas", "currentReplicas")
        revisions = {"currentRevision": "1", "updateRevision": "1"} if resource.kind == "StatefulSet" else {}
        progressing = {"type": "Progressing", "status": "True", "reason": "NewReplicaSetAvailable"}
        conditions = [{"type": "Available", "status": "True"}, progressing]
        counts = dict.fromkeys(names, count)
        observed = {"observedGeneration": item["metadata"]["generation"], "conditions": conditions}
        self._status(resource, item, counts | observed | revisions)

    def _status(self, resource: Resource, item: Object, status: Object) -> None:
        metadata = item["metadata"]
        key = resource, metadata["namespace"], metadata["name"]
        current = self._store.get(*key)
        if current.get("status") != status:
            self._store.replace(key, current | {"status": status}, "kubelet", "status")


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _child(owner: Object, name: str, spec: Object) -> Object:
    """The metadata of an object that its owner makes from a template."""
    template = {key: spec["template"]["metadata"].get(key, {}) for key in ("labels", "annotations")}
    return {"name": name, **template, "ownerReferences": [_reference(owner)]}


def _reference(owner: Object) -> Object:
    about = {"apiVersion": owner["apiVersion"], "kind": owner["kind"], "controller": True}
    return about | {key: owner["metadata"][key] for key in ("name", "uid")}


def _endpoint(pod: Object) -> Object:
    conditions = {one["type"]: one["status"] for one in pod["status"].get("conditions", [])}
    target = {"kind": "Pod", "name": pod["metadata"]["name"], "uid": pod["metadata"]["uid"]}
    ready = {"ready": conditions.get("Ready") == "True"}
    return {"addresses": [pod["status"]["podIP"]], "conditions": ready, "targetRef": target}


def _target(port: Object, pods: list[Object]) -> int:
    """The number of a Service's target port, which may be the name of a container's."""
    target = port.get("targetPort", port["port"])
    containers = [container for pod in pods for container in pod["spec"].get("containers", [])]
    named = {one.get("name"): one["containerPort"] for container in containers for one in container.get("ports", [])}
    return int(target) if str(target).isdecimal() else named.get(target, port["port"])
