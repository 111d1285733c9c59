{{- /* What containers of several components share. All take (dict "root" $ "component" ... "values" ...). */ -}}

{{- define "barista.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 1000
runAsGroup: 1000
fsGroup: 1000
# A large model cache is not walked through at every start.
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "barista.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- /* The start of every container: image, rights, the folders that it may write to. */ -}}
{{- define "barista.container" -}}
image: {{ include "barista.image" .root | quote }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
securityContext:
  {{- include "barista.containerSecurityContext" .root | nindent 2 }}
  {{- if and (eq .component "worker") .values.capabilities }}
    add: {{ toJson .values.capabilities }}
  {{- end }}
{{- end -}}

{{- define "barista.homeEnv" -}}
- name: HOME
  value: /home/barista
- name: BARISTA_CACHE
  value: /var/cache/barista
{{- end -}}

{{- define "barista.tokenEnv" -}}
- name: RAY_AUTH_MODE
  value: token
- name: RAY_AUTH_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ eq .Values.ray.mode "external" | ternary .Values.ray.external.tokenSecret (include "barista.authSecretName" .) }}
      key: auth_token
{{- end -}}

{{- define "barista.poolTokenEnv" -}}
- name: BARISTA_POOL_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ include "barista.authSecretName" . }}
      key: pool_token
{{- end -}}

{{- define "barista.folderMounts" -}}
- name: tmp
  mountPath: /tmp
- name: home
  mountPath: /home/barista
{{- end -}}

{{- define "barista.tlsMount" -}}
- name: tls
  mountPath: {{ .tlsDir | default "/etc/barista/tls" }}
  readOnly: true
{{- end -}}

{{- define "barista.apiTokenMount" -}}
- name: api-token
  mountPath: /var/run/secrets/kubernetes.io/serviceaccount
  readOnly: true
{{- end -}}

{{- define "barista.modelMounts" -}}
- name: model-cache
  mountPath: /var/cache/barista
{{- if eq .Values.modelCache.type "image" }}
- name: model-image
  mountPath: {{ .Values.modelCache.image.mountPath }}
  readOnly: true
{{- end }}
{{- end -}}

{{- /* Makes the model's files, or waits until they are there, before anything reads them. */ -}}
{{- define "barista.modelContainer" -}}
{{- $model := .root.Values.model -}}
{{- $kind := include "barista.modelKind" .root -}}
{{- if and (ne $kind "path") (ne $model.pull "never") }}
- name: model
  {{- include "barista.container" . | nindent 2 }}
  command: [barista]
  {{- if eq $kind "built-in" }}
  args: [models, --prepare, {{ $model.name | quote }}]
  {{- else }}
  args: [pull, {{ $model.name | quote }}{{ if eq .component "router" }}, --tokenizer-only{{ end }}]
  {{- end }}
  env:
    {{- include "barista.homeEnv" .root | nindent 4 }}
    {{- if $model.tokenSecret.name }}
    - name: HF_TOKEN
      valueFrom:
        secretKeyRef: {{ toJson $model.tokenSecret }}
    {{- end }}
    {{- with .values.env }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  resources:
    {{- toYaml .values.resources | nindent 4 }}
  volumeMounts:
    {{- include "barista.folderMounts" .root | nindent 4 }}
    {{- include "barista.modelMounts" .root | nindent 4 }}
{{- end }}
{{- end -}}

{{- /* A router that pulls takes the tokenizer alone: it needs no folder of a node, and so no particular node. */ -}}
{{- define "barista.modelVolumes" -}}
{{- $cache := .root.Values.modelCache -}}
{{- $ownCopy := and (eq .component "router") (include "barista.pullsModel" .root) -}}
- name: model-cache
  {{- if eq $cache.type "pvc" }}
  persistentVolumeClaim:
    claimName: {{ $cache.pvc.existingClaim | default (printf "%s-model" (include "barista.fullname" .root)) }}
  {{- else if and (eq $cache.type "hostPath") (not $ownCopy) }}
  # Made by the kubelet, it would belong to root, and user 1000 could not write to it.
  hostPath: {path: {{ $cache.hostPath.path | quote }}, type: Directory}
  {{- else }}
  emptyDir:
    sizeLimit: {{ $cache.size }}
  {{- end }}
{{- if eq $cache.type "image" }}
- name: model-image
  image:
    reference: {{ $cache.image.reference }}
    pullPolicy: {{ $cache.image.pullPolicy }}
{{- end }}
{{- end -}}

{{- define "barista.tlsVolume" -}}
- name: tls
  secret:
    secretName: {{ include "barista.tlsSecretName" . }}
    defaultMode: 0440
    items:
      - {key: ca.crt, path: ca.pem}
      - {key: tls.crt, path: cert.pem}
      - {key: tls.key, path: key.pem}
{{- end -}}

{{- /* The token as automounting would give it, but only to the container that mounts it. */ -}}
{{- define "barista.apiTokenVolume" -}}
- name: api-token
  projected:
    defaultMode: 0440
    sources:
      - serviceAccountToken:
          path: token
          expirationSeconds: 3600
      - configMap:
          name: kube-root-ca.crt
          items:
            - {key: ca.crt, path: ca.crt}
      - downwardAPI:
          items:
            - path: namespace
              fieldRef:
                fieldPath: metadata.namespace
{{- end -}}

{{- /* A probe of an HTTP path that needs no key. seconds: how long it may fail before that has consequences. */ -}}
{{- define "barista.probe" -}}
httpGet:
  path: {{ .path }}
  port: {{ .port }}
periodSeconds: {{ .period }}
timeoutSeconds: 5
failureThreshold: {{ div (add .seconds .period -1) .period }}
{{- end -}}
