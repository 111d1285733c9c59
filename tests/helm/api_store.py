"""What a Kubernetes API server keeps: objects, one revision counter, and the history that watches read."""

from __future__ import annotations

import copy
import datetime
import re
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.helm.api_patch import (
    ApplyConflict,
    Owners,
    PatchError,
    apply_patch,
    json_patch,
    merge_patch,
    strategic_patch,
    take_ownership,
)

Object = dict[str, Any]


@dataclass(frozen=True)
class Resource:
    """One kind of the API. group: empty for the core group."""

    group: str
    version: str
    kind: str
    plural: str
    namespaced: bool = True
    subresources: tuple[str, ...] = ("status",)

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def built_in(self) -> bool:
        """Whether strategic merge patches are known for it."""
        return "." not in self.group or self.group.endswith(".k8s.io")


def _resources() -> list[Resource]:
    scaled = ("status", "scale")
    none = ()
    table = [
        ("", "v1", "Namespace namespaces", ("status",)),
        ("", "v1", "Node nodes", ("status",)),
        ("", "v1", "PersistentVolume persistentvolumes", ("status",)),
        ("", "v1", "Pod pods", ("status",)),
        ("", "v1", "Service services", ("status",)),
        ("", "v1", "PersistentVolumeClaim persistentvolumeclaims", ("status",)),
        ("", "v1", "ReplicationController replicationcontrollers", scaled),
        ("", "v1", "Secret secrets", none),
        ("", "v1", "ConfigMap configmaps", none),
        ("", "v1", "ServiceAccount serviceaccounts", none),
        ("", "v1", "Endpoints endpoints", none),
        ("", "v1", "Event events", none),
        ("apps", "v1", "Deployment deployments", scaled),
        ("apps", "v1", "StatefulSet statefulsets", scaled),
        ("apps", "v1", "ReplicaSet replicasets", scaled),
        ("apps", "v1", "DaemonSet daemonsets", ("status",)),
        ("batch", "v1", "Job jobs", ("status",)),
        ("batch", "v1", "CronJob cronjobs", ("status",)),
        ("policy", "v1", "PodDisruptionBudget poddisruptionbudgets", ("status",)),
        ("autoscaling", "v2", "HorizontalPodAutoscaler horizontalpodautoscalers", ("status",)),
        ("networking.k8s.io", "v1", "NetworkPolicy networkpolicies", none),
        ("networking.k8s.io", "v1", "Ingress ingresses", ("status",)),
        ("rbac.authorization.k8s.io", "v1", "Role roles", none),
        ("rbac.authorization.k8s.io", "v1", "RoleBinding rolebindings", none),
        ("rbac.authorization.k8s.io", "v1", "ClusterRole clusterroles", none),
        ("rbac.authorization.k8s.io", "v1", "ClusterRoleBinding clusterrolebindings", none),
        ("coordination.k8s.io", "v1", "Lease leases", none),
        ("discovery.k8s.io", "v1", "EndpointSlice endpointslices", none),
        ("events.k8s.io", "v1", "Event events", none),
        ("scheduling.k8s.io", "v1", "PriorityClass priorityclasses", none),
        ("ray.io", "v1", "RayCluster rayclusters", ("status",)),
        ("ray.io", "v1", "RayJob rayjobs", ("status",)),
        ("monitoring.coreos.com", "v1", "ServiceMonitor servicemonitors", none),
        ("monitoring.coreos.com", "v1", "PodMonitor podmonitors", none),
        ("monitoring.coreos.com", "v1", "PrometheusRule prometheusrules", none),
        ("cert-manager.io", "v1", "Certificate certificates", ("status",)),
        ("cert-manager.io", "v1", "Issuer issuers", ("status",)),
        ("keda.sh", "v1alpha1", "ScaledObject scaledobjects", ("status",)),
        ("keda.sh", "v1alpha1", "TriggerAuthentication triggerauthentications", ("status",)),
    ]
    whole_cluster = {"namespaces", "nodes", "persistentvolumes", "clusterroles", "clusterrolebindings"}
    found = []
    for group, version, names, subresources in table:
        kind, plural = names.split()
        namespaced = plural not in whole_cluster | {"priorityclasses"}
        found.append(Resource(group, version, kind, plural, namespaced, subresources))
    return found


RESOURCES = _resources()
Key = tuple[Resource, str, str]  # resource, namespace, name


