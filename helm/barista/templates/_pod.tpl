{{- /*
The pod of every component, as a PodTemplateSpec. Takes (dict "root" $ "component" ... "values" ...), where values is the
component's part of values.yaml; its container comes from the template "barista.<component>.container".
*/ -}}
{{- define "barista.pod" -}}
{{- $root := .root -}}
{{- $isRay := has .component (list "head" "worker") -}}
{{- $readsModel := has .component (list "head" "worker" "router") -}}
{{- $apiToken := include "barista.callsKubernetes" (dict "root" $root "component" ($isRay | ternary "ray" .component)) -}}
metadata:
  labels:
    {{- include "barista.selectorLabels" . | nindent 4 }}
    {{- if $isRay }}
    barista.dev/ray: node
    {{- end }}
    {{- with merge (dict) .values.labels $root.Values.labels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- $own := dict }}
  {{- if eq .component "worker" }}
  {{- /* How many workers a pod stands for, for the deployer. */}}
  {{- $own = dict "barista.dev/workers" (include "barista.workersPerPod" $root) }}
  {{- end }}
  {{- with merge $own .values.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "barista.serviceAccountName" . }}
  # Tokens are mounted by name, into the containers that use them.
  automountServiceAccountToken: false
  # Otherwise a Service named barista would set BARISTA_PORT and the like in every pod.
  enableServiceLinks: false
  {{- with $root.Values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  securityContext:
    {{- include "barista.podSecurityContext" $root | nindent 4 }}
  {{- with .values.restartPolicy }}
  restartPolicy: {{ . }}
  {{- end }}
  terminationGracePeriodSeconds: {{ include "barista.gracePeriod" . }}
  {{- if and (eq .component "worker") (include "barista.gates" $root) }}
  readinessGates:
    - conditionType: barista.dev/experts-loaded
  {{- end }}
  {{- with .values.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- with .values.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with .values.schedulerName }}
  schedulerName: {{ . }}
  {{- end }}
  {{- with .values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .values.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .values.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .values.topologyKeys }}
  topologySpreadConstraints:
    {{- range . }}
    - maxSkew: 1
      topologyKey: {{ . }}
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels:
          {{- include "barista.selectorLabels" $ | nindent 10 }}
    {{- end }}
  {{- end }}
  {{- $first := list -}}
  {{- if $readsModel -}}
  {{- $first = concat $first (include "barista.modelContainer" . | fromYamlArray) -}}
  {{- end -}}
  {{- if and $isRay $apiToken -}}
  {{- $first = concat $first (include "barista.nodeLabelsContainer" . | fromYamlArray) -}}
  {{- end -}}
  {{- with $first }}
  initContainers:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    {{- include (printf "barista.%s.container" ($isRay | ternary "ray" .component)) . | nindent 4 }}
  volumes:
    - name: tmp
      emptyDir: {}
    - name: home
      emptyDir: {}
    {{- include "barista.tlsVolume" $root | nindent 4 }}
    {{- if $readsModel }}
    {{- include "barista.modelVolumes" . | nindent 4 }}
    {{- end }}
    {{- if $isRay }}
    {{- include "barista.rayVolumes" $root | nindent 4 }}
    {{- end }}
    {{- if eq .component "router" }}
    {{- include "barista.router.volumes" $root | nindent 4 }}
    {{- end }}
    {{- if $apiToken }}
    {{- include "barista.apiTokenVolume" $root | nindent 4 }}
    {{- end }}
    {{- with .values.volumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}

{{- /* Ray pods drain; the router ends its streams; the deployer has nothing to finish. */ -}}
{{- define "barista.gracePeriod" -}}
{{- if eq .component "router" -}}
{{- add (int .root.Values.engine.drainTimeout) 15 -}}
{{- else -}}
{{- .values.terminationGracePeriodSeconds | default 30 | int -}}
{{- end -}}
{{- end -}}
