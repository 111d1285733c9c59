{{- /* What follows from the values, asked for in more than one place. A yes is "true", a no "". */ -}}

{{- define "barista.dashboardUrl" -}}
{{- if eq .Values.ray.mode "external" -}}
{{- trimSuffix "/" .Values.ray.external.dashboardUrl -}}
{{- else -}}
http://{{ include "barista.fullname" . }}-head:{{ include "barista.port" "dashboard" }}
{{- end -}}
{{- end -}}

{{- define "barista.port" -}}
{{- get (dict
  "http" 8000
  "grpc" 50053
  "engine" 50051
  "controller" 50052
  "gcs" 6379
  "dashboard" 8265
  "metrics" 8080
  "agent" 52365
  "health" 8090
) . -}}
{{- end -}}

{{- /* Whether a component calls the Kubernetes API and so gets a token. */ -}}
{{- define "barista.callsKubernetes" -}}
{{- $values := .root.Values -}}
{{- if eq .component "ray" -}}
{{- if $values.kubernetes.nodeLabels -}}true{{- end -}}
{{- else if and (has .component (list "deployer" "router")) $values.kubernetes.enabled (ne $values.ray.mode "external") -}}
true
{{- end -}}
{{- end -}}

{{- /* The model comes from the hub, over HTTPS. */ -}}
{{- define "barista.pullsModel" -}}
{{- if and (eq (include "barista.modelKind" .) "hub") (ne .Values.model.pull "never") -}}true{{- end -}}
{{- end -}}

{{- define "barista.modelKind" -}}
{{- if hasPrefix "/" .Values.model.name -}}
path
{{- else if contains "/" .Values.model.name -}}
hub
{{- else -}}
built-in
{{- end -}}
{{- end -}}

{{- /* Expert workers: one in a pod, or one for each of its GPUs. */ -}}
{{- define "barista.workersPerPod" -}}
{{- max 1 (int .Values.workers.gpus) -}}
{{- end -}}

{{- /* The deployer says when a worker pod is ready. */ -}}
{{- define "barista.gates" -}}
{{- if and .Values.kubernetes.readinessGates (include "barista.callsKubernetes" (dict "root" . "component" "deployer")) -}}true{{- end -}}
{{- end -}}