class ApiError(Exception):
    """What the client is told as a Status object."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message


@dataclass(frozen=True)
class Change:
    """One line of the history. before, after: the object, None where there was or is none."""

    revision: int
    resource: Resource
    before: Object | None
    after: Object | None


@dataclass
class Store:
    """Every method may be called from any thread. Objects that are given out are never changed afterwards."""

    changed: Callable[[Change], None] = lambda change: None
    admit: Callable[[Resource, Object], Object] = lambda resource, item: item  # what the server fills in
    lock: Any = field(default_factory=threading.RLock)
    revision: int = 1
    forgotten: int = 0  # watches from before this revision get 410 Gone
    history: list[Change] = field(default_factory=list)
    objects: dict[Key, Object] = field(default_factory=dict)
    owners: dict[Key, Owners] = field(default_factory=dict)

    def get(self, resource: Resource, namespace: str, name: str) -> Object:
        """The object. Raises ApiError 404."""
        with self.lock:
            try:
                return self.objects[resource, namespace if resource.namespaced else "", name]
            except KeyError:
                where = f"{resource.plural}.{resource.group}" if resource.group else resource.plural
                raise ApiError(404, "NotFound", f'{where} "{name}" not found') from None

    def list(self, resource: Resource, namespace: str, matches: Callable[[Object], bool]) -> list[Object]:
        """The objects of one namespace, or of all for ""."""
        with self.lock:
            return [
                item
                for (of, where, _), item in sorted(self.objects.items(), key=lambda entry: entry[0][1:])
                if of == resource and namespace in ("", where) and matches(item)
            ]

    def create(
        self,
        resource: Resource,
        namespace: str,
        item: Object,
        manager: str = "",
        dry: bool = False,
        with_status: bool = False,
    ) -> Object:
        """Raises ApiError 409 if it is there, 404 if its namespace is not."""
        with self.lock:
            item = self.admit(resource, copy.deepcopy(item))
            metadata = item.setdefault("metadata", {})
            if metadata.get("generateName") and not metadata.get("name"):
                metadata["name"] = metadata["generateName"] + uuid.uuid4().hex[:5]
            namespace = namespace if resource.namespaced else ""
            key = resource, namespace, metadata["name"]
            if resource.namespaced:
                self.get(NAMESPACE, "", namespace)
                metadata["namespace"] = namespace
            if key in self.objects:
                raise ApiError(409, "AlreadyExists", f'{resource.plural} "{metadata["name"]}" already exists')
            if "status" in resource.subresources and not with_status:
                item.pop("status", None)
            now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            metadata |= {"uid": str(uuid.uuid4()), "creationTimestamp": now, "generation": 1}
            item |= {"apiVersion": resource.api_version, "kind": resource.kind}
            if not dry:
                self.owners[key] = {}
                take_ownership({}, item, self.owners[key], manager, built_in=resource.built_in)
                item = self._write(key, None, item)
            return item

    def replace(
        self, key: Key, item: Object, manager: str = "", subresource: str = "", dry: bool = False, own: bool = True
    ) -> Object:
        """Update the object, or its status. Raises ApiError 409 where the item carries another resourceVersion."""
        with self.lock:
            old = self.get(*key)
            item = self.admit(key[0], item)
            version = item["metadata"].get("resourceVersion")
            if version and version != old["metadata"]["resourceVersion"]:
                message = "the object has been modified; please apply your changes to the latest version and try again"
                raise ApiError(409, "Conflict", f'Operation cannot be fulfilled on "{key[2]}": {message}')
            if item["metadata"].get("uid", old["metadata"]["uid"]) != old["metadata"]["uid"]:
                raise ApiError(409, "Conflict", f'Precondition failed: UID of "{key[2]}"')
            if subresource == "status":
                item = old | {"status": item.get("status", {})}
            elif "status" in key[0].subresources:
                item = {name: part for name, part in item.items() if name != "status"}
                item |= {"status": old["status"]} if "status" in old else {}
            kept = {name: old["metadata"][name] for name in IMMUTABLE if name in old["metadata"]}
            item = item | {
                "metadata": item["metadata"] | kept | {"resourceVersion": old["metadata"]["resourceVersion"]}
            }
            if item == old or dry:
                return item
            if _spec(item) != _spec(old):
                item["metadata"]["generation"] += 1
            if own:
                take_ownership(old, item, self.owners[key], manager, built_in=key[0].built_in)
            return self._write(key, old, item)

    def patch(self, key: Key, how: str, patch: Any, manager: str, subresource: str, force: bool, dry: bool) -> Object:
        """how: the content type. Raises ApiError 404, 409, 415 and 422."""
        with self.lock:
            if how.startswith("application/apply-patch"):
                return self._apply(key, patch, manager, subresource, force, dry)
            old = self.get(*key)
            try:
                if how == "application/json-patch+json":
                    new = json_patch(old, patch)
                elif how == "application/merge-patch+json":
                    new = merge_patch(old, patch)
                elif how == "application/strategic-merge-patch+json" and key[0].built_in:
                    new = strategic_patch(old, patch)
                else:
                    raise ApiError(415, "UnsupportedMediaType", f"{how} is not known for {key[0].plural}")
            except PatchError as error:
                raise ApiError(422, "Invalid", str(error)) from error
            return self.replace(key, new, manager, subresource, dry)

    def delete(self, key: Key, *, in_history: bool = True, preconditions: Object | None = None) -> Object:
        """Take it and what it owns away. in_history False: no watch will ever hear of it, only a list shows it."""
        with self.lock:
            old = self.get(*key)
            uid = old["metadata"]["uid"]
            if (preconditions or {}).get("uid", uid) != uid:
                raise ApiError(409, "Conflict", "the UID in the precondition does not match")
            del self.objects[key]
            self.owners.pop(key, None)
            self.revision += 1
            if in_history:
                self._remember(Change(self.revision, key[0], old, None))
            for other, item in list(self.objects.items()):
                references = item["metadata"].get("ownerReferences", [])
                if any(reference.get("uid") == uid for reference in references) and other in self.objects:
                    self.delete(other)
            return old

    def forget_history(self) -> None:
        """As a server does after a few minutes: older resource versions are Gone."""
        with self.lock:
            self.revision += 1
            self.forgotten = self.revision
            self.history.clear()

    def since(self, revision: int) -> list[Change]:
        """The changes after this revision. Raises ApiError 410."""
        with self.lock:
            if revision < self.forgotten:
                raise ApiError(410, "Expired", f"too old resource version: {revision} ({self.forgotten})")
            return [change for change in self.history if change.revision > revision]

    def _apply(self, key: Key, wanted: Object, manager: str, subresource: str, force: bool, dry: bool) -> Object:
        if key not in self.objects:
            created = self.create(key[0], key[1], wanted, manager, dry)
            if not dry:
                apply_patch(created, wanted, self.owners[key], manager, force=True, built_in=key[0].built_in)
            return created
        old = self.get(*key)
        owners = copy.deepcopy(self.owners[key])
        try:
            new = apply_patch(old, wanted, owners, manager, force=force, built_in=key[0].built_in)
        except ApplyConflict as error:
            raise ApiError(409, "Conflict", f"Apply failed with 1 conflict: {error}") from error
        result = self.replace(key, new, manager, subresource, dry, own=False)
        if not dry:
            self.owners[key] = owners
        return result

    def _write(self, key: Key, old: Object | None, item: Object) -> Object:
        self.revision += 1
        item["metadata"]["resourceVersion"] = str(self.revision)
        self.objects[key] = item
        self._remember(Change(self.revision, key[0], old, item))
        return self.objects[key]

    def _remember(self, change: Change) -> None:
        self.history.append(change)
        self.changed(change)


IMMUTABLE = ("name", "namespace", "uid", "creationTimestamp", "generation")
NAMESPACE = next(resource for resource in RESOURCES if resource.plural == "namespaces")


def label_matcher(selector: str) -> Callable[[dict[str, str]], bool]:
    """A label selector: `a=b,c!=d,e in (f,g),h notin (i),j,!k`."""
    tests: list[Callable[[dict[str, str]], bool]] = []
    for term in filter(None, re.split(r",(?![^(]*\))", selector)):
        term = term.strip()
        if match := re.fullmatch(r"(\S+)\s+(in|notin)\s+\(([^)]*)\)", term):
            key, verb, values = match[1], match[2], {value.strip() for value in match[3].split(",")}
            tests.append(lambda labels, k=key, v=values, wanted=verb == "in": (labels.get(k) in v) == wanted)
        elif match := re.fullmatch(r"([^=!]+)(==?|!=)(.*)", term):
            key, value = match[1].strip(), match[3].strip()
            tests.append(lambda labels, k=key, v=value, wanted=match[2] != "!=": (labels.get(k) == v) == wanted)
        elif term.startswith("!"):
            tests.append(lambda labels, k=term[1:]: k not in labels)
        else:
            tests.append(lambda labels, k=term: k in labels)
    return lambda labels: all(test(labels) for test in tests)


def field_matcher(selector: str) -> Callable[[Object], bool]:
    """A field selector: `metadata.name=x,status.phase!=Running`."""
    terms = [re.fullmatch(r"([^=!]+)(==?|!=)(.*)", term) for term in filter(None, selector.split(","))]

    def matches(item: Object) -> bool:
        for term in terms:
            value: Any = item
            for part in term[1].split("."):
                value = value.get(part, "") if isinstance(value, dict) else ""
            if (str(value) == term[3]) != (term[2] != "!="):
                return False
        return True

    return matches


def matcher(labels: str, fields: str) -> Callable[[Object], bool]:
    """Both selectors of a request as one predicate."""
    by_label, by_field = label_matcher(labels), field_matcher(fields)
    return lambda item: by_label(item["metadata"].get("labels") or {}) and by_field(item)


def _spec(item: Object) -> Object:
    return {name: part for name, part in item.items() if name not in ("metadata", "status")}
