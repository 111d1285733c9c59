{{- /* The chart's arithmetic of memory, in bytes. */ -}}

{{- /* A Kubernetes quantity in bytes, such as 4Gi. */ -}}
{{- define "barista.bytes" -}}
{{- if kindIs "string" . -}}
{{- $number := regexFind "^[0-9.]+" . -}}
{{- $factor := get (dict
  "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "P" 1e15
  "Ki" 1024.0 "Mi" 1048576.0 "Gi" 1073741824.0 "Ti" 1099511627776.0 "Pi" 1125899906842624.0
) (trimPrefix $number .) | default 1.0 -}}
{{- mulf (float64 $number) $factor | int64 -}}
{{- else -}}
{{- int64 . -}}
{{- end -}}
{{- end -}}

{{- /* 12 GiB instead of 12884901888. */ -}}
{{- define "barista.gibibytes" -}}
{{- printf "%.1f GiB" (divf (float64 .) 1073741824.0) -}}
{{- end -}}

{{- /*
A window (cuda/window.h) between an engine and a worker of its pod: for each row of a step its ids, its hidden state and
top-k rows of answer, of at most float32, and 8 KiB of cells, headers and alignment.
*/ -}}
{{- define "barista.windowBytes" -}}
{{- $inspect := .Values.model.inspect | default dict -}}
{{- $rows := int64 (.Values.engine.maxNumBatchedTokens | default 512) -}}
{{- $topK := int64 ($inspect.top_k | default 8) -}}
{{- $rowBytes := mul 4 (int64 ($inspect.hidden_size | default 8192)) -}}
{{- add (mul $rows (add (mul 4 $topK) (mul $rowBytes (add 1 $topK)))) 8192 -}}
{{- end -}}

{{- /*
/dev/shm of a Ray pod: the object store, and windows where the engine shares the pod with workers, which is with GPUs.
Twice, since a worker that comes back gets a new one before the old one is gone. 64 MiB are spare. In MiB.
*/ -}}
{{- define "barista.sharedMemory" -}}
{{- $windows := mul 2 (int64 .Values.workers.gpus) (include "barista.windowBytes" . | int64) -}}
{{- $bytes := add (int64 .Values.ray.objectStoreMemory) $windows 67108864 -}}
{{- printf "%dMi" (div (add $bytes 1048575) 1048576) -}}
{{- end -}}

{{- /* Bytes that the workers together have for experts; "" where the values do not say. */ -}}
{{- define "barista.expertRoom" -}}
{{- $workers := .Values.workers -}}
{{- $limit := dig "limits" "memory" "" $workers.resources -}}
{{- if $workers.memoryBytes -}}
{{- mul (int64 $workers.memoryBytes) (include "barista.podsAtMost" . | int64) (include "barista.workersPerPod" . | int64) -}}
{{- else if and $limit (eq .Values.device "cpu") (ne .Values.ray.mode "external") -}}
{{- div (mul (int64 $workers.memoryPercent) (include "barista.bytes" $limit | int64) (include "barista.podsAtMost" . | int64)) 100 -}}
{{- end -}}
{{- end -}}

{{- define "barista.podsAtLeast" -}}
{{- $workers := .Values.workers -}}
{{- $workers.autoscaling.enabled | ternary $workers.autoscaling.minReplicas $workers.replicas | int -}}
{{- end -}}

{{- define "barista.podsAtMost" -}}
{{- $workers := .Values.workers -}}
{{- $workers.autoscaling.enabled | ternary $workers.autoscaling.maxReplicas $workers.replicas | int -}}
{{- end -}}

{{- /* Worker pods; what the deployer has scaled to stays across an upgrade. */ -}}
{{- define "barista.workerReplicas" -}}
{{- $now := 0 -}}
{{- if eq .Values.ray.mode "kuberay" -}}
{{- range dig "spec" "workerGroupSpecs" list (lookup "ray.io/v1" "RayCluster" .Release.Namespace (include "barista.fullname" .)) -}}
{{- $now = .replicas -}}
{{- end -}}
{{- else -}}
{{- $name := include "barista.componentName" (dict "root" . "component" "worker") -}}
{{- $now = dig "spec" "replicas" 0 (lookup "apps/v1" "StatefulSet" .Release.Namespace $name) -}}
{{- end -}}
{{- min (max (int $now) (include "barista.podsAtLeast" . | int)) (include "barista.podsAtMost" . | int) -}}
{{- end -}}
