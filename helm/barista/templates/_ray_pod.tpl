{{- /*
The container of head and workers, the same in a StatefulSet and in a RayCluster. Ports lie below 10000, since Ray
refuses them in the range of its workers.
*/ -}}
{{- define "barista.ray.container" -}}
{{- $root := .root -}}
{{- $isHead := eq .component "head" -}}
- name: ray
  {{- include "barista.container" . | nindent 2 }}
  command: [ray, start]
  args:
    {{- if $isHead }}
    - --head
    {{- end }}
    - --block
    {{- if $isHead }}
    - --port={{ include "barista.port" "gcs" }}
    - --dashboard-host=0.0.0.0
    - --dashboard-port={{ include "barista.port" "dashboard" }}
    {{- else }}
    - --address={{ include "barista.fullname" $root }}-head:{{ include "barista.port" "gcs" }}
    {{- end }}
    - --node-ip-address=$(POD_IP)
    - --num-cpus={{ $isHead | ternary 0 (int $root.Values.workers.numCpus) }}
    - {{ printf "--resources=%s" (include "barista.rayResources" .) | squote }}
    - --node-manager-port=6380
    - --object-manager-port=6381
    - --runtime-env-agent-port=6382
    - --dashboard-agent-grpc-port=6383
    - --dashboard-agent-listen-port={{ include "barista.port" "agent" }}
    - --metrics-export-port={{ include "barista.port" "metrics" }}
    - --min-worker-port=10002
    - --max-worker-port=10999
    - --object-store-memory={{ int64 $root.Values.ray.objectStoreMemory }}
    - --disable-usage-stats
    {{- if $root.Values.kubernetes.nodeLabels }}
    - --labels-file=/run/barista/labels.yaml
    {{- end }}
  ports:
    {{- if $isHead }}
    - {name: gcs-server, containerPort: {{ include "barista.port" "gcs" }}}
    - {name: dashboard, containerPort: {{ include "barista.port" "dashboard" }}}
    {{- end }}
    - {name: engine, containerPort: {{ include "barista.port" "engine" }}}
    - {name: controller, containerPort: {{ include "barista.port" "controller" }}}
    - {name: metrics, containerPort: {{ include "barista.port" "metrics" }}}
    - {name: agent, containerPort: {{ include "barista.port" "agent" }}}
  env:
    {{- include "barista.fieldEnv" (dict "POD_IP" "status.podIP" "POD_NAME" "metadata.name" "NODE_NAME" "spec.nodeName") | trim | nindent 4 }}
    {{- include "barista.homeEnv" $root | nindent 4 }}
    {{- include "barista.tokenEnv" $root | nindent 4 }}
    {{- include "barista.poolTokenEnv" $root | nindent 4 }}
    # The pod's limit is the only one: Ray's own would kill the largest worker for a busy neighbour.
    - name: RAY_memory_monitor_refresh_ms
      value: "0"
    - name: RAY_worker_niceness
      value: "0"
    - name: RAY_USAGE_STATS_ENABLED
      value: "0"
    # preStop has moved all of ours away: Ray need not wait half a minute for actors to leave.
    - name: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S
      value: "2"
    {{- with .values.env }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  resources:
    {{- include "barista.rayPodResources" . | nindent 4 }}
  startupProbe:
    {{- include "barista.rayProbe" (dict "component" .component "seconds" .values.startupSeconds) | nindent 4 }}
  livenessProbe:
    {{- include "barista.rayProbe" (dict "component" "worker" "seconds" 60) | nindent 4 }}
  readinessProbe:
    {{- include "barista.rayProbe" (dict "component" .component "seconds" 10) | nindent 4 }}
  lifecycle:
    preStop:
      exec:
        command: [barista, drain, --node, --timeout, {{ sub (include "barista.gracePeriod" .) 30 | quote }}]
  volumeMounts:
    {{- include "barista.folderMounts" $root | nindent 4 }}
    {{- include "barista.tlsMount" (dict) | nindent 4 }}
    {{- include "barista.modelMounts" $root | nindent 4 }}
    - name: shm
      mountPath: /dev/shm
    {{- if $root.Values.kubernetes.nodeLabels }}
    - name: node-labels
      mountPath: /run/barista
      readOnly: true
    {{- end }}
    {{- with .values.volumeMounts }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}

{{- /* Places, not amounts: Ray starts an actor of ours only where there is one. On GPUs an engine sits with its workers. */ -}}
{{- define "barista.rayResources" -}}
{{- $gpus := int .root.Values.workers.gpus -}}
{{- $places := dict -}}
{{- if eq .component "worker" -}}
{{- $_ := set $places "barista_worker" (add (include "barista.workersPerPod" .root) .values.jobPlaces) -}}
{{- end -}}
{{- if eq (eq .component "worker") (gt $gpus 0) -}}
{{- $_ := set $places "barista_engine" 1 -}}
{{- end -}}
{{- toJson $places -}}
{{- end -}}

{{- define "barista.rayPodResources" -}}
{{- $resources := deepCopy .values.resources -}}
{{- if and (eq .component "worker") .values.gpus -}}
{{- $gpus := dict .values.gpuResource (int .values.gpus) -}}
{{- $resources = merge (dict "limits" $gpus "requests" $gpus) $resources -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{- /* The raylet answers without a token; a head is only up when its GCS is. Liveness asks the raylet of both. */ -}}
{{- define "barista.rayProbe" -}}
{{- $head := dict "path" "/api/gcs_healthz" "port" (include "barista.port" "dashboard") -}}
{{- $node := dict "path" "/api/local_raylet_healthz" "port" (include "barista.port" "agent") -}}
{{- include "barista.probe" (merge (dict "period" 5 "seconds" .seconds) (eq .component "head" | ternary $head $node)) -}}
{{- end -}}

{{- define "barista.fieldEnv" -}}
{{- range $name, $path := . }}
- name: {{ $name }}
  valueFrom:
    fieldRef:
      fieldPath: {{ $path }}
{{- end }}
{{- end -}}

{{- define "barista.nodeLabelsContainer" -}}
- name: node-labels
  {{- include "barista.container" . | nindent 2 }}
  command: [barista]
  args: [node-labels, --output, /run/barista/labels.yaml]
  env:
    {{- include "barista.fieldEnv" (dict "NODE_NAME" "spec.nodeName") | trim | nindent 4 }}
    {{- include "barista.homeEnv" .root | nindent 4 }}
  resources:
    {{- toYaml .values.resources | nindent 4 }}
  volumeMounts:
    {{- include "barista.folderMounts" .root | nindent 4 }}
    {{- include "barista.apiTokenMount" .root | nindent 4 }}
    - name: node-labels
      mountPath: /run/barista
{{- end -}}

{{- define "barista.rayVolumes" -}}
- name: shm
  emptyDir:
    medium: Memory
    sizeLimit: {{ include "barista.sharedMemory" . }}
{{- if .Values.kubernetes.nodeLabels }}
- name: node-labels
  emptyDir: {}
{{- end }}
{{- end -}}
