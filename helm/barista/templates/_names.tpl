{{- /* Names and labels. Most of them take (dict "root" $ "component" "router"). */ -}}

{{- define "barista.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 45 | trimSuffix "-" -}}
{{- end -}}

{{- /* 45 characters: a StatefulSet's pods carry a label of its name and 18 more, a RayCluster's name has 53 at most. */ -}}
{{- define "barista.fullname" -}}
{{- $name := include "barista.name" . -}}
{{- $full := contains $name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name $name) -}}
{{- .Values.fullnameOverride | default $full | trunc 45 | trimSuffix "-" -}}
{{- end -}}

{{- define "barista.componentName" -}}
{{- printf "%s-%s" (include "barista.fullname" .root) .component -}}
{{- end -}}

{{- /* Where clients come in. */ -}}
{{- define "barista.routerServiceName" -}}
{{- include "barista.fullname" . -}}
{{- end -}}

{{- /* Every Ray pod, engine's and workers' alike: a headless Service. */ -}}
{{- define "barista.rayServiceName" -}}
{{- printf "%s-ray" (include "barista.fullname" .) -}}
{{- end -}}

{{- /* What a selector holds; without component: every pod of the release. */ -}}
{{- define "barista.selectorLabels" -}}
app.kubernetes.io/name: {{ include "barista.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end -}}

{{- define "barista.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{ include "barista.selectorLabels" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
app.kubernetes.io/part-of: barista
{{- with .root.Values.labels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- /* An object's metadata. name: in place of <fullname>-<component>. labels, annotations: in addition. */ -}}
{{- define "barista.metadata" -}}
name: {{ .name | default (include "barista.componentName" .) }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "barista.labels" . | nindent 2 }}
  {{- with .labels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with merge (dict) (.annotations | default dict) .root.Values.annotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "barista.image" -}}
{{- $image := .Values.image -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $image.repository $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $image.repository ($image.tag | default (printf "%s-%s" .Chart.AppVersion .Values.device)) -}}
{{- end -}}
{{- end -}}

{{- define "barista.serviceAccountName" -}}
{{- $shared := dict "head" "ray" "worker" "ray" "remover" "deployer" -}}
{{- include "barista.componentName" (dict "root" .root "component" (get $shared .component | default .component)) -}}
{{- end -}}

{{- define "barista.authSecretName" -}}
{{- .Values.auth.existingSecret | default (printf "%s-auth" (include "barista.fullname" .)) -}}
{{- end -}}

{{- define "barista.tlsSecretName" -}}
{{- eq .Values.tls.mode "secret" | ternary .Values.tls.secretName (printf "%s-tls" (include "barista.fullname" .)) -}}
{{- end -}}
