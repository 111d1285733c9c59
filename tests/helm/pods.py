"""Rendered pods as local processes: what a kubelet does with a pod, as far as the kernel of one machine can do it.

Each pod has a network namespace of its own on one bridge, a root that is read-only where the pod says so, and its
volumes; each container has its own process namespace, in which its command is process 1, and runs as the pod's user
without capabilities. Names of Services are looked up in /etc/hosts.
"""

from __future__ import annotations

import base64
import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

Document = dict[str, Any]

PATHS = (str(Path(sys.prefix) / "bin"), "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
# What stands for the image: the environment and the checkout.
IMAGE = (sys.prefix, str(Path(__file__).parents[2]))
TOOLS = ("ip", "unshare", "nsenter", "setpriv", "mount")
# The root of a pod is this machine's, seen through a layer that takes what is written while the pod is made.
ROOT = """
set -e
mount -t tmpfs tmpfs "$POD/root"
mkdir "$POD/root/upper" "$POD/root/work" "$POD/root/merged"
root="$POD/root/merged"
mount -t overlay overlay -o "lowerdir=/,upperdir=$POD/root/upper,workdir=$POD/root/work" "$root"
chmod 755 "$root/root"
cp "$POD/hosts" "$root/etc/hosts"
rm -f "$root/etc/resolv.conf"
echo nameserver 127.0.0.1 > "$root/etc/resolv.conf"  # refuses at once what is not in hosts
mount --rbind /proc "$root/proc"
mount --rbind /dev "$root/dev"
while read -r kind source target; do
    target=$(chroot "$root" realpath --canonicalize-missing "$target")  # /var/run is a link
    mkdir -p "$root$target"
    case $kind in
        memory) mount -t tmpfs -o mode=1777 tmpfs "$root$target" ;;
        folder) mount --rbind "$source" "$root$target" ;;
    esac
done < "$POD/mounts"
[ "$READ_ONLY" = no ] || mount -o remount,ro,bind "$root"
touch "$POD/made"
exec sleep infinity
"""


class Network:
    """One bridge with an address for each pod, in 198.18.0.0/15, which is set aside for tests (RFC 2544)."""

    def __init__(self) -> None:
        self.mark = secrets.token_hex(3)
        self._bridge = f"bar{self.mark}"
        self._subnet = f"198.19.{secrets.randbelow(256)}"
        self._hosts = 1
        self.address = f"{self._subnet}.1"

    def new_address(self) -> str:
        """For the next pod."""
        self._hosts += 1
        return f"{self._subnet}.{self._hosts}"

    @contextlib.contextmanager
    def up(self) -> Iterator[Network]:
        """Skips where namespaces cannot be had."""
        missing = [tool for tool in TOOLS if shutil.which(tool) is None]
        if missing or os.geteuid():
            pytest.skip(f"only root may make network namespaces, with {', '.join(missing or TOOLS)}")
        try:
            # An address of its own: else it has that of one of its ports, and changes it when a pod comes or goes. Then
            # the pods send to the old one for up to ten seconds.
            hardware = f"02:00:00:{self.mark[:2]}:{self.mark[2:4]}:{self.mark[4:]}"
            _run("ip", "link", "add", self._bridge, "address", hardware, "type", "bridge")
        except OSError as error:
            pytest.skip(f"network namespaces cannot be had here: {error}")
        try:
            _run("ip", "address", "add", f"{self.address}/24", "dev", self._bridge)
            _run("ip", "link", "set", self._bridge, "up")
            yield self
        finally:
            _run("ip", "link", "del", self._bridge)

    def plug(self, namespace: str, address: str) -> None:
        """Make a namespace with this address on the bridge."""
        device = f"v{self.mark}{address.rpartition('.')[2]}"
        _run("ip", "netns", "add", namespace)
        _run("ip", "link", "add", device, "type", "veth", "peer", "eth0", "netns", namespace)
        _run("ip", "link", "set", device, "master", self._bridge, "up")
        _run("ip", "-n", namespace, "address", "add", f"{address}/24", "dev", "eth0")
        for name in ("lo", "eth0"):
            _run("ip", "-n", namespace, "link", "set", name, "up")
        _run("ip", "-n", namespace, "route", "add", "default", "via", self.address)


@dataclass
class Cluster:
    """What pods share. documents: all that was rendered; environ: of every container, beside its own.

    host_paths: what stands for a volume of this name on every node. token, ca: of the API server, for the pods that ask
    for them. namespace: of the release.
    """

    network: Network
    folder: Path
    documents: Sequence[Document]
    environ: Mapping[str, str] = field(default_factory=dict)
    host_paths: Mapping[str, Path] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    token: str = ""
    ca: bytes = b""
    namespace: str = "default"

    def find(self, kind: str, name: str) -> Document:
        """The rendered document."""
        return next(item for item in self.documents if (item["kind"], item["metadata"]["name"]) == (kind, name))

    def secret(self, name: str) -> dict[str, bytes]:
        """The values of a rendered Secret."""
        return {key: base64.b64decode(text) for key, text in self.find("Secret", name)["data"].items()}


class Pod:
    """One pod of a rendered workload. The Services that it asks for must be in cluster.names before `start`."""

    def __init__(self, cluster: Cluster, name: str, template: Document) -> None:
        self.name = name
        self.spec: Document = template["spec"]
        self.labels: dict[str, str] = dict(template["metadata"]["labels"])
        self.annotations: dict[str, str] = dict(template["metadata"].get("annotations") or {})
        self.address = cluster.network.new_address()
        self._cluster = cluster
        self._folder = cluster.folder / f"{name}-{self.address.rpartition('.')[2]}"
        self._namespace = f"{cluster.network.mark}-{self._folder.name}"
        self._pause: subprocess.Popen[bytes] | None = None
        self._containers: dict[str, subprocess.Popen[bytes]] = {}
        self.refusal = ""  # what the last probe was answered

    def start(self) -> None:
        """Run the init containers to their end, and start the others. Raises AssertionError with what one wrote."""
        self._make()
        for container in self.spec.get("initContainers", ()):
            process = self._launch(container)
            assert process.wait(120) == 0, self.log(container["name"])
        for container in self.spec["containers"]:
            self._containers[container["name"]] = self._launch(container)

    def log(self, container: str = "") -> str:
        """What a container (the first one) has written."""
        return (self._folder / f"{container or self.spec['containers'][0]['name']}.log").read_text(errors="replace")

    def running(self) -> bool:
        """No container has ended."""
        return all(process.poll() is None for process in self._containers.values())

    def wait(self, seconds: float) -> int:
        """The exit status of the first container, when it has ended."""
        return self._containers[self.spec["containers"][0]["name"]].wait(seconds)

    def probe(self, kind: str) -> bool:
        """Whether a probe of the first container (startupProbe, livenessProbe, readinessProbe) succeeds now."""
        container = self.spec["containers"][0]
        get = container[kind]["httpGet"]
        port = get["port"]
        if isinstance(port, str):
            port = next(entry["containerPort"] for entry in container["ports"] if entry["name"] == port)
        try:
            answer = httpx.get(f"http://{self.address}:{port}{get['path']}", timeout=5, trust_env=False)
        except httpx.HTTPError as error:
            self.refusal = str(error)
            return False
        self.refusal = "" if answer.is_success else answer.text
        return answer.is_success

    def exec(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Run a command in the first container, as `kubectl exec` does."""
        container = self.spec["containers"][0]
        inside = ["nsenter", "--target", str(self._first(container["name"])), "--mount", "--net", "--pid", "--root"]
        return subprocess.run(
            [*inside, "env", "--chdir=/", *self._as_user(container), *command],
            env=self._environ(container),
            capture_output=True,
            text=True,
            check=False,
        )

    def stop(self) -> subprocess.CompletedProcess[str] | None:
        """As the kubelet does: the preStop hook, then SIGTERM, then, after the pod's grace period, SIGKILL.

        Returns what came of the hook.
        """
        deadline = time.monotonic() + self.spec["terminationGracePeriodSeconds"]
        (container,) = self.spec["containers"]
        hook = container.get("lifecycle", {}).get("preStop")
        done = self.exec(hook["exec"]["command"]) if hook else None
        process = self._containers[container["name"]]
        if process.poll() is None:
            os.kill(self._first(container["name"]), signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        self.kill()
        return done

    def kill(self) -> None:
        """End all of it at once, as the loss of its node does, and take its network away. Idempotent."""
        for name, process in self._containers.items():
            if process.poll() is None:
                os.kill(self._first(name), signal.SIGKILL)  # and with process 1 all of its namespace
            process.wait()
        if self._pause is not None:
            self._pause.kill()
            self._pause.wait()
            self._pause = None
            _run("ip", "netns", "del", self._namespace)

    def _make(self) -> None:
        """The pod's network and file system, held by a process that does nothing."""
        (self._folder / "root").mkdir(parents=True)
        self._cluster.network.plug(self._namespace, self.address)
        hosts = {"localhost": "127.0.0.1", self.name: self.address} | self._cluster.names
        (self._folder / "hosts").write_text("".join(f"{address} {name}\n" for name, address in hosts.items()))
        (self._folder / "mounts").write_text("".join(f"{line}\n" for line in self._mounts()))
        read_only = self.spec["containers"][0]["securityContext"].get("readOnlyRootFilesystem", False)
        inside = ["ip", "netns", "exec", self._namespace, "unshare", "--mount", "--propagation", "private"]
        with (self._folder / "root.log").open("wb") as log:
            self._pause = subprocess.Popen(
                [*inside, "sh", "-c", ROOT],
                env={"POD": str(self._folder), "READ_ONLY": "yes" if read_only else "no", "PATH": os.environ["PATH"]},
                stderr=log,
            )
        while not (self._folder / "made").exists():
            assert self._pause.poll() is None, (self._folder / "root.log").read_text()
            time.sleep(0.005)

    def _mounts(self) -> Iterator[str]:
        """Lines of: how, from where, to where."""
        containers = [*self.spec.get("initContainers", ()), *self.spec["containers"]]
        targets = {mount["mountPath"]: mount for container in containers for mount in container.get("volumeMounts", ())}
        volumes = {volume["name"]: volume for volume in self.spec.get("volumes", ())}
        for target in sorted(targets):
            volume = volumes[targets[target]["name"]]
            if volume.get("emptyDir", {}).get("medium") == "Memory":
                yield f"memory none {target}"
            else:
                yield f"folder {self._volume(volume)} {target}"
        for folder in IMAGE:  # which a volume may hide: a checkout below /tmp
            if any(Path(folder).is_relative_to(target) for target in targets):
                yield f"folder {folder} {folder}"

    def _volume(self, volume: Document) -> Path:
        """A folder with the volume's content."""
        name = volume["name"]
        if name in self._cluster.host_paths:
            return self._cluster.host_paths[name]
        folder = self._folder / "volumes" / name
        if not folder.exists():
            folder.mkdir(parents=True)
            for path, content in self._files(volume).items():
                (folder / path).write_bytes(content)
            for path in (folder, *folder.iterdir()):
                os.chown(path, self._user, self._user)
        return folder

    def _files(self, volume: Document) -> dict[str, bytes]:
        if "secret" in volume:
            values = self._cluster.secret(volume["secret"]["secretName"])
            items = volume["secret"].get("items") or [{"key": key, "path": key} for key in values]
            return {item["path"]: values[item["key"]] for item in items}
        if "projected" in volume:
            known = {"token": self._cluster.token.encode(), "ca.crt": self._cluster.ca}
            return known | {"namespace": self._cluster.namespace.encode()}
        assert "emptyDir" in volume, f"no volume of this kind is known here: {volume}"
        return {}

    @property
    def _user(self) -> int:
        return int(self.spec["securityContext"]["runAsUser"])

    def _as_user(self, container: Document) -> list[str]:
        context = container["securityContext"]
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert context["allowPrivilegeEscalation"] is False
        user = str(self._user)
        return [
            *("setpriv", "--reuid", user, "--regid", user, "--clear-groups"),
            *("--no-new-privs", "--inh-caps=-all", "--bounding-set=-all", "--pdeathsig", "KILL"),
        ]

    def _launch(self, container: Document) -> subprocess.Popen[bytes]:
        assert self._pause is not None
        environ = self._environ(container)
        command = [_expanded(word, environ) for word in [*container["command"], *container.get("args", ())]]
        inside = ["nsenter", "--target", str(self._pause.pid), "--mount", "--net"]
        alone = ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--propagation", "private"]
        # The container's own /proc; then its root.
        begin = ["sh", "-c", 'mount -t proc proc "$0/proc" && exec chroot "$0" "$@"', f"{self._folder}/root/merged"]
        with (self._folder / f"{container['name']}.log").open("wb") as log:
            return subprocess.Popen(
                [*inside, *alone, *begin, *self._as_user(container), *command],
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _first(self, container: str) -> int:
        """The process, as seen from here, that is process 1 of the container."""
        pid = self._containers[container].pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def _environ(self, container: Document) -> dict[str, str]:
        environ = {"PATH": ":".join(PATHS), "HOSTNAME": self.name} | dict(self._cluster.environ)
        for entry in container.get("env", ()):
            environ[entry["name"]] = self._value(entry)
        return environ

    def _value(self, entry: Document) -> str:
        source = entry.get("valueFrom")
        if source is None:
            return str(entry["value"])
        if "secretKeyRef" in source:
            return self._cluster.secret(source["secretKeyRef"]["name"])[source["secretKeyRef"]["key"]].decode()
        fields = {
            "status.podIP": self.address,
            "metadata.name": self.name,
            "metadata.namespace": self._cluster.namespace,
            "spec.nodeName": f"node-of-{self.name}",
        }
        return fields[source["fieldRef"]["fieldPath"]]


def _expanded(word: str, environ: Mapping[str, str]) -> str:
    """With $(NAME) as Kubernetes writes it."""
    for name, value in environ.items():
        word = word.replace(f"$({name})", value)
    return word


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
