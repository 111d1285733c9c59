{{- /*
Combinations that cannot work: each stops the rendering with a sentence that names the value and the remedy. What is
wrong with one value alone is in values.schema.json.
*/ -}}
{{- define "barista.checks" -}}
{{- $values := .Values -}}
{{- $apis := .Capabilities.APIVersions -}}
{{- $mode := $values.ray.mode -}}
{{- $external := eq $mode "external" -}}
{{- $model := $values.model -}}
{{- $inspect := $model.inspect | default dict -}}
{{- $modelKind := include "barista.modelKind" . -}}
{{- $cache := $values.modelCache -}}
{{- $workers := $values.workers -}}
{{- $gpus := int $workers.gpus -}}
{{- $group := int $workers.groupSize -}}
{{- $scaling := $workers.autoscaling -}}
{{- $routers := $values.router.autoscaling -}}
{{- $monitoring := $values.monitoring -}}
{{- $places := gt $gpus 0 | ternary (include "barista.podsAtLeast" . | int) 1 -}}
{{- $room := include "barista.expertRoom" . -}}
{{- $needed := $inspect.expert_bytes | default $inspect.held_bytes | default 0 | int64 -}}
{{- $trunk := 0 -}}
{{- if and $inspect.expert_bytes $inspect.memory_bytes -}}
{{- $trunk = sub (int64 $inspect.memory_bytes) $needed -}}
{{- end -}}
{{- $pulls := and (ne $modelKind "path") (ne $model.pull "never") -}}
{{- $makesCache := or (eq $cache.type "emptyDir") (and (eq $cache.type "pvc") (not $cache.pvc.existingClaim)) -}}
{{- $unmounted := include "barista.unmounted" . | fromYamlArray -}}
{{- $headLimit := dig "limits" "memory" "" $values.head.resources -}}
{{- $checks := list
  (list (and (eq $values.device "cuda") (eq $gpus 0))
    "device is cuda, but workers.gpus is 0: set workers.gpus to the GPUs of each worker pod, or device to cpu.")
  (list (and (eq $values.device "cpu") (gt $gpus 0))
    (printf "workers.gpus is %d, but device is cpu: set device to cuda, or workers.gpus to 0." $gpus))

  (list (and (eq $values.tls.mode "secret") (not $values.tls.secretName))
    "tls.mode is secret, but tls.secretName is empty: name a Secret with ca.crt, tls.crt and tls.key for barista.internal, or set tls.mode to generated.")
  (list (and (eq $values.tls.mode "cert-manager") (not ($apis.Has "cert-manager.io/v1")))
    "tls.mode is cert-manager, but the cluster has no cert-manager.io/v1: install cert-manager, or set tls.mode to generated.")

  (list (and (eq $mode "kuberay") (not (or ($apis.Has "ray.io/v1/RayCluster") ($apis.Has "ray.io/v1"))))
    "ray.mode is kuberay, but the cluster has no ray.io/v1 RayCluster: install the KubeRay operator, or set ray.mode to static.")
  (list (and $external (not $values.ray.external.dashboardUrl))
    "ray.mode is external, but ray.external.dashboardUrl is empty: set it to the cluster's dashboard, such as http://ray-head.ray:8265.")
  (list (and $external (not $values.ray.external.tokenSecret))
    "ray.mode is external, but ray.external.tokenSecret is empty: name the Secret that holds the cluster's token under auth_token.")
  (list (and $external (not $values.ray.external.tlsDir))
    "ray.mode is external, but ray.external.tlsDir is empty: set it to the folder of ca.pem, cert.pem and key.pem on the cluster's nodes.")
  (list (and $external (ne $values.tls.mode "secret"))
    "ray.mode is external, but tls.mode is not secret: the router needs a certificate of the authority that the cluster's nodes trust, in tls.secretName.")

  (list (and (eq $modelKind "path") (eq $model.pull "always"))
    (printf "model.pull is always, but model.name is the path %s: set model.pull to auto, or give a hub name." $model.name))
  (list (and (ne $modelKind "path") (eq $model.pull "never") (has $cache.type (list "emptyDir" "image")))
    (printf "model.pull is never, but the cache of %s starts empty: set modelCache.type to pvc or hostPath, or model.pull to auto." $model.name))
  (list (and (eq $cache.type "hostPath") (not $cache.hostPath.path))
    "modelCache.type is hostPath, but modelCache.hostPath.path is empty: set it to a folder of the nodes that user 1000 owns.")
  (list (and (eq $cache.type "image") (not $cache.image.reference))
    "modelCache.type is image, but modelCache.image.reference is empty: set it to the image that holds the model's files.")
  (list (and (eq $cache.type "image") (not (hasPrefix (printf "%s/" $cache.image.mountPath) (printf "%s/" $model.name))))
    (printf "modelCache.type is image, but model.name is %s: set it to a path in %s, where the image is mounted." $model.name $cache.image.mountPath))
  (list (and (eq $cache.type "image") (semverCompare "<1.31-0" .Capabilities.KubeVersion.Version))
    (printf "modelCache.type is image, but Kubernetes %s has no image volumes: use Kubernetes 1.35, or 1.31 with the feature gate ImageVolume, or set modelCache.type to pvc." .Capabilities.KubeVersion.Version))
  (list $unmounted
    (printf "model.name is %s, but nothing is mounted there in the pods of %s: set volumes and volumeMounts of each, or model.pull to never if the pods' image holds the model." $model.name (join ", " $unmounted)))
  (list (and $pulls $makesCache (not $external) (gt (int64 ($inspect.file_bytes | default 0)) (include "barista.bytes" $cache.size | int64)))
    (printf "%s has %s of files, but modelCache.size is %s: raise modelCache.size."
      $model.name (include "barista.gibibytes" ($inspect.file_bytes | default 0)) (toString $cache.size)))
  (list (and $room (gt $needed ($room | default 0 | int64)))
    (printf "%s needs %s for its experts, but the workers have room for %s: raise workers.replicas or workers.resources.limits.memory (or workers.memoryBytes), or set model.format to fewer bits and model.inspect to match."
      $model.name (include "barista.gibibytes" $needed) (include "barista.gibibytes" ($room | default 0))))
  (list (and $trunk $headLimit (eq $gpus 0) (not $external) (gt $trunk (include "barista.bytes" ($headLimit | default 0) | int64)))
    (printf "%s needs %s beside its experts, but the head, where the engine runs, has %s: raise head.resources.limits.memory."
      $model.name (include "barista.gibibytes" $trunk) (toString $headLimit)))

  (list (and (not $external) (gt (int $values.engine.replicas) $places))
    (printf "engine.replicas is %d, but there is room for %d: %s." (int $values.engine.replicas) $places
      (gt $gpus 0 | ternary "each worker pod holds one engine, so raise workers.replicas" "without GPUs the head holds the only one, so set engine.replicas to 1")))

  (list (and $scaling.enabled (lt (int $scaling.maxReplicas) (int $scaling.minReplicas)))
    (printf "workers.autoscaling.maxReplicas is %d, less than minReplicas, %d: raise it." (int $scaling.maxReplicas) (int $scaling.minReplicas)))
  (list (and $scaling.enabled (ne 0 (mod (int $scaling.maxReplicas) $group)))
    (printf "workers.autoscaling.maxReplicas is %d, which is not a whole number of groups: set it to a multiple of workers.groupSize, %d." (int $scaling.maxReplicas) $group))
  (list (and $scaling.enabled (ne 0 (mod (int $scaling.minReplicas) $group)))
    (printf "workers.autoscaling.minReplicas is %d, which is not a whole number of groups: set it to a multiple of workers.groupSize, %d." (int $scaling.minReplicas) $group))
  (list (and (not $scaling.enabled) (ne 0 (mod (int $workers.replicas) $group)))
    (printf "workers.replicas is %d, which is not a whole number of groups: set it to a multiple of workers.groupSize, %d." (int $workers.replicas) $group))
  (list (and $scaling.enabled (or $external (not $values.kubernetes.enabled)))
    "workers.autoscaling.enabled is true, but the deployer may not scale anything: set kubernetes.enabled to true and ray.mode to static or kuberay.")
  (list (and (ne $routers.type "none") (lt (int $routers.maxReplicas) (int $routers.minReplicas)))
    (printf "router.autoscaling.maxReplicas is %d, less than minReplicas, %d: raise it." (int $routers.maxReplicas) (int $routers.minReplicas)))
  (list (and (eq $routers.type "keda") (not ($apis.Has "keda.sh/v1alpha1")))
    "router.autoscaling.type is keda, but the cluster has no keda.sh/v1alpha1: install KEDA, or set router.autoscaling.type to pods.")

  (list (has (toString $values.router.maxUnavailable) (list "0" "0%"))
    "router.maxUnavailable is 0, which blocks every eviction and so every node's drain: set it to 1 or more.")
  (list (eq 0 (int $workers.maxUnavailable))
    "workers.maxUnavailable is 0, which blocks every eviction and so every node's drain: set it to 1 or more.")

  (list (and (or $monitoring.serviceMonitor.enabled $monitoring.podMonitor.enabled $monitoring.rules.enabled) (not ($apis.Has "monitoring.coreos.com/v1")))
    "monitoring asks for objects of monitoring.coreos.com/v1, which the cluster has not: install the Prometheus operator, or set serviceMonitor.enabled, podMonitor.enabled and rules.enabled of monitoring to false.")
-}}
{{- range $checks -}}
{{- if first . -}}
{{- fail (last .) -}}
{{- end -}}
{{- end -}}
{{- end -}}


{{- /* The parts of the values whose pods read the model, but have nothing mounted at or above its path: a list. */ -}}
{{- define "barista.unmounted" -}}
{{- $values := .Values -}}
{{- $cache := $values.modelCache -}}
{{- $missing := list -}}
{{- if and (eq (include "barista.modelKind" .) "path") (ne $values.model.pull "never") -}}
{{- $shared := list "/var/cache/barista" -}}
{{- if eq $cache.type "image" -}}
{{- $shared = append $shared $cache.image.mountPath -}}
{{- end -}}
{{- range $part := eq $values.ray.mode "external" | ternary (list "router") (list "head" "workers" "router") -}}
{{- $folders := $shared -}}
{{- range (get $values $part).volumeMounts -}}
{{- $folders = append $folders (trimSuffix "/" .mountPath) -}}
{{- end -}}
{{- $mounted := false -}}
{{- range $folders -}}
{{- $mounted = or $mounted (hasPrefix (printf "%s/" .) (printf "%s/" $values.model.name)) -}}
{{- end -}}
{{- if not $mounted -}}
{{- $missing = append $missing $part -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- toYaml $missing -}}
{{- end -}}
